"""What an experiment is, what it is given, and what it gives back.

An experiment owns its question: what is asked, how it is run, when it cannot be asked, what it may claim and by which rule, and which
pictures and tables show it. The study runs a list of them and the report lays out what they say; neither knows a metric's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from emolens import stats
from emolens._typing import HookedModel
from emolens.collect.activations import Activations
from emolens.directions.algebra import neutral_components
from emolens.directions.value import EmotionDirections
from emolens.experiments.rows import Row
from emolens.experiments.rules import Claim
from emolens.sets.emotion_sets import EmotionSet
from emolens.sets.external import Labelled

if TYPE_CHECKING:
    import matplotlib.figure


@dataclass(frozen=True, eq=False)
class Stories:
    """The stories of a set as they were read, with what every split and every fit needs of them.

    Attributes:
        emotions: The set.
        acts: All of its texts, neutral ones included.
        seed: Of the folds.
    """

    emotions: EmotionSet
    acts: Activations
    seed: int = 0

    @cached_property
    def main(self) -> Activations:
        """The stories of the main split."""
        return self.acts.select(lambda t: t.split == "main" and t.emotion is not None)

    @cached_property
    def labels(self) -> NDArray[np.intp]:
        """The emotion of each story, by its place in the set."""
        return np.array([self.emotions.names.index(t.emotion or "") for t in self.main.texts])

    @cached_property
    def topics(self) -> list[str]:
        """The topic of each story."""
        return [t.topic or "" for t in self.main.texts]

    @cached_property
    def texts(self) -> list[str]:
        """The stories themselves, in the order of the rows."""
        return [s.text for _, s in self.emotions.texts()]

    @cached_property
    def family_labels(self) -> NDArray[np.intp]:
        """The family of each story's emotion, by its place among the sorted families."""
        families = sorted(set(self.emotions.families.values()))
        of = self.emotions.families
        return np.array([families.index(of[t.emotion or ""]) for t in self.main.texts])

    @cached_property
    def folds(self) -> list[tuple[str, ...]]:
        """The outer folds: whole topics that have stories, stratified by person."""
        return stats.topic_folds(self.emotions.story_topics, seed=self.seed)

    def inner_folds(self, held_out: tuple[str, ...], n_folds: int = 3) -> list[tuple[str, ...]]:
        """Folds of the training topics, for choices that must not see the held-out ones.

        Args:
            held_out: Topics of an outer fold, which are in none of these.
            n_folds: How many.

        Returns:
            Held-out topics of each inner fold, stratified by person.

        Raises:
            ValueError: fewer topics are left than folds.

        Example:
            >>> from emolens.experiments import Stories
            >>> [len(fold) for fold in Stories(stories, acts).inner_folds(("kitchen", "market"))]
            [2, 2, 2]
        """
        kept = {t: person for t, person in self.emotions.story_topics.items() if t not in held_out}
        return stats.topic_folds(kept, n_folds=n_folds, seed=self.seed)

    def neutral_components(
        self, held_out: tuple[str, ...] = (), share: float = 0.5
    ) -> list[torch.Tensor] | None:
        """Neutral components from the neutral texts of every topic but these; one of a topic without stories is in no fold, so always used.

        Args:
            held_out: Topics whose neutral texts are left out.
            share: Of the variance of single neutral tokens that the components explain, 0 to 1.

        Returns:
            `[d_model component]` for each layer, orthonormal; None where the set has no neutral texts.

        Raises:
            ValueError: there are neutral texts, and all of them are of these topics.

        Example:
            >>> from emolens.experiments import Stories
            >>> len(Stories(stories, acts).neutral_components()) == len(acts.layers)
            True
        """
        tokens = self.acts.neutral_tokens
        if tokens is None:
            return None
        return neutral_components(tokens.select(lambda t: t.topic not in held_out).rows, share)

    def without(self, topics: Sequence[str]) -> Activations:
        """The collection without some topics, neutral texts of theirs included.

        Args:
            topics: Names of topics.

        Returns:
            `Activations`, a copy.

        Raises:
            KeyError: a topic that no text here has.

        Example:
            >>> from emolens.experiments import Stories
            >>> "kitchen" in {t.topic for t in Stories(stories, acts).without(["kitchen"]).texts}
            False
        """
        return self.acts.without(topics)


@dataclass(frozen=True)
class Shown:
    """A small table of words to be shown as it is: what was written, or what the vocabulary sees.

    Attributes:
        title: Printed on the fold.
        head: A word for each column.
        rows: As many cells a line as `head` has.
        open: Whether it is shown before anybody opens it.

    Example:
        >>> from emolens.experiments import Shown
        >>> Shown("Written", ("dose", "text"), (("0.1", "The door was open."),)).open
        False
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    open: bool = False


@dataclass(frozen=True)
class Findings:
    """What one experiment found, in plain values: it goes through JSON, so that it is kept and resumed.

    Attributes:
        rows: Every figure.
        shown: Words to be shown as they are.
        chosen: What later experiments may use, such as a block and a dose.
    """

    rows: Sequence[Row] = ()
    shown: Sequence[Shown] = ()
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; the inverse of `from_dict` through JSON.

        Returns:
            "rows" and "shown", a dict each, and "chosen". A figure that is no number stays NaN, which Python's JSON keeps.

        Example:
            >>> from emolens.experiments import Findings, row
            >>> Findings([row("length", "top1", 0.25)]).to_dict()["rows"][0]["value"]
            0.25
        """
        rows, shown = [asdict(r) for r in self.rows], [asdict(s) for s in self.shown]
        return {"rows": rows, "shown": shown, "chosen": dict(self.chosen)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Findings:
        """From what JSON made of `to_dict`.

        Args:
            data: A dict with "rows", "shown" and "chosen".

        Returns:
            `Findings`, as they were written.

        Raises:
            KeyError, TypeError: it is something else.

        Example:
            >>> import json
            >>> from emolens.experiments import Findings, row
            >>> found = Findings([row("length", "top1", 0.25)], [], {"layer": 1})
            >>> Findings.from_dict(json.loads(json.dumps(found.to_dict()))) == found
            True
        """
        shown = [
            Shown(s["title"], tuple(s["head"]), tuple(map(tuple, s["rows"])), s["open"])
            for s in data["shown"]
        ]
        return Findings([Row(**r) for r in data["rows"]], shown, dict(data["chosen"]))


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything an experiment may use.

    Attributes:
        model: The loaded model.
        stories: The set as it was read, with its folds.
        directions: Fitted on all stories.
        layer: Frozen by cross-validation on the stories.
        full: More permutations and draws, every layer, all texts.
        external: Other people's labelled texts, by file name.
        earlier: What the experiments found that this one needs, by name.
    """

    model: HookedModel
    stories: Stories
    directions: EmotionDirections
    layer: int
    full: bool = False
    external: Mapping[str, Labelled] = field(default_factory=dict)
    earlier: Mapping[str, Findings] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of folds, bootstraps, permutations and random directions."""
        return self.stories.seed


@dataclass(frozen=True)
class Gate:
    """Whether a model can be asked at all; a gate is true where it can.

    Attributes:
        reason: Why not, after "cannot be asked:"; empty where it can.
        smallest: A sentence on the smallest effect that the design could have shown.

    Example:
        >>> from emolens.experiments import Gate
        >>> bool(Gate()), bool(Gate("only 3 of 24 pairs have a gap"))
        (True, False)
    """

    reason: str = ""
    smallest: str = ""

    def __bool__(self) -> bool:
        return not self.reason


@dataclass(frozen=True, eq=False)
class View:
    """What a picture or a table is made of: an experiment's findings, and what they are about.

    Attributes:
        findings: Rows, and words to be shown.
        directions: Fitted on all stories, at the reported layer.
        emotions: The set.
    """

    findings: Findings
    directions: EmotionDirections
    emotions: EmotionSet

    @property
    def rows(self) -> Sequence[Row]:
        """The figures that were found."""
        return self.findings.rows


@dataclass(frozen=True)
class Picture:
    """A picture of what was found, with its controls in it.

    Attributes:
        draw: Gives None where there is nothing to draw.
        title: Short.
        caption: What is to be seen, and what it is beside.
        alt: For who cannot see it; the title if it is empty.
    """

    draw: Callable[[View], matplotlib.figure.Figure | None]
    title: str
    caption: str
    alt: str = ""


@dataclass(frozen=True)
class Table:
    """Figures as a table: either rows as they are, or cells of one's own.

    Attributes:
        title: Printed above it, or on the fold.
        rows: Which rows, to be laid out as all rows are.
        cells: Lines of cells, under `head`, where there are no `rows`.
        head: A word for each column of `cells`.
        numeric: Columns that are set to the right, 0-based.
        note: A sentence above it.
        folded: Whether it is to be opened first.
    """

    title: str = ""
    rows: Callable[[View], Sequence[Row]] | None = None
    cells: Callable[[View], Sequence[Sequence[str]]] | None = None
    head: tuple[str, ...] = ()
    numeric: tuple[int, ...] = ()
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Experiment:
    """A question, and everything that belongs to it.

    Attributes:
        name: Short; also that of its file and of its rows.
        question: One sentence, printed above its section.
        paper: Which figure or table of the paper it answers, if any.
        run: From what is given to what is found.
        gate: Can this model or set be asked at all? Fixed before it is run.
        claims: What it may say, each by a rule of `rules.RULES`.
        shows: Pictures and tables, in the order of the page.
        needs: Experiments that must have run before.
        method: How it was asked, in a sentence or two.
    """

    name: str
    question: str
    paper: str | None
    run: Callable[[Inputs], Findings]
    gate: Callable[[Findings], Gate] | None = None
    claims: tuple[Claim, ...] = ()
    shows: tuple[Picture | Table, ...] = ()
    needs: tuple[str, ...] = ()
    method: str = ""

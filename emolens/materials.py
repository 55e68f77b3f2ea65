"""Materials of the experiments besides stories: small files of prompts, each checked when it is read.

Pairs and openings for causal tests; scenarios that imply an emotion; sentences in which only a number changes; negation, carried-over
prefixes and who feels what; activities to prefer; dialogues of two speakers with two emotions; dialogues that hide one. Emotions are
named as in the sets: `core`'s names for scenarios, intensities and items, the paper's words (`emotions171`) for dialogues; an
`EmotionSet.concepts` joins the two. Each loader reads the shipped file, or one of your own of the same form.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from emolens._files import Strict, Word, here, read_jsonl, read_yaml, validate
from emolens.emotion_sets import Turn, data_root

Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
Category = Literal["helpful", "engaging", "social", "self-curiosity", "neutral", "aversive", "misaligned", "unsafe"]


class Pair(Strict):
    """A clean and a corrupted prompt that differ in one fact, and so in what someone feels; `control` changes a fact that does not matter.

    Each prompt ends where the word for the feeling would come.
    """

    id: Word
    clean: Prompt
    corrupted: Prompt
    control: Prompt
    emotion_clean: Word
    emotion_corrupted: Word


class Stems(Strict):
    """Openings whose next word could name a feeling: some to choose a layer and a dose on, others to report."""

    choose: Annotated[list[str], Field(min_length=1)]
    report: Annotated[list[str], Field(min_length=1)]


class Scenario(Strict):
    """What someone writes about their day, from which an emotion follows that is never named.

    Layers are chosen on `split` "main" and results reported on "test".
    """

    id: Word
    emotion: Word
    split: Literal["main", "test"]
    text: Prompt


class Intensity(Strict):
    """A sentence in which only a number changes, and how emotions change as it grows.

    Attributes:
        text: With {x} where the number stands.
        values: Growing.
        expected: +1 for an emotion that grows with the number, -1 for one that falls.
    """

    id: Word
    text: Annotated[str, Field(pattern=r"\{x\}")]
    values: Annotated[list[int | float], Field(min_length=3)]
    unit: str = ""
    expected: Annotated[dict[Word, Literal[-1, 1]], Field(min_length=1)]

    @model_validator(mode="after")
    def _growing(self) -> Intensity:
        if any(a >= b for a, b in zip(self.values, self.values[1:], strict=False)):
            raise ValueError(f"values must grow from each to the next, found {self.values}")
        return self

    @property
    def texts(self) -> list[str]:
        """The sentence with each of its numbers."""
        return [self.text.replace("{x}", f"{value:,}" if value >= 10_000 else f"{value:g}") for value in self.values]


class Negation(Strict):
    """One sentence that affirms an emotion, and the same one negated."""

    id: Word
    kind: Literal["negation"]
    emotion: Word
    affirmed: Prompt
    negated: Prompt


class Prefix(Strict):
    """A neutral text behind an emotional prefix, or behind a flat one (`control`) of like length."""

    id: Word
    kind: Literal["prefix"]
    emotion: Word
    prefix: Prompt
    control: Prompt
    text: Prompt


class Feeler(Strict):
    """Someone in a text, and what they feel."""

    name: Word
    emotion: Word


class PersonBinding(Strict):
    """A text in which two people feel different things."""

    id: Word
    kind: Literal["person"]
    text: Prompt
    persons: Annotated[list[Feeler], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _there(self) -> PersonBinding:
        absent = [p.name for p in self.persons if p.name not in self.text]
        if absent or self.persons[0].emotion == self.persons[1].emotion:
            raise ValueError(f"both people must be in the text, with different emotions (not in the text: {absent})")
        return self


Item = Annotated[Negation | Prefix | PersonBinding, Field(discriminator="kind")]


class Activity(Strict):
    """Something one could be asked to do: fits "Would you prefer to {text}" and "How would you feel about being asked to {text}?"."""

    id: Word
    category: Category
    text: Prompt


class FeltTurn(Turn):
    """A turn with the emotion of its speaker (`own`) and of the one who listens (`other`)."""

    own: Word
    other: Word


class FeltDialogue(Strict):
    """Two speakers in turn, each with an emotion that lasts: whose turn it is, by whose emotion it is."""

    id: Word
    topic: Word
    emotions: dict[Word, Word]
    turns: Annotated[list[FeltTurn], Field(min_length=2)]

    @model_validator(mode="after")
    def _labels(self) -> FeltDialogue:
        if len(self.emotions) != 2:
            raise ValueError(f"a dialogue has two speakers, found {sorted(self.emotions)}")
        _alternate(self.turns, set(self.emotions))
        for k, turn in enumerate(self.turns):
            other = next(e for s, e in self.emotions.items() if s != turn.speaker)
            if (turn.own, turn.other) != (self.emotions[turn.speaker], other):
                raise ValueError(f"turn {k}: own and other are not what `emotions` says")
        return self


class Span(Strict):
    """Characters [start, end) of one turn, both counted from 0."""

    turn: Annotated[int, Field(ge=0)]
    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=1)]


class Deflection(Strict):
    """A dialogue in which one speaker feels one thing and shows another; `spans` are where the mask speaks."""

    id: Word
    topic: Word
    felt: Word
    displayed: Word
    speaker: Word
    turns: Annotated[list[Turn], Field(min_length=2)]
    spans: Annotated[list[Span], Field(min_length=1)]

    @model_validator(mode="after")
    def _spans(self) -> Deflection:
        speakers = {t.speaker for t in self.turns}
        if len(speakers) != 2 or self.speaker not in speakers or self.felt == self.displayed:
            raise ValueError("two speakers, one of them `speaker`, and two different emotions are needed")
        _alternate(self.turns, speakers)
        for span in self.spans:
            turn = self.turns[span.turn] if span.turn < len(self.turns) else None
            if turn is None or turn.speaker != self.speaker or not span.start < span.end <= len(turn.text):
                raise ValueError(f"the span {span.model_dump()} is not inside a turn of speaker {self.speaker!r}")
        return self


def _alternate(turns: Any, speakers: set[str]) -> None:
    said = [t.speaker for t in turns]
    if set(said) != speakers or any(a == b for a, b in itertools.pairwise(said)):
        raise ValueError(f"the speakers {sorted(speakers)} must take turns, found {said}")


def load_pairs(path: str | Path | None = None) -> tuple[Pair, ...]:
    """Clean and corrupted prompts for activation patching: the 60 shipped ones, or a JSON-lines file of your own.

    Raises:
        FileNotFoundError, ValueError: no such file; what is wrong in which line.
    """
    pairs: tuple[Pair, ...] = _load("pairs.jsonl", path, Pair)
    for p in pairs:
        if p.clean in (p.corrupted, p.control):
            other = "corrupted" if p.clean == p.corrupted else "control"
            raise ValueError(f"{path or 'pairs.jsonl'}: pair {p.id!r}: clean and {other} are the same prompt")
    return pairs


def load_stems(path: str | Path | None = None) -> Stems:
    """Openings for validation steering: the 24 shipped ones, or a YAML file of your own.

    Raises:
        FileNotFoundError, ValueError: no such file; what is wrong in which line.
    """
    file = data_root() / "stems.yaml" if path is None else here(path)
    lines, data = read_yaml(file)
    stems = validate(Stems, data, file, lines)
    if both := set(stems.choose) & set(stems.report):
        raise ValueError(f"{file}: {sorted(both)[0]!r} is in both halves; what was chosen on cannot be reported on")
    return stems


def load_scenarios(path: str | Path | None = None) -> tuple[Scenario, ...]:
    """Implicit scenarios: 48 to choose a layer on and 48 to report, two of each for every emotion of `core`; or a file of your own."""
    return _load("scenarios.jsonl", path, Scenario)


def load_intensities(path: str | Path | None = None) -> tuple[Intensity, ...]:
    """Sentences in which only a number changes, with the expected sign for each emotion; or a file of your own.

    Reference:
        The paper's numeric-intensity templates; six points are too few (a random direction often reaches rho = 1), so these have eight.
    """
    return _load("intensities.jsonl", path, Intensity)


def load_items(path: str | Path | None = None) -> tuple[Negation | Prefix | PersonBinding, ...]:
    """Negation, carried-over prefixes and person binding: 40 shipped items, told apart by `kind`; or a file of your own."""
    return _load("items.jsonl", path, Item)


def load_activities(path: str | Path | None = None) -> tuple[Activity, ...]:
    """64 activities in eight categories, for preferences; or a file of your own."""
    return _load("activities.jsonl", path, Activity)


def load_dialogues(path: str | Path | None = None) -> tuple[FeltDialogue, ...]:
    """Two-speaker dialogues on a grid of 15 x 15 emotions; or a file of your own."""
    return _load("dialogues.jsonl", path, FeltDialogue)


def load_deflections(path: str | Path | None = None) -> tuple[Deflection, ...]:
    """Dialogues in which a speaker hides what they feel behind another emotion; or a file of your own."""
    return _load("deflections.jsonl", path, Deflection)


def _load(name: str, path: str | Path | None, model: Any) -> tuple[Any, ...]:
    file = data_root() / name if path is None else here(path)
    records = tuple(read_jsonl(file, model))
    if not records:
        raise ValueError(f"{file}: empty")
    most = Counter(r.id for r in records).most_common(1)[0]
    if most[1] > 1:
        raise ValueError(f"{file}: two records have the id {most[0]!r}")
    return records


CATEGORIES: tuple[str, ...] = get_args(Category)

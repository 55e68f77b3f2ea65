"""Does a direction fitted in one language read another, on topics that no language has shown it?

Sets that are parallel by concept and topic (`core` and its translations) are cut into folds of whole topics, the same in every language.
Directions, reference mean, neutral components and layer come from the training topics of one language; the held-out topics of every
language are read. Read with the stored reference of the training language a change of language shifts every score, so each cell is
given twice: "training reference", and "language-centred", by the unlabelled mean of the read language's training topics. Beside it the
embedding twin, TF-IDF within a language, the same procedure with labels shuffled within topic, and a twin that sees only how a story is built:
a translation keeps its sentences and its speech, so form crosses languages too. Parallel stories also share their plots, so the cosine of two
languages' directions is of directions fitted on different topics; that of one language with itself says how high it can be, with half of
the topics on a side. Primary rows: language-centred top-1, one a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from emolens import stats
from emolens._typing import Blocks, HookedModel
from emolens.collect.forward import collect_resid_post
from emolens.directions.algebra import mean_differences
from emolens.experiments.base import Stories
from emolens.experiments.fitting import Fit, Training, against_shuffled
from emolens.experiments.rows import Row, judged, row
from emolens.experiments.rules import RULES
from emolens.sets import EmotionSet, load_emotion_set

NAME = "languages"
Array = NDArray[np.floating]
READOUTS = ("language-centred", "training reference")


@dataclass(frozen=True, eq=False)
class Languages:
    """Accuracy from every language to every language.

    Attributes:
        names: The languages, in order.
        rows: All figures, with their controls.
        concepts, topics: What the sets share.
        layers: The layer of each fold, by language.
    """

    names: tuple[str, ...]
    rows: list[Row]
    concepts: tuple[str, ...]
    topics: tuple[str, ...]
    layers: dict[str, tuple[int, ...]]

    def matrix(
        self, metric: str = "top1", *, readout: str = "language-centred", control: str | None = None
    ) -> Array:
        """Values `[fitted in, read in]` of one metric; NaN where there is none (TF-IDF across languages).

        Args:
            metric: "top1" or "auc".
            readout: "language-centred" or "training reference", by which mean was subtracted.
            control: None for the directions; "embed", "form" or "tfidf" for a twin.

        Returns:
            `[fitted in, read in]`, in the order of `names`.

        Example:
            >>> import dataclasses
            >>> other = dataclasses.replace(stories, name="other", language="de")
            >>> found = em.compare_languages(model, [stories, other], layers=[1], n_shuffles=2, progress=False)
            >>> found.matrix("auc").shape
            (2, 2)
        """
        out = np.full((len(self.names), len(self.names)), np.nan)
        for r in self.rows:
            twin = r.control if r.control in ("embed", "form", "tfidf") else None
            if r.metric == metric and r.readout == readout and twin == control and r.split:
                a, b = r.split.split(" -> ")
                out[self.names.index(a), self.names.index(b)] = r.value
        return out

    def __repr__(self) -> str:
        cells = {r.split: r for r in self.rows if r.primary}
        width, above_null = 26, RULES["above_null"]
        lines = [
            f"top-1 of {len(self.concepts)} emotions (chance {1 / len(self.concepts):.2f}), fitted in a row's language, read in a column's, topics held out",
            "".join(["".ljust(8), *(name.ljust(width) for name in self.names)]),
        ]
        for a in self.names:
            found = [cells[f"{a} -> {b}"] for b in self.names]
            cell = [
                f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]{'' if above_null(r) == 'shown' else ' n.s.'}"
                for r in found
            ]
            lines.append("".join([a.ljust(8), *(c.ljust(width) for c in cell)]))
        null = max(
            (r.null_high for r in cells.values() if r.null_high is not None), default=float("nan")
        )
        form = self.matrix(control="form")
        lines.append(f"story form alone: {np.nanmin(form):.2f} to {np.nanmax(form):.2f}")
        lines.append(f"n.s.: not above 95 % of shuffled labels (at most {null:.2f}) with p < .05")
        return "\n".join(line.rstrip() for line in lines)


def compare_languages(
    model: HookedModel,
    sets: Sequence[EmotionSet | str] = ("core", "core_zh", "core_ja", "core_de"),
    *,
    layers: Blocks | None = None,
    n_shuffles: int = 200,
    seed: int = 0,
    progress: bool | None = None,
) -> Languages:
    """Accuracy of emotion directions within and across languages, with controls.

    Args:
        model: The loaded model; it should have been trained on all the languages.
        sets: Sets of different languages that share concepts (`Emotion.concept`, else the name) and topics.
        layers: Blocks to choose from; None is every one.
        n_shuffles: Label shuffles for the null of each cell; with fewer than 100 neither p nor a 95 % point is given.
        seed: Of folds, resamples and shuffles.
        progress: Show a bar while the stories are read; None shows one where it lasts and somebody can see it.

    Returns:
        `Languages`; print it for the matrix.

    Raises:
        ValueError: fewer than two sets, two of one language, or fewer than two shared concepts or four shared topics.

    Example:
        >>> import dataclasses
        >>> other = dataclasses.replace(stories, name="other", language="de")
        >>> em.compare_languages(model, [stories, other], layers=[1], n_shuffles=2, progress=False)
        top-1 of 4 emotions (chance 0.25), fitted in a row's language, read in a column's, topics held out
                en                        de
        ...
    """
    loaded = [load_emotion_set(s) if isinstance(s, str) else s for s in sets]
    names = [s.language for s in loaded]
    if len(loaded) < 2 or len(set(names)) < len(names):
        raise ValueError(f"give two or more sets of different languages, got {names}")
    concepts = [c for c in loaded[0].concepts if all(c in s.concepts for s in loaded)]
    person = loaded[0].story_topics
    topics = [t for t in person if all(s.story_topics.get(t) == person[t] for s in loaded)]
    if len(concepts) < 2 or len(topics) < 4:
        raise ValueError(
            f"the sets share {len(concepts)} concepts and {len(topics)} topics (of the same person); at least 2 and 4 are needed"
        )
    folds = stats.topic_folds({t: person[t] for t in topics}, seed=seed)
    languages = []
    for s in loaded:
        cut = _aligned(s, concepts, topics)
        acts = collect_resid_post(model, cut, layers=layers, progress=progress)
        languages.append(_Language(Stories(cut, acts, seed), folds))
    same = _cosines(languages, {t: person[t] for t in topics})
    out = [r for a in languages for r in _row_of_cells(a, languages, n_shuffles)] + same
    chosen = {t.name: tuple(t.stories.acts.layers[k] for k in t.slots) for t in languages}
    return Languages(tuple(names), out, tuple(concepts), tuple(topics), chosen)


def _aligned(s: EmotionSet, concepts: Sequence[str], topics: Sequence[str]) -> EmotionSet:
    """The shared part of a set, its emotions in the order of the concepts."""
    s = s.subset([s.concepts[c] for c in concepts])
    kept = {
        e: tuple(t for t in told if t.topic in topics and t.split == "main")
        for e, told in s.stories.items()
    }
    apart = {t.name for t in s.topics} - set(s.story_topics)  # of neutral texts alone: in no fold
    wanted = {*topics, *apart}
    neutral = tuple(n for n in s.neutral if n.topic in wanted)
    return replace(
        s, topics=tuple(t for t in s.topics if t.name in wanted), stories=kept, neutral=neutral
    )


class _Language:
    """One language: its stories by fold, and what each fold fitted on its training topics."""

    def __init__(self, stories: Stories, folds: list[tuple[str, ...]]) -> None:
        self.stories, self.folds, self.name = stories, folds, stories.emotions.language
        self.rows, self.embed, self.y = stories.main.rows, stories.main.embed, stories.labels
        form = stats.form_features(stories.texts, self.name)
        # on one scale, by all stories of the language but no label
        self.form = (form - form.mean(0)) / form.std(0).clip(1e-12)
        self.training = [Training(stories, held) for held in folds]
        self.inside = [fold.inside for fold in self.training]
        self.slots = [fit.slot for fit in self.fit(self.y)]

    def fit(self, labels: NDArray[np.integer]) -> list[Fit]:
        """Layer, directions and reference of every fold, from its training topics."""
        return [fold.fit(labels) for fold in self.training]

    def without(self, topics: Sequence[str], slot: int) -> Array:
        """Unit vectors `[emotion d_model]` from the stories and neutral texts of all topics but these."""
        rest = torch.from_numpy(~np.isin(np.asarray(self.stories.topics), list(topics)))
        components = self.stories.neutral_components(tuple(topics))
        vectors = mean_differences(
            self.rows[rest][:, [slot]],
            torch.from_numpy(self.y)[rest],
            components and [components[slot]],
        )[0]
        return torch.nn.functional.normalize(vectors[:, 0].double(), dim=-1).numpy()


def _scores(fits: list[Fit], b: _Language, readout: str) -> Array:
    """Scores `[text emotion]` of b's stories by another language's directions, each from the fold that held its topic out."""
    out = np.zeros((len(b.y), len(b.stories.emotions.names)))
    for fit, inside in zip(fits, b.inside, strict=True):
        shift = b.rows[~inside, fit.slot].mean(0) if readout == "language-centred" else None
        out[inside.numpy()] = fit.centred(b.rows[inside], shift)
    return out


def _row_of_cells(a: _Language, languages: list[_Language], n_shuffles: int) -> list[Row]:
    """Directions of a's language read in every language: each labelling is fitted once and read everywhere."""
    cells = [(b, readout) for b in languages for readout in READOUTS]

    def accuracies(labels: NDArray[np.integer]) -> list[float]:
        fits = a.fit(labels)
        return [stats.top_k(_scores(fits, b, readout), b.y).mean() for b, readout in cells]

    # the stories that are read keep their labels: another language's do not know of the shuffle
    _, null = against_shuffled(accuracies, a.y, a.stories.topics, n=n_shuffles, seed=a.stories.seed)
    fits = a.fit(a.y)
    return [
        r
        for b in languages
        for r in _cell(a, b, fits, {w: null[:, k] for k, (c, w) in enumerate(cells) if c is b})
    ]


def _cell(a: _Language, b: _Language, fits: list[Fit], null: dict[str, Array]) -> list[Row]:
    """Everything about directions of a's language read in b's."""
    seed, y, topics = b.stories.seed, b.stories.labels, b.stories.topics
    say = {
        "estimator": "mean_difference",
        "hook": a.stories.acts.hook_point,
        "layer": "nested",
        "split": f"{a.name} -> {b.name}",
        "n": len(y),
        "unit_of_n": "stories",
        "seed": seed,
    }
    out = []
    for readout in READOUTS:
        scores = _scores(fits, b, readout)
        right = stats.bootstrap_mean(stats.top_k(scores, y).astype(float), topics, seed=seed)
        against = judged(right.value, null[readout], "shuffled labels")
        out.append(
            row(
                NAME,
                "top1",
                right,
                primary=readout == READOUTS[0],
                readout=readout,
                **say,
                **against,
            )
        )
        auc = stats.bootstrap(
            lambda i, s=scores: stats.macro_auc(s[i], y[i]), topics, n=300, seed=seed
        )
        out.append(row(NAME, "auc", auc, readout=readout, **say))
    embed = _twin(a, b, a.embed.numpy(), b.embed.numpy())
    form = _twin(a, b, a.form, b.form)
    words = stats.tfidf_scores(b.stories.texts, [f"{k:04d}" for k in y], topics, b.folds, b.name, estimator="mean_difference") if a is b else None  # fmt: skip
    ours = stats.top_k(_scores(fits, b, READOUTS[0]), y).astype(float)
    for twin, scores in (("embed", embed), ("form", form), ("tfidf", words)):
        if scores is not None:
            theirs = stats.top_k(scores, y).astype(float)
            tag = say | {
                "control": twin,
                "readout": READOUTS[0],
                "layer": "embed" if twin == "embed" else None,
            }
            out.append(row(NAME, "top1", stats.bootstrap_mean(theirs, topics, seed=seed), **tag))
            margin = stats.bootstrap_mean(ours - theirs, topics, seed=seed)
            out.append(row(NAME, f"top1 minus {twin}", margin, **(tag | {"layer": "nested"})))
    return out


def _twin(a: _Language, b: _Language, x: Array, z: Array) -> Array:
    """The same from other features of a's and b's stories (embeddings, form), language-centred."""
    out = np.zeros((len(b.y), len(a.stories.emotions.names)))
    for mine, theirs in zip(a.inside, b.inside, strict=True):
        there, here = theirs.numpy(), ~mine.numpy()
        shift = z[~there].mean(0) - x[here].mean(0)
        out[there] = stats.centroid_scores(
            x[here], a.stories.labels[here], z[there] - shift, out.shape[1]
        )
    return out


def _cosines(languages: list[_Language], topics: dict[str, str | None]) -> list[Row]:
    """Cosine of the same emotion's directions in two languages, against other pairings of the emotions, at the first one's usual layer.

    Parallel stories have one plot, so the sides are fitted on the two halves of the topics, (a_1 . b_2 + a_2 . b_1) / 2: what they share is
    no plot. Halves scatter more than the whole; a language with itself (a_1 . a_2) says by how much.
    """
    slot = sorted(languages[0].slots)[len(languages[0].slots) // 2]
    layer, seed = languages[0].stories.acts.layers[slot], languages[0].stories.seed
    halves = stats.topic_folds(topics, n_folds=2, seed=seed)
    found = [[t.without(half, slot) for half in halves] for t in languages]
    out = []
    for i, a in enumerate(languages):
        for j in range(i, len(languages)):
            cosine = (found[i][0] @ found[j][1].T + found[i][1] @ found[j][0].T) / 2
            rng, order = np.random.default_rng(seed), np.arange(len(cosine))
            null = [cosine[order, rng.permutation(order)].mean() for _ in range(1000)]
            same = stats.bootstrap_mean(np.diag(cosine), list(order), seed=seed)
            out.append(
                row(
                    NAME, "cosine of the same emotion", same, split=f"{a.name} -> {languages[j].name}", layer=layer, readout="other topics",
                    hook=a.stories.acts.hook_point, estimator="mean_difference", n=len(order), unit_of_n="emotions",
                    **judged(same.value, np.array(null), "permuted emotions"),
                )
            )  # fmt: skip
    return out

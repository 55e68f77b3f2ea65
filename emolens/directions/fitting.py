"""From an estimator to calibrated directions: what is read held out, by topics that the directions have not seen.

Scales, bands and reliabilities come from directions fitted without the topic that they are measured on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from emolens import __version__, stats
from emolens.collect.activations import Activations, TextInfo, is_main
from emolens.collect.collection import Collection
from emolens.collect.moments import Moments, with_topics
from emolens.collect.pooling import LENGTHS
from emolens.directions.algebra import (
    class_means,
    default_layer,
    neutral_components,
    project,
    remove_components,
)
from emolens.directions.calibration import POSITION_EDGES, Calibration, position_bin
from emolens.directions.value import EmotionDirections

BAND = 0.95  # share of neutral texts (and tokens) whose highest score lies inside the neutral band
FOLDS = 4  # groups of topics, each read by directions without it, for the band
ENOUGH = 20  # neutral texts (or tokens) for a band: the least that have a 95 % point
Fit = Callable[
    [Float[Tensor, "text layer d_model"], Int[Tensor, " text"], list[str]],
    Float[Tensor, "emotion layer d_model"],
]


def from_means(
    acts: Activations | Collection,
    contrast: Callable[
        [Float64[Tensor, "emotion layer d_model"]], Float64[Tensor, "emotion layer d_model"]
    ],
    method: str,
    remove_neutral: float | int | None,
    *,
    emotions: list[str] | None = None,
) -> EmotionDirections:
    """Directions that are a contrast of the emotion means: from sums by emotion and topic, with one pass over the rows to calibrate."""
    moments, neutral = _moments(acts), _Neutral.of(acts)
    components = neutral.components(remove_neutral)

    def fit(means: Tensor) -> Tensor:
        vectors = contrast(means).float()
        return vectors if components is None else remove_components(vectors, components)

    means = moments.means()
    vectors, reference = fit(means), means.mean(0).float()
    held_out = _held_out_by_sums(acts, moments, fit)
    outside: Outside = []
    for fold in _groups(moments):
        rest = moments.means(without=fold)
        outside.append((fold, contrast(rest).float(), rest.mean(0).float()))
    return EmotionDirections(
        emotions=tuple(emotions or moments.emotions),
        vectors=vectors,
        reference=reference,
        reliability=_reliability(moments, fit, vectors),
        calibration=held_out and _calibrate(*held_out, outside, neutral, remove_neutral),
        **_common(acts, moments, neutral, method, remove_neutral, components),
    )


def from_rows(
    acts: Activations, fit: Fit, method: str, remove_neutral: float | int | None
) -> EmotionDirections:
    """Directions that need every row; calibrated by fitting again without each of four groups of topics."""
    if not isinstance(acts, Activations):
        raise TypeError(
            f"{method} needs the rows of every text in memory: give it {method}(collection.load())"
        )
    moments, neutral = _moments(acts), _Neutral.of(acts)
    components = neutral.components(remove_neutral)
    ((_, of_all),) = with_topics([acts])
    main, topics = (
        _pooled(acts, is_main),
        [t for t, text in zip(of_all, acts.texts, strict=True) if is_main(text)],
    )
    labels = torch.tensor([moments.emotions.index(t.emotion or "") for t in main.texts])

    def clean(vectors: Tensor) -> Tensor:
        return vectors if components is None else remove_components(vectors, components)

    vectors = clean(fit(main.rows, labels, topics))
    reference = class_means(main.rows, labels).mean(0)
    outside = _outside_by_rows(main, labels, topics, moments, fit)
    held_out = _held_out_by_rows(main, topics, outside, clean) if outside else None
    return EmotionDirections(
        emotions=tuple(moments.emotions),
        vectors=vectors,
        reference=reference,
        reliability=torch.full(vectors.shape[:2], torch.nan),  # slow to fit twenty times
        calibration=held_out and _calibrate(*held_out, outside, neutral, remove_neutral),
        **_common(acts, moments, neutral, method, remove_neutral, components),
    )


def _pooled(acts: Activations, keep: Callable[[TextInfo], bool]) -> Activations:
    """Some of the texts, without the single tokens that nobody here asks for: they are the larger part to copy."""
    return replace(acts, neutral_tokens=None).select(keep)


def _moments(acts: Activations | Collection) -> Moments:
    if (
        isinstance(acts, Activations)
        and acts.row_position.numel()
        and int(acts.row_position.max()) >= 0
    ):
        raise ValueError(
            "these activations are single tokens; collect with mean_over_tokens(), last_token() or char_span()"
        )
    if not isinstance(acts, Activations | Collection):
        raise TypeError(
            f"directions are made from what was collected, em.collect_resid_post(model, texts), not from a {type(acts).__name__}"
        )
    moments = acts.moments()
    if len(moments.emotions) < 2:
        others = Counter(
            t.split
            for chunk in acts.chunks()
            for t in chunk.texts
            if t.emotion is not None and not is_main(t)
        )
        apart = " and ".join(
            f"{n} texts with an emotion are of the split {split}" for split, n in others.items()
        )
        raise ValueError(
            f"directions need at least two emotions, found {len(moments.emotions)}: collect an emotion set, or give emotions="
            + (f" ({apart}: directions are made from main)" if apart else "")
        )
    return moments


@dataclass(frozen=True, eq=False)
class _Neutral:
    """What is known of the neutral texts (None where it was not collected): pooled whole, single tokens of theirs, pooled beginnings.

    `topic` and `text` have the topic and the text's sha256 of each row of each part; a text without a topic is a topic of its own.
    """

    rows: Tensor
    tokens: Tensor | None
    position: Tensor | None
    prefixes: Tensor | None
    length: Tensor | None
    topic: dict[str, NDArray[Any]]
    text: dict[str, NDArray[Any]]

    @staticmethod
    def of(acts: Activations | Collection) -> _Neutral:
        parts: dict[str, list[Activations]] = {"rows": [], "tokens": [], "prefixes": []}
        for chunk in acts.chunks():
            parts["rows"].append(_pooled(chunk, lambda t: t.split == "neutral"))
            for name in ("tokens", "prefixes"):
                if (part := getattr(chunk, f"neutral_{name}")) is not None:
                    parts[name].append(part)
        rows = {
            k: torch.cat([p.rows for p in found]) if found else None for k, found in parts.items()
        }
        at = {
            k: torch.cat([p.row_position for p in found]) if found else None
            for k, found in parts.items()
        }
        texts = {
            k: [p.texts[i] for p in found for i in p.row_text.tolist()]
            for k, found in parts.items()
        }
        topic = {
            k: np.array([t.topic if t.topic is not None else f"#{t.sha256}" for t in of])
            for k, of in texts.items()
        }
        text = {k: np.array([t.sha256 for t in of]) for k, of in texts.items()}
        assert rows["rows"] is not None  # there is at least one chunk
        return _Neutral(
            rows["rows"],
            rows["tokens"],
            at["tokens"],
            rows["prefixes"],
            at["prefixes"],
            topic,
            text,
        )

    def components(
        self, share: float | int | None, keep: NDArray[np.bool_] | None = None
    ) -> list[Tensor] | None:
        """The neutral components, of all tokens or of some."""
        if not share:
            return None
        if self.tokens is None:
            raise ValueError(
                "remove_neutral needs neutral texts: collect an emotion set that has them, or pass remove_neutral=None"
            )
        return neutral_components(
            self.tokens if keep is None else self.tokens[torch.from_numpy(keep)], share
        )


def _common(
    acts: Activations | Collection,
    moments: Moments,
    neutral: _Neutral,
    method: str,
    remove_neutral: float | int | None,
    components: list[Tensor] | None,
) -> dict[str, Any]:
    """The fields that do not depend on how a method fits."""
    counts = moments.counts().tolist()
    nowhere = torch.full(moments.total.shape[1:], torch.nan)
    return {
        "hook_point": acts.hook_point,
        "layers": acts.layers,
        "neutral_mean": neutral.rows.mean(0) if len(neutral.rows) else nowhere,
        "norm_median": acts.norm_median,
        "norm_mean": acts.norm_mean,
        "layer": default_layer(acts.layers, acts.info["model"]["n_layers"]),
        "info": acts.info
        | {
            "emolens": __version__,
            "method": method,
            "remove_neutral": remove_neutral or None,
            "neutral_k": [p.shape[1] for p in components] if components else None,
            "n_per_emotion": dict(zip(moments.emotions, counts, strict=True)),
            "n_topics": len(moments.person),
            "training_texts": sorted({t.sha256 for chunk in acts.chunks() for t in chunk.texts}),
        },
    }


def _held_out_by_sums(
    acts: Activations | Collection, moments: Moments, fit: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Mean and spread `[emotion layer]` of the scores of the main texts, each by directions without its topic.

    None where there are too few topics to leave one out.
    """
    names = sorted(moments.person)
    if len(names) < 2:
        return None
    folds = (
        [(t,) for t in names] if len(names) <= 64 else stats.topic_folds(moments.person, n_folds=16)
    )
    fitted = {}
    for fold in folds:
        means = moments.means(without=fold)
        if means.isnan().any():
            return None
        fitted |= dict.fromkeys(fold, (fit(means), means.mean(0).float()))
    n, total, squares = 0, 0.0, 0.0
    for chunk, topics in with_topics(acts.chunks()):
        mine = [is_main(t) for t in chunk.texts]
        main, topics = _pooled(chunk, is_main), [t for t, m in zip(topics, mine, strict=True) if m]
        for fold in folds:
            inside = torch.tensor([t in fold for t in topics], dtype=torch.bool)
            if inside.any():
                scores = project(main.rows[inside], *fitted[fold[0]]).double()
                n, total, squares = (
                    n + len(scores),
                    total + scores.sum(0),
                    squares + scores.square().sum(0),
                )
    mean = torch.as_tensor(total / n)
    spread = ((torch.as_tensor(squares) - n * mean.square()).clamp_min(0) / (n - 1)).sqrt()
    return mean.float(), spread.float().clamp_min(1e-12)


Outside = list[
    tuple[tuple[str, ...], Tensor, Tensor]
]  # topics, and vectors (neutral components still in) and reference without them


def _groups(moments: Moments) -> list[tuple[str, ...]]:
    """Up to four groups of topics such that every emotion is told outside each; none where that cannot be."""
    if len(moments.person) < 2:
        return []
    folds = stats.topic_folds(moments.person, n_folds=min(FOLDS, len(moments.person)))
    return folds if all((moments.counts(without=fold) > 0).all() for fold in folds) else []


def _outside_by_rows(
    main: Activations, labels: Tensor, topics: list[str], moments: Moments, fit: Fit
) -> Outside | None:
    """Each group of topics with what was fitted without it; None where that cannot be."""
    out = []
    for fold in _groups(moments):
        rest = torch.from_numpy(~np.isin(np.asarray(topics), fold))
        kept = [t for t, inside in zip(topics, rest.tolist(), strict=True) if inside]
        vectors = fit(main.rows[rest], labels[rest], kept)
        out.append((fold, vectors, class_means(main.rows[rest], labels[rest]).mean(0)))
    return out or None


def _held_out_by_rows(
    main: Activations, topics: list[str], outside: Outside, clean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """As `_held_out_by_sums`, with groups of topics."""
    held_out = torch.zeros(len(topics), len(outside[0][1]), len(main.layers))
    for fold, vectors, reference in outside:
        inside = torch.from_numpy(np.isin(np.asarray(topics), fold))
        held_out[inside] = project(main.rows[inside], clean(vectors), reference)
    return held_out.mean(0), held_out.std(0).clamp_min(1e-12)


def _calibrate(
    mean: Tensor, std: Tensor, outside: Outside | None, neutral: _Neutral, share: float | int | None
) -> Calibration:
    """Held-out scores of the stories gave mean and spread; neutral texts and tokens of held-out topics give the band of "none"."""
    outside, (k, n), bins = outside or [], mean.shape, len(POSITION_EDGES)
    names = [
        name
        for name, rows in vars(neutral).items()
        if name in neutral.topic and rows is not None and outside
    ]
    fold = _folds_of(neutral, names, [topics for topics, _, _ in outside])
    scores = {name: torch.zeros(len(fold[name]), k, n) for name in names}
    for f, (_, vectors, reference) in enumerate(outside):
        if share and not (fold["tokens"] != f).any():
            return _unknown(mean, std)
        components = neutral.components(share, fold["tokens"] != f) if share else None
        clean = vectors if components is None else remove_components(vectors, components)
        for name in names:
            inside = torch.from_numpy(fold[name] == f)
            scores[name][inside] = project(getattr(neutral, name)[inside], clean, reference)
    out = _unknown(mean, std)
    if (
        "rows" in names
    ):  # what is known of long texts stands for every length, until shorter ones are known
        band, rate = _band(scores["rows"], fold["rows"], (mean, std))
        out.band[:], out.band_rate[-1] = band, rate
    if neutral.length is not None and "prefixes" in names:
        known = []
        for j, length in enumerate(LENGTHS):
            here = neutral.length == length
            if here.sum() >= ENOUGH:
                known.append(j)
                out.band[j], out.band_rate[j] = _band(
                    scores["prefixes"][here], fold["prefixes"][here.numpy()], (mean, std)
                )
        for j in (
            set(range(len(LENGTHS))) - set(known) if known else ()
        ):  # a length that few reach takes its neighbour's band
            near = min(known, key=lambda c, j=j: abs(c - j))
            out.band[j], out.band_rate[j] = out.band[near], torch.nan
    if neutral.position is not None and "tokens" in names:
        s, at, known = scores["tokens"], position_bin(neutral.position), []
        for b in range(bins):
            if (at == b).sum() >= ENOUGH:
                known.append(b)
                out.token_mean[b], out.token_std[b] = _spread(s[at == b])
                out.token_band[b], out.token_rate[b] = _band(
                    s[at == b], fold["tokens"][(at == b).numpy()]
                )
        for b in set(range(bins)) - set(known) if known else ():  # as above
            near = min(known, key=lambda c, b=b: abs(c - b))
            out.token_mean[b], out.token_std[b] = out.token_mean[near], out.token_std[near]
            out.token_band[b], out.token_rate[b] = out.token_band[near], torch.nan
    return out


def _unknown(mean: Tensor, std: Tensor) -> Calibration:
    """Mean and spread of the stories, and nothing known of neutral text."""
    (k, n), bins, lengths = mean.shape, len(POSITION_EDGES), len(LENGTHS)
    band, rate = torch.full((2, lengths, n), torch.nan)
    token_mean, token_std = torch.full((2, bins, k, n), torch.nan)
    token_band, token_rate = torch.full((2, bins, n), torch.nan)
    return Calibration(mean, std, band, rate, token_mean, token_std, token_band, token_rate)


def _folds_of(
    neutral: _Neutral, names: list[str], folds: list[tuple[str, ...]]
) -> dict[str, NDArray[np.intp]]:
    """The fold of each neutral row of each part: that of its topic; topics that no story has are dealt out.

    Where all neutral texts are of one such topic, its texts are dealt out instead, each with all its rows.
    """
    of = {t: f for f, fold in enumerate(folds) for t in fold}
    unit, others = neutral.topic, {t for name in names for t in neutral.topic[name].tolist()}
    if len(others) == 1 and not others & set(of):
        unit, others = neutral.text, {t for name in names for t in neutral.text[name].tolist()}
    of |= {t: i % len(folds) for i, t in enumerate(sorted(others - set(of)))}
    return {name: np.array([of[t] for t in unit[name].tolist()], dtype=int) for name in names}


def _band(
    scores: Float[Tensor, "row emotion layer"],
    fold: NDArray[np.intp],
    scale: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The band of neutral rows and the share that lies above the band of the *other* folds; NaN with too few.

    The ceil(.95 (n + 1))-th smallest of n: one more text like these exceeds it with a probability of at most 5 %.

    Args:
        scale: Mean and spread to count in; None is that of the rows themselves, for the share that of the other folds.
    """

    def highest(rows: Tensor, others: Tensor) -> Tensor:
        mean, std = scale or _spread(others)
        return ((rows - mean) / std).amax(1)

    def point(rows: Tensor) -> Tensor:
        rank = min(int(np.ceil(BAND * (len(rows) + 1))), len(rows))
        return highest(rows, rows).kthvalue(rank, dim=0).values

    unknown = scores.new_full((scores.shape[2],), torch.nan)
    if len(scores) < ENOUGH or len(np.unique(fold)) < 2:
        return unknown, unknown
    above = torch.zeros_like(unknown)
    for f in np.unique(fold):
        inside = torch.from_numpy(fold == f)
        mine, others = scores[inside], scores[~inside]
        above += (
            (highest(mine, others) > point(others)).float().sum(0) if len(others) > 1 else torch.nan
        )  # one has no spread
    return point(scores), above / len(scores)


def _spread(scores: Float[Tensor, "row emotion layer"]) -> tuple[Tensor, Tensor]:
    return scores.mean(0), scores.std(0).clamp_min(1e-12)


def _reliability(moments: Moments, fit: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Cosine of the vectors of two halves of the topics, mean of ten splits, stepped up to full length: 2c / (1 + c).

    NaN with fewer than four topics.
    """
    names = sorted(moments.person)
    out = torch.full(vectors.shape[:2], torch.nan)
    if len(names) < 4:
        return out
    rng = np.random.default_rng(0)
    total, n_splits = torch.zeros(vectors.shape[:2]), 10
    for _ in range(n_splits):
        half = set(rng.permutation(names)[: len(names) // 2].tolist())
        halves = [moments.means(without=half), moments.means(without=set(names) - half)]
        if any(m.isnan().any() for m in halves):
            return out
        total += torch.nn.functional.cosine_similarity(*(fit(m) for m in halves), dim=-1)
    c = total / n_splits
    return 2 * c / (1 + c).clamp_min(1e-6)

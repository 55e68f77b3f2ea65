"""How figures are drawn: colours that colour-blind readers tell apart, and no meaning on colour alone; and the two pictures of directions.

An experiment draws from its rows and computes nothing that is not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from matplotlib.figure import Figure

from emolens import geometry
from emolens.directions.value import EmotionDirections
from emolens.experiments.rows import Row
from emolens.sets.norms import Norm

INK, ORANGE, BLUE, GREY, GREEN = "#1d2433", "#d9622b", "#3c6eb4", "#9aa3b2", "#2e8b6f"
RELIABLE = 0.5  # directions with a lower split-half reliability are greyed
NAMES = 45  # on one axis; of more emotions every second, third ... is named


def canvas(width: float = 6.0, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure of one pair of axes without a frame."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def known(value: float | None) -> float:
    """A figure, or NaN where there is none."""
    return float("nan") if value is None else value


def differences(lines: Sequence[tuple[str, Row]], label: str) -> Figure:
    """Named differences with their intervals, one below the other; hollow where an interval includes 0."""
    figure, axes = canvas(height=0.6 + 0.42 * max(len(lines), 1))
    for i, (_, r) in enumerate(lines):
        sure = known(r.low) > 0 or known(r.high) < 0
        axes.plot([known(r.low), known(r.high)], [i, i], color=ORANGE if sure else GREY, lw=2.2)
        axes.plot(
            r.value, i, "o", color=ORANGE if sure else GREY, mfc=ORANGE if sure else "white", ms=6
        )
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=label)
    return figure


def margins(rows: Sequence[Row], metrics: Mapping[str, str]) -> Figure:
    """Paired differences to each twin: of which metrics, and what they are called."""
    lines = [
        (f"{what}\n{estimator.replace('_', ' ')} - {control}", r)
        for metric, what in metrics.items()
        for estimator in ("mean_difference", "logistic")
        for control in ("tfidf", "embed", "form")
        for r in rows
        if r.metric == f"{metric} minus {control}" and r.estimator == estimator
    ]
    return differences(lines, "paired difference with 95 % interval (hollow: it includes 0)")


def cosine_matrix(directions: EmotionDirections, *, layer: SupportsIndex | None = None) -> Figure:
    """Draw the cosines of all pairs of emotions, in the order of a cluster tree.

    Emotions with unreliable directions have grey names; of many emotions only some are named.

    Args:
        directions: Two emotions or more.
        layer: A block number; None is the default layer.

    Returns:
        A figure of matplotlib.

    Raises:
        ValueError: no directions were computed there.

    Example:
        >>> from emolens.report import cosine_matrix
        >>> cosine_matrix(directions, layer=1).axes[0].images[0].get_array().shape
        (4, 4)
    """
    slot = directions.slot(layer)
    cosine = directions.cosine(layer=layer).numpy()
    order = (
        geometry.cluster_order(directions.vectors[:, slot].numpy())
        if len(cosine) > 2
        else list(range(len(cosine)))
    )
    size = 2.2 + 0.19 * min(len(cosine), NAMES)
    some = order[:: -(-len(order) // NAMES)]
    figure, axes = canvas(size + 0.9, size)
    image = axes.imshow(cosine[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1)
    names, at = [directions.emotions[i] for i in some], [order.index(i) for i in some]
    axes.set_xticks(at, names, rotation=90, fontsize=8, parse_math=False)  # names are not formulas
    axes.set_yticks(at, names, fontsize=8, parse_math=False)
    for label, i in zip(
        list(axes.get_yticklabels()) + list(axes.get_xticklabels()), some * 2, strict=True
    ):
        reliability = float(directions.reliability[i, slot])
        label.set_color(INK if reliability >= RELIABLE or np.isnan(reliability) else "#b0b6c2")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.7, label="cosine")
    return figure


def circumplex(
    directions: EmotionDirections,
    norms: Mapping[str, Norm],
    keys: Mapping[str, str | None],
    *,
    layer: SupportsIndex | None = None,
) -> Figure:
    """Draw where the model's directions lie, in components 1 and 2 rotated onto human valence and arousal, and where people put the words.

    Args:
        directions: Of emotions of which four or more have norms.
        norms: Human ratings by word, as of `load_norms`.
        keys: The word of each emotion; an emotion whose word is None or not in `norms` is left out.
        layer: A block number; None is the default layer.

    Returns:
        A figure of matplotlib; both sides are standardised, so its axes have no unit. With fewer than four emotions it says so.

    Raises:
        ValueError: no directions were computed there.

    Example:
        >>> from emolens.report import circumplex
        >>> words = dict(zip(directions.emotions, ("joy", "grief", "fear", "calm")))
        >>> circumplex(directions, em.load_norms(), words).axes[0].get_xlabel()
        'valence'
    """
    from scipy.linalg import orthogonal_procrustes

    figure, axes = canvas(6.4, 5.8)
    known = [i for i, e in enumerate(directions.emotions) if keys.get(e) in norms]
    if len(known) < 4:
        axes.text(
            0.5,
            0.5,
            "fewer than four emotions have human norms",
            ha="center",
            transform=axes.transAxes,
        )
        return figure
    found = [norms[keys[directions.emotions[i]] or ""] for i in known]
    people = np.array([[n.valence, n.arousal] for n in found])
    scores = geometry.components(directions.vectors[known, directions.slot(layer)].numpy(), 2)[0]
    a, b = ((z - z.mean(0)) / z.std(0) for z in (people, scores))
    b = b @ orthogonal_procrustes(b, a)[0]
    many = len(known) > NAMES
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        axes.plot(
            [x[0], y[0]], [x[1], y[1]], color=GREY, lw=0.8, alpha=0.35 if many else 1, zorder=1
        )
        axes.plot(
            *x,
            "D",
            color=BLUE,
            mfc="white",
            ms=5,
            label="people (Glasgow norms)" if i == 0 else None,
        )
        axes.plot(
            *y, "o", color=ORANGE, ms=5, label="model, PC1 and PC2 rotated" if i == 0 else None
        )
        if many and i % 3:  # or no name could be read
            continue
        axes.annotate(
            directions.emotions[known[i]],
            y,
            fontsize=7.5,
            xytext=(4, 3),
            textcoords="offset points",
            parse_math=False,
        )
    axes.axhline(0, color=GREY, lw=0.6)
    axes.axvline(0, color=GREY, lw=0.6)
    axes.set(xlabel="valence", ylabel="arousal", xticks=[], yticks=[])
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure

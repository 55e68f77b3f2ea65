"""Figures with their controls in them. Every function takes rows or directions and returns a matplotlib figure; nothing is computed
here that is not in the rows. Colours are safe for colour-blind readers, and no meaning rests on colour alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import matplotlib.patches
import numpy as np
from matplotlib.figure import Figure

from emolens import geometry
from emolens.directions.value import EmotionDirections
from emolens.experiments.base import Row, find
from emolens.sets.norms import Norm
from emolens.shards import write_page

INK, ORANGE, BLUE, GREY, GREEN = "#1d2433", "#d9622b", "#3c6eb4", "#9aa3b2", "#2e8b6f"
RELIABLE = 0.5  # directions with a lower split-half reliability are greyed
NAMES = 45  # on one axis; of more emotions every second, third ... is named


def _figure(width: float = 6.0, height: float = 3.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def accuracy_by_layer(rows: Sequence[Row]) -> Figure:
    """Held-out top-1 at every layer, with TF-IDF, embeddings, shuffled labels and chance."""
    figure, axes = _figure()
    curve = [r for r in find(rows, "separability", "emotion top1 by layer") if r.control is None]
    x = [int(r.layer) for r in curve if r.layer is not None]
    axes.plot(
        x,
        [r.value for r in curve],
        color=ORANGE,
        marker="o",
        ms=3,
        label="mean difference, residual stream",
    )
    axes.fill_between(
        x, [_n(r.low) for r in curve], [_n(r.high) for r in curve], color=ORANGE, alpha=0.18, lw=0
    )
    for control, colour, style, name in (
        ("tfidf", BLUE, "--", "TF-IDF, same estimator"),
        ("embed", GREEN, "-.", "embeddings, same estimator"),
        ("form", INK, (0, (5, 4)), "story form only, same estimator"),
    ):
        for r in find(
            rows, "separability", "emotion top1", control=control, estimator="mean_difference"
        )[:1]:
            axes.axhline(r.value, color=colour, ls=style, lw=1.4, label=f"{name}: {r.value:.2f}")
    for r in find(
        rows, "separability", "emotion top1", control="shuffled labels", estimator="mean_difference"
    )[:1]:
        axes.axhspan(
            0,
            _n(r.null_high),
            color=GREY,
            alpha=0.25,
            lw=0,
            label=f"shuffled labels, 95 % below {_n(r.null_high):.2f}",
        )
    for r in find(rows, "separability", "emotion top1", control="chance")[:1]:
        axes.axhline(r.value, color=INK, lw=1, ls=":", label=f"chance: {r.value:.2f}")
    axes.set(xlabel="layer (block, resid_post)", ylabel="held-out top-1", ylim=(0, None))
    figure.set_size_inches(6.0, 4.4)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def readouts(rows: Sequence[Row]) -> Figure:
    """The same vectors read in five ways: what centring is worth."""
    figure, axes = _figure(height=2.4)
    names = ["uncentred", "uncentred cosine", "neutral-centred", "centred", "calibrated"]
    found = [
        (n, find(rows, "separability", "emotion top1", readout=n, estimator="mean_difference"))
        for n in names
    ]
    kept = [(n, rs[0]) for n, rs in found if rs]
    axes.barh(
        [n for n, _ in kept],
        [r.value for _, r in kept],
        color=[GREY] * (len(kept) - 1) + [ORANGE],
        height=0.62,
    )
    for i, (_, r) in enumerate(kept):
        axes.plot([_n(r.low), _n(r.high)], [i, i], color=INK, lw=1.2)
        axes.text(_n(r.high) + 0.012, i, f"{r.value:.2f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="held-out top-1 of the same vectors")
    return figure


def margins(rows: Sequence[Row]) -> Figure:
    """Paired differences to each twin, on held-out topics and on other people's text."""
    lines = []
    for metric, what in (
        ("emotion top1", "top-1, held-out topics"),
        ("emotion auc", "AUC, held-out topics"),
        ("macro auc", "AUC, GoEmotions"),
    ):
        for estimator in ("mean_difference", "logistic"):
            for control in ("tfidf", "embed", "form"):
                for r in rows:
                    if r.metric == f"{metric} minus {control}" and r.estimator == estimator:
                        lines.append((f"{what}\n{estimator.replace('_', ' ')} - {control}", r))
    figure, axes = _figure(height=0.6 + 0.42 * max(len(lines), 1))
    for i, (_, r) in enumerate(lines):
        sure = _n(r.low) > 0 or _n(r.high) < 0
        axes.plot([_n(r.low), _n(r.high)], [i, i], color=ORANGE if sure else GREY, lw=2.2)
        axes.plot(
            r.value, i, "o", color=ORANGE if sure else GREY, mfc=ORANGE if sure else "white", ms=6
        )
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="paired difference with 95 % interval (hollow: it includes 0)")
    return figure


def transfer_by_label(rows: Sequence[Row]) -> Figure:
    """AUC of each GoEmotions label, zero-shot, beside TF-IDF fitted on the same stories."""
    found = sorted(find(rows, "transfer", "auc by label"), key=lambda r: r.value)
    figure, axes = _figure(height=0.7 + 0.32 * max(len(found), 1))
    for i, r in enumerate(found):
        axes.plot([_n(r.low), _n(r.high)], [i, i], color=ORANGE, lw=2)
        axes.plot(r.value, i, "o", color=ORANGE, label="directions" if i == 0 else None)
        axes.plot(
            _n(r.null_mean), i, "D", color=BLUE, mfc="white", label="TF-IDF" if i == 0 else None
        )
    axes.axvline(0.5, color=INK, lw=1, ls=":")
    axes.set_yticks(
        range(len(found)), [f"{r.emotion} (n={r.n})" for r in found], fontsize=9, parse_math=False
    )
    axes.set(xlabel="AUC (0.5 is chance)", xlim=(0.3, 1.0))
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


_CONTROLS = (
    (None, ORANGE, "o", "emotion directions"),
    ("random directions", GREY, "s", "random directions"),
)


def dose_curve(rows: Sequence[Row]) -> Figure:
    """Effect on the own words, and damage to neutral text, over the dose: into collapse."""
    figure = Figure(figsize=(6.0, 4.8), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    chosen = [r.dose for r in find(rows, "validation", "share diag above off", control=None)]
    for axes, metric in ((above, "diag minus off by dose"), (below, "kl by dose")):
        axes.spines[["top", "right"]].set_visible(False)
        for control, colour, marker, name in _CONTROLS:
            found = sorted(
                find(rows, "validation", metric, control=control), key=lambda r: _n(r.dose)
            )
            x = [_n(r.dose) for r in found]
            axes.plot(x, [r.value for r in found], color=colour, marker=marker, ms=5, label=name)
            if any(r.low is not None for r in found):
                axes.fill_between(
                    x,
                    [_n(r.low) for r in found],
                    [_n(r.high) for r in found],
                    color=colour,
                    alpha=0.15,
                    lw=0,
                )
        for dose in chosen:
            axes.axvline(_n(dose), color=INK, lw=1, ls=":")
        axes.set_xscale("log")
    doses = sorted({_n(r.dose) for r in find(rows, "validation", "kl by dose")})
    below.set_xticks(doses, [f"{d:g}" for d in doses])
    below.minorticks_off()
    above.axhline(0, color=INK, lw=0.8)
    above.set(ylabel="own words minus others,\nchange of log-probability")
    below.set(
        xlabel="dose, median residual norms (dotted: the chosen one)",
        ylabel="KL on neutral text,\nnats a token",
        yscale="log",
    )
    figure.legend(
        *above.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


def validation_matrix(rows: Sequence[Row]) -> Figure:
    """Change of each emotion's words (columns) when each direction (rows) is added; the own column is outlined."""
    found = find(rows, "validation", "change")
    down, across = (list(dict.fromkeys(getattr(r, k) for r in found)) for k in ("emotion", "split"))
    table = np.full((len(down), len(across)), np.nan)
    for r in found:
        table[down.index(r.emotion), across.index(r.split)] = r.value
    table = table - table.mean(1, keepdims=True)
    limit = float(np.abs(table).max())
    figure, axes = _figure(2.0 + 0.24 * len(across), 1.9 + 0.26 * len(down))
    image = axes.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(across)), across, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(down)), down, fontsize=8, parse_math=False)
    for i, name in enumerate(down):
        if name in across:
            j = across.index(name)
            axes.add_patch(
                matplotlib.patches.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, ec=INK, lw=1.6)
            )
    axes.spines[:].set_visible(False)
    axes.set(xlabel="whose words", ylabel="direction added")
    figure.colorbar(image, ax=axes, shrink=0.9, label="change minus row mean")
    return figure


def triad(rows: Sequence[Row]) -> Figure:
    """Patch, ablate and add for each contrast of emotions, filled beside its random control (hollow); the line is over all pairs."""
    tests = (
        ("patch recovery", "patch: gap recovered"),
        ("ablate loss, whole stream", "ablate: gap lost"),
        ("add gain", "add: gain in gaps"),
    )
    groups = list(
        dict.fromkeys(
            r.emotion for r in find(rows, "causal", "ablate loss, whole stream by contrast")
        )
    )
    figure = Figure(figsize=(7.2, 1.3 + 0.27 * max(len(groups), 1)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (metric, title) in zip(panels, tests, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        for r in find(rows, "causal", f"{metric} by contrast"):
            own = r.control is None
            axes.plot(
                r.value,
                groups.index(r.emotion),
                "o",
                color=ORANGE if own else GREY,
                mfc=ORANGE if own else "white",
                ms=5.5,
            )
        for r in find(rows, "causal", metric, control=None):
            axes.axvspan(_n(r.low), _n(r.high), color=ORANGE, alpha=0.12, lw=0)
            axes.axvline(r.value, color=ORANGE, lw=1.2)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(len(groups)), [str(g) for g in groups], fontsize=8, parse_math=False)
    if groups:
        panels[0].invert_yaxis()
    figure.supxlabel(
        "share of the gap between clean and corrupted (hollow: random directions)", fontsize=9
    )
    return figure


SPAN_NAMES = {
    "before": "before it",
    "changed": "the changed fact",
    "after": "after it",
    "last": "last token",
}


def patching_map(rows: Sequence[Row]) -> Figure:
    """Where the gap travels: share recovered by the clean stream of one layer (across) at one span of the prompt (down)."""
    found = find(rows, "causal", "patch recovery by layer and span")
    layers = sorted({int(r.layer or 0) for r in found})
    spans = [s for s in SPAN_NAMES if any(r.split == s for r in found)]
    table = np.full((len(spans), len(layers)), np.nan)
    for r in found:
        table[spans.index(str(r.split)), layers.index(int(r.layer or 0))] = r.value
    figure, axes = _figure(2.6 + 0.55 * len(layers), 1.3 + 0.42 * len(spans))
    image = axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    if len(layers) <= 12:  # more would not be readable
        for (i, j), value in np.ndenumerate(table):
            if np.isfinite(value):
                dark = "white" if abs(value) > 0.6 else INK
                axes.text(j, i, f"{value:z.2f}", ha="center", va="center", fontsize=8, color=dark)
    axes.set_xticks(range(len(layers)), [str(k) for k in layers], fontsize=8)
    axes.set_yticks(range(len(spans)), [SPAN_NAMES[s] for s in spans], fontsize=9)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="layer (stream before the block)")
    figure.colorbar(image, ax=axes, shrink=0.9, label="gap recovered")
    return figure


def cosine_matrix(directions: EmotionDirections, *, layer: SupportsIndex | None = None) -> Figure:
    """Cosines in the order of a cluster tree; emotions with unreliable directions have grey names. Of many emotions some names only."""
    slot = directions.slot(layer)
    cosine = directions.cosine(layer=layer).numpy()
    order = (
        geometry.cluster_order(directions.vectors[:, slot].numpy())
        if len(cosine) > 2
        else list(range(len(cosine)))
    )
    size = 2.2 + 0.19 * min(len(cosine), NAMES)
    some = order[:: -(-len(order) // NAMES)]
    figure, axes = _figure(size + 0.9, size)
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
    """Components 1 and 2, rotated onto human valence and arousal: where the model's directions lie and where people put the words."""
    from scipy.linalg import orthogonal_procrustes

    figure, axes = _figure(6.4, 5.8)
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


def layer_similarity(rows: Sequence[Row]) -> Figure:
    """How alike the cosine matrix of each layer is to that of the reported layer."""
    figure, axes = _figure(height=2.6)
    found = find(rows, "geometry", "rsa of layers with the reported one")
    axes.plot(
        [int(r.layer or 0) for r in found], [r.value for r in found], color=INK, marker="o", ms=3
    )
    axes.set(xlabel="layer", ylabel="RSA with the reported layer", ylim=(0, 1.02))
    return figure


def svg(figure: Figure, title: str) -> str:
    """The figure as inline SVG that scales with the page; `title` is read out by screen readers."""
    import io
    from html import escape

    text = io.StringIO()
    # a salt of its own, so that clip paths of several figures in one page keep different names
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    ):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    head, rest = body.split(">", 1)
    return f'{head} role="img" aria-label="{escape(title)}" style="width:100%;height:auto">{rest}'


def _n(value: float | None) -> float:
    return float("nan") if value is None else value


class CircuitsView:
    """A circuitsvis picture that always shows from its bundled JavaScript, in a notebook, an exported page, online or not.

    circuitsvis itself asks the network at each display and then links to a server; and a token such as ``</script>`` would end its
    script. Here neither happens.
    """

    def __init__(self, figure: Any) -> None:
        head, props = figure.local_src.rsplit("CircuitsVis.render(", 1)
        props, tail = props.rsplit("</script>", 1)
        name = (
            "circuits-vis-" + hashlib.sha256(props.split(",", 1)[1].encode()).hexdigest()[:12]
        )  # the same at every run
        random = props.split('"')[1]
        html = (
            head
            + "CircuitsVis.render("
            + props.replace("</", "<\\/").replace("<!--", "<\\!--")
            + "</script>"
            + tail
        )
        self.html = html.replace(random, name)

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a page that opens offline; a page of emolens is replaced, another file is not."""
        write_page(path, self.html, overwrite=overwrite)

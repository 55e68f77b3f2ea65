"""Patch, ablate, add: three tests of whether the model uses a direction, on prompts that differ in one fact.

Each pair has a clean prompt, a corrupted one whose changed fact changes the feeling, and a control whose changed fact does not. With
d(x) the logit difference of the two emotions' words at the last token, v the difference of their directions, gap = d(clean) - d(corrupted):
*patch* - the clean stream at the layer put into the corrupted run, at the last token whole, at every token only its part along v: share
of the gap recovered;
*ablate* - v taken out of both runs (affinely, sinks left alone), after every block only, and from the whole stream: share of the gap lost;
*add* - v added to the corrupted run: change of d in gaps. Beside each, random directions that remove as much variance of ordinary tokens
(ablate), or point anywhere (patch, add), through the same calls. Shares are ratios of means over pairs that pass `MIN_GAP`
(`patching.passing`); intervals resample whole contrasts, whose pairs share v and words, and draws. A map by layer and span of the prompt shows where the whole stream carries the gap.

Then the emotions' whole subspace is taken out of the stream while the stories are read again, and a classifier is fitted *afresh* on what is
left (an old one fails by construction), beside shuffled labels and random subspaces of the same rank and removed variance, with the
damage to neutral text. What is removed is fitted inside each fold: removing what was fitted on all stories leaves held-out ones that lie
on the wrong side of every boundary, and that looks like an effect.

Fitted on | judged on: v, and the means that ablation keeps, on the stories; layer and dose on openings (validation) | pairs: texts that are
in neither. In the refit directions, neutral components, means, both nulls and the classifier on the training topics of a fold | stories and
neutral texts of its held-out topics (the set of emotions, layer and inner regularisation are fixed before).
Primary row: share of the gap lost by ablation of the whole stream minus that of the matched random directions: "does the model use it" asks
for every place where a block could read it, and after-block ablation leaves one in each block (for a set that the pairs do not fit: what the
refitted classifier loses, minus shuffled labels). "Contributes, given these controls", not "is necessary".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from emolens.collect.forward import collect
from emolens.experiments.base import Experiment, Findings, Gate, Inputs, Picture, Table
from emolens.experiments.drawing import GREY, INK, ORANGE, canvas, known
from emolens.experiments.pairs import NAME, PRIMARY, triad, where
from emolens.experiments.refitting import refit
from emolens.experiments.rows import Row, find
from emolens.experiments.rules import Claim, interval, percent, rows_of
from emolens.interventions.stream import Stream, stream_points


def run(inputs: Inputs) -> Findings:
    """All rows; nothing where validation steering chose no block and dose."""
    chosen = inputs.earlier["validation"].chosen
    if not chosen:
        return Findings()
    layer, names = chosen["layer"], chosen["emotions"]
    stream = read_stream(inputs, names)
    rows, pairs = triad(inputs, stream, layer, chosen["dose"])
    primary = not any(r.primary for r in rows)
    left = refit(NAME, inputs, stream, layer, names, primary=primary)
    return Findings([*rows, *where(inputs, pairs), *left])


def read_stream(inputs: Inputs, names: Sequence[str]) -> Stream:
    """The stories of these emotions at every place of the stream, for the references of ablation; resid_post has been read already."""
    kept = [
        i for i, k in enumerate(inputs.stories.labels) if inputs.stories.emotions.names[k] in names
    ]
    labels = {
        "emotions": [inputs.stories.emotions.names[inputs.stories.labels[i]] for i in kept],
        "topics": [inputs.stories.topics[i] for i in kept],
    }
    sites = {
        point: collect(
            inputs.model,
            [inputs.stories.texts[i] for i in kept],
            point,
            layers=layers,
            progress=False,
            **labels,
        )
        for point, layers in stream_points(inputs.model).items()
        if point != "resid_post"
    }
    return Stream((*sites.values(), inputs.stories.main.select(lambda t: t.emotion in names)))


def gate(findings: Findings) -> Gate:
    """Where nothing was steered there is no block and dose to test."""
    return Gate() if findings.rows else Gate("validation steering chose no block and dose")


def _gap(metric: str, what: str) -> Callable[[Row, Sequence[Row], int], str]:
    def text(r: Row, rows: Sequence[Row], k: int) -> str:
        own = find(rows, NAME, metric, control=None)[0]
        return (
            f"{100 * own.value:.1f} % {what}; minus {r.control or ''} {100 * r.value:+.1f} points "
            f"[{100 * (r.low or 0):.1f}, {100 * (r.high or 0):.1f}]."
        )

    return text


_TRIAD = (
    ("ablation", "Taking a direction out of the whole stream costs the model part of the contrast", PRIMARY, "of the clean-corrupted gap is lost"),
    ("ablation after blocks", "Taking it out after every block costs part of it too", "ablate loss", "of the gap is lost (attention still hands it to the MLP of its own block)"),
    ("patching", "The part of the stream along a direction carries some of the contrast", "patch recovery", "of the gap is recovered by it alone"),
    ("adding", "Adding the direction moves a prompt towards the other emotion", "add gain", "of the gap is gained"),
)  # fmt: skip


def _untested_pairs(rows: Sequence[Row]) -> list[Row]:
    """The row that says how many pairs have a gap, where they were too few to be tested."""
    tested = any(find(rows, NAME, f"{metric} minus random") for _, _, metric, _ in _TRIAD)
    return [] if tested else find(rows, NAME, "pairs with a gap")


def _or_the_pairs(metric: str) -> Callable[[Sequence[Row], int], list[Row]]:
    return lambda rows, k: find(rows, NAME, f"{metric} minus random") or _untested_pairs(rows)


def _too_few_pairs(rows: Sequence[Row], k: int) -> str:
    return "".join(f"only {r.value:.0f} of {r.n} pairs have a gap" for r in _untested_pairs(rows))


def _refitted(r: Row, rows: Sequence[Row], k: int) -> str:
    [random] = find(rows, NAME, "top1 refitted minus random")
    left, whole = (find(rows, NAME, "top1 refitted", control=c) for c in (None, "nothing ablated"))
    says = ""
    if left and whole:
        says = (
            f"a fresh classifier reads {percent(left[0].value)} {interval(left[0], True)}, "
            f"{percent(whole[0].value)} with nothing taken out; "
        )
    return (
        f"{says}taken out by directions of the other topics only, that is {100 * r.value:+.1f} points {interval(r, True)} against directions from "
        f"{r.control or ''}, and {100 * random.value:+.1f} {interval(random, True)} against {random.control or ''}; "
        "shown if both intervals lie below 0."
    )


def triad_figure(rows: Sequence[Row]) -> Figure:
    """Patch, ablate and add for each contrast of emotions, filled beside its random control (hollow); the line is over all pairs."""
    tests = (
        ("patch recovery", "patch: gap recovered"),
        ("ablate loss, whole stream", "ablate: gap lost"),
        ("add gain", "add: gain in gaps"),
    )
    groups = list(
        dict.fromkeys(r.emotion for r in find(rows, NAME, "ablate loss, whole stream by contrast"))
    )
    figure = Figure(figsize=(7.2, 1.3 + 0.27 * max(len(groups), 1)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (metric, title) in zip(panels, tests, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        for r in find(rows, NAME, f"{metric} by contrast"):
            own = r.control is None
            axes.plot(
                r.value,
                groups.index(r.emotion),
                "o",
                color=ORANGE if own else GREY,
                mfc=ORANGE if own else "white",
                ms=5.5,
            )
        for r in find(rows, NAME, metric, control=None):
            axes.axvspan(known(r.low), known(r.high), color=ORANGE, alpha=0.12, lw=0)
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
    found = find(rows, NAME, "patch recovery by layer and span")
    layers = sorted({int(r.layer or 0) for r in found})
    spans = [s for s in SPAN_NAMES if any(r.split == s for r in found)]
    table = np.full((len(spans), len(layers)), np.nan)
    for r in found:
        table[spans.index(str(r.split)), layers.index(int(r.layer or 0))] = r.value
    figure, axes = canvas(2.6 + 0.55 * len(layers), 1.3 + 0.42 * len(spans))
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


CAUSAL = Experiment(
    NAME,
    question="Does the model use the directions?",
    paper=None,
    run=run,
    gate=gate,
    needs=("validation",),
    claims=(
        *(Claim(name, words, "above_zero", _or_the_pairs(metric), _gap(metric, what), "random directions do more", _too_few_pairs)
          for name, words, metric, what in _TRIAD),
        Claim("ablation: refitted", "Ablation leaves less emotion to be read", "below_zero",
              rows_of(NAME, "top1 refitted minus shuffled"), _refitted, "more is left than after the controls", also=rows_of(NAME, "top1 refitted minus random")),
    ),
    shows=(
        Picture(lambda view: triad_figure(view.rows) if find(view.rows, NAME, PRIMARY) else None, "Patch, ablate, add",
            "Prompts that differ in one fact and so in what someone feels. The gap is the difference in the logits of the two emotions' words. "
            "Line and band: all pairs with their 95 % interval. Ablated is the whole stream: wherever a block reads it."),
        Picture(lambda view: patching_map(view.rows) if find(view.rows, NAME, "patch recovery by layer and span") else None, "Where the gap travels",
            "The clean stream of one layer and one part of the prompt, put into the corrupted run: 1 means that this place alone carries the whole gap, 0 nothing of it. "
            "It must begin at the fact that differs and end at the last token; the map shows when it moves."),
        Table(rows=lambda view: [r for r in view.rows if "by contrast" not in r.metric and "by layer" not in r.metric],
            note="Steering moves this readout; that is not proof of sufficiency. Ablation says that a direction contributes, given these controls; not that it is necessary."),
    ),
)  # fmt: skip

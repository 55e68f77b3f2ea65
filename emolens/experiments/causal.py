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
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from emolens import stats
from emolens.collect.forward import collect
from emolens.directions.controls import random_directions
from emolens.directions.value import EmotionDirections
from emolens.experiments.base import Experiment, Findings, Gate, Inputs, Picture, Table
from emolens.experiments.drawing import GREY, INK, ORANGE, canvas, known
from emolens.experiments.refitting import matched, refit
from emolens.experiments.rows import Row, find, row
from emolens.experiments.rules import Claim, interval, percent, rows_of
from emolens.interventions.check import validate
from emolens.interventions.hooks import Hook, Hooks
from emolens.interventions.metrics import SPANS, passing
from emolens.interventions.patching import patch_resid_pre
from emolens.interventions.positions import Positions, Window
from emolens.interventions.stream import Stream, ablate_stream, stream_points
from emolens.interventions.verbs import (
    ablate_resid_post,
    patch_resid_post,
    steer_resid_post,
)
from emolens.models.running import can_start_at_layer, run_from, run_to, unembed
from emolens.models.tokens import EncodedText, encode, pad
from emolens.readout import first_tokens
from emolens.sets.materials import Pair, load_pairs

NAME = "causal"
MIN_PAIRS = 8
MIN_GAP = 1e-3  # logits; a smaller one is rounding, a negative one says that the model does not feel the fact as the pair means it
# random draws: beside patching and adding, which begin at the layer, and beside ablation, which begins at the first block and costs more
N_PATCHED, N_ABLATED = 20, 8
PRIMARY = "ablate loss, whole stream"


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


def usable_pairs(inputs: Inputs) -> tuple[list[Pair], int]:
    """Pairs of emotions of this set whose three prompts have one length in this tokenizer, and how many were dropped for their length."""
    tokenizer = inputs.model.tokenizer
    words = first_tokens(
        tokenizer, {e.name: e.target_words for e in inputs.stories.emotions.emotions}
    )
    name = inputs.stories.emotions.concepts
    named = [
        p.model_copy(
            update={k: name.get(getattr(p, k), "") for k in ("emotion_clean", "emotion_corrupted")}
        )
        for p in load_pairs()
    ]
    known = [p for p in named if words.get(p.emotion_clean) and words.get(p.emotion_corrupted)]

    def same(p):
        return len({len(tokenizer(t).input_ids) for t in (p.clean, p.corrupted, p.control)}) == 1

    kept = [p for p in known if same(p)]
    return kept, len(known) - len(kept)


def triad(inputs: Inputs, stream: Stream, layer: int, dose: float) -> tuple[list[Row], list[Pair]]:
    """Patch, ablate and add; and the pairs that have a gap (none where they are too few)."""
    pairs, dropped = usable_pairs(inputs)
    if len(pairs) < MIN_PAIRS:
        return [], []
    model, seed = inputs.model, inputs.seed
    prompts = {
        kind: encode(model, [getattr(p, kind) for p in pairs])
        for kind in ("clean", "corrupted", "control")
    }
    read = _reader(inputs, pairs)
    kept: dict[str, Tensor] = {}
    d = {kind: read(prompts[kind], keep=(layer, kind, kept)) for kind in prompts}
    gap = d["clean"] - d["corrupted"]
    used = torch.from_numpy(passing(d["clean"].numpy(), d["corrupted"].numpy(), MIN_GAP))
    n_used = int(used.sum())
    if n_used < MIN_PAIRS:
        few = row(
            NAME,
            "pairs with a gap",
            n_used,
            n=len(pairs),
            unit_of_n="pairs",
            layer=layer,
            seed=seed,
        )
        return [few], []

    base = inputs.directions
    v = base[[p.emotion_clean for p in pairs]] - base[[p.emotion_corrupted for p in pairs]]
    v = replace(v, emotions=tuple(p.id for p in pairs))
    n_patched, n_ablated = (100, 40) if inputs.full else (N_PATCHED, N_ABLATED)
    anywhere = [
        _like(v, random_directions(v, len(pairs), seed=seed + 1 + k)) for k in range(n_patched)
    ]
    same_variance = [
        matched(inputs.stories.acts, v, layer, seed + 1 + k, together=False)
        for k in range(n_ablated)
    ]

    last = Positions(
        tuple(prompts["corrupted"]), tuple((len(e.ids) - 1,) for e in prompts["corrupted"])
    )

    def patched(
        along: EmotionDirections | None, where: Positions | Literal["all"] = "all"
    ) -> Tensor:
        hooks = patch_resid_post(kept["clean"], layer=layer, along=along, positions=where)
        return read(prompts["corrupted"], hooks, after=kept["corrupted"]) - d["corrupted"]

    def lost(hooks: Hooks) -> Tensor:
        validate(model, hooks)
        return gap - (read(prompts["clean"], hooks) - read(prompts["corrupted"], hooks))

    def lost_after_blocks(u: EmotionDirections) -> Tensor:
        return lost(ablate_resid_post(u, layer="all", direction_from=layer, per_row=True))

    def lost_everywhere(u: EmotionDirections) -> Tensor:
        return lost(ablate_stream(u, stream, direction_from=layer, per_row=True))

    def added(u: EmotionDirections) -> Tensor:
        hooks = steer_resid_post(u, layer=layer, dose=dose)
        return read(prompts["corrupted"], hooks, after=kept["corrupted"]) - d["corrupted"]

    control = d["clean"] - d["control"]  # what a swap of another fact does to the same readout
    groups = [f"{p.emotion_clean}/{p.emotion_corrupted}" for p in pairs]
    say = {
        "hook": "resid_post",
        "layer": layer,
        "seed": seed,
        "estimator": "mean_difference",
        "unit_of_n": "pairs",
    }
    out = [
        row(NAME, "pairs with a gap", n_used, n=len(pairs), split=f"{dropped} dropped for their length", **say),
        row(NAME, "gap in logits", stats.bootstrap_mean(gap.numpy(), groups), n=len(pairs), **say),
        row(NAME, "gap in logits", stats.bootstrap_mean(control.numpy(), groups), control="another fact swapped", n=len(pairs), **say),
    ]  # fmt: skip

    share = partial(_share, gap=gap, used=used, groups=groups)
    # at all positions the whole stream would be the clean run itself
    whole = share(patched(None, last)[None])
    out.append(row(NAME, "patch recovery, whole stream of the last token", whole, n=n_used, **say))
    tests: tuple[
        tuple[
            str, Callable[[EmotionDirections], Tensor], list[EmotionDirections], str, dict[str, Any]
        ],
        ...,
    ] = (
        ("patch recovery", patched, anywhere, "random directions", {}),
        ("ablate loss", lost_after_blocks, same_variance, "random, same variance", {}),
        (PRIMARY, lost_everywhere, same_variance, "random, same variance", {"hook": "stream"}),
        ("add gain", added, anywhere, "random directions", {"dose": dose}),
    )
    for metric, test, others, against, more in tests:
        own, null = test(v)[None], torch.stack([test(u) for u in others])
        fields = say | {"n": n_used, "split": None} | more
        drawn = fields | {"control": against, "split": f"{len(others)} draws"}
        out.append(row(NAME, metric, share(own), **fields))
        out.append(row(NAME, metric, share(null), **drawn))
        out.append(
            row(
                NAME,
                f"{metric} minus random",
                share(own - null),
                primary=metric == PRIMARY,
                **drawn,
            )
        )
        for group in dict.fromkeys(groups):
            here = used & torch.tensor([g == group for g in groups])
            for values, of in ((own, None), (null, against)):
                if here.sum() >= 2:
                    of_these = float(values.mean(0)[here].sum() / gap[here].sum())
                    by = fields | {"n": int(here.sum()), "control": of}
                    out.append(row(NAME, f"{metric} by contrast", of_these, emotion=group, **by))
    return out, [p for p, u in zip(pairs, used.tolist(), strict=True) if u]


def _share(effect: Tensor, *, gap: Tensor, used: Tensor, groups: Sequence[str]) -> stats.Estimate:
    """Ratio of means over the used pairs of a table `[draw pair]`; draws and whole contrasts, whose pairs share v and words, are resampled."""
    e, g = effect[:, used].double().numpy(), gap[used].double().numpy()
    return stats.bootstrap_draws(
        e, [c for c, u in zip(groups, used.tolist(), strict=True) if u], of=g
    )


def _like(v: EmotionDirections, random: EmotionDirections) -> EmotionDirections:
    return replace(v, vectors=random.vectors)


def _reader(inputs: Inputs, pairs: list[Pair]) -> Any:
    """A function: prompts and hooks to the logit difference of each pair, at the last token.

    `keep` stores the stream after a block; hooks of that block alone can then be applied to it (`after`) without running the blocks before.
    """
    model = inputs.model
    words = first_tokens(
        model.tokenizer, {e.name: e.target_words for e in inputs.stories.emotions.emotions}
    )
    device = getattr(model.cfg, "device", "cpu")

    @torch.no_grad()
    def read(
        encoded: list[EncodedText],
        hooks: Hooks | None = None,
        keep: Any = None,
        after: Tensor | None = None,
    ) -> Float[Tensor, " pair"]:
        tokens, mask = pad(encoded, "left", device)
        window = Window(tokens.shape[1])
        bound = [(n, h.within(window) if isinstance(h, Hook) else h) for n, h in hooks or []]
        if keep is not None:
            layer, kind, stream = keep
            bound.append(
                (
                    f"blocks.{layer}.hook_resid_post",
                    lambda act, hook: stream.__setitem__(kind, act.detach()),
                )
            )
        if after is not None and can_start_at_layer(model):
            [(_, hook)] = bound
            resid = hook(after)
            if hook.spec.layer + 1 < model.cfg.n_layers:
                resid = run_from(model, resid, mask, hook.spec.layer + 1)
        else:
            with model.hooks(fwd_hooks=bound):
                resid = run_to(model, tokens, mask, model.cfg.n_layers)
        logits = unembed(model, resid[:, -1:])[:, 0].float().cpu()
        return torch.stack(
            [
                logits[i, words[p.emotion_clean]].mean()
                - logits[i, words[p.emotion_corrupted]].mean()
                for i, p in enumerate(pairs)
            ]
        )

    return read


def where(inputs: Inputs, pairs: list[Pair]) -> list[Row]:
    """Share of the gap that each layer's stream carries at each span of the prompt (`em.patch_resid_pre`), pairs of all contrasts together."""
    if len(pairs) < MIN_PAIRS:
        return []
    some = pairs if inputs.full else pairs[:: max(1, len(pairs) // 20)]
    n = inputs.model.cfg.n_layers
    layers = list(range(n)) if inputs.full else sorted({round(k * (n - 1) / 6) for k in range(7)})
    tokenizer = inputs.model.tokenizer
    words = first_tokens(
        tokenizer, {e.name: e.target_words for e in inputs.stories.emotions.emotions}
    )
    tables = []
    for contrast in dict.fromkeys((p.emotion_clean, p.emotion_corrupted) for p in some):
        here = [p for p in some if (p.emotion_clean, p.emotion_corrupted) == contrast]
        first, second = (words[e] for e in contrast)

        def difference(
            logits: Tensor, a: Sequence[int] = first, b: Sequence[int] = second
        ) -> Tensor:
            return logits[:, a].mean(-1) - logits[:, b].mean(-1)

        tables.append(
            patch_resid_pre(
                inputs.model, clean=[p.clean for p in here], corrupted=[p.corrupted for p in here], layers=layers,
                positions=SPANS, metric=difference,
            )
        )  # fmt: skip
    whole = tables[0].joined(tables[1:])
    bounds = whole.interval
    out = []
    for i, layer in enumerate(layers):
        for j, span in enumerate(whole.labels):
            if not np.isfinite(whole.recovery[i, j]):
                continue
            low, high = (float(b[i, j]) for b in bounds) if bounds is not None else (None, None)
            out.append(
                row(NAME, "patch recovery by layer and span", float(whole.recovery[i, j]), low=low, high=high, layer=layer, split=span,
                    hook="resid_pre", n=int(whole.pairs[i, j]), unit_of_n="pairs", seed=inputs.seed)
            )  # fmt: skip
    return out


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

"""Patch, ablate and add on pairs of prompts: how `causal` measures them, and where in prompt and model the gap travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emolens import stats
from emolens.directions.controls import random_directions
from emolens.directions.value import EmotionDirections
from emolens.experiments.base import Inputs
from emolens.experiments.refitting import matched
from emolens.experiments.rows import Row, row
from emolens.interventions.check import validate
from emolens.interventions.hooks import Hook, Hooks
from emolens.interventions.metrics import SPANS, passing
from emolens.interventions.patching import patch_resid_pre
from emolens.interventions.positions import Positions, Window
from emolens.interventions.stream import Stream, ablate_stream
from emolens.interventions.verbs import ablate_resid_post, patch_resid_post, steer_resid_post
from emolens.models.points import device_of
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
    used = passing(d["clean"], d["corrupted"], MIN_GAP)
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
    device = device_of(model)

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
            if whole.recovery[i, j].isnan():
                continue
            low, high = (float(b[i, j]) for b in bounds) if bounds is not None else (None, None)
            out.append(
                row(NAME, "patch recovery by layer and span", float(whole.recovery[i, j]), low=low, high=high, layer=layer, split=span,
                    hook="resid_pre", n=int(whole.pairs[i, j]), unit_of_n="pairs", seed=inputs.seed)
            )  # fmt: skip
    return out

"""Patch, ablate, add: three tests of whether the model uses a direction, on prompts that differ in one fact.

Each pair has a clean prompt, a corrupted one whose changed fact changes the feeling, and a control whose changed fact does not. With
d(x) the logit difference of the two emotions' words at the last token, v the difference of their directions, gap = d(clean) - d(corrupted):
*patch* - the clean stream at the layer put into the corrupted run, at the last token whole, at every token only its part along v: share
of the gap recovered;
*ablate* - v taken out of both runs at every block (affinely, sinks left alone): share of the gap lost;
*add* - v added to the corrupted run: change of d in gaps. Beside each, random directions that remove as much variance of ordinary tokens
(ablate), or point anywhere (patch, add). Shares are ratios of means over pairs whose gap is positive; intervals resample pairs.
A map by layer and span of the prompt shows where the whole stream carries the gap.

Then the emotions' whole subspace is taken out while the stories are read again, and a classifier is fitted *afresh* on what is left (an
old one fails by construction), beside random subspaces of the same rank and removed variance, with the damage to neutral text.
Primary row: share of the gap lost by ablation minus that of the matched random directions (for a set that the pairs do not fit: what
the refitted classifier loses, minus the same). "Contributes, given these controls", not
"is necessary".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from emolens import stats
from emolens.activations import collect_resid_post
from emolens.directions import EmotionDirections, random_directions
from emolens.experiments.base import Inputs, Row, row
from emolens.interventions import (
    Hook,
    Hooks,
    Positions,
    Window,
    ablate_resid_post,
    orthonormal,
    patch_resid_post,
    steer_resid_post,
)
from emolens.materials import Pair, load_pairs
from emolens.models import EncodedText, can_start_at_layer, encode, pad, run_from, run_to, unembed
from emolens.patching import SPANS, patch_resid_pre
from emolens.readout import first_tokens

NAME = "causal"
MIN_PAIRS = 8


def run(inputs: Inputs, *, layer: int, dose: float, names: Sequence[str]) -> list[Row]:
    """All rows. `layer`, `dose` and the emotions of the subspace are those that validation steering chose."""
    triad = _triad(inputs, layer, dose)
    return [*triad, *_where(inputs), *_refit(inputs, layer, list(names), primary=not any(r.primary for r in triad))]


# --- the triad --------------------------------------------------------------------------------------------------------


def usable_pairs(inputs: Inputs) -> tuple[list[Pair], int]:
    """Pairs of emotions of this set whose three prompts have one length in this tokenizer, and how many were dropped for their length."""
    tokenizer: Any = inputs.model.tokenizer  # type: ignore[attr-defined]  # it has read the stories
    words = first_tokens(tokenizer, {e.name: e.target_words for e in inputs.emotions.emotions})
    name = inputs.emotions.concepts
    named = [
        p.model_copy(update={k: name.get(getattr(p, k), "") for k in ("emotion_clean", "emotion_corrupted")})
        for p in load_pairs()
    ]
    known = [p for p in named if words.get(p.emotion_clean) and words.get(p.emotion_corrupted)]
    same = lambda p: len({len(tokenizer(t).input_ids) for t in (p.clean, p.corrupted, p.control)}) == 1  # noqa: E731  (used once)
    kept = [p for p in known if same(p)]
    return kept, len(known) - len(kept)


def _triad(inputs: Inputs, layer: int, dose: float) -> list[Row]:
    pairs, dropped = usable_pairs(inputs)
    if len(pairs) < MIN_PAIRS:
        return []
    model, seed = inputs.model, inputs.seed
    prompts = {kind: encode(model, [getattr(p, kind) for p in pairs]) for kind in ("clean", "corrupted", "control")}
    read = _reader(inputs, pairs)
    stream: dict[str, Tensor] = {}
    d = {kind: read(prompts[kind], keep=(layer, kind, stream)) for kind in prompts}
    gap = d["clean"] - d["corrupted"]
    used = gap > 0
    if used.sum() < MIN_PAIRS:
        return [
            row(NAME, "pairs with a gap", float(used.sum()), n=len(pairs), unit_of_n="pairs", layer=layer, seed=seed)
        ]

    base = inputs.directions
    v = base[[p.emotion_clean for p in pairs]] - base[[p.emotion_corrupted for p in pairs]]
    v = replace(v, emotions=tuple(p.id for p in pairs))
    n_random = 20 if inputs.full else 2
    anywhere = [_like(v, random_directions(v, len(pairs), seed=seed + 1 + k)) for k in range(n_random)]
    matched = [_matched(inputs, v, layer, seed + 1 + k, together=False) for k in range(n_random)]

    last = Positions(tuple(prompts["corrupted"]), tuple((len(e.ids) - 1,) for e in prompts["corrupted"]))

    def patched(along: EmotionDirections | None, where: Positions | Literal["all"]) -> Tensor:
        hooks = patch_resid_post(stream["clean"], layer=layer, along=along, positions=where)
        return read(prompts["corrupted"], hooks, after=stream["corrupted"]) - d["corrupted"]

    def lost(u: EmotionDirections) -> Tensor:
        hooks = ablate_resid_post(u, layer="all", direction_from=layer, per_row=True)
        return gap - (read(prompts["clean"], hooks) - read(prompts["corrupted"], hooks))

    def added(u: EmotionDirections) -> Tensor:
        return (
            read(prompts["corrupted"], steer_resid_post(u, layer=layer, dose=dose), after=stream["corrupted"])
            - d["corrupted"]
        )

    mean = lambda f, us: torch.stack([f(u) for u in us]).mean(0)  # noqa: E731  (a name for four lines)
    whole = patched(None, last)  # at all positions it would be the clean run itself
    along, along_null = patched(v, "all"), mean(lambda u: patched(u, "all"), anywhere)
    loss, loss_null = lost(v), mean(lost, matched)
    gain, gain_null = added(v), mean(added, anywhere)
    control = d["clean"] - d["control"]  # what a swap of another fact does to the same readout

    groups = [f"{p.emotion_clean}/{p.emotion_corrupted}" for p in pairs]
    say = {"hook": "resid_post", "layer": layer, "seed": seed, "estimator": "mean_difference", "unit_of_n": "pairs"}
    out = [
        row(NAME, "pairs with a gap", float(used.sum()), n=len(pairs), split=f"{dropped} dropped for their length", **say),
        row(NAME, "gap in logits", stats.bootstrap_mean(gap.numpy(), range(len(gap))), n=len(pairs), **say),
        row(NAME, "gap in logits", stats.bootstrap_mean(control.numpy(), range(len(gap))), control="another fact swapped", n=len(pairs), **say),
    ]  # fmt: skip
    tests = (
        ("patch recovery, whole stream of the last token", whole, None, None, None),
        ("patch recovery", along, along_null, "random directions", None),
        ("ablate loss", loss, loss_null, "random, same variance", None),
        ("add gain", gain, gain_null, "random directions", dose),
    )
    for metric, effect, null, against, amount in tests:
        out.append(row(NAME, metric, _share(effect, gap, used), dose=amount, n=int(used.sum()), **say))
        if null is not None:
            out.append(
                row(NAME, metric, _share(null, gap, used), control=against, dose=amount, n=int(used.sum()), **say)
            )
            primary = metric == "ablate loss"
            paired = _share(effect - null, gap, used)
            out.append(
                row(
                    NAME,
                    f"{metric} minus random",
                    paired,
                    primary=primary,
                    control=against,
                    dose=amount,
                    n=int(used.sum()),
                    **say,
                )
            )
        for group in dict.fromkeys(groups):
            here = used & torch.tensor([g == group for g in groups])
            for values, of in ((effect, None), (null, against)):
                if here.sum() >= 2 and values is not None:
                    share = float(values[here].sum() / gap[here].sum())
                    out.append(
                        row(NAME, f"{metric} by contrast", share, emotion=group, control=of, n=int(here.sum()), **say)
                    )
    return out


def _share(effect: Tensor, gap: Tensor, used: Tensor) -> stats.Estimate:
    """Ratio of means over the used pairs, pairs resampled."""
    e, g = effect[used].double().numpy(), gap[used].double().numpy()
    return stats.bootstrap(lambda i: float(e[i].sum() / g[i].sum()), range(len(g)))


def _like(v: EmotionDirections, random: EmotionDirections) -> EmotionDirections:
    return replace(v, vectors=random.vectors)


def _reader(inputs: Inputs, pairs: list[Pair]) -> Any:
    """A function: prompts and hooks to the logit difference of each pair, at the last token.

    `keep` stores the stream after a block; hooks of that block alone can then be applied to it (`after`) without running the blocks before.
    """
    model: Any = inputs.model
    words = first_tokens(model.tokenizer, {e.name: e.target_words for e in inputs.emotions.emotions})
    device = getattr(model.cfg, "device", "cpu")

    @torch.no_grad()
    def read(
        encoded: list[EncodedText], hooks: Hooks | None = None, keep: Any = None, after: Tensor | None = None
    ) -> Float[Tensor, " pair"]:
        tokens, mask = pad(encoded, "left", device)
        window = Window(tokens.shape[1])
        bound = [(n, h.within(window) if isinstance(h, Hook) else h) for n, h in hooks or []]
        if keep is not None:
            layer, kind, stream = keep
            bound.append((f"blocks.{layer}.hook_resid_post", lambda act, hook: stream.__setitem__(kind, act.detach())))
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
                logits[i, words[p.emotion_clean]].mean() - logits[i, words[p.emotion_corrupted]].mean()
                for i, p in enumerate(pairs)
            ]
        )

    return read


def _where(inputs: Inputs) -> list[Row]:
    """Share of the gap that each layer's stream carries at each span of the prompt (`em.patch_resid_pre`), pairs of all contrasts together."""
    pairs, _ = usable_pairs(inputs)
    if len(pairs) < MIN_PAIRS:
        return []
    some = pairs if inputs.full else pairs[:: max(1, len(pairs) // 20)]
    n = inputs.model.cfg.n_layers
    layers = list(range(n)) if inputs.full else sorted({round(k * (n - 1) / 6) for k in range(7)})
    tokenizer: Any = inputs.model.tokenizer  # type: ignore[attr-defined]  # it has read the stories
    words = first_tokens(tokenizer, {e.name: e.target_words for e in inputs.emotions.emotions})
    tables = []
    for contrast in dict.fromkeys((p.emotion_clean, p.emotion_corrupted) for p in some):
        here = [p for p in some if (p.emotion_clean, p.emotion_corrupted) == contrast]
        first, second = (words[e] for e in contrast)
        difference = lambda logits, a=first, b=second: logits[:, a].mean(-1) - logits[:, b].mean(-1)  # noqa: E731  (a metric)
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
                    hook="resid_pre", n=len(whole.clean), unit_of_n="pairs", seed=inputs.seed)
            )  # fmt: skip
    return out


# --- what is left after ablation --------------------------------------------------------------------------------------


def _refit(inputs: Inputs, layer: int, names: list[str], *, primary: bool) -> list[Row]:
    """A fresh classifier on stories that were read without the subspace."""
    kept = [i for i, k in enumerate(inputs.labels) if inputs.emotions.names[k] in names]
    texts, topics = [inputs.texts[i] for i in kept], [inputs.topics[i] for i in kept]
    labels = np.array([names.index(inputs.emotions.names[inputs.labels[i]]) for i in kept])
    neutral = [n.text for n in inputs.emotions.neutral][:: max(1, len(inputs.emotions.neutral) // 8)][:8]
    v = inputs.directions[names]
    hooks: dict[str | None, Hooks] = {"nothing": [], None: ablate_resid_post(v, layer="all", direction_from=layer)}
    for k in range(8 if inputs.full else 2):
        random = _matched(inputs, v, layer, inputs.seed + 1 + k, together=True)
        hooks[f"random subspace {k}"] = ablate_resid_post(random, layer="all", direction_from=layer)
    model: Any = inputs.model
    right: dict[str | None, np.ndarray] = {}
    loss: dict[str | None, np.ndarray] = {}
    for what, list_of in hooks.items():
        with model.hooks(fwd_hooks=list_of):
            loss[what] = _loss(model, neutral)
            if list_of:
                rows = collect_resid_post(model, texts, layers=[layer], progress=False).rows[:, 0]
            else:  # they have been read already
                rows = inputs.main.rows[kept, inputs.acts.layers.index(layer)]
        x = rows.double().numpy()
        fit = lambda train, test: stats.logistic_scores(x[train], labels[train], x[test])  # noqa: E731, B023  (called before x changes)
        scores = stats.heldout_scores(fit, topics, inputs.folds, len(names))
        right[what] = stats.top_k(scores, labels).astype(float)
    random = [k for k in hooks if k not in (None, "nothing")]
    rank = len(orthonormal(v.unit(layer)))
    say = {
        "hook": "resid_post",
        "layer": layer,
        "seed": inputs.seed,
        "estimator": "logistic",
        "n": len(texts),
        "unit_of_n": "stories",
    }
    matched = np.mean([right[k] for k in random], 0)
    damage = np.mean([loss[k] for k in random], 0)
    out = [
        row(NAME, "top1 refitted", stats.bootstrap_mean(right["nothing"], topics), control="nothing ablated", split=f"{len(names)} emotions", **say),
        row(NAME, "top1 refitted", stats.bootstrap_mean(right[None], topics), split=f"rank {rank}", **say),
        row(NAME, "top1 refitted", stats.bootstrap_mean(matched, topics), control="random subspaces, same variance", **say),
        row(NAME, "top1 refitted minus random", stats.bootstrap_mean(right[None] - matched, topics), primary=primary, control="random subspaces, same variance", **say),
    ]  # fmt: skip
    say |= {"n": len(neutral), "unit_of_n": "neutral texts", "estimator": None}
    for what, values in ((None, loss[None]), ("random subspaces, same variance", damage)):
        estimate = stats.bootstrap_mean(values - loss["nothing"], range(len(neutral)))
        out.append(row(NAME, "change of loss on neutral text", estimate, control=what, **say))
    return out


@torch.no_grad()
def _loss(model: Any, texts: list[str]) -> np.ndarray:
    """Mean loss in nats of each text; hooks that are on the model are in force."""
    out = []
    for e in encode(model, texts):
        tokens, mask = pad([e], "right", getattr(model.cfg, "device", "cpu"))
        log = model(tokens, attention_mask=mask, return_type="logits")[0, :-1].float().log_softmax(-1)
        out.append(-float(log.gather(1, tokens[0, 1:, None]).mean()))
    return np.array(out)


def _matched(inputs: Inputs, v: EmotionDirections, layer: int, seed: int, *, together: bool) -> EmotionDirections:
    """Random directions that hold as much of the variance of ordinary neutral tokens at a layer as those of `v` do there.

    Noise g is bent towards the leading components of the covariance C, C^a g, and a found by bisection: one for each direction, or one
    for the subspace that they span together. The same directions stand at every layer.
    """
    tokens = inputs.acts.neutral_tokens
    assert tokens is not None  # a study refuses a set without neutral texts
    x = tokens.rows[:, tokens.layers.index(layer)].double()
    values, axes = torch.linalg.eigh(torch.cov(x.T))  # ascending
    values = values.clamp_min(float(values[-1]) * 1e-9)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(v.vectors), len(values)), generator=generator, dtype=torch.float64)

    def held(u: Tensor) -> Tensor:
        if together:
            return ((orthonormal(u.float()).double() @ axes) ** 2 @ values).sum()[None]
        u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        return (u @ axes) ** 2 @ values

    target = held(v.vectors[:, v.slot(layer)].double())
    low, high = torch.full_like(target, -1.0), torch.full_like(target, 2.0)
    bent = noise
    for _ in range(30):
        a = (low + high) / 2
        bent = (noise * (values / values[-1]) ** a[:, None]) @ axes.T
        less = held(bent) < target  # C^a g leans on the large components more as a grows
        low, high = torch.where(less, a, low), torch.where(less, high, a)
    vectors = repeat(bent.float(), "direction d_model -> direction layer d_model", layer=len(v.layers))
    return replace(v, vectors=vectors, calibration=None)

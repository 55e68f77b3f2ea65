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
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from emolens import stats
from emolens._typing import HookedModel
from emolens.collect.activations import Activations
from emolens.collect.forward import collect, collect_resid_post
from emolens.directions.controls import random_directions, shuffled_directions
from emolens.directions.estimators import mean_difference
from emolens.directions.value import EmotionDirections
from emolens.experiments.base import Inputs, Row, row
from emolens.interventions.check import validate
from emolens.interventions.hooks import Hook, Hooks
from emolens.interventions.metrics import SPANS, passing
from emolens.interventions.patching import patch_resid_pre
from emolens.interventions.positions import Positions, Window
from emolens.interventions.stream import Stream, ablate_stream, stream_points
from emolens.interventions.verbs import (
    ablate_resid_post,
    orthonormal,
    patch_resid_post,
    steer_resid_post,
)
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
N_SHUFFLED, N_SUBSPACES = 3, 2  # draws a fold of the refit, each of which reads the stories again
PRIMARY = "ablate loss, whole stream"
NOTHING, SHUFFLED, SUBSPACE = (
    "nothing ablated",
    "shuffled labels",
    "random subspaces, same variance",
)


def run(inputs: Inputs, *, layer: int, dose: float, names: Sequence[str]) -> list[Row]:
    """All rows. `layer`, `dose` and the emotions of the subspace are those that validation steering chose."""
    stream = read_stream(inputs, names)
    triad, pairs = _triad(inputs, stream, layer, dose)
    primary = not any(r.primary for r in triad)
    return [
        *triad,
        *_where(inputs, pairs),
        *_refit(inputs, stream, layer, list(names), primary=primary),
    ]


def read_stream(inputs: Inputs, names: Sequence[str]) -> Stream:
    """The stories of these emotions at every place of the stream, for the references of ablation; resid_post has been read already."""
    kept = [i for i, k in enumerate(inputs.labels) if inputs.emotions.names[k] in names]
    labels = {
        "emotions": [inputs.emotions.names[inputs.labels[i]] for i in kept],
        "topics": [inputs.topics[i] for i in kept],
    }
    sites = {
        point: collect(
            inputs.model,
            [inputs.texts[i] for i in kept],
            point,
            layers=layers,
            progress=False,
            **labels,
        )
        for point, layers in stream_points(inputs.model).items()
        if point != "resid_post"
    }
    return Stream((*sites.values(), inputs.main.select(lambda t: t.emotion in names)))


# --- the triad --------------------------------------------------------------------------------------------------------


def usable_pairs(inputs: Inputs) -> tuple[list[Pair], int]:
    """Pairs of emotions of this set whose three prompts have one length in this tokenizer, and how many were dropped for their length."""
    tokenizer = inputs.model.tokenizer
    words = first_tokens(tokenizer, {e.name: e.target_words for e in inputs.emotions.emotions})
    name = inputs.emotions.concepts
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


def _triad(inputs: Inputs, stream: Stream, layer: int, dose: float) -> tuple[list[Row], list[Pair]]:
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
    matched = [
        _matched(inputs.acts, v, layer, seed + 1 + k, together=False) for k in range(n_ablated)
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
        ("ablate loss", lost_after_blocks, matched, "random, same variance", {}),
        (PRIMARY, lost_everywhere, matched, "random, same variance", {"hook": "stream"}),
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
        model.tokenizer, {e.name: e.target_words for e in inputs.emotions.emotions}
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


def _where(inputs: Inputs, pairs: list[Pair]) -> list[Row]:
    """Share of the gap that each layer's stream carries at each span of the prompt (`em.patch_resid_pre`), pairs of all contrasts together."""
    if len(pairs) < MIN_PAIRS:
        return []
    some = pairs if inputs.full else pairs[:: max(1, len(pairs) // 20)]
    n = inputs.model.cfg.n_layers
    layers = list(range(n)) if inputs.full else sorted({round(k * (n - 1) / 6) for k in range(7)})
    tokenizer = inputs.model.tokenizer
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
            if whole.recovery[i, j].isnan():
                continue
            low, high = (float(b[i, j]) for b in bounds) if bounds is not None else (None, None)
            out.append(
                row(NAME, "patch recovery by layer and span", float(whole.recovery[i, j]), low=low, high=high, layer=layer, split=span,
                    hook="resid_pre", n=int(whole.pairs[i, j]), unit_of_n="pairs", seed=inputs.seed)
            )  # fmt: skip
    return out


# --- what is left after ablation --------------------------------------------------------------------------------------


def _refit(
    inputs: Inputs, stream: Stream, layer: int, names: list[str], *, primary: bool
) -> list[Row]:
    """A fresh classifier on stories that were read without the subspace: inside each fold, from its training topics, everything is made again.

    Directions, neutral components and references of the training topics; shuffled labels and random subspaces likewise. With each
    ablation in force all stories are read; the classifier is fitted on the ablated training rows and judged on the ablated held-out ones.
    """
    kept = [i for i, k in enumerate(inputs.labels) if inputs.emotions.names[k] in names]
    texts, topics = [inputs.texts[i] for i in kept], [inputs.topics[i] for i in kept]
    labels = np.array([names.index(inputs.emotions.names[inputs.labels[i]]) for i in kept])
    draws = {
        NOTHING: 1,
        None: 1,
        SHUFFLED: 16 if inputs.full else N_SHUFFLED,
        SUBSPACE: 8 if inputs.full else N_SUBSPACES,
    }
    right = {what: np.full((n, len(texts)), np.nan) for what, n in draws.items()}
    neutral = _dealt(inputs)
    loss = {what: np.full((n, len(neutral)), np.nan) for what, n in draws.items()}
    model = inputs.model
    whole = inputs.main.rows[
        kept, inputs.acts.layers.index(layer)
    ]  # read already, with nothing ablated
    ranks = set()
    for k, fold in enumerate(inputs.folds):
        held = np.isin(topics, fold)
        train = inputs.without(fold).at([layer])
        v = mean_difference(train)[names]
        means = stream.select(lambda t, fold=fold: t.topic not in fold)
        ranks.add(len(orthonormal(v.unit(layer))))
        made: dict[str | None, Callable[[int], EmotionDirections]] = {
            None: lambda seed, v=v: v,
            SHUFFLED: lambda seed, v=v, train=train: shuffled_directions(train, v, seed=seed),
            SUBSPACE: lambda seed, v=v, train=train: _matched(train, v, layer, seed, together=True),
        }
        for what, n in draws.items():
            for j in range(n):
                hooks = (
                    []
                    if what == NOTHING
                    else ablate_stream(made[what](inputs.seed + 1 + 1000 * k + j), means)
                )
                with model.hooks(fwd_hooks=hooks):
                    rows = (
                        collect_resid_post(model, texts, layers=[layer], progress=False).rows[:, 0]
                        if hooks
                        else whole
                    )
                    for i, (of, text) in enumerate(neutral):
                        if of == k:
                            loss[what][j, i] = _loss(model, text)
                x = rows.double().numpy()
                scores = stats.logistic_scores(x[~held], labels[~held], x[held])
                right[what][j, held] = stats.top_k(scores, labels[held])
    say = {
        "hook": "stream",
        "layer": layer,
        "seed": inputs.seed,
        "estimator": "logistic",
        "n": len(texts),
        "unit_of_n": "stories",
    }
    rank = "-".join(map(str, sorted({min(ranks), max(ranks)})))
    split = {NOTHING: f"{len(names)} emotions", None: f"rank {rank}"} | {
        c: f"{draws[c]} draws a fold" for c in (SHUFFLED, SUBSPACE)
    }
    out = [
        row(
            NAME,
            "top1 refitted",
            stats.bootstrap_draws(values, topics),
            control=what,
            split=split[what],
            **say,
        )
        for what, values in right.items()
    ]
    for what, name in ((SHUFFLED, "shuffled"), (SUBSPACE, "random"), (NOTHING, "nothing ablated")):
        paired = stats.bootstrap_draws(right[None] - right[what], topics)
        mine = primary and what == SHUFFLED
        out.append(
            row(
                NAME,
                f"top1 refitted minus {name}",
                paired,
                primary=mine,
                control=what,
                split=split[what],
                **say,
            )
        )
    say |= {"n": len(neutral), "unit_of_n": "neutral texts", "estimator": None}
    for what in (None, SHUFFLED, SUBSPACE):
        change = stats.bootstrap_draws(loss[what] - loss[NOTHING], range(len(neutral)))
        out.append(
            row(
                NAME,
                "change of loss on neutral text",
                change,
                control=what,
                split=split[what] if what else None,
                **say,
            )
        )
    return out


def _dealt(inputs: Inputs) -> list[tuple[int, str]]:
    """At most two neutral texts of the held-out topics of each fold (those without a topic are dealt in turn), with the fold's number."""
    fold_of = {topic: k for k, fold in enumerate(inputs.folds) for topic in fold}
    n = len(inputs.folds)
    found = [
        (fold_of.get(t.topic or "", i % n), t.text) for i, t in enumerate(inputs.emotions.neutral)
    ]
    return [pair for k in range(n) for pair in [f for f in found if f[0] == k][:2]]


@torch.no_grad()
def _loss(model: HookedModel, text: str) -> float:
    """Mean loss of a text in nats a token; hooks that are on the model are in force."""
    [e] = encode(model, [text])
    tokens, mask = pad([e], "right", device_of(model))
    log = model(tokens, attention_mask=mask, return_type="logits")[0, :-1].float().log_softmax(-1)
    return -float(log.gather(1, tokens[0, 1:, None]).mean())


def _matched(
    acts: Activations, v: EmotionDirections, layer: int, seed: int, *, together: bool
) -> EmotionDirections:
    """Random directions that hold as much of the variance of ordinary neutral tokens at a layer as those of `v` do there.

    Noise g is bent towards the leading components of the covariance C, C^a g, and a found by bisection: one for each direction, or one
    for the subspace of the same rank that they span together. The same directions stand at every layer.
    """
    tokens = acts.neutral_tokens
    assert tokens is not None  # a study refuses a set without neutral texts
    x = tokens.rows[:, tokens.layers.index(layer)].double()
    values, axes = torch.linalg.eigh(torch.cov(x.T))  # ascending
    values = values.clamp_min(float(values[-1]) * 1e-9)
    generator = torch.Generator().manual_seed(seed)
    n = len(orthonormal(v.unit(layer))) if together else len(v.vectors)
    noise = torch.randn((n, len(values)), generator=generator, dtype=torch.float64)

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
    vectors = repeat(
        bent.float(), "direction d_model -> direction layer d_model", layer=len(v.layers)
    )
    names = v.emotions if n == len(v.emotions) else tuple(f"random {k}" for k in range(n))
    return replace(v, emotions=names, vectors=vectors, calibration=None)

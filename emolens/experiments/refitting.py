"""What is left to be read when a subspace is taken out of the stream: ablate, read the stories again, fit a classifier afresh.

An old classifier fails by construction; a fresh one does not. What is removed is fitted inside each fold: removing what was fitted on all
stories leaves held-out ones that lie on the wrong side of every boundary, and that looks like an effect. Beside it shuffled labels and
random subspaces of the same rank and removed variance, through the same steps, and the damage to neutral text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from emolens import stats
from emolens._typing import HookedModel
from emolens.collect.activations import Activations
from emolens.collect.forward import collect_resid_post
from emolens.directions.controls import shuffled_directions
from emolens.directions.estimators import mean_difference
from emolens.directions.value import EmotionDirections
from emolens.experiments.base import Inputs
from emolens.experiments.rows import Row, row
from emolens.interventions.stream import Stream, ablate_stream
from emolens.interventions.verbs import orthonormal
from emolens.models.tokens import encode, pad

N_SHUFFLED, N_SUBSPACES = 3, 2  # draws a fold, each of which reads the stories again
NOTHING, SHUFFLED, SUBSPACE = (
    "nothing ablated",
    "shuffled labels",
    "random subspaces, same variance",
)


def refit(
    experiment: str,
    inputs: Inputs,
    stream: Stream,
    layer: int,
    names: Sequence[str],
    *,
    primary: bool,
) -> list[Row]:
    """A fresh classifier on stories that were read without the subspace: inside each fold, from its training topics, everything is made again.

    Directions, neutral components and references of the training topics; shuffled labels and random subspaces likewise. With each
    ablation in force all stories are read; the classifier is fitted on the ablated training rows and judged on the ablated held-out ones.
    """
    kept = [
        i for i, k in enumerate(inputs.stories.labels) if inputs.stories.emotions.names[k] in names
    ]
    texts, topics = (
        [inputs.stories.texts[i] for i in kept],
        [inputs.stories.topics[i] for i in kept],
    )
    labels = np.array(
        [names.index(inputs.stories.emotions.names[inputs.stories.labels[i]]) for i in kept]
    )
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
    whole = inputs.stories.main.rows[
        kept, inputs.stories.acts.layers.index(layer)
    ]  # read already, with nothing ablated
    ranks = set()
    for k, fold in enumerate(inputs.stories.folds):
        held = np.isin(topics, fold)
        train = inputs.stories.without(fold).at([layer])
        v = mean_difference(train)[names]
        means = stream.select(lambda t, fold=fold: t.topic not in fold)
        ranks.add(len(orthonormal(v.unit(layer))))
        made: dict[str | None, Callable[[int], EmotionDirections]] = {
            None: lambda seed, v=v: v,
            SHUFFLED: lambda seed, v=v, train=train: shuffled_directions(train, v, seed=seed),
            SUBSPACE: lambda seed, v=v, train=train: matched(train, v, layer, seed, together=True),
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
            experiment,
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
                experiment,
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
                experiment,
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
    fold_of = {topic: k for k, fold in enumerate(inputs.stories.folds) for topic in fold}
    n = len(inputs.stories.folds)
    found = [
        (fold_of.get(t.topic or "", i % n), t.text)
        for i, t in enumerate(inputs.stories.emotions.neutral)
    ]
    return [pair for k in range(n) for pair in [f for f in found if f[0] == k][:2]]


@torch.no_grad()
def _loss(model: HookedModel, text: str) -> float:
    """Mean loss of a text in nats a token; hooks that are on the model are in force."""
    [e] = encode(model, [text])
    tokens, mask = pad([e], "right", getattr(model.cfg, "device", "cpu"))
    log = model(tokens, attention_mask=mask, return_type="logits")[0, :-1].float().log_softmax(-1)
    return -float(log.gather(1, tokens[0, 1:, None]).mean())


def matched(
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
    unknown = torch.full(vectors.shape[:2], torch.nan)
    return replace(v, emotions=names, vectors=vectors, reliability=unknown, calibration=None)

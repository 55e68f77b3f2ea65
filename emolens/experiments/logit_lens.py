"""The logit lens on the directions, as a test before it is a picture.

A list of top tokens looks convincing whatever it is made of. So the lens is scored: do the words that name an emotion rise more for its
own direction than those of other emotions (AUC, chance .5)? Against directions from the same stories with shuffled labels, which lie where
stories vary and have their neutral components removed as the real ones have, and beside them random directions of the same norm, which do
not. Words are shown only where the first passes. Intervals resample emotions. Primary row: mean AUC at the reported layer.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from emolens import stats
from emolens.experiments.base import Inputs, Row, judged, row
from emolens.experiments.fitting import Training, shuffles
from emolens.readout import LogitLens, first_tokens, logit_lens

NAME = "logit_lens"


def run(inputs: Inputs) -> list[Row]:
    """Mean AUC at the reported layer and at the last one; none for a set without target words that this tokenizer can tell apart."""
    rows, _ = run_with_words(inputs)
    return rows


def run_with_words(inputs: Inputs) -> tuple[list[Row], list[LogitLens]]:
    """The rows, and the lenses themselves for a table of words."""
    targets = {e.name: e.target_words for e in inputs.emotions.emotions}
    tokenizer = inputs.model.tokenizer
    if sum(map(bool, first_tokens(tokenizer, targets).values())) < 2:
        return [], []
    training, layers = (
        Training(inputs),
        tuple(dict.fromkeys((inputs.layer, inputs.acts.layers[-1]))),
    )
    slots, drawn = (
        [inputs.acts.layers.index(k) for k in layers],
        shuffles(inputs.labels, inputs.topics, seed=inputs.seed),
    )
    shuffled = torch.stack([training.at(y, slots) for y in drawn])
    rows, lenses = [], []
    for k, layer in enumerate(layers):
        ask = partial(
            logit_lens, inputs.model, inputs.directions, targets, layer=layer, seed=inputs.seed
        )
        lens = ask(null=shuffled[:, :, k])
        lenses.append(lens)
        random = ask(n_random=1000 if inputs.full else 100).null
        judgeable = np.array([x for x in lens.auc.values() if np.isfinite(x)])
        mean = stats.bootstrap_mean(judgeable, range(len(judgeable)), seed=inputs.seed)
        say = {
            "layer": layer,
            "estimator": "mean_difference",
            "hook": inputs.acts.hook_point,
            "n": len(judgeable),
            "unit_of_n": "emotions",
            "seed": inputs.seed,
        }
        for null, control in ((lens.null, "shuffled labels"), (random, "random directions")):
            primary = layer == inputs.layer and control == "shuffled labels"
            against = judged(mean.value, np.array(null), control)
            rows.append(
                row(NAME, "mean auc of target words", mean, primary=primary, **say, **against)
            )
    return rows, lenses

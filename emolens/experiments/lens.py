"""The logit lens on the directions, as a test before it is a picture.

A list of top tokens looks convincing whatever it is made of. So the lens is scored: do the words that name an emotion rise more for its
own direction than those of other emotions (AUC, chance .5), against random directions of the same norm? Words are shown only where
that passes. Primary row: mean AUC at the reported layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from emolens.experiments.base import Inputs, Row, row
from emolens.readout import LogitLens, first_tokens, logit_lens

NAME = "logit_lens"


def run(inputs: Inputs) -> list[Row]:
    """Mean AUC at the reported layer and at the last one; none for a set without target words that this tokenizer can tell apart."""
    rows, _ = run_with_words(inputs)
    return rows


def run_with_words(inputs: Inputs) -> tuple[list[Row], list[LogitLens]]:
    """The rows, and the lenses themselves for a table of words."""
    targets = {e.name: e.target_words for e in inputs.emotions.emotions}
    tokenizer: Any = inputs.model.tokenizer  # type: ignore[attr-defined]  # a model that has read the stories has one
    if sum(map(bool, first_tokens(tokenizer, targets).values())) < 2:
        return [], []
    lenses = [
        logit_lens(
            inputs.model,
            inputs.directions,
            targets,
            layer=layer,
            n_random=1000 if inputs.full else 200,
            seed=inputs.seed,
        )
        for layer in dict.fromkeys((inputs.layer, inputs.acts.layers[-1]))
    ]
    rows = [
        row(NAME, "mean auc of target words", lens.mean_auc, primary=lens.layer == inputs.layer, layer=lens.layer, p=lens.p,
            null_mean=float(np.mean(lens.null)), null_high=float(np.percentile(lens.null, 95)), control="random directions",
            estimator="mean_difference", hook=inputs.acts.hook_point, n=sum(np.isfinite(list(lens.auc.values()))), unit_of_n="emotions", seed=inputs.seed)
        for lens in lenses
    ]  # fmt: skip
    return rows, lenses

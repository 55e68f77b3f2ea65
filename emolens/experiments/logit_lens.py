"""The logit lens on the directions, as a test before it is a picture.

A list of top tokens looks convincing whatever it is made of. So the lens is scored: do the words that name an emotion rise more for its
own direction than those of other emotions (AUC, chance .5)? Against directions from the same stories with shuffled labels, which lie where
stories vary and have their neutral components removed as the real ones have, and beside them random directions of the same norm, which do
not. Words are shown only where the first passes. Intervals resample emotions. Primary row: mean AUC at the reported layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from emolens import stats
from emolens.experiments.base import Experiment, Findings, Gate, Inputs, Shown, Table
from emolens.experiments.fitting import Training, shuffles
from emolens.experiments.rows import Row, judged, row
from emolens.experiments.rules import Claim, interval, number, primary_of
from emolens.readout import LogitLens, first_tokens, logit_lens

NAME = "logit_lens"


def run(inputs: Inputs) -> Findings:
    """Mean AUC at the reported layer and at the last one, and the words; nothing for a set without target words that this tokenizer can tell apart."""
    s, seed = inputs.stories, inputs.seed
    targets = {e.name: e.target_words for e in s.emotions.emotions}
    if sum(map(bool, first_tokens(inputs.model.tokenizer, targets).values())) < 2:
        return Findings()
    training, layers = Training(s), tuple(dict.fromkeys((inputs.layer, s.acts.layers[-1])))
    slots = [s.acts.layers.index(k) for k in layers]
    drawn = shuffles(s.labels, s.topics, seed=seed)
    shuffled = torch.stack([training.at(y, slots) for y in drawn])
    rows, words = [], []
    for k, layer in enumerate(layers):
        ask = partial(logit_lens, inputs.model, inputs.directions, targets, layer=layer, seed=seed)
        lens = ask(null=shuffled[:, :, k])
        words.append(_words(lens))
        random = ask(n_random=1000 if inputs.full else 100).null
        judgeable = np.array([x for x in lens.auc.values() if np.isfinite(x)])
        mean = stats.bootstrap_mean(judgeable, range(len(judgeable)), seed=seed)
        say = partial(
            row, NAME, layer=layer, estimator="mean_difference", hook=s.acts.hook_point, n=len(judgeable), unit_of_n="emotions", seed=seed
        )  # fmt: skip
        for null, control in ((lens.null, "shuffled labels"), (random, "random directions")):
            primary = layer == inputs.layer and control == "shuffled labels"
            against = judged(mean.value, np.array(null), control)
            rows.append(say("mean auc of target words", mean, primary=primary, **against))
    return Findings(rows, words)


def _words(lens: LogitLens) -> Shown:
    """The highest tokens of each emotion, where the lens passes its test."""
    if not any(lens.words.values()):
        return Shown(
            f"At layer {lens.layer} the lens does not pass its test, so no words are shown.", (), ()
        )
    lines = (
        (e, "  ".join(repr(w)[1:-1] for w in words), number(lens.auc[e]))
        for e, words in lens.words.items()
    )
    return Shown(
        f"Highest tokens at layer {lens.layer}", ("emotion", "tokens", "AUC"), tuple(lines)
    )


def gate(findings: Findings) -> Gate:
    """Two emotions must have words that this tokenizer tells apart by their first token."""
    few = "fewer than two emotions have target words whose first token is theirs alone in this tokenizer"
    return Gate() if findings.rows else Gate(few)


def _vocabulary(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"logit lens at layer {r.layer}: AUC {r.value:.2f} {interval(r)}, {r.control} {number(r.null_mean)}, p = {number(r.p, 3)}."


LOGIT_LENS = Experiment(
    NAME,
    question="Does the vocabulary see an emotion's own words in its direction?",
    paper=None,
    run=run,
    gate=gate,
    claims=(
        Claim("vocabulary", "Through the lens an emotion's own words lie above other emotions' words", "rejected",
              primary_of(NAME), _vocabulary, "shuffled labels do more"),
    ),
    shows=(Table(rows=lambda view: view.rows),),
    method="Each direction is put through the unembedding; words are shown only where those of its emotion rise more than the others'.",
)  # fmt: skip

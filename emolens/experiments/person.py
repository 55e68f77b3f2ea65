"""Does a direction learned from "I" read "she", and the other way round?

Fit on the topics told in one grammatical person, test on those told in the other; beside it the same number of topics with both persons
mixed on each side, so that only the change of person differs. Layer, neutral components, reference and spread come from the fitted half, and
the null is the same with its labels shuffled within topic: two readings at chance do not differ either, so "it reads the other person" is
asked of the reading, and what it costs of the difference. Then the topics told in both persons: fitted without them, is the other person's
telling read as well as the topic's own? Primary row: cross-person top-1 minus mixed-person top-1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emolens import stats
from emolens.experiments.base import Inputs, Row, judged, row
from emolens.experiments.fitting import Training, against_shuffled

NAME = "person"


def run(inputs: Inputs) -> list[Row]:
    """All rows; none if every topic has the same person."""
    every = inputs.emotions.told.items()
    first, third = (sorted(t for t, p in every if p == person) for person in ("first", "third"))
    if min(len(first), len(third)) < 2:
        return []
    say = {
        "estimator": "mean_difference",
        "readout": "calibrated",
        "hook": inputs.acts.hook_point,
        "layer": "nested",
        "seed": inputs.seed,
    }
    n, unit = len(inputs.labels), "stories"
    halves = [Training(inputs, held) for held in (first, third)]
    cross = _correct(halves, inputs.labels)
    null = against_shuffled(
        lambda y: [_correct(halves, y).mean()], inputs.labels, inputs.topics, seed=inputs.seed
    )[1]
    # every topic is tested once by directions from half of the topics, of both persons
    dealt = [[Training(inputs, held) for held in _mixed(first, third, k)] for k in range(4)]
    mixed = np.mean([_correct(half, inputs.labels) for half in dealt], 0)
    out = [
        row(NAME, "top1", stats.bootstrap_mean(cross, inputs.topics), split="other person", n=n, unit_of_n=unit, **say, **judged(float(cross.mean()), null[:, 0], "shuffled labels")),
        row(NAME, "top1", stats.bootstrap_mean(mixed, inputs.topics), split="both persons", control="mixed halves", n=n, unit_of_n=unit, **say),
        row(NAME, "top1 cross minus mixed", stats.bootstrap_mean(cross - mixed, inputs.topics), primary=True, control="mixed halves", n=n, unit_of_n=unit, **say),
    ]  # fmt: skip
    other = inputs.acts.select(lambda t: t.split == "other_person")
    if other.texts:
        told = sorted({t.topic or "" for t in other.texts})
        fit = Training(inputs, told).fit(inputs.labels)
        own = inputs.main.select(lambda t: t.topic in told)
        # the unit here is the emotion: the topics told twice are too few to resample
        groups, right = list(inputs.emotions.names) * len(told), {}
        for name, acts in (("own person", own), ("other person", other)):
            labels = np.array([inputs.emotions.names.index(t.emotion or "") for t in acts.texts])
            order = np.lexsort((labels, np.array([told.index(t.topic or "") for t in acts.texts])))
            right[name] = stats.top_k(fit.z(acts.rows), labels).astype(float)[order]
            estimate = stats.bootstrap_mean(
                right[name], [inputs.emotions.names[k] for k in labels[order]]
            )
            out.append(
                row(
                    NAME,
                    "top1 of topics told twice",
                    estimate,
                    split=name,
                    n=len(labels),
                    unit_of_n=unit,
                    **say,
                )
            )
        difference = stats.bootstrap_mean(right["other person"] - right["own person"], groups)
        what = "top1 of topics told twice, other minus own"
        out.append(row(NAME, what, difference, n=len(groups), unit_of_n="pairs of stories", **say))
    return out


def _correct(halves: list[Training], labels: NDArray[np.integer]) -> NDArray[np.floating]:
    """Whether each story is read right by directions from the topics of the half that it is not in."""
    out = np.zeros(len(labels))
    for half in halves:
        inside = half.inside.numpy()
        out[inside] = stats.top_k(half.fit(labels).z(half.test), labels[inside])
    return out


def _mixed(first: list[str], third: list[str], seed: int) -> list[list[str]]:
    """The topics cut into two halves with both persons in each."""
    rng = np.random.default_rng(seed)
    a, b = rng.permutation(first).tolist(), rng.permutation(third).tolist()
    h, k = len(a) // 2, len(b) // 2
    return [a[:h] + b[:k], a[h:] + b[k:]]

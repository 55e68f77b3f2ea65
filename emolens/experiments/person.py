"""Does a direction learned from "I" read "she", and the other way round?

Fit on the eight topics told in one grammatical person, test on the eight told in the other; beside it the same number of topics with
both persons mixed on each side, so that only the change of person differs. Then two topics told in both persons: fitted without
either, is the other person's telling read as well as the topic's own? The layer is the study's frozen one, which was
chosen with all topics in view: levels here are a little flattered, differences compare like with like. Primary row: cross-person top-1 minus
mixed-person top-1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from emolens import stats
from emolens.directions import class_means, mean_difference, project, remove_components
from emolens.experiments.base import Inputs, Row, row

NAME = "person"


def run(inputs: Inputs) -> list[Row]:
    """All rows; none if every topic has the same person."""
    every = inputs.emotions.told.items()
    first, third = (sorted(t for t, p in every if p == person) for person in ("first", "third"))
    if min(len(first), len(third)) < 2:
        return []
    say = {
        "estimator": "mean_difference",
        "readout": "centred",
        "hook": inputs.acts.hook_point,
        "layer": inputs.layer,
        "seed": inputs.seed,
    }
    n, unit = len(inputs.labels), "stories"
    cross = _correct(inputs, [first, third])
    # every topic is tested once by directions from half of the topics, four first-person and four third-person
    mixed = np.mean([_correct(inputs, _mixed(first, third, k)) for k in range(4)], 0)
    out = [
        row(NAME, "top1", stats.bootstrap_mean(cross, inputs.topics), split="other person", n=n, unit_of_n=unit, **say),
        row(NAME, "top1", stats.bootstrap_mean(mixed, inputs.topics), split="both persons", control="mixed halves", n=n, unit_of_n=unit, **say),
        row(NAME, "top1 cross minus mixed", stats.bootstrap_mean(cross - mixed, inputs.topics), primary=True, control="mixed halves", n=n, unit_of_n=unit, **say),
    ]  # fmt: skip
    other = inputs.acts.select(lambda t: t.split == "other_person")
    if other.texts:
        told = sorted({t.topic or "" for t in other.texts})
        v = mean_difference(inputs.without(told).at([inputs.layer]))
        own = inputs.acts.select(lambda t: t.split == "main" and t.topic in told and t.emotion is not None)
        right = {}
        for name, acts in (("own person", own), ("other person", other)):
            labels = np.array([inputs.emotions.names.index(t.emotion or "") for t in acts.texts])
            right[name] = stats.top_k(v.z(acts.at([inputs.layer]).rows)[:, :, 0].numpy(), labels).astype(float)
            order = np.lexsort((labels, np.array([told.index(t.topic or "") for t in acts.texts])))
            right[name] = right[name][order]
            emotions = [
                inputs.emotions.names[k] for k in np.sort(labels)
            ]  # the unit here: two topics are too few to resample
            estimate = stats.bootstrap_mean(right[name], [inputs.emotions.names[k] for k in labels[order]])
            out.append(
                row(
                    NAME,
                    "top1 of topics told twice",
                    estimate,
                    split=name,
                    n=len(emotions),
                    unit_of_n="stories",
                    **(say | {"readout": "calibrated"}),
                )
            )
        groups = list(inputs.emotions.names) * len(told)
        difference = stats.bootstrap_mean(right["other person"] - right["own person"], groups)
        out.append(
            row(
                NAME,
                "top1 of topics told twice, other minus own",
                difference,
                n=len(groups),
                unit_of_n="pairs of stories",
                **(say | {"readout": "calibrated"}),
            )
        )
    return out


def _correct(inputs: Inputs, halves: list[list[str]]) -> NDArray[np.floating]:
    """Whether each story is read right by directions from the half of the topics that it is not in."""
    slot = inputs.acts.layers.index(inputs.layer)
    topic, y = np.asarray(inputs.topics), torch.from_numpy(inputs.labels)
    out = np.zeros(len(topic))
    for held in halves:
        inside = torch.from_numpy(np.isin(topic, held))
        rows = inputs.main.rows[:, [slot]]
        means = class_means(rows[~inside], y[~inside])
        mu = means.mean(0)
        components = inputs.neutral_components(tuple(held))
        vectors = means - mu if components is None else remove_components(means - mu, [components[slot]])
        scores = project(rows[inside], vectors, mu)[:, :, 0].numpy()
        out[inside.numpy()] = stats.top_k(scores, inputs.labels[inside.numpy()])
    return out


def _mixed(first: list[str], third: list[str], seed: int) -> list[list[str]]:
    """The topics cut into two halves with both persons in each."""
    rng = np.random.default_rng(seed)
    a, b = rng.permutation(first).tolist(), rng.permutation(third).tolist()
    h, k = len(a) // 2, len(b) // 2
    return [a[:h] + b[:k], a[h:] + b[k:]]

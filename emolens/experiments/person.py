"""Does a direction learned from "I" read "she", and the other way round?

Fit on the topics told in one grammatical person, test on those told in the other; beside it the same number of topics with both persons
mixed on each side, so that only the change of person differs. Layer, neutral components, reference and spread come from the fitted half, and
the null is the same with its labels shuffled within topic: two readings at chance do not differ either, so "it reads the other person" is
asked of the reading, and what it costs of the difference. Then the topics told in both persons: fitted without them, is the other person's
telling read as well as the topic's own? Primary row: cross-person top-1 minus mixed-person top-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from emolens import stats
from emolens.experiments.base import Experiment, Findings, Gate, Inputs, Table
from emolens.experiments.fitting import Training, against_shuffled
from emolens.experiments.rows import Row, find, judged, row
from emolens.experiments.rules import RULES, Claim, interval, rows_of

NAME = "person"


def run(inputs: Inputs) -> Findings:
    """All rows; none if every topic has the same person."""
    s, seed = inputs.stories, inputs.seed
    first, third = (
        sorted(t for t, p in s.emotions.story_topics.items() if p == person)
        for person in ("first", "third")
    )
    if min(len(first), len(third)) < 2:
        return Findings()
    told = partial(
        row, NAME, estimator="mean_difference", readout="calibrated", hook=s.acts.hook_point, layer="nested", seed=seed
    )  # fmt: skip
    of_stories = partial(told, n=len(s.labels), unit_of_n="stories")
    halves = [Training(s, held) for held in (first, third)]
    cross = _correct(halves, s.labels)
    null = against_shuffled(lambda y: [_correct(halves, y).mean()], s.labels, s.topics, seed=seed)[
        1
    ]
    # every topic is tested once by directions from half of the topics, of both persons
    dealt = [[Training(s, held) for held in _mixed(first, third, k)] for k in range(4)]
    mixed = np.mean([_correct(half, s.labels) for half in dealt], 0)
    against = judged(float(cross.mean()), null[:, 0], "shuffled labels")
    twin = {"control": "mixed halves"}
    out = [
        of_stories("top1", stats.bootstrap_mean(cross, s.topics), split="other person", **against),
        of_stories("top1", stats.bootstrap_mean(mixed, s.topics), split="both persons", **twin),
        of_stories(
            "top1 cross minus mixed",
            stats.bootstrap_mean(cross - mixed, s.topics),
            primary=True,
            **twin,
        ),
    ]
    other = s.acts.select(lambda t: t.split == "other_person")
    if other.texts:
        twice = sorted({t.topic or "" for t in other.texts})
        fit = Training(s, twice).fit(s.labels)
        own = s.main.select(lambda t: t.topic in twice)
        # the unit here is the emotion: the topics told twice are too few to resample
        groups, right = list(s.emotions.names) * len(twice), {}
        for name, acts in (("own person", own), ("other person", other)):
            labels = np.array([s.emotions.names.index(t.emotion or "") for t in acts.texts])
            order = np.lexsort((labels, np.array([twice.index(t.topic or "") for t in acts.texts])))
            right[name] = stats.top_k(fit.z(acts.rows), labels).astype(float)[order]
            estimate = stats.bootstrap_mean(
                right[name], [s.emotions.names[k] for k in labels[order]]
            )
            out.append(
                told(
                    "top1 of topics told twice",
                    estimate,
                    split=name,
                    n=len(labels),
                    unit_of_n="stories",
                )
            )
        difference = stats.bootstrap_mean(right["other person"] - right["own person"], groups)
        what = "top1 of topics told twice, other minus own"
        out.append(told(what, difference, n=len(groups), unit_of_n="pairs of stories"))
    return Findings(out)


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


def gate(findings: Findings) -> Gate:
    """A set of one grammatical person has no other to read."""
    few = "fewer than two topics are told in one of the two grammatical persons"
    return Gate() if findings.rows else Gate(few)


def _persons(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"top-1 {100 * r.value:+.1f} points {interval(r, True)} against directions from as many topics of both persons."


def _nothing_to_lose(rows: Sequence[Row], k: int) -> str:
    """Where directions from both persons read nothing, a change of person has nothing to cost."""
    mixed = find(rows, NAME, "top1", split="both persons")
    read = mixed and RULES["above_chance"](replace(mixed[0], null_mean=1 / k)) == "shown"
    return "" if read else "directions from both persons are at chance themselves"


PERSON = Experiment(
    NAME,
    question="Does a direction learned from “I” read “she”, and the other way round?",
    paper=None,
    run=run,
    gate=gate,
    claims=(
        Claim("person", "Directions from “I” read “she” as well, and the other way round", "no_loss",
              rows_of(NAME, "top1 cross minus mixed"), _persons, "the change of person costs something", _nothing_to_lose),
    ),
    shows=(Table(rows=lambda view: view.rows),),
    method="Fitted on the topics of one grammatical person, read on those of the other; beside it as many topics of both persons on each side.",
)  # fmt: skip

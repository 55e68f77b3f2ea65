"""From a row to a verdict: the rules by which every claim is judged, and what is said of each outcome.

A rule sees one row and says "shown", "opposite" (as sure, on the other side), "not shown", or "not asked" where a figure that it needs is
absent, is no number, or stands on too few units. Rules are in one table, `RULES`; claims belong to the experiments, which name the rule
and make the words. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from emolens.experiments.rows import Row, find

Verdict = Literal["shown", "not shown", "opposite", "not asked"]
LEVEL = 0.05  # of a permutation test
LOSS = 0.05  # of top-1: a difference that is surely smaller counts as none
FEWEST = 6  # stories, words, pairs or openings; an interval over fewer is no interval


@dataclass(frozen=True)
class Rule:
    """When a row shows a claim and when it shows the opposite.

    Attributes:
        needs: Fields of the row without which there is no verdict, beside `value`.
        shown: Whether the row shows the claim.
        opposite: Whether it shows the opposite as surely.
        says: A sentence that is added to the words of a verdict; `{other}` stands for what `Claim.other` says.

    Example:
        >>> from emolens.experiments import RULES, row
        >>> [RULES["above_zero"](row("length", "r", 0.2, low=low, high=0.3, n=32)) for low in (0.1, -0.1)]
        ['shown', 'not shown']
    """

    needs: tuple[str, ...]
    shown: Callable[[Any], bool]
    opposite: Callable[[Any], bool]
    says: Mapping[str, str] = field(default_factory=dict)

    def missing(self, r: Row) -> str:
        """Why this row cannot answer.

        Args:
            r: The row.

        Returns:
            The reason in words: too few units, or a figure that is absent or no number; empty if it can.

        Example:
            >>> from emolens.experiments import RULES, row
            >>> RULES["above_zero"].missing(row("length", "r", 0.2, high=0.3))
            'no low'
        """
        if r.n is not None and r.n < FEWEST:
            return f"n = {r.n} {r.unit_of_n or ''}; at least {FEWEST} are needed"
        absent = [
            k for k in ("value", *self.needs) if (x := getattr(r, k)) is None or not np.isfinite(x)
        ]
        return f"no {' and no '.join(k.replace('_', ' ') for k in absent)}" if absent else ""

    def __call__(self, r: Row) -> Verdict:
        """The verdict on one row."""
        if self.missing(r):
            return "not asked"
        return "shown" if self.shown(r) else "opposite" if self.opposite(r) else "not shown"


RULES: dict[str, Rule] = {
    # the whole interval lies above what 95 % of the null draws reach, and the permutation test rejects it
    "above_null": Rule(
        ("low", "high", "null_mean", "null_high", "p"),
        lambda r: r.low > r.null_high and r.p < LEVEL,
        lambda r: r.high < r.null_mean and r.p > 1 - LEVEL,
        {"opposite": "The interval lies below the control: {other}."},
    ),
    "above_zero": Rule(
        ("low", "high"),
        lambda r: r.low > 0,
        lambda r: r.high < 0,
        {
            "not shown": "The interval includes 0.",
            "opposite": "The interval lies below 0: {other}.",
        },
    ),
    "below_zero": Rule(
        ("low", "high"),
        lambda r: r.high < 0,
        lambda r: r.low > 0,
        {
            "not shown": "The interval includes 0.",
            "opposite": "The interval lies above 0: {other}.",
        },
    ),
    # absence of a loss is shown by an interval that excludes one, not by one that includes 0
    "no_loss": Rule(
        ("low", "high"),
        lambda r: r.low > -LOSS,
        lambda r: r.high < 0,
        {
            "shown": f"A loss of more than {100 * LOSS:.0f} points is excluded.",
            "not shown": f"A loss of more than {100 * LOSS:.0f} points is not excluded.",
            "opposite": "The interval lies below 0: {other}.",
        },
    ),
    "above_chance": Rule(
        ("low", "high", "null_mean"),
        lambda r: r.low > r.null_mean,
        lambda r: r.high < r.null_mean,
        {
            "not shown": "The interval includes chance.",
            "opposite": "The interval lies below chance.",
        },
    ),
    "rejected": Rule(
        ("p", "null_mean"),
        lambda r: r.p < LEVEL,
        lambda r: r.p > 1 - LEVEL and r.value < r.null_mean,
        {"opposite": "That is lower than {other}."},
    ),
    # of a maximum over sizes, whose sign says nothing: a small one is no finding, and its interval must exclude 0 on a side
    "rejected_maximum": Rule(
        ("low", "high", "p"), lambda r: r.p < LEVEL and (r.low > 0 or r.high < 0), lambda r: False
    ),
}


@dataclass(frozen=True)
class Claim:
    """One sentence that a study may find.

    Attributes:
        name: Short and stable.
        words: The claim itself.
        rule: Its name in `RULES`.
        rows: What it is judged on, from all rows and the number of emotions; one line for each row found.
        text: The figures in words, from that row, all rows and the number of emotions.
        other: What is the case where the opposite is shown.
        gate: Why the claim cannot be asked at all; empty if it can.
        also: Further rows that must agree by the same rule, say a second control.
        confound: What it says, where shown, is a reason to doubt the others: no success, and not to be shown as one.
    """

    name: str
    words: str
    rule: str
    rows: Callable[[Sequence[Row], int], Sequence[Row]]
    text: Callable[[Row, Sequence[Row], int], str]
    other: str = ""
    gate: Callable[[Sequence[Row], int], str] = lambda rows, k: ""
    also: Callable[[Sequence[Row], int], Sequence[Row]] = lambda rows, k: ()
    confound: bool = False


@dataclass(frozen=True)
class Answer:
    """A claim as a study answers it.

    Attributes:
        name: The claim's.
        words: The claim itself.
        verdict: "shown", "not shown", "opposite" or "not asked".
        text: The figures in words, or why it cannot be asked.
        confound: Where shown, a reason to doubt the others.
    """

    name: str
    words: str
    verdict: Verdict
    text: str
    confound: bool = False


def judge(claim: Claim, r: Row, rows: Sequence[Row], k: int) -> Answer:
    """Judge a claim on one of its rows.

    Args:
        claim: What may be said, and the name of its rule.
        r: The row.
        rows: All rows of the experiment: for gate, text and further controls.
        k: Number of emotions.

    Returns:
        `Answer`. "not asked" where the gate is closed or a figure is missing; "not shown" where two controls disagree.

    Example:
        >>> from emolens.experiments import Claim, judge, row
        >>> claim = Claim("length", "It is read", "above_zero", lambda rows, k: rows, lambda r, rows, k: f"r = {r.value}.")
        >>> rows = [row("length", "r", 0.2, low=-0.1, high=0.3)]
        >>> judge(claim, rows[0], rows, 24).text
        'r = 0.2. The interval includes 0.'
    """
    rule, judged = RULES[claim.rule], (r, *claim.also(rows, k))
    if reason := claim.gate(rows, k) or next(filter(None, map(rule.missing, judged)), ""):
        return Answer(
            claim.name, claim.words, "not asked", f"cannot be asked: {reason}.", claim.confound
        )
    each: set[Verdict] = {rule(x) for x in judged}
    verdict: Verdict = each.pop() if len(each) == 1 else "not shown"
    ending = rule.says.get(verdict, "").format(other=claim.other)
    return Answer(
        claim.name,
        claim.words,
        verdict,
        f"{claim.text(r, rows, k)} {ending}".rstrip(),
        claim.confound,
    )


def percent(value: float | None) -> str:
    """A share; "?" where it is not known."""
    return "?" if value is None else f"{100 * value:.0f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A figure; nothing where it is not known."""
    return "" if value is None or not np.isfinite(value) else f"{value:z.{digits}f}"


def interval(r: Row, percent: bool = False, digits: int = 2) -> str:
    """The interval of a row in brackets; nothing where it has none."""
    if r.low is None or r.high is None:
        return ""
    return (
        f"[{100 * r.low:.0f}, {100 * r.high:.0f}]"
        if percent
        else f"[{r.low:z.{digits}f}, {r.high:z.{digits}f}]"
    )


def rows_of(
    experiment: str, metric: str, **fields: Any
) -> Callable[[Sequence[Row], int], list[Row]]:
    """Where a claim finds its rows: those of a metric whose fields have the given values."""
    return lambda rows, k: find(rows, experiment, metric, **fields)


def primary_of(experiment: str) -> Callable[[Sequence[Row], int], list[Row]]:
    """Where a claim finds its row: the one that was named before the experiment was run."""
    return lambda rows, k: [r for r in rows if r.experiment == experiment and r.primary]


def nothing_read(experiment: str, metric: str) -> Callable[[Sequence[Row], int], str]:
    """A gate: two readings at chance differ by chance, and surely so on many texts; what reads nothing itself is not compared."""

    def gate(rows: Sequence[Row], k: int) -> str:
        own = find(rows, experiment, metric, **MAIN)  # slow estimators have no null of their own
        read = any(
            r.low is not None and r.null_high is not None and r.low > r.null_high for r in own
        )
        return "" if read else "the directions themselves are not above shuffled labels"

    return gate


MAIN = {"estimator": "mean_difference", "control": "shuffled labels"}  # the headline's row


def margin_claim(
    experiment: str,
    name: str,
    words: str,
    metric: str,
    what: str,
    other: str,
    *,
    estimator: str = "mean_difference",
) -> Claim:
    """A claim about a paired difference of accuracies, or of areas."""

    def text(r: Row, rows: Sequence[Row], k: int) -> str:
        if "auc" in metric:
            return f"{what} {r.value:+.3f} {interval(r, digits=3)}."
        return f"{what} {100 * r.value:+.1f} points {interval(r, True)}."

    found = rows_of(experiment, metric, estimator=estimator)
    gate = nothing_read(experiment, metric.split(" minus ")[0])
    return Claim(name, words, "above_zero", found, text, other, gate)

"""One figure with all that is needed to read it: the row that every experiment writes, and how its null is written into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emolens import stats


@dataclass(frozen=True)
class Row:
    """One figure of a study with everything needed to read it. A field that does not apply is None.

    Attributes:
        experiment: Name of the experiment that found it.
        metric: What was measured, such as "emotion top1"; its unit follows from it (a share, nats, a correlation).
        value: The figure; NaN where it could not be computed, which results.json has as null.
        primary: Whether it was named before the experiment was run.
        estimator: How directions were fitted, such as "mean_difference".
        readout: How they read, such as "calibrated" or "centred".
        hook: The hook point, such as "resid_post".
        layer: A block, 0-based, or in a word how it was chosen ("nested": anew in each fold).
        emotion: Of one emotion, or of one human norm.
        split: On which part of the texts.
        control: What it is compared with, or the control that it is itself a figure of.
        dose: In median residual norms.
        low, high: 95 % bootstrap interval, in the unit of `value`.
        null_mean, null_high: Mean and 95 % point of the null's draws, in the unit of `value`.
        p: One-sided, of a permutation test against those draws.
        q: `p` after Benjamini and Hochberg, where there is a row for each emotion.
        draws: Of the null.
        n: How many units the interval is over.
        unit_of_n: What they are, such as "stories" or "pairs".
        seed: Of folds, resamples and draws.

    Example:
        >>> from emolens.experiments import Row
        >>> Row("length", "top1", 0.25, low=0.1, high=0.4, n=32, unit_of_n="stories").null_high is None
        True
    """

    experiment: str
    metric: str
    value: float
    primary: bool = False
    estimator: str | None = None
    readout: str | None = None
    hook: str | None = None
    layer: int | str | None = None
    emotion: str | None = None
    split: str | None = None
    control: str | None = None
    dose: float | None = None
    low: float | None = None
    high: float | None = None
    null_mean: float | None = None
    null_high: float | None = None
    p: float | None = None
    q: float | None = None
    draws: int | None = None
    n: int | None = None
    unit_of_n: str | None = None
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON without NaN.

        Returns:
            All fields; None for what does not apply, and for what is no finite number.

        Example:
            >>> from emolens.experiments import row
            >>> row("length", "top1", float("nan")).to_dict()["value"] is None
            True
        """
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in asdict(self).items()}
        return {
            k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in plain.items()
        }


def row(experiment: str, metric: str, value: float | stats.Estimate, **fields: Any) -> Row:
    """Make a row from a number, or from an estimate with its interval.

    Args:
        experiment: Name of the experiment.
        metric: What was measured.
        value: The figure, NaN where it could not be computed; an `Estimate` also gives `low` and `high`.
        fields: Any other fields of `Row`.

    Returns:
        `Row`, of plain numbers.

    Raises:
        TypeError: no number, or no such field.

    Example:
        >>> from emolens import stats
        >>> from emolens.experiments import row
        >>> made = row("length", "top1", stats.Estimate(0.25, 0.1, 0.4), n=np.int64(32))
        >>> made.value, made.low, made.high, made.n
        (0.25, 0.1, 0.4, 32)
    """
    if isinstance(value, stats.Estimate):
        fields |= {"low": value.low, "high": value.high}
        value = value.value
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in fields.items()}
    return Row(experiment, metric, float(value), **plain)


MIN_DRAWS = 100  # of a null; with fewer its 95 % point and p say too little to be printed


def judged(value: float, null: NDArray[np.floating], control: str) -> dict[str, Any]:
    """The fields of a row that say what its null gave: mean, 95 % point, p = (k + 1) / (draws + 1) for k draws as high, number of draws.

    >>> judged(1.0, np.zeros(199), "shuffled labels")["p"]
    0.005
    >>> judged(1.0, np.zeros(10), "shuffled labels")  # ten draws have no 95 % point
    {'control': 'shuffled labels', 'null_mean': 0.0, 'draws': 10}

    Args:
        value: The figure itself.
        null: What the control gave, a number a draw.
        control: Its name.

    Returns:
        Fields for `row`; without 95 % point and p where there are fewer than 100 draws.

    Raises:
        ValueError: no draws.
    """
    null = np.asarray(null, float)
    if not len(null):
        raise ValueError(
            f"no draws of {control}: a null needs at least one, and a p at least {MIN_DRAWS}"
        )
    fields = {"control": control, "null_mean": float(null.mean()), "draws": len(null)}
    if len(null) < MIN_DRAWS:
        return fields
    return fields | {
        "null_high": float(np.percentile(null, 95)),
        "p": stats.permutation_p(value, null),
    }


def find(rows: Sequence[Row], experiment: str, metric: str, **fields: Any) -> list[Row]:
    """Find the rows of a metric whose fields have the given values.

    Args:
        rows: Where to look.
        experiment: Name of the experiment.
        metric: What was measured.
        fields: Any other fields of `Row`, with the value that is wanted; None is wanted too.

    Returns:
        Rows, in their order; none where nothing fits.

    Example:
        >>> from emolens.experiments import find, row
        >>> rows = [row("length", "top1", 0.5), row("length", "top1", 0.3, control="shuffled labels")]
        >>> [r.value for r in find(rows, "length", "top1", control=None)]
        [0.5]
    """
    return [
        r
        for r in rows
        if r.experiment == experiment
        and r.metric == metric
        and all(getattr(r, k) == v for k, v in fields.items())
    ]

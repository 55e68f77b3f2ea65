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
    """One figure of a study with everything needed to read it; absent is None."""

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
        """For JSON: a value that is not a number is absent too."""
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in asdict(self).items()}
        return {
            k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in plain.items()
        }


def row(experiment: str, metric: str, value: float | stats.Estimate, **fields: Any) -> Row:
    """A row from a number or an estimate with its interval."""
    if isinstance(value, stats.Estimate):
        fields |= {"low": value.low, "high": value.high}
        value = value.value
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in fields.items()}
    return Row(experiment, metric, float(value), **plain)


MIN_DRAWS = 100  # of a null; with fewer its 95 % point and p say too little to be printed


def judged(value: float, null: NDArray[np.floating], control: str) -> dict[str, Any]:
    """The fields of a row that say what its null gave: mean, 95 % point, p and number of draws (p is at least 1 / (draws + 1)).

    >>> judged(1.0, np.zeros(199), "shuffled labels")["p"]
    0.005
    >>> judged(1.0, np.zeros(10), "shuffled labels")  # ten draws have no 95 % point
    {'control': 'shuffled labels', 'null_mean': 0.0, 'draws': 10}

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
    """Rows of a metric whose fields have the given values."""
    return [
        r
        for r in rows
        if r.experiment == experiment
        and r.metric == metric
        and all(getattr(r, k) == v for k, v in fields.items())
    ]

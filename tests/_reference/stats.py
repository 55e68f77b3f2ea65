"""Statistics as loops over their definitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def bootstrap_mean_draws(values: NDArray, groups: Sequence[str], n: int, seed: int) -> list[float]:
    """Means of `n` resamples of whole groups, one resample after the other."""
    rng = np.random.default_rng(seed)
    names = sorted(set(groups))
    out = []
    for _ in range(n):
        resample: list[float] = []
        for g in rng.integers(len(names), size=len(names)):
            resample += [v for v, group in zip(values, groups, strict=True) if group == names[g]]
        out.append(float(np.mean(resample)))
    return out


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """q_i: the least p_(j) m / j over the ranks j at or above i's."""
    m = len(p)
    ranked = sorted(p)
    return [
        min(1.0, min(ranked[j] * m / (j + 1) for j in range(m) if ranked[j] >= value))
        for value in p
    ]


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Share of (positive, negative) pairs in the right order, a tie for one half."""
    own = [s for s, p in zip(scores, positive, strict=True) if p]
    other = [s for s, p in zip(scores, positive, strict=True) if not p]
    return float(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in other]))


def centroid_scores(
    train: NDArray, labels: Sequence[int], test: NDArray, n_classes: int
) -> NDArray:
    """Mean difference as a classifier, one text and one class at a time."""
    means = [
        np.mean([x for x, y in zip(train, labels, strict=True) if y == c], axis=0)
        for c in range(n_classes)
    ]
    mu = sum(means) / n_classes
    out = np.zeros((len(test), n_classes))
    for i, x in enumerate(test):
        for c in range(n_classes):
            v = means[c] - mu
            out[i, c] = (x - mu) @ v / np.sqrt(v @ v)
    return out

"""Geometry as loops over pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata


def cosine(a: NDArray, b: NDArray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def spearman(x: list[float], y: list[float]) -> float:
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def rsa(vectors: NDArray, points: NDArray) -> float:
    """Spearman of cosine distance with Euclidean distance of the norms, over pairs of words."""
    pairs = list(combinations(range(len(points)), 2))
    return spearman(
        [1 - cosine(vectors[i], vectors[j]) for i, j in pairs],
        [float(np.sqrt(((points[i] - points[j]) ** 2).sum())) for i, j in pairs],
    )


def layer_rsa(vectors: NDArray) -> NDArray:
    """Spearman of the cosines of all pairs of emotions at one layer with those at another."""
    pairs = list(combinations(range(vectors.shape[0]), 2))
    cosines = [
        [cosine(vectors[i, k], vectors[j, k]) for i, j in pairs] for k in range(vectors.shape[1])
    ]
    return np.array([[spearman(a, b) for b in cosines] for a in cosines])


def procrustes_disparity(points: NDArray, scores: NDArray) -> float:
    """1 - (sum of singular values of A'B)^2 for A and B centred and of Frobenius norm one."""
    a, b = ((x - x.mean(0)) / np.linalg.norm(x - x.mean(0)) for x in (points, scores))
    return float(1 - np.linalg.svd(a.T @ b, compute_uv=False).sum() ** 2)

"""The geometry of emotion directions: components, axes of human norms, clusters, similarity of layers.

Components are principal components of *unit* vectors, so that a loud emotion does not make an axis. Which component carries
valence moves with the layer, so the table of the first three is always given with the null of their maximum; the sign of a component
is arbitrary and r is given as |r|. Centred vectors have expected cosine -1/(K-1), and nulls are drawn with that. No model here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import cluster, spatial
from scipy import stats as sp
from torch import Tensor

from emolens import stats
from emolens._typing import typed

Array = NDArray[np.floating]


def unit(vectors: Array) -> Array:
    """Rows of norm one."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)


@typed
def components(
    vectors: Float[Tensor, "emotion d_model"], n: int = 3
) -> tuple[Float[Tensor, "emotion component"], Float[Tensor, " component"]]:
    """Scores of the emotions on the first principal components of their unit vectors, and each one's share of variance.

    >>> scores, share = components(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.1]]), n=2)
    >>> scores.shape, bool(share[0] >= share[1])
    (torch.Size([4, 2]), True)
    """
    x = torch.nn.functional.normalize(vectors.double(), dim=-1)
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    n = min(n, len(s))
    return (u[:, :n] * s[:n]).float(), (s[:n] ** 2 / (s**2).sum()).float()


@dataclass(frozen=True)
class AxisFit:
    """|r| of one component with a human norm."""

    component: int
    r: stats.Estimate
    p: float
    null_high: float


def axis_null(
    scores: Sequence[Array], norms: Sequence[tuple[Sequence[int], Array]], *, n_permutations: int = 1000, seed: int = 0
) -> Array:
    """Largest |r| of any component at any layer with any table of norms when the words are permuted, `[permutation]`.

    One permutation of the words serves every layer and table, so what they have in common stays.

    Args:
        scores: `[word component]` of every layer that was looked at.
        norms: For each table the rows of the words that it rates, and the ratings.
    """
    every = np.concatenate(list(scores), axis=1)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(every)) for _ in range(n_permutations)]
    null = np.zeros(n_permutations)
    for known, norm in norms:
        y = (norm - norm.mean()) / norm.std().clip(1e-12)
        for k, order in enumerate(orders):
            x = every[order[list(known)]]
            z = (x - x.mean(0)) / x.std(0).clip(1e-12)
            null[k] = max(null[k], np.abs(y @ z).max() / len(y))
    return null


def axis_table(scores: Array, norm: Array, null: Array, *, seed: int = 0) -> list[AxisFit]:
    """|r| of each component with a norm, with a bootstrap over words and a max-statistic permutation p.

    Args:
        scores: `[word component]` at the layer that is reported, of the rated words.
        norm: `[word]`.
        null: From `axis_null`, over everything that was searched.
    """
    words = list(range(len(norm)))
    return [
        AxisFit(
            k + 1,
            stats.bootstrap(lambda i, k=k: abs(stats.pearson(scores[i, k], norm[i])), words, seed=seed),
            stats.permutation_p(abs(stats.pearson(scores[:, k], norm)), null),
            float(np.percentile(null, 95)),
        )
        for k in range(scores.shape[1])
    ]


def ridge_heldout(vectors: Array, norm: Array, *, seed: int = 0) -> Array:
    """Predicted norm of every word by a ridge regression that never saw the word (ten folds of words, penalty chosen inside).

    Without signal the predictions are means of the *other* words, so their r with the norm is below 0, not 0: judge it by a permutation.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    x, out = unit(vectors), np.zeros(len(norm))
    for train, test in KFold(min(10, len(norm)), shuffle=True, random_state=seed).split(x):
        out[test] = RidgeCV(alphas=np.logspace(-2, 3, 11)).fit(x[train], norm[train]).predict(x[test])
    return out


def rsa(vectors: Array, points: Array, *, n_permutations: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Spearman correlation of cosine distance with distance in the norms' plane, and its Mantel p.

    Args:
        vectors: `[word d_model]`.
        points: `[word axis]`, for example standardised valence and arousal.
    """
    a = spatial.distance.pdist(unit(vectors))
    square = spatial.distance.squareform(spatial.distance.pdist(points))
    upper = np.triu_indices(len(points), 1)

    def rho(order: NDArray[np.integer]) -> float:
        correlation: Any = sp.spearmanr(a, square[np.ix_(order, order)][upper])  # scipy's stub hides the tuple
        return float(correlation[0])

    rng = np.random.default_rng(seed)
    observed = rho(np.arange(len(points)))
    return observed, stats.permutation_p(observed, [rho(rng.permutation(len(points))) for _ in range(n_permutations)])


def procrustes(scores: Array, points: Array, *, n_permutations: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Disparity (0 is identical) between two planes after the best rotation and scale, and its permutation p."""
    rng = np.random.default_rng(seed)
    observed = float(spatial.procrustes(points, scores)[2])
    null = [-float(spatial.procrustes(points[rng.permutation(len(points))], scores)[2]) for _ in range(n_permutations)]
    return observed, stats.permutation_p(-observed, null)


def layer_rsa(vectors: Float[Tensor, "emotion layer d_model"]) -> Array:
    """Spearman correlation between the cosine matrices of every two layers, `[layer layer]`."""
    v = unit(vectors.double().numpy())
    cosines = np.einsum("eld,fld->lef", v, v)
    upper = np.triu_indices(v.shape[0], 1)
    ranks = sp.rankdata(cosines[:, upper[0], upper[1]], axis=1)
    return np.atleast_2d(np.corrcoef(ranks))


def cosine_null(n_emotions: int, d_model: int, *, n: int = 200, seed: int = 0) -> tuple[float, float]:
    """Central 95 % of pairwise cosines of random directions that are centred over the emotions, as mean differences are."""
    rng = np.random.default_rng(seed)
    upper = np.triu_indices(n_emotions, 1)
    draws = []
    for _ in range(n):
        x = rng.standard_normal((n_emotions, d_model))
        x = unit(x - x.mean(0))
        draws.append((x @ x.T)[upper])
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return float(low), float(high)


def family_agreement(
    vectors: Array, families: Sequence[str], *, n_permutations: int = 1000, seed: int = 0
) -> tuple[float, float, list[int]]:
    """Adjusted Rand index of average-linkage clusters (as many as families) with the families, its permutation p, and the clusters."""
    from sklearn.metrics import adjusted_rand_score

    tree = cluster.hierarchy.linkage(spatial.distance.pdist(unit(vectors), "cosine"), "average")
    clusters = cluster.hierarchy.fcluster(tree, len(set(families)), "maxclust")
    rng = np.random.default_rng(seed)
    observed = float(adjusted_rand_score(list(families), clusters))
    null = [adjusted_rand_score(rng.permutation(list(families)), clusters) for _ in range(n_permutations)]
    return observed, stats.permutation_p(observed, null), clusters.tolist()


def cluster_order(vectors: Array) -> list[int]:
    """Order of the emotions along an optimally ordered average-linkage tree, for a matrix that shows its blocks."""
    distances = spatial.distance.pdist(unit(vectors), "cosine")
    return cluster.hierarchy.leaves_list(
        cluster.hierarchy.linkage(distances, "average", optimal_ordering=True)
    ).tolist()

"""The geometry of emotion directions: components, axes of human norms, clusters, similarity of layers.

Components are principal components of *unit* vectors, so that a loud emotion does not make an axis. Which component carries
valence moves with the layer, so the table of the first three is always given with the null of their maximum. The sign of a component is
arbitrary: it is fixed by the component itself, never by a norm, so that r is signed and its interval can hold 0 (one of |r| cannot). What is
measured on pairs is resampled by emotion, for pairs that share one are not independent. Centred vectors have expected cosine -1/(K-1), and
nulls are drawn with that. No model here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


RIDGE_WORDS = 30  # fewer rated words are not given to a cross-validated regression


def unit(vectors: Array) -> Array:
    """Rows of norm one."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)


@typed
def components(
    vectors: Float[Tensor, "emotion d_model"], n: int = 3
) -> tuple[Float[Tensor, "emotion component"], Float[Tensor, " component"]]:
    """Scores of the emotions on the first principal components of their unit vectors, and each one's share of variance.

    The emotion that lies furthest out on a component is on its positive side.

    >>> scores, share = components(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.1]]), n=2)
    >>> scores.shape, bool(share[0] >= share[1])
    (torch.Size([4, 2]), True)
    """
    x = torch.nn.functional.normalize(vectors.double(), dim=-1)
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    n = min(n, len(s))
    scores = u[:, :n] * s[:n]
    furthest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    return (scores * torch.where(furthest < 0, -1.0, 1.0)).float(), (
        s[:n] ** 2 / (s**2).sum()
    ).float()


@dataclass(frozen=True)
class AxisFit:
    """Signed r of one component with a human norm; p and `null_high` are of |r|, the largest of everything that was searched."""

    component: int
    r: stats.Estimate
    p: float
    null_high: float


def axis_null(
    scores: Sequence[Array],
    norms: Sequence[tuple[Sequence[int], Array]],
    *,
    n_permutations: int = 1000,
    seed: int = 0,
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
    """Signed r of each component with a norm, with a bootstrap over words and a two-sided max-statistic permutation p.

    Args:
        scores: `[word component]` at the layer that is reported, of the rated words.
        norm: `[word]`.
        null: From `axis_null`, over everything that was searched.
    """
    words = list(range(len(norm)))
    return [
        AxisFit(
            k + 1,
            stats.bootstrap(lambda i, k=k: stats.pearson(scores[i, k], norm[i]), words, seed=seed),
            stats.permutation_p(abs(stats.pearson(scores[:, k], norm)), null),
            float(np.percentile(null, 95)),
        )
        for k in range(scores.shape[1])
    ]


def ridge_heldout(vectors: Array, norm: Array, *, seed: int = 0) -> Array:
    """Predicted norm of every word by a ridge regression that never saw the word (ten folds of words, penalty chosen inside).

    Without signal the predictions are means of the *other* words, so their r with the norm is below 0, not 0, and -1 with a fold for each word:
    judge it by permuted words through this same function.

    Args:
        vectors: `[word d_model]`.
        norm: `[word]`, or `[word target]` for several norms (or permutations) at once, each with a penalty of its own.

    Raises:
        ValueError: fewer than `RIDGE_WORDS` words, where that bias is larger than any effect.
    """
    if len(norm) < RIDGE_WORDS:
        raise ValueError(
            f"a ridge regression over {len(norm)} held-out words says nothing; at least {RIDGE_WORDS} are needed"
        )
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    x, out = unit(vectors), np.zeros(norm.shape)
    for train, test in KFold(min(10, len(norm)), shuffle=True, random_state=seed).split(x):
        fitted = RidgeCV(alphas=np.logspace(-2, 3, 11), alpha_per_target=norm.ndim > 1).fit(
            x[train], norm[train]
        )
        out[test] = fitted.predict(x[test])
    return out


def over_pairs(
    statistic: Callable[[NDArray[np.intp], NDArray[np.intp]], float],
    n_emotions: int,
    *,
    n: int = 1000,
    seed: int = 0,
) -> stats.Estimate:
    """A statistic of pairs of emotions with an interval that resamples the emotions: pairs that share one are not independent.

    Args:
        statistic: Called with the first and the second emotion of every pair; an emotion drawn twice is no pair of its own.

    >>> over_pairs(lambda i, j: float(len(i)), 4, n=50).value
    6.0
    """
    upper = np.triu_indices(n_emotions, 1)

    def of(rows: NDArray[np.intp]) -> float:
        i, j = rows[upper[0]], rows[upper[1]]
        return statistic(i[i != j], j[i != j])

    return stats.bootstrap(of, list(range(n_emotions)), n=n, seed=seed)


def rsa(
    vectors: Array,
    points: Array,
    *,
    n_permutations: int = 1000,
    n_resamples: int = 300,
    seed: int = 0,
) -> tuple[stats.Estimate, float]:
    """Spearman correlation of cosine distance with distance in the norms' plane, its interval over words and its Mantel p.

    Args:
        vectors: `[word d_model]`.
        points: `[word axis]`, for example standardised valence and arousal.
    """
    ours, theirs = (
        spatial.distance.squareform(spatial.distance.pdist(x)) for x in (unit(vectors), points)
    )
    upper = np.triu_indices(len(points), 1)

    def rho(i: NDArray[np.intp], j: NDArray[np.intp], order: NDArray[np.integer]) -> float:
        return stats.pearson(sp.rankdata(ours[i, j]), sp.rankdata(theirs[order[i], order[j]]))

    rng, same = np.random.default_rng(seed), np.arange(len(points))
    observed = over_pairs(lambda i, j: rho(i, j, same), len(points), n=n_resamples, seed=seed)
    null = [rho(*upper, rng.permutation(len(points))) for _ in range(n_permutations)]
    return observed, stats.permutation_p(observed.value, null)


def procrustes(
    scores: Array, points: Array, *, n_permutations: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Disparity (0 is identical) between two planes after the best rotation and scale, and its permutation p."""
    rng = np.random.default_rng(seed)
    observed = float(spatial.procrustes(points, scores)[2])
    null = [
        -float(spatial.procrustes(points[rng.permutation(len(points))], scores)[2])
        for _ in range(n_permutations)
    ]
    return observed, stats.permutation_p(-observed, null)


def layer_rsa(vectors: Float[Tensor, "emotion layer d_model"]) -> Array:
    """Spearman correlation between the cosine matrices of every two layers, `[layer layer]`."""
    v = unit(vectors.double().numpy())
    cosines = np.einsum("eld,fld->lef", v, v)
    upper = np.triu_indices(v.shape[0], 1)
    ranks = sp.rankdata(cosines[:, upper[0], upper[1]], axis=1)
    return np.atleast_2d(np.corrcoef(ranks))


def cosine_null(
    n_emotions: int, d_model: int, *, n: int = 200, seed: int = 0
) -> tuple[float, float]:
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
    null = [
        adjusted_rand_score(rng.permutation(list(families)), clusters)
        for _ in range(n_permutations)
    ]
    return observed, stats.permutation_p(observed, null), clusters.tolist()


def cluster_order(vectors: Array) -> list[int]:
    """Order of the emotions along an optimally ordered average-linkage tree, for a matrix that shows its blocks."""
    distances = spatial.distance.pdist(unit(vectors), "cosine")
    return cluster.hierarchy.leaves_list(
        cluster.hierarchy.linkage(distances, "average", optimal_ordering=True)
    ).tolist()

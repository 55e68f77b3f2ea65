"""The geometry of emotion directions: components, axes of human norms, clusters, similarity of layers.

Components are principal components of *unit* vectors, so that a loud emotion does not make an axis. Which component carries
valence moves with the layer, so the table of the first three is always given with the null of their maximum. The sign of a component is
arbitrary: it is fixed by the component itself, never by a norm, so that r is signed and its interval can hold 0 (one of |r| cannot). What is
measured on pairs is resampled by emotion, for pairs that share one are not independent. Centred vectors have expected cosine -1/(K-1), and
nulls are drawn with that. Arrays of numpy go in and out; no model here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import NDArray
from scipy import cluster, spatial
from scipy import stats as sp

from emolens import stats
from emolens._typing import typed

Array = NDArray[np.floating]


RIDGE_WORDS = 30  # fewer rated words are not given to a cross-validated regression


def unit(vectors: Array) -> Array:
    """Scale rows to norm one.

    >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]

    Args:
        vectors: `[... d_model]`; one that is zero stays zero.

    Returns:
        A copy.
    """
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)


@typed
def components(
    vectors: Float[ndarray, "emotion d_model"], n: int = 3
) -> tuple[Float[ndarray, "emotion component"], Float[ndarray, " component"]]:
    """Find the principal components of the emotions' unit vectors.

    The emotion that lies furthest out on a component is on its positive side.

    >>> cross = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.1]])
    >>> scores, share = components(cross, n=2)
    >>> scores.shape, bool(share[0] >= share[1])
    ((4, 2), True)

    Args:
        vectors: A row for each emotion, of any length.
        n: At most so many components.

    Returns:
        Scores of the emotions (in units of a unit vector), and each component's share of variance, 0 to 1; both float32.
    """
    x = torch.nn.functional.normalize(torch.from_numpy(vectors.astype(float)), dim=-1)
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    n = min(n, len(s))
    scores, share = u[:, :n] * s[:n], s[:n] ** 2 / (s**2).sum()
    furthest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    signed = scores * torch.where(furthest < 0, -1.0, 1.0)
    return signed.float().numpy(), share.float().numpy()


@dataclass(frozen=True)
class AxisFit:
    """How one component goes with a human norm.

    Attributes:
        component: Its number, from 1 on.
        r: Signed Pearson r, with its interval over words.
        p: Of |r|, against the largest of everything that was searched.
        null_high: The 95 % point of that null.
    """

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
    """Draw the null of a search: the largest |r| of any component at any layer with any table of norms when the words are permuted.

    One permutation of the words serves every layer and table, so what they have in common stays.

    >>> rng = np.random.default_rng(0)
    >>> axis_null([rng.normal(size=(9, 3))], [(range(9), rng.normal(size=9))], n_permutations=20).shape
    (20,)

    Args:
        scores: `[word component]` of every layer that was looked at.
        norms: For each table the rows of the words that it rates, and the ratings.
        n_permutations: Draws.
        seed: Of the permutations.

    Returns:
        `[permutation]`, from 0 to 1.
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
    """Correlate each component with a norm, with a bootstrap over words and a two-sided max-statistic permutation p.

    >>> rng = np.random.default_rng(0)
    >>> scores, norm = rng.normal(size=(9, 3)), rng.normal(size=9)
    >>> [fit.component for fit in axis_table(scores, norm, axis_null([scores], [(range(9), norm)]))]
    [1, 2, 3]

    Args:
        scores: `[word component]` at the layer that is reported, of the rated words.
        norm: `[word]`.
        null: From `axis_null`, over everything that was searched.
        seed: Of the bootstrap.

    Returns:
        A fit for each component, in order.
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
    """Predict the norm of every word by a ridge regression that never saw the word (ten folds of words, penalty chosen inside).

    Without signal the predictions are means of the *other* words, so their r with the norm is below 0, not 0, and -1 with a fold for each word:
    judge it by permuted words through this same function.

    >>> rng = np.random.default_rng(0)
    >>> ridge_heldout(rng.normal(size=(40, 8)), rng.normal(size=40)).shape
    (40,)

    Args:
        vectors: `[word d_model]`.
        norm: `[word]`, or `[word target]` for several norms (or permutations) at once, each with a penalty of its own.
        seed: Of the folds.

    Returns:
        Predictions in the units of the norm, of its shape.

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
    """Give a statistic of pairs of emotions an interval that resamples the emotions: pairs that share one are not independent.

    >>> over_pairs(lambda i, j: float(len(i)), 4, n=50).value
    6.0

    Args:
        statistic: Called with the first and the second emotion of every pair; an emotion drawn twice is no pair of its own.
        n_emotions: How many there are.
        n: Resamples.
        seed: Of the resamples.

    Returns:
        In the units of the statistic.
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
    """Compare cosine distances with distances in the norms' plane: Spearman correlation, its interval over words, its Mantel p.

    >>> rng = np.random.default_rng(0)
    >>> rho, p = rsa(rng.normal(size=(8, 5)), rng.normal(size=(8, 2)), n_permutations=20, n_resamples=20)
    >>> -1 <= rho.value <= 1, 0 < p <= 1
    (True, True)

    Args:
        vectors: `[word d_model]`.
        points: `[word axis]`, for example standardised valence and arousal.
        n_permutations: Of the words, for p.
        n_resamples: Of the words, for the interval.
        seed: Of both.
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
    """Compare two planes after the best rotation and scale.

    >>> square = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    >>> round(abs(procrustes(3 * square[:, ::-1], square, n_permutations=20)[0]), 6)
    0.0

    Args:
        scores: `[word axis]`.
        points: `[word axis]`, of the same words and as many axes.
        n_permutations: Of the words, for p.
        seed: Of the permutations.

    Returns:
        Disparity, 0 (identical) to 1, and its permutation p.
    """
    rng = np.random.default_rng(seed)
    observed = float(spatial.procrustes(points, scores)[2])
    null = [
        -float(spatial.procrustes(points[rng.permutation(len(points))], scores)[2])
        for _ in range(n_permutations)
    ]
    return observed, stats.permutation_p(-observed, null)


@typed
def layer_rsa(vectors: Float[ndarray, "emotion layer d_model"]) -> Float[ndarray, "layer layer"]:
    """Compare the cosine matrices of every two layers by Spearman correlation.

    >>> layer_rsa(directions.vectors.numpy()).shape
    (3, 3)

    Args:
        vectors: Of any length.

    Returns:
        Correlations, in the order of the layers.
    """
    v = unit(vectors.astype(float))
    cosines = np.einsum("eld,fld->lef", v, v)
    upper = np.triu_indices(v.shape[0], 1)
    ranks = sp.rankdata(cosines[:, upper[0], upper[1]], axis=1)
    return np.atleast_2d(np.corrcoef(ranks))


def cosine_null(
    n_emotions: int, d_model: int, *, n: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Find the central 95 % of pairwise cosines of random directions that are centred over the emotions, as mean differences are.

    >>> low, high = cosine_null(8, 64)
    >>> low < -1 / 7 < high
    True

    Args:
        n_emotions: How many directions.
        d_model: Their width.
        n: Draws of a whole set.
        seed: Of the draws.

    Returns:
        The 2.5 and the 97.5 % point.
    """
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
    """Compare average-linkage clusters, as many as there are families, with the families.

    >>> pairs = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> family_agreement(pairs, ["a", "a", "b", "b"], n_permutations=20)[0]
    1.0

    Args:
        vectors: `[emotion d_model]`, compared by cosine.
        families: The family of each emotion.
        n_permutations: Of the families, for p.
        seed: Of the permutations.

    Returns:
        Adjusted Rand index (1 is the same partition, 0 chance), its permutation p, and the cluster of each emotion.
    """
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
    """Order the emotions along an optimally ordered average-linkage tree, for a matrix that shows its blocks.

    >>> order = cluster_order(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]]))
    >>> sorted(map(sorted, (order[:2], order[2:])))
    [[0, 2], [1, 3]]

    Args:
        vectors: `[emotion d_model]`, compared by cosine.

    Returns:
        Row numbers.
    """
    distances = spatial.distance.pdist(unit(vectors), "cosine")
    return cluster.hierarchy.leaves_list(
        cluster.hierarchy.linkage(distances, "average", optimal_ordering=True)
    ).tolist()

"""Estimators of directions at one layer, written out; `x[e][t]` is the row of emotion e in topic t."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mean_difference(x: NDArray) -> NDArray:
    """m_e minus the mean of the emotions' means; x is `[emotion topic d_model]`."""
    means = [np.mean(own, axis=0) for own in x]
    return np.array([m - sum(means) / len(means) for m in means])


def neutral_projector(tokens: NDArray, share: float) -> NDArray:
    """Projector on the least number of principal components that together explain `share` of the variance."""
    from sklearn.decomposition import PCA

    fitted = PCA(svd_solver="full").fit(tokens.astype(float))
    n = 1
    while fitted.explained_variance_ratio_[:n].sum() < share:
        n += 1
    return fitted.components_[:n].T @ fitted.components_[:n]


def lda(x: NDArray) -> NDArray:
    """S^-1 (m_e - mu) with scikit-learn's Ledoit-Wolf S of the rows minus their emotion's mean."""
    from sklearn.covariance import LedoitWolf

    within = np.concatenate([own - own.mean(0) for own in x]).astype(float)
    return mean_difference(x.astype(float)) @ np.linalg.inv(
        LedoitWolf(assume_centered=True).fit(within).covariance_
    )


def heldout_scores(x: NDArray, projector: NDArray) -> NDArray:
    """(x - mu) . v_e / |v_e| of every text `[emotion topic emotion]`, v and mu from the other topics."""
    n_emotions, n_topics, d = x.shape
    out = np.zeros((n_emotions, n_topics, n_emotions))
    for t in range(n_topics):
        rest = np.delete(x, t, axis=1)
        v = mean_difference(rest) @ (np.eye(d) - projector)
        mu = rest.mean(1).mean(0)
        for e in range(n_emotions):
            for f in range(n_emotions):
                out[e, t, f] = (x[e, t] - mu) @ v[f] / np.linalg.norm(v[f])
    return out

"""From activations to emotion directions: pure tensor maths, no model.

For emotion e with stories s of vectors x_s (one layer), m_e = mean over e's stories of x_s and mu = mean over emotions of m_e:
``mean_difference``  v_e = (I - P)(m_e - mu), with P the projector on the top principal components of neutral tokens;
``antonym_contrast`` v_e = (I - P)(m_e - m_antonym(e));  ``pca`` the first singular direction of e's same-topic differences;
``lda`` v_e = S^-1 (m_e - mu), S the Ledoit-Wolf within-emotion covariance;  ``logistic`` the weights of a multinomial regression.
All come from one pass over the texts and share one calibration: scores of texts whose topic was left out. Which one is best is an
experiment (`emolens.experiments.separability`), not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor

from emolens import stats
from emolens.collect.activations import Activations
from emolens.collect.collection import Collection
from emolens.directions.algebra import class_means
from emolens.directions.fitting import from_means, from_rows
from emolens.directions.value import EmotionDirections
from emolens.sets.emotion_sets import EmotionSet


def mean_difference(
    acts: Activations | Collection, *, remove_neutral: float | int | None = 0.5
) -> EmotionDirections:
    """Fit directions as differences of means, without what neutral text varies in.

    v_e = (I - P)(m_e - mu);  P projects on the first k principal components of ordinary tokens of neutral texts, k the least number
    that explains `remove_neutral` of their variance (recorded as `info["neutral_k"]`).

    >>> em.mean_difference(acts, remove_neutral=0.5)
    EmotionDirections(glimmer, gloamer, brindle, tarrow; resid_post, layers 0..2, d_model 32; mean_difference)

    Args:
        acts: Collected from an emotion set, or from texts with `emotions=` (and `topics=`, which makes the calibration honest); in
            memory, or a `Collection`, whose shards are then read one after the other.
        remove_neutral: Share of neutral variance to remove, 0 to 1; None or 0 removes nothing.

    Returns:
        Directions `[emotion layer d_model]` in the residual stream's own units, calibrated, with split-half reliability over topics.

    Raises:
        ValueError: fewer than two emotions; neutral removal asked for without neutral texts.

    Reference:
        Anthropic 2026, *Emotion Concepts*, "Extracting emotion vectors"; difference of means as in arXiv 2312.06681.
    """
    return from_means(acts, lambda means: means - means.mean(0), "mean_difference", remove_neutral)


def antonym_contrast(
    acts: Activations | Collection,
    *,
    antonyms: EmotionSet | Mapping[str, str] | None = None,
    remove_neutral: float | int | None = 0.5,
) -> EmotionDirections:
    """Fit each emotion against its antonym:  v_e = (I - P)(m_e - m_antonym(e)).

    >>> em.antonym_contrast(acts, antonyms={"glimmer": "tarrow"}).emotions
    ('glimmer',)

    Args:
        acts: As for `mean_difference`.
        antonyms: A set or a mapping; None takes the antonyms of the set that was collected. Emotions without one are left out.
        remove_neutral: As for `mean_difference`.

    Returns:
        Directions of the emotions that have an antonym, otherwise as of `mean_difference`.

    Raises:
        ValueError: an antonym that is not among the collected emotions, or no antonyms at all.
    """
    if isinstance(antonyms, EmotionSet):
        antonyms = {e.name: e.antonym for e in antonyms.emotions if e.antonym}
    pairs = dict(antonyms or acts.info.get("antonyms") or {})
    names = acts.moments().emotions
    if not pairs:
        raise ValueError("no antonyms known: give antonyms={'joy': 'sadness', ...}")
    for a, b in pairs.items():
        if a not in names or b not in names:
            raise ValueError(
                f"antonym pair {a!r}, {b!r}: both must be among the collected emotions: {', '.join(names)}"
            )
    chosen = [n for n in names if n in pairs]

    def contrast(means: Tensor) -> Tensor:
        return (
            means[[names.index(n) for n in chosen]] - means[[names.index(pairs[n]) for n in chosen]]
        )

    return from_means(acts, contrast, "antonym_contrast", remove_neutral, emotions=chosen)


def pca(acts: Activations, *, remove_neutral: float | int | None = 0.5) -> EmotionDirections:
    """Fit the first singular direction of same-topic differences (linear artificial tomography), with the sign of the mean difference.

    For emotion e and topic t, d_t = x[e, t] - mean over other emotions of x[., t]; v_e is the first right singular vector of the d_t,
    scaled to the norm of their mean.

    >>> em.pca(acts.at([1])).vectors.shape
    torch.Size([4, 1, 32])

    Args:
        acts: As for `mean_difference`, in memory.
        remove_neutral: As for `mean_difference`.

    Returns:
        Directions, calibrated by four groups of topics, without reliability.

    Raises:
        TypeError: a `Collection`: give its ``load()``.
        ValueError: as `mean_difference`.

    Reference:
        Zou et al. 2023, *Representation Engineering*, arXiv 2310.01405, section 3.1.
    """

    def fit(rows: Tensor, labels: Tensor, topics: list[str]) -> Tensor:
        topic = torch.tensor(np.unique(topics, return_inverse=True)[1])
        n = int(labels.max()) + 1
        out = []
        for e in range(n):
            differences = []
            for t in topic.unique():
                here, own = topic == t, labels == e
                if (here & own).any() and (here & ~own).any():
                    differences.append(rows[here & own].mean(0) - rows[here & ~own].mean(0))
            stack = rearrange(
                torch.stack(differences), "topic layer d_model -> layer topic d_model"
            )
            mean = stack.mean(1)
            first = torch.linalg.svd(stack, full_matrices=False).Vh[:, 0]
            along = einsum(first, mean, "layer d_model, layer d_model -> layer")
            out.append(
                first
                * torch.where(along < 0, -1.0, 1.0)[:, None]
                * torch.linalg.vector_norm(mean, dim=-1)[:, None]
            )
        return torch.stack(out)

    return from_rows(acts, fit, "pca", remove_neutral)


def lda(acts: Activations) -> EmotionDirections:
    """Fit a shrinkage discriminant:  v_e = S^-1 (m_e - mu), S the Ledoit-Wolf estimate of the covariance within emotions.

    >>> em.lda(acts.at([1])).info["method"]
    'lda'

    Args:
        acts: As for `mean_difference`, in memory.

    Returns:
        Directions as of `pca`; their length is not that of a difference of activations.

    Raises:
        TypeError, ValueError: as `pca`.

    Reference:
        Ledoit & Wolf 2004, *A well-conditioned estimator for large-dimensional covariance matrices*.
    """
    from sklearn.covariance import ledoit_wolf

    def fit(rows: Tensor, labels: Tensor, topics: list[str]) -> Tensor:
        means = class_means(rows, labels)
        out = []
        for k in range(rows.shape[1]):
            within = (rows[:, k] - means[labels, k]).double().numpy()
            covariance = torch.from_numpy(ledoit_wolf(within, assume_centered=True)[0])
            out.append(
                torch.linalg.solve(
                    covariance, (means[:, k] - means[:, k].mean(0)).double().T
                ).T.float()
            )
        return torch.stack(out, 1)

    return from_rows(acts, fit, "lda", None)


def logistic(acts: Activations, *, c: float | int = 1.0) -> EmotionDirections:
    """Fit the weights of a multinomial logistic regression on standardised rows, centred over emotions.

    >>> em.logistic(acts.at([1])).emotions == directions.emotions
    True

    Args:
        acts: As for `mean_difference`, in memory. One regression is fitted for each layer: pass `acts.at([20])` to be quick.
        c: Inverse regularisation, above 0, as in `stats.logistic_scores`.

    Returns:
        Directions as of `pca`: weights on activations in the residual stream's own units.

    Raises:
        TypeError, ValueError: as `pca`.
    """
    from sklearn.linear_model import LogisticRegression

    def fit(rows: Tensor, labels: Tensor, topics: list[str]) -> Tensor:
        out = []
        for k in range(rows.shape[1]):
            x = rows[:, k].double().numpy()
            scale = np.where(x.std(0) > 1e-12, x.std(0), 1.0) * np.sqrt(x.shape[1])
            tol = stats.logistic_tolerance(len(labels.unique()))
            model = LogisticRegression(C=float(c) * 100, max_iter=300, tol=tol).fit(
                (x - x.mean(0)) / scale, labels.numpy()
            )
            weights = (
                model.coef_ if len(labels.unique()) > 2 else np.vstack([-model.coef_, model.coef_])
            )
            out.append(torch.from_numpy((weights - weights.mean(0)) / scale).float())
        return torch.stack(out, 1)

    return from_rows(acts, fit, "logistic", None)

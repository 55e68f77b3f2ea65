"""The linear algebra of directions: class means, neutral components, projections. Nothing here knows of files or models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from emolens._typing import typed


@typed
def class_means(
    rows: Float[Tensor, "text layer d_model"], labels: Int[Tensor, " text"]
) -> Float[Tensor, "emotion layer d_model"]:
    """Average the rows of each label 0 .. max.

    >>> rows = torch.tensor([[[1.0]], [[3.0]], [[5.0]]])
    >>> class_means(rows, torch.tensor([0, 0, 1])).flatten().tolist()
    [2.0, 5.0]

    Args:
        rows: Pooled activations, a text a row.
        labels: The number of each text's emotion.

    Returns:
        Means in the rows' own units.

    Raises:
        ValueError: no texts, or a label below the highest that no text has.
    """
    n = torch.bincount(labels)
    if not len(n) or (n == 0).any():
        empty = int((n == 0).nonzero()[0]) if len(n) else 0
        raise ValueError(
            f"emotion number {empty} has no text among the {len(rows)} given: there is no mean of nothing"
        )
    total = rows.new_zeros((len(n), *rows.shape[1:])).index_add_(0, labels, rows)
    return total / n[:, None, None]


@typed
def mean_differences(
    rows: Float[Tensor, "text layer d_model"],
    labels: Int[Tensor, " text"],
    components: list[Float[Tensor, "d_model _"]] | None = None,
) -> tuple[Float[Tensor, "emotion layer d_model"], Float[Tensor, "layer d_model"]]:
    """Fit the mean difference of labelled rows:  v_e = (I - P)(m_e - mu), and mu, the mean of the means m_e.

    The plain estimator that nulls, refits and cross-validations call many times; `estimators.mean_difference` is the one with provenance
    and calibration.

    >>> rows = torch.tensor([[[1.0]], [[3.0]], [[5.0]]])
    >>> vectors, reference = mean_differences(rows, torch.tensor([0, 0, 1]))
    >>> vectors.flatten().tolist(), reference.item()
    ([-1.5, 1.5], 3.5)

    Args:
        rows: Pooled activations of the texts to fit on.
        labels: The number of each text's emotion, 0 .. max.
        components: Of each layer what is removed, orthonormal: from `neutral_components`. None removes nothing.

    Returns:
        Vectors and reference, in the rows' own units.

    Raises:
        ValueError: as `class_means`.
    """
    means = class_means(rows, labels)
    reference = means.mean(0)
    vectors = means - reference
    return vectors if components is None else remove_components(vectors, components), reference


@typed
def neutral_components(
    tokens: Float[Tensor, "token layer d_model"], share: float | int
) -> list[Float[Tensor, "d_model component"]]:
    """Find the fewest principal components of each layer that together explain `share` of the tokens' variance.

    >>> tokens = torch.tensor([[[3.0, 0.0]], [[-3.0, 0.0]], [[0.0, 1.0]], [[0.0, -1.0]]])
    >>> neutral_components(tokens, 0.5)[0].abs().tolist()
    [[1.0], [0.0]]

    Args:
        tokens: Activations of single tokens of neutral texts.
        share: Of their variance, between 0 and 1.

    Returns:
        For each layer orthonormal columns; layers differ in how many they need.

    Raises:
        ValueError: a share outside 0 to 1; fewer than two tokens, or tokens that are all the same: an arbitrary direction would come out.
    """
    if not 0 < share < 1:
        raise ValueError(f"remove_neutral={share}; between 0 and 1, or None")
    if len(tokens) < 2:
        raise ValueError(
            f"neutral components need tokens of neutral texts, there are {len(tokens)}: give neutral texts on more topics "
            "(all of them may be of the topics that are held out), or remove nothing"
        )
    out = []
    for k in range(tokens.shape[1]):
        x = (tokens[:, k] - tokens[:, k].mean(0)).double()
        # fewer tokens than dimensions: X X^T has the same eigenvalues and is smaller
        wide = len(x) < x.shape[1]
        values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)  # ascending
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        if values[0] == 0:
            raise ValueError(
                f"the {len(tokens)} neutral tokens are all the same: they vary in nothing that could be removed"
            )
        n = int((values.cumsum(0) < share * values.sum()).sum()) + 1
        first = vectors[:, :n]
        if wide:
            first = torch.nn.functional.normalize(x.T @ first, dim=0)
        out.append(first.float())
    return out


@typed
def remove_components(
    vectors: Float[Tensor, "emotion layer d_model"], components: list[Float[Tensor, "d_model _"]]
) -> Float[Tensor, "emotion layer d_model"]:
    """Take components out of vectors, layer by layer:  (I - P) v.

    >>> x_axis = torch.tensor([[1.0], [0.0]])
    >>> remove_components(torch.tensor([[[3.0, 4.0]]]), [x_axis]).flatten().tolist()
    [0.0, 4.0]

    Args:
        vectors: What they are taken from.
        components: For each layer orthonormal columns.

    Returns:
        A copy, in the vectors' own units.
    """
    return torch.stack(
        [vectors[:, k] - (vectors[:, k] @ p) @ p.T for k, p in enumerate(components)], 1
    )


@typed
def project(
    rows: Float[Tensor, "text layer d_model"],
    vectors: Float[Tensor, "emotion layer d_model"],
    reference: Float[Tensor, "layer d_model"],
) -> Float[Tensor, "text emotion layer"]:
    """Project rows on directions:  s = (x - mu) . v / |v|. Not calibrated: compare rows, not emotions.

    >>> raw = project(acts.rows, directions.vectors, directions.reference)
    >>> raw.shape == (len(acts.rows), len(directions), len(directions.layers))
    True

    Args:
        rows: Activations of texts or tokens.
        vectors: Of any length; one that is zero gives 0.
        reference: mu, from which they are measured.

    Returns:
        Signed distances in the residual stream's own units.
    """
    unit = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)
    return einsum(
        rows - reference, unit, "text layer d_model, emotion layer d_model -> text emotion layer"
    )


def default_layer(layers: Sequence[int], n_layers: int) -> int:
    """Choose the layer nearest to two thirds of the depth, where the paper reads.

    >>> default_layer(range(30), 30)
    20

    Args:
        layers: Block numbers that were collected.
        n_layers: Blocks of the model.
    """
    return min(layers, key=lambda layer: (abs(layer - 2 * n_layers // 3), layer))

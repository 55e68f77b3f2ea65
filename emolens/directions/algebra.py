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
    """Mean row of each label 0 .. max.

    >>> class_means(torch.tensor([[[1.0]], [[3.0]], [[5.0]]]), torch.tensor([0, 0, 1])).flatten().tolist()
    [2.0, 5.0]

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
def neutral_components(
    tokens: Float[Tensor, "token layer d_model"], share: float | int
) -> list[Float[Tensor, "d_model component"]]:
    """For each layer the orthonormal principal components of the tokens that together explain `share` of their variance.

    >>> tokens = torch.tensor([[[3.0, 0.0]], [[-3.0, 0.0]], [[0.0, 1.0]], [[0.0, -1.0]]])
    >>> neutral_components(tokens, 0.5)[0].abs().tolist()
    [[1.0], [0.0]]

    Raises:
        ValueError: fewer than two tokens, or tokens that are all the same: an arbitrary direction would come out.
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
        wide = (
            len(x) < x.shape[1]
        )  # fewer tokens than dimensions: X X^T has the same eigenvalues and is smaller
        values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)  # ascending
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        if values[0] == 0:
            raise ValueError(
                f"the {len(tokens)} neutral tokens are all the same: they vary in nothing that could be removed"
            )
        n = int((values.cumsum(0) < share * values.sum()).sum()) + 1
        first = (
            torch.nn.functional.normalize(x.T @ vectors[:, :n], dim=0) if wide else vectors[:, :n]
        )
        out.append(first.float())
    return out


@typed
def remove_components(
    vectors: Float[Tensor, "emotion layer d_model"], components: list[Float[Tensor, "d_model _"]]
) -> Float[Tensor, "emotion layer d_model"]:
    """(I - P) v, layer by layer."""
    return torch.stack(
        [vectors[:, k] - (vectors[:, k] @ p) @ p.T for k, p in enumerate(components)], 1
    )


@typed
def project(
    rows: Float[Tensor, "text layer d_model"],
    vectors: Float[Tensor, "emotion layer d_model"],
    reference: Float[Tensor, "layer d_model"],
) -> Float[Tensor, "text emotion layer"]:
    """s = (x - mu) . v / |v|, in the residual stream's own units."""
    unit = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)
    return einsum(
        rows - reference, unit, "text layer d_model, emotion layer d_model -> text emotion layer"
    )


def default_layer(layers: Sequence[int], n_layers: int) -> int:
    """Choose the layer nearest to two thirds of the depth, where the paper reads.

    >>> default_layer(range(30), 30)
    20
    """
    return min(layers, key=lambda layer: (abs(layer - 2 * n_layers // 3), layer))

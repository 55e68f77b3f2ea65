"""Directions beside directions: whether they lie in one space, and their cosines."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from emolens.shards import same_weights

if TYPE_CHECKING:
    from emolens.directions.value import EmotionDirections


def same_space(directions: EmotionDirections, other: EmotionDirections, what: str) -> None:
    """Refuse directions of another model, hook point or width; `what` says what cannot be done with both, such as "compared"."""
    if not isinstance(other, type(directions)):
        raise TypeError(f"directions are {what} with directions, not {type(other).__name__}")
    mine, theirs = directions.info["model"], other.info["model"]
    for name, a, b in (
        ("hook point", directions.hook_point, other.hook_point),
        ("width", directions.vectors.shape[-1], other.vectors.shape[-1]),
    ):
        if a != b:
            raise ValueError(
                f"these directions differ in their {name} ({a} and {b}) and cannot be {what}"
            )
    if not same_weights(mine, theirs):
        names = f"{mine.get('name')} and {theirs.get('name')}"
        raise ValueError(f"these directions differ in their model ({names}) and cannot be {what}")


def cosines(
    directions: EmotionDirections, other: EmotionDirections | None, layer: int, corrected: bool
) -> Float[Tensor, "emotion other"]:
    """`EmotionDirections.cosine` at one block."""
    if other is not None:
        same_space(directions, other, "compared")
    whole = directions if other is None else other
    cosine = einsum(directions.unit(layer), whole.unit(layer), "e d_model, f d_model -> e f")
    if corrected:
        mine, theirs = (
            torch.where(r > 0, r, torch.nan).sqrt()
            for r in (d.reliability[:, d.slot(layer)] for d in (directions, whole))
        )
        cosine = cosine / (mine[:, None] * theirs)
        if other is None:
            cosine.diagonal()[cosine.diagonal().isfinite()] = 1
    return cosine


def ranked(one: EmotionDirections, layer: SupportsIndex | None) -> list[tuple[str, float]]:
    """Emotions and their cosines with one direction, the most similar first, without those that it was made of."""
    whole = one.among or one
    cosine = einsum(
        one.unit(layer)[0], whole.unit(layer), "d_model, emotion d_model -> emotion"
    ).tolist()
    pairs = sorted(zip(whole, cosine, strict=True), key=lambda pair: -pair[1])
    return [pair for pair in pairs if pair[0] not in one.operands]


def only_one(directions: EmotionDirections, call: str) -> None:
    """Refuse several directions where a call is of one."""
    if len(directions) != 1:
        raise ValueError(
            f"{call}() is of one direction, here are {len(directions)}; take one, as in directions[{directions.emotions[0]!r}].{call}()"
        )

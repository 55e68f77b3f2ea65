"""Sums and multiples of directions: vectors are combined, and what a sum has no longer is taken off it."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from emolens.directions.comparing import same_space

if TYPE_CHECKING:
    from emolens.directions.value import EmotionDirections

Number = float | int | np.number | Tensor


def scaled(directions: EmotionDirections, factor: float) -> EmotionDirections:
    """Multiply every vector; `factor` stands before their names."""
    return replace(
        directions,
        emotions=tuple(f"{factor:g} {e}" for e in directions),
        vectors=directions.vectors * factor,
        calibration=None,
        operands=directions.operands or directions.emotions,
    )


def combined(
    directions: EmotionDirections, other: EmotionDirections, sign: float, symbol: str
) -> EmotionDirections:
    """Add vectors to vectors of the same model, hook point and layers, one by one; `symbol` stands between their names."""
    same_space(directions, other, "combined")
    if directions.layers != other.layers:
        raise ValueError(
            f"these directions differ in their layers ({directions.layers} and {other.layers}) and cannot be combined"
        )
    if len(directions.emotions) != len(other.emotions):
        raise ValueError(
            f"{len(directions.emotions)} and {len(other.emotions)} emotions cannot be combined one by one"
        )
    return replace(
        directions,
        emotions=tuple(
            f"{a} {symbol} {b}" for a, b in zip(directions.emotions, other.emotions, strict=True)
        ),
        vectors=directions.vectors + sign * other.vectors,
        reliability=torch.full_like(directions.reliability, torch.nan),
        calibration=None,
        among=directions.among or other.among or directions,
        operands=(
            *(directions.operands or directions.emotions),
            *(other.operands or other.emotions),
        ),
    )


def finite(factor: Number) -> float:
    """A finite number of Python, numpy or torch as a plain one."""
    number = factor.item() if isinstance(factor, Tensor) and factor.ndim == 0 else factor
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise TypeError(f"directions are multiplied by a finite number, not {factor!r}")
    return float(number)

"""Where a direction acts: for each layer its unit vectors, and the norms and means that the formulas of the verbs need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emolens._typing import AnyPoint, Blocks, block_numbers, hook_name
from emolens.collect.pooling import SINK
from emolens.directions.value import EmotionDirections
from emolens.interventions.hooks import DoseUnit, Hook, Spec
from emolens.interventions.positions import Positions, Where, check_where

Direction = EmotionDirections | Float[Tensor, "*row d_model"] | Float[np.ndarray, "*row d_model"]
Layers = Blocks | Literal["all"] | None


@dataclass(frozen=True, eq=False)
class Place:
    """One layer at which a verb acts.

    Attributes:
        kind, hook_point, layer: What is done, and where.
        unit: `[row d_model]`, directions of norm one.
        norm: Of each dose unit its size here, where it is known.
        directions: That the unit vectors are of; None for a bare tensor.
        slot: Of the layer in the directions, where they have it.
    """

    kind: str
    hook_point: AnyPoint
    layer: int
    unit: Tensor
    norm: dict[str, float] = field(default_factory=dict)
    directions: EmotionDirections | None = None
    slot: int | None = None

    def size(self, unit: DoseUnit) -> float:
        """A dose of one in the stream's own units."""
        if unit not in ("median", "mean", "raw"):
            raise ValueError(f"dose_unit={unit!r}; allowed: 'median', 'mean', 'raw'")
        size = 1.0 if unit == "raw" else self.norm.get(unit, math.nan)
        if not math.isfinite(size):
            raise ValueError(
                f"the {unit} residual norm at {self.hook_point} of layer {self.layer} is not known to these directions; "
                "collect them there, or give dose_unit='raw' (the residual stream's own units)"
            )
        return size

    def mean(self, which: Literal["reference", "neutral_mean"]) -> Float[Tensor, " d_model"]:
        """The mean activation of stories, or of neutral texts."""
        if self.directions is None or self.slot is None:
            raise ValueError(
                f"the mean at {self.hook_point} of layer {self.layer} is not known here: use directions collected there, or method='zero'"
            )
        if which == "reference":
            return self.directions.centre(self.directions.layers[self.slot]).float()
        mean = self.directions.neutral_mean[self.slot].float()
        if not torch.isfinite(mean).all():
            raise ValueError(
                "method='mean' needs neutral texts, and these directions were made without any"
            )
        return mean

    def limit(self, sinks: bool) -> Float[Tensor, " row=1"]:
        """The norm from which on a token is an attention sink and is left alone."""
        median = self.norm.get("median", math.nan)
        known = math.isfinite(median) and self.hook_point.startswith("resid")
        return torch.tensor([SINK * median if known and not sinks else math.inf])

    def hook(
        self, edit: Callable[..., Tensor], tensors: tuple[Tensor, ...], amount: str, positions: Where | Positions
    ) -> tuple[str, Hook]:  # fmt: skip
        """The hook name and the hook that makes `edit` here."""
        check_where(positions)
        rows = max(len(t) for t in tensors)
        if isinstance(positions, Positions) and rows not in (1, len(positions.encoded)):
            raise ValueError(
                f"{rows} rows of directions for the positions of {len(positions.encoded)} prompts"
            )
        v, name = self.directions, hook_name(self.hook_point, self.layer)
        what = v.emotions if v is not None else ("direction",) * len(self.unit)
        model = v.info["model"] if v is not None else None
        spec = Spec(self.kind, self.hook_point, self.layer, name, what, amount, self.unit.shape[-1], rows, model)  # fmt: skip
        return name, Hook(spec, edit, tensors, positions)


def resolve_places(
    kind: str,
    hook_point: AnyPoint,
    direction: Direction,
    layer: Layers,
    direction_from: SupportsIndex | None,
) -> list[Place]:
    """Where a direction is to act: its vector, reference and norms for each layer asked for."""
    if isinstance(direction, np.ndarray):
        direction = torch.from_numpy(direction)
    if isinstance(direction, Tensor):
        if direction.ndim not in (1, 2) or not torch.isfinite(direction).all():
            raise ValueError(
                f"a bare direction is a finite tensor [d_model] or [row d_model], got {list(direction.shape)}"
            )
        if direction_from is not None or layer is None or isinstance(layer, str):
            raise ValueError(
                "a bare tensor knows no layers: give layer= as a block number or several"
            )
        rows = direction.detach().float().reshape(-1, direction.shape[-1])
        size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        if (size == 0).any():
            raise ValueError("a direction that is zero points nowhere")
        return [Place(kind, hook_point, k, rows / size) for k in layers_once(layer)]
    if not isinstance(direction, EmotionDirections):
        raise TypeError(
            f"a direction is v['joy'], or a tensor or array [d_model], not a {type(direction).__name__}"
        )
    v = direction
    if v.hook_point != hook_point and direction_from is None:
        raise ValueError(
            f"{kind}_{hook_point} with directions of {v.hook_point}: collect them at {hook_point}, or say direction_from= "
            f"(and dose_unit='raw' where there is a dose) to use those of one {v.hook_point} layer there"
        )
    if layer is None:
        chosen = [v.layer]
    else:
        chosen = list(v.layers) if isinstance(layer, str) and layer == "all" else layers_once(layer)
    out = []
    for k in chosen:
        known = v.hook_point == hook_point and k in v.layers
        if direction_from is None and not known:
            v.slot(k)  # says which layers there are
        slot, norm = v.layers.index(k) if known else None, {}
        if slot is not None:
            norm = {"median": float(v.norm_median[slot]), "mean": float(v.norm_mean[slot])}
        unit = v.unit(k if direction_from is None else direction_from).float()
        out.append(Place(kind, hook_point, k, unit, norm, v, slot))
    return out


def layers_once(layer: Any) -> list[int]:
    """Block numbers, at least one, each once."""
    wrong = ": layers are block numbers from 0 on, or 'all'"
    chosen = list(block_numbers(layer, wrong))
    for k in chosen:
        if k < 0:
            raise ValueError(f"layer {k}{wrong}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layer={layer!r}: give each block once, at least one")
    return chosen


def for_rows(name: str, values: float | int | Sequence[float] | Tensor, rows: int) -> Tensor:
    """`[row]` from a number or one for each row; the number of rows may come from here."""
    out = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
    if not len(out) or not torch.isfinite(out).all():
        raise ValueError(f"{name}={values!r}: a finite number, or one for each row")
    if len(out) != rows and 1 not in (len(out), rows):
        raise ValueError(
            f"{len(out)} values of {name} for {rows} directions; give one, or one for each"
        )
    return out

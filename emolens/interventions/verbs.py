"""Hooks that change the residual stream, named by verb and hook point: steer, ablate, clamp, rotate, patch.

With v the unit direction, mu the reference mean and m the median norm of ordinary tokens at the hook point:
``steer``  x + dose m v;   ``ablate``  x - ((x - mu).v) v, or a whole subspace;   ``clamp``  the projection (x - mu).v set to a value;
``rotate`` x turned towards v by an angle, its norm kept;   ``patch``  x replaced by the activation of another run;
``ablate_stream``  ablation wherever a block reads the stream or leaves it, with the mean of each of these places.
Each call returns a list of ``(hook_name, hook)``, to be added to other lists and given to `model.hooks`, `run_with_hooks`, `em.generate`
or `em.sweep`. A hook returns a new tensor and never writes in place. Nothing runs a model here but `check`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from emolens._typing import Blocks, HeadPoint, HookPoint, block_numbers, hook_name
from emolens.collect.activations import Activations
from emolens.collect.pooling import SINK
from emolens.directions.value import EmotionDirections
from emolens.interventions.hooks import (
    AblationMethod,
    DoseUnit,
    Hook,
    Hooks,
    Replace,
    Spec,
    add_vector,
    replace_along,
    set_projection,
    turn_towards,
)
from emolens.interventions.positions import Positions, Where

Direction = EmotionDirections | Float[Tensor, "*row d_model"] | Float[np.ndarray, "*row d_model"]
Layers = Blocks | Literal["all"] | None
P = ParamSpec("P")
R = TypeVar("R")


def _named(
    function: Callable[Concatenate[Any, P], R], hook_point: str, what: str
) -> Callable[P, R]:
    """The public call of a verb at one hook point, with its own name, signature and docstring."""

    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(hook_point, *args, **kwargs)

    verb = function.__name__.strip("_")
    named.__name__ = named.__qualname__ = f"{verb}_{hook_point}"
    signature = inspect.signature(function)
    named.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]  # for help()
    first, rest = inspect.cleandoc(function.__doc__ or "").split("\n", 1)
    named.__doc__ = f"{first.rstrip('.')}: {what}.\n{rest}"
    return named


@dataclass(frozen=True, eq=False)
class _Place:
    """One layer of an intervention: unit directions `[row d_model]` and what the formulas need."""

    layer: int
    unit: Tensor
    norm: dict[str, float]  # dose unit -> size
    v: EmotionDirections | None
    slot: int | None  # of the layer in v, where v has it


def resolve_places(
    kind: str,
    hook_point: HookPoint,
    direction: Direction,
    layer: Layers,
    direction_from: int | None,
) -> list[_Place]:
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
        return [_Place(k, rows / size, {}, None, None) for k in _numbers(layer)]
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
    every = isinstance(layer, str) and layer == "all"
    chosen = [v.layer] if layer is None else list(v.layers) if every else _numbers(layer)
    out = []
    for k in chosen:
        known = v.hook_point == hook_point and k in v.layers
        if direction_from is None and not known:
            v.slot(k)  # says which layers there are
        slot = v.layers.index(k) if known else None
        norm = (
            {"median": float(v.norm_median[slot]), "mean": float(v.norm_mean[slot])}
            if slot is not None
            else {}
        )
        out.append(
            _Place(
                k, v.unit(k if direction_from is None else direction_from).float(), norm, v, slot
            )
        )
    return out


def _numbers(layer: Any) -> list[int]:
    wrong = ": layers are block numbers from 0 on, or 'all'"
    chosen = list(block_numbers(layer, wrong))
    for k in chosen:
        if k < 0:
            raise ValueError(f"layer {k}{wrong}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layer={layer!r}: give each block once, at least one")
    return chosen


def orthonormal(
    directions: Float[Tensor, "direction d_model"],
) -> Float[Tensor, "component d_model"]:
    """An orthonormal basis of what directions span; as many rows as they have rank (centred directions have one less than their number).

    >>> orthonormal(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).abs().tolist()
    [[1.0, 0.0]]
    """
    _, size, axes = torch.linalg.svd(directions.double(), full_matrices=False)
    return axes[size > 1e-5 * size[0]].float()


def _per_row(name: str, values: float | int | Sequence[float] | Tensor, rows: int) -> Tensor:
    """`[row]` from a number or one for each row; the number of rows may come from here."""
    out = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
    if not len(out) or not torch.isfinite(out).all():
        raise ValueError(f"{name}={values!r}: a finite number, or one for each row")
    if len(out) != rows and 1 not in (len(out), rows):
        raise ValueError(
            f"{len(out)} values of {name} for {rows} directions; give one, or one for each"
        )
    return out


def _size(place: _Place, unit: DoseUnit, hook_point: str) -> float:
    if unit not in ("median", "mean", "raw"):
        raise ValueError(f"dose_unit={unit!r}; allowed: 'median', 'mean', 'raw'")
    if unit == "raw":
        return 1.0
    size = place.norm.get(unit, math.nan)
    if not math.isfinite(size):
        raise ValueError(
            f"the {unit} residual norm at {hook_point} of layer {place.layer} is not known to these directions; "
            "collect them there, or give dose_unit='raw' (the residual stream's own units)"
        )
    return size


def _reference(
    place: _Place, which: Literal["reference", "neutral_mean"], hook_point: str
) -> Tensor:
    if place.v is None or place.slot is None:
        raise ValueError(
            f"the mean at {hook_point} of layer {place.layer} is not known here: use directions collected there, or method='zero'"
        )
    mean = getattr(place.v, which)[place.slot].float()
    if not torch.isfinite(mean).all():
        raise ValueError(
            "method='mean' needs neutral texts, and these directions were made without any"
        )
    return mean


def _limit(place: _Place, hook_point: str, sinks: bool) -> Tensor:
    """`[row=1]`, the norm from which on a token is an attention sink and is left alone."""
    known = math.isfinite(place.norm.get("median", math.nan)) and hook_point.startswith("resid")
    return torch.tensor([SINK * place.norm["median"] if known and not sinks else math.inf])


def _hook(
    kind: str, hook_point: str, place: _Place, edit: Callable[..., Tensor], tensors: tuple[Tensor, ...], amount: str, positions: Where | Positions
) -> tuple[str, Hook]:  # fmt: skip
    if not isinstance(positions, Positions) and positions not in ("all", "generation"):
        raise ValueError(
            f"positions={positions!r}; allowed: 'all', 'generation', or em.positions(model, prompts, ...)"
        )
    rows = max(len(t) for t in tensors)
    if isinstance(positions, Positions) and rows not in (1, len(positions.encoded)):
        raise ValueError(
            f"{rows} rows of directions for the positions of {len(positions.encoded)} prompts"
        )
    name = hook_name(hook_point, place.layer)  # type: ignore[arg-type]  # one of the literals, by construction
    what = place.v.emotions if place.v is not None else ("direction",) * len(place.unit)
    model = place.v.info["model"] if place.v is not None else None
    spec = Spec(
        kind, hook_point, place.layer, name, what, amount, place.unit.shape[-1], rows, model
    )
    return name, Hook(spec, edit, tensors, positions)


def _text(values: Tensor) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values.min():g} to {values.max():g}"


def _steer(
    hook_point: HookPoint,
    direction: Direction,
    *,
    dose: float | int | Sequence[float] | Tensor,
    layer: Layers = None,
    dose_unit: DoseUnit = "median",
    direction_from: int | None = None,
    positions: Where | Positions = "all",
) -> Hooks:
    """Add a direction.

    x' = x + dose * m * v, with v of norm one and m the median norm of ordinary tokens at this hook point and layer.

    Args:
        direction: One emotion (``v["joy"]``) for all rows of the batch, or several, one for each row; or a tensor `[d_model]` or
            `[row d_model]` with ``dose_unit="raw"``. Its length plays no part, only where it points.
        dose: A number, or one for each row; negative steers away. `em.calibrate_dose` finds how much a model bears.
        layer: A block, several, or "all" that the directions have; None is their own default. Each layer gets its own direction.
        dose_unit: "median", "mean" (the paper's; ordinary tokens only), or "raw" units of the residual stream.
        direction_from: Use this layer's direction at every layer.
        positions: "all", "generation" (the last prompt token and every new one), or `em.positions(...)`.

    Returns:
        A list of ``(hook_name, hook)``.

    Raises:
        ValueError: a layer without directions, a dose that is not finite, rows that do not match, directions of another hook point.

    Example:
        ``hooks = em.steer_resid_post(v["joy"], layer=18, dose=0.1)``

    Reference:
        Turner et al. 2023, *Activation Addition*, arXiv 2308.10248; the unit is that of Anthropic 2026 with the median for the mean.
    """
    out = []
    for place in resolve_places("steer", hook_point, direction, layer, direction_from):
        doses = _per_row("dose", dose, len(place.unit))
        vector = rearrange(doses * _size(place, dose_unit, hook_point), "row -> row 1") * place.unit
        amount = f"dose {_text(doses)} {'raw' if dose_unit == 'raw' else dose_unit + ' norms'}"
        out.append(_hook("steer", hook_point, place, add_vector, (vector,), amount, positions))
    return out


def _ablate(
    hook_point: HookPoint,
    direction: Direction,
    *,
    layer: Layers = None,
    method: AblationMethod = "affine",
    per_row: bool = False,
    source: Activations | None = None,
    direction_from: int | None = None,
    positions: Where | Positions = "all",
    sinks: bool = False,
    seed: int = 0,
) -> Hooks:
    """Take a direction, or the subspace of several, out of the stream.

    x' = x - ((x - r).v) v: the projection on v becomes that of r. "affine": r = mu, the mean of the stories that the directions were made
    from; "mean": of neutral texts; "zero": r = 0, which also takes away the large component that all text shares; "resample": r is one
    text drawn at random from `source` (average over seeds). Several directions are made orthonormal first and removed together.

    Args:
        direction: One or several emotions (the subspace they span), or a tensor `[d_model]` or `[component d_model]`.
        layer: A block, several, or "all" that the directions have.
        method: "affine", "zero", "mean" or "resample"; "zero" is the only one for a bare tensor.
        per_row: Several directions are one for each row of the batch instead of a subspace.
        source: For "resample": activations of this hook point and layer, such as ``em.collect_resid_post(model, texts)``.
        direction_from: Use this layer's direction at every layer.
        positions: As in `steer_resid_post`.
        sinks: Change attention sinks too: tokens (the first, mostly) with a norm above ten medians, whose projection on any direction is
            hundreds of times that of the rest. Left alone by default; a bare tensor does not know the median and changes them.
        seed: Of the draws of "resample".

    Returns:
        A list of ``(hook_name, hook)``.

    Raises:
        ValueError: a mean that the directions do not know, directions of another hook point, a layer they do not have.

    Reference:
        Arditi et al. 2024, arXiv 2406.11717 (to zero); Marshall et al. 2024, *Refusal is an affine function*, arXiv 2411.09003.
    """
    if method not in ("affine", "zero", "mean", "resample"):
        raise ValueError(f"method={method!r}; allowed: 'affine', 'zero', 'mean', 'resample'")
    if (source is not None) != (method == "resample"):
        raise ValueError(
            "method='resample' needs source=, activations to draw from, and no other method takes them"
        )
    out = []
    for place in resolve_places("ablate", hook_point, direction, layer, direction_from):
        basis = (
            rearrange(place.unit, "row d_model -> row 1 d_model")
            if per_row
            else orthonormal(place.unit)[None]
        )
        if method == "zero":
            r = torch.zeros_like(place.unit[0])
        elif method == "resample":
            assert source is not None
            if source.hook_point != hook_point or place.layer not in source.layers:
                have = f"{source.hook_point} of layers {list(source.layers)}"
                raise ValueError(f"source has {have}, not {hook_point} of layer {place.layer}")
            drawn = int(
                torch.randint(len(source.rows), (1,), generator=torch.Generator().manual_seed(seed))
            )
            r = source.rows[drawn, source.layers.index(place.layer)].float()
        else:
            r = _reference(place, "reference" if method == "affine" else "neutral_mean", hook_point)
        out.append(removed_from(hook_point, place, basis, r, method, positions, sinks))
    return out


def removed_from(
    hook_point: HookPoint, place: _Place, basis: Tensor, r: Tensor, method: str, positions: Where | Positions, sinks: bool
) -> tuple[str, Hook]:  # fmt: skip
    """The hook that sets the projections on a basis to those of r."""
    target = einsum(basis, r, "row component d_model, d_model -> row component")
    tensors = (basis, target, _limit(place, hook_point, sinks))
    return _hook(
        "ablate",
        hook_point,
        place,
        set_projection,
        tensors,
        f"rank {basis.shape[1]}, {method}",
        positions,
    )


def _clamp(
    hook_point: HookPoint,
    direction: Direction,
    *,
    value: float | int | Sequence[float] | Tensor,
    layer: Layers = None,
    dose_unit: DoseUnit = "median",
    direction_from: int | None = None,
    positions: Where | Positions = "all",
    sinks: bool = False,
) -> Hooks:
    """Set the projection on a direction to a value.

    x' = x + (value * m - (x - mu).v) v: measured from the reference mean mu, in median norms m (as a dose is). 0 is affine ablation.

    Args:
        direction, layer, direction_from, positions: As in `steer_resid_post`.
        sinks: As in `ablate_resid_post`.
        value: A number, or one for each row.
        dose_unit: "median", "mean" or "raw"; a bare tensor has no mu and is measured from zero.

    Returns:
        A list of ``(hook_name, hook)``.

    Raises:
        ValueError: as `steer_resid_post`.
    """
    out = []
    for place in resolve_places("clamp", hook_point, direction, layer, direction_from):
        values = _per_row("value", value, len(place.unit))
        mu = (
            torch.zeros_like(place.unit[0])
            if place.v is None
            else _reference(place, "reference", hook_point)
        )
        at = einsum(place.unit, mu, "row d_model, d_model -> row") + values * _size(
            place, dose_unit, hook_point
        )
        basis = rearrange(place.unit, "row d_model -> row 1 d_model")
        amount = f"value {_text(values)} {'raw' if dose_unit == 'raw' else dose_unit + ' norms'}"
        out.append(
            _hook(
                "clamp",
                hook_point,
                place,
                set_projection,
                (basis, at[:, None], _limit(place, hook_point, sinks)),
                amount,
                positions,
            )
        )
    return out


def _rotate(
    hook_point: HookPoint,
    direction: Direction,
    *,
    angle: float | int | Sequence[float] | Tensor,
    layer: Layers = None,
    direction_from: int | None = None,
    positions: Where | Positions = "all",
    sinks: bool = False,
) -> Hooks:
    """Turn the activation towards a direction and keep its norm.

    With phi the angle between x and v, and u the unit vector of x orthogonal to v:
    x' = |x| (cos(phi') v + sin(phi') u),  phi' = phi - angle, not past v (0) nor past -v (180 degrees).

    Args:
        direction, layer, direction_from, positions: As in `steer_resid_post`.
        sinks: As in `ablate_resid_post`; a sink a hundred times as long would move a hundred times as far.
        angle: Degrees, a number or one for each row; negative turns away.

    Returns:
        A list of ``(hook_name, hook)``.

    Raises:
        ValueError: as `steer_resid_post`.

    Reference:
        Vu & Nguyen 2025, *Angular Steering*, arXiv 2510.26243, with the plane of each activation and v for their fixed plane.
    """
    out = []
    for place in resolve_places("rotate", hook_point, direction, layer, direction_from):
        angles = _per_row("angle", angle, len(place.unit))
        radians = rearrange(torch.deg2rad(angles), "row -> row 1 1")
        tensors = (
            rearrange(place.unit, "row d_model -> row 1 d_model"),
            radians,
            _limit(place, hook_point, sinks),
        )
        out.append(
            _hook(
                "rotate",
                hook_point,
                place,
                turn_towards,
                tensors,
                f"{_text(angles)} degrees",
                positions,
            )
        )
    return out


def _patch(
    hook_point: HookPoint | HeadPoint,
    source: Any,
    *,
    layer: Blocks,
    heads: Sequence[int] | None = None,
    along: Direction | None = None,
    positions: Where | Positions = "all",
) -> Hooks:
    """Replace the activation by that of another run.

    x' = the same entry of `source`. (The sweeps `em.patch_*` do this for every layer and position and measure what it does.)

    Args:
        source: An `ActivationCache` or another mapping from hook names, or the activation `[batch pos ...]` itself; one row fits any batch.
        layer: A block, or several with a mapping.
        heads: For z, q, k, v: which heads; None is all.
        along: Only the part of the difference along this direction, x' = x + ((source - x).v) v: one for all rows, or one for each.
        positions: "all" or `em.positions(...)`; the columns of source and batch are the same.

    Returns:
        A list of ``(hook_name, hook)``.

    Raises:
        ValueError: several layers of one tensor; heads of a hook point that has none; shapes that do not match, at the first firing.
        KeyError: a hook point that the cache does not have.
    """
    if heads is not None and hook_point not in ("z", "q", "k", "v"):
        raise ValueError(f"{hook_point} has no heads; z, q, k and v have")
    if along is not None and hook_point in ("z", "q", "k", "v"):
        raise ValueError(
            f"along= is a direction of the residual stream; {hook_point} has other axes"
        )
    layers = _numbers(layer)
    if not isinstance(positions, Positions) and positions not in ("all", "generation"):
        raise ValueError(
            f"positions={positions!r}; allowed: 'all', 'generation', or em.positions(model, prompts, ...)"
        )
    if isinstance(source, Tensor) and len(layers) > 1:
        raise ValueError("one tensor is the activation of one layer; give a cache for several")
    out = []
    for k in layers:
        name = hook_name(hook_point, k)
        if not isinstance(source, Tensor) and name not in source:
            raise KeyError(f"the cache has no {name!r}")
        x = (source if isinstance(source, Tensor) else source[name]).detach()
        if x.ndim < 3:
            raise ValueError(f"{name}: the source is [batch pos ...], got {list(x.shape)}")
        if along is not None:
            place = resolve_places("patch", hook_point, along, k, None)[0]  # type: ignore[arg-type]  # no head point
            name, hook = _hook(
                "patch",
                hook_point,
                place,
                replace_along,
                (x, place.unit),
                "from another run, along it",
                positions,
            )
            out.append((name, hook))
            continue
        if isinstance(positions, Positions) and len(x) not in (1, len(positions.encoded)):
            raise ValueError(
                f"{len(x)} rows of source for the positions of {len(positions.encoded)} prompts"
            )
        what = (
            hook_point if heads is None else f"{hook_point} of heads {', '.join(map(str, heads))}"
        )
        spec = Spec("patch", hook_point, k, name, (what,), "from another run", x.shape[-1], len(x))
        out.append(
            (
                name,
                Hook(spec, Replace(tuple(heads) if heads is not None else None), (x,), positions),
            )
        )
    return out


_PRE, _MID, _POST = (
    "the residual stream before the block",
    "the stream between attention and MLP",
    "the stream after the block",
)
_ATTN, _MLP = "the output of attention", "the output of the MLP"
steer_resid_pre = _named(_steer, "resid_pre", _PRE)
steer_resid_mid = _named(_steer, "resid_mid", _MID)
steer_resid_post = _named(_steer, "resid_post", _POST)
steer_attn_out = _named(_steer, "attn_out", _ATTN)
steer_mlp_out = _named(_steer, "mlp_out", _MLP)
ablate_resid_pre = _named(_ablate, "resid_pre", _PRE)
ablate_resid_mid = _named(_ablate, "resid_mid", _MID)
ablate_resid_post = _named(_ablate, "resid_post", _POST)
ablate_attn_out = _named(_ablate, "attn_out", _ATTN)
ablate_mlp_out = _named(_ablate, "mlp_out", _MLP)
clamp_resid_pre = _named(_clamp, "resid_pre", _PRE)
clamp_resid_mid = _named(_clamp, "resid_mid", _MID)
clamp_resid_post = _named(_clamp, "resid_post", _POST)
clamp_attn_out = _named(_clamp, "attn_out", _ATTN)
clamp_mlp_out = _named(_clamp, "mlp_out", _MLP)
rotate_resid_pre = _named(_rotate, "resid_pre", _PRE)
rotate_resid_mid = _named(_rotate, "resid_mid", _MID)
rotate_resid_post = _named(_rotate, "resid_post", _POST)
rotate_attn_out = _named(_rotate, "attn_out", _ATTN)
rotate_mlp_out = _named(_rotate, "mlp_out", _MLP)
patch_resid_pre = _named(_patch, "resid_pre", _PRE)
patch_resid_mid = _named(_patch, "resid_mid", _MID)
patch_resid_post = _named(_patch, "resid_post", _POST)
patch_attn_out = _named(_patch, "attn_out", _ATTN)
patch_mlp_out = _named(_patch, "mlp_out", _MLP)
patch_z = _named(_patch, "z", "what each head read, before W_O")
patch_q = _named(_patch, "q", "the queries")
patch_k = _named(_patch, "k", "the keys")
patch_v = _named(_patch, "v", "the values")


def steer_at(
    hook_point: HookPoint,
    direction: Direction,
    *,
    dose: float | int | Sequence[float] | Tensor,
    layer: Layers = None,
    dose_unit: DoseUnit = "median",
    positions: Where | Positions = "all",
) -> Hooks:
    """`steer_resid_post` and its siblings for a hook point given by name."""
    return _steer(
        hook_point, direction, dose=dose, layer=layer, dose_unit=dose_unit, positions=positions
    )

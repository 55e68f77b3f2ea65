"""Hooks that change the residual stream, named by verb and hook point: steer, ablate, clamp, rotate, patch.

With v the unit direction, mu the reference mean and m the median norm of ordinary tokens at the hook point:
``steer``  x + dose m v;   ``ablate``  x - ((x - mu).v) v, or a whole subspace;   ``clamp``  the projection (x - mu).v set to a value;
``rotate`` x turned towards v by an angle, its norm kept;   ``patch``  x replaced by the activation of another run;
``ablate_stream``  ablation wherever a block reads the stream or leaves it, with the mean of each of these places.
Each call returns a list of ``(hook_name, hook)``, to be added to other lists and given to `model.hooks`, `run_with_hooks`, `em.generate`
or `em.sweep`. A hook returns a new tensor and never writes in place. Nothing runs a model here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from emolens._typing import AnyPoint, Blocks, Cache, HookPoint, at_hook_point, hook_name
from emolens.collect.activations import Activations
from emolens.interventions.hooks import (
    EVERYWHERE,
    AblationMethod,
    DoseUnit,
    Hook,
    Hooks,
    add_vector,
    replace_along,
    replacing,
    set_projection,
    turn_towards,
)
from emolens.interventions.places import (
    Direction,
    Layers,
    Place,
    for_rows,
    layers_once,
    resolve_places,
)
from emolens.interventions.positions import Positions, Where, check_where


def orthonormal(
    directions: Float[Tensor, "direction d_model"],
) -> Float[Tensor, "component d_model"]:
    """An orthonormal basis of what directions span.

    Args:
        directions: `[direction d_model]`, of any length.

    Returns:
        `[component d_model]` in float32, as many rows as the directions have rank (centred ones have one less than their number).

    Example:
        >>> from emolens.interventions import orthonormal
        >>> orthonormal(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).abs().tolist()
        [[1.0, 0.0]]
    """
    _, size, axes = torch.linalg.svd(directions.double(), full_matrices=False)
    return axes[size > 1e-5 * size[0]].float()


_UNITS = {"median": "median norms", "mean": "mean norms", "raw": "raw"}


def _text(values: Tensor) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values.min():g} to {values.max():g}"


def _steer(
    hook_point: AnyPoint,
    direction: Direction,
    *,
    dose: float | int | Sequence[float] | Tensor,
    layer: Layers = None,
    dose_unit: DoseUnit = "median",
    direction_from: SupportsIndex | None = None,
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
        >>> hooks = em.steer_resid_post(directions["glimmer"], layer=1, dose=0.1)
        >>> [name for name, _ in hooks]
        ['blocks.1.hook_resid_post']
        >>> print(hooks[0][1].spec)
        steer glimmer at blocks.1.hook_resid_post (dose 0.1 median norms)
        >>> with model.hooks(fwd_hooks=hooks):
        ...     logits = model(torch.tensor([[1, 2, 3]]))

    Reference:
        Turner et al. 2023, *Activation Addition*, arXiv 2308.10248; the unit is that of Anthropic 2026 with the median for the mean.
    """
    out = []
    for place in resolve_places("steer", hook_point, direction, layer, direction_from):
        doses = for_rows("dose", dose, len(place.unit))
        vector = rearrange(doses * place.size(dose_unit), "row -> row 1") * place.unit
        amount = f"dose {_text(doses)} {_UNITS[dose_unit]}"
        out.append(place.hook(add_vector, (vector,), amount, positions))
    return out


def _ablate(
    hook_point: HookPoint,
    direction: Direction,
    *,
    layer: Layers = None,
    method: AblationMethod = "affine",
    per_row: bool = False,
    source: Activations | None = None,
    direction_from: SupportsIndex | None = None,
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

    Example:
        >>> [(name, hook)] = em.ablate_resid_post(directions[["glimmer", "tarrow"]], layer=1)
        >>> print(hook.spec)
        ablate glimmer, tarrow at blocks.1.hook_resid_post (rank 2, affine)

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
        if method == "zero":
            r = torch.zeros_like(place.unit[0])
        elif source is not None:
            if source.hook_point != hook_point or place.layer not in source.layers:
                have = f"{source.hook_point} of layers {list(source.layers)}"
                raise ValueError(f"source has {have}, not {hook_point} of layer {place.layer}")
            generator = torch.Generator().manual_seed(seed)
            drawn = int(torch.randint(len(source.rows), (1,), generator=generator))
            r = source.rows[drawn, source.layers.index(place.layer)].float()
        else:
            r = place.mean("reference" if method == "affine" else "neutral_mean")
        out.append(removed_from(place, basis_of(place.unit, per_row), r, method, positions, sinks))
    return out


def basis_of(
    unit: Float[Tensor, "row d_model"], per_row: bool
) -> Float[Tensor, "basis component d_model"]:
    """What is taken out: of each row its own direction, or of every row the subspace of all."""
    return rearrange(unit, "row d_model -> row 1 d_model") if per_row else orthonormal(unit)[None]


def removed_from(
    place: Place, basis: Tensor, r: Tensor, method: str, positions: Where | Positions, sinks: bool
) -> tuple[str, Hook]:
    """The hook that sets the projections on a basis to those of r."""
    target = einsum(basis, r, "row component d_model, d_model -> row component")
    amount = f"rank {basis.shape[1]}, {method}"
    return place.hook(set_projection, (basis, target, place.limit(sinks)), amount, positions)


def _clamp(
    hook_point: HookPoint,
    direction: Direction,
    *,
    value: float | int | Sequence[float] | Tensor,
    layer: Layers = None,
    dose_unit: DoseUnit = "median",
    direction_from: SupportsIndex | None = None,
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

    Example:
        >>> [(name, hook)] = em.clamp_resid_post(directions["glimmer"], layer=1, value=0.2)
        >>> print(hook.spec)
        clamp glimmer at blocks.1.hook_resid_post (value 0.2 median norms)
    """
    out = []
    for place in resolve_places("clamp", hook_point, direction, layer, direction_from):
        values = for_rows("value", value, len(place.unit))
        zero = torch.zeros_like(place.unit[0])
        mu = zero if place.directions is None else place.mean("reference")
        at = einsum(place.unit, mu, "row d_model, d_model -> row") + values * place.size(dose_unit)
        basis = rearrange(place.unit, "row d_model -> row 1 d_model")
        tensors = (basis, rearrange(at, "row -> row 1"), place.limit(sinks))
        amount = f"value {_text(values)} {_UNITS[dose_unit]}"
        out.append(place.hook(set_projection, tensors, amount, positions))
    return out


def _rotate(
    hook_point: HookPoint,
    direction: Direction,
    *,
    angle: float | int | Sequence[float] | Tensor,
    layer: Layers = None,
    direction_from: SupportsIndex | None = None,
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

    Example:
        >>> [(name, hook)] = em.rotate_resid_post(directions["glimmer"], layer=1, angle=30)
        >>> print(hook.spec)
        rotate glimmer at blocks.1.hook_resid_post (30 degrees)

    Reference:
        Vu & Nguyen 2025, *Angular Steering*, arXiv 2510.26243, with the plane of each activation and v for their fixed plane.
    """
    out = []
    for place in resolve_places("rotate", hook_point, direction, layer, direction_from):
        angles = for_rows("angle", angle, len(place.unit))
        radians = rearrange(torch.deg2rad(angles), "row -> row 1 1")
        unit = rearrange(place.unit, "row d_model -> row 1 d_model")
        tensors = (unit, radians, place.limit(sinks))
        out.append(place.hook(turn_towards, tensors, f"{_text(angles)} degrees", positions))
    return out


def _patch(
    hook_point: AnyPoint,
    source: Cache | Tensor,
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

    Example:
        >>> from emolens.interventions import patch_resid_post, patch_z
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> logits, cache = model.run_with_cache(tokens)
        >>> hooks = patch_resid_post(cache, layer=1) + patch_z(cache, layer=2, heads=[0, 3])
        >>> with model.hooks(fwd_hooks=hooks):
        ...     bool(torch.allclose(model(tokens), logits, atol=1e-4))  # clean into clean changes nothing
        True
    """
    if heads is not None and hook_point not in ("z", "q", "k", "v"):
        raise ValueError(f"{hook_point} has no heads; z, q, k and v have")
    if along is not None and hook_point in ("z", "q", "k", "v"):
        raise ValueError(
            f"along= is a direction of the residual stream; {hook_point} has other axes"
        )
    layers = layers_once(layer)
    check_where(positions)
    if isinstance(source, Tensor) and len(layers) > 1:
        raise ValueError("one tensor is the activation of one layer; give a cache for several")
    known = () if isinstance(source, Tensor) else tuple(source.keys())
    out = []
    for k in layers:
        name = hook_name(hook_point, k)
        if not isinstance(source, Tensor) and name not in known:
            raise KeyError(f"the cache has no {name!r}")
        x = (source if isinstance(source, Tensor) else source[name]).detach()
        if x.ndim < 3:
            raise ValueError(f"{name}: the source is [batch pos ...], got {list(x.shape)}")
        if along is not None:
            [place] = resolve_places("patch", hook_point, along, k, None)  # type: ignore[arg-type]  # no head point
            amount = "from another run, along it"
            out.append(place.hook(replace_along, (x, place.unit), amount, positions))
            continue
        if isinstance(positions, Positions) and len(x) not in (1, len(positions.encoded)):
            raise ValueError(
                f"{len(x)} rows of source for the positions of {len(positions.encoded)} prompts"
            )
        here, what = EVERYWHERE, hook_point
        if heads is not None:
            if x.ndim != 4 or not all(0 <= h < x.shape[2] for h in heads):
                raise ValueError(
                    f"heads {list(heads)}: this hook point has heads 0 to {x.shape[2] - 1}"
                    if x.ndim == 4
                    else f"{name}: the source is [batch pos head d_head], got {list(x.shape)}"
                )
            here = torch.zeros(1, 1, x.shape[2], dtype=torch.bool)
            here[..., list(heads)] = True
            what = f"{hook_point} of heads {', '.join(map(str, heads))}"
        out.append(replacing(hook_point, k, x, here, what=what, positions=positions))
    return out


steer_resid_pre = at_hook_point(_steer, "resid_pre")
steer_resid_mid = at_hook_point(_steer, "resid_mid")
steer_resid_post = at_hook_point(_steer, "resid_post")
steer_attn_out = at_hook_point(_steer, "attn_out")
steer_mlp_out = at_hook_point(_steer, "mlp_out")
ablate_resid_pre = at_hook_point(_ablate, "resid_pre")
ablate_resid_mid = at_hook_point(_ablate, "resid_mid")
ablate_resid_post = at_hook_point(_ablate, "resid_post")
ablate_attn_out = at_hook_point(_ablate, "attn_out")
ablate_mlp_out = at_hook_point(_ablate, "mlp_out")
clamp_resid_pre = at_hook_point(_clamp, "resid_pre")
clamp_resid_mid = at_hook_point(_clamp, "resid_mid")
clamp_resid_post = at_hook_point(_clamp, "resid_post")
clamp_attn_out = at_hook_point(_clamp, "attn_out")
clamp_mlp_out = at_hook_point(_clamp, "mlp_out")
rotate_resid_pre = at_hook_point(_rotate, "resid_pre")
rotate_resid_mid = at_hook_point(_rotate, "resid_mid")
rotate_resid_post = at_hook_point(_rotate, "resid_post")
rotate_attn_out = at_hook_point(_rotate, "attn_out")
rotate_mlp_out = at_hook_point(_rotate, "mlp_out")
patch_resid_pre = at_hook_point(_patch, "resid_pre")
patch_resid_mid = at_hook_point(_patch, "resid_mid")
patch_resid_post = at_hook_point(_patch, "resid_post")
patch_attn_out = at_hook_point(_patch, "attn_out")
patch_mlp_out = at_hook_point(_patch, "mlp_out")
patch_z = at_hook_point(_patch, "z")
patch_q = at_hook_point(_patch, "q")
patch_k = at_hook_point(_patch, "k")
patch_v = at_hook_point(_patch, "v")


def steer_at(
    hook_point: AnyPoint,
    direction: Direction,
    *,
    dose: float | int | Sequence[float] | Tensor,
    layer: Layers = None,
    dose_unit: DoseUnit = "median",
    positions: Where | Positions = "all",
) -> Hooks:
    """Add a direction at a hook point that is given by name: `steer_resid_post` and its siblings.

    Args:
        hook_point: By TransformerLens's name without "hook_", such as "resid_post".
        direction, dose, layer, dose_unit, positions: As in `steer_resid_post`.

    Returns:
        A list of ``(hook_name, hook)``.

    Raises:
        ValueError: as `steer_resid_post`.

    Example:
        >>> from emolens.interventions import steer_at
        >>> [name for name, _ in steer_at("resid_post", directions["glimmer"], layer=[0, 1], dose=0.1)]
        ['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post']
    """
    return _steer(
        hook_point, direction, dose=dose, layer=layer, dose_unit=dose_unit, positions=positions
    )

"""Hooks that change the residual stream, named by verb and hook point: steer, ablate, clamp, rotate, patch.

With v the unit direction, mu the reference mean and m the median norm of ordinary tokens at the hook point:
``steer``  x + dose m v;   ``ablate``  x - ((x - mu).v) v, or a whole subspace;   ``clamp``  the projection (x - mu).v set to a value;
``rotate`` x turned towards v by an angle, its norm kept;   ``patch``  x replaced by the activation of another run;
``ablate_stream``  ablation wherever a block reads the stream or leaves it, with the mean of each of these places.
Each call returns a list of ``(hook_name, hook)``, to be added to other lists and given to `model.hooks`, `run_with_hooks`, `em.generate`
or `em.sweep`. A hook returns a new tensor and never writes in place. Nothing runs a model here but `check`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from html import escape
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emolens._typing import Blocks, HeadPoint, HookedModel, HookPoint, Text, block_numbers, hook_name
from emolens.activations import SINK, Activations, Pooling, TextInfo, collect, is_main, pooled_positions
from emolens.corpus import several
from emolens.directions import EmotionDirections
from emolens.models import EncodedText, can_start_at_layer, checked, encode, pad
from emolens.readout import check_model
from emolens.shards import same_weights

Direction = EmotionDirections | Float[Tensor, "*row d_model"] | Float[np.ndarray, "*row d_model"]
Layers = Blocks | Literal["all"] | None
Where = Literal["all", "generation"]
DoseUnit = Literal["median", "mean", "raw"]
AblationMethod = Literal["affine", "zero", "mean", "resample"]


# --- positions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Positions:
    """Chosen tokens of particular prompts, and the very batch that they are columns of.

    Attributes:
        encoded: The prompts as tokens.
        chosen: For each prompt the chosen tokens, counted over its real tokens.
        padding_side: Of the batch that a raw run will use; `em.generate` and `em.sweep` pad for themselves.
        device: Where `tokens` and `attention_mask` are made.
    """

    encoded: tuple[EncodedText, ...]
    chosen: tuple[tuple[int, ...], ...]
    padding_side: Literal["left", "right"] = "right"
    device: Any = "cpu"

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The padded prompts, for ``model(p.tokens, attention_mask=p.attention_mask)``."""
        return pad(self.encoded, self.padding_side, self.device)[0]

    @property
    def attention_mask(self) -> Int[Tensor, "batch pos"]:
        """1 for real tokens."""
        return pad(self.encoded, self.padding_side, self.device)[1]

    @cached_property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """Which columns of the padded batch are chosen."""
        return self._columns(self.padding_side)

    @cached_property
    def mask_left(self) -> Bool[Tensor, "batch pos"]:
        """The same for a batch padded on the left, as generation needs it."""
        return self._columns("left")

    def _columns(self, side: str) -> Tensor:
        width = max(len(e.ids) for e in self.encoded)
        out = torch.zeros((len(self.encoded), width), dtype=torch.bool)
        for row, (e, chosen) in enumerate(zip(self.encoded, self.chosen, strict=True)):
            offset = width - len(e.ids) if side == "left" else 0
            out[row, [offset + k for k in chosen]] = True
        return out

    def take(self, rows: Sequence[int]) -> Positions:
        """The same for some of the prompts."""
        return replace(self, encoded=tuple(self.encoded[i] for i in rows), chosen=tuple(self.chosen[i] for i in rows))

    def __repr__(self) -> str:
        return f"Positions({sum(map(len, self.chosen))} tokens of {len(self.encoded)} prompts)"


def positions(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    where: Literal["prompt", "last"] | Sequence[int] | Pooling = "prompt",
    *,
    padding_side: Literal["left", "right"] = "right",
    prepend_bos: bool | None = None,
) -> Positions:
    """Choose tokens of prompts exactly, for the `positions` of a hook.

    Args:
        prompts: One or several texts or chats.
        where: "prompt" (every real token), "last" (the last real one), token numbers (the same for every prompt; negative ones count
            from the end), or `em.char_span([...])` (the tokens of some characters or words), `em.every_token(skip=1)` (all but the first).
        padding_side: Of the batch that you will run.
        prepend_bos: As in `em.score`.

    Returns:
        `Positions`; run its own `tokens` and `attention_mask` with the hooks that were made from it.

    Raises:
        ValueError: a token past the end; a span that lies nowhere.

    Example:
        ``p = em.positions(model, "How would you feel about a walk?", em.char_span(["a walk"]))``
    """
    texts = prompts_of(prompts)
    encoded = encode(model, texts, prepend_bos=prepend_bos)
    if isinstance(where, str):
        if where not in ("prompt", "last"):
            raise ValueError(f"where={where!r}; allowed: 'prompt', 'last', token numbers, em.char_span([...])")
        chosen = [tuple(range(len(e.ids))) if where == "prompt" else (len(e.ids) - 1,) for e in encoded]
    elif isinstance(where, Pooling):
        if where.spans is not None and len(where.spans) != len(encoded):
            raise ValueError(f"char_span: {len(where.spans)} spans for {len(encoded)} prompts")
        chosen = [tuple(pooled_positions(e, where, i, "")) for i, e in enumerate(encoded)]
    else:
        chosen = []
        for i, e in enumerate(encoded):
            n = len(e.ids)
            for k in where:
                if not -n <= k < n:
                    raise ValueError(f"position {k} is past the end of prompt {i}, which has {n} tokens")
            chosen.append(tuple(sorted({k % n for k in where})))
    return Positions(tuple(encoded), tuple(chosen), padding_side, getattr(model.cfg, "device", "cpu"))


def prompts_of(prompts: Text | Sequence[Text]) -> list[Text]:
    """`corpus.several` of at least one prompt."""
    out = several(prompts)
    if not out:
        raise ValueError("no prompt given")
    return out


class Window:
    """Which columns of the whole left-padded sequence the model is looking at; moved by the loop that owns it."""

    def __init__(self, width: int, start: int = 0) -> None:
        self.width, self.start = width, start  # of the prompts; of the current call


# --- the hook ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a hook does, where and how much, as data.

    Attributes:
        kind: steer, ablate, clamp, rotate or patch.
        hook_point, layer, hook_name: Where.
        what: Names of the directions, or of what is patched.
        amount: How much, in words and units.
        width: d_model (or d_head) that it fits; None fits any.
        rows: Rows of the batch that it fits; 1 fits any.
        model: `ModelInfo` of the model that the directions were made with, as a dictionary; None if unknown.
        stream: One of the hooks that together ablate the whole stream.
    """

    kind: str
    hook_point: str
    layer: int
    hook_name: str
    what: tuple[str, ...]
    amount: str
    width: int | None
    rows: int
    model: dict[str, Any] | None = field(default=None, repr=False)
    stream: bool = False

    def __str__(self) -> str:
        names = ", ".join(self.what[:3]) + (f", ... ({len(self.what)})" if len(self.what) > 3 else "")
        return f"{self.kind} {names} at {self.hook_name} ({self.amount})"


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook function for TransformerLens: ``hook(activation, hook_point) -> activation``.

    Attributes:
        spec: What it does.
        edit: Called with the activation and `tensors`; returns the changed activation.
        tensors: Each `[row ...]` with one row, or one for each row of the batch.
        positions: "all", "generation" (the last prompt token and every new one), or `Positions`.
    """

    spec: Spec
    edit: Callable[..., Tensor] = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)
    positions: Where | Positions = "all"
    window: Window | None = field(default=None, repr=False)
    _cast: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def __call__(self, act: Tensor, hook: Any = None) -> Tensor:
        spec = self.spec
        if spec.width is not None and act.shape[-1] != spec.width:
            raise ValueError(f"{spec}: made for width {spec.width}, this activation has {act.shape[-1]}")
        if spec.rows not in (1, act.shape[0]):
            raise ValueError(f"{spec}: made for {spec.rows} rows, this batch has {act.shape[0]}")
        mask = self._mask(act)
        if mask is not None and not mask.any():
            return act
        where = act.device, act.dtype
        if where not in self._cast:  # once a device: a copy at every firing would stall a GPU
            self._cast[where] = tuple(t.to(act.device) for t in self.tensors)
        new = self.edit(act, *self._cast[where]).to(act.dtype)
        if mask is None or mask.all():
            return new
        mask = mask.to(act.device)
        return torch.where(mask.reshape(*mask.shape, *(1,) * (act.ndim - 2)), new, act)

    def _mask(self, act: Tensor) -> Tensor | None:
        """Columns to change; None for all of them."""
        if self.positions == "all":
            return None
        width = act.shape[1]
        if self.window is None:
            if self.positions == "generation":
                raise ValueError(
                    f"{self.spec}: positions='generation' is known only to em.generate, em.sweep and em.check; "
                    "in a raw run use 'all' or em.positions(...)"
                )
            assert isinstance(self.positions, Positions)
            mask = self.positions.mask
            if mask.shape != act.shape[:2]:
                raise ValueError(
                    f"{self.spec}: its positions are of {mask.shape[0]} prompts in {mask.shape[1]} columns, this batch has "
                    f"{act.shape[0]} x {width}; run the tokens of the same em.positions(...)"
                )
            return mask
        columns = torch.arange(self.window.start, self.window.start + width)
        if self.positions == "generation":
            return (columns >= self.window.width - 1)[None]
        assert isinstance(self.positions, Positions)
        mask = self.positions.mask_left
        out = torch.zeros((len(mask), width), dtype=torch.bool)
        inside = columns < mask.shape[1]
        out[:, inside] = mask[:, columns[inside]]
        return out

    def take(self, rows: Sequence[int]) -> Hook:
        """The hook for some rows of its batch."""
        here = self.positions.take(rows) if isinstance(self.positions, Positions) else self.positions
        if self.spec.rows == 1:
            return replace(self, positions=here, _cast={})
        tensors = tuple(t if len(t) == 1 else t[list(rows)] for t in self.tensors)
        what = tuple(self.spec.what[i] for i in rows) if len(self.spec.what) == self.spec.rows else self.spec.what
        spec = replace(self.spec, rows=len(rows), what=what)
        return replace(self, spec=spec, tensors=tensors, positions=here, _cast={})

    def within(self, window: Window) -> Hook:
        """The hook as the loop that owns `window` uses it."""
        return replace(self, window=window)


Hooks = list[tuple[str, Any]]  # (hook name, function): ours, or anyone's

P = ParamSpec("P")
R = TypeVar("R")


def _named(function: Callable[Concatenate[Any, P], R], hook_point: str, what: str) -> Callable[P, R]:
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


# --- directions and layers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    """One layer of an intervention: unit directions `[row d_model]` and what the formulas need."""

    layer: int
    unit: Tensor
    norm: dict[str, float]  # dose unit -> size
    v: EmotionDirections | None
    slot: int | None  # of the layer in v, where v has it


def resolve_places(
    kind: str, hook_point: HookPoint, direction: Direction, layer: Layers, direction_from: int | None
) -> list[_Place]:
    if isinstance(direction, np.ndarray):
        direction = torch.from_numpy(direction)
    if isinstance(direction, Tensor):
        if direction.ndim not in (1, 2) or not torch.isfinite(direction).all():
            raise ValueError(
                f"a bare direction is a finite tensor [d_model] or [row d_model], got {list(direction.shape)}"
            )
        if direction_from is not None or layer is None or isinstance(layer, str):
            raise ValueError("a bare tensor knows no layers: give layer= as a block number or several")
        rows = direction.detach().float().reshape(-1, direction.shape[-1])
        size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        if (size == 0).any():
            raise ValueError("a direction that is zero points nowhere")
        return [_Place(k, rows / size, {}, None, None) for k in _numbers(layer)]
    if not isinstance(direction, EmotionDirections):
        raise TypeError(f"a direction is v['joy'], or a tensor or array [d_model], not a {type(direction).__name__}")
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
        norm = {"median": float(v.norm_median[slot]), "mean": float(v.norm_mean[slot])} if slot is not None else {}
        out.append(_Place(k, v.unit(k if direction_from is None else direction_from).float(), norm, v, slot))
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


def orthonormal(directions: Float[Tensor, "direction d_model"]) -> Float[Tensor, "component d_model"]:
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
        raise ValueError(f"{len(out)} values of {name} for {rows} directions; give one, or one for each")
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


def _reference(place: _Place, which: Literal["reference", "neutral_mean"], hook_point: str) -> Tensor:
    if place.v is None or place.slot is None:
        raise ValueError(
            f"the mean at {hook_point} of layer {place.layer} is not known here: use directions collected there, or method='zero'"
        )
    mean = getattr(place.v, which)[place.slot].float()
    if not torch.isfinite(mean).all():
        raise ValueError("method='mean' needs neutral texts, and these directions were made without any")
    return mean


def _limit(place: _Place, hook_point: str, sinks: bool) -> Tensor:
    """`[row=1]`, the norm from which on a token is an attention sink and is left alone."""
    known = math.isfinite(place.norm.get("median", math.nan)) and hook_point.startswith("resid")
    return torch.tensor([SINK * place.norm["median"] if known and not sinks else math.inf])


def _hook(
    kind: str, hook_point: str, place: _Place, edit: Callable[..., Tensor], tensors: tuple[Tensor, ...], amount: str, positions: Where | Positions
) -> tuple[str, Hook]:  # fmt: skip
    if not isinstance(positions, Positions) and positions not in ("all", "generation"):
        raise ValueError(f"positions={positions!r}; allowed: 'all', 'generation', or em.positions(model, prompts, ...)")
    rows = max(len(t) for t in tensors)
    if isinstance(positions, Positions) and rows not in (1, len(positions.encoded)):
        raise ValueError(f"{rows} rows of directions for the positions of {len(positions.encoded)} prompts")
    name = hook_name(hook_point, place.layer)  # type: ignore[arg-type]  # one of the literals, by construction
    what = place.v.emotions if place.v is not None else ("direction",) * len(place.unit)
    model = place.v.info["model"] if place.v is not None else None
    spec = Spec(kind, hook_point, place.layer, name, what, amount, place.unit.shape[-1], rows, model)
    return name, Hook(spec, edit, tensors, positions)


def _text(values: Tensor) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values.min():g} to {values.max():g}"


# --- the verbs --------------------------------------------------------------------------------------------------------


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
        raise ValueError("method='resample' needs source=, activations to draw from, and no other method takes them")
    out = []
    for place in resolve_places("ablate", hook_point, direction, layer, direction_from):
        basis = rearrange(place.unit, "row d_model -> row 1 d_model") if per_row else orthonormal(place.unit)[None]
        if method == "zero":
            r = torch.zeros_like(place.unit[0])
        elif method == "resample":
            assert source is not None
            if source.hook_point != hook_point or place.layer not in source.layers:
                have = f"{source.hook_point} of layers {list(source.layers)}"
                raise ValueError(f"source has {have}, not {hook_point} of layer {place.layer}")
            drawn = int(torch.randint(len(source.rows), (1,), generator=torch.Generator().manual_seed(seed)))
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
    return _hook("ablate", hook_point, place, set_projection, tensors, f"rank {basis.shape[1]}, {method}", positions)


# --- the whole stream -------------------------------------------------------------------------------------------------


def stream_points(model: HookedModel) -> dict[HookPoint, tuple[int, ...]]:
    """Where the residual stream is read or left: before block 0, between attention and MLP, and after every block.

    A parallel model, whose MLP reads what attention reads, has no second place. (Before block k + 1 is after block k.)
    """
    every = tuple(range(model.cfg.n_layers))
    parallel = getattr(model.cfg, "parallel_attn_mlp", False) or hook_name("resid_mid", 0) not in model.hook_dict
    middle: dict[HookPoint, tuple[int, ...]] = {} if parallel else {"resid_mid": every}
    return {"resid_pre": (0,), **middle, "resid_post": every}


@dataclass(frozen=True, eq=False)
class Stream:
    """Pooled activations of the same texts at every place of `stream_points`: what `ablate_stream` takes its references from.

    Raises:
        ValueError: places of another model, a place that is missing, or one that is no place of the stream.
    """

    sites: tuple[Activations, ...]

    def __post_init__(self) -> None:
        models = {a.info["model"]["fingerprint"]: a.info["model"] for a in self.sites}
        if len(models) != 1:
            raise ValueError(f"a stream is of one model, these activations are of {len(models)}")
        [model] = models.values()
        have = {(a.hook_point, k) for a in self.sites for k in a.layers}
        points = {point for point, _ in have if point == "resid_mid"} | {"resid_post"}
        needed = {("resid_pre", 0), *((point, k) for point in points for k in range(model["n_layers"]))}
        if have != needed:
            point, k = min(have ^ needed, key=lambda place: (place[1], place[0]))
            which = "is missing" if (point, k) in needed else "is none of its places"
            raise ValueError(
                f"a stream is resid_pre of block 0 and resid_mid (but in a parallel model) and resid_post of every block; {point} of block {k} "
                f"{which}: em.collect_stream reads them"
            )

    def select(self, keep: Callable[[TextInfo], bool]) -> Stream:
        """The texts for which `keep` is true, at every place."""
        return Stream(tuple(a.select(keep) for a in self.sites))

    def places(self) -> Iterator[tuple[Activations, int, int]]:
        """Each place in the order of the model: the activations that have it, the block, and its slot there."""
        order = {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}
        found = [(layer, order[a.hook_point], a, k) for a in self.sites for k, layer in enumerate(a.layers)]
        for layer, _, a, k in sorted(found, key=lambda place: place[:2]):
            yield a, layer, k


def collect_stream(model: HookedModel, texts: Any, **options: Any) -> Stream:
    """Read texts at every place where a block reads the residual stream or leaves it (`stream_points`): one pass for each hook point.

    Args:
        texts: An emotion set, or plain texts; `options` as for `em.collect_resid_post`, but without `layers`.

    Returns:
        `Stream`, for `ablate_stream`; the mean of its texts at each place is what the ablation keeps.
    """
    found = stream_points(model)
    return Stream(tuple(collect(model, texts, point, layers=layers, **options) for point, layers in found.items()))


def ablate_stream(
    direction: Direction,
    stream: Stream,
    *,
    direction_from: int | None = None,
    method: Literal["affine", "zero", "mean"] = "affine",
    per_row: bool = False,
    positions: Where | Positions = "all",
    sinks: bool = False,
) -> Hooks:
    """Take a direction, or the subspace of several, out of the whole stream: no block reads it any more.

    At every place of the stream  x' = x - ((x - r).v) v, with r the mean of the texts of `stream` at that place. `ablate_resid_post` at all
    layers leaves what the embedding and each attention layer write for the MLP of the same block to read.

    Args:
        direction: One or several emotions (the subspace they span), or a tensor `[d_model]` or `[component d_model]`.
        stream: From `em.collect_stream`; of stories, the ones that the directions were made from, say.
        direction_from: The layer whose direction is taken out everywhere; None is the directions' own default.
        method: "affine": r is the mean of the emotions' means over the stories (of all texts, where none has an emotion); "mean": that of
            the neutral texts; "zero": 0.
        per_row, positions, sinks: As in `ablate_resid_post`.

    Returns:
        A list of ``(hook_name, hook)`` for every place. On a `TransformerBridge` the change of resid_mid reaches the MLP only; the
        skip connection loses the directions at resid_post of the same block, so that every reader finds the same.

    Raises:
        ValueError: directions and stream of two models; no text to take the mean of.

    Example:
        ``hooks = em.ablate_stream(v["fear"], em.collect_stream(model, emotions), direction_from=18)``
    """
    if method not in ("affine", "zero", "mean"):
        raise ValueError(f"method={method!r}; allowed: 'affine', 'zero', 'mean'")
    if not isinstance(direction, EmotionDirections):
        if direction_from is not None:
            raise ValueError(f"direction_from={direction_from}, but a bare tensor knows no layers: leave it out")
        [given] = resolve_places("ablate", "resid_post", direction, 0, None)
    else:
        [given] = resolve_places("ablate", direction.hook_point, direction, direction_from, direction_from)
        made, read = direction.info["model"], stream.sites[0].info["model"]
        if not same_weights(made, read):
            raise ValueError(
                f"the directions are of {made.get('name')} and the stream of {read.get('name')}; collect both from one model"
            )
    if (width := stream.sites[0].rows.shape[-1]) != given.unit.shape[-1]:
        raise ValueError(f"a direction of width {given.unit.shape[-1]} for a stream of width {width}")
    basis = rearrange(given.unit, "row d_model -> row 1 d_model") if per_row else orthonormal(given.unit)[None]
    out = []
    for acts, layer, slot in stream.places():
        r = torch.zeros_like(given.unit[0]) if method == "zero" else _mean_of(acts, slot, method)
        place = replace(given, layer=layer, norm={"median": float(acts.norm_median[slot])})
        name, hook = removed_from(acts.hook_point, place, basis, r, method, positions, sinks)
        out.append((name, replace(hook, spec=replace(hook.spec, stream=True))))
    return out


def _mean_of(acts: Activations, slot: int, method: str) -> Tensor:
    """Mean `[d_model]` of the stories (each emotion weighs the same), of the texts where none has an emotion, or of the neutral texts."""
    if method == "affine" and any(map(is_main, acts.texts)):
        groups = [t.emotion if is_main(t) else None for t in acts.texts]
    else:
        split = "neutral" if method == "mean" else ""
        groups = [split if t.split == split else None for t in acts.texts]
    of_row = [groups[i] for i in acts.row_text.tolist()]
    names = [g for g in dict.fromkeys(groups) if g is not None]
    if not names:
        raise ValueError(
            f"method={method!r} has no {'neutral texts' if method == 'mean' else 'texts'} to take the mean of here"
        )
    means = [acts.rows[torch.tensor([g == name for g in of_row]), slot].double().mean(0) for name in names]
    return torch.stack(means).mean(0).float()


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
        mu = torch.zeros_like(place.unit[0]) if place.v is None else _reference(place, "reference", hook_point)
        at = einsum(place.unit, mu, "row d_model, d_model -> row") + values * _size(place, dose_unit, hook_point)
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
        tensors = (rearrange(place.unit, "row d_model -> row 1 d_model"), radians, _limit(place, hook_point, sinks))
        out.append(_hook("rotate", hook_point, place, turn_towards, tensors, f"{_text(angles)} degrees", positions))
    return out


def _patch(
    hook_point: HookPoint | HeadPoint,
    source: Mapping[str, Tensor] | Tensor,
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
        raise ValueError(f"along= is a direction of the residual stream; {hook_point} has other axes")
    layers = _numbers(layer)
    if not isinstance(positions, Positions) and positions not in ("all", "generation"):
        raise ValueError(f"positions={positions!r}; allowed: 'all', 'generation', or em.positions(model, prompts, ...)")
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
                "patch", hook_point, place, replace_along, (x, place.unit), "from another run, along it", positions
            )
            out.append((name, hook))
            continue
        if isinstance(positions, Positions) and len(x) not in (1, len(positions.encoded)):
            raise ValueError(f"{len(x)} rows of source for the positions of {len(positions.encoded)} prompts")
        what = hook_point if heads is None else f"{hook_point} of heads {', '.join(map(str, heads))}"
        spec = Spec("patch", hook_point, k, name, (what,), "from another run", x.shape[-1], len(x))
        out.append((name, Hook(spec, Replace(tuple(heads) if heads is not None else None), (x,), positions)))
    return out


# --- the edits: pure functions of an activation `[batch pos ...]` and tensors `[row ...]` -----------------------------------


def add_vector(x: Tensor, vector: Tensor) -> Tensor:
    return x + rearrange(vector, "row d_model -> row 1 d_model").to(x.dtype)


def set_projection(x: Tensor, basis: Tensor, target: Tensor, limit: Tensor) -> Tensor:
    x32 = x.float()  # a projection in half precision would leave a remainder of its own size
    basis = basis.expand(len(x), -1, -1)
    now = einsum(x32, basis, "batch pos d_model, batch component d_model -> batch pos component")
    step = rearrange(target, "row component -> row 1 component") - now
    new = x32 + einsum(step, basis, "batch pos component, batch component d_model -> batch pos d_model")
    return torch.where(torch.linalg.vector_norm(x32, dim=-1, keepdim=True) < limit, new.to(x.dtype), x)


def turn_towards(x: Tensor, v: Tensor, angle: Tensor, limit: Tensor) -> Tensor:
    x32 = x.float()
    along = (x32 * v).sum(-1, keepdim=True)
    across = x32 - along * v
    length, norm = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (across, x32))
    u = across / length.clamp_min(1e-12)
    turned = (torch.atan2(length, along) - angle).clamp(0, math.pi)
    new = norm * (turned.cos() * v + turned.sin() * u)
    return torch.where(
        (norm < limit) & (length > 1e-6 * norm), new.to(x.dtype), x
    )  # x parallel to v has no plane and stays


def replace_along(x: Tensor, source: Tensor, v: Tensor) -> Tensor:
    if source.shape[1:] != x.shape[1:]:
        raise ValueError(f"patch: the source is {list(source.shape)}, this activation {list(x.shape)}")
    v = rearrange(v, "row d_model -> row 1 d_model")
    x32 = x.float()
    return x32 + ((source.float() - x32) * v).sum(-1, keepdim=True) * v


@dataclass(frozen=True)
class Replace:
    """Of a patch: whole activations, or some heads."""

    heads: tuple[int, ...] | None

    def __call__(self, x: Tensor, source: Tensor) -> Tensor:
        if source.shape[1:] != x.shape[1:]:
            raise ValueError(f"patch: the source is {list(source.shape)}, this activation {list(x.shape)}")
        source = source.expand_as(x).to(x.dtype)
        if self.heads is None:
            return source.clone()
        if not all(0 <= h < x.shape[2] for h in self.heads):
            raise ValueError(f"heads {list(self.heads)}: this hook point has heads 0 to {x.shape[2] - 1}")
        new = x.clone()
        new[:, :, list(self.heads)] = source[:, :, list(self.heads)]
        return new


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
    return _steer(hook_point, direction, dose=dose, layer=layer, dose_unit=dose_unit, positions=positions)


# --- before a run -----------------------------------------------------------------------------------------------------


def validate(
    model: HookedModel,
    hooks: Hooks,
    *,
    encoded: Sequence[EncodedText] | None = None,
    allow_other_model: bool | None = False,
) -> None:
    """Refuse hooks that cannot do what they say on this model and batch, before any forward pass.

    Args:
        encoded: The prompts that they will run on; None where they are not known yet.

    Raises:
        KeyError: a hook point that the model lacks (one backend would ignore it in silence).
        ValueError: another model's directions, another width, rows or positions of other prompts.
        TypeError: not a list of (name, function).
    """
    points = model.hook_dict  # one look: a bridge makes it anew at each
    known: list[Mapping[str, Any]] = []  # models that were compared with this one
    for entry in hooks:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and callable(entry[1])):
            raise TypeError(f"hooks are a list of (hook name, function), found {entry!r}")
        name, hook = entry
        if name not in points:
            if isinstance(hook, Hook) and hook.spec.layer >= model.cfg.n_layers:
                raise KeyError(
                    f"layer {hook.spec.layer} does not exist; this model has layers 0 to {model.cfg.n_layers - 1}"
                )
            near = difflib.get_close_matches(name, points, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            if "resid_mid" in name:
                hint = "; a parallel-residual model adds attention and MLP at once and has no resid_mid"
            raise KeyError(f"this model has no hook point {name!r}{hint}")
        if not isinstance(hook, Hook):
            continue
        spec = hook.spec
        # subtle: what resid_mid loses for the MLP alone, the skip connection loses at resid_post of the same block
        if spec.hook_point == "resid_mid" and not can_start_at_layer(model) and not spec.stream:
            raise KeyError(
                f"{spec}: on a TransformerBridge this hook point is only what the MLP reads, and a change there is lost to the stream; "
                "use attn_out, which adds the same vector to the stream, or backend='hooked'"
            )
        width = model.cfg.d_head if spec.hook_point in ("z", "q", "k", "v") else model.cfg.d_model
        if spec.width not in (None, width):
            raise ValueError(f"{spec}: made for width {spec.width}, this model has {width}")
        if spec.model is not None and spec.model not in known:
            check_model(model, spec.model, allow_other_model=allow_other_model)
            known.append(spec.model)
        if encoded is None:
            continue
        if spec.rows not in (1, len(encoded)):
            raise ValueError(f"{spec}: made for {spec.rows} rows, here are {len(encoded)} prompts")
        if isinstance(hook.positions, Positions):
            mine, here = [e.ids for e in hook.positions.encoded], [e.ids for e in encoded]
            if mine != here:
                raise ValueError(
                    f"{spec}: its positions are of other prompts; resolve them again with em.positions(...)"
                )
    ablated = {name for name, hook in hooks if isinstance(hook, Hook) and hook.spec.stream}
    needed = {hook_name(point, k) for point, layers in stream_points(model).items() for k in layers}
    if ablated and (missing := sorted(needed - ablated)):
        raise ValueError(
            f"ablate_stream left out {missing[0]}, which this model has; give it em.collect_stream(...) of this model, and use all its hooks"
        )


@dataclass(frozen=True, eq=False)
class Check:
    """What hooks did to one prompt.

    Attributes:
        text: The prompt.
        spans: Characters of each token; none of a token that the tokenizer adds.
        tokens: What each token is in the text, spaces included; the name of one that the tokenizer adds.
        steered: `[pos]` whether any hook changed the token.
        fired: For each hook: its name, how often it fired, how many tokens it changed, the median over them of |x' - x| / |x|, and of
            |x'| / |x|.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    tokens: tuple[str, ...]
    steered: Bool[Tensor, " pos"]
    fired: tuple[tuple[str, int, int, float, float], ...]

    def _pieces(self) -> Iterator[tuple[str, bool]]:
        """The text cut at its tokens, and whether each piece was changed; a token without characters (a BOS) stands under its name."""
        at = 0
        for (start, end), name, on in zip(self.spans, self.tokens, self.steered.tolist(), strict=True):
            if start == end:
                yield name if on else "", on
                continue
            start = max(start, at)
            yield self.text[at:start], False
            yield self.text[start:end], on  # nothing where the token before has taken the whole character
            at = max(end, at)
        yield self.text[at:], False

    @property
    def marked(self) -> str:
        """The text with changed tokens in brackets."""
        return "".join(f"[{piece}]" if on and piece else piece for piece, on in self._pieces())

    def __repr__(self) -> str:
        lines = [self.marked]
        for what, times, n, step, norm in self.fired:
            lines.append(
                f"  {what}: fired {times}x, {n} of {len(self.spans)} tokens, |change| {step:.3f} |x|, norm x {norm:.3f}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        mark = '<mark style="background:#f6cdb8">'
        text = "".join(f"{mark}{escape(p)}</mark>" if on and p else escape(p) for p, on in self._pieces())
        lines = "".join(
            f"<li>{escape(what)}: fired {times}x, {n} of {len(self.spans)} tokens, |change| = {step:.3f} |x|, norm x {norm:.3f}</li>"
            for what, times, n, step, norm in self.fired
        )
        style = "font:14px/1.7 system-ui,sans-serif;color:#1d2433;background:#fff;padding:8px;max-width:52em"
        return f'<div style="{style}"><bdi>{text}</bdi><ul>{lines}</ul></div>'


def check(
    model: HookedModel, hooks: Hooks, prompt: Text, *, prepend_bos: bool | None = None, allow_other_model: bool = False
) -> Check:
    """Run one prompt and report which hooks fired, which tokens they changed, and by how much.

    Args:
        hooks: From the factories here, or anyone's; hooks with one row for each prompt are shown for their first row.

    Returns:
        `Check`; it prints as the text with the changed tokens in brackets, and shows itself in Jupyter.

    Raises:
        ValueError: no token was changed; or what `validate` refuses.
        FloatingPointError: NaN or infinity, with the layer and the type.

    Example:
        ``em.check(model, em.steer_resid_post(v["joy"], layer=18, dose=0.1), "He feels")``
    """
    texts = prompts_of(prompt)
    if len(texts) > 1:
        raise ValueError(f"check runs one prompt, got {len(texts)}; call it for each")
    [encoded] = encode(model, texts, prepend_bos=prepend_bos)
    hooks = [(name, h.take([0]) if isinstance(h, Hook) and h.spec.rows > 1 else h) for name, h in hooks]
    if not hooks:
        raise ValueError("no hooks given")
    validate(model, hooks, encoded=[encoded], allow_other_model=allow_other_model)
    tokens, mask = pad([encoded], "left", getattr(model.cfg, "device", "cpu"))
    window = Window(tokens.shape[1])
    steered = torch.zeros(tokens.shape[1], dtype=torch.bool)
    seen: list[list[tuple[int, float, float]]] = [[] for _ in hooks]

    def watched(function: Any, k: int) -> Callable[..., Any]:
        inner = function.within(window) if isinstance(function, Hook) else function

        def hook(act: Tensor, hook: Any) -> Any:
            old = act.detach().clone()
            new = inner(act, hook)
            if new is None:
                new = act
            x, y = (rearrange(t.detach().float().cpu(), "1 pos ... -> pos (...)") for t in (old, new))
            norm, step = torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(y - x, dim=-1)
            changed = step > 0
            steered.logical_or_(changed)
            size = torch.linalg.vector_norm(y, dim=-1)
            median = lambda t: float(t[changed].median()) if changed.any() else 0.0  # noqa: E731  (used twice in one line)
            seen[k].append((int(changed.sum()), median(step / norm), median(size / norm)))
            return new

        return hook

    run = partial(model.run_with_hooks, tokens, attention_mask=mask, return_type="logits")
    plain = [(n, h.within(window) if isinstance(h, Hook) else h) for n, h in hooks]
    with torch.no_grad():
        logits = run(fwd_hooks=[(n, watched(h, k)) for k, (n, h) in enumerate(hooks)])
        checked(model, logits, lambda more: run(fwd_hooks=[*plain, *more]), mask)
    fired = []
    for (name, h), at in zip(hooks, seen, strict=True):
        last = at[-1] if at else (0, 0.0, 0.0)
        fired.append((str(h.spec) if isinstance(h, Hook) else name, len(at), *last))
    if not steered.any():
        raise ValueError(
            "these hooks changed no token of the prompt: " + "; ".join(f"{what} fired {n}x" for what, n, *_ in fired)
        )
    tokenizer: Any = model.tokenizer  # type: ignore[attr-defined]  # encode has asked for it
    return Check(encoded.text, tuple(encoded.offsets), tuple(encoded.pieces(tokenizer)), steered, tuple(fired))

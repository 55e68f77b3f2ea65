"""One hook: which tokens it touches, what it does to them, and how it says so.

A hook returns a new tensor and never writes in place; its `.spec` says what, where and how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import einsum, rearrange
from torch import Tensor

from emolens._typing import AnyPoint, hook_name
from emolens.interventions.positions import Positions, Where, Window

DoseUnit = Literal["median", "mean", "raw"]
AblationMethod = Literal["affine", "zero", "mean", "resample"]


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
    hook_point: AnyPoint
    layer: int
    hook_name: str
    what: tuple[str, ...]
    amount: str
    width: int | None
    rows: int
    model: dict[str, Any] | None = field(default=None, repr=False)
    stream: bool = False

    def __str__(self) -> str:
        names = ", ".join(self.what[:3]) + (
            f", ... ({len(self.what)})" if len(self.what) > 3 else ""
        )
        return f"{self.kind} {names} at {self.hook_name} ({self.amount})"


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook function for TransformerLens: ``hook(activation, hook_point) -> activation``.

    Attributes:
        spec: What it does.
        edit: Called with the activation and `tensors`; returns the changed activation.
        tensors: Each `[row ...]` with one row, or one for each row of the batch.
        positions: "all", "generation" (the last prompt token and every new one), or `Positions`.
        window: Of the loop that it runs in; None in a raw run.

    Raises:
        ValueError: when it fires on an activation of another width, or on another number of rows or columns.
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
            raise ValueError(
                f"{spec}: made for width {spec.width}, this activation has {act.shape[-1]}"
            )
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
        """The hook for some rows of its batch.

        Args:
            rows: Their numbers.

        Returns:
            A new `Hook`.

        Example:
            >>> [(name, hook)] = em.steer_resid_post(directions[["glimmer", "tarrow"]], layer=1, dose=0.1)
            >>> print(hook.take([1]).spec)
            steer tarrow at blocks.1.hook_resid_post (dose 0.1 median norms)
        """
        here = (
            self.positions.take(rows) if isinstance(self.positions, Positions) else self.positions
        )
        if self.spec.rows == 1:
            return replace(self, positions=here, _cast={})
        tensors = tuple(t if len(t) == 1 else t[list(rows)] for t in self.tensors)
        what = (
            tuple(self.spec.what[i] for i in rows)
            if len(self.spec.what) == self.spec.rows
            else self.spec.what
        )
        spec = replace(self.spec, rows=len(rows), what=what)
        return replace(self, spec=spec, tensors=tensors, positions=here, _cast={})

    def within(self, window: Window) -> Hook:
        """The hook as a loop uses it that shows the model a few columns at a time.

        Args:
            window: Of the loop, which moves it.

        Returns:
            A new `Hook`.

        Example:
            >>> from emolens.interventions import Window
            >>> [(name, hook)] = em.steer_resid_post(directions["glimmer"], layer=1, dose=0.1, positions="generation")
            >>> prompt = torch.zeros(1, 5, 32)
            >>> hook.within(Window(width=5))(prompt).any(-1).tolist()  # the last token of the prompt, and later each new one
            [[False, False, False, False, True]]
        """
        return replace(self, window=window)


Hooks = list[tuple[str, Any]]  # (hook name, function): ours, or anyone's


def add_vector(x: Tensor, vector: Tensor) -> Tensor:
    """x + v, the same at every token."""
    return x + rearrange(vector, "row d_model -> row 1 d_model").to(x.dtype)


def set_projection(x: Tensor, basis: Tensor, target: Tensor, limit: Tensor) -> Tensor:
    """Set the projection on each basis vector of every token that is no sink."""
    x32 = x.float()  # a projection in half precision would leave a remainder of its own size
    basis = basis.expand(len(x), -1, -1)
    now = einsum(x32, basis, "batch pos d_model, batch component d_model -> batch pos component")
    step = rearrange(target, "row component -> row 1 component") - now
    new = x32 + einsum(
        step, basis, "batch pos component, batch component d_model -> batch pos d_model"
    )
    return torch.where(
        torch.linalg.vector_norm(x32, dim=-1, keepdim=True) < limit, new.to(x.dtype), x
    )


def turn_towards(x: Tensor, v: Tensor, angle: Tensor, limit: Tensor) -> Tensor:
    """Turn every token that is no sink towards v, its norm kept."""
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
    """The component along v of another activation in place of one's own."""
    if source.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"patch: the source is {list(source.shape)}, this activation {list(x.shape)}"
        )
    v = rearrange(v, "row d_model -> row 1 d_model")
    x32 = x.float()
    return x32 + ((source.float() - x32) * v).sum(-1, keepdim=True) * v


def replace_where(x: Tensor, source: Tensor, here: Tensor) -> Tensor:
    """The entries of another run where `here` `[row pos ...]` is true, the same along the axes that it lacks."""
    if source.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"patch: the source is {list(source.shape)}, this activation {list(x.shape)}"
        )
    return torch.where(
        here.reshape(*here.shape, *(1,) * (x.ndim - here.ndim)), source.to(x.dtype), x
    )


EVERYWHERE = torch.ones(1, 1, dtype=torch.bool)


def replacing(
    hook_point: AnyPoint,
    layer: int,
    source: Tensor,
    here: Tensor = EVERYWHERE,
    *,
    what: str | None = None,
    positions: Where | Positions = "all",
) -> tuple[str, Hook]:
    """The hook that puts the activation of another run in place of one's own.

    Args:
        hook_point, layer: Where.
        source: `[row pos ...]`, one row or one for each of the batch.
        here: `[row pos ...]`, which entries are replaced; an axis of one, or one that is left out, stands for all.
        what: As the hook says it; None is the hook point.
        positions: As of `Hook`.
    """
    name, rows = hook_name(hook_point, layer), max(len(source), len(here))
    spec = Spec("patch", hook_point, layer, name, (what or hook_point,), "from another run", source.shape[-1], rows)  # fmt: skip
    return name, Hook(spec, replace_where, (source, here), positions)

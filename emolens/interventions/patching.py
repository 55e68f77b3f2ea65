"""Where is an emotion computed, and who writes it: activation patching, its gradient approximation, and direct attribution.

Patching runs one prompt (the base) with one activation of another (the source) put in its place and reads a metric:
``recovery = mean(patched - base) / mean(target - base)``, 0 where nothing changes and 1 where the cell carries all of it: the mean is over
pairs with clean - corrupted above `min_gap` (`passing`), since pairs that differ the other way round would cancel.
Denoising puts clean into corrupted (target: clean, what suffices); noising puts corrupted into clean (what is necessary).
Attribution splits the residual stream into what each embedding, head and MLP added: a sum, hence exact, but blind to indirect
effects. Not done here: path patching, MLP neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from emolens._typing import (
    Blocks,
    HeadPoint,
    HookedModel,
    HookPoint,
    Text,
    hook_name,
)
from emolens.interventions.metrics import (
    NONE_PASSES,
    SPANS,
    Direction,
    LogitDifference,
    Metric,
    Patching,
    Projection,
    passing,
)
from emolens.models.identity import check_model
from emolens.models.points import check_layers, device_of
from emolens.models.running import can_start_at_layer, checked, unembed
from emolens.models.tokens import EncodedText, encode
from emolens.sets.corpus import several

Prompts = Text | Sequence[Text]


@dataclass(frozen=True, eq=False)
class _Pair:
    """Clean and corrupted token ids `[1 pos]` of one pair, and the columns: for each label its positions."""

    clean: Tensor
    corrupted: Tensor
    columns: dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A metric bound to a model."""

    model: HookedModel
    metric: Metric
    prompts: tuple[str, ...]
    sides: tuple[list[int], list[int]] = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.metric, Projection):
            check_model(self.model, self.metric.model, allow_other_model=None)
            _check_point(self.model, self.metric.hook_point, [self.metric.layer])
        elif isinstance(self.metric, LogitDifference):
            object.__setattr__(self, "sides", self.metric.ids(self.model.tokenizer, self.prompts))
        elif not callable(self.metric):
            raise TypeError(
                f"metric is a callable, logit_difference(...) or projection(...), not {self.metric!r}"
            )

    def ahead(self, hook_point: str, layer: int) -> int:
        """How far the metric is ahead of a hook point: 0 where it reads that very activation, below where it was read before."""
        if not isinstance(self.metric, Projection):
            return 1
        return _depth(self.metric.hook_point, self.metric.layer) - _depth(hook_point, layer)

    def reaches(self, hook_point: str, layer: int) -> bool:
        return self.ahead(hook_point, layer) > 0

    def __call__(
        self,
        x: Tensor,
        layer: int | None = None,
        hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
    ) -> Tensor:
        """The metric `[batch]` for tokens `[batch pos]`, or for the stream `[batch pos d_model]` before `layer`."""
        model, metric, kept = self.model, self.metric, []
        hooks = list(hooks)
        if isinstance(metric, Projection):
            hooks.append((metric.hook_name, lambda act, hook: kept.append(act[:, -1])))
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        if can_start_at_layer(model):
            stop = metric.layer + 1 if isinstance(metric, Projection) else model.cfg.n_layers
            options: dict[str, Any] = {"stop_at_layer": stop}
            if layer is not None:
                options["start_at_layer"] = layer
        else:
            options = {"logits_to_keep": 1}
        run = partial(model.run_with_hooks, x, attention_mask=mask, return_type="logits", **options)
        out, again = run(fwd_hooks=hooks), lambda more: run(fwd_hooks=[*hooks, *more])
        if isinstance(metric, Projection):
            unit, reference = metric.unit.to(kept[0]), metric.reference.to(kept[0])
            checked(model, kept[0], again)
            return einsum(kept[0] - reference, unit, "batch d_model, d_model -> batch")
        hooked = can_start_at_layer(model)
        logits = (
            unembed(model, out[:, -1:], again)[:, -1]
            if hooked
            else checked(model, out[:, -1], again)
        )
        if isinstance(metric, LogitDifference):
            a, b = self.sides
            return logits[:, a].mean(-1) - logits[:, b].mean(-1)
        values = metric(logits)
        if values.shape != logits.shape[:1]:
            raise ValueError(
                f"metric returned shape {list(values.shape)}, one value a row is [{len(logits)}]"
            )
        if not torch.isfinite(values).all():
            raise FloatingPointError(
                "the metric is NaN or infinite where the logits are not; mend the function"
            )
        return values


ORDER = (
    ("resid_pre",),
    ("q", "k", "v"),
    ("z",),
    ("attn_out",),
    ("resid_mid",),
    ("mlp_out",),
    ("resid_post",),
)  # of a block


def _depth(hook_point: str, layer: int) -> int:
    """Where in the model a hook point lies; resid_post of a block is resid_pre of the next."""
    return (len(ORDER) - 1) * layer + next(
        k for k, points in enumerate(ORDER) if hook_point in points
    )


def _check_point(
    model: HookedModel, hook_point: HookPoint | HeadPoint, layers: Blocks | None
) -> tuple[int, ...]:
    chosen = check_layers(model, hook_point, layers)
    # past where the skip branches off
    if hook_point == "resid_mid" and not can_start_at_layer(model):
        raise KeyError(
            "on a TransformerBridge resid_mid is only what the MLP reads; patch attn_out, or load with backend='hooked'"
        )
    return chosen


def _encoded(
    model: HookedModel, clean: Prompts, corrupted: Prompts
) -> tuple[list[EncodedText], list[EncodedText]]:
    a, b = several(clean), several(corrupted)
    if len(a) != len(b):
        raise ValueError(
            f"clean and corrupted need the same number of prompts, given {len(a)} and {len(b)}"
        )
    return encode(model, a), encode(model, b)


def _pairs(
    model: HookedModel,
    a: list[EncodedText],
    b: list[EncodedText],
    positions: Sequence[int | str] | None,
    by_head: bool,
) -> tuple[list[_Pair], int]:
    device = device_of(model)
    out: list[_Pair] = []
    dropped = 0
    for x, y in zip(a, b, strict=True):
        if len(x.ids) != len(y.ids):
            if len(a) == 1:
                raise ValueError(
                    f"clean has {len(x.ids)} tokens and corrupted {len(y.ids)}; patching needs the same count: reword one"
                )
            dropped += 1
            continue
        n = len(x.ids)
        if by_head:
            columns = {"all": list(range(n))}
        elif len(a) == 1 and not (positions and all(isinstance(p, str) for p in positions)):
            wanted = list(range(n)) if positions is None else positions
            columns, pieces = {}, x.pieces(model.tokenizer)
            for p in wanted:
                if not isinstance(p, int) or not -n <= p < n:
                    raise ValueError(
                        f"position {p!r} does not exist; this pair has {n} tokens, 0..{n - 1}"
                    )
                columns[f"{p % n}:{pieces[p]}"] = [p % n]
        else:
            columns = _spans(x.ids, y.ids)
            unknown = [p for p in positions or () if p not in SPANS]
            if unknown:
                raise ValueError(
                    f"positions of several pairs, and those given by name, are the spans {SPANS}, not {unknown[0]!r}"
                )
            columns = {
                s: columns[s] for s in (SPANS if positions is None else cast(Any, positions))
            }
        ids = [torch.tensor([e.ids], device=device) for e in (x, y)]
        out.append(_Pair(ids[0], ids[1], columns))
    if not out:
        raise ValueError(
            f"all {dropped} pairs differ in their token count for this tokenizer; none is left"
        )
    return out, dropped


def _spans(clean: list[int], corrupted: list[int]) -> dict[str, list[int]]:
    last = len(clean) - 1
    differ = [i for i in range(last) if clean[i] != corrupted[i]] or [last]
    first, end = differ[0], min(differ[-1] + 1, last)
    ranges = (range(first), range(first, end), range(end, last), range(last, last + 1))
    return {name: list(r) for name, r in zip(SPANS, ranges, strict=True)}


def cache_of(model: HookedModel, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations at some hook points in one unhooked run."""
    kept: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: Any, name: str) -> None:
        kept[name] = act.detach()

    hooks = [(name, lambda act, hook, name=name: keep(act, hook, name)) for name in names]
    options = (
        {"stop_at_layer": model.cfg.n_layers}
        if can_start_at_layer(model)
        else {"logits_to_keep": 1}
    )
    model.run_with_hooks(
        tokens,
        attention_mask=torch.ones_like(tokens),
        return_type="logits",
        fwd_hooks=hooks,
        **options,
    )
    return kept


def _put(cells: list[tuple[list[int], int | None]], source: Tensor) -> Callable[..., Tensor]:
    """A hook that replaces, in row i, the positions (and the head) of cell i by those of `source` `[1 pos ...]`."""

    def hook(act: Tensor, hook: Any) -> Tensor:
        act = act.clone()
        for row, (where, head) in enumerate(cells):
            if head is None:
                act[row, where] = source[0, where]
            else:
                act[row, where, head] = source[0, where, head]
        return act

    return hook


def _sweep(
    model: HookedModel,
    hook_point: HookPoint | HeadPoint,
    *,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    layers: Blocks | None,
    positions: Sequence[int | str] | None,
    direction: Direction,
    batch_tokens: int,
    min_gap: float,
    progress: bool,
    skip: bool = True,
) -> Patching:
    """Patch one cell a row: the base prompt repeated, started before the patched layer where the backend really skips."""
    by_head = hook_point in get_args(HeadPoint)
    pairs, dropped, wanted, read = _prepare(
        model, hook_point, clean, corrupted, metric, layers, positions, direction, by_head
    )
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, given {batch_tokens}")
    skip = skip and can_start_at_layer(model)
    names = [hook_name(hook_point, layer) for layer in wanted]
    starts = [hook_name("resid_pre", layer) for layer in wanted] if skip else []
    values, labels = [], ()
    with torch.inference_mode():
        pairs, ends, excluded = _passing(pairs, read, min_gap)
        for pair in tqdm(pairs, disable=not progress):
            base, source = (
                (pair.corrupted, pair.clean)
                if direction == "denoise"
                else (pair.clean, pair.corrupted)
            )
            sources, before = (
                cache_of(model, source, names),
                cache_of(model, base, starts) if skip else {},
            )
            everywhere = list(range(base.shape[1]))
            if by_head:
                n_heads = sources[names[0]].shape[2]
                cells = [(everywhere, head) for head in range(n_heads)]
                labels = tuple(f"H{head}" for head in range(n_heads))
            else:
                cells = [(where, None) for where in pair.columns.values()]
                labels = tuple(pair.columns)
            table = np.full((len(wanted), len(cells)), np.nan)
            present = [i for i, (where, _) in enumerate(cells) if where]
            step = max(1, batch_tokens // base.shape[1])
            for row, layer in enumerate(wanted):
                if not read.reaches(hook_point, layer):
                    continue
                for at in range(0, len(present), step):
                    some = present[at : at + step]
                    hook = (names[row], _put([cells[i] for i in some], sources[names[row]]))
                    x = before[starts[row]] if skip else base
                    x = repeat(x, "1 ... -> batch ...", batch=len(some))
                    table[row, some] = (
                        read(x, layer if skip else None, [hook]).float().cpu().numpy()
                    )
            values.append(table)
    return _result(
        hook_point, direction, wanted, labels, values, ends, dropped, excluded, False, read
    )


def _passing(
    pairs: list[_Pair], read: _Reader, min_gap: float
) -> tuple[list[_Pair], Float[np.ndarray, "pair end"], int]:
    """The pairs that pass, their metric on clean and corrupted, and how many were left out."""
    ends = np.array([(float(read(pair.clean)), float(read(pair.corrupted))) for pair in pairs])
    kept = passing(ends[:, 0], ends[:, 1], min_gap)
    if not kept.any():
        raise ValueError(NONE_PASSES.format(len(pairs), min_gap))
    return [pair for pair, k in zip(pairs, kept, strict=True) if k], ends[kept], int((~kept).sum())


def _prepare(
    model: HookedModel, hook_point: HookPoint | HeadPoint, clean: Prompts, corrupted: Prompts, metric: Metric, layers: Blocks | None,
    positions: Sequence[int | str] | None, direction: str, by_head: bool,
) -> tuple[list[_Pair], int, list[int], _Reader]:  # fmt: skip
    """Everything that can be refused before the first forward pass."""
    if direction not in get_args(Direction):
        raise ValueError(f"direction is 'denoise' or 'noise', not {direction!r}")
    wanted = list(_check_point(model, hook_point, layers))
    encoded = _encoded(model, clean, corrupted)
    read = _Reader(model, metric, tuple(e.text for side in encoded for e in side))
    pairs, dropped = _pairs(model, *encoded, positions, by_head)
    return pairs, dropped, wanted, read


def _result(
    hook_point: str, direction: Direction, layers: list[int], labels: tuple[str, ...], values: list[np.ndarray],
    ends: Float[np.ndarray, "pair end"], dropped: int, excluded: int, approximate: bool, read: _Reader,
) -> Patching:  # fmt: skip
    c, k = ends.T
    trivial = tuple(layer for layer in layers if read.ahead(hook_point, layer) == 0)
    return Patching(
        hook_point,
        direction,
        tuple(layers),
        labels,
        np.stack(values),
        c,
        k,
        dropped,
        excluded,
        trivial,
        approximate,
    )


def _stream(hook_point: HookPoint, what: str) -> Callable[..., Patching]:
    def patch(
        model: HookedModel,
        *,
        clean: Prompts,
        corrupted: Prompts,
        metric: Metric,
        layers: Blocks | None = None,
        positions: Sequence[int | str] | None = None,
        direction: Direction = "denoise",
        batch_tokens: int = 4096,
        min_gap: float = 0.0,
        progress: bool = False,
    ) -> Patching:
        return _sweep(
            model, hook_point, clean=clean, corrupted=corrupted, metric=metric, layers=layers, positions=positions,
            direction=direction, batch_tokens=batch_tokens, min_gap=min_gap, progress=progress,
        )  # fmt: skip

    patch.__name__ = patch.__qualname__ = f"patch_{hook_point}"
    patch.__doc__ = f"""Patch {what}, layer by position (by span for several pairs).

    Args:
        clean: One prompt or several; `corrupted` as many, each with as many tokens as its partner.
        metric: `logit_difference(...)`, `projection(...)`, or a callable from last-token logits `[batch d_vocab]` to `[batch]`.
        layers: None takes all of them.
        positions: Token indices of a single pair, or names of spans (before, changed, after, last) of one or several.
        direction: "denoise" puts clean into corrupted; "noise" the other way round.
        batch_tokens: Most tokens in one forward pass.
        min_gap: Of several pairs those with clean - corrupted not above this (or not above 0) are excluded and counted; a pair alone
            may have either sign.

    Raises:
        KeyError, ValueError: the model lacks the hook point; no such layer or position, unequal token counts, or no pair that passes.
    """
    return patch


def _heads(hook_point: HeadPoint, what: str) -> Callable[..., Patching]:
    def patch(
        model: HookedModel,
        *,
        clean: Prompts,
        corrupted: Prompts,
        metric: Metric,
        layers: Blocks | None = None,
        direction: Direction = "denoise",
        batch_tokens: int = 4096,
        min_gap: float = 0.0,
        progress: bool = False,
    ) -> Patching:
        return _sweep(
            model, hook_point, clean=clean, corrupted=corrupted, metric=metric, layers=layers, positions=None,
            direction=direction, batch_tokens=batch_tokens, min_gap=min_gap, progress=progress,
        )  # fmt: skip

    patch.__name__ = patch.__qualname__ = f"patch_{hook_point}"
    patch.__doc__ = f"Patch {what}, layer by head, at all positions at once; arguments as for `patch_resid_pre`."
    return patch


patch_resid_pre = _stream("resid_pre", "the residual stream before each block")
patch_resid_mid = _stream("resid_mid", "the residual stream between attention and MLP")
patch_resid_post = _stream("resid_post", "the residual stream after each block")
patch_attn_out = _stream("attn_out", "what each attention layer writes")
patch_mlp_out = _stream("mlp_out", "what each MLP writes")
patch_z = _heads("z", "the output of each head before W_O")
patch_q = _heads("q", "the queries of each head")
patch_k = _heads("k", "the keys of each head (of each group, with grouped queries)")
patch_v = _heads("v", "the values of each head (of each group, with grouped queries)")


def attribution_patching(
    model: HookedModel,
    *,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    hook_point: HookPoint = "resid_pre",
    layers: Blocks | None = None,
    direction: Direction = "denoise",
    min_gap: float = 0.0,
) -> Patching:
    """First-order patching of all cells from two forward passes and one backward: (source - base) . d metric / d base.

    Reference:
        Nanda 2023, *Attribution patching*; compare with exact patching by `agreement`.
    """
    pairs, dropped, wanted, read = _prepare(
        model, hook_point, clean, corrupted, metric, layers, None, direction, False
    )
    names = [hook_name(hook_point, layer) for layer in wanted]
    values = []
    with torch.no_grad():
        pairs, ends, excluded = _passing(pairs, read, min_gap)
    for pair, (c, k) in zip(pairs, ends, strict=True):
        with torch.no_grad():
            base, source = (
                (pair.corrupted, pair.clean)
                if direction == "denoise"
                else (pair.clean, pair.corrupted)
            )
            sources = cache_of(model, source, names)
        kept: dict[str, Tensor] = {}

        def keep(act: Tensor, hook: Any, name: str, kept: dict[str, Tensor] = kept) -> Tensor:
            # frozen weights leave the first activation outside any graph: begin one there
            kept[name] = act if act.requires_grad else act.detach().requires_grad_()
            return kept[name]

        reached = [row for row, layer in enumerate(wanted) if read.reaches(hook_point, layer)]
        table = np.full((len(wanted), len(pair.columns)), np.nan)
        if reached:
            hooks = [
                (names[r], lambda act, hook, name=names[r]: keep(act, hook, name)) for r in reached
            ]
            with torch.enable_grad():
                value = read(base, None, hooks)
                grads = torch.autograd.grad(value.sum(), [kept[names[r]] for r in reached])
            for row, grad in zip(reached, grads, strict=True):
                change = sources[names[row]] - kept[names[row]].detach()
                effect = einsum(change, grad, "one pos d_model, one pos d_model -> pos")
                effect = checked(model, effect).float().cpu().numpy()
                for column, where in enumerate(pair.columns.values()):
                    if where:
                        table[row, column] = (k if direction == "denoise" else c) + effect[
                            where
                        ].sum()
        values.append(table)
    labels = tuple(pairs[0].columns)
    return _result(
        hook_point, direction, wanted, labels, values, ends, dropped, excluded, True, read
    )

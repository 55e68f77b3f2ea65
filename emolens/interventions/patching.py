"""Where is an emotion computed: activation patching and its gradient approximation.

Patching runs one prompt (the base) with one activation of another (the source) put in its place and reads a metric:
``recovery = mean(patched - base) / mean(target - base)``, 0 where nothing changes and 1 where the cell carries all of it: the mean is over
pairs with clean - corrupted above `min_gap` (`passing`), since pairs that differ the other way round would cancel.
Denoising puts clean into corrupted (target: clean, what suffices); noising puts corrupted into clean (what is necessary).
Not done here: who writes a direction (`attribution`), path patching, MLP neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from emolens._typing import (
    AnyPoint,
    Blocks,
    HeadPoint,
    HookedModel,
    HookPoint,
    Text,
    at_hook_point,
    hook_name,
)
from emolens.collect.progress import progress_bar
from emolens.interventions.hooks import replacing
from emolens.interventions.metrics import (
    NONE_PASSES,
    SPANS,
    LogitDiff,
    Metric,
    Mode,
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

    def sides(self, mode: Mode) -> tuple[Tensor, Tensor]:
        """The run that is patched, and the one that its activations come from."""
        base, source = self.corrupted, self.clean
        return (base, source) if mode == "denoise" else (source, base)


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
        elif isinstance(self.metric, LogitDiff):
            object.__setattr__(self, "sides", self.metric.ids(self.model.tokenizer, self.prompts))
        elif not callable(self.metric):
            raise TypeError(
                f"metric is a callable, logit_diff(...) or projection(...), not {self.metric!r}"
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
        if isinstance(metric, LogitDiff):
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
    model: HookedModel, hook_point: AnyPoint, layers: Blocks | None
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
            columns = {s: columns[s] for s in map(str, SPANS if positions is None else positions)}
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

    hooks = [(name, partial(keep, name=name)) for name in names]
    end: dict[str, Any] = {"logits_to_keep": 1}
    if can_start_at_layer(model):
        end = {"stop_at_layer": model.cfg.n_layers}
    mask = torch.ones_like(tokens)
    model.run_with_hooks(tokens, attention_mask=mask, return_type="logits", fwd_hooks=hooks, **end)
    return kept


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a sweep does to each pair."""

    model: HookedModel
    hook_point: AnyPoint
    layers: list[int]
    mode: Mode
    read: _Reader

    @property
    def by_head(self) -> bool:
        return self.hook_point in get_args(HeadPoint)

    @property
    def names(self) -> list[str]:
        return [hook_name(self.hook_point, layer) for layer in self.layers]

    @property
    def reached(self) -> list[int]:
        """Rows of the layers that the metric lies behind."""
        return [row for row, k in enumerate(self.layers) if self.read.reaches(self.hook_point, k)]


_Cells = Callable[[_Plan, _Pair, float], tuple[tuple[str, ...], Float[Tensor, "layer column"]]]


def _sweep(
    cells: _Cells, model: HookedModel, hook_point: AnyPoint, *, clean: Prompts, corrupted: Prompts, metric: Metric,
    layers: Blocks | None = None, positions: Sequence[int | str] | None = None, mode: Mode = "denoise", min_gap: float = 0.0,
    progress: bool | None = None, approximate: bool = False,
) -> Patching:  # fmt: skip
    """The table of every pair that passes, whichever way its cells are found; what can be refused is, before the first pass."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode is 'denoise' or 'noise', not {mode!r}")
    wanted = list(_check_point(model, hook_point, layers))
    encoded = _encoded(model, clean, corrupted)
    read = _Reader(model, metric, tuple(e.text for side in encoded for e in side))
    plan = _Plan(model, hook_point, wanted, mode, read)
    pairs, dropped = _pairs(model, *encoded, positions, plan.by_head)
    labels, values = (), []
    with torch.no_grad():
        each = [(float(read(pair.clean)), float(read(pair.corrupted))) for pair in pairs]
        ends = torch.tensor(each, dtype=torch.float64)
        kept = passing(ends[:, 0], ends[:, 1], min_gap)
        if not kept.any():
            raise ValueError(NONE_PASSES.format(len(pairs), min_gap))
        for i in progress_bar(kept.nonzero()[:, 0].tolist(), "pair", progress):
            labels, table = cells(plan, pairs[i], float(ends[i, 1 if mode == "denoise" else 0]))
            values.append(table)
    trivial = tuple(layer for layer in wanted if read.ahead(hook_point, layer) == 0)
    return Patching(
        hook_point, mode, tuple(wanted), labels, torch.stack(values), ends[kept, 0], ends[kept, 1], dropped,
        int((~kept).sum()), trivial, approximate,
    )  # fmt: skip


@torch.inference_mode()
def _exact(
    plan: _Plan, pair: _Pair, value: float, *, batch_tokens: int, skip: bool = True
) -> tuple[tuple[str, ...], Float[Tensor, "layer column"]]:
    """One cell a row: the base prompt repeated, started before the patched layer where the backend really skips."""
    model, (base, source) = plan.model, pair.sides(plan.mode)
    skip = skip and can_start_at_layer(model)
    starts = [hook_name("resid_pre", layer) for layer in plan.layers] if skip else []
    sources = cache_of(model, source, plan.names)
    before = cache_of(model, base, starts) if skip else {}
    if plan.by_head:
        n_heads = sources[plan.names[0]].shape[2]
        labels = tuple(f"H{head}" for head in range(n_heads))
        here = rearrange(torch.eye(n_heads, dtype=torch.bool), "cell head -> cell 1 head")
    else:
        labels = tuple(pair.columns)
        here = torch.zeros(len(labels), base.shape[1], dtype=torch.bool)
        for cell, where in enumerate(pair.columns.values()):
            here[cell, where] = True
    table = torch.full((len(plan.layers), len(labels)), math.nan, dtype=torch.float64)
    present = here.flatten(1).any(1).nonzero()[:, 0]
    for row in plan.reached:
        layer, name = plan.layers[row], plan.names[row]
        x = before[starts[row]] if skip else base
        for some in present.split(max(1, batch_tokens // base.shape[1])):
            rows = repeat(x, "1 ... -> batch ...", batch=len(some))
            hook = replacing(plan.hook_point, layer, sources[name], here[some])
            table[row, some] = plan.read(rows, layer if skip else None, [hook]).double().cpu()
    return labels, table


def _by_gradient(
    plan: _Plan, pair: _Pair, value: float
) -> tuple[tuple[str, ...], Float[Tensor, "layer column"]]:
    """All cells at once: the metric of the base, and its change along the difference of the activations."""
    base, source = pair.sides(plan.mode)
    sources = cache_of(plan.model, source, plan.names)
    kept: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: Any, name: str) -> Tensor:
        # frozen weights leave the first activation outside any graph: begin one there
        kept[name] = act if act.requires_grad else act.detach().requires_grad_()
        return kept[name]

    reached = [plan.names[row] for row in plan.reached]
    table = torch.full((len(plan.layers), len(pair.columns)), math.nan, dtype=torch.float64)
    if not reached:
        return tuple(pair.columns), table
    with torch.enable_grad():
        there = plan.read(base, None, [(name, partial(keep, name=name)) for name in reached])
        grads = torch.autograd.grad(there.sum(), [kept[name] for name in reached])
    for row, name, grad in zip(plan.reached, reached, grads, strict=True):
        change = sources[name] - kept[name].detach()
        effect = einsum(change, grad, "one pos d_model, one pos d_model -> pos")
        effect = checked(plan.model, effect).cpu()
        for column, where in enumerate(pair.columns.values()):
            if where:
                table[row, column] = value + float(effect[where].sum())
    return tuple(pair.columns), table


def _patch(
    hook_point: AnyPoint,
    model: HookedModel,
    *,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    layers: Blocks | None = None,
    positions: Sequence[int | str] | None = None,
    mode: Mode = "denoise",
    batch_tokens: int = 4096,
    min_gap: float = 0.0,
    progress: bool | None = None,
) -> Patching:
    """Patch layer by position (by span for several pairs; z, q, k and v by head, at all positions at once).

    Args:
        model: From `em.load_model`, or your own.
        clean: One prompt or several.
        corrupted: As many, each with as many tokens as its partner.
        metric: `em.logit_diff(...)`, `em.projection(...)`, or a callable from last-token logits `[batch d_vocab]` to `[batch]`.
        layers: Blocks to patch; None takes all of them.
        positions: Token indices of a single pair, or names of spans (before, changed, after, last) of one or several; not for heads.
        mode: "denoise" puts clean into corrupted (what suffices); "noise" corrupted into clean (what is necessary).
        batch_tokens: Most tokens in one forward pass.
        min_gap: Of several pairs those with clean - corrupted not above this (or not above 0) are excluded and counted, in the
            metric's units; a pair alone may have either sign.
        progress: Whether to show a bar over pairs; None shows one where it lasts and somebody can see it.

    Returns:
        `Patching`, with `values` `[pair layer column]` in the metric's units and `recovery` `[layer column]`, 0 to 1 mostly.

    Raises:
        KeyError: the model lacks the hook point.
        ValueError: no such layer or position, unequal token counts, positions of heads, or no pair that passes.

    Example:
        >>> found = em.patch_resid_pre(
        ...     model, clean="He lost 3 cats.", corrupted="He lost 7 cats.", metric=em.logit_diff("a", "b"), layers=[0, 1]
        ... )
        >>> found.values.shape == (1, 2, len(found.labels)), found.top(1).columns
        (True, ('layer', 'column', 'recovery'))
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, given {batch_tokens}")
    if positions is not None and hook_point in get_args(HeadPoint):
        raise ValueError(
            f"patch_{hook_point} takes all positions at once; positions= is of the stream"
        )
    return _sweep(
        partial(_exact, batch_tokens=batch_tokens), model, hook_point, clean=clean, corrupted=corrupted, metric=metric, layers=layers,
        positions=positions, mode=mode, min_gap=min_gap, progress=progress,
    )  # fmt: skip


patch_resid_pre = at_hook_point(_patch, "resid_pre")
patch_resid_mid = at_hook_point(_patch, "resid_mid")
patch_resid_post = at_hook_point(_patch, "resid_post")
patch_attn_out = at_hook_point(_patch, "attn_out")
patch_mlp_out = at_hook_point(_patch, "mlp_out")
patch_z = at_hook_point(_patch, "z")
patch_q = at_hook_point(_patch, "q")
patch_k = at_hook_point(_patch, "k")
patch_v = at_hook_point(_patch, "v")


def attribution_patching(
    model: HookedModel,
    *,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    hook_point: HookPoint = "resid_pre",
    layers: Blocks | None = None,
    mode: Mode = "denoise",
    min_gap: float = 0.0,
) -> Patching:
    """First-order patching of all cells from two forward passes and one backward: (source - base) . d metric / d base.

    Args:
        model, clean, corrupted, metric, layers, mode, min_gap: As for `em.patch_resid_pre`.
        hook_point: What is patched, by TransformerLens's name without "hook_".

    Returns:
        `Patching`, marked `approximate`; `em.agreement` compares it with the exact one.

    Raises:
        KeyError: the model lacks the hook point.
        ValueError: no such layer, unequal token counts, or no pair that passes.

    Example:
        >>> em.attribution_patching(
        ...     model, clean="He lost 3 cats.", corrupted="He lost 7 cats.", metric=em.logit_diff("a", "b"), layers=[1, 2]
        ... ).approximate
        True

    Reference:
        Nanda 2023, *Attribution patching*.
    """
    return _sweep(
        _by_gradient, model, hook_point, clean=clean, corrupted=corrupted, metric=metric, layers=layers, mode=mode,
        min_gap=min_gap, approximate=True,
    )  # fmt: skip

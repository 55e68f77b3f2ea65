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
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from html import escape
from typing import Any, Literal, SupportsIndex, cast, get_args

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import stats as sp
from torch import Tensor
from tqdm import tqdm

from emolens import stats
from emolens._typing import Blocks, HeadPoint, HookedModel, HookPoint, Text, block_numbers, hook_name, typed
from emolens.corpus import several
from emolens.directions import EmotionDirections
from emolens.models import EncodedText, can_start_at_layer, checked, encode, unembed
from emolens.readout import check_model
from emolens.tokens import following

Direction = Literal["denoise", "noise"]
Prompts = Text | Sequence[Text]
SPANS = ("before", "changed", "after", "last")


# --- metrics ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitDifference:
    """Mean logit of the first tokens of `first` minus that of `second`, at the last real token, each as it follows the prompt."""

    first: tuple[str, ...]
    second: tuple[str, ...]

    def ids(self, tokenizer: Any, prompts: Sequence[str | None] = (None,)) -> tuple[list[int], list[int]]:
        """Token ids of both sides; ValueError where they share one, or where a word has other tokens after another prompt."""

        def first(word: str) -> int:
            found = {following(tokenizer, word, p)[0] for p in prompts}
            if len(found) > 1:
                raise ValueError(
                    f"{word!r} begins with another token after one prompt than after another; let all of them end alike (with or "
                    "without a space)"
                )
            return found.pop()

        a, b = ([first(w) for w in side] for side in (self.first, self.second))
        if set(a) & set(b):
            raise ValueError(
                f"{self.first} and {self.second} begin with the same token for this tokenizer; choose other words"
            )
        return a, b


@dataclass(frozen=True, eq=False)
class Projection:
    """(x - mu).v / |v| at the last real token of one hook point; the cell that it reads is trivial, cells behind it are NaN."""

    emotion: str
    hook_point: HookPoint
    layer: int
    unit: Float[Tensor, " d_model"] = field(repr=False)
    reference: Float[Tensor, " d_model"] = field(repr=False)
    model: dict[str, Any] = field(repr=False)

    @property
    def hook_name(self) -> str:
        return hook_name(self.hook_point, self.layer)


Metric = LogitDifference | Projection | Callable[[Tensor], Tensor]


def logit_difference(first: str | Sequence[str], second: str | Sequence[str]) -> LogitDifference:
    """A metric of the next word, in logits; give words as they continue the prompt, mostly with a leading space.

    >>> logit_difference(" happy", [" sad", " blue"])
    LogitDifference(first=(' happy',), second=(' sad', ' blue'))

    Raises:
        ValueError: a side without a word.
    """
    a, b = ((x,) if isinstance(x, str) else tuple(x) for x in (first, second))
    if not (a and b and all(a) and all(b)):
        raise ValueError("logit_difference needs at least one word on each side, none of them empty")
    return LogitDifference(a, b)


def projection(v: EmotionDirections, *, layer: SupportsIndex | None = None) -> Projection:
    """A metric inside the model: how far the stream lies along one emotion, in the stream's own units.

    Raises:
        ValueError: several emotions, or no directions at this layer.
    """
    check_single(v)
    at = v.slot(layer)
    return Projection(
        v.emotions[0], v.hook_point, v.layers[at], v.unit(v.layers[at])[0], v.reference[at], v.info["model"]
    )


def check_single(v: EmotionDirections) -> None:
    if len(v.emotions) != 1:
        raise ValueError(f"one emotion is needed, these are {len(v.emotions)}: take one, as v[{v.emotions[0]!r}]")


def passing(
    clean: Float[np.ndarray, " pair"], corrupted: Float[np.ndarray, " pair"], min_gap: float = 0.0
) -> NDArray[np.bool_]:
    """Which pairs a recovery is averaged over: those with clean - corrupted above `min_gap` (and above 0).

    A pair alone has nothing to cancel with: there the size of its difference decides, whatever its sign, unless it is 0.

    >>> passing(np.array([2.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0])).tolist()
    [True, False, False]
    """
    gap = np.asarray(clean) - np.asarray(corrupted)
    gap = np.abs(gap) if len(gap) == 1 else gap
    return (gap > 0) & (gap >= min_gap)


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Patching:
    """What each patch did.

    Attributes:
        values: `[pair layer column]`, the metric with the cell patched; NaN where the cell does not exist or cannot matter.
        clean: `[pair]`, the metric of the clean runs.
        corrupted: `[pair]`, of the corrupted runs.
        labels: Names of the columns: tokens, spans of several pairs, or heads.
        dropped: Pairs left out because their token counts differ.
        excluded: Pairs left out because clean - corrupted is not above `min_gap` (`passing`).
        trivial: Layers where the patched activation is the one that the metric reads: NaN, and shown as "=".
            Those behind it cannot matter: NaN, and shown as ".".
        approximate: Made by gradients.
    """

    hook_point: str
    direction: Direction
    layers: tuple[int, ...]
    labels: tuple[str, ...]
    values: Float[np.ndarray, "pair layer column"]
    clean: Float[np.ndarray, " pair"]
    corrupted: Float[np.ndarray, " pair"]
    dropped: int = 0
    excluded: int = 0
    trivial: tuple[int, ...] = ()
    approximate: bool = False

    def _ratio(self, rows: np.ndarray) -> Float[np.ndarray, "layer column"]:
        base, target = (self.corrupted, self.clean) if self.direction == "denoise" else (self.clean, self.corrupted)
        change = self.values[rows] - base[rows, None, None]
        gap = np.where(np.isnan(change), 0, (target - base)[rows, None, None]).sum(0)
        # the same pairs above and below: a pair without a span must not weigh in its gap
        counted = (~np.isnan(change)).any(0) & (gap != 0)
        return np.where(counted, np.nansum(change, 0) / np.where(gap == 0, 1, gap), np.nan)

    @cached_property
    def recovery(self) -> Float[np.ndarray, "layer column"]:
        """Ratio of means over pairs: 0 is the base run, 1 the target run; NaN where the two do not differ."""
        return self._ratio(np.arange(len(self.clean)))

    @property
    def pairs(self) -> Int[np.ndarray, "layer column"]:
        """How many pairs each cell is the mean of: a pair without a span does not count there."""
        return (~np.isnan(self.values)).sum(0)

    @cached_property
    def interval(self) -> Float[np.ndarray, "bound layer column"] | None:
        """Lower and upper 95 % bound of the recovery, resampling pairs; None for a single pair."""
        if len(self.clean) < 2:
            return None
        out = np.full((2, *self.recovery.shape), np.nan)
        pairs = list(range(len(self.clean)))
        for cell in zip(*np.nonzero(~np.isnan(self.recovery)), strict=True):
            row, column = int(cell[0]), int(cell[1])
            one = Patching(
                self.hook_point, self.direction, (0,), ("",), self.values[:, row : row + 1, column : column + 1],
                self.clean, self.corrupted,
            )  # fmt: skip
            e = stats.bootstrap(lambda rows, one=one: float(one._ratio(rows)[0, 0]), pairs, n=300)
            out[:, row, column] = e.low, e.high
        return out

    def joined(self, others: Sequence[Patching]) -> Patching:
        """The pairs of several sweeps together, say of contrasts that are read by other words.

        Raises:
            ValueError: sweeps of other layers, columns, hook points or directions; no pair that passes.
        """
        same = lambda p: (p.hook_point, p.direction, p.layers, p.labels, p.trivial, p.approximate)  # noqa: E731  (used twice)
        if any(same(p) != same(self) for p in others):
            raise ValueError("only sweeps of the same hook point, direction, layers and columns can be joined")
        every = [self, *others]
        clean, corrupted = (np.concatenate([getattr(p, side) for p in every]) for side in ("clean", "corrupted"))
        kept = passing(clean, corrupted)  # a pair that was alone before may have either sign
        if not kept.any():
            raise ValueError(NONE_PASSES.format(len(kept), 0.0))
        return replace(
            self,
            values=np.concatenate([p.values for p in every])[kept],
            clean=clean[kept],
            corrupted=corrupted[kept],
            dropped=sum(p.dropped for p in every),
            excluded=sum(p.excluded for p in every) + int((~kept).sum()),
        )

    def top(self, k: int = 5) -> list[tuple[int, str, float]]:
        """The k cells of largest |recovery|: layer, column label, recovery."""
        r = np.nan_to_num(np.abs(self.recovery), nan=-1.0)
        cells = [np.unravel_index(i, r.shape) for i in np.argsort(-r, axis=None)[:k]]
        return [(self.layers[i], self.labels[j], float(self.recovery[i, j])) for i, j in cells if r[i, j] >= 0]

    def _title(self) -> str:
        kind = "attribution patching (approximate)" if self.approximate else "patching"
        left_out = f", {self.dropped} dropped, {self.excluded} excluded" if self.dropped or self.excluded else ""
        return f"{kind} of {self.hook_point}, {self.direction}: recovery, {len(self.clean)} pair(s){left_out}"

    def __repr__(self) -> str:
        head = [repr(name)[1:-1][:7] for name in self.labels]
        lines = [self._title(), "layer " + " ".join(f"{name:>7}" for name in head)]
        for layer, row in zip(self.layers, self.recovery, strict=True):
            nothing = "=" if layer in self.trivial else "."
            lines.append(f"{layer:>5} " + " ".join(f"{nothing:>7}" if np.isnan(x) else f"{x:z7.2f}" for x in row))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        layers = [f"L{x}" for x in self.layers]
        same = np.array([[layer in self.trivial] * len(self.labels) for layer in self.layers])
        if len(self.labels) > len(layers):  # the longer side goes down the page
            return heat_map(self._title(), self.labels, layers, self.recovery.T, 1.0, same.T)
        return heat_map(self._title(), layers, self.labels, self.recovery, 1.0, same)


@dataclass(frozen=True)
class Agreement:
    """Correlation of approximate with exact recovery over the cells that both have."""

    pearson: float
    spearman: float
    cells: int

    def __repr__(self) -> str:
        return f"Agreement(Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}, {self.cells} cells)"


def agreement(exact: Patching, approximate: Patching) -> Agreement:
    """How well the gradient approximation orders the cells.

    Raises:
        ValueError: tables of other layers or columns, or fewer than three common cells.
    """
    if (exact.layers, exact.labels, exact.hook_point) != (
        approximate.layers, approximate.labels, approximate.hook_point,
    ):  # fmt: skip
        raise ValueError("exact and approximate need the same hook point, layers and columns")
    a, b = exact.recovery.ravel(), approximate.recovery.ravel()
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 3:
        raise ValueError(f"agreement needs at least 3 common cells, there are {both.sum()}")
    return Agreement(
        stats.pearson(a[both], b[both]), float(cast(Any, sp.spearmanr(a[both], b[both])).statistic), int(both.sum())
    )


NONE_PASSES = (
    "of {} pairs none has clean - corrupted above {:g}: the metric is not higher on clean. Swap its sides, or the prompts; "
    "or lower min_gap"
)
_EMPTY = '<td style="background:#ddd" title="cannot matter, or not there"></td>'
_TRIVIAL = '<td style="background:repeating-linear-gradient(45deg,#fff,#fff 3px,#ddd 3px,#ddd 6px)" title="what the metric itself reads">=</td>'


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray, limit: float, same: np.ndarray | None = None
) -> str:  # fmt: skip
    """A coloured table; empty cells are grey, or striped where they are the `same` as what is read."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = ""
    same = np.zeros(values.shape, bool) if same is None else same
    for name, row, trivial in zip(rows, values, same, strict=True):
        cells = ""
        for x, known in zip(row, trivial, strict=True):
            if np.isnan(x):
                cells += _TRIVIAL if known else _EMPTY
                continue
            colour = "214,96,77" if x > 0 else "67,147,195"
            cells += f'<td style="background:rgba({colour},{min(abs(x) / limit, 1):.2f})">{x:z.2f}</td>'
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    style = "font:12px system-ui,sans-serif;color:#1d2433;background:#fff"
    return f'<table style="{style}"><caption>{escape(title)}</caption><tr><th></th>{head}</tr>{body}</table>'


# --- the engine -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pair:
    """Clean and corrupted token ids `[1 pos]` of one pair, and the columns: for each label its positions."""

    clean: Tensor
    corrupted: Tensor
    columns: dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A metric bound to a model."""

    model: Any
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
            raise TypeError(f"metric is a callable, logit_difference(...) or projection(...), not {self.metric!r}")

    def ahead(self, hook_point: str, layer: int) -> int:
        """How far the metric is ahead of a hook point: 0 where it reads that very activation, below where it was read before."""
        if not isinstance(self.metric, Projection):
            return 1
        return _depth(self.metric.hook_point, self.metric.layer) - _depth(hook_point, layer)

    def reaches(self, hook_point: str, layer: int) -> bool:
        return self.ahead(hook_point, layer) > 0

    def __call__(
        self, x: Tensor, layer: int | None = None, hooks: Sequence[tuple[str, Callable[..., Any]]] = ()
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
        logits = unembed(model, out[:, -1:], again)[:, -1] if hooked else checked(model, out[:, -1], again)
        if isinstance(metric, LogitDifference):
            a, b = self.sides
            return logits[:, a].mean(-1) - logits[:, b].mean(-1)
        values = metric(logits)
        if values.shape != logits.shape[:1]:
            raise ValueError(f"metric returned shape {list(values.shape)}, one value a row is [{len(logits)}]")
        if not torch.isfinite(values).all():
            raise FloatingPointError("the metric is NaN or infinite where the logits are not; mend the function")
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
    return (len(ORDER) - 1) * layer + next(k for k, points in enumerate(ORDER) if hook_point in points)


def _check_point(model: Any, hook_point: str, layers: Sequence[int]) -> None:
    n = model.cfg.n_layers
    for layer in layers:
        if not 0 <= layer < n:
            raise ValueError(f"layer {layer} does not exist; {n} layers are 0..{n - 1}")
        name = hook_name(cast(Any, hook_point), layer)
        # a bridge lists hook_resid_mid of parallel blocks too, where it never fires
        parallel = hook_point == "resid_mid" and getattr(model.cfg, "parallel_attn_mlp", False)
        if name not in model.hook_dict or parallel:
            why = " (attention and MLP run in parallel here)" if parallel else ""
            raise KeyError(f"this model has no hook point {name}{why}; use resid_pre or resid_post")
        if hook_point == "resid_mid" and not can_start_at_layer(model):  # past where the skip branches off
            raise KeyError(
                f"on a TransformerBridge {name} is only what the MLP reads; patch attn_out, or load with backend='hooked'"
            )


def _encoded(model: Any, clean: Prompts, corrupted: Prompts) -> tuple[list[EncodedText], list[EncodedText]]:
    a, b = several(clean), several(corrupted)
    if len(a) != len(b) or not a:
        raise ValueError(f"clean and corrupted need the same number of prompts, given {len(a)} and {len(b)}")
    return encode(model, a), encode(model, b)


def _pairs(
    model: Any, a: list[EncodedText], b: list[EncodedText], positions: Sequence[int | str] | None, by_head: bool
) -> tuple[list[_Pair], int]:
    device = next(model.parameters()).device
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
                    raise ValueError(f"position {p!r} does not exist; this pair has {n} tokens, 0..{n - 1}")
                columns[f"{p % n}:{pieces[p]}"] = [p % n]
        else:
            columns = _spans(x.ids, y.ids)
            unknown = [p for p in positions or () if p not in SPANS]
            if unknown:
                raise ValueError(
                    f"positions of several pairs, and those given by name, are the spans {SPANS}, not {unknown[0]!r}"
                )
            columns = {s: columns[s] for s in (SPANS if positions is None else cast(Any, positions))}
        ids = [torch.tensor([e.ids], device=device) for e in (x, y)]
        out.append(_Pair(ids[0], ids[1], columns))
    if not out:
        raise ValueError(f"all {dropped} pairs differ in their token count for this tokenizer; none is left")
    return out, dropped


def _spans(clean: list[int], corrupted: list[int]) -> dict[str, list[int]]:
    last = len(clean) - 1
    differ = [i for i in range(last) if clean[i] != corrupted[i]] or [last]
    first, end = differ[0], min(differ[-1] + 1, last)
    ranges = (range(first), range(first, end), range(end, last), range(last, last + 1))
    return {name: list(r) for name, r in zip(SPANS, ranges, strict=True)}


def cache_of(model: Any, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: Any, name: str) -> None:
        kept[name] = act.detach()

    hooks = [(name, lambda act, hook, name=name: keep(act, hook, name)) for name in names]
    options = {"stop_at_layer": model.cfg.n_layers} if can_start_at_layer(model) else {"logits_to_keep": 1}
    model.run_with_hooks(
        tokens, attention_mask=torch.ones_like(tokens), return_type="logits", fwd_hooks=hooks, **options
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
    model: Any,
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
            base, source = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
            sources, before = cache_of(model, source, names), cache_of(model, base, starts) if skip else {}
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
                    table[row, some] = read(x, layer if skip else None, [hook]).float().cpu().numpy()
            values.append(table)
    return _result(hook_point, direction, wanted, labels, values, ends, dropped, excluded, False, read)


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
    model: Any, hook_point: str, clean: Prompts, corrupted: Prompts, metric: Metric, layers: Blocks | None,
    positions: Sequence[int | str] | None, direction: str, by_head: bool,
) -> tuple[list[_Pair], int, list[int], _Reader]:  # fmt: skip
    """Everything that can be refused before the first forward pass."""
    if direction not in get_args(Direction):
        raise ValueError(f"direction is 'denoise' or 'noise', not {direction!r}")
    wanted = list(range(model.cfg.n_layers)) if layers is None else list(block_numbers(layers))
    if not wanted:
        raise ValueError("layers is empty; None takes all of them")
    _check_point(model, hook_point, wanted)
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
        hook_point, direction, tuple(layers), labels, np.stack(values), c, k, dropped, excluded, trivial, approximate
    )


# --- the sweeps -------------------------------------------------------------------------------------------------------


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
    pairs, dropped, wanted, read = _prepare(model, hook_point, clean, corrupted, metric, layers, None, direction, False)
    names = [hook_name(hook_point, layer) for layer in wanted]
    values = []
    with torch.no_grad():
        pairs, ends, excluded = _passing(pairs, read, min_gap)
    for pair, (c, k) in zip(pairs, ends, strict=True):
        with torch.no_grad():
            base, source = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
            sources = cache_of(model, source, names)
        kept: dict[str, Tensor] = {}

        def keep(act: Tensor, hook: Any, name: str, kept: dict[str, Tensor] = kept) -> Tensor:
            # frozen weights leave the first activation outside any graph: begin one there
            kept[name] = act if act.requires_grad else act.detach().requires_grad_()
            return kept[name]

        reached = [row for row, layer in enumerate(wanted) if read.reaches(hook_point, layer)]
        table = np.full((len(wanted), len(pair.columns)), np.nan)
        if reached:
            hooks = [(names[r], lambda act, hook, name=names[r]: keep(act, hook, name)) for r in reached]
            with torch.enable_grad():
                value = read(base, None, hooks)
                grads = torch.autograd.grad(value.sum(), [kept[names[r]] for r in reached])
            for row, grad in zip(reached, grads, strict=True):
                change = sources[names[row]] - kept[names[row]].detach()
                effect = einsum(change, grad, "one pos d_model, one pos d_model -> pos")
                effect = checked(model, effect).float().cpu().numpy()
                for column, where in enumerate(pair.columns.values()):
                    if where:
                        table[row, column] = (k if direction == "denoise" else c) + effect[where].sum()
        values.append(table)
    labels = tuple(pairs[0].columns)
    return _result(hook_point, direction, wanted, labels, values, ends, dropped, excluded, True, read)


# --- attribution ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Attribution:
    """Who writes a direction: x.v / |v| at resid_post of `layer` as a sum over everything that was added to x.

    Attributes:
        labels: "embed", "L3H5", "L3 mlp", "L3 bias" (the biases of both outputs).
        values: `[entry]`, mean over ordinary tokens; `[token entry]` for single tokens, in the stream's units.
        total: `[]` or `[token]`, the projection itself.
        error: Largest |sum of entries - projection| / |x| over tokens.
        tokens: Strings of the tokens, for single tokens.
    """

    emotion: str
    layer: int
    labels: tuple[str, ...]
    values: Float[np.ndarray, "*token entry"]
    total: Float[np.ndarray, "*token"]
    error: float
    n_heads: int
    tokens: tuple[str, ...] = ()

    @property
    def mean(self) -> Float[np.ndarray, " entry"]:
        """Mean over the tokens."""
        return self.values if self.values.ndim == 1 else self.values.mean(0)

    @property
    def heads(self) -> Float[np.ndarray, "layer head"]:
        """What each head writes, mean over tokens."""
        of_heads = [x for x, name in zip(self.mean, self.labels, strict=True) if "H" in name]
        return rearrange(np.array(of_heads), "(layer head) -> layer head", head=self.n_heads)

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k entries of largest absolute value, mean over tokens."""
        return [(self.labels[i], float(self.mean[i])) for i in np.argsort(-np.abs(self.mean))[:k]]

    def __repr__(self) -> str:
        total = float(np.mean(self.total))
        lines = [f"{self.emotion} at resid_post {self.layer}: x.v = {total:.3f}, error {self.error:.1e} of |x|"]
        return "\n".join(lines + [f"  {name:<9}{x:9.3f}" for name, x in self.top(10)])

    def _repr_html_(self) -> str:
        """All entries: a row for each block with its heads, MLP and biases, and the embedding in the first."""
        title = (
            f"{self.emotion} at resid_post {self.layer}: what each part writes (x.v = {float(np.mean(self.total)):.3f})"
        )
        entry = dict(zip(self.labels, self.mean.tolist(), strict=True))
        rows = [f"L{i}" for i in range(self.layer + 1)]
        columns = [f"H{h}" for h in range(self.n_heads)]
        values = np.array(
            [[*(entry[f"{r}{c}"] for c in columns), entry[f"{r} mlp"], entry[f"{r} bias"], entry["embed"] if r == "L0" else np.nan] for r in rows]
        )  # fmt: skip
        return heat_map(title, rows, [*columns, "mlp", "bias", "embed"], values, float(np.nanmax(np.abs(values))) or 1.0)


def _or(bias: Tensor | None, zero: Tensor) -> Tensor:
    return zero if bias is None else bias


@typed
def attribute(
    model: HookedModel,
    v: EmotionDirections,
    prompts: Prompts,
    *,
    layer: SupportsIndex | None = None,
    per: Literal["component", "token"] = "component",
    allow_other_model: bool = False,
) -> Attribution:
    """Split the projection on one emotion into what the embedding, each head and each MLP wrote.

    ``x.v = embed.v + sum_l (sum_h z_lh W_O_lh . v + mlp_l . v + bias_l . v)``, with v of norm one and the first token left out.

    Raises:
        ValueError: several emotions, directions of another hook point or model, a prompt of one token, or an architecture that
            normalises outputs after W_O, where the heads' sum is not what is written.
    """
    check_single(v)
    check_model(model, v.info["model"], allow_other_model=allow_other_model)
    if v.hook_point != "resid_post":
        raise ValueError(f"attribute needs directions at resid_post, these are at {v.hook_point}")
    any_model: Any = model
    if getattr(any_model.cfg, "use_normalization_before_and_after", False):
        raise ValueError("this architecture normalises after W_O; its heads do not add up to what attention writes")
    layer = v.layers[v.slot(layer)]
    texts = encode(model, several(prompts))
    short = next((i for i, e in enumerate(texts) if len(e.ids) < 2), None)
    if short is not None or not texts:
        raise ValueError(f"prompt {short} has no token after the first" if texts else "no prompt given")
    n = layer + 1
    names = [hook_name("z", i) for i in range(n)] + [hook_name("mlp_out", i) for i in range(n)]
    names += [hook_name("resid_pre", 0), hook_name("resid_post", layer)]
    device = next(any_model.parameters()).device
    unit = v.unit(layer)[0].to(device)
    w = [any_model.W_O[i].float() @ unit.float() for i in range(n)]  # [head d_head]
    zero = torch.zeros_like(unit)  # a bridge has None where the checkpoint has no bias
    blocks = [any_model.blocks[i] for i in range(n)]
    bias_attn = [_or(getattr(b.attn, "b_O", None), zero).float() @ unit.float() for b in blocks]
    bias_mlp = [_or(getattr(b.mlp, "b_out", None), zero).float() @ unit.float() for b in blocks]
    n_heads = w[0].shape[0]
    labels = ["embed"]
    for i in range(n):
        labels += [f"L{i}H{h}" for h in range(n_heads)] + [f"L{i} mlp", f"L{i} bias"]
    rows, totals, norms, tokens = [], [], [], []
    with torch.inference_mode():
        for e in texts:
            ids = torch.tensor([e.ids], device=device)
            acts = cache_of(model, ids, names)
            checked(model, acts[names[-1]], lambda more, ids=ids: model.run_with_hooks(ids, fwd_hooks=more))
            acts = {name: act[0, 1:].float() for name, act in acts.items()}
            parts = [acts[hook_name("resid_pre", 0)] @ unit.float()]
            for i in range(n):
                z = acts[hook_name("z", i)]
                if z.ndim == 2:  # a bridge may keep the heads side by side
                    z = rearrange(z, "pos (head d_head) -> pos head d_head", head=n_heads)
                parts += list(einsum(z, w[i], "pos head d_head, head d_head -> head pos"))
                parts.append(acts[hook_name("mlp_out", i)] @ unit.float() - bias_mlp[i])
                parts.append((bias_attn[i] + bias_mlp[i]).expand(len(z)))
            x = acts[hook_name("resid_post", layer)]
            rows.append(torch.stack(parts, -1))
            totals.append(x @ unit.float())
            norms.append(torch.linalg.vector_norm(x, dim=-1))
            tokens += [e.text[a:b] for a, b in e.offsets[1:]]
    values, total = torch.cat(rows), torch.cat(totals)
    error = float(((values.sum(-1) - total).abs() / torch.cat(norms)).max())
    if per == "component":
        values, total, tokens = values.mean(0), total.mean(0), []
    return Attribution(
        v.emotions[0], layer, tuple(labels), values.cpu().numpy(), total.cpu().numpy(), error, n_heads, tuple(tokens)
    )

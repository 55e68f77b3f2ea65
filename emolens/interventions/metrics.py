"""What patching reads and what it gives back: differences of logits, projections, recoveries with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any, Literal, SupportsIndex, cast

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import stats as sp
from torch import Tensor

from emolens import stats
from emolens._typing import HookPoint, hook_name
from emolens.directions.value import EmotionDirections
from emolens.models.tokens import following

Direction = Literal["denoise", "noise"]
SPANS = ("before", "changed", "after", "last")


@dataclass(frozen=True)
class LogitDifference:
    """Mean logit of the first tokens of `first` minus that of `second`, at the last real token, each as it follows the prompt."""

    first: tuple[str, ...]
    second: tuple[str, ...]

    def ids(
        self, tokenizer: Any, prompts: Sequence[str | None] = (None,)
    ) -> tuple[list[int], list[int]]:
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
        raise ValueError(
            "logit_difference needs at least one word on each side, none of them empty"
        )
    return LogitDifference(a, b)


def projection(v: EmotionDirections, *, layer: SupportsIndex | None = None) -> Projection:
    """A metric inside the model: how far the stream lies along one emotion, in the stream's own units.

    Raises:
        ValueError: several emotions, no directions at this layer, or none that know their mean activation.
    """
    check_single(v)
    at = v.slot(layer)
    return Projection(
        v.emotions[0],
        v.hook_point,
        v.layers[at],
        v.unit(v.layers[at])[0],
        v.centre(v.layers[at]),
        v.info["model"],
    )


def check_single(v: EmotionDirections) -> None:
    """Refuse directions of several emotions where one is needed."""
    if len(v.emotions) != 1:
        raise ValueError(
            f"one emotion is needed, these are {len(v.emotions)}: take one, as v[{v.emotions[0]!r}]"
        )


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
        base, target = (
            (self.corrupted, self.clean)
            if self.direction == "denoise"
            else (self.clean, self.corrupted)
        )
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
            raise ValueError(
                "only sweeps of the same hook point, direction, layers and columns can be joined"
            )
        every = [self, *others]
        clean, corrupted = (
            np.concatenate([getattr(p, side) for p in every]) for side in ("clean", "corrupted")
        )
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
        return [
            (self.layers[i], self.labels[j], float(self.recovery[i, j]))
            for i, j in cells
            if r[i, j] >= 0
        ]

    def _title(self) -> str:
        kind = "attribution patching (approximate)" if self.approximate else "patching"
        left_out = (
            f", {self.dropped} dropped, {self.excluded} excluded"
            if self.dropped or self.excluded
            else ""
        )
        return f"{kind} of {self.hook_point}, {self.direction}: recovery, {len(self.clean)} pair(s){left_out}"

    def __repr__(self) -> str:
        head = [repr(name)[1:-1][:7] for name in self.labels]
        lines = [self._title(), "layer " + " ".join(f"{name:>7}" for name in head)]
        for layer, row in zip(self.layers, self.recovery, strict=True):
            nothing = "=" if layer in self.trivial else "."
            lines.append(
                f"{layer:>5} "
                + " ".join(f"{nothing:>7}" if np.isnan(x) else f"{x:z7.2f}" for x in row)
            )
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
        stats.pearson(a[both], b[both]),
        float(cast(Any, sp.spearmanr(a[both], b[both])).statistic),
        int(both.sum()),
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
            cells += (
                f'<td style="background:rgba({colour},{min(abs(x) / limit, 1):.2f})">{x:z.2f}</td>'
            )
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    style = "font:12px system-ui,sans-serif;color:#1d2433;background:#fff"
    return f'<table style="{style}"><caption>{escape(title)}</caption><tr><th></th>{head}</tr>{body}</table>'

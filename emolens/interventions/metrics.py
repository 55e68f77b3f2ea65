"""What patching reads and what it gives back: differences of logits, projections, recoveries with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats as sp
from torch import Tensor

from emolens import stats
from emolens._table import Table
from emolens._typing import AnyPoint, hook_name, typed
from emolens.directions.value import EmotionDirections
from emolens.models.tokens import following

Mode = Literal["denoise", "noise"]
SPANS = ("before", "changed", "after", "last")


@dataclass(frozen=True)
class LogitDiff:
    """Mean logit of the first tokens of `first` minus that of `second`, at the last real token, each as it follows the prompt.

    Attributes:
        first, second: The words of each side.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]

    def ids(
        self, tokenizer: Any, prompts: Sequence[str | None] = (None,)
    ) -> tuple[list[int], list[int]]:
        """Token ids of both sides.

        Args:
            tokenizer: Of the model.
            prompts: What the words follow; None is the beginning of a text.

        Returns:
            The first tokens of the words of each side.

        Raises:
            ValueError: the sides share a token, or a word begins with another token after another prompt.

        Example:
            >>> [len(side) for side in em.logit_diff("a", ["b", "c"]).ids(model.tokenizer)]
            [1, 2]
        """

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
    """(x - mu).v / |v| at the last real token of one hook point; the cell that it reads is trivial, cells behind it are NaN.

    Attributes:
        emotion: Whose direction v is.
        hook_point, layer: Where x is read.
        unit: `[d_model]`, v / |v|.
        reference: `[d_model]`, mu.
        model: `ModelInfo` of the model that the direction was made with, as a dictionary.
    """

    emotion: str
    hook_point: AnyPoint
    layer: int
    unit: Float[Tensor, " d_model"] = field(repr=False)
    reference: Float[Tensor, " d_model"] = field(repr=False)
    model: dict[str, Any] = field(repr=False)

    @property
    def hook_name(self) -> str:
        """TransformerLens's name of the place."""
        return hook_name(self.hook_point, self.layer)


Metric = LogitDiff | Projection | Callable[[Tensor], Tensor]


def logit_diff(first: str | Sequence[str], second: str | Sequence[str]) -> LogitDiff:
    """A metric of the next word, in logits: mean over the words of `first` minus mean over those of `second`.

    Args:
        first: A word or several as they continue the prompt, mostly with a leading space.
        second: Those of the other side.

    Returns:
        `LogitDiff`, a `metric` of the patching sweeps.

    Raises:
        ValueError: a side without a word.

    Example:
        >>> em.logit_diff(" happy", [" sad", " blue"])
        LogitDiff(first=(' happy',), second=(' sad', ' blue'))
    """
    a, b = ((x,) if isinstance(x, str) else tuple(x) for x in (first, second))
    if not (a and b and all(a) and all(b)):
        raise ValueError("logit_diff needs at least one word on each side, none of them empty")
    return LogitDiff(a, b)


def projection(direction: EmotionDirections, *, layer: SupportsIndex | None = None) -> Projection:
    """A metric inside the model: how far the stream lies along one emotion, in the stream's own units.

    With v the unit direction and mu the mean of the stories it was made from:  (x - mu).v  at the last real token.

    Args:
        direction: One emotion, ``directions["joy"]``.
        layer: The block whose activation is read; None is the directions' default.

    Returns:
        `Projection`, a `metric` of the patching sweeps.

    Raises:
        ValueError: several emotions, no directions at this layer, or none that know their mean activation.

    Example:
        >>> em.projection(directions["glimmer"], layer=1).hook_name
        'blocks.1.hook_resid_post'
    """
    check_single(direction)
    slot = direction.slot(layer)
    at = direction.layers[slot]
    mu = direction.centre(at)
    return Projection(direction.emotions[0], direction.hook_point, at, direction.unit(at)[0], mu, direction.info["model"])  # fmt: skip


def check_single(direction: EmotionDirections) -> None:
    """Refuse directions of several emotions where one is needed."""
    if len(direction.emotions) != 1:
        raise ValueError(
            f"one emotion is needed, these are {len(direction.emotions)}: take one, as v[{direction.emotions[0]!r}]"
        )


@typed
def passing(
    clean: Float[Tensor, " pair"], corrupted: Float[Tensor, " pair"], min_gap: float | int = 0.0
) -> Bool[Tensor, " pair"]:
    """Which pairs a recovery is averaged over: those with clean - corrupted above `min_gap` (and above 0).

    A pair alone has nothing to cancel with: there the size of its difference decides, whatever its sign, unless it is 0.

    Args:
        clean: `[pair]`, the metric of the clean runs, in its own units.
        corrupted: `[pair]`, of the corrupted runs.
        min_gap: In the metric's units.

    Returns:
        `[pair]`, true where the pair counts.

    Example:
        >>> from emolens.interventions import passing
        >>> passing(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])).tolist()
        [True, False, False]
    """
    gap = clean - corrupted
    gap = gap.abs() if len(gap) == 1 else gap
    return (gap > 0) & (gap >= min_gap)


@typed
@dataclass(frozen=True, eq=False)
class Patching:
    """What each patch did: what `em.patch_*` and `em.attribution_patching` return.

    Attributes:
        hook_point: What was patched.
        mode: "denoise" (clean into corrupted) or "noise".
        layers: Of the rows.
        labels: Names of the columns: tokens, spans of several pairs, or heads.
        values: `[pair layer column]`, the metric with the cell patched; NaN where the cell does not exist or cannot matter.
        clean: `[pair]`, the metric of the clean runs.
        corrupted: `[pair]`, of the corrupted runs.
        dropped: Pairs left out because their token counts differ.
        excluded: Pairs left out because clean - corrupted is not above `min_gap` (`passing`).
        trivial: Layers where the patched activation is the one that the metric reads: NaN, and shown as "=".
            Those behind it cannot matter: NaN, and shown as ".".
        approximate: Made by gradients.

    Raises:
        jaxtyping.TypeCheckError: tensors whose axes do not agree.
        ValueError: other layers or labels than there are rows and columns.
    """

    hook_point: AnyPoint
    mode: Mode
    layers: tuple[int, ...]
    labels: tuple[str, ...]
    values: Float[Tensor, "pair layer column"]
    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    dropped: int = 0
    excluded: int = 0
    trivial: tuple[int, ...] = ()
    approximate: bool = False

    def __post_init__(self) -> None:
        shape = len(self.layers), len(self.labels)
        if tuple(self.values.shape[1:]) != shape:
            raise ValueError(
                f"values {list(self.values.shape)} are [pair layer column], for {shape[0]} layers and {shape[1]} labels"
            )

    @property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The metric of the base and of the target, `[pair]`."""
        base, target = self.corrupted, self.clean
        return (base, target) if self.mode == "denoise" else (target, base)

    @cached_property
    def recovery(self) -> Float[Tensor, "layer column"]:
        """Ratio of means over pairs: 0 is the base run, 1 the target run; NaN where the two do not differ."""
        return _ratio(self.values, *self._ends)

    @property
    def pairs(self) -> Int[Tensor, "layer column"]:
        """How many pairs each cell is the mean of: a pair without a span does not count there."""
        return (~self.values.isnan()).sum(0)

    @cached_property
    def interval(self) -> Float[Tensor, "bound layer column"] | None:
        """Lower and upper 95 % bound of the recovery, resampling pairs; None for a single pair."""
        if len(self.clean) < 2:
            return None
        base, target = self._ends
        out = self.recovery.new_full((2, *self.recovery.shape), math.nan)
        pairs = list(range(len(self.clean)))
        for i, j in (~self.recovery.isnan()).nonzero().tolist():
            cell = self.values[:, i : i + 1, j : j + 1]

            def of(rows: Any, cell: Tensor = cell) -> float:
                return float(_ratio(cell[rows], base[rows], target[rows]))

            e = stats.bootstrap(of, pairs, n=300)
            out[:, i, j] = torch.tensor([e.low, e.high])
        return out

    def joined(self, others: Sequence[Patching]) -> Patching:
        """The pairs of several sweeps together, say of contrasts that are read by other words.

        Args:
            others: Sweeps of the same hook point, mode, layers and columns.

        Returns:
            One `Patching` of all the pairs that pass (`passing`); a pair that was alone before may have had either sign.

        Raises:
            ValueError: sweeps of other layers, columns, hook points or modes; no pair that passes.

        Example:
            >>> ends = torch.tensor([1.0]), torch.tensor([0.0])
            >>> one, two = (em.Patching("z", "denoise", (3,), ("H0",), torch.tensor([[[x]]]), *ends) for x in (0.5, 1.0))
            >>> one.joined([two]).recovery.tolist()
            [[0.75]]
        """
        same = ("hook_point", "mode", "layers", "labels", "trivial", "approximate")
        if any(getattr(p, name) != getattr(self, name) for p in others for name in same):
            raise ValueError(
                "only sweeps of the same hook point, mode, layers and columns can be joined"
            )
        every = [self, *others]
        clean, corrupted = (
            torch.cat([p.clean for p in every]),
            torch.cat([p.corrupted for p in every]),
        )
        kept = passing(clean, corrupted)
        if not kept.any():
            raise ValueError(NONE_PASSES.format(len(kept), 0.0))
        return replace(
            self, values=torch.cat([p.values for p in every])[kept], clean=clean[kept], corrupted=corrupted[kept],
            dropped=sum(p.dropped for p in every), excluded=sum(p.excluded for p in every) + int((~kept).sum()),
        )  # fmt: skip

    def top(self, k: int = 5) -> Table:
        """The k cells of largest |recovery|.

        Args:
            k: How many at most; a cell that does not exist or cannot matter is never one of them.

        Returns:
            `Table` of layer, column and recovery (0 the base run, 1 the target run), the largest first.

        Example:
            >>> values, ends = torch.tensor([[[0.25, -0.5]]]), (torch.tensor([1.0]), torch.tensor([0.0]))
            >>> em.Patching("z", "denoise", (3,), ("H0", "H1"), values, *ends).top(1)
            layer  column  recovery
                3  H1        -0.500
        """
        size = self.recovery.abs().nan_to_num(nan=-1.0)
        order = size.flatten().argsort(descending=True, stable=True)[:k].tolist()
        cells = [divmod(i, len(self.labels)) for i in order]
        return Table(
            ("layer", "column", "recovery"),
            tuple(
                (self.layers[i], self.labels[j], float(self.recovery[i, j]))
                for i, j in cells
                if size[i, j] >= 0
            ),
        )

    def _title(self) -> str:
        kind = "attribution patching (approximate)" if self.approximate else "patching"
        left_out = f", {self.dropped} dropped, {self.excluded} excluded"
        if not (self.dropped or self.excluded):
            left_out = ""
        return f"{kind} of {self.hook_point}, {self.mode}: recovery, {len(self.clean)} pair(s){left_out}"

    def __repr__(self) -> str:
        head = [repr(name)[1:-1][:7] for name in self.labels]
        lines = [self._title(), "layer " + " ".join(f"{name:>7}" for name in head)]
        for layer, row in zip(self.layers, self.recovery.tolist(), strict=True):
            nothing = "=" if layer in self.trivial else "."
            cells = (f"{nothing:>7}" if math.isnan(x) else f"{x:z7.2f}" for x in row)
            lines.append(f"{layer:>5} " + " ".join(cells))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        layers, values = [f"L{x}" for x in self.layers], self.recovery.numpy()
        same = np.array([[layer in self.trivial] * len(self.labels) for layer in self.layers])
        if len(self.labels) > len(layers):  # the longer side goes down the page
            return heat_map(self._title(), self.labels, layers, values.T, 1.0, same.T)
        return heat_map(self._title(), layers, self.labels, values, 1.0, same)


def _ratio(
    values: Float[Tensor, "pair layer column"],
    base: Float[Tensor, " pair"],
    target: Float[Tensor, " pair"],
) -> Float[Tensor, "layer column"]:
    """sum (values - base) / sum (target - base) over pairs."""
    change = values - base[:, None, None]
    # the same pairs above and below: a pair without a span must not weigh in its gap
    gap = torch.where(change.isnan(), 0, (target - base)[:, None, None]).sum(0)
    counted = (~change.isnan()).any(0) & (gap != 0)
    return torch.where(counted, change.nansum(0) / torch.where(gap == 0, 1, gap), math.nan)


@dataclass(frozen=True)
class Agreement:
    """Correlation of approximate with exact recovery over the cells that both have.

    Attributes:
        pearson, spearman: Correlations, -1 to 1.
        cells: How many cells both have.
    """

    pearson: float
    spearman: float
    cells: int

    def __repr__(self) -> str:
        return f"Agreement(Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}, {self.cells} cells)"


def agreement(exact: Patching, approximate: Patching) -> Agreement:
    """How well the gradient approximation orders the cells.

    Args:
        exact: Of `em.patch_*`.
        approximate: Of `em.attribution_patching`, with the same prompts, hook point, layers and columns.

    Returns:
        `Agreement`: Pearson's and Spearman's correlation over the common cells.

    Raises:
        ValueError: tables of other layers or columns, or fewer than three common cells.

    Example:
        >>> cells = ("resid_pre", "denoise", (0,), ("before", "changed", "last"))
        >>> a, b = ([[[0.0, 2.0, x]]] for x in (1.0, 0.5))
        >>> ends = torch.tensor([2.0]), torch.tensor([0.0])
        >>> exact, approximate = (em.Patching(*cells, torch.tensor(t), *ends) for t in (a, b))
        >>> em.agreement(exact, approximate)
        Agreement(Pearson 0.961, Spearman 1.000, 3 cells)
    """
    same = ("hook_point", "layers", "labels")
    if any(getattr(exact, name) != getattr(approximate, name) for name in same):
        raise ValueError("exact and approximate need the same hook point, layers and columns")
    a, b = (p.recovery.flatten().double().numpy() for p in (exact, approximate))
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 3:
        raise ValueError(f"agreement needs at least 3 common cells, there are {both.sum()}")
    rank: Any = sp.spearmanr(a[both], b[both])
    return Agreement(stats.pearson(a[both], b[both]), float(rank.statistic), int(both.sum()))


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

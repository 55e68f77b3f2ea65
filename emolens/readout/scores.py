"""Scores of texts or tokens, and how they show themselves: as lines, as a table, as coloured text.

A score inside the band of neutral text says nothing: it is in brackets in the lines, grey in the view, and its text is called "none".
Everything that a text or a name says is escaped before it becomes HTML. How scores are made is told in `reading`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from operator import index
from typing import Any, Literal, SupportsIndex

from jaxtyping import Bool, Float
from torch import Tensor

from emolens._table import Table
from emolens._typing import typed

SHOWN = 3  # emotions of a row, in the lines and in the view
STYLE = (
    "font:14px/1.7 system-ui,sans-serif;color:#1d2433;background:#fff;padding:8px;max-width:52em"
)


@typed
@dataclass(frozen=True, eq=False)
class Scores:
    """Calibrated scores of texts, or of their tokens. In Jupyter they show themselves.

    >>> scores = em.score(model, directions, ["The door was open when she came home.", "It rained."])
    >>> scores.values.shape, len(scores)
    (torch.Size([2, 4]), 2)

    Attributes:
        emotions: Names of the columns.
        values: `[row emotion]` z: of texts in standard deviations of held-out stories, of tokens in those of neutral text at the same
            position.
        raw: The same shape, (x - mu) . v/|v|, in the residual stream's units.
        per: Whether a row is a text or a token.
        layer: The block that was read.
        texts: The texts as they were read (chat messages rendered).
        text_of: For each row the number of its text.
        spans: For each row the characters of its text that it stands for; the whole text for texts.
        band: `[row]` a highest score below it is within what 95 % of neutral texts as long (neutral tokens at that position) do; NaN where
            too few neutral texts were collected to know.
        rate: `[row]` the share of neutral texts of held-out topics that were measured above the band, 0 to 1; NaN where not measured.
        flags: For each text: "short" (few tokens), "training" (its directions were made from this very text), "cut" (longer than the model
            reads, its beginning was read) or "left out" (the same, it has no row).
        info: Model, pooling and directions.

    Raises:
        jaxtyping.TypeCheckError: tensors whose shapes do not fit each other.
        ValueError: names, texts or spans that do not fit the tensors.
    """

    emotions: tuple[str, ...]
    values: Float[Tensor, "row emotion"]
    raw: Float[Tensor, "row emotion"]
    per: Literal["text", "token"]
    layer: int
    texts: tuple[str, ...]
    text_of: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    band: Float[Tensor, " row"]
    rate: Float[Tensor, " row"]
    flags: tuple[tuple[str, ...], ...]
    info: dict[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        said = (len(self.text_of), len(self.spans), len(self.emotions), len(self.flags))
        rows, columns = self.values.shape
        if said != (rows, rows, columns, len(self.texts)):
            raise ValueError(
                f"text_of, spans, emotions and flags have {said} entries; {rows} rows, {columns} columns and {len(self.texts)} texts need "
                f"{(rows, rows, columns, len(self.texts))}"
            )

    @property
    def above(self) -> Bool[Tensor, "row emotion"]:
        """Which scores lie above the band of neutral text: all of them where that is not known."""
        return ~(self.values <= self.band[:, None])

    @property
    def labels(self) -> list[str]:
        """The highest emotion of each row, or "none" inside the neutral band (never where that is not known)."""
        shown = zip(self.values.argmax(1).tolist(), self.above.any(1).tolist(), strict=True)
        return [self.emotions[e] if above else "none" for e, above in shown]

    @property
    def band_in_words(self) -> str:
        """The band and how often neutral text was measured above it.

        For example ``none below 2.1 to 3.4 by length; 4 to 6 % of neutral texts of unknown topics lie above``.
        """
        what = "texts" if self.per == "text" else "tokens"
        if len(self) and self.band.isnan().all():
            return "no band: too few neutral texts were collected, so nothing is called none"
        known, n = self.rate[~self.rate.isnan()], len(self)
        by = " by length" if self.per == "text" else " by position"
        band = f"none below {_range(self.band, '.1f', by)}"
        if not len(known):
            return f"{band}; how many neutral {what} lie above was not measured: too few were collected, or by an earlier version"
        rest = f" (not measured for {n - len(known)} of {n} {what})" if len(known) < n else ""
        return f"{band}; {_range(100 * known, '.0f')} % of neutral {what} of held-out topics lie above{rest}"

    def top(self, k: SupportsIndex = 3) -> Table:
        """Rank the emotions of each row by z.

        >>> scores = em.score(model, directions, ["The door was open when she came home.", "It rained."])
        >>> scores.top(1).columns, len(scores.top(2))
        (('row', 'text', 'emotion', 'z', 'band'), 4)

        Args:
            k: So many of each row, or all where there are fewer emotions.

        Returns:
            Row by row, the highest first: number and words of the row, emotion, z, and the band that it should lie above.

        Raises:
            ValueError: `k` below 1.
        """
        if index(k) < 1:
            raise ValueError(f"k={k}; at least 1")
        values, order = self.values.topk(min(index(k), len(self.emotions)), dim=1)
        cells = zip(values.tolist(), order.tolist(), self.band.tolist(), strict=True)
        return Table(
            ("row", "text", "emotion", "z", "band"),
            tuple(
                (row, self._words(row), self.emotions[e], z, band)
                for row, (zs, es, band) in enumerate(cells)
                for z, e in zip(zs, es, strict=True)
            ),
        )

    def column(self, emotion: str) -> int:
        """Find the column of an emotion.

        >>> em.score(model, directions, "The door was open when she came home.").column("gloamer")
        1

        Args:
            emotion: Its name.

        Returns:
            Its place on the emotion axis of `values`, 0-based.

        Raises:
            KeyError: unknown; the message names the known ones.
        """
        if emotion not in self.emotions:
            raise KeyError(f"no emotion {emotion!r} here; there are: {', '.join(self.emotions)}")
        return self.emotions.index(emotion)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return self.table(20)

    def table(self, rows: int | None = None) -> str:
        """Write the rows as lines of text: label, the highest emotions with their z (in brackets inside the neutral band), flags.

        >>> scores = em.score(model, directions, ["The door was open when she came home.", "It rained."])
        >>> len(scores.table().splitlines()), scores.table(1).splitlines()[-1]
        (3, '  ... 1 more')

        Args:
            rows: At most so many; None takes all.

        Returns:
            The lines, under one that says layer and band.
        """
        shown = len(self) if rows is None else min(rows, len(self))
        lines = [f"Scores per {self.per}, layer {self.layer}, z ({self.band_in_words})"]
        for row, label in enumerate(self.labels[:shown]):
            text = self._words(row).replace("\n", " ")
            said = [
                f"{e} {z:+.1f}" if above else f"({e} {z:+.1f})" for e, z, above in self._best(row)
            ]
            flags = [f"[{f}]" for f in self.flags[self.text_of[row]]] if self.per == "text" else []
            text = text if len(text) <= 50 else text[:47] + "..."
            lines.append(f"  {text!r:<54} {label:<13} {'  '.join([*said, *flags])}")
        if shown < len(self):
            lines.append(f"  ... {len(self) - shown} more")
        if left := sum("left out" in flags for flags in self.flags):
            lines.append(f"  {left} texts left out: longer than the model reads")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self, emotions: Sequence[str] | None = None, limit: float = 4.0) -> str:
        """Write a self-contained view: coloured tokens, or a bar for each emotion of a text.

        >>> em.score(model, directions, "The door was open when she came home.").to_html(["glimmer"])[:11]
        '<div style='

        Args:
            emotions: Rows of the token view, bars of a text; None takes the three that are highest in each text.
            limit: The z that gets the full colour.

        Returns:
            HTML without script, everything escaped.

        Raises:
            KeyError: an emotion that is not here.
        """
        asked = None if emotions is None else [self.column(e) for e in emotions]
        parts = [f'<div style="{STYLE}">']
        for t, text in enumerate(self.texts):
            rows = [i for i, owner in enumerate(self.text_of) if owner == t]
            if rows and self.per == "text":
                parts.append(self._text_html(rows[0], text, asked))
            elif rows:
                parts += self._tokens_html(rows, text, asked, limit)
        against = "neutral text at the same position" if self.per == "token" else "held-out stories"
        parts.append(
            f'<div style="font-size:12px;color:#667">layer {self.layer}; z against {against}; '
            f"grey: inside the band of neutral text, where nothing is claimed ({self.band_in_words})</div></div>"
        )
        return "".join(parts)

    def _words(self, row: int) -> str:
        start, end = self.spans[row]
        return self.texts[self.text_of[row]][start:end]

    def _best(self, row: int, asked: Sequence[int] | None = None) -> list[tuple[str, float, bool]]:
        """Name, z and whether it is above the band: of the highest emotions of a row, or of those asked for."""
        values, above = self.values[row], self.above[row].tolist()
        if asked is None:
            asked = values.topk(min(SHOWN, len(values))).indices.tolist()
        return [(self.emotions[e], float(values[e]), above[e]) for e in asked]

    def _tokens_html(
        self, rows: list[int], text: str, asked: Sequence[int] | None, limit: float
    ) -> list[str]:
        values, band = self.values[rows], self.band[rows].tolist()
        if asked is None:
            # the mean of the five highest tokens, so that one odd token does not choose
            highest = values.topk(min(5, len(rows)), dim=0).values.mean(0)
            asked = highest.argsort(descending=True)[:SHOWN].tolist()
        spans = [self.spans[i] for i in rows]
        return [
            f'<div style="margin:4px 0"><b>{escape(self.emotions[e])}</b> '
            f"{token_html(text, spans, values[:, e].tolist(), band, limit)}</div>"
            for e in asked
        ]

    def _text_html(self, row: int, text: str, asked: Sequence[int] | None) -> str:
        flags = "".join(
            f' <small style="color:#a40">[{escape(f)}]</small>'
            for f in self.flags[self.text_of[row]]
        )
        shown = escape(text if len(text) < 600 else text[:600] + " ...")
        bars = "".join(
            f'<div style="display:flex;align-items:center"><span style="width:8em">{escape(e)}</span>'
            f'<span style="background:{"#d9622b" if above else "#c9ccd3"};height:9px;width:{max(0.0, min(z, 6.0)) * 2.2:.2f}em"></span>'
            f'<span style="margin-left:6px;color:#667">{z:+.1f}</span></div>'
            for e, z, above in self._best(row, asked)
        )
        label = escape(self.labels[row])
        return f'<div style="margin:8px 0"><div><bdi>{shown}</bdi></div><b>{label}</b>{flags}{bars}</div>'


def _range(values: Tensor, form: str, by: str = "") -> str:
    """One number, or the least and the largest."""
    low, high = f"{float(values.min()):{form}}", f"{float(values.max()):{form}}"
    return low if low == high else f"{low} to {high}{by}"


def token_html(
    text: str,
    spans: Sequence[tuple[int, int]],
    values: Sequence[float],
    bands: Sequence[float],
    limit: float,
) -> str:
    """Colour each token's background from blue (low) over white (inside its band) to orange (high).

    >>> token_html("so <b>", [(0, 2)], [3.0], [1.0], 4.0)
    '<bdi><span title="+3.0" style="background:rgba(217,98,43,0.72)">so</span> &lt;b&gt;</bdi>'

    Args:
        text: The whole text; characters of no token stay white.
        spans: First and last (exclusive) character of each token, in order.
        values: z of each token.
        bands: Highest z of each token that is white.
        limit: The z that gets the full colour.

    Returns:
        HTML in which everything is escaped.
    """
    out, at = [], 0
    for (start, end), z, band in zip(spans, values, bands, strict=True):
        start = max(start, at)  # a character of several tokens belongs to the first
        if end <= start:
            continue
        beyond = (abs(z) - band) / max(limit - band, 1e-6)
        strength = 0.0 if abs(z) <= band else min(beyond * 0.85 + 0.15, 1.0)
        colour = "217,98,43" if z > 0 else "60,110,180"
        piece = escape(text[start:end]).replace("\n", "<br>")
        out.append(escape(text[at:start]).replace("\n", "<br>"))
        out.append(
            f'<span title="{z:+.1f}" style="background:rgba({colour},{strength:.2f})">{piece}</span>'
        )
        at = end
    out.append(escape(text[at:]).replace("\n", "<br>"))
    # isolate right-to-left marks, so that a hostile text cannot reorder the page around it
    return f"<bdi>{''.join(out)}</bdi>"

"""How the tokens of a text become rows: which positions are taken, and which tokens are ordinary.

Ordinary tokens are real (never padding), not the first (an attention sink with a hundred times the norm of the rest), and have a norm
below ten times the row's median.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from emolens._typing import block_number, whole_number
from emolens.models.tokens import EncodedText

SINK = 10.0  # a token whose norm exceeds this many medians of its row is not ordinary
GOLDEN = (5**0.5 - 1) / 2  # multiples of it fill a circle evenly, however many there are
# tokens after the first, at which each neutral text is also pooled: what short texts do
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Pooling:
    """How the tokens of a text become rows; made by `mean_over_tokens`, `last_token`, `char_span` and `every_token`.

    Attributes:
        kind: Mean over ordinary tokens, last token, mean over a span, or every token a row.
        skip: Tokens left out at the start, counted over real tokens.
        short: What is done with a text of which `skip` leaves less than half: see `mean_over_tokens`.
        limit: Most rows of a text, where every token is one; None is all.
        spans: One a text, `(start, end)` in characters or the words themselves.

    Example:
        >>> em.mean_over_tokens() == em.collect.Pooling("mean", skip=50)
        True
    """

    kind: Literal["mean", "last", "span", "tokens"]
    skip: int = 1
    short: Literal["second_half", "skip", "raise"] = "second_half"
    limit: int | None = None
    spans: tuple[tuple[int, int] | str, ...] | None = None


def mean_over_tokens(
    *, skip: SupportsIndex = 50, short: Literal["second_half", "skip", "raise"] = "second_half"
) -> Pooling:
    """Mean over the ordinary tokens from token `skip` on (0-based, counted over real tokens).

    Args:
        skip: Tokens left out at the start, at least 1; the paper uses 50.
        short: For a text where that would leave less than half: "second_half" takes its second half, "skip" leaves the text
            out if nothing remains (and counts it), "raise" raises if nothing remains.

    Returns:
        `Pooling`, for `pooling=` of every `collect_*`.

    Raises:
        ValueError: `skip` below 1, or another word for `short`.

    Example:
        >>> em.mean_over_tokens(skip=10).skip
        10
    """
    skip = whole_number("skip", skip, 0)
    if skip < 1:
        raise ValueError(f"skip={skip}; at least 1: the first token is an attention sink")
    if short not in ("second_half", "skip", "raise"):
        raise ValueError(f"short={short!r}; allowed: 'second_half', 'skip', 'raise'")
    return Pooling("mean", skip=skip, short=short)


def last_token() -> Pooling:
    """The last real token of each text, found by the mask.

    Returns:
        `Pooling`.

    Example:
        >>> em.last_token().kind
        'last'
    """
    return Pooling("last")


def char_span(spans: Sequence[tuple[SupportsIndex, SupportsIndex] | str]) -> Pooling:
    """Mean over the ordinary tokens that overlap a span of characters, one span for each text.

    Args:
        spans: `(start, end)` in the text (for chat messages: in `models.render_chat`'s result), or the words themselves, which
            must occur exactly once.

    Returns:
        `Pooling`, for texts in this order.

    Example:
        >>> pooling = em.char_span(["open", (0, 4)])
        >>> len(em.collect_resid_post(model, ["The door was open.", "Rain."], pooling=pooling).texts)
        2
    """
    return Pooling("span", spans=tuple(s if isinstance(s, str) else _pair(s) for s in spans))


def _pair(span: Sequence[SupportsIndex]) -> tuple[int, int]:
    start, end = map(block_number, span)
    return start, end


def every_token(*, skip: SupportsIndex = 1, limit: SupportsIndex | None = None) -> Pooling:
    """One row for each ordinary token from token `skip` on; at most `limit` a text, evenly spaced.

    Args:
        skip: Tokens left out at the start; the first, an attention sink, always is.
        limit: Most tokens of a text, at least 1; None is every one.

    Returns:
        `Pooling`.

    Raises:
        ValueError: a limit below 1.

    Example:
        >>> acts = em.collect_resid_post(model, ["The door was open."], pooling=em.every_token(limit=2))
        >>> acts.rows.shape[0], len(acts.texts)
        (2, 1)
    """
    limit = None if limit is None else whole_number("limit", limit)
    return Pooling("tokens", skip=max(whole_number("skip", skip, 0), 1), limit=limit)


def pooled_positions(e: EncodedText, pooling: Pooling, index: int, name: str) -> list[int]:
    """The positions (among the real tokens of a text) that are pooled; empty if the text is left out by policy."""
    n = len(e.ids)
    if pooling.kind == "last":
        return [n - 1]
    if pooling.kind == "span":
        assert pooling.spans is not None
        start, end = _span(pooling.spans[index], e.text, index)
        inside = [p for p, (a, b) in enumerate(e.offsets) if a < end and b > start and b > a]
        if not inside:
            raise ValueError(
                f"char_span: no token of text {index} lies in ({start}, {end}): {e.text[start:end]!r}"
            )
        return inside
    start = pooling.skip
    if pooling.kind == "mean" and pooling.short == "second_half":
        start = max(1, min(start, n // 2))
    if start >= n:
        if pooling.short == "skip":
            return []
        raise ValueError(
            f"text {name or index} has {n} tokens, nothing is left after the first {start}"
            + (
                "; lower skip, or use short='second_half' or 'skip'"
                if n > 1
                else "; one token is only an attention sink"
            )
        )
    positions = list(range(start, n))
    if pooling.limit is not None and len(positions) > pooling.limit:
        step = len(positions) / pooling.limit
        positions = [positions[int((k + 0.5) * step)] for k in range(pooling.limit)]
    return positions


def spread_positions(n_tokens: int, limit: int, phase: float) -> list[int]:
    """At most `limit` evenly spaced positions from 1 on, at a phase (0 to 1) of their step."""
    n = n_tokens - 1
    return (
        [1 + int((k + phase) * n / limit) for k in range(limit)]
        if n > limit
        else list(range(1, n_tokens))
    )


def running_mean(x: Tensor, ordinary: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Mean of the ordinary tokens of a row up to a column; the token itself where none is ordinary."""
    rows, inverse = row.unique(return_inverse=True)
    kept = ordinary[rows].to(x.dtype)
    total, n = (
        (x[rows] * kept[..., None]).cumsum(1)[inverse, column],
        kept.cumsum(1)[inverse, column, None],
    )
    return torch.where(n > 0, total / n.clamp_min(1), x[row, column])


def _span(span: tuple[int, int] | str, text: str, index: int) -> tuple[int, int]:
    if isinstance(span, str):
        if not span or text.count(span) != 1:
            raise ValueError(
                f"char_span: {span!r} occurs {text.count(span) if span else 0} times in text {index}; it must occur once"
            )
        start = text.index(span)
        return start, start + len(span)
    start, end = span
    if not 0 <= start < end <= len(text):
        raise ValueError(
            f"char_span: ({start}, {end}) is not inside text {index}, which has {len(text)} characters"
        )
    return start, end

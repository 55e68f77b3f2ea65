"""Texts coloured token by token, as one page."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emolens.readout import Scores
from emolens.report.figures import CircuitsView


def explore_tokens(
    scores: Scores, *, text: int = 0, emotions: Sequence[str] | None = None
) -> CircuitsView:
    """Token scores of one text in circuitsvis: a button for each emotion, all values on hover.

    Args:
        scores: From ``em.score(..., per="token")``.
        text: Which text.
        emotions: Which emotions, in order; None takes all of them.

    Returns:
        A view that a notebook shows, with its JavaScript in it; colours are z, in spreads of single neutral tokens.

    Raises:
        ValueError: scores of whole texts.
        IndexError: no such text.
        KeyError: no such emotion.

    Example:
        >>> scores = em.score(model, directions, ["The door was open."], per="token")
        >>> "The" in em.explore_tokens(scores)._repr_html_()
        True
    """
    from circuitsvis.tokens import colored_tokens_multi

    if scores.per != "token":
        raise ValueError("explore_tokens shows single tokens: score(..., per='token')")
    rows = [i for i, owner in enumerate(scores.text_of) if owner == text]
    if not rows:
        raise IndexError(f"there is no text {text}; there are {len(scores.texts)}")
    names = list(emotions or scores.emotions)
    columns = [scores.column(e) for e in names]
    whole, tokens, values, at = scores.texts[text], [], [], 0
    nothing = torch.zeros(len(columns))
    for i in rows:
        start, end = scores.spans[i]
        if start > at:  # tokens without a score, the first one above all: shown, and uncoloured
            tokens.append(whole[at:start])
            values.append(nothing)
        tokens.append(whole[start:end])
        values.append(scores.values[i, columns])
        at = max(at, end)
    if at < len(whole):
        tokens.append(whole[at:])
        values.append(nothing)
    return CircuitsView(colored_tokens_multi(tokens, torch.stack(values), names))

"""The one rule for bars: shown where somebody looks and waits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

PATIENCE = 2.0  # seconds before a bar is shown


def progress_bar(over: Sequence[T], unit: str, progress: bool | None, what: str = "") -> tqdm[T]:
    """Make a bar over units of work, to be iterated, or updated and closed.

    Args:
        over: The units; `range(n)` where only their number counts.
        unit: One of them, in a word.
        progress: True shows it, False does not; None shows it after two seconds, where stderr is a terminal or the page of a notebook.
        what: Words before it.

    Returns:
        The bar, of tqdm.

    Example:
        >>> from emolens.collect import progress_bar
        >>> [text.upper() for text in progress_bar(["a", "b"], "text", False)]
        ['A', 'B']
    """
    shown, delay = (_is_seen(), PATIENCE) if progress is None else (progress, 0)
    return tqdm(over, unit=unit, desc=what or None, disable=not shown, delay=delay)


def _is_seen() -> bool:
    """Whether somebody may be looking at stderr."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel") or (sys.stderr is not None and sys.stderr.isatty())

"""How much more an emotion's own words gain than the others': a sweep, read as validation steering reads it."""

from __future__ import annotations

import numpy as np

from emolens.interventions.sweep import Sweep


def above(margins: np.ndarray) -> np.ndarray:
    """Where the own words gain more than the others, 0 or 1."""
    return (margins > 0).astype(float)


def all_margins(s: Sweep, control: str | None) -> np.ndarray:
    """`[direction prompt emotion]`: the change of each emotion's words minus the mean of the others'."""
    return s.select(control=control).margin.double().numpy()


def own_margins(s: Sweep, names: list[str], control: str | None = None) -> np.ndarray:
    """`[prompt emotion]`: diag - off of the direction that is named for each emotion."""
    margins, directions = (
        all_margins(s, control),
        [c.direction for c in s.select(control=control).cells],
    )
    return np.stack([margins[directions.index(e), :, s.emotions.index(e)] for e in names], 1)


def own_highest(s: Sweep, names: list[str], control: str | None = None) -> np.ndarray:
    """`[prompt emotion]`: whether the own words rose most of all, 0 or 1."""
    at = s.select(control=control)
    highest, directions = at.change.argmax(-1).numpy(), [c.direction for c in at.cells]
    return np.stack([highest[directions.index(e)] == s.emotions.index(e) for e in names], 1).astype(
        float
    )

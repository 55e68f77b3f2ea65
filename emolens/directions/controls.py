"""Directions that mean nothing, with everything else alike: random ones, and those of shuffled labels."""

from __future__ import annotations

from dataclasses import replace
from operator import index
from typing import SupportsIndex

import numpy as np
import torch
from einops import einsum
from numpy.typing import NDArray

from emolens import stats
from emolens.collect.activations import Activations, is_main
from emolens.directions.algebra import mean_differences, neutral_components
from emolens.directions.value import EmotionDirections

SHUFFLES = 100  # draws until one is a control


def random_directions(
    directions: EmotionDirections,
    n: SupportsIndex = 8,
    *,
    seed: SupportsIndex = 0,
    like: Activations | None = None,
) -> EmotionDirections:
    """Draw directions that point anywhere, as long as the given ones are on average: the control of every steering experiment.

    >>> em.random_directions(directions, 3).emotions
    ('random 0', 'random 1', 'random 2')

    Args:
        directions: What they are a control of: same model, hook point, layers and mean length.
        n: How many.
        seed: The same seed gives the same ones.
        like: Draw them from the covariance of these rows instead of a sphere: directions in which text does vary.

    Returns:
        `n` directions named "random 0", "random 1", ... without calibration. A dose looks only at where they point.

    Raises:
        ValueError: fewer than one; rows that span no more than the directions do, so that a draw would lie among them.
    """
    n = index(n)
    if n < 1:
        raise ValueError(f"n={n}; at least one")
    if like is not None and len(like.rows) <= len(directions) + 1:
        raise ValueError(
            f"like= has {len(like.rows)} rows, which span no more than {len(directions)} directions do: the draws would not differ "
            "from what they control; give more rows, or like=None"
        )
    generator = torch.Generator().manual_seed(index(seed))
    if like is None:
        draws = torch.randn((n, *directions.vectors.shape[1:]), generator=generator)
    else:
        rows = like.at(list(directions.layers)).rows
        weights = torch.randn((n, len(rows)), generator=generator)
        draws = einsum(
            weights, rows - rows.mean(0), "row text, text layer d_model -> row layer d_model"
        )
    size = torch.linalg.vector_norm(directions.vectors, dim=-1).mean(0)
    draws = draws / torch.linalg.vector_norm(draws, dim=-1, keepdim=True) * size[:, None]
    names = tuple(f"random {i}" for i in range(n))
    unknown = torch.full(draws.shape[:2], torch.nan)
    made = {"vectors": draws, "reliability": unknown, "calibration": None}
    return replace(directions, emotions=names, among=None, operands=(), **made)


def shuffled_directions(
    acts: Activations, directions: EmotionDirections, *, seed: SupportsIndex = 0
) -> EmotionDirections:
    """Fit mean differences of the same texts with the emotion labels shuffled within each topic: what the texts give whatever they mean.

    Texts without a topic are shuffled among themselves. Neutral components are removed as for `directions`. No emotion keeps its texts
    together, under whatever name: that would be the effect itself (of two emotions, the same axis turned round).

    >>> em.shuffled_directions(acts, directions).emotions == directions.emotions
    True

    Args:
        acts: What the directions were made from, in memory.
        directions: What they are a control of.
        seed: The same seed gives the same shuffle.

    Returns:
        Directions named after the emotions whose label they got, without calibration.

    Raises:
        ValueError: every topic has one emotion only, or the texts are so few that an emotion's stay together however they are shuffled.
    """
    main = acts.select(is_main)
    names = acts.moments().emotions
    labels = np.array([names.index(t.emotion or "") for t in main.texts])
    topics, rng = [t.topic or "" for t in main.texts], np.random.default_rng(index(seed))
    kept = [names.index(e) for e in directions]
    together: list[int] = []
    # of few texts a draw can be the truth itself, or the truth under other names
    for _ in range(SHUFFLES):
        shuffled = stats.shuffle_within(labels, topics, rng)
        together = [k for k in kept if _stays(labels == k, shuffled)]
        if not together:
            break
    else:
        raise ValueError(
            f"the {int((labels == together[0]).sum())} texts of {names[together[0]]!r} stay together in {SHUFFLES} shuffles within topics, which "
            "is no control: more texts of several emotions in each topic are needed (or give no topics, to shuffle over all texts)"
        )
    components, share = None, directions.info["remove_neutral"]
    if share:
        assert acts.neutral_tokens is not None  # the directions were made from these activations
        components = neutral_components(acts.neutral_tokens.rows, share)
    vectors, _ = mean_differences(main.rows, torch.from_numpy(shuffled), components)
    k = [acts.layers.index(layer) for layer in directions.layers]
    unknown = torch.full_like(directions.reliability, torch.nan)
    made = {"vectors": vectors[kept][:, k], "reliability": unknown, "calibration": None}
    return replace(directions, among=None, **made)


def _stays(own: NDArray[np.bool_], shuffled: NDArray[np.integer]) -> bool:
    """Whether the texts of one emotion have one label, and no other text has it."""
    return len(np.unique(shuffled[own])) == 1 and bool(
        ((shuffled == shuffled[own][0]) == own).all()
    )

"""Directions that mean nothing, with everything else alike: random ones, and those of shuffled labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from einops import einsum
from numpy.typing import NDArray

from emolens import stats
from emolens.collect.activations import Activations, is_main
from emolens.directions.algebra import class_means, neutral_components, remove_components
from emolens.directions.value import EmotionDirections

SHUFFLES = 100  # draws until one is a control


def random_directions(
    v: EmotionDirections, n: int = 8, *, seed: int = 0, like: Activations | None = None
) -> EmotionDirections:
    """Directions that point anywhere, as long as those of `v` are on average: the control of every steering experiment.

    Args:
        like: Draw them from the covariance of these rows instead of a sphere: directions in which text does vary.

    Returns:
        `n` directions named "random 0", "random 1", ... without calibration. A dose looks only at where they point.

    Raises:
        ValueError: fewer than one; rows that span no more than the directions do, so that a draw would lie among them.
    """
    if n < 1:
        raise ValueError(f"n={n}; at least one")
    if like is not None and len(like.rows) <= len(v.vectors) + 1:
        raise ValueError(
            f"like= has {len(like.rows)} rows, which span no more than {len(v.vectors)} directions do: the draws would not differ "
            "from what they control; give more rows, or like=None"
        )
    generator = torch.Generator().manual_seed(seed)
    if like is None:
        draws = torch.randn((n, *v.vectors.shape[1:]), generator=generator)
    else:
        rows = like.at(list(v.layers)).rows
        weights = torch.randn((n, len(rows)), generator=generator)
        draws = einsum(
            weights, rows - rows.mean(0), "row text, text layer d_model -> row layer d_model"
        )
    size = torch.linalg.vector_norm(v.vectors, dim=-1).mean(0)
    draws = draws / torch.linalg.vector_norm(draws, dim=-1, keepdim=True) * size[:, None]
    names = tuple(f"random {i}" for i in range(n))
    return replace(
        v,
        emotions=names,
        vectors=draws,
        reliability=torch.full(draws.shape[:2], torch.nan),
        calibration=None,
        among=None,
        operands=(),
    )


def shuffled_directions(
    acts: Activations, v: EmotionDirections, *, seed: int = 0
) -> EmotionDirections:
    """Mean differences of the same texts with the emotion labels shuffled within each topic: what the texts give whatever they mean.

    Texts without a topic are shuffled among themselves. Neutral components are removed as for `v`. Named after the emotions whose label
    they got, without calibration. No emotion of `v` keeps its texts together, under whatever name: that would be the effect itself
    (of two emotions, the same axis turned round).

    Raises:
        ValueError: every topic has one emotion only, or the texts are so few that an emotion's stay together however they are shuffled.
    """
    main = acts.select(is_main)
    names = acts.moments().emotions
    labels = np.array([names.index(t.emotion or "") for t in main.texts])
    topics, rng = [t.topic or "" for t in main.texts], np.random.default_rng(seed)
    kept = [names.index(e) for e in v.emotions]
    together: list[int] = []
    for _ in range(
        SHUFFLES
    ):  # of few texts a draw can be the truth itself, or the truth under other names
        shuffled = stats.shuffle_within(labels, topics, rng)
        together = [k for k in kept if _stays(labels == k, shuffled)]
        if not together:
            break
    else:
        raise ValueError(
            f"the {int((labels == together[0]).sum())} texts of {names[together[0]]!r} stay together in {SHUFFLES} shuffles within topics, which "
            "is no control: more texts of several emotions in each topic are needed (or give no topics, to shuffle over all texts)"
        )
    means = class_means(main.rows, torch.from_numpy(shuffled))
    vectors = means - means.mean(0)
    share = v.info["remove_neutral"]
    if share:
        assert acts.neutral_tokens is not None  # v was made from these activations
        vectors = remove_components(vectors, neutral_components(acts.neutral_tokens.rows, share))
    k = [acts.layers.index(layer) for layer in v.layers]
    return replace(
        v,
        vectors=vectors[kept][:, k],
        reliability=torch.full_like(v.reliability, torch.nan),
        calibration=None,
        among=None,
    )


def _stays(own: NDArray[np.bool_], shuffled: NDArray[np.integer]) -> bool:
    """Whether the texts of one emotion have one label, and no other text has it."""
    return len(np.unique(shuffled[own])) == 1 and bool(
        ((shuffled == shuffled[own][0]) == own).all()
    )

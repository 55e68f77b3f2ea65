"""The mean difference of the stories under any labelling of them: what the experiments fit, and the null that is made of it.

A null that skips a step of the estimator (neutral components, scaling, the choice of the layer) has another spread than the
estimator, and its 95 % point says nothing. So what is read from stories has one way to fit, `Training.fit`, and one way to make a null, `against_shuffled`:
the very function that gave the value, called with labels shuffled within topic. What depends on no label is made once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from emolens import stats
from emolens.directions.algebra import mean_differences, project
from emolens.experiments.base import Stories

Array = NDArray[np.floating]
Labels = NDArray[np.integer]
N_SHUFFLES = 100


@dataclass(frozen=True, eq=False)
class Fit:
    """Directions of one labelling at the layer that it chose, on the scale of held-out training stories.

    Attributes:
        slot: Place of the chosen layer among the collected ones.
        vectors: m_e - mu without the neutral components.
        reference: mu.
        mean, std: Of the scores of training stories whose topic was left out.
    """

    slot: int
    vectors: Float[Tensor, "emotion d_model"]
    reference: Float[Tensor, " d_model"]
    mean: Float[Tensor, " emotion"]
    std: Float[Tensor, " emotion"]

    def centred(self, rows: Tensor, reference: Tensor | None = None) -> Array:
        """(x - mu) . v/|v| of rows `[text layer d_model]` of every layer, `[text emotion]`; another reference by name."""
        mu = self.reference if reference is None else reference
        return project(rows[:, [self.slot]], self.vectors[:, None], mu[None])[:, :, 0].numpy()

    def z(self, rows: Tensor) -> Array:
        """The same in held-out standard deviations above the held-out mean."""
        return (self.centred(rows) - self.mean.numpy()) / self.std.numpy()


class Training:
    """The stories without some topics, with everything about them that depends on no label.

    Without topics to hold out it is what a study ships: the layer by cross-validation over its folds, the directions of all stories.
    """

    def __init__(self, stories: Stories, held: Sequence[str] = ()) -> None:
        self.stories, self.held = stories, tuple(held)
        self.inside = torch.from_numpy(np.isin(np.asarray(stories.topics), list(held)))
        self.train, self.test = stories.main.rows[~self.inside], stories.main.rows[self.inside]
        self.topics = [
            t for t, out in zip(stories.topics, self.inside.tolist(), strict=True) if not out
        ]
        self.components = stories.neutral_components(self.held)
        self.folds = stories.inner_folds(self.held) if self.held else stories.folds
        self.parts = leave_out(self.topics)
        self.part = torch.tensor(
            [next(k for k, p in enumerate(self.parts) if t in p) for t in self.topics]
        )

    def fit(self, labels: Labels, slot: int | None = None) -> Fit:
        """Choose the layer, fit and calibrate by the training topics; `labels` are of all stories, those held out are not looked at.

        Args:
            slot: A layer's place, where it is not to be chosen.
        """
        y = labels[~self.inside.numpy()]
        if slot is None:
            slot = int(
                choose_layer(self.train, y, self.topics, self.folds, self.components).argmax()
            )
        rows, components = self.train[:, [slot]], self.components and [self.components[slot]]
        vectors, mu = mean_differences(rows, torch.from_numpy(y), components)
        held_out = self._left_out(rows[:, 0], torch.from_numpy(y), components)
        return Fit(slot, vectors[:, 0], mu[0], held_out.mean(0), held_out.std(0).clamp_min(1e-12))

    def _left_out(self, rows: Tensor, y: Tensor, components: list[Tensor] | None) -> Tensor:
        """Scores `[text emotion]` of the training stories by directions without their topic, from sums by topic."""
        k = int(y.max()) + 1
        total = (
            rows.new_zeros(len(self.parts) * k, rows.shape[1])
            .index_add_(0, self.part * k + y, rows)
            .unflatten(0, (-1, k))
        )
        n = torch.bincount(self.part * k + y, minlength=len(self.parts) * k).unflatten(0, (-1, k))
        out = rows.new_zeros(len(y), k)
        for part in range(len(self.parts)):
            means = (total.sum(0) - total[part]) / (n.sum(0) - n[part])[:, None]
            mu, inside = means.mean(0), self.part == part
            v = (
                means - mu
                if components is None
                else (means - mu) - ((means - mu) @ components[0]) @ components[0].T
            )
            out[inside] = (rows[inside] - mu) @ torch.nn.functional.normalize(v, dim=-1).T
        return out

    def at(self, labels: Labels, slots: Sequence[int]) -> Tensor:
        """Vectors `[emotion layer d_model]` at some layers, whichever would have been chosen."""
        components = self.components and [self.components[k] for k in slots]
        return mean_differences(
            self.train[:, list(slots)], torch.from_numpy(labels[~self.inside.numpy()]), components
        )[0]


def choose_layer(
    rows: Tensor,
    labels: Labels,
    topics: Sequence[str],
    folds: Sequence[Sequence[str]],
    components: list[Tensor] | None,
) -> Array:
    """Held-out top-1 of the mean difference at every layer, `[layer]`: what a layer is chosen by, and never a figure that is reported.

    The components know the neutral texts of all topics that the choice is made on; in an outer fold they are those of its training topics.
    """
    topic, y = np.asarray(topics), torch.from_numpy(np.asarray(labels))
    right = torch.zeros(rows.shape[1])
    n = 0
    for held in folds:
        inside = torch.from_numpy(np.isin(topic, list(held)))
        if not inside.any():
            continue
        scores = project(rows[inside], *mean_differences(rows[~inside], y[~inside], components))
        right += (scores.argmax(1) == y[inside][:, None]).sum(0)
        n += int(inside.sum())
    return (right / max(n, 1)).numpy()


def shuffles(
    labels: Labels, topics: Sequence[str], *, n: int = N_SHUFFLES, seed: int = 0
) -> list[Labels]:
    """Labels shuffled within topic, `n` times; the same seed gives the same ones."""
    rng = np.random.default_rng(seed)
    return [stats.shuffle_within(labels, topics, rng) for _ in range(n)]


def against_shuffled(
    statistic: Callable[[Labels], Sequence[float] | Array],
    labels: Labels,
    topics: Sequence[str],
    *,
    n: int = N_SHUFFLES,
    seed: int = 0,
) -> tuple[Array, Array]:
    """A statistic of labelled stories, and the same function of them with their labels shuffled within topic.

    The null goes through every step that gave the value, because it is the same call.

    Args:
        statistic: From the labels of all stories to one or more figures: fit, choose, calibrate and judge inside it.
        n: Shuffles; p cannot be smaller than 1 / (n + 1).

    Returns:
        `[figure]` and `[shuffle figure]`.
    """
    null = [np.asarray(statistic(y), float) for y in shuffles(labels, topics, n=n, seed=seed)]
    return np.asarray(statistic(labels), float), np.stack(null)


def leave_out(topics: Sequence[str]) -> list[tuple[str, ...]]:
    """One topic after the other; sixteen groups where there are many, as `directions.mean_difference` calibrates."""
    names = sorted(set(topics))
    if len(names) < 2:
        raise ValueError(
            f"one topic ({names[0]}) cannot be left out of itself: directions are calibrated by topics that they have not seen"
        )
    return (
        [(t,) for t in names]
        if len(names) <= 64
        else stats.topic_folds(dict.fromkeys(names), n_folds=16)
    )

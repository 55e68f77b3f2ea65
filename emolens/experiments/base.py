"""What every experiment is given and gives back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emolens import stats
from emolens._typing import HookedModel
from emolens.collect.activations import Activations
from emolens.directions.algebra import neutral_components
from emolens.directions.value import EmotionDirections
from emolens.sets.emotion_sets import EmotionSet


@dataclass(frozen=True)
class Row:
    """One figure of a study with everything needed to read it; absent is None."""

    experiment: str
    metric: str
    value: float
    primary: bool = False
    estimator: str | None = None
    readout: str | None = None
    hook: str | None = None
    layer: int | str | None = None
    emotion: str | None = None
    split: str | None = None
    control: str | None = None
    dose: float | None = None
    low: float | None = None
    high: float | None = None
    null_mean: float | None = None
    null_high: float | None = None
    p: float | None = None
    q: float | None = None
    draws: int | None = None
    n: int | None = None
    unit_of_n: str | None = None
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a value that is not a number is absent too."""
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in asdict(self).items()}
        return {
            k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in plain.items()
        }


def row(experiment: str, metric: str, value: float | stats.Estimate, **fields: Any) -> Row:
    """A row from a number or an estimate with its interval."""
    if isinstance(value, stats.Estimate):
        fields |= {"low": value.low, "high": value.high}
        value = value.value
    return Row(experiment, metric, float(value), **fields)


MIN_DRAWS = 100  # of a null; with fewer its 95 % point and p say too little to be printed


def judged(value: float, null: NDArray[np.floating], control: str) -> dict[str, Any]:
    """The fields of a row that say what its null gave: mean, 95 % point, p and number of draws (p is at least 1 / (draws + 1)).

    >>> judged(1.0, np.zeros(199), "shuffled labels")["p"]
    0.005
    >>> judged(1.0, np.zeros(10), "shuffled labels")  # ten draws have no 95 % point
    {'control': 'shuffled labels', 'null_mean': 0.0, 'draws': 10}

    Raises:
        ValueError: no draws.
    """
    null = np.asarray(null, float)
    if not len(null):
        raise ValueError(
            f"no draws of {control}: a null needs at least one, and a p at least {MIN_DRAWS}"
        )
    fields = {"control": control, "null_mean": float(null.mean()), "draws": len(null)}
    if len(null) < MIN_DRAWS:
        return fields
    return fields | {
        "null_high": float(np.percentile(null, 95)),
        "p": stats.permutation_p(value, null),
    }


def find(rows: Sequence[Row], experiment: str, metric: str, **fields: Any) -> list[Row]:
    """Rows of a metric whose fields have the given values."""
    return [
        r
        for r in rows
        if r.experiment == experiment
        and r.metric == metric
        and all(getattr(r, k) == v for k, v in fields.items())
    ]


@dataclass(frozen=True)
class Labelled:
    """Other people's texts: with labels (GoEmotions) or with ratings (EmoBank)."""

    texts: list[str]
    labels: list[set[str]]
    valence: NDArray[np.floating] | None = None
    arousal: NDArray[np.floating] | None = None

    @property
    def sha256(self) -> str:
        """Identity of the texts and what is said of them."""
        said = [
            self.texts,
            [sorted(x) for x in self.labels],
            *(None if a is None else a.tolist() for a in (self.valence, self.arousal)),
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything an experiment may use. `layer` was frozen by cross-validation on the stories."""

    model: HookedModel
    emotions: EmotionSet
    acts: Activations
    directions: EmotionDirections
    layer: int
    seed: int = 0
    full: bool = False
    external: Mapping[str, Labelled] = field(default_factory=dict)

    @cached_property
    def main(self) -> Activations:
        """The stories of the main split."""
        return self.acts.select(lambda t: t.split == "main" and t.emotion is not None)

    @cached_property
    def labels(self) -> NDArray[np.intp]:
        return np.array([self.emotions.names.index(t.emotion or "") for t in self.main.texts])

    @cached_property
    def topics(self) -> list[str]:
        return [t.topic or "" for t in self.main.texts]

    @cached_property
    def texts(self) -> list[str]:
        """The stories themselves, in the order of the rows."""
        return [s.text for _, s in self.emotions.texts()]

    @cached_property
    def family_labels(self) -> NDArray[np.intp]:
        families = sorted(set(self.emotions.families.values()))
        return np.array(
            [families.index(self.emotions.families[t.emotion or ""]) for t in self.main.texts]
        )

    @cached_property
    def folds(self) -> list[tuple[str, ...]]:
        """The outer folds: whole topics that have stories, stratified by person."""
        return stats.topic_folds(self.emotions.told, seed=self.seed)

    def neutral_components(
        self, held_out: tuple[str, ...], share: float = 0.5
    ) -> list[torch.Tensor] | None:
        """Neutral components from the neutral texts of every topic but these; one of a topic without stories is in no fold, so always used.

        Raises:
            ValueError: there are neutral texts, and all of them are of these topics.
        """
        tokens = self.acts.neutral_tokens
        return (
            None
            if tokens is None
            else neutral_components(tokens.select(lambda t: t.topic not in held_out).rows, share)
        )

    def without(self, topics: Sequence[str]) -> Activations:
        """The collection without some topics, as `Activations.without`."""
        return self.acts.without(topics)

    def inner_folds(self, held_out: tuple[str, ...], n_folds: int = 3) -> list[tuple[str, ...]]:
        """Folds of the training topics, for choices that must not see the held-out ones."""
        kept = {t: person for t, person in self.emotions.told.items() if t not in held_out}
        return stats.topic_folds(kept, n_folds=n_folds, seed=self.seed)

"""Activations whose emotions are planted or absent: what every experiment of reading is tried on, without a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _answers import NO_MODEL
from torch import Tensor

import emolens as em
from emolens.collect.activations import Activations, TextInfo
from emolens.collect.histogram import NORM_BINS
from emolens.experiments import fitting as refit
from emolens.experiments.base import Inputs, Stories
from emolens.sets.emotion_sets import Emotion, EmotionSet, Story, Topic
from emolens.sets.external import Labelled

PLANTED = (
    "joy",
    "sadness",
    "anger",
    "fear",
    "disgust",
    "surprise",
)  # words of GoEmotions and of the Glasgow norms
FAMILIES = dict(zip(PLANTED, ("up", "down", "out", "down", "out", "up"), strict=True))
D_MODEL = 48
N_LAYERS = 3
LOUD = 6.0  # spread of neutral text along its two components, and of every text


def planted_set(
    names: tuple[str, ...] = PLANTED, n_topics: int = 8, *, neutral: int = 3
) -> EmotionSet:
    """Emotions in topics of alternating person, two topics told in both persons; texts that say nothing."""
    topics = tuple(
        Topic(name=f"t{k}", person="third" if k % 2 else "first") for k in range(n_topics)
    )
    other, rng = {"first": "third", "third": "first"}, np.random.default_rng(0)

    def story(e: str, t: Topic, split: str) -> Story:
        who = t.person if split == "main" else other[t.person or ""]
        return Story(
            id=f"{e}-{t.name}-{split}",
            topic=t.name,
            person=who,
            text=f"{t.name} {_words(rng)}",
            split=split,
        )  # type: ignore[arg-type]

    stories = {
        e: tuple(story(e, t, "main") for t in topics)
        + tuple(story(e, t, "other_person") for t in topics[:2])
        for e in names
    }
    plain = tuple(
        Story(id=f"plain-{t.name}-{i}", topic=t.name, person=t.person, text=f"plain {t.name} {i}")
        for t in topics
        for i in range(neutral)
    )
    emotions = tuple(
        Emotion(name=e, family=FAMILIES.get(e), norm_key=e, target_words=[e]) for e in names
    )
    return EmotionSet("planted", "en", emotions, topics, stories, plain)


def _words(rng: np.random.Generator) -> str:
    """Words that say nothing of any emotion."""
    return " ".join(rng.choice([f"word{i}" for i in range(20)], 12))


class PlantedWorld:
    """x = common + signal u_emotion + topic + person + a loud neutral part + noise; the emotions are in every layer but the first.

    Args:
        signal: Length of an emotion's vector; 0 plants no effect. 48 dimensions for 36 training stories: whatever is fitted on a text that it
            judges finds that text again, so a leak shows.
        vectors: `[emotion d_model]` in place of random ones.
    """

    def __init__(
        self, emotions: EmotionSet, *, signal: float, seed: int = 0, vectors: Tensor | None = None
    ) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.emotions, self.signal = emotions, signal
        basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=self.g)).Q.T
        self.neutral, self.common = basis[:2], 50 * basis[2]
        k = len(emotions.names)
        drawn = torch.randn(k, D_MODEL - 3, generator=self.g) @ basis[3:]
        self.u = drawn / drawn.norm(dim=-1, keepdim=True) if vectors is None else vectors
        self.topic = {t.name: 0.5 * torch.randn(D_MODEL, generator=self.g) for t in emotions.topics}
        self.person = {p: 0.3 * torch.randn(D_MODEL, generator=self.g) for p in ("first", "third")}

    def rows(self, n: int) -> Tensor:
        """`[text layer d_model]` without any emotion."""
        loud = LOUD * torch.randn(n, N_LAYERS, 2, generator=self.g) @ self.neutral
        return self.common + loud + torch.randn(n, N_LAYERS, D_MODEL, generator=self.g)

    def story(self, emotion: str | None, topic: str, person: str) -> Tensor:
        x = self.rows(1)[0] + self.topic[topic] + self.person[person]
        if emotion is not None:
            x[1:] += self.signal * self.u[self.emotions.names.index(emotion)]
        return x


def planted_activations(world: PlantedWorld) -> Activations:
    """What collecting the set of a world would give: stories, retellings, neutral texts and a sample of their tokens."""
    s, texts, rows = world.emotions, [], []
    for e in s.names:
        for t in s.stories[e]:
            texts.append(TextInfo(t.id, e, t.topic, t.person, t.split, t.id, 100))
            rows.append(world.story(e, t.topic, t.person or "third"))
    for t in s.neutral:
        texts.append(TextInfo(t.id, None, t.topic, t.person, "neutral", t.id, 100))
        rows.append(world.story(None, t.topic, t.person or "third"))
    who = torch.tensor([i for i, t in enumerate(texts) if t.split == "neutral"]).repeat_interleave(
        24
    )
    info = {
        "model": {
            "name": "planted",
            "n_layers": N_LAYERS,
            "fingerprint": "f",
            "process_weights": {},
        },
        "pooling": {"kind": "mean", "skip": 50},
        "set": s.name,
        "set_sha256": "0",
    }
    common: dict[str, Any] = {
        "hook_point": "resid_post", "layers": tuple(range(N_LAYERS)), "texts": tuple(texts), "info": info,
        "norm_histogram": torch.ones(N_LAYERS, NORM_BINS, dtype=torch.int64), "sinks": torch.ones(len(texts), N_LAYERS),
    }  # fmt: skip
    tokens = None
    if len(who):
        x = world.rows(len(who))
        tokens = Activations(
            rows=x,
            embed=x[:, 0],
            row_text=who,
            row_position=torch.arange(len(who)) % 24 * 4 + 1,
            **common,
        )
    x = torch.stack(rows)
    embed = torch.randn(len(x), D_MODEL, generator=world.g)
    return Activations(
        rows=x, embed=embed, row_text=torch.arange(len(x)), row_position=torch.full((len(x),), -1), neutral_tokens=tokens, **common
    )  # fmt: skip


def planted_inputs(
    *,
    signal: float,
    seed: int = 0,
    emotions: EmotionSet | None = None,
    vectors: Tensor | None = None,
    **more: Any,
) -> Inputs:
    """Inputs of an experiment, with layer and directions as a study chooses them; `world` is kept beside them."""
    world = PlantedWorld(emotions or planted_set(), signal=signal, seed=seed, vectors=vectors)
    acts = planted_activations(world)
    s = Stories(world.emotions, acts, seed)
    accuracy = refit.choose_layer(
        s.main.rows, s.labels, s.topics, s.folds, s.neutral_components(())
    )
    layer = acts.layers[int(accuracy.argmax())]
    v = replace(em.mean_difference(acts), layer=layer)
    inputs = Inputs(NO_MODEL, s, v, layer, **more)
    object.__setattr__(inputs, "world", world)
    return inputs


def planted_external(
    inputs: Inputs, monkeypatch: Any, *, signal: float, n: int = 240, seed: int = 0
) -> dict[str, Labelled]:
    """Comments with a label each and sentences with ratings, whose activations hold `signal` of the world's emotions.

    The ratings are those of the emotion's word plus noise. `transfer` collects these activations in place of a model's.
    """
    from emolens.experiments import transfer
    from emolens.sets.norms import load_norms

    world: PlantedWorld = inputs.world  # type: ignore[attr-defined]  # put there by planted_inputs
    names, norms, rng = world.emotions.names, load_norms(), np.random.default_rng(seed)
    kind = rng.integers(len(names), size=n)
    x = world.rows(n)
    x[:, 1:] += signal * world.u[torch.from_numpy(kind)][:, None]
    texts = [f"comment {i} {_words(rng)}" for i in range(n)]
    ratings = {
        axis: np.array([getattr(norms[names[k]], axis) for k in kind]) + rng.normal(size=n)
        for axis in ("valence", "arousal")
    }

    def collected(_: Inputs, given: list[str]) -> Activations:
        kept = torch.tensor([int(t.split()[1]) for t in given])
        infos = tuple(TextInfo(t, None, None, None, "", t, 20) for t in given)
        return replace(
            inputs.stories.acts, rows=x[kept], embed=torch.randn(len(kept), D_MODEL, generator=world.g), row_text=torch.arange(len(kept)),
            row_position=torch.full((len(kept),), -1), texts=infos, sinks=torch.ones(len(kept), N_LAYERS), neutral_tokens=None,
        )  # fmt: skip

    monkeypatch.setattr(transfer, "_collect", collected)
    monkeypatch.setattr(transfer, "readable", lambda model, data: data)
    labelled = Labelled(texts, [{names[k]} for k in kind])
    rated = Labelled(texts, [set() for _ in texts], ratings["valence"], ratings["arousal"])
    return {"goemotions_test.tsv": labelled, "emobank.csv": rated}

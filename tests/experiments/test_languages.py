"""Directions across languages: a planted translation is read, a scrambled one is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from _answers import NO_MODEL

import emolens as em
from emolens.experiments import languages
from emolens.sets.emotion_sets import Emotion, EmotionSet, Story, Topic

CONCEPTS = ("joy", "fear", "anger")
TOPICS = tuple(Topic(name=f"t{k}", person="first" if k % 2 else "third") for k in range(8))


def _set(
    language: str, *, order: tuple[str, ...] = CONCEPTS, topics: tuple[Topic, ...] = TOPICS
) -> EmotionSet:
    emotions = tuple(Emotion(name=f"{c}-{language}", concept=c) for c in order)
    stories = {
        e.name: tuple(
            Story(
                id=f"{e.name}-{t.name}",
                topic=t.name,
                person=t.person,
                text=f"{language} {e.concept} {t.name}",
            )
            for t in topics
        )
        for e in emotions
    }
    return EmotionSet(f"set_{language}", language, emotions, topics, stories, ())


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of a text: its concept's direction, an offset of its language, a little of its topic, and noise.

    "pa" and "pb" tell the same plots (a concept in a topic, loudly) and have no direction of an emotion in common.
    """
    generator = torch.Generator().manual_seed(0)
    d = 64
    direction = {c: torch.randn(d, generator=generator) for c in CONCEPTS}
    own = {
        lang: {c: torch.randn(d, generator=generator) for c in CONCEPTS}
        for lang in ("xx", "pa", "pb")
    }
    offset = {
        lang: 5 * torch.randn(d, generator=generator) for lang in ("en", "de", "xx", "pa", "pb")
    }
    plot = {(c, t.name): 3 * torch.randn(d, generator=generator) for c in CONCEPTS for t in TOPICS}
    topic = {t.name: 0.5 * torch.randn(d, generator=generator) for t in TOPICS}

    def collect(model: Any, s: EmotionSet, **_: Any) -> em.Activations:
        from emolens.collect.activations import TextInfo
        from emolens.collect.histogram import NORM_BINS

        rows, infos = [], []
        for e in s.names:
            for story in s.stories[e]:
                language, concept, t = story.text.split()
                signal = own.get(language, direction)[concept]
                if language in ("pa", "pb"):
                    signal = signal + plot[concept, t]
                noise = 0.3 * torch.randn(2, d, generator=generator)
                rows.append(torch.stack([signal * 0, signal]) + offset[language] + topic[t] + noise)
                infos.append(TextInfo(story.id, e, t, story.person, "main", story.id, 9))
        x = torch.stack(rows)
        n = len(rows)
        return em.Activations(
            hook_point="resid_post", layers=(3, 7), rows=x, embed=torch.randn(n, d, generator=generator), row_text=torch.arange(n),
            row_position=torch.full((n,), -1), texts=tuple(infos), norm_histogram=torch.ones((2, NORM_BINS), dtype=torch.int64),
            sinks=torch.ones((n, 2)), info={"model": {"n_layers": 8}, "set": None},
        )  # fmt: skip

    monkeypatch.setattr(languages, "collect_resid_post", collect)


def test_a_shared_direction_is_read_in_the_other_language_and_a_private_one_is_not(
    planted: None,
) -> None:
    found = em.compare_languages(NO_MODEL, [_set("en"), _set("de"), _set("xx")], n_shuffles=100)
    accuracy = found.matrix()
    assert (accuracy[:2, :2] > 0.95).all()
    assert accuracy[2, 2] > 0.95
    assert (accuracy[[0, 1], 2] < 0.8).all()
    assert set(found.layers["en"]) == {7}  # the layer that holds anything
    reference = found.matrix(readout="training reference")
    assert reference[0, 1] < accuracy[0, 1]  # the offset between languages is read as an emotion
    cell = next(r for r in found.rows if r.primary and r.split == "en -> de")
    assert cell.p is not None
    assert cell.p < 0.05
    assert cell.null_mean == pytest.approx(1 / 3, abs=0.1)  # chance
    assert np.isnan(found.matrix(control="tfidf")[0, 1])
    assert found.matrix(control="embed").shape == (3, 3)
    assert not np.isnan(found.matrix(control="form")).any()
    same = {r.split: r for r in found.rows if r.metric == "cosine of the same emotion"}
    assert same["en -> de"].value > 0.9
    assert "n.s." in repr(found)
    assert "en      " in repr(found)


def test_plots_that_two_languages_share_are_no_direction_that_they_share(planted: None) -> None:
    """Both sides fitted on the same topics, the plots of parallel stories alone give a cosine."""
    found = em.compare_languages(NO_MODEL, [_set("pa"), _set("pb")], n_shuffles=20)
    same = {r.split: r for r in found.rows if r.metric == "cosine of the same emotion"}
    across = same["pa -> pb"]
    assert across.value == pytest.approx(0, abs=0.1)
    assert across.readout == "other topics"
    assert same["pa -> pa"].value > 0.3  # a direction that is there is found on either half
    assert set(same) == {"pa -> pa", "pa -> pb", "pb -> pb"}


def test_concepts_line_up_whatever_the_order_of_the_emotions(planted: None) -> None:
    shuffled = _set("de", order=("anger", "joy", "fear"))
    found = em.compare_languages(NO_MODEL, [_set("en"), shuffled], n_shuffles=20)
    assert (found.matrix() > 0.95).all()


def test_sets_that_share_too_little_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"two or more sets of different languages, got \['en', 'en'\]"
    ):
        em.compare_languages(NO_MODEL, [_set("en"), _set("en")])
    with pytest.raises(ValueError, match="share 3 concepts and 2 topics"):
        em.compare_languages(NO_MODEL, [_set("en"), _set("de", topics=TOPICS[:2])])
    other = _set("de")
    other = replace(
        other, emotions=tuple(e.model_copy(update={"concept": None}) for e in other.emotions)
    )
    with pytest.raises(ValueError, match="share 0 concepts"):
        em.compare_languages(NO_MODEL, [_set("en"), other])

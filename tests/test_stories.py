"""Stories by the model itself: the same texts however often it was interrupted, and nothing dropped in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import emolens as em
from emolens import stories as generation
from emolens.models.identity import present_info
from emolens.sets import Emotion, EmotionSet, Topic, load_emotion_set
from emolens.stories import judge, parse_story

GOOD = (
    "The kettle was on the table and nobody had put it there. She walked to the window, counted four buses in the rain, and came back "
    "to find the chair turned round. Outside a man was selling umbrellas from a pram. Her brother had the only other key."
)


SHORT = em.Decoding(12, temperature=0.9, top_p=0.95)


@pytest.fixture
def toy(toy_set: Path) -> EmotionSet:
    return load_emotion_set(toy_set)


def _write(model: Any, toy: EmotionSet, out: Path, **more: Any) -> generation.Written:
    options = {
        "emotions": ["glimmer", "brindle"],
        "topics": ["kitchen", "train"],
        "per_topic": 2,
        "batch_size": 3,
        "decoding": SHORT,
    }
    return em.write_stories(model, toy, out=out, progress=False, **(options | more))


def test_prompts_name_topic_person_and_feeling_and_run_nothing(toy: EmotionSet) -> None:
    first, *_ = prompts = em.story_prompts(
        toy, per_topic=2, emotions=["glimmer"], topics=["kitchen", "harbour"]
    )
    assert [p.id for p in prompts] == [
        f"glimmer-{t}-{k}" for t in ("kitchen", "harbour") for k in (1, 2)
    ]
    assert (
        first.prompt
        == "Write a short story about at the kitchen in the first person in which someone is glimmering."
    )
    hostile = toy.emotions[0].model_copy(
        update={"prompts": ["{topic.__class__} {0} {person!r} {adjective}"]}
    )
    odd = EmotionSet("odd", "en", (hostile, *toy.emotions[1:]), toy.topics, toy.stories, ())
    assert (
        em.story_prompts(odd, emotions=["glimmer"])[0].prompt
        == "{topic.__class__} {0} {person!r} glimmering"
    )


def test_prompts_that_cannot_be_made_say_why(toy: EmotionSet) -> None:
    with pytest.raises(KeyError, match="unknown topic 'kitchn'; did you mean 'kitchen'"):
        em.story_prompts(toy, topics=["kitchn"])
    with pytest.raises(KeyError, match="unknown emotion 'glimer'"):
        em.story_prompts(toy, emotions=["glimer"])
    with pytest.raises(ValueError, match="per_topic=0; at least 1"):
        em.story_prompts(toy, per_topic=0)
    mute = EmotionSet(
        "mute",
        "en",
        (Emotion(name="a"), Emotion(name="b")),
        (Topic(name="t", person="first"),),
        {"a": (), "b": ()},
        (),
    )
    with pytest.raises(ValueError, match="emotion 'a' of set 'mute' has no prompts"):
        em.story_prompts(mute)


def test_prompts_of_a_joined_set_have_its_long_topic_names(toy: EmotionSet) -> None:
    topic = toy.topics[0].model_copy(update={"name": f"{'s' * 80}/kitchen"})
    first, *_ = em.story_prompts(replace(toy, topics=(topic,)))
    assert first.topic == topic.name


def test_an_interrupted_run_goes_on_to_the_same_files(
    tiny_model: Any, toy: EmotionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _write(tiny_model, toy, tmp_path / "whole")
    real, calls = generation.generate, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["items"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(generation, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        _write(tiny_model, toy, tmp_path / "cut")
    assert sorted(p.name for p in (tmp_path / "cut" / "texts").iterdir()) == ["00000.json"]
    again = _write(tiny_model, toy, tmp_path / "cut")
    assert [list(c) for c in calls] == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [6, 7]]
    assert again.counts == whole.counts
    files = sorted(
        p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()
    )
    assert files == sorted(
        p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*") if p.is_file()
    )
    for file in files:
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (
            file
        )


def test_a_broken_batch_is_written_again_and_another_run_is_refused(
    tiny_model: Any, toy: EmotionSet, tmp_path: Path
) -> None:
    _write(tiny_model, toy, tmp_path / "run")
    file = tmp_path / "run" / "texts" / "00001.json"
    before = file.read_bytes()
    file.write_text('{"made_by": "glimmer-kitchen-1"', encoding="utf-8")
    _write(tiny_model, toy, tmp_path / "run")
    assert file.read_bytes() == before
    with pytest.raises(
        FileExistsError, match=r"already holds another run \(differs in: seed, temperature\)"
    ):
        _write(tiny_model, toy, tmp_path / "run", decoding=em.Decoding(12, 0.5, 0.95, seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is not empty and holds no run of this kind"):
        _write(tiny_model, toy, tmp_path / "mine")


def test_an_item_has_the_same_noise_in_any_batch(tiny_model: Any) -> None:
    prompts = ["The door", "He had counted", "I put"]
    together = em.generate(
        tiny_model, prompts, decoding=em.Decoding(8, 1.0, seed=3), items=[4, 9, 2]
    )
    alone = em.generate(tiny_model, prompts[1], decoding=em.Decoding(8, 1.0, seed=3), items=[9])
    other = em.generate(tiny_model, prompts[1], decoding=em.Decoding(8, 1.0, seed=3), items=[1])
    assert together.tokens[1] == alone.tokens[0] != other.tokens[0]
    with pytest.raises(
        ValueError, match=r"items=\[1\]: one number, 0 or more, for each of the 3 prompts"
    ):
        em.generate(tiny_model, prompts, items=[1])


def test_every_text_is_counted_once_and_the_set_is_balanced(
    toy: EmotionSet, tmp_path: Path
) -> None:
    prompts = em.story_prompts(
        toy, per_topic=2, emotions=["glimmer", "brindle"], topics=["kitchen", "train"]
    )
    texts = {p.id: f"{GOOD} It was {k} o'clock by my watch." for k, p in enumerate(prompts, 1)}
    texts["glimmer-kitchen-2"] = "I'm sorry, but I cannot write that."
    texts["glimmer-train-1"] = GOOD + " I was glimmering all day."
    texts["brindle-train-2"] = texts["brindle-train-1"]
    texts["brindle-kitchen-1"] = "Too short."
    del texts["brindle-kitchen-2"]
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"id": k, "text": v, "usage": 3}) + "\n" for k, v in texts.items()),
        encoding="utf-8",
    )
    options: dict[str, Any] = {
        "per_topic": 2,
        "emotions": ["glimmer", "brindle"],
        "topics": ["kitchen", "train"],
    }
    made = em.import_texts(
        file, toy, out=tmp_path / "out", writer="an engine", lengths=(20, 120), **options
    )
    assert made.counts == {
        "asked": 8, "kept": 2, "refusal": 1, "set aside": 1, "names the emotion": 1, "too short": 1, "missing": 1, "duplicate": 1,
    }  # fmt: skip
    assert sum(made.counts.values()) - made.counts["asked"] == made.counts["asked"]
    dropped = [
        json.loads(line)
        for line in (tmp_path / "out" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {d["id"]: d["reason"] for d in dropped}["brindle-kitchen-2"] == "missing"
    assert len(dropped) == 6
    s = load_emotion_set(tmp_path / "out" / "set")
    assert made.emotions is not None
    assert s.fingerprint == made.emotions.fingerprint == s.sha256
    assert [t.name for t in s.topics] == ["train"]  # in the kitchen one emotion has nothing
    assert {e: [x.id for x in s.stories[e]] for e in s.names} == {
        "glimmer": ["glimmer-train-2"],
        "brindle": ["brindle-train-1"],
    }
    assert "Written by an engine" in s.source
    assert "2 of 8 kept" in s.source


def test_where_nothing_is_usable_there_is_no_set_but_the_reasons(
    toy: EmotionSet, tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"id": "glimmer-kitchen-1", "text": ""}\n', encoding="utf-8")
    made = em.import_texts(
        file,
        toy,
        out=tmp_path / "out",
        writer="x",
        emotions=["glimmer", "brindle"],
        topics=["kitchen"],
    )
    assert made.emotions is None
    assert made.counts == {"asked": 2, "too short": 1, "missing": 1}
    assert not (tmp_path / "out" / "set").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"id": "glimmer-kitchen-9", "text": "x"}',
            "text 1: unknown prompt id 'glimmer-kitchen-9'; did you mean",
        ),
        ('{"id": "glimmer-kitchen-1"}', r"texts\.jsonl:1: text: field required"),
        (
            '{"id": "glimmer-kitchen-1", "text": "x"}\n' * 2,
            "the id 'glimmer-kitchen-1' is there twice",
        ),
        ("no json", r"texts\.jsonl:1: not valid JSON"),
    ],
)
def test_texts_that_were_not_asked_for_are_named(
    toy: EmotionSet, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        em.import_texts(file, toy, out=tmp_path / "out", writer="x")


def test_exported_prompts_come_back_by_their_ids(toy: EmotionSet, tmp_path: Path) -> None:
    prompts = em.story_prompts(toy)
    em.export_prompts(prompts, tmp_path / "prompts.jsonl")
    lines = [
        json.loads(line)
        for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["id"] for line in lines] == [p.id for p in prompts]
    assert set(lines[0]) == {"id", "emotion", "topic", "person", "prompt"}


@pytest.mark.parametrize(
    ("raw", "language", "story"),
    [
        ("**Title**\n\nHe lit it.\n\nIt was late.", "en", "He lit it. It was late."),
        ("Here is a story:\nShe left. Then he", "en", "She left."),
        ('# The Lamp\n"Go," she said. He went.', "en", '"Go," she said. He went.'),
        ("One two three. Four five six seven.", "en", "One two three."),
        ("以下是故事：\n他点了灯。天已经黑了。他", "zh", "他点了灯。"),
        ("no sentence at all", "en", ""),
    ],
)
def test_a_story_is_cut_out_of_what_a_model_says_around_it(
    raw: str, language: str, story: str
) -> None:
    assert parse_story(raw, language, 6) == story


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("I cannot write this story. " + GOOD, "refusal"),
        ("A dog barked.", "too short"),
        ("Der Kessel stand auf dem Tisch, und niemand hatte ihn dorthin gestellt. Sie ging zum Fenster, sah auf die Straße hinaus und kam zurück.", "wrong language"),
        (GOOD + " It was glimmeringly plain.", "names the emotion"),
        ("She went to the door and came back again. " * 6, "repetition"),
    ],
)  # fmt: skip
def test_each_reason_to_drop_a_text_is_found(
    toy: EmotionSet, text: str, reason: str | None
) -> None:
    assert judge(text, text, toy, "glimmer", (20, 150)) == reason


def test_a_story_in_the_other_person_is_dropped_and_speech_does_not_count(toy: EmotionSet) -> None:
    said = GOOD + ' "I saw it," she said.'
    assert judge(said, said, toy, "glimmer", (20, 150), "third") is None
    assert judge(said, said, toy, "glimmer", (20, 150), "first") == "wrong person"
    own = GOOD + " I saw it."
    assert judge(own, own, toy, "glimmer", (20, 150), "third") == "wrong person"
    assert judge(own, own, toy, "glimmer", (20, 150), "first") is None


@pytest.mark.real
def test_smollm2_writes_english_to_a_prompt_of_core(real_model: Any, tmp_path: Path) -> None:
    made = em.write_stories(
        real_model, "core", out=tmp_path / "own", emotions=["joy", "fear"], topics=["supper"], decoding=em.Decoding(60, 0.9, 0.95), lengths=(20, 60), progress=False
    )  # fmt: skip
    assert made.counts["asked"] == 2
    assert sum(made.counts.values()) == 4  # each of the two has one fate
    (file,) = (tmp_path / "own" / "texts").iterdir()
    for text in json.loads(file.read_text(encoding="utf-8"))["result"]:
        assert len(text.split()) > 10


def test_stories_are_not_gone_on_with_under_another_chat_template(
    tiny_model: Any, toy: EmotionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tiny_model, toy, tmp_path / "run")
    template = tiny_model.tokenizer.chat_template
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", template.replace("[{{", "<{{"))
    with pytest.raises(
        FileExistsError, match=r"already holds another run \(differs in: tokenization\)"
    ):
        _write(tiny_model, toy, tmp_path / "run")


def test_stories_are_not_gone_on_with_after_an_edit_of_the_weights(
    tiny_model: Any, toy: EmotionSet, tmp_path: Path
) -> None:
    _write(tiny_model, toy, tmp_path / "run")
    tensor = next(tiny_model.unembed.parameters())
    kept = tensor.detach().clone()
    try:
        with torch.no_grad():
            tensor *= 1.5
        with pytest.raises(
            FileExistsError, match=r"already holds another run \(differs in: fingerprint\)"
        ):
            _write(tiny_model, toy, tmp_path / "run")
    finally:
        with torch.no_grad():
            tensor.copy_(kept)
        present_info(tiny_model)

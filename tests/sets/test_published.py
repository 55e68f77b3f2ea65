"""Other people's corpora: tiny files of the same form, made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import emolens as em

PLAIN = "The {0} stood by the door for the third time that week and the {1} was on the table where it had been left since Monday morning."


def _probes(
    folder: Path, *, emotions: tuple[str, ...] = ("joyful", "afraid", "peckish"), drop: str = ""
) -> Path:
    """expression/stories.parquet and neutral_stories.parquet with the columns of the hub's files."""
    datasets = pytest.importorskip("datasets", reason="transformer-lens brings it")
    topics = [
        "A neighbor wants to install a fence",
        "A very long topic " + "that goes on and on " * 5,
        "Zoo",
    ]
    rows = [
        {"emotion": e, "topic": t, "story": PLAIN.format(f"{e} {k}", t[:5])}
        for e in emotions
        for t in topics
        for k in range(3 if t != "Zoo" else 1 + (e == "afraid"))
    ]
    flat = [
        {"topic": t, "story": PLAIN.format("man", k)}
        for t in [*topics, "Elsewhere"]
        for k in range(2)
    ]
    (folder / "expression").mkdir(parents=True)
    for name, data in (("stories", rows), ("neutral_stories", flat)):
        kept = [{k: v for k, v in r.items() if k != drop} for r in data]
        datasets.Dataset.from_list(kept).to_parquet(str(folder / "expression" / f"{name}.parquet"))
    return folder


def test_emotion_probes_become_a_balanced_set_with_norms(tmp_path: Path) -> None:
    s = em.sets.load_emotion_probes(_probes(tmp_path / "probes"), per_topic=2)
    assert s.names == ("afraid", "joyful", "peckish")
    assert [len(s.stories[e]) for e in s.names] == [
        5,
        5,
        5,
    ]  # two, two, and one at the zoo, where one emotion has no more
    assert s["afraid"].concept == "fear"  # from emotions171, with its norms
    assert s["afraid"].norm_key == "afraid"
    assert s["peckish"].norm_key is None
    assert s.topics[0].description == "A neighbor wants to install a fence"
    assert {t.person for t in s.topics} == {"mixed"}
    assert len(s.neutral) == 6
    assert "CC BY 4.0" in s.source
    assert "21 stories" not in s.source  # nothing is guessed: 22 were read
    assert "22 stories of 3 emotions read; 15 used" in s.source
    em.save_emotion_set(s, tmp_path / "saved")
    assert em.load_emotion_set(tmp_path / "saved").fingerprint == s.fingerprint


def test_some_emotions_and_topics_of_emotion_probes(tmp_path: Path) -> None:
    folder = _probes(tmp_path / "probes")
    s = em.sets.load_emotion_probes(folder, emotions=["peckish", "afraid"], topics=1, neutral=1)
    assert (s.names, len(s.topics), len(s.neutral)) == (("afraid", "peckish"), 1, 1)
    with pytest.raises(ValueError, match="unknown emotion 'afrad'; did you mean 'afraid'"):
        em.sets.load_emotion_probes(folder, emotions=["afrad", "afraid", "joyful"])


def test_files_that_are_not_emotion_probes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        em.sets.load_emotion_probes(tmp_path)
    with pytest.raises(ValueError, match="column 'story' is missing or not text; found"):
        em.sets.load_emotion_probes(_probes(tmp_path / "other", drop="story"))


def _emovec(folder: Path, topics: dict[str, list[str]]) -> Path:
    """stories.jsonl deep in a folder, prompts.jsonl above it, as EmoVecLLM lays them out."""
    deep = folder / "stories" / "abc123" / "Qwen"
    deep.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for e, told in topics.items():
        for k, t in enumerate(told):
            segments = [PLAIN.format(f"{e} {t} {n}", "lamp") for n in range(2)] + ["[story 3]"]
            lines.append({"job_id": f"{e}-{k}", "kind": "emotion_story", "emotion": e, "topic": t, "topic_idx": k, "segments": segments, "raw": "x"})  # fmt: skip
    talk = "You are brief.\n\nHuman: What is 2 plus 2?\n\nAssistant: It is 4.\n\nHuman: And 3?\n\nAssistant: Then 5."
    lines.append({"job_id": "n-0", "kind": "neutral_dialogue", "emotion": None, "topic": "sums", "segments": [talk, "no turns"], "raw": talk})  # fmt: skip
    (deep / "stories.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8"
    )
    jobs = [{"job_id": x["job_id"], "kind": x["kind"], "seed": 1} for x in lines] + [
        {"job_id": "lost", "kind": "x"}
    ]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in jobs), encoding="utf-8"
    )
    return deep


def test_emovecllm_segments_become_stories_of_the_shared_topics(tmp_path: Path) -> None:
    s = em.sets.load_emovecllm(
        _emovec(tmp_path, {"joyful": ["a fence", "a ring"], "sad": ["a fence", "a will"]})
    )
    assert [t.description for t in s.topics] == ["a fence", "sums"]
    assert {e: len(s.stories[e]) for e in s.names} == {"joyful": 2, "sad": 2}
    (dialogue,) = s.neutral
    assert (
        dialogue.text
        == "Human: What is 2 plus 2?\nAssistant: It is 4.\nHuman: And 3?\nAssistant: Then 5."
    )
    assert "1 of its prompts without one" in s.source
    assert "14 segments" in s.source
    assert "5 left out" in s.source
    assert s.source.endswith("4 used")


def test_emovecllm_without_shared_topics_is_refused_or_kept_by_name(tmp_path: Path) -> None:
    folder = _emovec(tmp_path, {"joyful": ["a fence"], "sad": ["a will"]})
    with pytest.raises(ValueError, match="no topic is told for every one of its 2 emotions, so a topic can be read as the emotion"):  # fmt: skip
        em.sets.load_emovecllm(folder)
    s = em.sets.load_emovecllm(folder, unshared="keep")
    assert {e: len(s.stories[e]) for e in s.names} == {"joyful": 2, "sad": 2}

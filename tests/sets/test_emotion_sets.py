"""What an emotion set is: its parts, subsets, fingerprint, and sets that are joined."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _sets import (
    Edit,
    change_first_story,
    load,
    make_spec,
    make_story,
    prose,
    write,
    write_files,
)

from emolens import sets as es
from emolens import stats


@pytest.fixture
def small(tmp_path: Path) -> es.EmotionSet:
    return es.load_emotion_set(write_files(tmp_path / "small").parent)


def test_the_room_shows_what_a_person_who_edits_sets_wants_and_no_files() -> None:
    assert dir(es) == sorted(es.__all__)
    assert {"load_emotion_set", "save_emotion_set", "check_emotion_set", "Story"} <= set(dir(es))
    assert not {"corpus", "open_corpus", "set_files", "check_shipped"} & set(dir(es))


def test_a_story_in_the_other_person_is_kept_apart_by_its_split(tmp_path: Path) -> None:
    def edit(spec: dict[str, Any]) -> None:
        other = make_story("joy", "kitchen", "third", 55) | {
            "id": "joy-kitchen-other",
            "split": "other_person",
        }
        spec["emotions"][0]["stories"].append(other)

    s = load(tmp_path, edit)
    assert [t.id for _, t in s.texts("other_person")] == ["joy-kitchen-other"]
    assert len(s.texts()) == 12


def test_an_emotion_that_is_not_there_names_the_nearest(small: es.EmotionSet) -> None:
    with pytest.raises(KeyError, match=r"unknown emotion 'sadnes'; did you mean 'sadness'\?"):
        small["sadnes"]


def test_a_subset_keeps_its_order_and_drops_antonyms_and_the_frozen_hash(
    small: es.EmotionSet,
) -> None:
    part = replace(small, sha256="0" * 64).subset(["fear", "joy"])
    assert part.names == ("fear", "joy")
    assert part["joy"].antonym is None
    assert part.sha256 is None
    assert set(part.stories) == {"fear", "joy"}
    assert small.subset(["joy", "sadness"])["joy"].antonym == "sadness"
    assert small.names == ("joy", "sadness", "fear")


def test_a_subset_of_less_than_two_or_of_unknown_emotions_is_an_error(small: es.EmotionSet) -> None:
    for names in (["joy"], ["joy", "joy"]):
        with pytest.raises(ValueError, match=r"a set needs at least two emotions, each once"):
            small.subset(names)
    with pytest.raises(KeyError, match=r"unknown emotion 'rage'"):
        small.subset(["joy", "rage"])


def test_the_fingerprint_does_not_depend_on_the_order_of_emotions_and_stories(
    tmp_path: Path,
) -> None:
    before = load(tmp_path).fingerprint

    def turn_round(spec: dict[str, Any]) -> None:
        spec["emotions"].reverse()
        spec["topics"].reverse()
        for emotion in spec["emotions"]:
            emotion["stories"].reverse()

    assert load(tmp_path, turn_round).fingerprint == before
    assert re.fullmatch(r"[0-9a-f]{64}", before)


def test_the_fingerprint_changes_with_any_text_and_with_whose_it_is(
    tmp_path: Path, small: es.EmotionSet
) -> None:
    def swap(spec: dict[str, Any]) -> None:
        a, b = (spec["emotions"][i]["stories"][1] for i in (0, 1))
        a["text"], b["text"] = b["text"], a["text"]

    edits: list[Edit | None] = [
        None,
        change_first_story(0, text=prose(0) + "."),
        change_first_story(2, text=prose(99)),
        swap,
    ]
    found = [load(tmp_path, edit).fingerprint for edit in edits]
    found.append(small.fingerprint)  # with neutral texts
    dialogue = tmp_path / "small" / "neutral" / "dialogues.jsonl"
    dialogue.write_text(
        dialogue.read_text(encoding="utf-8").replace('"A"', '"Ann"'), encoding="utf-8"
    )
    found.append(es.load_emotion_set(tmp_path / "small").fingerprint)
    assert len(set(found)) == len(found)


def test_told_are_the_topics_that_have_stories(toy_set: Path) -> None:
    s = es.load_emotion_set(toy_set)
    more = replace(s, topics=(es.Topic(name="apart", person="third"), *s.topics))
    assert list(more.story_topics) == [t.name for t in s.topics]
    assert more.story_topics["kitchen"] == "first"


def _messages(folder: Path, **change: Any) -> Path:
    """A set as people write: the small set's emotions in other topics of no person, twice in each, short, and free to name its emotion."""
    spec = make_spec() | {
        "name": "messages",
        "length": [8, 60],
        "topics": [{"name": t, "person": "mixed"} for t in ("chat", "diary", "train")],
    }
    for e, emotion in enumerate(spec["emotions"]):
        emotion["stories"] = [
            make_story(emotion["name"], topic, "mixed", 100 + 20 * e + 5 * t + k) | {"id": f"{emotion['name']}-{topic}-{k}", "text": prose(100 + 20 * e + 5 * t + k, 12), "may_name": k == 0}
            for t, topic in enumerate(("chat", "diary", "train"))
            for k in range(2)
        ]  # fmt: skip
    return write(folder, spec | change).parent


def test_joined_sets_keep_their_topics_apart_and_say_where_a_text_is_from(
    tmp_path: Path, small: es.EmotionSet
) -> None:
    both = es.load_emotion_set([tmp_path / "small", _messages(tmp_path / "messages")])
    assert (both.name, both.names, both.sha256) == ("small+messages", small.names, None)
    assert both.story_topics == {
        "small/kitchen": "first", "small/train": "third", "small/garden": "first", "small/office": "third",
        "messages/chat": "mixed", "messages/diary": "mixed", "messages/train": "mixed",
    }  # fmt: skip
    assert Counter(t.source for _, t in both.texts()) == {"small": 12, "messages": 18}
    assert {t.name: t.length for t in both.topics}["messages/chat"] == (8, 60)
    assert {t.name: t.length for t in both.topics}["small/train"] is None
    assert [n.id for n in both.neutral] == [f"small/{n.id}" for n in small.neutral]
    assert {n.source for n in both.neutral} == {"small"}
    assert [t.text for t in both.stories["joy"][:4]] == [t.text for t in small.stories["joy"]]
    assert small.stories["joy"][0].source == ""


def test_folds_of_a_joined_set_take_topics_of_every_source() -> None:
    folds = stats.topic_folds(es.load_emotion_set("core2+core").story_topics)
    for fold in folds:
        assert Counter(t.partition("/")[0] for t in fold) == {"core2": 4, "core": 4}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["core"], r"two or more of different names, got \['core'\]"),
        (["core", "core"], r"two or more of different names"),
        (["core", "core_de"], r"'core' is in 'en' and 'core_de' in 'de'; join one language"),
        (
            ["core", "plutchik8"],
            r"do not have the same emotions: only 'core' has 'acceptance' \(and 15 more differ\)",
        ),
    ],
)
def test_sets_that_do_not_go_together_are_not_joined(sets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        es.load_emotion_set(sets)


def test_sets_that_share_a_text_are_not_joined() -> None:
    """Under two topics it would be learnt from in one and judged in the other."""
    core = es.load_emotion_set("core")
    with pytest.raises(
        ValueError,
        match=r"'core' and 'plutchik8' share a text \('joy-supper' and 231 more\); each text once",
    ):
        es.join_emotion_sets(
            [core.subset(es.load_emotion_set("plutchik8").names), es.load_emotion_set("plutchik8")]
        )
    with pytest.raises(ValueError, match=r"'core2\+core' and 'core' share a text"):
        es.join_emotion_sets([es.load_emotion_set("core2+core"), core])
    with pytest.raises(ValueError, match=r"'core' is loaded already; .*join_emotion_sets"):
        es.load_emotion_set(["core2", core])  # type: ignore[list-item]  # what a person may try


def test_a_set_with_a_slash_in_its_name_is_not_joined(tmp_path: Path, small: es.EmotionSet) -> None:
    """The source of its texts would be what stands before the slash."""
    odd = es.load_emotion_set(_messages(tmp_path / "odd", name="a/b"))
    for sets in ([odd, small], [small, odd]):
        with pytest.raises(ValueError, match=r"no slash in its name, got 'a/b'.*name='a-b'"):
            es.join_emotion_sets(sets)
    joined = es.join_emotion_sets([small, replace(odd, name="a-b")])
    assert {t.source for _, t in joined.texts()} == {"small", "a-b"}

"""Checks of a set as stimuli: each rule is broken alone and found; the shipped data breaks none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _sets import Edit, change_first_story, load, prose, write_files

from emolens import sets as es
from emolens._files import data_root
from emolens.sets import check as sc
from emolens.sets import norms as norms_room


@pytest.fixture
def small(tmp_path: Path) -> es.EmotionSet:
    return es.load_emotion_set(write_files(tmp_path / "small").parent)


def test_a_sound_set_has_no_violations_and_its_numbers_are_told(small: es.EmotionSet) -> None:
    check = sc.check_emotion_set(small)
    assert check.violations == ()
    assert check.numbers["emotions"] == "3"
    assert check.numbers["topics"] == "4 (2 first person)"
    assert check.numbers["stories"] == "12 main, 0 in the other person"
    assert check.numbers["neutral texts"] == "1 stories, 1 dialogues"
    assert check.numbers["length"] == "median 90 words, 90 to 90"
    assert check.numbers["sha256 of the texts"] == small.fingerprint[:16]
    assert "information, not a rule" in check.numbers["TF-IDF accuracy, emotions"]


VIOLATIONS: dict[str, tuple[Edit, str]] = {
    "too short": (change_first_story(0, text=prose(33, 79)), r"joy-kitchen: 79 words; allowed 80 to 120"),
    "too long": (change_first_story(0, text=prose(33, 121)), r"joy-kitchen: 121 words; allowed 80 to 120"),
    "leak": (change_first_story(1, text=prose(33) + " saddened"), r"sadness-kitchen: names the emotion: saddened"),
    "near-duplicate": (
        lambda s: s["emotions"][1]["stories"][0].update(text="Once " + s["emotions"][0]["stories"][0]["text"]),
        r"joy-kitchen and sadness-kitchen: character 5-gram Jaccard 0\.9\d \(allowed below 0\.25\)",
    ),
    "opening": (
        lambda s: [e["stories"][0].update(text=f"At Night the train {prose(60 + i)}") for i, e in enumerate(s["emotions"][:2])],
        r"joy-kitchen, sadness-kitchen: the same 4 opening words",
    ),
    "frozen": (lambda s: s.update(sha256="0" * 64), r"the texts are not the frozen ones: sha256 \w{64}, set\.yaml says 0{64}"),
    "person": (
        lambda s: (
            s["topics"][0].update(person="third"),
            [e["stories"][0].update(person="third") for e in s["emotions"]],
        ),
        r"grammatical person is not balanced: 3 first-person, 9 third-person stories",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", VIOLATIONS)
def test_each_kind_of_violation_is_found_alone(tmp_path: Path, what: str) -> None:
    edit, message = VIOLATIONS[what]
    violations = sc.check_emotion_set(load(tmp_path, edit)).violations
    assert len(violations) == 1, violations
    assert re.fullmatch(message, violations[0])


def test_the_right_frozen_hash_is_no_violation(tmp_path: Path) -> None:
    right = load(tmp_path).fingerprint
    assert sc.check_emotion_set(load(tmp_path, lambda s: s.update(sha256=right))).violations == ()


@pytest.mark.parametrize(("language", "shortest"), [("zh", 120), ("ja", 160)])
def test_chinese_and_japanese_are_counted_in_characters(
    tmp_path: Path, language: str, shortest: int
) -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["language"] = language
        for e, emotion in enumerate(spec["emotions"]):
            for t, story in enumerate(emotion["stories"]):
                n = shortest - 1 - (e == t == 0)  # one story is a character short
                # characters of its own and one that all share: length is all there is to find
                own = (chr(0x4E00 + 400 * (4 * e + t) + i) for i in range(n))
                kana = "のはをにが" if language == "ja" else ""  # what tells Japanese from Chinese
                story["text"] = (
                    "".join(kana[i % 5] if kana and i % 2 else c for i, c in enumerate(own)) + "。"
                )

    s = load(tmp_path, edit)
    assert sc.check_emotion_set(s).violations == (
        f"joy-kitchen: {shortest - 1} characters; allowed {shortest} to {sc.LENGTHS[language][1]}",
    )


def test_with_few_topics_tfidf_is_not_computed_and_says_so(tmp_path: Path) -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["topics"] = spec["topics"][:2]
        for emotion in spec["emotions"]:
            emotion["stories"] = emotion["stories"][:2]

    numbers = sc.check_emotion_set(load(tmp_path, edit)).numbers
    assert numbers["TF-IDF accuracy"] == "not computed (fewer than four topics)"


@pytest.mark.parametrize("name", es.list_emotion_sets())
def test_every_shipped_set_is_frozen_and_breaks_none_of_its_own_rules(name: str) -> None:
    s = es.load_emotion_set(name)
    assert sc.check_emotion_set(s, words=False).violations == ()
    own = (data_root() / name / "set.yaml").read_text(encoding="utf-8")
    assert (
        s.sha256 is not None or "extends:" in own
    )  # a view without texts of its own is as frozen as its set


def test_a_phrase_in_many_texts_and_a_text_in_another_language_are_violations(
    tmp_path: Path,
) -> None:
    def edit(spec: dict[str, Any]) -> None:
        for k, e in enumerate(spec["emotions"][:2]):
            e["stories"][0]["text"] = prose(90 + k, 84) + " and his heart was hammering on"
        german = (
            "Der Zug hielt, und niemand stieg aus, weil der Bahnsteig unter Wasser stand und das Licht nicht ging. "
            * 5
        )
        spec["emotions"][2]["stories"][1]["text"] = german

    violations = sc.check_emotion_set(load(tmp_path, edit), words=False).violations
    assert len(violations) == 2
    assert "2 of 12 texts have the stock phrase /heart (was |is )?(hammer" in violations[0]
    assert violations[0].endswith("joy-kitchen, sadness-kitchen")
    assert violations[1] == "fear-train: reads as 'de', the set says 'en'"


def test_a_neutral_speaker_who_answers_themselves_is_a_violation(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "small").parent
    file = folder / "neutral" / "dialogues.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"B"', '"A"'), encoding="utf-8")
    violations = sc.check_emotion_set(es.load_emotion_set(folder), words=False).violations
    assert "talk-1: a speaker answers themselves" in violations


def test_norms_are_counted_by_the_form_that_the_table_has(small: es.EmotionSet) -> None:
    numbers = sc.coverage(small)
    assert numbers["norms, Glasgow"] == "2 exact, 1 by a related form, 0 without"  # afraid for fear
    assert norms_room.norm_of(small["fear"])[1] == "related"
    assert norms_room.norm_of(es.Emotion(name="zorb")) == (None, None)


def test_a_set_of_words_and_no_texts_breaks_rules_and_is_told_so(tmp_path: Path) -> None:
    """Stories too short for any run of words or characters: a crash of the counting hid the rules that they break."""

    def one_word(spec: dict[str, Any]) -> None:
        for k, e in enumerate(spec["emotions"]):
            for i, story in enumerate(e["stories"]):
                story["text"] = "abcd"[: 1 + (k + i) % 4]

    s = load(tmp_path, one_word)
    check = sc.check_emotion_set(s, words=False)
    assert len(check.rules["length"]) == 12
    assert check.numbers["commonest phrase"] == "none"


def test_two_sets_of_few_topics_share_emotions_and_say_what_they_lack(small: es.EmotionSet) -> None:
    few = replace(
        small, topics=small.topics[:2], stories={e: small.stories[e][:2] for e in small.names}
    )
    assert list(sc.read_across({"a": few, "b": small})["form-only accuracy, read in b"].values()) == [
        "fewer than four topics", ""
    ]  # fmt: skip

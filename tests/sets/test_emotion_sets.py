"""Emotion sets: what a wrong file says, that a strange file does no harm, views, fingerprints, checks and norms."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _sets import (
    TOPICS,
    Edit,
    change_emotion,
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
from emolens.sets import norms as norms_room


@pytest.fixture
def small(tmp_path: Path) -> es.EmotionSet:
    return es.load_emotion_set(write_files(tmp_path / "small").parent)


# --- reading a good set -----------------------------------------------------------------------------------------------


def test_a_set_of_files_and_the_same_set_inline_have_the_same_stories(
    tmp_path: Path, small: es.EmotionSet
) -> None:
    inline = load(tmp_path)
    assert small.stories == inline.stories
    assert small.topics == inline.topics
    assert small.names == ("joy", "sadness", "fear")
    assert [n.id for n in small.neutral] == ["neutral-1", "talk-1"]
    assert small.neutral[1].text.startswith("A: ")
    assert (
        repr(small) == "EmotionSet(small: 3 emotions x 4 topics, 12 stories, 2 neutral texts, en)"
    )
    assert small["joy"].antonym == "sadness"
    assert small.families == {"joy": "joy", "sadness": "sadness", "fear": "threat"}
    assert len(small.texts()) == 12
    assert small.texts("other_person") == []


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


def test_the_shipped_sets_are_listed_and_load_by_name() -> None:
    assert "core" in es.list_emotion_sets()
    assert es.load_emotion_set("core").name == "core"


# --- what a wrong set says --------------------------------------------------------------------------------------------


def test_an_unknown_set_lists_the_shipped_ones_and_the_nearest() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"unknown emotion set 'cor'; did you mean 'core'\? allowed: .*core"
    ):
        es.load_emotion_set("cor")
    with pytest.raises(FileNotFoundError, match=r"or give a folder with a set\.yaml"):
        es.load_emotion_set("/no/such/folder")


BAD: dict[str, tuple[Edit, str]] = {
    "no emotions": (
        lambda s: s.update(emotions=[]),
        r":\d+: emotions: list should have at least 1 item",
    ),
    "one emotion": (
        lambda s: s.update(emotions=s["emotions"][2:]),
        r":\d+: emotions: only 'fear'; a set needs at least two to tell apart",
    ),
    "not one story": (
        lambda s: [e.update(stories=[]) for e in s["emotions"]],
        r"stories: not one emotion has a story of split main",
    ),
    "no stories key": (
        lambda s: s["emotions"][1].pop("stories"),
        r":\d+: emotions\.1\.stories: 'sadness' has no stories; give a JSON-lines file or a list",
    ),
    "topics not shared": (
        lambda s: s["emotions"][1]["stories"].pop(2),
        r"do not share their topics: 'garden' is told 1 times for 'joy' and 0 times for 'sadness'; every emotion needs",
    ),
    "topic told twice": (
        lambda s: s["emotions"][2]["stories"].append(
            s["emotions"][2]["stories"][0] | {"id": "again"}
        ),
        r"'kitchen' is told 1 times for 'joy' and 2 times for 'fear'",
    ),
    "name twice": (change_emotion(2, name="joy"), r":\d+: emotions\.2\.name: 'joy' is there twice"),
    "id twice": (change_first_story(1, id="joy-train"), r"two texts have the id 'joy-train'"),
    "topic twice": (
        lambda s: s["topics"].append(dict(s["topics"][0])),
        r"topics: 'kitchen' is there twice",
    ),
    "no topics": (
        lambda s: s.pop("topics"),
        r"topics: missing; give a file or a list of \{name, person\}",
    ),
    "antonym unknown": (
        change_emotion(0, antonym="sadnes"),
        r":\d+: emotions\.0\.antonym: unknown emotion 'sadnes'; did you mean 'sadness'\? allowed: joy, sadness, fear",
    ),
    "opposite unknown": (
        change_emotion(2, opposite="rage"),
        r":\d+: emotions\.2\.opposite: unknown emotion 'rage'; allowed: joy",
    ),
    "topic unknown": (
        change_first_story(1, topic="kitchn"),
        r"story 'sadness-kitchen': unknown topic 'kitchn'; did you mean 'kitchen'\?",
    ),
    "person against the topic": (
        change_first_story(0, person="third"),
        r"story 'joy-kitchen' is told in the third person, but topic 'kitchen' is first for every emotion "
        r"\(use split: other_person\)",
    ),
    "unknown key": (lambda s: s.update(emotoins=[]), r":\d+: emotoins: this key is not known here"),
    "unknown key of an emotion": (
        change_emotion(0, strength=3),
        r":\d+: emotions\.0\.strength: this key is not known here \(found '3'\)",
    ),
    "wrong type": (
        change_emotion(1, intensity="very"),
        r":\d+: emotions\.1\.intensity: input should be a valid integer.*'very'",
    ),
    "out of range": (
        change_emotion(1, intensity=4),
        r":\d+: emotions\.1\.intensity: input should be less than or equal to 3",
    ),
    "emotion as a word": (
        lambda s: s.update(emotions=["joy", "fear"]),
        r":\d+: emotions\.0: .*\(found 'joy'\)",
    ),
    "a word that YAML reads as a truth value": (
        change_emotion(0, target_words=[True]),
        r":\d+: emotions\.0\.target_words\.0: input should be a valid string \(found 'True'\)",
    ),
    "person of a topic": (
        lambda s: s["topics"][1].update(person="2nd"),
        r":\d+: topics\.1\.person: input should be 'first', 'third' or 'mixed' \(found '2nd'\)",
    ),
    "empty text": (
        change_first_story(0, text=""),
        r":\d+: emotions\.0\.stories\.0\.text: string should have at least 1 char",
    ),
    "language": (
        lambda s: s.update(language="english"),
        r":\d+: language: string should match pattern",
    ),
    "name missing": (lambda s: s.pop("name"), r":1: name: field required"),
    "stories outside": (
        change_emotion(0, stories="../../secret.jsonl"),
        r"secret\.jsonl: a set may only name files inside its own folder",
    ),
    "absolute path": (
        change_emotion(0, stories="/etc/hostname"),
        r"a set may only name files inside its own folder",
    ),
    "topics outside": (
        lambda s: s.update(topics="../topics.yaml"),
        r"a set may only name files inside its own folder",
    ),
    "neutral outside": (
        lambda s: s.update(neutral=".."),
        r"a set may only name files inside its own folder",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_set_says_what_is_wrong_and_where(tmp_path: Path, what: str) -> None:
    edit, message = BAD[what]
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, edit)
    assert str(caught.value).startswith(
        str(tmp_path) if what != "absolute path" else "/etc/hostname: "
    )


def test_the_line_of_an_error_is_the_line_of_its_key(tmp_path: Path) -> None:
    path = write(tmp_path, make_spec())
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if "adjective: sad" in line)
    lines.insert(at, "  intensity: 9")
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}:{at + 1}: emotions\.1\.intensity: "
    ):
        es.load_emotion_set(path)


@pytest.mark.parametrize("key", ["stories", "neutral", "topics"])
def test_files_that_are_not_there_are_named(tmp_path: Path, key: str) -> None:
    spec = make_spec()
    (spec["emotions"][0] if key == "stories" else spec)[key] = "missing.jsonl"
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: (neutral: )?no such f"):
        es.load_emotion_set(write(tmp_path, spec))


def test_a_neutral_text_on_an_unknown_topic_is_an_error(tmp_path: Path) -> None:
    path = write_files(tmp_path / "own")
    file = path.parent / "neutral" / "stories.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("train", "tram"), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"neutral text 'neutral-1': unknown topic 'tram'; did you mean 'train'\?"
    ):
        es.load_emotion_set(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", "topic": ', r"joy\.jsonl:2: not valid JSON: Expecting value"),
        ("[" * 100_000, r"joy\.jsonl:2: not valid JSON: nested too deeply"),
        ('{"id": ' + "1" * 5000 + "}", r"joy\.jsonl:2: not valid JSON: Exceeds the limit"),
        ('{"id": "x"}', r"joy\.jsonl:2: topic: field required"),
        ('{"id": 3, "topic": "train", "person": "third", "text": "a"}', r"joy\.jsonl:2: id: .* valid string \(found '3'\)"),
        ('{"id": "x", "topic": "train", "person": "third", "text": "a", "mood": 1}', r"joy\.jsonl:2: mood: this key is not"),
        ('"just a string"', r"joy\.jsonl:2: : .*\(found 'just a string'\)"),
    ],
)  # fmt: skip
def test_a_broken_line_of_stories_is_named_by_its_number(
    tmp_path: Path, line: str, message: str
) -> None:
    path = write_files(tmp_path / "own")
    file = path.parent / "stories" / "joy.jsonl"
    stories = file.read_text(encoding="utf-8").splitlines()
    stories[1] = line
    file.write_text("\n".join(stories), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        es.load_emotion_set(path)


def test_a_dialogue_needs_two_turns(tmp_path: Path) -> None:
    path = write_files(tmp_path / "own")
    one = {"id": "d", "topic": "train", "turns": [{"speaker": "A", "text": "hello"}]}
    (path.parent / "neutral" / "dialogues.jsonl").write_text(
        "\n" + json.dumps(one), encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match=r"dialogues\.jsonl:2: turns: list should have at least 2 items"
    ):
        es.load_emotion_set(path)


# --- files that are wrong as files, or hostile ------------------------------------------------------------------------

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a: b", r":1: not valid YAML: mapping values are not allowed here"),
        ("name: a\nemotions: [", r":2: not valid YAML: "),
        (
            "name: a\nemotions:\n\t- name: joy",
            r":3: not valid YAML: .*a tab is not allowed as indentation: use spaces",
        ),
        (
            LAUGHS,
            r":2: not valid YAML: aliases \(\*a0\) are not used in emotion sets; write the value out",
        ),
        ("name: " + "[" * 100_000, r":1: not valid YAML: nested too deeply"),
        ("".join(f"{' ' * i}- \n" for i in range(100)), r":21: not valid YAML: nested too deeply"),
        ("name: \x00", r"not valid YAML: special characters are not allowed"),
        ("name: a\nname: b", r":2: not valid YAML: the key 'name' is there twice"),
        ("name: 2026-13-45", r"not valid YAML: month must be in 1\.\.12"),
        (
            "- joy\n- fear",
            r":1: expected a mapping with keys such as `name` and `emotions`, found list",
        ),
        ("", r":1: expected a mapping .*found NoneType"),
        ("name: a\n---\nname: b", r"not valid YAML: but found another document"),
    ],
)
def test_a_file_that_is_no_set_gives_one_clear_error(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "set.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        es.load_emotion_set(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'set.yaml'}:")


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir", "python/name:os.mkdir"]
)
def test_yaml_tags_are_refused_and_run_nothing(tmp_path: Path, tag: str) -> None:
    made = tmp_path / "made"
    (tmp_path / "set.yaml").write_text(f"name: a\nsource: !!{tag} ['{made}']\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r":2: not valid YAML: could not determine a constructor for the tag"
    ):
        es.load_emotion_set(tmp_path)
    assert not made.exists()


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    path = write_files(tmp_path / "own")
    (path.parent / "stories" / "joy.jsonl").write_bytes(b'{"id": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"joy\.jsonl: not UTF-8 text \(byte 11\)"):
        es.load_emotion_set(path)
    path.write_bytes(b"name: caf\xe9")
    with pytest.raises(ValueError, match=r"set\.yaml: not UTF-8 text \(byte 9\)"):
        es.load_emotion_set(path)


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, make_spec())
    monkeypatch.setattr("emolens._files.MAX_BYTES", 1000)
    with pytest.raises(
        ValueError, match=r"set\.yaml: [\d,]+ bytes; at most 1,000 are read from one file"
    ):
        es.load_emotion_set(path)


@pytest.mark.parametrize("where", ["stories/joy.jsonl", "neutral/stories.jsonl"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path, where: str) -> None:
    path = write_files(tmp_path / "own")
    file = path.parent / where
    (tmp_path / "outside.jsonl").write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    file.unlink()
    file.symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(ValueError, match=r"a set may only name files inside its own folder"):
        es.load_emotion_set(path)


# --- views ------------------------------------------------------------------------------------------------------------


def _view(folder: Path, **more: Any) -> Path:
    write_files(folder / "small")
    return write(
        folder,
        {"name": "view", "extends": "small", "emotions": [{"name": "joy"}, {"name": "fear"}]}
        | more,
    )


def test_a_view_keeps_the_stories_and_drops_the_antonyms_that_it_does_not_contain(
    tmp_path: Path,
) -> None:
    view = es.load_emotion_set(_view(tmp_path))
    whole = es.load_emotion_set(tmp_path / "small")
    assert view.names == ("joy", "fear")
    assert view.stories == {e: whole.stories[e] for e in view.names}
    assert view.topics == whole.topics
    assert view.neutral == whole.neutral
    assert view["joy"].antonym is None
    assert view["joy"].target_words == ["happy", "glad"]
    assert whole["joy"].antonym == "sadness"


def test_a_view_may_change_a_field_and_add_an_emotion_of_its_own(tmp_path: Path) -> None:
    stories = [
        make_story("calm", topic, person, 40 + t) for t, (topic, person) in enumerate(TOPICS)
    ]
    emotions = [{"name": "fear", "antonym": "calm"}, {"name": "calm", "stories": stories}]
    view = es.load_emotion_set(_view(tmp_path, emotions=emotions))
    assert view["fear"].antonym == "calm"
    assert view["fear"].adjective == "afraid"
    assert len(view.texts()) == 8


def test_an_antonym_that_the_view_itself_names_must_be_in_the_view(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"emotions\.0\.antonym: unknown emotion 'sadness'"):
        es.load_emotion_set(
            _view(tmp_path, emotions=[{"name": "joy", "antonym": "sadness"}, {"name": "fear"}])
        )


def test_a_view_speaks_the_language_of_its_set(tmp_path: Path) -> None:
    path = _view(tmp_path)
    base = tmp_path / "small" / "set.yaml"
    base.write_text("language: ja\n" + base.read_text(encoding="utf-8"), encoding="utf-8")
    assert es.load_emotion_set(path).language == "ja"
    path.write_text("language: de\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert es.load_emotion_set(path).language == "de"


def test_a_shipped_set_can_be_extended_by_name(tmp_path: Path) -> None:
    spec = {"name": "pair", "extends": "core", "emotions": [{"name": "joy"}, {"name": "grief"}]}
    view, core = es.load_emotion_set(write(tmp_path, spec)), es.load_emotion_set("core")
    assert view.stories["grief"] == core.stories["grief"]
    assert view["joy"].antonym is None


def test_sets_that_extend_each_other_are_an_error(tmp_path: Path) -> None:
    path = _view(tmp_path, extends=".")
    with pytest.raises(ValueError, match=r"`extends` goes round in a circle"):
        es.load_emotion_set(path)
    write(tmp_path, {"name": "a", "extends": "b", "emotions": [{"name": "joy"}]})
    write(tmp_path / "b", {"name": "b", "extends": "..", "emotions": [{"name": "joy"}]})
    with pytest.raises(ValueError, match=r"`extends` goes round in a circle"):
        es.load_emotion_set(path)


def test_extending_an_unknown_set_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"extends: unknown emotion set 'coer'; did you mean 'core'\?"
    ):
        es.load_emotion_set(_view(tmp_path, extends="coer"))


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


# --- fingerprint ------------------------------------------------------------------------------------------------------


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


# --- norms ------------------------------------------------------------------------------------------------------------


def test_the_shipped_norms_have_the_published_ranges_and_signs() -> None:
    glasgow, russell = norms_room.load_norms(), norms_room.load_norms("russell_mehrabian_1977")
    assert all(1 <= x <= 9 for n in glasgow.values() for x in (n.valence, n.arousal, n.dominance))
    assert all(-1 <= x <= 1 for n in russell.values() for x in (n.valence, n.arousal, n.dominance))
    assert glasgow["joy"].valence > 7 > 3 > glasgow["grief"].valence
    assert "amazed" not in glasgow  # only a related form of it was rated, and rows are exact forms


def test_rows_of_a_sense_are_no_exact_forms() -> None:
    exact, sense, every = (
        norms_room.load_norms(),
        norms_room.load_norms(sense=True),
        norms_room.load_norms(related=True),
    )
    assert sorted(sense.keys() - exact.keys()) == [
        "content",
        "interest",
        "kind",
        "mad",
        "patient",
        "tense",
        "upset",
    ]
    assert exact.keys() < sense.keys() < every.keys()
    core = es.load_emotion_set("core")
    assert [norms_room.norm_of(core[e])[1] for e in ("joy", "interest")] == ["exact", "sense"]
    assert norms_room.norm_of(es.load_emotion_set("emotions171")["kind"]) == (
        sense["kind"],
        "sense",
    )


def test_every_norm_key_of_core_is_a_row_of_a_table() -> None:
    glasgow = norms_room.load_norms(sense=True)
    missing = [
        e.name
        for e in es.load_emotion_set("core").emotions
        if e.norm_key and e.norm_key not in glasgow
    ]
    assert missing == []


def test_a_table_of_ones_own_is_read_with_comments_and_without_a_match_column(
    tmp_path: Path,
) -> None:
    path = tmp_path / "own.csv"
    path.write_text(
        "# mine\nword,valence,arousal,dominance,note\n# half\njoy,1,0.5,-0.25,x\n", encoding="utf-8"
    )
    assert norms_room.load_norms(path) == {"joy": norms_room.Norm(1.0, 0.5, -0.25)}


@pytest.mark.parametrize("cell", ["high", "", "nan", "inf"])
def test_a_cell_that_is_not_a_number_is_named_by_line_and_word(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text(
        f"# mine\n# too\nword,valence,arousal,dominance\njoy,1,2,3\nfear,1,{cell},3\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"own\.csv:5: 'fear': not a number"):
        norms_room.load_norms(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfword,valence,arousal,dominance\njoy,8,6,7\n",
        b"Word;Valence;AROUSAL;Dominance\r\njoy;8;6;7\r\n",
        b"\xef\xbb\xbf# mine\n WORD \tValence\tArousal\tDominance\njoy\t8\t6\t7\n",
    ],
)
def test_norms_are_read_however_a_spreadsheet_wrote_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.csv").write_bytes(content)
    assert norms_room.load_norms(tmp_path / "own.csv") == {"joy": norms_room.Norm(8.0, 6.0, 7.0)}


def test_a_decimal_comma_and_another_encoding_are_named(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(b"word;valence;arousal;dominance\njoy;8,5;6,1;7,0\n")
    with pytest.raises(
        ValueError,
        match=r"own\.csv:2: 'joy': not a number \(a decimal comma\? write 7\.5\) \(found '8,5, 6,1, 7,0'\)",
    ):
        norms_room.load_norms(tmp_path / "own.csv")
    (tmp_path / "cp.csv").write_bytes(
        "word,valence,arousal,dominance\nfühlen,1,2,3\n".encode("cp1252")
    )
    with pytest.raises(
        ValueError, match=r"not UTF-8 text .* such as Windows' cp1252; save it as UTF-8"
    ):
        norms_room.load_norms(tmp_path / "cp.csv")


def test_a_word_or_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(
        "# mine\nword,valence,arousal,dominance\njoy,1,2,3\njoy,3,2,1\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"own\.csv:4: 'joy': this word is there twice"):
        norms_room.load_norms(path)
    path.write_text("word,valence,arousal,dominance,Valence\njoy,1,2,3,4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.csv:1: there is more than one column 'valence'"):
        norms_room.load_norms(path)


def test_a_table_that_was_edited_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    for valence in (1.0, 2.0):
        path.write_text(f"word,valence,arousal,dominance\njoy,{valence},2,3\n", encoding="utf-8")
        os.utime(path, (1e9, 1e9))
        assert norms_room.load_norms(path)["joy"].valence == valence
    norms_room.load_norms(path).clear()
    assert norms_room.load_norms(path)


def test_a_key_that_is_there_twice_is_named_by_line(toy_set: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_set, tmp_path / "set")
    file = next((tmp_path / "set" / "stories").glob("*.jsonl"))
    first, second, *rest = file.read_text(encoding="utf-8").splitlines()
    file.write_text(
        "\n".join([first, second[:-1] + ', "topic": "train"}', *rest]), encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match=rf"{file.name}:2: not valid JSON: the key 'topic' is there twice"
    ):
        es.load_emotion_set(tmp_path / "set")


def test_a_set_of_a_windows_editor_is_read(toy_set: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_set, tmp_path / "set")
    for file in (p for p in (tmp_path / "set").rglob("*") if p.is_file()):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert (
        es.load_emotion_set(tmp_path / "set").fingerprint
        == es.load_emotion_set(toy_set).fingerprint
    )


def test_told_are_the_topics_that_have_stories(toy_set: Path) -> None:
    s = es.load_emotion_set(toy_set)
    more = replace(s, topics=(es.Topic(name="apart", person="third"), *s.topics))
    assert list(more.told) == [t.name for t in s.topics]
    assert more.told["kitchen"] == "first"


def test_a_table_that_is_not_a_table_is_refused_by_column_name_or_encoding(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("word,valence,arousal\njoy,1,2\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"own\.csv: column 'dominance' is missing; needed: word, valence, arousal"
    ):
        norms_room.load_norms(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.csv: column 'arousal' is missing"):
        norms_room.load_norms(path)
    path.write_bytes(b"word,valence,arousal,dominance\ncaf\xe9,1,2,3\n")
    with pytest.raises(ValueError, match=r"own\.csv: not UTF-8 text"):
        norms_room.load_norms(path)
    with pytest.raises(
        FileNotFoundError, match=r"unknown norms table 'glasgow'; did you mean 'glasgow_2019'\?"
    ):
        norms_room.load_norms("glasgow")


# --- the shipped set --------------------------------------------------------------------------------------------------


def test_core_has_the_shape_that_it_says() -> None:
    core = es.load_emotion_set("core")
    assert len(core.names) == 24
    assert Counter(t.person for t in core.topics) == {"first": 8, "third": 8}
    assert len(core.texts()) == 24 * 16
    other = core.texts("other_person")
    assert len(other) == 48
    assert Counter(e for e, _ in other) == dict.fromkeys(core.names, 2)
    person = {t.name: t.person for t in core.topics}
    assert all(story.person != person[story.topic] for _, story in other)
    assert Counter(type(n).__name__ for n in core.neutral) == {"Story": 48, "Dialogue": 40}
    assert {n.topic for n in core.neutral} == set(person)
    assert Counter(Counter(core.families.values()).values()) == {3: 8}  # eight families of three
    assert all(e.target_words and e.adjective and e.antonym and e.prompts for e in core.emotions)


def test_a_saved_set_is_the_same_set(tmp_path: Path, small: es.EmotionSet) -> None:
    folder = es.save_emotion_set(small, tmp_path / "copy")
    copy = es.load_emotion_set(folder)
    assert copy.fingerprint == small.fingerprint == copy.sha256
    assert copy.emotions == small.emotions
    assert (copy.topics, copy.neutral, copy.names) == (small.topics, small.neutral, small.names)
    with pytest.raises(FileExistsError, match="already holds a set"):
        es.save_emotion_set(small, folder)


def test_concepts_line_up_sets_and_must_be_one_emotion_each(tmp_path: Path) -> None:
    s = load(tmp_path, change_emotion(2, concept="terror"))
    assert s.concepts == {"joy": "joy", "sadness": "sadness", "terror": "fear"}
    with pytest.raises(ValueError, match="two emotions are the concept 'joy'"):
        load(tmp_path, change_emotion(2, concept="joy"))


def test_prompts_of_the_set_serve_every_emotion_that_has_none(tmp_path: Path) -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["prompts"] = ["about {topic}"]
        spec["emotions"][0]["prompts"] = ["own"]

    assert [e.prompts for e in load(tmp_path, edit).emotions] == [
        ["own"],
        ["about {topic}"],
        ["about {topic}"],
    ]


def test_a_mixed_topic_may_be_told_in_any_person(tmp_path: Path) -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["topics"][0]["person"] = "mixed"
        spec["emotions"][0]["stories"][0]["person"] = "third"

    assert load(tmp_path, edit).topics[0].person == "mixed"


def test_a_set_may_say_how_long_its_stories_are(tmp_path: Path) -> None:
    assert load(tmp_path, lambda s: s.update(length=[5, 500])).length == (5, 500)
    with pytest.raises(ValueError, match=r"length: found \[9, 5\]; allowed: \[least, most\]"):
        load(tmp_path, lambda s: s.update(length=[9, 5]))


def test_the_pool_of_171_words_and_its_views() -> None:
    pool = es.load_emotion_set("emotions171")
    assert (len(pool.names), len(pool.texts()), len(pool.topics)) == (171, 171 * 8, 8)
    assert Counter(t.person for t in pool.topics) == {"first": 4, "third": 4}
    assert Counter(type(n).__name__ for n in pool.neutral) == {"Story": 200, "Dialogue": 100}
    core = es.load_emotion_set("core")
    assert {t.name: t.person for t in pool.topics}.items() <= {
        t.name: t.person for t in core.topics
    }.items()
    assert len(set(pool.families.values())) == 10
    assert all(e.adjective and e.target_words and e.prompts for e in pool.emotions)
    wheel = es.load_emotion_set("plutchik32")
    assert set(core.names) <= set(wheel.concepts)
    assert len(wheel.names) == 32
    assert [
        len(es.load_emotion_set("basic6").names),
        len(es.load_emotion_set("plutchik8").names),
    ] == [6, 8]


def test_the_pool_has_the_papers_words() -> None:
    words = Path(__file__).parents[3] / "shared" / "data" / "emotions171.txt"
    if not words.is_file():
        pytest.skip("the paper's word list lies outside the project")
    assert (
        list(es.load_emotion_set("emotions171").names)
        == words.read_text(encoding="utf-8").split("\n")[:171]
    )


@pytest.mark.parametrize("language", ["zh", "ja", "de"])
def test_translations_are_parallel_to_core_by_concept_topic_and_id(language: str) -> None:
    core, own = es.load_emotion_set("core"), es.load_emotion_set(f"core_{language}")
    assert own.language == language
    assert list(own.concepts) == list(core.names)
    person = {t.name: t.person for t in core.topics}
    assert {t.name: t.person for t in own.topics}.items() <= person.items()
    assert len(own.topics) == 8
    for concept, name in own.concepts.items():
        assert [s.id for s in own.stories[name]] == [f"{concept}-{t.name}" for t in own.topics]
        assert {s.id for s in own.stories[name]} <= {s.id for s in core.stories[concept]}
        assert own[name].target_words
        assert own[name].antonym in own.names
    assert own.neutral


# --- joined sets ------------------------------------------------------------------------------------------------------


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
    assert both.told == {
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


def test_a_joined_set_is_loaded_by_the_names_with_a_plus_and_survives_a_file(
    tmp_path: Path,
) -> None:
    joined = es.load_emotion_set("core2+core")
    assert joined.name == "core2+core"
    assert (len(joined.texts()), len(joined.told), joined.edition) == (768, 32, 1)
    copy = es.load_emotion_set(es.save_emotion_set(joined, tmp_path / "copy"))
    assert (copy.fingerprint, copy.topics, copy.told) == (
        joined.fingerprint,
        joined.topics,
        joined.told,
    )
    assert copy.stories["joy"][0].source == "core2"


def test_folds_of_a_joined_set_take_topics_of_every_source() -> None:
    folds = stats.topic_folds(es.load_emotion_set("core2+core").told)
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


def test_a_part_of_a_joined_set_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="unknown emotion set 'core3'; did you mean 'core'"):
        es.load_emotion_set("core2+core3")


def test_a_topic_of_its_own_length_is_checked(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"topics: 'kitchen': length: found \[9, 5\]; allowed: \[least, most\]"
    ):
        load(tmp_path, lambda s: s["topics"][0].update(length=[9, 5]))

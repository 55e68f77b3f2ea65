"""Emotion sets: what a wrong file says, that a strange file does no harm, views, fingerprints, checks and norms."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from emolens import emotion_sets as es

TOPICS = [("kitchen", "first"), ("train", "third"), ("garden", "first"), ("office", "third")]
EMOTIONS = {
    "joy": {"adjective": "joyful", "antonym": "sadness", "target_words": ["happy", "glad"], "norm_key": "joy"},
    "sadness": {"adjective": "sad", "antonym": "joy", "forbidden": ["sad*"], "norm_key": "sadness"},
    "fear": {"adjective": "afraid", "family": "threat"},
}
WORDS = ["apple", "bridge", "candle", "door", "engine", "feather", "glove", "hammer", "island", "jacket", "kettle", "lamp", "mirror",
         "needle", "orange", "pencil", "quilt", "river", "spoon", "table", "umbrella", "violin", "window", "yard", "zipper"]  # fmt: skip
Edit = Callable[[dict[str, Any]], None]


def _prose(key: int, n: int = 90) -> str:
    """Words without sense in an order of their own, so that no two texts are near-duplicates or open alike."""
    rng = np.random.default_rng(key)
    return " ".join([*(f"{w}{rng.integers(1000)}" for w in rng.choice(WORDS, n - 2)), "and", "then"])


def _story(emotion: str, topic: str, person: str, key: int) -> dict[str, Any]:
    return {"id": f"{emotion}-{topic}", "topic": topic, "person": person, "text": _prose(key)}


def _spec() -> dict[str, Any]:
    """A whole set in one mapping: stories inline."""
    emotions = []
    for e, (name, more) in enumerate(EMOTIONS.items()):
        stories = [_story(name, topic, person, 10 * e + t) for t, (topic, person) in enumerate(TOPICS)]
        emotions.append({"name": name, **copy.deepcopy(more), "stories": stories})
    return {"name": "small", "topics": [{"name": t, "person": p} for t, p in TOPICS], "emotions": emotions}


def _write(folder: Path, spec: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "set.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _write_files(folder: Path) -> Path:
    """The same set as files: topics.yaml, one JSONL file an emotion, neutral stories and dialogues."""
    spec = _spec()
    (folder / "stories").mkdir(parents=True)
    (folder / "neutral").mkdir()
    for emotion in spec["emotions"]:
        file = f"stories/{emotion['name']}.jsonl"
        (folder / file).write_text("".join(json.dumps(s) + "\n" for s in emotion["stories"]))
        emotion["stories"] = file
    (folder / "topics.yaml").write_text(yaml.safe_dump({"topics": spec["topics"]}))
    spec["topics"] = "topics.yaml"
    spec["neutral"] = "neutral"
    neutral = {"id": "neutral-1", "topic": "train", "person": "third", "text": _prose(77)}
    turns = [{"speaker": "A", "text": _prose(78, 12)}, {"speaker": "B", "text": _prose(79, 12)}]
    (folder / "neutral" / "stories.jsonl").write_text(json.dumps(neutral) + "\n")
    (folder / "neutral" / "dialogues.jsonl").write_text(
        json.dumps({"id": "talk-1", "topic": "office", "turns": turns}) + "\n"
    )
    return _write(folder, spec)


def _load(tmp_path: Path, edit: Edit | None = None) -> es.EmotionSet:
    spec = _spec()
    if edit:
        edit(spec)
    return es.load_emotion_set(_write(tmp_path / "own", spec))


@pytest.fixture
def small(tmp_path: Path) -> es.EmotionSet:
    return es.load_emotion_set(_write_files(tmp_path / "small").parent)


# --- reading a good set -----------------------------------------------------------------------------------------------


def test_a_set_of_files_and_the_same_set_inline_have_the_same_stories(tmp_path: Path, small: es.EmotionSet) -> None:
    inline = _load(tmp_path)
    assert small.stories == inline.stories
    assert small.topics == inline.topics
    assert small.names == ("joy", "sadness", "fear")
    assert [n.id for n in small.neutral] == ["neutral-1", "talk-1"]
    assert small.neutral[1].text.startswith("A: ")
    assert repr(small) == "EmotionSet(small: 3 emotions x 4 topics, 12 stories, 2 neutral texts, en)"
    assert small["joy"].antonym == "sadness"
    assert small.families == {"joy": "joy", "sadness": "sadness", "fear": "threat"}
    assert len(small.texts()) == 12
    assert small.texts("other_person") == []


def test_a_story_in_the_other_person_is_kept_apart_by_its_split(tmp_path: Path) -> None:
    def edit(spec: dict[str, Any]) -> None:
        other = _story("joy", "kitchen", "third", 55) | {"id": "joy-kitchen-other", "split": "other_person"}
        spec["emotions"][0]["stories"].append(other)

    s = _load(tmp_path, edit)
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
    with pytest.raises(FileNotFoundError, match=r"unknown emotion set 'cor'; did you mean 'core'\? allowed: .*core"):
        es.load_emotion_set("cor")
    with pytest.raises(FileNotFoundError, match=r"or give a folder with a set\.yaml"):
        es.load_emotion_set("/no/such/folder")


def _emotion(i: int, **change: Any) -> Edit:
    return lambda spec: spec["emotions"][i].update(change)


def _first_story(i: int, **change: Any) -> Edit:
    return lambda spec: spec["emotions"][i]["stories"][0].update(change)


BAD: dict[str, tuple[Edit, str]] = {
    "no emotions": (lambda s: s.update(emotions=[]), r":\d+: emotions: list should have at least 1 item"),
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
        lambda s: s["emotions"][2]["stories"].append(s["emotions"][2]["stories"][0] | {"id": "again"}),
        r"'kitchen' is told 1 times for 'joy' and 2 times for 'fear'",
    ),
    "name twice": (_emotion(2, name="joy"), r":\d+: emotions\.2\.name: 'joy' is there twice"),
    "id twice": (_first_story(1, id="joy-train"), r"two texts have the id 'joy-train'"),
    "topic twice": (lambda s: s["topics"].append(dict(s["topics"][0])), r"topics: 'kitchen' is there twice"),
    "no topics": (lambda s: s.pop("topics"), r"topics: missing; give a file or a list of \{name, person\}"),
    "antonym unknown": (
        _emotion(0, antonym="sadnes"),
        r":\d+: emotions\.0\.antonym: unknown emotion 'sadnes'; did you mean 'sadness'\? allowed: joy, sadness, fear",
    ),
    "opposite unknown": (
        _emotion(2, opposite="rage"),
        r":\d+: emotions\.2\.opposite: unknown emotion 'rage'; allowed: joy",
    ),
    "topic unknown": (
        _first_story(1, topic="kitchn"),
        r"story 'sadness-kitchen': unknown topic 'kitchn'; did you mean 'kitchen'\?",
    ),
    "person against the topic": (
        _first_story(0, person="third"),
        r"story 'joy-kitchen' is told in the third person, but topic 'kitchen' is first for every emotion "
        r"\(use split: other_person\)",
    ),
    "unknown key": (lambda s: s.update(emotoins=[]), r":\d+: emotoins: this key is not known here"),
    "unknown key of an emotion": (
        _emotion(0, strength=3),
        r":\d+: emotions\.0\.strength: this key is not known here \(found '3'\)",
    ),
    "wrong type": (
        _emotion(1, intensity="very"),
        r":\d+: emotions\.1\.intensity: input should be a valid integer.*'very'",
    ),
    "out of range": (
        _emotion(1, intensity=4),
        r":\d+: emotions\.1\.intensity: input should be less than or equal to 3",
    ),
    "emotion as a word": (lambda s: s.update(emotions=["joy", "fear"]), r":\d+: emotions\.0: .*\(found 'joy'\)"),
    "a word that YAML reads as a truth value": (
        _emotion(0, target_words=[True]),
        r":\d+: emotions\.0\.target_words\.0: input should be a valid string \(found 'True'\)",
    ),
    "person of a topic": (
        lambda s: s["topics"][1].update(person="2nd"),
        r":\d+: topics\.1\.person: input should be 'first' or 'third' \(found '2nd'\)",
    ),
    "empty text": (
        _first_story(0, text=""),
        r":\d+: emotions\.0\.stories\.0\.text: string should have at least 1 char",
    ),
    "language": (lambda s: s.update(language="english"), r":\d+: language: string should match pattern"),
    "name missing": (lambda s: s.pop("name"), r":1: name: field required"),
    "stories outside": (
        _emotion(0, stories="../../secret.jsonl"),
        r"secret\.jsonl: a set may only name files inside its own folder",
    ),
    "absolute path": (_emotion(0, stories="/etc/hostname"), r"a set may only name files inside its own folder"),
    "topics outside": (lambda s: s.update(topics="../topics.yaml"), r"a set may only name files inside its own folder"),
    "neutral outside": (lambda s: s.update(neutral=".."), r"a set may only name files inside its own folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_set_says_what_is_wrong_and_where(tmp_path: Path, what: str) -> None:
    edit, message = BAD[what]
    with pytest.raises(ValueError, match=message) as caught:
        _load(tmp_path, edit)
    assert str(caught.value).startswith(str(tmp_path) if what != "absolute path" else "/etc/hostname: ")


def test_the_line_of_an_error_is_the_line_of_its_key(tmp_path: Path) -> None:
    path = _write(tmp_path, _spec())
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "adjective: sad" in line)
    lines.insert(at, "  intensity: 9")
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:{at + 1}: emotions\.1\.intensity: "):
        es.load_emotion_set(path)


@pytest.mark.parametrize("key", ["stories", "neutral", "topics"])
def test_files_that_are_not_there_are_named(tmp_path: Path, key: str) -> None:
    spec = _spec()
    (spec["emotions"][0] if key == "stories" else spec)[key] = "missing.jsonl"
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: (neutral: )?no such f"):
        es.load_emotion_set(_write(tmp_path, spec))


def test_a_neutral_text_on_an_unknown_topic_is_an_error(tmp_path: Path) -> None:
    path = _write_files(tmp_path / "own")
    file = path.parent / "neutral" / "stories.jsonl"
    file.write_text(file.read_text().replace("train", "tram"))
    with pytest.raises(ValueError, match=r"neutral text 'neutral-1': unknown topic 'tram'; did you mean 'train'\?"):
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
def test_a_broken_line_of_stories_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = _write_files(tmp_path / "own")
    file = path.parent / "stories" / "joy.jsonl"
    stories = file.read_text().splitlines()
    stories[1] = line
    file.write_text("\n".join(stories))
    with pytest.raises(ValueError, match=message):
        es.load_emotion_set(path)


def test_a_dialogue_needs_two_turns(tmp_path: Path) -> None:
    path = _write_files(tmp_path / "own")
    one = {"id": "d", "topic": "train", "turns": [{"speaker": "A", "text": "hello"}]}
    (path.parent / "neutral" / "dialogues.jsonl").write_text("\n" + json.dumps(one))
    with pytest.raises(ValueError, match=r"dialogues\.jsonl:2: turns: list should have at least 2 items"):
        es.load_emotion_set(path)


# --- files that are wrong as files, or hostile ------------------------------------------------------------------------

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a: b", r":1: not valid YAML: mapping values are not allowed here"),
        ("name: a\nemotions: [", r":2: not valid YAML: "),
        ("name: a\nemotions:\n\t- name: joy", r":3: not valid YAML: .*a tab is not allowed as indentation: use spaces"),
        (LAUGHS, r":2: not valid YAML: aliases \(\*a0\) are not used in emotion sets; write the value out"),
        ("name: " + "[" * 100_000, r":1: not valid YAML: nested too deeply"),
        ("".join(f"{' ' * i}- \n" for i in range(100)), r":21: not valid YAML: nested too deeply"),
        ("name: \x00", r"not valid YAML: special characters are not allowed"),
        ("name: a\nname: b", r":2: not valid YAML: the key 'name' is there twice"),
        ("name: 2026-13-45", r"not valid YAML: month must be in 1\.\.12"),
        ("- joy\n- fear", r":1: expected a mapping with keys such as `name` and `emotions`, found list"),
        ("", r":1: expected a mapping .*found NoneType"),
        ("name: a\n---\nname: b", r"not valid YAML: but found another document"),
    ],
)
def test_a_file_that_is_no_set_gives_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        es.load_emotion_set(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'set.yaml'}:")


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir", "python/name:os.mkdir"])
def test_yaml_tags_are_refused_and_run_nothing(tmp_path: Path, tag: str) -> None:
    made = tmp_path / "made"
    (tmp_path / "set.yaml").write_text(f"name: a\nsource: !!{tag} ['{made}']\n")
    with pytest.raises(ValueError, match=r":2: not valid YAML: could not determine a constructor for the tag"):
        es.load_emotion_set(tmp_path)
    assert not made.exists()


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    path = _write_files(tmp_path / "own")
    (path.parent / "stories" / "joy.jsonl").write_bytes(b'{"id": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"joy\.jsonl: not UTF-8 text \(byte 11\)"):
        es.load_emotion_set(path)
    path.write_bytes(b"name: caf\xe9")
    with pytest.raises(ValueError, match=r"set\.yaml: not UTF-8 text \(byte 9\)"):
        es.load_emotion_set(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, _spec())
    monkeypatch.setattr(es, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"set\.yaml: [\d,]+ bytes; at most 1,000 are read from one file"):
        es.load_emotion_set(path)


@pytest.mark.parametrize("where", ["stories/joy.jsonl", "neutral/stories.jsonl"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path, where: str) -> None:
    path = _write_files(tmp_path / "own")
    file = path.parent / where
    (tmp_path / "outside.jsonl").write_text(file.read_text())
    file.unlink()
    file.symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(ValueError, match=r"a set may only name files inside its own folder"):
        es.load_emotion_set(path)


# --- views ------------------------------------------------------------------------------------------------------------


def _view(folder: Path, **more: Any) -> Path:
    _write_files(folder / "small")
    return _write(folder, {"name": "view", "extends": "small", "emotions": [{"name": "joy"}, {"name": "fear"}]} | more)


def test_a_view_keeps_the_stories_and_drops_the_antonyms_that_it_does_not_contain(tmp_path: Path) -> None:
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
    stories = [_story("calm", topic, person, 40 + t) for t, (topic, person) in enumerate(TOPICS)]
    emotions = [{"name": "fear", "antonym": "calm"}, {"name": "calm", "stories": stories}]
    view = es.load_emotion_set(_view(tmp_path, emotions=emotions))
    assert view["fear"].antonym == "calm"
    assert view["fear"].adjective == "afraid"
    assert len(view.texts()) == 8


def test_an_antonym_that_the_view_itself_names_must_be_in_the_view(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"emotions\.0\.antonym: unknown emotion 'sadness'"):
        es.load_emotion_set(_view(tmp_path, emotions=[{"name": "joy", "antonym": "sadness"}, {"name": "fear"}]))


def test_a_view_speaks_the_language_of_its_set(tmp_path: Path) -> None:
    path = _view(tmp_path)
    base = tmp_path / "small" / "set.yaml"
    base.write_text("language: ja\n" + base.read_text())
    assert es.load_emotion_set(path).language == "ja"
    path.write_text("language: de\n" + path.read_text())
    assert es.load_emotion_set(path).language == "de"


def test_a_shipped_set_can_be_extended_by_name(tmp_path: Path) -> None:
    spec = {"name": "pair", "extends": "core", "emotions": [{"name": "joy"}, {"name": "grief"}]}
    view, core = es.load_emotion_set(_write(tmp_path, spec)), es.load_emotion_set("core")
    assert view.stories["grief"] == core.stories["grief"]
    assert view["joy"].antonym is None


def test_sets_that_extend_each_other_are_an_error(tmp_path: Path) -> None:
    path = _view(tmp_path, extends=".")
    with pytest.raises(ValueError, match=r"`extends` goes round in a circle"):
        es.load_emotion_set(path)
    _write(tmp_path, {"name": "a", "extends": "b", "emotions": [{"name": "joy"}]})
    _write(tmp_path / "b", {"name": "b", "extends": "..", "emotions": [{"name": "joy"}]})
    with pytest.raises(ValueError, match=r"`extends` goes round in a circle"):
        es.load_emotion_set(path)


def test_extending_an_unknown_set_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"extends: unknown emotion set 'coer'; did you mean 'core'\?"):
        es.load_emotion_set(_view(tmp_path, extends="coer"))


def test_a_subset_keeps_its_order_and_drops_antonyms_and_the_frozen_hash(small: es.EmotionSet) -> None:
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


def test_the_fingerprint_does_not_depend_on_the_order_of_emotions_and_stories(tmp_path: Path) -> None:
    before = _load(tmp_path).fingerprint

    def turn_round(spec: dict[str, Any]) -> None:
        spec["emotions"].reverse()
        spec["topics"].reverse()
        for emotion in spec["emotions"]:
            emotion["stories"].reverse()

    assert _load(tmp_path, turn_round).fingerprint == before
    assert re.fullmatch(r"[0-9a-f]{64}", before)


def test_the_fingerprint_changes_with_any_text_and_with_whose_it_is(tmp_path: Path, small: es.EmotionSet) -> None:
    def swap(spec: dict[str, Any]) -> None:
        a, b = (spec["emotions"][i]["stories"][1] for i in (0, 1))
        a["text"], b["text"] = b["text"], a["text"]

    edits: list[Edit | None] = [None, _first_story(0, text=_prose(0) + "."), _first_story(2, text=_prose(99)), swap]
    found = [_load(tmp_path, edit).fingerprint for edit in edits]
    found.append(small.fingerprint)  # with neutral texts
    dialogue = tmp_path / "small" / "neutral" / "dialogues.jsonl"
    dialogue.write_text(dialogue.read_text().replace('"A"', '"Ann"'))
    found.append(es.load_emotion_set(tmp_path / "small").fingerprint)
    assert len(set(found)) == len(found)


# --- checks -----------------------------------------------------------------------------------------------------------


def test_words_that_name_an_emotion_are_found_by_form_stem_and_list() -> None:
    joy = es.Emotion(name="joy", adjective="joyful", target_words=["happy"], forbidden=["delight*", "merry"])
    assert es.leaks("JOY! She was joyful, happy, happiness aside, and merry; delighted.", joy) == [
        "joy", "joyful", "happy", "merry", "delighted"
    ]  # fmt: skip
    assert es.leaks("She enjoyed the merriment at the jetty.", joy) == []
    grief = es.Emotion(name="grief", target_words=["mourn"])
    assert es.leaks("He mourned, mourning; she mourns.", grief) == ["mourned", "mourning", "mourns"]


def test_a_sound_set_has_no_violations_and_its_numbers_are_told(small: es.EmotionSet) -> None:
    check = es.check_emotion_set(small)
    assert check.violations == ()
    assert check.numbers["emotions"] == "3"
    assert check.numbers["topics"] == "4 (2 first person)"
    assert check.numbers["stories"] == "12 main, 0 in the other person"
    assert check.numbers["neutral texts"] == "1 stories, 1 dialogues"
    assert check.numbers["length"] == "median 90, 90 to 90"
    assert check.numbers["sha256 of the texts"] == small.fingerprint[:16]
    assert "information, not a test" in check.numbers["TF-IDF accuracy, emotions"]


VIOLATIONS: dict[str, tuple[Edit, str]] = {
    "too short": (_first_story(0, text=_prose(33, 79)), r"joy-kitchen: 79 words; allowed 80 to 120"),
    "too long": (_first_story(0, text=_prose(33, 121)), r"joy-kitchen: 121 words; allowed 80 to 120"),
    "leak": (_first_story(1, text=_prose(33) + " saddened"), r"sadness-kitchen: names the emotion: saddened"),
    "near-duplicate": (
        lambda s: s["emotions"][1]["stories"][0].update(text="Once " + s["emotions"][0]["stories"][0]["text"]),
        r"joy-kitchen and sadness-kitchen: character 5-gram Jaccard 0\.9\d \(allowed below 0\.25\)",
    ),
    "opening": (
        lambda s: [e["stories"][0].update(text=f"At Night the train {_prose(60 + i)}") for i, e in enumerate(s["emotions"][:2])],
        r"joy-kitchen, sadness-kitchen: the same four opening words",
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
    violations = es.check_emotion_set(_load(tmp_path, edit)).violations
    assert len(violations) == 1, violations
    assert re.fullmatch(message, violations[0])


def test_the_right_frozen_hash_is_no_violation(tmp_path: Path) -> None:
    right = _load(tmp_path).fingerprint
    assert es.check_emotion_set(_load(tmp_path, lambda s: s.update(sha256=right))).violations == ()


@pytest.mark.parametrize(("language", "shortest"), [("zh", 120), ("ja", 160)])
def test_chinese_and_japanese_are_counted_in_characters(tmp_path: Path, language: str, shortest: int) -> None:
    assert es.length("今天 天气\n很好", language) == 6
    assert es.length("今天 天气\n很好", "en") == 3

    def edit(spec: dict[str, Any]) -> None:
        spec["language"] = language
        for e, emotion in enumerate(spec["emotions"]):
            for t, story in enumerate(emotion["stories"]):
                n = shortest - 1 - (e == t == 0)  # one story is a character short
                # characters of its own and one that all share: length is all there is to find
                story["text"] = "".join(chr(0x4E00 + 400 * (4 * e + t) + i) for i in range(n)) + "。"

    s = _load(tmp_path, edit)
    assert es.check_emotion_set(s).violations == (
        f"joy-kitchen: {shortest - 1} characters; allowed {shortest} to {es.CHARACTERS[language][1]}",
    )


def test_with_few_topics_tfidf_is_not_computed_and_says_so(tmp_path: Path) -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["topics"] = spec["topics"][:2]
        for emotion in spec["emotions"]:
            emotion["stories"] = emotion["stories"][:2]

    numbers = es.check_emotion_set(_load(tmp_path, edit)).numbers
    assert numbers["TF-IDF accuracy"] == "not computed (fewer than four topics)"


# --- norms ------------------------------------------------------------------------------------------------------------


def test_the_shipped_norms_have_the_published_ranges_and_signs() -> None:
    glasgow, russell = es.load_norms(), es.load_norms("russell_mehrabian_1977")
    assert all(1 <= x <= 9 for n in glasgow.values() for x in (n.valence, n.arousal, n.dominance))
    assert all(-1 <= x <= 1 for n in russell.values() for x in (n.valence, n.arousal, n.dominance))
    assert glasgow["joy"].valence > 7 > 3 > glasgow["grief"].valence
    assert "amazed" not in glasgow  # only a related form of it was rated, and rows are exact forms


def test_every_norm_key_of_core_is_a_row_of_a_table() -> None:
    glasgow = es.load_norms()
    missing = [e.name for e in es.load_emotion_set("core").emotions if e.norm_key and e.norm_key not in glasgow]
    assert missing == []


def test_a_table_of_ones_own_is_read_with_comments_and_without_a_match_column(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("# mine\nword,valence,arousal,dominance,note\n# half\njoy,1,0.5,-0.25,x\n")
    assert es.load_norms(path) == {"joy": es.Norm(1.0, 0.5, -0.25)}


@pytest.mark.parametrize("cell", ["high", "", "nan", "inf"])
def test_a_cell_that_is_not_a_number_is_named_by_line_and_word(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text(f"# mine\n# too\nword,valence,arousal,dominance\njoy,1,2,3\nfear,1,{cell},3\n")
    with pytest.raises(ValueError, match=r"own\.csv:5: 'fear': not a number"):
        es.load_norms(path)


def test_a_table_that_is_not_a_table_is_refused_by_column_name_or_encoding(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("word,valence,arousal\njoy,1,2\n")
    with pytest.raises(ValueError, match=r"own\.csv: column 'dominance' is missing; needed: word, valence, arousal"):
        es.load_norms(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"own\.csv: column 'arousal' is missing"):
        es.load_norms(path)
    path.write_bytes(b"word,valence,arousal,dominance\ncaf\xe9,1,2,3\n")
    with pytest.raises(ValueError, match=r"own\.csv: not UTF-8 text"):
        es.load_norms(path)
    with pytest.raises(FileNotFoundError, match=r"unknown norms table 'glasgow'; did you mean 'glasgow_2019'\?"):
        es.load_norms("glasgow")


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


def test_core_is_frozen_and_breaks_none_of_its_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    core = es.load_emotion_set("core")
    if core.sha256 is None:
        pytest.skip("the texts are not frozen yet, and nothing may be measured on them before")
    assert core.sha256 == core.fingerprint
    monkeypatch.setattr(es, "_tfidf", lambda *_: {})  # information that takes most of a minute, and no rule
    assert es.check_emotion_set(core).violations == ()


# --- pairs and stems --------------------------------------------------------------------------------------------------


def test_the_shipped_pairs_change_one_fact_each_and_as_many_for_the_control() -> None:
    """Patching compares columns: a prompt that is longer than its pair would move every word after the change."""
    pairs = es.load_pairs()
    core = es.load_emotion_set("core")
    assert len(pairs) == 60
    assert len({t for p in pairs for t in (p.clean, p.corrupted, p.control)}) == 180
    for p in pairs:
        clean = p.clean.split()
        for other in (p.corrupted.split(), p.control.split()):
            assert len(other) == len(clean), p.id
            assert 1 <= sum(a != b for a, b in zip(clean, other, strict=True)) <= 2, p.id
        assert p.corrupted.split()[-1] == p.control.split()[-1] == clean[-1], p.id  # where the feeling would be named
        assert p.emotion_clean != p.emotion_corrupted
        assert {p.emotion_clean, p.emotion_corrupted} <= set(core.names)


def test_no_shipped_pair_or_stem_names_a_feeling_already() -> None:
    core = es.load_emotion_set("core")
    for p in es.load_pairs():
        for e in (p.emotion_clean, p.emotion_corrupted):
            assert es.leaks(f"{p.clean} {p.corrupted} {p.control}", core[e]) == [], p.id
    exact = [
        e.model_copy(update={"forbidden": []}) for e in core.emotions
    ]  # "happ*" is for stories; "happened" is no feeling
    for stem in (*es.load_stems().choose, *es.load_stems().report):
        assert [word for e in exact for word in es.leaks(stem, e)] == [], stem


def test_the_shipped_stems_are_chosen_on_one_half_and_reported_on_the_other() -> None:
    stems = es.load_stems()
    assert (len(stems.choose), len(stems.report)) == (12, 12)
    assert len({*stems.choose, *stems.report}) == 24


def _pair(**change: str) -> str:
    row = {
        "id": "a",
        "clean": "x",
        "corrupted": "y",
        "control": "z",
        "emotion_clean": "joy",
        "emotion_corrupted": "fear",
    }
    return json.dumps({k: v for k, v in (row | change).items() if v != "-"}) + "\n"


def test_pairs_of_ones_own_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(_pair() + "\n" + _pair(id="b", clean="Ünal felt"))
    assert [(p.id, p.clean) for p in es.load_pairs(path)] == [("a", "x"), ("b", "Ünal felt")]
    assert es.load_pairs(str(path))[0].emotion_corrupted == "fear"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (_pair() + _pair(), r"own\.jsonl: two pairs have the id 'a'"),
        (_pair(corrupted="x"), r"own\.jsonl: pair 'a': clean and corrupted are the same prompt"),
        (_pair(control="x"), r"own\.jsonl: pair 'a': clean and control are the same prompt"),
        (_pair() + _pair(id="b", control="-"), r"own\.jsonl:2: control: field required"),
        (_pair(clean=""), r"own\.jsonl:1: clean: string should have at least 1 character"),
        (_pair(emotion="joy"), r"own\.jsonl:1: emotion: this key is not known here \(found 'joy'\)"),
        (_pair() + "{broken\n", r"own\.jsonl:2: not valid JSON"),
    ],
    ids=["twice", "same", "same control", "missing", "empty", "unknown", "broken"],
)
def test_a_wrong_pair_is_named_by_line_and_field(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        es.load_pairs(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("choose: [a]\nreport: [b, a]\n", r"'a' is in both halves; what was chosen on cannot be reported on"),
        ("choose: [a]\n", r"own\.yaml:1: report: field required"),
        ("choose: [a]\nreport: []\n", r"own\.yaml:2: report: list should have at least 1 item"),
        ("choose: [a]\nreport: [b]\nmore: [c]\n", r"own\.yaml:3: more: this key is not known here"),
        ("choose: [a]\nreport: b\n", r"own\.yaml:2: report: input should be a valid list \(found 'b'\)"),
        ("choose: [a\n", r"own\.yaml:\d: not valid YAML"),
    ],
    ids=["both", "missing", "none", "unknown", "no list", "no yaml"],
)
def test_wrong_stems_are_named_by_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        es.load_stems(path)


def test_stems_of_ones_own_are_read_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text('choose: ["Sie fühlt"]\nreport: ["Er fühlt", "Ich fühle"]\n', encoding="utf-8")
    assert es.load_stems(path) == es.Stems(choose=["Sie fühlt"], report=["Er fühlt", "Ich fühle"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        es.load_stems(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        es.load_pairs(tmp_path / "nowhere.jsonl")

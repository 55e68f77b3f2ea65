"""Emotion sets as files: what a wrong file says, that a strange file does no harm, views, what is shipped, and saving."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
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
    write,
    write_files,
)

from emolens import sets as es


@pytest.fixture
def small(tmp_path: Path) -> es.EmotionSet:
    return es.load_emotion_set(write_files(tmp_path / "small").parent)


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


def test_the_shipped_sets_are_listed_and_load_by_name() -> None:
    assert "core" in es.list_emotion_sets()
    assert es.load_emotion_set("core").name == "core"


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


def test_a_joined_set_is_loaded_by_the_names_with_a_plus_and_survives_a_file(
    tmp_path: Path,
) -> None:
    joined = es.load_emotion_set("core2+core")
    assert joined.name == "core2+core"
    assert (len(joined.texts()), len(joined.story_topics), joined.edition) == (768, 32, 1)
    copy = es.load_emotion_set(es.save_emotion_set(joined, tmp_path / "copy"))
    assert (copy.fingerprint, copy.topics, copy.story_topics) == (
        joined.fingerprint,
        joined.topics,
        joined.story_topics,
    )
    assert copy.stories["joy"][0].source == "core2"


def test_a_part_of_a_joined_set_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="unknown emotion set 'core3'; did you mean 'core'"):
        es.load_emotion_set("core2+core3")


def test_a_topic_of_its_own_length_is_checked(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"topics: 'kitchen': length: found \[9, 5\]; allowed: \[least, most\]"
    ):
        load(tmp_path, lambda s: s["topics"][0].update(length=[9, 5]))


def test_a_set_joined_of_long_names_can_be_saved_and_loaded(
    tmp_path: Path, small: es.EmotionSet
) -> None:
    def long(letter: str) -> es.EmotionSet:
        stories = {
            e: tuple(t.model_copy(update={"text": f"{letter} {t.text}"}) for t in small.stories[e])
            for e in small.names
        }
        return replace(small, name=letter * 80, stories=stories, neutral=())

    joined = es.join_emotion_sets([long(letter) for letter in "abcd"])
    copy = es.load_emotion_set(es.save_emotion_set(joined, tmp_path / "copy"))
    assert (copy.name, copy.fingerprint) == (joined.name, joined.fingerprint)
    with pytest.raises(FileNotFoundError, match="unknown emotion set 'aaa"):
        es.load_emotion_set(joined.name)


def _first_of_joy(s: es.EmotionSet, *kept: Any) -> es.EmotionSet:
    """The set with others in place of the first story of joy."""
    return replace(s, stories=s.stories | {"joy": (*kept, *s.stories["joy"][1:])})


UNREADABLE: dict[str, tuple[Callable[[es.EmotionSet], es.EmotionSet], str]] = {
    "topics not shared": (_first_of_joy, "do not share their topics: 'kitchen' is told"),
    "nothing said": (
        lambda s: _first_of_joy(s, s.stories["joy"][0].model_copy(update={"text": " "})),
        r"stories/000-joy\.jsonl:1: text: the text is empty",
    ),
    "no such language": (
        lambda s: replace(s, language="english"),
        r"set\.yaml:1: language: string should match",
    ),
    "a name without end": (
        lambda s: replace(s, name="a" * 3000),
        r"set\.yaml:1: name: string should have at most",
    ),
    "no topics": (lambda s: replace(s, topics=()), "unknown topic 'kitchen'"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_could_not_be_loaded_again_is_not_saved(
    tmp_path: Path, small: es.EmotionSet, what: str
) -> None:
    change, message = UNREADABLE[what]
    with pytest.raises(ValueError, match=message):
        es.save_emotion_set(change(small), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_plus_in_the_name_of_a_folder_is_no_join(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    with pytest.raises(FileNotFoundError, match=re.escape(f"unknown emotion set '{folder}'")):
        es.load_emotion_set(f"{folder}+core")
    with pytest.raises(FileNotFoundError, match=re.escape(f"unknown emotion set '{folder}'")):
        es.load_emotion_set(f"core+{folder}")
    write_files(folder)
    assert es.load_emotion_set(folder).name == "small"
    with pytest.raises(ValueError, match="'small' and 'core' do not have the same emotions"):
        es.load_emotion_set(f"{folder}+core")


@pytest.mark.parametrize("key", ["id", "topic", "text"])
def test_blanks_are_no_text_and_no_name(tmp_path: Path, key: str) -> None:
    path = write_files(tmp_path / "own")
    file = path.parent / "stories" / "joy.jsonl"
    first, *others = file.read_text(encoding="utf-8").splitlines()
    blank = json.dumps(json.loads(first) | {key: " \n\t "})
    file.write_text("\n".join([blank, *others]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"joy\.jsonl:1: {key}: the text is empty"):
        es.load_emotion_set(path)

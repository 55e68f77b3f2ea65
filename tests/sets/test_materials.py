"""Materials of the experiments: what is shipped, what one's own files may be, and what a wrong one says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import emolens as em
from emolens import sets as es
from emolens.sets import dialogues as talks
from emolens.sets import items as items_room
from emolens.sets import materials
from emolens.sets.wording import leaks


def test_the_shipped_pairs_change_one_fact_each_and_as_many_for_the_control() -> None:
    """Patching compares columns: a prompt that is longer than its pair would move every word after the change."""
    pairs = materials.load_pairs()
    core = es.load_emotion_set("core")
    assert len(pairs) == 60
    assert len({t for p in pairs for t in (p.clean, p.corrupted, p.control)}) == 180
    for p in pairs:
        clean = p.clean.split()
        for other in (p.corrupted.split(), p.control.split()):
            assert len(other) == len(clean), p.id
            assert 1 <= sum(a != b for a, b in zip(clean, other, strict=True)) <= 2, p.id
        assert p.corrupted.split()[-1] == p.control.split()[-1] == clean[-1], (
            p.id
        )  # where the feeling would be named
        assert p.emotion_clean != p.emotion_corrupted
        assert {p.emotion_clean, p.emotion_corrupted} <= set(core.names)


def test_no_shipped_pair_or_stem_names_a_feeling_already() -> None:
    core = es.load_emotion_set("core")
    for p in materials.load_pairs():
        for e in (p.emotion_clean, p.emotion_corrupted):
            assert leaks(f"{p.clean} {p.corrupted} {p.control}", core[e]) == [], p.id
    exact = [
        e.model_copy(update={"forbidden": []}) for e in core.emotions
    ]  # "happ*" is for stories; "happened" is no feeling
    for stem in (*materials.load_stems().choose, *materials.load_stems().report):
        assert [word for e in exact for word in leaks(stem, e)] == [], stem


def test_the_shipped_stems_are_chosen_on_one_half_and_reported_on_the_other() -> None:
    stems = materials.load_stems()
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
    path.write_text(_pair() + "\n" + _pair(id="b", clean="Ünal felt"), encoding="utf-8")
    assert [(p.id, p.clean) for p in materials.load_pairs(path)] == [("a", "x"), ("b", "Ünal felt")]
    assert materials.load_pairs(str(path))[0].emotion_corrupted == "fear"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (_pair() + _pair(), r"own\.jsonl: two records have the id 'a'"),
        (_pair(corrupted="x"), r"own\.jsonl: pair 'a': clean and corrupted are the same prompt"),
        (_pair(control="x"), r"own\.jsonl: pair 'a': clean and control are the same prompt"),
        (_pair() + _pair(id="b", control="-"), r"own\.jsonl:2: control: field required"),
        (_pair(clean=""), r"own\.jsonl:1: clean: string should have at least 1 character"),
        (
            _pair(emotion="joy"),
            r"own\.jsonl:1: emotion: this key is not known here \(found 'joy'\)",
        ),
        (_pair() + "{broken\n", r"own\.jsonl:2: not valid JSON"),
    ],
    ids=["twice", "same", "same control", "missing", "empty", "unknown", "broken"],
)
def test_a_wrong_pair_is_named_by_line_and_field(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        materials.load_pairs(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "choose: [a]\nreport: [b, a]\n",
            r"'a' is in both halves; what was chosen on cannot be reported on",
        ),
        ("choose: [a]\n", r"own\.yaml:1: report: field required"),
        ("choose: [a]\nreport: []\n", r"own\.yaml:2: report: list should have at least 1 item"),
        ("choose: [a]\nreport: [b]\nmore: [c]\n", r"own\.yaml:3: more: this key is not known here"),
        (
            "choose: [a]\nreport: b\n",
            r"own\.yaml:2: report: input should be a valid list \(found 'b'\)",
        ),
        ("choose: [a\n", r"own\.yaml:\d: not valid YAML"),
    ],
    ids=["both", "missing", "none", "unknown", "no list", "no yaml"],
)
def test_wrong_stems_are_named_by_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        materials.load_stems(path)


def test_stems_of_ones_own_are_read_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text('choose: ["Sie fühlt"]\nreport: ["Er fühlt", "Ich fühle"]\n', encoding="utf-8")
    assert materials.load_stems(path) == materials.Stems(
        choose=["Sie fühlt"], report=["Er fühlt", "Ich fühle"]
    )
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        materials.load_stems(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        materials.load_pairs(tmp_path / "nowhere.jsonl")


# --- the other materials ----------------------------------------------------------------------------------------------


def test_what_is_shipped_has_the_shape_that_the_data_card_says() -> None:
    core = es.load_emotion_set("core")
    scenarios = materials.load_scenarios()
    assert {(s.emotion, s.split) for s in scenarios} == {
        (e, k) for e in core.names for k in ("main", "test")
    }
    assert len(scenarios) == 96
    intensities = materials.load_intensities()
    assert (len(intensities), {len(r.values) for r in intensities}) == (16, {8})
    items = items_room.load_items()
    assert len(items) == 40
    assert {r.kind for r in items} == {"negation", "prefix", "person"}
    activities = materials.load_activities()
    assert {
        c: sum(a.category == c for a in activities) for c in materials.CATEGORIES
    } == dict.fromkeys(materials.CATEGORIES, 8)
    dialogues = talks.load_dialogues()
    assert len(dialogues) == 240
    assert {len(d.turns) for d in dialogues} == {6, 7, 8}
    assert len({tuple(d.emotions.values()) for d in dialogues}) == 15 * 15
    deflections = talks.load_deflections()
    assert len(deflections) == 120
    for d in deflections:
        for span in d.spans:
            assert d.turns[span.turn].text[span.start : span.end].strip()


def test_an_intensity_writes_its_numbers_into_the_sentence() -> None:
    row = materials.Intensity(
        id="a", text="{x} of {x}", values=[0.5, 7, 20_000], expected={"fear": 1}
    )
    assert row.texts == ["0.5 of 0.5", "7 of 7", "20,000 of 20,000"]


_TURNS = [
    {"speaker": s, "text": f"line {k}", "own": o, "other": "joyful" if o == "sad" else "sad"}
    for k, (s, o) in enumerate([("A", "sad"), ("B", "joyful"), ("A", "sad")])
]
_FELT = {"id": "a", "topic": "t", "emotions": {"A": "sad", "B": "joyful"}, "turns": _TURNS}
_MASK = {
    "id": "a", "topic": "t", "felt": "sad", "displayed": "joyful", "speaker": "A",
    "turns": [{"speaker": "A", "text": "All is well."}, {"speaker": "B", "text": "Good."}], "spans": [{"turn": 0, "start": 0, "end": 12}],
}  # fmt: skip


_SHOWN = _MASK | {"kind": "shown", "displayed": "sad", "preamble": "A is sad and says so."}
_NONE = _MASK | {"kind": "none", "felt": None, "displayed": None, "spans": []}
_CHANGE = {
    "id": "a", "topic": "t", "kind": "change", "emotions": {"A": "sad", "B": "joyful"}, "changes": {"speaker": "B", "to": "proud", "from_turn": 2},
    "turns": [_TURNS[0], {"speaker": "B", "text": "x", "own": "proud", "other": "sad"}, {"speaker": "A", "text": "x", "own": "sad", "other": "proud"}],
}  # fmt: skip
_NEGATORS = {
    "id": "a", "kind": "negators", "emotion": "anger", "affirmed": "She was angry.",
    "negated": ["She was not angry.", "She was no longer angry."], "controls": ["She was then angry.", "She was just then angry."],
}  # fmt: skip
_PAIR = {
    "id": "a",
    "value": 20000,
    "grave": "20,000 homes burned.",
    "harmless": "20,000 homes sold.",
    "expected": {"fear": 1},
}
_REPLIES = {
    "id": "a", "kind": "sycophancy", "topic": "t", "text": "x", "claim": "false", "agreeing": "yes", "honest": "no", "harsh": "no",
}  # fmt: skip


@pytest.mark.parametrize(
    ("load", "good", "change", "message"),
    [
        ("scenarios", {"id": "a", "emotion": "joy", "split": "main", "text": "x"}, {"split": "train"}, r"split: input should be 'main' or 'test'"),
        ("intensities", {"id": "a", "text": "{x} mg", "values": [1, 2, 3], "expected": {"fear": 1}}, {"values": [1, 3, 2]}, r"values must grow from each to the next, found \[1, 3, 2\]"),
        ("intensities", {"id": "a", "text": "{x} mg", "values": [1, 2, 3], "expected": {"fear": 1}}, {"text": "mg"}, r"text: string should match pattern"),
        ("intensities", {"id": "a", "text": "{x} mg", "values": [1, 2, 3], "expected": {"fear": 1}}, {"expected": {"fear": 2}}, r"expected\.fear: input should be -1 or 1"),
        ("items", {"id": "a", "kind": "negation", "emotion": "joy", "affirmed": "x", "negated": "y"}, {"kind": "irony"}, r"'irony'"),
        ("items", {"id": "a", "kind": "person", "text": "Ann and Bo", "persons": [{"name": "Ann", "emotion": "joy"}, {"name": "Bo", "emotion": "fear"}]}, {"text": "Ann"}, r"not in the text: \['Bo'\]"),
        ("activities", {"id": "a", "category": "helpful", "text": "x"}, {"category": "odd"}, r"category: input should be 'helpful'"),
        ("dialogues", _FELT, {"turns": [_TURNS[0], _TURNS[2]]}, r"must take turns, found \['A', 'A'\]"),
        ("dialogues", _FELT, {"emotions": {"A": "joyful", "B": "sad"}}, r"turn 0: own and other are not what `emotions` says"),
        ("dialogues", _FELT, {"emotions": {"A": "sad"}}, r"a dialogue has two speakers"),
        ("deflections", _MASK, {"spans": [{"turn": 1, "start": 0, "end": 4}]}, r"is not inside a turn of speaker 'A'"),
        ("deflections", _MASK, {"spans": [{"turn": 0, "start": 0, "end": 99}]}, r"is not inside a turn of speaker 'A'"),
        ("deflections", _MASK, {"displayed": "sad"}, r"kind 'hidden' needs two different emotions"),
        ("deflections", _MASK, {"spans": []}, r"kind 'hidden' has `felt`, `displayed` and `spans`"),
        ("deflections", _SHOWN, {"displayed": "joyful"}, r"kind 'shown' needs the same emotion twice"),
        ("deflections", _NONE, {"felt": "sad"}, r"kind 'none' has no `felt`, `displayed` and `spans`"),
        ("dialogues", _CHANGE, {"changes": None}, r"a dialogue of kind 'change' has `changes`"),
        ("dialogues", _CHANGE, {"kind": "grid"}, r"a dialogue of kind 'grid' has no `changes`"),
        ("dialogues", _CHANGE, {"changes": {"speaker": "B", "to": "proud", "from_turn": 4}}, r"is about a speaker and a turn of the dialogue, found 'B' and 4"),
        ("dialogues", _CHANGE, {"changes": {"speaker": "B", "to": "proud", "from_turn": 3}}, r"turn 1: own and other are not what `emotions` and `changes` say"),
        ("items", _NEGATORS, {"controls": ["She was then angry."]}, r"a control of as many words, found \[4, 5\] and \[4\] words"),
        ("intensity_pairs", _PAIR, {"harmless": _PAIR["grave"]}, r"must differ, and both hold '20,000'"),
        ("intensity_pairs", _PAIR, {"value": 2000}, r"must differ, and both hold '2000'"),
        ("scenarios", {"id": "a", "emotion": "joy", "split": "main", "text": "x", "form": "third"}, {"form": "first"}, r"form: input should be 'question', 'third' or 'statement'"),
        ("scenarios", {"id": "a", "emotion": "joy", "split": "main", "text": "x"}, {"text": " \t"}, r"text: the text is empty \(found ' .t'\)"),
        ("prompts", {"id": "a", "kind": "role", "topic": "t", "text": "x", "theme": "dark"}, {"theme": "grim"}, r"theme: input should be 'bright', 'dark' or 'neither'"),
        ("prompts", {"id": "a", "kind": "rewrite", "topic": "t", "text": "x", "task": "rewriting", "source": "y"}, {"source": None}, r"source: input should be a valid string"),
        ("prompts", {"id": "a", "kind": "format", "topic": "t", "text": "x", "manner": "curt"}, {"kind": "odd"}, r"'odd'"),
        ("prompts", _REPLIES, {"claim": "lie"}, r"claim: input should be 'false', 'work' or 'plan'"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_named_and_the_right_one_is_read(
    tmp_path: Path, load: str, good: dict, change: dict, message: str
) -> None:
    path, read = tmp_path / "own.jsonl", getattr(em.sets, f"load_{load}")
    path.write_text(json.dumps(good) + "\n", encoding="utf-8")
    assert len(read(path)) == 1
    path.write_text(
        json.dumps(good) + "\n" + json.dumps(good | {"id": "b"} | change) + "\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"own\.jsonl:2: .*" + message):
        read(path)


def test_an_empty_file_of_materials_is_no_material(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.jsonl: empty"):
        materials.load_scenarios(tmp_path / "own.jsonl")


# --- second editions --------------------------------------------------------------------------------------------------


def test_a_shipped_file_is_read_by_its_name_and_a_file_of_ones_own_by_its_path(
    tmp_path: Path,
) -> None:
    assert materials.load_scenarios("scenarios") == materials.load_scenarios()
    assert talks.load_deflections("deflections") == talks.load_deflections()
    with pytest.raises(
        FileNotFoundError, match=r"unknown .*'deflections9'; did you mean 'deflections"
    ):
        talks.load_deflections("deflections9")
    with pytest.raises(
        FileNotFoundError, match=r"unknown .*'wrong'; allowed: pairs, pairs2 \(or give a file\)"
    ):
        materials.load_pairs("wrong")
    (tmp_path / "scenarios.jsonl").write_text(
        json.dumps({"id": "a", "emotion": "joy", "split": "main", "text": "x"}), encoding="utf-8"
    )
    assert len(materials.load_scenarios(tmp_path / "scenarios.jsonl")) == 1


def test_editions_are_what_is_shipped_of_a_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pairs", "pairs2", "pairs_of_shoes", "prompts"):
        (tmp_path / f"{name}.jsonl").write_text(_pair(), encoding="utf-8")
    monkeypatch.setattr(materials, "data_root", lambda: tmp_path)
    assert materials.editions("pairs") == ["pairs", "pairs2"]
    assert materials.editions("stems") == []
    assert materials.load_pairs("pairs2")[0].id == "a"


def test_the_emotion_that_changes_midway_is_felt_from_its_turn_on() -> None:
    d = talks.FeltDialogue.model_validate(_CHANGE)
    assert [d.felt(k)["B"] for k in range(3)] == ["joyful", "proud", "proud"]
    assert [d.felt(k)["A"] for k in range(3)] == ["sad"] * 3


def test_the_mask_of_the_first_edition_speaks_in_every_turn_once_it_has_begun() -> None:
    """59 of its clauses stood outside any span: one in each of 59 turns."""
    rows = talks.load_deflections()
    assert [(d.id, gap) for d in rows for gap in d.gaps] == []
    unmarked = [
        (d.id, k)
        for d in rows
        for k, t in enumerate(d.turns)
        if t.speaker == d.speaker and all(s.turn != k for s in d.spans)
    ]
    assert unmarked == [
        ("surprised-as-guilty", 0)
    ]  # "Excuse me, that's water out there.": no mask yet


@pytest.mark.parametrize(
    ("spans", "gap"),
    [
        ([(0, 0, 12)], "turn 2 has no span"),
        ([(0, 0, 12), (2, 0, 4), (2, 5, 9)], "turn 2: two spans meet at 4"),
        ([(0, 0, 12), (2, 0, 3)], r"turn 2: the span [0, 3) cuts a clause"),
        ([(0, 4, 12), (2, 0, 4)], r"turn 0: the span [4, 12) cuts a clause"),
    ],
)
def test_gaps_between_spans_are_found(spans: list[tuple[int, int, int]], gap: str) -> None:
    turns = [*_MASK["turns"], {"speaker": "A", "text": "Fun. Yes. The keys are there."}]
    marked = [{"turn": t, "start": a, "end": b} for t, a, b in spans]
    assert talks.Deflection.model_validate(_MASK | {"turns": turns, "spans": marked}).gaps == [gap]
    good = [{"turn": 0, "start": 0, "end": 12}, {"turn": 2, "start": 0, "end": 9}]
    assert talks.Deflection.model_validate(_MASK | {"turns": turns, "spans": good}).gaps == []


def test_a_control_expects_nothing_and_a_swapped_item_knows_its_twin() -> None:
    row = materials.Intensity(id="a", text="The label says {x}.", values=[5, 6, 7])
    assert row.expected == {}
    people = [{"name": "Ann", "emotion": "joy"}, {"name": "Bo", "emotion": "fear"}]
    twin = items_room.PersonBinding(
        id="person-1-swapped", kind="person", text="Ann, Bo", persons=people
    )  # pyright: ignore[reportArgumentType]  # pydantic makes Feelers
    assert twin.twin_of == "person-1"
    assert twin.model_copy(update={"id": "person-1"}).twin_of is None


def test_the_twin_of_a_challenging_prompt_must_be_there(tmp_path: Path) -> None:
    hard = {
        "id": "h",
        "kind": "challenging",
        "topic": "t",
        "text": "x",
        "challenge": "pressure",
        "twin": "p",
    }
    plain = {"id": "p", "kind": "twin", "topic": "t", "text": "y", "of": "h"}
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(hard)}\n{json.dumps(plain)}\n", encoding="utf-8")
    assert [p.kind for p in em.sets.load_prompts(path)] == ["challenging", "twin"]
    path.write_text(f"{json.dumps(hard)}\n{json.dumps(plain | {'of': 'p'})}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'h': 'p' is not its twin \(kind twin, of 'h'\)"):
        em.sets.load_prompts(path)


SNIPPETS = Path(__file__).parent / "snippets.jsonl"


def test_snippets_are_passages_of_a_file_of_ones_own(tmp_path: Path) -> None:
    snippets = materials.load_snippets(SNIPPETS)
    assert [(s.kind, s.year) for s in snippets] == [("minutes", 2026), ("recipe", 2026)]
    path = tmp_path / "own.jsonl"
    row = json.loads(SNIPPETS.read_text(encoding="utf-8").splitlines()[0])
    path.write_text(json.dumps(row | {"text": "Too short."}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.jsonl:1: .*a snippet has 60 to 120 words, found 2"):
        materials.load_snippets(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.jsonl: empty"):
        materials.load_snippets(path)

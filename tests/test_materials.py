"""Materials of the experiments: what is shipped, what one's own files may be, and what a wrong one says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emolens import emotion_sets as es
from emolens import materials
from emolens.set_checks import leaks


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
        assert p.corrupted.split()[-1] == p.control.split()[-1] == clean[-1], p.id  # where the feeling would be named
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
    path.write_text(_pair() + "\n" + _pair(id="b", clean="Ünal felt"))
    assert [(p.id, p.clean) for p in materials.load_pairs(path)] == [("a", "x"), ("b", "Ünal felt")]
    assert materials.load_pairs(str(path))[0].emotion_corrupted == "fear"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (_pair() + _pair(), r"own\.jsonl: two records have the id 'a'"),
        (_pair() + _pair(id="b", control="-"), r"own\.jsonl:2: control: field required"),
        (_pair(clean=""), r"own\.jsonl:1: clean: string should have at least 1 character"),
        (_pair(emotion="joy"), r"own\.jsonl:1: emotion: this key is not known here \(found 'joy'\)"),
        (_pair() + "{broken\n", r"own\.jsonl:2: not valid JSON"),
    ],
    ids=["twice", "missing", "empty", "unknown", "broken"],
)
def test_a_wrong_pair_is_named_by_line_and_field(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        materials.load_pairs(path)


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
        materials.load_stems(path)


def test_stems_of_ones_own_are_read_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text('choose: ["Sie fühlt"]\nreport: ["Er fühlt", "Ich fühle"]\n', encoding="utf-8")
    assert materials.load_stems(path) == materials.Stems(choose=["Sie fühlt"], report=["Er fühlt", "Ich fühle"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        materials.load_stems(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        materials.load_pairs(tmp_path / "nowhere.jsonl")

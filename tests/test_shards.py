"""What is kept of an interrupted run, and by what code a result knows that it is its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import emolens
from emolens import shards, study
from emolens.collect import collection
from emolens.shards import Kept

PACKAGE = Path(emolens.__file__).parent
COLLECT = sorted(p.name for p in (PACKAGE / "collect").glob("*.py"))


def never() -> None:
    raise AssertionError("made again")


def test_what_is_kept_is_read_and_is_the_same_the_first_time(tmp_path):
    found = {"n": np.int64(3), "share": np.float32(0.1), "pair": (1, 2), "text": "Straße"}
    first = Kept(tmp_path / "kept", "a").get("one", lambda: found)
    assert first == {"n": 3, "share": float(np.float32(0.1)), "pair": [1, 2], "text": "Straße"}
    assert Kept(tmp_path / "kept", "a").get("one", never) == first
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["one.json"]


def test_what_is_damaged_or_of_another_maker_is_made_again(tmp_path):
    kept = Kept(tmp_path, "a")
    kept.get("one", lambda: 1)
    for wrong in (
        "",
        "{",
        "[]",
        "null",
        '{"made_by": "a"}',
        json.dumps({"made_by": "b", "result": 1}),
    ):
        (tmp_path / "one.json").write_text(wrong, encoding="utf-8")
        assert kept.get("one", lambda: 2) == 2
        assert kept.get("one", never) == 2
    assert Kept(None, "a").get("one", lambda: 3) == 3


def test_a_unit_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError, match="made again"):
        Kept(tmp_path / "kept", "a").get("one", never)
    with pytest.raises(AttributeError):
        Kept(tmp_path / "kept", "a").get("one", lambda: {1, 2})  # no JSON
    assert not list(tmp_path.glob("kept/*"))


def test_a_folder_of_something_else_is_refused_by_who_asks(tmp_path):
    kept = Kept(tmp_path, "a")
    kept.check_own()
    kept.get("one", lambda: 1)
    (tmp_path / "two.json").write_text("{", encoding="utf-8")  # as a damaged disk leaves it
    kept.check_own()
    with pytest.raises(FileExistsError, match=r"results of something else \(one.json\)"):
        Kept(tmp_path, "b").check_own()
    (tmp_path / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"something else \(thesis.txt\); choose another"):
        kept.check_own()
    with pytest.raises(FileExistsError, match="is a file; give the name of a folder"):
        Kept(tmp_path / "thesis.txt", "a").check_own()


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A copy of the package whose files are those that a digest is taken of."""
    copy = tmp_path / "emolens"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "_data"))
    monkeypatch.setattr(shards, "__file__", str(copy / "shards.py"))
    monkeypatch.setattr(study, "__file__", str(copy / "study.py"))
    return copy


@pytest.mark.parametrize("name", COLLECT)
def test_editing_any_file_of_collect_changes_what_a_shard_is_made_by(copied, name):
    before = collection._code()
    file = copied / "collect" / name
    file.write_text(file.read_text(encoding="utf-8") + "\n# an edit\n", encoding="utf-8")
    assert collection._code() != before


def test_a_new_file_of_collect_changes_it_too_and_the_report_does_not(copied):
    before = collection._code()
    for file in (copied / "report").glob("*.py"):
        file.write_text("", encoding="utf-8")
    assert collection._code() == before
    (copied / "collect" / "new.py").write_text("", encoding="utf-8")
    (copied / "collect" / "new.py").write_text("SKIP = 1\n", encoding="utf-8")
    assert collection._code() != before


def test_a_docstring_of_the_report_discards_no_finished_experiment(copied):
    before = study._code()
    page = copied / "report" / "page.py"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace('"""', '"""Edited. ', 1), encoding="utf-8")
    assert page.read_text(encoding="utf-8") != text
    assert study._code() == before
    rules = copied / "experiments" / "rules.py"
    rules.write_text(rules.read_text(encoding="utf-8") + "\n# an edit\n", encoding="utf-8")
    assert study._code() != before

"""The list of edits that tests must notice (`make mutants`) still applies to the code as it is."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutations import EDITS, ROOT, Edit


def test_there_are_enough_edits_and_each_has_a_name_of_its_own():
    assert len(EDITS) >= 60
    assert Counter(e.name for e in EDITS).most_common(1)[0][1] == 1
    assert {e.file.split("/")[0] for e in EDITS} >= {
        "experiments",
        "report",
        "stats.py",
        "study.py",
        "interventions",
        "sets",
    }


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
def test_an_edit_applies_once_and_leaves_python(edit):
    source = (ROOT / "emolens" / edit.file).read_text(encoding="utf-8")
    changed = edit.applied(source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    assert (Path(__file__).parent / edit.tests.split()[0]).is_file()


def test_an_edit_that_no_longer_fits_is_an_error():
    with pytest.raises(ValueError, match=r"gone: 'x = 1' is 0 times in a\.py, not once"):
        Edit("gone", "a.py", "x = 1", "x = 2", "t").applied("y = 1")
    with pytest.raises(ValueError, match="is 2 times"):
        Edit("twice", "a.py", "1", "2", "t").applied("x = 1 + 1")

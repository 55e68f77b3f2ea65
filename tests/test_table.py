"""A table with labels: rows that unpack, columns by name, and a view that nothing in it can break."""

from __future__ import annotations

import pytest

from emolens._table import SHOWN, Table

TABLE = Table(("emotion", "z"), (("joy", 2.5), ("fear", -12.25), ("calm", 0.125)))


def test_rows_unpack_and_columns_have_names():
    assert [emotion for emotion, _ in TABLE] == TABLE["emotion"] == ["joy", "fear", "calm"]
    assert len(TABLE) == 3
    assert TABLE[-1] == ("calm", 0.125)
    assert TABLE[:2] == Table(("emotion", "z"), TABLE.rows[:2])
    assert TABLE.to_dicts()[1] == {"emotion": "fear", "z": -12.25}
    with pytest.raises(KeyError, match="no column 'cosine' here; there are: emotion, z"):
        TABLE["cosine"]


def test_a_row_of_another_length_and_two_columns_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"row \('joy',\) does not fit the columns emotion, z"):
        Table(("emotion", "z"), (("joy", 1.0), ("joy",)))
    with pytest.raises(ValueError, match="each needs a name of its own"):
        Table(("z", "z"), ())


def test_numbers_of_a_column_are_printed_alike_and_stand_under_each_other():
    assert repr(TABLE).splitlines() == [
        "emotion      z", "joy        2.5", "fear     -12.2", "calm       0.1",
    ]  # fmt: skip
    tiny = repr(Table(("effect", "n"), ((0.00123, 7), (float("nan"), 12))))
    assert tiny.splitlines() == [" effect   n", "0.00123   7", "    nan  12"]
    assert repr(Table(("emotion",), ())) == "emotion"


def test_a_long_table_says_how_much_is_not_shown():
    long = Table(("n",), tuple((i,) for i in range(SHOWN + 5)))
    assert repr(long).splitlines()[-1] == "... 5 more"
    assert long._repr_html_().endswith("... 5 more")
    assert len(repr(long).splitlines()) == SHOWN + 2


def test_what_a_cell_says_stays_in_its_cell():
    bad = Table(("<i>", "n"), (("<script>alert(1)</script>\n\x1b[31mred " + "x" * 99, 1),))
    html = bad._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;i&gt;" in html
    assert len(repr(bad).splitlines()) == 2
    assert "\x1b" not in repr(bad)
    assert all(len(line) < 60 for line in repr(bad).splitlines())

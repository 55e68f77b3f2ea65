"""Human norms: the shipped tables, and tables of one's own however a spreadsheet wrote them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emolens import sets as es
from emolens.sets import norms as norms_room


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

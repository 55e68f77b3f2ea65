"""What people give as texts and labels: files of every kind that is read, names that are not texts, and labels of numpy and pandas."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import emolens as em
from emolens._files import here
from emolens.collect.activations import Activations
from emolens.sets.corpus import open_corpus
from emolens.sets.records import names_a_file

DEEDS = {"joy": "laughed out loud at the door", "fear": "hid behind the door and trembled"}
ROWS = [
    {"text": f"Number {i}, the clerk, {deed} on day {i}.", "emotion": emotion, "topic": f"t{i}"}
    for i in range(4)
    for emotion, deed in DEEDS.items()
]
TEXTS = [r["text"] for r in ROWS]
EMOTIONS = [r["emotion"] for r in ROWS]


def read(path: Path, **options: str) -> list[tuple]:
    return [
        (text, label["emotion"], label["topic"], label["split"])
        for text, label in open_corpus(path, **options).read()
    ]


EXPECTED = [(r["text"], r["emotion"], r["topic"], "main") for r in ROWS]


def write(
    path: Path, separator: str = ",", header: str = "text,emotion,topic", encoding: str = "utf-8"
) -> Path:
    lines = [header.replace(",", separator)] + [
        separator.join(f'"{r[k]}"' for k in ("text", "emotion", "topic")) for r in ROWS
    ]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t.csv", {}),
        ("t.csv", {"separator": ";"}),
        ("t.csv", {"separator": "\t"}),
        ("t.tsv", {"separator": "\t"}),
        ("t.CSV", {"header": "Text, EMOTION ,Topic"}),
        ("t.csv", {"encoding": "utf-8-sig"}),
        ("t.csv", {"encoding": "utf-8-sig", "separator": ";", "header": "TEXT,Emotion,TOPIC"}),
    ],
)
def test_a_table_is_read_however_a_spreadsheet_wrote_it(tmp_path, name, options):
    assert read(write(tmp_path / name, **options)) == EXPECTED


def test_json_lines_are_read_with_keys_in_any_case(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({k.upper(): v for k, v in r.items()}) + "\n" for r in ROWS),
        encoding="utf-8",
    )
    assert read(tmp_path / "t.jsonl") == EXPECTED


def test_a_file_of_lines_is_a_text_a_line(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(TEXTS).encode())
    assert [text for text, *_ in read(tmp_path / "t.txt")] == TEXTS


def test_another_column_can_be_the_text(tmp_path):
    file = write(tmp_path / "t.csv", header="Comment,emotion,topic")
    assert read(file, column="comment") == EXPECTED
    with pytest.raises(
        ValueError,
        match=r"t\.csv:1: no column 'text'; there are: comment, emotion, topic; say which",
    ):
        read(file)
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"comment": "The door.", "text": 3}), encoding="utf-8"
    )
    assert read(tmp_path / "t.jsonl", column="comment") == [("The door.", None, None, "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,emotion\nThe door, open,joy\n", r"t\.csv:2: 3 cells under a header of 2; a text with a ',' in it stands in quotes"),
        (b"text,emotion\nThe door was open\n", r"t\.csv:2: 1 cells under a header of 2"),
        (b'text,emotion\nok,joy\n"The door,joy\n', r"t\.csv:\d: not a table"),
        ("text,emotion\nIch fühle,joy\n".encode("cp1252"), r"t\.csv:2: .*not UTF-8 text \(byte 5\) but another encoding, such as Windows' cp1252; save it as UTF-8"),
        ("text,emotion\nIch,joy\n".encode("utf-16"), r"t\.csv:1: .*not UTF-8 text \(byte 0\) but UTF-16"),
        ("text,emotion\nI sat,joy\n".encode("utf-16-le"), r"t\.csv:1: .*holds zero bytes.*UTF-16"),
        (b"text,emotion\nThe door,joy\n ,fear\n", r"t\.csv:3: text: the text is empty"),
        (b"text,emotion\nThe door,nan\n", r"t\.csv:2: emotion: a label is missing \(found 'nan'\)"),
        (b"text,text\na,b\n", "more than one column 'text'"),
        (b"text,emotion,split\nThe door,joy,dev\n", r"t\.csv:2: split: split 'dev'; allowed: main, other_person, neutral, test, validation \(or train"),
        (b"text,emotion,split\nThe door,joy,neutral\n", r"t\.csv:2: split 'neutral' and the emotion 'joy'"),
        (b"", "no column 'text'; there are: none"),
        (b"text,emotion\rThe door,joy\rThe house,fear\r", r"t\.csv:1: a carriage return parts this line.*save it with line feeds"),
        (b"text,emotion\rThe door,joy\nThe house,fear\n", r"t\.csv:1: a carriage return parts this line"),
    ],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_a_table_that_cannot_be_read_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "t.csv")


def test_lines_of_an_old_mac_are_not_read_as_one_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"The door.\rThe house.\r")
    with pytest.raises(ValueError, match=r"t\.txt:1: a carriage return parts this line"):
        read(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_bytes(b"The door.\r\nThe house.\r\n")
    assert [text for text, *_ in read(tmp_path / "t.txt")] == ["The door.", "The house."]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_pipe_is_not_said_to_be_missing(tmp_path):
    """What a shell gives for <(...) is there, and can be read once only."""
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(
        ValueError, match=r"p\.txt is no file but a pipe or a device; .*standard input"
    ):
        open_corpus(tmp_path / "p.txt")


def test_a_file_of_another_kind_and_a_folder_are_named(tmp_path, toy_set):
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match=r"t\.xlsx: a \.xlsx file is not read here; write it as \.csv"
    ):
        open_corpus(tmp_path / "t.xlsx")
    with pytest.raises(ValueError, match="is a folder; give load_emotion_set"):
        open_corpus(toy_set)
    with pytest.raises(ValueError, match="is a folder; give the files in it"):
        open_corpus(tmp_path)
    (tmp_path / "t.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.json:1: .*one record a line is read"):
        read(tmp_path / "t.json")


def test_an_empty_cell_is_no_label(tmp_path):
    (tmp_path / "t.csv").write_text(
        "text,emotion,topic\nThe door.,,\nThe house.,joy,t1\n", encoding="utf-8"
    )
    assert read(tmp_path / "t.csv") == [
        ("The door.", None, None, ""),
        ("The house.", "joy", "t1", "main"),
    ]


def test_texts_of_the_split_train_are_what_directions_are_made_from(tiny_model, tmp_path):
    file = tmp_path / "t.jsonl"
    rows = [r | ({"split": "train"} if i < 6 else {}) for i, r in enumerate(ROWS)] + [
        ROWS[0] | {"split": "test"}
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    v = em.mean_difference(
        em.collect_resid_post(tiny_model, file, progress=False), remove_neutral=None
    )
    assert v.info["n_per_emotion"] == {"joy": 4, "fear": 4}
    file.write_text("\n".join(json.dumps(r | {"split": "test"}) for r in ROWS), encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=r"at least two emotions, found 0: .* \(8 texts with an emotion are of the split test",
    ):
        em.mean_difference(
            em.collect_resid_post(tiny_model, file, progress=False), remove_neutral=None
        )


# --- names that are not texts -----------------------------------------------------------------------------------------


def test_a_name_is_never_taken_for_a_text(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fear").mkdir()
    (tmp_path / "my notes").write_text("x", encoding="utf-8")
    for name in ("stories.csv", "stories.json", "a/b.txt", "./texts", "~/texts", "C:\\texts.csv", str(tmp_path), "fear", "my notes", "/data/my texts.csv", "comments.dat", "nosuch file.csv", "I saved it as report.txt", "a.log", "t.csv.bz2", "t.jsonl.zst"):  # fmt: skip
        for call in (
            lambda: em.collect_resid_post(tiny_model, name, progress=False),  # noqa: B023
            lambda: em.generate(tiny_model, name, max_new_tokens=1),  # noqa: B023
            lambda: em.check(tiny_model, [], name),  # noqa: B023
        ):
            with pytest.raises(
                ValueError,
                match=r"is one text of a few tokens; for the (file|folder) of that name give pathlib\.Path\(",
            ):
                call()
    with pytest.raises(ValueError, match=r"for the emotion set give load_emotion_set\('core'\)"):
        em.collect_resid_post(tiny_model, "core", progress=False)


@pytest.mark.parametrize("text", ["and/or", "She opened it.", "v1.2", "Node.js", "e.g.", "joy", "\x00", "~nobody-here said so", "3.14", "x" * 5000, "a\nb.csv"])  # fmt: skip
def test_a_text_is_a_text(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_a_file(text) is None


def test_in_a_list_every_string_is_a_text(tiny_model):
    assert (
        len(em.collect_resid_post(tiny_model, ["stories.csv", "core"], progress=False).texts) == 2
    )


# --- labels and texts in memory ---------------------------------------------------------------------------------------


def collect(tiny_model, emotions, **options) -> Activations:
    return em.collect_resid_post(
        tiny_model, options.pop("texts", TEXTS), emotions=emotions, progress=False, **options
    )


def test_labels_of_numpy_pandas_and_torch_are_plain_words(tiny_model, tmp_path):
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    numbers = [0, 1] * 4
    for given, expected in (
        (np.array(EMOTIONS), EMOTIONS), (pd.Series(EMOTIONS), EMOTIONS), (pd.Categorical(EMOTIONS), EMOTIONS), (iter(EMOTIONS), EMOTIONS),
        ([f" {e} " for e in EMOTIONS], EMOTIONS), (numbers, ["0", "1"] * 4), (np.array(numbers), ["0", "1"] * 4), (torch.tensor(numbers), ["0", "1"] * 4),
    ):  # fmt: skip
        acts = collect(tiny_model, given, topics=np.arange(8) // 2, texts=np.array(TEXTS))
        assert [t.emotion for t in acts.texts] == expected
        assert [t.topic for t in acts.texts] == [str(i // 2) for i in range(8)]
        assert {type(t.emotion) for t in acts.texts} == {str}
        acts.save(tmp_path / "acts.safetensors", overwrite=True)
        assert Activations.load(tmp_path / "acts.safetensors").texts == acts.texts
        v = em.mean_difference(acts, remove_neutral=None)
        v.save(tmp_path / "v.safetensors", overwrite=True)
        assert em.load_directions(tmp_path / "v.safetensors").emotions == v.emotions


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), r"emotions\[2\]: a label is missing \(found 'nan'\)"),
        (np.float32("nan"), r"emotions\[2\]: a label is missing"),
        ("nan", r"emotions\[2\]: a label is missing"),
        ("", r"emotions\[2\]: a label is empty"),
        (1.5, r"emotions\[2\]: a label is a word or a whole number \(found '1\.5', a float\)"),
        (True, r"emotions\[2\]: a label is a word or a whole number"),
        (["joy"], r"emotions\[2\]: a label is a word or a whole number"),
        (b"joy", r"emotions\[2\]: a label is a word or a whole number"),
    ],
    ids=repr,
)
def test_a_label_that_is_missing_or_none_is_refused_by_its_number(tiny_model, bad, message):
    given = [*EMOTIONS[:2], bad, *EMOTIONS[3:]]
    with pytest.raises(ValueError, match=message):
        collect(tiny_model, given)
    with pytest.raises(ValueError, match=message.replace("emotions", "topics")):
        collect(tiny_model, EMOTIONS, topics=given)


def test_missing_values_of_numpy_and_pandas_are_refused(tiny_model):
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    for given in (np.array(["joy", "fear", np.nan, "joy"] * 2), pd.Series(["joy", "fear", np.nan, "joy"] * 2), pd.Series([0, 1, None, 1] * 2, dtype="Int64")):  # fmt: skip
        with pytest.raises(ValueError, match=r"emotions\[2\]: a label is missing"):
            collect(tiny_model, given)


def test_none_is_a_text_without_an_emotion(tiny_model):
    acts = collect(tiny_model, [None, *EMOTIONS[1:]])
    assert [(t.emotion, t.split) for t in acts.texts[:2]] == [(None, ""), ("fear", "main")]
    assert em.mean_difference(acts, remove_neutral=None).info["n_per_emotion"] == {
        "fear": 4,
        "joy": 3,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [("joy", "emotions is of type str: give a list, one label a text"), ({"joy": 1}, "emotions is of type dict"), (EMOTIONS[:3], "3 emotions for 8 texts"), (3, "emotions is of type int")],
    ids=str,
)  # fmt: skip
def test_labels_that_are_no_list_are_refused(tiny_model, given, message):
    with pytest.raises(ValueError, match=message):
        collect(tiny_model, given)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["The door.", float("nan")], r"text 1 is missing \(found nan\): leave it out"),
        (["The door.", None], "text 1 is missing"),
        (["The door.", "  "], "text 1 is empty"),
        (
            ["The door.", "caf\udce9"],
            r"text 1 holds half a character \('\\udce9' at place 3\): read it as UTF-8",
        ),
        (["The door.", 3], "text 1 is of type int: a text is a string, or a list of chat messages"),
        ([b"The door."], "text 0 is of type bytes"),
        ({"The door."}, "a set has no order of texts"),
        (7, "texts are a string or a list of them, not of type int"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused_by_its_number(tiny_model, texts, message):
    with pytest.raises(ValueError, match=message):
        em.collect_resid_post(tiny_model, texts, progress=False)


def test_messages_are_one_chat(tiny_model):
    chat = [
        {"role": "user", "content": "The door was open."},
        {"role": "assistant", "content": "It was."},
    ]
    one, listed = (
        em.collect_resid_post(tiny_model, given, progress=False) for given in (chat, [chat])
    )
    assert torch.equal(one.rows, listed.rows)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v(tiny_model):
    return em.mean_difference(collect(tiny_model, EMOTIONS), remove_neutral=None)


TWO = np.int64(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, v: em.collect_resid_post(m, TEXTS, layers=np.arange(3), progress=False).at(np.array([2])),
        lambda m, v: em.collect_resid_post(m, TEXTS, layers=TWO, progress=False),
        lambda m, v: em.collect_resid_post(m, TEXTS, layers=torch.tensor([2]), progress=False).at(TWO),
        lambda m, v: v.at(TWO),
        lambda m, v: v.at(np.array([2])),
        lambda m, v: v["joy", TWO],
        lambda m, v: v[np.array(["joy"])].at(torch.tensor(2)),
        lambda m, v: v.unit(TWO),
        lambda m, v: v.cosine(layer=TWO),
        lambda m, v: v["joy"].nearest(layer=TWO),
        lambda m, v: em.steer_resid_post(v["joy"], layer=TWO, dose=0.1),
        lambda m, v: em.steer_resid_post(v["joy"], layer=np.array([1, 2]), dose=0.1),
        lambda m, v: em.steer_resid_post(v["joy"], layer=TWO, direction_from=TWO, dose=0.1),
        lambda m, v: em.ablate_resid_post(v["joy"], layer=TWO, method="zero"),
        lambda m, v: em.clamp_resid_post(v["joy"], layer=TWO, value=0.1),
        lambda m, v: em.rotate_resid_post(v["joy"], layer=TWO, angle=10.0),
        lambda m, v: em.steer_resid_post(np.ones(32), layer=TWO, dose=1.0, dose_unit="raw"),
        lambda m, v: em.projection(v["joy"], layer=TWO),
        lambda m, v: em.attribute(m, v["joy"], "The door was open.", layer=TWO),
        lambda m, v: em.patch_resid_pre(m, clean="The door was open", corrupted="The door was shut", metric=lambda x: x[:, 0], layers=np.array([2])),
        lambda m, v: em.attribution_patching(m, clean="The door was open", corrupted="The door was shut", metric=lambda x: x[:, 0], layers=TWO),
        lambda m, v: em.sweep(m, ["The door"], v, layers=np.array([2]), doses=np.array([0.1]), target_words={"joy": ["happy"], "fear": ["sorry"]}, progress=False),
        lambda m, v: em.generate(m, "The door", em.steer_resid_post(v["joy"], layer=TWO, dose=0.1), max_new_tokens=1),
    ],
)  # fmt: skip
def test_layers_of_numpy_and_torch_are_taken_everywhere(tiny_model, v, call):
    call(tiny_model, v)


@pytest.mark.parametrize(
    "layer", [True, 1.0, "2", np.float64(2), None, np.bool_(True), torch.tensor(True)]
)
def test_what_is_no_layer_is_refused(tiny_model, v, layer):
    with pytest.raises(ValueError, match="layer"):
        em.collect_resid_post(tiny_model, TEXTS, layers=[layer], progress=False)
    with pytest.raises(ValueError, match="layer"):
        v.at([layer])


def test_a_layer_is_named_once(tiny_model):
    with pytest.raises(ValueError, match="layer 1 is there twice; name each layer once"):
        em.collect_resid_post(tiny_model, TEXTS, layers=[0, 1, np.int64(1)], progress=False)


def test_half_a_character_in_a_chat_is_refused(tiny_model):
    with pytest.raises(ValueError, match="text 0 holds half a character"):
        em.collect_resid_post(
            tiny_model, [[{"role": "user", "content": "caf\udce9"}]], progress=False
        )


# --- lengths ----------------------------------------------------------------------------------------------------------

LONG = "They laughed and nobody said why. " * 60


def test_a_text_longer_than_the_context_is_refused_before_the_first_pass(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "emolens.collect.forward._Pass.run", lambda *a: pytest.fail("a pass was made")
    )
    file = tmp_path / "t.txt"
    file.write_text("\n".join([*TEXTS, LONG]), encoding="utf-8")
    for given, place in (([*TEXTS, LONG], ""), (file, r" \(.*t\.txt:9\)")):
        message = rf"text 8 has \d+ tokens; this model reads 256{place}: shorten it, or choose long='truncate' or 'skip'"
        with pytest.raises(ValueError, match=message):
            em.collect_resid_post(tiny_model, given, progress=False)
        with pytest.raises(ValueError, match=message):
            em.collect_to(
                tmp_path / "c", tiny_model, given, batching=em.Batching(shard=2), progress=False
            )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("pooling", "message"),
    [(em.mean_over_tokens(skip=20, short="raise"), "text 8 has|text text-8 has"), (em.char_span(["Number"] * 8 + ["nowhere"]), "occurs 0 times in text 8")],
)  # fmt: skip
def test_a_text_that_cannot_be_pooled_is_refused_before_the_first_pass(
    tiny_model, tmp_path, monkeypatch, pooling, message
):
    monkeypatch.setattr(
        "emolens.collect.forward._Pass.run", lambda *a: pytest.fail("a pass was made")
    )
    with pytest.raises(ValueError, match=message):
        em.collect_to(
            tmp_path / "c",
            tiny_model,
            [*TEXTS, "The dog."],
            batching=em.Batching(shard=2),
            pooling=pooling,
            progress=False,
        )


@pytest.mark.parametrize("to", [False, True])
def test_a_long_text_is_cut_or_left_out_and_counted(tiny_model, tmp_path, to):
    def go(texts, long):
        options = {
            "batching": em.Batching(shard=2),
            "long": long,
            "progress": False,
            "pooling": em.last_token(),
        }
        if to:
            return em.collect_to(
                tmp_path / f"{long}{len(texts)}", tiny_model, texts, **options
            ).load()
        return em.collect_resid_post(tiny_model, texts, **options)

    plain = go(TEXTS, "raise")
    left_out, cut = (
        go([*TEXTS[:3], LONG, *TEXTS[3:]], "skip"),
        go([*TEXTS[:3], LONG, *TEXTS[3:]], "truncate"),
    )
    torch.testing.assert_close(left_out.rows, plain.rows)
    assert (left_out.info["dropped_texts"], left_out.info["truncated_texts"]) == (1, 0)
    assert (cut.info["dropped_texts"], cut.info["truncated_texts"]) == (0, 1)
    assert cut.texts[3].n_tokens == 256
    torch.testing.assert_close(torch.cat([cut.rows[:3], cut.rows[4:]]), plain.rows)
    with pytest.raises(
        ValueError,
        match="every text is longer than the 256 tokens that this model reads, and was left out",
    ):
        go([LONG], "skip")
    with pytest.raises(ValueError, match="long='cut'; allowed: 'raise', 'truncate', 'skip'"):
        go(TEXTS, "cut")


@pytest.mark.parametrize(
    "given", ["file:///", "file:///tmp/t.txt", "FILE://x", "https://", "s3:/b"]
)
def test_an_address_is_never_a_text(given):
    assert names_a_file(given) == "address"
    with pytest.raises(ValueError, match="an address that is not read"):
        open_corpus(given)


@pytest.mark.parametrize("path", ["file:///tmp/t.txt", Path("file:///tmp/t.txt")])
def test_an_address_of_this_machine_says_its_path(path):
    with pytest.raises(ValueError, match=r"^file:///tmp/t\.txt .*give the path, /tmp/t\.txt$"):
        here(path)
    assert names_a_file("well:/") is None

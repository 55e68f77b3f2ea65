"""Folders of shards: the same bits as in memory, after kills, with damage, from streams; and what is refused, with the reason."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emolens as em
from emolens import shards
from emolens.collect import collection as collection_room
from emolens.collect import forward as forward_room
from emolens.collect import moments as moments_room
from emolens.collect import recipe as recipe_room
from emolens.collect.activations import Activations, join
from emolens.collect.collection import Collection
from emolens.collect.forward import collect
from emolens.directions import estimators as estimators_room
from emolens.models.tokens import encode
from emolens.sets.corpus import open_corpus
from emolens.sets.records import MAX_LINE

TENSORS = ("rows", "embed", "row_text", "row_position", "norm_histogram", "sinks")


def same_bits(a: Activations, b: Activations) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.texts, a.layers, a.hook_point) == (b.texts, b.layers, b.hook_point)
    assert (a.neutral_tokens is None) == (b.neutral_tokens is None)
    if a.neutral_tokens is not None and b.neutral_tokens is not None:
        same_bits(a.neutral_tokens, b.neutral_tokens)


@pytest.fixture(scope="module")
def toy(toy_set) -> Any:
    return em.load_emotion_set(toy_set)


@pytest.fixture(scope="module")
def whole(tiny_model, toy) -> Activations:
    return em.collect_resid_post(tiny_model, toy, batching=em.Batching(shard=10), progress=False)


def to(folder: Path, model: Any, texts: Any, **options: Any) -> Collection:
    return em.collect_to(
        folder, model, texts, **({"batching": em.Batching(shard=10), "progress": False} | options)
    )


# --- the same numbers -------------------------------------------------------------------------------------------------


def test_a_folder_holds_what_memory_would_to_the_bit(tiny_model, toy, whole, tmp_path):
    collection = to(tmp_path / "c", tiny_model, toy)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 6  # 56 texts
    same_bits(collection.load(), whole)
    assert collection.info == collection.load().info == whole.info
    assert torch.equal(collection.norm_median, whole.norm_median)
    assert repr(collection) == "Collection(resid_post, layers 0..2, 56 texts in 6 shards)"


@settings(max_examples=8, deadline=None, derandomize=True)
@given(size=st.integers(1, 60))
def test_another_plan_gives_the_same_rows_to_float_noise(tiny_model, toy, whole, size):
    """Batches of other widths: sums in another order."""
    other = em.collect_resid_post(tiny_model, toy, batching=em.Batching(shard=size), progress=False)
    assert (other.rows - whole.rows).abs().max() <= 1e-5 * whole.rows.abs().max()
    assert other.texts == whole.texts
    assert torch.equal(other.norm_histogram.sum(-1), whole.norm_histogram.sum(-1))


def test_directions_of_a_collection_are_those_of_the_rows(tiny_model, toy, whole, tmp_path):
    collection = to(tmp_path / "c", tiny_model, toy)
    for fit in (em.mean_difference, em.antonym_contrast):
        a, b = fit(collection), fit(whole)
        # float64 sums, added in another order
        torch.testing.assert_close(a.vectors, b.vectors, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.reliability, b.reliability, rtol=1e-5, atol=1e-5)
        assert a.calibration is not None
        assert b.calibration is not None
        for name in ("mean", "std", "token_mean", "token_std"):
            torch.testing.assert_close(
                getattr(a.calibration, name), getattr(b.calibration, name), rtol=1e-4, atol=1e-5
            )
        assert a.info == b.info
    with pytest.raises(
        TypeError,
        match=r"lda needs the rows of every text in memory: give it lda\(collection\.load\(\)\)",
    ):
        em.lda(collection)  # type: ignore[arg-type]  # the error is the test
    assert torch.equal(em.lda(collection.load().at([1])).vectors, em.lda(whole.at([1])).vectors)


def test_the_second_moment_is_the_scatter_within_emotions(tiny_model, toy, whole, tmp_path):
    collection = to(tmp_path / "c", tiny_model, toy)
    main = whole.select(lambda t: t.split == "main")
    x = main.rows[:, 2].double().numpy()
    of = np.array([t.emotion for t in main.texts])
    expected = sum(
        (x[of == e] - x[of == e].mean(0)).T @ (x[of == e] - x[of == e].mean(0))
        for e in dict.fromkeys(of.tolist())
    )
    np.testing.assert_allclose(collection.second_moment(2).numpy(), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"layer 7 was not collected"):
        collection.second_moment(7)


def test_moments_add_up_exactly_over_any_cut(whole):
    texts = list(whole.texts)
    parts = [
        whole.select(lambda t, ids={t.id for t in texts[a : a + 7]}: t.id in ids)
        for a in range(0, 56, 7)
    ]
    a, b = moments_room.Moments.of([whole]), moments_room.Moments.of(parts)
    assert a.groups == b.groups
    assert torch.equal(a.n, b.n)
    torch.testing.assert_close(a.total, b.total, rtol=1e-14, atol=1e-12)  # float64
    assert a.emotions == ["glimmer", "gloamer", "brindle", "tarrow"]
    assert a.counts(without=["kitchen"]).tolist() == [7] * 4


def test_texts_without_a_topic_are_dealt_in_turn(tiny_model):
    texts = [f"A number {i} was written on the wall." for i in range(40)]
    acts = em.collect_resid_post(tiny_model, texts, emotions=["a", "b"] * 20, progress=False)
    ((_, topics),) = moments_room.with_topics([acts])
    assert topics[:4] == ["#0", "#0", "#1", "#1"]
    assert set(topics) == {f"#{k}" for k in range(16)}
    assert em.mean_difference(acts, remove_neutral=None).calibration is not None


def test_joining_slices_shifts_the_texts_of_rows(tiny_model):
    texts = ["One came home.", "Two came home late.", "Three stayed."]
    parts = [
        em.collect_resid_post(tiny_model, [t], pooling=em.every_token(), progress=False)
        for t in texts
    ]
    joined = join(parts)
    assert joined.row_text.unique().tolist() == [0, 1, 2]
    assert len(joined.texts) == 3


# --- killed, damaged, removed -----------------------------------------------------------------------------------------


def test_a_run_stopped_in_the_middle_continues_to_the_same_bits(
    tiny_model, toy, whole, tmp_path, monkeypatch
):
    made: list[int] = []
    slice_ = forward_room.collect_slice

    def interrupted(*args: Any) -> Activations:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(args[3].number)
        return slice_(*args)

    with monkeypatch.context() as patch:
        patch.setattr(collection_room, "collect_slice", interrupted)
        with pytest.raises(KeyboardInterrupt):
            to(tmp_path / "c", tiny_model, toy)
    with pytest.raises(ValueError, match="the collection is not whole: run it again"):
        Collection.open(tmp_path / "c")
    again: list[int] = []
    monkeypatch.setattr(
        collection_room, "collect_slice", lambda *a: again.append(a[3].number) or slice_(*a)
    )
    same_bits(to(tmp_path / "c", tiny_model, toy).load(), whole)
    assert (made, again) == ([0, 1, 2], [3, 4, 5])


@pytest.mark.parametrize("harm", ["removed", "cut", "one bit", "empty", "another file"])
def test_a_shard_that_is_lost_or_damaged_is_made_again(tiny_model, toy, whole, tmp_path, harm):
    folder = to(tmp_path / "c", tiny_model, toy).folder
    file = folder.file(2)
    content = bytearray(file.read_bytes())
    if harm == "removed":
        file.unlink()
    elif harm == "one bit":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(
            {"cut": content[: len(content) // 2], "empty": b"", "another file": b"hello" * 99}[harm]
        )
    with pytest.raises(ValueError, match=r"00002-.*; the collection is not whole: run it again"):
        Collection.open(tmp_path / "c")
    same_bits(to(tmp_path / "c", tiny_model, toy).load(), whole)


def test_files_left_by_a_killed_writer_are_swept(tiny_model, toy, tmp_path):
    to(tmp_path / "c", tiny_model, toy)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "c" / f".00001-x.safetensors.{shards._host()}-{gone.pid}.part").write_bytes(b"half")
    to(tmp_path / "c", tiny_model, toy)
    assert not list((tmp_path / "c").glob(".*.part"))


CHILD = """
import resource, signal, sys
import emolens as em
if sys.argv[4] != "0":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
model = em.load_model(sys.argv[1])
print("loaded", flush=True)
em.collect_to(sys.argv[3], model, em.load_emotion_set(sys.argv[2]), batching=em.Batching(shard=2), progress=False)
"""


def child(tiny: Any, toy_set: Path, folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(tiny("llama", tokenizer="chat")),
        str(toy_set),
        str(folder),
        str(limit),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.once
def test_kill_9_at_any_moment_costs_nothing_but_the_shard_in_hand(
    tiny, tiny_model, toy, toy_set, tmp_path
):
    expected = em.collect_resid_post(tiny_model, toy, batching=em.Batching(shard=2), progress=False)
    folder = tmp_path / "c"
    for done in (1, 5, 11):  # killed as soon as so many shards are there
        process = child(tiny, toy_set, folder)
        while process.poll() is None and len(list(folder.glob("*.safetensors"))) < done:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert done <= len(list(folder.glob("*.safetensors"))) < 28
    same_bits(to(folder, tiny_model, toy, batching=em.Batching(shard=2)).load(), expected)


@pytest.mark.once
def test_a_full_disk_is_an_error_that_leaves_whole_shards_only(
    tiny, tiny_model, toy, toy_set, tmp_path
):
    """The limit on a file's size stands for the disk: a shard is about 6 kB, the manifest smaller."""
    folder = tmp_path / "c"
    process = child(tiny, toy_set, folder, limit=4000)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "could not be written" in err
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "lock"}
    expected = em.collect_resid_post(tiny_model, toy, batching=em.Batching(shard=2), progress=False)
    same_bits(to(folder, tiny_model, toy, batching=em.Batching(shard=2)).load(), expected)


def test_a_disk_that_would_be_full_is_refused_before_the_first_pass(
    tiny_model, toy, tmp_path, monkeypatch
):
    usage = shutil_usage(free=1000)
    monkeypatch.setattr(collection_room.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"0\.0 GB are needed for the rows of 56 texts, 0\.0 GB are free"
    ):
        to(tmp_path / "c", tiny_model, toy)


def shutil_usage(free: int) -> Any:
    from collections import namedtuple

    return namedtuple("usage", "total used free")(free, 0, free)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_two_processes_do_not_share_a_folder(tiny_model, toy, tmp_path):
    to(tmp_path / "c", tiny_model, toy)
    manifest = shards.read_folder(tmp_path / "c").manifest
    manifest.pop("format")
    with (
        shards.begin(tmp_path / "c", manifest),
        pytest.raises(
            FileExistsError,
            match=rf"c is being written by another process \(process {os.getpid()} on .*\)",
        ),
    ):
        to(tmp_path / "c", tiny_model, toy)
    to(tmp_path / "c", tiny_model, toy)  # the lock went with its holder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": [1]}, r"begun with options\.layers = \[0, 1, 2\], now it is \[1\]"),
        (
            {"batching": em.Batching(shard=11)},
            r"begun with options\.batching\.shard = 10, now it is 11",
        ),
        (
            {"batching": em.Batching(60, shard=10)},
            r"begun with options\.batching\.tokens = 2048, now it is 60",
        ),
        ({"padding_side": "left"}, r'begun with options\.padding_side = "right", now it is "left"'),
        (
            {"pooling": em.mean_over_tokens(skip=9)},
            r"begun with options\.pooling\.skip = 50, now it is 9",
        ),
        (
            {"hook_point": "mlp_out"},
            r'begun with options\.hook_point = "resid_post", now it is "mlp_out"',
        ),
    ],
    ids=str,
)
def test_another_option_is_refused_by_name(tiny_model, toy, tmp_path, change, reason):
    to(tmp_path / "c", tiny_model, toy)
    with pytest.raises(FileExistsError, match=reason):
        to(tmp_path / "c", tiny_model, toy, **change)


def test_another_model_set_or_version_is_refused_by_name(
    tiny, tiny_model, toy, tmp_path, monkeypatch
):
    to(tmp_path / "c", tiny_model, toy)
    with pytest.raises(FileExistsError, match=r"begun with model\.\w+ = "):
        to(tmp_path / "c", em.load_model(tiny("llama", tokenizer="chat", seed=1)), toy)
    story = toy.stories["glimmer"][0]
    changed = replace(toy, stories=toy.stories | {"glimmer": (story.model_copy(update={"text": "Other."}), *toy.stories["glimmer"][1:])})  # fmt: skip
    with pytest.raises(FileExistsError, match=r"begun with corpus\.sha256 = "):
        to(tmp_path / "c", tiny_model, changed)
    monkeypatch.setattr(collection_room, "__version__", "9.9")
    with pytest.raises(
        FileExistsError, match=r'begun with versions\.emolens = ".*", now it is "9\.9"'
    ):
        to(tmp_path / "c", tiny_model, toy)


def test_options_left_open_are_those_of_the_run_that_began(tiny_model, toy, tmp_path):
    first = to(tmp_path / "c", tiny_model, toy, batching=em.Batching(333, shard=7))
    assert first.info["batch_tokens"] == 333
    again = em.collect_to(tmp_path / "c", tiny_model, toy, progress=False)
    same_bits(again.load(), first.load())


def test_folders_of_others_are_left_alone(tiny_model, toy, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(
        FileExistsError, match=r"holds other files \(thesis\.tex\); choose an empty or a new folder"
    ):
        to(tmp_path, tiny_model, toy)
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json there"):
        Collection.open(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError, match="file is a file; give the name of a folder"):
        to(tmp_path / "file" / "c", tiny_model, toy)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no json", '{"format": "x"}', "[" * 100_000, "\xff"]
)
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="not a manifest of emolens"):
        shards.read_folder(tmp_path)


def test_a_newer_version_says_so(tiny_model, toy, tmp_path):
    folder = to(tmp_path / "c", tiny_model, toy).folder
    file = tmp_path / "c" / "manifest.json"
    file.write_text(json.dumps(folder.manifest | {"format": "emolens.shards.7"}), encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=r"'emolens\.shards\.7', not emolens\.shards\.1; it was written by a newer emolens",
    ):
        shards.read_folder(tmp_path / "c")


def test_a_file_of_the_first_version_is_still_read(whole, tmp_path):
    """It kept the median of the sinks over texts instead of each text's."""
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    whole.save(file)
    tensors, metadata = shards.read_safetensors(file, "emolens.activations.2")
    for prefix in ("", "neutral_tokens."):
        tensors[prefix + "sink_ratio"] = tensors.pop(prefix + "sinks").median(0).values
    tensors = {
        name: t for name, t in tensors.items() if not name.startswith("neutral_prefixes.")
    }  # not known then
    del metadata["checksum"], metadata["neutral_prefixes."]
    save_file(tensors, file, metadata | {"format": "emolens.activations.1"})
    old = Activations.load(file)
    assert torch.equal(old.rows, whole.rows)
    assert torch.equal(old.sink_ratio, whole.sink_ratio)
    assert len(old.sinks) == len(old.texts)


# --- streams ----------------------------------------------------------------------------------------------------------


def lines(n: int) -> list[dict[str, Any]]:
    return [
        {
            "text": f"Text number {i} was {'long ' * (i % 7)}here.",
            "emotion": "ab"[i % 2],
            "topic": f"t{i % 3}",
            "x": 1,
        }
        for i in range(n)
    ]


@pytest.fixture
def jsonl(tmp_path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in lines(25)) + "\n", encoding="utf-8")
    return file


def test_a_file_plain_or_gzipped_and_a_table_give_the_same_as_lists(tiny_model, jsonl, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    rows = lines(25)
    expected = em.collect_resid_post(
        tiny_model, [r["text"] for r in rows], emotions=[r["emotion"] for r in rows], topics=[r["topic"] for r in rows],
        progress=False,
    )  # fmt: skip
    table = datasets.Dataset.from_list(rows)
    for source in (jsonl, packed, table, table.to_iterable_dataset()):
        same_bits(em.collect_resid_post(tiny_model, source, progress=False), expected)
    same_bits(
        to(tmp_path / "c", tiny_model, packed, batching=em.Batching(shard=128)).load(), expected
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 3}', r"texts\.jsonl:2: text: .* \(found '3'\)"),
        (b'{"text": ""}', r"texts\.jsonl:1: text: .*at least 1 character"),
        (b'{"emotion": "joy"}', r"texts\.jsonl:1: text: field required"),
        (b"\n\nhello", r"texts\.jsonl:3: not valid JSON: Expecting value"),
        (
            b'{"text": "a"}\n{"text": "a", "emotion": "joy", "text": "b"}',
            r"texts\.jsonl:2: not valid JSON: the key 'text' is there twice",
        ),
        (b"[1]", r"texts\.jsonl:1: .*(object|dictionary)"),
        (b'{"text": "\xff"}', r"texts\.jsonl:1: invalid json or text: not UTF-8"),
        (b"[" * 50_000, r"texts\.jsonl:1: not valid JSON: nested too deeply"),
        (
            b'{"text": "' + b"x" * MAX_LINE + b'"}',
            r"texts\.jsonl:1: a line of more than 1,000,000 bytes",
        ),
        (
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9],
            r"the gzip file is damaged or cut short|not valid JSON",
        ),
        (b"\x1f\x8bnonsense", r"texts\.jsonl:1: the gzip file is damaged or cut short"),
        (gzip.compress(b"x" * 200_000_000, mtime=0), r"a line of more than 1,000,000 bytes"),
    ],
    ids=lambda v: str(v)[:25],
)
def test_a_line_that_is_wrong_is_named(tmp_path, content, message):
    file = tmp_path / "texts.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_corpus(file).read())


def test_sources_that_bring_labels_or_are_not_there_say_so(tiny_model, jsonl, tmp_path):
    with pytest.raises(ValueError, match="a file or table brings its own emotions and topics"):
        collect(tiny_model, jsonl, "resid_post", emotions=["a"])
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        collect(tiny_model, tmp_path / "none.jsonl", "resid_post")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no texts given"):
        to(tmp_path / "c", tiny_model, tmp_path / "empty.jsonl")

    class Table:
        column_names = ("story", "label")

    with pytest.raises(ValueError, match="the table has no column 'text'; it has: story, label"):
        open_corpus(Table())


def test_what_is_no_list_of_texts_is_not_taken_for_one(tiny_model):
    for texts, message in (
        ("stories.jsonl", r"give pathlib\.Path\('stories\.jsonl'\)"),
        ({"text": ["a b c d"]}, "a dict has no order of texts: give a list"),
        (
            type("DataFrame", (), {"columns": ["text"]})(),
            "a DataFrame has no order of texts: give a list",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            em.collect_resid_post(tiny_model, texts, progress=False)


def test_a_file_of_a_windows_editor_is_read(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [text for text, _ in open_corpus(tmp_path / "texts.jsonl").read()] == ["a", "b"]


def test_a_shard_of_other_code_is_not_continued(tiny_model, toy, tmp_path, monkeypatch):
    to(tmp_path / "c", tiny_model, toy)
    monkeypatch.setattr(collection_room, "_code", lambda: "older")
    with pytest.raises(
        FileExistsError, match=r'begun with versions\.code = ".*", now it is "older"'
    ):
        to(tmp_path / "c", tiny_model, toy)


def test_a_file_system_without_locks_is_named_and_a_young_part_is_left_alone(
    tiny_model, toy, tmp_path, monkeypatch
):
    to(tmp_path / "c", tiny_model, toy)
    young, old = tmp_path / "c" / ".a.other-7.part", tmp_path / "c" / ".b.other-7.part"
    for part in (young, old):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    to(tmp_path / "c", tiny_model, toy)
    assert young.exists()
    assert not old.exists()

    def cannot(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", cannot)
    with pytest.raises(
        OSError,
        match=r"c: this file system cannot lock a file \(Function not implemented\); choose a folder",
    ):
        to(tmp_path / "c", tiny_model, toy)


@pytest.mark.once
def test_every_module_is_imported_and_a_folder_held_without_the_modules_of_unix(tiny, tmp_path):
    """Windows has no fcntl: filelock holds the folder there, for one process at a time."""
    code = """
import importlib, pkgutil, sys
import psutil  # its Linux half needs `resource`, as others' need pwd and termios
sys.modules["fcntl"] = sys.modules["resource"] = None  # as on Windows
import emolens as em
from emolens import shards
for module in pkgutil.walk_packages(em.__path__, "emolens."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
model, texts = em.load_model(sys.argv[1]), ["One is here.", "Two are there."]
em.collect_to(sys.argv[2], model, texts, progress=False)
manifest = shards.read_folder(sys.argv[2]).manifest
with shards.begin(sys.argv[2], manifest):
    try:
        em.collect_to(sys.argv[2], model, texts, progress=False)
    except FileExistsError as error:
        print(error)
em.collect_to(sys.argv[2], model, texts, progress=False)  # let go
print(len(em.collect_to(sys.argv[2], model, texts, progress=False).load().texts))
"""
    command = [sys.executable, "-c", code, str(tiny("llama")), str(tmp_path / "c")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    refused, n_texts = done.stdout.strip().splitlines()
    assert re.search(
        r"c is being written by another process \(process \d+ on .*\); wait for it", refused
    )
    assert n_texts == "2"
    (folder,) = tmp_path.iterdir()
    with shards.begin(
        folder, shards.read_folder(folder).manifest
    ) as same:  # and the folder is one like any other
        assert same.missing() == []


def test_an_error_numbers_the_text_in_the_corpus_not_in_its_slice(tiny_model):
    with pytest.raises(ValueError, match=r"text 3 has \d+ tokens; this model reads 256"):
        em.collect_resid_post(
            tiny_model,
            ["a b.", "c d.", "e f.", "z" * 300],
            batching=em.Batching(shard=2),
            progress=False,
        )


def test_a_slice_in_which_every_text_is_too_short_is_empty(tiny_model, tmp_path):
    texts = ["Short."] * 4 + [
        "This one is a good deal longer than the others are, and it is the last."
    ]
    pooling = em.mean_over_tokens(skip=15, short="skip")
    assert len(encode(tiny_model, texts)[0].ids) <= 15
    options = {"pooling": pooling, "batching": em.Batching(shard=2), "progress": False}
    acts = em.collect_resid_post(tiny_model, texts, **options)
    assert ([t.id for t in acts.texts], acts.info["dropped_texts"]) == (["text-4"], 4)
    same_bits(to(tmp_path / "c", tiny_model, texts, **options).load(), acts)
    with pytest.raises(ValueError, match="every text is shorter than skip=15"):
        to(tmp_path / "d", tiny_model, texts[:4], **options)


# --- memory -----------------------------------------------------------------------------------------------------------


def raises(error: BaseException) -> Any:
    """A function that raises it."""

    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("fail", [raises(torch.OutOfMemoryError("CUDA out of memory")), raises(MemoryError()), lambda: torch.empty(2**60)], ids=["cuda", "python", "this machine's"])  # fmt: skip
def test_a_batch_that_does_not_fit_is_halved_and_counted(tiny_model, fail):
    """Out of memory in the last layer, when the others have been counted already."""
    texts = [f"Text {i} is here." for i in range(7)]
    expected = em.collect_resid_post(tiny_model, texts, progress=False)

    def hungry(act: Any, hook: Any) -> None:
        if len(act) > 2:
            fail()

    with tiny_model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", hungry)]):
        acts = em.collect_resid_post(tiny_model, texts, progress=False)
    assert acts.info["split_batches"] == 3  # 7 = 4 + 3 = 2 + 2 + 2 + 1
    assert (acts.rows - expected.rows).abs().max() <= 1e-5 * expected.rows.abs().max()
    assert torch.equal(acts.norm_histogram.sum(-1), expected.norm_histogram.sum(-1))

    def starved(act: Any, hook: Any) -> None:
        fail()

    with (
        tiny_model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", starved)]),
        pytest.raises(MemoryError, match=r"one text of \d+ tokens does not fit into memory on cpu"),
    ):
        em.collect_resid_post(tiny_model, texts, progress=False)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny_model):
    def broken(act: Any, hook: Any) -> None:
        raise RuntimeError("shape mismatch")

    with (
        tiny_model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", broken)]),
        pytest.raises(RuntimeError, match="shape"),
    ):
        em.collect_resid_post(tiny_model, ["A text."], progress=False)


def test_the_token_budget_follows_free_memory(tiny_model, monkeypatch):
    assert recipe_room.token_budget(tiny_model) == 2048
    memory = type("memory", (), {"available": 100_000_000})
    monkeypatch.setattr(collection_room.psutil, "virtual_memory", lambda: memory)
    each = 4 * (8 * 32 + 4 * 48 + 3 * 4 * 256)
    assert recipe_room.token_budget(tiny_model) == 100_000_000 // 4 // each


def test_a_collection_too_large_to_load_says_what_works(tiny_model, toy, tmp_path, monkeypatch):
    collection = to(tmp_path / "c", tiny_model, toy)
    memory = type("memory", (), {"available": 1000})
    monkeypatch.setattr(collection_room.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(
        MemoryError, match="mean_difference and antonym_contrast work on the collection itself"
    ):
        collection.load()
    assert estimators_room.mean_difference(collection).calibration is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_are_summed_in_float32(tiny, dtype):
    """The mean of many half-precision numbers is not itself rounded to half precision."""
    model = em.load_model(tiny("llama", tokenizer="chat"), dtype=dtype)
    acts = em.collect_resid_post(
        model, ["A long text was here, and it went on for some time."], progress=False
    )
    assert acts.rows.dtype == torch.float32
    assert not torch.equal(acts.rows, acts.rows.to(getattr(torch, dtype)).float())


def test_a_model_moved_or_cast_in_part_is_refused(tiny):
    model = em.load_model(tiny("llama", tokenizer="chat"))
    model.cfg.device = "cuda"
    with pytest.raises(
        ValueError, match=r"cfg says cuda, its weights are on cpu: move it with model\.to\(\)"
    ):
        em.collect_resid_post(model, ["A text."], progress=False)
    model.cfg.device = "cpu"
    model.blocks[-1].to(torch.bfloat16)
    with pytest.raises(
        ValueError, match="float32 in its embedding and bfloat16 in its last block: load it in one"
    ):
        em.collect_resid_post(model, ["A text."], progress=False)


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "link").symlink_to("target")
    for said in ("once", "twice"):
        path = shards.vacant(tmp_path / "link", lambda _: None)
        with shards.written_whole(path) as part:
            part.write_text(said, encoding="utf-8")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text(encoding="utf-8") == said
    (tmp_path / "away").symlink_to("nowhere/target")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        shards.vacant(tmp_path / "away", lambda _: None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_neither_file_nor_folder_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe is no file but a device or a pipe"):
        shards.vacant(tmp_path / "pipe", lambda _: None, overwrite=True)

"""Hostile input to the readers of files: nothing but the documented errors, nothing executed, little time.

EMOLENS_FUZZ multiplies the number of examples; the count of each reader is in the docstring of its test for the default of 1.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import emolens as em
from emolens import shards
from emolens.collect.activations import Activations
from emolens.sets.corpus import open_corpus
from emolens.sets.emotion_sets import data_root, load_emotion_set
from emolens.sets.external import READERS as READERS_OF_TEXT
from emolens.sets.materials import load_pairs, load_stems
from emolens.sets.norms import load_norms

FUZZ = int(os.environ.get("EMOLENS_FUZZ", "1"))
DOCUMENTED = (ValueError, FileNotFoundError)
LIMIT = 20.0  # seconds for one input; a bound on hostile input, not a measurement


def fuzz(n: int) -> Any:
    return settings(
        max_examples=n * FUZZ,
        deadline=None,
        derandomize=FUZZ == 1,
        suppress_health_check=list(HealthCheck),
    )


def survives(read: Any, *arguments: Any) -> None:
    start, raised = time.perf_counter(), None
    try:
        read(*arguments)
    except DOCUMENTED as error:
        raised = error
    if raised is not None:
        assert type(raised) in DOCUMENTED, (
            f"{type(raised)}: {raised}"
        )  # not pydantic's subclass of ValueError
        assert 0 < len(str(raised)) < 2000, "an error without words, or one that repeats its input"
    assert time.perf_counter() - start < LIMIT


# JSON-like values, with the things that parsers stumble over
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=30)
    | st.sampled_from(["", "\x00", "\u202e", "../../etc/passwd", "!!python/object/apply:os.system [x]", "2026-13-45", "1e999", "*a", "&a"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
SET_KEYS = (
    "name",
    "extends",
    "language",
    "description",
    "emotions",
    "neutral",
    "topics",
    "sha256",
    "source",
)
EMOTION = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        (
            "name",
            "adjective",
            "antonym",
            "family",
            "intensity",
            "target_words",
            "stories",
            "prompts",
        ),
        VALUES,
    ),
)
SETS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(SET_KEYS, VALUES) | {"emotions": st.lists(EMOTION, max_size=3) | VALUES},
)
TEXT = st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("latin-1"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz(300)
@given(content=SETS.map(lambda d: yaml.safe_dump(d, allow_unicode=True)) | TEXT)
def test_the_reader_of_sets(place, content):
    """300 inputs."""
    file = place / "set.yaml"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    survives(load_emotion_set, file)


@fuzz(200)
@given(
    content=st.fixed_dictionaries({}, optional={"choose": VALUES, "report": VALUES}).map(
        yaml.safe_dump
    )
    | TEXT
)
def test_the_reader_of_stems(place, content):
    """200 inputs."""
    file = place / "stems.yaml"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    survives(load_stems, file)


JSONL = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "clean", "corrupted", "control", "text", "emotion", "topic", "split"), VALUES)).map(json.dumps)
    | TEXT,
    max_size=4,
).map("\n".join)  # fmt: skip


@fuzz(300)
@given(content=JSONL)
def test_the_reader_of_pairs(place, content):
    """300 inputs."""
    file = place / "pairs.jsonl"
    file.write_bytes(content.encode("utf-8", errors="surrogatepass"))
    survives(load_pairs, file)


@fuzz(300)
@given(content=JSONL, packed=st.booleans(), cut=st.integers(0, 40), flip=st.integers(0, 400))
def test_the_reader_of_texts(place, content, packed, cut, flip):
    """300 inputs, half of them gzipped and damaged."""
    raw = bytearray(content.encode("utf-8", errors="surrogatepass"))
    if packed:
        raw = bytearray(gzip.compress(bytes(raw)))
        raw[flip % len(raw)] ^= 1 << (flip % 8)
        raw = raw[: max(2, len(raw) - cut)]
    file = place / "texts.jsonl"
    file.write_bytes(raw)
    survives(lambda: list(open_corpus(file).read()))


TABLE = st.lists(
    st.lists(TEXT | st.sampled_from(["main", "train", "nan", '"a', ""]), max_size=5), max_size=5
)


@fuzz(300)
@given(
    rows=TABLE,
    separator=st.sampled_from(",;\t"),
    ending=st.sampled_from([".csv", ".tsv", ".txt"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
)
def test_the_reader_of_tables_of_texts(place, rows, separator, ending, encoding):
    """300 inputs."""
    lines = ["Text,emotion,TOPIC,split".replace(",", separator), *map(separator.join, rows)]
    file = place / f"texts{ending}"
    file.write_bytes("\n".join(lines).encode(encoding, errors="ignore"))
    survives(lambda: list(open_corpus(file).read()))


@fuzz(200)
@given(content=st.lists(st.lists(TEXT, max_size=5).map(",".join), max_size=5).map(lambda rows: "\n".join(["word,valence,arousal,dominance", *rows])) | TEXT)  # fmt: skip
def test_the_reader_of_norms(place, content):
    """200 inputs."""
    file = place / "norms.csv"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    survives(load_norms, file)


MATERIALS = {
    "scenarios": em.sets.load_scenarios, "intensities": em.sets.load_intensities, "items": em.sets.load_items, "activities": em.sets.load_activities,
    "dialogues": em.sets.load_dialogues, "deflections": em.sets.load_deflections,
}  # fmt: skip


@pytest.mark.parametrize("kind", MATERIALS)
@fuzz(150)
@given(line=st.integers(0, 10**6), field=st.integers(0, 20), value=VALUES, drop=st.booleans())
def test_the_readers_of_materials(place, kind, line, field, value, drop):
    """150 inputs a kind: three shipped records, of which one has lost a field or has something else in it."""
    records = (data_root() / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(records[(line + k) % len(records)]) for k in range(3)]
    name = sorted(records[1])[field % len(records[1])]
    if drop:
        del records[1][name]
    else:
        records[1][name] = value
    file = place / f"{kind}.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    survives(MATERIALS[kind], file)


@fuzz(200)
@given(lines=st.lists(st.fixed_dictionaries({"kind": st.sampled_from(["emotion_story", "neutral_dialogue"])}, optional={"job_id": st.text(max_size=3), "topic": st.text(max_size=3), "emotion": st.text(max_size=3), "segments": st.lists(st.text(max_size=80) | st.just("word " * 20), max_size=3) | VALUES}), max_size=4))  # fmt: skip
def test_the_reader_of_emovecllm(place, lines):
    """200 inputs."""
    (place / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    survives(em.sets.read_emovecllm, place)


@pytest.mark.parametrize("name", READERS_OF_TEXT)
@fuzz(150)
@given(content=TEXT | st.lists(st.lists(TEXT | st.sampled_from(["test", "3", "-1", "nan", "1e999"]), max_size=5).map("\t".join), max_size=5).map("\n".join) | st.lists(st.lists(TEXT | st.sampled_from(["test", "3", "nan"]), max_size=5).map(",".join), max_size=5).map(lambda rows: "\n".join(["split,V,A,text", *rows])), latin=st.booleans())  # fmt: skip
def test_the_readers_of_other_peoples_texts(place, name, content, latin):
    """150 inputs a file."""
    (place / "others").mkdir(exist_ok=True)
    (place / "others" / name).write_bytes(
        content.encode("latin-1" if latin else "utf-8", errors="ignore")
    )
    survives(READERS_OF_TEXT[name], place / "others" / name)


@pytest.fixture(scope="module")
def files(tiny_model, toy_set, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    acts = em.collect_resid_post(
        tiny_model, em.load_emotion_set(toy_set), layers=[1], progress=False
    )
    acts.save(folder / "acts")
    em.mean_difference(acts).save(folder / "vectors")
    return {name: folder / name for name in ("acts", "vectors")}


READERS = {"acts": Activations.load, "vectors": em.load_directions}


@pytest.mark.parametrize("kind", READERS)
@fuzz(300)
@given(
    at=st.integers(0, 10**6),
    value=st.integers(0, 255),
    keep=st.integers(0, 10**6),
    length=st.integers(0, 2**64 - 1),
)
def test_damaged_files_of_tensors(files, place, kind, at, value, keep, length):
    """300 inputs a kind: a byte changed, in the header more often than not; cut; or a header that claims another length."""
    raw = bytearray(files[kind].read_bytes())
    n = struct.unpack("<Q", raw[:8])[0]
    raw[at % (8 + n) if at % 3 else at % len(raw)] = value
    if keep % 3 == 0:
        raw = raw[: keep % len(raw)]
    if keep % 7 == 0:
        raw[:8] = struct.pack("<Q", length)
    file = place / kind
    file.write_bytes(raw)
    survives(READERS[kind], file)


@pytest.mark.parametrize("kind", READERS)
@fuzz(300)
@given(header=VALUES, drop=st.integers(0, 30), swap=st.booleans())
def test_files_of_tensors_with_another_header(files, place, kind, header, drop, swap):
    """300 inputs a kind: well-formed safetensors whose JSON says something else, or without a tensor."""
    formats = {"acts": "emolens.activations.2", "vectors": "emolens.directions.1"}
    tensors, metadata = shards.read_safetensors(files[kind], formats[kind])
    del metadata["checksum"]
    key = {"acts": "self.", "vectors": "emolens"}[kind]
    names = sorted(tensors)
    if drop < len(names):
        del tensors[names[drop]]
    if swap:
        old = json.loads(metadata[key])
        if isinstance(header, dict):
            old |= header
        field = sorted(old)[drop % len(old)]
        metadata[key] = json.dumps(old | {field: header})
    else:
        metadata[key] = json.dumps(header)
    file = place / f"{kind}-header"
    save_file(tensors, file, metadata)
    survives(READERS[kind], file)


@fuzz(300)
@given(content=VALUES.map(json.dumps) | TEXT | st.fixed_dictionaries({"format": st.just(shards.FORMAT), "shards": VALUES}).map(json.dumps))  # fmt: skip
def test_the_reader_of_manifests(place, content):
    """300 inputs."""
    (place / "manifest.json").write_bytes(content.encode("utf-8", errors="surrogatepass"))
    survives(shards.read_folder, place)


def test_yaml_that_would_run_code_or_fill_memory_does_neither(tmp_path):
    mark = tmp_path / "ran"
    for content in (
        f"!!python/object/apply:os.system ['touch {mark}']",
        f"name: !!python/object/new:os.system ['touch {mark}']",
        "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghijkl", "bcdefghijklm", strict=True)),
        "[" * 100_000,
        "{a: " * 5000,
        "- " * 50_000,
        "? " * 50_000,
    ):  # fmt: skip
        (tmp_path / "set.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"not valid YAML|expected a mapping"):
            load_emotion_set(tmp_path)
    assert not mark.exists()

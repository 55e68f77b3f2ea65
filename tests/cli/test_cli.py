"""The command line: help with an example, light imports, one line for an error, and extract and score from end to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import emolens as em
from emolens import cli
from emolens.cli.extract import METHODS
from emolens.models.catalogue import CATALOGUE
from emolens.sets.check import Check

COMMANDS = [
    ["study"],
    ["run"],
    ["extract"],
    ["plan"],
    ["score"],
    ["steer"],
    ["write-stories"],
    ["languages"],
    ["models"],
    ["sets", "list"],
    ["sets", "show"],
    ["sets", "check"],
    ["sets", "import"],
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Tables as on a wide terminal, whatever runs the tests; messages, not tracebacks."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("EMOLENS_TRACEBACK", raising=False)


@pytest.fixture
def emolens(monkeypatch, capfd):
    """Run the command as a shell would: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["emolens", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0  # type: ignore[assignment]
        out, err = capfd.readouterr()
        return code, out, err

    return run


def one_line(err: str) -> str:
    """The error, which is one line and no traceback."""
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "it/s]" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("emolens: ")
    return lines[0]


# --- help and weight --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert f"Example: emolens {' '.join(command)}" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("extract", ["Nothing is drawn here", "embed, resid_pre", "float64", "counted from 0", "128 on a CPU, 512 on a GPU"]),
        ("plan", ["Nothing is drawn here"]),
        ("score", ["Nothing is drawn here", "two thirds of the depth from extract", "the one that the directions were made in"]),
        ("steer", ["Seed of what is sampled, and of random directions", "the same width and tokenizer"]),
        ("write-stories", ["the default is 60,150, of Chinese and Japanese 100,400 characters", "above 0, at most 1"]),
        ("study", ["Seed of folds, resamples and random directions", "or both; without it"]),
    ],
)  # fmt: skip
def test_the_help_says_units_and_defaults(command, said):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "400"})
    assert not [phrase for phrase in said if phrase not in " ".join(result.output.split())]


def test_the_list_of_commands_is_complete():
    import typer

    def names(group: Any, before: tuple[str, ...] = ()) -> set[str]:
        if not hasattr(group, "commands"):
            return {" ".join(before)}
        return {n for name, c in group.commands.items() for n in names(c, (*before, name))}

    assert names(typer.main.get_command(cli.app)) == {" ".join(c) for c in COMMANDS}


@pytest.mark.parametrize("arguments", [[], ["sets"]])
def test_without_a_command_the_help_is_shown(arguments):
    result = CliRunner().invoke(cli.app, arguments)
    assert "Usage" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "code",
    ["import emolens", "import emolens; dir(emolens); emolens.__version__", "import emolens.cli"],
)
def test_importing_loads_nothing_heavy(code):
    heavy = (
        "torch",
        "transformer_lens",
        "transformers",
        "sklearn",
        "matplotlib",
        "scipy",
        "numpy",
        "pandas",
    )
    script = (
        f"import sys; {code}; sys.stdout.write(','.join(m for m in {heavy!r} if m in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
    )
    assert (result.stdout, result.returncode) == ("", 0), result.stderr


def test_the_module_runs_as_the_command_does():
    result = subprocess.run(
        [sys.executable, "-m", "emolens", "sets", "show", "nowhere"],
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert one_line(result.stderr).startswith("emolens: unknown emotion set 'nowhere'")


# --- looking ----------------------------------------------------------------------------------------------------------


def test_models_lists_every_alias_with_its_size(emolens):
    code, out, err = emolens("models")
    assert (code, err) == (0, "")
    for entry in CATALOGUE.values():
        (line,) = (x for x in out.splitlines() if x.split()[:1] == [entry.alias])
        assert f"{entry.gigabytes(2):.1f} GB" in line
        assert ("gated" in line) == entry.gated


def test_sets_list_shows_the_shipped_sets(emolens):
    code, out, err = emolens("sets", "list")
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        f"EmotionSet({n}" for n in em.list_emotion_sets()
    ]
    assert "EmotionSet(core: 24 emotions x 16 topics, 384 stories" in out


def test_sets_show_has_a_line_for_each_emotion(emolens, toy_set):
    for name in ("core", toy_set):
        code, out, _ = emolens("sets", "show", name)
        assert code == 0
        for e in em.load_emotion_set(name).emotions:
            assert any(line.split()[:1] == [e.name] for line in out.splitlines())
    _, out, _ = emolens("sets", "show", "core")
    (joy,) = (line for line in out.splitlines() if line.split()[:1] == ["joy"])
    assert "8.1" in joy  # its Glasgow valence


def test_sets_check_shows_the_numbers_and_passes_a_set_without_violations(
    emolens, toy_set, monkeypatch
):
    """That `core` has none is tested in test_emotion_sets.py."""
    asked = []

    def check(s: em.EmotionSet, *, words: bool, seed: int) -> Check:
        asked.append((s.name, words, seed))
        return Check({"emotions": "4", "length": "median 43"}, {"openings": ()})

    monkeypatch.setattr("emolens.sets.check.check_emotion_set", check)
    code, out, err = emolens("sets", "check", toy_set, "--no-words", "--seed", "5")
    assert (code, err) == (0, "")
    assert asked == [("toy", False, 5)]
    assert [line.split() for line in out.splitlines()] == [
        [str(toy_set)],
        ["emotions", "4"],
        ["length", "median", "43"],
        ["rule:", "openings", "0"],
        ["no", "violations", "in", "1", "checked"],
    ]


def test_sets_check_exits_with_1_on_a_violation_and_says_which_text(emolens, toy_set, tmp_path):
    for path in toy_set.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(toy_set)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    file = tmp_path / "stories" / "glimmer.jsonl"
    first, *rest = file.read_text(encoding="utf-8").splitlines()
    story = json.loads(first)
    story["text"] = (
        story["text"] + " I was [b]happy[/b]."
    )  # names the emotion, in what rich would take for markup
    file.write_text("\n".join([json.dumps(story), *rest]), encoding="utf-8")
    code, out, _ = emolens("sets", "check", tmp_path)
    assert code == 1
    assert (
        f"violation: {tmp_path}: emotion not named: {story['id']}: names the emotion: happy" in out
    )
    assert re.search(r"\d+ violations", out)


def test_sets_side_by_side_have_a_column_each_and_a_line_a_rule(emolens, toy_set, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = {"core": {"openings": ("a", "b"), "form": ("c",)}, "plutchik8": {"openings": ()}}
    monkeypatch.setattr(
        "emolens.sets.check.check_emotion_set",
        lambda s, **_: Check({"emotions": f"of {s.name}"}, found[s.name]),
    )
    code, out, _ = emolens("sets", "check", "core", "plutchik8")
    assert code == 1
    lines = [line.split() for line in out.splitlines()]
    assert lines[:2] == [["core", "plutchik8"], ["emotions", "of", "core", "of", "plutchik8"]]
    assert ["rule:", "openings", "2", "0"] in lines
    assert ["rule:", "form", "1", "not", "asked"] in lines
    assert "form-only accuracy, read in core" in out
    assert [line for line in out.splitlines() if line.startswith("violation")] == [
        "violation: core: openings: a (2 such)", "violation: core: form: c",
    ]  # fmt: skip
    _, every, _ = emolens("sets", "check", "core", "plutchik8", "--verbose")
    assert "violation: core: openings: b" in every.splitlines()
    assert out.splitlines()[-1] == every.splitlines()[-1] == "3 violations in 2 checked"


def test_a_hostile_name_in_a_set_is_shown_as_it_is(emolens, toy_set, tmp_path):
    spec = yaml.safe_load((toy_set / "set.yaml").read_text(encoding="utf-8"))
    for e in spec["emotions"]:
        e["stories"] = [
            json.loads(line)
            for line in (toy_set / e["stories"]).read_text(encoding="utf-8").splitlines()
        ]
        e["family"] = "[red]x[/red]"
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(spec | {"neutral": None, "topics": yaml.safe_load((toy_set / "topics.yaml").read_text(encoding="utf-8"))["topics"]}), encoding="utf-8")  # fmt: skip
    code, out, _ = emolens("sets", "show", tmp_path)
    assert code == 0
    assert "[red]x[/red]" in out


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sets", "show", "cor"], "unknown emotion set 'cor'; did you mean 'core'? allowed: "),
        (["sets", "check", "./nowhere"], "unknown emotion set './nowhere'"),
        (["extract", "--set", "nope"], "unknown emotion set 'nope'"),
        (["extract", "--model", "pythia-16m", "--out", "TMP/v.safetensors"], "unknown model 'pythia-16m'; did you mean pythia-1"),
        (["extract", "--method", "median"], f"--method median; allowed: {', '.join(METHODS)}"),
        (["extract", "--hook-point", "hidden"], "--hook-point hidden; allowed: embed, resid_pre, resid_mid, resid_post, attn_out, mlp_out"),
        (["extract", "--layers", "3,x"], "--layers 3,x; give block numbers such as 10,15,20"),
        (["extract", "--layers", "3-5"], "--layers 3-5; give block numbers"),
        (["extract", "--out", "TMP/nowhere/v.safetensors"], "nowhere: no such folder"),
        (["score", "--vectors", "TMP/none.safetensors", "text"], "none.safetensors: no such file"),
        (["study", "--model", "./nowhere", "--out", "TMP/study"], "./nowhere: no such file or directory"),
        # before the model is looked for
        (["study", "--model", "./nowhere", "--external", "TMP", "--out", "TMP/study"], "neither goemotions_test.tsv nor emobank.csv is there"),
        (["study", "--model", "TINY", "--set", "nope", "--out", "TMP/study"], "unknown emotion set 'nope'"),
        (["study", "--model", "https://example.org/a/b", "--out", "TMP/study"], "https://example.org/a/b is an address"),
        (["study", "--set", "https://example.org/core", "--out", "TMP/study"], "https://example.org/core is an address"),
        (["study", "--out", "s3://bucket/study"], "s3://bucket/study is an address"),
        (["study", "--external", "https://example.org/texts", "--out", "TMP/study"], "https://example.org/texts is an address"),
        (["extract", "--out", "s3://bucket/v.safetensors"], "s3://bucket/v.safetensors is an address"),
        (["extract", "--texts", "https://example.org/t.csv"], "https://example.org/t.csv is an address"),
        (["write-stories", "--model", "TINY", "--out", "s3://bucket/own"], "s3://bucket/own is an address"),
        (["write-stories", "--export-prompts", "s3://bucket/p.jsonl"], "s3://bucket/p.jsonl is an address"),
        (["sets", "import", "https://example.org/probes", "--out", "TMP/p"], "https://example.org/probes is an address"),
    ],
    ids=lambda x: " ".join(x[:3]) if isinstance(x, list) else "",
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_exit_2(emolens, tiny, tmp_path, arguments, message):
    given = [
        a.replace("TMP", str(tmp_path)).replace("TINY", str(tiny("llama", tokenizer="chat")))
        for a in arguments
    ]
    code, _, err = emolens(*given)
    assert code == 2
    assert message in one_line(err)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_layer_that_does_not_exist_is_one_line(emolens, tiny, toy_set, tmp_path):
    model = tiny("llama", tokenizer="chat")
    code, _, err = emolens(
        "extract", "-m", model, "-s", toy_set, "--layers", "1,7", "-o", tmp_path / "v.safetensors"
    )
    assert code == 2
    assert "layer 7 does not exist; this model has layers 0 to 2" in one_line(err)
    code, _, err = emolens("extract", "-m", tiny("neox"), "-s", toy_set, "--hook-point", "resid_mid", "-o", tmp_path / "v.safetensors")  # fmt: skip
    assert code == 2
    assert "no blocks.0.hook_resid_mid" in one_line(
        err
    )  # a KeyError, without the quotes of its repr
    assert "it has: resid_pre, resid_post, attn_out, mlp_out" in err


def test_a_usage_error_is_exit_2(emolens):
    for arguments in (
        ["nothing"],
        ["score"],
        ["extract", "--layer", "3"],
        ["study", "--seed", "x"],
    ):
        code, _, err = emolens(*arguments)
        assert code == 2
        assert "Traceback" not in err


def test_a_machine_that_says_no_is_exit_3(emolens, tiny, toy_set, tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    code, _, err = emolens(
        "study", "-m", tiny("llama", tokenizer="chat"), "-s", toy_set, "-o", tmp_path / "study"
    )
    assert code == 3
    assert "cannot write there (No space left on device)" in one_line(err)


@pytest.mark.parametrize("command", ["study", "extract", "plan", "write-stories", "languages"])
def test_a_device_that_is_not_there_is_said_before_anything_is_made(
    emolens, tiny, toy_set, tmp_path, monkeypatch, command
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("opened")
    )
    set_ = ("--sets", f"{toy_set},{toy_set}") if command == "languages" else ("-s", toy_set)
    out = () if command == "plan" else ("-o", tmp_path / "new")
    code, _, err = emolens(
        command, "-m", tiny("llama", tokenizer="chat"), *set_, "--device", "cuda", *out
    )
    assert code == 2
    assert "device='cuda', but of CUDA devices this machine has none that PyTorch sees; use device='cpu'" in one_line(err)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_plan_by_name_takes_no_device_of_this_machine(emolens, toy_set):
    code, _, err = emolens(
        "plan", "-m", "llama-3-8b", "-s", toy_set, "--device-name", "h100", "--device", "cuda"
    )
    assert code == 2
    assert (
        "--device: with --device-name the model is not opened; leave one of the two away"
        in one_line(err)
    )


PLACES = {  # where a file is wanted and a folder given, or the reverse
    "is a folder; give the name of a file": [
        ("extract", "-s", "SET", "-o", "FOLDER"),
        ("score", "-v", "FOLDER", "She sat down."),
        ("score", "-v", "VECTORS", "She sat down.", "--html", "FOLDER"),
        ("steer", "-v", "FOLDER", "-e", "glimmer", "The door"),
        ("write-stories", "-s", "SET", "--export-prompts", "FOLDER"),
        ("write-stories", "-s", "SET", "--import-texts", "FOLDER", "--writer", "me", "-o", "NEW"),
        ("languages", "--sets", "SET,SET", "-o", "FOLDER"),
    ],
    "is a folder; give the files in it": [("extract", "--texts", "FOLDER", "-o", "NEW")],
    "is a file; give the name of a folder": [
        ("study", "-s", "SET", "-o", "FILE"),
        ("study", "-s", "SET", "-o", "FILE/below"),
        ("study", "-s", "SET", "--external", "FILE", "-o", "NEW"),
        ("extract", "-s", "SET", "--shards", "FILE", "-o", "NEW"),
        ("extract", "-s", "SET", "--shards", "FILE/below", "-o", "NEW"),
        ("write-stories", "-s", "SET", "-o", "FILE"),
        ("sets", "import", "FOLDER", "--form", "emovecllm", "-o", "FILE"),
    ],
    "holds no run of this kind; choose another folder": [
        ("write-stories", "-s", "SET", "-o", "FULL")
    ],
    "holds a manifest.json of something else": [("write-stories", "-s", "SET", "-o", "OTHER")],
}


@pytest.mark.parametrize(
    ("message", "given"), [(m, g) for m, several in PLACES.items() for g in several], ids=str
)
def test_a_file_for_a_folder_and_the_reverse_are_told_apart_before_the_model_is_opened(
    emolens, tiny, toy_set, banded, tmp_path, monkeypatch, message, given
):
    monkeypatch.setattr(
        "emolens.models.loading.load_model", lambda *a, **k: pytest.fail("the model was opened")
    )
    monkeypatch.setattr(
        "emolens.collect.engines.load_model", lambda *a, **k: pytest.fail("the model was opened")
    )
    for name in ("folder", "full", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work", encoding="utf-8")
    (tmp_path / "other" / "manifest.json").write_text('{"spec": {"mine": 1}}', encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    places = {"SET": toy_set, "VECTORS": banded, "NEW": tmp_path / "new"}
    places |= {n.upper(): tmp_path / n for n in ("folder", "full", "other", "file")}
    for name, place in places.items():
        given = [x.replace(name, str(place)) for x in given]
    model = () if given[0] in ("sets",) else ("-m", tiny("llama", tokenizer="chat"))
    code, _, err = emolens(*given, *model)
    assert (code, message in one_line(err)) == (2, True), err
    assert not (tmp_path / "new").exists()


def test_an_interrupt_is_exit_130(emolens, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("emolens.sets.list_emotion_sets", interrupt)
    code, _, err = emolens("sets", "list")
    assert code == 130
    assert "Traceback" not in err


def test_the_traceback_is_there_for_who_asks(emolens, monkeypatch):
    monkeypatch.setenv("EMOLENS_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="unknown emotion set"):
        emolens("sets", "show", "nowhere")


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(tiny, toy_set, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("vectors") / "v.safetensors"
    result = CliRunner().invoke(
        cli.app,
        [
            "extract",
            "-m",
            str(tiny("llama", tokenizer="chat")),
            "-s",
            str(toy_set),
            "--layers",
            "1,2",
            "-o",
            str(file),
        ],
    )
    assert result.exit_code == 0, result.output
    assert (
        f"{file}: EmotionDirections(glimmer, gloamer, brindle, tarrow; resid_post, layers 1..2"
        in result.output
    )
    return file


@pytest.fixture(scope="module")
def banded(vectors, tmp_path_factory) -> Path:
    """The directions as if the set had neutral texts enough to know what "none" is."""
    from dataclasses import replace

    v = em.load_directions(vectors)
    file = tmp_path_factory.mktemp("banded") / "v.safetensors"
    replace(v, calibration=replace(v.calibration, band=torch.zeros_like(v.calibration.band))).save(
        file
    )
    return file


def test_extract_writes_what_the_library_computes(vectors, tiny_model, toy_set):
    v = em.load_directions(vectors)
    expected = em.mean_difference(
        em.collect_resid_post(
            tiny_model, em.load_emotion_set(toy_set), layers=[1, 2], progress=False
        )
    )
    # another process may batch its sums otherwise
    torch.testing.assert_close(v.vectors, expected.vectors, rtol=1e-5, atol=1e-5)
    assert (v.emotions, v.layers, v.hook_point) == (expected.emotions, (1, 2), "resid_post")


def test_extract_from_a_file_keeps_its_shards_and_continues(emolens, tiny, tmp_path):
    texts, out, shards = tmp_path / "t.jsonl", tmp_path / "v.safetensors", tmp_path / "rows"
    deeds = {"a": "laughed out loud at the door", "b": "wept alone in the rain"}
    texts.write_text(
        "".join(
            json.dumps(
                {"text": f"Number {i} {deed} on day {i}.", "emotion": e, "topic": f"t{i % 4}"}
            )
            + "\n"
            for i in range(8)
            for e, deed in deeds.items()
        ),
        encoding="utf-8",
    )
    command = ["extract", "-m", tiny("llama", tokenizer="chat"), "--texts", texts, "-o", out, "--shards", shards, "--shard-texts", "4"]  # fmt: skip
    code, said, _ = emolens(*command)
    assert code == 0
    assert "16 texts in 4 shards" in said
    v = em.load_directions(out)
    assert v.emotions == ("a", "b")
    assert v.calibration is not None
    next(iter(shards.glob("00002*"))).unlink()
    assert emolens(*command)[0] == 0
    assert torch.equal(em.load_directions(out).vectors, v.vectors)
    code, _, err = emolens(*command, "--layers", "1")
    assert code == 2
    assert "was begun with options.layers = [0, 1, 2], now it is [1]" in one_line(err)
    code, _, err = emolens("extract", "--texts", texts, "--set", "core")
    assert (code, one_line(err)) == (2, "emolens: --set and --texts: give one of the two")
    code, _, err = emolens(*command, "--engine", "slurm", "--slurm", "partition")
    assert code == 2
    assert "--slurm partition; give KEY=VALUE" in one_line(err)


def test_extract_leaves_no_shards_where_none_were_asked_for(emolens, tiny, toy_set, tmp_path):
    code, _, _ = emolens(
        "extract",
        "-m",
        tiny("llama", tokenizer="chat"),
        "-s",
        toy_set,
        "-o",
        tmp_path / "v.safetensors",
    )
    assert code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_extracts(emolens, tiny, toy_set, tmp_path, method):
    file = tmp_path / "v.safetensors"
    code, out, _ = emolens("extract", "-m", tiny("llama", tokenizer="chat"), "-s", toy_set, "--layers", "1", "--method", method, "--hook-point", "mlp_out", "-o", file)  # fmt: skip
    assert code == 0
    assert method in out
    v = em.load_directions(file)
    assert (v.info["method"], v.hook_point, v.layers) == (method, "mlp_out", (1,))


@pytest.mark.parametrize(("method", "times"), [("mean_difference", 0), ("pca", 1)])
def test_rows_are_read_into_memory_only_where_sums_are_not_enough(
    emolens, tiny, toy_set, tmp_path, monkeypatch, method, times
):
    loaded = []
    load = em.Collection.load
    monkeypatch.setattr(em.Collection, "load", lambda self: loaded.append(self) or load(self))
    code, _, _ = emolens("extract", "-m", tiny("llama", tokenizer="chat"), "-s", toy_set, "--layers", "1", "--method", method, "-o", tmp_path / "v.safetensors")  # fmt: skip
    assert (code, len(loaded)) == (0, times)


def test_score_reads_tokens_with_saved_vectors(emolens, vectors, tiny, tiny_model, tmp_path):
    model, text, page = (
        tiny("llama", tokenizer="chat"),
        "Then Mara wept <b>for</b> a long time.",
        tmp_path / "view.html",
    )
    code, out, _ = emolens(
        "score", "-v", vectors, "-m", model, "--tokens", "--layer", "2", "--html", page, text
    )
    assert code == 0
    expected = em.score(tiny_model, em.load_directions(vectors), [text], per="token", layer=2)
    assert out.startswith(repr(expected).splitlines()[0])
    assert f"wrote {page}" in out
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert "&lt;" in html
    assert "<b>for</b>" not in html


def test_score_reads_lines_from_standard_input(emolens, vectors, tiny, monkeypatch):
    import io

    monkeypatch.setattr(
        sys, "stdin", io.StringIO("The first line is here.\n\nThe second is longer than it.\n")
    )
    code, out, _ = emolens(
        "score", "-v", vectors, "-m", tiny("llama", tokenizer="chat"), "--tokens", "-"
    )
    assert code == 0
    assert len(out.splitlines()) > 30  # a line a token, all of them
    assert "more" not in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    code, _, err = emolens("score", "-v", vectors, "-m", tiny("llama", tokenizer="chat"), "-")
    assert code == 2
    assert "no text given" in one_line(err)


def test_score_reads_every_text_of_a_file_and_of_a_pipe(
    emolens, banded, tiny, tmp_path, monkeypatch
):
    import io

    texts = [f"Number {i} was waiting at the door, as on every day of the week." for i in range(50)]
    (tmp_path / "c.csv").write_text(
        "comment;id\n" + "".join(f"{t};{i}\n" for i, t in enumerate(texts)), encoding="utf-8"
    )
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8"
    )
    (tmp_path / "c.txt").write_text("\n".join(texts), encoding="utf-8")
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(texts).encode("utf-8-sig")))
    )
    said = set()
    for given in (
        (tmp_path / "c.csv", "--column", "Comment"),
        (tmp_path / "c.jsonl",),
        (tmp_path / "c.txt",),
        ("-",),
    ):
        code, out, err = emolens(
            "score", "-v", banded, "-m", tiny("llama", tokenizer="chat"), *given
        )
        assert code == 0, err
        assert all(f"Number {i} was" in line for i, line in enumerate(out.splitlines()[1:]))
        said.add(out)
    assert len(said) == 1
    assert len(said.pop().splitlines()) == 51


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("comments.csv",), "comments.csv: no such file"),
        (("./comments",), "comments: no such file"),
        (("nosuch file.csv",), "nosuch file.csv: no such file (a text that looks like a name: echo ... | emolens score -)"),
        (("https://example.org/a.csv",), "https://example.org/a.csv is an address, and only what lies on this machine is read and written"),
        (("https://example.org/a",), "https://example.org/a is an address"),
        (("She sat down.", "--html", "s3://mine/view.html"), "s3://mine/view.html is an address"),
        (("She sat down.", "-v", "https://example.org/v.safetensors"), "https://example.org/v.safetensors is an address"),
        (("TMP",), "is a folder; give the files in it"),
        (("TMP/c.csv",), "c.csv:1: no column 'text'; there are: comment, id; say which one is the text (column=, --column)"),
        (("TMP/c.xlsx",), "a .xlsx file is not read here"),
        (("She sat down.", "--column", "comment"), "no file was given"),
        (("She sat down.", "--long", "cut"), "--long cut; allowed: raise, truncate, skip"),
        (("She sat down.", "--layer", "7"), "layer 7 has no directions here"),
        (("She sat down.", "--html", "TMP/notes.html"), "notes.html already holds something that emolens did not write; choose another file, or overwrite=True (--overwrite)"),
        (("She sat down.", "--html", "TMP/none/view.html"), "none: no such folder"),
        (("She sat down.", "--device", "gpu", "-m", "TINY"), "device='gpu'; allowed: cpu, cuda"),
        (("She sat down.", "--dtype", "float23", "-m", "TINY"), "dtype='float23'; allowed: float32"),
    ],
    ids=str,
)  # fmt: skip
def test_score_refuses_before_the_model_is_opened(
    emolens, banded, tiny, tmp_path, monkeypatch, given, message
):
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("opened")
    )
    (tmp_path / "c.csv").write_text("comment,id\nThe door.,1\n", encoding="utf-8")
    (tmp_path / "c.xlsx").write_bytes(b"PK")
    (tmp_path / "notes.html").write_text("<p>mine</p>", encoding="utf-8")
    code, _, err = emolens(
        "score",
        "-v",
        banded,
        *(
            x.replace("TMP", str(tmp_path)).replace("TINY", str(tiny("llama", tokenizer="chat")))
            for x in given
        ),
    )
    assert code == 2
    assert message in one_line(err)
    assert (tmp_path / "notes.html").read_text(encoding="utf-8") == "<p>mine</p>"


def test_where_no_text_is_left_the_advice_fits(emolens, banded, tiny):
    model = tiny("llama", tokenizer="chat")
    code, _, err = emolens(
        "score", "-v", banded, "-m", model, "--long", "skip", "They laughed. " * 99
    )
    assert code == 2
    assert "every text is longer than the 256 tokens that this model reads, and was left out: choose long='truncate'" in one_line(err)  # fmt: skip


def test_a_text_too_long_is_named_cut_or_left_out(emolens, banded, tiny, tmp_path):
    file = tmp_path / "c.txt"
    file.write_text(
        "Number 1 was waiting at the door.\n"
        + "They laughed and nobody said why. " * 60
        + "\nNumber 3 was not.\n",
        encoding="utf-8",
    )
    command = ("score", "-v", banded, "-m", tiny("llama", tokenizer="chat"), file)
    code, _, err = emolens(*command)
    assert code == 2
    assert re.search(r"text 1 has \d+ tokens; this model reads 256 \(.*c\.txt:2\): shorten it, or choose long='truncate' or 'skip' \(--long of extract and score\)", one_line(err))  # fmt: skip
    code, out, _ = emolens(*command, "--long", "truncate")
    assert code == 0
    assert ["[cut]" in line for line in out.splitlines()] == [False, False, True, False]
    code, out, _ = emolens(*command, "--long", "skip")
    assert code == 0
    assert [line.split("'")[1][:8] for line in out.splitlines()[1:3]] == ["Number 1", "Number 3"]
    assert out.splitlines()[3].strip() == "1 texts left out: longer than the model reads"


# --- what is there already, and what cannot come of it ------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path) -> Path:
    file = tmp_path / "t.csv"
    rows = [
        f"Number {i} {deed} on day {i}.,{e},t{i}"
        for i in range(4)
        for e, deed in (("a", "laughed"), ("b", "wept"))
    ]
    file.write_text("\n".join(["text,emotion,topic", *rows]), encoding="utf-8")
    return file


def _never(monkeypatch) -> None:
    monkeypatch.setattr(
        "emolens.collect.engines.load_model", lambda *a, **k: pytest.fail("the model was opened")
    )


def test_extract_never_replaces_other_vectors_unless_told_to(
    emolens, vectors, tiny, toy_set, labelled, tmp_path, monkeypatch
):
    mine = tmp_path / "mine.safetensors"
    shutil.copy(vectors, mine)
    before, model = mine.read_bytes(), tiny("llama", tokenizer="chat")
    wanted = ("extract", "-o", mine, "--layers", "1,2")
    with monkeypatch.context() as patch:
        _never(patch)
        for other in (
            ("-m", tiny("qwen2"), "-s", toy_set), ("-m", model, "--texts", labelled), ("-m", model, "-s", toy_set, "--method", "lda"),
            ("-m", model, "-s", toy_set, "--hook-point", "resid_pre"), ("-m", model, "-s", toy_set, "--remove-neutral", "0"),
            ("-m", model, "-s", toy_set, "--dtype", "bfloat16"), ("-m", model, "-s", toy_set, "--layers", "1"),
        ):  # fmt: skip
            code, _, err = emolens(*wanted, *other)
            assert code == 2
            said = one_line(err)
            assert "mine.safetensors already holds other directions (4 emotions x 2 layers at resid_post, mean_difference of toy with tiny-llama" in said  # fmt: skip
            assert "--overwrite" in said
        (tmp_path / "weights.safetensors").write_bytes(b"of a model")
        code, _, err = emolens(
            "extract", "-m", model, "-s", toy_set, "-o", tmp_path / "weights.safetensors"
        )
        assert "already holds something that is no directions of emolens" in one_line(err)
    assert mine.read_bytes() == before
    twin = tmp_path / "twin" / model.name  # other weights under the same name
    shutil.copytree(tiny("llama", tokenizer="chat", seed=1), twin)
    monkeypatch.setattr(
        "emolens.collect.forward._Pass.run", lambda *a: pytest.fail("a pass was made")
    )
    code, _, err = emolens(*wanted, "-m", twin, "-s", toy_set)
    assert "already holds other directions" in one_line(err)
    assert mine.read_bytes() == before
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "200")
    assert emolens(*wanted, "-m", model, "-s", toy_set)[0] == 0  # the same again
    assert emolens(*wanted, "-m", model, "--texts", labelled, "--overwrite")[0] == 0
    assert em.load_directions(mine).emotions == ("a", "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--texts", "TMP/one.csv"), "directions need texts of at least two emotions (split main), found a in 2 texts (splits: main)"),
        (("--texts", "TMP/test.jsonl"), "found none in 2 texts (splits: test)"),
        (("--texts", "TMP/label.csv"), "found none in 2 texts (splits: none); a file names them in a column 'emotion'"),
        (("--texts", "TMP/t.csv", "--remove-neutral", "0.5"), "only those of a set (--set) are kept for that; give --remove-neutral 0"),
        (("--texts", "TMP/t.csv", "--method", "antonym_contrast"), "names no antonyms, which antonym_contrast needs"),
        (("--texts", "TMP/t.csv", "--column", "comment"), "no column 'comment'; there are: text, emotion, topic"),
        (("-s", "TMP/own"), "set 'own' has no neutral texts, and what they vary in was to be taken out: add neutral texts, or give --remove-neutral 0"),
        (("-s", "SET", "-o", "TMP"), "is a folder; give the name of a file"),
        (("-s", "SET", "--long", "cut"), "--long cut; allowed: raise, truncate, skip"),
        (("-s", "SET", "--method", "lda", "--remove-neutral", "0.5"), "lda takes nothing out"),
        (("-s", "SET", "--device", "cuda:99"), "device='cuda:99', but of CUDA devices this machine has"),
        (("-s", "SET", "--dtype", "float23"), "dtype='float23'; allowed: float32, float64, bfloat16, float16"),
    ],
    ids=str,
)  # fmt: skip
def test_extract_refuses_before_the_model_is_opened(
    emolens, tiny, toy_set, labelled, tmp_path, monkeypatch, given, message
):
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("opened")
    )
    (tmp_path / "one.csv").write_text("text,emotion\nThe door.,a\nThe house.,a\n", encoding="utf-8")
    (tmp_path / "label.csv").write_text("text,label\nThe door.,a\nThe house.,b\n", encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(
        '{"text": "a b", "emotion": "a", "split": "test"}\n{"text": "b", "emotion": "b", "split": "test"}\n',
        encoding="utf-8",
    )
    _without_neutral(toy_set, tmp_path / "own")
    given = [x.replace("TMP", str(tmp_path)).replace("SET", str(toy_set)) for x in given]
    code, _, err = emolens(
        "extract", "-m", tiny("llama", tokenizer="chat"), "-o", tmp_path / "v.safetensors", *given
    )
    assert code == 2
    assert message in one_line(err)
    assert not [p for p in tmp_path.iterdir() if "safetensors" in p.name]


def _without_neutral(toy_set: Path, folder: Path) -> None:
    shutil.copytree(toy_set, folder)
    spec = yaml.safe_load((folder / "set.yaml").read_text(encoding="utf-8")) | {
        "neutral": None,
        "name": "own",
    }
    (folder / "set.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")


def test_a_set_without_neutral_texts_gives_directions_that_say_what_they_cannot_do(
    emolens, tiny, toy_set, tmp_path
):
    _without_neutral(toy_set, tmp_path / "own")
    file = tmp_path / "v.safetensors"
    code, out, err = emolens("extract", "-m", tiny("llama", tokenizer="chat"), "-s", tmp_path / "own", "-o", file, "--remove-neutral", "0", "--layers", "1")  # fmt: skip
    assert code == 0, err
    assert "score will call no text 'none': that needs 20 neutral texts" in out
    assert em.load_directions(file).info["remove_neutral"] is None


def test_a_study_refuses_before_the_model_is_opened(emolens, tiny, toy_set, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "emolens.models.loading.load_model", lambda *a, **k: pytest.fail("the model was opened")
    )
    _without_neutral(toy_set, tmp_path / "own")
    project = tmp_path / "project"
    (project / "experiments").mkdir(parents=True)
    (project / "experiments" / "mine.py").write_text("my work", encoding="utf-8")
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    (vectors / "vectors.safetensors").write_bytes(b"mine")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for set_, out, message in (
        (tmp_path / "own", tmp_path / "study", "set 'own' has no neutral texts"),
        (toy_set, project, "holds something else (experiments) that a study would replace"),
        (toy_set, vectors, "holds something else (vectors.safetensors) that a study would replace"),
        (toy_set, tmp_path / "file", "file is a file; give the name of a folder"),
    ):
        code, _, err = emolens(
            "study", "-m", tiny("llama", tokenizer="chat"), "-s", set_, "-o", out
        )
        assert code in (2, 3)
        assert message in one_line(err)
    assert (project / "experiments" / "mine.py").read_text(encoding="utf-8") == "my work"
    assert (vectors / "vectors.safetensors").read_bytes() == b"mine"


def test_other_files_are_not_replaced_by_what_is_written(
    emolens, tiny, toy_set, tmp_path, monkeypatch
):
    mine = tmp_path / "mine.json"
    mine.write_text("my work", encoding="utf-8")
    monkeypatch.setattr(
        "emolens.models.loading.load_model", lambda *a, **k: pytest.fail("the model was opened")
    )
    code, _, err = emolens(
        "languages", "-m", tiny("llama"), "--sets", f"{toy_set},core_de", "-o", mine
    )
    assert (
        code,
        "mine.json already holds something that is no result of this command" in one_line(err),
    ) == (2, True)
    code, _, err = emolens("write-stories", "-s", toy_set, "--export-prompts", mine)
    assert (code, "mine.json already holds other prompts, or something else" in one_line(err)) == (
        2,
        True,
    )
    assert mine.read_text(encoding="utf-8") == "my work"
    for _ in range(2):  # the same again is no loss
        assert (
            emolens("write-stories", "-s", toy_set, "--export-prompts", mine, "--overwrite")[0] == 0
        )
    assert emolens("write-stories", "-s", toy_set, "--export-prompts", mine)[0] == 0
    (tmp_path / "topics.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="something else under a name that a set needs"):
        em.save_emotion_set(em.load_emotion_set(toy_set), tmp_path)
    assert (tmp_path / "topics.yaml").read_text(encoding="utf-8") == "mine"


def test_a_saved_value_does_not_replace_another(vectors, tmp_path):
    v, file = em.load_directions(vectors), tmp_path / "v.safetensors"
    v.save(file)
    v.save(file)
    with pytest.raises(
        FileExistsError, match=r"already holds other directions \(4 emotions x 2 layers"
    ):
        v["glimmer"].save(file)
    assert em.load_directions(file).emotions == v.emotions
    v["glimmer"].save(file, overwrite=True)
    assert em.load_directions(file).emotions == ("glimmer",)


def test_vectors_of_a_local_model_need_the_model_named(emolens, banded):
    """A file never holds a path of the machine that made it."""
    assert str(Path("/tmp")).encode() not in banded.read_bytes()
    code, _, err = emolens("score", "-v", banded, "a text")
    assert code == 2
    assert "made with a local model" in one_line(err)
    assert "with --model" in err


def test_vectors_of_another_model_are_refused_unless_allowed(emolens, vectors, tiny):
    twin = tiny("llama", tokenizer="chat", seed=1)
    code, _, err = emolens(
        "score", "-v", vectors, "-m", twin, "--tokens", "Mara wept for a long time."
    )
    assert code == 2
    assert "other weights" in one_line(err)
    code, out, _ = emolens(
        "score",
        "-v",
        vectors,
        "-m",
        twin,
        "--tokens",
        "--allow-other-model",
        "Mara wept for a long time.",
    )
    assert code == 0
    assert out.startswith("Scores per token")


def test_study_runs_and_shows_its_primary_rows(emolens, tiny, toy_set, tmp_path, monkeypatch):
    """The experiments themselves are tested in test_study.py."""
    from _answers import patched

    from emolens.experiments.base import Findings
    from emolens.experiments.protocol import EXPERIMENTS
    from emolens.experiments.rows import Row

    first = [
        Row(
            "separability",
            "emotion top1",
            0.5,
            primary=True,
            low=0.4,
            high=0.6,
            control="shuffled labels",
        )
    ]
    runs = {e.name: lambda inputs: Findings() for e in EXPERIMENTS}
    patched(monkeypatch, **(runs | {"separability": lambda inputs: Findings(first)}))
    monkeypatch.setattr("emolens.report.page.render", lambda *a, **k: "<!doctype html>")
    home = Path.home()
    out_folder = tmp_path / "a b" / "study"
    code, out, _ = emolens(
        "study",
        "-m",
        tiny("llama", tokenizer="chat"),
        "-s",
        toy_set,
        "-o",
        out_folder,
        "--seed",
        "3",
    )
    assert code == 0
    assert re.search(r"separability +emotion top1 +0\.500 \[0\.40, 0\.60\] +shuffled labels", out)
    provenance = json.loads((out_folder / "results.json").read_text(encoding="utf-8"))["provenance"]
    assert provenance["seed"] == 3
    assert provenance["command"].startswith("emolens study -m ")
    assert f"{home}{os.sep}" not in provenance["command"]
    code, _, err = emolens(
        "study", "-m", tiny("llama", tokenizer="chat", seed=1), "-s", toy_set, "-o", out_folder
    )
    assert code == 2
    assert "already holds another study" in one_line(err)
    assert "--overwrite" in err


# --- steer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["add", "ablate", "clamp", "rotate"])
def test_steer_shows_baseline_steered_and_random(emolens, vectors, tiny, method):
    model = tiny("llama", tokenizer="chat")
    options = (
        "-v",
        vectors,
        "-m",
        model,
        "-e",
        "glimmer",
        "--method",
        method,
        "--max-new-tokens",
        "4",
    )
    code, out, err = emolens("steer", *options, "The door [bold]was[/x] open")
    assert code == 0, err
    assert "The door [bold]was[/x] open" in out
    assert re.search(rf"baseline .*{method} glimmer .*{method} random", out)
    assert re.search(r"(glimmer|gloamer|brindle|tarrow) [+-]\d", out)


def test_steer_ends_where_it_is_told_to(emolens, vectors, tiny):
    """At its second token, by a special token's name or by a string."""
    path = tiny("llama", tokenizer="chat")
    options = ("-v", vectors, "-m", path, "-e", "glimmer", "--dose", "0", "--max-new-tokens", "6")
    [text] = em.generate(em.load_model(path), "A dog barked", max_new_tokens=6).texts
    start = next(i for i in range(2, len(text)) if text[i] not in text[:i] and text[i].isalnum())
    code, whole, err = emolens("steer", *options, "A dog barked")
    assert code == 0, err
    code, cut, err = emolens(
        "steer", *options, "--stop", text[start], "--stop", "never written", "A dog barked"
    )
    assert code == 0, err
    assert whole.count(text[: start + 1].strip()) == 3
    assert text[: start + 1].strip() not in cut


def test_steer_stacks_on_a_narrow_terminal_and_shows_the_text_as_it_is_written(
    emolens, vectors, tiny, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    model = tiny("llama", tokenizer="chat")
    options = ("-v", vectors, "-m", model, "-e", "glimmer", "--max-new-tokens", "4", "--watch")
    code, out, err = emolens("steer", *options, "The door", "A dog")
    assert code == 0, err
    assert [
        line
        for line in out.splitlines()
        if line.strip() in ("baseline", "add glimmer", "add random")
    ] == [
        *("baseline", "add glimmer", "add random"),
        *("baseline", "add glimmer", "add random"),
    ]
    assert "\r" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-e", "glimer"), "glimmer"),
        (("-e", "glimmer", "--layer", "99"), "99"),
        (("-e", "glimmer", "--dose", "nan"), "finite"),
        (("-e", "glimmer", "--method", "shout"), "allowed: add"),
    ],
)
def test_steer_refuses_before_the_model_is_loaded(emolens, vectors, monkeypatch, options, message):
    monkeypatch.setattr(
        "emolens.models.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded")
    )
    code, _, err = emolens("steer", "-v", vectors, *options, "The door")
    assert code == 2
    assert message in one_line(err)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "own.txt",
            "'own.txt' is the name of a file, and steer continues texts: give the text that is in it",
        ),
        ("mine", "'mine' is the name of a folder"),
        (" ", "text 0 is empty"),
    ],
)
def test_steer_takes_no_name_for_a_text(emolens, vectors, tmp_path, monkeypatch, prompt, message):
    monkeypatch.setattr(
        "emolens.models.loading.load_model", lambda *a, **k: pytest.fail("the model was loaded")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    code, _, err = emolens("steer", "-v", vectors, "-e", "glimmer", prompt)
    assert code == 2
    assert message in one_line(err)


def test_steer_without_a_vectors_file(emolens, tmp_path):
    code, _, err = emolens("steer", "-v", tmp_path / "none.safetensors", "-e", "joy", "The door")
    assert code == 2
    assert "none.safetensors" in one_line(err)


# --- stories, languages, imports ----------------------------------------------------------------------------------------


def test_write_stories_writes_counts_and_says_when_nothing_is_usable(
    emolens, tiny, toy_set, tmp_path
):
    options = ("-m", tiny("llama", tokenizer="chat"), "-s", toy_set, "--emotions", "glimmer,brindle", "--topics", "train", "--max-new-tokens", "8")  # fmt: skip
    code, out, err = emolens("write-stories", *options, "-o", tmp_path / "own")
    assert code == 1, err
    assert "2 asked" in out
    assert "not one topic has a usable story of every emotion" in out
    assert len((tmp_path / "own" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    code, _, err = emolens("write-stories", *options, "-o", tmp_path / "own", "--seed", "5")
    assert code == 2
    assert "differs in: seed" in one_line(err)


def test_prompts_go_out_and_texts_come_back(emolens, toy_set, tmp_path):
    some = ("-s", toy_set, "--emotions", "glimmer,brindle", "--topics", "train")
    code, out, _ = emolens("write-stories", *some, "--export-prompts", tmp_path / "prompts.jsonl")
    assert (code, "2 prompts" in out) == (0, True)
    prompts = [
        json.loads(line)
        for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    told = "The kettle was on the table and nobody had put it there. {} and I walked to the window and counted four buses in the rain."
    lines = [
        {"id": p["id"], "text": told.format(who)}
        for p, who in zip(prompts, ("Ann", "Bo"), strict=True)
    ]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8"
    )
    back = ("--import-texts", tmp_path / "texts.jsonl", "--length", "15,60", "-o", tmp_path / "own")
    code, _, err = emolens("write-stories", *some, *back)
    assert (code, "--writer" in one_line(err)) == (2, True)
    code, out, err = emolens("write-stories", *some, *back, "--writer", "a person")
    assert code == 0, err
    assert "2 asked, 2 kept" in out
    assert len(em.load_emotion_set(tmp_path / "own" / "set").texts()) == 2


@pytest.mark.parametrize(
    ("length", "message"), [("60", "two numbers"), ("90,60", "the first at least 1")]
)
def test_a_wrong_length_says_what_is_allowed(emolens, toy_set, tmp_path, length, message):
    code, _, err = emolens(
        "write-stories", "-s", toy_set, "--length", length, "-o", tmp_path / "own"
    )
    assert (code, message in one_line(err)) == (2, True)


def test_languages_prints_the_matrix_and_writes_every_row(emolens, tiny, toy_set, tmp_path):
    spec = yaml.safe_load((toy_set / "set.yaml").read_text(encoding="utf-8"))
    german = tmp_path / "toy_de"
    shutil.copytree(toy_set, german)
    (german / "set.yaml").write_text(
        yaml.safe_dump(spec | {"name": "toy_de", "language": "de"}), encoding="utf-8"
    )
    code, out, err = emolens("languages", "-m", tiny("llama", tokenizer="chat"), "--sets", f"{toy_set},{german}", "-o", tmp_path / "l.json")  # fmt: skip
    assert code == 0, err
    assert re.search(r"(?m)^de +\d\.\d\d \[", out)
    data = json.loads((tmp_path / "l.json").read_text(encoding="utf-8"))
    assert {r["split"] for r in data["rows"] if r["primary"]} == {
        "en -> en",
        "en -> de",
        "de -> en",
        "de -> de",
    }


def test_sets_import_makes_a_set_of_a_corpus(emolens, tmp_path):
    plain = "The {} stood by the door for the third time that week and the lamp was on the table where it had been left since Monday."
    told = [{"job_id": e, "kind": "emotion_story", "emotion": e, "topic": "a fence", "segments": [plain.format(e)]} for e in ("joyful", "sad")]  # fmt: skip
    (tmp_path / "stories.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in told), encoding="utf-8"
    )
    code, out, err = emolens(
        "sets", "import", tmp_path, "--form", "emovecllm", "-o", tmp_path / "set"
    )
    assert code == 0, err
    assert "2 used" in out
    assert em.load_emotion_set(tmp_path / "set").names == ("joyful", "sad")
    code, _, err = emolens("sets", "import", tmp_path, "--form", "csv", "-o", tmp_path / "set")
    assert (code, "allowed: emovecllm, emotion-probes" in one_line(err)) == (2, True)


def test_run_lists_the_experiments_and_a_new_one_among_them(emolens, monkeypatch):
    from toy_experiment import TOY

    from emolens.experiments import protocol

    monkeypatch.setattr(protocol, "EXPERIMENTS", (*protocol.EXPERIMENTS, TOY))
    code, out, _ = emolens("run", "--list")
    assert code == 0
    for e in protocol.EXPERIMENTS:
        assert e.name in out
        assert e.question.split()[0] in out
    assert "validation" in next(
        line for line in out.splitlines() if line.strip().startswith("causal")
    )


def test_run_refuses_an_unknown_experiment_before_the_model_is_opened(
    emolens, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        "emolens.models.loading.load_model", lambda *a, **k: pytest.fail("the model was opened")
    )
    code, _, err = emolens("run", "casual", "-o", tmp_path / "r")
    assert (code, "did you mean causal?" in err) == (2, True)
    code, _, err = emolens("run")
    assert (code, "name an experiment" in err) == (2, True)
    code, _, err = emolens("study", "--profile", "fast", "-o", tmp_path / "s")
    assert (code, "profile is one of quick, standard, full" in err) == (2, True)

"""The wheel: what is in it, and that it works outside the checkout, where the shipped sets live inside the package."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.wheel


def _run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without network: hatchling is in this environment."""
    out = tmp_path_factory.mktemp("wheel")
    built = _run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out
    )
    assert built.returncode == 0, built.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; its dependencies are read from this environment."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    installed = _run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=home
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    (site,) = home.glob("lib/python*/site-packages")
    # a line of a .pth file adds the folder but not its .pth files, so the editable install stays out
    (site / "dependencies.pth").write_text(
        sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8"
    )
    return python


def test_the_wheel_has_the_data_and_the_type_marker_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "emolens/py.typed",
        "emolens/_data/core/set.yaml",
        "emolens/_data/core/topics.yaml",
        "emolens/_data/core/stories/joy.jsonl",
        "emolens/_data/core/neutral/stories.jsonl",
        "emolens/_data/norms/glasgow_2019.csv",
        "emolens/models/adapters/llama.py",
        "emolens/experiments/separability.py",
    ):
        assert needed in names
    tops = {n.split("/")[0] for n in names}
    assert tops == {"emolens", next(t for t in tops if t.endswith(".dist-info"))}
    assert not [n for n in names if "test" in n.lower() or n.endswith((".pyc", ".ipynb"))]


def test_every_file_of_every_shipped_set_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = ROOT / "emotion_sets"
    missing = [
        p
        for p in data.rglob("*")
        if p.is_file() and f"emolens/_data/{p.relative_to(data)}" not in names
    ]
    assert not missing


def test_the_metadata_names_licence_and_transformer_lens_range(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    read = Parser().parsestr(archive.read(metadata).decode())
    assert read["License-Expression"] == "MIT"
    requires = [r for r in read.get_all("Requires-Dist") or [] if r.startswith("transformer-lens")]
    assert requires == ["transformer-lens<5,>=3.9"]


def test_nothing_in_the_wheel_names_a_folder_of_this_machine(wheel):
    archive = zipfile.ZipFile(wheel)
    assert "emolens/experiments/rules.py" in archive.namelist()
    for name in archive.namelist():
        assert str(ROOT).encode() not in archive.read(name), name


def test_the_installed_wheel_loads_its_own_sets_outside_the_checkout(python, tmp_path):
    code = (
        "import emolens as em, emolens._files as s, sys\n"
        "core = em.load_emotion_set('core')\n"
        "sys.stdout.write('\\n'.join([em.__file__, str(s.data_root()), ' '.join(em.list_emotion_sets()),"
        " str(len(core.names)), str(len(em.load_norms()) > 20)]))"
    )
    result = _run(python, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, data, listed, n_emotions, has_norms = result.stdout.split("\n")
    assert str(ROOT) not in file
    assert Path(data) == Path(file).parent / "_data"
    assert "core" in listed.split()
    assert (n_emotions, has_norms) == ("24", "True")


def test_the_installed_command_lists_the_sets(python, tmp_path):
    result = _run(python.with_name("emolens"), "sets", "list", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "EmotionSet(core: 24 emotions" in result.stdout

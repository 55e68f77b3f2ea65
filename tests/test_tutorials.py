"""Every tutorial runs from start to end, and the committed notebook is the one that its script makes.

Those that collect the same activations run in one folder, one after the other, as a reader's do: the second finds what the first collected.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
SHARED = "acts/{MODEL}/"  # in the scripts that collect into the same folder
RUNS = [
    pytest.param(
        script,
        id=script.stem,
        marks=pytest.mark.xdist_group(
            "tutorials that share" if SHARED in script.read_text(encoding="utf-8") else script.stem
        ),
    )
    for script in SCRIPTS
]
# beside another process of tests, a second thread only waits
BESIDE_OTHERS = {"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {}


def test_the_notebooks_match_their_scripts():
    pytest.importorskip("jupytext", reason="needs the notebooks extra")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "check.py")],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def desk(tmp_path_factory):
    return tmp_path_factory.mktemp("tutorials")


@pytest.mark.notebook
@pytest.mark.parametrize("script", RUNS)
def test_a_tutorial_runs_from_start_to_end(script, desk):
    # as a plain script: the cells assert their claims, and a notebook's kernel adds nothing but time
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=desk,
        env={**os.environ, "MPLBACKEND": "agg"} | BESIDE_OTHERS,
        timeout=1200,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_committed_notebook_has_its_outputs_and_no_errors(script):
    nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra")
    notebook = nbformat.read(script.with_suffix(".ipynb"), 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any(
        "image/png" in o.get("data", {}) for o in outputs
    )  # pictures can be seen in the file as committed
    assert any("CircuitsVis.render" in o.get("data", {}).get("text/html", "") for o in outputs)

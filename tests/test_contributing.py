"""What a contributor is told: the commands exist, the marks are those of the suite, and the code on the pages runs."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
import types
from pathlib import Path

import pytest
import toys
import yaml

from emolens.models import adapters

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"(?m)^([a-z0-9-]+):", MAKE))
COMMAND = r"(?m)(?:`|^|entry: )make ([a-z][a-z0-9-]+)"
PAGES = sorted((ROOT / "docs").glob("add-*.md"))


def _read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def test_every_make_target_that_is_named_exists():
    files = ("CONTRIBUTING.md", "README.md", ".ci/run", ".pre-commit-config.yaml")
    named = {t for file in files for t in re.findall(COMMAND, _read(file))}
    assert {"install", "quick", "test", "test-tl4", "check", "format"} <= named
    assert named <= TARGETS
    phony = re.search(r"(?m)^\.PHONY: (.*)$", MAKE)
    assert phony is not None
    assert set(phony[1].split()) == TARGETS


def test_what_runs_before_a_commit_and_in_ci_is_what_a_person_runs():
    (local,) = yaml.safe_load(_read(".pre-commit-config.yaml"))["repos"]
    assert local["repo"] == "local"
    assert all(re.fullmatch(r"make [a-z]+", hook["entry"]) for hook in local["hooks"])
    jobs = yaml.safe_load(_read(".github/workflows/ci.yml"))["jobs"]
    assert [step["run"] for step in jobs["ci"]["steps"] if "run" in step] == [".ci/run"]
    chosen = re.search(r"(?m)^quick:.*\n.* -m \"(.*)\"$", MAKE)
    assert chosen is not None
    assert json.loads(_read(".vscode/settings.json"))["python.testing.pytestArgs"][-1] == chosen[1]


def test_every_mark_is_explained():
    declared = tomllib.loads(_read("pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"]
    explained = set(re.findall(r"(?m)^\| `(\w+)` \|", CONTRIBUTING))
    assert explained == {mark.split(":")[0] for mark in declared}


def test_every_name_on_the_list_of_what_lasts_is_there():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    names = {path.stem.removeprefix("test_") for path in files}
    for path in files:
        names |= set(re.findall(r"(?m)^def (test_\w+)\(", path.read_text(encoding="utf-8")))
    assert names >= toys.SLOW


def test_every_page_is_reached_from_contributing():
    linked = set(re.findall(r"\(docs/(add-[a-z-]+\.md)\)", CONTRIBUTING))
    assert linked == {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_page_runs_and_so_do_its_tests(page, request, monkeypatch):
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8"))
    # a file inside a room cannot import from the room's list of names, which imports the file
    assert not re.search(r"(?m)^from emolens.experiments import", "".join(blocks[:1]))
    room = types.ModuleType(page.stem.replace("-", "_"))
    for block in blocks:
        exec(compile(block, str(page), "exec"), vars(room))
    if page.stem == "add-a-model-family":  # the line that goes into families.py
        monkeypatch.setitem(adapters.FAMILIES, "MistralForCausalLM", room)
    tests = [f for name, f in vars(room).items() if name.startswith("test_")]
    assert tests, "a page shows its test"
    for test in tests:
        test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})

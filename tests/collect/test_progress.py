"""Bars: shown after two seconds where somebody looks, or as told."""

from __future__ import annotations

import inspect
import io
import sys
import time
from types import SimpleNamespace

import pytest

import emolens as em
from emolens.collect import progress as room
from emolens.collect.progress import progress_bar
from emolens.interventions import patching


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream, progress, monkeypatch, *, patience=0.0, seconds=0.05) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(room, "PATIENCE", patience)
    for _ in progress_bar(range(3), "text", progress, "stories"):
        time.sleep(seconds)
    return stream.getvalue()


def test_a_bar_is_shown_on_a_terminal_and_in_no_file(monkeypatch):
    assert "stories" in shown(Terminal(), None, monkeypatch)
    assert shown(io.StringIO(), None, monkeypatch) == ""
    assert shown(Terminal(), None, monkeypatch, patience=60.0) == ""  # done before anyone waits


def test_a_bar_is_shown_on_the_page_of_a_notebook(monkeypatch):
    shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    assert "stories" in shown(io.StringIO(), None, monkeypatch)


def test_a_bar_that_is_asked_for_is_shown_at_once_and_one_that_is_refused_never(monkeypatch):
    assert "stories" in shown(io.StringIO(), True, monkeypatch, patience=60.0)
    assert shown(Terminal(), False, monkeypatch) == ""


@pytest.mark.parametrize(
    "function",
    [em.collect_resid_post, em.collect_z, em.collect_to, em.score, em.sweep, em.patch_resid_pre, patching.patch_z, em.write_stories, em.compare_languages],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_every_public_call_has_the_same_rule(function):
    assert inspect.signature(function).parameters["progress"].default is None

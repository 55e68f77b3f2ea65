"""The list of experiments, what a profile asks, and that one file is enough for a new one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from _answers import patched
from toy_experiment import TOY

import emolens as em
from emolens.experiments import protocol
from emolens.experiments.base import Findings, Shown
from emolens.experiments.protocol import EXPERIMENTS, answers, chosen_experiments, find_experiment
from emolens.experiments.rows import Row, row
from emolens.experiments.rules import RULES
from emolens.study import run_experiment, run_study


def test_name_file_and_rows_of_an_experiment_are_one_word():
    for e in EXPERIMENTS:
        assert e.run.__module__ == f"emolens.experiments.{e.name}"
        assert e.question.endswith("?")
        assert all(c.rule in RULES for c in e.claims)
        assert set(e.needs) <= {x.name for x in EXPERIMENTS[: EXPERIMENTS.index(e)]}
    assert len({e.name for e in EXPERIMENTS}) == len(EXPERIMENTS)


def test_a_profile_is_a_list_and_what_is_needed_runs_before():
    assert chosen_experiments("standard") == chosen_experiments("full") == EXPERIMENTS
    assert [e.name for e in chosen_experiments("quick")] == list(protocol.PROFILES["quick"] or ())
    assert [e.name for e in chosen_experiments(["causal"])] == ["validation", "causal"]
    assert [e.name for e in chosen_experiments(["causal", "person"])] == [
        "person",
        "validation",
        "causal",
    ]
    assert [e.name for e in chosen_experiments([TOY, "person"])] == ["person", "toy"]
    other = replace(TOY, needs=("person",))
    assert [e.name for e in chosen_experiments([other])] == ["person", "toy"]


def test_what_is_not_there_is_said_with_the_nearest():
    with pytest.raises(ValueError, match="no experiment 'casual'; did you mean causal"):
        find_experiment("casual")
    with pytest.raises(ValueError, match="profile is one of quick, standard, full, or a list"):
        chosen_experiments("fast")
    with pytest.raises(ValueError, match="two experiments are called 'toy'"):
        chosen_experiments([TOY, replace(TOY, question="Another?")])


def test_findings_are_the_same_after_json():
    found = Findings(
        [Row("toy", "m", 0.5, low=0.4, n=3)], [Shown("t", ("a", "b"), (("1", "2"),), open=True)], {"layer": 3, "emotions": ["joy"]}
    )  # fmt: skip
    again = Findings.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found


def test_a_figure_that_could_not_be_computed_is_nan_and_null_in_a_file():
    found = row("toy", "m", float("nan"), n=3)
    [again] = Findings.from_dict(json.loads(json.dumps(Findings([found]).to_dict()))).rows
    assert np.isnan(again.value)
    assert found.to_dict()["value"] is None
    with pytest.raises(TypeError):
        row("toy", "m", None)


def test_one_file_is_an_experiment(tiny_model, toy_set, tmp_path, monkeypatch):
    """It is in the list, in a study, on the page with question, verdict, figure and gate, and it is resumed."""
    monkeypatch.setattr(protocol, "EXPERIMENTS", (*EXPERIMENTS, TOY))
    stories = em.load_emotion_set(toy_set)
    assert find_experiment("toy") is TOY

    ran: list[str] = []

    def stop(inputs):
        raise KeyboardInterrupt

    patched(monkeypatch, toy=lambda inputs: ran.append("toy") or TOY.run(inputs), person=stop)
    last = find_experiment("person")
    options = {"profile": ["toy", replace(last, name="zz")], "out": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny_model, stories, **options)
    assert ran == ["toy"]
    assert [p.name for p in (tmp_path / "experiments").iterdir()] == ["toy.json"]
    patched(monkeypatch, person=lambda inputs: Findings())
    options["profile"] = ["toy", replace(find_experiment("person"), name="zz")]
    study = run_study(tiny_model, stories, **options)
    assert ran == ["toy"]  # kept, not run again
    assert [r.experiment for r in study.rows] == ["toy"]
    [answer] = [a for a in study.answers() if a.name == "toy"]
    assert answer.verdict in ("shown", "not shown")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for words in (
        TOY.question,
        TOY.paper,
        "Half of the topics reads the other",
        'aria-label="Toy figure"',
        "A dot, and nothing else.",
    ):
        assert words in page
    assert (
        "fewer than two topics are told" in page
    )  # the gate of the other one, which found nothing


def test_an_experiment_runs_alone_and_says_what_it_found(tiny_model, toy_set):
    stories = em.load_emotion_set(toy_set)
    found = run_experiment(TOY, tiny_model, stories, progress=False)
    assert [r.metric for r in found.rows] == ["top1"]
    assert TOY.question in repr(found)
    assert "Half of the topics reads the other" in repr(found)
    assert "<figure>" in found._repr_html_()


def test_a_closed_gate_is_said_once_with_the_smallest_effect():
    [answer] = answers(TOY, Findings(), 4)
    assert (answer.name, answer.verdict) == ("toy", "not asked")
    assert (
        answer.text == "cannot be asked: fewer than 4 topics. A share of .5 could have been shown."
    )

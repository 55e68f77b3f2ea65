"""Verdict rules as a truth table, and what the page says of each outcome."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from _answers import CLAIMS, SHIPPED, answers

from emolens.experiments import rows as rows_room
from emolens.experiments import rules as verdicts
from emolens.experiments.protocol import find_experiment
from emolens.experiments.rows import Row
from emolens.experiments.rules import FEWEST, RULES, Answer
from emolens.report import page as report

NAN = float("nan")
FULL: dict[str, Any] = {"value": 0.5, "low": 0.4, "high": 0.6, "null_mean": 0.2, "null_high": 0.3, "p": 0.01, "n": 100, "unit_of_n": "stories"}  # fmt: skip


def a_row(**changes: Any) -> Row:
    return Row("separability", "m", **(FULL | changes))


def below(value: float) -> dict[str, float]:
    """The same interval about another value."""
    return {"value": value, "low": round(value - 0.1, 9), "high": round(value + 0.1, 9)}


# rule: what is given, and the verdict. Every rule has a case of each kind; edges belong to "not shown".
TABLE: list[tuple[str, dict[str, Any], str]] = [
    ("above_null", {}, "shown"),
    ("above_null", {"p": 0.05}, "not shown"),
    ("above_null", {"p": 0.2}, "not shown"),
    ("above_null", {"low": 0.3}, "not shown"),  # the interval reaches what 95 % of the draws reach
    ("above_null", {"low": 0.25}, "not shown"),  # above the draws' mean is not enough
    ("above_null", {"null_high": 0.45}, "not shown"),
    ("above_null", below(0.05) | {"p": 0.97}, "opposite"),
    ("above_null", below(0.05) | {"p": 0.9}, "not shown"),
    ("above_null", below(0.25) | {"p": 0.97}, "not shown"),
    ("above_null", {"p": None}, "not asked"),
    ("above_null", {"null_high": None}, "not asked"),
    ("above_null", {"low": NAN}, "not asked"),
    ("above_zero", {}, "shown"),
    ("above_zero", {"low": 0.0}, "not shown"),
    ("above_zero", below(0.05), "not shown"),
    ("above_zero", below(-0.05), "not shown"),
    ("above_zero", {"value": -0.05, "low": -0.1, "high": 0.0}, "not shown"),
    ("above_zero", below(-0.5), "opposite"),
    ("above_zero", {"low": None, "high": None}, "not asked"),
    ("above_zero", {"value": NAN}, "not asked"),
    ("below_zero", below(-0.5), "shown"),
    ("below_zero", below(-0.05), "not shown"),
    ("below_zero", below(0.05), "not shown"),
    ("below_zero", {}, "opposite"),
    ("below_zero", {"high": None}, "not asked"),
    ("no_loss", {"value": -0.01, "low": -0.04, "high": 0.02}, "shown"),
    ("no_loss", {"value": -0.02, "low": -0.04, "high": -0.01}, "shown"),  # a loss, and surely a small one
    ("no_loss", {}, "shown"),
    ("no_loss", {"value": -0.01, "low": -0.05, "high": 0.03}, "not shown"),  # includes 0, and a loss as well
    ("no_loss", {"value": -0.08, "low": -0.11, "high": -0.05}, "opposite"),
    ("no_loss", {"low": None}, "not asked"),
    ("above_chance", {}, "shown"),
    ("above_chance", {"low": 0.2}, "not shown"),
    ("above_chance", below(0.2), "not shown"),
    ("above_chance", below(0.05), "opposite"),
    ("above_chance", {"null_mean": None}, "not asked"),
    ("rejected", {}, "shown"),
    ("rejected", {"low": None, "high": None}, "shown"),
    ("rejected", {"p": 0.05}, "not shown"),
    ("rejected", {"p": 0.99}, "not shown"),  # not below the draws' mean
    ("rejected", {"p": 0.99, "value": 0.1}, "opposite"),
    ("rejected", {"p": 0.94, "value": 0.1}, "not shown"),
    ("rejected", {"p": None}, "not asked"),
    ("rejected", {"p": NAN}, "not asked"),
    ("rejected_maximum", {}, "shown"),
    ("rejected_maximum", {"p": 0.05}, "not shown"),
    ("rejected_maximum", {"p": 0.99, "value": 0.1}, "not shown"),
    ("rejected_maximum", below(-0.5), "shown"),  # the sign of a component says nothing
    ("rejected_maximum", below(0.05), "not shown"),
    ("rejected_maximum", {"p": None}, "not asked"),
    *((rule, {"n": FEWEST - 1} | ({"value": -0.5, "low": -0.6, "high": -0.4} if rule == "below_zero" else {}), "not asked") for rule in RULES),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "given", "verdict"), TABLE)
def test_the_verdict_of_every_rule(rule, given, verdict):
    assert RULES[rule](a_row(**given)) == verdict


def test_the_table_has_every_outcome_of_every_rule():
    seen = {(rule, verdict) for rule, _, verdict in TABLE}
    every = {(rule, v) for rule in RULES for v in ("shown", "not shown", "opposite", "not asked")}
    assert every - seen == {("rejected_maximum", "opposite")}  # of a maximum of sizes there is none
    assert {c.rule for c in CLAIMS} <= set(RULES)


def test_as_many_units_as_the_fewest_are_enough():
    assert RULES["above_zero"](a_row(n=FEWEST)) == "shown"
    assert RULES["above_zero"](a_row(n=None, unit_of_n=None)) == "shown"


# --- claims -----------------------------------------------------------------------------------------------------------

EMOTIONS: Any = SimpleNamespace(
    names=["a", "b", "c", "d", "e"], families={}
)  # five: chance is 20 %
MD: dict[str, Any] = {"estimator": "mean_difference"}
SHUFFLED: dict[str, Any] = MD | {"control": "shuffled labels"}


def made(experiment: str, metric: str, **given: Any) -> Row:
    return Row(experiment, metric, **(FULL | given))


READS = made("separability", "emotion top1", readout="calibrated", **SHUFFLED)
# claim: the row that it is judged on, and what stands beside it
ROWS: dict[str, tuple[Row, list[Row]]] = {
    "separates": (made("separability", "emotion top1", readout="calibrated", **SHUFFLED), []),
    "more than words": (made("separability", "emotion top1 minus tfidf", control="tfidf", **MD), [READS]),
    "more than form": (made("separability", "emotion top1 minus form", control="form", **MD), [READS]),
    "form": (made("separability", "emotion top1", control="form", **MD), []),
    "logistic: more than words": (made("separability", "emotion top1 minus tfidf", control="tfidf", estimator="logistic"), [READS]),
    "zero-shot": (made("transfer", "macro auc", **SHUFFLED), []),
    "zero-shot: more than words": (made("transfer", "macro auc minus tfidf", control="tfidf", **MD), [made("transfer", "macro auc", **SHUFFLED)]),
    "valence axis": (made("transfer", "r", emotion="valence", **SHUFFLED), []),
    "arousal axis": (made("transfer", "r", emotion="arousal", **SHUFFLED), []),
    "steers": (
        made("validation", "share diag above off minus random", control="random directions", dose=0.1, layer=7),
        [made("validation", "share diag above off", value=0.9, dose=0.1, layer=7), made("validation", "share diag above off", value=0.4, dose=0.1, control="random directions")],
    ),
    "steers: more than told": (
        made("validation", "diag minus off at equal KL, direction minus instruction", control="instruction in words"),
        [made("validation", "diag minus off at equal KL"), made("validation", "diag minus off at equal KL", control="instruction in words")],
    ),
    "writes": (made("validation", "own score of the text minus random", control="random directions"), []),
    **{name: (made("causal", f"{metric} minus random", control="random ones"), [made("causal", metric), made("causal", "pairs with a gap", value=40.0)])
       for name, metric in (("ablation", "ablate loss, whole stream"), ("ablation after blocks", "ablate loss"), ("patching", "patch recovery"), ("adding", "add gain"))},
    "ablation: refitted": (
        made("causal", "top1 refitted minus shuffled", **(below(-0.5) | {"control": "shuffled directions"})),
        [made("causal", "top1 refitted minus random", **(below(-0.4) | {"control": "random subspaces"}))],
    ),
    "person": (made("person", "top1 cross minus mixed"), [made("person", "top1", split="both persons")]),
    "valence": (made("geometry", "|r| of PC1 with valence", primary=True), []),
    "vocabulary": (made("logit_lens", "mean auc of target words", primary=True), []),
}  # fmt: skip


def the_answer(name: str, **changes: Any) -> Answer:
    judged, beside = ROWS[name]
    [found] = [
        a for a in answers([*beside, replace(judged, **changes)], EMOTIONS) if a.name == name
    ]
    return found


def test_every_claim_is_tried_here():
    assert set(ROWS) == {c.name for c in CLAIMS}, (
        "each claim has a line in ROWS, in this file: a row that shows it, and the rows that it needs beside it"
    )
    assert len(CLAIMS) == len({c.name for c in CLAIMS})


@pytest.mark.parametrize("name", ROWS)
def test_a_claim_is_shown_by_its_row_and_by_no_other(name):
    assert the_answer(name).verdict == "shown"
    judged = ROWS[name][0]
    others = [r for n, (r, more) in ROWS.items() if n != name for r in (r, *more) if r != judged]
    assert name not in {a.name for a in answers(others, EMOTIONS)}
    assert answers([replace(judged, experiment="another")], EMOTIONS) == []


@pytest.mark.parametrize("name", ROWS)
def test_a_claim_is_not_shown_by_a_row_without_an_effect(name):
    """An interval about nothing, and a p of a half."""
    nothing = {"value": 0.2, "low": 0.1, "high": 0.3, "p": 0.5}
    if RULES[next(c.rule for c in CLAIMS if c.name == name)] in (RULES["above_zero"], RULES["below_zero"], RULES["no_loss"]):  # fmt: skip
        nothing |= {"value": 0.0, "low": -0.1, "high": 0.1}
    assert the_answer(name, **nothing).verdict == "not shown"


@pytest.mark.parametrize("name", ROWS)
def test_a_claim_whose_figures_are_absent_is_not_asked_and_says_which(name):
    needs = RULES[next(c.rule for c in CLAIMS if c.name == name)].needs
    for field in ("value", *needs):
        if name == "form" and field == "null_mean":  # set from the number of emotions
            continue
        for nothing in (NAN,) if field == "value" else (None, NAN):
            a = the_answer(name, **{field: nothing})
            assert (a.verdict, a.text) == (
                "not asked",
                f"cannot be asked: no {field.replace('_', ' ')}.",
            )
    assert the_answer(name, n=5).text == "cannot be asked: n = 5 stories; at least 6 are needed."


def test_what_is_said_of_a_margin():
    assert (
        the_answer("more than words").text
        == "top-1 minus the same estimator on TF-IDF +50.0 points [40, 60]."
    )
    not_shown = the_answer("more than words", **below(0.05)).text
    assert not_shown.endswith("+5.0 points [-5, 15]. The interval includes 0.")
    opposite = the_answer("more than words", **below(-0.5))
    assert opposite.verdict == "opposite"
    assert opposite.text.endswith(
        "-50.0 points [-60, -40]. The interval lies below 0: words do better."
    )
    assert "+0.500 [0.400, 0.600]." in the_answer("zero-shot: more than words").text
    assert "form does better" in the_answer("more than form", **below(-0.5)).text


def test_what_is_said_of_the_others():
    assert "read the right one in 50 % of held-out stories [40, 60]; chance is 20 %, and with shuffled labels 95 % of runs stay below 30 %" in the_answer("separates").text  # fmt: skip
    assert (
        "shuffled labels are read better"
        in the_answer("separates", **below(0.05) | {"p": 0.99}).text
    )
    assert "chance 20 %" in the_answer("form").text
    assert "Adding a direction" in the_answer("steers").words
    assert "in 90 % [40, 60] of openings x emotions" in the_answer("steers").text
    assert "random directions 40 %" in the_answer("steers").text
    assert "at block 7, dose 0.1" in the_answer("steers").text
    assert "random directions do more" in the_answer("steers", **below(-0.5)).text
    assert "the instruction does more" in the_answer("steers: more than told", **below(-0.5)).text
    assert "minus random ones +50.0 points [40.0, 60.0]" in the_answer("ablation").text
    assert (
        "-50.0 points [-60, -40] against directions from shuffled directions, and -40.0 [-50, -30] against random subspaces"
        in the_answer("ablation: refitted").text
    )
    assert (
        the_answer("ablation: refitted", **below(0.5)).verdict == "not shown"
    )  # the two controls disagree
    assert "A loss of more than 5 points is excluded." in the_answer("person").text
    assert (
        "The interval lies below 0" in the_answer("person", value=-0.08, low=-0.11, high=-0.05).text
    )
    assert (
        "by directions of the topics that the added ones do not know" in the_answer("writes").text
    )
    assert "looked at while emolens was made, so it is no fresh test." in the_answer("steers").text
    judged, labels = (
        ROWS["zero-shot"][0],
        [made("transfer", "auc by label", emotion=e, **MD) for e in "abc"],
    )
    wider = made("transfer", "macro auc, labels resampled too", **(MD | {"low": 0.2, "high": 0.9}))
    [said] = [a.text for a in answers([judged, wider, *labels], EMOTIONS) if a.name == "zero-shot"]
    assert said.startswith("macro-AUC 0.50 [0.40, 0.60] over 3 labels (resampled are comments, which speaks of these labels; "
                           "with the labels resampled too, that is for labels like them, [0.20, 0.90]) against 0.20")  # fmt: skip
    assert "AUC 0.50 [0.40, 0.60]" in the_answer("vocabulary").text
    assert "underpowered" not in the_answer("valence").text
    few = the_answer("valence", n=18, unit_of_n="words, underpowered")
    assert few.verdict == "not asked"
    assert (
        "is of 18 rated words, which is underpowered; a claim about geometry needs a larger set"
        in few.text
    )


@pytest.mark.parametrize("name", ["more than words", "more than form", "logistic: more than words", "zero-shot: more than words"])  # fmt: skip
def test_what_reads_nothing_itself_is_not_compared(name):
    judged, [own] = ROWS[name]
    for given in (
        [judged],
        [judged, replace(own, null_high=None)],
        [judged, replace(own, low=0.25)],
    ):
        [a] = [a for a in answers(given, EMOTIONS) if a.name == name]
        assert (a.verdict, a.text) == (
            "not asked",
            "cannot be asked: the directions themselves are not above shuffled labels.",
        )


def test_every_row_of_a_claim_must_agree():
    """A second control is no second chance."""
    judged, [second] = ROWS["ablation: refitted"]
    cases = (
        ({}, "shown"),
        (below(-0.05), "not shown"),
        (below(0.5), "not shown"),
        ({"high": None}, "not asked"),
    )
    for changes, verdict in cases:
        for rows in ([judged, replace(second, **changes)], [replace(judged, **changes), second]):
            assert [a.verdict for a in answers(rows, EMOTIONS)] == [verdict]
    both = [replace(judged, **below(0.5)), replace(second, **below(0.5))]
    assert [a.verdict for a in answers(both, EMOTIONS)] == ["opposite"]


def test_where_nothing_is_read_the_person_does_not_matter():
    judged, [mixed] = ROWS["person"]
    [a] = answers([judged, replace(mixed, low=0.15, high=0.3)], EMOTIONS)
    assert (a.verdict, a.text) == (
        "not asked",
        "cannot be asked: directions from both persons are at chance themselves.",
    )


def test_pairs_without_a_gap_are_named():
    found = answers([made("causal", "pairs with a gap", value=3.0, n=40)], EMOTIONS)
    assert [a.name for a in found] == ["ablation", "ablation after blocks", "patching", "adding"]
    assert {a.text for a in found} == {"cannot be asked: only 3 of 40 pairs have a gap."}


def test_the_primary_row_alone_is_judged_where_there_are_many():
    judged = ROWS["valence"][0]
    assert [a.verdict for a in answers([replace(judged, primary=False), replace(judged, p=0.5)], EMOTIONS)] == ["not shown"]  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "label", "words"), [
    ("shown", "yes", "shown"), ("not shown", "no", "not shown"), ("opposite", "opposite", "the opposite"), ("not asked", "unasked", "not asked"),
])  # fmt: skip
def test_each_verdict_has_its_label_on_the_page(verdict, label, words):
    line = report._answer(Answer("x", "A claim", verdict, "figures"))
    assert line == f"<li class='{label}'><b>A claim</b>: figures</li>"
    assert f".{label}::before{{content:'{words}'" in report.STYLE


def test_a_confound_that_is_shown_has_not_the_colour_of_success():
    assert [c.name for e in SHIPPED for c in find_experiment(e).claims if c.confound] == ["form"]
    shown = the_answer("form")
    assert (shown.verdict, shown.confound) == ("shown", True)
    assert report._answer(shown).startswith("<li class='confound'>")
    assert ".confound::before{content:'shown'" in report.STYLE
    assert report._answer(the_answer("form", **below(0.2))).startswith("<li class='no'>")
    assert report._answer(the_answer("separates")).startswith("<li class='yes'>")


def test_figures_that_are_not_known_are_not_made_up():
    assert (verdicts.percent(None), verdicts.number(None), verdicts.number(NAN)) == ("?", "", "")
    assert verdicts.interval(a_row(low=None)) == ""
    assert (verdicts.percent(0.256), verdicts.number(-0.0001), verdicts.interval(a_row())) == (
        "26 %",
        "0.00",
        "[0.40, 0.60]",
    )


def test_a_null_without_draws_is_an_error():
    with pytest.raises(ValueError, match="no draws of shuffled labels: a null needs at least one"):
        rows_room.judged(1.0, np.zeros(0), "shuffled labels")

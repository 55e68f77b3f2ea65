"""What each experiment concludes where the truth is known: found where it was planted, and not claimed where it was not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from _planted import EMOTIONS, fewer_draws, planted, planted_geometry, run_all, verdicts_of
from sklearn import linear_model  # noqa: F401  (before the limit below, which sees only what is loaded)
from threadpoolctl import threadpool_limits

from emolens.experiments import norms
from emolens.experiments.base import Row, find
from emolens.verdicts import CLAIMS, Answer

READING = {"separates", "more than words", "more than form", "logistic: more than words", "zero-shot", "zero-shot: more than words", "valence axis", "arousal axis", "person"}  # fmt: skip
USING = {"steers", "steers: more than told", "writes", "ablation", "patching", "adding", "vocabulary"}
REST = {"ablation: refitted", "form"}


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    """One thread for small matrices, and fewer draws."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(limits=1), fewer_draws():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def effect(_light) -> tuple[list[Row], dict[str, Answer]]:
    inputs = planted("effect")
    rows = run_all(inputs)
    return rows, verdicts_of(rows, inputs)


@pytest.fixture(scope="module")
def shuffled(_light) -> dict[str, Answer]:
    inputs = planted("shuffled")
    return verdicts_of(run_all(inputs), inputs)


@pytest.fixture(scope="module")
def unused(_light) -> dict[str, Answer]:
    inputs = planted("unused")
    return verdicts_of(run_all(inputs, causal_only=True), inputs)


@pytest.fixture(scope="module")
def valence(_light) -> dict[bool, tuple[list[Row], dict[str, Answer]]]:
    out = {}
    for there in (True, False):
        inputs = planted_geometry(there)
        rows = norms.run(inputs)
        out[there] = rows, verdicts_of(rows, inputs)
    return out


def test_every_claim_is_put_to_a_planted_world():
    assert {c.name for c in CLAIMS} == READING | USING | REST | {"valence"}


@pytest.mark.parametrize("claim", sorted((READING | USING | REST) - {"form"}))
def test_what_was_planted_is_found(effect, claim):
    answer = effect[1][claim]
    assert answer.verdict == "shown", answer.text


def test_form_that_says_nothing_is_not_called_a_confound(effect, shuffled):
    assert effect[1]["form"].verdict != "shown"
    assert shuffled["form"].verdict != "shown"


@pytest.mark.parametrize("claim", sorted(READING | {"steers", "steers: more than told", "writes", "vocabulary"}))
def test_nothing_is_claimed_of_shuffled_labels(shuffled, claim):
    answer = shuffled[claim]
    assert answer.verdict != "shown", answer.text


@pytest.mark.xfail(reason="the directions are fitted on the stories that judge what is left", strict=False)
def test_ablation_of_shuffled_directions_takes_nothing_away(shuffled):
    assert shuffled["ablation: refitted"].verdict != "shown", shuffled["ablation: refitted"].text


@pytest.mark.parametrize("claim", sorted(USING))
def test_directions_that_the_model_does_not_use_do_nothing(unused, claim):
    answer = unused[claim]
    assert answer.verdict != "shown", answer.text


def test_human_valence_is_found_where_it_was_planted_and_only_there(valence):
    assert valence[True][1]["valence"].verdict == "shown"
    assert valence[False][1]["valence"].verdict == "not shown"


def test_each_axis_is_compared_with_its_own_ratings(valence):
    """Planted on two orthogonal axes, valence larger: what is read from one column for both would be wrong for one of them."""
    rows = valence[True][0]
    best = {axis: max(abs(r.value) for r in rows if r.emotion == axis and " PC" in r.metric and "form" in (r.split or ""))
            for axis in ("valence", "arousal")}  # fmt: skip
    assert best["valence"] > 0.85
    assert best["arousal"] > 0.6


def test_the_gap_begins_at_the_changed_fact_and_ends_at_the_last_token(effect):
    """One head of block 0 carries it: before that block the fact has all of it and the last token nothing."""
    at = {(r.layer, r.split): r.value for r in find(effect[0], "causal", "patch recovery by layer and span")}
    assert at[0, "changed"] == pytest.approx(1, abs=0.05)
    assert at[0, "last"] == pytest.approx(0, abs=0.05)
    assert at[2, "last"] == pytest.approx(1, abs=0.1)
    assert at[2, "changed"] == pytest.approx(0, abs=0.1)


def test_the_whole_stream_of_the_last_token_carries_the_gap(effect):
    [whole] = find(effect[0], "causal", "patch recovery, whole stream of the last token")
    assert whole.value == pytest.approx(1, abs=0.05)
    [gap, other_fact] = find(effect[0], "causal", "gap in logits")
    assert gap.value > 10 * abs(other_fact.value)


def test_every_emotion_moves_its_own_words(effect):
    change = {(r.emotion, r.split): r.value for r in find(effect[0], "validation", "change")}
    for e in EMOTIONS:
        assert max(EMOTIONS, key=lambda w, e=e: change[e, w]) == e


def test_the_verdict_follows_the_sign_of_what_was_planted(effect):
    """Minus the directions: every test of use turns to its opposite."""
    inputs = planted("effect")
    minus = replace(inputs.directions, vectors=-inputs.directions.vectors)
    rows = run_all(replace(inputs, directions=minus), causal_only=True)
    found = verdicts_of(rows, inputs)
    assert {found[c].verdict for c in ("steers", "adding", "vocabulary")} == {"opposite"}
    assert found["ablation"].verdict == "shown"  # a line is the same line from both ends

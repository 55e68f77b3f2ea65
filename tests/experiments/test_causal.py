"""The causal experiments on planted models: an effect is found, none is not, and what is removed never saw what judges it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from _answers import answers
from _planted import EMOTIONS, planted_inputs, planted_model, planted_pairs, planted_set

import emolens as em
from emolens.experiments import causal, refitting, validation
from emolens.experiments import pairs as pairs_room
from emolens.experiments.base import Inputs, Stories
from emolens.experiments.rows import Row, row
from emolens.interventions.measure import Cell
from emolens.interventions.sweep import Sweep
from emolens.interventions.verbs import orthonormal
from emolens.sets.materials import load_stems

LAYER, DOSE = 1, 0.5


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch) -> None:
    for room, name, n in (
        (pairs_room, "N_PATCHED", 6),
        (pairs_room, "N_ABLATED", 4),
        (refitting, "N_SHUFFLED", 2),
        (refitting, "N_SUBSPACES", 1),
    ):
        monkeypatch.setattr(room, name, n)
    monkeypatch.setattr(pairs_room, "load_pairs", planted_pairs)
    stems = load_stems()
    few = stems.model_copy(update={"choose": stems.choose[:4], "report": stems.report[:6]})
    monkeypatch.setattr(validation, "load_stems", lambda: few)


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> Inputs:
    """A model that reads words for feelings off the axes of the stories' marks."""
    model = planted_model(tmp_path_factory.mktemp("same"), reads="same")
    return planted_inputs(model, planted_set(), layer=LAYER)


@pytest.fixture(scope="module")
def unused(tmp_path_factory) -> Inputs:
    """One that reads them off other axes: its stories can be told apart, and the directions move nothing."""
    model = planted_model(tmp_path_factory.mktemp("other"), reads="other")
    return planted_inputs(model, planted_set(), layer=LAYER)


@pytest.fixture(scope="module")
def meaningless(used) -> Inputs:
    """Stories without marks: their labels are as good as shuffled."""
    return planted_inputs(used.model, planted_set(marked=False, seed=1), layer=LAYER)


def triad(inputs: Inputs) -> tuple[list[Row], Any]:
    return pairs_room.triad(inputs, causal.read_stream(inputs, EMOTIONS), LAYER, DOSE)


def refit(inputs: Inputs) -> list[Row]:
    return refitting.refit(
        "causal", inputs, causal.read_stream(inputs, EMOTIONS), LAYER, list(EMOTIONS), primary=True
    )


def the(rows: list[Row], metric: str, **wanted: Any) -> Row:
    (found,) = (
        r for r in rows if r.metric == metric and all(getattr(r, k) == v for k, v in wanted.items())
    )
    return found


# --- patch, ablate, add -----------------------------------------------------------------------------------------------


def test_a_direction_that_the_model_uses_is_shown_by_every_test(used):
    rows, pairs = triad(used)
    assert len(pairs) == 24
    for metric, least in (
        ("patch recovery", 0.5),
        ("ablate loss", 0.5),
        ("ablate loss, whole stream", 0.5),
        ("add gain", 0.05),
    ):
        assert the(rows, f"{metric} minus random").low > least
        assert the(rows, metric, control=None).value > least
    (primary,) = (r for r in rows if r.primary)
    assert primary.metric == "ablate loss, whole stream minus random"
    assert abs(the(rows, "gap in logits", control="another fact swapped").value) < 0.1


@pytest.mark.parametrize("which", ["unused", "meaningless"])
def test_a_direction_that_the_model_does_not_use_is_shown_by_none(request, which):
    rows, _ = triad(request.getfixturevalue(which))
    for metric in ("patch recovery", "ablate loss", "ablate loss, whole stream", "add gain"):
        assert abs(the(rows, metric, control=None).value) < 0.05
        assert the(rows, f"{metric} minus random").low < 0.01


def test_pairs_whose_gap_points_the_other_way_take_no_part(used, monkeypatch):
    pairs = planted_pairs()
    turned = tuple(
        p.model_copy(update={"clean": p.corrupted, "corrupted": p.clean, "control": p.corrupted})
        for p in pairs[:8]
    )
    expected, _ = triad(used)
    monkeypatch.setattr(pairs_room, "load_pairs", lambda: (*pairs[8:], *turned))
    rows, kept = triad(used)
    assert [p.id for p in kept] == [p.id for p in pairs[8:]]
    assert the(rows, "pairs with a gap").value == 16
    assert the(rows, "pairs with a gap").n == 24
    one, other = (the(r, "ablate loss", control=None) for r in (rows, expected))
    assert one.value == pytest.approx(other.value, abs=0.05)
    mapped = pairs_room.where(used, kept)
    assert {r.n for r in mapped if r.split == "last"} == {16}
    assert the(
        mapped, "patch recovery by layer and span", layer=0, split="last"
    ).value == pytest.approx(1, abs=0.01)


def test_matched_directions_have_the_rank_and_the_variance_of_what_they_control(used):
    v = used.directions[list(EMOTIONS)]  # all emotions of the set: one less in rank than in number
    tokens = used.stories.acts.neutral_tokens.rows[:, LAYER].double()

    def held(u):
        basis = orthonormal(u.unit(LAYER)).double()
        return float(((tokens - tokens.mean(0)) @ basis.T).square().sum())

    for seed in range(3):
        random = refitting.matched(used.stories.acts, v, LAYER, seed, together=True)
        both = torch.linalg.matrix_rank(torch.cat([v.vectors[:, LAYER], random.vectors[:, LAYER]]))
        assert torch.linalg.matrix_rank(random.vectors[:, LAYER]) == len(EMOTIONS) - 1
        assert both == 2 * (len(EMOTIONS) - 1)  # and it is another subspace
        assert held(random) == pytest.approx(held(v), rel=0.01)


# --- what is left after ablation --------------------------------------------------------------------------------------


def test_a_planted_emotion_is_gone_after_its_ablation_and_not_after_that_of_the_controls(used):
    rows = refit(used)
    assert the(rows, "top1 refitted", control=refitting.NOTHING).value == 1.0
    assert the(rows, "top1 refitted", control=refitting.SHUFFLED).value > 0.9
    (primary,) = (r for r in rows if r.primary)
    assert primary.metric == "top1 refitted minus shuffled"
    assert primary.high < -0.2
    assert the(rows, "top1 refitted minus random").high < -0.2
    assert the(rows, "top1 refitted", control=None).split == "rank 3"
    assert the(rows, "top1 refitted", control=refitting.SHUFFLED).split == "2 draws a fold"


def test_labels_that_mean_nothing_lose_nothing_by_ablation_unless_it_saw_what_judges_it(
    meaningless, monkeypatch
):
    """The right answer is no effect. Directions of all topics make a classifier of what is left miss: what the first edition reported."""
    honest = refit(meaningless)
    monkeypatch.setattr(Stories, "without", lambda self, topics: self.acts)
    leaking = refit(meaningless)
    for metric in ("top1 refitted minus random", "top1 refitted minus shuffled"):
        r = the(honest, metric)
        assert r.low <= 0 <= r.high
    assert the(leaking, "top1 refitted minus random").high < 0
    assert (
        the(leaking, "top1 refitted", control=None).value
        < the(honest, "top1 refitted", control=None).value - 0.05
    )


def test_nothing_that_is_removed_in_a_fold_knows_its_held_out_topics(used, monkeypatch):
    """Other activations of the held-out topics leave every direction, null and reference of the fold as they were."""
    seen: list[list[torch.Tensor]] = []
    real = refitting.ablate_stream

    def spy(direction, stream, **options):
        hooks = real(direction, stream, **options)
        seen[-1].append(torch.cat([t.flatten() for _, hook in hooks for t in hook.tensors]))
        return hooks

    monkeypatch.setattr(refitting, "ablate_stream", spy)
    fold = used.stories.folds[0]
    monkeypatch.setattr(Stories, "folds", property(lambda self: [fold]))

    def spoiled(acts):
        out = torch.tensor([t.topic in fold for t in acts.texts])[acts.row_text]
        rows = torch.where(
            out[:, None, None],
            torch.randn(acts.rows.shape, generator=torch.Generator().manual_seed(0)),
            acts.rows,
        )
        tokens = acts.neutral_tokens and spoiled(acts.neutral_tokens)
        return replace(acts, rows=rows, neutral_tokens=tokens)

    stream = causal.read_stream(used, EMOTIONS)
    for inputs, means in (
        (used, stream),
        (
            replace(used, stories=replace(used.stories, acts=spoiled(used.stories.acts))),
            em.Stream(tuple(spoiled(a) for a in stream.sites)),
        ),
    ):
        seen.append([])
        monkeypatch.setattr(refitting.stats, "top_k", lambda scores, labels: np.zeros(len(labels)))
        refitting.refit("causal", inputs, means, LAYER, list(EMOTIONS), primary=True)
    assert len(seen[0]) == 4  # its own, two shuffled, one random
    for before, after in zip(*seen, strict=True):
        assert torch.equal(before, after)
    assert len({round(float(t.sum()), 3) for t in seen[0]}) == 4  # and none is another


# --- validation steering ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "shown"), [("used", True), ("unused", False), ("meaningless", False)]
)
def test_adding_a_direction_is_shown_only_where_the_model_reads_words_off_it(request, which, shown):
    found = validation.run(request.getfixturevalue(which))
    rows = found.rows
    (primary,) = (r for r in rows if r.primary)
    assert primary.metric == "share diag above off minus random"
    assert (primary.low > 0) == shown
    if shown:
        assert the(rows, "argmax", control=None).value > 0.9
        assert the(rows, "share diag above off minus shuffled").low > 0
    assert set(found.chosen) == {"layer", "dose", "emotions"}


def test_what_chooses_a_dose_does_not_report_it(used, monkeypatch):
    asked: list[dict[str, Any]] = []
    real = validation.sweep
    monkeypatch.setattr(
        validation, "sweep", lambda *a, **k: asked.append({"prompts": a[1], **k}) or real(*a, **k)
    )
    validation.run(used)
    pilot, *reported = asked
    for other in reported:
        assert not set(pilot["prompts"]) & set(other["prompts"])
        assert not set(pilot["neutral"]) & set(other.get("neutral") or ())
    assert any(other.get("neutral") for other in reported)


@pytest.mark.parametrize(
    ("kl", "chosen"),
    [
        (
            [0.05, 0.09, 0.2, 0.05],
            (8, 0.1),
        ),  # (block, dose) of the second: the largest effect within the budget
        ([0.05, 0.05, 0.05, 0.05], (9, 0.05)),  # of the third, the largest of all
        ([0.3, 0.4, 0.2, 0.5], (9, 0.05)),  # none is: the gentlest
    ],
)
def test_the_best_block_and_dose_within_the_budget_are_chosen(kl, chosen):
    at = [(8, 0.05), (8, 0.1), (9, 0.05), (9, 0.1)]
    effect = [0.1, 0.3, 0.9, 0.2]
    change = torch.tensor([[[x, 0.0], [x, 0.0]] for x in effect])  # of joy's words, in two openings
    cells = tuple(Cell("joy", None, layer, dose) for layer, dose in at)
    pilot = Sweep(
        cells, ("a", "b"), ("joy", "fear"), change, torch.zeros(2, 2), torch.tensor(kl)[:, None]
    )
    assert validation._choose(pilot) == chosen


# --- what the report says of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shuffled", "random", "shown"),
    [((-0.3, -0.1), (-0.3, -0.1), True), ((-0.3, 0.01), (-0.3, -0.1), False), ((-0.3, -0.1), (-0.3, 0.01), False), ((0.1, 0.3), (0.1, 0.3), False)],
)  # fmt: skip
def test_less_emotion_is_left_only_where_both_nulls_say_so(shuffled, random, shown):
    rows = [
        row("causal", f"top1 refitted minus {name}", np.mean(at), low=at[0], high=at[1])
        for name, at in (("shuffled", shuffled), ("random", random))
    ]
    [answer] = answers(rows, planted_set())
    assert (answer.verdict == "shown") == shown
    assert f"{100 * np.mean(shuffled):+.1f} points" in answer.text


@pytest.mark.parametrize(("low", "shown"), [(0.05, True), (-0.05, False)])
def test_the_claim_of_ablation_is_that_of_the_whole_stream(low, shown):
    def of(metric, low):
        own = row("causal", metric, 0.2)
        return [
            own,
            row(
                "causal",
                f"{metric} minus random",
                0.1,
                low=low,
                high=0.3,
                control="random, same variance",
            ),
        ]

    stream, after = answers(
        [*of("ablate loss, whole stream", low), *of("ablate loss", 0.05)], planted_set()
    )
    assert "out of the whole stream" in stream.words
    assert (stream.verdict == "shown") == shown
    assert after.verdict == "shown"
    assert "after every block" in after.words
    assert stream.text.count("20.0 %") == 1

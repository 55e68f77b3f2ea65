"""The small functions that choose, divide and compare, on numbers whose right answer is known."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pytest
import torch

import emolens as em
from emolens import stats
from emolens._typing import hook_name
from emolens.collect.activations import Activations
from emolens.experiments import margins, pairs, transfer, validation
from emolens.experiments.rows import Row, find
from emolens.interventions.measure import Cell
from emolens.interventions.sweep import Sweep

# on a bridge resid_mid is only what the MLP reads, and patching it is refused
needs_hooked = pytest.mark.skipif(
    int(version("transformer-lens").split(".")[0]) >= 4,
    reason="transformer-lens 4 has no HookedTransformer",
)


def pilot(effect: dict[tuple[int, float], float], kl: dict[tuple[int, float], float]) -> Sweep:
    """Two emotions whose own words gain `effect` and the other's nothing."""
    cells = tuple(Cell(e, None, layer, dose) for layer, dose in effect for e in ("joy", "fear"))
    change = torch.zeros(len(cells), 3, 2)
    damage = torch.zeros(len(cells), 4)
    for i, c in enumerate(cells):
        change[i, :, ("joy", "fear").index(c.direction)] = effect[c.layer, c.dose]
        damage[i] = kl[c.layer, c.dose]
    return Sweep(cells, ("a", "b", "c"), ("joy", "fear"), change, torch.zeros(3, 2), damage)


def test_the_block_and_dose_with_the_largest_effect_within_the_budget_are_chosen():
    effect = {(5, 0.1): 1.0, (5, 0.2): 3.0, (9, 0.1): 2.0, (9, 0.2): 8.0}
    low = dict.fromkeys(effect, 0.05)
    assert validation._choose(pilot(effect, low)) == (9, 0.2)
    assert validation._choose(pilot(effect, low | {(9, 0.2): 0.2})) == (5, 0.2)
    assert validation._choose(pilot(effect, low | {(9, 0.2): 0.2, (5, 0.2): 0.3})) == (9, 0.1)


def test_the_gentlest_dose_is_chosen_where_none_is_within_the_budget():
    effect = {(5, 0.1): 1.0, (5, 0.2): 3.0, (9, 0.1): 2.0}
    assert validation._choose(pilot(effect, {(5, 0.1): 0.3, (5, 0.2): 0.9, (9, 0.1): 0.5})) == (
        5,
        0.1,
    )


def test_own_margins_are_those_of_the_named_emotion():
    s = pilot({(5, 0.1): 2.0}, {(5, 0.1): 0.0})
    s.change[1, 0] = torch.tensor([4.0, 1.0])  # fear raises joy's words in the first prompt
    assert margins.own_margins(s, ["joy", "fear"]).tolist() == [[2, -3], [2, 2], [2, 2]]
    assert margins.own_margins(s, ["fear", "joy"]).tolist() == [[-3, 2], [2, 2], [2, 2]]
    assert margins.own_highest(s, ["joy", "fear"]).tolist() == [[1, 0], [1, 1], [1, 1]]
    assert margins.above(np.array([-1.0, 0.0, 2.0])).tolist() == [0, 0, 1]


def test_a_share_of_the_gap_is_a_ratio_of_means_over_the_pairs_with_a_gap():
    effect, gap = torch.tensor([[1.0, 1.0, 50.0], [3.0, 1.0, 50.0]]), torch.tensor([1.0, 4.0, -1.0])
    e = pairs._share(effect, gap=gap, used=gap > 0, groups=["a", "b", "c"])
    assert e.value == pytest.approx((2 / 5 + 4 / 5) / 2)  # not the mean of the ratios
    assert 0.2 <= e.low <= e.value <= e.high <= 3.0
    together = pairs._share(
        effect[:1], gap=gap, used=gap > 0, groups=["a", "a", "c"]
    )  # one contrast: nothing to resample
    assert together.low == together.value == together.high == pytest.approx(2 / 5)


def test_the_ceiling_is_judged_on_texts_that_it_did_not_see():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(120, 1, 60))).float()
    positive = rng.random((120, 3)) < 0.3
    acts = object.__new__(Activations)
    object.__setattr__(acts, "rows", rows)
    auc = stats.multilabel_auc(transfer._supervised(acts, positive, 0), positive)
    assert (
        np.abs(auc - 0.5).max() < 0.2
    )  # random labels; fitted on the texts that judge it, it would reach 1
    rows[:, 0, :3] += 6 * torch.from_numpy(positive).float()
    assert (stats.multilabel_auc(transfer._supervised(acts, positive, 0), positive) > 0.9).all()


def test_texts_that_name_the_emotion_are_left_out_of_the_text_without_them():
    scores = np.array([[9.0, 0.0], [1.0, 5.0], [3.0, 1.0], [2.0, 2.0], [0.0, 9.0]])
    positive = np.array([[1, 0], [1, 1], [1, 0], [0, 0], [0, 1]], bool)
    named = np.array([[1, 0], [0, 0], [0, 0], [0, 0], [0, 0]], bool)
    assert transfer._unnamed(scores, positive, named) == pytest.approx((3 / 4 + 1) / 2)


def test_a_two_way_interval_resamples_rows_and_columns():
    across = np.repeat([[0.0, 1.0, 2.0, 3.0]], 5, 0)  # says the same in every row
    for table in (across, across.T):
        e = stats.bootstrap_two_way(table, n=300)
        assert e.value == 1.5
        assert e.low < 1.0
        assert e.high > 2.0
    for narrow in (across[:, :1], across.T[:1]):
        assert (
            stats.bootstrap_two_way(narrow, n=50).low
            == stats.bootstrap_two_way(narrow, n=50).high
            == 0.0
        )


def test_an_interval_over_columns_as_well_is_wider_than_one_over_rows():
    """Columns far apart whose rows hardly scatter: over rows alone the mean is sure, of other columns it is not."""
    rng = np.random.default_rng(0)
    table = np.array([0.0, 1.0, 2.0, np.nan]) + rng.normal(scale=0.1, size=(50, 4))
    rows = stats.bootstrap(lambda i: float(np.nanmean(table[i].mean(0))), range(50))
    both = stats.bootstrap_columns(lambda i: table[i].mean(0), range(50))
    assert rows.value == pytest.approx(both.value)
    assert rows.high - rows.low < 0.1
    assert both.low < 0.4
    assert both.high > 1.6
    alike = stats.bootstrap_columns(
        lambda i: table[i][:, [1, 1, 1]].mean(0), range(50)
    )  # columns that say the same add nothing
    assert alike.high - alike.low == pytest.approx(4 * 0.1 / 50**0.5, rel=0.3)


def test_shuffled_labels_stay_in_their_topic_and_do_move():
    labels, topics = np.arange(40), np.repeat(list("abcd"), 10)
    shuffled = stats.shuffle_within(labels, topics.tolist(), np.random.default_rng(0))
    for t in "abcd":
        assert sorted(shuffled[topics == t]) == sorted(labels[topics == t])
        assert (shuffled[topics == t] != labels[topics == t]).sum() >= 5
    assert labels.tolist() == list(range(40))  # the given ones are left alone


def test_rows_are_found_by_every_field():
    rows = [Row("a", "m", 1.0, control="x", layer=1), Row("a", "m", 2.0, control="x", layer=2), Row("b", "m", 3.0), Row("a", "n", 4.0)]  # fmt: skip
    assert [r.value for r in find(rows, "a", "m", control="x", layer=2)] == [2.0]
    assert [r.value for r in find(rows, "a", "m")] == [1.0, 2.0]
    assert find(rows, "a", "m", control=None) == []


@needs_hooked
def test_patching_between_attention_and_mlp_is_not_patching_what_attention_writes(tiny_model):
    clean, corrupted = "He lost 3 cats today.", "He lost 7 cats today."

    def metric(logits):
        return logits[:, 5] - logits[:, 9]

    r = em.patch_resid_mid(tiny_model, clean=clean, corrupted=corrupted, metric=metric)
    assert r.hook_point == "resid_mid"
    ids = [torch.tensor([e.ids]) for e in em.models.encode(tiny_model, [clean, corrupted])]
    _, cache = tiny_model.run_with_cache(ids[0])
    for layer in r.layers:
        name = hook_name("resid_mid", layer)

        def put(act, hook, name=name):
            return torch.cat([act[:, :-1], cache[name][:, -1:]], 1)

        logits = tiny_model.run_with_hooks(ids[1], fwd_hooks=[(name, put)])[:, -1]
        assert float(r.values[0, layer, -1]) == pytest.approx(
            float(metric(logits).detach()), abs=1e-4
        )


@pytest.mark.parametrize(
    "point",
    [
        "resid_pre",
        pytest.param("resid_mid", marks=needs_hooked),
        "resid_post",
        "attn_out",
        "mlp_out",
        "z",
        "q",
        "k",
        "v",
    ],
)
def test_every_sweep_patches_the_site_of_its_name(tiny_model, point):
    run = getattr(em, f"patch_{point}")
    r = run(tiny_model, clean="a cat", corrupted="a dog", metric=lambda x: x[:, 5], layers=[1])
    assert r.hook_point == point
    assert run.__name__ == f"patch_{point}"

"""What is printed and shown in notebooks, against orders and figures that are known."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from emolens import stats
from emolens.directions.value import EmotionDirections
from emolens.interventions import metrics as metrics_room
from emolens.interventions import sweep as sweeps
from emolens.interventions.attribution import Attribution
from emolens.interventions.dose import DoseCalibration
from emolens.interventions.generate import Generations
from emolens.interventions.measure import Cell, Written
from emolens.interventions.metrics import Patching
from emolens.interventions.sweep import Sweep
from emolens.readout import LogitLens, Scores

NAN = float("nan")


def patched(recovery: list[list[float]], **more: Any) -> Patching:
    """One pair whose gap is 1, so that the values are the recoveries."""
    values = torch.tensor(recovery)[None]
    given: dict[str, Any] = {
        "values": values,
        "mode": "denoise",
        "clean": torch.tensor([1.0]),
        "corrupted": torch.tensor([0.0]),
    }
    labels = tuple(f"{i}: t{i}" for i in range(values.shape[2]))
    layers = tuple(range(0, 2 * values.shape[1], 2))
    return Patching("resid_pre", layers=layers, labels=labels, **(given | more))


TABLE = [[0.1, -0.9, NAN], [0.5, 0.0, 0.95]]


def test_the_top_cells_are_the_largest_first_whatever_their_sign():
    found = patched(TABLE).top(4)
    assert [(layer, label) for layer, label, _ in found] == [
        (2, "2: t2"),
        (0, "1: t1"),
        (2, "0: t0"),
        (0, "0: t0"),
    ]
    assert [x for _, _, x in found] == pytest.approx([0.95, -0.9, 0.5, 0.1])
    assert len(patched(TABLE).top(99)) == 5  # a cell that does not exist is never one of them


def test_a_table_of_patches_prints_its_cells_in_their_place():
    lines = repr(patched(TABLE, dropped=2)).splitlines()
    assert lines[0] == "patching of resid_pre, denoise: recovery, 1 pair(s), 2 dropped, 0 excluded"
    assert lines[1].split() == ["layer", "0:", "t0", "1:", "t1", "2:", "t2"]
    assert [line.split() for line in lines[2:]] == [
        ["0", "0.10", "-0.90", "."],
        ["2", "0.50", "0.00", "0.95"],
    ]
    html = patched(TABLE)._repr_html_()
    cells = re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)\">([-\d.]+)<", html)
    assert (
        "67",
        "0.90",
        "-0.90",
    ) in cells  # blue for what goes the other way, as strong as it is large
    assert ("214", "0.95", "0.95") in cells
    assert "approximate" in repr(patched(TABLE, approximate=True))


def test_recovery_is_a_ratio_of_means_over_the_pairs_that_have_the_cell():
    """Denoising: 0 is the corrupted run and 1 the clean one; noising the other way round."""
    values = torch.tensor([[[2.0, NAN]], [[5.0, 6.0]]], dtype=torch.float64)
    clean, corrupted = (torch.tensor(x, dtype=torch.float64) for x in ([4.0, 10.0], [0.0, 2.0]))
    r = Patching("resid_pre", "denoise", (0,), ("a", "b"), values, clean, corrupted)
    assert r.recovery.tolist() == [[(2 + 3) / (4 + 8), 4 / 8]]
    r = Patching("resid_pre", "noise", (0,), ("a", "b"), values, clean, corrupted)
    assert r.recovery.tolist() == [[(-2 - 5) / (-4 - 8), -4 / -8]]
    assert r.interval is not None
    low, high = r.interval
    assert low[0, 0] < r.recovery[0, 0] < high[0, 0]


def test_values_whose_axes_do_not_agree_are_refused():
    one, two, table = torch.ones(1), torch.ones(2), torch.ones(1, 2, 3)
    for wrong in ({"clean": two}, {"clean": one[0]}, {"values": table[0]}):
        with pytest.raises(TypeCheckError):
            patched(TABLE, **wrong)
    with pytest.raises(
        ValueError, match=r"\[1, 2, 3\] are \[pair layer column\], for 2 layers and 1"
    ):
        Patching("resid_pre", "denoise", (0, 1), ("a",), table, one, one)
    a = attribution()
    with pytest.raises(TypeCheckError):
        replace(a, total=torch.ones(3))
    with pytest.raises(
        ValueError, match=r"\[2, 5\] are \[entry\] or \[token entry\], for 1 labels"
    ):
        replace(a, labels=("embed",))
    s = a_sweep()
    for wrong in (
        {"baseline": torch.zeros(3, 3)},
        {"kl": torch.zeros(2, 2)},
        {"kl": torch.zeros(3)},
    ):
        with pytest.raises(TypeCheckError):
            replace(s, **wrong)
    with pytest.raises(
        ValueError, match=r"\[3, 2, 3\] is .* for 3 cells, 1 prompts and 3 emotions"
    ):
        replace(s, prompts=("a",))
    with pytest.raises(TypeCheckError):
        Written((("x",),), torch.ones(1, 1), torch.ones(1, 2), torch.ones(1, 1))
    with pytest.raises(TypeCheckError):
        Generations(("a",), ("b",), ((3,),), ("joy",), (torch.ones(1),))


def attribution() -> Attribution:
    labels = ("embed", "L0H0", "L0H1", "L0 mlp", "L0 bias")
    values = torch.tensor([[0.1, 0.5, -0.2, -3.0, 0.0], [0.3, 0.7, -0.4, -1.0, 0.0]])
    return Attribution("joy", 0, labels, values, values.sum(1), 1e-7, 2, ("a", "b"))


def test_the_top_writers_are_the_largest_first_whatever_their_sign():
    a = attribution()
    assert [name for name, _ in a.top(4)] == ["L0 mlp", "L0H0", "L0H1", "embed"]
    assert [x for _, x in a.top(4)] == pytest.approx([-2.0, 0.6, -0.3, 0.2])
    assert a.heads.tolist() == [pytest.approx([0.6, -0.3])]
    lines = repr(a).splitlines()
    assert lines[0] == "joy at resid_post 0: x.v = -1.500, error 1.0e-07 of |x|"
    assert [line.split()[-1] for line in lines[1:]] == [
        "-2.000",
        "0.600",
        "-0.300",
        "0.200",
        "0.000",
    ]


def test_agreement_sees_the_order_and_the_sign():
    exact = patched([[0.1, 0.2, 0.4], [0.5, 0.7, 0.9]])
    up, down = (
        patched([[0.2, 0.4, 0.8], [1.0, 1.4, 1.8]]),
        patched([[0.9, 0.8, 0.6], [0.5, 0.3, 0.1]]),
    )
    assert metrics_room.agreement(exact, up).pearson == pytest.approx(1)
    assert metrics_room.agreement(exact, up).spearman == pytest.approx(1)
    assert metrics_room.agreement(exact, down).pearson == pytest.approx(-1)
    assert (
        repr(metrics_room.agreement(exact, down))
        == "Agreement(Pearson -1.000, Spearman -1.000, 6 cells)"
    )


def scores() -> Scores:
    values = torch.tensor([[0.5, 3.0, 2.0], [0.4, -1.0, 0.9]])
    return Scores(
        emotions=("joy", "fear", "anger"), values=values, raw=values, per="text", layer=3, texts=("one text", "two text"), text_of=(0, 1),
        spans=((0, 8), (0, 8)), band=torch.tensor([1.0, 1.0]), rate=torch.tensor([0.05, 0.05]), flags=((), ("short",)), info={},
    )  # fmt: skip


def test_scores_name_the_highest_and_nothing_inside_the_band():
    s = scores()
    assert s.labels == ["fear", "none"]
    assert s.top(3)["emotion"] == ["fear", "anger", "joy", "anger", "joy", "fear"]
    assert s.top(1).rows == (
        (0, "one text", "fear", 3.0, 1.0),
        (1, "two text", "anger", pytest.approx(0.9), 1.0),
    )
    lines = repr(s).splitlines()
    assert lines[1].split() == [
        "'one",
        "text'",
        "fear",
        "fear",
        "+3.0",
        "anger",
        "+2.0",
        "(joy",
        "+0.5)",
    ]
    assert lines[2].split()[2:5] == ["none", "(anger", "+0.9)"]
    assert lines[2].endswith("[short]")


def test_the_bars_of_a_text_are_its_scores_highest_first():
    html = scores().to_html().split("one text")[1].split("two text")[0]
    assert re.findall(r"width:8em\">(\w+)<", html) == ["fear", "anger", "joy"]
    assert re.findall(r"(\+[\d.]+)</span>", html) == ["+3.0", "+2.0", "+0.5"]
    widths = [float(x) for x in re.findall(r"height:9px;width:([\d.]+)em", html)]
    assert widths == sorted(widths, reverse=True)


def test_generations_name_the_emotions_that_rise_highest():
    g = Generations(("He",), (" ran",), ((1, 2),), ("joy", "fear", "anger"), (torch.tensor([[1.0, 4.0, -2.0], [3.0, 2.0, -4.0]]),))  # fmt: skip
    assert g.top(0, 2).rows == (("fear", 3.0), ("joy", 2.0))
    assert g.mood(0, 2) == "fear +3.0, joy +2.0"
    assert repr(g) == "'He' -> ' ran'  (fear +3.0, joy +2.0, anger -3.0)"


def a_sweep() -> Sweep:
    cells = (
        Cell("joy", None, 1, 0.1),
        Cell("fear", None, 1, 0.1),
        Cell("r0", "random directions", 1, 0.1),
    )
    change = torch.tensor([
        [[3.0, 1.0, 1.0], [2.0, 3.0, 0.0]],  # joy: above the others' mean in both, highest in one
        [[0.0, -1.0, 2.0], [0.0, 5.0, 1.0]],  # fear: above in one, highest in one
        [[1.0, 0.0, 0.0], [0.0, 0.0, 3.0]],
    ])  # fmt: skip
    kl = torch.tensor([[0.1, 0.3], [0.2, 0.4], [0.5, 0.7]])
    return Sweep(cells, ("a", "b"), ("joy", "fear", "anger"), change, torch.zeros(2, 3), kl)


def test_a_sweep_prints_own_above_others_own_highest_and_damage():
    s = a_sweep()
    assert s.margin[0, 0].tolist() == [2.0, -1.0, -1.0]
    lines = repr(s).splitlines()
    assert lines[1].split() == [
        "layer",
        "dose",
        "control",
        "own",
        ">",
        "others",
        "own",
        "highest",
        "KL",
    ]
    assert lines[2].split() == ["1", "0.1", "emotion", "directions", "0.75", "0.50", "0.250"]
    assert lines[3].split() == ["1", "0.1", "random", "directions", "0.33", "0.33", "0.600"]


def test_perplexity_is_in_units_of_the_unsteered_text():
    def text(log: float) -> Written:
        return Written((("x",),), torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), log))

    s = Sweep((Cell("joy", None, 1, 0.1),), ("a",), ("joy",), torch.zeros(1, 1, 1), torch.zeros(1, 1), None, text(2.0), text(1.0))  # fmt: skip
    assert s.perplexity_ratio.item() == pytest.approx(np.e)


def test_a_calibrated_dose_prints_what_was_measured():
    c = DoseCalibration("joy", 4, 0.125, 0.1, stats.Estimate(0.09, 0.07, 0.12), 5)
    assert (
        str(c)
        == "joy at layer 4: dose 0.125, KL 0.09 [0.07, 0.12] nats a token on 5 other texts (budget 0.1)"
    )
    assert str(stats.Estimate(0.5, 0.25, 0.75)) == "0.50 [0.25, 0.75]"


def test_the_nearest_directions_come_first_without_their_own():
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.1], [0.9, 0.1]])[:, None]
    flat = torch.zeros(1, 2)
    v = EmotionDirections(tuple("abcd"), "resid_post", (3,), vectors, flat, flat, torch.ones(1), torch.ones(1), torch.ones(4, 1), 3, {})  # fmt: skip
    assert [name for name, _ in v["a"].nearest()] == ["d", "b", "c"]
    assert [round(c, 2) for _, c in v["a"].nearest()] == [0.99, 0.6, -1.0]


def test_the_lens_averages_the_emotions_that_can_be_judged():
    assert LogitLens(("a", "b", "c"), 1, {"a": 0.9, "b": NAN, "c": 0.5}, (0.5,), 0.01, {}).mean_auc == pytest.approx(0.7)  # fmt: skip


def test_the_shortest_words_of_each_emotion_are_the_fewest_tokens():
    class Letters:
        def __call__(self, text: str, **options: Any) -> Any:
            return type("Ids", (), {"input_ids": [ord(c) for c in text]})

    assert sweeps.shortest_words(Letters(), {"joy": ["glad", "merry", "very"], "fear": []}) == {
        "joy": ["glad", "very"]
    }

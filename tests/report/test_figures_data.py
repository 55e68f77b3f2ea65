"""Every picture draws its rows: the data of its artists, its axes and its words, not its pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
import torch
from _worlds import planted_geometry

from emolens.directions.value import EmotionDirections
from emolens.experiments import causal, drawing, geometry, separability, transfer, validation
from emolens.experiments.rows import Row
from emolens.sets.norms import load_norms

MARGINS = {
    "emotion top1": "top-1, held-out topics",
    "emotion auc": "AUC, held-out topics",
    "macro auc": "AUC, GoEmotions",
}
MD: dict[str, Any] = {"estimator": "mean_difference"}


def sep(metric: str, value: float, **more: Any) -> Row:
    return Row(
        "separability", metric, value, **({"low": value - 0.05, "high": value + 0.07} | more)
    )


def points(axes: Any, marker: str) -> list[tuple[float, float]]:
    """Where markers of a kind are drawn, one artist each."""
    return [
        (float(x.get_xdata()[0]), float(x.get_ydata()[0]))
        for x in axes.lines
        if x.get_marker() == marker
    ]


def colour(artist: Any) -> str:
    return matplotlib.colors.to_hex(artist.get_color())


def labels(axis: Any) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


def labelled(axes: Any, start: str) -> Any:
    [found] = [x for x in (*axes.lines, *axes.patches) if str(x.get_label()).startswith(start)]
    return found


def test_accuracy_by_layer():
    curve = [sep("emotion top1 by layer", v, layer=k) for k, v in ((3, 0.2), (7, 0.6), (9, 0.4))]
    other = sep("emotion top1 by layer", 0.9, layer="embed", control="embed")
    controls = [
        sep("emotion top1", v, control=c, **MD)
        for c, v in (("tfidf", 0.31), ("embed", 0.27), ("form", 0.13))
    ]
    shuffled = sep("emotion top1", 0.6, control="shuffled labels", null_high=0.11, **MD)
    chance = sep("emotion top1", 0.05, control="chance")
    figure = separability.accuracy_by_layer([*curve, other, *controls, shuffled, chance])
    [axes] = figure.axes
    main = labelled(axes, "mean difference")
    assert main.get_xydata().tolist() == [[3, 0.2], [7, 0.6], [9, 0.4]]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(np.round(v, 6)) for v in band} == {(x, round(v + d, 6)) for x, v in ((3, 0.2), (7, 0.6), (9, 0.4)) for d in (-0.05, 0.07)}  # fmt: skip
    for name, value in (
        ("TF-IDF", 0.31),
        ("embeddings", 0.27),
        ("story form", 0.13),
        ("chance", 0.05),
    ):
        line = labelled(axes, name)
        assert set(line.get_ydata()) == {value}
        assert line.get_label().endswith(f"{value:.2f}")
    assert axes.get_ylim()[0] == 0
    assert labelled(axes, "shuffled labels, 95 % below 0.11").get_height() == pytest.approx(0.11)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer (block, resid_post)", "held-out top-1")


def test_readouts():
    given = {
        "uncentred": 0.1,
        "uncentred cosine": 0.12,
        "neutral-centred": 0.3,
        "centred": 0.6,
        "calibrated": 0.65,
    }
    rows = [sep("emotion top1", v, readout=k, **MD) for k, v in reversed(given.items())]
    [axes] = separability.readouts(rows).axes
    assert [round(p.get_width(), 6) for p in axes.patches] == list(given.values())
    assert labels(axes.yaxis) == list(given)
    assert [matplotlib.colors.to_hex(p.get_facecolor()) for p in axes.patches] == [
        drawing.GREY
    ] * 4 + [drawing.ORANGE]
    assert [list(x.get_xdata()) for x in axes.lines] == [
        [v - 0.05, v + 0.07] for v in given.values()
    ]
    assert [t.get_text() for t in axes.texts] == [f"{v:.2f}" for v in given.values()]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first readout on top


def test_margins():
    made = [("emotion top1 minus tfidf", 0.2, 0.1, 0.3), ("emotion top1 minus embed", 0.02, -0.1, 0.1), ("emotion auc minus form", -0.2, -0.3, -0.1)]  # fmt: skip
    rows = [Row("separability", m, v, low=a, high=b, **MD) for m, v, a, b in made]
    rows.append(
        Row("transfer", "macro auc minus tfidf", 0.04, low=0.01, high=0.06, estimator="logistic")
    )
    [axes] = drawing.margins(rows, MARGINS).axes
    assert points(axes, "o") == [(0.2, 0), (0.02, 1), (-0.2, 2), (0.04, 3)]
    dots = [x for x in axes.lines if x.get_marker() == "o"]
    sure = [True, False, True, True]  # an interval that excludes 0 on either side is filled
    assert [colour(x) == drawing.ORANGE for x in dots] == sure
    assert [x.get_markerfacecolor() != "white" for x in dots] == sure
    spans = [
        list(x.get_xdata())
        for x in axes.lines
        if x.get_marker() == "None" and len(x.get_xdata()) == 2
    ]
    assert [s for s in spans if s != [0, 0]] == [
        [0.1, 0.3],
        [-0.1, 0.1],
        [-0.3, -0.1],
        [0.01, 0.06],
    ]
    assert [0, 0] in spans  # the line that the intervals are to be compared with
    names = labels(axes.yaxis)
    assert names[0] == "top-1, held-out topics\nmean difference - tfidf"
    assert names[3] == "AUC, GoEmotions\nlogistic - tfidf"


def test_transfer_by_label():
    given = [("joy", 0.7, 0.55, 40), ("fear", 0.9, 0.6, 12), ("anger", 0.5, 0.8, 30)]
    rows = [Row("transfer", "auc by label", v, low=v - 0.1, high=v + 0.05, emotion=e, null_mean=t, n=n) for e, v, t, n in given]  # fmt: skip
    [axes] = transfer.transfer_by_label(rows).axes
    assert points(axes, "o") == [(0.5, 0), (0.7, 1), (0.9, 2)]  # the lowest below
    assert points(axes, "D") == [(0.8, 0), (0.55, 1), (0.6, 2)]
    assert labels(axes.yaxis) == ["anger (n=30)", "joy (n=40)", "fear (n=12)"]
    assert axes.get_xlim() == (0.3, 1.0)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["directions", "TF-IDF"]
    assert [0.5, 0.5] in [list(x.get_xdata()) for x in axes.lines]


def test_dose_curve():
    doses = (0.4, 0.05, 0.1)  # in any order
    rows = [Row("validation", "share diag above off", 0.9, dose=0.1)]
    rows += [Row("validation", "share diag above off", 0.5, dose=0.3, control="random directions")]
    value = {("diag minus off by dose", None): 10, ("diag minus off by dose", "random directions"): 1, ("kl by dose", None): 3, ("kl by dose", "random directions"): 2}  # fmt: skip
    rows += [Row("validation", m, f * d, dose=d, control=c, low=f * d / 2, high=f * d * 2) for (m, c), f in value.items() for d in doses]  # fmt: skip
    figure = validation.dose_curve(rows)
    for axes, metric in zip(figure.axes, ("diag minus off by dose", "kl by dose"), strict=True):
        for marker, control in (("o", None), ("s", "random directions")):
            [line] = [x for x in axes.lines if x.get_marker() == marker]
            f = value[metric, control]
            assert np.allclose(line.get_xydata(), [[d, f * d] for d in sorted(doses)])
        assert axes.get_xscale() == "log"
        chosen = [list(x.get_xdata()) for x in axes.lines if x.get_linestyle() == ":"]
        assert chosen == [[0.1, 0.1]]  # the direction's, not a control's
    above, below = figure.axes
    assert above.get_yscale() == "linear"
    assert below.get_yscale() == "log"
    assert "own words minus others" in above.get_ylabel()
    assert "KL" in below.get_ylabel()
    assert labels(below.xaxis) == ["0.05", "0.1", "0.4"]


def test_validation_matrix():
    names = ["joy", "fear", "anger"]
    table = np.array([[3.0, 1.0, 2.0], [0.0, 6.0, 0.0], [1.0, 1.0, 4.0]])
    rows = [Row("validation", "change", table[i, j], emotion=e, split=w) for i, e in enumerate(names) for j, w in enumerate(names)]  # fmt: skip
    figure = validation.validation_matrix(
        rows[::-1]
    )  # the order of the rows is the order of the picture
    axes, bar = figure.axes
    [image] = axes.images
    assert np.allclose(image.get_array(), (table - table.mean(1, keepdims=True))[::-1, ::-1])
    assert image.get_clim() == (-4.0, 4.0)  # blue and orange are as far from white
    assert labels(axes.xaxis) == labels(axes.yaxis) == names[::-1]
    assert [(p.get_x(), p.get_y()) for p in axes.patches] == [(k - 0.5, k - 0.5) for k in range(3)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("whose words", "direction added")
    assert bar.get_ylabel() == "change minus row mean"


def test_triad():
    tests = ("patch recovery", "ablate loss, whole stream", "add gain")
    rows = []
    for k, metric in enumerate(tests):
        rows.append(Row("causal", metric, 0.1 * (k + 1), low=0.05 * (k + 1), high=0.2 * (k + 1)))
        rows.append(Row("causal", metric, -0.5, low=-0.6, high=-0.4, control="random directions"))
        for j, group in enumerate(("joy/fear", "anger/joy")):
            rows.append(Row("causal", f"{metric} by contrast", k + 0.1 * j, emotion=group))
            rows.append(Row("causal", f"{metric} by contrast", -k - 0.1 * j, emotion=group, control="random directions"))  # fmt: skip
    figure = causal.triad_figure(rows)
    assert [axes.get_title() for axes in figure.axes] == ["patch: gap recovered", "ablate: gap lost", "add: gain in gaps"]  # fmt: skip
    for k, axes in enumerate(figure.axes):
        dots = [x for x in axes.lines if x.get_marker() == "o"]
        own = [x for x in dots if x.get_markerfacecolor() != "white"]
        assert [(x.get_xdata()[0], x.get_ydata()[0]) for x in own] == [(k, 0), (k + 0.1, 1)]
        assert all(colour(x) == drawing.ORANGE for x in own)
        hollow = [x for x in dots if x not in own]
        assert [(x.get_xdata()[0], x.get_ydata()[0]) for x in hollow] == [(-k, 0), (-k - 0.1, 1)]
        verticals = [x.get_xdata()[0] for x in axes.lines if x.get_marker() != "o"]
        assert verticals == pytest.approx([0.1 * (k + 1), 0])  # over all pairs, and nothing
        [band] = axes.patches
        assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx(
            (0.05 * (k + 1), 0.2 * (k + 1))
        )
    assert labels(figure.axes[0].yaxis) == ["joy/fear", "anger/joy"]


def test_patching_map():
    value = {(0, "changed"): 1.0, (0, "last"): 0.02, (4, "changed"): -0.25, (4, "last"): 0.75}
    rows = [Row("causal", "patch recovery by layer and span", v, layer=k, split=s) for (k, s), v in reversed(value.items())]  # fmt: skip
    figure = causal.patching_map(rows)
    axes, bar = figure.axes
    [image] = axes.images
    assert image.get_array().tolist() == [[1.0, -0.25], [0.02, 0.75]]
    assert image.get_clim() == (-1, 1)
    assert labels(axes.yaxis) == ["the changed fact", "last token"]
    assert labels(axes.xaxis) == ["0", "4"]
    written = {tuple(np.round(t.get_position()).astype(int)): t.get_text() for t in axes.texts}
    assert written == {(0, 0): "1.00", (1, 0): "-0.25", (0, 1): "0.02", (1, 1): "0.75"}
    assert bar.get_ylabel() == "gap recovered"


def directions(vectors: torch.Tensor, reliability: list[float]) -> EmotionDirections:
    n, d = vectors.shape
    flat = torch.zeros(1, d)
    return EmotionDirections(
        tuple("abcdefgh"[:n]), "resid_post", (3,), vectors[:, None], flat, flat, torch.ones(1), torch.ones(1),
        torch.tensor(reliability)[:, None], 3, {},
    )  # fmt: skip


def test_cosine_matrix():
    vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.9, 0.1], [-1.0, -0.2]])
    v = directions(vectors, [0.9, 0.2, 0.9, 0.9])
    axes, bar = drawing.cosine_matrix(v).axes
    names = labels(axes.xaxis)
    assert names == labels(axes.yaxis)
    assert {frozenset(names[:2]), frozenset(names[2:])} == {
        frozenset("ac"),
        frozenset("bd"),
    }  # alike side by side
    order = ["abcd".index(x) for x in names]
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    assert np.allclose(
        axes.images[0].get_array(), (unit @ unit.T)[order][:, order].numpy(), atol=1e-6
    )
    assert axes.images[0].get_clim() == (-1, 1)
    grey = {t.get_text() for t in axes.get_xticklabels() if t.get_color() == "#b0b6c2"}
    assert grey == {"b"}
    assert bar.get_ylabel() == "cosine"


def test_circumplex_puts_people_at_their_ratings_and_the_model_near_them():
    inputs = planted_geometry(True)
    norms, keys = load_norms(), {e.name: e.norm_key for e in inputs.stories.emotions.emotions}
    [axes] = drawing.circumplex(inputs.directions, norms, keys).axes
    people, model = np.array(points(axes, "D")), np.array(points(axes, "o"))
    rated = np.array([[norms[e].valence, norms[e].arousal] for e in inputs.directions.emotions])
    assert np.allclose(people, (rated - rated.mean(0)) / rated.std(0))
    assert np.corrcoef(people[:, 0], model[:, 0])[0, 1] > 0.85
    assert np.corrcoef(people[:, 1], model[:, 1])[0, 1] > 0.6
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("valence", "arousal")
    ends = [
        x.get_xydata() for x in axes.lines if x.get_marker() == "None" and len(x.get_xdata()) == 2
    ]
    assert any(np.allclose(line, [people[0], model[0]]) for line in ends)
    assert {t.get_text() for t in axes.texts} == set(inputs.directions.emotions)
    few = replace(inputs.directions, emotions=tuple(f"unknown{i}" for i in range(36)))
    [empty] = drawing.circumplex(few, norms, {}).axes
    assert [t.get_text() for t in empty.texts] == ["fewer than four emotions have human norms"]


def test_layer_similarity():
    rows = [Row("geometry", "rsa of layers with the reported one", v, layer=k) for k, v in ((0, 0.2), (1, 1.0), (2, 0.7))]  # fmt: skip
    [axes] = geometry.layer_similarity(rows).axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.2], [1, 1.0], [2, 0.7]]
    assert axes.get_ylim() == (0, 1.02)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "RSA with the reported layer")


def test_rows_of_other_experiments_are_never_drawn():
    rows = [Row("another", "kl by dose", 1.0, dose=0.1)]  # fmt: skip
    assert validation.dose_curve(rows).axes[1].lines[0].get_xydata().size == 0
    [axes] = separability.accuracy_by_layer(
        [replace(sep("emotion top1 by layer", 0.5, layer=1), experiment="another")]
    ).axes
    assert axes.lines[0].get_xydata().size == 0

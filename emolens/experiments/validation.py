"""Does adding a direction make the model say its word? Validation steering with its controls and its collapse.

Openings such as "He feels" are continued with one direction added at one block. Read is the change of the log-probability of each
emotion's target words; "diag" is the change of the steered emotion's own words, "off" the mean of the others'. Block and dose are
chosen on one half of the openings (largest mean diag - off with a KL divergence on neutral text within `BUDGET`), everything else is
reported on the other half, beside random directions, directions from shuffled labels, and the other emotions' directions (argmax).
Primary row: share of (opening, emotion) cells with diag above off, minus that of random directions. It says that the direction moves this
readout, not that the model feels or acts by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from emolens import stats
from emolens.directions import EmotionDirections, random_directions, shuffled_directions
from emolens.experiments.base import Inputs, Row, row
from emolens.interventions import steer_resid_post
from emolens.materials import load_stems
from emolens.steering import Generations, generate
from emolens.sweeps import shortest_words, sweep

NAME = "validation"
BASIC = ("joy", "sadness", "anger", "fear", "disgust", "surprise")
BUDGET = 0.1  # nats a token on neutral text
DOSES = (0.05, 0.1, 0.2)
CURVE = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
OPENING = "I opened the door and"


@dataclass(frozen=True, eq=False)
class Chosen:
    """Where and how strongly the other causal experiments steer, and the texts written there."""

    layer: int
    dose: float
    emotions: tuple[str, ...]
    texts: tuple[tuple[str, str, str], ...]  # (what was added, the text, its top scores)


def steered_emotions(inputs: Inputs) -> list[str]:
    """Six in the short form (the basic ones where the set has them), all that have target words in the full one."""
    able = [e.name for e in inputs.emotions.emotions if e.target_words and e.name in inputs.directions.emotions]
    if inputs.full:
        return able
    basic = [e for e in BASIC if e in able]
    rest = [e for e in able if e not in basic]
    return (basic + rest)[:6]


def run(inputs: Inputs) -> list[Row]:
    """All rows; none for a set with target words for fewer than two emotions."""
    return run_with_choice(inputs)[0]


def run_with_choice(inputs: Inputs) -> tuple[list[Row], Chosen | None]:
    """The rows, and the block and dose that were chosen."""
    names = steered_emotions(inputs)
    tokenizer: Any = inputs.model.tokenizer  # type: ignore[attr-defined]  # it has read the stories
    words = {e.name: e.target_words for e in inputs.emotions.emotions if e.target_words}
    if not inputs.full:
        words = shortest_words(tokenizer, words)
    if len(names) < 2:
        return [], None
    stems, n_layers = load_stems(), inputs.model.cfg.n_layers
    v = inputs.directions[names]
    neutral = [n.text for n in inputs.emotions.neutral][:: max(1, len(inputs.emotions.neutral) // 4)][:4]
    candidates = sorted({k for k in (n_layers // 2, inputs.layer, 3 * n_layers // 4) if k in v.layers})
    common: dict[str, Any] = {"target_words": words, "seed": inputs.seed, "progress": False, "neutral_tokens": 48}

    pilot = sweep(inputs.model, stems.choose, v, layers=candidates, doses=DOSES, controls={}, neutral=neutral, **common)
    layer, dose = _choose(pilot, names)
    say = {"hook": v.hook_point, "layer": layer, "seed": inputs.seed, "estimator": "mean_difference"}

    controls = {
        "random directions": random_directions(v, 200 if inputs.full else 40, seed=inputs.seed),
        "shuffled labels": _shuffled(inputs, names),
    }
    main = sweep(inputs.model, stems.report, v, layers=[layer], doses=[dose], controls=controls, **common)
    n = len(stems.report) * len(names)
    unit = "cells (opening x emotion)"
    own = _margins(main, names, None)  # [prompt emotion]
    out = []
    columns = [main.emotions.index(e) for e in names]
    for control in (None, *controls):
        if control == "random directions":  # a random direction has no emotion of its own: it stands in for each
            margins = _all_margins(main, control)[:, :, columns]
            margins = margins.transpose(1, 0, 2).reshape(len(stems.report), -1)
        else:
            margins = _margins(main, names, control)
        estimate = stats.bootstrap_two_way((margins > 0).astype(float))
        fields = {
            "control": control,
            "dose": dose,
            "n": n if control != "random directions" else margins.size,
            "unit_of_n": unit,
            **say,
        }
        out.append(row(NAME, "share diag above off", estimate, **fields))
        out.append(row(NAME, "diag minus off", stats.bootstrap_two_way(margins), **fields))
        if control != "random directions":
            first = _argmax(main, names, control)
            out.append(
                row(
                    NAME,
                    "argmax",
                    stats.bootstrap_two_way(first.astype(float)),
                    null_mean=1 / len(main.emotions),
                    **fields,
                )
            )
    by_chance = (_all_margins(main, "random directions")[:, :, columns] > 0).mean(0)
    paired = stats.bootstrap_two_way((own > 0) - by_chance)
    fields = {"control": "random directions", "dose": dose, "n": n, "unit_of_n": unit, **say}
    out.append(row(NAME, "share diag above off minus random", paired, primary=True, **fields))
    p = []
    null = _all_margins(main, "random directions").mean(1)[:, columns]  # [random emotion]
    for k in range(len(names)):
        p.append(stats.permutation_p(float(own[:, k].mean()), null[:, k]))
    q = stats.benjamini_hochberg(p)
    for k, name in enumerate(names):
        estimate = stats.bootstrap_mean(own[:, k], list(range(len(own))))
        low, high = float(null[:, k].mean()), float(np.percentile(null[:, k], 95))
        out.append(
            row(NAME, "diag minus off by emotion", estimate, emotion=name, dose=dose, null_mean=low, null_high=high, p=p[k], q=float(q[k]),
                control="random directions", n=len(own), unit_of_n="openings", **say)
        )  # fmt: skip
    change = main.change[[i for i, c in enumerate(main.cells) if c.control is None]].mean(1)
    for i, name in enumerate(names):
        for j, word in enumerate(main.emotions):
            out.append(row(NAME, "change", float(change[i, j]), emotion=name, split=word, dose=dose, **say))

    few = {"random directions": random_directions(v, 40 if inputs.full else 6, seed=inputs.seed)}
    curve = sweep(inputs.model, stems.report, v, layers=[layer], doses=CURVE, controls=few, neutral=neutral, **common)
    for d in CURVE:
        for control in (None, *few):
            at = curve.select(dose=d)
            if control is None:
                margins = _margins(at, names, None)
            else:
                margins = _all_margins(at, control)[:, :, columns].transpose(1, 0, 2).reshape(len(stems.report), -1)
            out.append(
                row(NAME, "diag minus off by dose", stats.bootstrap_two_way(margins), dose=d, control=control, **say)
            )
            cells = [i for i, c in enumerate(at.cells) if c.control == control]
            assert at.kl is not None  # neutral texts were given
            out.append(row(NAME, "kl by dose", float(at.kl[cells].mean()), dose=d, control=control, **say))
    return out, Chosen(layer, dose, tuple(names), _texts(inputs, v, layer, dose))


def _choose(pilot: Any, names: list[str]) -> tuple[int, float]:
    """Largest mean diag - off among the (layer, dose) within the budget; the gentlest one if none is."""
    best, gentlest = None, None
    for layer, dose in sorted({(c.layer, c.dose) for c in pilot.cells}):
        at = pilot.select(layer=layer, dose=dose)
        margin, kl = float(_margins(at, names, None).mean()), float(at.kl.mean())
        if kl <= BUDGET and (best is None or margin > best[0]):
            best = (margin, layer, dose)
        if gentlest is None or kl < gentlest[0]:
            gentlest = (kl, layer, dose)
    found = best or gentlest
    assert found is not None  # there is at least one cell
    return found[1], found[2]


def _all_margins(s: Any, control: str | None) -> np.ndarray:
    """`[direction prompt emotion]`: the change of each emotion's words minus the mean of the others'."""
    cells = [i for i, c in enumerate(s.cells) if c.control == control]
    change = s.change[cells].double().numpy()
    k = change.shape[-1]
    return change - (change.sum(-1, keepdims=True) - change) / (k - 1)


def _margins(s: Any, names: list[str], control: str | None) -> np.ndarray:
    """`[prompt emotion]`: diag - off of the direction that is named for each emotion."""
    margins = _all_margins(s, control)
    directions = [c.direction for c in s.cells if c.control == control]
    return np.stack([margins[directions.index(e), :, s.emotions.index(e)] for e in names], 1)


def _argmax(s: Any, names: list[str], control: str | None) -> np.ndarray:
    """`[prompt emotion]`: whether the own words rose most of all."""
    cells = [i for i, c in enumerate(s.cells) if c.control == control]
    directions = [s.cells[i].direction for i in cells]
    highest = s.change[cells].argmax(-1).numpy()
    return np.stack([highest[directions.index(e)] == s.emotions.index(e) for e in names], 1)


def _shuffled(inputs: Inputs, names: list[str]) -> EmotionDirections:
    return shuffled_directions(inputs.acts, inputs.directions, seed=inputs.seed)[names]


def _texts(inputs: Inputs, v: EmotionDirections, layer: int, dose: float) -> tuple[tuple[str, str, str], ...]:
    """One opening continued with nothing, with each emotion, with a random direction, and with twice the dose."""
    names = list(v.emotions)
    noise = random_directions(v, 1, seed=inputs.seed)
    zero = torch.zeros(1)
    out: list[tuple[str, str, str]] = []
    for label, d, doses in (
        ("nothing", v[names[:1]], zero),
        ("", v, torch.full((len(names),), dose)),
        ("random", noise, torch.tensor([dose])),
        ("twice ", v, torch.full((len(names),), 2 * dose)),
    ):
        hooks = steer_resid_post(d, dose=doses, layer=layer)
        g: Generations = generate(
            inputs.model, [OPENING] * len(doses), hooks, max_new_tokens=24, read=inputs.directions
        )
        for i, name in enumerate(d.emotions):
            what = label if label in ("nothing", "random") else f"{label}{name}"
            out.append((what, OPENING + g.texts[i], g.top(i, 2)))
    return tuple(out)

"""Does adding a direction make the model say its word? Validation steering with its controls and its collapse.

Openings such as "He feels" are continued with one direction added at one block. Read is the change of the log-probability of each
emotion's target words, all of them and whole; "diag" is the change of the steered emotion's own words, "off" the mean of the others'.
Block and dose are chosen on one half of the openings (largest mean diag - off with a KL divergence on neutral text within `BUDGET`; for
speed by six emotions and each emotion's shortest words), everything else is reported on the other half, for every emotion that has
words, beside random directions, directions from shuffled labels, and the other emotions' directions (argmax).
Beside it the direct path alone, the same vector added after the last block; and for six emotions and (short form) every second opening:
the dose curve into collapse; an instruction in words, at whose KL the curve is interpolated; what is written, as the unsteered model reads it.

Fitted on | judged on: directions on the stories (shuffled ones on the same, with shuffled labels); block and dose on one half of the openings
and two neutral texts | the other half, which had been looked at while emolens was made, and four others. Neutral components come from all neutral texts, which the KL is measured on.
What is written: directions of one half of the topics | read by directions of the other half, both ways: a scene that a direction writes is no emotion.
Primary row: share of (opening, emotion) cells with diag above off, minus that of random directions. It says that the direction moves this
readout, not that the model feels or acts by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emolens import stats
from emolens.directions.controls import random_directions, shuffled_directions
from emolens.directions.estimators import mean_difference
from emolens.directions.value import EmotionDirections
from emolens.experiments.base import MIN_DRAWS, Inputs, Row, judged, row
from emolens.interventions.dose import prompt_baseline
from emolens.interventions.sweep import Sweep, shortest_words, sweep
from emolens.sets.materials import load_stems

NAME = "validation"
MANY = 40  # emotions; a larger set steers its six basic ones, and all of them with `full`
BASIC = ("joy", "sadness", "anger", "fear", "disgust", "surprise")
BUDGET = 0.1  # nats a token on neutral text
DOSES = (0.05, 0.1, 0.2)
CURVE = (0.05, 0.1, 0.2, 0.4, 0.8)
OPENING = "I opened the door and"
RANDOM = "random directions"
SHUFFLED = "shuffled labels"
TOLD = "instruction in words"


@dataclass(frozen=True, eq=False)
class Chosen:
    """Where and how strongly the other causal experiments steer, and the texts written there."""

    layer: int
    dose: float
    emotions: tuple[str, ...]
    texts: tuple[tuple[str, str, str], ...]  # (what was added, the text, its score)

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> Chosen:
        """From `dataclasses.asdict` that has been through JSON, which has no tuples."""
        added = tuple((what, text, score) for what, text, score in plain["texts"])
        return Chosen(plain["layer"], plain["dose"], tuple(plain["emotions"]), added)


def run(inputs: Inputs) -> list[Row]:
    """All rows; none for a set with target words for fewer than two emotions."""
    return run_with_choice(inputs)[0]


def run_with_choice(inputs: Inputs) -> tuple[list[Row], Chosen | None]:
    """The rows, and the block and dose that were chosen."""
    words = {e.name: e.target_words for e in inputs.emotions.emotions if e.target_words}
    names = [e for e in words if e in inputs.directions.emotions]
    if len(names) < 2:
        return [], None
    tokenizer = inputs.model.tokenizer
    basic = [e for c in BASIC if (e := inputs.emotions.concepts.get(c)) in names]
    few = names if inputs.full else (basic + [e for e in names if e not in basic])[:6]
    names = names if inputs.full or len(names) <= MANY else few
    words = {e: words[e] for e in names}
    quick = shortest_words(tokenizer, words)
    stems, n_layers, v = load_stems(), inputs.model.cfg.n_layers, inputs.directions[names]
    some = stems.report if inputs.full else stems.report[::2]
    plain = [n.text for n in inputs.emotions.neutral][:: max(1, len(inputs.emotions.neutral) // 6)][
        :6
    ]
    neutral = [t for i, t in enumerate(plain) if i % 3] or plain  # the others choose the dose
    common: dict[str, Any] = {"seed": inputs.seed, "progress": False, "neutral_tokens": 32}

    layers = sorted({k for k in (n_layers // 2, inputs.layer, 3 * n_layers // 4) if k in v.layers})
    pilot = sweep(
        inputs.model, stems.choose, v[few], layers=layers, doses=DOSES, target_words=quick, controls={}, neutral=plain[::3], **common
    )  # fmt: skip
    layer, dose = _choose(pilot)
    at: dict[str, Any] = {**common, "layers": [layer], "doses": [dose]}
    say = {
        "hook": v.hook_point,
        "layer": layer,
        "dose": dose,
        "seed": inputs.seed,
        "estimator": "mean_difference",
    }

    random = random_directions(v, 200 if inputs.full else MIN_DRAWS, seed=inputs.seed)
    shuffled = {
        f"{SHUFFLED} {k}": shuffled_directions(
            inputs.acts.at([layer]), v.at(layer), seed=inputs.seed + k
        )[few]
        for k in range(100 if inputs.full else 5)
    }
    main = sweep(
        inputs.model,
        stems.report,
        v,
        target_words=words,
        controls={RANDOM: random, **shuffled},
        **at,
    )
    out = _main_rows(main, names, few, list(shuffled), say)
    after = replace(v.at(layer), layers=(n_layers - 1,), layer=n_layers - 1, among=None)
    direct = sweep(
        inputs.model,
        stems.report,
        after,
        target_words=words,
        controls={},
        **{**at, "layers": [n_layers - 1]},
    )
    through = own_margins(direct, names)
    unit = {"n": through.size, "unit_of_n": "cells (opening x emotion)"}
    out.append(
        row(
            NAME,
            "share diag above off, direct path",
            stats.bootstrap_two_way(above(through)),
            **unit,
            **say,
        )
    )
    out.append(
        row(NAME, "diag minus off, direct path", stats.bootstrap_two_way(through), **unit, **say)
    )

    anywhere = random_directions(v, 40 if inputs.full else 2, seed=inputs.seed)
    curve = sweep(
        inputs.model, some, v[few], layers=[layer], doses=CURVE, target_words=words, controls={RANDOM: anywhere}, neutral=neutral, **common
    )  # fmt: skip
    out += _curve_rows(curve, few, say)
    told = prompt_baseline(
        inputs.model, some, inputs.emotions, names=few, neutral=neutral, neutral_tokens=32
    )
    out += _told_rows(curve, told, few, say)
    out += _written_rows(
        [_written(inputs, half, few, some, quick, at) for half in _halves(inputs)], few, say
    )
    return out, Chosen(layer, dose, tuple(few), _texts(inputs, v[few], layer, dose, quick))


def _main_rows(
    main: Sweep, names: list[str], few: list[str], draws: list[str], say: dict[str, Any]
) -> list[Row]:
    """The claim, its controls, each emotion with its null, and the whole matrix."""
    columns = [main.emotions.index(e) for e in names]
    own, null = (
        own_margins(main, names),
        all_margins(main, RANDOM)[:, :, columns],
    )  # [prompt emotion], [draw prompt emotion]
    several = np.stack(
        [own_margins(main, few, control) for control in draws]
    )  # [draw prompt emotion]
    unit = "cells (opening x emotion)"
    out = []
    # a random direction has no emotion of its own: it stands in for each
    for control, table, n in (
        (None, own[None], own.size),
        (RANDOM, null, null.size),
        (SHUFFLED, several, several.size),
    ):
        fields = {
            "control": control,
            "n": n,
            "unit_of_n": unit,
            "split": f"{len(table)} draws" if control else None,
            **say,
        }
        out.append(
            row(NAME, "share diag above off", stats.bootstrap_two_way(above(table)), **fields)
        )
        out.append(row(NAME, "diag minus off", stats.bootstrap_two_way(table), **fields))
    for control, highest, n in (
        (None, own_highest(main, names), own.size),
        (SHUFFLED, np.stack([own_highest(main, few, control) for control in draws]), several.size),
    ):
        fields = {
            "control": control,
            "n": n,
            "unit_of_n": unit,
            "null_mean": 1 / len(main.emotions),
            **say,
        }
        out.append(row(NAME, "argmax", stats.bootstrap_two_way(highest), **fields))
    inside = [names.index(e) for e in few]
    for control, paired in (
        (RANDOM, above(own) - above(null)),
        (SHUFFLED, above(own[:, inside]) - above(several)),
    ):
        fields = {
            "control": control,
            "n": paired[0].size,
            "unit_of_n": unit,
            "draws": len(paired),
            "primary": control == RANDOM,
            **say,
        }
        metric = f"share diag above off minus {control.split()[0]}"
        out.append(row(NAME, metric, stats.bootstrap_two_way(paired), **fields))
    of_emotion = null.mean(1)  # [draw emotion]
    each = [judged(float(own[:, k].mean()), of_emotion[:, k], RANDOM) for k in range(len(names))]
    q, floor = (
        stats.benjamini_hochberg([against["p"] for against in each]),
        1 / (len(of_emotion) + 1),
    )
    for k, name in enumerate(names):
        estimate = stats.bootstrap_mean(own[:, k], list(range(len(own))))
        fields = {"emotion": name, "q": float(q[k]), "split": f"p at least {floor:.3f}", "n": len(own), "unit_of_n": "openings"}  # fmt: skip
        out.append(row(NAME, "diag minus off by emotion", estimate, **fields, **each[k], **say))
    change = main.select(control=None).change.mean(1)
    for i, name in enumerate(names):
        for j, word in enumerate(main.emotions):
            out.append(row(NAME, "change", float(change[i, j]), emotion=name, split=word, **say))
    return out


def _curve_rows(curve: Sweep, few: list[str], say: dict[str, Any]) -> list[Row]:
    """Effect and damage at every dose."""
    columns = [curve.emotions.index(e) for e in few]
    out = []
    for dose in CURVE:
        for control in (None, RANDOM):
            at = curve.select(dose=dose, control=control)
            margins = (
                all_margins(at, control)[:, :, columns].mean(0) if control else own_margins(at, few)
            )
            assert at.kl is not None  # neutral texts were given
            fields = say | {"dose": dose, "control": control}
            out.append(
                row(NAME, "diag minus off by dose", stats.bootstrap_two_way(margins), **fields)
            )
            out.append(row(NAME, "kl by dose", float(at.kl.mean()), **fields))
    return out


def _told_rows(curve: Sweep, told: Sweep, few: list[str], say: dict[str, Any]) -> list[Row]:
    """An instruction, and each direction at the dose where it changes neutral text as much (on the curve, between its points)."""
    assert curve.kl is not None  # neutral texts were given to both
    assert told.kl is not None
    words, kl = (
        own_margins(told, few, "prompt"),
        told.kl.mean(1).double().numpy(),
    )  # [prompt emotion], [emotion]
    at_dose = np.stack(
        [own_margins(curve.select(dose=d), few) for d in CURVE]
    )  # [dose prompt emotion]
    damage = np.stack([curve.select(dose=d, control=None).kl.mean(1).numpy() for d in CURVE])  # type: ignore[union-attr]  # as above
    steered, doses = np.empty_like(words), []
    for k in range(len(few)):
        rising = np.maximum.accumulate(damage[:, k])
        doses.append(float(np.exp(np.interp(np.log(kl[k]), np.log(rising), np.log(CURVE)))))
        for j in range(len(words)):
            steered[j, k] = np.interp(doses[-1], CURVE, at_dose[:, j, k])
    say = say | {
        "n": words.size,
        "unit_of_n": "cells (opening x emotion)",
        "dose": float(np.mean(doses)),
    }
    out = [
        row(NAME, "kl of the instruction", float(kl.mean()), control=TOLD, **(say | {"dose": None}))
    ]
    for control, table in ((TOLD, words), (None, steered)):
        out.append(
            row(
                NAME,
                "share diag above off at equal KL",
                stats.bootstrap_two_way(above(table)),
                control=control,
                **say,
            )
        )
        out.append(
            row(
                NAME,
                "diag minus off at equal KL",
                stats.bootstrap_two_way(table),
                control=control,
                **say,
            )
        )
    paired = stats.bootstrap_two_way(steered - words)
    return [
        *out,
        row(
            NAME,
            "diag minus off at equal KL, direction minus instruction",
            paired,
            control=TOLD,
            **say,
        ),
    ]


def _halves(inputs: Inputs) -> list[tuple[str, ...]]:
    """The topics in two halves, persons balanced."""
    return stats.topic_folds(inputs.emotions.told, n_folds=2, seed=inputs.seed)


def _written(
    inputs: Inputs, half: tuple[str, ...], few: list[str], openings: list[str], words: dict[str, list[str]], at: dict[str, Any]
) -> Sweep:  # fmt: skip
    """What directions of one half of the topics write, read by directions of the other half.

    A direction also holds the scenes of its stories. Read by directions of the same stories a text about those scenes is that emotion.
    """
    layers = sorted({*at["layers"], inputs.layer})
    other = [t for t in inputs.emotions.told if t not in half]
    writes, reads = (mean_difference(inputs.without(topics).at(layers)) for topics in (other, half))
    random = random_directions(writes[few], len(few), seed=inputs.seed)
    return sweep(
        inputs.model, openings, writes[few], target_words=words, controls={RANDOM: random}, max_new_tokens=16,
        read=replace(reads, layer=inputs.layer), **at,
    )  # fmt: skip


def _written_rows(halves: list[Sweep], few: list[str], say: dict[str, Any]) -> list[Row]:
    """What is written with each direction and with random ones, as the unsteered model reads it; the mean of both halves."""
    out, scores = [], {}
    for control in (None, RANDOM):
        both = [s.select(control=control) for s in halves]
        texts = [s.written for s in both if s.written is not None]
        known = [w.score.double().numpy() for w in texts if w.score is not None]
        columns = [texts[0].emotions.index(e) for e in few]
        scores[control] = np.stack(known)[..., columns]  # [half cell prompt emotion]
        fields = {
            "control": control,
            "n": sum(w.length.numel() for w in texts),
            "unit_of_n": "texts",
            **say,
        }

        def mean(tables: list[Any]) -> stats.Estimate:  # of [cell prompt]
            return stats.bootstrap_two_way(np.mean([t.double().numpy().T for t in tables], 0))

        e = mean([s.perplexity_ratio.log() for s in both])
        ratio = stats.Estimate(*(float(np.exp(x)) for x in (e.value, e.low, e.high)))
        out.append(
            row(NAME, "perplexity of the text, in units of the unsteered text's", ratio, **fields)
        )
        out.append(
            row(NAME, "distinct pairs of the text", mean([w.distinct for w in texts]), **fields)
        )
        out.append(row(NAME, "length of the text", mean([w.length for w in texts]), **fields))
    own = np.stack([scores[None][:, k, :, k] for k in range(len(few))], -1) - scores[RANDOM].mean(1)
    mine = own.mean(0)  # [prompt emotion]
    fields = {"control": RANDOM, "n": own.size, "unit_of_n": "texts", "split": "read by directions of other topics", **say}  # fmt: skip
    return [
        *out,
        row(NAME, "own score of the text minus random", stats.bootstrap_two_way(mine), **fields),
    ]


def _choose(pilot: Sweep) -> tuple[int, float]:
    """Largest mean diag - off among the (layer, dose) within the budget; the gentlest one if none is."""
    names = list(dict.fromkeys(c.direction for c in pilot.cells))
    found = []
    for layer, dose in sorted({(c.layer, c.dose) for c in pilot.cells}):
        at = pilot.select(layer=layer, dose=dose)
        assert at.kl is not None  # neutral texts were given
        kl = float(at.kl.mean())
        found.append(
            (
                kl <= BUDGET,
                float(own_margins(at, names).mean()) if kl <= BUDGET else -kl,
                layer,
                dose,
            )
        )
    return max(found)[2:]


def above(margins: np.ndarray) -> np.ndarray:
    """Where the own words gain more than the others, 0 or 1."""
    return (margins > 0).astype(float)


def all_margins(s: Sweep, control: str | None) -> np.ndarray:
    """`[direction prompt emotion]`: the change of each emotion's words minus the mean of the others'."""
    return s.select(control=control).margin.double().numpy()


def own_margins(s: Sweep, names: list[str], control: str | None = None) -> np.ndarray:
    """`[prompt emotion]`: diag - off of the direction that is named for each emotion."""
    margins, directions = (
        all_margins(s, control),
        [c.direction for c in s.select(control=control).cells],
    )
    return np.stack([margins[directions.index(e), :, s.emotions.index(e)] for e in names], 1)


def own_highest(s: Sweep, names: list[str], control: str | None = None) -> np.ndarray:
    """`[prompt emotion]`: whether the own words rose most of all, 0 or 1."""
    at = s.select(control=control)
    highest, directions = at.change.argmax(-1).numpy(), [c.direction for c in at.cells]
    return np.stack([highest[directions.index(e)] == s.emotions.index(e) for e in names], 1).astype(
        float
    )


def _texts(
    inputs: Inputs, v: EmotionDirections, layer: int, dose: float, words: dict[str, list[str]]
) -> tuple[tuple[str, str, str], ...]:
    """One opening continued with nothing, with each emotion, with a random direction, and with twice the dose."""
    s = sweep(
        inputs.model, [OPENING], v, layers=[layer], doses=[dose, 2 * dose], target_words=words, max_new_tokens=24, read=inputs.directions,
        controls={"random": random_directions(v, 1, seed=inputs.seed)}, seed=inputs.seed, progress=False,
    )  # fmt: skip
    assert s.written is not None
    assert s.unsteered is not None
    assert s.unsteered.score is not None
    found = [("nothing", s.unsteered, 0)]
    for d, control, label in ((dose, None, ""), (dose, "random", ""), (2 * dose, None, "twice ")):
        cells = [i for i, c in enumerate(s.cells) if (c.dose, c.control) == (d, control)]
        found += [
            (label + (s.cells[i].control or s.cells[i].direction), s.written, i) for i in cells
        ]
    out = []
    for what, w, i in found:
        assert w.score is not None
        e = what.removeprefix("twice ")
        if e in w.emotions:  # beside what the unsteered text has of it
            k = w.emotions.index(e)
            seen = f"{e} {float(w.score[i, 0, k]):+.1f} (with nothing {float(s.unsteered.score[0, 0, k]):+.1f})"
        else:
            best = w.score[i, 0].argsort(descending=True)[:2].tolist()
            seen = "highest: " + ", ".join(
                f"{w.emotions[k]} {float(w.score[i, 0, k]):+.1f}" for k in best
            )
        out.append((what, OPENING + w.texts[i][0], seen if w.length[i, 0] else ""))
    return tuple(out)

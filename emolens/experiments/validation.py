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

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from emolens import stats
from emolens.directions.controls import random_directions, shuffled_directions
from emolens.directions.estimators import mean_difference
from emolens.directions.value import EmotionDirections
from emolens.experiments.base import Experiment, Findings, Gate, Inputs, Picture, Shown, Table, View
from emolens.experiments.drawing import GREY, INK, ORANGE, canvas, known
from emolens.experiments.margins import above, all_margins, own_highest, own_margins
from emolens.experiments.rows import MIN_DRAWS, Row, find, judged, row
from emolens.experiments.rules import Claim, interval, percent, rows_of
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
CELLS = "cells (opening x emotion)"
Say = Callable[..., Row]  # `rows.row` with the fields that a part has in common


def run(inputs: Inputs) -> Findings:
    """All rows, the texts, and the block, dose and emotions that later experiments steer with; nothing for a set with target words for fewer than two emotions."""
    words = {e.name: e.target_words for e in inputs.stories.emotions.emotions if e.target_words}
    names = [e for e in words if e in inputs.directions.emotions]
    if len(names) < 2:
        return Findings()
    basic = [e for c in BASIC if (e := inputs.stories.emotions.concepts.get(c)) in names]
    few = names if inputs.full else (basic + [e for e in names if e not in basic])[:6]
    names = names if inputs.full or len(names) <= MANY else few
    words = {e: words[e] for e in names}
    quick = shortest_words(inputs.model.tokenizer, words)
    stems, n_layers, v = load_stems(), inputs.model.cfg.n_layers, inputs.directions[names]
    some = stems.report if inputs.full else stems.report[::2]
    plain = [n.text for n in inputs.stories.emotions.neutral]
    plain = plain[:: max(1, len(plain) // 6)][:6]
    neutral = [t for i, t in enumerate(plain) if i % 3] or plain  # the others choose the dose
    common: dict[str, Any] = {"seed": inputs.seed, "progress": False, "neutral_tokens": 32}

    layers = sorted({k for k in (n_layers // 2, inputs.layer, 3 * n_layers // 4) if k in v.layers})
    pilot = sweep(
        inputs.model, stems.choose, v[few], layers=layers, doses=DOSES, target_words=quick, controls={}, neutral=plain[::3], **common
    )  # fmt: skip
    layer, dose = _choose(pilot)
    at: dict[str, Any] = {**common, "layers": [layer], "doses": [dose]}
    say = partial(
        row,
        NAME,
        hook=v.hook_point,
        layer=layer,
        dose=dose,
        seed=inputs.seed,
        estimator="mean_difference",
    )

    random = random_directions(v, 200 if inputs.full else MIN_DRAWS, seed=inputs.seed)
    acts, here = inputs.stories.acts.at([layer]), v.at(layer)
    shuffled = {
        f"{SHUFFLED} {k}": shuffled_directions(acts, here, seed=inputs.seed + k)[few]
        for k in range(100 if inputs.full else 5)
    }
    main = sweep(
        inputs.model, stems.report, v, target_words=words, controls={RANDOM: random, **shuffled}, **at
    )  # fmt: skip
    out = _main_rows(main, names, few, list(shuffled), say)
    last = n_layers - 1
    after = replace(here, layers=(last,), layer=last, among=None)
    direct = sweep(
        inputs.model, stems.report, after, target_words=words, controls={}, **{**at, "layers": [last]}
    )  # fmt: skip
    through = own_margins(direct, names)
    alone = partial(say, n=through.size, unit_of_n=CELLS)
    out.append(alone("share diag above off, direct path", stats.bootstrap_two_way(above(through))))
    out.append(alone("diag minus off, direct path", stats.bootstrap_two_way(through)))

    anywhere = random_directions(v, 40 if inputs.full else 2, seed=inputs.seed)
    curve = sweep(
        inputs.model, some, v[few], layers=[layer], doses=CURVE, target_words=words, controls={RANDOM: anywhere}, neutral=neutral, **common
    )  # fmt: skip
    out += _curve_rows(curve, few, say)
    told = prompt_baseline(
        inputs.model, some, inputs.stories.emotions, names=few, neutral=neutral, neutral_tokens=32
    )
    out += _told_rows(curve, told, few, say)
    out += _written_rows(
        [_written(inputs, half, few, some, quick, at) for half in _halves(inputs)], few, say
    )
    chosen = {"layer": layer, "dose": dose, "emotions": few}
    return Findings(out, [_texts(inputs, v[few], layer, dose, quick)], chosen)


def _main_rows(
    main: Sweep, names: list[str], few: list[str], draws: list[str], say: Say
) -> list[Row]:
    """The claim, its controls, each emotion with its null, and the whole matrix."""
    columns, out = [main.emotions.index(e) for e in names], []
    own = own_margins(main, names)  # [prompt emotion]
    null = all_margins(main, RANDOM)[:, :, columns]  # [draw prompt emotion]
    several = np.stack([own_margins(main, few, control) for control in draws])  # the same
    of_cells = partial(say, unit_of_n=CELLS)
    # a random direction has no emotion of its own: it stands in for each
    for control, table in ((None, own[None]), (RANDOM, null), (SHUFFLED, several)):
        split = f"{len(table)} draws" if control else None
        of_table = partial(of_cells, control=control, n=table.size, split=split)
        out.append(of_table("share diag above off", stats.bootstrap_two_way(above(table))))
        out.append(of_table("diag minus off", stats.bootstrap_two_way(table)))
    highest = np.stack([own_highest(main, few, control) for control in draws])
    for control, table, n in (
        (None, own_highest(main, names), own.size),
        (SHUFFLED, highest, several.size),
    ):
        chance = 1 / len(main.emotions)
        out.append(
            of_cells(
                "argmax", stats.bootstrap_two_way(table), control=control, n=n, null_mean=chance
            )
        )
    inside = [names.index(e) for e in few]
    for control, paired in (
        (RANDOM, above(own) - above(null)),
        (SHUFFLED, above(own[:, inside]) - above(several)),
    ):
        metric, first = f"share diag above off minus {control.split()[0]}", control == RANDOM
        drawn = {"control": control, "n": paired[0].size, "draws": len(paired), "primary": first}
        out.append(of_cells(metric, stats.bootstrap_two_way(paired), **drawn))
    of_emotion = null.mean(1)  # [draw emotion]
    each = [judged(float(own[:, k].mean()), of_emotion[:, k], RANDOM) for k in range(len(names))]
    q, floor = stats.benjamini_hochberg([x["p"] for x in each]), 1 / (len(of_emotion) + 1)
    by = partial(
        say,
        "diag minus off by emotion",
        split=f"p at least {floor:.3f}",
        n=len(own),
        unit_of_n="openings",
    )
    for k, name in enumerate(names):
        estimate = stats.bootstrap_mean(own[:, k], list(range(len(own))))
        out.append(by(estimate, emotion=name, q=float(q[k]), **each[k]))
    change = main.select(control=None).change.mean(1)
    for i, name in enumerate(names):
        for j, word in enumerate(main.emotions):
            out.append(say("change", float(change[i, j]), emotion=name, split=word))
    return out


def _curve_rows(curve: Sweep, few: list[str], say: Say) -> list[Row]:
    """Effect and damage at every dose."""
    columns, out = [curve.emotions.index(e) for e in few], []
    for dose in CURVE:
        for control in (None, RANDOM):
            at = curve.select(dose=dose, control=control)
            assert at.kl is not None  # neutral texts were given
            found = (
                all_margins(at, control)[:, :, columns].mean(0) if control else own_margins(at, few)
            )
            here = partial(say, dose=dose, control=control)
            out.append(here("diag minus off by dose", stats.bootstrap_two_way(found)))
            out.append(here("kl by dose", float(at.kl.mean())))
    return out


def _told_rows(curve: Sweep, told: Sweep, few: list[str], say: Say) -> list[Row]:
    """An instruction, and each direction at the dose where it changes neutral text as much (on the curve, between its points)."""
    assert curve.kl is not None  # neutral texts were given to both
    assert told.kl is not None
    words = own_margins(told, few, "prompt")  # [prompt emotion]
    kl = told.kl.mean(1).double().numpy()  # [emotion]
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
    say = partial(say, n=words.size, unit_of_n=CELLS, dose=float(np.mean(doses)))
    out = [say("kl of the instruction", float(kl.mean()), control=TOLD, dose=None)]
    for control, table in ((TOLD, words), (None, steered)):
        more = stats.bootstrap_two_way(above(table))
        out.append(say("share diag above off at equal KL", more, control=control))
        out.append(
            say("diag minus off at equal KL", stats.bootstrap_two_way(table), control=control)
        )
    paired = stats.bootstrap_two_way(steered - words)
    return [
        *out,
        say("diag minus off at equal KL, direction minus instruction", paired, control=TOLD),
    ]


def _halves(inputs: Inputs) -> list[tuple[str, ...]]:
    """The topics in two halves, persons balanced."""
    return stats.topic_folds(inputs.stories.emotions.story_topics, n_folds=2, seed=inputs.seed)


def _written(
    inputs: Inputs, half: tuple[str, ...], few: list[str], openings: list[str], words: dict[str, list[str]], at: dict[str, Any]
) -> Sweep:  # fmt: skip
    """What directions of one half of the topics write, read by directions of the other half.

    A direction also holds the scenes of its stories. Read by directions of the same stories a text about those scenes is that emotion.
    """
    layers = sorted({*at["layers"], inputs.layer})
    other = [t for t in inputs.stories.emotions.story_topics if t not in half]
    writes, reads = (
        mean_difference(inputs.stories.without(topics).at(layers)) for topics in (other, half)
    )
    random = random_directions(writes[few], len(few), seed=inputs.seed)
    return sweep(
        inputs.model, openings, writes[few], target_words=words, controls={RANDOM: random}, max_new_tokens=16,
        read=replace(reads, layer=inputs.layer), **at,
    )  # fmt: skip


def _written_rows(halves: list[Sweep], few: list[str], say: Say) -> list[Row]:
    """What is written with each direction and with random ones, as the unsteered model reads it; the mean of both halves."""
    out, scores = [], {}
    for control in (None, RANDOM):
        both = [s.select(control=control) for s in halves]
        texts = [s.written for s in both if s.written is not None]
        read = [w.score.double().numpy() for w in texts if w.score is not None]
        columns = [texts[0].emotions.index(e) for e in few]
        scores[control] = np.stack(read)[..., columns]  # [half cell prompt emotion]
        n = sum(w.length.numel() for w in texts)
        of_texts = partial(say, control=control, n=n, unit_of_n="texts")

        def mean(tables: list[Any]) -> stats.Estimate:  # of [cell prompt]
            return stats.bootstrap_two_way(np.mean([t.double().numpy().T for t in tables], 0))

        e = mean([s.perplexity_ratio.log() for s in both])
        ratio = stats.Estimate(*(float(np.exp(x)) for x in (e.value, e.low, e.high)))
        out.append(of_texts("perplexity of the text, in units of the unsteered text's", ratio))
        out.append(of_texts("distinct pairs of the text", mean([w.distinct for w in texts])))
        out.append(of_texts("length of the text", mean([w.length for w in texts])))
    own = np.stack([scores[None][:, k, :, k] for k in range(len(few))], -1) - scores[RANDOM].mean(1)
    mine = stats.bootstrap_two_way(own.mean(0))  # of [prompt emotion]
    read_by = {"n": own.size, "unit_of_n": "texts", "split": "read by directions of other topics"}
    return [*out, say("own score of the text minus random", mine, control=RANDOM, **read_by)]


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


def _texts(
    inputs: Inputs, v: EmotionDirections, layer: int, dose: float, words: dict[str, list[str]]
) -> Shown:
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
    title = "What it writes: one opening, greedy, with each direction, with a random one, and at twice the dose"
    head = ("added", "text", "score (z) of the new tokens, read by the unsteered model")
    return Shown(title, head, tuple(out), open=True)


def gate(findings: Findings) -> Gate:
    """Two emotions must have words that they could make the model say."""
    return (
        Gate() if findings.rows else Gate("fewer than two emotions of this set have target words")
    )


def _steers(r: Row, rows: Sequence[Row], k: int) -> str:
    metric = "share diag above off"
    [own], [null] = (find(rows, NAME, metric, control=c, dose=r.dose) for c in (None, RANDOM))
    text = (
        f"in {percent(own.value)} {interval(own, True)} of openings x emotions its own words rise more than the mean of the others "
        f"(random directions {percent(null.value)} {interval(null, True)}; difference {100 * r.value:+.0f} points {interval(r, True)}), "
        f"at block {r.layer}, dose {r.dose:g}, chosen on other openings; those it is reported on had been looked at while emolens was made, so it is no fresh test."
    )
    for first in find(rows, NAME, "argmax", control=None):
        text += f" They rise most of all in {percent(first.value)} {interval(first, True)} (chance {percent(first.null_mean)})."
    return text


def _instruction(r: Row, rows: Sequence[Row], k: int) -> str:
    metric = "diag minus off at equal KL"
    [own], [told] = (find(rows, NAME, metric, control=c) for c in (None, TOLD))
    return f"{own.value:.2f} nats against {told.value:.2f}; difference {r.value:+.2f} {interval(r)}, the dose interpolated on the curve."


def _writes(r: Row, rows: Sequence[Row], k: int) -> str:
    return (
        f"z {r.value:+.2f} {interval(r)} against text written with random directions; the unsteered model reads it, "
        "by directions of the topics that the added ones do not know."
    )


_CONTROLS = ((None, ORANGE, "o", "emotion directions"), (RANDOM, GREY, "s", RANDOM))


def dose_curve(rows: Sequence[Row]) -> Figure:
    """Effect on the own words, and damage to neutral text, over the dose: into collapse."""
    figure = Figure(figsize=(6.0, 4.8), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    chosen = [r.dose for r in find(rows, NAME, "share diag above off", control=None)]
    for axes, metric in ((above, "diag minus off by dose"), (below, "kl by dose")):
        axes.spines[["top", "right"]].set_visible(False)
        for control, colour, marker, name in _CONTROLS:
            found = sorted(find(rows, NAME, metric, control=control), key=lambda r: known(r.dose))
            x = [known(r.dose) for r in found]
            axes.plot(x, [r.value for r in found], color=colour, marker=marker, ms=5, label=name)
            if any(r.low is not None for r in found):
                axes.fill_between(
                    x,
                    [known(r.low) for r in found],
                    [known(r.high) for r in found],
                    color=colour,
                    alpha=0.15,
                    lw=0,
                )
        for dose in chosen:
            axes.axvline(known(dose), color=INK, lw=1, ls=":")
        axes.set_xscale("log")
    doses = sorted({known(r.dose) for r in find(rows, NAME, "kl by dose")})
    below.set_xticks(doses, [f"{d:g}" for d in doses])
    below.minorticks_off()
    above.axhline(0, color=INK, lw=0.8)
    above.set(ylabel="own words minus others,\nchange of log-probability")
    below.set(
        xlabel="dose, median residual norms (dotted: the chosen one)",
        ylabel="KL on neutral text,\nnats a token",
        yscale="log",
    )
    figure.legend(
        *above.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


def validation_matrix(rows: Sequence[Row]) -> Figure:
    """Change of each emotion's words (columns) when each direction (rows) is added; the own column is outlined."""
    found = find(rows, NAME, "change")
    down, across = (list(dict.fromkeys(getattr(r, k) for r in found)) for k in ("emotion", "split"))
    table = np.full((len(down), len(across)), np.nan)
    for r in found:
        table[down.index(r.emotion), across.index(r.split)] = r.value
    table = table - table.mean(1, keepdims=True)
    limit = float(np.abs(table).max())
    figure, axes = canvas(2.0 + 0.24 * len(across), 1.9 + 0.26 * len(down))
    image = axes.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(across)), across, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(down)), down, fontsize=8, parse_math=False)
    for i, name in enumerate(down):
        if name in across:
            j = across.index(name)
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, ec=INK, lw=1.6))
    axes.spines[:].set_visible(False)
    axes.set(xlabel="whose words", ylabel="direction added")
    figure.colorbar(image, ax=axes, shrink=0.9, label="change minus row mean")
    return figure


BESIDE = (
    ("share diag above off, direct path", "own words rise more than the others', by the direct path alone", "share diag above off", None, "with the blocks after it"),
    ("diag minus off, direct path", "own words minus the others', nats, by the direct path alone", "diag minus off", None, "with the blocks after it"),
    ("share diag above off at equal KL", "own words rise more, at the KL of an instruction", "", TOLD, "the instruction"),
    ("diag minus off at equal KL", "own words minus the others', nats, at the KL of an instruction", "", TOLD, "the instruction"),
    ("perplexity of the text, in units of the unsteered text's", "perplexity of what is written, in units of the unsteered text's", "", RANDOM, RANDOM),
    ("distinct pairs of the text", "share of different ones among its pairs of tokens", "", RANDOM, RANDOM),
    ("length of the text", "its length in tokens", "", RANDOM, RANDOM),
)  # fmt: skip


def _beside(view: View) -> list[list[str]]:
    """Further measures of the directions, each beside what it is to be compared with."""
    lines = []
    for metric, what, other, control, name in BESIDE:
        own, theirs = (
            find(view.rows, NAME, m, control=c)
            for m, c in ((metric, None), (other or metric, control))
        )
        lines.append([what, *(f"{r.value:.2f} {interval(r)}" for r in (*own, *theirs)), name])
    return lines


MAIN_ROWS = (
    "share diag above off",
    "share diag above off minus random",
    "share diag above off minus shuffled",
    "diag minus off",
    "argmax",
)
VALIDATION = Experiment(
    NAME,
    question="Does adding a direction make the model say its word?",
    paper=None,
    run=run,
    gate=gate,
    claims=(
        Claim("steers", "Adding a direction makes the model say its word", "above_zero",
              rows_of(NAME, "share diag above off minus random"), _steers, "random directions do more", also=rows_of(NAME, "share diag above off minus shuffled")),
        Claim("steers: more than told", "It does more than an instruction in words that changes neutral text as much", "above_zero",
              rows_of(NAME, "diag minus off at equal KL, direction minus instruction"), _instruction, "the instruction does more"),
        Claim("writes", "What is written with a direction reads more like its emotion", "above_zero",
              rows_of(NAME, "own score of the text minus random"), _writes, "text written with random directions does more"),
    ),
    shows=(
        Picture(lambda view: dose_curve(view.rows), "Dose curve",
            "Above: how much more an emotion's own words gain than the others' when its direction is added (six emotions in a short study), on openings that did not choose block and dose (but had been looked at while emolens was made). "
            "Below: what the same dose does to neutral text. Where both rise together the text is falling apart."),
        Picture(lambda view: validation_matrix(view.rows), "Validation steering",
            "Change of the log-probability of each emotion's words at the chosen block and dose, minus the mean of its row. Outlined: the own words."),
        Table(rows=lambda view: [r for r in view.rows if r.metric in MAIN_ROWS]),
        Table("Beside it", cells=_beside, head=("what", "directions [95 %]", "compared with", "which is"),
            note="The direct path is the same vector added after the last block: what it writes on the vocabulary without any block reading it. "
            "An instruction in words is compared where it changes neutral text as much as the direction does (between the points of the dose curve). "
            "What is written is read by the unsteered model, at the chosen dose; a text that repeats itself has a low perplexity and few distinct pairs."),
        Table("Each emotion against random directions", rows=lambda view: find(view.rows, NAME, "diag minus off by emotion"), folded=True),
    ),
)  # fmt: skip

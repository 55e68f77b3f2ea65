"""An experiment of one file, as somebody would write it: do an emotion's stories lie nearer to its direction than chance has it?"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from emolens import stats
from emolens.experiments.base import Experiment, Findings, Gate, Inputs, Picture, Table, View
from emolens.experiments.drawing import ORANGE, canvas
from emolens.experiments.fitting import Training, against_shuffled
from emolens.experiments.rows import Row, judged, row
from emolens.experiments.rules import Claim, interval, primary_of

NAME = "toy"
LEAST = 4  # topics; of fewer a half is one


def run(inputs: Inputs) -> Findings:
    """Top-1 on the second half of the topics by directions of the first, beside labels shuffled within topic."""
    s = inputs.stories
    half = sorted(set(s.topics))[::2]
    if len(half) < LEAST // 2:
        return Findings()
    training = Training(s, half)

    def top1(labels) -> list[float]:
        return [stats.top_k(training.fit(labels).z(training.test), labels[training.inside]).mean()]

    value, null = against_shuffled(top1, s.labels, s.topics, seed=inputs.seed)
    right = stats.top_k(training.fit(s.labels).z(training.test), s.labels[training.inside])
    topics = [t for t, out in zip(s.topics, training.inside.tolist(), strict=True) if out]
    estimate = stats.bootstrap_mean(right.astype(float), topics, seed=inputs.seed)
    against = judged(float(value[0]), null[:, 0], "shuffled labels")
    found = row(NAME, "top1", estimate, primary=True, n=len(right), unit_of_n="stories", **against)
    return Findings([found])


def gate(findings: Findings) -> Gate:
    """Two halves need topics."""
    return (
        Gate()
        if findings.rows
        else Gate(f"fewer than {LEAST} topics", "A share of .5 could have been shown.")
    )


def figure(view: View) -> Figure:
    """One dot."""
    drawn, axes = canvas()
    axes.plot([r.value for r in view.rows], "o", color=ORANGE)
    return drawn


def _says(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"{r.value:.2f} {interval(r)} of {k} emotions."


TOY = Experiment(
    NAME,
    question="Is a toy read by half of its topics?",
    paper="No figure of any paper.",
    run=run,
    gate=gate,
    claims=(
        Claim("toy", "Half of the topics reads the other", "above_null", primary_of(NAME), _says),
    ),
    shows=(
        Picture(figure, "Toy figure", "A dot, and nothing else."),
        Table(rows=lambda view: view.rows),
    ),
)

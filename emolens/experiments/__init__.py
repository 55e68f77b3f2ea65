"""One file an experiment: what is asked, how it is run, when it cannot be asked, what it claims and by which rule, and what shows it."""

from emolens.experiments.base import (
    Experiment,
    Findings,
    Gate,
    Inputs,
    Picture,
    Shown,
    Stories,
    Table,
    View,
)
from emolens.experiments.languages import Languages, compare_languages
from emolens.experiments.protocol import (
    EXPERIMENTS,
    PROFILES,
    answers,
    chosen_experiments,
    find_experiment,
)
from emolens.experiments.rows import Row, find, judged, row
from emolens.experiments.rules import RULES, Answer, Claim, Rule, judge

__all__ = [
    "EXPERIMENTS", "PROFILES", "RULES", "Answer", "Claim", "Experiment", "Findings", "Gate", "Inputs", "Languages", "Picture", "Row",
    "Rule", "Shown", "Stories", "Table", "View", "answers", "chosen_experiments", "compare_languages", "find", "find_experiment", "judge",
    "judged", "row",
]  # fmt: skip

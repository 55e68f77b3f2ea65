"""Which experiments there are, in which order they run, and what each says once it has run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from emolens.experiments.base import Experiment, Findings, Gate
from emolens.experiments.causal import CAUSAL
from emolens.experiments.geometry import GEOMETRY
from emolens.experiments.logit_lens import LOGIT_LENS
from emolens.experiments.person import PERSON
from emolens.experiments.rules import Answer, judge
from emolens.experiments.separability import SEPARABILITY
from emolens.experiments.transfer import TRANSFER
from emolens.experiments.validation import VALIDATION

EXPERIMENTS: tuple[Experiment, ...] = (
    SEPARABILITY, PERSON, TRANSFER, GEOMETRY, LOGIT_LENS, VALIDATION, CAUSAL,
)  # fmt: skip
# quick: the stories alone, without other people's texts and without reading them again under ablation
PROFILES = {
    "quick": ("separability", "person", "geometry", "logit_lens"),
    "standard": None,
    "full": None,
}


def find_experiment(name: str) -> Experiment:
    """Find the experiment of a name.

    Args:
        name: As `emolens run --list` prints it.

    Returns:
        `Experiment`.

    Raises:
        ValueError: there is none; the nearest names are said.

    Example:
        >>> from emolens.experiments import find_experiment
        >>> find_experiment("separability").needs
        ()
    """
    known = {e.name: e for e in EXPERIMENTS}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no experiment {name!r}; {hint}there are: {', '.join(known)}")
    return known[name]


def chosen_experiments(profile: str | Sequence[str | Experiment]) -> tuple[Experiment, ...]:
    """Choose the experiments of a profile, or those that are named or given with what they need.

    Args:
        profile: "quick", "standard" or "full", or a list of names and `Experiment`s of one's own.

    Returns:
        Experiments in the order in which they run: one's own come last.

    Raises:
        ValueError: an unknown profile or name, or two experiments of one name.

    Example:
        >>> from emolens.experiments import chosen_experiments
        >>> [e.name for e in chosen_experiments(["causal"])]
        ['validation', 'causal']
    """
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ValueError(
                f"profile is one of {', '.join(PROFILES)}, or a list of experiments; not {profile!r}"
            )
        profile = PROFILES[profile] or EXPERIMENTS
    asked = [e if isinstance(e, Experiment) else find_experiment(e) for e in profile]
    found: dict[str, Experiment] = {}

    def add(experiment: Experiment) -> None:
        if found.get(experiment.name, experiment) is not experiment:
            raise ValueError(f"two experiments are called {experiment.name!r}")
        for need in experiment.needs:
            if need not in found:
                add(next((e for e in asked if e.name == need), None) or find_experiment(need))
        found[experiment.name] = experiment

    for experiment in asked:
        add(experiment)
    order = [e.name for e in EXPERIMENTS]
    own = sorted((e for e in found.values() if e.name in order), key=lambda e: order.index(e.name))
    return (*own, *(e for e in found.values() if e.name not in order))


def asked(experiment: Experiment, findings: Findings) -> Gate:
    """Whether the model could be asked; an experiment without a gate can always be."""
    return Gate() if experiment.gate is None else experiment.gate(findings)


def answers(experiment: Experiment, findings: Findings, n_emotions: int) -> list[Answer]:
    """Say what was found of each claim.

    Args:
        experiment: What was asked.
        findings: What it found.
        n_emotions: Of the set, for chance.

    Returns:
        An answer for each row of each claim, in order, so that a claim without rows has none; one answer, "not asked", where the gate
        is closed.

    Example:
        >>> from emolens.experiments import Findings, answers, find_experiment
        >>> [answer.verdict for answer in answers(find_experiment("person"), Findings(), 24)]
        ['not asked']
    """
    gate = asked(experiment, findings)
    if not gate:
        text = f"cannot be asked: {gate.reason}." + (f" {gate.smallest}" if gate.smallest else "")
        return [Answer(experiment.name, experiment.question, "not asked", text)]
    rows = findings.rows
    return [
        judge(c, r, rows, n_emotions) for c in experiment.claims for r in c.rows(rows, n_emotions)
    ]

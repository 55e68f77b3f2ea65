"""What the experiments say of rows that a test has made: each judges those that bear its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from emolens.collect.activations import Activations
from emolens.experiments import protocol
from emolens.experiments.base import Findings
from emolens.experiments.rows import Row
from emolens.experiments.rules import Answer


def _absent(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("there is no model here")


# what has the type and nothing in it, for inputs of which an experiment never asks that part
class _NoModel:
    run_with_hooks = run_with_cache = hooks = __call__ = staticmethod(_absent)


NO_MODEL: Any = _NoModel()
NO_ACTS = object.__new__(Activations)
# of which the suite knows every claim and picture; an experiment that is added has a file of its own
SHIPPED = ("separability", "person", "transfer", "geometry", "logit_lens", "validation", "causal")
CLAIMS = tuple(c for e in protocol.EXPERIMENTS for c in e.claims)


def answers(rows: Sequence[Row], emotions: Any) -> list[Answer]:
    """All answers, in the order of a report; an experiment without rows says nothing here."""
    out = []
    for experiment in protocol.EXPERIMENTS:
        if own := [r for r in rows if r.experiment == experiment.name]:
            out += protocol.answers(experiment, Findings(own), len(emotions.names))
    return out


def patched(monkeypatch: Any, **runs: Any) -> None:
    """Let the experiments of these names run something else."""
    every = tuple(replace(e, run=runs.get(e.name, e.run)) for e in protocol.EXPERIMENTS)
    monkeypatch.setattr(protocol, "EXPERIMENTS", every)

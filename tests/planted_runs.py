"""How often a study claims what is not there, and how often it finds what is: planted worlds, the report's own verdict rules.

    python tests/planted_runs.py [--seeds 40] [--found 10] [--json FILE]

Every seed makes another model, other stories and other draws (see `_worlds`). Draws are fewer than in a study, for speed alone: 100
resamples an interval, 99 permutations of distance matrices; null draws of claims (100 shuffles, 200 random directions, 1,000
permuted words) are those of a study.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parent))
from _answers import CLAIMS
from _worlds import fewer_draws, planted, planted_geometry, run_all, verdicts_of

from emolens.experiments import geometry as norms

# Worlds in which the right answer to a claim is no. Directions of shuffled labels lie where real ones do, so removing or adding one still
# does something to a model that uses that space: the three tests of pairs are judged where the model does not use it.
PAIRS = {"ablation", "ablation after blocks", "patching", "adding"}
STEERING = {"steers", "steers: more than told", "writes", "vocabulary"}


def share(n: int, of: int) -> str:
    return f"{n}/{of} {100 * n / of:3.0f} %" if of else "-"


def wrong(world: str, claim: str) -> bool:
    if claim == "valence":
        return world == "no valence"
    return (world == "shuffled" and claim not in PAIRS) or (
        world == "unused" and claim in PAIRS | STEERING
    )


def verdicts(world: str, seed: int) -> dict[str, str]:
    """Claim to verdict for one run."""
    if world in ("valence", "no valence"):
        inputs = planted_geometry(world == "valence", seed)
        rows = norms.run(inputs).rows
    else:
        inputs = planted(world, seed)  # type: ignore[arg-type]  # the other worlds
        rows = run_all(inputs, causal_only=world == "unused")
    return {name: a.verdict for name, a in verdicts_of(rows, inputs).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=40, help="runs without an effect")
    parser.add_argument("--found", type=int, default=10, help="runs with one")
    parser.add_argument(
        "--worlds", nargs="*", default=["shuffled", "unused", "no valence", "effect", "valence"]
    )
    parser.add_argument("--json", type=Path, help="also write every verdict")
    args = parser.parse_args()
    started = time.time()
    every: list[tuple[str, int, dict[str, str]]] = []
    for world in args.worlds:
        for seed in range(args.found if world in ("effect", "valence") else args.seeds):
            every.append((world, seed, verdicts(world, seed)))
        print(
            f"{world}: {seed + 1} runs ({time.time() - started:.0f} s)", file=sys.stderr, flush=True
        )
    print(
        f"{'claim':<28}{'no effect, shown':>18}{'opposite':>10}{'not asked':>11}{'effect, found':>16}"
    )
    for claim in CLAIMS:
        none = Counter(
            v[claim.name] for world, _, v in every if wrong(world, claim.name) and claim.name in v
        )
        some = Counter(
            v[claim.name]
            for world, _, v in every
            if world in ("effect", "valence") and claim.name in v
        )
        if claim.name == "form":  # no world has any
            some.clear()
        n = none.total()
        print(
            f"{claim.name:<28}{share(none['shown'], n):>18}{none['opposite']:>10}{none['not asked']:>11}{share(some['shown'], some.total()):>16}"
        )
    print(f"{len(every)} runs in {time.time() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(every, indent=1), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with threadpool_limits(limits=1), fewer_draws():
        main()

"""Time and memory of the causal tools on SmolLM2: what hooks, rows and sweeps cost against the same work done plainly.

Each ratio is the median of interleaved pairs, with its 95 % bootstrap interval, after the results of both sides were found equal; peak
memory is that of a fresh process for each case, above a process that has loaded the model and read its weights. Needs transformer-lens 3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loading import touch
from speed import ALIAS, compare  # sets the environment before torch

import torch  # isort: skip

import emolens as em
from emolens.models.tokens import encode, pad

PROMPTS = [
    "I opened the door and", "After the phone call she", "The old man looked at me and", "On the way home they",
    "When it was over, he", "My sister put down the letter and", "Nobody in the room", "At the end of the day I",
]  # fmt: skip
N_NEW = 16
DOSES = (0.05, 0.1, 0.2)
PATCHED_LAYERS = (5, 15, 25)


class Work:
    """One model and everything that the cases share; each case is a method that returns what it computed."""

    def __init__(self, vectors: Path) -> None:
        self.model: Any = em.load_model(ALIAS)
        self.n_layers = self.model.cfg.n_layers
        self.random = torch.randn(
            (len(PROMPTS), self.model.cfg.d_model), generator=torch.Generator().manual_seed(0)
        )
        emotions = em.load_emotion_set("plutchik8")

        def one(w):  # token, which a plain run reads from its last logits
            return len(self.model.tokenizer(" " + w, add_special_tokens=False).input_ids) == 1

        words = {e.name: [w for w in e.target_words if one(w)] for e in emotions.emotions}
        self.words = {e: ws for e, ws in words.items() if ws}
        if (
            not vectors.is_file()
        ):  # collected in a process of its own: it needs more memory than what is measured
            acts = em.collect_resid_post(
                self.model, emotions, layers=[2 * self.n_layers // 3], progress=False
            )
            em.mean_difference(acts).save(vectors)
        self.v = em.load_directions(vectors)[list(self.words)]

    # a dose that leaves the text as it is, so that both sides write the same number of tokens
    def write(self, direction: torch.Tensor | None, layers: list[int]) -> Any:
        hooks = []
        if direction is not None:
            hooks = em.steer_resid_post(direction, dose=1e-4, layer=layers, dose_unit="raw")
        return em.generate(self.model, PROMPTS, hooks, max_new_tokens=N_NEW).tokens

    def generate_plain(self) -> Any:
        return self.write(None, [])

    def generate_hooks(self) -> Any:
        return self.write(self.random[0], list(range(self.n_layers)))

    def generate_rows(self) -> Any:
        return self.write(self.random, list(range(self.n_layers)))

    def sweep_rows(self) -> torch.Tensor:
        options: dict[str, Any] = {"target_words": self.words, "controls": {}, "progress": False}
        return em.sweep(self.model, PROMPTS, self.v, doses=DOSES, **options).change

    @torch.no_grad()
    def sweep_serial(self) -> torch.Tensor:
        """The same cells as hooks of plain runs, one after another; the prompts of a cell are one batch already."""
        v, tokenizer = self.v, self.model.tokenizer
        tokens, mask = pad(encode(self.model, PROMPTS), "left", "cpu")
        ids = [
            [tokenizer(" " + w, add_special_tokens=False).input_ids for w in ws]
            for ws in self.words.values()
        ]

        def read(hooks: list[Any]) -> torch.Tensor:
            with self.model.hooks(fwd_hooks=hooks):
                logits = self.model(tokens, attention_mask=mask, return_type="logits")[:, -1]
            log = logits.log_softmax(-1)
            return torch.stack([log[:, [token for [token] in ws]].mean(-1) for ws in ids], -1)

        base = read([])
        cells = [(d, e) for d in DOSES for e in v.emotions]
        return torch.stack([read(em.steer_resid_post(v[e], dose=d)) - base for d, e in cells])

    def pair(self) -> Any:
        return em.sets.load_pairs()[0]

    def patch_ours(self) -> torch.Tensor:
        p, metric = self.pair(), em.logit_diff(" happy", " sad")
        found = em.patch_resid_pre(
            self.model, clean=p.clean, corrupted=p.corrupted, metric=metric, layers=PATCHED_LAYERS
        )
        return found.recovery

    @torch.no_grad()
    def patch_transformer_lens(self) -> torch.Tensor:
        """TransformerLens's own loop over the same cells, as its documentation uses it."""
        import pandas as pd
        from transformer_lens import patching

        p = self.pair()
        clean, corrupted = (
            torch.tensor([e.ids]) for e in encode(self.model, [p.clean, p.corrupted])
        )
        happy, sad = (
            self.model.tokenizer(w, add_special_tokens=False).input_ids[0]
            for w in (" happy", " sad")
        )

        def difference(logits):  # a metric, as there
            return logits[0, -1, happy] - logits[0, -1, sad]

        base, target = difference(self.model(corrupted)), difference(self.model(clean))
        _, cache = self.model.run_with_cache(
            clean, names_filter=lambda name: name.endswith("hook_resid_pre")
        )
        n = clean.shape[1]
        cells = pd.DataFrame(
            [(layer, pos) for layer in PATCHED_LAYERS for pos in range(n)], columns=["layer", "pos"]
        )
        values = patching.generic_activation_patch(
            self.model, corrupted, cache, lambda logits: (difference(logits) - base) / (target - base),
            patching.layer_pos_patch_setter, "resid_pre", index_df=cells,
        )  # fmt: skip
        return values.reshape(len(PATCHED_LAYERS), n)


def resident_mib() -> tuple[float, float]:
    """Resident memory now, and its peak since the last call (Linux); loading a GGUF file has a higher peak than any case here."""
    fields = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    now, peak = (float(fields[k].split()[0]) / 2**10 for k in ("VmRSS", "VmHWM"))
    return now, peak


def _largest(a: Any, b: Any) -> float:
    """Largest difference of two results; texts are equal or they are not."""
    return float((a - b).abs().max()) if isinstance(a, torch.Tensor) else float(a != b)


# what is timed: name, ours, against, allowed difference (float32 noise of thirty blocks in log-probabilities and recoveries)
CASES = (
    ("generation, 8 rows x 16 tokens: 30 hooks against none", "generate_hooks", "generate_plain", 0.0),
    ("generation, 30 hooks: one direction a row against one for all", "generate_rows", "generate_hooks", 0.0),
    ("sweep, 7 emotions x 3 doses x 8 prompts: rows of shared batches against one run a cell", "sweep_rows", "sweep_serial", 2e-4),
    ("patching, 3 layers x 22 tokens: em.patch_resid_pre against TransformerLens's loop", "patch_ours", "patch_transformer_lens", 1e-4),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs for each ratio")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only",
        type=int,
        nargs="*",
        default=range(len(CASES)),
        help="numbers of the ratios to run",
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument(
        "--vectors",
        type=Path,
        help="directions of plutchik8 at one layer; the default collects them",
    )
    options = parser.parse_args()
    if not importlib.metadata.version("transformer-lens").startswith("3."):
        sys.exit("transformer-lens 4 has no HookedTransformer to compare")
    torch.set_num_threads(options.threads)
    if options.case:  # a child process: its peak memory
        work = Work(options.vectors)
        touch(work.model)
        before = resident_mib()
        if options.case != "nothing":
            getattr(work, options.case)()
        print(before[0], resident_mib()[1])
        return

    with tempfile.TemporaryDirectory(prefix="vectors") as directory:
        vectors = options.vectors or Path(directory) / "vectors.safetensors"

        def child(case: str) -> tuple[float, float]:
            command = [
                sys.executable,
                __file__,
                "--case",
                case,
                "--vectors",
                vectors,
                "--threads",
                str(options.threads),
            ]
            before, after = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            ).stdout.split()[-2:]
            return float(before), float(after)

        child("nothing")  # makes the directions
        memory = {
            case: child(case) for number in options.only for case in CASES[number][1:3]
        }  # this process is small yet
        work = Work(vectors)
    results: dict[str, Any] = {}
    for number in options.only:
        name, ours, theirs, allowed = CASES[number]
        run: list[Callable[[], Any]] = [getattr(work, ours), getattr(work, theirs)]
        difference = _largest(run[0](), run[1]())
        if not difference <= allowed:  # a benchmark of another result is worth nothing
            sys.exit(f"{name}: the results differ by {difference:.1e}")
        r = results[name] = compare(*run, options.pairs) | {"largest_difference": difference}
        of = {side: memory[case] for side, case in (("ours", ours), ("theirs", theirs))}
        r["memory_mib"] = {side: {"before": b, "peak": a} for side, (b, a) in of.items()}
        print(
            f"{name}: {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}] ({r['ours_s']:.2f} s against {r['theirs_s']:.2f} s at best), "
            f"results differ by {difference:.1e}, peak above the loaded model {of['ours'][1] - of['ours'][0]:.0f} MiB against {of['theirs'][1] - of['theirs'][0]:.0f} MiB",
            flush=True,
        )
    if options.json:
        options.json.write_text(
            json.dumps({"pairs": options.pairs, "threads": options.threads} | results, indent=2),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

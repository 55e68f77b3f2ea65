"""Peak memory and time of loading a model, each way in a fresh process; time of the imports that come before it.

Memory is that above what the imports alone take, in units of the weights. Time is from the imports to the last parameter read, and for
an import that of the whole process, as a ratio within rounds that run every case once.

The weights of SmolLM2 are first written to a temporary directory as safetensors, so that reading a GGUF file, which has its own
price, is not part of it. Peak is the largest resident set of the process (`ru_maxrss`), which a child inherits from the process
that starts it: so this one stays small, and the weights are written by a child as well.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CASES = {
    "imports": "imports alone",
    "hf": "Hugging Face",
    "hooked": "emolens, HookedTransformer",
    "bridge": "emolens, TransformerBridge",
    "tl": "TransformerLens's own converter",
}
IMPORTS = ("emolens", "torch", "transformer_lens")


def load(case: str, directory: str) -> Any:
    """One way of loading, after the imports that all of them share."""
    import torch
    import transformer_lens  # noqa: F401  (part of the baseline)
    from transformer_lens.model_bridge.sources import build_bridge_from_module  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import emolens as em

    torch.set_num_threads(2)
    if case == "imports":
        return em.load_model
    if case in ("hooked", "bridge"):
        return em.load_model(directory, backend=case)
    with _quiet():
        hf_model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True
        )
    if case == "hf":
        return hf_model
    from speed import through_transformer_lens

    return through_transformer_lens(hf_model)


def touch(model: Any) -> float:
    """Read every parameter once: weights that are only mapped from the file count as well."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return 0.0
    return sum(float(p.detach().sum()) for p in model.parameters())


def peak_mib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def save_weights(directory: Path) -> int:
    """Write SmolLM2 as float32 safetensors with its tokenizer; returns the bytes of the weights."""
    import torch
    from speed import ALIAS
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emolens.models.catalogue import catalogue
    from emolens.models.sources import _packaged_gguf

    place, file = _packaged_gguf(next(entry for entry in catalogue() if entry.alias == ALIAS))
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
        model.hf_quantizer = (
            None  # the weights are plain float32 by now, but transformers would not write them
        )
        del model.config.quantization_config
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(directory)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def import_seconds(name: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import {name}"], check=True, capture_output=True
    )
    return time.perf_counter() - start


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and whole range: a process of its own for each ratio leaves few of them."""
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def in_words(ratios: list[float]) -> str:
    return "{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**spread(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=9, help="processes for each case")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--case", choices=("save", *CASES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case == "save":  # a child process
        print(save_weights(Path(options.directory)))
        return
    if options.case:
        load("imports", options.directory)
        start = time.perf_counter()
        touch(load(options.case, options.directory))
        print(time.perf_counter() - start, peak_mib())
        return

    cases = list(CASES)
    if int(importlib.metadata.version("transformer-lens").split(".")[0]) >= 4:
        cases = [
            case for case in cases if case not in ("hooked", "tl")
        ]  # there is no HookedTransformer
    with tempfile.TemporaryDirectory(prefix="weights") as directory:

        def child(case: str) -> list[float]:
            command = [sys.executable, __file__, "--case", case, "--directory", directory]
            out = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            ).stdout
            return [float(number) for number in out.splitlines()[-1].split()]

        weights = child("save")[0] / 2**20
        rounds = [{case: child(case) for case in cases} for _ in range(options.repeat)]
    started = [{name: import_seconds(name) for name in IMPORTS} for _ in range(options.repeat)]

    peaks = {case: statistics.median(r[case][1] for r in rounds) for case in cases}
    results: dict[str, Any] = {"weights_mib": weights, "rounds": options.repeat}
    print(f"weights {weights:.0f} MiB; {options.repeat} rounds")
    for case in cases[1:]:
        memory = (peaks[case] - peaks["imports"]) / weights
        slower = [r[case][0] / r["hf"][0] for r in rounds]
        results[case] = {"peak_mib": peaks[case], "ratio": memory, "time": spread(slower)}
        print(
            f"{CASES[case]}: above imports {memory:.2f} x the weights; time {in_words(slower)} of Hugging Face's"
        )
    for name in IMPORTS[:-1]:
        slower = [r[name] / r["transformer_lens"] for r in started]
        results[f"import {name}"] = spread(slower) | {"fastest_s": min(r[name] for r in started)}
        print(f"import {name}: time {in_words(slower)} of import transformer_lens")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

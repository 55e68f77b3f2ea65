"""Peak memory of loading a model, each way in a fresh process, above what the imports alone take, in units of the weights.

The weights of SmolLM2 are first written to a temporary directory as safetensors, so that reading a GGUF file, which has its own
price, is not part of it. Peak is the largest resident set of the process (`ru_maxrss`), which a child inherits from the process
that starts it: so this one stays small, and the weights are written by a child as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
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


def load(case: str, directory: str) -> Any:
    """One way of loading, after the imports that all of them share."""
    import torch
    import transformer_lens  # noqa: F401  (part of the baseline)
    from transformer_lens.model_bridge.sources import build_bridge_from_module  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import emolens as em
    from emolens.models import _quiet

    torch.set_num_threads(2)
    if case == "imports":
        return em.load_model
    if case in ("hooked", "bridge"):
        return em.load_model(directory, backend=case)
    with _quiet():
        hf_model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
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

    from emolens.models import _packaged_gguf, _quiet, catalogue

    place, file = _packaged_gguf(next(entry for entry in catalogue() if entry.alias == ALIAS))
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
        model.hf_quantizer = None  # the weights are plain float32 by now, but transformers would not write them
        del model.config.quantization_config
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(directory)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="processes for each case; the median is reported")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--case", choices=("save", *CASES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case == "save":  # a child process
        print(save_weights(Path(options.directory)))
        return
    if options.case:
        touch(load(options.case, options.directory))
        print(peak_mib())
        return

    import importlib.metadata
    import statistics

    cases = list(CASES)
    if int(importlib.metadata.version("transformer-lens").split(".")[0]) >= 4:
        cases = [case for case in cases if case not in ("hooked", "tl")]  # there is no HookedTransformer
    with tempfile.TemporaryDirectory(prefix="weights") as directory:

        def child(case: str) -> float:
            command = [sys.executable, __file__, "--case", case, "--directory", directory]
            return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])

        n_bytes = child("save")
        peaks = {case: statistics.median(child(case) for _ in range(options.repeat)) for case in cases}
    weights = n_bytes / 2**20
    results = {case: {"peak_mib": peaks[case], "ratio": (peaks[case] - peaks["imports"]) / weights} for case in cases}
    print(f"weights {weights:.0f} MiB")
    for case in cases:
        print(f"{CASES[case]}: peak {peaks[case]:.0f} MiB, above imports {results[case]['ratio']:.2f} x the weights")
    if options.json:
        options.json.write_text(json.dumps({"weights_mib": weights} | results, indent=2))


if __name__ == "__main__":
    main()

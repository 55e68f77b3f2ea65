"""Time of a forward pass and of generation: emolens's HookedTransformer against Hugging Face and against TransformerLens's own loader.

Pairs of runs are interleaved (ours, theirs, ours, theirs ...) and the ratio is taken within a pair, so that a busy machine slows
both sides of a ratio. Reported: the median of the ratios, and its 95 % bootstrap interval. Needs transformer-lens 3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import numpy as np
import torch

import emolens as em

ALIAS = "smollm2-135m-instruct-q4"


def through_transformer_lens(hf_model: Any) -> Any:
    """The same weights through TransformerLens's own converter and loader, without weight processing.

    Its `from_pretrained` takes listed names only, so the two functions under it are called with a saved config.
    """
    from transformer_lens import HookedTransformer, loading_from_pretrained

    with tempfile.TemporaryDirectory(
        prefix="config"
    ) as directory:  # it reads model families out of the path
        hf_model.config.architectures = [type(hf_model).__name__]  # a GGUF file does not name it
        hf_model.config.save_pretrained(directory)
        cfg = loading_from_pretrained.get_pretrained_model_config(
            directory, fold_ln=False, dtype=torch.float32, device="cpu", default_prepend_bos=False
        )
        state = loading_from_pretrained.get_pretrained_state_dict(
            directory, cfg, hf_model=hf_model, dtype=torch.float32
        )
    cfg.tokenizer_name = None  # else it is fetched from the hub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it announces its own removal
        model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def models() -> dict[str, Any]:
    """Three models with the same weights: `ours`, `hf` and `tl`."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from emolens.models.catalogue import catalogue
    from emolens.models.sources import _packaged_gguf

    directory, file = _packaged_gguf(next(entry for entry in catalogue() if entry.alias == ALIAS))
    with _quiet():
        read = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32)
    del read.config.quantization_config  # the weights are plain float32 by now
    hf_model = LlamaForCausalLM(read.config)
    hf_model.load_state_dict(read.state_dict())
    hf_model.generation_config.eos_token_id = None  # every row runs its length, as in the others
    return {
        "ours": em.load_model(ALIAS),
        "hf": hf_model.eval(),
        "tl": through_transformer_lens(hf_model),
    }


def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)
    return getattr(logits, "logits", logits)


def generate(model: Any, tokens: torch.Tensor, n_new: int) -> torch.Tensor:
    if hasattr(model, "hook_dict"):
        return model.generate(
            tokens, max_new_tokens=n_new, do_sample=False, stop_at_eos=False, verbose=False
        )
    mask = torch.ones_like(tokens)
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int
) -> dict[str, float]:
    """Median of `pairs` ratios ours / theirs, its bootstrap interval, and the fastest times of both."""
    ours(), theirs()  # warm
    times = np.array(
        [
            (seconds(ours), seconds(theirs)) if pair % 2 else (seconds(theirs), seconds(ours))[::-1]
            for pair in range(pairs)
        ]
    )
    ratios = times[:, 0] / times[:, 1]
    resampled = np.median(np.random.default_rng(0).choice(ratios, (10_000, pairs)), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "ours_s": float(times[:, 0].min()),
        "theirs_s": float(times[:, 1].min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs for each ratio")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if not importlib.metadata.version("transformer-lens").startswith("3."):
        sys.exit("transformer-lens 4 has no HookedTransformer to compare")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    loaded = models()
    vocabulary = loaded["ours"].cfg.d_vocab
    long, short = torch.randint(vocabulary, (2, 128)), torch.randint(vocabulary, (8, 8))
    tasks: dict[str, Callable[[Any], torch.Tensor]] = {
        "forward with logits, 2 x 128 tokens": lambda model: forward(model, long),
        "generate with KV cache, 8 x 16 tokens": lambda model: generate(model, short, 16),
    }
    results: dict[str, dict[str, dict[str, float]]] = {}
    with torch.inference_mode():
        for task, run in tasks.items():
            expected = run(loaded["hf"])
            for name in ("ours", "tl"):  # a benchmark of a wrong model is worth nothing
                difference = (run(loaded[name]).float() - expected.float()).abs().max().item()
                if not difference < 1e-3:  # logits reach 29; 5e-5 was measured
                    sys.exit(f"{name} differs from Hugging Face by {difference:.1e} in: {task}")
            results[task] = {
                other: compare(
                    lambda run=run: run(loaded["ours"]),
                    lambda run=run, other=other: run(loaded[other]),
                    options.pairs,
                )
                for other in ("hf", "tl")
            }
            for other, label in (("hf", "Hugging Face"), ("tl", "TransformerLens's loader")):
                r = results[task][other]
                print(
                    f"{task}: {r['ratio']:.2f} of {label} [{r['low']:.2f}, {r['high']:.2f}]"
                    f"  ({r['ours_s']:.2f} s against {r['theirs_s']:.2f} s at best)"
                )
    if options.json:
        options.json.write_text(
            json.dumps({"pairs": options.pairs, "threads": options.threads} | results, indent=2),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

"""Collecting against the bare Hugging Face blocks, `run_with_cache`, and Hugging Face one text at a time; by length and batch.

Pairs of runs are interleaved and the ratio is of tokens per second within a pair: above one, emolens is faster. The bare blocks are
`hf.model(tokens)` without LM head, KV cache or padding. Before anything is timed, pooled rows are compared with Hugging Face's hidden states.
`--plan` compares `emolens plan`'s estimate with a run; `--profile` says where the time goes, in ours and in the bare blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import torch
from speed import ALIAS, compare, seconds

import emolens as em
from emolens.collect.planning import plan_measured
from emolens.models.loading import open_hf
from emolens.models.tokens import encode


def faster(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, tokens: float = 1.0
) -> dict[str, float]:
    """(tokens a second of ours) / (of theirs), with its interval; `tokens` is the tokens of ours over those of theirs."""
    r = compare(theirs, ours, pairs)  # their time over ours
    return {key: tokens * r[key] for key in ("ratio", "low", "high")} | {
        "ours_s": r["theirs_s"],
        "theirs_s": r["ours_s"],
    }


def text_of(model: Any, n: int, seed: int) -> str:
    """Words that are exactly n tokens."""
    words = " ".join(t.text for _, t in em.load_emotion_set("core").texts()[seed : seed + 12])
    ids = encode(model, [words])[0].ids[:n]
    text = model.tokenizer.decode(ids)
    assert len(encode(model, [text])[0].ids) == n
    return text


def one_at_a_time(hf: Any, encoded: list[Any]) -> torch.Tensor:
    """What published scripts do: a text, all hidden states, their mean from the second half on."""
    rows = []
    for e in encoded:
        hidden = hf(torch.tensor([e.ids]), output_hidden_states=True).hidden_states
        rows.append(torch.stack([h[0, len(e.ids) // 2 :].mean(0) for h in hidden[1:]]))
    return torch.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=("hooked", "bridge"), default=None)
    parser.add_argument("--only", default="", help="a word of the cases to run")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = em.load_model(ALIAS, backend=options.backend)
    core = em.load_emotion_set("core")
    results: dict[str, Any] = {
        "pairs": options.pairs,
        "threads": options.threads,
        "backend": em.model_info(model).backend,
    }
    if options.plan:
        plan = plan_measured(model, core)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            em.collect_to(Path(folder) / "c", model, core, progress=False)
            took = time.perf_counter() - start
            disk = sum(f.stat().st_size for f in (Path(folder) / "c").iterdir())
        results["plan"] = {
            "estimated_s": plan.hours * 3600,
            "took_s": took,
            "estimated_bytes": plan.disk,
            "bytes": disk,
        }
        print(
            f"planned {plan.hours * 3600:.0f} s, took {took:.0f} s; planned {plan.disk / 1e6:.1f} MB, written {disk / 1e6:.1f} MB"
        )
    elif options.profile:
        with torch.no_grad():
            profile(model, options.pairs, results)
    else:
        with torch.no_grad():
            throughput(model, core, options, results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def throughput(model: Any, core: Any, options: argparse.Namespace, results: dict[str, Any]) -> None:
    hf = open_hf(ALIAS)[0]
    collect = partial(em.collect_resid_post, model, progress=False)
    sample = [t.text for _, t in core.texts()][::16]  # 24 stories
    mixed = [
        text_of(model, n, i)
        for i, n in enumerate((8, 12, 20, 30, 45, 60, 80, 110, 140, 170, 220, 300))
    ]
    encoded = encode(model, sample)
    assert all(
        len(e.ids) >= 100 for e in encoded
    )  # so that pooling skips 50 tokens, and not half of a short text
    hidden = hf(torch.tensor([encoded[0].ids]), output_hidden_states=True).hidden_states[15][0, 50:]
    row = em.collect_resid_post(model, sample[:1], layers=[14], progress=False).rows[0, 0]
    norm = torch.linalg.vector_norm(hidden, dim=-1)
    assert (norm < 1000).all()
    assert (row - hidden.mean(0)).abs().max() < 1e-4 * row.abs().max()  # else a fast wrong number

    cases: dict[str, tuple[Callable[[], object], Callable[[], object], float]] = {}
    for batch, width in ((1, 128), (2, 128), (8, 128), (16, 64), (4, 256), (2, 512)):
        texts = [text_of(model, width, 5 * i) for i in range(batch)]
        tokens = torch.tensor([e.ids for e in encode(model, texts)])
        cases[f"bare blocks, {batch} x {width} tokens"] = (
            lambda texts=texts: collect(texts), lambda tokens=tokens: hf.model(tokens, use_cache=False), 1.0,
        )  # fmt: skip
    n = sum(len(e.ids) for e in encoded)
    best = torch.tensor(
        [e.ids for e in encode(model, [text_of(model, 128, 5 * i) for i in range(8)])]
    )
    cases["bare blocks at 8 x 128, ours on 24 stories of mixed length, with tokenising and padding"] = (
        lambda: collect(sample), lambda: hf.model(best, use_cache=False), n / best.numel(),
    )  # fmt: skip
    padded = model.tokenizer(sample[:8], return_tensors="pt", padding=True)
    cases["run_with_cache of resid_post, 8 stories"] = (
        lambda: collect(sample[:8]),
        lambda: model.run_with_cache(
            padded.input_ids,
            attention_mask=padded.attention_mask,
            names_filter=lambda name: name.endswith("resid_post"),
        ),
        1.0,
    )
    mixed_encoded = encode(model, mixed)
    cases["Hugging Face, output_hidden_states, one text at a time: 12 texts of 8 to 300 tokens"] = (
        lambda: collect(mixed), lambda: one_at_a_time(hf, mixed_encoded), 1.0,
    )  # fmt: skip
    cases["Hugging Face, one text at a time, for one layer of 30: the same 12 texts, ours stops after block 20"] = (
        lambda: em.collect_resid_post(model, mixed, layers=[20], progress=False),
        lambda: one_at_a_time(hf, mixed_encoded), 1.0,
    )  # fmt: skip
    short = [
        text_of(model, n, i)
        for i, n in enumerate((8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) * 2)
    ]
    short_encoded = encode(model, short)
    cases["Hugging Face, output_hidden_states, one text at a time: 24 texts of 8 to 30 tokens"] = (
        lambda: collect(short), lambda: one_at_a_time(hf, short_encoded), 1.0,
    )  # fmt: skip
    for name, (ours, theirs, tokens) in cases.items():
        if options.only in name:
            r = results[name] = faster(ours, theirs, options.pairs, tokens)
            print(f"{name}: {r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]", flush=True)


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "norms": ("aten::_fused_rms_norm", "aten::rsqrt", "aten::mean", "aten::pow"),
    "activation": ("aten::silu", "aten::silu_"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
}  # fmt: skip


def profile(model: Any, runs: int, results: dict[str, Any]) -> None:
    """Share of the wall time by kind of operation; the rest of the operations, and what is spent outside all of them."""
    hf = open_hf(ALIAS)[0]
    texts = [text_of(model, 128, 5 * i) for i in range(8)]
    tokens = torch.tensor([e.ids for e in encode(model, texts)])
    sides: dict[str, Callable[[], object]] = {
        "ours, 8 x 128 tokens": lambda: em.collect_resid_post(model, texts, progress=False),
        "bare blocks, 8 x 128 tokens": lambda: hf.model(tokens, use_cache=False),
    }
    for name, run in sides.items():
        run()
        wall = min(seconds(run) for _ in range(runs))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            profiled = seconds(run)
        spent = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
        share = {
            kind: sum(spent.get(key, 0.0) for key in keys) / profiled
            for kind, keys in KINDS.items()
        }
        share["other operations"] = sum(spent.values()) / profiled - sum(share.values())
        share["outside operations"] = 1 - sum(share.values())
        results[name] = {"wall_s": wall, "profiled_s": profiled, "share": share}
        print(f"{name}: {wall:.2f} s ({profiled:.2f} s under the profiler)")
        for kind, part in sorted(share.items(), key=lambda item: -item[1]):
            print(f"  {kind:20} {part:6.1%}")
        largest = sorted(
            ((t, k) for k, t in spent.items() if not any(k in keys for keys in KINDS.values())),
            reverse=True,
        )
        print(
            "  largest of the others:", ", ".join(f"{k} {t / profiled:.1%}" for t, k in largest[:5])
        )


if __name__ == "__main__":
    main()

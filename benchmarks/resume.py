"""Twenty kills, memory over corpus size, and two ranks against one, on a tiny random model and short texts.

`kills`: an uninterrupted run, then twenty that are killed with SIGKILL at a random moment and continued; their results are compared to the bit.
`memory`: peak resident memory of a process that collects 1,000, 10,000 and 100,000 texts from a JSON-lines file.
`ranks`: time of `torchrun` with two ranks against one, one thread each, on SmolLM2, without starting and loading.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: a process that has threads cannot be forked

ROOT = Path(__file__).parent.parent


def write_texts(file: Path, n: int) -> None:
    rng = random.Random(0)
    words = [
        "door",
        "rain",
        "letter",
        "kettle",
        "garden",
        "harbour",
        "train",
        "clock",
        "window",
        "dog",
        "evening",
        "step",
    ]
    with file.open("w", encoding="utf-8") as out:
        for i in range(n):
            text = " ".join(rng.choices(words, k=rng.randint(4, 9)))
            out.write(
                json.dumps({"text": text, "emotion": "abcd"[i % 4], "topic": f"t{i // 4 % 16}"})
                + "\n"
            )


def tiny_model(directory: Path) -> Any:
    """The tests' tiny Llama, d_model 32, 3 layers."""
    sys.path.insert(0, str(ROOT / "tests"))
    from toys import randomise, tiny_config, tiny_tokenizer
    from transformers import AutoModelForCausalLM

    import emolens as em

    if not directory.exists():
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        randomise(model)
        model.save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
    return em.load_model(directory)


def digest(folder: Path) -> str:
    """Of every number of a collection, its texts and its sums."""
    from emolens.collect.collection import Collection

    collection = Collection.open(folder)
    acts, sha = collection.load(), hashlib.sha256()
    for t in (acts.rows, acts.embed, acts.norm_histogram, acts.sinks, collection.moments().total):
        sha.update(t.contiguous().numpy().tobytes())
    sha.update(repr(acts.texts).encode())
    return sha.hexdigest()


def kills(place: Path, n: int) -> dict[str, Any]:
    import emolens as em

    model = tiny_model(place / "model")
    write_texts(place / "texts.jsonl", 2000)

    def run(folder: Path) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                em.collect_to(folder, model, place / "texts.jsonl", shard_texts=16, progress=False)
            finally:
                os._exit(0)
        return pid

    os.waitpid(run(place / "whole"), 0)
    start = time.perf_counter()
    os.waitpid(run(place / "again"), 0)  # warm: its time is that of the runs that follow
    took = time.perf_counter() - start
    expected, rng = digest(place / "whole"), random.Random(0)
    done, same = [], 0
    for k in range(n):
        folder = place / f"killed-{k}"
        pid = run(folder)
        time.sleep(rng.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done.append(len(list(folder.glob("*.safetensors"))) if folder.exists() else 0)
        os.waitpid(run(folder), 0)
        same += digest(folder) == expected
    print(
        f"{n} kills within {took:.1f} s, after {sorted(done)} of 125 shards: {same} of {n} results identical to the bit"
    )
    return {"kills": n, "identical": same, "shards_done": sorted(done), "uninterrupted_s": took}


def memory(place: Path, sizes: list[int]) -> dict[str, Any]:
    out = {}
    for n in sizes:
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "child",
            "--place",
            str(place),
            "--n",
            str(n),
        ]
        out[n] = float(
            subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            ).stdout.split()[-1]
        )
        print(f"{n} texts: peak {out[n]:.0f} MiB", flush=True)
    spread = max(out.values()) / min(out.values()) - 1
    print(f"largest over smallest: {spread:+.1%}")
    return {"peak_mib": out, "spread": spread}


def child(place: Path, n: int) -> None:
    from loading import peak_mib

    import emolens as em

    model = tiny_model(place / "model")
    write_texts(place / f"{n}.jsonl", n)
    em.collect_to(place / f"c{n}", model, place / f"{n}.jsonl", progress=False)
    print(peak_mib())


def ranks(place: Path) -> dict[str, Any]:
    from speed import ALIAS

    import emolens as em

    texts = place / "stories.jsonl"
    stories = em.load_emotion_set("core").texts()[::4]  # 96, of every emotion
    texts.write_text(
        "".join(
            json.dumps({"text": t.text, "emotion": e, "topic": t.topic}) + "\n" for e, t in stories
        ),
        encoding="utf-8",
    )
    took: dict[int, float] = {}
    last: dict[int, Path] = {}
    for turn, n in enumerate((1, 2, 1, 2)):
        folder = place / f"r{n}-{turn}"
        launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port", "29677"]  # fmt: skip
        options = ["-m", ALIAS, "--texts", str(texts), "-o", str(place / "v.safetensors"), "--shards", str(folder), "--shard-texts", "8", "--device", "cpu"]  # fmt: skip
        subprocess.run(
            [*launch, "-m", "emolens", "extract", *options], check=True, capture_output=True
        )
        shards = [f.stat().st_mtime for f in folder.glob("*.safetensors")]
        took[n] = min(took.get(n, 1e9), max(shards) - (folder / "manifest.json").stat().st_mtime)
        last[n] = folder
    same = digest(last[1]) == digest(last[2])
    print(
        f"one rank {took[1]:.0f} s, two {took[2]:.0f} s: {took[1] / took[2]:.2f} times as fast; identical to the bit: {same}"
    )
    return {"one_s": took[1], "two_s": took[2], "speed_up": took[1] / took[2], "identical": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "memory", "ranks", "child"))
    parser.add_argument("--n", type=int, default=20, help="kills")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "child":
        child(options.place, options.n)
        return
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        run = {
            "kills": lambda: kills(place, options.n),
            "memory": lambda: memory(place, options.sizes),
            "ranks": lambda: ranks(place),
        }
        result = run[options.what]()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

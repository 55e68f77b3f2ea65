"""Every engine gives what one process gives, to the bit; also when a worker is killed in the middle."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import emolens as em
from emolens.collect import engines
from emolens.collect.activations import Activations
from emolens.collect.collection import Collection, collect_to
from emolens.collect.engines import Request, collect_on

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(em.__file__).parent.parent),
}


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    extra = {"ray": "ray", "submitit": "slurm"}[package]
    return pytest.mark.skipif(
        missing, reason=f"{package} is not installed: pip install 'emolens[{extra}]'"
    )


@pytest.fixture(scope="module")
def request_(tiny, toy_set) -> Request:
    return Request(
        str(tiny("llama", tokenizer="chat")),
        emotions=str(toy_set),
        batching=em.Batching(shard=2),
        device="cpu",
    )


@pytest.fixture(scope="module")
def expected(request_, tmp_path_factory) -> Activations:
    """Of another process, with the thread count of the workers."""
    folder = tmp_path_factory.mktemp("single") / "c"
    subprocess.run([*collecting("local", request_, folder)], env=ENVIRONMENT, check=True)
    return Collection.open(folder).load()


def collecting(engine: str, request: Request, folder: Path) -> list[str]:
    """The command of a process that collects on an engine, with two workers."""
    code = (
        "import sys, json; from emolens.collect.engines import Request, collect_on\n"
        "collect_on(sys.argv[1], Request(**json.loads(sys.argv[2])), sys.argv[3], workers=2, progress=False)"
    )
    return [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        code,
        engine,
        json.dumps(asdict(request)),
        str(folder),
    ]


def same(folder: Path, expected: Activations) -> None:
    found = Collection.open(folder).load()
    for name in ("rows", "embed", "norm_histogram", "sinks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.texts == expected.texts
    assert found.neutral_tokens is not None
    assert expected.neutral_tokens is not None
    assert torch.equal(found.neutral_tokens.rows, expected.neutral_tokens.rows)


def extract(request: Request, out: Path, *more: str) -> list[str]:
    assert request.emotions is not None
    options = [
        "-m",
        request.model,
        "-s",
        request.emotions,
        "-o",
        str(out),
        "--shards",
        str(out.parent / "c"),
    ]
    return ["-m", "emolens", "extract", *options, "--shard-texts", "2", "--device", "cpu", *more]


def killed_when(
    folder: Path, done: int, victims: Callable[[], list[psutil.Process]], process: Any
) -> None:
    """Kill one of the victims as soon as so many shards are there."""
    while process.poll() is None and len(list(folder.glob("*.safetensors"))) < done:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()
    found = victims()
    assert found, "no worker was found to kill"
    found[-1].send_signal(signal.SIGKILL)


def port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launcher(kind: str) -> list[str]:
    if kind == "accelerate":
        options = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
        return [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *options,
            "--main_process_port",
            port(),
        ]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        port(),
    ]


@pytest.mark.parametrize("kind", ["accelerate", "torchrun"])
def test_two_ranks_give_what_one_gives(request_, expected, tmp_path, kind):
    out = tmp_path / "v.safetensors"
    done = subprocess.run(
        [*launcher(kind), *extract(request_, out)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    same(tmp_path / "c", expected)
    v = em.load_directions(out)
    torch.testing.assert_close(
        v.vectors, em.mean_difference(expected).vectors, rtol=1e-5, atol=1e-6
    )


def test_a_rank_killed_in_the_middle_ends_the_run_and_the_next_one_continues(
    request_, expected, tmp_path
):
    command = [*launcher("torchrun"), *extract(request_, tmp_path / "v.safetensors")]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    killed_when(tmp_path / "c", 4, lambda: psutil.Process(process.pid).children(), process)
    process.communicate()
    assert process.returncode != 0
    assert 4 <= len(list((tmp_path / "c").glob("*.safetensors"))) < 28
    again = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8"
    )
    assert again.returncode == 0, again.stderr[-2000:]
    same(tmp_path / "c", expected)


def test_an_error_of_the_first_rank_ends_all_with_its_words(request_, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("years of work", encoding="utf-8")
    command = [*launcher("torchrun"), *extract(request_, tmp_path / "v.safetensors")]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, encoding="utf-8"
    )
    assert done.returncode != 0
    assert done.stderr.count("holds other files (thesis.tex)") == 2


@needs("ray")
def test_ray_gives_what_one_process_gives_and_survives_the_loss_of_an_actor(
    request_, expected, tmp_path
):
    command = collecting("ray", request_, tmp_path / "c")
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )

    def actors() -> list[psutil.Process]:
        family = psutil.Process(process.pid).children(recursive=True)
        return [p for p in family if "MapWorker" in " ".join(p.cmdline())]

    killed_when(tmp_path / "c", 4, actors, process)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    same(tmp_path / "c", expected)


@needs("submitit")
def test_submitted_jobs_give_what_one_process_gives_and_a_lost_one_is_submitted_again(
    request_, expected, tmp_path, monkeypatch
):
    """The first worker to take a share kills itself after two shards."""
    for key in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(key, ENVIRONMENT[key])
    marker = tmp_path / "killed"
    hook = tmp_path / "site" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(
        "import os, signal, threading, time\n"
        "def watch():\n"
        "    import sys\n"
        f"    folder, marker = {str(tmp_path / 'c')!r}, {str(marker)!r}\n"
        "    while True:\n"
        "        time.sleep(0.002)\n"
        "        done = [n for n in (os.listdir(folder) if os.path.isdir(folder) else ()) if n.endswith('.safetensors')]\n"
        "        if len(done) >= 4:\n"
        "            try:\n"
        "                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))\n"
        "            except FileExistsError:\n"
        "                return\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "if any('submitit' in a for a in __import__('sys').orig_argv):\n"
        "    threading.Thread(target=watch, daemon=True).start()\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", f"{hook.parent}:{ENVIRONMENT['PYTHONPATH']}")
    collect_on("slurm", request_, tmp_path / "c", workers=2, slurm={"cluster": "local"})
    assert marker.exists(), "no worker was killed"
    same(tmp_path / "c", expected)


@needs("submitit")
def test_a_job_that_raises_says_why_and_is_not_submitted_again(tiny, tmp_path, monkeypatch):
    for key in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(key, ENVIRONMENT[key])
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "word " * 2000, "emotion": "a"}) + "\n", encoding="utf-8")
    request = Request(str(tiny("llama", tokenizer="chat")), texts=str(texts), device="cpu")
    with pytest.raises(
        RuntimeError, match=r"a job failed, what is done stays: ValueError: text 0 has \d+ tokens"
    ):
        collect_on("slurm", request, tmp_path / "c", slurm={"cluster": "local"})


def test_the_devices_of_a_worker_are_those_where_it_runs():
    assert Request("m").gpus(found=True) == 1
    assert Request("m").gpus(found=False) == 0
    assert Request("m", device="cuda", n_devices=2).gpus(found=False) == 2
    assert Request("m", device="cpu").gpus(found=True) == 0


def test_an_engine_without_its_extra_says_how_to_get_it(request_, tmp_path, monkeypatch):
    for engine, package in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            ModuleNotFoundError, match=rf"needs an extra: pip install 'emolens\[{engine}\]'"
        ):
            collect_on(engine, request_, tmp_path / "c")  # type: ignore[arg-type]  # a loop over literals


def test_requests_that_cannot_be_met_are_refused_before_a_model_is_opened(request_, tmp_path):
    with pytest.raises(ValueError, match="engine='spark'; allowed: local, ray, slurm"):
        collect_on("spark", request_, tmp_path)  # type: ignore[arg-type]  # the error is the test
    with pytest.raises(ValueError, match="workers=0"):
        collect_on("local", request_, tmp_path, workers=0)
    with pytest.raises(ValueError, match="give a set or a file of texts, one of the two"):
        collect_on("local", Request("nowhere"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        collect_on("local", Request("nowhere", texts=str(tmp_path / "none.jsonl")), tmp_path)


def test_a_worker_with_another_model_is_refused(tiny, tiny_model, toy_set, tmp_path):
    toy = em.load_emotion_set(toy_set)
    collect_to(tmp_path / "c", tiny_model, toy, progress=False)
    other = em.load_model(tiny("llama", tokenizer="chat"), dtype="bfloat16")
    with pytest.raises(ValueError, match="was begun with another model, or in another precision"):
        engines.joined(tmp_path / "c", other, toy, "resid_post", {})

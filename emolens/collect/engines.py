"""Run a collection on many devices or machines, on engines that people already use.

Shards do not depend on who makes them, so every engine does the same: one process holds the folder, each worker opens the model once
and makes some of the missing shards, and the finished folder is read in its fixed order. The result is that of a single process, and a
worker that dies costs the shard it had in hand. ``local`` is this process, or the ranks that ``accelerate launch`` or ``torchrun``
started; ``ray`` maps over the shards with Ray Data, one actor a device; ``slurm`` submits jobs through submitit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from emolens._typing import AnyPoint, HookedModel, whole_number
from emolens.collect.collection import Collection, Job, joined, lock_folder, open_job, survey
from emolens.collect.pooling import mean_over_tokens
from emolens.collect.recipe import Batching, Options
from emolens.models.loading import load_model
from emolens.sets.corpus import Corpus, Long, open_corpus
from emolens.sets.set_files import load_emotion_set
from emolens.shards import vacant_folder

Engine = Literal["local", "ray", "slurm"]
Check = Callable[[dict[str, Any]], None]
ROUNDS = 3  # how often what a lost job left over is submitted again


@dataclass(frozen=True)
class Request:
    """What to collect, in plain values that any process can open again.

    Attributes:
        model, device, dtype, revision, n_devices, device_map: As for `load_model`.
        emotions: Name or folder of a set, or None for the texts of a file.
        texts: A file of texts with labels (see `corpus.open_corpus`), or None.
        column: Of the file: where the text is.
        hook_point, layers, batching, long, skip: As for `collect`; `skip` of `mean_over_tokens`.

    Example:
        >>> from emolens.collect import Request
        >>> Request("smollm2-135m-instruct", texts="letters.csv", layers=(18,)).batching
        Batching(tokens=None, texts=None, shard=None)
    """

    model: str
    emotions: str | None = None
    texts: str | None = None
    column: str = "text"
    hook_point: AnyPoint = "resid_post"
    layers: tuple[int, ...] | None = None
    skip: int = 50
    long: Long = "raise"
    batching: Batching = field(default_factory=Batching)
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    n_devices: int = 1
    device_map: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batching, dict):  # of a request that came as plain values
            object.__setattr__(self, "batching", Batching(**self.batching))

    def open_texts(self) -> Corpus:
        """Open the set or the file.

        Returns:
            `Corpus`, which can be read any number of times.

        Raises:
            ValueError: both or neither were given; a file of a kind that is not read.
            FileNotFoundError: it is not there.

        Example:
            >>> from emolens.collect import Request
            >>> Request("smollm2-135m-instruct", emotions="basic6").open_texts().has_neutral
            True
        """
        if (self.emotions is None) == (self.texts is None):
            raise ValueError("give a set or a file of texts, one of the two")
        if self.emotions is not None:
            return open_corpus(load_emotion_set(self.emotions))
        return open_corpus(Path(str(self.texts)), column=self.column)

    def open_model(self, device: str | None = None) -> HookedModel:
        """Load the model.

        Args:
            device: Where to, if the request names no device of its own; None chooses as `load_model` does.

        Returns:
            The model.

        Example:
            >>> from emolens.collect import Request
            >>> Request("no-such-model").open_model("cpu")
            Traceback (most recent call last):
            ValueError: ...
        """
        return load_model(
            self.model,
            device=self.device or device,
            dtype=self.dtype,
            revision=self.revision,
            n_devices=self.n_devices,
            device_map=self.device_map,
        )

    @property
    def options(self) -> Options:
        """For `open_job`, `survey` and `joined`."""
        return {
            "layers": self.layers,
            "pooling": mean_over_tokens(skip=self.skip),
            "batching": self.batching,
            "long": self.long,
        }

    def gpus(self, found: bool) -> int:
        """How many GPUs one worker needs; with a `device_map`, `n_devices` says how many.

        Args:
            found: Whether there are any where it runs.

        Returns:
            Their number; 0 on a CPU.

        Example:
            >>> from emolens.collect import Request
            >>> Request("smollm2-135m-instruct", n_devices=2).gpus(found=True)
            2
            >>> Request("smollm2-135m-instruct", device="cpu").gpus(found=True)
            0
        """
        on_gpu = found if self.device is None else torch.device(self.device).type == "cuda"
        return self.n_devices if on_gpu else 0


def collect_on(
    engine: Engine,
    request: Request,
    folder: str | Path,
    *,
    workers: int = 1,
    slurm: dict[str, Any] | None = None,
    before: Check | None = None,
    progress: bool | None = None,
) -> Collection | None:
    """Collect into a folder on an engine.

    Args:
        engine: "local" (and data parallel where a launcher started several ranks), "ray" or "slurm".
        request: What to collect.
        folder: Where to.
        workers: Actors or jobs; the ranks of a launcher are counted by the launcher.
        slurm: Parameters for submitit's executor, such as `{"slurm_partition": "gpu", "timeout_min": 600}`; "cluster" picks the
            executor ("local" runs the jobs here).
        before: Called with the manifest before the first pass, to refuse the run.
        progress: Show a bar, where the work is done in this process.

    Returns:
        `Collection`, on the one process that should go on; None on the other ranks of a launcher.

    Raises:
        ModuleNotFoundError: the extra of the engine is not installed.
        RuntimeError: shards are missing because workers died; the same call continues.
        As `collect_to`.

    Example:
        >>> from emolens.collect import Request, collect_on
        >>> collect_on("local", Request("a-model"), "folder", workers=0)
        Traceback (most recent call last):
        ValueError: workers=0; at least 1
    """
    workers = whole_number("workers", workers)
    request.open_texts()  # before anything starts: a wrong name should not cost a queue
    folder = vacant_folder(folder).absolute()
    if engine == "local":
        return _local(request, folder, before, progress)
    run = {"ray": _on_ray, "slurm": _on_slurm}.get(engine)
    if run is None:
        raise ValueError(f"engine={engine!r}; allowed: local, ray, slurm")
    return run(request, folder, workers, slurm or {}, before or (lambda manifest: None))


def _local(
    request: Request, folder: Path, before: Check | None, progress: bool | None
) -> Collection | None:
    texts = request.open_texts()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        asked = (folder, request.open_model(), texts, request.hook_point, request.options)
        with open_job(*asked, before=before) as job:
            job.run(job.folder.missing(), progress=progress)
            return job.result()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # ranks end when their shards do: far apart, but a rank that died ends all of them through the launcher
    ours = not torch.distributed.is_initialized()
    state = PartialState(
        cpu=request.gpus(torch.cuda.is_available()) == 0, timeout=timedelta(days=30)
    )
    model = request.open_model(str(state.device))
    asked = (folder, model, texts, request.hook_point, request.options)

    def first(act: Callable[[], Any]) -> Any:
        """Let the first rank act; every rank gets its result, or raises its error."""
        said: list[Any] = [None, None]
        if state.is_main_process:
            try:
                said[0] = act()
            except Exception as error:
                said[1] = error
        broadcast_object_list(said)
        if said[1] is not None:
            raise said[1]
        return said[0]

    holding: Any = None

    def begin() -> list[int]:
        nonlocal holding
        holding = open_job(*asked, before=before)
        return holding.__enter__().folder.missing()

    try:
        missing = first(begin)
        mine = missing[state.process_index :: state.num_processes]
        job = joined(*asked)
        job.run(mine, progress=progress if state.is_main_process else False)
        state.wait_for_everyone()
        return job.result() if state.is_main_process else None
    finally:
        if holding is not None:
            holding.__exit__(None, None, None)
        if ours:  # and leave no state that says there is one
            state.destroy_process_group()
            PartialState._reset_state()


def _opened(request: dict[str, Any], folder: str) -> Job:
    r = Request(**request)
    return joined(folder, r.open_model(), r.open_texts(), r.hook_point, r.options)


def _survey(request: dict[str, Any], folder: str) -> dict[str, Any]:
    """On a worker: the machine that starts the run may be too small for the model."""
    r = Request(**request)
    return survey(folder, r.open_model(), r.open_texts(), r.hook_point, r.options)


def _make(request: dict[str, Any], folder: str, numbers: Sequence[int]) -> int:
    _opened(request, folder).run(numbers, progress=False)
    return len(numbers)


class _Actor:
    """Opens the model once and makes a shard at a time."""

    def __init__(self, request: dict[str, Any], folder: str) -> None:
        self.job = _opened(request, folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.job.run([int(k) for k in batch["number"]], progress=False)
        return batch


def _on_ray(
    request: Request, folder: Path, workers: int, _: dict[str, Any], before: Check
) -> Collection:
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "engine 'ray' needs an extra: pip install 'emolens[ray]'"
        ) from error

    plain = asdict(request)
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = request.gpus(ray.cluster_resources().get("GPU", 0) > 0)
    manifest = ray.get(ray.remote(_survey).options(num_gpus=gpus).remote(plain, str(folder)))
    with lock_folder(folder, manifest, before) as mine:
        missing = mine.missing()
        if missing:
            numbers = [{"number": k} for k in missing]
            ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
                _Actor,
                fn_constructor_args=(plain, str(folder)),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
                num_gpus=gpus,
            ).materialize()
        return _finished(mine.missing(), folder)


def _on_slurm(
    request: Request, folder: Path, workers: int, parameters: dict[str, Any], before: Check
) -> Collection:
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "engine 'slurm' needs an extra: pip install 'emolens[slurm]'"
        ) from error

    plain = asdict(request)
    logs = folder.with_name(f"{folder.name}.logs")
    executor = submitit.AutoExecutor(folder=logs, cluster=parameters.get("cluster"))
    given = {k: v for k, v in parameters.items() if k != "cluster"}
    if request.device is None and executor.cluster == "slurm" and not torch.cuda.is_available():
        raise ValueError(
            "this machine has no GPU, so what the jobs' machines have is not known: say --device cuda or --device cpu"
        )
    gpus = request.gpus(torch.cuda.is_available())
    executor.update_parameters(
        **({"gpus_per_node": gpus, "timeout_min": 24 * 60, "name": "emolens"} | given)
    )
    try:
        manifest = executor.submit(_survey, plain, str(folder)).result()
    except FailedJobError as error:
        raise RuntimeError(
            f"a job failed, what is done stays: {_last_of_trace(str(error))}"
        ) from error
    with lock_folder(folder, manifest, before) as mine:
        missing = mine.missing()
        errors: list[Any] = []
        for _ in range(ROUNDS):
            shares = [missing[k::workers] for k in range(min(workers, len(missing)))]
            jobs = [executor.submit(_make, plain, str(folder), share) for share in shares]
            errors = [error for job in jobs if (error := job.exception()) is not None]
            for error in errors:
                if isinstance(error, FailedJobError):  # it raised: it would again
                    raise RuntimeError(
                        f"a job failed, what is done stays: {_last_of_trace(str(error))}"
                    ) from error
            missing = mine.missing()
            if not missing:
                break
        return _finished(missing, folder, errors)


def _last_of_trace(said: str) -> str:
    """The exception's own words in submitit's message, which puts the trace between two rules."""
    trace = said.split("-" * 22)[1].strip() if said.count("-" * 22) >= 2 else said.strip()
    return trace.splitlines()[-1]


def _finished(missing: list[int], folder: Path, errors: Sequence[BaseException] = ()) -> Collection:
    if missing:
        last = f" ({str(errors[-1]).strip().splitlines()[-1]})" if errors else ""
        raise RuntimeError(
            f"{folder}: {len(missing)} shards are missing, their workers were lost{last}; the same command continues"
        )
    return Collection.open(folder)

"""`emolens extract` and `emolens plan`: directions without a study, and what a run will take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer import Option

from emolens.cli import options

METHODS = ("mean_difference", "antonym_contrast", "pca", "lda", "logistic")


def extract(
    model: options.Model = options.DEFAULT_MODEL,
    set: Annotated[
        str | None,
        Option(
            "--set", "-s", help="Shipped set (core is the default), or a folder with a set.yaml."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        Option(
            help='Instead of a set: a file of texts with their emotion and topic, .jsonl ({"text": ..., "emotion": ..., "topic": ...} a line) or .csv (columns of these names); also .gz.'
        ),
    ] = None,
    column: options.Column = "text",
    out: Annotated[Path, Option("--out", "-o", help="File for the directions.")] = Path(
        "vectors.safetensors"
    ),
    shards: Annotated[
        Path | None,
        Option(
            help="Folder for the pooled rows, to keep; without it they are beside OUT until the run is done."
        ),
    ] = None,
    method: Annotated[
        str, Option(help=f"{', '.join(METHODS[:-1])} or {METHODS[-1]}.")
    ] = "mean_difference",
    remove_neutral: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            help="Share of what neutral texts vary in to take out; 0 takes out nothing. The default is .5 for a set, 0 for a file, and 0 for lda and logistic.",
        ),
    ] = None,
    hook_point: Annotated[
        str, Option(help="embed, resid_pre, resid_mid, resid_post, attn_out or mlp_out.")
    ] = "resid_post",
    layers: options.Layers = None,
    engine: Annotated[
        str, Option(help="local (also under accelerate launch or torchrun), ray or slurm.")
    ] = "local",
    workers: Annotated[int, Option(min=1, help="Actors of ray, or jobs of slurm.")] = 1,
    slurm: Annotated[
        list[str] | None,
        Option(help="For submitit, such as slurm_partition=gpu; once for each parameter."),
    ] = None,
    batch_tokens: Annotated[
        int | None, Option(min=1, help="Tokens of a batch; the default fits free memory.")
    ] = None,
    shard_texts: Annotated[
        int | None,
        Option(
            min=1,
            help="Texts of a shard, which is what a killed run can lose; the default is 128 on a CPU, 512 on a GPU.",
        ),
    ] = None,
    long: options.Long = "raise",
    overwrite: options.Overwrite = False,
    n_devices: Annotated[
        int, Option(min=1, help="Spread the blocks of one model over so many devices.")
    ] = 1,
    device_map: Annotated[
        str | None, Option(help="accelerate's placement, for the bridge backend.")
    ] = None,
    seed: options.NoSeed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
) -> None:
    """Compute directions and save them, without a study. A run that was stopped continues with the same command.

    Example: emolens extract --model qwen2.5-0.5b --set core --layers 12,16 --out qwen.safetensors

    On several devices: accelerate launch -m emolens extract --model llama-3-8b --set core
    """
    del seed  # the estimators draw nothing; the option is there so that every command takes it
    from emolens import directions
    from emolens._typing import HookPoint
    from emolens.collect.collection import Collection
    from emolens.collect.engines import Request, collect_on
    from emolens.collect.recipe import Batching
    from emolens.sets.corpus import Long
    from emolens.shards import vacant, vacant_folder

    options.one_of("--method", method, METHODS)
    point = options.one_of("--hook-point", hook_point, get_args(HookPoint))
    if set is not None and texts is not None:
        raise ValueError("--set and --texts: give one of the two")
    policy = options.one_of("--long", long, get_args(Long))
    estimate = getattr(directions, method)
    takes = get_type_hints(estimate)  # what an estimator can take is in its signature
    takes_out = "remove_neutral" in takes
    if remove_neutral and not takes_out:
        raise ValueError(
            f"--remove-neutral {remove_neutral}: {method} takes nothing out; leave it away, or choose another method"
        )
    if remove_neutral == 1:
        raise ValueError(
            "--remove-neutral 1 would leave nothing; give a share below 1, such as 0.5"
        )
    if remove_neutral is None:
        remove_neutral = 0.5 if texts is None and takes_out else 0
    request = Request(
        model, None if texts is not None else set or "core", None if texts is None else str(texts), column, point,
        layers=options.block_numbers(layers), batching=Batching(batch_tokens, shard=shard_texts), long=policy,
        device=device, dtype=dtype, revision=revision, n_devices=n_devices, device_map=device_map,
    )  # fmt: skip
    parameters = dict(map(_parameter, slurm or ()))
    asked = _Asked(request, method, remove_neutral, shards)
    vacant(out, asked.other, overwrite=overwrite)
    folder = vacant_folder(shards or out.with_name(f"{out.name}.shards"))

    def before(manifest: dict[str, Any]) -> None:
        vacant(out, lambda file: asked.other(file, manifest), overwrite=overwrite)

    where: Any = engine  # checked there
    collection = collect_on(
        where, request, folder, workers=workers, slurm=parameters, before=before
    )
    if collection is None:  # a rank that is not the first
        return
    by_shard = Collection in get_args(takes["acts"])
    taken_out = {"remove_neutral": remove_neutral or None} if takes_out else {}
    v = estimate(collection if by_shard else collection.load(), **taken_out)
    v.save(out, overwrite=True)  # what may be replaced was asked before the first text was read
    typer.echo(f"{out}: {v!r}")
    if n := v.info["truncated_texts"]:
        typer.echo(f"{n} texts were longer than the model reads, cut")
    if n := v.info["dropped_texts"]:
        typer.echo(f"{n} texts were left out")
    if v.calibration is None:
        typer.echo(
            "these directions steer, but score cannot use them: that needs at least two topics"
        )
    elif not v.calibration.band.isfinite().any():
        typer.echo("score will call no text 'none': that needs 20 neutral texts")
    if shards is None:
        shutil.rmtree(folder)
    else:
        typer.echo(f"{folder}: {collection!r}")


def plan(
    model: options.Model = options.DEFAULT_MODEL,
    set: options.Set = "core",
    stories_per_emotion: Annotated[
        int | None,
        Option(min=1, help="Of the run that is planned; the default is what the set has."),
    ] = None,
    devices: Annotated[int, Option(min=1, help="How many of the device.")] = 1,
    device_name: Annotated[
        str | None,
        Option(
            help="h200, h100, a100, l40s, rtx4090 or v100; without it, the speed is measured here."
        ),
    ] = None,
    layers: options.Layers = None,
    seed: options.NoSeed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
) -> None:
    """Estimate what extract will take: tokens, operations, memory, hours, disk.

    Example: emolens plan --model llama-3-8b --set core --stories-per-emotion 1200 --devices 8 --device-name h100
    """
    del seed  # nothing is drawn
    from emolens.collect import planning
    from emolens.models.loading import load_model
    from emolens.sets import load_emotion_set

    emotions, chosen = load_emotion_set(set), options.block_numbers(layers)
    asked: dict[str, Any] = {
        "stories_per_emotion": stories_per_emotion,
        "layers": chosen,
        "devices": devices,
    }
    if device_name is not None:
        given = {"--device": device, "--dtype": dtype, "--revision": revision}
        if ignored := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{ignored[0]}: with --device-name the model is not opened; leave one of the two away"
            )
        typer.echo(str(planning.plan_named(model, emotions, device_name, **asked)))
        return
    try:
        loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    except (OSError, MemoryError) as error:
        raise type(error)(
            f"{error}; or name the device, with --device-name h100, to plan without measuring"
        ) from error
    typer.echo(str(planning.plan_measured(loaded, emotions, **asked)))


def _parameter(given: str) -> tuple[str, Any]:
    key, equals, value = given.partition("=")
    if not key or not equals:
        raise ValueError(
            f"--slurm {given}; give KEY=VALUE, such as slurm_partition=gpu or timeout_min=600"
        )
    return key, int(value) if value.isdigit() else value


@dataclass(frozen=True)
class _Asked:
    """What `extract` was asked for; made only if directions can come of it."""

    request: Any  # engines.Request
    method: str
    share: float
    shards: Path | None

    def __post_init__(self) -> None:
        """Read the texts through once, so that nothing is collected in vain."""
        corpus = self.request.open_texts()
        labels = [label for _, label in corpus.read()]
        named = corpus.info["set"]
        what = f"set {named!r}" if named else f"{self.request.texts}"
        main = {x["emotion"] for x in labels if x["split"] == "main"}
        names = sorted(main - {None})
        if len(names) < 2:
            labelled = any(x["emotion"] for x in labels)
            splits = sorted({x["split"] or "none" for x in labels})
            raise ValueError(
                f"{what}: directions need texts of at least two emotions (split main), found {', '.join(names) or 'none'} in {len(labels)} texts "
                f"(splits: {', '.join(splits) or 'none'})"
                + ("" if named or labelled else "; a file names them in a column 'emotion'")
            )
        if self.share and not (corpus.has_neutral and any(x["split"] == "neutral" for x in labels)):
            raise ValueError(
                f"{what} has no neutral texts, and what they vary in was to be taken out: add neutral texts, or give --remove-neutral 0"
                if corpus.has_neutral
                else f"{what}: what neutral texts vary in was to be taken out, and only those of a set (--set) are kept for that; "
                "give --remove-neutral 0"
            )
        if self.method == "antonym_contrast" and not corpus.info["antonyms"]:
            raise ValueError(
                f"{what} names no antonyms, which antonym_contrast needs; choose another --method"
            )

    def other(self, file: Path, manifest: dict[str, Any] | None = None) -> str | None:
        """What the file holds, if it is not what was asked for; `manifest`, once the model is open, has its weights too."""
        from emolens.collect.activations import text_hash
        from emolens.directions.value import load_directions

        try:
            v = load_directions(file)
        except ValueError:
            return "something that is no directions of emolens"
        r, info, model = self.request, v.info, v.info["model"]
        texts = {text_hash(text) for text, _ in r.open_texts().read() if isinstance(text, str)}
        read = set(info["training_texts"])
        made = v.hook_point, info["method"], info["remove_neutral"]
        same = (
            model["name"] in options.names_of(r.model)
            and (r.dtype is None or model["dtype"] == r.dtype.removeprefix("torch."))
            and (r.revision is None or model["revision"] == r.revision)
            and made == (r.hook_point, self.method, self.share or None)
            # a folder that was begun says it itself
            and (r.layers is None or v.layers == r.layers or self.shards is not None)
            and (read < texts if r.long == "skip" else read == texts)
        )
        if same and manifest is not None:
            now = manifest["model"]
            same = all(model[k] == now[k] for k in ("fingerprint", "process_weights", "dtype"))
            same = same and list(v.layers) == list(manifest["options"]["layers"])
        return None if same else f"other directions ({v.origin})"

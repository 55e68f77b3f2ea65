"""The command line. Heavy imports happen inside the commands, so that help answers at once.

Exit codes: 0 done; 1 a check found violations; 2 the request was wrong (unknown name, bad file, wrong option); 3 the machine or the
network said no (memory, disk, hub); 130 interrupted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find, read and test emotion directions in language models.\n\nStart with: emolens study --model smollm2-135m-instruct-q4 --set core",
)
sets = typer.Typer(no_args_is_help=True, help="Look at emotion sets and check them.")
app.add_typer(sets, name="sets")

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Short name (see `emolens models`), hub name, directory or .gguf file.",
    ),
]
Set = Annotated[
    str,
    typer.Option(
        "--set",
        "-s",
        help="Shipped set, or a folder with a set.yaml; several with a plus: core2+core.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of folds, resamples and random directions.")]
SampleSeed = Annotated[int, typer.Option(help="Seed of what is sampled, and of random directions.")]
NoSeed = Annotated[
    int, typer.Option(help="Nothing is drawn here; it is there so that every command takes it.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the default is a GPU if there is one.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float64, bfloat16 or float16; the default is float32 on a CPU, the checkpoint's own on a GPU."
    ),
]
SameDtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float64, bfloat16 or float16; the default is the one that the directions were made in."
    ),
]
Layer = Annotated[
    int | None,
    typer.Option(
        help="Block, counted from 0; the default is the directions' own: the one that study froze, two thirds of the depth from extract."
    ),
]
Twin = Annotated[
    bool,
    typer.Option(
        "--allow-other-model",
        help="Accept other weights of the same width and tokenizer, such as the base model of an instruct model.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there, if it is something else.")
]
Long = Annotated[
    str,
    typer.Option(
        help="A text of more tokens than the model reads: raise (before any is read), truncate or skip."
    ),
]
Column = Annotated[str, typer.Option(help="Of a .csv, .tsv or .jsonl file: where the text is.")]
Revision = Annotated[
    str | None, typer.Option(help="Hub revision, or a Pythia step such as step3000.")
]
SameRevision = Annotated[
    str | None,
    typer.Option(
        help="Hub revision, or a Pythia step; the default is the one that the directions were made with."
    ),
]


@app.command()
def study(
    model: Model = "smollm2-135m-instruct-q4",
    set: Set = "core",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for vectors, results and report.")
    ] = Path("study"),
    external: Annotated[
        Path | None,
        typer.Option(
            help="Folder with goemotions_test.tsv, emobank.csv or both; without it, nothing is read across to other people's text."
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="More permutations, every layer, all external texts.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another study in the folder.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Run the whole protocol and write a report.

    Example: emolens study --model pythia-160m --set core --out study-pythia
    """
    from rich.console import Console

    console = Console()
    console.print("loading ...", style="dim")
    from emolens.experiments.transfer import load_external
    from emolens.models.loading import load_model
    from emolens.models.placement import check_device
    from emolens.sets.emotion_sets import load_emotion_set
    from emolens.study import check_request, run_study

    emotions = load_emotion_set(
        set
    )  # before the model: a wrong name should not take half a minute to say
    if external is not None:
        load_external(external)
    check_device(device)
    check_request(emotions, out, seed)
    command = "emolens " + " ".join(a if " " not in a else repr(a) for a in _shown(sys.argv[1:]))
    result = run_study(
        load_model(model, device=device, dtype=dtype, revision=revision),
        emotions,
        out=out,
        seed=seed,
        full=full,
        external=external,
        overwrite=overwrite,
        command=command,
        say=lambda line: console.print(line, highlight=False, markup=False),
    )
    from rich.table import Table

    table = Table(
        "experiment", "primary row", "value [95 %]", "control", box=None, header_style="bold"
    )
    for r in result.primary():
        interval = (
            f" [{r.low:.2f}, {r.high:.2f}]" if r.low is not None and r.high is not None else ""
        )
        table.add_row(r.experiment, r.metric, f"{r.value:.3f}{interval}", r.control or "")
    console.print(table)


@app.command()
def extract(
    model: Model = "smollm2-135m-instruct-q4",
    set: Annotated[
        str | None,
        typer.Option(
            "--set", "-s", help="Shipped set (core is the default), or a folder with a set.yaml."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help='Instead of a set: a file of texts with their emotion and topic, .jsonl ({"text": ..., "emotion": ..., "topic": ...} a line) or .csv (columns of these names); also .gz.'
        ),
    ] = None,
    column: Column = "text",
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the directions.")] = Path(
        "vectors.safetensors"
    ),
    shards: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pooled rows, to keep; without it they are beside OUT until the run is done."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="mean_difference, antonym_contrast, pca, lda or logistic.")
    ] = "mean_difference",
    remove_neutral: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of what neutral texts vary in to take out; 0 takes out nothing. The default is .5 for a set, 0 for a file, and 0 for lda and logistic.",
        ),
    ] = None,
    hook_point: Annotated[
        str, typer.Option(help="embed, resid_pre, resid_mid, resid_post, attn_out or mlp_out.")
    ] = "resid_post",
    layers: Annotated[
        str | None,
        typer.Option(help="Blocks, counted from 0, such as 10,15,20; the default is all."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local (also under accelerate launch or torchrun), ray or slurm.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Actors of ray, or jobs of slurm.")] = 1,
    slurm: Annotated[
        list[str] | None,
        typer.Option(help="For submitit, such as slurm_partition=gpu; once for each parameter."),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a batch; the default fits free memory.")
    ] = None,
    shard_texts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Texts of a shard, which is what a killed run can lose; the default is 128 on a CPU, 512 on a GPU.",
        ),
    ] = None,
    long: Long = "raise",
    overwrite: Overwrite = False,
    n_devices: Annotated[
        int, typer.Option(min=1, help="Spread the blocks of one model over so many devices.")
    ] = 1,
    device_map: Annotated[
        str | None, typer.Option(help="accelerate's placement, for the bridge backend.")
    ] = None,
    seed: NoSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Compute directions and save them, without a study. A run that was stopped continues with the same command.

    Example: emolens extract --model qwen2.5-0.5b --set core --layers 12,16 --out qwen.safetensors

    On several devices: accelerate launch -m emolens extract --model llama-3-8b --set core
    """
    del seed  # the estimators draw nothing; the option is there so that every command takes it
    import shutil
    from typing import get_args

    from emolens import directions
    from emolens._typing import HookPoint
    from emolens.collect.engines import Request, collect_on
    from emolens.shards import vacant, vacant_folder

    methods = ("mean_difference", "antonym_contrast", "pca", "lda", "logistic")
    if method not in methods:
        raise ValueError(f"--method {method}; allowed: {', '.join(methods)}")
    if hook_point not in get_args(HookPoint):
        raise ValueError(f"--hook-point {hook_point}; allowed: {', '.join(get_args(HookPoint))}")
    if set is not None and texts is not None:
        raise ValueError("--set and --texts: give one of the two")
    _check_long(long)
    by_weights = method in ("lda", "logistic")
    if by_weights and remove_neutral:
        raise ValueError(
            f"--remove-neutral {remove_neutral}: {method} takes nothing out; leave it away, or choose another method"
        )
    if remove_neutral == 1:
        raise ValueError(
            "--remove-neutral 1 would leave nothing; give a share below 1, such as 0.5"
        )
    share = (
        remove_neutral
        if remove_neutral is not None
        else 0.5
        if texts is None and not by_weights
        else 0
    )
    request = Request(
        model,
        emotions=None if texts is not None else set or "core",
        texts=None if texts is None else str(texts),
        column=column,
        hook_point=hook_point,  # type: ignore[arg-type]  # checked above
        layers=_layers(layers),
        batch_tokens=batch_tokens,
        shard_texts=shard_texts,
        long=long,  # type: ignore[arg-type]  # as above
        device=device,
        dtype=dtype,
        revision=revision,
        n_devices=n_devices,
        device_map=device_map,
    )
    parameters = dict(_parameter(p) for p in slurm or ())
    asked = _Asked(request, method, share, shards)
    vacant(out, asked.other, overwrite=overwrite)
    folder = vacant_folder(shards or out.with_name(f"{out.name}.shards"))
    collection = collect_on(
        engine,  # type: ignore[arg-type]  # checked there
        request,
        folder,
        workers=workers,
        slurm=parameters,
        before=lambda manifest: (
            vacant(out, lambda file: asked.other(file, manifest), overwrite=overwrite) and None
        ),
    )
    if collection is None:  # a rank that is not the first
        return
    by_means = method in ("mean_difference", "antonym_contrast")
    acts: Any = collection if by_means else collection.load()
    v = getattr(directions, method)(
        acts, **({} if by_weights else {"remove_neutral": share or None})
    )
    v.save(out, overwrite=True)  # what may be replaced was asked before the first text was read
    typer.echo(f"{out}: {v!r}")
    for what, n in (
        ("longer than the model reads, cut", v.info["truncated_texts"]),
        ("left out", v.info["dropped_texts"]),
    ):
        if n:
            typer.echo(f"{n} texts were {what}")
    if v.calibration is None or not v.calibration.band.isfinite().any():
        typer.echo(
            "these directions steer, but score cannot use them: that needs at least two topics, and 20 neutral texts to know what 'none' is"
        )
    if shards is None:
        shutil.rmtree(folder)
    else:
        typer.echo(f"{folder}: {collection!r}")


@app.command()
def plan(
    model: Model = "smollm2-135m-instruct-q4",
    set: Set = "core",
    stories_per_emotion: Annotated[
        int | None,
        typer.Option(min=1, help="Of the run that is planned; the default is what the set has."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many of the device.")] = 1,
    device_name: Annotated[
        str | None,
        typer.Option(
            help="h200, h100, a100, l40s, rtx4090 or v100; without it, the speed is measured here."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Blocks, counted from 0, such as 10,15,20; the default is all."),
    ] = None,
    seed: NoSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Estimate what extract will take: tokens, operations, memory, hours, disk.

    Example: emolens plan --model llama-3-8b --set core --stories-per-emotion 1200 --devices 8 --device-name h100
    """
    del seed  # nothing is drawn
    from emolens.collect import planning
    from emolens.models.loading import load_model
    from emolens.sets.emotion_sets import load_emotion_set

    emotions, chosen = load_emotion_set(set), _layers(layers)
    options: dict[str, Any] = {
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
        typer.echo(str(planning.plan_named(model, emotions, device_name, **options)))
        return
    try:
        loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    except (OSError, MemoryError) as error:
        raise type(error)(
            f"{error}; or name the device, with --device-name h100, to plan without measuring"
        ) from error
    typer.echo(str(planning.plan_measured(loaded, emotions, **options)))


@app.command()
def score(
    texts: Annotated[
        list[str],
        typer.Argument(
            help="Texts to read, or files of them: .txt (a text a line), .csv, .tsv or .jsonl (see --column), also .gz; - reads lines from standard input."
        ),
    ],
    vectors: Annotated[
        Path, typer.Option("--vectors", "-v", help="Directions, as written by study or extract.")
    ] = Path("study/vectors.safetensors"),
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The default is the model they were made with."),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Score every token.")] = False,
    layer: Layer = None,
    html: Annotated[Path | None, typer.Option(help="Write the coloured view to this file.")] = None,
    column: Column = "text",
    long: Long = "raise",
    overwrite: Overwrite = False,
    allow_other_model: Twin = False,
    seed: NoSeed = 0,
    device: Device = None,
    dtype: SameDtype = None,
    revision: SameRevision = None,
) -> None:
    """Read emotions from text with saved directions.

    Example: emolens score --vectors study/vectors.safetensors "She read the letter twice and sat down on the stairs."

    A file: emolens score comments.csv --column comment > scores.txt
    """
    del seed  # nothing is drawn
    from emolens.directions.value import load_directions
    from emolens.models.loading import load_model
    from emolens.readout import score as read
    from emolens.readout import vacant_page, write_page
    from emolens.sets.corpus import Corpus

    _check_long(long)
    if html is not None:
        vacant_page(html, overwrite=overwrite)
    given = _texts(texts, column)
    v = load_directions(vectors)
    v.slot(layer)
    v.scale("token" if tokens else "text")
    name, dtype, revision = _made_with(v.info["model"], model, dtype, revision)
    loaded = load_model(name, device=device, dtype=dtype, revision=revision)
    scores = read(
        loaded,
        v,
        Corpus(lambda: iter(given), {}, False),
        per="token" if tokens else "text",
        layer=layer,
        long=long,  # type: ignore[arg-type]  # checked above
        allow_other_model=allow_other_model,
    )
    typer.echo(scores.table())
    if html is not None:
        write_page(html, scores.to_html(), overwrite=overwrite)
        typer.echo(f"wrote {html}")


@app.command()
def steer(
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    emotion: Annotated[str, typer.Option("--emotion", "-e", help="Whose direction.")],
    vectors: Annotated[
        Path, typer.Option("--vectors", "-v", help="Directions, as written by study or extract.")
    ] = Path("study/vectors.safetensors"),
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The default is the model they were made with."),
    ] = None,
    layer: Layer = None,
    dose: Annotated[
        float,
        typer.Option(
            help="In median residual norms: what add adds, and what clamp sets. rotate turns by its arc tangent; ablate has none."
        ),
    ] = 0.1,
    method: Annotated[str, typer.Option(help="add, ablate, clamp or rotate.")] = "add",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to write for each prompt, at most.")
    ] = 40,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End at this string, or special token, too; may be given several times."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; above, samples.")
    ] = 0.0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the steered text as it is written.")
    ] = False,
    allow_other_model: Twin = False,
    seed: SampleSeed = 0,
    device: Device = None,
    dtype: SameDtype = None,
    revision: SameRevision = None,
) -> None:
    """Continue prompts as they are, steered, and steered along a random direction, side by side.

    Example: emolens steer --vectors study/vectors.safetensors --emotion joy --dose 0.1 "I opened the door and"
    """
    import math

    from emolens import interventions
    from emolens.directions.controls import random_directions
    from emolens.directions.value import load_directions
    from emolens.interventions.generate import Decoding, generate
    from emolens.models.loading import load_model
    from emolens.sets.corpus import names_a_file, several

    if method not in ("add", "ablate", "clamp", "rotate"):
        raise ValueError(f"--method {method}; allowed: add, ablate, clamp, rotate")
    if not math.isfinite(dose):
        raise ValueError(f"--dose {dose}; give a finite number of median norms, such as 0.1")
    if not math.isfinite(temperature):
        raise ValueError(f"--temperature {temperature}; give a finite number, 0 or more")
    several(prompts)  # none is empty
    for prompt in prompts:
        if (kind := names_a_file(prompt)) is not None:
            raise ValueError(
                f"{prompt!r} is the name of a {kind}, and steer continues texts: give the text that is in it (a text that looks like a name: "
                "em.generate takes it in a list)"
            )
    v = load_directions(vectors)
    at = v.layers[v.slot(layer)]
    verb = getattr(interventions, f"{'steer' if method == 'add' else method}_{v.hook_point}")
    amount = {
        "add": {"dose": dose},
        "ablate": {},
        "clamp": {"value": dose},
        "rotate": {"angle": _degrees(dose)},
    }[method]
    runs = {
        "baseline": None,
        f"{method} {emotion}": verb(v[emotion], layer=at, **amount),
        f"{method} random": verb(random_directions(v, 1, seed=seed), layer=at, **amount),
    }
    name, dtype, revision = _made_with(v.info["model"], model, dtype, revision)
    loaded = load_model(name, device=device, dtype=dtype, revision=revision)
    read = v if v.calibration is not None and v.calibration.token_mean.isfinite().any() else None
    written = {}
    for title, hooks in runs.items():
        shown = watch and title == f"{method} {emotion}"
        written[title] = generate(
            loaded,
            prompts,
            hooks,
            decoding=Decoding(max_new_tokens, temperature, seed=seed),
            stop=stop or (),
            read=read,
            layer=at,
            watch=shown,
            allow_other_model=allow_other_model,
        )
        if shown:
            typer.echo(err=True)
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for i, prompt in enumerate(prompts):
        console.print(Text(prompt, style="bold"))
        cells = []
        for made in written.values():
            top = made.mood(i) if read is not None and made.tokens[i] else ""
            cells.append(Group(Text(made.texts[i].strip()), Text(top, style="dim")))
        if console.width < 100:
            for title, cell in zip(written, cells, strict=True):
                console.print(Text(title, style="underline"), cell)
        else:
            table = Table(expand=True)
            for title in written:
                table.add_column(Text(title), ratio=1)
            table.add_row(*cells)
            console.print(table)
    note = f"layer {at}" + ("" if method == "ablate" else f", dose {dose:g}")
    if read is not None:
        note += "; emotions: mean z of the new tokens, as the unsteered model reads the text at the same layer"
    console.print(Text(note, style="dim"))


@app.command("write-stories")
def write_stories(
    model: Model = "smollm2-135m-instruct-q4",
    set: Set = "core",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for texts, counts and the set.")
    ] = Path("stories"),
    per_topic: Annotated[
        int, typer.Option(min=1, help="Stories asked for, for each emotion and topic.")
    ] = 1,
    emotions: Annotated[
        str | None,
        typer.Option(help="Some of the set's, such as joy,fear,anger; the default is all."),
    ] = None,
    topics: Annotated[
        str | None,
        typer.Option(help="Some of the set's, such as supper,clinic; the default is all."),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="Least and most words; the default is 60,150, of Chinese and Japanese 100,400 characters."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to write for each story, at most.")
    ] = 220,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; above, samples.")
    ] = 0.9,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the smallest set of tokens with this probability, above 0, at most 1."
        ),
    ] = 0.95,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts at once; a run goes on with the same number only.")
    ] = 16,
    export_prompts: Annotated[
        Path | None,
        typer.Option(help="Write the prompts as JSON lines for another engine, and stop."),
    ] = None,
    import_texts: Annotated[
        Path | None,
        typer.Option(help="Read the texts from JSON lines (id, text) that another engine wrote."),
    ] = None,
    writer: Annotated[
        str | None, typer.Option(help="Who wrote the imported texts, for the set's source.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the file of --export-prompts, if it holds something else."
        ),
    ] = False,
    seed: SampleSeed = 0,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Let a model write the stories of a set, filter them, and make a set of them. The same command goes on after an interruption.

    Exit code 1 if no topic has a usable story of every emotion.

    Example: emolens write-stories --set core --emotions joy,fear,anger --topics supper,clinic --per-topic 8 --out own
    """
    from emolens import stories as generation
    from emolens.interventions.generate import Decoding
    from emolens.models.loading import load_model
    from emolens.models.placement import check_device
    from emolens.sets.emotion_sets import load_emotion_set

    s = load_emotion_set(set)
    lengths = None if length is None else _two_numbers(length)
    if export_prompts is None:
        generation.check_folder(out)
    if export_prompts is None and import_texts is None:
        check_device(device)
    named = [x.split(",") if x else None for x in (emotions, topics)]
    if export_prompts is not None:
        prompts = generation.story_prompts(
            s, per_topic=per_topic, emotions=named[0], topics=named[1]
        )
        generation.export_prompts(prompts, export_prompts, overwrite=overwrite)
        typer.echo(
            f"{export_prompts}: {len(prompts)} prompts; give back lines of id and text with --import-texts"
        )
        return
    if import_texts is not None:
        if not writer:
            raise ValueError(
                "--import-texts needs --writer: who wrote the texts (model, engine, sampling)"
            )
        made = generation.import_texts(import_texts, s, out=out, writer=writer, per_topic=per_topic, emotions=named[0], topics=named[1], lengths=lengths)  # fmt: skip
    else:
        generation.story_prompts(
            s, per_topic=per_topic, emotions=named[0], topics=named[1]
        )  # before the model: a wrong name
        loaded = load_model(model, device=device, dtype=dtype, revision=revision)
        made = generation.write_stories(
            loaded, s, out=out, per_topic=per_topic, emotions=named[0], topics=named[1], lengths=lengths, batch_size=batch_size,
            decoding=Decoding(max_new_tokens, temperature, top_p, seed),
        )  # fmt: skip
    typer.echo(repr(made))
    if made.emotions is None:
        typer.echo(
            "no set: not one topic has a usable story of every emotion (see dropped.jsonl); ask for more with --per-topic"
        )
        raise typer.Exit(1)
    typer.echo(f"{made.folder / 'set'}: {made.emotions!r}")


@app.command()
def languages(
    model: Model = "smollm2-135m-instruct-q4",
    sets: Annotated[
        str,
        typer.Option(
            help="Sets of different languages with the same concepts and topics, with commas between them."
        ),
    ] = "core,core_zh,core_ja,core_de",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all rows to this JSON file.")
    ] = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Read every language with the directions of every other, on topics that none has seen.

    Example: emolens languages --model qwen2.5-0.5b --out languages.json
    """
    import json

    from emolens.experiments.languages import compare_languages
    from emolens.models.identity import model_info
    from emolens.models.loading import load_model
    from emolens.sets.emotion_sets import load_emotion_set
    from emolens.shards import vacant, written_whole

    chosen = [load_emotion_set(name) for name in sets.split(",")]
    prints = {s.name: s.fingerprint for s in chosen}

    def other(file: Path) -> str | None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            name, read = found["model"]["name"], found["sets"]
        except (ValueError, KeyError, TypeError):
            return "something that is no result of this command"
        return (
            None
            if name in _names(model) and read == prints
            else f"the result of {name} on {', '.join(read)}"
        )

    if out is not None:
        vacant(out, other, overwrite=overwrite)
    loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    found = compare_languages(loaded, chosen, seed=seed)
    typer.echo(repr(found))
    if out is not None:
        data = {
            "model": model_info(loaded).to_dict(),
            "sets": prints,
            "layers": found.layers,
            "topics": found.topics,
            "rows": [r.to_dict() for r in found.rows],
        }
        with written_whole(out) as part:
            part.write_text(
                json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
            )
        typer.echo(f"wrote {out}")


@app.command()
def models() -> None:
    """List the models known by a short name, with what they need.

    Example: emolens models
    """
    from rich.console import Console
    from rich.table import Table

    from emolens.models.catalogue import CATALOGUE

    table = Table(box=None, header_style="bold")
    table.add_column("name", no_wrap=True)
    for heading in ("layers", "size", "float32", "bfloat16"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for e in CATALOGUE.values():
        n = (
            f"{e.n_parameters / 1e9:.1f} B"
            if e.n_parameters > 1e9
            else f"{e.n_parameters / 1e6:.0f} M"
        )
        note = "gated" if e.gated else ("in a package" if e.gguf_package else "")
        memory = f"{e.gigabytes(4):.1f} GB", f"{e.gigabytes(2):.1f} GB"
        table.add_row(e.alias, str(e.n_layers), n, *memory, note)
    console = Console()
    console.print(table)
    console.print(
        "Any other Llama-3, Qwen-2.5 or Pythia model loads by its hub name, a directory or a .gguf file.",
        style="dim",
    )


@sets.command("list")
def sets_list() -> None:
    """List the shipped sets.

    Example: emolens sets list
    """
    from emolens.sets.emotion_sets import list_emotion_sets, load_emotion_set

    for name in list_emotion_sets():
        typer.echo(repr(load_emotion_set(name)))


@sets.command("show")
def sets_show(
    name: Annotated[str, typer.Argument(help="Shipped set, or a folder with a set.yaml.")] = "core",
) -> None:
    """Show the emotions of a set and their human norms.

    Example: emolens sets show core
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from emolens.sets.check import coverage
    from emolens.sets.emotion_sets import load_emotion_set
    from emolens.sets.norms import norm_of

    s = load_emotion_set(name)
    console = Console()
    wide = console.width >= 120
    table = Table(box=None, header_style="bold")
    table.add_column("emotion", no_wrap=True)
    for heading in ("family", "antonym", *(("adjective", "target words") if wide else ())):
        table.add_column(heading)
    for heading in ("Glasgow V", "A", "R&M V", "A"):
        table.add_column(heading, justify="right", no_wrap=True)
    for e in s.emotions:
        cells = []
        for source in ("glasgow_2019", "russell_mehrabian_1977"):
            rated, match = norm_of(e, source)
            mark = {"sense": "~", "related": "*"}.get(match or "", "")
            cells += (
                [f"{rated.valence:.1f}{mark}", f"{rated.arousal:.1f}{mark}"]
                if rated
                else ["-", "-"]
            )
        said = (
            e.name,
            e.family,
            e.antonym,
            *((e.adjective, ", ".join(e.target_words)) if wide else ()),
        )
        table.add_row(*(escape(x or "") for x in said), *cells)
    console.print(table)
    for title, text in coverage(s).items():
        console.print(f"{title}: {text}", style="dim", highlight=False)
    console.print(
        "Glasgow: Scott et al. 2019, 1..9; R&M: Russell & Mehrabian 1977, -1..1; V valence, A arousal; ~ one sense of the word; * another form of it; - not rated",
        style="dim",
        highlight=False,
    )


@sets.command("check")
def sets_check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Shipped sets, or folders with a set.yaml; none checks everything shipped."
        ),
    ] = None,
    words: Annotated[
        bool,
        typer.Option(
            "--words/--no-words", help="Also how far words alone go (TF-IDF on held-out topics)."
        ),
    ] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Every text that breaks a rule, not only the first.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Check sets as stimuli, and the shipped materials; exit code 1 if a rule is broken. Several sets stand side by side.

    Example: emolens sets check core core2
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from emolens.sets.check import check_emotion_set, read_across
    from emolens.sets.emotion_sets import load_emotion_set
    from emolens.sets.material_checks import check_shipped

    console = Console(highlight=False)
    if names:
        loaded = {name: load_emotion_set(name) for name in names}
        results = {name: check_emotion_set(s, words=words, seed=seed) for name, s in loaded.items()}
        across = read_across(loaded, seed=seed)
    else:
        results, across = check_shipped(words=words, seed=seed), {}
    for columns in [list(results)] if names else [[name] for name in results]:
        shown = [results[name] for name in columns]
        table = Table(box=None, show_header=False)
        for key in dict.fromkeys(key for result in shown for key in result.numbers):
            table.add_row(key, *(escape(result.numbers.get(key, "")) for result in shown))
        for key, cells in across.items():
            table.add_row(key, *(cells[name] for name in columns))
        for rule in dict.fromkeys(rule for result in shown for rule in result.rules):
            counts = [
                str(len(result.rules[rule])) if rule in result.rules else "not asked"
                for result in shown
            ]
            table.add_row(f"rule: {rule}", *counts)
        console.print("  ".join(columns), style="bold", markup=False, soft_wrap=True)
        console.print(table)
        for name, result in zip(columns, shown, strict=True):
            for rule, found in result.rules.items():
                for k, violation in enumerate(found if verbose else found[:1]):
                    of = f" ({len(found)} such)" if k == 0 and len(found) > 1 else ""
                    console.print(
                        f"violation: {name}: {rule}: {violation}{of}", markup=False, soft_wrap=True
                    )
    broken = sum(len(result.violations) for result in results.values())
    console.print(f"{broken or 'no'} violations in {len(results)} checked", style="bold")
    if broken:
        raise typer.Exit(1)


@sets.command("import")
def sets_import(
    source: Annotated[
        str, typer.Argument(help="A folder; for emotion-probes also the hub's name.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the set.")],
    form: Annotated[
        str, typer.Option("--form", help="emovecllm or emotion-probes.")
    ] = "emotion-probes",
    emotions: Annotated[
        str | None,
        typer.Option(
            help="emotion-probes: some of them, such as joyful,afraid; the default is all."
        ),
    ] = None,
    topics: Annotated[
        int | None,
        typer.Option(min=1, help="emotion-probes: the first so many topics; the default is all."),
    ] = None,
    per_topic: Annotated[
        int, typer.Option(min=1, help="emotion-probes: stories of an emotion in a topic.")
    ] = 1,
) -> None:
    """Make a set of another project's corpus.

    Example: emolens sets import ryancodrai/emotion-probes --emotions joyful,afraid,angry --topics 16 --out probes
    """
    from emolens.sets.emotion_sets import check_vacant, save_emotion_set
    from emolens.sets.published import read_emotion_probes, read_emovecllm

    if form not in ("emovecllm", "emotion-probes"):
        raise ValueError(f"--form {form}; allowed: emovecllm, emotion-probes")
    check_vacant(out)
    if form == "emovecllm":
        s = read_emovecllm(source)
    else:
        s = read_emotion_probes(
            source,
            emotions=emotions.split(",") if emotions else None,
            topics=topics,
            per_topic=per_topic,
        )
    typer.echo(f"{save_emotion_set(s, out)}: {s!r}\n{s.source}")


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
        what = f"set {corpus.info['set']!r}" if corpus.info["set"] else f"{self.request.texts}"
        names = sorted(
            {x["emotion"] for x in labels if x["split"] == "main" and x["emotion"] is not None}
        )
        if len(names) < 2:
            splits = sorted({x["split"] or "none" for x in labels})
            raise ValueError(
                f"{what}: directions need texts of at least two emotions (split main), found {', '.join(names) or 'none'} in {len(labels)} texts "
                f"(splits: {', '.join(splits) or 'none'})"
                + (
                    ""
                    if corpus.info["set"] or any(x["emotion"] for x in labels)
                    else "; a file names them in a column 'emotion'"
                )
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
        same = (
            model["name"] in _names(r.model)
            and (r.dtype is None or model["dtype"] == r.dtype.removeprefix("torch."))
            and (r.revision is None or model["revision"] == r.revision)
            and (v.hook_point, info["method"], info["remove_neutral"])
            == (r.hook_point, self.method, self.share or None)
            and (
                r.layers is None or v.layers == r.layers or self.shards is not None
            )  # a folder that was begun says it itself
            and (read < texts if r.long == "skip" else read == texts)
        )
        if same and manifest is not None:
            now = manifest["model"]
            same = all(model[k] == now[k] for k in ("fingerprint", "process_weights", "dtype"))
            same = same and list(v.layers) == list(manifest["options"]["layers"])
        return None if same else f"other directions ({v.origin})"


def _names(model: str) -> tuple[str, ...]:
    """What files call a model that was asked for so."""
    return model, Path(model).expanduser().resolve().name


def _check_long(long: str) -> None:
    if long not in ("raise", "truncate", "skip"):
        raise ValueError(f"--long {long}; allowed: raise, truncate, skip")


def _texts(arguments: list[str], column: str) -> list[tuple[Any, dict[str, Any]]]:
    """What `score` was given, read: texts as they are, files, lines of standard input; a name that is no file is never taken for a text."""
    import io

    from emolens._files import here
    from emolens.sets.corpus import names_a_file, open_corpus, records

    out: list[tuple[Any, dict[str, Any]]] = []
    files = 0
    for argument in arguments:
        kind = None if argument == "-" else names_a_file(argument)
        if argument == "-":
            raw = (
                sys.stdin.buffer.read()
                if hasattr(sys.stdin, "buffer")
                else sys.stdin.read().encode()
            )
            out += records(io.BytesIO(raw), "standard input", "text", ".txt")
        elif kind is not None:
            path = here(argument)
            if not path.exists():
                raise FileNotFoundError(
                    f"{argument}: no such file (a text that looks like a name: echo ... | emolens score -)"
                )
            out += open_corpus(path, column=column).read()
            files += 1
        else:
            out += open_corpus([argument]).read()
    if column != "text" and not files:
        raise ValueError(f"--column {column}: no file was given whose column it could be")
    if not out:
        raise ValueError("no text given")
    return out


def _two_numbers(text: str) -> tuple[int, int]:
    try:
        low, high = (int(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"--length {text}; give two numbers such as 60,150") from None
    if not 1 <= low <= high:
        raise ValueError(f"--length {text}; the first at least 1, the second at least the first")
    return low, high


def _layers(given: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(int(k) for k in given.split(",")) if given else None
    except ValueError:
        raise ValueError(f"--layers {given}; give block numbers such as 10,15,20") from None


def _parameter(given: str) -> tuple[str, Any]:
    key, equals, value = given.partition("=")
    if not key or not equals:
        raise ValueError(
            f"--slurm {given}; give KEY=VALUE, such as slurm_partition=gpu or timeout_min=600"
        )
    return key, int(value) if value.isdigit() else value


def _degrees(dose: float) -> float:
    """The angle by which a dose turns an activation of median norm that is orthogonal to the direction."""
    import math

    return math.degrees(math.atan(dose))


def _made_with(
    info: dict[str, Any], model: str | None, dtype: str | None, revision: str | None
) -> tuple[str, str | None, str | None]:
    """Model, dtype and revision: as asked for, or as the directions were made."""
    from emolens.models.catalogue import CATALOGUE

    if model is None and info["name"] not in CATALOGUE and "/" not in info["name"]:
        raise ValueError(
            f"these directions were made with a local model, {info['name']}: say where it is with --model"
        )
    return model or info["name"], dtype or info["dtype"], revision or info["revision"]


def _shown(arguments: list[str]) -> list[str]:
    """Arguments without the user's home folder, for a page that is shared."""
    return [a.replace(str(Path.home()), "~") for a in arguments]


def main() -> None:
    """Run the command line; errors are one line, not a traceback (set EMOLENS_TRACEBACK=1 to see it)."""
    import os

    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command resumes", err=True)
        sys.exit(130)
    except (
        ValueError,
        KeyError,
        TypeError,
        FileNotFoundError,
        FileExistsError,
        ModuleNotFoundError,
    ) as error:
        _fail(error, 2, os.environ)
    except (OSError, MemoryError, ArithmeticError, RuntimeError) as error:
        _fail(error, 3, os.environ)


def _fail(error: BaseException, code: int, environment) -> None:
    if environment.get("EMOLENS_TRACEBACK"):
        raise error
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    typer.echo(f"emolens: {' '.join(str(message).split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

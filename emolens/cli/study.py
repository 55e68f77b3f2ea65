"""`emolens study`, `emolens run` and `emolens languages`: experiments on a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from emolens.cli import options

Out = Annotated[Path, Option("--out", "-o", help="Folder for vectors, results and report.")]
External = Annotated[
    Path | None,
    Option(
        help="Folder with goemotions_test.tsv, emobank.csv or both; without it, nothing is read across to other people's text."
    ),
]
Replace = Annotated[bool, Option("--overwrite", help="Replace another study in the folder.")]


def study(
    model: options.Model = options.DEFAULT_MODEL,
    set: options.Set = "core",
    out: Out = Path("study"),
    external: External = None,
    profile: Annotated[
        str,
        Option(
            help="quick (what the stories alone answer), standard, or full (more permutations, every layer, all external texts)."
        ),
    ] = "standard",
    overwrite: Replace = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
) -> None:
    """Run the whole protocol and write a report.

    Example: emolens study --model pythia-160m --set core --out study-pythia
    """
    _run(profile, model, set, out, external, overwrite, seed, device, dtype, revision)


def run(
    names: Annotated[
        list[str] | None, Argument(help="Experiments; what they need is run before them.")
    ] = None,
    show: Annotated[
        bool, Option("--list", help="Say which experiments there are, and stop.")
    ] = False,
    model: options.Model = options.DEFAULT_MODEL,
    set: options.Set = "core",
    out: Out = Path("run"),
    external: External = None,
    overwrite: Replace = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
) -> None:
    """Run some experiments alone, with what they need, and write the report of them.

    Example: emolens run validation --model smollm2-135m-instruct-q4
    """
    if show:
        from emolens.cli.printing import print_experiments

        return print_experiments()
    if not names:
        raise ValueError(
            "name an experiment, such as: emolens run separability (emolens run --list says which there are)"
        )
    _run(names, model, set, out, external, overwrite, seed, device, dtype, revision)


def _run(
    profile: str | list[str],
    model: str,
    set: str,
    out: Path,
    external: Path | None,
    overwrite: bool,
    seed: int,
    device: str | None,
    dtype: str | None,
    revision: str | None,
) -> None:
    """Whatever is wrong with a request is said before the model is opened: that takes half a minute."""
    from rich.console import Console

    console = Console()
    console.print("loading ...", style="dim")
    from emolens.cli.printing import print_primary
    from emolens.experiments.protocol import chosen_experiments
    from emolens.models.loading import load_model
    from emolens.models.placement import check_device
    from emolens.sets.emotion_sets import load_emotion_set
    from emolens.sets.external import load_external
    from emolens.study import check_request, run_study

    chosen_experiments(profile)
    emotions = load_emotion_set(set)
    if external is not None:
        load_external(external)
    check_device(device)
    check_request(emotions, out, seed)
    loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    result = run_study(
        loaded, emotions, profile=profile, out=out, seed=seed, external=external, overwrite=overwrite, command=_command(sys.argv[1:]),
        say=lambda line: console.print(line, highlight=False, markup=False),
    )  # fmt: skip
    print_primary(result.primary())


def _command(arguments: list[str]) -> str:
    """What was typed, without the user's home folder, for a page that is shared."""
    shown = [a.replace(str(Path.home()), "~") for a in arguments]
    return "emolens " + " ".join(a if " " not in a else repr(a) for a in shown)


def languages(
    model: options.Model = options.DEFAULT_MODEL,
    sets: Annotated[
        str,
        Option(
            help="Sets of different languages with the same concepts and topics, with commas between them."
        ),
    ] = "core,core_zh,core_ja,core_de",
    out: Annotated[
        Path | None, Option("--out", "-o", help="Write all rows to this JSON file.")
    ] = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
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
        same = name in options.names_of(model) and read == prints
        return None if same else f"the result of {name} on {', '.join(read)}"

    if out is not None:
        vacant(out, other, overwrite=overwrite)
    loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    found = compare_languages(loaded, chosen, seed=seed)
    typer.echo(repr(found))
    if out is not None:
        known = {"model": model_info(loaded).to_dict(), "sets": prints}
        rows = [r.to_dict() for r in found.rows]
        data = known | {"layers": found.layers, "topics": found.topics, "rows": rows}
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        with written_whole(out) as part:
            part.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {out}")

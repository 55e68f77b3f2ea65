"""`emolens study` and `emolens languages`: whole protocols on a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from emolens.cli import options


def study(
    model: options.Model = options.DEFAULT_MODEL,
    set: options.Set = "core",
    out: Annotated[
        Path, Option("--out", "-o", help="Folder for vectors, results and report.")
    ] = Path("study"),
    external: Annotated[
        Path | None,
        Option(
            help="Folder with goemotions_test.tsv, emobank.csv or both; without it, nothing is read across to other people's text."
        ),
    ] = None,
    full: Annotated[
        bool, Option("--full", help="More permutations, every layer, all external texts.")
    ] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace another study in the folder.")
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
) -> None:
    """Run the whole protocol and write a report.

    Example: emolens study --model pythia-160m --set core --out study-pythia
    """
    from rich.console import Console

    console = Console()
    console.print("loading ...", style="dim")
    from emolens.cli.printing import print_primary
    from emolens.experiments.transfer import load_external
    from emolens.models.loading import load_model
    from emolens.models.placement import check_device
    from emolens.sets.emotion_sets import load_emotion_set
    from emolens.study import check_request, run_study

    # before the model: a wrong name should not take half a minute to say
    emotions = load_emotion_set(set)
    if external is not None:
        load_external(external)
    check_device(device)
    check_request(emotions, out, seed)
    loaded = load_model(model, device=device, dtype=dtype, revision=revision)
    result = run_study(
        loaded, emotions, out=out, seed=seed, full=full, external=external, overwrite=overwrite, command=_command(sys.argv[1:]),
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

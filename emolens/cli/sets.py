"""`emolens sets`: look at emotion sets, check them, make one of another project's corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from emolens.cli import options

sets = typer.Typer(no_args_is_help=True, help="Look at emotion sets and check them.")


@sets.command("list")
def list_sets() -> None:
    """List the shipped sets.

    Example: emolens sets list
    """
    from emolens.sets.emotion_sets import list_emotion_sets, load_emotion_set

    for name in list_emotion_sets():
        typer.echo(repr(load_emotion_set(name)))


@sets.command("show")
def show(
    name: Annotated[str, Argument(help="Shipped set, or a folder with a set.yaml.")] = "core",
) -> None:
    """Show the emotions of a set and their human norms.

    Example: emolens sets show core
    """
    from emolens.cli.printing import print_set
    from emolens.sets.emotion_sets import load_emotion_set

    print_set(load_emotion_set(name))


@sets.command("check")
def check(
    names: Annotated[
        list[str] | None,
        Argument(help="Shipped sets, or folders with a set.yaml; none checks everything shipped."),
    ] = None,
    words: Annotated[
        bool,
        Option(
            "--words/--no-words", help="Also how far words alone go (TF-IDF on held-out topics)."
        ),
    ] = True,
    verbose: Annotated[
        bool, Option("--verbose", help="Every text that breaks a rule, not only the first.")
    ] = False,
    seed: options.Seed = 0,
) -> None:
    """Check sets as stimuli, and the shipped materials; exit code 1 if a rule is broken. Several sets stand side by side.

    Example: emolens sets check core core2
    """
    from emolens.cli.printing import print_checks
    from emolens.sets.check import check_emotion_set, read_across
    from emolens.sets.emotion_sets import load_emotion_set
    from emolens.sets.material_checks import check_shipped

    if names:
        loaded = {name: load_emotion_set(name) for name in names}
        results = {name: check_emotion_set(s, words=words, seed=seed) for name, s in loaded.items()}
        across = read_across(loaded, seed=seed)
    else:
        results, across = check_shipped(words=words, seed=seed), {}
    together = [list(results)] if names else [[name] for name in results]
    print_checks(results, across, together, verbose=verbose)
    if any(result.violations for result in results.values()):
        raise typer.Exit(1)


@sets.command("import")
def import_corpus(
    source: Annotated[str, Argument(help="A folder; for emotion-probes also the hub's name.")],
    out: Annotated[Path, Option("--out", "-o", help="Folder for the set.")],
    form: Annotated[str, Option("--form", help="emovecllm or emotion-probes.")] = "emotion-probes",
    emotions: Annotated[
        str | None,
        Option(help="emotion-probes: some of them, such as joyful,afraid; the default is all."),
    ] = None,
    topics: Annotated[
        int | None,
        Option(min=1, help="emotion-probes: the first so many topics; the default is all."),
    ] = None,
    per_topic: Annotated[
        int, Option(min=1, help="emotion-probes: stories of an emotion in a topic.")
    ] = 1,
) -> None:
    """Make a set of another project's corpus.

    Example: emolens sets import ryancodrai/emotion-probes --emotions joyful,afraid,angry --topics 16 --out probes
    """
    from emolens.sets.emotion_sets import check_vacant, save_emotion_set
    from emolens.sets.published import read_emotion_probes, read_emovecllm

    form = options.one_of("--form", form, ("emovecllm", "emotion-probes"))
    check_vacant(out)
    chosen = emotions.split(",") if emotions else None
    if form == "emovecllm":
        s = read_emovecllm(source)
    else:
        s = read_emotion_probes(source, emotions=chosen, topics=topics, per_topic=per_topic)
    typer.echo(f"{save_emotion_set(s, out)}: {s!r}\n{s.source}")

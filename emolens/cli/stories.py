"""`emolens write-stories`: texts written by a model, or brought back from another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from emolens.cli import options


def write_stories(
    model: options.Model = options.DEFAULT_MODEL,
    set: options.Set = "core",
    out: Annotated[
        Path, Option("--out", "-o", help="Folder for texts, counts and the set.")
    ] = Path("stories"),
    per_topic: Annotated[
        int, Option(min=1, help="Stories asked for, for each emotion and topic.")
    ] = 1,
    emotions: Annotated[
        str | None, Option(help="Some of the set's, such as joy,fear,anger; the default is all.")
    ] = None,
    topics: Annotated[
        str | None, Option(help="Some of the set's, such as supper,clinic; the default is all.")
    ] = None,
    length: Annotated[
        str | None,
        Option(
            help="Least and most words; the default is 60,150, of Chinese and Japanese 100,400 characters."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, Option(min=1, help="Tokens to write for each story, at most.")
    ] = 220,
    temperature: Annotated[
        float, Option(min=0, help="0 takes the likeliest token; above, samples.")
    ] = 0.9,
    top_p: Annotated[
        float,
        Option(
            help="Sample from the smallest set of tokens with this probability, above 0, at most 1."
        ),
    ] = 0.95,
    batch_size: Annotated[
        int, Option(min=1, help="Prompts at once; a run goes on with the same number only.")
    ] = 16,
    export_prompts: Annotated[
        Path | None, Option(help="Write the prompts as JSON lines for another engine, and stop.")
    ] = None,
    import_texts: Annotated[
        Path | None,
        Option(help="Read the texts from JSON lines (id, text) that another engine wrote."),
    ] = None,
    writer: Annotated[
        str | None, Option(help="Who wrote the imported texts, for the set's source.")
    ] = None,
    overwrite: Annotated[
        bool,
        Option(
            "--overwrite", help="Replace the file of --export-prompts, if it holds something else."
        ),
    ] = False,
    seed: options.SampleSeed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
) -> None:
    """Let a model write the stories of a set, filter them, and make a set of them. The same command goes on after an interruption.

    Exit code 1 if no topic has a usable story of every emotion.

    Example: emolens write-stories --set core --emotions joy,fear,anger --topics supper,clinic --per-topic 8 --out own
    """
    from emolens import stories as generation
    from emolens.models.loading import load_model
    from emolens.models.placement import check_device
    from emolens.sets.emotion_sets import load_emotion_set

    s = load_emotion_set(set)
    lengths = None if length is None else _two_numbers(length)
    if export_prompts is None:
        generation.check_folder(out)
    if export_prompts is None and import_texts is None:
        check_device(device)
    chosen, told = [x.split(",") if x else None for x in (emotions, topics)]
    if import_texts is None or export_prompts is not None:  # before the model: a wrong name
        prompts = generation.story_prompts(s, per_topic=per_topic, emotions=chosen, topics=told)
        if export_prompts is not None:
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
        made = generation.import_texts(
            import_texts, s, out, writer=writer, per_topic=per_topic, emotions=chosen, topics=told, lengths=lengths
        )  # fmt: skip
    else:
        loaded = load_model(model, device=device, dtype=dtype, revision=revision)
        made = generation.write_stories(
            loaded, s, out, per_topic=per_topic, emotions=chosen, topics=told, lengths=lengths, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, batch_size=batch_size, seed=seed,
        )  # fmt: skip
    typer.echo(repr(made))
    if made.emotions is None:
        typer.echo(
            "no set: not one topic has a usable story of every emotion (see dropped.jsonl); ask for more with --per-topic"
        )
        raise typer.Exit(1)
    typer.echo(f"{made.folder / 'set'}: {made.emotions!r}")


def _two_numbers(text: str) -> tuple[int, int]:
    try:
        low, high = (int(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"--length {text}; give two numbers such as 60,150") from None
    if not 1 <= low <= high:
        raise ValueError(f"--length {text}; the first at least 1, the second at least the first")
    return low, high

"""The options that several commands take, and what is asked of a value before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from typer import Option

DEFAULT_MODEL = "smollm2-135m-instruct-q4"

Model = Annotated[
    str,
    Option(
        "--model",
        "-m",
        help="Short name (see `emolens models`), hub name, directory or .gguf file.",
    ),
]
SavedModel = Annotated[
    str | None, Option("--model", "-m", help="The default is the model they were made with.")
]
Set = Annotated[
    str,
    Option(
        "--set",
        "-s",
        help="Shipped set, or a folder with a set.yaml; several with a plus: core2+core.",
    ),
]
Vectors = Annotated[
    Path, Option("--vectors", "-v", help="Directions, as written by study or extract.")
]
Seed = Annotated[int, Option(help="Seed of folds, resamples and random directions.")]
SampleSeed = Annotated[int, Option(help="Seed of what is sampled, and of random directions.")]
NoSeed = Annotated[
    int, Option(help="Nothing is drawn here; it is there so that every command takes it.")
]
Device = Annotated[
    str | None, Option(help="cpu, cuda, cuda:1 ...; the default is a GPU if there is one.")
]
_DTYPES = "float32, float64, bfloat16 or float16; the default is"
Dtype = Annotated[
    str | None, Option(help=f"{_DTYPES} float32 on a CPU, the checkpoint's own on a GPU.")
]
SameDtype = Annotated[
    str | None, Option(help=f"{_DTYPES} the one that the directions were made in.")
]
Revision = Annotated[str | None, Option(help="Hub revision, or a Pythia step such as step3000.")]
SameRevision = Annotated[
    str | None,
    Option(
        help="Hub revision, or a Pythia step; the default is the one that the directions were made with."
    ),
]
Layer = Annotated[
    int | None,
    Option(
        help="Block, counted from 0; the default is the directions' own: the one that study froze, two thirds of the depth from extract."
    ),
]
Layers = Annotated[
    str | None, Option(help="Blocks, counted from 0, such as 10,15,20; the default is all.")
]
Twin = Annotated[
    bool,
    Option(
        "--allow-other-model",
        help="Accept other weights of the same width and tokenizer, such as the base model of an instruct model.",
    ),
]
Overwrite = Annotated[
    bool, Option("--overwrite", help="Replace what is there, if it is something else.")
]
Long = Annotated[
    str,
    Option(
        help="A text of more tokens than the model reads: raise (before any is read), truncate or skip."
    ),
]
Column = Annotated[str, Option(help="Of a .csv, .tsv or .jsonl file: where the text is.")]

T = TypeVar("T", bound=str)


def one_of(option: str, given: str, allowed: tuple[T, ...]) -> T:
    """The choice that was given, or an error that lists what is allowed."""
    for choice in allowed:
        if given == choice:
            return choice
    raise ValueError(f"{option} {given}; allowed: {', '.join(allowed)}")


def block_numbers(given: str | None) -> tuple[int, ...] | None:
    """The blocks of --layers; None for all."""
    try:
        return tuple(int(k) for k in given.split(",")) if given else None
    except ValueError:
        raise ValueError(f"--layers {given}; give block numbers such as 10,15,20") from None


def names_of(model: str) -> tuple[str, ...]:
    """What files call a model that was asked for so."""
    return model, Path(model).expanduser().resolve().name

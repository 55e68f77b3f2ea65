"""`emolens score` and `emolens steer`: what saved directions read, and what they do to a text."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer import Argument, Option

from emolens.cli import options

VECTORS = Path("study/vectors.safetensors")


def score(
    texts: Annotated[
        list[str],
        Argument(
            help="Texts to read, or files of them: .txt (a text a line), .csv, .tsv or .jsonl (see --column), also .gz; - reads lines from standard input."
        ),
    ],
    vectors: options.Vectors = VECTORS,
    model: options.SavedModel = None,
    tokens: Annotated[bool, Option("--tokens", help="Score every token.")] = False,
    layer: options.Layer = None,
    html: Annotated[Path | None, Option(help="Write the coloured view to this file.")] = None,
    column: options.Column = "text",
    long: options.Long = "raise",
    overwrite: options.Overwrite = False,
    allow_other_model: options.Twin = False,
    seed: options.NoSeed = 0,
    device: options.Device = None,
    dtype: options.SameDtype = None,
    revision: options.SameRevision = None,
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
    from emolens.sets.corpus import Corpus, Long

    policy = options.one_of("--long", long, get_args(Long))
    if html is not None:
        vacant_page(html, overwrite=overwrite)
    given = _texts(texts, column)
    v = load_directions(vectors)
    v.slot(layer)
    per = "token" if tokens else "text"
    v.scale(per)
    name, dtype, revision = _made_with(v.info["model"], model, dtype, revision)
    loaded = load_model(name, device=device, dtype=dtype, revision=revision)
    corpus = Corpus(lambda: iter(given), {}, False)
    scores = read(
        loaded, v, corpus, per=per, layer=layer, long=policy, allow_other_model=allow_other_model
    )
    typer.echo(scores.table())
    if html is not None:
        write_page(html, scores.to_html(), overwrite=overwrite)
        typer.echo(f"wrote {html}")


def steer(
    prompts: Annotated[list[str], Argument(help="Texts to continue.")],
    emotion: Annotated[str, Option("--emotion", "-e", help="Whose direction.")],
    vectors: options.Vectors = VECTORS,
    model: options.SavedModel = None,
    layer: options.Layer = None,
    dose: Annotated[
        float,
        Option(
            help="In median residual norms: what add adds, and what clamp sets. rotate turns by its arc tangent; ablate has none."
        ),
    ] = 0.1,
    method: Annotated[str, Option(help="add, ablate, clamp or rotate.")] = "add",
    max_new_tokens: Annotated[
        int, Option(min=1, help="Tokens to write for each prompt, at most.")
    ] = 40,
    stop: Annotated[
        list[str] | None,
        Option(help="End at this string, or special token, too; may be given several times."),
    ] = None,
    temperature: Annotated[
        float, Option(min=0, help="0 takes the likeliest token; above, samples.")
    ] = 0.0,
    watch: Annotated[
        bool, Option("--watch", help="Show the steered text as it is written.")
    ] = False,
    allow_other_model: options.Twin = False,
    seed: options.SampleSeed = 0,
    device: options.Device = None,
    dtype: options.SameDtype = None,
    revision: options.SameRevision = None,
) -> None:
    """Continue prompts as they are, steered, and steered along a random direction, side by side.

    Example: emolens steer --vectors study/vectors.safetensors --emotion joy --dose 0.1 "I opened the door and"
    """
    from emolens import interventions
    from emolens.cli.printing import print_side_by_side
    from emolens.directions.controls import random_directions
    from emolens.directions.value import load_directions
    from emolens.interventions.generate import generate
    from emolens.models.loading import load_model
    from emolens.sets.corpus import names_a_file, several

    options.one_of("--method", method, ("add", "ablate", "clamp", "rotate"))
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
        # by which the dose turns an activation of median norm that is orthogonal to the direction
        "rotate": {"angle": math.degrees(math.atan(dose))},
    }[method]
    steered = f"{method} {emotion}"
    runs = {
        "baseline": None,
        steered: verb(v[emotion], layer=at, **amount),
        f"{method} random": verb(random_directions(v, 1, seed=seed), layer=at, **amount),
    }
    name, dtype, revision = _made_with(v.info["model"], model, dtype, revision)
    loaded = load_model(name, device=device, dtype=dtype, revision=revision)
    read = v if v.calibration is not None and v.calibration.token_mean.isfinite().any() else None
    written = {}
    for title, hooks in runs.items():
        shown = watch and title == steered
        written[title] = generate(
            loaded, prompts, hooks, max_new_tokens=max_new_tokens, stop=stop or (), temperature=temperature,
            seed=seed, read=read, layer=at, watch=shown, allow_other_model=allow_other_model,
        )  # fmt: skip
        if shown:
            typer.echo(err=True)
    note = f"layer {at}" + ("" if method == "ablate" else f", dose {dose:g}")
    if read is not None:
        note += "; emotions: mean z of the new tokens, as the unsteered model reads the text at the same layer"
    print_side_by_side(prompts, written, read=read is not None, note=note)


def _texts(arguments: list[str], column: str) -> list[tuple[Any, dict[str, Any]]]:
    """What `score` was given, read: texts as they are, files, lines of standard input; a name that is no file is never taken for a text."""
    from emolens._files import here
    from emolens.sets.corpus import names_a_file, open_corpus, records

    out: list[tuple[Any, dict[str, Any]]] = []
    files = 0
    for argument in arguments:
        if argument == "-":
            binary = hasattr(sys.stdin, "buffer")
            raw = sys.stdin.buffer.read() if binary else sys.stdin.read().encode()
            out += records(io.BytesIO(raw), "standard input", "text", ".txt")
        elif names_a_file(argument) is not None:
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

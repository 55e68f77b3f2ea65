"""The file of directions: safetensors with JSON metadata, by the names of the fields. No pickle, no paths of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emolens.directions.calibration import Calibration
from emolens.shards import read_safetensors, same_weights, write_safetensors

if TYPE_CHECKING:
    from emolens.directions.value import EmotionDirections

FORMAT = "emolens.directions.1"
TENSORS = ("vectors", "reference", "neutral_mean", "norm_median", "norm_mean", "reliability")
HEADER = ("emotions", "hook_point", "layers", "layer", "info", "operands")
WRONG_HEADER = "its header is not that of directions"
SCALE = "calibration."  # before the name of each of its tensors


def write_fields(path: Path, directions: EmotionDirections) -> None:
    """Write everything but the whole that a part was taken from."""
    tensors = {k: getattr(directions, k) for k in TENSORS}
    if directions.calibration is not None:
        tensors |= {f"{SCALE}{k}": tensor for k, tensor in vars(directions.calibration).items()}
    # the format refuses tensors that share memory, as the unknown ones may
    tensors = {k: x.clone(memory_format=torch.contiguous_format) for k, x in tensors.items()}
    header = {k: getattr(directions, k) for k in HEADER}
    write_safetensors(path, tensors, {"format": FORMAT, "emolens": json.dumps(header)})


def read_fields(path: str | Path) -> dict[str, Any]:
    """Read what `write_fields` wrote, of this version or an earlier one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, damaged, another program's file, or one whose tensors do not fit its names.
    """
    tensors, metadata = read_safetensors(path, FORMAT)
    if "norm_median" in tensors:  # 0.1.0 had no mean
        unknown = torch.full_like(tensors["norm_median"], torch.nan)
        tensors = {"norm_mean": unknown} | tensors
    if missing := [*sorted(set(TENSORS) - set(tensors)), *({"emolens"} - set(metadata))]:
        raise ValueError(
            f"{path}: {missing[0]} is missing; the file was not written whole, or by another version"
        )
    try:
        header = json.loads(metadata["emolens"])
        fields = {k: header[k] for k in HEADER} | {k: tensors[k] for k in TENSORS}
        fields |= {k: tuple(header[k]) for k in ("emotions", "layers", "operands")}
        words = (*fields["emotions"], *fields["operands"])
        numbers = (*fields["layers"], fields["layer"])
        if not all(isinstance(w, str) for w in words) or not all(type(k) is int for k in numbers):
            raise TypeError("names must be words, layers must be numbers")
        _check_shapes(tensors, len(fields["emotions"]), len(fields["layers"]))
        scale = {k.removeprefix(SCALE): t for k, t in tensors.items() if k.startswith(SCALE)}
        return fields | {"calibration": Calibration.of_file(scale) if scale else None}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {WRONG_HEADER} ({str(error)[:200]})") from error


def other_directions(
    directions: EmotionDirections, load: Callable[[Path], EmotionDirections], file: Path
) -> str | None:
    """What a file holds, in words; None if it is these directions, made again."""
    try:
        found = load(file)
    except ValueError:
        return "something that is no directions of emolens"
    made = ("method", "remove_neutral", "set_sha256", "pooling", "training_texts")
    fields = ("emotions", "hook_point", "layers", "operands")
    same = (
        all(getattr(found, k) == getattr(directions, k) for k in fields)
        and all(found.info.get(k) == directions.info.get(k) for k in made)
        and same_weights(found.info["model"], directions.info["model"])
    )
    return None if same else f"other directions ({found.origin})"


def _check_shapes(tensors: Mapping[str, Tensor], e: int, k: int) -> None:
    """Say which tensor does not fit, in fewer words than a TypeCheckError."""
    d = tensors["vectors"].shape[-1] if tensors["vectors"].ndim else 0
    shapes = ((e, k, d), (k, d), (k, d), (k,), (k,), (e, k))
    for name, shape in zip(TENSORS, shapes, strict=True):
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensors[name].shape)}; {e} emotions and {k} layers need {list(shape)}"
            )

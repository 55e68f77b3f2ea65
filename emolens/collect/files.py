"""The file of activations: safetensors with a JSON header for the whole and each of its parts. No pickle, no paths of this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emolens.shards import read_safetensors, write_safetensors

if TYPE_CHECKING:
    from emolens.collect.activations import Activations

FORMATS = ("emolens.activations.2", "emolens.activations.1")  # written; read
PARTS = ("neutral_tokens", "neutral_prefixes")  # activations of their own, of the neutral texts
TENSORS = ("rows", "embed", "row_text", "row_position", "norm_histogram", "sinks")


def write_parts(path: str | Path, acts: Activations) -> None:
    """Write activations with their parts."""
    tensors: dict[str, Tensor] = {}
    headers: dict[str, str] = {}
    for prefix, part in (("", acts), *((f"{name}.", getattr(acts, name)) for name in PARTS)):
        if part is not None:
            for name in TENSORS:
                tensors[prefix + name] = getattr(part, name).clone(
                    memory_format=torch.contiguous_format
                )
            header = {"hook_point": part.hook_point, "layers": part.layers, "info": part.info}
            header |= {} if part.heads is None else {"heads": part.heads}
            headers[prefix or "self."] = json.dumps(
                header | {"texts": [asdict(t) for t in part.texts]}
            )
    write_safetensors(path, tensors, {"format": FORMATS[0], **headers})


def read_parts(path: str | Path) -> dict[str, dict[str, Any]]:
    """The fields of what `write_parts` wrote, of this version or an earlier one: under "" those of the whole, under its name those of a part.

    Raises:
        FileNotFoundError, ValueError: no such file, or not one of these, or a truncated or damaged one.
    """
    tensors, metadata = read_safetensors(path, *FORMATS)
    parts: dict[str, dict[str, Any]] = {}
    try:
        for part in ("", *PARTS):
            prefix = f"{part}." if part else ""
            if (prefix or "self.") in metadata:
                header = json.loads(metadata[prefix or "self."])
                if metadata["format"] == FORMATS[1]:
                    # kept the median of the sinks only: it is that of every text
                    median = tensors[prefix + "sink_ratio"]
                    tensors[prefix + "sinks"] = median.repeat(len(header["texts"]), 1)
                parts[part] = {k: header[k] for k in ("hook_point", "info", "texts")}
                parts[part] |= {"layers": tuple(header["layers"]), "heads": header.get("heads")}
                parts[part] |= {name: tensors[prefix + name] for name in TENSORS}
        if "" not in parts:
            raise KeyError("self.")
        return parts
    except (KeyError, TypeError, ValueError) as error:
        raise wrong_header(path, error) from error


def wrong_header(path: str | Path, error: Exception) -> ValueError:
    """What is said of a file whose header does not make activations."""
    said = repr(error).split("\\n")[0][:200]
    return ValueError(f"{path}: its header is not that of activations ({said})")

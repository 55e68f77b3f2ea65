"""A LoRA adapter, beside its model or alone, merged into the weights: without it they are the base model's, and nothing would say so.

peft does the arithmetic, W' = W + (alpha / r) B A and its kin. Here is checked that every tensor of the adapter is used, and that the
merged model computes what the adapted one did. Other kinds of adapters, and weights that cannot be changed exactly, are refused by name.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emolens.models.adapters._refuse import ConversionError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that was found.

    Attributes:
        label: Its folder or repository, never a path.
        base: The model that it was made for, in its own words.
        revision: Of that model, where the adapter names one.
        kind: For files and people: label, kind and rank.
    """

    label: str
    folder: Path
    base: str
    revision: str | None
    kind: str


def find(location: str, revision: str | None, label: str) -> Adapter | None:
    """The adapter in a directory or hub repository, if there is one; before any weight is read.

    Raises:
        ModuleNotFoundError: there is one, and no peft to merge it.
        ConversionError: it is no LoRA adapter.
        FileNotFoundError: its weights are not there as safetensors.
    """
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    file = find_adapter_config_file(location, revision=revision)
    if file is None:
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionError(
            f"{label} holds a {kind} adapter ({CONFIG}); LoRA adapters are merged, other kinds are not converted"
        )
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(
            f"{label} holds a LoRA adapter ({CONFIG}); to merge it: pip install 'emolens[lora]'"
        )
    weights = Path(location) / WEIGHTS
    if not Path(location).is_dir():
        weights = Path(cached_file(location, WEIGHTS, revision=revision) or WEIGHTS)
    if not weights.is_file():
        raise FileNotFoundError(
            f"{label}: {CONFIG} is there, but no {WEIGHTS} (pickled weights are not read)"
        )
    base, kind = (
        str(config.get("base_model_name_or_path") or ""),
        f"{label} (LoRA, r={config.get('r')})",
    )
    return Adapter(label, weights.parent, base, config.get("revision"), kind)


@contextmanager
def left_out() -> Iterator[None]:
    """While it lasts transformers loads no adapter of its own accord, which would hide what is missing in the base model."""
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    modules: tuple[Any, ...] = (peft, auto_factory)
    places = [(place, place.is_peft_available) for place in modules]
    for place, _ in places:
        place.is_peft_available = lambda: False
    try:
        yield
    finally:
        for place, original in places:
            place.is_peft_available = original


def merge(hf_model: Any, adapter: Adapter) -> Any:
    """The model with the adapter in its weights, all of whose layers are plain again.

    Raises:
        ConversionError: quantised weights; an adapter of another model, or tensors of it that are not used; a merged model that does not
            compute what the adapted one did (an adapter on one of two tied matrices).
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    if getattr(hf_model.config, "quantization_config", None) is not None:
        raise ConversionError(
            f"{adapter.label}: a LoRA adapter cannot be merged exactly into quantised weights; load the full base model"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft warns of is checked below
        try:
            adapted = PeftModel.from_pretrained(
                hf_model, str(adapter.folder), torch_device=str(hf_model.device)
            ).eval()
        except (RuntimeError, ValueError) as error:
            raise ConversionError(
                f"{adapter.label}: this adapter does not fit {adapter.base}: {str(error).splitlines()[0]}"
            ) from error
        with safe_open(str(adapter.folder / WEIGHTS), framework="pt") as file:
            stored = set(file.keys())
        used = set(get_peft_model_state_dict(adapted))
        if wrong := sorted(stored ^ used):
            what = "is not used" if wrong[0] in stored else "is missing"
            raise ConversionError(
                f"{adapter.label}: the adapter's tensor {wrong[0]} {what} (and {len(wrong) - 1} more)"
            )
        ids = (
            torch.arange(1, 17, device=hf_model.device)[None]
            % hf_model.config.get_text_config().vocab_size
        )
        with torch.inference_mode():
            wanted = adapted(ids).logits.float().log_softmax(-1)
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError) as error:  # NaN; kinds that have no merged form
            raise ConversionError(
                f"{adapter.label}: this adapter cannot be merged: {str(error).splitlines()[0]}"
            ) from error
        with torch.inference_mode():
            difference = (merged(ids).logits.float().log_softmax(-1) - wanted).abs().max().item()
    # float32: two orders of the same sums; a half precision rounds each merged weight
    if not difference < (1e-3 if hf_model.dtype in (torch.float32, torch.float64) else 0.5):
        raise ConversionError(
            f"{adapter.label}: merged, the model differs from the adapted one by {difference:.1e} nats; an adapter on tied embeddings "
            "cannot be merged"
        )
    return merged

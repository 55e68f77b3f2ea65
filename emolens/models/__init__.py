"""Load a model with TransformerLens's hooks, know which it is, run it in parts. The only room that imports transformer_lens."""

from emolens.models.adapters.fused import fused
from emolens.models.catalogue import Entry
from emolens.models.identity import (
    ModelInfo,
    check_model,
    has_weights_of,
    model_info,
    present_info,
    wrap,
)
from emolens.models.loading import load_model, open_hf
from emolens.models.placement import check_device
from emolens.models.points import check_layers, device_of
from emolens.models.running import (
    Decoder,
    can_start_at_layer,
    checked,
    not_finite,
    out_of_memory,
    run_from,
    run_to,
    unembed,
)
from emolens.models.tokens import EncodedText, encode, pad, render_chat, tokenize, word_tokens

__all__ = [
    "Decoder",
    "EncodedText",
    "Entry",
    "ModelInfo",
    "can_start_at_layer",
    "check_device",
    "check_layers",
    "check_model",
    "checked",
    "device_of",
    "encode",
    "fused",
    "has_weights_of",
    "load_model",
    "model_info",
    "not_finite",
    "open_hf",
    "out_of_memory",
    "pad",
    "present_info",
    "render_chat",
    "run_from",
    "run_to",
    "tokenize",
    "unembed",
    "word_tokens",
    "wrap",
]

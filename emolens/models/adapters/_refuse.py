"""What a conversion does not carry is refused by name, never dropped."""

from typing import Any

from torch import nn


class ConversionError(ValueError):
    """A model cannot be converted faithfully to a `HookedTransformer`."""


def rope_type(hf_config: Any, allowed: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The rope type of a HF config and its parameters; types outside `allowed` are refused."""
    given = getattr(hf_config, "rope_parameters", None)
    rope = dict(given or getattr(hf_config, "rope_scaling", None) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in allowed:
        raise ConversionError(
            f"rope type {kind!r} is not converted (converted for this family: {', '.join(allowed)}); use backend='bridge'"
        )
    rope.setdefault("rope_theta", getattr(hf_config, "rope_theta", 10000.0))
    return kind, rope


def features(hf_config: Any) -> None:
    """Refuse config features that change the computation and that TransformerLens would silently ignore."""
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization is not None:
        says = quantization if isinstance(quantization, dict) else vars(quantization)
        method = str(getattr(says.get("quant_method"), "value", says.get("quant_method")))
        if method != "gguf":  # a GGUF file is dequantised by transformers at load
            tried = f" (tried with bitsandbytes; {method} needs what transformers asks for)"
            tried = "" if method == "bitsandbytes" else tried
            raise ConversionError(
                f"weights quantised with {method!r} are not converted; use backend='bridge'{tried}"
            )
    if getattr(hf_config, "use_sliding_window", False):
        raise ConversionError(
            "sliding-window attention (use_sliding_window=True) is not converted; use backend='bridge'"
        )


def activation(
    name: str, allowed: tuple[str, ...] = ("silu", "gelu", "gelu_new", "gelu_fast", "relu")
) -> str:
    """TransformerLens's name of a HF activation function."""
    name = {"swish": "silu"}.get(name, name)
    if name not in allowed:
        raise ConversionError(
            f"activation {name!r} is not converted (converted: {', '.join(allowed)})"
        )
    return name


def plain(linear: nn.Module) -> nn.Linear:
    """A layer whose weight is what it multiplies by; others (LoRA, quantised, fused) are refused by name rather than read."""
    if type(linear) is not nn.Linear:
        raise ConversionError(
            f"a layer of type {type(linear).__name__} is not converted; merge or dequantise it, or use backend='bridge'"
        )
    return linear

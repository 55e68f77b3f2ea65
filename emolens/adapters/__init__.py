"""From a Hugging Face model to a `HookedTransformer` that shares its weights.

Each family has one file with two functions: ``config(hf_config)`` returns the fields of a `HookedTransformerConfig`, or
refuses by name what the conversion does not carry; ``parameters(hf_model)`` yields ``(TransformerLens name, tensor)`` where the
tensors are **strided views** of the HF weights in the layout that makes every `einops.rearrange` of TransformerLens's forward
pass a free view. So a converted model has HF's memory and nearly HF's speed. Nothing here downloads or processes weights.
"""

from emolens.adapters import llama, neox
from emolens.adapters._refuse import ConversionError
from emolens.adapters.hooked import to_hooked

FAMILIES = {
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "GPTNeoXForCausalLM": neox,
}

__all__ = ["FAMILIES", "ConversionError", "family_of", "to_hooked"]


def family_of(architecture: str):
    """The adapter of an architecture name of a HF config.

    Raises:
        ConversionError: for an architecture that no adapter converts.
    """
    if architecture not in FAMILIES:
        raise ConversionError(
            f"architecture {architecture!r} is not converted by emolens (converted: {', '.join(FAMILIES)}); "
            "load it with backend='bridge', which wraps the Hugging Face model itself"
        )
    return FAMILIES[architecture]

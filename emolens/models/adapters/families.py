"""Which adapter converts which architecture, by the name that is in a Hugging Face config."""

from emolens.models.adapters import llama, neox
from emolens.models.adapters._refuse import ConversionError

FAMILIES = {
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "GPTNeoXForCausalLM": neox,
}


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

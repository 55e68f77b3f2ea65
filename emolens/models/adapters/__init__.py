"""From a Hugging Face model to a `HookedTransformer` that shares its weights.

Each family has one file with two functions: ``config(hf_config)`` returns the fields of a `HookedTransformerConfig`, or
refuses by name what the conversion does not carry; ``parameters(hf_model)`` yields ``(TransformerLens name, tensor)`` where the
tensors are **strided views** of the HF weights in the layout that makes every `einops.rearrange` of TransformerLens's forward
pass a free view. So a converted model has HF's memory and nearly HF's speed. Nothing here downloads or processes weights.
"""

from emolens.models.adapters._refuse import ConversionError
from emolens.models.adapters.families import FAMILIES, family_of
from emolens.models.adapters.hooked import to_hooked

__all__ = ["FAMILIES", "ConversionError", "family_of", "to_hooked"]

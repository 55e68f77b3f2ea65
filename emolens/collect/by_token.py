"""Every token of a few texts, as TransformerLens's cache has them: for a look, and for analyses of one's own. Nothing is pooled here."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emolens._typing import AnyPoint, Blocks, HookedModel, Text, hook_name
from emolens.collect.recipe import check_layers
from emolens.models.adapters.fused import fused
from emolens.models.running import ending_at, not_finite
from emolens.models.tokens import encode, pad
from emolens.sets.corpus import several


def token_activations(
    model: HookedModel,
    texts: Text | Iterable[Text],
    *,
    layers: Blocks | None = None,
    hook_point: AnyPoint = "resid_post",
    prepend_bos: bool | None = None,
) -> tuple[dict[int, Float[Tensor, "batch ..."]], Int[Tensor, "batch pos"]]:
    """Read every token of a few texts in one batch, the first one and the padding included.

    Args:
        model: A model from `load_model`, or your own.
        texts: One text or several, or chats.
        layers: Block indices, 0-based; None is every block.
        hook_point: As for `collect`; by head for `z`, `q`, `k`, `v`.
        prepend_bos: None follows the model's tokenizer.

    Returns:
        Of each layer `[batch pos d_model]` (`[batch pos head d_head]`, `[batch pos d_mlp]`; of a pattern `[batch head pos pos]`, queries
        first) as the model computes it, on its device; and the attention mask `[batch pos]`, 1 where there is a token. Padding is on
        the right, and what stands there means nothing.

    Raises:
        KeyError: the model lacks the hook point.
        ValueError: no texts, one longer than the model reads, a layer that does not exist.
        FloatingPointError: NaN or infinity at a token.

    Example:
        >>> x, mask = em.token_activations(model, ["The door was open.", "Rain."], layers=[1])
        >>> x[1].shape[:2] == mask.shape, x[1].shape[-1] == model.cfg.d_model
        (True, True)
    """
    layers = check_layers(model, hook_point, layers)
    encoded = encode(model, several(texts), prepend_bos=prepend_bos)
    if not encoded:
        raise ValueError("no texts given")
    tokens, mask = pad(encoded, "right", getattr(model.cfg, "device", None) or "cpu")
    found: dict[int, Tensor] = {}

    def keep(act: Tensor, hook: Any, layer: int) -> None:
        found[layer] = act.detach().clone()

    options, last = ending_at(model, max(layers) + 1)
    hooks = [(hook_name(hook_point, layer), partial(keep, layer=layer)) for layer in layers]
    with torch.no_grad(), fused(model):
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[*hooks, *last], **options)
    for layer in layers:
        x = found[layer].transpose(1, 2) if hook_point == "pattern" else found[layer]
        if not torch.isfinite(x[mask.bool().to(x.device)]).all():
            dtype = str(x.dtype).removeprefix("torch.")
            raise not_finite(f"{hook_point} of layer {layer}", dtype)
    return {layer: found[layer] for layer in layers}, mask

"""Run a model in parts: up to a layer, on from one, token by token; and tell numbers from NaN.

The same calls on a `HookedTransformer` and on a `TransformerBridge`, which differ in what can be skipped. A result that is not finite
is traced to the first layer that made it so, and raised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emolens._typing import HookedModel, is_hooked


def unembed(model: Any, resid: Tensor, again: Again | None = None) -> Tensor:
    """Logits of a residual stream `[... d_model]`, through the final norm with its gain.

    Raises:
        FloatingPointError: NaN or infinity; `again` as for `checked`.
    """
    return checked(model, model.unembed(model.ln_final(resid)), again)


Again = Callable[
    [list[tuple[str, Callable[..., Any]]]], Any
]  # a forward pass once more, with these hooks after its own


def not_finite(what: str, dtype: str) -> FloatingPointError:
    """The error of every path on which a number is NaN or infinite, with the fix."""
    if dtype == "float16":
        fix = "; half precision overflows here: load with dtype='float32' or 'bfloat16'"
    else:
        fix = ", although dtype='float32' and 'bfloat16' hold numbers up to 3e38: a weight is damaged, or a hook adds too much (lower its dose)"
    return FloatingPointError(f"{what} is not finite in {dtype}{fix}")


def checked(
    model: Any, x: Tensor, again: Again | None = None, mask: Tensor | None = None
) -> Tensor:
    """`x` itself (logits or a residual stream `[batch pos ...]`), if it is finite.

    Args:
        again: The forward pass that made it, to be run once more with more hooks, to find the first layer that is not finite. It costs
            nothing where all is well.
        mask: `[batch pos]`, of real tokens; what padding holds does not matter.

    Raises:
        FloatingPointError: NaN or infinity, with the layer (where it can be found) and the type.
    """
    if bool(
        torch.isfinite(x.detach().sum(dtype=torch.float32))
    ):  # one NaN or infinity makes the sum one, without a copy
        return x
    bad = ~torch.isfinite(x.detach())
    if not bool((bad if mask is None else bad.flatten(2).any(-1) & mask.bool()).any()):
        return x
    found: list[int] = []

    def look(act: Tensor, hook: Any, layer: int) -> None:
        wrong = ~torch.isfinite(act).flatten(2).all(-1)
        if mask is not None and mask.shape == wrong.shape:
            wrong &= mask.bool()
        if wrong.any():
            found.append(layer)

    if again is not None:
        hooks = [
            (f"blocks.{k}.hook_resid_post", partial(look, layer=k))
            for k in range(model.cfg.n_layers)
        ]
        with torch.no_grad(), contextlib.suppress(Exception):  # what matters is the first error
            again(hooks)
    what = f"resid_post of layer {min(found)}" if found else "a logit or its residual stream"
    raise not_finite(what, str(x.dtype).removeprefix("torch."))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA and Python have classes for it, torch's CPU, cuBLAS and MPS allocators only words."""
    said = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "cannot allocate memory",
        "defaultcpuallocator",
        "alloc_failed",
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error).lower() for words in said
    )


def can_start_at_layer(model: HookedModel) -> bool:
    """Whether the blocks before `start_at_layer` are really skipped: `HookedTransformer` does, a bridge runs or refuses them."""
    return is_hooked(model)


def ending_at(
    model: HookedModel, layer: int
) -> tuple[dict[str, Any], list[tuple[str, Callable[..., Any]]]]:
    """Options and hooks of a forward pass that ends before block `layer` (or after the last one) and gives the stream there.

    A bridge stops before a block only; after the last one it is a hook, to come after all others, that stops it in the same way.
    """
    if layer < model.cfg.n_layers or can_start_at_layer(model):
        return {"return_type": None, "stop_at_layer": layer}, []
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    def stop(act: Tensor, hook: Any) -> None:
        raise StopAtLayerException(act)

    return {"return_type": None, "use_cache": False}, [
        (f"blocks.{layer - 1}.hook_resid_post", stop)
    ]


def run_to(model: Any, tokens: Tensor, mask: Tensor, layer: int) -> Tensor:
    """The residual stream before block `layer` (or after the last one), `[batch pos d_model]`; hooks of the blocks before fire.

    Raises:
        FloatingPointError: NaN or infinity in it; as `checked`.
    """
    options, hooks = ending_at(model, layer)

    def run(more: Sequence[tuple[str, Callable[..., Any]]] = ()) -> Tensor:
        return model.run_with_hooks(
            tokens, attention_mask=mask, fwd_hooks=[*more, *hooks], **options
        )

    return checked(model, run(), run, mask)


def run_from(model: Any, resid: Tensor, mask: Tensor, layer: int) -> Tensor:
    """The residual stream after the last block, from that before block `layer`; for models where `can_start_at_layer`. Errors as `run_to`."""
    options = {
        "start_at_layer": layer,
        "stop_at_layer": model.cfg.n_layers,
        "return_type": "logits",
    }
    run = partial(model.run_with_hooks, resid, attention_mask=mask, **options)
    return checked(model, run(), lambda more: run(fwd_hooks=more), mask)


class Decoder:
    """Logits of the next token step by step with a KV cache, the same on either backend.

    The batch is padded on the left, so that every row's next token is the last column. The unembedding is computed for that column alone.
    """

    cache: Any  # TransformerLens's, or Hugging Face's

    def __init__(self, model: Any, mask: Tensor, layer: int = 0) -> None:
        """`mask` `[batch pos]` is that of the prompts; from `layer` on, where the caller has the stream before it."""
        self.model, self.mask, self.layer, self.seen = model, mask, layer, 0
        self.fed: list[
            Tensor
        ] = []  # what is in the cache: read once more where a number is not finite
        self.hooked = can_start_at_layer(model)
        if self.hooked:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            self.cache = TransformerLensKeyValueCache.init_cache(
                model.cfg, model.cfg.device, len(mask)
            )
        elif layer:
            raise ValueError("this backend cannot start at a layer")

    def __call__(self, x: Tensor, *, keep: bool = True) -> Tensor:
        """Logits `[batch d_vocab]` after more tokens `[batch pos]` (or their stream before `layer`, `[batch pos d_model]`).

        Args:
            keep: Remember the tokens for the next call; without, the call leaves no trace.

        Raises:
            FloatingPointError: NaN or infinity in the logits; as `checked`.
        """
        new = x.shape[1]
        mask = (
            self.mask
            if not self.seen
            else torch.cat([self.mask, self.mask.new_ones((len(x), new))], 1)
        )
        n_layers = self.model.cfg.n_layers
        fed = [*self.fed, x]
        again = partial(self._anew, fed=fed, mask=mask)
        if self.hooked:
            if not keep:
                self.cache.freeze()
            if self.layer or x.ndim == 3:
                options = {
                    "start_at_layer": self.layer,
                    "attention_mask": mask,
                    "stop_at_layer": n_layers,
                }
            else:
                options = {"attention_mask": mask[:, -new:], "stop_at_layer": n_layers}
            try:
                resid = self.model(x, past_kv_cache=self.cache, return_type="logits", **options)
            finally:
                self.cache.unfreeze()
            logits = unembed(self.model, resid[:, -1:], again)[:, 0]
        else:
            options = {"past_key_values": self.cache} if self.seen else {}
            logits, cache = self.model(
                x,
                attention_mask=mask,
                return_type="logits_and_cache",
                use_cache=True,
                logits_to_keep=1,
                **options,
            )
            logits = checked(self.model, logits[:, -1], again)
            if keep:
                self.cache = cache
            elif self.seen:
                self.cache.crop(-new)
        if keep:
            self.mask, self.seen, self.fed = mask, self.seen + new, fed
        return logits

    def _anew(
        self, more: list[tuple[str, Callable[..., Any]]], fed: list[Tensor], mask: Tensor
    ) -> None:
        """Everything that was fed once more, without a cache."""
        x = torch.cat(fed, 1)
        start = {"start_at_layer": self.layer} if self.layer or x.ndim == 3 else {}
        self.model.run_with_hooks(
            x, attention_mask=mask, return_type="logits", fwd_hooks=more, **start
        )

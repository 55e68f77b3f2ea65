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
from jaxtyping import Float, Int
from torch import Tensor

from emolens._typing import HookedModel, is_hooked, typed
from emolens.models.points import device_of

Hooks = Sequence[tuple[str, Callable[..., Any]]]
Again = Callable[[Hooks], Any]  # a forward pass once more, with these hooks after its own


@typed
def unembed(
    model: HookedModel, resid: Float[Tensor, "*batch pos d_model"], again: Again | None = None
) -> Float[Tensor, "*batch pos d_vocab"]:
    """Read the residual stream through the final norm, with its gain, and the unembedding.

    Args:
        model: On either backend.
        resid: The stream after the last block.
        again: As for `checked`.

    Returns:
        Logits.

    Raises:
        FloatingPointError: NaN or infinity among them.

    Example:
        >>> em.models.unembed(model, torch.ones(1, 2, 32)).shape
        torch.Size([1, 2, 320])
    """
    return checked(model, model.unembed(model.ln_final(resid)), again)


def not_finite(what: str, dtype: str) -> FloatingPointError:
    """Make the error of every path on which a number is NaN or infinite, with the fix; the caller raises it.

    Args:
        what: The number, as the subject of the sentence.
        dtype: In which it was computed, such as "float16".

    Returns:
        The error.

    Example:
        >>> em.models.not_finite("a logit", "float16")
        FloatingPointError("a logit is not finite in float16; half precision overflows here: load with dtype='float32' or 'bfloat16'")
    """
    if dtype == "float16":
        fix = "; half precision overflows here: load with dtype='float32' or 'bfloat16'"
    else:
        fix = ", although dtype='float32' and 'bfloat16' hold numbers up to 3e38: a weight is damaged, or a hook adds too much (lower its dose)"
    return FloatingPointError(f"{what} is not finite in {dtype}{fix}")


def checked(
    model: HookedModel,
    x: Float[Tensor, "*shape"],
    again: Again | None = None,
    mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Let a tensor of a forward pass through if it is finite, and name the first layer that is not where it is not.

    Args:
        model: That made it.
        x: Logits or a residual stream, `[batch pos ...]`.
        again: The forward pass that made it, to be run once more with more hooks, to find the first layer that is not finite. It costs
            nothing where all is well.
        mask: 1 for real tokens; what padding holds does not matter.

    Returns:
        `x` itself.

    Raises:
        FloatingPointError: NaN or infinity, with the layer (where it can be found) and the type.

    Example:
        >>> em.models.checked(model, torch.tensor([[1.0, torch.inf]]))
        Traceback (most recent call last):
        FloatingPointError: a logit or its residual stream is not finite in float32...
    """
    # one NaN or infinity makes the sum one, without a copy
    if bool(torch.isfinite(x.detach().sum(dtype=torch.float32))):
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


# CUDA and Python have classes for it; torch's CPU, cuBLAS and MPS allocators have only words
_NO_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator", "alloc_failed",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, on any device.

    Args:
        error: Any exception.

    Returns:
        Whether it is one of the classes for that, or says so in words.

    Example:
        >>> em.models.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error).lower() for words in _NO_MEMORY
    )


def can_start_at_layer(model: HookedModel) -> bool:
    """Say whether the blocks before `start_at_layer` are really skipped: `HookedTransformer` does that, a bridge runs or refuses them.

    Args:
        model: On either backend.

    Returns:
        Whether `run_from` and a `Decoder` with a layer may be used.

    Example:
        >>> em.models.can_start_at_layer(model) == (em.model_info(model).backend == "hooked")
        True
    """
    return is_hooked(model)


def ending_at(model: HookedModel, layer: int) -> tuple[dict[str, Any], Hooks]:
    """Options and hooks of a forward pass that ends before block `layer` (or after the last one) and gives the stream there.

    A bridge stops before a block only; after the last one it is a hook, to come after all others, that stops it in the same way.
    """
    if layer < model.cfg.n_layers or can_start_at_layer(model):
        return {"return_type": None, "stop_at_layer": layer}, []
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    def stop(act: Tensor, hook: Any) -> None:
        raise StopAtLayerException(act)

    last = [(f"blocks.{layer - 1}.hook_resid_post", stop)]
    return {"return_type": None, "use_cache": False}, last


@typed
def run_to(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], layer: int
) -> Float[Tensor, "batch pos d_model"]:
    """Run a model up to a block; the hooks of the blocks before it fire.

    Args:
        model: On either backend.
        tokens: Ids, padded on either side.
        mask: 1 for real tokens.
        layer: The block before which the pass ends; `n_layers` is after the last one.

    Returns:
        The residual stream there.

    Raises:
        FloatingPointError: NaN or infinity in it, with the first layer that has them.

    Example:
        >>> tokens, mask = em.models.pad(em.models.encode(model, ["The door", "Snow"]), "left", "cpu")
        >>> em.models.run_to(model, tokens, mask, 2).shape[-1]
        32
    """
    options, hooks = ending_at(model, layer)

    def run(more: Hooks = ()) -> Tensor:
        forward = partial(model.run_with_hooks, tokens, attention_mask=mask, **options)
        return forward(fwd_hooks=[*more, *hooks])

    return checked(model, run(), run, mask)


@typed
def run_from(
    model: HookedModel,
    resid: Float[Tensor, "batch pos d_model"],
    mask: Int[Tensor, "batch pos"],
    layer: int,
) -> Float[Tensor, "batch pos d_model"]:
    """Run a `HookedTransformer` on from a block; a bridge cannot skip what is before it.

    Args:
        model: One that can start at a layer.
        resid: The residual stream before that block.
        mask: 1 for real tokens.
        layer: The first block that runs.

    Returns:
        The residual stream after the last block.

    Raises:
        FloatingPointError: as `run_to`.

    Example:
        >>> resid, mask = torch.ones(1, 3, 32), torch.ones(1, 3, dtype=torch.long)
        >>> if em.models.can_start_at_layer(model):
        ...     resid = em.models.run_from(model, resid, mask, 1)
        >>> resid.shape
        torch.Size([1, 3, 32])
    """
    options = {"start_at_layer": layer, "stop_at_layer": model.cfg.n_layers}
    run = partial(model.run_with_hooks, resid, attention_mask=mask, return_type="logits", **options)
    return checked(model, run(), lambda more: run(fwd_hooks=more), mask)


class Decoder:
    """Logits of the next token step by step with a KV cache, the same on either backend.

    The batch is padded on the left, so that every row's next token is the last column. The unembedding is computed for that column alone.

    Args:
        model: On either backend.
        mask: `[batch pos]`, 1 for the real tokens of the prompts.
        layer: Where each step starts, for a caller that has the stream before it (`can_start_at_layer`); 0 takes tokens.

    Raises:
        ValueError: a layer for a model that cannot start at one.

    Example:
        >>> tokens, mask = em.models.pad(em.models.encode(model, ["The door", "Snow"]), "left", "cpu")
        >>> step = em.models.Decoder(model, mask)
        >>> written = step(tokens).argmax(-1, keepdim=True)
        >>> step(written).shape
        torch.Size([2, 320])
    """

    cache: Any  # TransformerLens's, or Hugging Face's

    def __init__(self, model: HookedModel, mask: Int[Tensor, "batch pos"], layer: int = 0) -> None:
        self.model, self.mask, self.layer, self.seen = model, mask, layer, 0
        # what is in the cache: read once more where a number is not finite
        self.fed: list[Tensor] = []
        self.hooked = can_start_at_layer(model)
        if self.hooked:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as Cache

            self.cache = Cache.init_cache(model.cfg, device_of(model), len(mask))
        elif layer:
            raise ValueError("this backend cannot start at a layer")

    def __call__(
        self, x: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"], *, keep: bool = True
    ) -> Float[Tensor, "batch d_vocab"]:
        """Read more tokens.

        Args:
            x: Their ids, or their stream before `layer`.
            keep: Remember them for the next call; without, the call leaves no trace.

        Returns:
            Logits of the token after the last one.

        Raises:
            FloatingPointError: NaN or infinity in the logits; as `checked`.
        """
        new, mask = x.shape[1], self.mask
        if self.seen:
            mask = torch.cat([mask, mask.new_ones((len(x), new))], 1)
        fed = [*self.fed, x]
        again = partial(self._anew, fed=fed, mask=mask)
        if self.hooked:
            if not keep:
                self.cache.freeze()
            options = {"return_type": "logits", "stop_at_layer": self.model.cfg.n_layers}
            if self.layer or x.ndim == 3:
                options |= {"start_at_layer": self.layer, "attention_mask": mask}
            else:
                options |= {"attention_mask": mask[:, -new:]}
            try:
                resid = self.model(x, past_kv_cache=self.cache, **options)
            finally:
                self.cache.unfreeze()
            logits = unembed(self.model, resid[:, -1:], again)[:, 0]
        else:
            options = {"return_type": "logits_and_cache", "use_cache": True, "logits_to_keep": 1}
            if self.seen:
                options["past_key_values"] = self.cache
            logits, cache = self.model(x, attention_mask=mask, **options)
            logits = checked(self.model, logits[:, -1], again)
            if keep:
                self.cache = cache
            elif self.seen:
                self.cache.crop(-new)
        if keep:
            self.mask, self.seen, self.fed = mask, self.seen + new, fed
        return logits

    def _anew(self, more: Hooks, fed: list[Tensor], mask: Tensor) -> None:
        """Everything that was fed once more, without a cache."""
        x = torch.cat(fed, 1)
        options: dict[str, Any] = {"return_type": "logits", "fwd_hooks": more}
        if self.layer or x.ndim == 3:
            options["start_at_layer"] = self.layer
        self.model.run_with_hooks(x, attention_mask=mask, **options)

"""Run the blocks at Hugging Face's speed where nobody looks inside them.

TransformerLens computes a block in pieces, so that every intermediate value has a hook point, in a bridge as well. Where no hook is on an inner one (q, k, v,
z, the attention scores and pattern, norms, the MLP's hidden layer), a block can be computed as its Hugging Face original does:
attention without its pattern, norms and rotary in one go. The hook points at a block's edges (resid_pre, attn_out, resid_mid,
mlp_out, resid_post) fire in both cases, on the same values to float noise. A block with a hook inside, with a part that someone has replaced,
or of a kind that is not known here runs as TransformerLens wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from emolens._typing import HookedModel, is_hooked

EDGES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "GPTNeoXForCausalLM")
# what changes a block's arithmetic; each is False, None or 0 in the models that emolens converts
UNKNOWN = (
    "use_attn_in", "use_split_qkv_input", "use_attn_result", "use_hook_mlp_in", "use_qk_norm", "clip_qkv", "use_logn_attn",
    "use_dynamic_ntk_rope", "use_attention_sinks", "load_in_4bit", "use_normalization_before_and_after", "attn_only",
    "rotary_adjacent_pairs", "use_local_attn",
)  # fmt: skip


@contextmanager
def fused(model: HookedModel) -> Iterator[None]:
    """Let blocks without inner hooks compute their output in fewer and larger steps while it lasts; for passes without gradients.

    Args:
        model: On either backend; it is as before when the context is left.

    Returns:
        A context manager.

    Example:
        >>> with torch.no_grad(), em.models.fused(model):
        ...     model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 320])
    """
    if is_hooked(model):
        blocks, rotary = [b for b in model.blocks if _known(b)], _Rotary()
        forwards = [(b, partial(_forward, b, b.forward, _inner(b, EDGES), rotary)) for b in blocks]
    else:
        forwards = _hugging_face(model)
    for part, forward in forwards:
        vars(part)["forward"] = forward  # a bridge hands an ordinary assignment on to what it wraps
    try:
        yield
    finally:
        for part, _ in forwards:
            del vars(part)["forward"]


def _inner(part: Any, edges: tuple[str, ...]) -> list[Any]:
    """Everything inside a block, or a part of a bridge's, but these hook points of its own."""
    own = {id(getattr(part, name, None)) for name in edges}
    return [p for p in part.modules() if p is not part and id(p) not in own]


def _watched(parts: list[Any]) -> bool:
    return any(p._forward_hooks or p._forward_pre_hooks or p._backward_hooks for p in parts)


def _hugging_face(model: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """Parts of a `TransformerBridge`'s blocks with a forward that goes to what they wrap, Hugging Face's own attention, norms and products.

    None where the bridge computes something else than the model that it wraps.
    """
    if (
        model.cfg.architecture not in ARCHITECTURES
        or model.compatibility_mode
        or any(getattr(model.cfg, name, None) for name in UNKNOWN)
    ):
        return []
    # a part, its other forward, and the hook points that this calls
    wrapped: list[tuple[Any, Callable[..., Any], tuple[str, ...]]] = []
    for block in model.blocks:
        linear = [part for part in block.modules() if type(part).__name__ == "LinearBridge"]
        wrapped += [(part, part.original_component, ()) for part in linear]
        wrapped += [(ln, partial(_bridged_norm, ln), ("hook_in",)) for ln in (block.ln1, block.ln2)]
        # GPT-NeoX's works on copies of what it wraps, which may have been edited
        if type(block.attn).__name__ == "PositionEmbeddingsAttentionBridge":
            wrapped.append((block.attn, partial(_bridged_attention, block.attn), ("hook_out",)))
    return [
        (part, partial(_unwatched, _points(part, edges), forward, part.forward))
        for part, forward, edges in wrapped
        if "forward" not in vars(part)
    ]


def _points(part: Any, edges: tuple[str, ...]) -> list[Any]:
    """Its hook points alone: torch's hooks on what is wrapped, which Hugging Face sets as well, fire either way."""
    return [p for p in _inner(part, edges) if type(p).__name__ == "HookPoint"]


def _unwatched(
    inner: list[Any], forward: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:  # fmt: skip
    return (original if _watched(inner) else forward)(*args, **kwargs)


def _bridged_norm(ln: Any, x: Tensor) -> Tensor:
    return ln.original_component(ln.hook_in(x))


def _bridged_attention(attn: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    attn_out, *others = attn.original_component(*args, **kwargs)
    return attn.hook_out(attn_out), *others


KINDS = {
    "Attention", "GroupedQueryAttention", "GatedMLP", "MLP", "BiasedGatedMLP", "RMSNorm", "LayerNorm"
}  # fmt: skip


def _known(block: Any) -> bool:
    cfg = block.cfg
    kinds = {type(part).__name__ for part in (block.attn, block.mlp, block.ln1, block.ln2)}
    return (
        type(block).__name__ == "TransformerBlock"
        and "forward" not in vars(block)
        and cfg.original_architecture in ARCHITECTURES
        and cfg.positional_embedding_type == "rotary"
        and cfg.attention_dir == "causal"
        and not block.attn._attention_dir_override
        and not any(getattr(cfg, name, None) for name in UNKNOWN)
        and not getattr(cfg, "attn_scores_soft_cap", -1) > 0
        and kinds <= KINDS
        and not any("forward" in vars(part) for part in block.modules())
    )


@dataclass
class _Rotary:
    """Angles and mask of one batch, made by its first block and used by all."""

    key: tuple[Any, ...] = ()
    of_mask: Tensor | None = None
    cos: Tensor = field(default_factory=lambda: torch.empty(0))
    sin: Tensor = field(default_factory=lambda: torch.empty(0))
    mask: Tensor | None = None
    holes: bool = False  # a mask that is not padding on one side is TransformerLens's business

    def of(self, attn: Any, x: Tensor, attention_mask: Tensor | None) -> _Rotary:
        key = (x.shape[:2], x.device, attn.rotary_cos.shape)
        if key != self.key or attention_mask is not self.of_mask:
            width = x.shape[1]
            self.holes = (
                attention_mask is not None
                and int((attention_mask.diff(dim=-1) != 0).sum(-1).max()) > 1
            )
            self.of_mask = (
                attention_mask  # held, so that another mask cannot come to have its identity
            )
            self.key, self.mask, position = key, None, torch.arange(width, device=x.device)[None]
            # padding on the right: a real token never looks at what comes after it
            if attention_mask is not None and not bool((attention_mask[:, 0] == 1).all()):
                real = attention_mask.to(x.device).bool()
                position = (real.cumsum(-1) - 1).clamp_min(0)
                causal = torch.ones((width, width), dtype=torch.bool, device=x.device).tril()
                # or a padding row would have nothing to look at
                itself = torch.eye(width, dtype=torch.bool, device=x.device)
                self.mask = (causal & real[:, None, None]) | itself
            self.cos = attn.rotary_cos.to(x.device)[position][:, None]
            self.sin = attn.rotary_sin.to(x.device)[position][:, None]
        return self


def _forward(
    block: Any,
    original: Callable[..., Tensor],
    inner: list[Any],
    rotary: _Rotary,
    resid_pre: Tensor,
    shortformer_pos_embed: Tensor | None = None,
    past_kv_cache_entry: Any = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    # TransformerLens extends the angles itself
    too_long = resid_pre.shape[1] > block.attn.rotary_cos.shape[0]
    more = past_kv_cache_entry is not None or shortformer_pos_embed is not None
    if (
        _watched(inner)
        or too_long
        or more
        or rotary.of(block.attn, resid_pre, attention_mask).holes
    ):
        return original(
            resid_pre,
            shortformer_pos_embed=shortformer_pos_embed,
            past_kv_cache_entry=past_kv_cache_entry,
            attention_mask=attention_mask,
        )
    resid_pre = block.hook_resid_pre(resid_pre)
    attn_in = _norm(block.ln1, resid_pre)
    attn_out = block.hook_attn_out(_attention(block.attn, attn_in, rotary))
    resid_pre = resid_pre.to(attn_out.device)
    if block.cfg.parallel_attn_mlp:
        mlp_out = block.hook_mlp_out(_mlp(block.mlp, _norm(block.ln2, resid_pre)))
        return block.hook_resid_post(resid_pre + attn_out + mlp_out)
    resid_mid = block.hook_resid_mid(resid_pre + attn_out)
    mlp_out = block.hook_mlp_out(_mlp(block.mlp, _norm(block.ln2, resid_mid)))
    return block.hook_resid_post(resid_mid + mlp_out)


def _norm(ln: Any, x: Tensor) -> Tensor:
    x = x.to(ln.w.device)
    if type(ln).__name__ == "RMSNorm":
        return functional.rms_norm(x, x.shape[-1:], ln.w, ln.eps)
    return functional.layer_norm(x, x.shape[-1:], ln.w, ln.b, ln.eps)


def _attention(attn: Any, x: Tensor, rotary: _Rotary) -> Tensor:
    grouped = "_" if type(attn).__name__ == "GroupedQueryAttention" else ""
    q, k, v = (
        _heads(x, getattr(attn, f"{prefix}W_{name}"), getattr(attn, f"{prefix}b_{name}"))
        for prefix, name in (("", "Q"), (grouped, "K"), (grouped, "V"))
    )
    q, k = _rotate(q, attn.cfg.rotary_dim, rotary), _rotate(k, attn.cfg.rotary_dim, rotary)
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    z = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=rotary.mask,
        is_causal=rotary.mask is None,
        scale=1 / float(attn.attn_scale),
    )
    # a free view of the weights in the layout that the adapters give them
    w_o = attn.W_O.permute(2, 0, 1).flatten(1)
    return functional.linear(z.transpose(1, 2).flatten(2), w_o, attn.b_O)


def _heads(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`[batch head pos d_head]`"""
    flat = functional.linear(x, w.transpose(1, 2).flatten(0, 1), b.flatten())
    return flat.unflatten(-1, (len(w), -1)).transpose(1, 2)


def _rotate(x: Tensor, rotary_dim: int, rotary: _Rotary) -> Tensor:
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * rotary.cos + torch.cat([-b, a], dim=-1) * rotary.sin
    return torch.cat([turned, passed], dim=-1) if passed.shape[-1] else turned


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    kind = type(mlp).__name__
    if kind == "GatedMLP" and not mlp.cfg.is_layer_norm_activation() and not mlp.b_in.any():
        x = x.to(mlp.W_gate.device)
        gate = functional.linear(x, mlp.W_gate.T)
        gate = functional.silu(gate, inplace=True) if mlp.cfg.act_fn == "silu" else mlp.act_fn(gate)
        return functional.linear(
            gate.mul_(functional.linear(x, mlp.W_in.T)), mlp.W_out.T, mlp.b_out
        )
    return mlp(x)

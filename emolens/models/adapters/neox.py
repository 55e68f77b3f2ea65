"""Pythia (GPT-NeoX): LayerNorm, partial rotary, fused QKV, parallel or sequential residual.

The fused ``query_key_value`` weight interleaves q, k and v head by head, so no view of it is contiguous across heads: it is
laid out anew, one block at a time, and the fused tensor of that block is let go, so that a load holds one extra block at most.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emolens.models.adapters import _refuse


def config(hf: Any) -> dict[str, Any]:
    """Fields of `HookedTransformerConfig` for a GPT-NeoX config."""
    _refuse.features(hf)
    _, rope = _refuse.rope_type(hf, ("default",))
    d_head = hf.hidden_size // hf.num_attention_heads
    fraction = rope.get("partial_rotary_factor", getattr(hf, "rotary_pct", 1.0))
    return {
        "d_model": hf.hidden_size,
        "d_head": d_head,
        "n_heads": hf.num_attention_heads,
        "n_layers": hf.num_hidden_layers,
        "n_ctx": hf.max_position_embeddings,
        "d_mlp": hf.intermediate_size,
        "d_vocab": hf.vocab_size,
        "act_fn": _refuse.activation(hf.hidden_act),
        "eps": hf.layer_norm_eps,
        "attn_scale": d_head**0.5,
        "normalization_type": "LN",
        "parallel_attn_mlp": hf.use_parallel_residual,
        "positional_embedding_type": "rotary",
        "rotary_dim": int(d_head * fraction),
        "rotary_base": rope["rope_theta"],
    }


def parameters(hf_model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter under TransformerLens's name; all but q, k, v are views of the HF tensors.

    The HF model is taken apart while this runs: each fused weight is emptied once its three parts are yielded.
    """
    n_heads = hf_model.config.num_attention_heads
    yield "embed.W_E", hf_model.gpt_neox.embed_in.weight
    for i, layer in enumerate(hf_model.gpt_neox.layers):
        block, attn, mlp = f"blocks.{i}.", layer.attention, layer.mlp
        for part in (attn.query_key_value, attn.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h):
            _refuse.plain(part)
        for ln, norm in (("ln1", layer.input_layernorm), ("ln2", layer.post_attention_layernorm)):
            yield f"{block}{ln}.w", norm.weight
            yield f"{block}{ln}.b", norm.bias
        fused = attn.query_key_value
        # [head, qkv, d_head, d_model]
        weight = fused.weight.detach().unflatten(0, (n_heads, 3, -1))
        bias = None if fused.bias is None else fused.bias.detach().unflatten(0, (n_heads, 3, -1))
        for k, name in enumerate("QKV"):
            yield f"{block}attn.W_{name}", weight[:, k].contiguous().transpose(1, 2)
            if bias is not None:
                yield f"{block}attn.b_{name}", bias[:, k].contiguous()
        fused.weight, weight = nn.Parameter(torch.empty(0), requires_grad=False), None
        yield block + "attn.W_O", attn.dense.weight.unflatten(1, (n_heads, -1)).permute(1, 2, 0)
        if attn.dense.bias is not None:
            yield block + "attn.b_O", attn.dense.bias
        yield block + "mlp.W_in", mlp.dense_h_to_4h.weight.T
        yield block + "mlp.b_in", mlp.dense_h_to_4h.bias
        yield block + "mlp.W_out", mlp.dense_4h_to_h.weight.T
        yield block + "mlp.b_out", mlp.dense_4h_to_h.bias
    yield "ln_final.w", hf_model.gpt_neox.final_layer_norm.weight
    yield "ln_final.b", hf_model.gpt_neox.final_layer_norm.bias
    yield "unembed.W_U", _refuse.plain(hf_model.lm_head).weight.T

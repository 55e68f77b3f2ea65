"""Estimates against what is really there: parameters, tokens, disk and time."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import emolens as em
from emolens import cli
from emolens.collect import planning
from emolens.collect.collection import collect_to
from emolens.models.catalogue import CATALOGUE
from emolens.models.tokens import encode


@pytest.fixture(scope="module")
def toy(toy_set):
    return em.load_emotion_set(toy_set)


def test_a_plan_counts_what_a_run_then_makes(tiny_model, toy, tmp_path):
    plan = planning.plan_measured(tiny_model, toy, seconds=0.2)
    collection = collect_to(tmp_path / "c", tiny_model, toy, progress=False)
    assert plan.n_texts == collection.n_texts == 56
    stories = [len(e.ids) for e in encode(tiny_model, [t.text for _, t in toy.texts()])]
    assert plan.tokens_per_text == pytest.approx(sum(stories) / len(stories))
    assert plan.block_parameters == sum(
        p.numel() for b in tiny_model.blocks for p in b.parameters()
    )
    assert plan.weight_bytes == 4 * sum(p.numel() for p in tiny_model.parameters())
    written = sum(file.stat().st_size for file in (tmp_path / "c").glob("*.safetensors"))
    assert (
        0.6 < plan.disk / written < 1.3
    )  # what is known of a text weighs as much as rows of 32 numbers; benchmarks have a real one
    assert plan.n_neutral == sum(t.split == "neutral" for t in collection.load().texts) == 16
    assert plan.moment_bytes == 8 * 4 * 8 * 3 * 32


def test_a_plan_scales_with_stories_layers_and_devices(tiny_model, toy):
    one = planning.plan_measured(tiny_model, toy, seconds=0.1)
    many = planning.plan_measured(
        tiny_model, toy, stories_per_emotion=1200, layers=[0], devices=8, seconds=0.1
    )
    assert many.n_texts == 4 * 1200 + 16
    assert many.block_parameters * 3 == one.block_parameters
    assert many.hours == pytest.approx(many.n_tokens / many.tokens_per_second / 8 / 3600)


def test_a_named_device_needs_no_model(toy):
    plan = planning.plan_named("llama-3-8b", toy, "h100", stories_per_emotion=1200, devices=8)
    per_token = 2 * plan.block_parameters + 2 * 32 * 4096 * plan.tokens_per_text
    assert (
        plan.block_parameters == 8_030_261_248 - 2 * 128_256 * 4096 - 4096
    )  # the published size, less embeddings and last norm
    assert plan.flops == pytest.approx(plan.n_tokens * per_token)
    assert plan.tokens_per_second * per_token == pytest.approx(0.4 * 989e12)
    with pytest.raises(ValueError, match="device 'tpu' is not known; known: h200, h100"):
        planning.plan_named("llama-3-8b", toy, "tpu")
    with pytest.raises(ValueError, match="'mine' is not in the catalogue"):
        planning.plan_named("mine", toy, "h100")
    with pytest.raises(ValueError, match=r"layer 40 does not exist; this model has layers 0 to 31"):
        planning.plan_named("llama-3-8b", toy, "h100", layers=[40])


def test_blocks_are_part_of_every_model_of_the_catalogue():
    for entry in CATALOGUE.values():
        assert 0.1 < entry.n_block_parameters / entry.n_parameters < 1


def test_the_command_prints_the_formulas(tiny, toy_set):
    run = CliRunner().invoke(
        cli.app, ["plan", "-m", "llama-3-70b", "-s", str(toy_set), "--device-name", "a100"]
    )
    assert run.exit_code == 0
    for word in (
        "texts",
        "tokens",
        "operations",
        "memory",
        "speed",
        "time",
        "disk",
        "40% of the peak of a100",
    ):
        assert word in run.output
    run = CliRunner().invoke(
        cli.app, ["plan", "-m", str(tiny("llama", tokenizer="chat")), "-s", str(toy_set)]
    )
    assert run.exit_code == 0
    assert "measured here for" in run.output

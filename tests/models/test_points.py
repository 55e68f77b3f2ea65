"""Which layers and hook points a model has, in one wording, whatever library a layer's number comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import emolens as em
from emolens._typing import HookedModel, block_number, block_numbers
from emolens.collect import planning
from emolens.models.points import check_layers, device_of, existing_layers, layers_with

PROMPT = "The door was open when she came home."
WHOLE: dict[str, Callable[[int], Any]] = {
    "python": int, "numpy": np.int64, "torch": torch.tensor, "array": np.array,
}  # fmt: skip


@pytest.mark.parametrize("number", WHOLE.values(), ids=WHOLE)
def test_a_layer_is_a_whole_number_of_any_library(number: Callable[[int], Any]) -> None:
    assert block_number(number(2)) == 2
    assert type(block_number(number(2))) is int
    assert block_numbers(number(2)) == block_numbers([number(2)]) == (2,)


def test_several_layers_are_any_row_of_them() -> None:
    rows = ([2, 0], (2, 0), np.array([2, 0]), torch.tensor([2, 0]), iter([2, 0]))
    assert {block_numbers(row) for row in rows} == {(2, 0)}
    assert block_numbers(range(2)) == (0, 1)


@pytest.mark.parametrize(
    "wrong", [True, np.True_, torch.tensor(True), 1.0, np.float64(1), torch.tensor(1.0), "1", None, ["1"], [True]], ids=repr
)  # fmt: skip
def test_what_is_no_whole_number_is_no_layer(wrong: Any) -> None:
    with pytest.raises(ValueError, match="layers are block numbers, such as 18"):
        block_numbers(wrong)


@pytest.mark.parametrize("hook_point", ["resid_post", "resid_mid", "z", "embed"])
def test_a_layer_that_is_not_there_is_said_with_those_that_are(
    tiny_model: Any, hook_point: Any
) -> None:
    if hook_point == "embed":
        assert check_layers(tiny_model, hook_point, [7]) == (0,)
        return
    assert check_layers(tiny_model, hook_point) == (0, 1, 2)
    assert check_layers(tiny_model, hook_point, torch.tensor([2, 0])) == (2, 0)
    for wrong in (3, -1, [0, 7], True, "1"):
        with pytest.raises(
            ValueError, match=r"layer .* does not exist; this model has layers 0 to 2"
        ):
            check_layers(tiny_model, hook_point, wrong)
    with pytest.raises(ValueError, match="layer 1 is there twice"):
        check_layers(tiny_model, hook_point, [1, np.int64(1)])
    with pytest.raises(ValueError, match="layers is empty; give block indices, or None for all"):
        check_layers(tiny_model, hook_point, [])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_parallel_model_has_no_resid_mid_whatever_its_hooks_are_called(
    tiny: Callable[..., Any], backend: Any
) -> None:
    try:
        model = em.load_model(tiny("neox"), backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    assert layers_with(model, "resid_mid") == ()
    assert layers_with(model, "mlp_out") == (0, 1, 2)
    match = r"no blocks\.1\.hook_resid_mid .*; it has: resid_pre, resid_post, attn_out, mlp_out"
    with pytest.raises(KeyError, match=match):
        check_layers(model, "resid_mid", 1)
    with pytest.raises(KeyError, match=match):
        em.collect_resid_mid(model, [PROMPT], layers=1, progress=False)
    with pytest.raises(KeyError, match=match):
        em.patch_resid_mid(model, clean=PROMPT, corrupted=PROMPT, metric=len, layers=1)


def test_every_room_says_the_same_of_a_layer_that_is_not_there(
    tiny_model: Any, toy_set: Any
) -> None:
    hooks = em.steer_resid_post(torch.ones(32), layer=9, dose=1.0, dose_unit="raw")
    calls: tuple[Callable[[], Any], ...] = (
        lambda: em.collect_resid_post(tiny_model, [PROMPT], layers=9, progress=False),
        lambda: em.patch_z(tiny_model, clean=PROMPT, corrupted=PROMPT, metric=len, layers=[9]),
        lambda: em.generate(tiny_model, PROMPT, hooks),
        lambda: em.check(tiny_model, hooks, PROMPT),
        lambda: planning.plan_measured(tiny_model, em.load_emotion_set(toy_set), layers=9),
        lambda: existing_layers(9, 3),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match="layer 9 does not exist; this model has layers 0 to 2"
        ):
            call()


@pytest.fixture(scope="module")
def fitted(tiny_model: Any, toy_set: Any) -> tuple[em.EmotionSet, em.Activations, Any]:
    stories = em.load_emotion_set(toy_set)
    acts = em.collect_resid_post(tiny_model, stories, progress=False)
    return stories, acts, em.mean_difference(acts)


def _calls(model: Any, stories: em.EmotionSet, acts: em.Activations, v: Any) -> dict[str, Any]:
    """Every public call that takes a layer, of the layer, to something that can be compared."""
    one, words = v["glimmer"], {e.name: e.target_words for e in stories.emotions}
    cache = {f"blocks.{k}.hook_resid_post": torch.zeros(1, 9, 32) for k in range(3)}
    pair: dict[str, Any] = {"clean": "Mara sang.", "corrupted": "Mara wept."}

    def first(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0]

    def specs(hooks: Any) -> list[str]:
        return [str(hook.spec) for _, hook in hooks]

    return {
        "collect": lambda k: em.collect_resid_post(model, [PROMPT], layers=k, progress=False).rows,
        "acts.at": lambda k: acts.at(k).rows,
        "plan": lambda k: planning.plan_named("llama-3-8b", stories, "h100", layers=k).flops,
        "at": lambda k: v.at(k).vectors,
        "slot": lambda k: v.slot(k),
        "unit": lambda k: v.unit(k),
        "item": lambda k: v["glimmer", k].vectors,
        "cosine": lambda k: v.cosine(layer=k),
        "nearest": lambda k: [name for name, _ in one.nearest(layer=k)],
        "score": lambda k: em.score(model, v, PROMPT, per="token", layer=k).layer,
        "logit_lens": lambda k: em.logit_lens(model, v, words, layer=k).layer,
        "steer": lambda k: specs(em.steer_resid_post(one, layer=k, dose=0.1)),
        "steer from": lambda k: em.steer_resid_post(one, layer=0, direction_from=k, dose=0.1)[0][1].tensors[0],
        "ablate": lambda k: specs(em.ablate_resid_post(one, layer=k)),
        "clamp": lambda k: specs(em.clamp_resid_post(one, layer=k, value=1.0)),
        "rotate": lambda k: specs(em.rotate_resid_post(one, angle=0.5, layer=k)),
        "patch hook": lambda k: specs(em.interventions.patch_resid_post(cache, layer=k)),
        "projection": lambda k: em.projection(one, layer=k).layer,
        "attribute": lambda k: em.attribute(model, one, PROMPT, layer=k).values,
        "patch": lambda k: em.patch_resid_pre(model, **pair, metric=first, layers=k).values,
        "attribution_patching": lambda k: em.attribution_patching(model, **pair, metric=first, layers=k).layers,
        "generate": lambda k: em.generate(model, PROMPT, max_new_tokens=1, read=v, layer=k).scores[0],
        "sweep": lambda k: em.sweep(model, PROMPT, v, layers=k, doses=[0.1], target_words=words, controls={}).change,
        "calibrate_dose": lambda k: em.calibrate_dose(model, one, [PROMPT] * 4, layer=k).layer,
        "figure": lambda k: len(em.report.cosine_matrix(v, layer=k).axes),
    }  # fmt: skip


@pytest.mark.parametrize("library", ["numpy", "torch", "array"])
def test_every_call_takes_a_layer_of_any_library(
    tiny_model: Any, fitted: Any, library: str
) -> None:
    for name, call in _calls(tiny_model, *fitted).items():
        expected, found = call(1), call(WHOLE[library](1))
        same = (
            torch.equal(torch.as_tensor(expected).nan_to_num(), torch.as_tensor(found).nan_to_num())
            if isinstance(expected, torch.Tensor | np.ndarray)
            else expected == found
        )
        assert same, f"{name} of {library}"


def test_the_device_is_that_of_the_config_or_the_cpu(tiny_model: Any) -> None:
    assert device_of(tiny_model) == torch.device("cpu") == tiny_model.W_E.device


def test_a_model_is_known_by_its_methods_and_nothing_is_computed_to_ask(tiny_model: Any) -> None:
    class Costly(torch.nn.Module):
        context_level, cfg, tokenizer, hook_dict, blocks, W_E, ln_final, unembed = range(8)

        def run_with_hooks(self) -> None: ...
        def run_with_cache(self) -> None: ...
        def hooks(self) -> None: ...

        @property
        def W_O(self) -> torch.Tensor:
            raise AssertionError("a bridge stacks every block's weights here")

    assert isinstance(tiny_model, HookedModel)
    assert isinstance(Costly(), HookedModel)
    assert not isinstance(torch.nn.Linear(2, 2), HookedModel)
    assert not isinstance("pythia-70m", HookedModel)

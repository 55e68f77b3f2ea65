"""Vectors from elsewhere as directions: what works with them, and what says that it needs more than a vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emolens as em
from emolens.directions.value import EmotionDirections

D = 32
UP = torch.arange(D, dtype=torch.float32) - 10
TEXT = "The door was open when she came home."


@pytest.fixture
def given(tiny_model) -> EmotionDirections:
    vectors = {"up": UP, "down": -UP.numpy(), "side": torch.ones(D).tolist()}
    return _given(tiny_model, vectors)


def _given(of, vectors, **change) -> EmotionDirections:
    options = {"model": em.model_info(of), "hook_point": "resid_post", "layers": 1} | change
    return EmotionDirections.from_tensors(vectors, **options)


def test_tensors_arrays_and_lists_become_directions_of_their_model(given, tiny_model):
    assert given.emotions == ("up", "down", "side")
    assert given.layers == (1,)
    assert given.layer == 1
    assert torch.equal(given["up"].tensor(), UP)
    assert torch.equal(given["down"].tensor(1), -UP)
    assert given.nearest("up").to_dicts()[-1] == pytest.approx({"emotion": "down", "cosine": -1.0})
    assert given.info["model"] == em.model_info(tiny_model).to_dict()
    assert not {
        k for k in ("reference", "norm_median", "norm_mean") if getattr(given, k).isfinite().any()
    }


def test_they_are_copies_whatever_they_came_from(tiny_model):
    decoder = torch.nn.Parameter(torch.randn(5, D, dtype=torch.float64))
    made = _given(tiny_model, {"feature 3": decoder[3]})
    assert made.vectors.dtype == torch.float32
    assert not made.vectors.requires_grad
    same = torch.ones(D)
    made = _given(tiny_model, {"a": same})
    same.zero_()
    assert made.vectors.eq(1).all()


def test_several_layers_take_a_row_each(tiny_model):
    rows = torch.randn(2, D)
    made = _given(tiny_model, {"a": rows}, layers=np.array([0, 2]), norm_median=torch.tensor([3.0, 4.0]), reference=np.ones((2, D)))  # fmt: skip
    assert torch.equal(made["a"].tensor(2), rows[1])
    assert made.layer == 2
    assert made.norm_median.tolist() == [3.0, 4.0]
    assert made.centre(0).tolist() == [1.0] * D


def test_a_cache_of_the_model_gives_a_direction_that_steers_it(tiny_model):
    _, cache = tiny_model.run_with_cache("The door was open.")
    difference = cache["resid_post", 1][0, -1] - cache["resid_post", 1][0, 2]
    made = _given(tiny_model, {"end": difference}, norm_median=2.0)
    tokens = torch.tensor([[5, 6, 7, 8]])
    plain = tiny_model(tokens)
    with tiny_model.hooks(fwd_hooks=em.steer_resid_post(made["end"], dose=0.5)):
        by_norm = tiny_model(tokens)
    with tiny_model.hooks(fwd_hooks=em.steer_resid_post(made["end"], dose=1.0, dose_unit="raw")):
        raw = tiny_model(tokens)
    assert not torch.allclose(plain, raw)
    torch.testing.assert_close(by_norm, raw)  # half of a norm of two


def test_they_combine_with_fitted_ones_and_come_back_from_a_file(given, tiny_model, tmp_path):
    assert (given["up"] + given["side"]).emotions == ("up + side",)
    given.save(tmp_path / "given.safetensors")
    back = em.load_directions(tmp_path / "given.safetensors")
    assert torch.equal(back.vectors, given.vectors)
    assert back.info == given.info
    assert back.calibration is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v: em.steer_resid_post(v["up"], dose=1.0), "the median residual norm .* is not known .* dose_unit='raw'"),
        (lambda m, v: em.ablate_resid_post(v["up"]), r"know no mean activation .* from_tensors\(\.\.\., reference=\)"),
        (lambda m, v: em.projection(v["up"]), "know no mean activation"),
        (lambda m, v: em.logit_lens(m, v, {"up": ["door"], "down": ["home"]}), "know no mean activation"),
        (lambda m, v: em.score(m, v, TEXT), "no calibration .*from tensors"),
        (lambda m, v: em.score(m, v, TEXT, per="token"), "no calibration .*from tensors"),
    ],
    ids=["dose", "affine ablation", "projection", "lens", "score", "token score"],
)  # fmt: skip
def test_a_call_that_needs_more_than_a_vector_says_so(given, tiny_model, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model, given)


@pytest.mark.parametrize(
    ("vectors", "change", "message"),
    [
        ({"a": torch.ones(7)}, {}, r"the vector of 'a' has shape \[7\]; \[d_model\] is \[32\] here"),
        ({"a": torch.ones(D)}, {"layers": [0, 1]}, r"has shape \[32\]; \[layer d_model\] is \[2, 32\] here"),
        ({"a": torch.full((D,), torch.nan)}, {}, "'a' is not finite"),
        ({}, {}, "no vectors given"),
        ({"a": UP}, {"layers": 3}, "layers=3: blocks of .*, 0 to 2, each once"),
        ({"a": torch.ones(2, D)}, {"layers": [1, 1]}, r"layers=\[1, 1\]: .* each once"),
        ({"a": UP}, {"layers": ()}, r"layers=\(\)"),
        ({"a": UP}, {"hook_point": "resid_pst"}, "hook_point='resid_pst'; allowed: embed, resid_pre"),
        ({"a": UP}, {"norm_median": -1.0}, "norm_median=-1.0: a positive number"),
        ({"a": UP}, {"norm_median": [1.0, 2.0]}, "one for each layer"),
        ({"a": UP}, {"reference": torch.ones(5)}, r"reference has shape \[5\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(tiny_model, vectors, change, message):
    with pytest.raises(ValueError, match=message):
        _given(tiny_model, vectors, **change)


def test_a_model_itself_is_not_its_description(tiny_model):
    with pytest.raises(TypeError, match=r"model= is em\.model_info\(model\).*; this .* has no "):
        _given(tiny_model, {"a": UP}, model=tiny_model)

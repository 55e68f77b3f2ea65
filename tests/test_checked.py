"""The suite checks annotations: a wrong shape anywhere in the package is an error, though the function itself does not look."""

import checked
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import emolens as em
from emolens._typing import typed
from emolens.collect.activations import Activations


def test_a_value_of_wrong_shapes_is_refused_while_the_suite_runs(example_acts):
    fields = {f: getattr(example_acts, f) for f in Activations.__dataclass_fields__}
    assert Activations(**fields).layers == example_acts.layers
    with pytest.raises(TypeCheckError):
        Activations(**fields | {"embed": torch.zeros(3)})


def test_what_is_given_wrongly_on_purpose_meets_our_own_error(example_acts):
    with pytest.raises(ValueError, match=r"'x'"):
        example_acts.at("x")


def test_a_whole_number_is_a_float_as_it_is_for_a_type_checker():
    @typed
    def half(x: float) -> float:
        return x / 2

    assert half(1) == 0.5
    with pytest.raises(TypeCheckError):
        half("1")


def test_a_function_inside_a_function_is_checked_when_it_is_made_first(
    example_model, example_directions
):
    def make():
        def length(x: Float[Tensor, " d_model"]) -> float:
            return x.norm().item()

        return checked.of_inner(length)

    assert make()(torch.ones(4)) == 2
    with pytest.raises(TypeCheckError):
        make()(torch.ones(2, 2))
    em.check(
        example_model, em.steer_resid_post(example_directions["glimmer"], dose=0.1), "The door"
    )
    assert any("emolens" in code.co_filename for code in checked._made)

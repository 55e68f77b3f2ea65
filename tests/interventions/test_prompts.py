"""One prompt or several: a string or a chat is one, a list of them several, whichever call it is given to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import emolens as em
from emolens.sets.corpus import several

PROMPT = "She opened the letter."
CHAT = [{"role": "user", "content": "How was the walk?"}]


@pytest.fixture(scope="module")
def calls(tiny_model: Any, toy_set: Any) -> dict[str, Any]:
    """Every call that takes prompts, of the prompts, to something that can be compared."""
    stories = em.load_emotion_set(toy_set)
    v = em.mean_difference(em.collect_resid_post(tiny_model, stories, progress=False))
    one, words = v["glimmer"], {e.name: e.target_words for e in stories.emotions}
    hooks = em.steer_resid_post(one, dose=0.1)
    return {
        "positions": lambda p: em.positions(tiny_model, p).chosen,
        "check": lambda p: em.check(tiny_model, hooks, p).fired,
        "generate": lambda p: em.generate(tiny_model, p, hooks, max_new_tokens=2).tokens,
        "sweep": lambda p: em.sweep(tiny_model, p, v, doses=[0.1], target_words=words, controls={}).change,
        "prompt_baseline": lambda p: em.prompt_baseline(tiny_model, p, stories).change,
        "attribute": lambda p: em.attribute(tiny_model, one, p).values,
        "collect": lambda p: em.collect_resid_post(tiny_model, p, progress=False).rows,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["positions", "check", "generate", "sweep", "prompt_baseline", "attribute", "collect"],
)
def test_one_prompt_is_a_list_of_it_and_none_is_refused(calls: dict[str, Any], name: str) -> None:
    call = calls[name]
    for prompt in (PROMPT, CHAT):
        alone, listed = call(prompt), call([prompt])
        if isinstance(alone, torch.Tensor | np.ndarray):
            np.testing.assert_array_equal(np.asarray(alone), np.asarray(listed))
        else:
            assert alone == listed
    with pytest.raises(ValueError, match="no texts given"):
        call([])


def test_patching_and_baking_ask_for_prompts_too(tiny_model: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="no texts given"):
        em.patch_resid_pre(tiny_model, clean=[], corrupted=[], metric=len)
    hooks = em.steer_resid_post(torch.ones(32), layer=0, dose=1.0, dose_unit="raw")
    with pytest.raises(ValueError, match="no texts given"):
        em.bake("pythia-70m", hooks, out=tmp_path / "baked", prompts=[])


def test_a_chat_is_one_prompt_and_a_list_of_chats_several() -> None:
    assert several(PROMPT) == several([PROMPT]) == [PROMPT]
    assert several(CHAT) == several([CHAT]) == [CHAT]
    assert several([CHAT, PROMPT]) == [CHAT, PROMPT]
    with pytest.raises(ValueError, match="each chat is a list of its own"):
        several([PROMPT, *CHAT])

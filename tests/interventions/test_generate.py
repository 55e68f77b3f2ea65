"""Generation with hooks: the same text cached or not, alone or in a padded batch, on either backend."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

import emolens as em
from emolens.interventions.generate import generate
from emolens.models.tokens import encode

TL4 = int(importlib.metadata.version("transformer-lens").split(".")[0]) >= 4
PROMPTS = [
    "The door was open and",
    "He",
    "On Sunday the neighbours were in the garden again; a dog",
]
N = 7


@pytest.fixture(
    scope="module",
    params=[(b, f) for f in ("llama", "qwen2", "neox") for b in ("hooked", "bridge")],
    ids="-".join,
)
def model(request, tiny):
    backend, family = request.param
    if backend == "hooked" and TL4:
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    return em.load_model(tiny(family, tokenizer="bos"), backend=backend)


@pytest.fixture(scope="module")
def v(model, toy_set):
    return em.mean_difference(
        em.collect_resid_post(model, em.load_emotion_set(toy_set), progress=False)
    )


def naive(model, prompt, hooks, n=N):
    """Greedy tokens by a full forward pass for each, unpadded, without a cache; no EOS is set to stop at."""
    ids = list(encode(model, [prompt])[0].ids)
    start = len(ids)
    for _ in range(n):
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            token = int(model(torch.tensor([ids]), return_type="logits")[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        ids.append(token)
    return tuple(ids[start:])


def test_greedy_text_is_that_of_full_forward_passes_alone_and_in_a_padded_batch(model, v):
    for hooks in ([], em.steer_resid_post(v["glimmer"], layer=1, dose=0.5)):
        together = generate(model, PROMPTS, hooks, max_new_tokens=N)
        uncached = generate(model, PROMPTS, hooks, max_new_tokens=N, cache=False)
        assert together.tokens == uncached.tokens
        for i, prompt in enumerate(PROMPTS):
            assert together.tokens[i] == naive(model, prompt, hooks)
            assert generate(model, prompt, hooks, max_new_tokens=N).tokens[0] == together.tokens[i]


def test_each_row_may_have_a_direction_and_a_dose_of_its_own(model, v):
    doses = [0.5, 1.0, -0.5]
    names = ["glimmer", "gloamer", "brindle"]
    together = generate(
        model, PROMPTS, em.steer_resid_post(v[names], layer=1, dose=doses), max_new_tokens=N
    )
    for i, (name, dose) in enumerate(zip(names, doses, strict=True)):
        alone = generate(
            model, PROMPTS[i], em.steer_resid_post(v[name], layer=1, dose=dose), max_new_tokens=N
        )
        assert together.tokens[i] == alone.tokens[0]


def test_generation_positions_begin_at_the_last_prompt_token(model, v):
    """A raw hook on the last prompt token and every later one is the reference; prompts of other lengths stand beside it."""
    hooks = em.steer_resid_post(v["glimmer"], layer=1, dose=2.0, positions="generation")
    vector = 2.0 * v.norm_median[1] * v.unit(1)[0]
    seen = generate(model, PROMPTS, hooks, max_new_tokens=N)
    for i, prompt in enumerate(PROMPTS):
        n = len(encode(model, [prompt])[0].ids)

        def reference(act, hook, n=n):
            new = act.clone()
            new[:, n - 1 :] += vector
            return new

        assert seen.tokens[i] == naive(model, prompt, [("blocks.1.hook_resid_post", reference)])
    assert seen.tokens == generate(model, PROMPTS, hooks, max_new_tokens=N, cache=False).tokens


def test_chosen_prompt_tokens_are_steered_once_and_no_new_one(model, v):
    p = em.positions(model, PROMPTS, "last")
    hooks = em.steer_resid_post(v["glimmer"], layer=1, dose=2.0, positions=p)
    seen = generate(model, PROMPTS, hooks, max_new_tokens=N)
    vector = 2.0 * v.norm_median[1] * v.unit(1)[0]
    for i, prompt in enumerate(PROMPTS):
        n = len(encode(model, [prompt])[0].ids)

        def reference(act, hook, n=n):
            new = act.clone()
            new[:, n - 1] += vector
            return new

        assert seen.tokens[i] == naive(model, prompt, [("blocks.1.hook_resid_post", reference)])
    with pytest.raises(ValueError, match="other prompts"):
        generate(model, PROMPTS[::-1], hooks)


def test_sampling_does_not_depend_on_the_other_rows_and_does_on_the_seed(model):
    one, two = (em.Decoding(12, temperature=1.0, top_p=0.95, seed=seed) for seed in (1, 2))
    together = generate(model, PROMPTS, decoding=one)
    assert together.tokens[0] == generate(model, PROMPTS[0], decoding=one).tokens[0]
    assert together.tokens == generate(model, PROMPTS, decoding=one).tokens
    assert together.tokens != generate(model, PROMPTS, decoding=two).tokens
    short = generate(model, PROMPTS, max_new_tokens=2, decoding=one)
    assert short.tokens == tuple(ids[:2] for ids in together.tokens)


def test_a_small_top_p_takes_the_likeliest_token(model):
    greedy = generate(model, PROMPTS, max_new_tokens=N)
    assert generate(model, PROMPTS, decoding=em.Decoding(N, 1.0, 1e-9)).tokens == greedy.tokens


def reread(model, v, prompt, new, hooks=()):
    """z at layer 1 of new tokens in one pass over the text, with hooks or none."""
    e = encode(model, [prompt])[0]
    ids = torch.tensor([e.ids + list(new)])
    kept: list[torch.Tensor] = []
    listen = ("blocks.1.hook_resid_post", lambda act, hook: kept.append(act.detach()))
    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=[*hooks, listen])
    at = torch.arange(len(e.ids), ids.shape[1])
    return v.at([1]).token_z(kept[0][0, len(e.ids) :, None].float(), at)[:, :, 0]


@pytest.mark.parametrize("read_with", ["unsteered", "as generated"])
def test_scores_are_those_of_the_text_read_without_hooks_or_as_generated_by_name(
    model, v, read_with
):
    """Read as it was generated, every text has what was added to it."""
    hooks = em.steer_resid_post(v["glimmer"], layer=1, dose=1.0)
    g = generate(model, PROMPTS, hooks, max_new_tokens=N, read=v, layer=1, read_with=read_with)
    assert g.read_with == read_with
    for i, prompt in enumerate(PROMPTS):
        z = {
            what: reread(model, v, prompt, g.tokens[i], on)
            for what, on in (("unsteered", []), ("as generated", hooks))
        }
        torch.testing.assert_close(
            g.scores[i], z[read_with], atol=2e-3, rtol=1e-3
        )  # z of float noise
        assert (z["as generated"] - z["unsteered"])[:, v.index("glimmer")].min() > 1
    assert len(g.top(0)) == 3 == g.mood(0).count(",") + 1


def test_the_default_reads_the_text_and_a_sweep_reads_it_alike(model, v):
    hooks = em.steer_resid_post(v["glimmer"], layer=1, dose=1.0)
    g = generate(model, PROMPTS, hooks, max_new_tokens=N, read=v, layer=1)
    assert g.read_with == "unsteered"
    words = {e: ["door"] if e == "glimmer" else ["dog"] for e in v.emotions}
    s = em.sweep(
        model, PROMPTS, v["glimmer"], layers=[1], doses=[1.0], target_words=words, controls={}, max_new_tokens=N, read=v.at(1), progress=False
    )  # fmt: skip
    assert s.written.texts[0] == g.texts
    mean = torch.stack([z.mean(0) for z in g.scores])
    torch.testing.assert_close(s.written.score[0], mean, atol=2e-3, rtol=1e-3)  # z of float noise


def test_a_text_that_ends_at_once_has_no_scores(model, v):
    tokenizer = model.tokenizer
    before, first = tokenizer.eos_token, generate(model, PROMPTS[:1], max_new_tokens=1).tokens[0][0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    try:
        for read_with in ("unsteered", "as generated"):
            g = generate(model, PROMPTS[:1], max_new_tokens=N, read=v, read_with=read_with)
            assert g.tokens == ((),)
            assert g.scores[0].shape == (0, len(v.emotions))
    finally:
        tokenizer.eos_token = before


@pytest.mark.parametrize("read_with", ["unsteered", "as generated"])
def test_watching_shows_the_text_as_it_grows(model, v, read_with):
    seen = []
    hooks = em.steer_resid_post(v["glimmer"], layer=1, dose=1.0)
    g = generate(
        model, PROMPTS[:2], hooks, max_new_tokens=5, read=v, layer=1, read_with=read_with, watch=lambda text, z: seen.append((text, z))
    )  # fmt: skip
    assert len(seen) == 5
    assert seen[-1][0] == model.tokenizer.decode(list(g.tokens[0]))
    shown = torch.tensor([[z[e] for e in v.emotions] for _, z in seen])
    torch.testing.assert_close(shown, g.scores[0], atol=2e-3, rtol=1e-3)  # z of float noise
    assert g.tokens == generate(model, PROMPTS[:2], hooks, max_new_tokens=5).tokens
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_a_row_ends_at_eos_and_the_others_go_on(model):
    plain = generate(model, PROMPTS, max_new_tokens=N)
    stop, tokenizer = plain.tokens[0][2], model.tokenizer
    before = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    try:
        ended = generate(model, PROMPTS, max_new_tokens=N)
    finally:
        tokenizer.eos_token = before
    for whole, cut in zip(plain.tokens, ended.tokens, strict=True):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(ended.tokens[0]) <= 2


def test_no_hook_is_left_after_an_error_or_an_interrupt(model, v):
    for error in (RuntimeError, KeyboardInterrupt):

        def breaks(act, hook, error=error):
            raise error

        with pytest.raises(error):
            generate(
                model,
                PROMPTS,
                [
                    *em.steer_resid_post(v["glimmer"], layer=1, dose=0.1),
                    ("blocks.2.hook_resid_post", breaks),
                ],
            )
        assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_new_tokens": 0}, "at least 1"), ({"max_new_tokens": 5000}, "this model reads 256"),
     ({"read_with": "steered"}, "allowed: 'unsteered', 'as generated'")],
)  # fmt: skip
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, **options)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}])  # fmt: skip
def test_a_decoding_out_of_range_is_refused_when_it_is_made(options):
    with pytest.raises(ValueError, match=r"at least 1, at least 0, in \(0, 1\]"):
        em.Decoding(**options)


def test_hooks_that_do_not_fit_are_refused_before_any_run(model, v):
    with pytest.raises(ValueError, match="made for 2 rows, here are 3 prompts"):
        generate(model, PROMPTS, em.steer_resid_post(v[["glimmer", "gloamer"]], layer=1, dose=0.1))
    with pytest.raises(KeyError, match="no hook point"):
        generate(model, PROMPTS, [("blocks.0.hook_nothing", lambda act, hook: act)])

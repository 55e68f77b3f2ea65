"""Collecting: parity with each text run alone, independence of batching and padding, pooling, policies, errors, files, cleanup."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import emolens as em
from emolens.collect.activations import (
    Activations,
    join,
)
from emolens.collect.collection import joined, open_job
from emolens.collect.forward import collect
from emolens.collect.histogram import NORM_BINS, histogram_mean, histogram_median, norm_bins
from emolens.collect.pooling import SINK
from emolens.models.points import check_layers
from emolens.models.tokens import encode, render_chat

# of very different lengths, so that every batch is padded; one has characters of several tokens
TEXTS = [
    "The door was open when she came home.",
    "He had counted the steps to the station every morning for eleven years, and today there was one more.",
    "Rain.",
    "In 世界 there was a dog 🙂 at the gate, and nobody said what they were thinking.",
    "I put the kettle on and waited for the letter.",
    "They laughed, then they stopped.",
]
# Sums over 50 tokens in another order, and attention over another width: a few hundred float32 roundings of 6e-8.
RELATIVE = 1e-5
FAMILIES = ("llama", "qwen2", "neox")
BACKENDS = ("hooked", "bridge") if version("transformer-lens").startswith("3.") else ("bridge",)
POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tiny) -> Any:
    return em.load_model(
        tiny(request.param, tokenizer="no_bos" if request.param == "qwen2" else "bos")
    )


def quiet(model: Any, texts: Any, **options: Any) -> Activations:
    return em.collect_resid_post(model, texts, progress=False, **options)


def assert_close(a: Any, b: Any, relative: float = RELATIVE) -> None:
    """Difference over the size of the largest entry."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= relative * np.abs(b).max()


def alone(model: Any, ids: list[int], name: str) -> np.ndarray:
    """`[token d_model]` of one text by itself, unpadded, from TransformerLens's own cache."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens, attention_mask=torch.ones_like(tokens), names_filter=lambda n: n == name
        )
    (value,) = cache.values() if hasattr(cache, "values") else cache.cache_dict.values()
    return value[0].double().numpy()


def ordinary(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1)
    rest = norm[1:] if len(norm) > 1 else norm
    keep = norm < SINK * np.median(rest)
    keep[0] = False
    return keep


def naive_mean(model: Any, text: str, name: str, skip: int) -> np.ndarray:
    ids = encode(model, [text])[0].ids
    x = alone(model, ids, name)
    keep = ordinary(x)
    keep[: max(1, min(skip, len(ids) // 2))] = False
    return x[keep].mean(0)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [1, 8, 50])
def test_pooled_rows_equal_each_text_run_alone_unpadded(model, skip):
    acts = quiet(model, TEXTS, pooling=em.mean_over_tokens(skip=skip))
    assert acts.rows.dtype == torch.float32
    assert acts.rows.shape == (len(TEXTS), model.cfg.n_layers, model.cfg.d_model)
    for i, text in enumerate(TEXTS):
        for slot, layer in enumerate(acts.layers):
            assert_close(
                acts.rows[i, slot], naive_mean(model, text, f"blocks.{layer}.hook_resid_post", skip)
            )
        assert_close(acts.embed[i], naive_mean(model, text, "hook_embed", skip))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_collects_every_layer_the_last_included_without_its_unembedding(tiny, family):
    model = em.load_model(tiny(family), backend="bridge")
    widths: list[int] = []
    handle = model.unembed.register_forward_hook(
        lambda module, args, out: widths.append(out.shape[1])
    )
    acts = quiet(model, TEXTS, pooling=em.mean_over_tokens(skip=4))
    handle.remove()
    assert set(widths) <= {1}
    for i, text in enumerate(TEXTS):
        for layer in acts.layers:
            assert_close(
                acts.rows[i, layer], naive_mean(model, text, f"blocks.{layer}.hook_resid_post", 4)
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bos", "no_bos", "chat"])
def test_texts_become_the_tokens_that_hugging_face_makes_of_them(tiny, backend, kind):
    """TransformerLens's bridge would add a BOS to some tokenizers, and call the EOS of others their BOS."""
    model = em.load_model(tiny("llama", tokenizer=kind), backend=backend)
    expected = AutoTokenizer.from_pretrained(tiny("llama", tokenizer=kind))
    assert [e.ids for e in encode(model, TEXTS)] == expected(TEXTS).input_ids
    assert model.tokenizer.bos_token == expected.bos_token


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bos_that_exists_but_is_not_added_stays_out(tiny, backend, tmp_path):
    """As in Pythia and SmolLM2."""
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama", tokenizer="bos"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(tmp_path)
    model = em.load_model(tiny("llama"), backend=backend, tokenizer=tmp_path)
    ids = encode(model, TEXTS[:1])[0].ids
    assert ids[0] != model.tokenizer.bos_token_id
    assert encode(model, TEXTS[:1], prepend_bos=True)[0].ids == [model.tokenizer.bos_token_id, *ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_resid_post_is_hugging_face_s_hidden_state(tiny, family):
    """Not the last one: that is after the final norm, and no layer."""
    model = em.load_model(tiny(family))
    hf = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    acts = quiet(model, TEXTS, pooling=em.every_token(), padding_side="left")
    for i, e in enumerate(encode(model, TEXTS)):
        with torch.no_grad():
            hidden = hf(torch.tensor([e.ids]), output_hidden_states=True).hidden_states
        mine = acts.row_text == i
        at = acts.row_position[mine]
        assert_close(acts.embed[mine], hidden[0][0][at])
        for layer in range(model.cfg.n_layers - 1):
            assert_close(acts.rows[mine, layer], hidden[layer + 1][0][at])
        last = model.cfg.n_layers - 1
        assert not np.allclose(acts.rows[mine, last], hidden[last + 1][0][at], rtol=0.01)


@pytest.mark.parametrize("point", POINTS)
def test_every_hook_point_equals_its_naive_mean(model, point):
    if point == "resid_mid" and "blocks.0.hook_resid_mid" not in model.hook_dict:
        with pytest.raises(
            KeyError,
            match=r"no blocks\.0\.hook_resid_mid.*parallel-residual.*it has: resid_pre, resid_post, attn_out, mlp_out",
        ):
            em.collect_resid_mid(model, TEXTS, progress=False)
        return
    acts = getattr(em, f"collect_{point}")(
        model, TEXTS, pooling=em.mean_over_tokens(skip=4), progress=False
    )
    assert acts.hook_point == point
    assert acts.layers == ((0,) if point == "embed" else tuple(range(model.cfg.n_layers)))
    for i, text in enumerate(TEXTS):
        for slot, layer in enumerate(acts.layers):
            name = "hook_embed" if point == "embed" else f"blocks.{layer}.hook_{point}"
            assert_close(acts.rows[i, slot], naive_mean(model, text, name, 4))
    if point == "embed":
        assert torch.equal(acts.rows[:, 0], acts.embed)


def test_the_stream_before_a_block_is_the_stream_after_the_one_before(model):
    after, before = quiet(model, TEXTS), em.collect_resid_pre(model, TEXTS, progress=False)
    assert torch.equal(before.rows[:, 1:], after.rows[:, :-1])
    assert_close(before.rows[:, 0], before.embed)


def test_attention_and_mlp_add_up_to_the_stream(tiny):
    """resid_post = resid_pre + attn_out + mlp_out, for means over the same tokens (no token of these models is a sink)."""
    model = em.load_model(tiny("neox"))
    pre, attn, mlp, post = (
        getattr(em, f"collect_{p}")(model, TEXTS, progress=False)
        for p in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    assert_close(pre.rows + attn.rows + mlp.rows, post.rows)


# --- batching and padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pooling",
    [em.mean_over_tokens(skip=6), em.last_token(), em.every_token(skip=2, limit=5)],
    ids=lambda p: p.kind,
)
@pytest.mark.parametrize(
    "options",
    [
        {"batching": em.Batching(texts=1)},
        {"batching": em.Batching(texts=16)},
        {"batching": em.Batching(tokens=60)},
        {"batching": em.Batching(tokens=1)},
        {"padding_side": "left"},
        {"padding_side": "left", "batching": em.Batching(texts=2)},
    ],
    ids=str,
)
def test_batching_and_padding_change_nothing(model, pooling, options):
    a, b = quiet(model, TEXTS, pooling=pooling), quiet(model, TEXTS, pooling=pooling, **options)
    assert_close(b.rows, a.rows)
    assert_close(b.embed, a.embed)
    assert torch.equal(b.row_text, a.row_text)
    assert torch.equal(b.row_position, a.row_position)
    assert_close(b.sink_ratio, a.sink_ratio)
    assert torch.equal(b.norm_histogram.sum(-1), a.norm_histogram.sum(-1))
    # a norm on the edge of a bin may fall on either side
    assert (b.norm_histogram - a.norm_histogram).abs().sum() <= 4
    assert b.texts == a.texts


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(len(TEXTS))),
    batch_size=st.integers(1, 7),
    side=st.sampled_from(["left", "right"]),
)
def test_the_order_of_the_texts_does_not_matter(tiny_model, order, batch_size, side):
    expected = quiet(tiny_model, TEXTS).rows[list(order)]
    shuffled = quiet(
        tiny_model,
        [TEXTS[i] for i in order],
        batching=em.Batching(texts=batch_size),
        padding_side=side,
    )
    assert_close(shuffled.rows, expected)


def test_beginnings_of_neutral_texts_are_pooled_as_a_text_of_that_length_is(tiny_model, toy_set):
    toy = em.load_emotion_set(toy_set)
    for pooling, summary in (
        (em.mean_over_tokens(), lambda x: x.mean(0)),
        (em.last_token(), lambda x: x[-1]),
    ):
        acts = em.collect_resid_post(tiny_model, toy, pooling=pooling, progress=False)
        found = acts.neutral_prefixes
        assert found is not None
        text = next(i for i, t in enumerate(acts.texts) if t.split == "neutral")
        story = next(n.text for n in toy.neutral if n.id == acts.texts[text].id)
        tokens = em.collect_resid_post(
            tiny_model, [story], pooling=em.every_token(), progress=False
        )
        here = found.row_text == text
        lengths = found.row_position[here].tolist()
        assert lengths == [
            n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < acts.texts[text].n_tokens
        ]
        assert len(tokens.rows) == acts.texts[text].n_tokens - 1  # every token is ordinary here
        for row, n in zip(found.rows[here], lengths, strict=True):
            assert_close(row, summary(tokens.rows[:n]))
        assert {acts.texts[i].split for i in found.row_text.tolist()} == {"neutral"}
        kept = acts.select(lambda t, name=acts.texts[text].id: t.id == name)
        assert torch.equal(kept.neutral_prefixes.rows, found.rows[here])


def test_the_sample_of_neutral_tokens_has_every_position_as_often_as_it_occurs():
    from emolens.collect.pooling import GOLDEN, spread_positions
    from emolens.collect.recipe import SAMPLED

    counts = Counter(
        p for text in range(400) for p in spread_positions(121, SAMPLED, text * GOLDEN % 1)
    )
    assert set(counts) == set(range(1, 121))
    assert (
        max(counts.values()) - min(counts.values()) <= 8
    )  # 80 each; positions 1 and 2 were in none, and 3 in every
    assert spread_positions(11, SAMPLED, 0.3) == list(range(1, 11))


def test_neutral_tokens_do_not_depend_on_batching(tiny_model, toy_set):
    toy = em.load_emotion_set(toy_set)
    a = quiet(tiny_model, toy, layers=[1])
    b = quiet(tiny_model, toy, layers=[1], batching=em.Batching(texts=1), padding_side="left")
    assert a.neutral_tokens is not None
    assert b.neutral_tokens is not None
    assert_close(b.neutral_tokens.rows, a.neutral_tokens.rows)
    assert torch.equal(b.neutral_tokens.row_position, a.neutral_tokens.row_position)
    assert torch.equal(b.neutral_tokens.row_text, a.neutral_tokens.row_text)


def test_the_same_call_twice_is_identical_to_the_bit(tiny_model):
    a, b = quiet(tiny_model, TEXTS), quiet(tiny_model, TEXTS)
    assert torch.equal(a.rows, b.rows)
    assert torch.equal(a.norm_histogram, b.norm_histogram)


def test_some_layers_are_those_of_all_layers(tiny_model):
    every = quiet(tiny_model, TEXTS)
    one = quiet(tiny_model, TEXTS, layers=[1])
    assert one.layers == (1,)
    assert torch.equal(one.rows, every.at([1]).rows)
    assert torch.equal(one.norm_median, every.at([1]).norm_median)
    swapped = quiet(tiny_model, TEXTS, layers=[2, 0])
    assert torch.equal(swapped.rows, every.at([2, 0]).rows)


# --- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_skip_counts_real_tokens_not_columns(tiny_model, side):
    acts = quiet(tiny_model, TEXTS, pooling=em.every_token(skip=3), padding_side=side)
    for i, e in enumerate(encode(tiny_model, TEXTS)):
        assert acts.row_position[acts.row_text == i].tolist() == list(range(3, len(e.ids)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_the_last_real_one(model, side):
    acts = quiet(model, TEXTS, pooling=em.last_token(), padding_side=side)
    for i, e in enumerate(encode(model, TEXTS)):
        for slot, layer in enumerate(acts.layers):
            assert_close(
                acts.rows[i, slot], alone(model, e.ids, f"blocks.{layer}.hook_resid_post")[-1]
            )


def test_every_token_is_the_token_s_own_activation_at_its_own_position(model):
    acts = quiet(model, TEXTS, pooling=em.every_token())
    for i, e in enumerate(encode(model, TEXTS)):
        x = alone(model, e.ids, "blocks.1.hook_resid_post")
        mine = acts.row_text == i
        assert_close(acts.rows[mine, 1], x[acts.row_position[mine].numpy()])
        assert 0 not in acts.row_position[mine].tolist()


def test_a_limit_takes_so_many_tokens_evenly_spaced(tiny_model):
    acts = quiet(tiny_model, [TEXTS[1]], pooling=em.every_token(limit=4))
    n = len(encode(tiny_model, [TEXTS[1]])[0].ids)
    positions = acts.row_position.tolist()
    assert len(positions) == 4
    gaps = np.diff(positions)
    assert gaps.max() - gaps.min() <= 1
    # half a gap before the first and after the last
    assert positions[0] - 1 <= (n - 1) / 8
    assert n - 1 - positions[-1] <= (n - 1) / 8 + 1


def _span_mean(model: Any, text: str, tokens: list[int], layer: int = 1) -> np.ndarray:
    x = alone(model, encode(model, [text])[0].ids, f"blocks.{layer}.hook_resid_post")
    return x[tokens].mean(0)


def _tokens_in(model: Any, text: str, start: int, end: int) -> list[int]:
    return [
        p
        for p, (a, b) in enumerate(encode(model, [text])[0].offsets)
        if b > a and a < end and b > start
    ]


@pytest.mark.parametrize("span", ["came home", (21, 30), (4, 5)], ids=str)
def test_a_span_is_the_mean_of_the_tokens_that_overlap_it(model, span):
    text = TEXTS[0]
    start, end = (
        span if isinstance(span, tuple) else (text.index(span), text.index(span) + len(span))
    )
    tokens = _tokens_in(model, text, start, end)
    assert tokens
    # beside a longer text, so that this one is padded
    acts = quiet(
        model, [text, TEXTS[1]], pooling=em.char_span([span, "station"]), padding_side="left"
    )
    assert_close(acts.rows[0, 1], _span_mean(model, text, tokens))


def test_a_span_of_a_character_of_several_tokens_takes_all_of_them(tiny_model):
    text, at = TEXTS[3], TEXTS[3].index("🙂")
    tokens = _tokens_in(tiny_model, text, at, at + 1)
    assert len(tokens) == 4  # a byte each
    acts = quiet(tiny_model, [text], pooling=em.char_span(["🙂"]))
    assert_close(acts.rows[0, 1], _span_mean(tiny_model, text, tokens))


def test_a_span_at_the_start_of_a_text_without_bos_is_its_first_token(tiny):
    """The first token is no ordinary one, but it is what was asked for."""
    model = em.load_model(tiny("qwen2", tokenizer="no_bos"))
    text = TEXTS[0]
    acts = quiet(model, [text], pooling=em.char_span([(0, 1)]))
    assert_close(acts.rows[0, 1], _span_mean(model, text, [0]))


def test_a_span_in_chat_messages_is_found_in_the_rendered_text(tiny_model):
    messages = [
        {"role": "user", "content": "Was the door open?"},
        {"role": "assistant", "content": "It was, all night."},
    ]
    text = render_chat(tiny_model, messages)
    start = text.index("all night")
    by_word = quiet(tiny_model, [messages], pooling=em.char_span(["all night"]))
    by_offset = quiet(tiny_model, [messages], pooling=em.char_span([(start, start + 9)]))
    assert torch.equal(by_word.rows, by_offset.rows)
    ids = tiny_model.tokenizer(
        text, add_special_tokens=False
    ).input_ids  # the template has its BOS already
    assert by_word.texts[0].n_tokens == len(ids)
    x = alone(tiny_model, ids, "blocks.1.hook_resid_post")
    offsets = tiny_model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    inside = [p for p, (a, b) in enumerate(offsets) if a < start + 9 and b > start]
    assert_close(by_word.rows[0, 1], x[inside].mean(0))


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ("was", r"'was' occurs 2 times in text 0; it must occur once"),
        ("elephant", r"'elephant' occurs 0 times"),
        ("", r"'' occurs 0 times"),
        ((5, 5), r"\(5, 5\) is not inside text 0, which has 26 characters"),
        ((5, 99), r"\(5, 99\) is not inside text 0"),
        ((-1, 3), r"\(-1, 3\) is not inside"),
    ],
)
def test_a_span_that_is_not_there_once_is_an_error(tiny_model, span, message):
    with pytest.raises(ValueError, match=message):
        quiet(tiny_model, ["It was dark, it was early."], pooling=em.char_span([span]))


def test_a_span_that_no_token_carries_is_an_error_not_a_missing_row(tiny_model, monkeypatch):
    """Some tokenizers drop what they do not know."""

    def hollow(model, texts, **options):
        whole = encode(model, texts, **options)
        return [
            replace(e, offsets=[(a, b) if a > 3 else (0, 0) for a, b in e.offsets]) for e in whole
        ]

    monkeypatch.setattr("emolens.collect.recipe.encode", hollow)
    with pytest.raises(ValueError, match=r"no token of text 0 lies in \(0, 3\): 'The'"):
        quiet(tiny_model, TEXTS[:1], pooling=em.char_span(["The"]))


def test_spans_match_texts_one_by_one(tiny_model):
    with pytest.raises(ValueError, match="char_span: 1 spans for 2 texts"):
        quiet(tiny_model, TEXTS[:2], pooling=em.char_span(["door"]))


# --- short texts ------------------------------------------------------------------------------------------------------


def test_a_short_text_gives_its_second_half(tiny_model):
    text = TEXTS[4]
    n = len(encode(tiny_model, [text])[0].ids)
    assert n < 100
    acts = quiet(tiny_model, [text], pooling=em.mean_over_tokens(skip=100))
    assert_close(acts.rows[0, 1], naive_mean(tiny_model, text, "blocks.1.hook_resid_post", n // 2))


def test_a_short_text_is_left_out_and_counted(tiny_model):
    lengths = [len(e.ids) for e in encode(tiny_model, TEXTS)]
    skip = sorted(lengths)[2]  # three texts have no token left
    acts = quiet(tiny_model, TEXTS, pooling=em.mean_over_tokens(skip=skip, short="skip"))
    kept = [i for i, n in enumerate(lengths) if n > skip]
    assert [t.id for t in acts.texts] == [f"text-{i}" for i in kept]
    assert acts.info["dropped_texts"] == len(TEXTS) - len(kept) == 3
    assert acts.row_text.tolist() == list(range(len(kept)))
    assert_close(
        acts.rows,
        quiet(
            tiny_model,
            [TEXTS[i] for i in kept],
            pooling=em.mean_over_tokens(skip=skip, short="skip"),
        ).rows,
    )


def test_all_texts_too_short_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="every text is shorter than skip=200 tokens; lower skip"):
        quiet(tiny_model, TEXTS, pooling=em.mean_over_tokens(skip=200, short="skip"))


def test_a_short_text_can_be_refused(tiny_model):
    with pytest.raises(
        ValueError,
        match=r"text text-0 has \d+ tokens, nothing is left after the first 200; lower skip",
    ):
        quiet(tiny_model, TEXTS, pooling=em.mean_over_tokens(skip=200, short="raise"))


def test_a_text_of_one_token_is_never_a_zero_vector(tiny):
    model = em.load_model(tiny("qwen2", tokenizer="no_bos"))
    assert len(encode(model, ["x"])[0].ids) == 1
    with pytest.raises(ValueError, match="one token is only an attention sink"):
        quiet(model, ["x", TEXTS[0]])
    assert (
        len(quiet(model, ["x", TEXTS[0]], pooling=em.mean_over_tokens(skip=1, short="skip")).texts)
        == 1
    )
    acts = quiet(model, ["x", TEXTS[0]], pooling=em.last_token())  # asked for by name
    assert_close(
        acts.rows[0, 1], alone(model, encode(model, ["x"])[0].ids, "blocks.1.hook_resid_post")[0]
    )
    assert torch.isfinite(acts.sink_ratio).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: em.mean_over_tokens(skip=0),
            "skip=0; at least 1: the first token is an attention sink",
        ),
        (
            lambda: em.mean_over_tokens(short="drop"),
            "short='drop'; allowed: 'second_half', 'skip', 'raise'",
        ),
        (lambda: em.every_token(limit=0), "limit=0; at least 1"),
    ],
)
def test_poolings_check_their_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_bos_policy_is_explicit_and_recorded(tiny_model):
    default, forced, without = (
        quiet(tiny_model, TEXTS, prepend_bos=b) for b in (None, True, False)
    )
    assert torch.equal(
        default.rows, forced.rows
    )  # this tokenizer adds one itself, and gets no second
    assert [t.n_tokens for t in without.texts] == [t.n_tokens - 1 for t in default.texts]
    assert not torch.allclose(without.rows, default.rows)
    assert [a.info["prepend_bos"] for a in (default, forced, without)] == [None, True, False]


def test_a_tokenizer_without_bos_says_so(tiny):
    model = em.load_model(tiny("qwen2", tokenizer="no_bos"))
    with pytest.raises(ValueError, match="no BOS token; use prepend_bos=None"):
        quiet(model, TEXTS, prepend_bos=True)
    assert torch.equal(quiet(model, TEXTS, prepend_bos=False).rows, quiet(model, TEXTS).rows)


def test_texts_that_cannot_be_read_are_named(tiny, tiny_model):
    with pytest.raises(ValueError, match=r"text 1 has \d+ tokens; this model reads 256"):
        quiet(tiny_model, ["Short.", "z" * 300])
    with pytest.raises(ValueError, match="text 1 is empty"):
        quiet(em.load_model(tiny("qwen2", tokenizer="no_bos")), ["Short.", ""])
    with pytest.raises(ValueError, match="no texts given"):
        quiet(tiny_model, [])


def test_a_model_without_a_tokenizer_asks_for_one(tiny_model):
    silent: Any = SimpleNamespace(tokenizer=None, cfg=tiny_model.cfg)
    with pytest.raises(ValueError, match="no tokenizer: load it with tokenizer="):
        encode(silent, TEXTS)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[3], [-1], [0, 99], [True], ["1"], [1.0]])
def test_a_layer_that_does_not_exist_is_refused_before_the_pass(tiny_model, layers):
    with pytest.raises(ValueError, match=r"layer .* does not exist; this model has layers 0 to 2"):
        quiet(tiny_model, TEXTS, layers=layers)


def test_no_layers_is_not_all_layers(tiny_model):
    with pytest.raises(ValueError, match="layers is empty"):
        quiet(tiny_model, TEXTS, layers=[])
    assert check_layers(tiny_model, "resid_post", None) == (0, 1, 2)


def test_labels_that_do_not_match_the_texts_are_refused(tiny_model, toy_set):
    with pytest.raises(ValueError, match="2 emotions for 6 texts"):
        quiet(tiny_model, TEXTS, emotions=["a", "b"])
    with pytest.raises(ValueError, match="1 topics for 6 texts"):
        quiet(tiny_model, TEXTS, emotions=["a"] * 6, topics=["t"])
    with pytest.raises(ValueError, match="an emotion set brings its own emotions and topics"):
        quiet(tiny_model, em.load_emotion_set(toy_set), emotions=["a"])


def test_wrong_options_are_refused(tiny_model):
    with pytest.raises(ValueError, match="padding_side='both'; allowed: 'left', 'right'"):
        quiet(tiny_model, TEXTS, padding_side="both")
    with pytest.raises(
        ValueError,
        match="Batching: texts=0; at least 1",
    ):
        quiet(tiny_model, TEXTS, batching=em.Batching(texts=0))
    with pytest.raises(TypeError, match="unexpected keyword"):
        em.collect_mlp_out(tiny_model, TEXTS, layer=[1])
    with pytest.raises(
        TypeError, match="a HookedTransformer or TransformerBridge is needed, got Linear"
    ):
        quiet(torch.nn.Linear(2, 2), TEXTS)


@pytest.mark.parametrize(
    "pooling", [em.mean_over_tokens(), em.last_token(), em.every_token()], ids=lambda p: p.kind
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_name_the_first_layer_that_has_them(tiny_model, pooling, bad):
    def spoil(act, hook):
        act = act.clone()
        act[0, -1, 3] = bad
        return act

    hooks = [("blocks.1.hook_resid_post", spoil)]
    with (
        tiny_model.hooks(fwd_hooks=hooks),
        pytest.raises(
            FloatingPointError, match=r"resid_post of layer 1 is not finite.*dtype='float32'"
        ),
    ):
        quiet(tiny_model, TEXTS[:1], pooling=pooling)


# --- cleanup ----------------------------------------------------------------------------------------------------------


def n_hooks(model: Any) -> int:
    return sum(
        len(p.fwd_hooks) + len(p.bwd_hooks) + len(p._forward_hooks)
        for p in model.hook_dict.values()
    )


def test_no_hook_is_left_after_success(model):
    before = n_hooks(model)
    quiet(model, TEXTS)
    assert n_hooks(model) == before


def test_no_hook_is_left_after_an_exception_inside_the_pass(tiny_model):
    def fail(act, hook):
        raise KeyboardInterrupt

    before = n_hooks(tiny_model)
    with (
        pytest.raises(KeyboardInterrupt),
        tiny_model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", fail)]),
    ):
        quiet(tiny_model, TEXTS)
    assert n_hooks(tiny_model) == before
    assert_close(quiet(tiny_model, TEXTS).rows, quiet(tiny_model, TEXTS).rows)


def test_hooks_of_the_user_act_and_stay(tiny_model):
    """Collecting under an intervention reads what the intervention made."""
    plain = quiet(tiny_model, TEXTS)
    with tiny_model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda act, hook: act + 1.0)]):
        steered = quiet(tiny_model, TEXTS)
        again = quiet(tiny_model, TEXTS)
    assert_close(steered.rows[:, 0], plain.rows[:, 0] + 1.0)
    assert torch.equal(steered.rows, again.rows)
    assert not torch.allclose(steered.rows[:, 2], plain.rows[:, 2], atol=0.1)


def test_gradients_work_after_collecting(tiny):
    """Neither inference tensors in the rotary cache, nor switched-off parameters, nor a graph that is kept."""
    model = em.load_model(tiny("llama", max_position_embeddings=4096))
    acts = quiet(
        model, ["z" * 2100]
    )  # TransformerLens prepares rotary angles for 2048 positions and grows them here
    assert acts.texts[0].n_tokens > 2048
    assert not acts.rows.requires_grad
    assert torch.is_grad_enabled()
    assert all(p.requires_grad for p in model.parameters())
    tokens = torch.tensor([encode(model, TEXTS[1:2])[0].ids])
    model(tokens, return_type="logits").logsumexp(-1).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


def test_the_model_says_the_same_before_and_after(tiny_model):
    tokens = torch.tensor([encode(tiny_model, TEXTS[:1])[0].ids])
    with torch.no_grad():
        before = tiny_model(tokens, return_type="logits")
        quiet(tiny_model, TEXTS)
        assert torch.equal(tiny_model(tokens, return_type="logits"), before)
    assert not tiny_model.training


# --- sinks and norms --------------------------------------------------------------------------------------------------


def _enlarge(position: int, factor: float):
    def hook(act, hook):
        act = act.clone()
        act[:, position] *= factor
        return act

    return [("blocks.1.hook_resid_post", hook)]


def test_a_planted_huge_token_is_not_ordinary(tiny_model):
    """One token a hundred times the median leaves the mean, the histogram and the token rows of its layer alone."""
    text, at = TEXTS[1], 20
    plain = quiet(tiny_model, [text], pooling=em.mean_over_tokens(skip=1), layers=[1])
    with tiny_model.hooks(fwd_hooks=_enlarge(at, 100.0)):
        huge = quiet(tiny_model, [text], pooling=em.mean_over_tokens(skip=1), layers=[1])
        tokens = quiet(tiny_model, [text], pooling=em.every_token(), layers=[1])
    x = alone(tiny_model, encode(tiny_model, [text])[0].ids, "blocks.1.hook_resid_post")
    keep = np.arange(len(x)) > 0
    assert_close(plain.rows[0, 0], x[keep].mean(0))
    keep[at] = False
    assert_close(huge.rows[0, 0], x[keep].mean(0))
    assert huge.norm_histogram.sum() == plain.norm_histogram.sum() - 1
    assert at not in tokens.row_position.tolist()
    assert tokens.rows.shape[0] == keep.sum()


def test_a_token_nine_times_the_median_is_ordinary(tiny_model):
    text, at = TEXTS[1], 20
    x = alone(tiny_model, encode(tiny_model, [text])[0].ids, "blocks.1.hook_resid_post")
    factor = 9.0 * np.median(np.linalg.norm(x[1:], axis=-1)) / np.linalg.norm(x[at])
    with tiny_model.hooks(fwd_hooks=_enlarge(at, float(factor))):
        tokens = quiet(tiny_model, [text], pooling=em.every_token(), layers=[1])
    assert at in tokens.row_position.tolist()


def test_the_sink_ratio_is_the_first_norm_over_the_median(tiny_model):
    with tiny_model.hooks(fwd_hooks=_enlarge(0, 50.0)):
        acts = quiet(tiny_model, TEXTS, layers=[1])
    ratios = []
    for e in encode(tiny_model, TEXTS):
        norm = np.linalg.norm(alone(tiny_model, e.ids, "blocks.1.hook_resid_post"), axis=-1)
        ratios.append(
            50.0 * norm[0] / np.sort(norm[1:])[(len(norm) - 2) // 2]
        )  # torch's median is the lower one
    assert_close(acts.sink_ratio[0], np.sort(ratios)[(len(ratios) - 1) // 2])


def test_the_histogram_counts_every_ordinary_token_once(tiny_model):
    acts = quiet(tiny_model, TEXTS)
    for slot, layer in enumerate(acts.layers):
        norms = []
        for e in encode(tiny_model, TEXTS):
            x = alone(tiny_model, e.ids, f"blocks.{layer}.hook_resid_post")
            norms.append(np.linalg.norm(x, axis=-1)[ordinary(x)])
        together = np.concatenate(norms)
        assert acts.norm_histogram[slot].sum() == len(together)
        # half a bin of 1.4 %, and the lower of two middle values
        near = np.sort(together)[[(len(together) - 1) // 2, len(together) // 2]]
        assert near[0] * 0.99 <= acts.norm_median[slot] <= near[1] * 1.01


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(1e-3, 1e7), min_size=1, max_size=60).map(
        lambda v: v if len(v) % 2 else v[1:]
    )
)
def test_the_median_of_a_histogram_is_right_to_half_a_bin(norms):
    median = histogram_median(norm_bins(torch.tensor(norms, dtype=torch.float32))[None]).item()
    bin_width = 10 ** (12 / NORM_BINS) - 1  # 1.4 %
    assert median == pytest.approx(np.median(norms), rel=bin_width)


def test_histograms_merge_by_addition():
    norms = torch.rand(500) * 300 + 1
    assert torch.equal(norm_bins(norms[:123]) + norm_bins(norms[123:]), norm_bins(norms))
    assert (
        norm_bins(torch.tensor([0.0, 1e-20, 1e20])).sum() == 3
    )  # out of range falls in the outer bins


# --- sets, selection, files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_acts(tiny_model, toy_set) -> Activations:
    return quiet(tiny_model, em.load_emotion_set(toy_set))


def test_directions_of_joined_sets_rest_on_the_texts_of_each(tiny_model, toy_set, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(toy_set, again)
    (again / "set.yaml").write_text(
        (again / "set.yaml").read_text(encoding="utf-8").replace("name: toy\n", "name: again\n"),
        encoding="utf-8",
    )
    for file in again.glob("*/*.jsonl"):  # other texts: a joined set has each once
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"text": "', '"text": "Once more. '), encoding="utf-8")
    both = em.load_emotion_set(f"{toy_set}+{again}")
    acts = quiet(tiny_model, both)
    assert acts.info["set"] == "toy+again"
    assert {t.topic.partition("/")[0] for t in acts.texts} == {"toy", "again"}
    one, other, joined = (
        em.mean_difference(quiet(tiny_model, s), remove_neutral=0.0)
        for s in (em.load_emotion_set(toy_set), em.load_emotion_set(again), both)
    )
    # as many texts of each: the mean of both
    torch.testing.assert_close(
        joined.vectors, (one.vectors + other.vectors) / 2, rtol=1e-4, atol=1e-5
    )
    assert (joined.vectors - one.vectors).abs().max() > 1e-3
    assert (
        em.score(
            tiny_model, joined, "She went to the kitchen and sat there for a while.", progress=False
        )
        is not None
    )


def test_a_set_brings_labels_splits_and_neutral_tokens(toy_acts, toy_set):
    toy = em.load_emotion_set(toy_set)
    splits = [t.split for t in toy_acts.texts]
    assert (splits.count("main"), splits.count("other_person"), splits.count("neutral")) == (
        32,
        8,
        16,
    )
    stories = {s.id: (e, s) for e in toy.names for s in toy.stories[e]}
    for text in toy_acts.texts:
        if text.split == "neutral":
            assert text.emotion is None
        else:
            emotion, story = stories[text.id]
            assert (text.emotion, text.topic, text.person, text.split) == (
                emotion,
                story.topic,
                story.person,
                story.split,
            )
    assert toy_acts.info["set"] == "toy"
    assert toy_acts.info["set_sha256"] == toy.fingerprint
    assert toy_acts.info["antonyms"] == {e.name: e.antonym for e in toy.emotions}
    tokens = toy_acts.neutral_tokens
    assert tokens is not None
    assert {toy_acts.texts[i].split for i in tokens.row_text.tolist()} == {"neutral"}
    assert int(torch.bincount(tokens.row_text).max()) <= 24
    assert tokens.row_position.min() >= 1


def test_plain_texts_carry_the_labels_they_were_given(tiny_model):
    acts = quiet(tiny_model, TEXTS, emotions=["a", "b"] * 3, topics=["t", "t", "u", "u", "v", "v"])
    assert [(t.emotion, t.topic, t.split) for t in acts.texts[:3]] == [
        ("a", "t", "main"),
        ("b", "t", "main"),
        ("a", "u", "main"),
    ]
    assert acts.neutral_tokens is None
    assert quiet(tiny_model, TEXTS).texts[0].split == ""
    assert quiet(tiny_model, TEXTS[0]).rows.shape[0] == 1  # one text is a list of one


def test_select_keeps_rows_and_texts_together(toy_acts):
    some = toy_acts.select(lambda t: t.emotion == "brindle" and t.split == "main")
    assert len(some.texts) == len(some.rows) == 8
    assert {t.emotion for t in some.texts} == {"brindle"}
    where = [
        i for i, t in enumerate(toy_acts.texts) if t.emotion == "brindle" and t.split == "main"
    ]
    assert torch.equal(some.rows, toy_acts.rows[where])
    assert torch.equal(some.norm_histogram, toy_acts.norm_histogram)
    assert len(toy_acts.select(lambda t: False).texts) == 0


def test_select_takes_the_neutral_tokens_of_its_texts_and_of_no_others(toy_acts):
    some = toy_acts.select(lambda t: t.topic != "kitchen")
    assert some.neutral_tokens is not None
    assert {t.topic for t in some.neutral_tokens.texts} == {t.topic for t in toy_acts.texts} - {
        "kitchen"
    }
    whole = toy_acts.neutral_tokens
    there = torch.tensor([whole.texts[i].topic != "kitchen" for i in whole.row_text.tolist()])
    assert (~there).sum() > 0
    assert torch.equal(some.neutral_tokens.rows, whole.rows[there])
    with pytest.raises(
        ValueError, match="neutral components need tokens of neutral texts, there are 0"
    ):
        em.mean_difference(toy_acts.select(lambda t: t.split == "main"))


def test_a_hold_out_fits_nothing_on_the_topics_left_out(toy_acts):
    """Whatever is changed in the held-out topics, the directions stay the same to the bit."""
    train = toy_acts.without(["kitchen", "garden"])
    assert {t.topic for t in train.texts} == {t.topic for t in toy_acts.texts} - {
        "kitchen",
        "garden",
    }

    def held(acts):
        return torch.tensor(
            [acts.texts[i].topic in ("kitchen", "garden") for i in acts.row_text.tolist()]
        )

    tokens = toy_acts.neutral_tokens
    other = replace(
        toy_acts,
        rows=torch.where(held(toy_acts)[:, None, None], torch.randn_like(toy_acts.rows), toy_acts.rows),
        neutral_tokens=replace(tokens, rows=torch.where(held(tokens)[:, None, None], torch.randn_like(tokens.rows), tokens.rows)),
    )  # fmt: skip
    a, b = em.mean_difference(train), em.mean_difference(other.without(["kitchen", "garden"]))
    assert torch.equal(a.vectors, b.vectors)
    assert torch.equal(a.calibration.token_mean, b.calibration.token_mean)
    assert not torch.equal(em.mean_difference(toy_acts).vectors, a.vectors)


def test_without_takes_one_name_and_refuses_one_that_is_not_there(toy_acts):
    assert toy_acts.without("kitchen").texts == toy_acts.without(["kitchen"]).texts
    with pytest.raises(KeyError, match="unknown topic 'kitchn'; did you mean 'kitchen'"):
        toy_acts.without(["kitchn"])


def test_select_renumbers_the_texts_of_tokens(toy_acts):
    tokens = toy_acts.neutral_tokens
    assert tokens is not None
    some = tokens.select(lambda t: t.topic == "garden")
    assert {some.texts[i].topic for i in some.row_text.tolist()} == {"garden"}
    there = torch.tensor([tokens.texts[i].topic == "garden" for i in tokens.row_text.tolist()])
    assert torch.equal(some.rows, tokens.rows[there])


def test_at_takes_layers_and_names_a_missing_one(toy_acts):
    one = toy_acts.at([2])
    assert one.layers == (2,)
    assert torch.equal(one.rows[:, 0], toy_acts.rows[:, 2])
    assert one.neutral_tokens is not None
    assert one.neutral_tokens.layers == (2,)
    assert repr(one).startswith("Activations(resid_post, layers 2, 56 rows x 32")
    with pytest.raises(ValueError, match=r"layer 0 was not collected; collected: \[2\]"):
        one.at([0])


def test_a_file_gives_back_what_was_saved(toy_acts, tmp_path):
    file = tmp_path / "acts.safetensors"
    toy_acts.save(file)
    again = Activations.load(file)
    for a, b in ((toy_acts, again), (toy_acts.neutral_tokens, again.neutral_tokens)):
        assert a is not None
        assert b is not None
        for name in ("rows", "embed", "row_text", "row_position", "norm_histogram", "sinks"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.texts, a.layers, a.hook_point, a.info) == (
            b.texts,
            b.layers,
            b.hook_point,
            b.info,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["acts.safetensors"]


def test_selected_activations_and_those_without_tokens_are_saved_too(toy_acts, tmp_path):
    part = replace(toy_acts.select(lambda t: t.split == "main").at([1]), neutral_tokens=None)
    part.save(tmp_path / "part.safetensors")
    again = Activations.load(tmp_path / "part.safetensors")
    assert again.neutral_tokens is None
    assert torch.equal(again.rows, part.rows)


def test_files_that_cannot_be_read_say_why(toy_acts, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "acts.safetensors"
    toy_acts.save(file)
    whole = file.read_bytes()
    for n in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="not a safetensors file, or a truncated one"):
            Activations.load(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError, match=r"this is another program's file, not emolens\.activations\.2"
    ):
        Activations.load(file)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        Activations.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        toy_acts.save(tmp_path / "nowhere" / "acts.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(toy_acts, tmp_path, monkeypatch):
    import emolens.shards

    file = tmp_path / "acts.safetensors"
    file.write_bytes(b"old")

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(emolens.shards, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        toy_acts.save(file, overwrite=True)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("acts.safetensors", b"old")]


def test_collect_by_name_is_the_named_function(tiny_model):
    by_name = collect(tiny_model, TEXTS, "mlp_out", progress=False)
    assert torch.equal(by_name.rows, em.collect_mlp_out(tiny_model, TEXTS, progress=False).rows)
    assert em.collect_mlp_out.__name__ == "collect_mlp_out"


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_rows_equal_each_text_run_alone_and_leave_out_the_sink(real_model):
    layers = [15, 20]
    acts = quiet(
        real_model, TEXTS, layers=layers, pooling=em.mean_over_tokens(skip=1), padding_side="left"
    )
    for i, text in enumerate(TEXTS):
        if len(encode(real_model, [text])[0].ids) < 3:
            continue
        for slot, layer in enumerate(layers):
            assert_close(
                acts.rows[i, slot],
                naive_mean(real_model, text, f"blocks.{layer}.hook_resid_post", 1),
            )
    assert (
        acts.sink_ratio > 50
    ).all()  # the first token is about a hundred times the rest in these layers
    assert (acts.norm_median < 1000).all()


@pytest.mark.real
def test_real_padding_side_changes_nothing(real_model):
    """Pad equals EOS in this tokenizer: a mask made from ids would fail here, on texts that hold the EOS itself."""
    texts = [*TEXTS, "It ended here.<|im_end|>", "<|im_end|>And it began."]
    right, left = (
        quiet(real_model, texts, layers=[15], padding_side=side, batching=em.Batching(texts=3))
        for side in ("right", "left")
    )
    assert_close(left.rows, right.rows)
    assert_close(
        left.sink_ratio, right.sink_ratio, 1e-4
    )  # a ratio of two norms, one of them of 22,000


# --- the mean norm ----------------------------------------------------------------------------------------------------


def test_the_mean_norm_is_that_of_the_ordinary_tokens_without_the_sink(tiny_model):
    """The first token is made fifty times as long: the mean of all tokens would double."""
    with tiny_model.hooks(fwd_hooks=_enlarge(0, 50.0)):
        acts = quiet(tiny_model, TEXTS, layers=[1])
    norms, everything = [], []
    for e in encode(tiny_model, TEXTS):
        x = alone(tiny_model, e.ids, "blocks.1.hook_resid_post")
        x[0] *= 50.0
        norms.append(np.linalg.norm(x, axis=-1)[ordinary(x)])
        everything.append(np.linalg.norm(x, axis=-1))
    mean = np.concatenate(norms).mean()
    # half a bin of 1.4 % for every token, which a mean cannot exceed
    assert acts.norm_mean[0].item() == pytest.approx(mean, rel=0.0071)
    assert np.concatenate(everything).mean() > 1.5 * mean
    assert acts.norm_mean.shape == acts.norm_median.shape == (1,)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-3, 1e7), min_size=1, max_size=60))
def test_the_mean_of_a_histogram_is_right_to_half_a_bin(norms):
    mean = histogram_mean(norm_bins(torch.tensor(norms, dtype=torch.float32))[None]).item()
    half_a_bin = 10 ** (6 / NORM_BINS) - 1  # 0.68 %
    assert mean == pytest.approx(
        np.mean(norms), rel=half_a_bin + 1e-5
    )  # and float32, in which an edge may move


def test_the_mean_norm_follows_the_layers_and_a_file(toy_acts, tmp_path):
    assert torch.equal(toy_acts.at([2]).norm_mean, toy_acts.norm_mean[2:])
    toy_acts.save(tmp_path / "acts.safetensors")
    assert torch.equal(
        Activations.load(tmp_path / "acts.safetensors").norm_mean, toy_acts.norm_mean
    )
    assert (
        (toy_acts.norm_mean / toy_acts.norm_median - 1).abs() < 0.5
    ).all()  # no outlier is in it


# --- how text becomes tokens is part of what a run is -----------------------------------------------------------------

CHATS = [
    [{"role": "user", "content": f"The door was open when she came home, {i} times."}]
    for i in range(4)
]


def _template(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "[{{ m['role'] }}]", "<|{{ m['role'] }}|>"
    )


def _no_bos(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def _eos_behind(tokenizer: Any) -> None:
    marks = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)  # fmt: skip


def _lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _another_mark(tokenizer: Any) -> None:
    tokenizer.bos_token = "</s>"


def _no_merges(tokenizer: Any) -> None:
    """The same vocabulary and the same rules of everything but which pieces are put together."""
    core = tokenizer.backend_tokenizer
    state = json.loads(core.to_str())
    state["model"]["merges"] = []
    core.model = Tokenizer.from_str(json.dumps(state)).model


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_template, "tokenization.chat_template"),
        (_no_bos, "tokenization.puts_before"),
        (_eos_behind, "tokenization.left_off_behind"),
        (_lower_case, "tokenization.normalizer"),
        (_another_mark, "tokenization.special_tokens.bos_token"),
        (_no_merges, "ids_sha256"),
    ],
)
def test_a_run_is_not_resumed_with_other_tokens(tiny, tmp_path, change, what):
    model = em.load_model(tiny("llama", tokenizer="chat"))
    options: Any = {"pooling": em.last_token(), "batching": em.Batching(shard=2)}
    texts = [*CHATS, "The door was open."]
    with open_job(tmp_path / "run", model, texts, "resid_post", options) as job:
        job.run([0], progress=False)
    change(model.tokenizer)
    with pytest.raises(
        FileExistsError,
        match=f"was begun with {re.escape(what)} = .*, now it is .*; choose another",
    ):
        em.collect_to(tmp_path / "run", model, texts, progress=False, **options)
    with (
        pytest.raises(ValueError, match="another chat template or tokenizer")
        if what != "ids_sha256"
        else nullcontext()
    ):
        joined(tmp_path / "run", model, texts, "resid_post", options)


def test_how_text_became_tokens_is_in_the_vectors_and_the_same_from_shards(
    tiny_model, toy_set, tmp_path
):
    emotions = em.load_emotion_set(toy_set)
    whole = em.collect_resid_post(
        tiny_model, emotions, progress=False, batching=em.Batching(shard=20)
    )
    folder = em.collect_to(
        tmp_path / "run", tiny_model, emotions, progress=False, batching=em.Batching(shard=20)
    )
    assert (
        folder.info["ids_sha256"]
        == whole.info["ids_sha256"]
        == folder.folder.manifest["ids_sha256"]
    )
    assert folder.load().info == whole.info
    em.mean_difference(whole).save(tmp_path / "v.safetensors")
    info = em.load_directions(tmp_path / "v.safetensors").info
    assert info["ids_sha256"] == whole.info["ids_sha256"]
    assert info["tokenization"]["puts_before"] == ["<s>"]
    assert info["tokenization"]["template_date"] == "2024-07-26"
    other = em.collect_resid_post(
        tiny_model, emotions, progress=False, batching=em.Batching(shard=20), prepend_bos=False
    )
    assert other.info["ids_sha256"] != whole.info["ids_sha256"]


def test_activations_of_earlier_versions_do_not_know_their_tokens_and_are_read(
    tiny_model, tmp_path
):
    acts = quiet(tiny_model, TEXTS)
    old = replace(
        acts, info={k: v for k, v in acts.info.items() if k not in ("tokenization", "ids_sha256")}
    )
    old.save(tmp_path / "old.safetensors")
    read = em.Activations.load(tmp_path / "old.safetensors")
    assert torch.equal(join([read, read]).rows, torch.cat([acts.rows, acts.rows]))
    assert "ids_sha256" not in join([read]).info

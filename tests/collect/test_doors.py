"""What is read inside a block, every token, and other people's tensors: parity with TransformerLens's own cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_activations import BACKENDS, FAMILIES, TEXTS, alone, assert_close

import emolens as em
from emolens._typing import Cache, hook_name
from emolens.collect.activations import Activations
from emolens.models import encode

INNER = ("z", "q", "k", "v", "pattern", "mlp_post")
SKIP = 4
WORDS = ["joy", "fear", "joy", "fear", None, "joy"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[(f, b) for f in FAMILIES for b in BACKENDS], ids="-".join)
def model(request, tiny) -> Any:
    family, backend = request.param
    return em.load_model(tiny(family), backend=backend)


@pytest.fixture(scope="module")
def caches(model) -> list[dict[str, np.ndarray]]:
    """Of each text alone, unpadded, every hook point that is asked for."""
    names = [hook_name(p, layer) for p in (*INNER, "resid_post") for layer in (0, 2)]
    return [
        {name: alone(model, ids, name) for name in names}
        for ids in (e.ids for e in encode(model, TEXTS))
    ]


def pooled(x: np.ndarray, point: str, longest: int) -> np.ndarray:
    """Mean over tokens from `SKIP` on, `[head key]` for a pattern, else `[head d_head]` or `[d_mlp]`."""
    if point == "pattern":
        x = np.pad(x, ((0, 0), (0, 0), (0, longest - x.shape[-1]))).transpose(1, 0, 2)
    kept = max(1, min(SKIP, len(x) // 2))
    if point != "pattern":
        norm = np.linalg.norm(x.reshape(len(x), -1), axis=-1)
        assert (norm[1:] < 10 * np.median(norm[1:])).all()  # no token of these is left out
    return x[kept:].mean(0)


@pytest.mark.parametrize("point", INNER)
def test_heads_patterns_and_hidden_layers_are_those_of_the_cache(model, caches, point):
    longest = max(len(e.ids) for e in encode(model, TEXTS))
    for side in ("right", "left"):
        acts = getattr(em, f"collect_{point}")(
            model, TEXTS, layers=[2, 0], pooling=em.mean_over_tokens(skip=SKIP), padding_side=side,
            batching=em.Batching(texts=4, shard=3), progress=False,
        )  # fmt: skip
        for layer in (0, 2):
            found = acts.tensor(layer)
            for i, cache in enumerate(caches):
                assert_close(found[i], pooled(cache[hook_name(point, layer)], point, longest))


def test_grouped_queries_have_fewer_keys_than_queries(model):
    n_kv = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    q, k = (
        f(model, TEXTS[:1], layers=[1], progress=False).tensor(1)
        for f in (em.collect_q, em.collect_k)
    )
    assert q.shape == (1, model.cfg.n_heads, model.cfg.d_head)
    assert k.shape == (1, n_kv, model.cfg.d_head)


def test_the_attention_that_is_paid_to_a_text_sums_to_one(model):
    paid = em.collect_pattern(model, TEXTS, progress=False)
    for layer in paid.layers:
        total = paid.tensor(layer).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("point", ["z", "pattern", "mlp_post"])
def test_a_folder_of_heads_is_what_is_collected_in_memory(tiny_model, toy_set, tmp_path, point):
    toy, options = em.load_emotion_set(toy_set), {"batching": em.Batching(shard=10)}
    whole = getattr(em, f"collect_{point}")(tiny_model, toy, progress=False, **options)
    folder = em.collect_to(tmp_path / "c", tiny_model, toy, point, progress=False, **options)
    loaded = folder.load()
    assert torch.equal(loaded.rows, whole.rows)
    assert loaded.heads == whole.heads
    loaded.save(tmp_path / "a.safetensors")
    again = Activations.load(tmp_path / "a.safetensors")
    assert again.tensor(1).shape == whole.tensor(1).shape
    assert torch.equal(folder.moments().total, whole.moments().total)


def test_directions_are_made_of_heads_as_of_the_stream(tiny_model, toy_set):
    acts = em.collect_z(tiny_model, em.load_emotion_set(toy_set), layers=[1], progress=False)
    v = em.mean_difference(acts, remove_neutral=None)
    means = torch.stack(
        [
            acts.rows[[t.emotion == e and t.split == "main" for t in acts.texts]].mean(0)
            for e in v.emotions
        ]
    )
    torch.testing.assert_close(v.vectors, means - means.mean(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("point", [*INNER, "resid_post", "embed"])
def test_every_token_is_that_of_the_cache(model, caches, point):
    found, mask = em.token_activations(
        model, TEXTS, layers=None if point == "embed" else [0, 2], hook_point=point
    )
    lengths = [len(e.ids) for e in encode(model, TEXTS)]
    assert mask.sum(-1).tolist() == lengths
    assert list(found) == ([0] if point == "embed" else [0, 2])
    for i, (cache, n) in enumerate(zip(caches, lengths, strict=True)):
        for layer, x in found.items():
            mine = x[i, :, :n, :n] if point == "pattern" else x[i, :n]
            if point != "embed":
                assert_close(mine, cache[hook_name(point, layer)])
    assert not any(h.fwd_hooks for h in model.hook_dict.values())


def test_wrong_requests_for_tokens_are_refused(tiny_model):
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        em.token_activations(tiny_model, ["a"], layers=9)
    with pytest.raises(ValueError, match="no texts"):
        em.token_activations(tiny_model, [])


# --- other people's tensors -------------------------------------------------------------------------------------------


def same(a: Activations, b: Activations) -> None:
    assert_close(a.rows, b.rows)
    assert (a.layers, a.hook_point, a.labels) == (b.layers, b.hook_point, b.labels)


def test_tensors_of_torch_and_numpy_give_the_directions_of_what_was_collected(tiny_model, toy_set):
    acts = em.collect_resid_post(
        tiny_model, em.load_emotion_set(toy_set), layers=[0, 2], progress=False
    )
    main = acts.select(lambda t: t.split == "main")
    for rows in (main.rows, main.rows.numpy(), main.rows.double().tolist()):
        mine = em.Activations.from_tensors(
            rows, main.labels, topics=[t.topic for t in main.texts], model=tiny_model, layers=np.array([0, 2])
        )  # fmt: skip
        same(mine, main)
        v, expected = (em.mean_difference(a, remove_neutral=None) for a in (mine, main))
        torch.testing.assert_close(v.vectors, expected.vectors, atol=1e-6, rtol=1e-5)
        assert v.calibration is not None
    hooks = em.steer_resid_post(v[v.emotions[0]], layer=2, dose=0.1)
    em.check(tiny_model, hooks, "The door")


def test_a_cache_of_transformer_lens_and_a_dict_are_taken_over(model):
    encoded = encode(model, TEXTS)
    tokens, mask = em.models.pad(encoded, "right", "cpu")
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
    assert isinstance(cache, Cache)
    assert isinstance({}, Cache)
    rest = mask.clone()
    rest[:, :1] = 0
    rest[2, :2] = 1 - mask[2, :2] + mask[2, :2]  # "Rain." keeps its tokens
    expected = {
        k: (x * rest[..., None]).sum(1) / rest.sum(-1, keepdim=True)
        for k in range(3)
        if (x := cache[f"blocks.{k}.hook_resid_post"]) is not None
    }
    for given in (cache, dict(cache.items())):
        acts = em.Activations.from_tensors(given, WORDS, model=model, mask=rest)
        assert acts.layers == (0, 1, 2)
        assert acts.labels == WORDS
        for layer, x in expected.items():
            assert_close(acts.tensor(layer), x)
    by_head = em.Activations.from_tensors(
        cache, WORDS, model=model, mask=rest, hook_point="k", layers=1
    )
    x = cache["blocks.1.attn.hook_k"]
    assert_close(
        by_head.tensor(1), (x * rest[..., None, None]).sum(1) / rest.sum(-1)[:, None, None]
    )


def test_padding_may_hold_anything(tiny_model):
    x, mask = torch.randn(2, 5, 32), torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    expected = x[1, 1:3].mean(0)
    x[1, 3:] = torch.nan
    acts = em.Activations.from_tensors(
        {"blocks.1.hook_resid_post": x}, ["a", "b"], model=tiny_model, mask=mask
    )
    assert_close(acts.tensor(1)[1], expected)
    norms = x[mask.bool()].norm(dim=-1)
    assert float(acts.norm_median[0]) == pytest.approx(float(norms.median()), rel=0.1)


def test_what_is_taken_over_can_be_saved_and_is_of_its_model_only(tiny_model, tmp_path):
    rows, labels = np.random.default_rng(0).normal(size=(4, 2, 32)), torch.tensor([0, 1, 0, 1])
    acts = em.Activations.from_tensors(rows, labels, model="gpt2", layers=[1, 2])
    acts.save(tmp_path / "a.safetensors")
    same(Activations.load(tmp_path / "a.safetensors"), acts)
    assert acts.labels == ["0", "1", "0", "1"]
    assert bool(acts.embed.isnan().all())
    v = em.mean_difference(acts, remove_neutral=None)
    assert not torch.allclose(v.cosine(), torch.eye(2))
    with pytest.raises(ValueError, match="made with gpt2"):
        em.check(tiny_model, em.steer_resid_post(v["0"], layer=1, dose=0.1), "The door")


ROWS = torch.ones(2, 1, 32)
POST = "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {}, "layers: say which blocks"),
        (ROWS, {"layers": [1, 2]}, r"rows of shape \[2, 1, 32\] for layers \[1, 2\]; give \[text layer d_model\]"),
        (ROWS[..., :8], {"layers": 1}, "rows are 8 wide, resid_post of .* is 32"),
        (ROWS, {"layers": 9}, "layer 9 does not exist"),
        (ROWS * torch.nan, {"layers": 1}, "NaN or infinity"),
        (ROWS, {"layers": 1, "labels": ["a"]}, "1 labels for 2 texts"),
        (ROWS, {"layers": 1, "topics": ["a"] * 3}, "3 topics for 2 texts"),
        (ROWS, {"layers": 1, "mask": torch.ones(2, 1)}, "take no mask"),
        (ROWS, {"layers": 1, "hook_point": "pattern"}, "em.collect_pattern pools it"),
        (ROWS, {"layers": 1, "hook_point": "z"}, "give .text layer head d_head"),
        ({POST: torch.ones(2, 5, 32)}, {}, "need mask"),
        ({POST: torch.ones(2, 5, 32)}, {"mask": torch.ones(2, 4)}, r"mask of shape \[2, 4\]"),
        ({POST: torch.ones(2, 5, 32)}, {"mask": torch.zeros(2, 5)}, "with a token of each text"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(tiny_model, rows, options, message):
    given = {"labels": ["a", "b"], "model": tiny_model} | options
    with pytest.raises(ValueError, match=message):
        em.Activations.from_tensors(rows, **given)
    with pytest.raises(KeyError, match=r"no blocks\.0\.hook_resid_mid; it has: x"):
        em.Activations.from_tensors({"x": ROWS}, ["a"], model="gpt2", hook_point="resid_mid")


def test_numbers_of_numpy_and_torch_are_numbers(tiny_model):
    two = (np.int64(2), torch.tensor(2))
    for n in two:
        batching = em.Batching(tokens=n, texts=n, shard=n)
        assert batching == em.Batching(2, 2, 2)
        for pooling in (em.mean_over_tokens(skip=n), em.every_token(skip=n, limit=n)):
            em.collect_resid_post(
                tiny_model, TEXTS[:2], layers=n, pooling=pooling, batching=batching, progress=False
            )
            assert isinstance(pooling.skip, int)
        assert em.char_span([(n - 2, n)]).spans == ((0, 2),)
    for wrong in (0, -1, 1.5, True, "two", SimpleNamespace()):
        with pytest.raises(ValueError, match=r"Batching: tokens=.*at least 1"):
            em.Batching(tokens=wrong)

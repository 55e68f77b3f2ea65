"""Patching equals a naive loop and TransformerLens's own; attribution adds up to the projection."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import emolens as em
from emolens._typing import hook_name, typed
from emolens.directions.value import EmotionDirections
from emolens.interventions import attribution as attribution_room
from emolens.interventions import metrics as metrics_room
from emolens.interventions import patching as P
from emolens.interventions import verbs as verbs_room
from emolens.models.identity import model_info
from emolens.models.running import can_start_at_layer

CLEAN, CORRUPTED = "He lost 3 cats today.", "He lost 7 cats today."
TOLERANCE = (
    1e-4  # float32 noise of three blocks is 1e-6; batches of other sizes choose other kernels
)
TL3 = not __import__("importlib.metadata").metadata.version("transformer-lens").startswith("4")


@pytest.fixture(
    scope="module",
    params=[(f, b) for f in ("llama", "qwen2", "neox") for b in ("hooked", "bridge")],
    ids="-".join,
)
def model(request, tiny) -> Any:
    family, backend = request.param
    if backend == "hooked" and not TL3:
        pytest.skip("HookedTransformer is loaded on TransformerLens 3 only")
    return em.load_model(tiny(family), backend=backend)


def metric(logits):
    return logits[:, 5] - logits[:, 9]


def both(model):
    device = next(model.parameters()).device
    return tuple(
        torch.tensor([e.ids], device=device) for e in em.models.encode(model, [CLEAN, CORRUPTED])
    )


def directions(model, hook_point="resid_post"):
    n, d = model.cfg.n_layers, model.cfg.d_model
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(1, n, d, generator=generator)
    ones = torch.ones(n)
    return EmotionDirections(
        ("joy",), hook_point, tuple(range(n)), vectors, torch.randn(n, d, generator=generator), torch.zeros(n, d),
        ones, ones, torch.ones(1, n), 1, {"model": model_info(model).to_dict(), "method": "made up"},
    )  # fmt: skip


def naive(model, point, shift=0):
    clean, corrupted = both(model)
    _, cache = model.run_with_cache(clean)
    heads = point in ("z", "q", "k", "v")
    out = []
    for layer in range(model.cfg.n_layers):
        name = hook_name(point, (layer + shift) % model.cfg.n_layers)
        cells = cache[name].shape[2] if heads else clean.shape[1]
        row = []
        for cell in range(cells):

            def hook(act, hook, cell=cell, name=name):
                act = act.clone()
                if heads:
                    act[:, :, cell] = cache[name][:, :, cell]
                else:
                    act[:, cell] = cache[name][:, cell]
                return act

            row.append(
                float(
                    metric(
                        model.run_with_hooks(corrupted, fwd_hooks=[(name, hook)])[:, -1]
                    ).detach()
                )
            )
        out.append(row)
    return np.array(out)


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / np.abs(b).max())


def ordered(model):
    """The two prompts, the one with the higher metric first."""
    r = P.patch_resid_post(
        model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, layers=[0], positions=[0]
    )
    return (CLEAN, CORRUPTED) if r.clean[0] > r.corrupted[0] else (CORRUPTED, CLEAN)


def sweep(model, point, **options):
    return getattr(P, f"patch_{point}")(
        model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, **options
    )


@pytest.mark.parametrize(
    "point", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v"]
)
def test_a_sweep_equals_a_naive_loop_of_full_forwards(model, point):
    expected = naive(model, point)
    difference = relative(sweep(model, point, batch_tokens=20).values[0], expected)
    print(f"naive {point}: {difference:.1e}")
    assert difference < TOLERANCE
    assert relative(naive(model, point, shift=1), expected) > TOLERANCE, (
        "the check must see a wrong layer"
    )


def test_a_wrong_site_is_seen(model):
    assert relative(sweep(model, "mlp_out").values[0], naive(model, "attn_out")) > TOLERANCE


def test_patching_everything_gives_the_clean_run(model):
    last = model.cfg.n_layers - 1
    assert sweep(model, "resid_post", layers=[last]).recovery[0, -1] == pytest.approx(1, abs=1e-3)
    high, low = ordered(model)
    r = P.patch_resid_pre(
        model, clean=[high, high], corrupted=[low, low], metric=metric, layers=[0]
    )
    assert r.recovery[0, 1] == pytest.approx(1, abs=1e-3), (
        "the changed tokens are everything at layer 0"
    )


def test_a_cache_of_transformer_lens_is_a_source_where_annotations_are_checked(model):
    clean, _ = both(model)
    _, cache = model.run_with_cache(clean)
    patch = typed(verbs_room._patch)
    assert not isinstance(cache, Mapping)
    names = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    assert [name for name, _ in patch("resid_post", cache, layer=[0, 2])] == names
    assert [name for name, _ in patch("resid_post", dict(cache), layer=[0, 2])] == names
    with pytest.raises(TypeCheckError):
        patch("resid_post", 3, layer=1)


def test_clean_into_clean_changes_nothing(model):
    clean, _ = both(model)
    want, cache = model.run_with_cache(clean)
    for layer in range(model.cfg.n_layers):
        hooks = verbs_room.patch_resid_pre(cache[f"blocks.{layer}.hook_resid_pre"], layer=layer)
        got = model.run_with_hooks(clean, fwd_hooks=hooks)
        assert torch.allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(
        ValueError, match="of 1 pairs none has clean - corrupted above 0"
    ):  # no share of no gap
        P.patch_resid_pre(model, clean=CLEAN, corrupted=CLEAN, metric=metric)


@pytest.mark.parametrize("point", ["resid_pre", "attn_out", "mlp_out", "z"])
def test_equals_transformer_lens(model, point):
    from transformer_lens import patching as tl

    getters = {
        "resid_pre": tl.get_act_patch_resid_pre, "attn_out": tl.get_act_patch_attn_out,
        "mlp_out": tl.get_act_patch_mlp_out, "z": tl.get_act_patch_attn_head_out_all_pos,
    }  # fmt: skip
    clean, corrupted = both(model)
    _, cache = model.run_with_cache(clean)
    theirs = (
        getters[point](model, corrupted, cache, lambda logits: metric(logits[:, -1]).squeeze())
        .detach()
        .cpu()
    )
    difference = relative(sweep(model, point).values[0], theirs.numpy())
    print(f"TransformerLens {point}: {difference:.1e}")
    assert difference < TOLERANCE


def test_skipping_equals_not_skipping(model):
    if not can_start_at_layer(model):
        pytest.skip("this backend never skips")
    run = partial(
        P._sweep, model=model, hook_point="resid_pre", clean=CLEAN, corrupted=CORRUPTED, metric=metric, mode="noise"
    )  # fmt: skip
    skipping, whole = (
        run(partial(P._exact, batch_tokens=4096, skip=skip)) for skip in (True, False)
    )
    assert relative(skipping.values, whole.values) < TOLERANCE


@pytest.mark.parametrize(
    ("point", "measured", "trivial"),
    [
        ("resid_pre", [0, 1], [2]),
        ("attn_out", [0, 1], []),
        ("mlp_out", [0, 1], []),
        ("resid_post", [0], [1]),
        ("z", [0, 1], []),
    ],
)
def test_a_projection_tells_what_lies_before_it_from_itself_and_what_lies_behind(
    model, point, measured, trivial
):
    """Against a naive loop: the cells that the metric itself reads are the source's projection, those behind it change nothing."""
    metric = metrics_room.projection(directions(model), layer=1)  # at resid_post
    r = getattr(P, f"patch_{point}")(model, clean=CLEAN, corrupted=CORRUPTED, metric=metric)
    assert [layer for layer in r.layers if np.isfinite(r.values[0, layer]).all()] == measured
    assert list(r.trivial) == trivial
    clean, corrupted = both(model)
    name = "blocks.{}.hook_resid_post".format

    def put(layer):
        return name(layer), lambda act, hook: clean_act[layer]

    _, cache = model.run_with_cache(clean)
    clean_act = {layer: cache[name(layer)] for layer in (0, 1, 2)}
    seen: list[torch.Tensor] = []
    listen = (name(1), lambda act, hook: seen.append(act[0, -1].detach()))
    for layer in (1, 2):
        model.run_with_hooks(corrupted, fwd_hooks=[put(layer), listen])
    model.run_with_hooks(corrupted, fwd_hooks=[listen])
    assert torch.equal(seen[0], clean_act[1][0, -1])  # trivial
    assert torch.equal(seen[1], seen[2])  # behind it nothing happens


def test_trivial_and_impossible_cells_look_different(model):
    r = P.patch_resid_post(
        model,
        clean=CLEAN,
        corrupted=CORRUPTED,
        metric=metrics_room.projection(directions(model), layer=1),
    )
    lines = repr(r).splitlines()
    assert set(lines[3].split()[1:]) == {"="}
    assert set(lines[4].split()[1:]) == {"."}
    html = r._repr_html_()
    n = len(r.labels)
    assert (html.count("what the metric itself reads"), html.count("cannot matter")) == (n, n)


@pytest.mark.parametrize("layer", [0, 2])
def test_attribution_adds_up_to_the_projection(model, layer):
    a = attribution_room.attribute(model, directions(model), [CLEAN, CORRUPTED], layer=layer)
    print(f"attribution error {a.error:.1e}")
    assert a.error < 1e-5
    assert a.values.sum() == pytest.approx(float(a.total), abs=1e-4)
    assert a.heads.shape == (layer + 1, model.cfg.n_heads)
    html = a._repr_html_()
    for label, x in zip(
        a.labels, a.mean, strict=True
    ):  # heads, MLPs, biases and the embedding: the largest may be any of them
        assert f">{x:z.2f}</td>" in html, label
    assert all(f"<th>{part}</th>" in html for part in ("H0", "mlp", "bias", "embed", "L0"))
    t = attribution_room.attribute(model, directions(model), CLEAN, layer=layer, per="token")
    assert t.values.shape == (len(t.tokens), len(t.labels))
    assert len(t.top(3)) == 3


@pytest.mark.parametrize("point", ["resid_pre", "mlp_out"])
def test_gradients_equal_exact_patching_for_tiny_differences(model, point):
    clean, corrupted = both(model)
    i, j = next((int(a), int(b)) for a, b in zip(clean[0], corrupted[0], strict=True) if a != b)
    weight = model.W_E.data
    before = weight[i].clone()
    weight[i] = weight[j] + 1e-2 * before
    try:
        exact = sweep(model, point)
        near = P.attribution_patching(
            model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, hook_point=point
        )
    finally:
        weight[i] = before
    difference = relative(near.values[0] - near.corrupted[0], exact.values[0] - exact.corrupted[0])
    print(f"gradients {point}: {difference:.1e}")
    assert difference < 0.1, "second-order terms of a change of one percent"
    assert "Pearson" in repr(metrics_room.agreement(exact, near))


def test_counts_and_spans_of_several_pairs(tiny_model):
    high, low = ordered(tiny_model)
    clean, corrupted = [high, high, "one", high], [low, low, "one two three four", high]
    r = P.patch_resid_pre(tiny_model, clean=clean, corrupted=corrupted, metric=metric)
    assert r.labels == metrics_room.SPANS
    assert (len(r.clean), r.dropped, r.excluded) == (2, 1, 1)
    assert r.pairs.tolist() == [[2 if span else 0 for span in (r.recovery[0] == r.recovery[0])]] * 3
    assert "1 dropped" in repr(r)
    assert r.interval is not None
    one = P.patch_resid_pre(tiny_model, clean=CLEAN, corrupted=CORRUPTED, metric=metric)
    assert one.interval is None


def test_errors_say_what_is_wrong(model):
    run = partial(P.patch_resid_pre, model, metric=metric)
    with pytest.raises(ValueError, match="patching needs the same count"):
        run(clean="one", corrupted="one two three four")
    with pytest.raises(ValueError, match=r"layer 7 does not exist; this model has layers 0 to 2"):
        run(clean=CLEAN, corrupted=CORRUPTED, layers=[7])
    with pytest.raises(ValueError, match="position 99 does not exist"):
        run(clean=CLEAN, corrupted=CORRUPTED, positions=[99])
    with pytest.raises(ValueError, match="mode is 'denoise' or 'noise', not 'noising'"):
        run(clean=CLEAN, corrupted=CORRUPTED, mode="noising")
    with pytest.raises(ValueError, match="patch_z takes all positions at once"):
        P.patch_z(model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, positions=[0])
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, given 0"):
        run(clean=CLEAN, corrupted=CORRUPTED, batch_tokens=0)
    with pytest.raises(ValueError, match="needs directions at resid_post"):
        attribution_room.attribute(model, directions(model, "resid_pre"), CLEAN)
    if getattr(model.cfg, "parallel_attn_mlp", False):
        with pytest.raises(KeyError, match="hook_resid_mid"):
            sweep(model, "resid_mid")


def test_labels_are_escaped(tiny_model):
    r = P.patch_resid_pre(tiny_model, clean="a <b> 3", corrupted="a <b> 7", metric=metric)
    assert "<b>" not in r._repr_html_()


def test_pairs_of_several_contrasts_are_joined_and_a_single_pair_has_spans_too(model):
    high, low = ordered(model)
    longer = f"{high} So it was.", f"{low} So it was."
    gap = P.patch_resid_pre(model, clean=longer[0], corrupted=longer[1], metric=metric, layers=[0])
    other = longer if gap.clean[0] > gap.corrupted[0] else longer[::-1]
    pairs = ((high, low), other)
    one = [
        P.patch_resid_pre(
            model, clean=a, corrupted=b, metric=metric, layers=[0, 2], positions=metrics_room.SPANS
        )
        for a, b in pairs
    ]
    joined = one[0].joined(one[1:])
    clean, corrupted = ([p[k] for p in pairs] for k in (0, 1))
    whole = P.patch_resid_pre(model, clean=clean, corrupted=corrupted, metric=metric, layers=[0, 2])
    assert joined.labels == whole.labels == metrics_room.SPANS
    np.testing.assert_array_equal(joined.values, whole.values)
    np.testing.assert_array_equal(joined.recovery, whole.recovery)
    with pytest.raises(ValueError, match="can be joined"):
        one[0].joined(
            [
                P.patch_resid_post(
                    model,
                    clean=CLEAN,
                    corrupted=CORRUPTED,
                    metric=metric,
                    positions=metrics_room.SPANS,
                )
            ]
        )
    with pytest.raises(ValueError, match="not 'middle'"):
        P.patch_resid_pre(
            model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, positions=["middle"]
        )


@pytest.mark.parametrize(
    "patch", [P.patch_resid_pre, P.patch_z, P.attribution_patching], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_a_pair_that_differs_the_other_way_round_is_left_out_and_counted(model, patch, mode):
    """Two mirrored pairs cancelled to NaN, which was printed as a cell that cannot matter."""
    high, low = ordered(model)
    both = patch(model, clean=[high, low], corrupted=[low, high], metric=metric, mode=mode)
    right = patch(model, clean=[high], corrupted=[low], metric=metric, mode=mode)
    assert (both.excluded, len(both.clean)) == (1, 1)
    assert "1 pair(s), 0 dropped, 1 excluded" in repr(both)
    if patch is P.patch_z:  # a single pair has its tokens for columns, not spans
        np.testing.assert_array_equal(both.recovery, right.recovery)
    assert np.isfinite(both.recovery[:, -1]).all()
    assert (both.pairs[:, -1] == 1).all()


def test_joining_mirrored_pairs_leaves_one_out_as_sweeping_them_does(model):
    high, low = ordered(model)
    run = partial(P.patch_resid_pre, model, metric=metric, positions=metrics_room.SPANS)
    joined = run(clean=high, corrupted=low).joined([run(clean=low, corrupted=high)])
    together = run(clean=[high, low], corrupted=[low, high])
    assert joined.excluded == together.excluded == 1
    np.testing.assert_array_equal(joined.recovery, together.recovery)


def test_pairs_of_which_none_passes_are_refused_with_the_fix(model):
    high, low = ordered(model)
    for patch in (P.patch_resid_pre, P.attribution_patching):
        with pytest.raises(ValueError, match=r"of 1 pairs none has clean - corrupted above 0"):
            patch(
                model, clean=high, corrupted=high, metric=metric
            )  # no difference to recover: a table of NaN
        with pytest.raises(
            ValueError, match=r"of 2 pairs none has clean - corrupted above 0: .*Swap its sides"
        ):
            patch(model, clean=[low, low], corrupted=[high, high], metric=metric)
        with pytest.raises(
            ValueError, match=r"none has clean - corrupted above 1000: .*lower min_gap"
        ):
            patch(model, clean=high, corrupted=low, metric=metric, min_gap=1000)

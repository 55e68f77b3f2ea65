"""Components, axes of norms, similarity of layers and clusters: planted structure, nulls, and parity with naive loops."""

from __future__ import annotations

from itertools import pairwise

import jaxtyping
import numpy as np
import pytest
from _reference import geometry as naive
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from emolens import geometry

PROPERTY = settings(
    max_examples=25, deadline=None, derandomize=True
)  # no deadline: two shared cores


def _rotation(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


# --- components -------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(0, 10_000))
def test_components_are_scikit_learns_pca_of_unit_vectors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(12, 8)) * np.linspace(3, 1, 8)
    scores, share = geometry.components(vectors.astype(np.float32), n=3)
    pca = PCA(n_components=3, svd_solver="full")
    expected = pca.fit_transform(geometry.unit(vectors))
    assert np.abs(share - pca.explained_variance_ratio_).max() < 1e-5  # inputs rounded to float32
    for k in range(3):
        r = np.corrcoef(scores[:, k], expected[:, k])[0, 1]
        assert (
            abs(r) > 0.999
        )  # the sign is arbitrary; near-equal components mix by float32 rounding
        assert scores[:, k].std() == pytest.approx(expected[:, k].std(), rel=1e-3)


def test_a_loud_emotion_does_not_make_an_axis() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(10, 6))
    loud = vectors.copy()
    loud[3] *= 1000
    a, b = (geometry.components(v)[1] for v in (vectors, loud))
    assert np.allclose(a, b, atol=1e-5)  # float32 rounding of the inputs
    raw = np.linalg.svd(loud - loud.mean(0), compute_uv=False) ** 2
    assert (
        raw[0] / raw.sum() > 0.99
    )  # negative control: without unit norm that emotion is the first axis


def test_there_are_no_more_components_than_dimensions() -> None:
    scores, share = geometry.components(np.random.default_rng(0).normal(size=(4, 2)), n=5)
    assert scores.shape == (4, 2)
    assert share.sum() == pytest.approx(1.0, abs=1e-6)  # two float32 shares


def test_a_wrong_shape_is_a_type_check_error() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        geometry.components(np.zeros(3))


# --- axes of human norms ----------------------------------------------------------------------------------------------


def _null(layers: list[np.ndarray], norm: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    return geometry.axis_null(layers, [(range(len(norm)), norm)], n_permutations=n, seed=seed)


def test_a_second_table_that_says_the_same_hardly_raises_the_null_and_another_one_does() -> None:
    rng = np.random.default_rng(8)
    layers = [rng.normal(size=(40, 3)) for _ in range(4)]
    norm, other = rng.normal(size=40), rng.normal(size=12)
    every, some = range(40), range(5, 17)
    alone, same, two = (
        np.percentile(geometry.axis_null(layers, tables, n_permutations=400), 95)
        for tables in (
            [(every, norm)],
            [(every, norm), (every, 3 * norm + 1)],
            [(every, norm), (some, other)],
        )
    )
    assert same == pytest.approx(alone)
    assert two > alone  # twelve words reach a high r by chance


def test_a_planted_axis_is_found_at_its_component_with_the_least_possible_p() -> None:
    rng = np.random.default_rng(1)
    norm = rng.normal(size=30)
    scores = rng.normal(size=(30, 3))
    scores[:, 1] = -norm + 0.2 * rng.normal(size=30)  # the sign of a component is arbitrary
    table = geometry.axis_table(scores, norm, _null([scores], norm, 199))
    assert [fit.component for fit in table] == [1, 2, 3]
    assert table[1].r.value < -0.9  # r keeps the sign that the component was given
    assert table[1].r.high < -0.8
    assert (
        table[0].r.low < 0 < table[0].r.high
    )  # an interval of |r| could not say that there is nothing
    assert table[1].p == pytest.approx(1 / 200)
    assert min(table[0].p, table[2].p) > 0.05


def test_the_axis_p_is_uniform_under_the_null_and_counts_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        geometry.stats, "bootstrap", lambda *_, **__: geometry.stats.Estimate(0, 0, 0)
    )  # the interval is not what is tested here
    rng = np.random.default_rng(2)
    best = []
    for seed in range(300):
        layers = [rng.normal(size=(20, 3)) for _ in range(4)]
        norm = rng.normal(size=20)
        # report the best of twelve cells, as somebody who searched would
        null = _null(layers, norm, 99, seed)
        best.append(
            min(fit.p for scores in layers for fit in geometry.axis_table(scores, norm, null))
        )
    assert min(best) >= 0.01  # the floor, 1 / (99 + 1)
    # P(best <= .1) = .1 with a binomial sd of .017 over 300 runs; without the maximum it would be about 1 - .9**12 = .72.
    assert np.mean(np.asarray(best) <= 0.1) < 0.16
    assert np.mean(best) == pytest.approx(
        0.5, abs=0.07
    )  # sd of a mean of 300 uniforms is .017; four of them


def test_searching_more_layers_raises_the_null() -> None:
    rng = np.random.default_rng(3)
    norm, here = rng.normal(size=20), rng.normal(size=(20, 1))
    layers = [here, *(rng.normal(size=(20, 3)) for _ in range(10))]
    alone, among = (
        geometry.axis_table(here, norm, _null(a, norm, 200))[0] for a in ([here], layers)
    )
    assert among.null_high > alone.null_high
    assert among.p >= alone.p
    assert among.r == alone.r


def test_a_component_that_does_not_vary_has_no_p_below_one() -> None:
    norm = np.random.default_rng(4).normal(size=12)
    scores = np.column_stack([norm, np.zeros(12)])
    with pytest.warns(RuntimeWarning, match="All-NaN"):  # the interval of an r that does not exist
        table = geometry.axis_table(scores, norm, _null([scores], norm, 50))
    assert np.isnan(table[1].r.value)
    assert table[1].p == 1.0


def test_ridge_predicts_a_planted_axis_for_words_it_never_saw() -> None:
    rng = np.random.default_rng(5)
    norm = rng.normal(size=40)
    vectors = norm[:, None] * rng.normal(size=24) + rng.normal(size=(40, 24))
    assert np.corrcoef(geometry.ridge_heldout(vectors, norm), norm)[0, 1] > 0.8
    # negative control: a norm that the vectors do not hold (40 words: three standard errors are .48)
    other = rng.normal(size=40)
    assert np.corrcoef(geometry.ridge_heldout(vectors, other), other)[0, 1] < 0.48


def test_the_ridge_of_a_word_does_not_see_that_words_norm() -> None:
    rng = np.random.default_rng(6)
    vectors, norm = rng.normal(size=(30, 6)), rng.normal(size=30)
    changed = norm.copy()
    changed[4] += 100
    before, after = (geometry.ridge_heldout(vectors, y) for y in (norm, changed))
    assert after[4] == before[4]
    assert (
        after != before
    ).sum() >= 27  # the others do, but for the two that share its fold (30 words in ten folds)


def test_many_norms_at_once_are_each_predicted_as_alone() -> None:
    rng = np.random.default_rng(7)
    vectors, norms = rng.normal(size=(32, 6)), rng.normal(size=(32, 3))
    together = geometry.ridge_heldout(vectors, norms)
    for k in range(3):
        assert np.abs(together[:, k] - geometry.ridge_heldout(vectors, norms[:, k])).max() < 1e-8


def test_a_ridge_of_few_words_is_refused_because_it_would_say_minus_one() -> None:
    rng = np.random.default_rng(8)
    with pytest.raises(
        ValueError,
        match="a ridge regression over 8 held-out words says nothing; at least 30 are needed",
    ):
        geometry.ridge_heldout(rng.normal(size=(8, 6)), rng.normal(size=8))


def test_the_sign_of_a_component_is_its_own() -> None:
    vectors = np.random.default_rng(1).normal(size=(9, 6))
    scores, _ = geometry.components(vectors)
    for k in range(3):
        assert scores[np.abs(scores[:, k]).argmax(), k] > 0
    flipped, _ = geometry.components(
        vectors @ np.diag([-1.0, 1, 1, -1, 1, 1])
    )  # a mirror: the same shape
    assert np.allclose(flipped, scores, atol=1e-5, rtol=0)


def test_intervals_over_pairs_resample_emotions() -> None:
    """Of a matrix that is one number for each emotion, 45 pairs know no more than ten emotions do."""
    rng = np.random.default_rng(9)
    own = rng.normal(size=10)
    e = geometry.over_pairs(lambda i, j: float((own[i] + own[j]).mean()), 10, n=400)
    assert e.value == pytest.approx(2 * own.mean())
    assert (e.high - e.low) / 4 == pytest.approx(
        2 * own.std() / 10**0.5, rel=0.3
    )  # two standard errors of a mean of ten, each side


# --- similarity -------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(0, 10_000))
def test_rsa_is_the_naive_loop_over_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, points = rng.normal(size=(9, 7)), rng.normal(size=(9, 2))
    rho, _ = geometry.rsa(vectors, points, n_permutations=1, n_resamples=2)
    assert rho.value == pytest.approx(
        naive.rsa(vectors, points), abs=1e-9
    )  # ranks are exact, the rest is float64


def test_rsa_finds_a_plane_that_is_rotated_into_many_dimensions_and_mantel_p_reaches_its_floor() -> (
    None
):
    rng = np.random.default_rng(7)
    angle = rng.uniform(0, 2 * np.pi, size=14)
    points = np.column_stack([np.cos(angle), np.sin(angle)])
    vectors = (
        np.pad(points, ((0, 0), (0, 10))) @ _rotation(rng, 12) * rng.uniform(1, 9, size=(14, 1))
    )
    rho, p = geometry.rsa(vectors, points, n_permutations=99)
    assert rho.value == pytest.approx(
        1.0, abs=1e-6
    )  # near-equal distances may swap ranks by float64 rounding
    assert p == pytest.approx(0.01)
    assert geometry.rsa(rng.normal(size=(14, 12)), points, n_permutations=99)[1] > 0.05


@PROPERTY
@given(st.integers(0, 10_000))
def test_procrustes_is_the_sum_of_singular_values(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, points = rng.normal(size=(2, 10, 2))
    disparity, _ = geometry.procrustes(scores, points, n_permutations=1)
    assert disparity == pytest.approx(
        naive.procrustes_disparity(points, scores), abs=1e-10
    )  # float64


def test_procrustes_ignores_rotation_reflection_scale_and_shift() -> None:
    rng = np.random.default_rng(8)
    points = rng.normal(size=(12, 2))
    disparity, p = geometry.procrustes(
        5 * points @ _rotation(rng, 2) * [1, -1] + 3, points, n_permutations=99
    )
    assert disparity == pytest.approx(0.0, abs=1e-12)  # float64 rounding of a sum of squares of one
    assert p == pytest.approx(0.01)


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_layer_rsa_is_the_naive_loop_for_one_two_and_more_layers(n_layers: int) -> None:
    vectors = np.random.default_rng(n_layers).normal(size=(7, n_layers, 6))
    found = geometry.layer_rsa(vectors)
    assert found.shape == (n_layers, n_layers)
    assert (
        np.abs(found - naive.layer_rsa(vectors)).max() < 1e-9
    )  # ranks are exact, the rest float64


def test_layer_rsa_is_one_between_a_layer_and_its_rotated_louder_copy() -> None:
    rng = np.random.default_rng(9)
    a = rng.normal(size=(8, 10))
    vectors = np.stack([a, 7 * a @ _rotation(rng, 10), rng.normal(size=(8, 10))], 1)
    found = geometry.layer_rsa(vectors)
    assert found[0, 1] > 0.999  # float32 inputs may swap two near-equal cosines
    assert abs(found[0, 2]) < 0.6  # negative control; 28 pairs: three standard errors are .57


@pytest.mark.parametrize("k", [3, 8, 24])
def test_cosines_of_centred_directions_are_expected_at_minus_one_over_k_minus_one(k: int) -> None:
    low, high = geometry.cosine_null(k, 512, n=100)
    assert low < -1 / (k - 1) < high
    assert (low + high) / 2 == pytest.approx(
        -1 / (k - 1), abs=0.01
    )  # sd of a cosine is 1/sqrt(512) = .044, 300 draws or more
    wide = np.subtract(*geometry.cosine_null(k, 64, n=100)[::-1])
    assert wide > high - low  # fewer dimensions, wider null


# --- clusters ---------------------------------------------------------------------------------------------------------


def _families(seed: int, spread: float) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    families = [f"family-{i // 4}" for i in range(16)]
    return np.repeat(rng.normal(size=(4, 20)), 4, axis=0) + spread * rng.normal(
        size=(16, 20)
    ), families


def test_planted_families_are_recovered_exactly_with_the_least_possible_p() -> None:
    vectors, families = _families(0, spread=0.3)
    index, p, clusters = geometry.family_agreement(vectors, families, n_permutations=99)
    assert index == pytest.approx(1.0)
    assert p == pytest.approx(0.01)
    assert len({(f, c) for f, c in zip(families, clusters, strict=True)}) == 4


def test_families_that_the_vectors_do_not_hold_are_not_found() -> None:
    rng = np.random.default_rng(1)
    found = [
        geometry.family_agreement(rng.normal(size=(16, 20)), _families(0, 0)[1], n_permutations=49)
        for _ in range(40)
    ]
    assert (
        abs(np.mean([index for index, _, _ in found])) < 0.1
    )  # the index is adjusted for chance: zero on average
    assert (
        np.mean([p <= 0.1 for _, p, _ in found]) < 0.3
    )  # .1 expected, binomial sd .047; the index is discrete


def test_the_cluster_order_puts_families_side_by_side() -> None:
    vectors, families = _families(2, spread=0.2)
    shuffled = np.random.default_rng(0).permutation(16)
    order = geometry.cluster_order(vectors[shuffled])
    assert sorted(order) == list(range(16))
    seen = [families[shuffled[i]] for i in order]
    assert sum(a != b for a, b in pairwise(seen)) == 3


def test_unit_rows_have_norm_one_and_a_zero_row_stays_zero() -> None:
    rows = geometry.unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert rows.tolist() == [[0.6, 0.8], [0.0, 0.0]]

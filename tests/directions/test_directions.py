"""Directions on activations whose emotions are planted: recovery, calibration, arithmetic, files, and the main errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
from _reference import directions as naive
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import emolens as em
from emolens import stats
from emolens.cli.extract import METHODS
from emolens.collect.activations import Activations, TextInfo
from emolens.collect.histogram import NORM_BINS
from emolens.collect.pooling import LENGTHS
from emolens.directions import algebra as algebra_room
from emolens.directions import calibration as calibration_room
from emolens.directions import estimators as estimators_room
from emolens.directions import fitting as fitting_room
from emolens.directions import value as dirs
from emolens.directions.value import EmotionDirections
from emolens.shards import read_safetensors

EMOTIONS = ("joy", "sadness", "fear", "calm", "anger", "trust")
ANTONYMS = {"joy": "sadness", "sadness": "joy", "fear": "calm", "calm": "fear"}
LAYERS = (2, 5)
N_LAYERS = 8
D = 48
N_TOPICS = 12
# antonym_contrast gives directions of pairs, and has tests of its own
ESTIMATORS = {m: getattr(estimators_room, m) for m in METHODS if m != "antonym_contrast"}
PROPERTY = settings(
    max_examples=15, deadline=None, derandomize=True
)  # no deadline: two shared cores


@dataclass(frozen=True)
class World:
    """Activations x = common + v_emotion + u_topic + neutral part + noise, and what they were made of."""

    acts: Activations
    planted: Tensor  # [emotion layer d_model], centred over the emotions
    neutral: Tensor  # [layer d_model component], orthonormal, orthogonal to the planted vectors
    common: Tensor  # [layer d_model]


def _text(name: str, emotion: str | None, topic: str, split: str = "main") -> TextInfo:
    person = "first" if int(topic[1:]) % 2 else "third"
    return TextInfo(name, emotion, topic, person if emotion else None, split, f"{name:0>16}", 80)


def _info() -> dict:
    model = {
        "name": "planted",
        "fingerprint": "f00d",
        "process_weights": {"fold_ln": False},
        "n_layers": N_LAYERS,
    }
    return {
        "model": model,
        "set": "planted",
        "antonyms": ANTONYMS,
        "pooling": {"kind": "mean", "skip": 50},
    }


def _pack(
    rows: Tensor, texts: list[TextInfo], row_text: list[int], position: list[int], **more
) -> Activations:
    histogram = torch.zeros((len(LAYERS), NORM_BINS), dtype=torch.int64)
    histogram[:, 1200] = 7
    return Activations(
        hook_point="resid_post", layers=LAYERS, rows=rows, embed=rows[:, 0].clone(), row_text=torch.tensor(row_text),
        row_position=torch.tensor(position), texts=tuple(texts), norm_histogram=histogram,
        sinks=torch.ones(len(texts), len(LAYERS)), info=_info(), **more,
    )  # fmt: skip


def planted(
    seed: int = 0, *, signal: float = 4.0, noise: float = 0.4, n_topics: int = N_TOPICS
) -> World:
    """A world with a common component 50 times as large as the signal, as in a real residual stream."""
    g = torch.Generator().manual_seed(seed)
    n_layers, k = len(LAYERS), len(EMOTIONS)
    basis = torch.stack(
        [torch.linalg.qr(torch.randn(D, D, generator=g))[0] for _ in LAYERS]
    )  # columns orthonormal
    mixed = torch.eye(k) + 0.25 * torch.randn(
        k, k, generator=g
    )  # no two emotions alike, none much louder
    v = torch.einsum("lds,es->eld", basis[:, :, 2:8], mixed)
    v = v - v.mean(0)
    v = signal * v / v.norm(dim=-1, keepdim=True).mean()
    neutral = basis[:, :, :2].contiguous()
    common = 200 * basis[:, :, 8]
    topic = torch.einsum(
        "lds,ts->tld", basis[:, :, 9:14], 2 * torch.randn(n_topics, 5, generator=g)
    )

    def around(n: int, loud: float) -> Tensor:
        along = torch.randn(n, n_layers, 2, generator=g) * loud
        return (
            common
            + torch.einsum("ldc,nlc->nld", neutral, along)
            + noise * torch.randn(n, n_layers, D, generator=g)
        )

    texts, rows = [], []
    for e, emotion in enumerate(EMOTIONS):
        for t in range(n_topics):
            texts.append(_text(f"{emotion}-{t}", emotion, f"t{t}"))
            rows.append(around(1, 1.0)[0] + v[e] + topic[t])
    for t in range(
        n_topics
    ):  # the neutral texts, and texts told in the other person that no estimator may use
        for i in range(2):
            texts.append(_text(f"neutral-{t}-{i}", None, f"t{t}", "neutral"))
            rows.append(around(1, 1.0)[0] + topic[t])
    for e, emotion in enumerate(EMOTIONS):
        texts.append(_text(f"{emotion}-other", emotion, "t0", "other_person"))
        rows.append(around(1, 1.0)[0] - 30 * v[e])
    who = [i for i, text in enumerate(texts) if text.split == "neutral"]
    per_text = 100
    tokens = _pack(around(len(who) * per_text, 8.0), texts, [i for i in who for _ in range(per_text)], [p for _ in who for p in range(1, per_text + 1)])  # fmt: skip
    reached = [
        length for _ in who for length in LENGTHS
    ]  # of a mean over fewer tokens the noise is larger
    scatter = (
        noise
        * (128 / torch.tensor(reached)).sqrt()[:, None, None]
        * torch.randn(len(reached), n_layers, D, generator=g)
    )
    start = (
        around(len(reached), 1.0)
        + scatter
        + topic[[int((texts[i].topic or "t0")[1:]) for i in who for _ in LENGTHS]]
    )
    prefixes = _pack(start, texts, [i for i in who for _ in LENGTHS], reached)
    acts = _pack(
        torch.stack(rows),
        texts,
        list(range(len(rows))),
        [-1] * len(rows),
        neutral_tokens=tokens,
        neutral_prefixes=prefixes,
    )
    return World(acts, v, neutral, common)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(one_thread: None) -> World:
    return planted()


@pytest.fixture(scope="module")
def v(world: World) -> EmotionDirections:
    return estimators_room.mean_difference(world.acts)


def _main(acts: Activations) -> tuple[Tensor, np.ndarray]:
    main = acts.select(lambda t: t.split == "main")
    return main.rows, np.array([EMOTIONS.index(t.emotion or "") for t in main.texts])


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


# --- estimators -------------------------------------------------------------------------------------------------------


def test_mean_difference_recovers_the_planted_directions(
    world: World, v: EmotionDirections
) -> None:
    # twelve topics leave noise of .4 sqrt(48 / 12) = .8 beside a signal of about 4: cosine about .98
    assert _cosines(v.vectors, world.planted).min() > 0.95
    assert v.emotions == EMOTIONS
    assert v.layers == LAYERS
    # negative control: the uncentred means are all the common component
    rows, labels = _main(world.acts)
    raw = algebra_room.class_means(rows, torch.from_numpy(labels))
    assert _cosines(raw, world.planted).abs().max() < 0.1
    assert _cosines(raw[0], raw[1]).min() > 0.99


def test_mean_difference_is_the_naive_formula_with_the_naive_projector(
    world: World, v: EmotionDirections
) -> None:
    rows, _ = _main(world.acts)
    assert world.acts.neutral_tokens is not None
    for k in range(len(LAYERS)):
        x = rows[:, k].double().reshape(len(EMOTIONS), N_TOPICS, D).numpy()
        p = naive.neutral_projector(world.acts.neutral_tokens.rows[:, k].numpy(), 0.5)
        expected = naive.mean_difference(x) @ (np.eye(D) - p)
        assert (
            np.abs(v.vectors[:, k].numpy() - expected).max() < 1e-3
        )  # float32 sums of entries of size 100
    assert v.info["neutral_k"] == [2, 2] or v.info["neutral_k"] == [1, 1]
    assert v.info["n_per_emotion"] == dict.fromkeys(EMOTIONS, N_TOPICS)


def test_the_vectors_sum_to_zero_over_the_emotions(world: World) -> None:
    for share in (None, 0.5):
        vectors = estimators_room.mean_difference(world.acts, remove_neutral=share).vectors
        assert vectors.sum(0).abs().max() < 1e-3  # float32 means of entries of size 100
    # the reference is the mean of the emotions' means, so that the sum is zero because of it
    rows, labels = _main(world.acts)
    means = algebra_room.class_means(rows, torch.from_numpy(labels))
    assert torch.allclose(estimators_room.mean_difference(world.acts).reference, means.mean(0))


def test_neutral_components_are_removed_exactly_and_were_there_before(world: World) -> None:
    before = estimators_room.mean_difference(world.acts, remove_neutral=None)
    after = estimators_room.mean_difference(world.acts, remove_neutral=0.9)
    assert world.acts.neutral_tokens is not None
    parts = algebra_room.neutral_components(world.acts.neutral_tokens.rows, 0.9)
    for k, part in enumerate(parts):
        assert torch.allclose(
            part.T @ part, torch.eye(part.shape[1]), atol=1e-5
        )  # orthonormal in float32
        assert (
            after.unit(LAYERS[k]) @ part
        ).abs().max() < 1e-6  # float32 rounding of a unit vector
        assert (before.unit(LAYERS[k]) @ part).abs().max() > 1e-2  # negative control
    assert before.info["neutral_k"] is None
    assert before.info["remove_neutral"] is None
    assert after.info["remove_neutral"] == 0.9


def test_the_planted_neutral_plane_is_what_is_found(world: World) -> None:
    assert world.acts.neutral_tokens is not None
    for k, part in enumerate(algebra_room.neutral_components(world.acts.neutral_tokens.rows, 0.8)):
        assert part.shape == (D, 2)  # two planted components carry 128 of 140 units of variance
        # singular values of the overlap of two planes are cosines; 2,400 tokens leave an error of 1e-2
        assert torch.linalg.svdvals(part.T @ world.neutral[k]).min() > 0.99


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
def test_neutral_components_are_the_fewest_that_explain_the_share(share: float) -> None:
    rows = torch.randn(200, 2, 10, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        4, 1, 10
    )
    for k, part in enumerate(algebra_room.neutral_components(rows, share)):
        expected = naive.neutral_projector(rows[:, k].numpy(), share)
        assert part.shape[1] == round(np.trace(expected))
        assert np.abs((part @ part.T).numpy() - expected).max() < 1e-5  # returned in float32


@pytest.mark.parametrize("share", [1.0, 1.5, -0.2])
def test_a_share_outside_zero_to_one_is_refused(world: World, share: float) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"remove_neutral={share}; between 0 and 1, or None")
    ):
        estimators_room.mean_difference(world.acts, remove_neutral=share)


def test_texts_told_in_the_other_person_are_not_used(world: World, v: EmotionDirections) -> None:
    without = estimators_room.mean_difference(
        world.acts.select(lambda t: t.split != "other_person")
    )
    assert torch.equal(without.vectors, v.vectors)  # the same sums in the same order


def test_antonym_contrast_is_antisymmetric_and_leaves_out_emotions_without_an_antonym(
    world: World,
) -> None:
    v = estimators_room.antonym_contrast(world.acts)
    assert v.emotions == ("joy", "sadness", "fear", "calm")
    assert torch.allclose(v["joy"].vectors, -v["sadness"].vectors, atol=1e-5)
    assert torch.allclose(v["fear"].vectors, -v["calm"].vectors, atol=1e-5)
    planted_joy = world.planted[0] - world.planted[1]
    assert _cosines(v["joy"].vectors[0], planted_joy).min() > 0.95  # as for the mean difference
    one = estimators_room.antonym_contrast(world.acts, antonyms={"joy": "fear"})
    assert one.emotions == ("joy",)
    m = estimators_room.mean_difference(world.acts)
    assert torch.allclose(
        one.vectors, (m["joy"] - m["fear"]).vectors, atol=1e-3
    )  # float32 of entries of 100


def test_antonyms_that_are_missing_or_unknown_are_errors(world: World) -> None:
    with pytest.raises(ValueError, match=r"no antonyms known: give antonyms=\{'joy': 'sadness'"):
        estimators_room.antonym_contrast(
            replace(world.acts, info=world.acts.info | {"antonyms": None})
        )
    with pytest.raises(
        ValueError,
        match=r"antonym pair 'joy', 'gloom': both must be among the collected emotions: joy",
    ):
        estimators_room.antonym_contrast(world.acts, antonyms={"joy": "gloom"})


@pytest.mark.parametrize("method", ESTIMATORS)
def test_every_estimator_recovers_the_planted_ranking(world: World, method: str) -> None:
    v = ESTIMATORS[method](world.acts)
    assert v.info["method"] == method
    assert v.emotions == EMOTIONS
    cosine = _cosines(v.vectors[:, None], world.planted[None])  # [emotion emotion layer]
    # each direction lies nearest to its own planted vector, at both layers
    assert (cosine.argmax(1) == torch.arange(len(EMOTIONS))[:, None]).all()
    fresh, labels = _main(planted(seed=0).acts)
    assert (
        stats.top_k(v.z(fresh)[:, :, 1].numpy(), labels).mean() > 0.95
    )  # and reads the texts; chance is .17


def test_pca_points_along_the_mean_difference_and_has_the_length_of_the_mean(world: World) -> None:
    v, m = (
        estimators_room.pca(world.acts, remove_neutral=None),
        estimators_room.mean_difference(world.acts, remove_neutral=None),
    )
    assert _cosines(v.vectors, m.vectors).min() > 0.95  # one common direction and isotropic noise
    # the mean against the *other* emotions is K / (K - 1) times the mean against all
    expected = m.vectors.norm(dim=-1) * len(EMOTIONS) / (len(EMOTIONS) - 1)
    assert torch.allclose(
        v.vectors.norm(dim=-1), expected, rtol=1e-3
    )  # float32 of entries of size 100


def test_the_sign_of_a_pca_direction_is_not_the_sign_that_the_decomposition_happens_to_give(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = estimators_room.pca(world.acts)
    svd = torch.linalg.svd

    def flipped(x: Tensor, **options: bool) -> SimpleNamespace:
        found = svd(x, **options)
        return SimpleNamespace(
            U=-found.U, S=found.S, Vh=-found.Vh
        )  # as good a decomposition as the other

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert torch.equal(estimators_room.pca(world.acts).vectors, before.vectors)


def test_lda_is_scikit_learns_ledoit_wolf_written_out(world: World) -> None:
    v = estimators_room.lda(world.acts)
    rows, _ = _main(world.acts)
    for k in range(len(LAYERS)):
        expected = naive.lda(rows[:, k].double().reshape(len(EMOTIONS), N_TOPICS, D).numpy())
        # residuals are taken in float32, and the inverse of a covariance enlarges that
        assert _cosines(v.vectors[:, k], torch.from_numpy(expected).float()).min() > 0.9999


def test_lda_ignores_a_loud_direction_that_tells_no_emotion(world: World) -> None:
    g = torch.Generator().manual_seed(1)
    loud = torch.zeros(D)
    loud[0] = 1
    rows = world.acts.rows + 40 * torch.randn(len(world.acts.rows), 1, 1, generator=g) * loud
    noisy = replace(world.acts, rows=rows)
    along = {
        m: ESTIMATORS[m](noisy).at(5).unit()[:, 0].abs().max() for m in ("lda", "mean_difference")
    }
    assert along["lda"] < 0.25 < along["mean_difference"]


def test_logistic_is_scikit_learns_through_the_score_it_gives(world: World) -> None:
    v = estimators_room.logistic(world.acts)
    rows, labels = _main(world.acts)
    x = rows[:, 1].double().numpy()
    expected = stats.logistic_scores(x, labels, x)
    raw = (
        x @ v.vectors[:, 1].double().numpy().T
    )  # linear in x: equal up to a constant for each emotion
    difference = (raw - expected) - (raw - expected).mean(0)
    spread = (expected - expected.mean(1, keepdims=True)).std()
    per_text = difference - difference.mean(
        1, keepdims=True
    )  # a softmax does not see a shift of all classes
    assert np.abs(per_text).max() < 1e-3 * spread  # weights are stored in float32, rows reach 200


@pytest.mark.parametrize("method", ESTIMATORS)
def test_two_emotions_make_two_opposite_directions(world: World, method: str) -> None:
    v = ESTIMATORS[method](world.acts.select(lambda t: t.emotion in (None, "joy", "fear")))
    assert v.emotions == ("joy", "fear")
    assert _cosines(v.vectors[0], v.vectors[1]).max() < -0.999  # opposite but for float32


@pytest.mark.parametrize("method", ESTIMATORS)
def test_no_estimator_sees_the_order_of_the_texts(world: World, method: str) -> None:
    acts = world.acts
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(acts.texts)))
    shuffled = replace(
        acts,
        rows=acts.rows[order],
        embed=acts.embed[order],
        texts=tuple(acts.texts[int(i)] for i in order),
    )
    a, b = ESTIMATORS[method](acts), ESTIMATORS[method](shuffled)
    assert a.calibration is not None
    assert b.calibration is not None
    back = [b.index(e) for e in a.emotions]
    # float32 sums in another order; a regression stops at a gradient of 1e-3
    assert _cosines(a.vectors, b.vectors[back]).min() > 0.9999
    assert torch.allclose(a.calibration.std, b.calibration.std[back], rtol=0.01)


@PROPERTY
@given(st.integers(0, 1000))
def test_the_order_of_the_texts_does_not_matter_to_means(seed: int) -> None:
    acts = planted(n_topics=5).acts
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(acts.texts)))
    shuffled = replace(
        acts,
        rows=acts.rows[order],
        embed=acts.embed[order],
        texts=tuple(acts.texts[int(i)] for i in order),
        neutral_tokens=None,
    )
    a, b = (
        estimators_room.mean_difference(x, remove_neutral=None)
        for x in (replace(acts, neutral_tokens=None), shuffled)
    )
    assert a.calibration is not None
    assert b.calibration is not None
    for emotion in EMOTIONS:
        # float32 sums of entries of size 100 in another order
        assert torch.allclose(a[emotion].vectors, b[emotion].vectors, atol=1e-3)
        i, j = a.index(emotion), b.index(emotion)
        assert torch.allclose(a.calibration.mean[i], b.calibration.mean[j], atol=1e-3)
        assert torch.allclose(a.calibration.std[i], b.calibration.std[j], atol=1e-3)


@pytest.mark.parametrize("labels", [[], [0, 2, 2], [1, 1, 1]])
def test_there_is_no_mean_of_nothing(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"emotion number [01] has no text among the \d given"):
        algebra_room.class_means(
            torch.zeros(len(labels), 1, 2), torch.tensor(labels, dtype=torch.long)
        )


@pytest.mark.parametrize("rows", [torch.zeros(0, 2, 8), torch.randn(1, 2, 8), torch.ones(5, 2, 8)])
def test_neutral_components_of_nothing_are_an_error_not_an_arbitrary_direction(
    rows: torch.Tensor,
) -> None:
    with pytest.raises(ValueError, match=r"there are [01]: give neutral texts|all the same"):
        algebra_room.neutral_components(rows, 0.5)


def test_class_means_is_typed() -> None:
    rows = torch.zeros(4, 2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        algebra_room.class_means(rows[:, 0], torch.zeros(4, dtype=torch.long))
    with pytest.raises(jaxtyping.TypeCheckError):
        algebra_room.class_means(rows, torch.zeros(3, dtype=torch.long))  # another number of texts
    with pytest.raises(jaxtyping.TypeCheckError):
        algebra_room.class_means(rows, torch.zeros(4))  # labels are integers


def test_a_projection_with_another_width_is_a_type_check_error(v: EmotionDirections) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        v.z(torch.zeros(3, len(LAYERS), D + 1))
    with pytest.raises(jaxtyping.TypeCheckError):
        v.z(torch.zeros(3, len(LAYERS) + 1, D))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_directions_need_two_emotions(world: World) -> None:
    one = world.acts.select(lambda t: t.emotion == "joy")
    with pytest.raises(
        ValueError,
        match=r"at least two emotions, found 1: collect an emotion set, or give emotions=",
    ):
        estimators_room.mean_difference(one, remove_neutral=None)


def test_single_tokens_are_no_texts(world: World) -> None:
    assert world.acts.neutral_tokens is not None
    with pytest.raises(ValueError, match=r"single tokens; collect with mean_over_tokens"):
        estimators_room.mean_difference(world.acts.neutral_tokens)


def test_neutral_removal_needs_neutral_texts(world: World) -> None:
    with pytest.raises(
        ValueError, match=r"remove_neutral needs neutral texts: .* or pass remove_neutral=None"
    ):
        estimators_room.mean_difference(replace(world.acts, neutral_tokens=None))


# --- calibration ------------------------------------------------------------------------------------------------------


def test_the_calibration_is_the_naive_leave_one_topic_out_loop(
    world: World, v: EmotionDirections
) -> None:
    rows, _ = _main(world.acts)
    assert world.acts.neutral_tokens is not None
    assert v.calibration is not None
    for k in range(len(LAYERS)):
        x = rows[:, k].double().reshape(len(EMOTIONS), N_TOPICS, D).numpy()
        p = naive.neutral_projector(world.acts.neutral_tokens.rows[:, k].numpy(), 0.5)
        held_out = naive.heldout_scores(x, p).reshape(-1, len(EMOTIONS))
        # float32 projections of rows of norm 200
        assert np.abs(v.calibration.mean[:, k].numpy() - held_out.mean(0)).max() < 2e-3
        assert np.abs(v.calibration.std[:, k].numpy() - held_out.std(0, ddof=1)).max() < 2e-3


def test_scores_of_texts_of_new_topics_have_mean_zero_and_spread_one() -> None:
    whole = planted(seed=3, n_topics=40)
    train = whole.acts.select(lambda t: int((t.topic or "t0")[1:]) < 20)
    fresh = whole.acts.select(lambda t: t.split == "main" and int((t.topic or "t0")[1:]) >= 20)
    z = estimators_room.mean_difference(train).z(fresh.rows)
    # 20 new topics: a mean of 120 correlated scores has a standard error of about .1
    assert z.mean(0).abs().max() < 0.4
    assert (z.std(0) - 1).abs().max() < 0.25
    labels = np.array([EMOTIONS.index(t.emotion or "") for t in fresh.texts])
    assert stats.top_k(z[:, :, 0].numpy(), labels).mean() > 0.95


def test_a_calibrated_readout_works_where_the_uncentred_one_fails() -> None:
    # the common component is 200, the signal 4: any tilt of a direction towards it drowns the emotion
    world = planted(seed=5)
    v = estimators_room.mean_difference(world.acts)
    tilted = replace(
        v,
        vectors=v.vectors
        + torch.linspace(-0.2, 0.2, len(EMOTIONS))[:, None, None] * world.common / 20,
    )
    rows, labels = _main(world.acts)
    unit = tilted.vectors / tilted.vectors.norm(dim=-1, keepdim=True)
    uncentred = torch.einsum("tld,eld->tel", rows, unit)
    centred = algebra_room.project(rows, tilted.vectors, tilted.reference)
    accuracy = [
        float(stats.top_k(s[:, :, 0].numpy(), labels).mean())
        for s in (uncentred, centred, v.z(rows))
    ]
    assert accuracy[0] < 0.3  # chance is .17
    assert accuracy[1] > 0.9
    assert accuracy[2] > 0.95


def test_neutral_texts_are_mostly_inside_the_neutral_band_and_emotional_ones_are_not(
    world: World, v: EmotionDirections
) -> None:
    assert v.calibration is not None
    neutral = world.acts.select(lambda t: t.split == "neutral")
    inside = (v.z(neutral.rows).amax(1) <= v.calibration.band[-1]).float().mean(0)
    assert (inside >= 0.8).all()  # 24 texts, of which 95 % are expected inside
    main, _ = _main(world.acts)
    assert (v.z(main).amax(1) > v.calibration.band[-1]).float().mean() > 0.9


def test_the_band_holds_for_every_length_on_topics_that_the_calibration_never_saw() -> None:
    """Texts of one token or of 128: about 5 % of unseen neutral texts lie above their band, and the calibration had said so."""
    whole = planted(seed=11, n_topics=120)

    def at(t):
        return int((t.topic or "t0")[1:])

    train = replace(
        whole.acts.select(lambda t: at(t) < 60),
        neutral_tokens=whole.acts.neutral_tokens.select(lambda t: at(t) < 60),
        neutral_prefixes=whole.acts.neutral_prefixes.select(lambda t: at(t) < 60),
    )
    fresh = whole.acts.neutral_prefixes.select(lambda t: at(t) >= 60)
    v = estimators_room.mean_difference(train)
    c = v.calibration
    band, said = c.of_length(fresh.row_position)
    above = (v.z(fresh.rows).amax(1) > band).float()
    for length in LENGTHS:
        here = fresh.row_position == length
        assert here.sum() == 120
        assert (
            above[here].mean(0) < 0.13
        ).all()  # 5 % of 120 texts and of 120 to calibrate: a standard deviation of .028
        assert (said[here].mean(0) < 0.11).all()
    assert above.mean() == pytest.approx(0.05, abs=0.025)
    # negative control: the band of long texts, given to short ones
    short = fresh.row_position == 1
    assert (v.z(fresh.rows[short]).amax(1) > c.band[-1]).float().mean() > 0.3
    assert (c.band.diff(dim=0) < 0.5).all()  # wider the shorter
    between = c.of_length(torch.tensor([3, 1000, 128]))[0]
    assert ((between[0] - c.band[1]) * (between[0] - c.band[2]) <= 0).all()
    assert torch.equal(between[1], between[2])


def test_the_rate_of_single_tokens_is_of_a_band_and_a_scale_that_do_not_know_their_topic(
    world: World,
) -> None:
    """Parity with everything fitted anew without each group of topics; one topic's tokens are loud, so that the scale matters."""
    tokens = world.acts.neutral_tokens
    loud = torch.tensor([tokens.texts[i].topic == "t1" for i in tokens.row_text.tolist()])
    noise = torch.randn(
        tokens.rows.shape, generator=torch.Generator().manual_seed(2)
    ) * torch.linspace(0, 30, D)
    tokens = replace(
        tokens, rows=torch.where(loud[:, None, None], tokens.rows + noise, tokens.rows)
    )
    acts = replace(world.acts, neutral_tokens=tokens)
    c = estimators_room.mean_difference(acts).calibration
    groups = fitting_room._groups(acts.moments())
    topic, position = (
        np.array([tokens.texts[i].topic for i in tokens.row_text.tolist()]),
        calibration_room.position_bin(tokens.row_position),
    )
    above, known_all = torch.zeros_like(c.token_rate), torch.zeros_like(c.token_rate)
    n = torch.zeros(len(c.token_rate), 1)
    z, fold = torch.zeros(len(tokens.rows), *c.mean.shape), np.zeros(len(topic), int)
    for f, group in enumerate(groups):
        v, inside = (
            estimators_room.mean_difference(acts.without(group)),
            torch.from_numpy(np.isin(topic, group)),
        )
        z[inside], fold[inside.numpy()] = (
            algebra_room.project(tokens.rows[inside], v.vectors, v.reference),
            f,
        )
    for b in range(len(n)):
        here = position == b
        n[b] = here.sum()
        every = ((z[here] - z[here].mean(0)) / z[here].std(0)).amax(1)
        for f in range(len(groups)):
            mine, others = here & torch.from_numpy(fold == f), here & torch.from_numpy(fold != f)
            mean, std = z[others].mean(0), z[others].std(0)
            rank = min(int(np.ceil(0.95 * (int(others.sum()) + 1))), int(others.sum()))
            point = ((z[others] - mean) / std).amax(1).kthvalue(rank, 0).values
            above[b] += (((z[mine] - mean) / std).amax(1) > point).sum(0)
            point = every[others[here]].kthvalue(rank, 0).values
            known_all[b] += (every[mine[here]] > point).sum(0)
    measured = c.token_rate.isfinite()
    assert measured.any()
    torch.testing.assert_close(c.token_rate[measured], (above / n)[measured])
    assert not torch.equal(
        (above / n)[measured], (known_all / n)[measured]
    )  # negative control: a scale of all tokens says something else


def test_one_token_of_other_topics_measures_no_rate() -> None:
    scores = torch.randn(20, 3, 2, generator=torch.Generator().manual_seed(0))
    band, rate = fitting_room._band(scores, np.array([0] * 19 + [1]))
    assert band.isfinite().all()
    assert rate.isnan().all()
    assert fitting_room._band(scores, np.array([0] * 18 + [1] * 2))[1].isfinite().all()


def test_neutral_texts_of_one_topic_of_their_own_are_dealt_out_text_by_text() -> None:
    """What is fitted outside a fold has no token of a text that is judged in it, and every length is known."""
    acts = planted(seed=3).acts

    def moved(a: Activations) -> Activations:
        return replace(
            a,
            texts=tuple(replace(t, topic="nature") if t.split == "neutral" else t for t in a.texts),
        )

    whole = replace(
        moved(acts),
        neutral_tokens=moved(acts.neutral_tokens),
        neutral_prefixes=moved(acts.neutral_prefixes),
    )
    neutral = fitting_room._Neutral.of(whole)
    names = ["rows", "tokens", "prefixes"]
    for k in (2, 4, 8):
        fold = fitting_room._folds_of(neutral, names, [(f"f{i}",) for i in range(k)])
        of = dict(zip(neutral.text["rows"].tolist(), fold["rows"].tolist(), strict=True))
        assert set(of.values()) == set(range(k))
        for name in names:
            assert fold[name].tolist() == [of[t] for t in neutral.text[name].tolist()]
    c = estimators_room.mean_difference(whole).calibration
    assert c is not None
    assert c.band.isfinite().all()
    assert c.band_rate.isfinite().all()


def test_too_few_neutral_texts_give_no_band(world: World) -> None:
    few = world.acts.select(lambda t: t.split != "neutral" or t.id < "neutral-1")
    v = estimators_room.mean_difference(few)
    assert v.calibration is not None
    assert v.calibration.band_rate.isnan().all()
    assert v.calibration.band.isnan().all()


def test_without_neutral_texts_the_neutral_mean_is_missing_and_says_so(world: World) -> None:
    v = estimators_room.mean_difference(
        world.acts.select(lambda t: t.split == "main"), remove_neutral=None
    )
    assert v.neutral_mean.isnan().all()
    assert torch.isfinite(estimators_room.mean_difference(world.acts).neutral_mean).all()


def test_one_topic_gives_directions_without_calibration_and_scoring_them_is_an_error(
    world: World,
) -> None:
    v = estimators_room.mean_difference(
        world.acts.select(lambda t: t.topic == "t3"), remove_neutral=None
    )
    assert v.calibration is None
    assert v.reliability.isnan().all()
    with pytest.raises(
        ValueError, match=r"no calibration .*use directions.project for raw projections"
    ):
        v.z(torch.zeros(1, len(LAYERS), D))
    with pytest.raises(ValueError, match=r"no calibration"):
        v.token_z(torch.zeros(1, len(LAYERS), D), torch.tensor([1]))


def test_token_scores_of_neutral_text_are_standard_in_every_position_bin(
    world: World, v: EmotionDirections
) -> None:
    tokens = world.acts.neutral_tokens
    assert tokens is not None
    z, bins = (
        v.token_z(tokens.rows, tokens.row_position),
        calibration_room.position_bin(tokens.row_position),
    )
    for b in range(len(calibration_room.POSITION_EDGES)):
        here = z[bins == b]
        # calibrated on the same tokens as directions without their topics read them: near zero and one, not exactly
        assert here.mean(0).abs().max() < 0.1
        assert (here.std(0) - 1).abs().max() < 0.15


def test_a_position_bin_without_tokens_takes_its_neighbours_values(world: World) -> None:
    tokens = world.acts.neutral_tokens
    assert tokens is not None
    early = tokens.row_position < 16
    short = replace(
        tokens,
        rows=tokens.rows[early],
        embed=tokens.embed[early],
        row_text=tokens.row_text[early],
        row_position=tokens.row_position[early],
    )
    c = estimators_room.mean_difference(replace(world.acts, neutral_tokens=short)).calibration
    assert c is not None
    assert torch.equal(c.token_mean[2], c.token_mean[1])
    assert torch.equal(c.token_mean[3], c.token_mean[1])
    assert not torch.equal(c.token_mean[0], c.token_mean[1])


def test_positions_fall_into_the_bins_that_the_edges_name() -> None:
    position = torch.tensor([1, 3, 4, 15, 16, 63, 64, 5000])
    assert calibration_room.position_bin(position).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("layers", "n_layers", "expected"),
    [
        (range(30), 30, 20),
        (range(12), 12, 8),
        ((0, 5, 25), 30, 25),
        ((18, 22), 30, 18),
        ((3,), 30, 3),
    ],
)
def test_the_default_layer_is_the_collected_one_nearest_to_two_thirds(
    layers, n_layers, expected
) -> None:
    assert algebra_room.default_layer(list(layers), n_layers) == expected


# --- reliability ------------------------------------------------------------------------------------------------------


def test_reliability_is_near_one_with_a_strong_signal_and_near_zero_with_none() -> None:
    strong = estimators_room.mean_difference(planted(seed=7, noise=0.2).acts).reliability
    assert strong.min() > 0.95
    none = estimators_room.mean_difference(planted(seed=7, signal=1e-6).acts).reliability
    # cosines of two noise vectors in about 46 dimensions, averaged over ten splits that share texts: sd about .15
    assert none.mean().abs() < 0.15
    assert none.max() < 0.6


def test_reliability_is_the_spearman_brown_formula_of_the_halves() -> None:
    # with two identical halves of topics every split gives the same vectors: c = 1, and 2 c / (1 + c) = 1
    acts = planted(seed=8, noise=0.0, n_topics=4).acts
    v = estimators_room.mean_difference(acts, remove_neutral=None)
    rows, labels = _main(acts)
    halves = []
    for topics in ((0, 1), (2, 3)):
        keep = torch.tensor([i % 4 in topics for i in range(len(rows))])
        means = algebra_room.class_means(rows[keep], torch.from_numpy(labels)[keep])
        halves.append(means - means.mean(0))
    c = _cosines(*halves)
    # only three ways to halve four topics: the formula of one of them lies among the mean's neighbours
    assert (2 * c / (1 + c) - v.reliability).abs().max() < 0.1


def test_slow_estimators_have_no_reliability_and_few_topics_neither(world: World) -> None:
    assert estimators_room.lda(world.acts).reliability.isnan().all()
    three = world.acts.select(lambda t: t.topic in ("t0", "t1", "t2"))
    assert estimators_room.mean_difference(three).reliability.isnan().all()


def test_a_corrected_cosine_divides_by_the_reliabilities(v: EmotionDirections) -> None:
    r = torch.full_like(v.reliability, 0.25)
    r[2] = 1.0
    r[3] = -0.1
    corrected, raw = replace(v, reliability=r).cosine(layer=5, corrected=True), v.cosine(layer=5)
    assert torch.allclose(corrected[0, 1], raw[0, 1] / 0.25)
    assert torch.allclose(corrected[0, 2], raw[0, 2] / 0.5)
    assert corrected[3, 0].isnan()  # no estimate where the reliability is not positive
    assert corrected[3, 3].isnan()
    assert torch.equal(corrected.diagonal()[:3], torch.ones(3))
    assert torch.allclose(raw.diagonal(), torch.ones(len(EMOTIONS)))
    across = replace(v, reliability=r).cosine(v["joy"], layer=5, corrected=True)
    expected = (
        raw[:, EMOTIONS.index("joy")] / (r[:, 1].clamp(min=0) * v["joy"].reliability[0, 1]).sqrt()
    )
    assert torch.allclose(across[:3, 0], expected[:3])


def test_cosines_with_other_directions_are_of_the_same_layer_and_model(
    v: EmotionDirections,
) -> None:
    about = v.info["model"] | {"d_model": v.vectors.shape[-1]}
    probe = EmotionDirections.from_tensors(
        {"a": v["fear"].tensor(5) * 3, "b": -v["joy"].tensor(5)}, model=about, hook_point=v.hook_point, layers=5,
    )  # fmt: skip
    across, own = v.cosine(probe, layer=5), v.cosine(layer=5)
    assert across.shape == (len(EMOTIONS), 2)
    assert torch.allclose(across[:, 0], own[:, EMOTIONS.index("fear")], atol=1e-6)
    assert torch.allclose(across[:, 1], -own[:, EMOTIONS.index("joy")], atol=1e-6)
    assert torch.allclose(probe.cosine(v), across.T)  # the layer of the one that asks
    with pytest.raises(ValueError, match="layer 2 has no directions here"):
        v.cosine(probe, layer=2)
    elsewhere = replace(probe, info={"model": about | {"fingerprint": "another", "name": "other"}})
    with pytest.raises(ValueError, match=r"differ in their model .* cannot be compared"):
        v.cosine(elsewhere)
    with pytest.raises(TypeError, match="directions are compared with directions, not Tensor"):
        v.cosine(v.vectors)


# --- taking parts -----------------------------------------------------------------------------------------------------


def test_parts_are_taken_by_emotion_and_layer(v: EmotionDirections) -> None:
    assert v["joy"].emotions == ("joy",)
    assert v["joy"].vectors.shape == (1, 2, D)
    assert v[["fear", "joy"]].emotions == ("fear", "joy")
    assert torch.equal(v[["fear", "joy"]].vectors[1], v.vectors[0])
    assert torch.equal(v["fear", 5].vectors[0, 0], v.vectors[2, 1])
    assert v["fear", 5].layer == 5
    assert v.at([5, 2]).layers == (5, 2)
    assert torch.equal(v.at([5, 2]).reference, v.reference[[1, 0]])
    assert v.unit(2).norm(dim=-1).tolist() == pytest.approx(
        [1.0] * len(EMOTIONS), abs=1e-6
    )  # float32
    assert (
        repr(v)
        == "EmotionDirections(joy, sadness, fear, calm, ... (6); resid_post, layers 2..5, d_model 48; mean_difference)"
    )


def test_a_part_scores_as_the_whole_does(world: World, v: EmotionDirections) -> None:
    rows, _ = _main(world.acts)
    part = v["fear", 5].z(rows[:, [1]])
    assert torch.allclose(
        part[:, 0, 0], v.z(rows)[:, 2, 1], atol=1e-4
    )  # float32, another order of sums


def test_the_default_layer_is_used_where_none_is_named(v: EmotionDirections) -> None:
    assert v.layer == 5  # two thirds of eight blocks
    assert torch.equal(v.unit(), v.unit(5))
    assert v.slot() == 1


def test_an_unknown_emotion_names_the_nearest_one(v: EmotionDirections) -> None:
    with pytest.raises(
        KeyError,
        match=r"no emotion 'sadnes' here; did you mean 'sadness'\? There are: joy, sadness",
    ):
        v["sadnes"]
    with pytest.raises(KeyError, match=r"no emotion 'xyz' here\. There are: joy"):
        v.index("xyz")


def test_an_unknown_layer_names_the_ones_there_are(v: EmotionDirections) -> None:
    for call in (
        lambda: v.at(3),
        lambda: v.slot(3),
        lambda: v["joy", 3],
        lambda: v.unit(3),
        lambda: v.cosine(layer=3),
    ):
        with pytest.raises(
            ValueError, match=r"layer 3 has no directions here; there are layers 2, 5"
        ):
            call()


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_arithmetic_is_that_of_vectors(v: EmotionDirections) -> None:
    a, b = v["joy"], v["fear"]
    back = (a - b) + b
    assert torch.allclose(back.vectors, a.vectors, atol=1e-5)  # one rounding of a float32 sum
    assert torch.equal((2 * a).vectors, (a + a).vectors)
    assert torch.equal((-a).vectors, (a * -1).vectors)
    assert torch.equal((a - b).vectors, (-(b - a)).vectors)
    assert (a - b).emotions == ("joy - fear",)
    assert (0.5 * a).emotions == ("0.5 joy",)
    assert torch.equal(a.vectors[0], v.vectors[0])  # nothing was changed in place


def test_directions_made_by_arithmetic_have_no_calibration(v: EmotionDirections) -> None:
    for made in (v["joy"] - v["fear"], 2 * v["joy"]):
        assert made.calibration is None
        with pytest.raises(ValueError, match=r"made by arithmetic"):
            made.z(torch.zeros(1, len(LAYERS), D))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_point": "resid_mid"}, r"differ in their hook point \(resid_post and resid_mid\)"),
        ({"layers": (2, 6), "layer": 6}, r"differ in their layers \(\(2, 5\) and \(2, 6\)\)"),
        (
            {"vectors": torch.zeros(1, 2, 7)}
            | dict.fromkeys(("reference", "neutral_mean"), torch.zeros(2, 7)),
            r"differ in their width \(48 and 7\)",
        ),
        (
            {"info": {"model": {"fingerprint": "beef", "process_weights": {}}, "method": ""}},
            r"differ in their model",
        ),
    ],
)
def test_directions_of_another_origin_cannot_be_combined(
    v: EmotionDirections, change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message + r".* cannot be combined"):
        v["joy"] - replace(v["fear"], **change)


def test_what_is_not_a_direction_or_a_number_cannot_be_combined(v: EmotionDirections) -> None:
    with pytest.raises(TypeError, match=r"directions are combined with directions, not Tensor"):
        v["joy"] + torch.zeros(D)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"1 and 2 emotions cannot be combined one by one"):
        v["joy"] + v[["fear", "joy"]]
    for factor in (float("nan"), float("inf"), True, "2"):
        with pytest.raises(TypeError, match=r"multiplied by a finite number, not"):
            v["joy"] * factor  # type: ignore[operator]


def test_nearest_ranks_by_cosine_and_leaves_the_operands_out(v: EmotionDirections) -> None:
    ranked = v["joy"].nearest(layer=5)
    expected = {
        e: float(c) for e, c in zip(EMOTIONS, v.cosine(layer=5)[0], strict=True) if e != "joy"
    }
    assert [e for e, _ in ranked] == sorted(expected, key=lambda e: -expected[e])
    assert dict(ranked) == pytest.approx(expected, abs=1e-6)  # float32
    made = {e for e, _ in (v["joy"] - v["sadness"]).nearest(k=10)}
    assert made == set(EMOTIONS) - {"joy", "sadness"}
    assert {e for e, _ in (0.5 * (v["joy"] + v["fear"])).nearest(k=10)} == set(EMOTIONS) - {
        "joy",
        "fear",
    }
    assert len(v["joy"].nearest(k=2)) == 2
    assert v["joy", 2].nearest()  # the whole is looked at, at the same layer
    with pytest.raises(
        ValueError,
        match=r"nearest\(\) is of one direction, here are 6; take one, as in directions\['joy'\]\.nearest",
    ):
        v.nearest()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["whole", "part", "made", "no neutral"])
def test_a_saved_file_gives_back_every_bit(
    tmp_path: Path, world: World, v: EmotionDirections, which: str
) -> None:
    made = {
        "whole": lambda: v,
        "part": lambda: v[["fear", "joy"]].at([5]),
        "made": lambda: v["joy"] - 0.5 * v["fear"],
        "no neutral": lambda: estimators_room.mean_difference(
            world.acts.select(lambda t: t.split == "main"), remove_neutral=None
        ),
    }[which]()
    made.save(tmp_path / "v.safetensors")
    back = dirs.load_directions(tmp_path / "v.safetensors")
    for name in ("vectors", "reference", "neutral_mean", "norm_median", "reliability"):
        a, b = getattr(made, name), getattr(back, name)
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(-1.5), b.nan_to_num(-1.5)), name
    for name in ("emotions", "hook_point", "layers", "layer", "operands", "info"):
        assert getattr(made, name) == getattr(back, name), name
    assert (made.calibration is None) == (back.calibration is None) == (which == "made")
    if made.calibration is not None and back.calibration is not None:
        for name in calibration_room.Calibration.__dataclass_fields__:
            a, b = getattr(made.calibration, name), getattr(back.calibration, name)
            assert torch.equal(a.nan_to_num(-1.5), b.nan_to_num(-1.5)), name
    assert [p.name for p in tmp_path.iterdir()] == [
        "v.safetensors"
    ]  # no half-written file beside it


def test_activations_come_back_from_a_file_and_give_the_same_directions(
    tmp_path: Path, world: World, v: EmotionDirections
) -> None:
    world.acts.save(tmp_path / "a.safetensors")
    again = estimators_room.mean_difference(Activations.load(tmp_path / "a.safetensors"))
    assert torch.equal(again.vectors, v.vectors)
    assert again.calibration is not None
    assert v.calibration is not None
    assert torch.equal(again.calibration.token_mean, v.calibration.token_mean)


def test_a_truncated_file_is_named_as_one(tmp_path: Path, v: EmotionDirections) -> None:
    path = tmp_path / "v.safetensors"
    v.save(path)
    whole = path.read_bytes()
    for n in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(
            ValueError, match=r"v\.safetensors: not a safetensors file, or a truncated one"
        ):
            dirs.load_directions(path)


def test_files_of_others_are_refused_by_name(tmp_path: Path, world: World) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"vectors": torch.zeros(2)}, foreign)
    with pytest.raises(
        ValueError, match=r"this is another program's file, not emolens\.directions\.1"
    ):
        dirs.load_directions(foreign)
    world.acts.save(tmp_path / "acts.safetensors")
    with pytest.raises(
        ValueError, match=r"this is emolens\.activations\.2, not emolens\.directions\.1"
    ):
        dirs.load_directions(tmp_path / "acts.safetensors")
    (tmp_path / "text.safetensors").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"not a safetensors file, or a truncated one"):
        dirs.load_directions(tmp_path / "text.safetensors")


def test_missing_files_and_folders_are_named(tmp_path: Path, v: EmotionDirections) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such file"):
        dirs.load_directions(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"missing: no such folder"):
        v.save(tmp_path / "missing" / "v.safetensors")


def test_a_file_names_no_folder_of_this_machine(tmp_path: Path, v: EmotionDirections) -> None:
    v.save(tmp_path / "v.safetensors")
    assert str(tmp_path).encode() not in (tmp_path / "v.safetensors").read_bytes()


# --- the mean norm ----------------------------------------------------------------------------------------------------


def test_the_mean_norm_is_that_of_the_activations_and_goes_where_the_layers_go(
    tmp_path: Path, world: World, v: EmotionDirections
) -> None:
    histogram = torch.zeros((len(LAYERS), NORM_BINS), dtype=torch.int64)
    histogram[0, [1100, 1200]] = torch.tensor([3, 1])
    histogram[1, 1300] = 5
    made = estimators_room.mean_difference(replace(world.acts, norm_histogram=histogram))
    middle = [10 ** (-4 + (b + 0.5) * 12 / NORM_BINS) for b in (1100, 1200, 1300)]
    expected = torch.tensor([(3 * middle[0] + middle[1]) / 4, middle[2]])
    torch.testing.assert_close(
        made.norm_mean, expected, rtol=1e-6, atol=0
    )  # computed in float64, kept in float32
    assert float(made.norm_median[0]) < float(made.norm_mean[0])
    assert torch.equal(made["joy"].norm_mean, made.norm_mean)
    assert torch.equal(made.at(5).norm_mean, made.norm_mean[1:])
    assert torch.equal((made["joy"] - made["fear"]).norm_mean, made.norm_mean)
    made.save(tmp_path / "v.safetensors")
    assert torch.equal(dirs.load_directions(tmp_path / "v.safetensors").norm_mean, made.norm_mean)


def test_a_file_without_the_mean_norm_is_read_and_its_unit_is_unknown(
    tmp_path: Path, v: EmotionDirections
) -> None:
    """Version 0.1.0 wrote none: everything else works, and a dose in that unit is refused."""
    path = tmp_path / "v.safetensors"
    v.save(path)
    tensors, metadata = read_safetensors(path, "emolens.directions.1")
    del metadata["checksum"]
    save_file({k: t for k, t in tensors.items() if k != "norm_mean"}, path, metadata)
    old = dirs.load_directions(path)
    assert old.norm_mean.shape == old.norm_median.shape
    assert old.norm_mean.isnan().all()
    assert torch.equal(old.norm_median, v.norm_median)
    assert len(em.steer_resid_post(old["joy"], dose=0.1)) == 1
    with pytest.raises(
        ValueError, match=r"the mean residual norm at resid_post of layer \d is not known"
    ):
        em.steer_resid_post(old["joy"], dose=0.1, dose_unit="mean")


def test_a_file_of_an_earlier_version_is_read_with_its_one_band_and_no_measured_rate(
    tmp_path: Path, v: EmotionDirections
) -> None:
    path = tmp_path / "v.safetensors"
    v.save(path)
    tensors, metadata = read_safetensors(path, "emolens.directions.1")
    del metadata["checksum"]
    old = {k: t for k, t in tensors.items() if not k.endswith("_rate")}
    old |= {
        f"calibration.{k}": tensors[f"calibration.{k}"][-1].clone() for k in ("band", "token_band")
    }
    save_file(old, path, metadata)
    c = dirs.load_directions(path).calibration
    assert c is not None
    assert v.calibration is not None
    assert (c.band == v.calibration.band[-1]).all()
    assert (c.token_band == v.calibration.token_band[-1]).all()
    assert c.band.shape == v.calibration.band.shape
    assert c.band_rate.isnan().all()
    assert c.token_rate.isnan().all()


# --- values check themselves ------------------------------------------------------------------------------------------


def test_a_calibration_of_shapes_that_do_not_fit_is_refused(v: EmotionDirections) -> None:
    assert v.calibration is not None
    with pytest.raises(jaxtyping.TypeCheckError):
        replace(v.calibration, std=torch.ones(5, 5))
    with pytest.raises(jaxtyping.TypeCheckError):
        replace(v.calibration, token_band=torch.ones(3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vectors": torch.randn(3, 7, 4, 2)}, jaxtyping.TypeCheckError, "vectors"),
        ({"reference": torch.zeros(2, D + 1)}, jaxtyping.TypeCheckError, "reference"),
        ({"norm_median": torch.ones(3)}, jaxtyping.TypeCheckError, "norm_median"),
        ({"layers": [2, 5]}, jaxtyping.TypeCheckError, "layers"),
        ({"emotions": ("joy", "fear")}, ValueError, r"2 emotions and 2 layers are named, .* hold 6 and 2"),
        ({"layer": 3}, ValueError, r"the default layer 3 is not among the layers \(2, 5\)"),
    ],
)  # fmt: skip
def test_directions_that_do_not_fit_themselves_are_refused(
    v: EmotionDirections, change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(v, **change)


def test_directions_with_the_calibration_of_other_ones_are_refused(v: EmotionDirections) -> None:
    with pytest.raises(ValueError, match="this calibration is of other emotions or layers"):
        replace(v["joy"], calibration=v.calibration)


# --- doors ------------------------------------------------------------------------------------------------------------


def test_directions_are_asked_as_a_mapping_of_emotions(v: EmotionDirections) -> None:
    assert list(v) == list(EMOTIONS)
    assert len(v) == len(EMOTIONS)
    assert "joy" in v
    assert "bliss" not in v
    assert {e: v[e].vectors.shape for e in v}["fear"] == (1, 2, D)


@pytest.mark.parametrize("number", [2, np.int64(2), torch.tensor(2), np.array(2)])
def test_a_number_is_a_layer_of_whatever_library(v: EmotionDirections, number: int) -> None:
    assert v["fear"][number].layers == v["fear", number].layers == (2,)
    assert torch.equal(v["fear"][number].vectors[0, 0], v.vectors[2, 0])
    assert torch.equal(v["fear"].tensor(number), v.vectors[2, 0])
    assert v[number].vectors.shape == (6, 1, D)
    assert v.slot(number) == 0
    with pytest.raises(ValueError, match="layer 3 has no directions here"):
        v["fear"][number + 1]


def test_what_is_neither_an_emotion_nor_a_layer_is_refused(v: EmotionDirections) -> None:
    for key in (1.5, True, None):
        with pytest.raises(ValueError, match=f"layer {key}: layers are block numbers"):
            v[key]  # type: ignore[index]
    assert v[np.array(["fear", "joy"])].emotions == ("fear", "joy")


def test_a_tensor_is_one_vector_and_a_copy(v: EmotionDirections) -> None:
    vector = v["joy"].tensor()
    assert torch.equal(vector, v.vectors[0, 1])
    vector.zero_()
    assert v.vectors[0, 1].any()
    with pytest.raises(ValueError, match=r"tensor\(\) is of one direction, here are 6"):
        v.tensor()


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_numbers_of_numpy_and_torch_multiply_from_both_sides(
    v: EmotionDirections, half: float
) -> None:
    for made in (half * v["joy"], v["joy"] * half, v["joy"] / 2, v["joy"] / (1 / half)):
        assert isinstance(made, EmotionDirections)
        assert made.emotions == ("0.5 joy",)
        assert torch.equal(made.vectors, v["joy"].vectors * 0.5)
    with pytest.raises(ZeroDivisionError):
        v["joy"] / 0
    for wrong in (np.ones(3), torch.ones(3), np.bool_(True), torch.tensor(True)):
        with pytest.raises(TypeError, match="multiplied by a finite number"):
            wrong * v["joy"]


def test_nearest_is_asked_by_name(v: EmotionDirections) -> None:
    assert v.nearest("joy", layer=5) == v["joy"].nearest(layer=5)
    assert v.nearest("joy", k=np.int64(2)).columns == ("emotion", "cosine")
    assert len(v.nearest("joy", k=np.int64(2))) == 2
    with pytest.raises(ValueError, match="k=0; at least 1"):
        v.nearest("joy", k=0)


# --- the plain estimator ----------------------------------------------------------------------------------------------


def test_mean_differences_are_the_vectors_and_reference_of_the_estimator(
    world: World, v: EmotionDirections
) -> None:
    rows, labels = _main(world.acts)
    tokens = world.acts.neutral_tokens
    assert tokens is not None
    components = algebra_room.neutral_components(tokens.rows, 0.5)
    vectors, reference = algebra_room.mean_differences(rows, torch.as_tensor(labels), components)
    torch.testing.assert_close(
        vectors, v.vectors, atol=1e-3, rtol=0
    )  # sums in float32 of rows of norm 200
    torch.testing.assert_close(reference, v.reference, atol=1e-3, rtol=0)
    plain, _ = algebra_room.mean_differences(rows, torch.as_tensor(labels))
    assert not torch.allclose(plain, vectors, atol=0.1)


def test_controls_take_numbers_of_numpy_and_torch(world: World, v: EmotionDirections) -> None:
    drawn = em.random_directions(v, 2, seed=3)
    for number in (np.int64, torch.tensor):
        assert torch.equal(
            em.random_directions(v, number(2), seed=number(3)).vectors, drawn.vectors
        )
        again = em.shuffled_directions(world.acts, v, seed=number(3))
        assert torch.equal(again.vectors, em.shuffled_directions(world.acts, v, seed=3).vectors)

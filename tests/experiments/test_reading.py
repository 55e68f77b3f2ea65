"""The experiments that read: a planted effect is found, none is found where none was planted, and a null is the estimator's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from _planted_rows import PLANTED, planted_external, planted_inputs, planted_set

import emolens as em
from emolens import stats
from emolens.directions.algebra import class_means, mean_differences, project
from emolens.experiments import fitting as refit
from emolens.experiments import geometry as norms
from emolens.experiments import person, separability, transfer
from emolens.experiments.base import Inputs
from emolens.experiments.rows import Row, judged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def effect() -> Inputs:
    return planted_inputs(signal=6.0)


@pytest.fixture(scope="module")
def nothing() -> Inputs:
    """The same texts, and no emotion in them."""
    return planted_inputs(signal=0.0, seed=3)


@pytest.fixture(scope="module")
def separated(nothing: Inputs) -> list[Row]:
    return separability.run(nothing).rows


def the(rows: list[Row], metric: str, **wanted: Any) -> Row:
    (found,) = (
        r for r in rows if r.metric == metric and all(getattr(r, k) == v for k, v in wanted.items())
    )
    return found


def beats(r: Row) -> bool:
    """The report's rule."""
    return (
        r.p is not None
        and r.p < 0.05
        and r.low is not None
        and r.null_high is not None
        and r.low > r.null_high
    )


# --- the estimator and its null ---------------------------------------------------------------------------------------


def test_the_experiments_fit_what_a_study_ships(effect: Inputs) -> None:
    """Parity: `Training` without held-out topics is the layer and the `mean_difference` of the study, step for step."""
    fit = refit.Training(effect.stories).fit(effect.stories.labels)
    v = effect.directions.at(effect.layer)
    assert effect.stories.acts.layers[fit.slot] == effect.layer
    assert v.calibration is not None
    # float32 sums in another order, of rows of norm 50
    torch.testing.assert_close(fit.vectors, v.vectors[:, 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(fit.reference, v.reference[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(fit.mean, v.calibration.mean[:, 0], atol=2e-3, rtol=0)
    torch.testing.assert_close(fit.std, v.calibration.std[:, 0], atol=2e-3, rtol=0)
    rows = effect.stories.main.rows
    assert np.abs(fit.z(rows) - v.z(rows[:, [fit.slot]])[:, :, 0].numpy()).max() < 5e-3


def test_a_fit_does_not_look_at_the_labels_or_the_rows_of_the_topics_that_it_is_judged_on(
    effect: Inputs,
) -> None:
    held = effect.stories.folds[0]
    inside = np.isin(effect.stories.topics, held)
    labels = effect.stories.labels.copy()
    labels[inside] = np.random.default_rng(0).permutation(labels[inside])
    acts = effect.stories.acts.rows.clone()
    acts[[t.topic in held for t in effect.stories.acts.texts]] += 100
    changed = replace(
        effect, stories=replace(effect.stories, acts=replace(effect.stories.acts, rows=acts))
    )
    a, b = (
        refit.Training(effect.stories, held).fit(effect.stories.labels),
        refit.Training(changed.stories, held).fit(labels),
    )
    assert a.slot == b.slot
    assert torch.equal(a.vectors, b.vectors)
    assert torch.equal(a.std, b.std)


def naive_axis(
    inputs: Inputs,
    labels: np.ndarray,
    rows: torch.Tensor,
    weight: np.ndarray,
    layer: int | None = None,
) -> np.ndarray:
    """The whole estimator with other labels, by the public functions: layer, neutral components, centring, scale, axis."""
    names = inputs.stories.emotions.names
    told = iter(labels.tolist())
    texts = tuple(
        replace(t, emotion=names[next(told)]) if t.split == "main" else t
        for t in inputs.stories.acts.texts
    )
    acts = replace(inputs.stories.acts, texts=texts)
    accuracy = refit.choose_layer(
        inputs.stories.main.rows,
        labels,
        inputs.stories.topics,
        inputs.stories.folds,
        inputs.stories.neutral_components(()),
    )
    v = em.mean_difference(acts).at([int(accuracy.argmax()) if layer is None else layer])
    order = [v.emotions.index(e) for e in names]
    return v.z(rows[:, [v.layers[0]]])[:, order, 0].numpy() @ weight


def test_the_null_of_other_peoples_ratings_is_the_estimator_itself(
    effect: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing neutral components and scaling included: without them the 95 % point is another one."""
    data = planted_external(effect, monkeypatch, signal=0.0)["emobank.csv"]
    x = transfer.EmoBank(effect, data).acts.rows[:, effect.stories.acts.layers.index(effect.layer)]
    loud = (
        x @ (x - x.mean(0)).svd().V[:, 0]
    )  # people rate what neutral text varies in, which the directions do not hold
    data = replace(data, valence=loud.double().numpy())
    rows = transfer.run(replace(effect, external={"emobank.csv": data})).rows
    judge = transfer.EmoBank(effect, data)
    rng = np.random.default_rng(effect.seed)
    nulls: dict[int | None, list[float]] = {
        None: [],
        effect.layer: [],
    }  # the layer chosen anew, and the one that is read
    for _ in range(refit.N_SHUFFLES):
        y = stats.shuffle_within(effect.stories.labels, effect.stories.topics, rng)
        for layer, drawn in nulls.items():
            read = naive_axis(effect, y, judge.acts.rows, judge.weights["valence"], layer)
            drawn.append(stats.pearson(read, judge.truth["valence"]))
    found = the(rows, "r", emotion="valence", control="shuffled labels")
    p = {layer: stats.permutation_p(found.value, drawn) for layer, drawn in nulls.items()}
    assert found.p == max(p.values())
    expected = max(
        nulls.values(), key=lambda n: (stats.permutation_p(found.value, n), np.percentile(n, 95))
    )
    assert found.draws == refit.N_SHUFFLES
    assert found.null_high == pytest.approx(
        np.percentile(expected, 95), abs=5e-3
    )  # float32 projections
    assert found.null_mean == pytest.approx(np.mean(expected), abs=5e-3)
    plain = []  # negative control: a null that skips neutral components and scale is another null
    rng = np.random.default_rng(effect.seed)
    slot = effect.stories.acts.layers.index(effect.layer)
    for _ in range(refit.N_SHUFFLES):
        y = torch.from_numpy(
            stats.shuffle_within(effect.stories.labels, effect.stories.topics, rng)
        )
        means = class_means(effect.stories.main.rows[:, [slot]], y)
        scores = project(judge.acts.rows[:, [slot]], means - means.mean(0), means.mean(0))[
            :, :, 0
        ].numpy()
        plain.append(stats.pearson(judge.read(scores, "valence"), judge.truth["valence"]))
    assert abs(np.percentile(plain, 95) - np.percentile(expected, 95)) > 0.02


def test_the_value_and_its_null_are_one_call(nothing: Inputs) -> None:
    seen = []

    def statistic(labels: np.ndarray) -> list[float]:
        seen.append(labels)
        return [float(len(seen))]

    value, null = refit.against_shuffled(
        statistic, nothing.stories.labels, nothing.stories.topics, n=5
    )
    assert value.tolist() == [6.0]
    assert null[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert np.array_equal(seen[-1], nothing.stories.labels)
    for y in seen[:-1]:
        assert not np.array_equal(y, nothing.stories.labels)
        for t in set(nothing.stories.topics):  # every topic keeps its labels
            here = np.asarray(nothing.stories.topics) == t
            assert sorted(y[here]) == sorted(nothing.stories.labels[here])


def test_too_few_draws_have_no_p_and_every_null_says_how_many_there_were(
    nothing: Inputs, separated: list[Row]
) -> None:
    assert "p" not in judged(1.0, np.zeros(10), "x")
    assert judged(1.0, np.zeros(100), "x")["p"] == pytest.approx(1 / 101)
    rows = separated + person.run(nothing).rows
    for r in rows:
        if r.control == "shuffled labels":
            assert r.draws is not None
            assert r.p is None or r.draws >= 100


# --- separability -----------------------------------------------------------------------------------------------------


def test_separability_finds_what_is_planted_and_nothing_else(
    effect: Inputs, nothing: Inputs, separated: list[Row]
) -> None:
    folds = [refit.Training(effect.stories, held) for held in effect.stories.folds]
    value, null = refit.against_shuffled(
        lambda y: separability._measures(folds, y), effect.stories.labels, effect.stories.topics
    )
    assert value[0] > 0.9
    assert null[:, 0].max() < 0.6
    rows = separated
    absent = the(rows, "emotion top1", primary=True)
    assert not beats(absent)
    assert absent.value < 0.4  # chance is .17
    assert not beats(
        the(
            rows,
            "emotion auc",
            readout="calibrated",
            estimator="mean_difference",
            control="shuffled labels",
        )
    )
    for estimator in ("lda", "pca"):
        assert the(rows, "emotion top1", estimator=estimator).value < 0.4
    # negative control: this world shows a leak. Fitted on the very stories that it judges, the same estimator reads nothing "right"
    rows_, y = nothing.stories.main.rows, torch.from_numpy(nothing.stories.labels)
    leaked = project(rows_, *mean_differences(rows_, y, nothing.stories.neutral_components(())))[
        :, :, 1
    ]
    assert (leaked.argmax(1) == y).float().mean() > 0.6


def test_the_null_of_separability_chooses_its_layer_inside_each_fold(separated: list[Row]) -> None:
    """So it lies at chance, where the best of all layers would lie above it."""
    primary = the(separated, "emotion top1", primary=True)
    assert primary.null_mean == pytest.approx(
        1 / len(PLANTED), abs=0.03
    )  # 100 draws of 48 stories: a standard error of .006


# --- person -----------------------------------------------------------------------------------------------------------


def test_person_reads_across_only_where_something_is_read(effect: Inputs, nothing: Inputs) -> None:
    rows = person.run(effect).rows
    assert beats(the(rows, "top1", split="other person"))
    assert the(rows, "top1 cross minus mixed").high >= 0
    assert the(rows, "top1 of topics told twice", split="other person").value > 0.9
    rows = person.run(nothing).rows
    across = the(rows, "top1", split="other person")
    assert the(rows, "top1 cross minus mixed").high >= 0  # nothing is lost where nothing is read
    assert not beats(across)  # and so this is the question


def test_a_direction_of_one_person_only_does_not_cross() -> None:
    """Emotions that live in other directions in "I" and in "she"."""
    emotions = planted_set()
    inputs = planted_inputs(signal=0.0, emotions=emotions, seed=5)
    g = torch.Generator().manual_seed(1)
    own = {
        p: 8 * torch.nn.functional.normalize(torch.randn(6, 48, generator=g), dim=-1)
        for p in ("first", "third")
    }
    rows = inputs.stories.acts.rows.clone()
    for i, t in enumerate(inputs.stories.acts.texts):
        if t.emotion is not None:
            rows[i, 1:] += own[t.person or ""][emotions.names.index(t.emotion)]
    found = person.run(
        replace(
            inputs, stories=replace(inputs.stories, acts=replace(inputs.stories.acts, rows=rows))
        )
    ).rows
    assert the(found, "top1 cross minus mixed").high < 0
    assert not beats(the(found, "top1", split="other person"))


# --- other people's text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_transfer_finds_the_emotions_of_other_texts_only_where_they_are(
    effect: Inputs, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    external = planted_external(effect, monkeypatch, signal=4.0 if there else 0.0)
    rows = transfer.run(replace(effect, external=external)).rows
    macro = the(rows, "macro auc", control="shuffled labels")
    r = the(rows, "r", emotion="valence", control="shuffled labels")
    assert beats(macro) == beats(r) == there
    assert (the(rows, "macro auc minus tfidf", estimator="mean_difference").low > 0) == there


def test_directions_of_shuffled_stories_read_nothing_in_other_texts(
    nothing: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other texts do hold emotions; the stories do not, so there is nothing to carry over."""
    rows = transfer.run(
        replace(nothing, external=planted_external(nothing, monkeypatch, signal=4.0))
    ).rows
    assert not beats(the(rows, "macro auc", control="shuffled labels"))
    assert not beats(the(rows, "r", emotion="valence", control="shuffled labels"))


def test_twins_are_centred_and_scaled_as_the_directions_are(
    effect: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity: embeddings in place of the stream, through the public estimators. Some of them loud, so that the scale matters."""
    embed = effect.stories.acts.embed.clone() * torch.linspace(
        0.2, 5, effect.stories.acts.embed.shape[1]
    )
    embed += 3 * torch.nn.functional.one_hot(
        torch.tensor([int((t.topic or "t0")[1:]) % 7 for t in effect.stories.acts.texts]),
        embed.shape[1],
    )
    for k, e in enumerate(
        effect.stories.emotions.names
    ):  # an emotion told from a few dimensions each
        embed[[t.emotion == e for t in effect.stories.acts.texts], 5 * k : 5 * k + 3] += 2.0
    inputs = replace(
        effect, stories=replace(effect.stories, acts=replace(effect.stories.acts, embed=embed))
    )
    external = planted_external(effect, monkeypatch, signal=0.0)
    judge = transfer.EmoBank(inputs, external["emobank.csv"])
    monkeypatch.setattr(transfer, "_collect", lambda inputs, texts: judge.acts)
    tables = transfer._tables(inputs, judge.acts, judge.texts)
    seen = replace(
        inputs.stories.acts,
        rows=embed[:, None],
        layers=(0,),
        sinks=inputs.stories.acts.sinks[:, :1],
        norm_histogram=inputs.stories.acts.norm_histogram[:1],
    )
    seen, other = replace(seen, neutral_tokens=None), judge.acts.embed[:, None]
    expected = em.mean_difference(seen, remove_neutral=None).z(other)[:, :, 0].numpy()
    np.testing.assert_allclose(
        tables["embed"][0], expected, atol=1e-3
    )  # float32 sums of the public estimator
    expected = (
        em.logistic(seen).z(other)[:, :, 0].numpy()
    )  # unit weights without intercepts, which differ by fold: not to the digit
    for k in range(len(PLANTED)):
        assert stats.pearson(tables["embed logistic"][0][:, k], expected[:, k]) > 0.99
        assert tables["embed logistic"][0][:, k].std() == pytest.approx(
            expected[:, k].std(), rel=0.3
        )
    rows = transfer.run(replace(inputs, external={"emobank.csv": external["emobank.csv"]})).rows
    reads = judge.read(tables["embed"][0], "valence")
    assert the(
        rows, "r", emotion="valence", control="embed", estimator="mean_difference"
    ).value == pytest.approx(stats.pearson(reads, judge.truth["valence"]))


def test_comments_are_read_in_their_natural_proportions_and_n_is_said(
    effect: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = planted_external(effect, monkeypatch, signal=4.0, n=600)["goemotions_test.tsv"]
    rare = replace(
        data, labels=[x if i % 10 == 0 else {"neutral"} for i, x in enumerate(data.labels)]
    )
    monkeypatch.setattr(transfer, "QUICK", 300)
    kept = transfer._sample(rare, effect)
    assert len(kept.texts) == 300
    share = np.mean([x != {"neutral"} for x in kept.labels])
    assert share == pytest.approx(0.1, abs=0.035)  # two standard deviations of a draw of 300
    rows = transfer.run(replace(effect, external={"goemotions_test.tsv": rare})).rows
    assert {r.n for r in rows if r.metric == "macro auc"} == {300}
    assert {r.unit_of_n for r in rows if r.metric == "auc by label"} == {"positive of 300 comments"}
    assert len(transfer._sample(rare, replace(effect, full=True)).texts) == 600


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> tuple[str, ...]:
    """Forty words that Glasgow rates, in steps of valence."""
    rated = em.sets.norms.load_norms("glasgow_2019")
    every = sorted((n.valence, w) for w, n in rated.items() if w.isalpha())
    return tuple(w for _, w in every[:: len(every) // 40][:40])


def valence_world(words: tuple[str, ...], size: float) -> Inputs:
    """Emotions whose vectors lie along one direction as people rate them, `size` times as far as they lie apart otherwise."""
    rated = em.sets.norms.load_norms("glasgow_2019", sense=True)
    v = torch.tensor([rated[w].valence for w in words])
    # with seed 2 forty random vectors lie along valence by chance (ridge r .54 without any axis; over seeds r has a spread of .3)
    g = torch.Generator().manual_seed(7)
    u = torch.randn(len(words), 48, generator=g) / 48**0.5
    along = torch.nn.functional.normalize(torch.randn(48, generator=g), dim=0)
    return planted_inputs(
        signal=20.0,
        emotions=planted_set(words, 4, neutral=6),
        vectors=u + size * ((v - v.mean()) / v.std())[:, None] * along,
    )


def test_the_headline_of_geometry_is_given_without_and_with_rows_of_a_sense(
    words: tuple[str, ...],
) -> None:
    some = (*words[::4], "kind", "mad")
    rows = [
        r for r in norms.run(valence_world(some, 1.0)).rows if r.metric == "r of PC1 with valence"
    ]
    glasgow = {r.split: r.n for r in rows if (r.split or "").startswith("glasgow")}
    assert glasgow == {
        "glasgow_2019, exact form": 10,
        "glasgow_2019, exact form or a sense of it": 12,
    }
    assert [r.split for r in rows if r.primary] == ["glasgow_2019, exact form"]


def test_geometry_finds_a_planted_axis_of_valence_and_no_other(words: tuple[str, ...]) -> None:
    rows = norms.run(valence_world(words, 1.0)).rows
    primary = the(rows, "r of PC1 with valence", split="glasgow_2019, exact form")
    assert primary.primary
    assert abs(primary.value) > 0.8
    assert primary.p is not None
    assert primary.p < 0.01
    assert primary.low * primary.high > 0
    ridge = the(
        rows,
        "ridge r with valence, held-out words",
        control="permuted words",
        split="glasgow_2019, exact form",
    )
    assert beats(ridge)
    assert the(rows, "rsa with valence-arousal distance", split="glasgow_2019, exact form").p < 0.05
    rows = norms.run(valence_world(words, 0.0)).rows
    (primary,) = (r for r in rows if r.primary)
    assert primary.p > 0.05
    ridge = the(
        rows,
        "ridge r with valence, held-out words",
        control="permuted words",
        split="glasgow_2019, exact form",
    )
    assert not beats(ridge)
    assert ridge.null_mean < -0.05  # the bias of held-out folds is shown beside the value
    signed = [r for r in rows if r.metric.startswith("r of PC") and r.low < 0 < r.high]
    assert len(signed) >= 4  # an interval of |r| could not hold 0


def test_a_ridge_over_few_words_is_not_asked_and_says_why(effect: Inputs) -> None:
    rows = [r for r in norms.run(effect).rows if r.metric.startswith("ridge")]
    assert rows
    for r in rows:
        assert np.isnan(r.value)
        assert r.p is None
        assert r.control == "cannot be asked: fewer than 30 rated words"
        assert r.n == len(PLANTED)

"""Folds, bootstrap, permutation, multiple testing and classifiers: theorems, and parity with loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from _reference import stats as naive
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from emolens import stats

PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True
)  # no deadline: two shared cores
probability = st.floats(0, 1)


def test_every_topic_is_held_out_exactly_once_and_each_fold_has_both_persons() -> None:
    person = {f"topic-{i:02d}": "first" if i < 8 else "third" for i in range(16)}
    folds = stats.topic_folds(person, n_folds=4)
    assert sorted(t for fold in folds for t in fold) == sorted(person)
    for fold in folds:
        assert sorted(person[t] for t in fold) == ["first", "first", "third", "third"]


@PROPERTY
@given(
    st.lists(st.sampled_from(["first", "third", None]), min_size=4, max_size=30),
    st.integers(2, 4),
    st.integers(0, 9),
)
def test_folds_are_disjoint_complete_and_differ_by_at_most_one_topic(
    persons, n_folds, seed
) -> None:
    person = {f"t{i}": p for i, p in enumerate(persons)}
    folds = stats.topic_folds(person, n_folds=n_folds, seed=seed)
    assert sorted(t for fold in folds for t in fold) == sorted(person)
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for kind in set(persons):
        counts = [sum(person[t] == kind for t in fold) for fold in folds]
        assert max(counts) - min(counts) <= 1


def test_folds_do_not_depend_on_the_order_of_the_topics() -> None:
    person = {f"t{i}": "first" if i % 2 else "third" for i in range(10)}
    assert stats.topic_folds(person) == stats.topic_folds(dict(reversed(person.items())))
    assert stats.topic_folds(person) != stats.topic_folds(person, seed=1)


def test_too_few_topics_for_the_folds_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"3 topics cannot make 4 folds; give more topics or fewer folds"
    ):
        stats.topic_folds({"a": "first", "b": "third", "c": "first"})


def test_bootstrap_of_a_mean_is_the_naive_loop() -> None:
    rng = np.random.default_rng(1)
    groups = [f"g{i % 7}" for i in range(40)]
    values = rng.normal(size=40)
    draws = naive.bootstrap_mean_draws(values, groups, n=300, seed=5)
    for estimate in (
        stats.bootstrap_mean(values, groups, n=300, seed=5),
        stats.bootstrap(lambda i: values[i].mean(), groups, n=300, seed=5),
    ):
        assert estimate.value == pytest.approx(
            values.mean(), abs=1e-12
        )  # float64 sums in another order
        assert (estimate.low, estimate.high) == pytest.approx(
            tuple(np.percentile(draws, [2.5, 97.5])), abs=1e-12
        )


def test_bootstrap_resamples_groups_and_not_rows() -> None:
    # two groups of 50 equal values: rows would give an interval of about +-.1, groups give all or nothing
    estimate = stats.bootstrap_mean(np.repeat([0.0, 1.0], 50), ["a"] * 50 + ["b"] * 50)
    assert (estimate.low, estimate.value, estimate.high) == (0.0, 0.5, 1.0)


def test_the_bootstrap_interval_of_topics_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    groups = [f"t{i}" for i in range(16) for _ in range(6)]
    covered = 0
    for seed in range(300):
        values = np.repeat(rng.normal(size=16), 6) + rng.normal(
            size=96
        )  # topics differ: rows are not independent
        estimate = stats.bootstrap_mean(values, groups, n=400, seed=seed)
        covered += estimate.low <= 0.0 <= estimate.high
    # A percentile interval over 16 groups is known to be a little short (about .92); binomial sd of the share is .016.
    assert 0.87 <= covered / 300 <= 0.98


def test_an_estimate_prints_its_interval() -> None:
    assert str(stats.Estimate(0.634, 0.6, 0.671)) == "0.63 [0.60, 0.67]"


@PROPERTY
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.integers(-6, 6))
def test_a_permutation_p_counts_the_observation_and_never_falls_below_its_floor(
    null, observed
) -> None:
    p = stats.permutation_p(observed, null)
    assert p == (sum(x >= observed for x in null) + 1) / (len(null) + 1)
    assert 1 / (len(null) + 1) <= p <= 1


def test_a_missing_observation_or_draw_is_no_evidence() -> None:
    assert stats.permutation_p(float("nan"), [0.0, 1.0]) == 1.0
    assert stats.permutation_p(3.0, [float("nan"), 1.0, 2.0]) == 0.5


@PROPERTY
@given(st.lists(probability, min_size=1, max_size=20))
def test_q_values_are_those_of_the_step_up_definition(p) -> None:
    q = stats.benjamini_hochberg(p)
    assert q.tolist() == pytest.approx(
        naive.benjamini_hochberg(p), abs=1e-12
    )  # products in another order
    assert (q >= np.asarray(p) - 1e-15).all()  # one multiplication and one division: an ulp


def test_benjamini_hochberg_keeps_its_rate_under_the_null() -> None:
    rng = np.random.default_rng(0)
    # With every null true the chance of any call at q < .1 is at most .1; the binomial sd over 400 runs is .015.
    false = [(stats.benjamini_hochberg(rng.uniform(size=12)) < 0.1).any() for _ in range(400)]
    assert np.mean(false) < 0.145


@PROPERTY
@given(st.integers(0, 10_000))
def test_auc_is_scikit_learns_and_the_naive_pair_count_also_with_ties(seed) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1, 2], rng.integers(0, 3, size=22)])
    scores = rng.integers(0, 5, size=(25, 3)).astype(
        float
    )  # five values in 25 texts: ties everywhere
    found = stats.auc_by_class(scores, labels)
    for c in range(3):
        assert found[c] == pytest.approx(
            roc_auc_score(labels == c, scores[:, c]), abs=1e-12
        )  # float64 sums
        assert found[c] == pytest.approx(naive.auc(scores[:, c], labels == c), abs=1e-12)
    assert stats.macro_auc(scores, labels) == pytest.approx(found.mean(), abs=1e-12)


def test_a_class_that_cannot_be_judged_is_nan_and_left_out_of_the_macro_mean() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.1, 0.0]])
    labels = np.array([0, 1, 0])  # nobody is of class 2
    found = stats.auc_by_class(scores, labels)
    assert np.isnan(found[2])
    assert stats.macro_auc(scores, labels) == 1.0


def test_auc_with_several_labels_a_text_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    positive = rng.random((40, 4)) < 0.4
    scores = rng.normal(size=(40, 4))
    expected = [roc_auc_score(positive[:, c], scores[:, c]) for c in range(4)]
    assert stats.multilabel_auc(scores, positive).tolist() == pytest.approx(
        expected, abs=1e-12
    )  # float64 sums


def test_top_k_counts_the_texts_whose_class_is_among_the_best() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    labels = np.array([0, 1, 2])
    assert stats.top_k(scores, labels).tolist() == [True, False, False]
    assert stats.top_k(scores, labels, 2).tolist() == [True, True, False]
    assert stats.top_k(scores, labels, 3).all()


def test_a_readout_that_says_nothing_is_never_right() -> None:
    labels = np.array([0, 1])
    assert not stats.top_k(
        np.zeros((2, 3)), labels
    ).any()  # all tied: a constant readout must not score 100 %
    assert not stats.top_k(np.full((2, 3), np.nan), labels).any()  # a text that no fold held out


def test_pearson_is_numpys_and_nan_where_nothing_varies() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20))
    assert stats.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-15)
    assert np.isnan(stats.pearson(x, np.ones(20)))
    assert np.isnan(stats.pearson(x[:2], y[:2]))  # two points always lie on a line


def test_partial_pearson_is_the_textbook_formula() -> None:
    rng = np.random.default_rng(2)
    given_ = rng.normal(size=60)
    x, y = given_ + rng.normal(size=60), given_**2 - given_ + rng.normal(size=60)
    xy, xg, yg = stats.pearson(x, y), stats.pearson(x, given_), stats.pearson(y, given_)
    expected = (xy - xg * yg) / np.sqrt((1 - xg**2) * (1 - yg**2))
    assert stats.partial_pearson(x, y, given_) == pytest.approx(
        expected, abs=1e-10
    )  # least squares in float64


def test_partial_pearson_removes_a_correlation_that_goes_through_the_third_variable() -> None:
    rng = np.random.default_rng(4)
    common = rng.normal(size=2000)
    x, y = common + 0.3 * rng.normal(size=2000), common + 0.3 * rng.normal(size=2000)
    assert stats.pearson(x, y) > 0.85
    assert abs(stats.partial_pearson(x, y, common)) < 0.09  # four standard errors, 4 / sqrt(2000)


def test_partial_pearson_of_something_that_the_third_variable_explains_wholly_is_nan() -> None:
    rng = np.random.default_rng(5)
    given_, y = rng.normal(size=(2, 20))
    assert np.isnan(
        stats.partial_pearson(2 * given_ + 1, y, given_)
    )  # the residual is rounding noise, not data


# --- classifiers on held-out topics ----------------------------------------------------------------------------------


def _blobs(
    seed: int, n_classes: int = 3, n_topics: int = 4, width: int = 6
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    centres, shifts = rng.normal(size=(n_classes, width)), rng.normal(size=(n_topics, width))
    labels = np.tile(np.arange(n_classes), 2 * n_topics)
    topic = np.repeat(np.arange(n_topics), 2 * n_classes)
    x = centres[labels] + shifts[topic] + 0.3 * rng.normal(size=(len(labels), width))
    return x, labels, [f"t{t}" for t in topic]


def test_no_text_is_scored_by_a_classifier_that_saw_its_topic() -> None:
    topics = ["a", "a", "b", "c", "c", "d"]
    seen: list[tuple[set[str], set[str]]] = []

    def spy(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        seen.append(({topics[i] for i in train}, {topics[i] for i in test}))
        assert len(set(train) | set(test)) == len(topics)
        return np.column_stack([test, -test]).astype(float)

    scores = stats.heldout_scores(spy, topics, [("a", "d"), ("b", "c")], n_classes=2)
    assert [(sorted(train), sorted(test)) for train, test in seen] == [
        (["b", "c"], ["a", "d"]),
        (["a", "d"], ["b", "c"]),
    ]
    assert scores.tolist() == [[i, -i] for i in range(6)]  # each row lands on its own text


def test_a_topic_that_is_in_no_fold_stays_unscored() -> None:
    scores = stats.heldout_scores(
        lambda train, test: np.ones((len(test), 2)), ["a", "b"], [("a",)], 2
    )
    assert np.isnan(scores[1]).all()
    assert not np.isnan(scores[0]).any()


def test_centroid_scores_are_the_naive_loop() -> None:
    x, labels, _ = _blobs(0)
    found = stats.centroid_scores(x[:15], labels[:15], x[15:], 3)
    assert (
        np.abs(found - naive.centroid_scores(x[:15], labels[:15], x[15:], 3)).max() < 1e-12
    )  # float64 sums


@PROPERTY
@given(st.integers(0, 1000), st.floats(-1000, 1000))
def test_centroid_scores_do_not_move_with_the_origin_or_the_order_of_the_texts(seed, shift) -> None:
    x, labels, _ = _blobs(seed)
    base = stats.centroid_scores(x, labels, x, 3)
    order = np.random.default_rng(seed).permutation(len(x))
    moved = stats.centroid_scores((x + shift)[order], labels[order], x + shift, 3)
    assert (
        np.abs(moved - base).max() < 1e-9
    )  # float64: 1000 x 2e-16 x 24 texts, amplified by short vectors


def test_centroid_scores_weigh_emotions_and_not_texts_equally() -> None:
    train = np.array([[1.0, 0.0]] * 9 + [[0.0, 1.0]])
    labels = np.array([0] * 9 + [1])
    # the middle between the two means scores zero for both, however many texts each mean has
    assert stats.centroid_scores(train, labels, np.array([[0.5, 0.5]]), 2) == pytest.approx(
        np.zeros((1, 2)), abs=1e-15
    )


@pytest.mark.parametrize("n_classes", [2, 4])
def test_logistic_scores_are_scikit_learns_on_standardised_features(n_classes: int) -> None:
    x, labels, _ = _blobs(1, n_classes=n_classes)
    train, test = np.arange(len(x)) < 6 * n_classes, np.arange(len(x)) >= 6 * n_classes
    scaler = StandardScaler().fit(x[train])
    unit = np.sqrt(x.shape[1])
    model = LogisticRegression(C=100.0, tol=1e-3, max_iter=300).fit(
        scaler.transform(x[train]) / unit, labels[train]
    )
    expected = model.decision_function(scaler.transform(x[test]) / unit)
    found = stats.logistic_scores(x[train], labels[train], x[test])
    assert found.shape == (test.sum(), n_classes)
    if n_classes == 2:
        expected = np.column_stack([-expected, expected])
    assert (
        np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    )  # the same solver on the same numbers


def test_logistic_scores_do_not_depend_on_the_units_of_the_features() -> None:
    x, labels, _ = _blobs(2)
    scale = np.array([1e-3, 1.0, 10.0, 1e3, 5.0, 0.2])
    a, b = (stats.logistic_scores(data, labels, data) for data in (x, x * scale + 7))
    assert (
        np.abs(a - b).max() < 1e-4 * np.abs(a).max()
    )  # the solver sees the same numbers to about 1e-13


def test_a_feature_that_never_varies_does_not_divide_by_zero() -> None:
    x, labels, _ = _blobs(3)
    x[:, 2] = 5.0
    assert np.isfinite(stats.logistic_scores(x, labels, x)).all()


def test_the_tfidf_vocabulary_comes_from_the_training_texts_only() -> None:
    train = ["the red kettle sang", "the red door", "a kettle and a door"]
    x, z = stats.tfidf(train, ["zebra zebra", "the zebra kettle"])
    assert (
        x.shape[1] == z.shape[1] == 4
    )  # the, red, kettle, door: words of at least two training texts
    assert not z[0].any()  # a word that no training text has carries nothing
    assert z[1].any()


def test_chinese_and_japanese_are_read_by_characters() -> None:
    x, z = stats.tfidf(["今天天气很好", "今天天气不好"], ["今天下雨"], "zh")
    assert (
        x.shape[1] > 4
    )  # words between spaces would give one feature a text, and none in two texts
    assert z.any()


@pytest.mark.parametrize("estimator", ["logistic", "mean_difference"])
def test_tfidf_scores_find_words_that_repeat_across_topics_and_no_others(estimator) -> None:
    marker = {"joy": "sunlight", "fear": "footsteps", "anger": "slammed"}
    rows = [(e, f"t{t}") for t in range(4) for e in marker]
    told = [
        f"thing{t} word{t} {marker[e]} and the rest"
        for (e, _), t in zip(rows, np.repeat(range(4), 3), strict=True)
    ]
    labels, topics = [e for e, _ in rows], [t for _, t in rows]
    folds = [(f"t{t}",) for t in range(4)]
    scores = stats.tfidf_scores(told, labels, topics, folds, estimator=estimator)
    y = np.unique(labels, return_inverse=True)[1]  # columns are alphabetical: anger, fear, joy
    assert stats.top_k(scores, y).all()
    # negative control: a marker that belongs to one topic only tells nothing about a topic that was held out
    private = [f"{marker[e]}{t} and the rest of it" for e, t in rows]
    assert not stats.top_k(
        stats.tfidf_scores(private, labels, topics, folds, estimator=estimator), y
    ).any()


@pytest.mark.parametrize("n_classes", [8, 171])
def test_a_regression_with_many_classes_does_not_end_where_it_began(n_classes: int) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(n_classes), 6)
    x = rng.normal(size=(n_classes, 576))[y] + rng.normal(size=(len(y), 576))
    scores = stats.logistic_scores(x, y, x)
    assert stats.top_k(scores, y).mean() > 0.95


def test_form_means_the_same_in_every_language() -> None:
    english = stats.form_features(['"Go," she said. He went? No.'])[0]
    german = stats.form_features(["„Geh,“ sagte sie. Er ging? Nein."], "de")[0]
    chinese = stats.form_features(["“走，”她说。他走了？没有。"], "zh")[0]
    for other in (german, chinese):
        assert other[0] > 0.1  # quoted speech is seen
        assert other[1] == pytest.approx(english[1])  # three sentences
        assert (other[5:7] > 0).all()  # a comma and a question mark


def test_centroids_of_a_class_without_texts_are_an_error():
    with pytest.raises(ValueError, match="class 1 has no training text"):
        stats.centroid_scores(np.eye(3), np.array([0, 0, 2]), np.eye(3), 3)


def test_a_shuffle_that_can_move_nothing_is_refused():
    rng = np.random.default_rng(0)
    for groups in (["a", "b", "c", "d"], ["a", "b", "a", "b"]):
        with pytest.raises(
            ValueError, match=rf"within {len(set(groups))} groups that have one label each"
        ):
            stats.shuffle_within(np.array([0, 1, 0, 1]), groups, rng)
    moved = [
        stats.shuffle_within(np.array([0, 1, 0, 1]), ["a", "a", "b", "b"], rng).tolist()
        for _ in range(20)
    ]
    assert [0, 1, 0, 1] in moved  # a permutation test counts the truth as one of its draws
    assert len({tuple(m) for m in moved}) == 4


def test_an_interval_over_draws_is_wider_than_one_over_their_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1, 40)) * 0.1 + rng.normal(size=(5, 1))
    both, mean = (
        stats.bootstrap_draws(values, range(40)),
        stats.bootstrap_mean(values.mean(0), range(40)),
    )
    assert both.value == pytest.approx(mean.value)
    assert both.high - both.low > 5 * (mean.high - mean.low)
    one = stats.bootstrap_draws(values[:1], range(40))
    same = stats.bootstrap_mean(values[0], range(40))
    assert (one.low, one.high) == pytest.approx(
        (same.low, same.high), abs=0.01
    )  # other resamples of the same rows


def test_a_share_over_draws_is_the_ratio_of_means():
    values, gap = np.array([[1.0, 4.0], [3.0, 0.0]]), np.array([2.0, 8.0])
    e = stats.bootstrap_draws(values, ["a", "b"], of=gap)
    assert e.value == pytest.approx(4.0 / 10.0)
    assert e.low == pytest.approx(0.0)  # only the second pair of the second draw
    assert e.high == pytest.approx(1.5)  # only the first pair of it


@pytest.mark.parametrize(
    "text", ['"Go on," she said.', "'Go on,' she said.", "‘It's late, go on,’ she said."]
)
def test_speech_is_seen_in_double_and_in_single_quotes(text: str) -> None:
    quoted = stats.form_features([text])[0, stats.FORM.index("quoted speech")]
    assert quoted > 0.4


def test_an_apostrophe_is_no_speech() -> None:
    text = "The dogs' bowls, Ann's and his, weren't there. 'Twas late, she thought, and the boys' beds weren't made."
    assert stats.form_features([text])[0, 0] == 0
    behind = "The dogs' bowls were out. 'Go,' she said."
    assert stats.form_features([behind])[0, 0] == pytest.approx(len("'Go,'") / len(behind))

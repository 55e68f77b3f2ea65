"""The statistics that every experiment uses: folds of whole topics, grouped bootstrap, permutation p, multiple testing.

Texts of one topic are not independent, so intervals resample topics, never texts. A p value counts the observation itself,
p = (k + 1) / (n + 1), so it cannot be smaller than the number of permutations allows. Pure functions of arrays; no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats as sp

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def topic_folds(
    person_of_topic: Mapping[str, str | None], *, n_folds: int = 4, seed: int = 0
) -> list[tuple[str, ...]]:
    """Held-out topics of each fold, stratified by grammatical person and, in a joined set, by source; of sizes that differ by one at most.

    The source of a topic is what stands before a slash in its name (`emotion_sets.join_emotion_sets`). Give the topics that have stories (`EmotionSet.story_topics`): one that only neutral texts have would take a story topic's place.

    >>> [len(f) for f in topic_folds({f"t{i}": "first" if i % 2 else "third" for i in range(16)})]
    [4, 4, 4, 4]

    Raises:
        ValueError: fewer topics than folds.
    """
    if len(person_of_topic) < n_folds:
        raise ValueError(
            f"{len(person_of_topic)} topics cannot make {n_folds} folds; give more topics or fewer folds"
        )
    rng = np.random.default_rng(seed)
    folds: list[list[str]] = [[] for _ in range(n_folds)]
    k = 0
    stratum = {
        t: (t.partition("/")[0] if "/" in t else "", str(p)) for t, p in person_of_topic.items()
    }
    for kind in sorted(set(stratum.values())):
        for topic in rng.permutation(sorted(t for t, s in stratum.items() if s == kind)):
            folds[k % n_folds].append(str(topic))
            k += 1
    return [tuple(f) for f in folds]


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    groups: Sequence[object],
    *,
    n: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Percentile interval of a statistic of row indices, resampling whole groups.

    For a paired difference let the statistic compute both sides from the same indices.

    Args:
        statistic: Called with row indices (with repetition); with all rows once for the value itself.
        groups: The group of each row: a topic, or a word.
        n: Resamples.
    """
    return bootstrap_each(lambda rows: np.array([statistic(rows)]), groups, n=n, seed=seed)[0]


def bootstrap_each(
    statistic: Callable[[NDArray[np.intp]], Array],
    groups: Sequence[object],
    *,
    n: int = 1000,
    seed: int = 0,
) -> list[Estimate]:
    """`bootstrap` for a statistic that gives several figures at once, such as one for each emotion: the same resamples serve all.

    >>> [e.value for e in bootstrap_each(lambda i: np.array([i.mean(), i.max()]), ["a", "b", "c"], n=50)]
    [1.0, 2.0]
    """
    names, inverse = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    members = [np.flatnonzero(inverse == g) for g in range(len(names))]
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(len(inverse)))
    draws = [
        statistic(np.concatenate([members[g] for g in rng.integers(len(names), size=len(names))]))
        for _ in range(n)
    ]
    low, high = np.nanpercentile(np.stack(draws), [2.5, 97.5], axis=0)
    return [
        Estimate(float(v), float(a), float(b)) for v, a, b in zip(value, low, high, strict=True)
    ]


def bootstrap_mean(
    values: Array, groups: Sequence[object], *, n: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `values` with an interval over groups: `bootstrap` for means, without a Python loop.

    >>> e = bootstrap_mean(np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"])
    >>> (e.value, e.low, e.high)
    (0.5, 0.0, 1.0)
    """
    values = np.asarray(values, dtype=float)
    _, inverse = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums, counts = np.bincount(inverse, values), np.bincount(inverse)
    draws = np.random.default_rng(seed).integers(len(sums), size=(n, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def bootstrap_two_way(values: Array, *, n: int = 2000, seed: int = 0) -> Estimate:
    """Mean of a table with an interval that resamples every axis of it at once (say stems and emotions, or draws too), NaN left out.

    >>> e = bootstrap_two_way(np.ones((4, 3)))
    >>> (e.value, e.low, e.high)
    (1.0, 1.0, 1.0)

    Reference:
        Owen 2007, *The pigeonhole bootstrap*, arXiv 0712.1111.
    """
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n):
        draws.append(
            np.nanmean(values[np.ix_(*(rng.integers(size, size=size) for size in values.shape))])
        )
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(np.nanmean(values)), float(low), float(high))


def bootstrap_columns(
    statistic: Callable[[NDArray[np.intp]], Array],
    groups: Sequence[object],
    *,
    n: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean of a statistic with a figure for each column, with an interval that resamples whole groups of rows and the columns at once.

    For columns that were sampled too, say labels that stand for others: `bootstrap` speaks of these columns only. NaN is left out.

    Args:
        statistic: Called with row indices; returns a figure for each column.
        groups: The group of each row.
        n: Resamples.

    >>> e = bootstrap_columns(lambda i: np.array([0.0, 1.0]), ["a", "b"], n=200)  # rows say nothing, columns differ
    >>> (e.value, e.low, e.high)
    (0.5, 0.0, 1.0)

    Reference:
        Owen 2007, *The pigeonhole bootstrap*, arXiv 0712.1111.
    """
    rng = np.random.default_rng(seed)

    def drawn(rows: NDArray[np.intp]) -> Array:
        figures = statistic(rows)
        figures = figures[np.isfinite(figures)]
        return figures[rng.integers(len(figures), size=len(figures))].mean(keepdims=True)

    [e] = bootstrap_each(drawn, groups, n=n, seed=seed)
    return Estimate(float(np.nanmean(statistic(np.arange(len(groups))))), e.low, e.high)


def bootstrap_draws(
    values: Array,
    groups: Sequence[object],
    *,
    of: Array | None = None,
    n: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean over draws and rows of a table `[draw row]`, with an interval that resamples the draws and whole groups of rows at once.

    For a null that was drawn a few times: its mean over the draws is itself uncertain, and so is a difference from it.

    Args:
        values: `[draw row]`; a single draw is `bootstrap_mean`.
        groups: The group of each row.
        of: `[row]`; the statistic is then the ratio sum(values) / sum(of), such as a share of a gap.
        n: Resamples.

    >>> e = bootstrap_draws(np.array([[1.0, 1.0], [0.0, 0.0]]), ["a", "b"])
    >>> (e.value, e.low, e.high)
    (0.5, 0.0, 1.0)

    Reference:
        Owen 2007, *The pigeonhole bootstrap*, arXiv 0712.1111.
    """
    values = np.asarray(values, dtype=float)
    weights = np.ones(values.shape[1]) if of is None else np.asarray(of, dtype=float)
    _, inverse = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums = np.stack([np.bincount(inverse, draw) for draw in values])
    counts = np.bincount(inverse, weights)
    rng = np.random.default_rng(seed)
    draws, members = (rng.multinomial(size, np.full(size, 1 / size), size=n) for size in sums.shape)
    means = ((draws @ sums) * members).sum(1) / (len(values) * (members @ counts))
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.sum() / (len(values) * weights.sum())), float(low), float(high))


def permutation_p(observed: float, null: Sequence[float] | Array) -> float:
    """One-sided p of `observed` against draws of the null: (number at least as large + 1) / (draws + 1).

    >>> permutation_p(3.0, [1.0, 2.0, 4.0])
    0.5
    """
    null = np.asarray(null, dtype=float)
    return float(
        (np.sum(~(null < observed)) + 1) / (len(null) + 1)
    )  # NaN on either side is no evidence


def shuffle_within(
    labels: NDArray[np.integer], groups: Sequence[str], rng: np.random.Generator
) -> NDArray[np.integer]:
    """The labels permuted inside each group: the null that keeps topics and counts as they are.

    >>> shuffle_within(np.array([0, 1, 7]), ["a", "a", "b"], np.random.default_rng(0))[2]
    np.int64(7)

    Raises:
        ValueError: every group has one label only, so that nothing can move and the null would be the truth itself.
    """
    out, names = labels.copy(), np.asarray(groups)
    if all(len(np.unique(labels[names == name])) < 2 for name in np.unique(names)):
        raise ValueError(
            f"labels cannot be shuffled within {len(np.unique(names))} groups that have one label each: nothing moves. "
            "Every topic needs texts of several emotions (or give no topics, to shuffle over all texts)"
        )
    for name in np.unique(names):
        out[names == name] = rng.permutation(out[names == name])
    return out


def benjamini_hochberg(p: Sequence[float] | Array) -> Array:
    """q values: the false discovery rate at which each test would be called.

    >>> [round(float(q), 4) for q in benjamini_hochberg([0.01, 0.02, 0.5])]
    [0.03, 0.03, 0.5]
    """
    return sp.false_discovery_control(np.asarray(p, dtype=float), method="bh")


def auc_by_class(scores: Array, labels: NDArray[np.integer]) -> Array:
    """One-vs-rest area under the ROC curve of each column; ties count half. A class without both kinds of text is NaN.

    AUC_e = P(score_e of a text of e > score_e of another text), from ranks (Mann-Whitney).

    >>> auc_by_class(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])).tolist()
    [1.0, 1.0]
    """
    positive = labels[:, None] == np.arange(scores.shape[1])[None]
    return multilabel_auc(scores, positive)


def multilabel_auc(scores: Array, positive: NDArray[np.bool_]) -> Array:
    """As `auc_by_class`, for texts that may have several labels: `positive` is `[text class]`."""
    ranks = sp.rankdata(scores, axis=0)
    n1 = positive.sum(0).astype(float)
    n0 = len(scores) - n1
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((ranks * positive).sum(0) - n1 * (n1 + 1) / 2) / (n1 * n0)


def macro_auc(scores: Array, labels: NDArray[np.integer]) -> float:
    """Mean of `auc_by_class` over the classes that can be judged."""
    return float(np.nanmean(auc_by_class(scores, labels)))


def top_k(scores: Array, labels: NDArray[np.integer], k: int = 1) -> NDArray[np.bool_]:
    """Whether each text's own class is among its k best columns; a tie or a NaN counts against it."""
    own = np.take_along_axis(scores, labels[:, None], 1)
    return (~(scores < own)).sum(1) <= k


def pearson(x: Array, y: Array) -> float:
    """Pearson r; NaN when one side does not vary."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def partial_pearson(x: Array, y: Array, given: Array) -> float:
    """Pearson r of x and y after the part of each that is linear in `given` is taken out; NaN when nothing is left of one."""
    design = np.column_stack([np.ones(len(given)), given])

    def residual(a: Array) -> Array:
        rest = a - design @ np.linalg.lstsq(design, a, rcond=None)[0]
        return (
            rest if rest.std() > 1e-9 * np.abs(a).max() else np.zeros_like(a)
        )  # what rounding leaves is not a residual

    return pearson(residual(np.asarray(x, float)), residual(np.asarray(y, float)))


# --- classifiers on held-out topics: the same code for activations, embeddings and TF-IDF ----------------------------


def heldout_scores(
    fit_score: Callable[[NDArray[np.intp], NDArray[np.intp]], Array],
    topics: Sequence[str],
    folds: Sequence[Sequence[str]],
    n_classes: int,
) -> Array:
    """Scores `[text class]` of every text by a classifier that never saw its topic.

    Args:
        fit_score: Called with the indices of the training and of the held-out texts; returns the scores of the latter.
    """
    topic_array = np.asarray(topics)
    out = np.full((len(topic_array), n_classes), np.nan)
    for fold in folds:
        held = np.isin(topic_array, list(fold))
        out[held] = fit_score(np.flatnonzero(~held), np.flatnonzero(held))
    return out


def centroid_scores(
    train: Array, labels: NDArray[np.integer], test: Array, n_classes: int
) -> Array:
    """Mean difference as a classifier: (x - mu) . v_e / |v_e| with v_e = mean of class e - mu, mu = mean of the class means.

    Raises:
        ValueError: a class without a training text.
    """
    if missing := sorted(set(range(n_classes)) - set(labels.tolist())):
        raise ValueError(f"class {missing[0]} has no training text: there is no mean of nothing")
    means = np.stack([train[labels == c].mean(0) for c in range(n_classes)])
    mu = means.mean(0)
    vectors = means - mu
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    return (test - mu) @ vectors.T


def logistic_scores(
    train: Array, labels: NDArray[np.integer], test: Array, *, c: float = 1.0
) -> Array:
    """Multinomial logistic regression on features of unit variance; decision values.

    `c` = 1 is scikit-learn's C = 100 on rows of about unit norm; as there, it weighs the sum of the losses, not their mean.
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = train.mean(0), train.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0) * np.sqrt(
        train.shape[1]
    )  # unit norm, not unit entries: one C for any width
    model = LogisticRegression(
        C=c * 100, max_iter=300, tol=logistic_tolerance(len(np.unique(labels)))
    )
    model.fit((train - mean) / scale, labels)
    scores = model.decision_function((test - mean) / scale)
    return np.column_stack([-scores, scores]) if scores.ndim == 1 else scores


def tfidf(train: Sequence[str], test: Sequence[str], language: str = "en") -> tuple[Array, Array]:
    """TF-IDF features with the vocabulary of the training texts; character n-grams where words are not spaced."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer: Any  # scikit-learn's stubs know no sparse results
    if language in ("zh", "ja"):
        vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 3), sublinear_tf=True, min_df=2
        )
    else:
        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w+\b")
    return vectorizer.fit_transform(train).toarray(), vectorizer.transform(test).toarray()


_SIGNS = str.maketrans(
    "，、。？！；：„“”「」『』«»", ",,.?!;:" + '"' * 9
)  # of other languages, by their English kind
FORM = (
    "quoted speech", "sentences", "words a sentence", "spread of sentence length", "longest sentence", "commas", "question marks",
    "exclamation marks", "semicolons", "colons", "ellipses", "digits", "contractions", "word length",
)  # fmt: skip
# subtle: an apostrophe is the same sign; speech begins before a word that no letter precedes and ends behind a mark
QUOTED = re.compile(
    r"[\"“「][^\"”」]*[\"”」]|(?<!\w)['‘](?=\w)(?:[^'\n]|'(?=\w))*?[.,?!…—-]['’](?!\w)"
)


def form_features(texts: Sequence[str], language: str = "en") -> Array:
    """How a text is built rather than what it says, `[text feature]` in the order of `FORM`: shares, counts a word, lengths, and the
    logarithm of the number of sentences.

    A baseline for texts written for a purpose: an emotion that is always told in short sentences can be read off the sentences. The features
    mean the same in every language; Chinese and Japanese are counted in characters. Speech may stand in double or in single quotes.

    >>> form_features(["One. Two! Three?"]).shape
    (1, 14)
    """
    out = []
    split = (lambda t: [c for c in t if not c.isspace()]) if language in ("zh", "ja") else str.split
    for text in texts if language == "en" else [t.translate(_SIGNS) for t in texts]:
        words = split(text)
        lengths = [
            len(split(sentence))
            for sentence in re.split(r"(?<=[.!?。！？])[\"'”’」]?\s*", text)
            if sentence.strip()
        ] or [0]
        quoted = sum(len(q) for q in QUOTED.findall(text)) / max(len(text), 1)
        marks = [text.count(mark) / max(len(words), 1) for mark in ",?!;:…"]
        digits = sum(c.isdigit() for c in text) / max(len(text), 1)
        short = len(re.findall(r"['’][a-z]+\b", text)) / max(len(words), 1)
        size = float(np.mean([len(w) for w in words])) if words else 0.0
        out.append(
            [
                quoted,
                np.log(len(lengths)),
                np.mean(lengths),
                np.std(lengths),
                np.max(lengths),
                *marks,
                digits,
                short,
                size,
            ]
        )
    return np.array(out, dtype=float)


def logistic_tolerance(n_classes: int) -> float:
    """Largest gradient entry at which a multinomial regression counts as fitted: 1e-3 up to 24 classes, less beyond.

    The gradient at zero is about 1 / n_classes; with a fixed tolerance a regression with many classes ends where it began.

    >>> logistic_tolerance(8), logistic_tolerance(240)
    (0.001, 0.0001)
    """
    return min(1e-3, 0.024 / n_classes)


def logistic_words(train: Array, labels: NDArray[np.integer], test: Array) -> Array:
    """Logistic regression on TF-IDF features, which are of unit length already (C = 10); decision values.

    With an L2 penalty the weights lie in the span of the training texts, X = U S V^T, so X V has the same solution with a column a text
    instead of a column a word.
    """
    from sklearn.linear_model import LogisticRegression

    u, s, vt = np.linalg.svd(train, full_matrices=False)
    train, test = u * s, test @ vt.T
    scores = LogisticRegression(C=10.0, max_iter=300).fit(train, labels).decision_function(test)
    return np.column_stack([-scores, scores]) if scores.ndim == 1 else scores


def tfidf_scores(
    texts: list[str],
    labels: Sequence[str],
    topics: Sequence[str],
    folds: Sequence[Sequence[str]],
    language: str = "en",
    *,
    estimator: Literal["logistic", "mean_difference"] = "logistic",
) -> Array:
    """Held-out scores `[text class]` from words alone; classes in alphabetical order."""
    names, y = np.unique(labels, return_inverse=True)

    def fit_score(train: NDArray[np.intp], test: NDArray[np.intp]) -> Array:
        x, z = tfidf([texts[i] for i in train], [texts[i] for i in test], language)
        return (
            centroid_scores(x, y[train], z, len(names))
            if estimator == "mean_difference"
            else logistic_words(x, y[train], z)
        )

    return heldout_scores(fit_score, topics, folds, len(names))

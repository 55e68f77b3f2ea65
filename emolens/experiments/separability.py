"""Do directions tell emotions apart on topics they never saw, and better than words alone?

Outer folds are whole topics. Inside a fold everything is fitted on training topics: vectors, neutral components, reference mean,
spread, layer, TF-IDF vocabulary. Margins are paired, like against like: mean difference with TF-IDF centroids and embedding
centroids, logistic with TF-IDF logistic and embedding logistic, on the same held-out texts with a bootstrap over topics. A third twin sees
only how a story is built (`stats.form_features`): what it reads, a direction may be reading too.
Primary row: top-1 of the emotions, mean difference, calibrated, layer chosen inside the fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emolens import stats
from emolens.directions import class_means, lda, pca, project, remove_components
from emolens.experiments.base import Inputs, Row, row

NAME = "separability"
Array = NDArray[np.floating]
Labels = NDArray[np.integer]


def run(inputs: Inputs) -> list[Row]:
    """All rows of the experiment."""
    say = {
        "hook": inputs.acts.hook_point,
        "n": len(inputs.labels),
        "unit_of_n": "stories",
        "seed": inputs.seed,
        "split": "held-out topics",
    }
    n_shuffles = 100
    out: list[Row] = []
    folds = [_Fold(inputs, held) for held in inputs.folds]
    for what, labels in (("emotion", inputs.labels), ("family", inputs.family_labels)):
        if len(np.unique(labels)) < 2 or (what == "family" and len(np.unique(labels)) == len(inputs.emotions.names)):
            continue
        k = int(labels.max()) + 1
        tag = say | {"emotion": None, "estimator": "mean_difference"}
        nested = _nested(folds, labels, k)
        calibrated = nested["calibrated"]
        primary = what == "emotion"
        twins = {
            "tfidf": _words(inputs, labels, "mean_difference"),
            "embed": _centroids(inputs, _embed(inputs), labels, k),
            "form": _centroids(inputs, _form(inputs), labels, k),
        }
        null = _shuffled(folds, labels, k, n_shuffles, inputs.seed)
        out += _judge(
            f"{what}",
            calibrated,
            labels,
            inputs,
            tag | {"readout": "calibrated", "layer": "nested"},
            primary=primary,
            null=null,
        )
        out += _margins(what, calibrated, twins, labels, inputs, tag | {"layer": "nested", "readout": "calibrated"})
        if what == "emotion":
            for readout, scores in nested.items():
                if readout != "calibrated":
                    out += _judge(what, scores, labels, inputs, tag | {"readout": readout, "layer": "nested"})
            out += _by_layer(folds, labels, k, inputs, tag, twins["embed"])
            out += _per_emotion(calibrated, inputs, tag, n_random=200 if not inputs.full else 1000)
            out += _other_estimators(inputs, labels, k, nested_layers=[f.choice for f in folds], say=say)
        out += _logistic(inputs, folds, labels, k, what, say)
    return out


def choose_layer(
    rows: Tensor, labels: Labels, topics: Sequence[str], folds: Sequence[Sequence[str]], components: list[Tensor] | None
) -> NDArray[np.floating]:
    """Held-out top-1 of the mean difference at every layer, `[layer]`: what a layer is chosen by."""
    topic, y = np.asarray(topics), torch.from_numpy(np.asarray(labels))
    right = torch.zeros(rows.shape[1])
    n = 0
    for held in folds:
        inside = torch.from_numpy(np.isin(topic, list(held)))
        if not inside.any():
            continue
        scores = _md(rows[~inside], y[~inside], rows[inside], components)
        right += (scores.argmax(1) == y[inside][:, None]).sum(0)
        n += int(inside.sum())
    return (right / max(n, 1)).numpy()


def _md(train: Tensor, labels: Tensor, test: Tensor, components: list[Tensor] | None) -> Tensor:
    """Centred mean-difference scores `[text class layer]`."""
    means = class_means(train, labels)
    mu = means.mean(0)
    vectors = means - mu
    return project(test, vectors if components is None else remove_components(vectors, components), mu)


class _Fold:
    """One outer fold, with what is fitted once for all questions asked of it."""

    def __init__(self, inputs: Inputs, held: tuple[str, ...]) -> None:
        self.inputs, self.held = inputs, held
        self.inside = torch.from_numpy(np.isin(np.asarray(inputs.topics), held))
        self.components = inputs.neutral_components(held)
        self.inner = inputs.inner_folds(held)
        self.topics = [t for t, out in zip(inputs.topics, self.inside.tolist(), strict=True) if not out]
        self.train, self.test = inputs.main.rows[~self.inside], inputs.main.rows[self.inside]
        neutral = inputs.acts.select(lambda t: t.split == "neutral" and t.topic not in held)
        if not neutral.texts and any(t.split == "neutral" for t in inputs.acts.texts):
            raise ValueError(
                f"all neutral texts are of the held-out topics {', '.join(held)}: give neutral texts on more topics"
            )
        self.neutral_mean = neutral.rows.mean(0) if neutral.texts else None
        self.choice = -1

    def choose(self, labels: Tensor) -> int:
        """The layer with the best inner held-out top-1 (a slot on the layer axis)."""
        accuracy = choose_layer(self.train, labels[~self.inside].numpy(), self.topics, self.inner, self.components)
        return int(accuracy.argmax())


def _nested(folds: list[_Fold], labels: Labels, k: int) -> dict[str, Array]:
    """Held-out scores at each fold's own layer, for every kind of readout."""
    y = torch.from_numpy(labels)
    kinds = ("calibrated", "centred", "neutral-centred", "uncentred", "uncentred cosine")
    out = {kind: np.full((len(labels), k), np.nan) for kind in kinds}
    for fold in folds:
        slot = fold.choose(y)
        if k == len(fold.inputs.emotions.names):
            fold.choice = slot
        train, test = fold.train[:, [slot]], fold.test[:, [slot]]
        components = fold.components and [fold.components[slot]]
        labels_in = y[~fold.inside]
        means = class_means(train, labels_in)
        mu = means.mean(0)
        vectors = means - mu if components is None else remove_components(means - mu, components)
        centred = project(test, vectors, mu)[:, :, 0]
        inside = fold.inside.numpy()
        out["centred"][inside] = centred
        # the spread of held-out scores, by the inner folds of training topics
        topic, inner = np.asarray(fold.topics), torch.zeros(len(train), k)
        for held in fold.inner:
            there = torch.from_numpy(np.isin(topic, held))
            inner[there] = _md(train[~there], labels_in[~there], train[there], components)[:, :, 0]
        out["calibrated"][inside] = (centred - inner.mean(0)) / inner.std(0)
        zero = torch.zeros_like(mu)
        raw = project(test, vectors, zero)[:, :, 0]
        out["uncentred"][inside] = raw
        # cosine: the same vector for all texts of a row, so only comparisons between texts change
        out["uncentred cosine"][inside] = raw / torch.linalg.vector_norm(test[:, 0], dim=-1, keepdim=True)
        if fold.neutral_mean is not None:
            out["neutral-centred"][inside] = project(test, vectors, fold.neutral_mean[[slot]])[:, :, 0]
    return {kind: s for kind, s in out.items() if np.isfinite(s).all()}


def _shuffled(folds: list[_Fold], labels: Labels, k: int, n: int, seed: int) -> dict[str, Array]:
    """Top-1 and AUC with labels shuffled within topic and vectors fitted again; the maximum over layers, as a layer was chosen."""
    rng = np.random.default_rng(seed)
    topic = folds[0].inputs.topics
    top1, auc = [], []
    n_layers = folds[0].train.shape[1]
    for _ in range(n):
        y = stats.shuffle_within(labels, topic, rng)
        shuffled = torch.from_numpy(y)
        scores = np.zeros((len(y), k, n_layers))
        for fold in folds:
            scores[fold.inside.numpy()] = _md(fold.train, shuffled[~fold.inside], fold.test, fold.components)
        # judged against the shuffled labels: the classifier, not the label, is what the null breaks
        top1.append(max(stats.top_k(scores[:, :, j], y).mean() for j in range(n_layers)))
        auc.append(
            max(stats.macro_auc(scores[:, :, j], y) for j in range(0, n_layers, 3))
        )  # ranks are slow: every third
    return {"top1": np.array(top1), "auc": np.array(auc)}


def _judge(
    what: str,
    scores: Array,
    labels: Labels,
    inputs: Inputs,
    tag: dict,
    *,
    primary: bool = False,
    null: dict[str, Array] | None = None,
) -> list[Row]:
    """Top-1, top-5 and AUC of one table of held-out scores, with chance and the shuffled-label null."""
    k = scores.shape[1]
    out = []
    for metric, correct in (("top1", stats.top_k(scores, labels)), ("top5", stats.top_k(scores, labels, 5))):
        if metric == "top5" and k < 12:
            continue
        estimate = stats.bootstrap_mean(correct.astype(float), inputs.topics, seed=inputs.seed)
        extra = {}
        if null is not None and metric in null:
            extra = {"control": "shuffled labels", "null_mean": float(null[metric].mean()), "null_high": float(np.percentile(null[metric], 95)), "p": stats.permutation_p(estimate.value, null[metric])}  # fmt: skip
        out.append(row(NAME, f"{what} {metric}", estimate, primary=primary and metric == "top1", **(tag | extra)))
    auc = stats.bootstrap(lambda i: stats.macro_auc(scores[i], labels[i]), inputs.topics, n=300, seed=inputs.seed)
    extra = {}
    if null is not None:
        extra = {"control": "shuffled labels", "null_mean": float(null["auc"].mean()), "null_high": float(np.percentile(null["auc"], 95)), "p": stats.permutation_p(auc.value, null["auc"])}  # fmt: skip
    out.append(row(NAME, f"{what} auc", auc, **(tag | extra)))
    if primary or (what == "family" and tag["estimator"] == "mean_difference"):  # once for all estimators
        out.append(
            row(
                NAME,
                f"{what} top1",
                1 / k,
                **(tag | {"control": "chance", "readout": None, "estimator": None, "layer": None}),
            )
        )
    return out


def _margins(what: str, scores: Array, twins: dict[str, Array], labels: Labels, inputs: Inputs, tag: dict) -> list[Row]:
    """The twins' own figures, and the paired difference to each."""
    out = []
    correct = stats.top_k(scores, labels).astype(float)
    for name, twin in twins.items():
        own = stats.top_k(twin, labels).astype(float)
        layer = {"layer": "embed" if name == "embed" else None, "readout": None}
        out.append(
            row(
                NAME,
                f"{what} top1",
                stats.bootstrap_mean(own, inputs.topics, seed=inputs.seed),
                **(tag | {"control": name} | layer),
            )
        )
        auc = stats.bootstrap(
            lambda i, twin=twin: stats.macro_auc(twin[i], labels[i]), inputs.topics, n=300, seed=inputs.seed
        )
        out.append(row(NAME, f"{what} auc", auc, **(tag | {"control": name} | layer)))
        out.append(
            row(
                NAME,
                f"{what} top1 minus {name}",
                stats.bootstrap_mean(correct - own, inputs.topics, seed=inputs.seed),
                **(tag | {"control": name}),
            )
        )
        margin = stats.bootstrap(
            lambda i, twin=twin: stats.macro_auc(scores[i], labels[i]) - stats.macro_auc(twin[i], labels[i]),
            inputs.topics,
            n=300,
            seed=inputs.seed,
        )
        out.append(row(NAME, f"{what} auc minus {name}", margin, **(tag | {"control": name})))
    return out


def _by_layer(folds: list[_Fold], labels: Labels, k: int, inputs: Inputs, tag: dict, embed: Array) -> list[Row]:
    """The curve over layers (each layer reported as it is: no choice, so no selection), and its shuffled-label band."""
    y = torch.from_numpy(labels)
    n_layers = folds[0].train.shape[1]
    scores = np.zeros((len(labels), k, n_layers))
    for fold in folds:
        scores[fold.inside.numpy()] = _md(fold.train, y[~fold.inside], fold.test, fold.components)
    out = []
    for j, layer in enumerate(inputs.acts.layers):
        correct = stats.top_k(scores[:, :, j], labels).astype(float)
        fields = tag | {"readout": "centred", "layer": layer}
        out.append(
            row(NAME, "emotion top1 by layer", stats.bootstrap_mean(correct, inputs.topics, seed=inputs.seed), **fields)
        )
        out.append(row(NAME, "emotion auc by layer", stats.macro_auc(scores[:, :, j], labels), **fields))
    fields = tag | {"readout": "centred", "layer": "embed", "control": "embed"}
    out.append(
        row(
            NAME,
            "emotion top1 by layer",
            stats.bootstrap_mean(stats.top_k(embed, labels).astype(float), inputs.topics, seed=inputs.seed),
            **fields,
        )
    )
    return out


def _per_emotion(scores: Array, inputs: Inputs, tag: dict, n_random: int) -> list[Row]:
    """One-vs-rest AUC of each emotion against random directions drawn from the residual covariance, with q over the emotions."""
    auc = stats.auc_by_class(scores, inputs.labels)
    slot = inputs.acts.layers.index(inputs.layer)
    x = inputs.main.rows[:, slot].double()
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(inputs.seed)
    # X^T g has the covariance of the rows: the directions in which texts really differ, not isotropic ones
    random = (x @ (x.T @ torch.randn(len(x), n_random, generator=generator, dtype=torch.float64))).numpy()
    null = np.stack(
        [stats.multilabel_auc(random, np.repeat(inputs.labels[:, None] == e, n_random, 1)) for e in range(len(auc))]
    )
    null = np.maximum(null, 1 - null)  # the sign of a random direction is free
    p = [stats.permutation_p(a, null[e]) for e, a in enumerate(auc)]
    q = stats.benjamini_hochberg(p)
    fields = tag | {"readout": "calibrated", "layer": "nested", "control": "random directions"}
    each = stats.bootstrap_each(
        lambda i: stats.auc_by_class(scores[i], inputs.labels[i]), inputs.topics, n=200, seed=inputs.seed
    )
    return [
        row(NAME, "emotion auc one-vs-rest", each[e],
            **(fields | {"emotion": name, "null_mean": float(null[e].mean()), "null_high": float(np.percentile(null[e], 95)), "p": p[e], "q": float(q[e])}))
        for e, name in enumerate(inputs.emotions.names)
    ]  # fmt: skip


def _other_estimators(inputs: Inputs, labels: Labels, k: int, nested_layers: list[int], say: dict) -> list[Row]:
    """LDA and PCA at the layers that the mean difference chose inside each fold."""
    out = []
    for name, estimator in (("lda", lda), ("pca", pca)):
        scores = np.full((len(labels), k), np.nan)
        for held, slot in zip(inputs.folds, nested_layers, strict=True):
            v = estimator(inputs.without(held).at([inputs.acts.layers[slot]]))
            inside = np.isin(np.asarray(inputs.topics), held)
            scores[inside] = v.z(inputs.main.rows[torch.from_numpy(inside)][:, [slot]])[:, :, 0].numpy()
        out += _judge(
            "emotion", scores, labels, inputs, say | {"estimator": name, "readout": "calibrated", "layer": "nested"}
        )
    return out


def _logistic(inputs: Inputs, folds: list[_Fold], labels: Labels, k: int, what: str, say: dict) -> list[Row]:
    """Logistic regression on activations against its twins on TF-IDF and on embeddings; layer chosen inside on a coarse grid."""
    step = 1 if inputs.full else max(1, len(inputs.acts.layers) // 6)
    grid = list(range(len(inputs.acts.layers) - 1, -1, -step))[::-1]
    scores, embed, form = np.full((3, len(labels), k), np.nan)
    e, f = _embed(inputs), _form(inputs)
    chosen = []
    for fold in folds:
        inside, y = fold.inside.numpy(), labels[~fold.inside.numpy()]
        topic = np.asarray(fold.topics)
        there = np.isin(topic, fold.inner[0])  # one inner split: the choice among a few layers is coarse anyway
        inner = []
        for j in grid:
            x = fold.train[:, j].numpy()
            inner.append(stats.top_k(stats.logistic_scores(x[~there], y[~there], x[there]), y[there]).mean())
        j = grid[int(np.argmax(inner))]
        chosen.append(j)
        scores[inside] = stats.logistic_scores(fold.train[:, j].numpy(), y, fold.test[:, j].numpy())
        embed[inside] = stats.logistic_scores(e[~inside], y, e[inside])
        form[inside] = stats.logistic_scores(f[~inside], y, f[inside])
    twins = {"tfidf": _words(inputs, labels, "logistic"), "embed": embed, "form": form}
    null = _shuffled_logistic(folds, labels, k, chosen, 100 if inputs.full else 10, inputs.seed)
    tag = say | {"estimator": "logistic", "layer": "nested", "readout": "decision"}
    return _judge(what, scores, labels, inputs, tag, null=null) + _margins(what, scores, twins, labels, inputs, tag)


def _shuffled_logistic(
    folds: list[_Fold], labels: Labels, k: int, chosen: list[int], n: int, seed: int
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    topic = folds[0].inputs.topics
    top1, auc = [], []
    for _ in range(n):
        y = stats.shuffle_within(labels, topic, rng)
        scores = np.zeros((len(y), k))
        for fold, j in zip(folds, chosen, strict=True):
            inside = fold.inside.numpy()
            scores[inside] = stats.logistic_scores(fold.train[:, j].numpy(), y[~inside], fold.test[:, j].numpy())
        top1.append(stats.top_k(scores, y).mean())
        auc.append(stats.macro_auc(scores, y))
    return {"top1": np.array(top1), "auc": np.array(auc)}


def _embed(inputs: Inputs) -> Array:
    return inputs.main.embed.numpy()


def _words(inputs: Inputs, labels: Labels, estimator: Literal["logistic", "mean_difference"]) -> Array:
    names = [f"{y:04d}" for y in labels]  # sorts as the labels do
    return stats.tfidf_scores(
        inputs.texts, names, inputs.topics, inputs.folds, inputs.emotions.language, estimator=estimator
    )


def _form(inputs: Inputs) -> Array:
    """Form of each story, on one scale; the scale uses all stories but no label."""
    x = stats.form_features(inputs.texts, inputs.emotions.language)
    return (x - x.mean(0)) / x.std(0).clip(1e-12)


def _centroids(inputs: Inputs, x: Array, labels: Labels, k: int) -> Array:
    return stats.heldout_scores(
        lambda a, b: stats.centroid_scores(x[a], labels[a], x[b], k), inputs.topics, inputs.folds, k
    )

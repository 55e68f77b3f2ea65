"""Do directions tell emotions apart on topics they never saw, and better than words alone?

Outer folds are whole topics. Inside a fold everything is fitted on training topics: vectors, neutral components, reference mean,
spread, layer, TF-IDF vocabulary. Margins are paired, like against like: centred mean difference with TF-IDF centroids and embedding
centroids, logistic with TF-IDF logistic and embedding logistic, on the same held-out texts with a bootstrap over topics. The null is this
whole procedure with labels shuffled within topic (`refit.against_shuffled`); regressions, which are slow, go through it with `full`. A third
twin sees only how a story is built (`stats.form_features`): what it reads, a direction may be reading too. It is not a clean null: in
`emotions171` forms were dealt out so that an emotion has each once, a form seen in training is then one that the held-out story does *not*
have, and the twin lies below chance by design (AUC .43), so a margin over it says nothing there.
Primary row: top-1 of the emotions, mean difference, calibrated, layer chosen inside the fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from emolens import stats
from emolens.directions.algebra import project
from emolens.directions.estimators import lda, pca
from emolens.experiments.base import Inputs, Row, judged, row
from emolens.experiments.fitting import Fit, Training, against_shuffled, fitted

NAME = "separability"
METRICS = ("top1", "top5", "auc")
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
    out: list[Row] = []
    folds = [Training(inputs, held) for held in inputs.folds]
    for what, labels in (("emotion", inputs.labels), ("family", inputs.family_labels)):
        if len(np.unique(labels)) < 2 or (
            what == "family" and len(np.unique(labels)) == len(inputs.emotions.names)
        ):
            continue
        k = int(labels.max()) + 1
        tag = say | {"emotion": None, "estimator": "mean_difference"}
        fits = [fold.fit(labels) for fold in folds]
        nested = _readouts(folds, fits, labels)
        calibrated = nested["calibrated"]
        primary = what == "emotion"
        twins = {
            "tfidf": _words(inputs, labels, "mean_difference"),
            "embed": _centroids(inputs, _embed(inputs), labels, k),
            "form": _centroids(inputs, _form(inputs), labels, k),
        }
        null = against_shuffled(
            lambda y: _measures(folds, y), labels, inputs.topics, seed=inputs.seed
        )[1]
        out += _judge(
            f"{what}",
            calibrated,
            labels,
            inputs,
            tag | {"readout": "calibrated", "layer": "nested"},
            primary=primary,
            null=null,
        )
        out += _margins(
            what,
            nested["centred"],
            twins,
            labels,
            inputs,
            tag | {"layer": "nested", "readout": "centred"},
        )
        if what == "emotion":
            for readout, scores in nested.items():
                if readout != "calibrated":
                    out += _judge(
                        what, scores, labels, inputs, tag | {"readout": readout, "layer": "nested"}
                    )
            out += _by_layer(folds, labels, k, inputs, tag, twins["embed"])
            out += _per_emotion(calibrated, inputs, tag, n_random=200 if not inputs.full else 1000)
            out += _other_estimators(
                inputs, labels, k, nested_layers=[f.slot for f in fits], say=say
            )
        out += _logistic(inputs, folds, labels, k, what, say)
    return out


def held_out_scores(folds: Sequence[Training], labels: Labels) -> Array:
    """Calibrated scores `[text emotion]` of every story by directions, layer and spread of a fold that held its topic out."""
    out = np.full((len(labels), int(labels.max()) + 1), np.nan)
    for fold in folds:
        out[fold.inside.numpy()] = fold.fit(labels).z(fold.test)
    return out


def _measures(folds: Sequence[Training], labels: Labels) -> list[float]:
    """What `METRICS` names, of one labelling: judged against that very labelling, for a null breaks the classifier, not the truth."""
    scores = held_out_scores(folds, labels)
    return [
        stats.top_k(scores, labels).mean(),
        stats.top_k(scores, labels, 5).mean(),
        stats.macro_auc(scores, labels),
    ]


def _readouts(folds: Sequence[Training], fits: Sequence[Fit], labels: Labels) -> dict[str, Array]:
    """Held-out scores at each fold's own layer, for every kind of readout."""
    kinds = ("calibrated", "centred", "neutral-centred", "uncentred", "uncentred cosine")
    out = {kind: np.full((len(labels), int(labels.max()) + 1), np.nan) for kind in kinds}
    for fold, fit in zip(folds, fits, strict=True):
        inside = fold.inside.numpy()
        out["calibrated"][inside], out["centred"][inside] = fit.z(fold.test), fit.centred(fold.test)
        raw = out["uncentred"][inside] = fit.centred(fold.test, torch.zeros_like(fit.reference))
        # cosine: the same vector for all texts of a row, so only comparisons between texts change
        norm = torch.linalg.vector_norm(fold.test[:, fit.slot], dim=-1, keepdim=True).numpy()
        out["uncentred cosine"][inside] = raw / norm
        neutral = fold.inputs.acts.select(
            lambda t, held=fold.held: t.split == "neutral" and t.topic not in held
        )
        if not neutral.texts and any(t.split == "neutral" for t in fold.inputs.acts.texts):
            raise ValueError(
                f"all neutral texts are of the held-out topics {', '.join(fold.held)}: give neutral texts on more topics"
            )
        if neutral.texts:
            out["neutral-centred"][inside] = fit.centred(
                fold.test, neutral.rows[:, fit.slot].mean(0)
            )
    return {kind: s for kind, s in out.items() if np.isfinite(s).all()}


def _judge(
    what: str,
    scores: Array,
    labels: Labels,
    inputs: Inputs,
    tag: dict,
    *,
    primary: bool = False,
    null: Array | None = None,
) -> list[Row]:
    """Top-1, top-5 and AUC of one table of held-out scores, with chance and the shuffled-label null."""
    k = scores.shape[1]
    out = []
    for metric, correct in (
        ("top1", stats.top_k(scores, labels)),
        ("top5", stats.top_k(scores, labels, 5)),
    ):
        if metric == "top5" and k < 12:
            continue
        estimate = stats.bootstrap_mean(correct.astype(float), inputs.topics, seed=inputs.seed)
        extra = (
            {}
            if null is None
            else judged(estimate.value, null[:, METRICS.index(metric)], "shuffled labels")
        )
        out.append(
            row(
                NAME,
                f"{what} {metric}",
                estimate,
                primary=primary and metric == "top1",
                **(tag | extra),
            )
        )
    auc = stats.bootstrap(
        lambda i: stats.macro_auc(scores[i], labels[i]), inputs.topics, n=300, seed=inputs.seed
    )
    extra = (
        {} if null is None else judged(auc.value, null[:, METRICS.index("auc")], "shuffled labels")
    )
    out.append(row(NAME, f"{what} auc", auc, **(tag | extra)))
    if primary or (
        what == "family" and tag["estimator"] == "mean_difference"
    ):  # once for all estimators
        out.append(
            row(
                NAME,
                f"{what} top1",
                1 / k,
                **(tag | {"control": "chance", "readout": None, "estimator": None, "layer": None}),
            )
        )
    return out


def _margins(
    what: str, scores: Array, twins: dict[str, Array], labels: Labels, inputs: Inputs, tag: dict
) -> list[Row]:
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
            lambda i, twin=twin: stats.macro_auc(twin[i], labels[i]),
            inputs.topics,
            n=300,
            seed=inputs.seed,
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
            lambda i, twin=twin: (
                stats.macro_auc(scores[i], labels[i]) - stats.macro_auc(twin[i], labels[i])
            ),
            inputs.topics,
            n=300,
            seed=inputs.seed,
        )
        out.append(row(NAME, f"{what} auc minus {name}", margin, **(tag | {"control": name})))
    return out


def _by_layer(
    folds: Sequence[Training], labels: Labels, k: int, inputs: Inputs, tag: dict, embed: Array
) -> list[Row]:
    """The curve over layers (each layer reported as it is: no choice, so no selection), neutral components of each fold's own."""
    y = torch.from_numpy(labels)
    scores = np.zeros((len(labels), k, len(inputs.acts.layers)))
    for fold in folds:
        scores[fold.inside.numpy()] = project(
            fold.test, *fitted(fold.train, y[~fold.inside], fold.components)
        )
    out = []
    for j, layer in enumerate(inputs.acts.layers):
        correct = stats.top_k(scores[:, :, j], labels).astype(float)
        fields = tag | {"readout": "centred", "layer": layer}
        out.append(
            row(
                NAME,
                "emotion top1 by layer",
                stats.bootstrap_mean(correct, inputs.topics, seed=inputs.seed),
                **fields,
            )
        )
        out.append(
            row(NAME, "emotion auc by layer", stats.macro_auc(scores[:, :, j], labels), **fields)
        )
    fields = tag | {"readout": "centred", "layer": "embed", "control": "embed"}
    out.append(
        row(
            NAME,
            "emotion top1 by layer",
            stats.bootstrap_mean(
                stats.top_k(embed, labels).astype(float), inputs.topics, seed=inputs.seed
            ),
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
    random = (
        x @ (x.T @ torch.randn(len(x), n_random, generator=generator, dtype=torch.float64))
    ).numpy()
    null = np.stack(
        [
            stats.multilabel_auc(random, np.repeat(inputs.labels[:, None] == e, n_random, 1))
            for e in range(len(auc))
        ]
    )
    null = np.maximum(null, 1 - null)  # the sign of a random direction is free
    p = [stats.permutation_p(a, null[e]) for e, a in enumerate(auc)]
    q = stats.benjamini_hochberg(p)
    fields = tag | {"readout": "calibrated", "layer": "nested", "control": "random directions"}
    each = stats.bootstrap_each(
        lambda i: stats.auc_by_class(scores[i], inputs.labels[i]),
        inputs.topics,
        n=200,
        seed=inputs.seed,
    )
    return [
        row(NAME, "emotion auc one-vs-rest", each[e],
            **(fields | {"emotion": name, "null_mean": float(null[e].mean()), "null_high": float(np.percentile(null[e], 95)), "p": p[e], "q": float(q[e])}))
        for e, name in enumerate(inputs.emotions.names)
    ]  # fmt: skip


def _other_estimators(
    inputs: Inputs, labels: Labels, k: int, nested_layers: list[int], say: dict
) -> list[Row]:
    """LDA and PCA at the layers that the mean difference chose inside each fold."""
    out = []
    for name, estimator in (("lda", lda), ("pca", pca)):
        scores = np.full((len(labels), k), np.nan)
        for held, slot in zip(inputs.folds, nested_layers, strict=True):
            v = estimator(inputs.without(held).at([inputs.acts.layers[slot]]))
            inside = np.isin(np.asarray(inputs.topics), held)
            scores[inside] = v.z(inputs.main.rows[torch.from_numpy(inside)][:, [slot]])[
                :, :, 0
            ].numpy()
        out += _judge(
            "emotion",
            scores,
            labels,
            inputs,
            say | {"estimator": name, "readout": "calibrated", "layer": "nested"},
        )
    return out


def _logistic(
    inputs: Inputs, folds: Sequence[Training], labels: Labels, k: int, what: str, say: dict
) -> list[Row]:
    """Logistic regression on activations against its twins on TF-IDF and on embeddings; layer chosen inside on a coarse grid."""
    embed, form = np.full((2, len(labels), k), np.nan)
    e, f = _embed(inputs), _form(inputs)
    for fold in folds:
        inside, y = fold.inside.numpy(), labels[~fold.inside.numpy()]
        embed[inside] = stats.logistic_scores(e[~inside], y, e[inside])
        form[inside] = stats.logistic_scores(f[~inside], y, f[inside])
    twins = {"tfidf": _words(inputs, labels, "logistic"), "embed": embed, "form": form}

    def measures(y: Labels) -> list[float]:
        found = _logistic_scores(folds, y, full=True)
        return [
            stats.top_k(found, y).mean(),
            stats.top_k(found, y, 5).mean(),
            stats.macro_auc(found, y),
        ]

    scores, null = _logistic_scores(folds, labels, full=inputs.full), None
    if inputs.full:
        null = against_shuffled(measures, labels, inputs.topics, seed=inputs.seed)[1]
    tag = say | {"estimator": "logistic", "layer": "nested", "readout": "decision"}
    return _judge(what, scores, labels, inputs, tag, null=null) + _margins(
        what, scores, twins, labels, inputs, tag
    )


def _logistic_scores(folds: Sequence[Training], labels: Labels, *, full: bool) -> Array:
    """Decision values `[text class]` of held-out stories, the layer of each fold chosen by one inner split."""
    out = np.full((len(labels), int(labels.max()) + 1), np.nan)
    for fold in folds:
        inside, n_layers = fold.inside.numpy(), fold.train.shape[1]
        y, there = labels[~inside], np.isin(np.asarray(fold.topics), fold.folds[0])
        best, chosen = -1.0, 0
        for j in range(n_layers - 1, -1, -(1 if full else max(1, n_layers // 6))):
            x = fold.train[:, j].numpy()
            right = stats.top_k(
                stats.logistic_scores(x[~there], y[~there], x[there]), y[there]
            ).mean()
            if right >= best:  # of equal ones the earliest
                best, chosen = right, j
        out[inside] = stats.logistic_scores(
            fold.train[:, chosen].numpy(), y, fold.test[:, chosen].numpy()
        )
    return out


def _embed(inputs: Inputs) -> Array:
    return inputs.main.embed.numpy()


def _words(
    inputs: Inputs, labels: Labels, estimator: Literal["logistic", "mean_difference"]
) -> Array:
    names = [f"{y:04d}" for y in labels]  # sorts as the labels do
    return stats.tfidf_scores(
        inputs.texts,
        names,
        inputs.topics,
        inputs.folds,
        inputs.emotions.language,
        estimator=estimator,
    )


def _form(inputs: Inputs) -> Array:
    """Form of each story, on one scale; the scale uses all stories but no label."""
    x = stats.form_features(inputs.texts, inputs.emotions.language)
    return (x - x.mean(0)) / x.std(0).clip(1e-12)


def _centroids(inputs: Inputs, x: Array, labels: Labels, k: int) -> Array:
    return stats.heldout_scores(
        lambda a, b: stats.centroid_scores(x[a], labels[a], x[b], k), inputs.topics, inputs.folds, k
    )

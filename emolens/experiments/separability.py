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

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from emolens import stats
from emolens.directions.algebra import mean_differences, project
from emolens.directions.estimators import lda, pca
from emolens.experiments.base import Experiment, Findings, Inputs, Picture, Stories, Table, View
from emolens.experiments.drawing import BLUE, GREEN, GREY, INK, ORANGE, canvas, known, margins
from emolens.experiments.fitting import Fit, Training, against_shuffled
from emolens.experiments.rows import Row, find, judged, row
from emolens.experiments.rules import MAIN, Claim, interval, margin_claim, number, percent, rows_of

NAME = "separability"
METRICS = ("top1", "top5", "auc")
Array = NDArray[np.floating]
Labels = NDArray[np.integer]
Say = Callable[..., Row]  # `rows.row` with the fields that a part has in common


def run(inputs: Inputs) -> Findings:
    """All rows of the experiment."""
    s, out = inputs.stories, []
    say = partial(
        row, NAME, hook=s.acts.hook_point, n=len(s.labels), unit_of_n="stories", seed=inputs.seed, split="held-out topics"
    )  # fmt: skip
    folds = [Training(s, held) for held in s.folds]
    for what, labels in (("emotion", s.labels), ("family", s.family_labels)):
        k = int(labels.max()) + 1
        if k < 2 or (what == "family" and k == len(s.emotions.names)):
            continue
        ours = partial(say, estimator="mean_difference")
        nested = partial(ours, layer="nested")
        fits = [fold.fit(labels) for fold in folds]
        scores = _readouts(folds, fits, labels)
        twins = {
            "tfidf": _words(s, labels, "mean_difference"),
            "embed": _centroids(s, s.main.embed.numpy(), labels, k),
            "form": _centroids(s, _form(s), labels, k),
        }
        null = against_shuffled(lambda y: _measures(folds, y), labels, s.topics, seed=inputs.seed)[
            1
        ]
        calibrated, main = scores["calibrated"], what == "emotion"
        out += _judge(
            what,
            calibrated,
            labels,
            inputs,
            partial(nested, readout="calibrated"),
            primary=main,
            chance=True,
            null=null,
        )
        out += _margins(
            what, scores["centred"], twins, labels, inputs, partial(nested, readout="centred")
        )
        if main:
            for readout, read in scores.items():
                if readout != "calibrated":
                    out += _judge(what, read, labels, inputs, partial(nested, readout=readout))
            out += _by_layer(
                folds, labels, k, inputs, partial(ours, readout="centred"), twins["embed"]
            )
            out += _per_emotion(calibrated, inputs, nested, n_random=1000 if inputs.full else 200)
            out += _other_estimators(inputs, labels, k, [f.slot for f in fits], say)
        out += _logistic(inputs, folds, labels, k, what, say)
    return Findings(out)


def held_out_scores(folds: Sequence[Training], labels: Labels) -> Array:
    """Calibrated scores `[text emotion]` of every story by directions, layer and spread of a fold that held its topic out."""
    out = np.full((len(labels), int(labels.max()) + 1), np.nan)
    for fold in folds:
        out[fold.inside.numpy()] = fold.fit(labels).z(fold.test)
    return out


def _measures(folds: Sequence[Training], labels: Labels) -> list[float]:
    """What `METRICS` names, of one labelling: judged against that very labelling, for a null breaks the classifier, not the truth."""
    return _measured(held_out_scores(folds, labels), labels)


def _measured(scores: Array, labels: Labels) -> list[float]:
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
        neutral = fold.stories.acts.select(
            lambda t, held=fold.held: t.split == "neutral" and t.topic not in held
        )
        if not neutral.texts and any(t.split == "neutral" for t in fold.stories.acts.texts):
            raise ValueError(
                f"all neutral texts are of the held-out topics {', '.join(fold.held)}: give neutral texts on more topics"
            )
        if neutral.texts:
            out["neutral-centred"][inside] = fit.centred(
                fold.test, neutral.rows[:, fit.slot].mean(0)
            )
    return {kind: s for kind, s in out.items() if np.isfinite(s).all()}


def _judge(
    what: str, scores: Array, labels: Labels, inputs: Inputs, say: Say, *, primary: bool = False, chance: bool = False, null: Array | None = None
) -> list[Row]:  # fmt: skip
    """Top-1, top-5 and AUC of one table of held-out scores, with the shuffled-label null, and chance where it is asked for."""
    k, topics, seed, out = scores.shape[1], inputs.stories.topics, inputs.seed, []

    def against(value: float, metric: str) -> dict[str, Any]:
        return (
            {} if null is None else judged(value, null[:, METRICS.index(metric)], "shuffled labels")
        )

    for metric, best in (("top1", 1), ("top5", 5)):
        if metric == "top5" and k < 12:
            continue
        right = stats.top_k(scores, labels, best).astype(float)
        found = stats.bootstrap_mean(right, topics, seed=seed)
        first = primary and metric == "top1"
        out.append(say(f"{what} {metric}", found, primary=first, **against(found.value, metric)))
    auc = _auc(lambda i: stats.macro_auc(scores[i], labels[i]), inputs)
    out.append(say(f"{what} auc", auc, **against(auc.value, "auc")))
    if chance:  # once for all estimators
        out.append(
            say(f"{what} top1", 1 / k, control="chance", readout=None, estimator=None, layer=None)
        )
    return out


def _auc(measure: Callable[[NDArray[np.intp]], float], inputs: Inputs) -> stats.Estimate:
    return stats.bootstrap(measure, inputs.stories.topics, n=300, seed=inputs.seed)


def _margins(
    what: str, scores: Array, twins: dict[str, Array], labels: Labels, inputs: Inputs, say: Say
) -> list[Row]:
    """The twins' own figures, and the paired difference to each."""
    topics, seed, out = inputs.stories.topics, inputs.seed, []
    correct = stats.top_k(scores, labels).astype(float)
    for name, twin in twins.items():
        right = stats.top_k(twin, labels).astype(float)
        own = partial(say, control=name, layer="embed" if name == "embed" else None, readout=None)
        out.append(own(f"{what} top1", stats.bootstrap_mean(right, topics, seed=seed)))
        out.append(
            own(f"{what} auc", _auc(lambda i, t=twin: stats.macro_auc(t[i], labels[i]), inputs))
        )
        paired = stats.bootstrap_mean(correct - right, topics, seed=seed)
        out.append(say(f"{what} top1 minus {name}", paired, control=name))

        def difference(i: NDArray[np.intp], t: Array = twin) -> float:
            return stats.macro_auc(scores[i], labels[i]) - stats.macro_auc(t[i], labels[i])

        out.append(say(f"{what} auc minus {name}", _auc(difference, inputs), control=name))
    return out


def _by_layer(
    folds: Sequence[Training], labels: Labels, k: int, inputs: Inputs, say: Say, embed: Array
) -> list[Row]:
    """The curve over layers (each layer reported as it is: no choice, so no selection), neutral components of each fold's own."""
    y, layers = torch.from_numpy(labels), inputs.stories.acts.layers
    scores = np.zeros((len(labels), k, len(layers)))
    for fold in folds:
        fit = mean_differences(fold.train, y[~fold.inside], fold.components)
        scores[fold.inside.numpy()] = project(fold.test, *fit)

    def top1(read: Array) -> stats.Estimate:
        right = stats.top_k(read, labels).astype(float)
        return stats.bootstrap_mean(right, inputs.stories.topics, seed=inputs.seed)

    out = []
    for j, layer in enumerate(layers):
        out.append(say("emotion top1 by layer", top1(scores[:, :, j]), layer=layer))
        out.append(
            say("emotion auc by layer", stats.macro_auc(scores[:, :, j], labels), layer=layer)
        )
    return [*out, say("emotion top1 by layer", top1(embed), layer="embed", control="embed")]


def _per_emotion(scores: Array, inputs: Inputs, say: Say, n_random: int) -> list[Row]:
    """One-vs-rest AUC of each emotion against random directions drawn from the residual covariance, with q over the emotions."""
    s = inputs.stories
    auc = stats.auc_by_class(scores, s.labels)
    x = s.main.rows[:, s.acts.layers.index(inputs.layer)].double()
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(inputs.seed)
    # X^T g has the covariance of the rows: the directions in which texts really differ, not isotropic ones
    noise = torch.randn(len(x), n_random, generator=generator, dtype=torch.float64)
    random = (x @ (x.T @ noise)).numpy()
    null = np.stack(
        [
            stats.multilabel_auc(random, np.repeat(s.labels[:, None] == e, n_random, 1))
            for e in range(len(auc))
        ]
    )
    null = np.maximum(null, 1 - null)  # the sign of a random direction is free
    p = [stats.permutation_p(a, null[e]) for e, a in enumerate(auc)]
    q, high = stats.benjamini_hochberg(p), np.percentile(null, 95, axis=1)
    each = stats.bootstrap_each(
        lambda i: stats.auc_by_class(scores[i], s.labels[i]), s.topics, n=200, seed=inputs.seed
    )
    say = partial(say, readout="calibrated", control="random directions")
    return [
        say("emotion auc one-vs-rest", each[e], emotion=name, null_mean=float(null[e].mean()), null_high=float(high[e]), p=p[e], q=float(q[e]))
        for e, name in enumerate(s.emotions.names)
    ]  # fmt: skip


def _other_estimators(
    inputs: Inputs, labels: Labels, k: int, slots: list[int], say: Say
) -> list[Row]:
    """LDA and PCA at the layers that the mean difference chose inside each fold."""
    s, out = inputs.stories, []
    for name, estimator in (("lda", lda), ("pca", pca)):
        scores = np.full((len(labels), k), np.nan)
        for held, slot in zip(s.folds, slots, strict=True):
            v = estimator(s.without(held).at([s.acts.layers[slot]]))
            inside = np.isin(np.asarray(s.topics), held)
            scores[inside] = v.z(s.main.rows[torch.from_numpy(inside)][:, [slot]])[:, :, 0].numpy()
        of_name = partial(say, estimator=name, readout="calibrated", layer="nested")
        out += _judge("emotion", scores, labels, inputs, of_name)
    return out


def _logistic(
    inputs: Inputs, folds: Sequence[Training], labels: Labels, k: int, what: str, say: Say
) -> list[Row]:
    """Logistic regression on activations against its twins on TF-IDF and on embeddings; layer chosen inside on a coarse grid."""
    s = inputs.stories
    embed, form = np.full((2, len(labels), k), np.nan)
    e, f = s.main.embed.numpy(), _form(s)
    for fold in folds:
        inside, y = fold.inside.numpy(), labels[~fold.inside.numpy()]
        embed[inside] = stats.logistic_scores(e[~inside], y, e[inside])
        form[inside] = stats.logistic_scores(f[~inside], y, f[inside])
    twins = {"tfidf": _words(s, labels, "logistic"), "embed": embed, "form": form}

    def measures(y: Labels) -> list[float]:
        return _measured(_logistic_scores(folds, y, full=True), y)

    scores, null = _logistic_scores(folds, labels, full=inputs.full), None
    if inputs.full:
        null = against_shuffled(measures, labels, s.topics, seed=inputs.seed)[1]
    say = partial(say, estimator="logistic", layer="nested", readout="decision")
    return _judge(what, scores, labels, inputs, say, null=null) + _margins(
        what, scores, twins, labels, inputs, say
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
            found = stats.logistic_scores(x[~there], y[~there], x[there])
            right = stats.top_k(found, y[there]).mean()
            if right >= best:  # of equal ones the earliest
                best, chosen = right, j
        train, test = (x[:, chosen].numpy() for x in (fold.train, fold.test))
        out[inside] = stats.logistic_scores(train, y, test)
    return out


def _words(s: Stories, labels: Labels, estimator: Literal["logistic", "mean_difference"]) -> Array:
    names = [f"{y:04d}" for y in labels]  # sorts as the labels do
    return stats.tfidf_scores(
        s.texts, names, s.topics, s.folds, s.emotions.language, estimator=estimator
    )


def _form(s: Stories) -> Array:
    """Form of each story, on one scale; the scale uses all stories but no label."""
    x = stats.form_features(s.texts, s.emotions.language)
    return (x - x.mean(0)) / x.std(0).clip(1e-12)


def _centroids(s: Stories, x: Array, labels: Labels, k: int) -> Array:
    def fit_score(train: NDArray[np.intp], test: NDArray[np.intp]) -> Array:
        return stats.centroid_scores(x[train], labels[train], x[test], k)

    return stats.heldout_scores(fit_score, s.topics, s.folds, k)


def _separates(r: Row, rows: Sequence[Row], k: int) -> str:
    family = find(rows, NAME, "family top1", readout="calibrated", **MAIN)
    more = (
        f" Of the families the right one in {percent(family[0].value)} {interval(family[0], True)}."
        if family
        else ""
    )
    return (
        f"of {k} emotions mean-difference directions read the right one in {percent(r.value)} of held-out stories {interval(r, True)}; "
        f"chance is {percent(1 / k)}, and with shuffled labels 95 % of runs stay below {percent(r.null_high)}.{more}"
    )


def _form_alone(rows: Sequence[Row], k: int) -> list[Row]:
    found = find(rows, NAME, "emotion top1", control="form", estimator="mean_difference")
    return [replace(r, null_mean=1 / k) for r in found]


def _form_reads(r: Row, rows: Sequence[Row], k: int) -> str:
    return (
        f"form alone reads {percent(r.value)} {interval(r, True)} of the held-out stories (chance {percent(1 / k)}); "
        "what it reads, a direction may be reading too."
    )


def accuracy_by_layer(rows: Sequence[Row]) -> Figure:
    """Held-out top-1 at every layer, with TF-IDF, embeddings, shuffled labels and chance."""
    figure, axes = canvas()
    curve = [r for r in find(rows, NAME, "emotion top1 by layer") if r.control is None]
    x = [int(r.layer) for r in curve if r.layer is not None]
    axes.plot(
        x,
        [r.value for r in curve],
        color=ORANGE,
        marker="o",
        ms=3,
        label="mean difference, residual stream",
    )
    axes.fill_between(
        x,
        [known(r.low) for r in curve],
        [known(r.high) for r in curve],
        color=ORANGE,
        alpha=0.18,
        lw=0,
    )
    for control, colour, style, name in (
        ("tfidf", BLUE, "--", "TF-IDF, same estimator"),
        ("embed", GREEN, "-.", "embeddings, same estimator"),
        ("form", INK, (0, (5, 4)), "story form only, same estimator"),
    ):
        for r in find(rows, NAME, "emotion top1", control=control, estimator="mean_difference")[:1]:
            axes.axhline(r.value, color=colour, ls=style, lw=1.4, label=f"{name}: {r.value:.2f}")
    for r in find(
        rows, NAME, "emotion top1", control="shuffled labels", estimator="mean_difference"
    )[:1]:
        axes.axhspan(
            0,
            known(r.null_high),
            color=GREY,
            alpha=0.25,
            lw=0,
            label=f"shuffled labels, 95 % below {known(r.null_high):.2f}",
        )
    for r in find(rows, NAME, "emotion top1", control="chance")[:1]:
        axes.axhline(r.value, color=INK, lw=1, ls=":", label=f"chance: {r.value:.2f}")
    axes.set(xlabel="layer (block, resid_post)", ylabel="held-out top-1", ylim=(0, None))
    figure.set_size_inches(6.0, 4.4)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def readouts(rows: Sequence[Row]) -> Figure:
    """The same vectors read in five ways: what centring is worth."""
    figure, axes = canvas(height=2.4)
    names = ["uncentred", "uncentred cosine", "neutral-centred", "centred", "calibrated"]
    found = [
        (n, find(rows, NAME, "emotion top1", readout=n, estimator="mean_difference")) for n in names
    ]
    kept = [(n, rs[0]) for n, rs in found if rs]
    axes.barh(
        [n for n, _ in kept],
        [r.value for _, r in kept],
        color=[GREY] * (len(kept) - 1) + [ORANGE],
        height=0.62,
    )
    for i, (_, r) in enumerate(kept):
        axes.plot([known(r.low), known(r.high)], [i, i], color=INK, lw=1.2)
        axes.text(known(r.high) + 0.012, i, f"{r.value:.2f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="held-out top-1 of the same vectors")
    return figure


def _estimators(view: View) -> list[list[str]]:
    """Every estimator on the same held-out texts, above its twins."""
    kinds = (
        ("mean_difference", "calibrated"),
        ("lda", "calibrated"),
        ("pca", "calibrated"),
        ("logistic", "decision"),
    )
    lines = []
    for estimator, readout in kinds:
        for control in (None, "tfidf", "embed", "form"):
            cells = [estimator.replace("_", " ") if control is None else f"\u2003on {control}"]
            for metric in (
                "emotion top1",
                "emotion top5",
                "emotion auc",
                "family top1",
                "family auc",
            ):
                found = find(view.rows, NAME, metric, estimator=estimator)
                if control is None:
                    own = [
                        r
                        for r in found
                        if r.control in (None, "shuffled labels") and r.readout == readout
                    ]
                else:
                    own = [r for r in found if r.control == control]
                cells.append(f"{own[0].value:.2f} {interval(own[0])}" if own else "")
            if any(cells[1:]):
                lines.append(cells)
    return lines


def _each_emotion(view: View) -> list[list[str]]:
    v, lines = view.directions, []
    found = {r.emotion: r for r in find(view.rows, NAME, "emotion auc one-vs-rest")}
    for reliability, e in zip(v.reliability[:, v.slot()].tolist(), v.emotions, strict=True):
        r = found.get(e)
        near = ", ".join(f"{name} {cosine:+.2f}" for name, cosine in v[e].nearest(k=3))
        own = (
            [f"{r.value:.2f} {interval(r)}", number(r.null_high), number(r.q, 3)] if r else [""] * 3
        )
        lines.append([e, *own, number(reliability), near])
    return lines


_TOP1, _WORDS = "emotion top1 minus ", "words do better"
SEPARABILITY = Experiment(
    NAME,
    question="Can the directions tell emotions apart on topics they never saw?",
    paper=None,
    run=run,
    claims=(
        Claim("separates", "The residual stream separates emotions on topics it never saw", "above_null",
              rows_of(NAME, "emotion top1", readout="calibrated", **MAIN), _separates, "shuffled labels are read better"),
        margin_claim(NAME, "more than words", "It is more than vocabulary", _TOP1 + "tfidf", "top-1 minus the same estimator on TF-IDF", _WORDS),
        margin_claim(NAME, "more than form", "It is more than the way a story is built", _TOP1 + "form",
               "top-1 minus the same estimator on sentence lengths, punctuation and quotes", "form does better"),
        Claim("form", "A confound: the way a story is built tells emotions apart by itself", "above_chance", _form_alone, _form_reads, confound=True),
        margin_claim(NAME, "logistic: more than words", "The same with logistic regression on both sides", _TOP1 + "tfidf", "top-1 minus TF-IDF", _WORDS, estimator="logistic"),
    ),
    shows=(
        Picture(lambda view: accuracy_by_layer(view.rows), "Accuracy by layer",
            "Share of held-out stories whose own emotion scores highest, by layer. Everything is fitted on the other topics. Band: 95 % interval over topics. "
            "The dashed lines are the same estimator on word counts (TF-IDF) and on the token embeddings of the same stories: what is above them is not just vocabulary."),
        Picture(lambda view: readouts(view.rows), "Accuracy by readout",
            "One set of vectors read in five ways. Without subtracting a reference (top), the component that all texts share drowns the emotions."),
        Picture(lambda view: margins(view.rows, {"emotion top1": "top-1, held-out topics", "emotion auc": "AUC, held-out topics"}), "Paired differences",
            "The claim of a probe is its margin over the same estimator on words. Each line is a paired difference on the same texts. "
            "Story form is not a clean null where forms were dealt out evenly to each emotion (emotions171): it is below chance there by design."),
        Table(cells=_estimators, head=("estimator", "emotion top-1", "top-5", "AUC", "family top-1", "family AUC"), numeric=(1, 2, 3, 4, 5)),
        Table("Each emotion", cells=_each_emotion, numeric=(1, 2, 3, 4), folded=True,
            head=("emotion", "AUC, held-out topics", "random, 95 % below", "q", "reliability", "nearest directions (cosine)")),
    ),
)  # fmt: skip

"""Zero-shot on other people's text: the test that answers the doubts about stories written for the purpose.

Everything is fitted on the stories and frozen (directions, layer, spread); nothing is tuned on the external text. GoEmotions: macro-AUC
over the labels that the set has. EmoBank: r of the valence and arousal axes (directions weighted by human norms). Beside each: TF-IDF
and embeddings fitted on the same stories, centred and scaled in the same way (words have no neutral components to be removed); the whole
estimator on stories with shuffled labels (neutral components, scale and axis; with the layer chosen anew and at the layer that is read,
whichever is stricter); the result without the texts that name the emotion; and what a regression fitted on the external texts finds at
the same layer: what there was to be read. Primary row: macro-AUC minus TF-IDF's on GoEmotions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from emolens import stats
from emolens._typing import HookedModel
from emolens.collect.activations import Activations
from emolens.collect.forward import collect
from emolens.directions.estimators import logistic
from emolens.experiments.base import Experiment, Findings, Gate, Inputs, Picture, Table
from emolens.experiments.drawing import BLUE, INK, ORANGE, canvas, known, margins
from emolens.experiments.fitting import Labels, Training, against_shuffled, leave_out
from emolens.experiments.rows import Row, find, judged, row
from emolens.experiments.rules import MAIN, Claim, interval, margin_claim, number, rows_of
from emolens.models.tokens import encode
from emolens.readout import pooled_as
from emolens.sets.check import leaks
from emolens.sets.external import Labelled
from emolens.sets.norms import load_norms

NAME = "transfer"
Array = NDArray[np.floating]
Index = NDArray[np.intp]
MIN_POSITIVE = 5  # a label with fewer texts is not judged
QUICK = 2000  # comments read without `full`, as frequent as they are
N_RESAMPLES = 500
TWINS = (
    ("mean_difference", "tfidf"),
    ("mean_difference", "embed"),
    ("logistic", "tfidf logistic"),
    ("logistic", "embed logistic"),
)


def run(inputs: Inputs) -> Findings:
    """All rows; none without external texts."""
    judges = {"goemotions_test.tsv": GoEmotions, "emobank.csv": EmoBank}
    read = [judges[name](inputs, data) for name, data in inputs.external.items()]
    read = [r for r in read if r.asked]
    if not read:
        return Findings()
    training, frozen = Training(inputs.stories), inputs.stories.acts.layers.index(inputs.layer)

    def figures(labels: Labels) -> list[float]:
        anew = training.fit(labels)
        fits = (anew, anew if anew.slot == frozen else training.fit(labels, frozen))
        return [x for fit in fits for r in read for x in r.figures(fit.z(r.acts.rows))]

    _, both = against_shuffled(
        figures, inputs.stories.labels, inputs.stories.topics, seed=inputs.seed
    )
    nulls = np.split(
        both, 2, axis=1
    )  # [shuffle figure] with the layer chosen anew, and at the layer that is read
    out, at = [], 0
    for r in read:
        out += r.rows([null[:, at : at + len(r.asked)] for null in nulls])
        at += len(r.asked)
    return Findings(out)


def _stricter(value: float, nulls: list[Array], figure: int) -> dict[str, Any]:
    """What the null with the larger p (then the higher 95 % point) says of a figure.

    The layer was frozen for its accuracy on the stories, which shuffled labels never have: with the choice in the null they read an arbitrary
    layer, perhaps one where nothing scatters; without it the null has a step less. A reading has to beat both.
    """
    found = [judged(value, null[:, figure], "shuffled labels") for null in nulls]
    return max(found, key=lambda f: (f.get("p", 1.0), f.get("null_high", 0.0)))


class GoEmotions:
    """Macro-AUC over the labels that are a concept of the set and that enough comments have.

    Intervals resample comments and speak of these labels; one row resamples the labels too, and speaks of labels like them.
    """

    def __init__(self, inputs: Inputs, data: Labelled) -> None:
        known = inputs.stories.emotions.concepts
        data = Labelled(data.texts, [{known.get(x, x) for x in labels} for labels in data.labels])
        data = _sample(readable(inputs.model, data), inputs)
        self.inputs, self.texts = inputs, data.texts
        self.counts = {e: sum(e in ls for ls in data.labels) for e in inputs.stories.emotions.names}
        self.shared = [e for e in inputs.stories.emotions.names if self.counts[e] >= MIN_POSITIVE]
        self.asked = ["macro auc"] if self.shared else []
        if self.shared:
            self.positive = np.array([[e in ls for e in self.shared] for ls in data.labels])
            self.columns = [inputs.stories.emotions.names.index(e) for e in self.shared]
            self.acts = _collect(inputs, data.texts)

    def figures(self, scores: Array) -> list[float]:
        """The macro-AUC of a table of scores `[comment emotion]`."""
        return [self._macro(scores)]

    def _macro(self, scores: Array, rows: NDArray[np.intp] | slice = slice(None)) -> float:
        return float(np.nanmean(self._by_label(scores, rows)))

    def _by_label(self, scores: Array, rows: NDArray[np.intp] | slice = slice(None)) -> Array:
        return stats.multilabel_auc(scores[rows][:, self.columns], self.positive[rows])

    def rows(self, nulls: list[Array]) -> list[Row]:
        """All rows, from the nulls of `figures`."""
        inputs, shared, positive, columns = self.inputs, self.shared, self.positive, self.columns
        tables = _tables(inputs, self.acts, self.texts)
        ids = list(range(len(self.texts)))
        say = {
            "hook": inputs.stories.acts.hook_point,
            "layer": inputs.layer,
            "split": "goemotions",
            "n": len(ids),
            "unit_of_n": "comments",
            "seed": inputs.seed,
        }
        out = []
        for name, (scores, fields) in tables.items():
            extra = {}
            if name == "mean_difference":
                extra = _stricter(self._macro(scores), nulls, 0)
            estimate = stats.bootstrap(lambda i, s=scores: self._macro(s, i), ids, n=N_RESAMPLES)
            out.append(row(NAME, "macro auc", estimate, **(say | fields | extra)))
            if name == "mean_difference":  # for other labels than these as well
                wider = stats.bootstrap_columns(
                    lambda i, s=scores: self._by_label(s, i), ids, n=N_RESAMPLES
                )
                unit = {
                    "n": len(shared),
                    "unit_of_n": f"labels, resampled with {len(ids)} comments",
                }
                out.append(
                    row(NAME, "macro auc, labels resampled too", wider, **(say | fields | unit))
                )
        out.append(row(NAME, "macro auc", 0.5, control="chance", **say))
        ceiling = _supervised(self.acts.at([inputs.layer]), positive, inputs.seed)
        what = "supervised on these texts, cross-validated"
        highest = stats.bootstrap(
            lambda i: float(np.nanmean(stats.multilabel_auc(ceiling[i], positive[i]))),
            ids,
            n=N_RESAMPLES,
        )
        out.append(row(NAME, "macro auc", highest, estimator="logistic", control=what, **say))
        for ours, twin in TWINS:
            margin = stats.bootstrap(
                lambda i, a=tables[ours][0], b=tables[twin][0]: (
                    self._macro(a, i) - self._macro(b, i)
                ),
                ids,
                n=N_RESAMPLES,
            )
            control, primary = twin.split()[0], (ours, twin) == ("mean_difference", "tfidf")
            metric = f"macro auc minus {control}"
            out.append(
                row(NAME, metric, margin, primary=primary, control=control, estimator=ours, **say)
            )
        named = np.array(
            [
                [
                    bool(leaks(t, inputs.stories.emotions[e], inputs.stories.emotions.language))
                    for e in shared
                ]
                for t in self.texts
            ]
        )
        for name in ("mean_difference", "tfidf"):
            scores, fields = tables[name]
            estimate = stats.bootstrap(
                lambda i, s=scores: _unnamed(s[i][:, columns], positive[i], named[i]),
                ids,
                n=N_RESAMPLES,
            )
            out.append(
                row(
                    NAME,
                    "macro auc, texts that name the emotion left out",
                    estimate,
                    **(say | fields),
                )
            )
        scores, theirs = tables["mean_difference"][0], self._by_label(tables["tfidf"][0])
        each = stats.bootstrap_each(lambda i: self._by_label(scores, i), ids, n=200)
        for k, (e, ours) in enumerate(zip(shared, each, strict=True)):
            fields = {
                "emotion": e,
                "estimator": "mean_difference",
                "control": "tfidf",
                "null_mean": float(theirs[k]),
            }
            fields |= {"n": self.counts[e], "unit_of_n": f"positive of {len(ids)} comments"}
            out.append(row(NAME, "auc by label", ours, **(say | fields)))
        return out


def _supervised(acts: Activations, positive: NDArray[np.bool_], seed: int) -> Array:
    """What the layer holds: logistic regressions fitted on the external texts themselves, scored on folds they did not see."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    x = acts.rows[:, 0].double().numpy()
    out = np.zeros(positive.shape)
    for k in range(positive.shape[1]):
        for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(
            x, positive[:, k]
        ):
            mean, scale = x[train].mean(0), x[train].std(0).clip(1e-12)
            model = LogisticRegression(C=0.01, max_iter=200).fit(
                (x[train] - mean) / scale, positive[train, k]
            )
            out[test, k] = model.decision_function((x[test] - mean) / scale)
    return out


def _unnamed(scores: Array, positive: NDArray[np.bool_], named: NDArray[np.bool_]) -> float:
    """Macro-AUC where each label is judged on the texts that do not contain a word for it."""
    return float(
        np.nanmean(
            [
                stats.multilabel_auc(
                    scores[~named[:, [k]].ravel()][:, [k]], positive[~named[:, k]][:, [k]]
                )[0]
                for k in range(positive.shape[1])
            ]
        )
    )


class EmoBank:
    """Pearson r of the valence and arousal axes with the ratings of readers and writers."""

    def __init__(self, inputs: Inputs, data: Labelled) -> None:
        norms = load_norms()
        known = [e.name for e in inputs.stories.emotions.emotions if e.norm_key in norms]
        self.inputs, self.texts = inputs, data.texts
        self.columns = [inputs.stories.emotions.names.index(e) for e in known]
        self.asked = ["valence", "arousal"] if len(known) >= 4 and data.valence is not None else []
        if self.asked:
            assert data.valence is not None
            assert data.arousal is not None
            self.truth = {"valence": data.valence, "arousal": data.arousal}
            words = [norms[inputs.stories.emotions[e].norm_key or ""] for e in known]
            weights = {axis: np.array([getattr(w, axis) for w in words]) for axis in self.asked}
            self.weights = {axis: w - w.mean() for axis, w in weights.items()}
            self.acts = _collect(inputs, data.texts)

    def read(self, scores: Array, axis: str) -> Array:
        """The emotions' scores weighted by the human rating of their words, `[sentence]`."""
        return scores[:, self.columns] @ self.weights[axis]

    def figures(self, scores: Array) -> list[float]:
        """r of each axis."""
        return [stats.pearson(self.read(scores, axis), self.truth[axis]) for axis in self.asked]

    def rows(self, nulls: list[Array]) -> list[Row]:
        """All rows, from the nulls of `figures`."""
        inputs, tables, ids = (
            self.inputs,
            _tables(self.inputs, self.acts, self.texts),
            list(range(len(self.texts))),
        )
        out = []
        for k, axis in enumerate(self.asked):
            truth, given = self.truth[axis], self.truth["valence"]
            read = {name: self.read(scores, axis) for name, (scores, _) in tables.items()}
            say = {
                "hook": inputs.stories.acts.hook_point,
                "layer": inputs.layer,
                "split": "emobank",
                "n": len(ids),
                "unit_of_n": "sentences",
                "seed": inputs.seed,
                "emotion": axis,
            }
            for name, (_, fields) in tables.items():
                r = stats.bootstrap(
                    lambda i, v=read[name], t=truth: stats.pearson(v[i], t[i]), ids, n=N_RESAMPLES
                )
                extra = _stricter(r.value, nulls, k) if name == "mean_difference" else {}
                out.append(row(NAME, "r", r, **(say | fields | extra)))
            if axis == "arousal":
                partial = stats.bootstrap(
                    lambda i, v=read["mean_difference"], t=truth, g=given: stats.partial_pearson(
                        v[i], t[i], g[i]
                    ),
                    ids,
                    n=N_RESAMPLES,
                )
                out.append(
                    row(
                        NAME,
                        "partial r given valence",
                        partial,
                        **(say | tables["mean_difference"][1]),
                    )
                )
            for ours, twin in TWINS:
                margin = stats.bootstrap(
                    lambda i, a=read[ours], b=read[twin], t=truth: (
                        stats.pearson(a[i], t[i]) - stats.pearson(b[i], t[i])
                    ),
                    ids,
                    n=N_RESAMPLES,
                )
                control = twin.split()[0]
                out.append(
                    row(NAME, f"r minus {control}", margin, control=control, estimator=ours, **say)
                )
        return out


def readable(model: HookedModel, data: Labelled) -> Labelled:
    """Without the comments of a single token, which is an attention sink and no more."""
    kept = [i for i, e in enumerate(encode(model, data.texts)) if len(e.ids) > 1]
    return Labelled([data.texts[i] for i in kept], [data.labels[i] for i in kept])


def _sample(data: Labelled, inputs: Inputs) -> Labelled:
    """Everything with `full`; otherwise `QUICK` comments drawn by seed whatever their labels, so that they stay as frequent as they are."""
    if inputs.full or len(data.texts) <= QUICK:
        return data
    order = sorted(np.random.default_rng(inputs.seed).permutation(len(data.texts))[:QUICK].tolist())
    return Labelled([data.texts[i] for i in order], [data.labels[i] for i in order])


def _collect(inputs: Inputs, texts: list[str]) -> Activations:
    """The texts at every layer, for a labelling that is shuffled may choose any; pooled as the directions were made."""
    pooling = pooled_as(inputs.stories.acts.info)
    return collect(
        inputs.model,
        texts,
        inputs.stories.acts.hook_point,
        layers=inputs.stories.acts.layers,
        pooling=pooling,
    )


def _tables(inputs: Inputs, acts: Activations, texts: list[str]) -> dict[str, tuple[Array, dict]]:
    """Scores `[text emotion]` of ours and of every twin, all fitted on the same stories, centred and scaled by stories that were left out."""
    v, acts = inputs.directions.at(inputs.layer), acts.at([inputs.layer])
    k, y, stories = len(inputs.stories.emotions.names), inputs.stories.labels, inputs.stories.texts
    embed, there = inputs.stories.main.embed.numpy(), acts.embed.numpy()
    lr = logistic(inputs.stories.acts.at([inputs.layer]))

    def words(train: Index, test: Index | None) -> tuple[Array, Array]:
        others = texts if test is None else [stories[i] for i in test]
        return stats.tfidf([stories[i] for i in train], others, inputs.stories.emotions.language)

    def embeddings(train: Index, test: Index | None) -> tuple[Array, Array]:
        return embed[train], there if test is None else embed[test]

    def calibrated(
        features: Callable[..., tuple[Array, Array]],
        fit: Callable[..., Array],
        folds: Sequence[tuple[str, ...]],
    ) -> Array:
        def scores(train: Index, test: Index | None = None) -> Array:
            x, z = features(train, test)
            return fit(x, y[train], z)

        held_out = stats.heldout_scores(scores, inputs.stories.topics, folds, k)
        return (scores(np.arange(len(y))) - held_out.mean(0)) / held_out.std(0, ddof=1).clip(1e-12)

    # the topics that are left out together are those of the directions: one by one, for a regression by fold
    centroids, singly = (
        partial(stats.centroid_scores, n_classes=k),
        leave_out(inputs.stories.topics),
    )
    of_words, of_embed = {"control": "tfidf", "layer": None}, {"control": "embed", "layer": "embed"}
    means, regression = {"estimator": "mean_difference"}, {"estimator": "logistic"}
    ours = {"readout": "calibrated"}
    return {
        "mean_difference": (v.z(acts.rows)[:, :, 0].numpy(), means | ours),
        "logistic": (lr.z(acts.rows)[:, :, 0].numpy(), regression | ours),
        "tfidf": (calibrated(words, centroids, singly), means | of_words),
        "tfidf logistic": (
            calibrated(words, stats.logistic_words, inputs.stories.folds),
            regression | of_words,
        ),
        "embed": (calibrated(embeddings, centroids, singly), means | of_embed),
        "embed logistic": (
            calibrated(embeddings, stats.logistic_scores, inputs.stories.folds),
            regression | of_embed,
        ),
    }


def gate(findings: Findings) -> Gate:
    """Other people's texts, with labels or ratings that the set can be asked for."""
    return (
        Gate()
        if findings.rows
        else Gate("no external texts were given, or none of their labels is an emotion of this set")
    )


def _zero_shot(r: Row, rows: Sequence[Row], k: int) -> str:
    fitted = [
        c for c in find(rows, NAME, "macro auc") if (c.control or "").startswith("supervised")
    ]
    more = (
        f" A regression fitted on these comments finds {fitted[0].value:.2f} at the same layer: what there was to be read."
        if fitted
        else ""
    )
    n = len({x.emotion for x in find(rows, NAME, "auc by label")})
    wider = "".join(
        f"; with the labels resampled too, that is for labels like them, {interval(w)}"
        for w in find(rows, NAME, "macro auc, labels resampled too")
    )
    labels = (
        f" over {n} labels (resampled are comments, which speaks of these labels{wider})"
        if n
        else ""
    )
    return (
        f"macro-AUC {r.value:.2f} {interval(r)}{labels} against {number(r.null_mean)} (95 % below {number(r.null_high)}), "
        f"p = {number(r.p, 3)}; chance is .50.{more}"
    )


def _axis(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"r = {r.value:.2f} {interval(r)}, p = {number(r.p, 3)} against shuffled labels."


def transfer_by_label(rows: Sequence[Row]) -> Figure:
    """AUC of each GoEmotions label, zero-shot, beside TF-IDF fitted on the same stories."""
    found = sorted(find(rows, NAME, "auc by label"), key=lambda r: r.value)
    figure, axes = canvas(height=0.7 + 0.32 * max(len(found), 1))
    for i, r in enumerate(found):
        axes.plot([known(r.low), known(r.high)], [i, i], color=ORANGE, lw=2)
        axes.plot(r.value, i, "o", color=ORANGE, label="directions" if i == 0 else None)
        axes.plot(
            known(r.null_mean), i, "D", color=BLUE, mfc="white", label="TF-IDF" if i == 0 else None
        )
    axes.axvline(0.5, color=INK, lw=1, ls=":")
    axes.set_yticks(
        range(len(found)), [f"{r.emotion} (n={r.n})" for r in found], fontsize=9, parse_math=False
    )
    axes.set(xlabel="AUC (0.5 is chance)", xlim=(0.3, 1.0))
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


TRANSFER = Experiment(
    NAME,
    question="Do the directions read other people's text?",
    paper=None,
    run=run,
    gate=gate,
    claims=(
        Claim("zero-shot", "Zero-shot on other people's text (GoEmotions) the directions beat shuffled ones", "above_null",
              rows_of(NAME, "macro auc", **MAIN), _zero_shot, "shuffled directions do better"),
        margin_claim(NAME, "zero-shot: more than words", "There they do better than words", "macro auc minus tfidf",
               "macro-AUC minus TF-IDF from the same stories", "words do better"),
        *(Claim(f"{axis} axis", f"The {axis} axis reads the {axis} of EmoBank's sentences", "above_null",
                rows_of(NAME, "r", emotion=axis, **MAIN), _axis, "it reads the other way round") for axis in ("valence", "arousal")),
    ),
    shows=(
        Picture(lambda view: transfer_by_label(view.rows) if find(view.rows, NAME, "auc by label") else None, "Transfer to GoEmotions",
            "Area under the ROC curve for each label on Reddit comments (GoEmotions, Demszky et al. 2020). Diamonds: TF-IDF centroids from the same stories."),
        Picture(lambda view: margins(view.rows, {"macro auc": "AUC, GoEmotions"}) if find(view.rows, NAME, "macro auc") else None, "Paired differences on other people's text",
            "Each line is a paired difference on the same comments, to the same estimator on words or embeddings of the same stories."),
        Table("All rows", rows=lambda view: [r for r in view.rows if r.metric != "auc by label"], folded=True),
    ),
    method="Directions, layer and spread are frozen on the stories; nothing but the supervised ceiling is fitted on the texts below.",
)  # fmt: skip

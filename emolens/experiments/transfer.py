"""Zero-shot on other people's text: the test that answers the doubts about stories written for the purpose.

Everything is fitted on the stories and frozen (directions, layer, spread); nothing is tuned on the external text. GoEmotions: macro-AUC
over the labels that the set has. EmoBank: r of the valence and arousal axes (directions weighted by human norms). Beside each: TF-IDF
and embeddings fitted on the same stories in the same way, directions from stories with shuffled labels, the result without the texts that
name the emotion, and what a regression fitted on the external texts finds at the same layer: what there was to be read. Primary row: macro-AUC minus TF-IDF's on GoEmotions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emolens import stats
from emolens._files import read_text
from emolens._typing import HookedModel
from emolens.activations import Activations, collect, mean_over_tokens
from emolens.directions import class_means, logistic
from emolens.emotion_sets import load_norms
from emolens.experiments.base import Inputs, Labelled, Row, row
from emolens.models import encode
from emolens.set_checks import leaks

NAME = "transfer"
GOEMOTIONS = [
    "admiration",
    "amusement",
    "anger",
    "annoyance",
    "approval",
    "caring",
    "confusion",
    "curiosity",
    "desire",
    "disappointment",
    "disapproval",
    "disgust",
    "embarrassment",
    "excitement",
    "fear",
    "gratitude",
    "grief",
    "joy",
    "love",
    "nervousness",
    "optimism",
    "pride",
    "realization",
    "relief",
    "remorse",
    "sadness",
    "surprise",
    "neutral",
]
Array = NDArray[np.floating]
MIN_POSITIVE = 5  # a label with fewer texts is not judged


def load_goemotions(path: str | Path | None = None) -> Labelled:
    """The test split of GoEmotions (Demszky et al. 2020, CC BY 4.0).

    Args:
        path: A file with text, comma-separated label ids and comment id, separated by tabs; None loads it from the hub (extra `data`).
    """
    if path is None:
        from datasets import load_dataset

        data = load_dataset("google-research-datasets/go_emotions", "simplified", split="test")
        return Labelled(list(data["text"]), [{GOEMOTIONS[i] for i in ids} for ids in data["labels"]])
    texts, labels = [], []
    for number, line in enumerate(_table(path, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
        try:
            ids = [int(i) for i in line[1].split(",")]
            if min(ids) < 0:
                raise IndexError(min(ids))
            labels.append({GOEMOTIONS[i] for i in ids})
            texts.append(line[0])
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path}:{number}: expected text, label ids 0..27 and an id, separated by tabs") from error
    if not texts:
        raise ValueError(f"{path}: empty")
    return Labelled(texts, labels)


def load_emobank(path: str | Path) -> Labelled:
    """EmoBank (Buechel & Hahn 2017, CC BY-SA 4.0): a CSV file with the columns split, V, A, text. The test split is used."""
    wanted = f"{path}: expected a CSV file with the columns split, V, A and text, and rows of the test split"
    header, *lines = _table(path) or [[]]
    try:
        at = {name: header.index(name) for name in ("split", "V", "A", "text")}
        rows = [r for r in lines if r and r[at["split"]] == "test" and r[at["text"]].strip()]
        v, a = (np.array([float(r[at[k]]) for r in rows]) for k in ("V", "A"))
    except (IndexError, ValueError) as error:
        raise ValueError(wanted) from error
    if not rows:
        raise ValueError(wanted)
    if not (np.isfinite(v).all() and np.isfinite(a).all()):
        raise ValueError(f"{path}: a rating is not a finite number")
    return Labelled([r[at["text"]] for r in rows], [set() for _ in rows], v, a)


def _table(path: str | Path, **form: Any) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(read_text(Path(path)), newline=""), **form))
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error


READERS: dict[str, Callable[[Path], Labelled]] = {
    "goemotions_test.tsv": load_goemotions,
    "emobank.csv": load_emobank,
}


def load_external(folder: str | Path) -> dict[str, Labelled]:
    """What a folder holds of goemotions_test.tsv and emobank.csv, by file name.

    Raises:
        FileNotFoundError: no such folder, or neither file is in it.
        ValueError: a file is not what its name says.
    """
    folder, names = Path(folder).expanduser(), " and ".join(READERS)
    if not folder.is_dir():
        raise FileNotFoundError(f"external={folder}: no such folder (expected {names} in it)")
    found = {name: read(folder / name) for name, read in READERS.items() if (folder / name).is_file()}
    if not found:
        raise FileNotFoundError(f"external={folder}: neither {' nor '.join(READERS)} is there")
    return found


def run(inputs: Inputs) -> list[Row]:
    """All rows; none without external texts."""
    judges = {"goemotions_test.tsv": goemotions, "emobank.csv": emobank}
    return [r for name, data in inputs.external.items() for r in judges[name](inputs, data)]


def goemotions(inputs: Inputs, data: Labelled) -> list[Row]:
    """Macro-AUC over the labels that are a concept of the set."""
    known = inputs.emotions.concepts
    data = _sample(Labelled(data.texts, [{known.get(x, x) for x in labels} for labels in data.labels]), inputs)
    data = readable(inputs.model, data)
    counts = {e: sum(e in ls for ls in data.labels) for e in inputs.emotions.names}
    shared = [e for e in inputs.emotions.names if counts[e] >= MIN_POSITIVE]
    if not shared:
        return []
    positive = np.array([[e in ls for e in shared] for ls in data.labels])
    columns = [inputs.emotions.names.index(e) for e in shared]
    acts = _collect(inputs, data.texts)
    tables = _tables(inputs, acts, data.texts)
    say = {
        "hook": inputs.acts.hook_point,
        "layer": inputs.layer,
        "split": "goemotions",
        "n": len(data.texts),
        "unit_of_n": "comments",
        "seed": inputs.seed,
    }
    ids = list(range(len(data.texts)))

    def macro(scores: Array, rows: NDArray[np.intp]) -> float:
        return float(np.nanmean(stats.multilabel_auc(scores[rows][:, columns], positive[rows])))

    null = _shuffled(inputs, acts, lambda scores: macro(scores, np.arange(len(ids))))
    out = []
    for name, (scores, fields) in tables.items():
        extra = {}
        if name == "mean_difference":
            extra = {
                "null_mean": float(null.mean()),
                "null_high": float(np.percentile(null, 95)),
                "control": "shuffled labels",
            }
            extra["p"] = stats.permutation_p(macro(scores, np.arange(len(ids))), null)
        out.append(
            row(
                NAME,
                "macro auc",
                stats.bootstrap(lambda i, s=scores: macro(s, i), ids, n=500),
                **(say | fields | extra),
            )
        )
    out.append(row(NAME, "macro auc", 0.5, control="chance", **say))
    ceiling = _supervised(acts, positive, inputs.seed)
    what = "supervised on these texts, cross-validated"
    out.append(
        row(
            NAME,
            "macro auc",
            stats.bootstrap(lambda i: float(np.nanmean(stats.multilabel_auc(ceiling[i], positive[i]))), ids, n=500),
            estimator="logistic",
            control=what,
            **say,
        )
    )
    for ours, twins in (("mean_difference", ("tfidf", "embed")), ("logistic", ("tfidf logistic", "embed logistic"))):
        for twin in twins:
            margin = stats.bootstrap(
                lambda i, a=ours, b=twin: macro(tables[a][0], i) - macro(tables[b][0], i), ids, n=500
            )
            primary = (ours, twin) == ("mean_difference", "tfidf")
            out.append(
                row(
                    NAME,
                    f"macro auc minus {twin.split()[0]}",
                    margin,
                    primary=primary,
                    control=twin.split()[0],
                    estimator=ours,
                    **say,
                )
            )
    named = np.array(
        [[bool(leaks(t, inputs.emotions[e], inputs.emotions.language)) for e in shared] for t in data.texts]
    )
    for name in ("mean_difference", "tfidf"):
        scores, fields = tables[name]
        estimate = stats.bootstrap(lambda i, s=scores: _unnamed(s[i][:, columns], positive[i], named[i]), ids, n=500)
        out.append(row(NAME, "macro auc, texts that name the emotion left out", estimate, **(say | fields)))
    scores = tables["mean_difference"][0]
    per = stats.multilabel_auc(scores[:, columns], positive)
    each = stats.bootstrap_each(lambda i: stats.multilabel_auc(scores[i][:, columns], positive[i]), ids, n=200)
    for k, (e, ours) in enumerate(zip(shared, each, strict=True)):
        theirs = stats.multilabel_auc(tables["tfidf"][0][:, columns], positive)[k]
        assert np.isclose(ours.value, per[k])
        fields = say | {
            "emotion": e,
            "estimator": "mean_difference",
            "control": "tfidf",
            "null_mean": float(theirs),
            "n": counts[e],
            "unit_of_n": "positive comments",
        }
        out.append(row(NAME, "auc by label", ours, **fields))
    return out


def _supervised(acts: Activations, positive: NDArray[np.bool_], seed: int) -> Array:
    """What the layer holds: logistic regressions fitted on the external texts themselves, scored on folds they did not see."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    x = acts.rows[:, 0].double().numpy()
    out = np.zeros(positive.shape)
    for k in range(positive.shape[1]):
        for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, positive[:, k]):
            mean, scale = x[train].mean(0), x[train].std(0).clip(1e-12)
            model = LogisticRegression(C=0.01, max_iter=200).fit((x[train] - mean) / scale, positive[train, k])
            out[test, k] = model.decision_function((x[test] - mean) / scale)
    return out


def _unnamed(scores: Array, positive: NDArray[np.bool_], named: NDArray[np.bool_]) -> float:
    """Macro-AUC where each label is judged on the texts that do not contain a word for it."""
    return float(
        np.nanmean(
            [
                stats.multilabel_auc(scores[~named[:, [k]].ravel()][:, [k]], positive[~named[:, k]][:, [k]])[0]
                for k in range(positive.shape[1])
            ]
        )
    )


def emobank(inputs: Inputs, data: Labelled) -> list[Row]:
    """Pearson r of the valence and arousal axes with the ratings of readers and writers."""
    norms = load_norms()
    known = [e.name for e in inputs.emotions.emotions if e.norm_key in norms]
    if len(known) < 4 or data.valence is None or data.arousal is None:
        return []
    columns = [inputs.emotions.names.index(e) for e in known]
    acts = _collect(inputs, data.texts)
    tables = _tables(inputs, acts, data.texts)
    ids = list(range(len(data.texts)))
    out = []
    for axis, truth, given in (("valence", data.valence, None), ("arousal", data.arousal, data.valence)):
        weight = np.array([getattr(norms[inputs.emotions[e].norm_key or ""], axis) for e in known])
        weight = weight - weight.mean()
        read = lambda scores, w=weight: scores[:, columns] @ w  # noqa: E731
        say = {
            "hook": inputs.acts.hook_point,
            "layer": inputs.layer,
            "split": "emobank",
            "n": len(ids),
            "unit_of_n": "sentences",
            "seed": inputs.seed,
            "emotion": axis,
        }
        null = _shuffled(inputs, acts, lambda scores, read=read, truth=truth: stats.pearson(read(scores), truth))
        for name, (scores, fields) in tables.items():
            value = read(scores)
            extra = {}
            if name == "mean_difference":
                p = stats.permutation_p(stats.pearson(value, truth), null)
                extra = {
                    "null_mean": float(null.mean()),
                    "null_high": float(np.percentile(null, 95)),
                    "control": "shuffled labels",
                    "p": p,
                }
            out.append(
                row(
                    NAME,
                    "r",
                    stats.bootstrap(lambda i, v=value, t=truth: stats.pearson(v[i], t[i]), ids, n=500),
                    **(say | fields | extra),
                )
            )
            if given is not None and name == "mean_difference":
                partial = stats.bootstrap(
                    lambda i, v=value, t=truth, g=given: stats.partial_pearson(v[i], t[i], g[i]), ids, n=500
                )
                out.append(row(NAME, "partial r given valence", partial, **(say | fields)))
        for ours, twins in (
            ("mean_difference", ("tfidf", "embed")),
            ("logistic", ("tfidf logistic", "embed logistic")),
        ):
            for twin in twins:
                a, b = read(tables[ours][0]), read(tables[twin][0])
                margin = stats.bootstrap(
                    lambda i, a=a, b=b, t=truth: stats.pearson(a[i], t[i]) - stats.pearson(b[i], t[i]), ids, n=500
                )
                out.append(
                    row(NAME, f"r minus {twin.split()[0]}", margin, control=twin.split()[0], estimator=ours, **say)
                )
    return out


def readable(model: HookedModel, data: Labelled) -> Labelled:
    """Without the comments of a single token, which is an attention sink and no more."""
    kept = [i for i, e in enumerate(encode(model, data.texts)) if len(e.ids) > 1]
    return Labelled([data.texts[i] for i in kept], [data.labels[i] for i in kept])


def _sample(data: Labelled, inputs: Inputs) -> Labelled:
    """Everything with `full`; otherwise up to 80 comments of each shared label and 500 others, by seed (an AUC does not see prevalence)."""
    if inputs.full:
        return data
    rng = np.random.default_rng(inputs.seed)
    keep: set[int] = set()
    for e in inputs.emotions.names:
        own = [i for i, ls in enumerate(data.labels) if e in ls]
        keep |= set(rng.permutation(own)[:80].tolist())
    others = [i for i, ls in enumerate(data.labels) if not ls & set(inputs.emotions.names)]
    keep |= set(rng.permutation(others)[:500].tolist())
    order = sorted(keep)
    return Labelled([data.texts[i] for i in order], [data.labels[i] for i in order])


def _collect(inputs: Inputs, texts: list[str]) -> Activations:
    pooling = mean_over_tokens(skip=1)
    return collect(inputs.model, texts, inputs.acts.hook_point, layers=[inputs.layer], pooling=pooling)


def _tables(inputs: Inputs, acts: Activations, texts: list[str]) -> dict[str, tuple[Array, dict]]:
    """Scores `[text emotion]` of ours and of every twin, all fitted on the same stories."""
    v = inputs.directions.at(inputs.layer)
    k, y = len(inputs.emotions.names), inputs.labels
    words, there = stats.tfidf(inputs.texts, texts, inputs.emotions.language)
    embed = inputs.main.embed.numpy()
    lr = logistic(inputs.acts.at([inputs.layer]))
    return {
        "mean_difference": (v.z(acts.rows)[:, :, 0].numpy(), {"estimator": "mean_difference", "readout": "calibrated"}),
        "logistic": (lr.z(acts.rows)[:, :, 0].numpy(), {"estimator": "logistic", "readout": "calibrated"}),
        "tfidf": (
            stats.centroid_scores(words, y, there, k),
            {"estimator": "mean_difference", "control": "tfidf", "layer": None},
        ),
        "tfidf logistic": (
            stats.logistic_words(words, y, there),
            {"estimator": "logistic", "control": "tfidf", "layer": None},
        ),
        "embed": (
            stats.centroid_scores(embed, y, acts.embed.numpy(), k),
            {"estimator": "mean_difference", "control": "embed", "layer": "embed"},
        ),
        "embed logistic": (
            stats.logistic_scores(embed, y, acts.embed.numpy()),
            {"estimator": "logistic", "control": "embed", "layer": "embed"},
        ),
    }


def _shuffled(inputs: Inputs, acts: Activations, judge: Callable[[Array], float], n: int = 100) -> Array:
    """The same judgement of directions from stories whose labels were shuffled within their topic."""
    rng = np.random.default_rng(inputs.seed)
    topic, slot = inputs.topics, inputs.acts.layers.index(inputs.layer)
    rows = inputs.main.rows[:, slot]
    out = []
    for _ in range(n):
        y = stats.shuffle_within(inputs.labels, topic, rng)
        means = class_means(rows[:, None], torch.from_numpy(y))[:, 0]
        vectors = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
        out.append(judge(((acts.rows[:, 0] - means.mean(0)) @ vectors.T).numpy()))
    return np.array(out)

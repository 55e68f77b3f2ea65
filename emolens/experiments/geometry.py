"""The geometry of the directions against human ratings, and how sure it is.

Components 1-3 of the unit vectors of *all* emotions against valence and arousal of those that a table rates: signed r (the sign of a
component is fixed by `geometry.components`, without the norms) with an interval over words and a two-sided permutation null of the maximum
over every component, layer and table that could have been looked at; the same from the embeddings; a ridge regression over held-out words,
each r beside that of permuted words through the same cross-validation, which is below 0 by construction, and not asked of fewer than
`geometry.RIDGE_WORDS` words; RSA; RSA with the distance in story form (`stats.form_features`); clusters against families; reliability; similarity
of layers; how far the two tables agree. Intervals of what is measured on pairs resample emotions. Headline: exact word forms, without
and with rows that rate one sense of a word; other forms of a word are a sensitivity row. Below `FEW` rated words there is no r, below
`UNDERPOWERED` no claim, and the rows say so: claims about geometry belong to a set of many words. Primary row: r of the
component, of 1-3, with the largest |r| with valence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from emolens import geometry, stats
from emolens.directions.algebra import mean_differences
from emolens.experiments.base import Experiment, Findings, Inputs, Picture, Table, View
from emolens.experiments.drawing import INK, RELIABLE, canvas, circumplex, cosine_matrix
from emolens.experiments.rows import Row, find, judged, row
from emolens.experiments.rules import Claim, interval, number, primary_of
from emolens.sets.norms import load_norms, norm_of

NAME = "geometry"
TABLES = ("glasgow_2019", "russell_mehrabian_1977")
EXACT = "exact form"
# which rows of a table are taken; the headline is given without and with rows of a sense
FORMS = {
    EXACT: ("exact",),
    "exact form or a sense of it": ("exact", "sense"),
    "exact, sense or related form": ("exact", "sense", "related"),
}
UNDERPOWERED = 30  # words; below this an interval on r is about .4 wide at best
FEW = 6  # words; below this no r is given


def run(inputs: Inputs) -> Findings:
    """All rows."""
    v = inputs.directions
    say = {
        "hook": v.hook_point,
        "layer": inputs.layer,
        "estimator": "mean_difference",
        "seed": inputs.seed,
    }
    layers = [geometry.components(v.vectors[:, k].numpy())[0] for k in range(len(v.layers))]
    exact: dict[str, dict[int, Any]] = {}
    out: list[Row] = []
    for table in TABLES:
        if 0 < len(few := _rated(inputs, table, ("exact",))) < FEW:
            reason = f"cannot be asked: fewer than {FEW} rated words"
            at = say | _words(few, f"{table}, {EXACT}") | {"control": reason}
            out += [
                row(NAME, f"r of PC1-3 with {axis}", float("nan"), emotion=axis, **at)
                for axis in ("valence", "arousal")
            ]
    before: dict[str, dict[int, Any]] = {}
    for form, kinds in FORMS.items():
        rated = {t: r for t in TABLES if len(r := _rated(inputs, t, kinds)) >= FEW}
        if rated == before:  # no table, or no other rows to add
            continue
        before = rated
        exact = rated if form == EXACT else exact
        for axis in ("valence", "arousal"):
            tables = [
                (list(r), np.array([getattr(n, axis) for n in r.values()])) for r in rated.values()
            ]
            null = geometry.axis_null(layers, tables, seed=inputs.seed)
            for table, words in rated.items():
                at = say | _words(words, f"{table}, {form}") | {"emotion": axis}
                first = rated is exact and table == next(iter(exact)) and axis == "valence"
                out += _axis(
                    inputs, words, axis, layers[v.slot(inputs.layer)], null, at, primary=first
                )
    for table, words in exact.items():
        out += _plane(inputs, words, say | _words(words, f"{table}, {EXACT}"))
    return Findings(out + _agreement(inputs) + _similarity(inputs, say))


def _words(rated: dict[int, Any], split: str) -> dict[str, Any]:
    power = "" if len(rated) >= UNDERPOWERED else ", underpowered"
    return {"n": len(rated), "unit_of_n": f"words{power}", "split": split}


def _rated(inputs: Inputs, table: str, kinds: tuple[str, ...]) -> dict[int, Any]:
    """The emotions that a table rates in these forms, by their row."""
    found = {
        k: norm_of(inputs.stories.emotions[e], table)
        for k, e in enumerate(inputs.directions.emotions)
    }
    return {k: norm for k, (norm, kind) in found.items() if kind in kinds}


def _axis(
    inputs: Inputs,
    rated: dict[int, Any],
    axis: str,
    scores: np.ndarray,
    null: np.ndarray,
    at: dict,
    *,
    primary: bool,
) -> list[Row]:
    """Components and ridge of one table and axis, with the embeddings' beside them."""
    v, known = inputs.directions, list(rated)
    norm = np.array([getattr(n, axis) for n in rated.values()])
    embed = _embed(inputs)
    twin = geometry.components(embed.astype(np.float32))[0][known]
    fits = geometry.axis_table(scores[known], norm, null, seed=inputs.seed)
    best = max(fits, key=lambda f: abs(f.r.value))
    searched = "permuted words, max of |r| over components, layers and tables"
    out = [
        row(NAME, f"r of PC{f.component} with {axis}", f.r, primary=primary and f is best, **(at | judged(abs(f.r.value), null, searched)))
        for f in fits
    ]  # fmt: skip
    ids = list(range(len(known)))
    # component and sign are chosen on all words and then kept, so that the interval is not one of maxima
    along, theirs = (_best(x, norm) for x in (scores[known], twin))
    margin = stats.bootstrap(
        lambda i: stats.pearson(along[i], norm[i]) - stats.pearson(theirs[i], norm[i]),
        ids,
        seed=inputs.seed,
    )
    out.append(
        row(NAME, f"highest |r| of PC1-3 with {axis} minus embed", margin, control="embed", **at)
    )
    if len(known) < geometry.RIDGE_WORDS:
        reason = f"cannot be asked: fewer than {geometry.RIDGE_WORDS} rated words"
        return [
            *out,
            row(NAME, f"ridge r with {axis}, held-out words", float("nan"), control=reason, **at),
        ]
    vectors = v.vectors[known, v.slot(inputs.layer)].numpy()
    rng = np.random.default_rng(inputs.seed)
    every = np.column_stack([norm, *(rng.permutation(norm) for _ in range(100))])
    found = {}
    for name, x in (("permuted words", vectors), ("embed, permuted words", embed[known])):
        predicted = geometry.ridge_heldout(x, every)
        chance = np.array(
            [stats.pearson(p, y) for p, y in zip(predicted.T, every.T, strict=True)][1:]
        )
        found[name] = (predicted[:, 0], chance)
        r = stats.bootstrap(
            lambda i, p=predicted[:, 0]: stats.pearson(p[i], norm[i]), ids, seed=inputs.seed
        )
        out.append(
            row(
                NAME,
                f"ridge r with {axis}, held-out words",
                r,
                **(at | judged(r.value, chance, name)),
            )
        )
    (ours, chance), (twin, of_twin) = found.values()
    margin = stats.bootstrap(
        lambda i: stats.pearson(ours[i], norm[i]) - stats.pearson(twin[i], norm[i]),
        ids,
        seed=inputs.seed,
    )
    against = judged(margin.value, chance - of_twin, "embed") | {"p": None}
    out.append(row(NAME, f"ridge r with {axis} minus embed", margin, **(at | against)))
    return out


def _best(scores: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """The component with the largest |r|, turned so that its r is positive."""
    r = [stats.pearson(scores[:, k], norm) for k in range(scores.shape[1])]
    k = int(np.nanargmax(np.abs(r)))
    return scores[:, k] * np.sign(r[k])


def _agreement(inputs: Inputs) -> list[Row]:
    """How well the two tables agree on the set's own words: what an r with either is to be read beside."""
    a, b = (load_norms(t) for t in TABLES)
    words = [
        e.norm_key for e in inputs.stories.emotions.emotions if e.norm_key in a and e.norm_key in b
    ]
    if len(words) < FEW:
        return []
    out = []
    for axis in ("valence", "arousal"):
        x, y = (np.array([getattr(t[w or ""], axis) for w in words]) for t in (a, b))
        r = stats.bootstrap(
            lambda i, x=x, y=y: stats.pearson(x[i], y[i]), list(range(len(words))), seed=inputs.seed
        )
        out.append(
            row(
                NAME,
                f"r of the two tables in {axis}",
                r,
                emotion=axis,
                n=len(words),
                unit_of_n="words",
            )
        )
    return out


def _plane(inputs: Inputs, rated: dict[int, Any], at: dict) -> list[Row]:
    """RSA and Procrustes against the valence-arousal plane, and the partial r of arousal given valence (in Glasgow arousal rises with it)."""
    v = inputs.directions
    vectors = v.vectors[list(rated), v.slot(inputs.layer)]
    points = np.array([[n.valence, n.arousal] for n in rated.values()])
    points = (points - points.mean(0)) / points.std(0)
    rho, p = geometry.rsa(vectors.numpy(), points, seed=inputs.seed)
    every = geometry.components(v.vectors[:, v.slot(inputs.layer)].numpy())[0]  # of all emotions
    scores = every[list(rated)]
    disparity, p2 = geometry.procrustes(scores[:, :2], points, seed=inputs.seed)
    ids, rng = list(range(len(points))), np.random.default_rng(inputs.seed)

    def partials(to: np.ndarray) -> list[float]:
        return [
            stats.partial_pearson(scores[:, k], to[:, 1], to[:, 0]) for k in range(scores.shape[1])
        ]

    k = int(np.nanargmax(np.abs(partials(points))))
    partial = stats.bootstrap(
        lambda i: stats.partial_pearson(scores[i, k], points[i, 1], points[i, 0]),
        ids,
        seed=inputs.seed,
    )
    chance = np.array(
        [np.nanmax(np.abs(partials(points[rng.permutation(len(points))]))) for _ in range(1000)]
    )
    against = judged(
        abs(partial.value), chance, "permuted words, max of |partial r| over components"
    )
    return [
        row(NAME, "rsa with valence-arousal distance", rho, p=p, control="Mantel", **at),
        row(
            NAME,
            "procrustes disparity of PC1-2 and valence-arousal",
            disparity,
            p=p2,
            control="permuted words",
            **at,
        ),
        row(NAME, f"partial r of PC{k + 1} with arousal given valence", partial, **(at | against)),
    ]


def _similarity(inputs: Inputs, say: dict) -> list[Row]:
    """Reliability, cosines against their null, families, and how alike layers are."""
    v = inputs.directions
    slot = v.slot(inputs.layer)
    cosine = v.cosine(layer=inputs.layer).numpy()
    form = stats.form_features(inputs.stories.texts, inputs.stories.emotions.language)
    form = np.stack(
        [
            form[inputs.stories.labels == k].mean(0)
            for k in range(len(inputs.stories.emotions.names))
        ]
    )
    form_rho, form_p = geometry.rsa(
        v.vectors[:, slot].numpy(),
        (form - form.mean(0)) / form.std(0).clip(1e-12),
        seed=inputs.seed,
    )
    upper = np.triu_indices(len(cosine), 1)
    low, high = geometry.cosine_null(len(cosine), v.vectors.shape[-1], seed=inputs.seed)
    families = [inputs.stories.emotions.families[e] for e in v.emotions]
    same = np.array([families[i] == families[j] for i, j in zip(*upper, strict=True)])
    out = [
        row(NAME, "rsa with distance in story form", form_rho, p=form_p, control="Mantel", n=len(v.emotions), unit_of_n="emotions", **say),
        row(NAME, "share of cosines outside the null of random directions", float(np.mean((cosine[upper] < low) | (cosine[upper] > high))), null_high=high, null_mean=-1 / (len(cosine) - 1), control="random directions", n=len(cosine), unit_of_n="emotions", **say),
        row(NAME, "split-half reliability, median", float(v.reliability[:, slot].median()), n=len(v.emotions), unit_of_n="emotions", **say),
    ]  # fmt: skip
    out += [
        row(NAME, "split-half reliability", float(r), emotion=e, **say)
        for e, r in zip(v.emotions, v.reliability[:, slot].tolist(), strict=True)
    ]
    if same.any() and not same.all():
        family = np.array(families)

        def alike(i: np.ndarray, j: np.ndarray) -> float:
            inside = family[i] == family[j]
            return float(cosine[i, j][inside].mean()) if inside.any() else float("nan")

        within = geometry.over_pairs(alike, len(cosine), seed=inputs.seed)
        out.append(
            row(
                NAME,
                "mean cosine within a family",
                within,
                null_mean=float(cosine[upper][~same].mean()),
                control="pairs of different families",
                n=len(cosine),
                unit_of_n="emotions",
                **say,
            )
        )
        rand, p, _ = geometry.family_agreement(
            v.vectors[:, slot].numpy(), families, seed=inputs.seed
        )
        out.append(
            row(
                NAME,
                "adjusted Rand index of clusters with families",
                rand,
                p=p,
                control="permuted families",
                n=len(families),
                unit_of_n="emotions",
                **say,
            )
        )
    if len(v.layers) > 1:
        similarity = geometry.layer_rsa(v.vectors.numpy())[slot]
        out += [
            row(NAME, "rsa of layers with the reported one", float(s), **(say | {"layer": layer}))
            for layer, s in zip(v.layers, similarity, strict=True)
        ]
    return out


def _embed(inputs: Inputs) -> np.ndarray:
    embed, labels = inputs.stories.main.embed, torch.from_numpy(inputs.stories.labels)
    return mean_differences(embed[:, None], labels)[0][:, 0].numpy()


def _component(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"{r.metric} = {r.value:.2f} {interval(r)}, p = {number(r.p, 3)} for the maximum of |r| over components, layers and tables."


def _too_few_words(rows: Sequence[Row], k: int) -> str:
    """Below so many rated words the interval of an r is wide enough for either answer."""
    return "".join(
        f"{r.metric} = {r.value:.2f} {interval(r)} is of {r.n} rated words, which is underpowered; a claim about geometry needs a larger set"
        for r in primary_of(NAME)(rows, k)
        if "underpowered" in (r.unit_of_n or "")
    )


LAYERS = "rsa of layers with the reported one"


def layer_similarity(rows: Sequence[Row]) -> Figure:
    """How alike the cosine matrix of each layer is to that of the reported layer."""
    figure, axes = canvas(height=2.6)
    found = find(rows, NAME, LAYERS)
    axes.plot(
        [int(r.layer or 0) for r in found], [r.value for r in found], color=INK, marker="o", ms=3
    )
    axes.set(xlabel="layer", ylabel="RSA with the reported layer", ylim=(0, 1.02))
    return figure


def _circumplex(view: View) -> Figure:
    return circumplex(
        view.directions, load_norms(), {e.name: e.norm_key for e in view.emotions.emotions}
    )


def _related(r: Row) -> bool:
    return "related" in (r.split or "") or (r.split or "").startswith("russell")


def _tabled(view: View) -> list[Row]:
    return [r for r in view.rows if r.metric not in ("split-half reliability", LAYERS)]


GEOMETRY = Experiment(
    NAME,
    question="Does the space have the shape that people give the words?",
    paper=None,
    run=run,
    claims=(
        Claim("valence", "A leading component lines up with human valence", "rejected_maximum", primary_of(NAME), _component, gate=_too_few_words),
    ),
    shows=(
        Picture(lambda view: cosine_matrix(view.directions), "Cosine matrix",
            f"Cosines of the directions at the reported layer, ordered by similarity. Grey names: split-half reliability below {RELIABLE}. "
            "Centred directions are negative on average by construction."),
        Picture(_circumplex, "Circumplex",
            "First two components, rotated onto human ratings (Glasgow Norms, Scott et al. 2019), with a line from each word's rating to the model's direction. "
            "The rotation uses the ratings, so this picture is an illustration; the table is the test."),
        Table(rows=lambda view: [r for r in _tabled(view) if not _related(r)]),
        Table("Sensitivity: related word forms, the other table of norms", rows=lambda view: [r for r in _tabled(view) if _related(r)], folded=True),
        Picture(lambda view: layer_similarity(view.rows) if find(view.rows, NAME, LAYERS) else None, "Similarity of layers",
            "Spearman correlation of each layer's cosine matrix with that of the reported layer."),
    ),
    method="Components of the directions of all emotions against the ratings of the words that a table of norms has, each beside permuted words.",
)  # fmt: skip

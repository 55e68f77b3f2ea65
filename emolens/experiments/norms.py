"""The geometry of the directions against human ratings, and how sure it is.

Components 1-3 of the unit vectors against valence and arousal, with an interval over words and a permutation null of the maximum over
every component and layer that could have been looked at; RSA with the distance in story form (`stats.form_features`); a ridge regression over held-out words; the same from the embeddings; RSA;
clusters against Plutchik's families; reliability of each direction; similarity of layers. With few rated words the rows say so:
claims about geometry belong to a set of many words. Primary row: |r| of the best of components 1-3 with valence.
"""

from __future__ import annotations

import numpy as np
import torch

from emolens import geometry, stats
from emolens.directions import class_means
from emolens.emotion_sets import load_norms
from emolens.experiments.base import Inputs, Row, row

NAME = "geometry"
UNDERPOWERED = 30  # words; below this an interval on r is about .4 wide at best


def run(inputs: Inputs) -> list[Row]:
    """All rows."""
    v = inputs.directions
    slot = v.slot(inputs.layer)
    say = {"hook": v.hook_point, "layer": inputs.layer, "estimator": "mean_difference", "seed": inputs.seed}
    out = []
    embed = _embed(inputs)
    for table, key in (("glasgow_2019", "exact"), ("russell_mehrabian_1977", "adjective")):
        norms = load_norms(table)
        words = {e.name: (e.norm_key if key == "exact" else e.adjective) for e in inputs.emotions.emotions}
        known = [i for i, e in enumerate(v.emotions) if words[e] in norms]
        if len(known) < 6:
            continue
        power = "underpowered" if len(known) < UNDERPOWERED else None
        at = say | {
            "n": len(known),
            "unit_of_n": "words" + (f", {power}" if power else ""),
            "split": f"{table}, {'exact form' if key == 'exact' else 'related form (adjective)'}",
        }
        scores = [geometry.components(v.vectors[known, k])[0].numpy() for k in range(len(v.layers))]
        for axis in ("valence", "arousal"):
            norm = np.array([getattr(norms[words[v.emotions[i]] or ""], axis) for i in known])
            fits = geometry.axis_table(scores[slot], norm, all_scores=scores, seed=inputs.seed)
            best = max(fits, key=lambda f: f.r.value)
            for f in fits:
                primary = axis == "valence" and f is best and key == "exact"
                out.append(
                    row(
                        NAME,
                        f"|r| of PC{f.component} with {axis}",
                        f.r,
                        primary=primary,
                        p=f.p,
                        null_high=f.null_high,
                        control="permuted words, max over components and layers",
                        emotion=axis,
                        **at,
                    )
                )
            vectors = v.vectors[known, slot].numpy()
            predicted, theirs = geometry.ridge_heldout(vectors, norm), geometry.ridge_heldout(embed[known], norm)
            ids = list(range(len(known)))
            rng = np.random.default_rng(inputs.seed)
            shuffled = [rng.permutation(norm) for _ in range(100)]
            null = [stats.pearson(geometry.ridge_heldout(vectors, y), y) for y in shuffled]
            ridge = stats.bootstrap(lambda i, a=predicted, b=norm: stats.pearson(a[i], b[i]), ids, seed=inputs.seed)
            judged = {
                "control": "permuted words",
                "p": stats.permutation_p(ridge.value, null),
                "null_mean": float(np.mean(null)),
                "null_high": float(np.percentile(null, 95)),
            }
            out.append(row(NAME, f"ridge r with {axis}, held-out words", ridge, emotion=axis, **(at | judged)))
            margin = stats.bootstrap(
                lambda i, a=predicted, c=theirs, b=norm: stats.pearson(a[i], b[i]) - stats.pearson(c[i], b[i]),
                ids,
                seed=inputs.seed,
            )
            out.append(row(NAME, f"ridge r with {axis} minus embed", margin, control="embed", emotion=axis, **at))
        if key == "exact":
            out += _plane(inputs, known, norms, words, at)
    out += _similarity(inputs, say)
    return out


def _plane(inputs: Inputs, known: list[int], norms: dict, words: dict, at: dict) -> list[Row]:
    """RSA and Procrustes against the valence-arousal plane, and the partial r of arousal given valence (in Glasgow arousal rises with it)."""
    v = inputs.directions
    vectors = v.vectors[known, v.slot(inputs.layer)]
    points = np.array([[norms[words[v.emotions[i]]].valence, norms[words[v.emotions[i]]].arousal] for i in known])
    points = (points - points.mean(0)) / points.std(0)
    rho, p = geometry.rsa(vectors.numpy(), points, seed=inputs.seed)
    scores = geometry.components(vectors)[0].numpy()
    disparity, p2 = geometry.procrustes(scores[:, :2], points, seed=inputs.seed)
    partial = max(abs(stats.partial_pearson(scores[:, k], points[:, 1], points[:, 0])) for k in range(scores.shape[1]))
    return [
        row(NAME, "rsa with valence-arousal distance", rho, p=p, control="Mantel", **at),
        row(NAME, "procrustes disparity of PC1-2 and valence-arousal", disparity, p=p2, control="permuted words", **at),
        row(NAME, "highest |partial r| of a component with arousal given valence", partial, **at),
    ]


def _similarity(inputs: Inputs, say: dict) -> list[Row]:
    """Reliability, cosines against their null, families, and how alike layers are."""
    v = inputs.directions
    slot = v.slot(inputs.layer)
    cosine = v.cosine(layer=inputs.layer).numpy()
    form = stats.form_features(inputs.texts)
    form = np.stack([form[inputs.labels == k].mean(0) for k in range(len(inputs.emotions.names))])
    form_rho, form_p = geometry.rsa(
        v.vectors[:, slot].numpy(), (form - form.mean(0)) / form.std(0).clip(1e-12), seed=inputs.seed
    )
    upper = np.triu_indices(len(cosine), 1)
    low, high = geometry.cosine_null(len(cosine), v.vectors.shape[-1], seed=inputs.seed)
    families = [inputs.emotions.families[e] for e in v.emotions]
    same = np.array([families[i] == families[j] for i, j in zip(*upper, strict=True)])
    out = [
        row(NAME, "rsa with distance in story form", form_rho, p=form_p, control="Mantel", n=len(v.emotions), unit_of_n="emotions", **say),
        row(NAME, "share of cosines outside the null of random directions", float(np.mean((cosine[upper] < low) | (cosine[upper] > high))), null_high=high, null_mean=-1 / (len(cosine) - 1), control="random directions", n=len(same), unit_of_n="pairs", **say),
        row(NAME, "split-half reliability, median", float(v.reliability[:, slot].median()), n=len(v.emotions), unit_of_n="emotions", **say),
    ]  # fmt: skip
    out += [
        row(NAME, "split-half reliability", float(r), emotion=e, **say)
        for e, r in zip(v.emotions, v.reliability[:, slot].tolist(), strict=True)
    ]
    if same.any() and not same.all():
        within = stats.bootstrap_mean(cosine[upper][same], list(range(int(same.sum()))), seed=inputs.seed)
        out.append(
            row(
                NAME,
                "mean cosine within a family",
                within,
                null_mean=float(cosine[upper][~same].mean()),
                control="pairs of different families",
                n=int(same.sum()),
                unit_of_n="pairs",
                **say,
            )
        )
        rand, p, _ = geometry.family_agreement(v.vectors[:, slot].numpy(), families, seed=inputs.seed)
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
        similarity = geometry.layer_rsa(v.vectors)[slot]
        out += [
            row(NAME, "rsa of layers with the reported one", float(s), **(say | {"layer": layer}))
            for layer, s in zip(v.layers, similarity, strict=True)
        ]
    return out


def _embed(inputs: Inputs) -> np.ndarray:
    means = class_means(inputs.main.embed[:, None], torch.from_numpy(inputs.labels))[:, 0]
    return (means - means.mean(0)).numpy()

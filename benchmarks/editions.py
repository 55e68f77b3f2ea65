"""Directions of one set read the stories of another: other writers, topics, form and register, the best held-out test there is.

    python benchmarks/editions.py --sets core,core2,everyday [--model smollm2-135m-instruct-q4] [--rows FOLDER] [--json FILE]

Everything is of the set that is fitted: layer (cross-validated over its topics), neutral components, reference mean and spread. A cell is the top-1 and
AUC over the emotions that both sets have, with a 95 % interval over the topics of the set that is read, and the same directions from labels
shuffled within topic (the whole estimator again, layer and all; its 95 % point). Beside it TF-IDF and embeddings of the same stories, centred and
scaled in the same way. With --diagonal also each set by its own folds of topics.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import emolens as em
from emolens import stats
from emolens.experiments.base import Stories
from emolens.experiments.fitting import Fit, Training, against_shuffled, leave_out
from emolens.experiments.separability import held_out_scores


class Side:
    """A set with its rows, to be fitted on and to be read."""

    def __init__(self, model: Any, name: str, folder: Path, n_shuffles: int) -> None:
        self.name, self.emotions = name, em.load_emotion_set(name)
        print(f"reading {name} ...", flush=True)
        acts = em.collect_to(folder / name, model, self.emotions, progress=False).load()
        self.stories = Stories(self.emotions, acts)
        self.training, self.n_shuffles = Training(self.stories), n_shuffles
        self.concepts = [e.concept or e.name for e in self.emotions.emotions]
        self.fits: dict[bytes, Fit] = {}

    def fit(self, labels: np.ndarray) -> Fit:
        """Each labelling is fitted once, and read in every other set."""
        key = labels.tobytes()
        if key not in self.fits:
            self.fits[key] = self.training.fit(labels)
        return self.fits[key]

    def figures(
        self, scores: np.ndarray, at: Side, rows: np.ndarray | slice = slice(None)
    ) -> tuple[float, float]:
        """Top-1 and macro-AUC of scores `[story of at, emotion of self]` over the emotions that both have."""
        mine, theirs, labels = self._shared(at)
        s, y = scores[:, mine][theirs][rows], labels[theirs][rows]
        return float(stats.top_k(s, y).mean()), float(stats.macro_auc(s, y))

    def _shared(self, at: Side) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Columns of the emotions that both have, which stories are of them, and the stories' label among them (-1 for none)."""
        shared = [c for c in self.concepts if c in at.concepts]
        labels = np.array(
            [shared.index(c) if (c := at.concepts[y]) in shared else -1 for y in at.stories.labels]
        )
        return [self.concepts.index(c) for c in shared], labels >= 0, labels

    def read(self, at: Side) -> dict[str, Any]:
        """The cell: value, interval, null and twins."""
        mine, there = self.stories, at.stories.main.rows
        _, known, _ = self._shared(at)
        topics = [t for t, k in zip(at.stories.topics, known, strict=True) if k]
        folds = [Training(mine, held) for held in mine.folds] if at is self else []

        def scores(labels: np.ndarray) -> np.ndarray:
            return held_out_scores(folds, labels) if folds else self.fit(labels).z(there)

        def cell(s: np.ndarray) -> dict[str, Any]:
            top1, auc = (
                stats.bootstrap(lambda i, k=k: self.figures(s, at, i)[k], topics, n=500)
                for k in (0, 1)
            )
            return {
                "top1": [top1.value, top1.low, top1.high],
                "auc": [auc.value, auc.low, auc.high],
            }

        own = scores(mine.labels)
        null = against_shuffled(
            lambda y: self.figures(scores(y), at), mine.labels, mine.topics, n=self.n_shuffles
        )[1]
        twins = {name: cell(s) for name, s in self.twins(at).items()}
        margins = {}
        for name, s in self.twins(at).items():
            d = stats.bootstrap(
                lambda i, s=s: self.figures(own, at, i)[0] - self.figures(s, at, i)[0],
                topics,
                n=500,
            )
            margins[name] = [d.value, d.low, d.high]
        high = np.percentile(null, 95, axis=0).tolist()
        return cell(own) | {
            "fitted": self.name, "read": at.name, "emotions": len(self._shared(at)[0]), "stories": int(known.sum()),
            "layer": "nested" if folds else mine.acts.layers[self.fit(mine.labels).slot],
            "null top1 95 %": high[0], "null auc 95 %": high[1], "draws": len(null), "twins": twins, "top1 minus": margins,
        }  # fmt: skip

    def twins(self, at: Side) -> dict[str, np.ndarray]:
        """TF-IDF and embeddings through the same estimator; on the diagonal by fold."""
        mine, k = self.stories, len(self.concepts)
        y, texts, others = mine.labels, mine.texts, at.stories.texts
        embed, there = mine.main.embed.numpy(), at.stories.main.embed.numpy()
        language = mine.emotions.language

        def words(train: np.ndarray, test: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            return stats.tfidf(
                [texts[i] for i in train],
                others if test is None else [texts[i] for i in test],
                language,
            )

        def embeddings(train: np.ndarray, test: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            return embed[train], there if test is None else embed[test]

        def calibrated(features: Any) -> np.ndarray:
            def scores(train: np.ndarray, test: np.ndarray | None = None) -> np.ndarray:
                x, z = features(train, test)
                return partial(stats.centroid_scores, n_classes=k)(x, y[train], z)

            held = stats.heldout_scores(
                scores, mine.topics, mine.folds if at is self else leave_out(mine.topics), k
            )
            out = held if at is self else scores(np.arange(len(y)))
            return (out - held.mean(0)) / held.std(0, ddof=1).clip(1e-12)

        return {"tfidf": calibrated(words), "embed": calibrated(embeddings)}


def said(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Directions of one set read the stories of another."
    )
    parser.add_argument(
        "--sets", default="core,core2,everyday", help="names or folders, joined ones with a plus"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument(
        "--rows", type=Path, default=Path("editions"), help="folder for pooled rows, kept"
    )
    parser.add_argument("--shuffles", type=int, default=100)
    parser.add_argument(
        "--diagonal",
        action="store_true",
        help="also a set by its own folds, as a study has it: long",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = em.load_model(args.model)
    sides = [Side(model, name, args.rows, args.shuffles) for name in args.sets.split(",")]
    cells = []
    print(
        f"{'fitted on':<16}{'read':<16}{'top-1':<20}{'null':<7}{'AUC':<20}{'null':<7}{'TF-IDF':<20}{'embed':<20}{'minus TF-IDF':<20}"
    )
    for a in sides:
        for b in sides:
            if a is b and not args.diagonal:
                continue
            c = a.read(b)
            cells.append(c)
            print(
                f"{a.name:<16}{b.name:<16}{said(*c['top1']):<20}{c['null top1 95 %']:<7.2f}{said(*c['auc']):<20}{c['null auc 95 %']:<7.2f}"
                f"{said(*c['twins']['tfidf']['top1']):<20}{said(*c['twins']['embed']['top1']):<20}{said(*c['top1 minus']['tfidf']):<20}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(cells, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

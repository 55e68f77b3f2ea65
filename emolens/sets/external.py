"""Other people's labelled texts, which no direction was fitted on: GoEmotions (labels) and EmoBank (ratings)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emolens._files import existing, read_text

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


@dataclass(frozen=True)
class Labelled:
    """Other people's texts: with labels (GoEmotions) or with ratings (EmoBank).

    Attributes:
        texts: As they were written.
        labels: The emotions of each text, none for a text that is only rated.
        valence: Of each text, on the scale of its source; None where texts have labels.
        arousal: As `valence`.

    Example:
        >>> em.sets.Labelled(["What a day!", "No."], [{"joy"}, {"anger", "fear"}]).labels[0]
        {'joy'}
    """

    texts: list[str]
    labels: list[set[str]]
    valence: NDArray[np.floating] | None = None
    arousal: NDArray[np.floating] | None = None

    @property
    def sha256(self) -> str:
        """Identity of the texts and what is said of them."""
        said = [
            self.texts,
            [sorted(x) for x in self.labels],
            *(None if a is None else a.tolist() for a in (self.valence, self.arousal)),
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def load_goemotions(path: str | Path | None = None) -> Labelled:
    r"""Load the test split of GoEmotions, comments with the labels that their readers gave (CC BY 4.0).

    Args:
        path: A file with text, comma-separated label ids and comment id, separated by tabs; None loads it from the hub (extra `data`).

    Returns:
        `Labelled`, with names of `GOEMOTIONS` as labels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not of that form, which is named; no line at all.
        ModuleNotFoundError: no path, and the extra is not installed.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("some.tsv").write_text("What a day!\t17\tc1\n", encoding="utf-8")
        >>> em.sets.load_goemotions("some.tsv")
        Labelled(texts=['What a day!'], labels=[{'joy'}], valence=None, arousal=None)

    Reference:
        Demszky et al. 2020, *GoEmotions: A Dataset of Fine-Grained Emotions*.
    """
    if path is None:
        from datasets import load_dataset

        data = load_dataset("google-research-datasets/go_emotions", "simplified", split="test")
        return Labelled(
            list(data["text"]), [{GOEMOTIONS[i] for i in ids} for ids in data["labels"]]
        )
    texts, labels = [], []
    for number, line in enumerate(_table(path, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
        try:
            ids = [int(i) for i in line[1].split(",")]
            if min(ids) < 0:
                raise IndexError(min(ids))
            labels.append({GOEMOTIONS[i] for i in ids})
            texts.append(line[0])
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{path}:{number}: expected text, label ids 0..27 and an id, separated by tabs"
            ) from error
    if not texts:
        raise ValueError(f"{path}: empty")
    return Labelled(texts, labels)


def load_emobank(path: str | Path) -> Labelled:
    r"""Load the test split of EmoBank, sentences with ratings of valence and arousal (CC BY-SA 4.0).

    Args:
        path: A CSV file with the columns split, V, A, text.

    Returns:
        `Labelled`, with valence and arousal on EmoBank's scale of 1 to 5, and no labels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another form, no row of the test split, or a rating that is no finite number.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("some.csv").write_text("split,V,A,text\ntest,4.2,3.1,What a day!\n", encoding="utf-8")
        >>> em.sets.load_emobank("some.csv").valence
        array([4.2])

    Reference:
        Buechel & Hahn 2017, *EmoBank: Studying the Impact of Annotation Perspective and Representation Format*.
    """
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
    r"""Load what a folder holds of goemotions_test.tsv and emobank.csv.

    Args:
        folder: With one of these files, or both.

    Returns:
        `Labelled` by file name.

    Raises:
        FileNotFoundError: no such folder, or neither file is in it.
        ValueError: a file is not what its name says.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("emobank.csv").write_text("split,V,A,text\ntest,4.2,3.1,What a day!\n", encoding="utf-8")
        >>> em.sets.load_external(".")["emobank.csv"].texts
        ['What a day!']
    """
    try:
        folder = existing(folder, "folder")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"external: {error} (expected {' and '.join(READERS)} in it)") from error
    found = {
        name: read(folder / name) for name, read in READERS.items() if (folder / name).is_file()
    }
    if not found:
        raise FileNotFoundError(f"external={folder}: neither {' nor '.join(READERS)} is there")
    return found

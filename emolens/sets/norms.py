"""Human ratings of words: valence, arousal and dominance on the scales of their studies."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from emolens._files import data_root, here, read_text, table, unknown
from emolens.sets.emotion_sets import Emotion


@dataclass(frozen=True)
class Norm:
    """Human ratings of a word, in the table's own units.

    Attributes:
        valence: From unpleasant to pleasant.
        arousal: From calm to excited.
        dominance: From being controlled to being in control.
    """

    valence: float
    arousal: float
    dominance: float


def load_norms(
    name_or_path: str | Path = "glasgow_2019", *, sense: bool = False, related: bool = False
) -> dict[str, Norm]:
    """Load human valence, arousal and dominance of words.

    Args:
        name_or_path: "glasgow_2019" (scale 1..9, CC BY 4.0), "russell_mehrabian_1977" (scale -1..1), or a CSV file of
            one's own with the columns word, valence, arousal, dominance.
        sense: Also rows of one sense of a word, such as "kind (nice)", or of a word with several senses (column
            `match`).
        related: Also these, and words that the table rates in another form only: a sensitivity check, not the headline.

    Returns:
        Ratings by the exact form of the word, in the table's units.

    Raises:
        FileNotFoundError: no such table.
        ValueError: a column is missing, a cell is not a number, a word is there twice, with the line.

    Example:
        >>> norms = em.load_norms()
        >>> round(norms["joy"].valence, 1), round(norms["grief"].valence, 1)
        (8.1, 1.9)

    Reference:
        Scott et al. 2019, *The Glasgow Norms*; Russell & Mehrabian 1977, *Evidence for a three-factor theory of emotions*.
    """
    folder = data_root() / "norms"
    path = folder / f"{name_or_path}.csv"
    if not path.is_file():
        path = here(name_or_path)
    if not path.is_file():
        shipped = sorted(p.stem for p in folder.glob("*.csv"))
        raise FileNotFoundError(unknown("norms table", str(name_or_path), shipped))
    return dict(_norms(read_text(path), path, sense, related))


@lru_cache(maxsize=8)
def _norms(text: str, path: Path, sense: bool, related: bool) -> Mapping[str, Norm]:
    """The table that a text is, read once; a file that was edited is another text."""
    norms: dict[str, Norm] = {}
    rows = ["" if row.startswith("#") else row for row in text.splitlines()]
    comments = next((i for i, row in enumerate(rows) if row), len(rows))
    names, separator = table("\n".join(rows[comments:]))
    needed = ("word", "valence", "arousal", "dominance")
    if missing := sorted(set(needed) - set(names)):
        there = ", ".join(names)[:200] or "none"
        raise ValueError(
            f"{path}: column {missing[0]!r} is missing; needed: {', '.join(needed)}; there are: {there}"
        )
    if twice := [c for c in needed if names.count(c) > 1]:
        raise ValueError(f"{path}:{comments + 1}: there is more than one column {twice[0]!r}")
    reader = csv.DictReader(rows[comments + 1 :], fieldnames=names, delimiter=separator)
    for row in reader:
        match = row.get("match", "exact")
        if related or match == "exact" or (sense and match == "sense"):
            where = f"{path}:{comments + 1 + reader.line_num}: {row['word']!r}"
            try:
                values = [float(row[k]) for k in needed[1:]]
            except (TypeError, ValueError) as error:
                found = ", ".join(str(row[k]) for k in needed[1:])
                comma = " (a decimal comma? write 7.5)" if separator != "," and "," in found else ""
                raise ValueError(f"{where}: not a number{comma} (found {found[:60]!r})") from error
            if not np.isfinite(values).all():
                raise ValueError(f"{where}: not a number")
            if row["word"] in norms:
                raise ValueError(f"{where}: this word is there twice")
            norms[row["word"]] = Norm(*values)
    return norms


def norm_of(
    emotion: Emotion, table: str = "glasgow_2019"
) -> tuple[Norm | None, Literal["exact", "sense", "related"] | None]:
    """Find an emotion's row of a table.

    Args:
        emotion: Looked up by its `norm_key`, else by its name and adjective.
        table: As `load_norms` takes it.

    Returns:
        The ratings, and how they were found: by `norm_key` as the table has it ("exact"), rated in one sense or where
        the word has several ("sense"), or by another form of the word ("related"). None twice where the table does
        not have the word; nothing is guessed.

    Raises:
        FileNotFoundError: no such table.
        ValueError: what is wrong with a table of one's own, with the line.

    Example:
        >>> rated, found = em.sets.norm_of(em.load_emotion_set("core")["fear"])
        >>> round(rated.valence, 1), found
        (2.6, 'exact')
    """
    exact, senses = load_norms(table), load_norms(table, sense=True)
    every = load_norms(table, related=True)
    if emotion.norm_key in senses:
        return senses[emotion.norm_key], "exact" if emotion.norm_key in exact else "sense"
    for word in (emotion.norm_key, emotion.name, emotion.adjective):
        if word in every:
            return every[word], "related"
    return None, None

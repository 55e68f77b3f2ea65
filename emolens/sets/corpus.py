"""Texts with their labels, read as a stream and cut into slices of a fixed number.

A corpus is an emotion set, a list of texts, a file (`records`) or a table of the `datasets` library. It is read
in order, as often as needed, and never held as a whole unless it already was. A file's name is never taken for
a text. A slice has a name made from what is in it, so that work on it can be recognised again. Nothing here
sees a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from emolens._files import here, whole
from emolens._typing import Text
from emolens.sets.emotion_sets import EmotionSet
from emolens.sets.records import (
    LABELS,
    Record,
    label,
    labelled,
    missing,
    names_a_file,
    plain_label,
    reader_of,
    scalar,
)
from emolens.sets.set_files import list_emotion_sets

Long = Literal["raise", "truncate", "skip"]


@dataclass(frozen=True)
class Slice:
    """Consecutive texts: `texts[i]` is number `start + i` of the corpus, has `labels[i]` and stands at `places[i]`."""

    number: int
    start: int
    texts: list[Text]
    labels: list[dict[str, Any]]
    places: list[str]

    @property
    def digest(self) -> str:
        """sha256 over texts and labels (first 16 hex digits)."""
        said = json.dumps([self.start, self.texts, self.labels])
        return hashlib.sha256(said.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Something that can be read from its start, any number of times; made by `open_corpus`.

    Attributes:
        read: Each text with its labels; among these "place" says where it stands (a line of a file, an id of a set, "" of a list).
        info: What files remember of it: the set's name, fingerprint and antonyms (None for other texts).
        has_neutral: Whether single tokens of neutral texts are worth keeping (it is an emotion set).
    """

    read: Callable[[], Iterator[Record]]
    info: dict[str, Any]
    has_neutral: bool

    def slices(self, size: int, numbers: Sequence[int] | None = None) -> Iterator[Slice]:
        """Cut into slices of `size` texts; `numbers` picks some of them, in ascending order."""
        stream, number = self.read(), 0
        wanted = None if numbers is None else set(numbers)
        last = None if wanted is None else max(wanted, default=-1)
        while (last is None or number <= last) and (pairs := list(islice(stream, size))):
            if wanted is None or number in wanted:
                labels = [{k: known[k] for k in LABELS} for _, known in pairs]
                places = [known["place"] for _, known in pairs]
                yield Slice(number, number * size, [text for text, _ in pairs], labels, places)
            number += 1


def open_corpus(
    texts: EmotionSet | Corpus | Text | Iterable[Text] | Path | Any,
    emotions: Iterable[Any] | None = None,
    topics: Iterable[Any] | None = None,
    *,
    column: str = "text",
) -> Corpus:
    """Make a corpus of what `collect` and `score` accept.

    Args:
        texts: An emotion set; one text; a list, array or series of texts, or of chats; a `datasets.Dataset`; or the `pathlib.Path` of a file:
            JSON lines (``.jsonl``), a table with a header (``.csv``, ``.tsv``; commas, semicolons or tabs) or a text a line (``.txt``), each
            also as ``.gz``. Files and tables bring their own labels, in columns of the names `LABELS`, in any case of letters.
        emotions, topics: Labels of plain texts, one a text: words or whole numbers (which become words); None for a text without one.
        column: Of a file or table: where the text is.

    Returns:
        A corpus whose texts are read when they are asked for.

    Raises:
        ValueError: labels that are missing or do not match the texts; a string that is the name of a file, folder or set; later, while
            reading, a line that is not what it should be.
        FileNotFoundError: no such file.
    """
    if isinstance(texts, Corpus):
        return texts
    has_labels = isinstance(texts, EmotionSet | Path) or hasattr(texts, "column_names")
    if has_labels and (emotions is not None or topics is not None):
        what = "an emotion set" if isinstance(texts, EmotionSet) else "a file or table"
        raise ValueError(f"{what} brings its own emotions and topics")
    info: dict[str, Any] = {"set": None, "set_sha256": None, "antonyms": None}
    if isinstance(texts, EmotionSet):
        antonyms = {e.name: e.antonym for e in texts.emotions if e.antonym}
        info = {"set": texts.name, "set_sha256": texts.fingerprint, "antonyms": antonyms}
        return Corpus(lambda: _of_set(texts), info, True)
    if isinstance(texts, Path):
        return Corpus(reader_of(here(texts), column), info, False)
    if (columns := getattr(texts, "column_names", ())) != ():
        if isinstance(columns, Mapping):  # a DatasetDict
            raise ValueError(
                f"this table has parts ({', '.join(map(str, columns))}): give one of them, such as table[{next(iter(columns))!r}]"
            )
        if columns is not None and column.lower() not in [str(c).strip().lower() for c in columns]:
            raise ValueError(
                f"the table has no column {column!r}; it has: {', '.join(map(str, columns))}"
            )
        return Corpus(lambda: _of_table(texts, column), info, False)
    if isinstance(texts, Mapping | set | frozenset) or hasattr(texts, "columns"):
        raise ValueError(
            f"a {type(texts).__name__} has no order of texts: give a list, or datasets.Dataset.from_dict / from_pandas"
        )
    plain = several(texts)
    of = _labels(emotions, "emotions", len(plain)), _labels(topics, "topics", len(plain))
    return Corpus(lambda: _of_list(plain, *of), info, False)


def several(texts: Text | Iterable[Text]) -> list[Text]:
    """One text or prompt or several as a list of plain ones, at least one: a single string is one text, a list of messages one chat.

    Raises:
        ValueError: no text; one that is missing or empty or no text; a single string that is the name of a file, folder or set.
    """
    if isinstance(texts, str):
        return [plain_text(alone(texts), 0)]
    if isinstance(texts, Path):
        raise ValueError(
            f"{texts}: texts are wanted here; read the file first, as in pathlib.Path(...).read_text()"
        )
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise ValueError(
            f"texts are a string or a list of them, not of type {type(texts).__name__}"
        )
    if isinstance(texts, Mapping):
        raise ValueError("a single message; a chat is a list of them: put it in [ ]")
    given: list[Any] = list(texts)
    if not given:
        raise ValueError("no texts given: one string, or a list of at least one")
    messages = [isinstance(x, Mapping) for x in given]
    if all(messages):
        given = [given]
    elif any(messages):
        i = messages.index(True)
        raise ValueError(
            f"entry {i} is a message beside texts or chats; each chat is a list of its own: put it in [ ]"
        )
    return [plain_text(text, i) for i, text in enumerate(given)]


def plain_text(text: Any, number: int) -> Text:
    """Text `number` as a plain string, or as the chat that it is."""
    text = scalar(text)
    if isinstance(text, str):
        if not text.strip():
            raise ValueError(f"text {number} is empty")
        return whole(str(text), f"text {number}")
    if text is None or missing(text):
        raise ValueError(f"text {number} is missing (found {text!r}): leave it out")
    if not isinstance(text, Sequence) or isinstance(text, bytes):
        raise ValueError(
            f"text {number} is of type {type(text).__name__}: a text is a string, or a list of chat messages"
        )
    return text


def alone(text: str) -> str:
    """A string that was given where texts are wanted; a ValueError if it names a file, folder or set, and so would be read as a few tokens.

    >>> alone("She read the letter twice.")
    'She read the letter twice.'
    """
    kind = names_a_file(text)
    if kind == "address":
        raise ValueError(
            f"{text!r} is one text of a few tokens, and an address that is not read: download it first; for the text itself [{text!r}]"
        )
    if kind is None and text in list_emotion_sets():
        raise ValueError(
            f"{text!r} is one text of a few tokens; for the emotion set give load_emotion_set({text!r}), for the word itself [{text!r}]"
        )
    if kind is not None:
        raise ValueError(
            f"{text!r} is one text of a few tokens; for the {kind} of that name give pathlib.Path({text!r}), for the text itself [{text!r}]"
        )
    return text


def _labels(given: Iterable[Any] | None, name: str, n: int) -> list[str | None] | None:
    if given is None:
        return None
    listed = isinstance(given, Iterable) and not hasattr(given, "columns")
    if not listed or isinstance(given, str | bytes | Mapping | set | frozenset):
        raise ValueError(f"{name} is of type {type(given).__name__}: give a list, one label a text")
    out, given = [], list(given)
    if len(given) != n:
        raise ValueError(f"{len(given)} {name} for {n} texts")
    for i, value in enumerate(given):
        try:
            out.append(plain_label(value))
        except ValueError as error:
            raise ValueError(f"{name}[{i}]: {error}") from None
    return out


def _of_set(s: EmotionSet) -> Iterator[Record]:
    for emotion in s.names:
        for t in s.stories[emotion]:
            about = {"emotion": emotion, "topic": t.topic, "person": t.person}
            yield t.text, label(t.id, t.split, t.id, **about)
    for n in s.neutral:
        yield n.text, label(n.id, "neutral", n.id, topic=n.topic)


def _of_list(
    texts: Sequence[Text],
    emotions: Sequence[str | None] | None,
    topics: Sequence[str | None] | None,
) -> Iterator[Record]:
    for i, text in enumerate(texts):
        emotion, topic = emotions[i] if emotions else None, topics[i] if topics else None
        split = "" if emotion is None else "main"
        yield text, label(f"text-{i}", split, emotion=emotion, topic=topic)


def _of_table(table: Any, column: str) -> Iterator[Record]:
    for i, row in enumerate(table):
        yield labelled(row, i, f"row {i}", column)

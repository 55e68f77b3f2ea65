"""Texts with their labels, read as a stream and cut into slices of a fixed number.

A corpus is an emotion set, a list of texts, a JSON-lines file (plain or gzip) or a table of the `datasets` library. It is read in
order, as often as needed, and never held as a whole unless it already was. A slice has a name made from what is in it, so that
work on it can be recognised again. Nothing here sees a model.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emolens.emotion_sets import EmotionSet
from emolens.tokens import Text, several

MAX_LINE = 1_000_000  # bytes of one line of JSON: a text is far shorter, and hostile input stays small
LABELS = ("id", "emotion", "topic", "person", "split")


class Line(BaseModel):
    """One line of a JSON-lines file: a text, and what is known of it.

    `split` is "main" for a text with an emotion and "" without one, unless it says "neutral", "other_person" or something else.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)  # other people's files carry more

    text: Annotated[str, Field(min_length=1)]
    id: str | int | None = None
    emotion: str | None = None
    topic: str | None = None
    person: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Slice:
    """Consecutive texts: `texts[i]` is number `start + i` of the corpus and has `labels[i]`."""

    number: int
    start: int
    texts: list[Text]
    labels: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """sha256 over texts and labels (first 16 hex digits)."""
        return hashlib.sha256(json.dumps([self.start, self.texts, self.labels]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Something that can be read from its start, any number of times; made by `open_corpus`.

    Attributes:
        info: What files remember of it: the set's name, fingerprint and antonyms (None for other texts).
        has_neutral: Whether single tokens of neutral texts are worth keeping (it is an emotion set).
    """

    read: Callable[[], Iterator[tuple[Text, dict[str, Any]]]]
    info: dict[str, Any]
    has_neutral: bool

    def slices(self, size: int, numbers: Sequence[int] | None = None) -> Iterator[Slice]:
        """Cut into slices of `size` texts; `numbers` picks some of them, in ascending order."""
        wanted = None if numbers is None else set(numbers)
        stream, number = self.read(), 0
        while (wanted is None or number <= max(wanted, default=-1)) and (pairs := list(islice(stream, size))):
            if wanted is None or number in wanted:
                texts, labels = [text for text, _ in pairs], [label for _, label in pairs]
                yield Slice(number, number * size, texts, labels)
            number += 1


def open_corpus(
    texts: EmotionSet | Sequence[Text] | Path | Any,
    emotions: Sequence[str] | None = None,
    topics: Sequence[str] | None = None,
) -> Corpus:
    """What `collect` accepts, as a corpus.

    Args:
        texts: An emotion set; one text or chat (a list of messages); a list of texts or chats; the `pathlib.Path` of a ``.jsonl`` or ``.jsonl.gz`` file
            with a "text" in every line; or a `datasets.Dataset` with a column of that name. The last two bring their own labels.
        emotions, topics: Labels of plain texts, one a text.

    Raises:
        ValueError: labels that do not match the texts; later, while reading, a line that is not what it should be.
        FileNotFoundError: no such file.
    """
    labelled = isinstance(texts, EmotionSet | Path) or hasattr(texts, "column_names")
    if labelled and (emotions is not None or topics is not None):
        what = "an emotion set" if isinstance(texts, EmotionSet) else "a file or table"
        raise ValueError(f"{what} brings its own emotions and topics")
    info: dict[str, Any] = {"set": None, "set_sha256": None, "antonyms": None}
    if isinstance(texts, EmotionSet):
        antonyms = {e.name: e.antonym for e in texts.emotions if e.antonym}
        info = {"set": texts.name, "set_sha256": texts.fingerprint, "antonyms": antonyms}
        return Corpus(lambda: _of_set(texts), info, True)
    if isinstance(texts, Path):
        path = texts.expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return Corpus(lambda: _of_file(path), info, False)
    if (columns := getattr(texts, "column_names", ())) != ():
        if columns is not None and "text" not in columns:
            raise ValueError(f"the table has no column 'text'; it has: {', '.join(map(str, columns))}")
        return Corpus(lambda: _of_table(texts), info, False)
    if isinstance(texts, str) and texts.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(
            f"{texts!r} is one text of a few tokens; for the file of that name give pathlib.Path({texts!r})"
        )
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise ValueError(
            f"a {type(texts).__name__} has no order of texts: give a list, or datasets.Dataset.from_dict / from_pandas"
        )
    plain = several(texts)
    for name, given in (("emotions", emotions), ("topics", topics)):
        if given is not None and len(given) != len(plain):
            raise ValueError(f"{len(given)} {name} for {len(plain)} texts")
    return Corpus(lambda: _of_list(plain, emotions, topics), info, False)


def _of_set(s: EmotionSet) -> Iterator[tuple[Text, dict[str, Any]]]:
    for emotion in s.names:
        for t in s.stories[emotion]:
            yield t.text, {"id": t.id, "emotion": emotion, "topic": t.topic, "person": t.person, "split": t.split}
    for n in s.neutral:
        yield n.text, {"id": n.id, "emotion": None, "topic": n.topic, "person": None, "split": "neutral"}


def _of_list(
    texts: Sequence[Text], emotions: Sequence[str] | None, topics: Sequence[str] | None
) -> Iterator[tuple[Text, dict[str, Any]]]:
    for i, text in enumerate(texts):
        label = {"emotion": emotions[i] if emotions else None, "topic": topics[i] if topics else None}
        yield text, {"id": f"text-{i}", **label, "person": None, "split": "main" if emotions else ""}


def _labelled(line: Line, number: int) -> tuple[Text, dict[str, Any]]:
    split = line.split if line.split is not None else ("main" if line.emotion is not None else "")
    label = {k: getattr(line, k) for k in ("emotion", "topic", "person")}
    return line.text, {"id": f"text-{number}" if line.id is None else str(line.id), **label, "split": split}


def _of_table(table: Any) -> Iterator[tuple[Text, dict[str, Any]]]:
    for i, row in enumerate(table):
        try:
            yield _labelled(Line.model_validate({k: row[k] for k in ("text", *LABELS) if k in row}), i)
        except ValidationError as error:
            raise ValueError(f"row {i}: {_first(error)}") from error


def _of_file(path: Path) -> Iterator[tuple[Text, dict[str, Any]]]:
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
        n = 0
        for number, line in enumerate(_lines(file, path), start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line  # of an editor on Windows
            if not line.strip():
                continue
            try:
                yield _labelled(Line.model_validate_json(line), n)
            except ValidationError as error:
                raise ValueError(f"{path}:{number}: {_first(error)}") from error
            n += 1


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(MAX_LINE + 1)
        except (EOFError, OSError, zlib.error) as error:  # what gzip raises on a damaged file
            raise ValueError(f"{path}:{number}: the gzip file is damaged or cut short ({error})") from error
        if not line:
            return
        if len(line) > MAX_LINE:
            raise ValueError(f"{path}:{number}: a line of more than {MAX_LINE:,} bytes")
        yield line


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    found = "" if first["type"] in ("missing", "json_invalid") else f" (found {str(first['input'])[:60]!r})"
    return f"{where + ': ' if where else ''}{first['msg'].lower()}{found}"

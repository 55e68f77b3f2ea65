"""Texts with their labels, read as a stream and cut into slices of a fixed number.

A corpus is an emotion set, a list of texts, a file (JSON lines, CSV or a text a line; plain or gzip) or a table of the `datasets`
library. It is read in order, as often as needed, and never held as a whole unless it already was. Here is the border for what people
give: labels of numpy and pandas become plain words, a missing one is an error that says where, and a file's name is never taken for a
text. A slice has a name made from what is in it, so that work on it can be recognised again. Nothing here sees a model.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import numbers
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from emolens._files import address, decoded, existing, here, parse_json, table, whole
from emolens._typing import Text
from emolens.sets.emotion_sets import EmotionSet, list_emotion_sets

MAX_LINE = 1_000_000  # bytes of one line: a text is far shorter, and hostile input stays small
LABELS = ("id", "emotion", "topic", "person", "split")
SPLITS = ("main", "other_person", "neutral", "test", "validation", "")
TABLES = {".csv": ",;\t|", ".tsv": "\t"}  # by what a header may be parted
LINES = (".txt", ".text")
JSON = (".jsonl", ".ndjson", ".json", "")
# files that are not read here; by all of these endings a name is known for a file's
FOREIGN = (
    ".gz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar", ".log", ".dat", ".tab", ".md", ".rst", ".zip", ".parquet", ".arrow", ".xls", ".xlsx", ".ods", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".htm", ".html", ".xml", ".yaml", ".yml", ".npy", ".npz",
    ".pkl", ".pt", ".safetensors", ".gguf",
)  # fmt: skip
ENDINGS = (*TABLES, *LINES, *filter(None, JSON), *FOREIGN)
Long = Literal["raise", "truncate", "skip"]


def plain_label(value: Any) -> str | None:
    """A label as a plain word, whatever library it comes from; None for a text that has none.

    >>> plain_label(" joy "), plain_label(3), plain_label(None)
    ('joy', '3', None)

    Raises:
        ValueError: a missing value (NaN of numpy or pandas, also as the word that it is written as), or something that is no label.
    """
    value = _scalar(value)
    if value is None:
        return None
    word = str(value).strip() if isinstance(value, str) else str(value)
    if _missing(value) or word.lower() in ("nan", "<na>", "nat", "none", "null"):
        raise ValueError(
            f"a label is missing (found {word!r}): name it, or give None where there is none"
        )
    if not isinstance(value, str) and (
        isinstance(value, bool) or not isinstance(value, numbers.Integral)
    ):
        raise ValueError(
            f"a label is a word or a whole number (found {word[:60]!r}, a {type(value).__name__})"
        )
    if not word:
        raise ValueError("a label is empty: name it, or give None where there is none")
    return word


def _split(value: Any) -> str | None:
    """What a text is for: other people's "train" is our "main"."""
    split = "" if isinstance(value, str) and not value.strip() else plain_label(value)
    split = "main" if split == "train" else split
    if split is not None and split not in SPLITS:
        raise ValueError(
            f"split {split!r}; allowed: {', '.join(SPLITS[:-1])} (or train, which is main)"
        )
    return split


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return text


Label = Annotated[str | None, BeforeValidator(plain_label)]


class Line(BaseModel):
    """One record of a file or table: a text, and what is known of it.

    `split` is "main" for a text with an emotion and "" without one, unless it says "neutral", "other_person", "test" or "validation";
    directions are made from "main" ("train" is another word for it).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)  # other people's files carry more

    text: Annotated[str, Field(min_length=1), AfterValidator(_said)]
    id: Label = None
    emotion: Label = None
    topic: Label = None
    person: Label = None
    split: Annotated[str | None, BeforeValidator(_split)] = None


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
        return hashlib.sha256(
            json.dumps([self.start, self.texts, self.labels]).encode()
        ).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Something that can be read from its start, any number of times; made by `open_corpus`.

    Attributes:
        read: Each text with its labels; among these "place" says where it stands (a line of a file, an id of a set, "" of a list).
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
        while (wanted is None or number <= max(wanted, default=-1)) and (
            pairs := list(islice(stream, size))
        ):
            if wanted is None or number in wanted:
                labels = [{k: label[k] for k in LABELS} for _, label in pairs]
                places = [label["place"] for _, label in pairs]
                yield Slice(number, number * size, [text for text, _ in pairs], labels, places)
            number += 1


def open_corpus(
    texts: EmotionSet | Corpus | Text | Iterable[Text] | Path | Any,
    emotions: Iterable[Any] | None = None,
    topics: Iterable[Any] | None = None,
    *,
    column: str = "text",
) -> Corpus:
    """What `collect` and `score` accept, as a corpus.

    Args:
        texts: An emotion set; one text; a list, array or series of texts, or of chats; a `datasets.Dataset`; or the `pathlib.Path` of a file:
            JSON lines (``.jsonl``), a table with a header (``.csv``, ``.tsv``; commas, semicolons or tabs) or a text a line (``.txt``), each
            also as ``.gz``. Files and tables bring their own labels, in columns of the names `LABELS`, in any case of letters.
        emotions, topics: Labels of plain texts, one a text: words or whole numbers (which become words); None for a text without one.
        column: Of a file or table: where the text is.

    Raises:
        ValueError: labels that are missing or do not match the texts; a string that is the name of a file, folder or set; later, while
            reading, a line that is not what it should be.
        FileNotFoundError: no such file.
    """
    if isinstance(texts, Corpus):
        return texts
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
        return Corpus(_reader_of(here(texts), column), info, False)
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
    of = {
        name: _labels(given, name, len(plain))
        for name, given in (("emotions", emotions), ("topics", topics))
    }
    return Corpus(lambda: _of_list(plain, of["emotions"], of["topics"]), info, False)


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
    text = _scalar(text)
    if isinstance(text, str):
        if not text.strip():
            raise ValueError(f"text {number} is empty")
        return whole(str(text), f"text {number}")
    if text is None or _missing(text):
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


def names_a_file(text: str) -> Literal["file", "folder", "address"] | None:
    """What a string is the name of: something that is there, or that its ending or its beginning shows to be a file's.

    A sentence that ends like a file ("I saved it as report.txt") counts as a name: an error that says how to give the text costs less than
    the numbers of a name that was read as a text.
    """
    if not text.strip() or "\n" in text or len(text) > 1000:
        return None
    try:
        path = Path(text).expanduser()
        if path.exists():
            return "folder" if path.is_dir() else "file"
    except (OSError, ValueError, RuntimeError):  # no name that a file could have
        return None
    one = len(text.split()) == 1
    if one and address(text):
        return "address"
    shaped = text.startswith(("./", "../", "/", "~/", ".\\", "..\\", "~\\")) or text[1:3] in (
        ":\\",
        ":/",
    )
    return "file" if (one and shaped) or text.lower().endswith(ENDINGS) else None


def _scalar(value: Any) -> Any:
    """The plain value of a numpy scalar or of a tensor of one number."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _missing(value: Any) -> bool:
    return type(value).__name__ in ("NAType", "NaTType") or (
        isinstance(value, float) and math.isnan(value)
    )


def _labels(given: Iterable[Any] | None, name: str, n: int) -> list[str | None] | None:
    if given is None:
        return None
    if (
        isinstance(given, str | bytes | Mapping | set | frozenset)
        or not isinstance(given, Iterable)
        or hasattr(given, "columns")
    ):
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


def _of_set(s: EmotionSet) -> Iterator[tuple[Text, dict[str, Any]]]:
    for emotion in s.names:
        for t in s.stories[emotion]:
            yield (
                t.text,
                {
                    "id": t.id,
                    "emotion": emotion,
                    "topic": t.topic,
                    "person": t.person,
                    "split": t.split,
                    "place": t.id,
                },
            )
    for n in s.neutral:
        yield (
            n.text,
            {
                "id": n.id,
                "emotion": None,
                "topic": n.topic,
                "person": None,
                "split": "neutral",
                "place": n.id,
            },
        )


def _of_list(
    texts: Sequence[Text],
    emotions: Sequence[str | None] | None,
    topics: Sequence[str | None] | None,
) -> Iterator[tuple[Text, dict[str, Any]]]:
    for i, text in enumerate(texts):
        emotion, topic = emotions[i] if emotions else None, topics[i] if topics else None
        split = "" if emotion is None else "main"
        yield (
            text,
            {
                "id": f"text-{i}",
                "emotion": emotion,
                "topic": topic,
                "person": None,
                "split": split,
                "place": "",
            },
        )


def _of_table(table: Any, column: str) -> Iterator[tuple[Text, dict[str, Any]]]:
    for i, row in enumerate(table):
        yield _labelled(row, i, f"row {i}", column)


def _labelled(record: Any, number: int, place: str, column: str) -> tuple[Text, dict[str, Any]]:
    """A text with its labels from one record, whose keys may be in any case of letters."""
    if not isinstance(record, Mapping):
        raise ValueError(
            f'{place}: a record is an object such as {{"text": ...}}, found {str(record)[:60]!r}'
        )
    fields: dict[str, Any] = {}
    for key, value in record.items():
        name = str(key).strip().lower()
        name = "text" if name == column.strip().lower() else None if name == "text" else name
        if name in fields and name in ("text", *LABELS):
            raise ValueError(f"{place}: there is more than one {key!r}")
        fields |= {name: value} if name is not None else {}
    if "text" not in fields and column != "text":
        raise ValueError(f"{place}: no {column!r}; there are: {', '.join(map(str, record))}")
    try:
        line = Line.model_validate({k: fields[k] for k in ("text", *LABELS) if k in fields})
    except ValidationError as error:
        raise ValueError(f"{place}: {_first(error)}") from error
    split = line.split if line.split is not None else "main"
    if split == "neutral" and line.emotion is not None:
        raise ValueError(
            f"{place}: split 'neutral' and the emotion {line.emotion!r}: a neutral text has none"
        )
    split = "" if split == "main" and line.emotion is None else split
    label = {k: getattr(line, k) for k in ("emotion", "topic", "person")}
    return line.text, {
        "id": f"text-{number}" if line.id is None else line.id,
        **label,
        "split": split,
        "place": place,
    }


def _reader_of(path: Path, column: str) -> Callable[[], Iterator[tuple[Text, dict[str, Any]]]]:
    """How a file is read, by its ending."""
    if path.is_dir():
        hint = (
            f"load_emotion_set({str(path)!r})"
            if (path / "set.yaml").is_file()
            else "the files in it, one by one"
        )
        raise ValueError(f"{path} is a folder; give {hint}")
    path = existing(path, "file")
    ending = (
        path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    )
    if ending in FOREIGN:
        raise ValueError(
            f"{path}: a {ending} file is not read here; write it as .csv, .jsonl (a record a line) or .txt (a text a line)"
        )

    def read() -> Iterator[tuple[Text, dict[str, Any]]]:
        with path.open("rb") as raw:
            yield from records(raw, str(path), column, ending)

    return read


def records(
    raw: BinaryIO, name: str, column: str, ending: str
) -> Iterator[tuple[Text, dict[str, Any]]]:
    """The texts of an open file, plain or gzip; `name` and the line are in every error.

    Raises:
        ValueError: as `open_corpus`.
    """
    start = raw.read(2)
    raw.seek(0)
    file: Any = gzip.GzipFile(fileobj=raw) if start == b"\x1f\x8b" else raw
    lines = _lines(file, name)
    found = (
        _rows(lines, name, column, TABLES[ending])
        if ending in TABLES
        else ((at, {column: _one_line(line, at)}) for at, line in lines if line.strip())
        if ending in LINES
        else _objects(lines)
    )
    for n, (at, record) in enumerate(found):
        yield _labelled(record, n, at, column)


def _objects(lines: Iterator[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    for at, line in lines:
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{at}: {str(error)[:200]} (one record a line is read)") from error
            yield at, record


def _rows(
    lines: Iterator[tuple[str, str]], name: str, column: str, separators: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table under its header; an empty cell is no label."""
    place = name

    def told() -> Iterator[str]:
        nonlocal place
        for at, line in lines:
            place = at
            yield line

    text = told()
    names, separator = table(
        _one_line(next((line for line in text if line.strip()), ""), place), separators
    )
    wanted = column.strip().lower()
    if twice := [c for c in (wanted, *LABELS) if names.count(c) > 1]:
        raise ValueError(f"{place}: there is more than one column {twice[0]!r}")
    if wanted not in names:
        raise ValueError(
            f"{place}: no column {column!r}; there are: {', '.join(names)[:200] or 'none'}; say which one is the text (column=, --column)"
        )
    try:
        for cells in csv.reader(text, delimiter=separator, strict=True):
            if not any(c.strip() for c in cells):
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"{place}: {len(cells)} cells under a header of {len(names)}; a text with a {separator!r} in it stands in quotes"
                )
            yield (
                place,
                {
                    k: cell if k == wanted or cell.strip() else None
                    for k, cell in zip(names, cells, strict=True)
                },
            )
    except csv.Error as error:
        raise ValueError(f"{place}: not a table: {error}") from error


def _one_line(line: str, at: str) -> str:
    """A line without its end; what old Macs wrote would be one line, and a header that swallows its rows."""
    line = line.rstrip("\r\n")
    if "\r" in line:
        raise ValueError(
            f"{at}: a carriage return parts this line, as in files of old Macs; save it with line feeds (LF)"
        )
    return line


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
    """Each line with its place."""
    number = 0
    while True:
        number += 1
        at = f"{name}:{number}"
        try:
            line = file.readline(MAX_LINE + 1)
        except (EOFError, OSError, zlib.error) as error:  # what gzip raises on a damaged file
            raise ValueError(f"{at}: the gzip file is damaged or cut short ({error})") from error
        if not line:
            return
        if len(line) > MAX_LINE:
            raise ValueError(f"{at}: a line of more than {MAX_LINE:,} bytes")
        text = decoded(line, f"{at}: invalid json or text")
        if "\0" in text:  # plain letters of UTF-16 are valid UTF-8
            raise ValueError(
                f"{at}: holds zero bytes, so it is UTF-16 or no text; save it as UTF-8 (in Excel: 'CSV UTF-8')"
            )
        yield at, text


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":  # of our own: it says what was found
        return f"{where}: {first.get('ctx', {}).get('error', first['msg'])}"
    found = "" if first["type"] == "missing" else f" (found {str(first['input'])[:60]!r})"
    return f"{where + ': ' if where else ''}{first['msg'].lower()}{found}"

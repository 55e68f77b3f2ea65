"""Texts of files and tables, a record at a time: JSON lines, tables with a header, a text a line; plain or gzip.

Here is the border for labels that other people give: those of numpy and pandas become plain words, a missing
one is an error that says where, and other people's further columns are passed over. What is read is made into
a `Corpus` by `corpus.open_corpus`.
"""

from __future__ import annotations

import csv
import gzip
import math
import numbers
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from emolens._files import address, decoded, existing, not_blank, parse_json, reason, table
from emolens._typing import Text

MAX_LINE = 1_000_000  # bytes of one line: a text is far shorter, and hostile input stays small
LABELS = ("id", "emotion", "topic", "person", "split")
SPLITS = ("main", "other_person", "neutral", "test", "validation", "")
TABLES = {".csv": ",;\t|", ".tsv": "\t"}  # by what a header may be parted
LINES = (".txt", ".text")
JSON = (".jsonl", ".ndjson", ".json", "")
# files that are not read here; by all of these endings a name is known for a file's
FOREIGN = (
    ".gz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar", ".zip", ".log", ".dat", ".tab", ".md", ".rst",
    ".parquet", ".arrow", ".xls", ".xlsx", ".ods", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".htm", ".html", ".xml",
    ".yaml", ".yml", ".npy", ".npz", ".pkl", ".pt", ".safetensors", ".gguf",
)  # fmt: skip
ENDINGS = (*TABLES, *LINES, *filter(None, JSON), *FOREIGN)
Record = tuple[Text, dict[str, Any]]  # a text and its labels, with "place", where it stands


def plain_label(value: Any) -> str | None:
    """A label as a plain word, whatever library it comes from; None for a text that has none.

    >>> plain_label(" joy "), plain_label(3), plain_label(None)
    ('joy', '3', None)

    Raises:
        ValueError: a missing value (NaN of numpy or pandas, also as the word that it is written as), or something that is no label.
    """
    value = scalar(value)
    if value is None:
        return None
    word = str(value).strip() if isinstance(value, str) else str(value)
    if missing(value) or word.lower() in ("nan", "<na>", "nat", "none", "null"):
        raise ValueError(
            f"a label is missing (found {word!r}): name it, or give None where there is none"
        )
    whole_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not isinstance(value, str) and not whole_number:
        raise ValueError(
            f"a label is a word or a whole number (found {word[:60]!r}, a {type(value).__name__})"
        )
    if not word:
        raise ValueError("a label is empty: name it, or give None where there is none")
    return word


def scalar(value: Any) -> Any:
    """The plain value of a numpy scalar or of a tensor of one number."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def missing(value: Any) -> bool:
    """Whether it stands for nothing: NaN, or what pandas has for it."""
    nothing = type(value).__name__ in ("NAType", "NaTType")
    return nothing or (isinstance(value, float) and math.isnan(value))


def _split(value: Any) -> str | None:
    """What a text is for: other people's "train" is our "main"."""
    split = "" if isinstance(value, str) and not value.strip() else plain_label(value)
    split = "main" if split == "train" else split
    if split is not None and split not in SPLITS:
        raise ValueError(
            f"split {split!r}; allowed: {', '.join(SPLITS[:-1])} (or train, which is main)"
        )
    return split


Label = Annotated[str | None, BeforeValidator(plain_label)]


class Line(BaseModel):
    """One record of a file or table: a text, and what is known of it.

    `split` is "main" for a text with an emotion and "" without one, unless it says "neutral", "other_person", "test" or "validation";
    directions are made from "main" ("train" is another word for it).
    """

    # other people's files carry more
    model_config = ConfigDict(extra="ignore", frozen=True)

    text: Annotated[str, Field(min_length=1), AfterValidator(not_blank)]
    id: Label = None
    emotion: Label = None
    topic: Label = None
    person: Label = None
    split: Annotated[str | None, BeforeValidator(_split)] = None


def label(
    name: str, split: str, place: str = "", *,
    emotion: str | None = None, topic: str | None = None, person: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What is known of a text: the names of `LABELS`, and where it stands."""
    known = {"id": name, "emotion": emotion, "topic": topic, "person": person}
    return known | {"split": split, "place": place}


def labelled(record: Any, number: int, place: str, column: str) -> Record:
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
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{place}: {'.'.join(map(str, first['loc']))}: {reason(first)}") from error
    split = line.split if line.split is not None else "main"
    if split == "neutral" and line.emotion is not None:
        raise ValueError(
            f"{place}: split 'neutral' and the emotion {line.emotion!r}: a neutral text has none"
        )
    split = "" if split == "main" and line.emotion is None else split
    known = line.model_dump(include={"emotion", "topic", "person"})
    named = f"text-{number}" if line.id is None else line.id
    return line.text, label(named, split, place, **known)


def reader_of(path: Path, column: str) -> Callable[[], Iterator[Record]]:
    """How a file is read, by its ending."""
    if path.is_dir():
        is_set = (path / "set.yaml").is_file()
        hint = f"load_emotion_set({str(path)!r})" if is_set else "the files in it, one by one"
        raise ValueError(f"{path} is a folder; give {hint}")
    path = existing(path, "file")
    named = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    ending = named.suffix.lower()
    if ending in FOREIGN:
        raise ValueError(
            f"{path}: a {ending} file is not read here; write it as .csv, .jsonl (a record a line) or .txt (a text a line)"
        )

    def read() -> Iterator[Record]:
        with path.open("rb") as raw:
            yield from records(raw, str(path), column, ending)

    return read


def records(raw: BufferedIOBase, name: str, column: str, ending: str) -> Iterator[Record]:
    """The texts of an open file, plain or gzip; `name` and the line are in every error.

    Raises:
        ValueError: a line that is not what it should be.
    """
    start = raw.read(2)
    raw.seek(0)
    file: Any = gzip.GzipFile(fileobj=raw) if start == b"\x1f\x8b" else raw
    lines = _lines(file, name)
    if ending in TABLES:
        found = _rows(lines, name, column, TABLES[ending])
    elif ending in LINES:
        found = ((at, {column: _one_line(line, at)}) for at, line in lines if line.strip())
    else:
        found = _objects(lines)
    for n, (at, record) in enumerate(found):
        yield labelled(record, n, at, column)


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

    def texts() -> Iterator[str]:
        nonlocal place
        for at, line in lines:
            place = at
            yield line

    text = texts()
    header = next((line for line in text if line.strip()), "")
    names, separator = table(_one_line(header, place), separators)
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
            there = zip(names, cells, strict=True)
            yield place, {k: c if k == wanted or c.strip() else None for k, c in there}
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


def _lines(file: BufferedIOBase, name: str) -> Iterator[tuple[str, str]]:
    """Each line with its place."""
    number = 0
    while True:
        number += 1
        at = f"{name}:{number}"
        try:
            line = file.readline(MAX_LINE + 1)
        # what gzip raises on a damaged file
        except (EOFError, OSError, zlib.error) as error:
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
    shaped = text.startswith(("./", "../", "/", "~/", ".\\", "..\\", "~\\"))
    shaped = shaped or text[1:3] in (":\\", ":/")
    return "file" if (one and shaped) or text.lower().endswith(ENDINGS) else None

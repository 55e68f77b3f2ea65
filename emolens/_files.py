"""Reading files that people write: YAML and JSON lines, checked by pydantic, with errors that name the file, the line and the field.

Safe on a file from a stranger: size, depth and aliases are limited, nothing is executed, and a file may only name others inside its folder.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

MAX_BYTES = 50_000_000  # of one file; a set of 205,200 stories is cut into one file an emotion
MAX_DEPTH = 20  # of YAML; a set needs six, and the parser's time grows with the square of the depth


class Strict(BaseModel):
    """A record with these keys and no others; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def not_blank(text: str) -> str:
    """A text that says something, as it is."""
    if not text.strip():
        raise ValueError(f"the text is empty (found {text[:60]!r})")
    return text


Word = Annotated[str, Field(min_length=1, max_length=80), AfterValidator(not_blank)]
# of a set, a topic or a text: in joined sets their names are put together
Name = Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(not_blank)]


def data_root() -> Path:
    """Where the shipped sets and materials are: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).parent
    wheel = package / "_data"
    return wheel if wheel.is_dir() else package.parent / "emotion_sets"


def unknown(what: str, name: str, allowed: Any) -> str:
    """The sentence of an error about a name: what was given, the nearest that there is, what is allowed."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    shown = ", ".join(allowed[:30]) + (" ..." if len(allowed) > 30 else "")
    return f"unknown {what} {name!r}{hint} allowed: {shown}"


# a drive of Windows is one letter; pathlib drops all slashes but one, and that one too at the end
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{2,}|/(?=[^/]))")


def address(path: str | Path) -> str | None:
    """What a path says that is no path but an address (``https://...``, ``s3://...``), with the slashes that pathlib took from it."""
    found = _ADDRESS.match(str(path))
    if not found:
        return None
    slashes = "///" if found[1].lower() == "file" else "//"
    return f"{found[1]}:{slashes}{str(path)[found.end() :]}"


def here(path: str | Path) -> Path:
    """A path of this machine, with ~ made whole.

    Raises:
        ValueError: an address.
    """
    if (url := address(path)) is not None:
        if url.lower().startswith("file:"):
            raise ValueError(f"{url} is an address of this machine: give the path, {url[7:]}")
        raise ValueError(
            f"{url} is an address, and only what lies on this machine is read and written: download it first (a model of the hub goes by "
            "its name, owner/model)"
        )
    return Path(path).expanduser()


def existing(path: str | Path, kind: Literal["file", "folder"]) -> Path:
    """A file or a folder of this machine that is there.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the other of the two is, or a pipe or a device; or an address.
    """
    path = here(path)
    if path.is_dir() if kind == "file" else path.is_file():
        raise ValueError(
            f"{path} is a {'folder' if kind == 'file' else 'file'}; give the name of a {kind}"
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(
            f"{path} is no {kind} but a pipe or a device; write it to a file (`emolens score -` reads texts from standard input)"
        )
    if not (path.is_file() if kind == "file" else path.is_dir()):
        raise FileNotFoundError(f"{path}: no such {kind}")
    return path


def inside(folder: Path, name: str) -> Path:
    """A file that belongs to the set: a set from a stranger must not read outside its own folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / name}: a set may only name files inside its own folder")
    return path


def read_text(path: Path) -> str:
    """The text of a file of at most `MAX_BYTES`, which must be UTF-8; without the mark that editors on Windows put before it."""
    path = existing(path, "file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path}: {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read from one file"
        )
    return decoded(path.read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n")


def decoded(raw: bytes, at: str) -> str:
    """Bytes as text, which must be UTF-8; `at` begins the error."""
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = "UTF-16" if utf16 else "another encoding, such as Windows' cp1252"
        raise ValueError(
            f"{at}: not UTF-8 text (byte {error.start}) but {found}; save it as UTF-8 (in Excel: 'CSV UTF-8')"
        ) from error


def table(text: str, separators: str = ",;\t|") -> tuple[list[str], str]:
    """The header of a table, in small letters, and the sign that parts its cells: the one that makes most of them.

    >>> table("Word; Valence;AROUSAL")
    (['word', 'valence', 'arousal'], ';')
    """
    first = next((line for line in text.splitlines() if line.strip()), "")
    parted = [next(csv.reader([first], delimiter=s), []) for s in separators]
    header = max(parted, key=len)
    return [c.strip().lower() for c in header], separators[parted.index(header)]


def read_yaml(path: Path) -> tuple[dict[tuple, int], Any]:
    """The data of a YAML file and the line of every node, by its path."""
    text = read_text(path)
    try:
        try:  # libyaml is ten times as fast, and its errors are not those of the other
            lines, data = _parsed(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError:
            lines, data = _parsed(text, yaml.SafeLoader)
    # ValueError: a date such as 2026-13-45
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        deep = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or deep
        tab = " (a tab is not allowed as indentation: use spaces)" if "\\t" in str(problem) else ""
        raise ValueError(f"{path}{where}: not valid YAML: {problem}{tab}") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}:1: expected a mapping with keys such as `name` and `emotions`, found {type(data).__name__}"
        )
    return lines, data


def _parsed(text: str, loader: Any) -> tuple[dict[tuple, int], Any]:
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _at(event.start_mark, "nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            use = f"aliases (*{event.anchor}) are not used in emotion sets"
            raise _at(event.start_mark, f"{use}; write the value out")
    parser = loader(text)
    root = parser.get_single_node()
    lines: dict[tuple, int] = {}
    _lines(root, (), lines)
    return lines, None if root is None else parser.construct_document(root)


def _at(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _lines(node: Any, path: tuple, out: dict[tuple, int]) -> None:
    if node is None:  # an empty file
        return
    out[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if (*path, key.value) in out:  # YAML would silently keep the last
                raise _at(key.start_mark, f"the key {key.value!r} is there twice")
            _lines(value, (*path, key.value), out)
            out[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _lines(value, (*path, i), out)


@lru_cache
def _adapter(model: Any) -> Any:
    return TypeAdapter(model)


def validate(model: Any, data: Any, path: Path, lines: dict[tuple, int] | int) -> Any:
    """The record that `data` is; a ValueError names file, line, field, what was found and what is allowed."""
    try:
        return _adapter(model).validate_python(data)
    except ValidationError as error:
        raise ValueError(_explain(error, path, lines)) from error


def _explain(error: ValidationError, path: Path, lines: dict[tuple, int] | int) -> str:
    # the deepest branch of a union is the one that was meant
    first = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))
    # a union names its branches
    loc = tuple(k for k in first["loc"] if k != "str" and not str(k).startswith("list["))
    line: int | None = lines if isinstance(lines, int) else None
    if isinstance(lines, dict):
        line = next((lines[loc[:k]] for k in range(len(loc), -1, -1) if loc[:k] in lines), 1)
    return f"{path}:{line}: {'.'.join(map(str, loc))}: {reason(first)}"


def reason(problem: Any) -> str:
    """What pydantic found wrong with a field, in words, and what was in it."""
    if problem["type"] == "value_error":  # of our own: it says what was found
        return str(problem["ctx"]["error"])
    known = problem["type"] != "extra_forbidden"
    message = problem["msg"].lower() if known else "this key is not known here"
    found = "" if problem["type"] == "missing" else f" (found {str(problem['input'])[:60]!r})"
    return message + found


def parse_json(text: str) -> Any:
    """The data of one JSON value.

    Raises:
        ValueError: no JSON, nested too deeply, or an object with a key twice, of which others would silently keep the last.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"the key {twice!r} is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    # ValueError: also a number of more than 4,300 digits
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        problem = "nested too deeply" if deep else getattr(error, "msg", str(error))
        raise ValueError(f"not valid JSON: {problem}") from error


def read_jsonl(path: Path, model: Any) -> list[Any]:
    """One record a line; empty lines are passed over."""
    out = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        out.append(validate(model, data, path, number))
    return out


def whole(text: str, name: str) -> str:
    """A text of whole characters; a ValueError that begins with `name` for one with half of a pair, which no tokenizer reads.

    Such a text was decoded with another encoding than its own.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at place {error.start}"
        raise ValueError(
            f"{name} holds half a character ({found}): read it as UTF-8, or take that out"
        ) from None
    return text

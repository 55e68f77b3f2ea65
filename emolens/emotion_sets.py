"""Emotion sets: what a person edits in YAML, with stories in JSON lines beside it.

A set is a folder with ``set.yaml`` (emotions: names, antonyms, target words, forbidden words), ``topics.yaml`` (each topic fixes the
grammatical person for every emotion) and texts. Every emotion tells the same topics; topics are the unit of every split. Files are
read with `yaml.safe_load` rules, checked by pydantic, and every error names the file, the line, the field, what was found and what
is allowed. Nothing here sees a model; `check` reports how good a set is as stimuli, without changing it.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Person = Literal["first", "third"]
MAX_BYTES = 50_000_000  # of one file; a set of 205,200 stories is cut into one file an emotion
MAX_DEPTH = 20  # of YAML; a set needs six, and the parser's time grows with the square of the depth


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Word = Annotated[str, Field(min_length=1, max_length=80)]


class Topic(_Strict):
    """One situation that every emotion is told in. `person` holds for all emotions, so that it cannot tell them apart."""

    name: Word
    person: Person
    description: str = ""


class Story(_Strict):
    """One text. `split` is "main", or "other_person" for a topic told in the person that is not its own."""

    id: Word
    topic: Word
    person: Person
    text: Annotated[str, Field(min_length=1, max_length=20_000)]
    split: Literal["main", "other_person", "test"] = "main"


class Turn(_Strict):
    """What one speaker says before the other answers."""

    speaker: Word
    text: Annotated[str, Field(min_length=1)]


class Dialogue(_Strict):
    """Two or more speakers in turn."""

    id: Word
    topic: Word
    turns: Annotated[list[Turn], Field(min_length=2)]

    @property
    def text(self) -> str:
        return "\n".join(f"{turn.speaker}: {turn.text}" for turn in self.turns)


class Emotion(_Strict):
    """One emotion concept, as the user writes it.

    Attributes:
        antonym: An opposite in feeling; `opposite` is Plutchik's partner across the wheel.
        target_words: Words whose log-probability stands for the emotion.
        norm_key: The row of the norms tables, exact form; None where no table has it.
        forbidden: Words that its stories must not contain; ``sad*`` means every word that begins so. The name, the adjective and
            the target words with their regular inflections are always forbidden.
        stories: A JSON-lines file relative to the set, or the stories themselves.
    """

    name: Word
    adjective: Word | None = None
    antonym: Word | None = None
    opposite: Word | None = None
    family: Word | None = None
    intensity: Annotated[int, Field(ge=1, le=3)] | None = None
    target_words: list[Word] = []
    norm_key: Word | None = None
    forbidden: list[Word] = []
    prompts: list[str] = []
    stories: str | list[Story] | None = None


class _Set(_Strict):
    name: Word
    extends: Word | None = None
    language: Annotated[str, Field(pattern="^[a-z]{2}$")] = "en"
    description: str = ""
    source: str = ""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    emotions: Annotated[list[Emotion], Field(min_length=1)]
    neutral: str | None = None
    topics: str | list[Topic] | None = None


class Pair(_Strict):
    """A clean and a corrupted prompt that differ in one fact, and so in what someone feels; `control` changes a fact that does not matter.

    Each prompt ends where the word for the feeling would come.
    """

    id: Word
    clean: Annotated[str, Field(min_length=1, max_length=2000)]
    corrupted: Annotated[str, Field(min_length=1, max_length=2000)]
    control: Annotated[str, Field(min_length=1, max_length=2000)]
    emotion_clean: Word
    emotion_corrupted: Word


class Stems(_Strict):
    """Openings whose next word could name a feeling: some to choose a layer and a dose on, others to report."""

    choose: Annotated[list[str], Field(min_length=1)]
    report: Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True, eq=False)
class EmotionSet:
    """A validated set: emotions, topics, stories and neutral texts.

    `stories[e]` are the texts of emotion e, in the order of the topics; `neutral` holds stories and dialogues.
    """

    name: str
    language: str
    emotions: tuple[Emotion, ...]
    topics: tuple[Topic, ...]
    stories: dict[str, tuple[Story, ...]]
    neutral: tuple[Story | Dialogue, ...]
    description: str = ""
    source: str = ""
    sha256: str | None = None

    def __repr__(self) -> str:
        return (
            f"EmotionSet({self.name}: {len(self.emotions)} emotions x {len(self.topics)} topics, {len(self.texts())} stories, "
            f"{len(self.neutral)} neutral texts, {self.language})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(e.name for e in self.emotions)

    def __getitem__(self, name: str) -> Emotion:
        for emotion in self.emotions:
            if emotion.name == name:
                return emotion
        raise KeyError(_unknown("emotion", name, self.names))

    @cached_property
    def families(self) -> dict[str, str]:
        """Family of each emotion; an emotion without one is its own."""
        return {e.name: e.family or e.name for e in self.emotions}

    def texts(self, split: str = "main") -> list[tuple[str, Story]]:
        """(emotion, story) for every story of a split, emotion by emotion."""
        return [(e, s) for e in self.names for s in self.stories[e] if s.split == split]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every text with its emotion, topic, person and split, in a fixed order: the identity of the stimuli."""
        rows = [[e, s.topic, s.person, s.split, s.text] for e in sorted(self.names) for s in self.stories[e]]
        rows += [["", n.topic, "", "neutral", n.text] for n in self.neutral]
        return hashlib.sha256(json.dumps(sorted(rows), ensure_ascii=False).encode()).hexdigest()

    def subset(self, names: Sequence[str]) -> EmotionSet:
        """The same set with some of its emotions, in the order given. Antonyms that are left out are dropped."""
        kept = [self[name] for name in names]
        if len(kept) < 2 or len(set(names)) < len(kept):
            raise ValueError(f"a set needs at least two emotions, each once, got {list(names)}")
        inside = lambda name: name if name in names else None  # noqa: E731  (used twice in one line)
        emotions = tuple(
            e.model_copy(update={"antonym": inside(e.antonym), "opposite": inside(e.opposite)}) for e in kept
        )
        return replace(self, emotions=emotions, stories={n: self.stories[n] for n in names}, sha256=None)


def data_root() -> Path:
    """Where the shipped sets are: inside the wheel, or at the top of a checkout."""
    inside = Path(__file__).parent / "_data"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "emotion_sets"


def list_emotion_sets() -> list[str]:
    """Names of the shipped sets."""
    return sorted(p.parent.name for p in data_root().glob("*/set.yaml"))


def load_emotion_set(name_or_path: str | Path) -> EmotionSet:
    """Load and validate a set: a shipped one by name, or the user's own folder or YAML file.

    Raises:
        FileNotFoundError: no such set; the message lists the shipped ones.
        ValueError: what is wrong, as ``file:line: field: found ...; allowed ...``.
    """
    given = str(name_or_path)
    shipped = data_root() / given / "set.yaml"
    if "/" not in given and shipped.is_file():
        return _load(shipped, ())
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / "set.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            _unknown("emotion set", given, list_emotion_sets()) + " (or give a folder with a set.yaml)"
        )
    return _load(path, ())


def load_pairs(path: str | Path | None = None) -> tuple[Pair, ...]:
    """Clean and corrupted prompts for activation patching: the 60 shipped ones, or a JSON-lines file of your own.

    Raises:
        FileNotFoundError, ValueError: no such file; what is wrong in which line.
    """
    pairs = tuple(_read_jsonl(data_root() / "pairs.jsonl" if path is None else Path(path).expanduser(), Pair))
    most = Counter(p.id for p in pairs).most_common(1)
    if most and most[0][1] > 1:
        raise ValueError(f"{path or 'pairs.jsonl'}: two pairs have the id {most[0][0]!r}")
    for p in pairs:
        if p.clean in (p.corrupted, p.control):
            other = "corrupted" if p.clean == p.corrupted else "control"
            raise ValueError(f"{path or 'pairs.jsonl'}: pair {p.id!r}: clean and {other} are the same prompt")
    return pairs


def load_stems(path: str | Path | None = None) -> Stems:
    """Openings for validation steering: the 24 shipped ones, or a YAML file of your own.

    Raises:
        FileNotFoundError, ValueError: no such file; what is wrong in which line.
    """
    file = data_root() / "stems.yaml" if path is None else Path(path).expanduser()
    lines, data = _read_yaml(file)
    stems = _validate(Stems, data, file, lines)
    if both := set(stems.choose) & set(stems.report):
        raise ValueError(f"{file}: {sorted(both)[0]!r} is in both halves; what was chosen on cannot be reported on")
    return stems


def _load(path: Path, seen: tuple[Path, ...]) -> EmotionSet:
    if path.resolve() in seen:
        raise ValueError(f"{path}: `extends` goes round in a circle")
    lines, data = _read_yaml(path)
    spec = _validate(_Set, data, path, lines)
    here = path.parent
    names = [e.name for e in spec.emotions]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{path}:{lines.get(('emotions', i), 1)}: emotions.{i}.name: {name!r} is there twice")

    base = None
    if spec.extends is not None:
        local = here / spec.extends / "set.yaml"
        parent = local if local.is_file() else data_root() / spec.extends / "set.yaml"
        if not parent.is_file():
            raise FileNotFoundError(f"{path}: extends: " + _unknown("emotion set", spec.extends, list_emotion_sets()))
        base = _load(parent, (*seen, path.resolve()))

    topics = _topics(spec, here, base, path)
    emotions, stories = [], {}
    for i, emotion in enumerate(spec.emotions):
        where = f"{path}:{lines.get(('emotions', i), 1)}: emotions.{i}"
        if base is not None and emotion.name in base.names:
            own = emotion.model_dump(exclude_unset=True)
            merged = base[emotion.name].model_copy(update=own)
            told = base.stories[emotion.name] if emotion.stories is None else _stories(emotion, here, where)
        else:
            merged, told = emotion, _stories(emotion, here, where)
        emotions.append(merged.model_copy(update={"stories": None}))
        stories[emotion.name] = told
    if base is not None:  # a view keeps the antonyms that it contains
        emotions = [
            e.model_copy(
                update={
                    k: None for k in ("antonym", "opposite") if getattr(e, k) not in names and _inherited(spec, e, k)
                }
            )
            for e in emotions
        ]
    result = EmotionSet(
        name=spec.name,
        language=base.language if base and "language" not in spec.model_fields_set else spec.language,
        emotions=tuple(emotions),
        topics=topics,
        stories=stories,
        neutral=_neutral(spec, here) or (base.neutral if base else ()),
        description=spec.description,
        source=spec.source,
        sha256=spec.sha256,
    )
    _cross_check(result, path, lines)
    return result


def _inherited(spec: _Set, emotion: Emotion, key: str) -> bool:
    own = next(e for e in spec.emotions if e.name == emotion.name)
    return key not in own.model_fields_set


def _topics(spec: _Set, here: Path, base: EmotionSet | None, path: Path) -> tuple[Topic, ...]:
    if spec.topics is None:
        if base is None:
            raise ValueError(f"{path}: topics: missing; give a file or a list of {{name, person}}")
        return base.topics
    if isinstance(spec.topics, list):
        return tuple(spec.topics)
    file = _inside(here, spec.topics)
    lines, data = _read_yaml(file)

    class _Topics(_Strict):
        topics: Annotated[list[Topic], Field(min_length=1)]

    return tuple(_validate(_Topics, data, file, lines).topics)


def _stories(emotion: Emotion, here: Path, where: str) -> tuple[Story, ...]:
    if emotion.stories is None:
        raise ValueError(f"{where}.stories: {emotion.name!r} has no stories; give a JSON-lines file or a list")
    if isinstance(emotion.stories, list):
        return tuple(emotion.stories)
    return tuple(_read_jsonl(_inside(here, emotion.stories), Story))


def _neutral(spec: _Set, here: Path) -> tuple[Story | Dialogue, ...]:
    if spec.neutral is None:
        return ()
    folder = _inside(here, spec.neutral)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: neutral: no such folder (it may hold stories.jsonl and dialogues.jsonl)")
    out: list[Story | Dialogue] = []
    for name, model in (("stories.jsonl", Story), ("dialogues.jsonl", Dialogue)):
        if (folder / name).is_file():
            out += _read_jsonl(_inside(here, f"{spec.neutral}/{name}"), model)
    return tuple(out)


def _cross_check(s: EmotionSet, path: Path, lines: dict[tuple, int]) -> None:
    """What no single file can know: names that refer to each other, and the same topics for every emotion."""
    line = lambda i: lines.get(("emotions", i), 1)  # noqa: E731
    if len(s.emotions) < 2:
        raise ValueError(f"{path}:{line(0)}: emotions: only {s.names[0]!r}; a set needs at least two to tell apart")
    person = {t.name: t.person for t in s.topics}
    if len(person) < len(s.topics):
        twice = Counter(t.name for t in s.topics).most_common(1)[0][0]
        raise ValueError(f"{path}: topics: {twice!r} is there twice")
    for i, emotion in enumerate(s.emotions):
        for key in ("antonym", "opposite"):
            name = getattr(emotion, key)
            if name is not None and name not in s.names:
                raise ValueError(f"{path}:{line(i)}: emotions.{i}.{key}: " + _unknown("emotion", name, s.names))
            if name == emotion.name:
                raise ValueError(f"{path}:{line(i)}: emotions.{i}.{key}: {name!r} cannot be its own {key}")
        for story in s.stories[emotion.name]:
            if story.topic not in person:
                raise ValueError(f"{path}: story {story.id!r}: " + _unknown("topic", story.topic, person))
            if story.split == "main" and story.person != person[story.topic]:
                raise ValueError(
                    f"{path}: story {story.id!r} is told in the {story.person} person, but topic {story.topic!r} is "
                    f"{person[story.topic]} for every emotion (use split: other_person)"
                )
    ids = Counter(x.id for x in (*(t for ts in s.stories.values() for t in ts), *s.neutral))
    if ids and (most := ids.most_common(1)[0])[1] > 1:
        raise ValueError(f"{path}: two texts have the id {most[0]!r}")
    told = {e: Counter(t.topic for t in s.stories[e] if t.split == "main") for e in s.names}
    first = s.names[0]
    if not any(told.values()):
        raise ValueError(f"{path}: stories: not one emotion has a story of split main")
    for e in s.names[1:]:
        if told[e] != told[first]:
            odd = sorted((told[e] - told[first]) or (told[first] - told[e]))[0]
            raise ValueError(
                f"{path}: the emotions do not share their topics: {odd!r} is told {told[first][odd]} times for {first!r} and "
                f"{told[e][odd]} times for {e!r}; every emotion needs the same topics, or the topic is read as the emotion"
            )
    for text in s.neutral:
        if text.topic not in person:
            raise ValueError(f"{path}: neutral text {text.id!r}: " + _unknown("topic", text.topic, person))


# --- reading files ----------------------------------------------------------------------------------------------------


def _unknown(what: str, name: str, allowed: Any) -> str:
    allowed = list(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(allowed[:30]) + (" ..." if len(allowed) > 30 else "")
    return f"unknown {what} {name!r}{hint} allowed: {shown}" if hint else f"unknown {what} {name!r}; allowed: {shown}"


def _inside(here: Path, name: str) -> Path:
    """A file that belongs to the set: a set from a stranger must not read outside its own folder."""
    path = (here / name).resolve()
    if not path.is_relative_to(here.resolve()):
        raise ValueError(f"{here / name}: a set may only name files inside its own folder")
    return path


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read from one file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _read_yaml(path: Path) -> tuple[dict[tuple, int], Any]:
    """The data of a YAML file and the line of every node, by its path."""
    text = _read_text(path)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
            if isinstance(event, yaml.AliasEvent):
                problem = f"aliases (*{event.anchor}) are not used in emotion sets; write the value out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
        lines: dict[tuple, int] = {}
        _lines(root, (), lines)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date such as 2026-13-45
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


def _lines(node: Any, path: tuple, out: dict[tuple, int]) -> None:
    if node is None:  # an empty file
        return
    out[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if (*path, key.value) in out:  # YAML would silently keep the last
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            _lines(value, (*path, key.value), out)
            out[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _lines(value, (*path, i), out)


def _validate(model: Any, data: Any, path: Path, lines: dict[tuple, int] | int) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError(_explain(error, path, lines)) from error


def _explain(error: ValidationError, path: Path, lines: dict[tuple, int] | int) -> str:
    first = min(error.errors(), key=lambda e: -len(e["loc"]))  # the deepest branch of a union is the one that was meant
    loc = tuple(
        part for part in first["loc"] if not (isinstance(part, str) and (part == "str" or part.startswith("list[")))
    )
    line: int | None = lines if isinstance(lines, int) else None
    if isinstance(lines, dict):
        line = next((lines[loc[:k]] for k in range(len(loc), -1, -1) if loc[:k] in lines), 1)
    found = "" if first["type"] == "missing" else f" (found {str(first['input'])[:60]!r})"
    message = "this key is not known here" if first["type"] == "extra_forbidden" else first["msg"].lower()
    return f"{path}:{line}: {'.'.join(map(str, loc))}: {message}{found}"


def _read_jsonl(path: Path, model: Any) -> list[Any]:
    out = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
            problem = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise ValueError(f"{path}:{number}: not valid JSON: {problem}") from error
        out.append(_validate(model, data, path, number))
    return out


# --- norms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """Human ratings of a word, in the table's own units."""

    valence: float
    arousal: float
    dominance: float


def load_norms(name_or_path: str | Path = "glasgow_2019") -> dict[str, Norm]:
    """Human valence, arousal and dominance of words, by exact form.

    Args:
        name_or_path: "glasgow_2019" (Scott et al. 2019, scale 1..9, CC BY 4.0), "russell_mehrabian_1977" (scale -1..1), or a CSV file
            of your own with the columns word, valence, arousal, dominance.

    Raises:
        FileNotFoundError: no such table.
        ValueError: a column is missing or a cell is not a number, with the line.
    """
    folder = data_root() / "norms"
    path = folder / f"{name_or_path}.csv"
    if not path.is_file():
        path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            _unknown("norms table", str(name_or_path), sorted(p.stem for p in folder.glob("*.csv")))
        )
    norms: dict[str, Norm] = {}
    rows = ["" if row.startswith("#") else row for row in _read_text(path).splitlines()]
    comments = next((i for i, row in enumerate(rows) if row), len(rows))
    reader = csv.DictReader(rows[comments:])
    missing = {"word", "valence", "arousal", "dominance"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path}: column {sorted(missing)[0]!r} is missing; needed: word, valence, arousal, dominance")
    for row in reader:
        if row.get("match", "exact") == "exact":
            where = f"{path}:{comments + reader.line_num}: {row['word']!r}"
            try:
                values = [float(row[k]) for k in ("valence", "arousal", "dominance")]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: not a number") from error
            if not np.isfinite(values).all():
                raise ValueError(f"{where}: not a number")
            norms[row["word"]] = Norm(*values)
    return norms


# --- checking a set as stimuli ----------------------------------------------------------------------------------------

WORDS = {"en": (80, 120), "de": (70, 120)}  # per story; Chinese and Japanese are counted in characters
CHARACTERS = {"zh": (120, 320), "ja": (160, 400)}
NEAR_DUPLICATE = 0.25  # character 5-gram Jaccard; unrelated English stories of 100 words stay below .10


@dataclass(frozen=True)
class Check:
    """What `check_emotion_set` found: numbers for a table, and violations, each with the text it is about."""

    numbers: dict[str, str]
    violations: tuple[str, ...]


def length(text: str, language: str) -> int:
    """Words, or characters for Chinese and Japanese."""
    return len(re.sub(r"\s", "", text)) if language in CHARACTERS else len(text.split())


def leaks(text: str, emotion: Emotion) -> list[str]:
    """Words of `text` that name the emotion, inflect its name, or are on its forbidden list.

    >>> leaks("She sadly put it down; a sad day.", Emotion(name="sadness", forbidden=["sad", "sad*ly"]))
    ['sad']
    """
    whole = {w.lower() for w in (emotion.name, emotion.adjective or "", *emotion.target_words) if w}
    forms = {w + end for w in whole for end in ("", "s", "d", "ed", "ing", "ly", "ness")}
    forms |= {w.lower() for w in emotion.forbidden if not w.endswith("*")}
    stems = tuple(w[:-1].lower() for w in emotion.forbidden if w.endswith("*"))
    words = re.findall(r"[^\W\d_]+", text.lower())
    return [w for w in words if w in forms or (stems and w.startswith(stems))]


def check_emotion_set(s: EmotionSet, *, seed: int = 0) -> Check:
    """Counts, lengths, balance, leaks, near-duplicates, repeated openings, and TF-IDF accuracy across topics as information."""
    violations: list[str] = []
    low, high = WORDS.get(s.language) or CHARACTERS.get(s.language) or (1, 10**6)
    stories = [(e, t) for e in s.names for t in s.stories[e]]
    lengths = [length(t.text, s.language) for _, t in stories]
    violations += [
        f"{t.id}: {n} {'characters' if s.language in CHARACTERS else 'words'}; allowed {low} to {high}"
        for (_, t), n in zip(stories, lengths, strict=True)
        if not low <= n <= high
    ]
    for e, t in stories:
        found = leaks(t.text, s[e])
        if found:
            violations.append(f"{t.id}: names the emotion: {', '.join(sorted(set(found)))}")
    person = Counter(t.person for _, t in s.texts())
    if person["first"] != person["third"]:
        violations.append(
            f"grammatical person is not balanced: {person['first']} first-person, {person['third']} third-person stories"
        )
    texts = [(t.id, t.text) for _, t in stories] + [(n.id, n.text) for n in s.neutral]
    pairs = list(_near_duplicates(texts))
    violations += [
        f"{a} and {b}: character 5-gram Jaccard {j:.2f} (allowed below {NEAR_DUPLICATE})" for a, b, j in pairs
    ]
    openings: dict[str, list[str]] = defaultdict(list)
    for name, text in texts:
        openings[" ".join(text.lower().split()[:4])].append(name)
    violations += [f"{', '.join(ids)}: the same four opening words" for ids in openings.values() if len(ids) > 1]
    if s.sha256 is not None and s.sha256 != s.fingerprint:
        violations.append(f"the texts are not the frozen ones: sha256 {s.fingerprint}, set.yaml says {s.sha256}")
    norms = load_norms()
    covered = sum(1 for e in s.emotions if e.norm_key in norms)
    numbers = {
        "emotions": str(len(s.names)),
        "topics": f"{len(s.topics)} ({sum(t.person == 'first' for t in s.topics)} first person)",
        "stories": f"{len(s.texts())} main, {len(s.texts('other_person'))} in the other person",
        "neutral texts": f"{sum(isinstance(n, Story) for n in s.neutral)} stories, {sum(isinstance(n, Dialogue) for n in s.neutral)} dialogues",
        "length": f"median {np.median(lengths):.0f}, {min(lengths)} to {max(lengths)}",
        "norms (Glasgow, exact form)": f"{covered} of {len(s.names)}",
        "sha256 of the texts": s.fingerprint[:16],
    }
    numbers |= _tfidf(s, seed)
    return Check(numbers, tuple(violations))


def _near_duplicates(texts: list[tuple[str, str]]) -> Iterator[tuple[str, str, float]]:
    """Pairs whose sets of character 5-grams overlap (Jaccard) by `NEAR_DUPLICATE` or more."""
    from sklearn.feature_extraction.text import CountVectorizer

    counts: Any = CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True)
    grams = counts.fit_transform([t for _, t in texts]).astype(np.float32)
    sizes = np.asarray(grams.sum(1)).ravel()
    shared = (grams @ grams.T).tocoo()
    for i, j, both in zip(shared.row, shared.col, shared.data, strict=True):
        if i < j and (jaccard := both / (sizes[i] + sizes[j] - both)) >= NEAR_DUPLICATE:
            yield texts[i][0], texts[j][0], float(jaccard)


def _tfidf(s: EmotionSet, seed: int) -> dict[str, str]:
    """How far words alone go: TF-IDF logistic regression on held-out topics, for emotions and for families."""
    from emolens import stats

    main = s.texts()
    topics = [t.topic for _, t in main]
    if len(set(topics)) < 4:
        return {"TF-IDF accuracy": "not computed (fewer than four topics)"}
    folds = stats.topic_folds({t.name: t.person for t in s.topics}, n_folds=4)
    out = {}
    for what, labels in (("emotions", [e for e, _ in main]), ("families", [s.families[e] for e, _ in main])):
        if len(set(labels)) < 2:
            continue
        scores = stats.tfidf_scores([t.text for _, t in main], labels, topics, folds, s.language)
        right = stats.top_k(scores, np.unique(labels, return_inverse=True)[1])
        accuracy = stats.bootstrap_mean(right.astype(float), topics, seed=seed)
        out[f"TF-IDF accuracy, {what}"] = f"{accuracy} (chance {1 / len(set(labels)):.2f}; information, not a test)"
    return out

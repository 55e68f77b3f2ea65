"""Emotion sets: what a person edits in YAML, with stories in JSON lines beside it.

A set is a folder with ``set.yaml`` (emotions: names, antonyms, target words, forbidden words), ``topics.yaml`` (each topic fixes the
grammatical person for every emotion) and texts. Every emotion tells the same topics; topics are the unit of every split. Files are
read with `yaml.safe_load` rules, checked by pydantic, and every error names the file, the line, the field, what was found and what
is allowed. Nothing here sees a model; how good a set is as stimuli is `set_checks`' business, and the smaller materials of experiments
(pairs, scenarios, dialogues) are `materials`'.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from emolens._files import Strict, Word, here, inside, read_jsonl, read_yaml, unknown, validate
from emolens.shards import vacant_folder

Person = Literal["first", "third", "mixed"]
Length = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]  # least and most, in words or characters


class Topic(Strict):
    """One situation that every emotion is told in. `person` holds for all emotions, so that it cannot tell them apart.

    "mixed" is for texts of life and corpora of others, in which a topic is told by "I" as well as of "she". `length` is what a story of
    this topic may have, where that is not the set's.
    """

    name: Word
    person: Person
    description: str = ""
    length: Length | None = None


class _Told(Strict):
    id: Word
    topic: Word

    @property
    def source(self) -> str:
        """The set that the text comes from, in a joined set (`join_emotion_sets`); else empty."""
        return self.topic.partition("/")[0] if "/" in self.topic else ""


class Story(_Told):
    """One text. `split` is "main", or "other_person" for a topic told in the person that is not its own.

    `may_name`: the text was asked for as people write it, and may name its emotion.
    """

    person: Person
    text: Annotated[str, Field(min_length=1, max_length=20_000)]
    split: Literal["main", "other_person", "test"] = "main"
    may_name: bool = False


class Turn(Strict):
    """What one speaker says before the other answers."""

    speaker: Word
    text: Annotated[str, Field(min_length=1)]


class Dialogue(_Told):
    """Two or more speakers in turn."""

    turns: Annotated[list[Turn], Field(min_length=2)]

    @property
    def text(self) -> str:
        return "\n".join(f"{turn.speaker}: {turn.text}" for turn in self.turns)


class Emotion(Strict):
    """One emotion concept, as the user writes it.

    Attributes:
        concept: The same emotion by its name in `core`, where the name here is another word or another language: it lines sets up.
        antonym: An opposite in feeling; `opposite` is Plutchik's partner across the wheel.
        target_words: Words whose log-probability stands for the emotion.
        norm_key: The row of the norms tables, exact form; None where no table has it.
        forbidden: Words that its stories must not contain; ``sad*`` means every word that begins so. The name, the adjective and
            the target words with their regular inflections are always forbidden. In Chinese and Japanese any occurrence counts.
        prompts: What to ask a model for such a story, with {topic}, {person} and {adjective}; the set's own where none is given.
        stories: A JSON-lines file relative to the set, or the stories themselves.
    """

    name: Word
    concept: Word | None = None
    adjective: Word | None = None
    antonym: Word | None = None
    opposite: Word | None = None
    family: Word | None = None
    intensity: Annotated[int, Field(ge=1, le=3)] | None = None
    target_words: list[Word] = Field(default_factory=list)
    norm_key: Word | None = None
    forbidden: list[Word] = Field(default_factory=list)
    prompts: list[str] = Field(default_factory=list)
    stories: str | list[Story] | None = None


class _Set(Strict):
    name: Word
    extends: Word | None = None
    language: Annotated[str, Field(pattern="^[a-z]{2}$")] = "en"
    description: str = ""
    source: str = ""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    length: Length | None = None
    edition: Literal[1, 2] = 1
    prompts: list[str] = Field(default_factory=list)
    emotions: Annotated[list[Emotion], Field(min_length=1)]
    neutral: str | None = None
    topics: str | list[Topic] | None = None


class _Topics(Strict):
    topics: Annotated[list[Topic], Field(min_length=1)]


@dataclass(frozen=True, eq=False)
class EmotionSet:
    """A validated set: emotions, topics, stories and neutral texts.

    `stories[e]` are the texts of emotion e, in the order of the topics; `neutral` holds stories and dialogues. `length` is what a story
    may have, in words (in characters for Chinese and Japanese), where the set says so. `edition` 2 says that form was drawn by lot and
    plots were assigned, so that the texts keep the rules for it (`set_checks`); `design` is the file of these sheets, where there is one.
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
    length: tuple[int, int] | None = None
    edition: int = 1
    design: Path | None = None

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
        raise KeyError(unknown("emotion", name, self.names))

    @cached_property
    def families(self) -> dict[str, str]:
        """Family of each emotion; an emotion without one is its own."""
        return {e.name: e.family or e.name for e in self.emotions}

    @cached_property
    def told(self) -> dict[str, Person]:
        """Person of each topic that has a main story, in order: what folds are dealt from. Others are of neutral texts alone."""
        used = {s.topic for _, s in self.texts()}
        return {t.name: t.person for t in self.topics if t.name in used}

    @cached_property
    def concepts(self) -> dict[str, str]:
        """Emotion of each concept: what lines this set up with `core` and with its translations."""
        return {e.concept or e.name: e.name for e in self.emotions}

    def texts(self, split: str = "main") -> list[tuple[str, Story]]:
        """(emotion, story) for every story of a split, emotion by emotion."""
        return [(e, s) for e in self.names for s in self.stories[e] if s.split == split]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every text with its emotion, topic, person and split, in a fixed order: the identity of the stimuli."""
        rows = [
            [e, s.topic, s.person, s.split, s.text]
            for e in sorted(self.names)
            for s in self.stories[e]
        ]
        rows += [["", n.topic, "", "neutral", n.text] for n in self.neutral]
        return hashlib.sha256(json.dumps(sorted(rows), ensure_ascii=False).encode()).hexdigest()

    def subset(self, names: Sequence[str]) -> EmotionSet:
        """The same set with some of its emotions, in the order given. Antonyms that are left out are dropped."""
        kept = [self[name] for name in names]
        if len(kept) < 2 or len(set(names)) < len(kept):
            raise ValueError(f"a set needs at least two emotions, each once, got {list(names)}")
        inside = lambda name: name if name in names else None  # noqa: E731  (used twice in one line)
        emotions = tuple(
            e.model_copy(update={"antonym": inside(e.antonym), "opposite": inside(e.opposite)})
            for e in kept
        )
        return replace(
            self, emotions=emotions, stories={n: self.stories[n] for n in names}, sha256=None
        )


def data_root() -> Path:
    """Where the shipped sets are: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "_data"
    return inside if inside.is_dir() else package.parent / "emotion_sets"


def list_emotion_sets() -> list[str]:
    """Names of the shipped sets."""
    return sorted(p.parent.name for p in data_root().glob("*/set.yaml"))


def load_emotion_set(name_or_path: str | Path | Sequence[str | Path]) -> EmotionSet:
    """Load and validate a set: a shipped one by name, or the user's own folder or YAML file.

    Several are joined (`join_emotion_sets`): give a list of them, or their names with a plus, ``"core2+everyday"``.

    Raises:
        FileNotFoundError: no such set; the message lists the shipped ones.
        ValueError: what is wrong, as ``file:line: field: found ...; allowed ...``.
    """
    if isinstance(name_or_path, EmotionSet):
        raise ValueError(
            f"{name_or_path.name!r} is loaded already; sets that are loaded are joined by join_emotion_sets"
        )
    if not isinstance(name_or_path, str | Path):
        return join_emotion_sets([load_emotion_set(name) for name in name_or_path])
    given = str(name_or_path)
    shipped = data_root() / given / "set.yaml"
    if "/" not in given and shipped.is_file():
        return _load(shipped, ())
    path = here(given)
    if path.is_dir():
        path = path / "set.yaml"
    if not path.is_file() and "+" in given:
        return load_emotion_set(given.split("+"))
    if not path.is_file():
        raise FileNotFoundError(
            unknown("emotion set", given, list_emotion_sets())
            + " (or give a folder with a set.yaml)"
        )
    return _load(path, ())


def join_emotion_sets(sets: Sequence[EmotionSet]) -> EmotionSet:
    """One set of several that have the same emotions: the stories and neutral texts of all, each on its own topics.

    The source is a factor of the design. A topic `t` of set `s` becomes ``s/t`` and keeps its person and its length, so that no two sets
    share a topic; `Story.source` is `s`; every emotion has the same texts from each source, and folds take topics from each in turn
    (`stats.topic_folds`). Ids become ``s/id``. Emotions are described as the first set does, and come in its order.

    Raises:
        ValueError: fewer than two sets, two of one name, two languages, emotions that are not the same in all, or a text in two of them.
    """
    names = [s.name for s in sets]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"sets are joined from two or more of different names, got {names}")
    first = sets[0]
    for s in sets[1:]:
        if s.language != first.language:
            raise ValueError(
                f"{first.name!r} is in {first.language!r} and {s.name!r} in {s.language!r}; join one language"
            )
        if odd := sorted(set(s.names) ^ set(first.names)):
            alone = first.name if odd[0] in first.names else s.name
            raise ValueError(
                f"{first.name!r} and {s.name!r} do not have the same emotions: only {alone!r} has {odd[0]!r} (and {len(odd) - 1} more "
                "differ); join subsets: join_emotion_sets([a.subset(names), b.subset(names)])"
            )
    seen: dict[str, str] = {}
    for s in sets:
        texts = {t.text: t.id for t in (*(t for e in s.names for t in s.stories[e]), *s.neutral)}
        if both := [text for text in texts if text in seen]:
            raise ValueError(
                f"{seen[both[0]]!r} and {s.name!r} share a text ({texts[both[0]]!r} and {len(both) - 1} more); each text once, or it is held out "
                "under one topic and fitted on under another"
            )
        seen |= dict.fromkeys(texts, s.name)

    def under(s: EmotionSet, text: Any) -> Any:
        return text.model_copy(
            update={"id": f"{s.name}/{text.id}", "topic": f"{s.name}/{text.topic}"}
        )

    return EmotionSet(
        name="+".join(names),
        language=first.language,
        emotions=first.emotions,
        topics=tuple(
            t.model_copy(update={"name": f"{s.name}/{t.name}", "length": t.length or s.length})
            for s in sets
            for t in s.topics
        ),
        stories={e: tuple(under(s, t) for s in sets for t in s.stories[e]) for e in first.names},
        neutral=tuple(under(s, n) for s in sets for n in s.neutral),
        description=" | ".join(f"{s.name}: {s.description}" for s in sets),
        source=" | ".join(f"{s.name}: {s.source}" for s in sets),
        edition=min(s.edition for s in sets),
    )


def check_vacant(folder: str | Path) -> Path:
    """The folder that a set is to be written to.

    Raises:
        FileExistsError: there is a set already, or something else where it would be.
    """
    folder = vacant_folder(folder)
    for name in ("set.yaml", "topics.yaml", "stories", "neutral"):
        if (folder / name).exists():
            held = "a set" if name == "set.yaml" else "something else under a name that a set needs"
            raise FileExistsError(f"{folder} already holds {held}; choose another folder")
    return folder


def save_emotion_set(s: EmotionSet, folder: str | Path) -> Path:
    """Write a set as a folder that `load_emotion_set` reads: set.yaml, topics.yaml, one file of stories an emotion, neutral texts.

    Raises:
        FileExistsError: there is a set already.
    """
    folder = check_vacant(folder)
    (folder / "stories").mkdir(parents=True, exist_ok=True)
    emotions = []
    for number, e in enumerate(s.emotions):
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in e.name)
        file = f"stories/{number:03d}-{name}.jsonl"  # numbered: two names may differ in nothing a file system keeps
        _write_jsonl(folder / file, s.stories[e.name])
        emotions.append(e.model_dump(exclude_defaults=True) | {"stories": file})
    for name, kind in (("stories", Story), ("dialogues", Dialogue)):
        texts = [n for n in s.neutral if isinstance(n, kind)]
        if texts:
            (folder / "neutral").mkdir(exist_ok=True)
            _write_jsonl(folder / "neutral" / f"{name}.jsonl", texts)
    topics = [t.model_dump(exclude_defaults=True, mode="json") for t in s.topics]
    _write_yaml(folder / "topics.yaml", {"topics": topics})
    head = {
        "name": s.name,
        "language": s.language,
        "description": s.description,
        "source": s.source,
    }
    head |= {"sha256": s.fingerprint, "topics": "topics.yaml"} | (
        {"length": list(s.length)} if s.length else {}
    )
    head |= {"edition": s.edition} if s.edition > 1 else {}
    head |= {"neutral": "neutral"} if s.neutral else {}
    _write_yaml(
        folder / "set.yaml", head | {"emotions": emotions}
    )  # last: a folder with a set.yaml is a whole set
    return folder


def _write_jsonl(path: Path, records: Sequence[Story | Dialogue]) -> None:
    lines = [
        json.dumps(r.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n" for r in records
    ]
    path.write_text("".join(lines), encoding="utf-8")


class _Plain(yaml.SafeDumper):
    """Writes a list again where it is there twice: the reader takes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_yaml(path: Path, data: dict[str, Any]) -> None:
    text = yaml.dump(data, Dumper=_Plain, allow_unicode=True, sort_keys=False, width=120)
    path.write_text(text, encoding="utf-8")


def _load(path: Path, seen: tuple[Path, ...]) -> EmotionSet:
    if path.resolve() in seen:
        raise ValueError(f"{path}: `extends` goes round in a circle")
    lines, data = read_yaml(path)
    spec = validate(_Set, data, path, lines)
    here = path.parent
    names = [e.name for e in spec.emotions]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(
                f"{path}:{lines.get(('emotions', i), 1)}: emotions.{i}.name: {name!r} is there twice"
            )

    base = None
    if spec.extends is not None:
        local = here / spec.extends / "set.yaml"
        parent = local if local.is_file() else data_root() / spec.extends / "set.yaml"
        if not parent.is_file():
            raise FileNotFoundError(
                f"{path}: extends: " + unknown("emotion set", spec.extends, list_emotion_sets())
            )
        base = _load(parent, (*seen, path.resolve()))

    topics = _topics(spec, here, base, path)
    emotions, stories = [], {}
    for i, emotion in enumerate(spec.emotions):
        where = f"{path}:{lines.get(('emotions', i), 1)}: emotions.{i}"
        if base is not None and emotion.name in base.names:
            own = emotion.model_dump(exclude_unset=True)
            merged = base[emotion.name].model_copy(update=own)
            told = (
                base.stories[emotion.name]
                if emotion.stories is None
                else _stories(emotion, here, where)
            )
        else:
            merged, told = emotion, _stories(emotion, here, where)
        emotions.append(
            merged.model_copy(update={"stories": None, "prompts": merged.prompts or spec.prompts})
        )
        stories[emotion.name] = told
    if base is not None:  # a view keeps the antonyms that it contains
        emotions = [
            e.model_copy(
                update={
                    k: None
                    for k in ("antonym", "opposite")
                    if getattr(e, k) not in names and _inherited(spec, e, k)
                }
            )
            for e in emotions
        ]
    result = EmotionSet(
        name=spec.name,
        language=base.language
        if base and "language" not in spec.model_fields_set
        else spec.language,
        emotions=tuple(emotions),
        topics=topics,
        stories=stories,
        neutral=_neutral(spec, here) or (base.neutral if base else ()),
        description=spec.description,
        source=spec.source,
        sha256=spec.sha256,
        length=spec.length or (base.length if base else None),
        edition=base.edition if base and "edition" not in spec.model_fields_set else spec.edition,
        design=here / "design.jsonl"
        if (here / "design.jsonl").is_file()
        else base.design
        if base
        else None,
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
    file = inside(here, spec.topics)
    lines, data = read_yaml(file)

    return tuple(validate(_Topics, data, file, lines).topics)


def _stories(emotion: Emotion, here: Path, where: str) -> tuple[Story, ...]:
    if emotion.stories is None:
        raise ValueError(
            f"{where}.stories: {emotion.name!r} has no stories; give a JSON-lines file or a list"
        )
    if isinstance(emotion.stories, list):
        return tuple(emotion.stories)
    return tuple(read_jsonl(inside(here, emotion.stories), Story))


def _neutral(spec: _Set, here: Path) -> tuple[Story | Dialogue, ...]:
    if spec.neutral is None:
        return ()
    folder = inside(here, spec.neutral)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: neutral: no such folder (it may hold stories.jsonl and dialogues.jsonl)"
        )
    out: list[Story | Dialogue] = []
    for name, model in (("stories.jsonl", Story), ("dialogues.jsonl", Dialogue)):
        if (folder / name).is_file():
            out += read_jsonl(inside(here, f"{spec.neutral}/{name}"), model)
    return tuple(out)


def _cross_check(s: EmotionSet, path: Path, lines: dict[tuple, int]) -> None:
    """What no single file can know: names that refer to each other, and the same topics for every emotion."""
    line = lambda i: lines.get(("emotions", i), 1)  # noqa: E731
    if len(s.emotions) < 2:
        raise ValueError(
            f"{path}:{line(0)}: emotions: only {s.names[0]!r}; a set needs at least two to tell apart"
        )
    person = {t.name: t.person for t in s.topics}
    if len(person) < len(s.topics):
        twice = Counter(t.name for t in s.topics).most_common(1)[0][0]
        raise ValueError(f"{path}: topics: {twice!r} is there twice")
    for i, emotion in enumerate(s.emotions):
        for key in ("antonym", "opposite"):
            name = getattr(emotion, key)
            if name is not None and name not in s.names:
                raise ValueError(
                    f"{path}:{line(i)}: emotions.{i}.{key}: " + unknown("emotion", name, s.names)
                )
            if name == emotion.name:
                raise ValueError(
                    f"{path}:{line(i)}: emotions.{i}.{key}: {name!r} cannot be its own {key}"
                )
        for story in s.stories[emotion.name]:
            if story.topic not in person:
                raise ValueError(
                    f"{path}: story {story.id!r}: " + unknown("topic", story.topic, person)
                )
            if story.split == "main" and person[story.topic] not in ("mixed", story.person):
                raise ValueError(
                    f"{path}: story {story.id!r} is told in the {story.person} person, but topic {story.topic!r} is "
                    f"{person[story.topic]} for every emotion (use split: other_person)"
                )
    concept, times = Counter(e.concept or e.name for e in s.emotions).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: two emotions are the concept {concept!r}")
    for where, length in (
        ("length", s.length),
        *((f"topics: {t.name!r}: length", t.length) for t in s.topics),
    ):
        if length is not None and length[0] > length[1]:
            line_of = lines.get(("length",), 1)
            raise ValueError(
                f"{path}:{line_of}: {where}: found {list(length)}; allowed: [least, most]"
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
            raise ValueError(
                f"{path}: neutral text {text.id!r}: " + unknown("topic", text.topic, person)
            )

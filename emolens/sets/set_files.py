"""Emotion sets as files: what a person edits in YAML, with stories in JSON lines beside it.

A set is a folder with ``set.yaml`` (emotions: names, antonyms, target words, forbidden words), ``topics.yaml``
and texts. Files are read with `yaml.safe_load` rules and checked by pydantic; every error names the file, the
line, the field, what was found and what is allowed. What is written is checked by the same rules before it is
written, so that a set that was saved can be loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from emolens._files import (
    Name,
    Strict,
    Word,
    data_root,
    here,
    inside,
    read_jsonl,
    read_yaml,
    unknown,
    validate,
)
from emolens.sets.emotion_sets import (
    Dialogue,
    Emotion,
    EmotionSet,
    Length,
    Story,
    Topic,
    among,
    join_emotion_sets,
)
from emolens.shards import vacant_folder

NEUTRAL = {"stories.jsonl": Story, "dialogues.jsonl": Dialogue}


class _Set(Strict):
    name: Name
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


def list_emotion_sets() -> list[str]:
    """List the names of the shipped sets.

    Returns:
        Names for `load_emotion_set`, in alphabetical order.

    Example:
        >>> "core" in em.list_emotion_sets()
        True
    """
    return sorted(p.parent.name for p in data_root().glob("*/set.yaml"))


def load_emotion_set(name_or_path: str | Path | Sequence[str | Path]) -> EmotionSet:
    """Load and validate a set.

    Args:
        name_or_path: A shipped set by name, or a folder or YAML file of one's own. Several are joined
            (`join_emotion_sets`): a list of them, or their names with a plus, ``"core2+everyday"``.

    Returns:
        The set, with every text read.

    Raises:
        FileNotFoundError: no such set; the message lists the shipped ones.
        ValueError: what is wrong, as ``file:line: field: found ...; allowed ...``.

    Example:
        >>> em.load_emotion_set("core").names[:3]
        ('serenity', 'joy', 'ecstasy')
    """
    if isinstance(name_or_path, EmotionSet):
        raise ValueError(
            f"{name_or_path.name!r} is loaded already; sets that are loaded are joined by join_emotion_sets"
        )
    if not isinstance(name_or_path, str | Path):
        return join_emotion_sets([load_emotion_set(name) for name in name_or_path])
    sets = [_load(file, ()) for file in _files(str(name_or_path))]
    return sets[0] if len(sets) == 1 else join_emotion_sets(sets)


def _files(given: str) -> list[Path]:
    """The files of one set, or of several with a plus between them; names may hold a plus, so the longest that is there is taken."""
    files, rest = [], given.split("+")
    while rest:
        there = ((k, _file("+".join(rest[:k]))) for k in range(len(rest), 0, -1))
        k, file = next(((k, file) for k, file in there if file), (0, None))
        if file is None:
            while len(rest) > 1 and _file(rest[-1]):
                rest.pop()
            absent = unknown("emotion set", "+".join(rest), list_emotion_sets())
            raise FileNotFoundError(f"{absent} (or give a folder with a set.yaml)")
        files.append(file)
        rest = rest[k:]
    return files


def _file(given: str) -> Path | None:
    """The set.yaml of a shipped set or of a folder, or a file itself; None where there is none."""
    shipped = data_root() / given / "set.yaml"
    try:
        if "/" not in given and shipped.is_file():
            return shipped
        path = here(given)
        path = path / "set.yaml" if path.is_dir() else path
        return path if path.is_file() else None
    except OSError:  # longer than the name of a file may be
        return None


def _load(path: Path, seen: tuple[Path, ...]) -> EmotionSet:
    if path.resolve() in seen:
        raise ValueError(f"{path}: `extends` goes round in a circle")
    lines, data = read_yaml(path)
    spec = validate(_Set, data, path, lines)
    folder, names = path.parent, [e.name for e in spec.emotions]
    for i, name in enumerate(names):
        if name in names[:i]:
            line = lines.get(("emotions", i), 1)
            raise ValueError(f"{path}:{line}: emotions.{i}.name: {name!r} is there twice")

    base = None
    if spec.extends is not None:
        local = folder / spec.extends / "set.yaml"
        parent = local if local.is_file() else data_root() / spec.extends / "set.yaml"
        if not parent.is_file():
            raise FileNotFoundError(
                f"{path}: extends: " + unknown("emotion set", spec.extends, list_emotion_sets())
            )
        base = _load(parent, (*seen, path.resolve()))

    emotions, stories = [], {}
    for i, emotion in enumerate(spec.emotions):
        inherited = base is not None and emotion.name in base.names
        if base is not None and inherited and emotion.stories is None:
            stories[emotion.name] = base.stories[emotion.name]
        else:
            where = f"{path}:{lines.get(('emotions', i), 1)}: emotions.{i}"
            stories[emotion.name] = _stories(emotion, folder, where)
        if base is not None and inherited:  # a view keeps the antonyms that it contains
            own = emotion.model_dump(exclude_unset=True)
            emotion = among(base[emotion.name], names).model_copy(update=own)
        own = {"stories": None, "prompts": emotion.prompts or spec.prompts}
        emotions.append(emotion.model_copy(update=own))

    def own_or_inherited(key: Literal["language", "edition"]) -> Any:
        return getattr(spec if base is None or key in spec.model_fields_set else base, key)

    design = folder / "design.jsonl"
    result = EmotionSet(
        name=spec.name,
        language=own_or_inherited("language"),
        emotions=tuple(emotions),
        topics=_topics(spec, folder, base, path),
        stories=stories,
        neutral=_neutral(spec, folder) or (base.neutral if base else ()),
        description=spec.description,
        source=spec.source,
        sha256=spec.sha256,
        length=spec.length or (base.length if base else None),
        edition=own_or_inherited("edition"),
        design=design if design.is_file() else base.design if base else None,
    )
    _cross_check(result, path, lines)
    return result


def _topics(spec: _Set, folder: Path, base: EmotionSet | None, path: Path) -> tuple[Topic, ...]:
    if spec.topics is None:
        if base is None:
            raise ValueError(f"{path}: topics: missing; give a file or a list of {{name, person}}")
        return base.topics
    if isinstance(spec.topics, list):
        return tuple(spec.topics)
    file = inside(folder, spec.topics)
    lines, data = read_yaml(file)
    return tuple(validate(_Topics, data, file, lines).topics)


def _stories(emotion: Emotion, folder: Path, where: str) -> tuple[Story, ...]:
    if emotion.stories is None:
        raise ValueError(
            f"{where}.stories: {emotion.name!r} has no stories; give a JSON-lines file or a list"
        )
    if isinstance(emotion.stories, list):
        return tuple(emotion.stories)
    return tuple(read_jsonl(inside(folder, emotion.stories), Story))


def _neutral(spec: _Set, folder: Path) -> tuple[Story | Dialogue, ...]:
    if spec.neutral is None:
        return ()
    place = inside(folder, spec.neutral)
    if not place.is_dir():
        raise FileNotFoundError(
            f"{place}: neutral: no such folder (it may hold {' and '.join(NEUTRAL)})"
        )
    files = [
        (inside(folder, f"{spec.neutral}/{name}"), NEUTRAL[name])
        for name in NEUTRAL
        if (place / name).is_file()
    ]
    return tuple(text for file, model in files for text in read_jsonl(file, model))


def _cross_check(s: EmotionSet, path: Path, lines: dict[tuple, int]) -> None:
    """What no single file can know: names that refer to each other, and the same topics for every emotion."""
    person = {t.name: t.person for t in s.topics}
    _check_names(s, path, lines, person)
    _check_lengths(s, path, lines)
    _check_texts(s, path, person)


def _check_names(
    s: EmotionSet, path: Path, lines: dict[tuple, int], person: dict[str, str]
) -> None:
    if len(s.emotions) < 2:
        line = lines.get(("emotions", 0), 1)
        raise ValueError(
            f"{path}:{line}: emotions: only {s.names[0]!r}; a set needs at least two to tell apart"
        )
    if len(person) < len(s.topics):
        twice = Counter(t.name for t in s.topics).most_common(1)[0][0]
        raise ValueError(f"{path}: topics: {twice!r} is there twice")
    for i, emotion in enumerate(s.emotions):
        for key in ("antonym", "opposite"):
            name = getattr(emotion, key)
            where = f"{path}:{lines.get(('emotions', i), 1)}: emotions.{i}.{key}"
            if name is not None and name not in s.names:
                raise ValueError(f"{where}: " + unknown("emotion", name, s.names))
            if name == emotion.name:
                raise ValueError(f"{where}: {name!r} cannot be its own {key}")
    concept, times = Counter(e.concept or e.name for e in s.emotions).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: two emotions are the concept {concept!r}")


def _check_lengths(s: EmotionSet, path: Path, lines: dict[tuple, int]) -> None:
    of_topics = ((f"topics: {t.name!r}: length", t.length) for t in s.topics)
    for where, length in (("length", s.length), *of_topics):
        if length is not None and length[0] > length[1]:
            line = lines.get(("length",), 1)
            raise ValueError(
                f"{path}:{line}: {where}: found {list(length)}; allowed: [least, most]"
            )


def _check_texts(s: EmotionSet, path: Path, person: dict[str, str]) -> None:
    stories = [t for e in s.names for t in s.stories[e]]
    for story in stories:
        if story.topic not in person:
            raise ValueError(
                f"{path}: story {story.id!r}: " + unknown("topic", story.topic, person)
            )
        if story.split == "main" and person[story.topic] not in ("mixed", story.person):
            raise ValueError(
                f"{path}: story {story.id!r} is told in the {story.person} person, but topic {story.topic!r} is "
                f"{person[story.topic]} for every emotion (use split: other_person)"
            )
    for text in s.neutral:
        if text.topic not in person:
            raise ValueError(
                f"{path}: neutral text {text.id!r}: " + unknown("topic", text.topic, person)
            )
    ids = Counter(x.id for x in (*stories, *s.neutral))
    if ids and (most := ids.most_common(1)[0])[1] > 1:
        raise ValueError(f"{path}: two texts have the id {most[0]!r}")
    told = {e: Counter(t.topic for t in s.stories[e] if t.split == "main") for e in s.names}
    if not any(told.values()):
        raise ValueError(f"{path}: stories: not one emotion has a story of split main")
    first = s.names[0]
    for e in s.names[1:]:
        if told[e] != told[first]:
            odd = sorted((told[e] - told[first]) or (told[first] - told[e]))[0]
            raise ValueError(
                f"{path}: the emotions do not share their topics: {odd!r} is told {told[first][odd]} times for {first!r} and "
                f"{told[e][odd]} times for {e!r}; every emotion needs the same topics, or the topic is read as the emotion"
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
    """Write a set as a folder that `load_emotion_set` reads.

    Args:
        s: The set; the sheets of its `design` are not copied.
        folder: Where set.yaml, topics.yaml, one file of stories an emotion and the neutral texts come to lie; it is
            made if it is not there.

    Returns:
        The folder.

    Raises:
        FileExistsError: there is a set already, or something else under a name that a set needs.
        ValueError: what `load_emotion_set` would not read, such as emotions that do not share their topics; nothing is
            written then.

    Example:
        >>> import tempfile
        >>> folder = em.save_emotion_set(stories, tempfile.mkdtemp())
        >>> em.load_emotion_set(folder).fingerprint == stories.fingerprint
        True
    """
    folder = check_vacant(folder)
    emotions, texts = [], {}
    for number, e in enumerate(s.emotions):
        # numbered: two names may differ in nothing that a file system keeps
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in e.name)
        file = f"stories/{number:03d}-{name}.jsonl"
        texts[file] = Story, s.stories[e.name]
        emotions.append(e.model_dump(exclude_defaults=True) | {"stories": file})
    for name, kind in NEUTRAL.items():
        if told := [n for n in s.neutral if isinstance(n, kind)]:
            texts[f"neutral/{name}"] = kind, told
    topics = {"topics": [t.model_dump(exclude_defaults=True, mode="json") for t in s.topics]}
    head = {"name": s.name, "language": s.language, "description": s.description}
    head |= {"source": s.source, "sha256": s.fingerprint, "topics": "topics.yaml"}
    head |= {"length": list(s.length)} if s.length else {}
    head |= {"edition": s.edition} if s.edition > 1 else {}
    head |= {"neutral": "neutral"} if s.neutral else {}
    head |= {"emotions": emotions}
    rows = {
        file: [t.model_dump(exclude_defaults=True) for t in told]
        for file, (_, told) in texts.items()
    }

    _cross_check(s, folder / "set.yaml", {})
    validate(_Set, head, folder / "set.yaml", {})
    validate(_Topics, topics, folder / "topics.yaml", {})
    for file, (kind, _) in texts.items():
        for number, row in enumerate(rows[file], start=1):
            validate(kind, row, folder / file, number)

    for file, told in rows.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in told]
        (folder / file).write_text("".join(lines), encoding="utf-8")
    _write_yaml(folder / "topics.yaml", topics)
    # last: a folder with a set.yaml is a whole set
    _write_yaml(folder / "set.yaml", head)
    return folder


class _Plain(yaml.SafeDumper):
    """Writes a list again where it is there twice: the reader takes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_yaml(path: Path, data: dict[str, Any]) -> None:
    text = yaml.dump(data, Dumper=_Plain, allow_unicode=True, sort_keys=False, width=120)
    path.write_text(text, encoding="utf-8")

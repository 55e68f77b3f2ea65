"""Other people's corpora of emotional stories as emotion sets: EmoVecLLM's files, and `ryancodrai/emotion-probes` (CC BY 4.0).

Only their form is read here; their texts are not part of emolens. Topics become numbered, with the corpus'
sentence as description, and are told in mixed person. An emotion that `emotions171` has brings its norms,
antonym and target words along. What came in and what was used is written into the set's `source`; nothing is
judged (see `check`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from emolens._files import here, read_jsonl, unknown
from emolens.sets.emotion_sets import (
    Dialogue,
    Emotion,
    EmotionSet,
    Story,
    Topic,
    Turn,
    among,
)
from emolens.sets.set_files import load_emotion_set

LEAST_WORDS = 20  # a segment below is a heading or a fragment
HUB = "ryancodrai/emotion-probes"
STORIES, NEUTRAL = "expression/stories.parquet", "expression/neutral_stories.parquet"


class _Call(BaseModel):
    """One line of EmoVecLLM's stories.jsonl: what one call of its generator wrote. Other keys are passed over."""

    job_id: str
    kind: str
    emotion: str | None = None
    topic: str
    segments: list[str]


class _Job(BaseModel):
    job_id: str
    kind: str


def load_emovecllm(
    folder: str | Path, *, unshared: Literal["raise", "keep"] = "raise"
) -> EmotionSet:
    """Load the files of EmoVecLLM as a set.

    Args:
        folder: Where `stories.jsonl` (with `segments`) lies; `prompts.jsonl` is looked for beside and above it.
        unshared: EmoVecLLM may tell each emotion in topics of its own, so that a topic can be read as the emotion.
            "raise" keeps the topics that every emotion has and raises if there are none; "keep" keeps all: enough to
            collect and to average, not for held-out topics, and not to be saved as a set.

    Returns:
        A set whose neutral texts are EmoVecLLM's neutral dialogues.

    Raises:
        FileNotFoundError: no stories.jsonl.
        ValueError: what is wrong in which line; no shared topic.

    Example:
        >>> import json, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> calls = [
        ...     {"job_id": e, "kind": "emotion_story", "emotion": e, "topic": "a bus", "segments": [f"{e} " * 20]}
        ...     for e in ("joyful", "sad")
        ... ]
        >>> _ = (folder / "stories.jsonl").write_text("\\n".join(map(json.dumps, calls)), encoding="utf-8")
        >>> em.sets.load_emovecllm(folder)
        EmotionSet(emovecllm: 2 emotions x 1 topics, 2 stories, 0 neutral texts, en)
    """
    folder = here(folder)
    calls: list[_Call] = read_jsonl(folder / "stories.jsonl", _Call)
    places = [p / "prompts.jsonl" for p in (folder, *folder.parents[:3])]
    prompts = next((p for p in places if p.is_file()), None)
    jobs: list[_Job] = read_jsonl(prompts, _Job) if prompts else []
    missing = {j.job_id for j in jobs} - {c.job_id for c in calls}
    counts: Counter[str] = Counter()
    told: list[tuple[str, str, str]] = []
    neutral: list[tuple[str, list[Turn]]] = []
    for call in calls:
        counts["segments"] += len(call.segments)
        for text in call.segments:
            if call.kind == "emotion_story" and call.emotion and len(text.split()) >= LEAST_WORDS:
                told.append((call.emotion, call.topic, text))
            elif call.kind == "neutral_dialogue" and len(turns := _turns(text)) >= 2:
                neutral.append((call.topic, turns))
            else:
                counts["left out (too short, no turns, or another kind)"] += 1
    source = f"EmoVecLLM, {folder.name}: {len(calls)} calls"
    source += f", {len(missing)} of its prompts without one" if jobs else ""
    source += "".join(f", {n} {what}" for what, n in counts.items())
    s = _make("emovecllm", told, source, per_topic=None, unshared=unshared)
    number = {t.description: t.name for t in s.topics}
    apart = sorted({t for t, _ in neutral} - set(number))
    number |= {t: f"neutral-{k:03d}" for k, t in enumerate(apart)}
    topics = [Topic(name=number[t], person="mixed", description=t) for t in apart]
    dialogues = [
        Dialogue(id=f"dialogue-{k:05d}", topic=number[t], turns=turns)
        for k, (t, turns) in enumerate(neutral)
    ]
    return replace(s, topics=(*s.topics, *topics), neutral=tuple(dialogues))


def load_emotion_probes(
    source: str | Path = HUB,
    *,
    emotions: Sequence[str] | None = None,
    topics: int | None = None,
    per_topic: int = 1,
    neutral: int = 200,
) -> EmotionSet:
    """Load `ryancodrai/emotion-probes` as a set (171 emotions x 100 topics x 12 stories; CC BY 4.0).

    The corpus is streamed through `datasets`.

    Args:
        source: The hub's name, or a folder with expression/stories.parquet (columns emotion, topic, story) and
            expression/neutral_stories.parquet (topic, story).
        emotions: Some of them, by the corpus' names; None takes all.
        topics: The first so many topics in alphabetical order of the corpus' own; None takes all.
        per_topic: Stories of an emotion in a topic, at most 12.
        neutral: Neutral stories at most.

    Returns:
        A set with as many stories of every emotion in a topic as the emotion that has fewest.

    Raises:
        FileNotFoundError: no such file in the folder.
        ValueError: an unknown emotion; columns that are not these.
        OSError: the hub cannot be reached.

    Example:
        >>> import pathlib, tempfile, datasets
        >>> datasets.disable_progress_bars()
        >>> (folder := pathlib.Path(tempfile.mkdtemp(), "expression")).mkdir()
        >>> told = [(e, t, f"{e} by the {t}") for e in ("joyful", "sad") for t in ("lake", "mill")]
        >>> told = dict(zip(("emotion", "topic", "story"), map(list, zip(*told))))
        >>> _ = datasets.Dataset.from_dict(told).to_parquet(folder / "stories.parquet")
        >>> _ = datasets.Dataset.from_dict(told).to_parquet(folder / "neutral_stories.parquet")
        >>> em.sets.load_emotion_probes(folder.parent, topics=1, neutral=1)
        EmotionSet(emotion-probes: 2 emotions x 1 topics, 2 stories, 1 neutral texts, en)
    """
    told = [
        (r["emotion"], r["topic"], r["story"])
        for r in _rows(source, STORIES, ("emotion", "topic", "story"), emotions)
    ]
    have = {e for e, _, _ in told}
    for e in emotions or ():
        if e not in have:
            raise ValueError(unknown("emotion", e, sorted(have)))
    some = sorted({t for _, t, _ in told})[:topics]
    kept = [(e, t, x) for e, t, x in told if t in set(some)]
    note = f"{HUB} (CC BY 4.0): {len(told)} stories of {len(have)} emotions read"
    s = _make("emotion-probes", kept, note, per_topic=per_topic, unshared="raise")
    number = {t.description: t.name for t in s.topics}
    flat = []
    for k, r in enumerate(_rows(source, NEUTRAL, ("topic", "story"), None)):
        if len(flat) == neutral:
            break
        if topic := number.get(r["topic"]):
            flat.append(Story(id=f"neutral-{k:05d}", topic=topic, person="mixed", text=r["story"]))
    return replace(s, neutral=tuple(flat))


def _rows(
    source: str | Path, file: str, columns: tuple[str, ...], emotions: Sequence[str] | None
) -> Iterable[dict]:
    from datasets import load_dataset

    local = here(source) / file
    if local.is_file():
        data: Any = load_dataset("parquet", data_files=str(local), split="train", streaming=True)
    elif str(source) == HUB:
        data = load_dataset(HUB, data_files=file, split="train", streaming=True)
    else:
        raise FileNotFoundError(f"{local}: no such file")
    for row in data:
        missing = [c for c in columns if not isinstance(row.get(c), str)]
        if missing:
            raise ValueError(
                f"{source}/{file}: column {missing[0]!r} is missing or not text; found {sorted(row)}"
            )
        if emotions is None or row["emotion"] in emotions:
            yield row


def _make(
    name: str,
    told: list[tuple[str, str, str]],
    source: str,
    *,
    per_topic: int | None,
    unshared: Literal["raise", "keep"],
) -> EmotionSet:
    """A set from (emotion, topic, text); as many stories of every emotion in a topic as the emotion that has fewest."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for emotion, topic, text in told:
        cells[emotion, topic].append(" ".join(text.split()))
    names = sorted({e for e, _ in cells})
    if len(names) < 2:
        raise ValueError(f"{name}: {len(names)} emotions with stories; a set needs at least two")
    topics = sorted({t for _, t in cells})
    each: dict[str, int | None] = dict.fromkeys(topics)
    if unshared == "raise":
        least = {t: min(len(cells[e, t]) for e in names) for t in topics}
        each = {t: n if per_topic is None else min(n, per_topic) for t, n in least.items() if n}
        if not each:
            raise ValueError(
                f"{name}: no topic is told for every one of its {len(names)} emotions, so a topic can be read as the emotion; choose emotions that "
                "share topics, or unshared='keep' to collect them all the same"
            )
    number = {t: f"topic-{k:03d}" for k, t in enumerate(topics) if t in each}
    stories = {
        e: tuple(
            Story(id=f"{e}-{number[t]}-{k + 1}", topic=number[t], person="mixed", text=text)
            for t in number
            for k, text in enumerate(cells[e, t][: each[t]])
        )
        for e in names
    }
    known = {e.name: e for e in load_emotion_set("emotions171").emotions}
    emotions = tuple(among(known.get(e, Emotion(name=e, adjective=e)), names) for e in names)
    used = sum(len(x) for x in stories.values())
    return EmotionSet(
        name=name,
        language="en",
        emotions=emotions,
        topics=tuple(Topic(name=n, person="mixed", description=t) for t, n in number.items()),
        stories=stories,
        neutral=(),
        source=f"{source}; {used} used",
        length=(LEAST_WORDS, 10_000),
    )


def _turns(text: str) -> list[Turn]:
    """The turns of "Human: ... Assistant: ..." (also Person, AI); what stands before the first is an instruction and no turn."""
    parts = re.split(r"(?m)^\s*(Human|Person|Assistant|AI)\s*:\s*", text)
    names = {"Person": "Human", "AI": "Assistant"}
    said = zip(parts[1::2], parts[2::2], strict=True)
    return [
        Turn(speaker=names.get(who, who), text=" ".join(what.split()))
        for who, what in said
        if what.strip()
    ]

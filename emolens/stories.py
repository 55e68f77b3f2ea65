"""Stories by the model itself, the paper's own way: prompts from a set, texts by any engine, parsed, filtered and counted.

`write_stories` lets the loaded model write; `story_prompts` and `import_texts` let any other engine. Noise is keyed by (seed, item, step)
and the batches are a fixed plan, so an interrupted run goes on to the same texts. What is dropped is counted with its reason and kept in
``dropped.jsonl``. A set needs the same topics for every emotion: what one emotion has too much of is set aside. Whether a story
shows its emotion is not judged here.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from emolens import __version__
from emolens._files import Name, Strict, Word, here, read_jsonl, unknown
from emolens._typing import HookedModel
from emolens.collect.progress import progress_bar
from emolens.interventions.generate import Decoding, generate
from emolens.models.identity import present_info
from emolens.models.tokens import tokenization
from emolens.sets.emotion_sets import EmotionSet, Person, Story
from emolens.sets.set_files import load_emotion_set, save_emotion_set
from emolens.sets.wording import CHARACTERS, language_of, leaks, length
from emolens.shards import Kept, vacant, vacant_folder, written_whole

# how a prompt of each language says it
PERSONS = {
    "en": {"first": "first", "third": "third"},
    "de": {"first": "ersten", "third": "dritten"},
    "zh": {"first": "第一人称", "third": "第三人称"},
    "ja": {"first": "一人称", "third": "三人称"},
}
REFUSAL = re.compile(
    r"^\W*(i('m| am) sorry|sorry,|i can('t|not)|i('m| am) (not able|unable)|as an ai|i won't|es tut mir leid|ich kann (das |diese )?nicht"
    r"|对不起|抱歉|很抱歉|作为(一个)?ai|申し訳|すみませんが)",
    re.IGNORECASE,
)
# Japanese may leave it out
SELF = {
    "en": r"\b(I|[Mm]y|me|[Mm]yself)\b",
    "de": r"(?i)\b(ich|mich|mir|mein(e|en|em|er|es)?)\b",
    "zh": "我",
}
QUOTED = re.compile(r"[\"“„「][^\"”“」]*[\"”“」]")
LENGTHS = {False: (60, 150), True: (100, 400)}  # words; characters for Chinese and Japanese
SAMPLED = Decoding(max_new_tokens=220, temperature=0.9, top_p=0.95)
# share of three-word runs (eight-character runs) that occurred before in the same text
REPEATED = 0.25


class StoryPrompt(Strict):
    """One request for one story."""

    id: str
    emotion: Word
    topic: Name
    person: Person
    prompt: str


class _Text(BaseModel):  # other keys are an engine's own
    id: str
    text: str


@dataclass(frozen=True, eq=False)
class Written:
    """What came of the texts.

    Attributes:
        counts: "asked", "kept", "set aside" (more than the emotion that has fewest in that topic), and each reason of a drop.
        emotions: The set, or None where no topic has a story of every emotion.
        folder: Where it lies.
    """

    counts: dict[str, int]
    emotions: EmotionSet | None
    folder: Path

    def __repr__(self) -> str:
        return f"Written({self.folder}: {', '.join(f'{n} {k}' for k, n in self.counts.items())})"


def story_prompts(
    s: EmotionSet,
    *,
    per_topic: int = 1,
    emotions: Sequence[str] | None = None,
    topics: Sequence[str] | None = None,
) -> list[StoryPrompt]:
    """Fill the prompts of a set with its topics.

    Args:
        s: A set whose emotions, or which itself, has `prompts` with {topic}, {person} and {adjective}.
        per_topic: Stories of an emotion in a topic, at least 1; its prompts take turns.
        emotions: Some of the set's, by name; None takes all.
        topics: Likewise.

    Returns:
        Requests in a fixed order: emotion by emotion, topic by topic. Their ids are ``emotion-topic-number``.

    Raises:
        KeyError: a name that the set does not have.
        ValueError: an emotion has no prompts; `per_topic` below 1.

    Example:
        >>> [p.id for p in em.story_prompts(stories, emotions=["glimmer"], topics=["kitchen", "train"])]
        ['glimmer-kitchen-1', 'glimmer-train-1']
        >>> em.story_prompts(stories)[0].prompt
        'Write a short story about at the kitchen in the first person in which someone is glimmering.'
    """
    if per_topic < 1:
        raise ValueError(f"per_topic={per_topic}; at least 1")
    names = {t.name: t for t in s.topics}
    for topic in topics or ():
        if topic not in names:
            raise KeyError(unknown("topic", topic, names))
    words = PERSONS.get(s.language, PERSONS["en"])
    out = []
    for name in emotions or s.names:
        e = s[name]
        if not e.prompts:
            raise ValueError(
                f"emotion {name!r} of set {s.name!r} has no prompts; add `prompts` to it or to the set"
            )
        for topic in (names[t] for t in topics or names):
            for k in range(per_topic):
                prompt = e.prompts[k % len(e.prompts)]
                filled = {
                    "topic": topic.description or topic.name,
                    "adjective": e.adjective or e.name,
                }
                filled["person"] = words.get(topic.person, words["third"])
                # not str.format, which would look into objects for a stranger's prompt
                for key, value in filled.items():
                    prompt = prompt.replace("{" + key + "}", value)
                out.append(
                    StoryPrompt(id=f"{name}-{topic.name}-{k + 1}", emotion=name, topic=topic.name, person=topic.person, prompt=prompt)
                )  # fmt: skip
    return out


def export_prompts(
    prompts: Sequence[StoryPrompt], path: str | Path, *, overwrite: bool = False
) -> None:
    """Write prompts as JSON lines, for any engine.

    It gives back lines with the same `id` and a `text`, of which `import_texts` makes a set.

    Args:
        prompts: From `story_prompts`.
        path: The file to write; its folder must be there.
        overwrite: Replace what the file holds.

    Raises:
        FileNotFoundError: the folder is not there.
        FileExistsError: the file is there and holds something else.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "prompts.jsonl")
        >>> em.export_prompts(em.story_prompts(stories), path)
        >>> len(path.read_text(encoding="utf-8").splitlines())
        32
    """
    lines = "".join(p.model_dump_json() + "\n" for p in prompts)

    def held(file: Path) -> str | None:
        return None if file.read_bytes() == lines.encode() else "other prompts, or something else"

    vacant(path, held, overwrite=overwrite)
    with written_whole(path) as part:
        part.write_bytes(lines.encode())


def write_stories(
    model: HookedModel,
    s: EmotionSet | str,
    *,
    per_topic: int = 1,
    emotions: Sequence[str] | None = None,
    topics: Sequence[str] | None = None,
    lengths: tuple[int, int] | None = None,
    decoding: Decoding = SAMPLED,
    batch_size: int = 16,
    progress: bool | None = None,
    out: str | Path,
) -> Written:
    """Let the loaded model write the stories of a set, and make a set of them.

    Args:
        model: Any model of `load_model`; one with a chat template is asked as a chat, a base model gets the prompt as text.
        s: The set whose prompts and topics are used, or its name.
        per_topic: Stories asked for, for each emotion and topic, at least 1.
        emotions: Some of the set's, by name; None takes all.
        topics: Likewise.
        lengths: Least and most words of a story (characters for Chinese and Japanese); a longer one is cut at a sentence.
        decoding: How many tokens of a story at most, and how they are chosen: `em.Decoding`, by default 220 sampled ones.
        batch_size: Prompts at once, at least 1; part of the plan, since a batch may change the last digits of a probability.
        progress: Whether to show a bar; None shows one where it lasts and somebody can see it.
        out: A folder: ``manifest.json``, ``texts/`` (one file a batch), ``dropped.jsonl`` and, at the end, ``set/``.

    Returns:
        The set and what was dropped for which reason. A run that was interrupted goes on; a finished one is read again.

    Raises:
        KeyError: an emotion or topic that the set does not have.
        ValueError: an emotion without prompts; a number that is out of range.
        FileExistsError: the folder holds another run; the message says what differs.

    Example:
        >>> import tempfile
        >>> some = {"emotions": ["glimmer", "tarrow"], "topics": ["train"], "progress": False}
        >>> written = em.write_stories(
        ...     model, stories, decoding=em.Decoding(4), out=tempfile.mkdtemp(), **some
        ... )
        >>> written.counts["asked"], written.emotions is None  # four tokens are no story
        (2, True)

    Reference:
        Anthropic 2026, *Emotion Concepts and their Function in a Large Language Model*: stories written by the model that is read.
    """
    s = load_emotion_set(s) if isinstance(s, str) else s
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; at least 1")
    prompts = story_prompts(s, per_topic=per_topic, emotions=emotions, topics=topics)
    info, requests = present_info(model), "".join(p.model_dump_json() for p in prompts)
    spec = {
        "model": info.name,
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "backend": type(model).__name__,
        "tokenization": tokenization(getattr(model, "tokenizer", None)),
        "stop_tokens": info.stop_tokens,
        "stop_strings": info.stop_strings,
        "prompts": hashlib.sha256(requests.encode()).hexdigest()[:16],
        **asdict(decoding),
        "batch_size": batch_size,
        "emolens": __version__,
    }
    folder = _begin(out, spec)
    chat = bool(getattr(getattr(model, "tokenizer", None), "chat_template", None))
    kept, texts = Kept(folder / "texts", _hash(spec)), {}

    def write(start: int, batch: Sequence[StoryPrompt]) -> list[str]:
        asked = [
            [{"role": "user", "content": p.prompt}] if chat else p.prompt + "\n\n" for p in batch
        ]
        items = range(start, start + len(batch))
        made = generate(model, asked, decoding=decoding, items=items)
        return list(made.texts)

    starts = range(0, len(prompts), batch_size)
    for start in progress_bar(starts, "batch", progress, f"{len(prompts)} stories"):
        batch = prompts[start : start + batch_size]
        made = kept.get(f"{start // batch_size:05d}", lambda: write(start, batch))  # noqa: B023  # called at once
        texts |= {p.id: text for p, text in zip(batch, made, strict=True)}
    writer = f"{info.name} (weights {info.fingerprint[:12]}), temperature {decoding.temperature}, top_p {decoding.top_p}, seed {decoding.seed}"
    return _finish(folder, s, prompts, texts, lengths, writer, spec)


def import_texts(
    path: str | Path,
    s: EmotionSet | str,
    *,
    writer: str,
    per_topic: int = 1,
    emotions: Sequence[str] | None = None,
    topics: Sequence[str] | None = None,
    lengths: tuple[int, int] | None = None,
    out: str | Path,
) -> Written:
    """Make a set of texts that another engine wrote to exported prompts.

    Args:
        path: JSON lines with `id` (of the prompt) and `text`; other keys are passed over. Prompts without a text count as "missing".
        s: The set whose prompts were exported, or its name.
        out: A folder: ``manifest.json``, ``dropped.jsonl`` and ``set/``.
        writer: Who wrote them, for the set's `source`: model, engine, sampling.
        per_topic: As for the export.
        emotions: As for the export.
        topics: As for the export.
        lengths: Least and most words of a story (characters for Chinese and Japanese); a longer one is cut at a sentence.

    Returns:
        The set and what was dropped for which reason.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is wrong; an id that was not asked for, or twice.
        FileExistsError: the folder holds another run; the message says what differs.

    Example:
        >>> import json, pathlib, tempfile
        >>> folder, some = pathlib.Path(tempfile.mkdtemp()), {"topics": ["train"]}
        >>> answers = [json.dumps({"id": p.id, "text": "I am sorry."}) for p in em.story_prompts(stories, **some)]
        >>> _ = (folder / "texts.jsonl").write_text("\\n".join(answers), encoding="utf-8")
        >>> em.import_texts(folder / "texts.jsonl", stories, out=folder / "own", writer="another model", **some).counts
        {'asked': 4, 'refusal': 4}
    """
    s = load_emotion_set(s) if isinstance(s, str) else s
    prompts = story_prompts(s, per_topic=per_topic, emotions=emotions, topics=topics)
    known = {p.id for p in prompts}
    texts: dict[str, str] = {}
    for number, line in enumerate(read_jsonl(here(path), _Text), start=1):
        if line.id not in known:
            absent = unknown("prompt id", line.id, sorted(known))
            raise ValueError(f"{path}: text {number}: {absent}")
        if line.id in texts:
            raise ValueError(f"{path}: text {number}: the id {line.id!r} is there twice")
        texts[line.id] = line.text
    data = hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()[:16]
    spec = {"writer": writer, "texts": data, "prompts": len(prompts), "emolens": __version__}
    return _finish(_begin(out, spec), s, prompts, texts, lengths, writer, spec)


def parse_story(text: str, language: str, most: int) -> str:
    """The story in what a model wrote: without headings and introduction, in one paragraph, whole sentences, at most `most` words long.

    >>> parse_story("Sure, here is a story:\\n\\n**The Lamp**\\n\\nHe lit it. It was late. He", "en", 100)
    'He lit it. It was late.'
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    # an introduction, a title
    while lines and (lines[0].endswith((":", "：")) or not re.search(r"[.!?。！？…]", lines[0])):
        lines = lines[1:]
    joined = ("" if language in CHARACTERS else " ").join(
        line
        for line in lines
        if not re.fullmatch(r"[#*_=-].*[*_=-]?", line) or re.search(r"[.!?。！？]$", line)
    )
    joined = re.sub(r"\s+", " ", joined).strip()
    sentences = re.findall(r".+?(?:[.!?…]+[\"'”’)]*(?=\s|$)|[。！？…]+[」”』]*)", joined)
    kept, size = [], 0
    for sentence in sentences:
        size += length(sentence, language)
        if size > most:
            break
        kept.append(sentence)
    return "".join(kept).strip()


def judge(
    story: str, raw: str, s: EmotionSet, emotion: str, lengths: tuple[int, int], person: Person = "mixed",
) -> str | None:  # fmt: skip
    """Why a story is dropped, or None: "refusal", "too short", "wrong language", "wrong person", "names the emotion", "repetition"."""
    if REFUSAL.search(raw):
        return "refusal"
    if length(story, s.language) < lengths[0]:
        return "too short"
    if language_of(story) != s.language:
        return "wrong language"
    if person != "mixed" and s.language in SELF:
        told = "first" if re.search(SELF[s.language], QUOTED.sub("", story)) else "third"
        if told != person:
            return "wrong person"
    if leaks(story, s[emotion], s.language):
        return "names the emotion"
    if _repeated(story, s.language) > REPEATED:
        return "repetition"
    return None


def _repeated(text: str, language: str) -> float:
    """Share of the runs of three words (eight characters) that occurred before in the text."""
    units: Sequence[str] = text if language in CHARACTERS else re.findall(r"\w+", text.lower())
    size = 8 if language in CHARACTERS else 3
    runs = [tuple(units[i : i + size]) for i in range(len(units) - size + 1)]
    return 1 - len(set(runs)) / max(len(runs), 1)


def check_folder(out: str | Path) -> tuple[Path, dict[str, Any] | None]:
    """The folder of a run, and what an earlier run in it was asked for; what needs no model is refused here.

    Raises:
        FileExistsError: a file, or a folder that holds something else.
    """
    folder = vacant_folder(out)
    manifest = folder / "manifest.json"
    if manifest.is_file():
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
            if found["hash"] == _hash(found["spec"]):
                return folder, found["spec"]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise FileExistsError(
            f"{folder} holds a manifest.json of something else; choose another folder"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty and holds no run of this kind; choose another folder"
        )
    return folder, None


def _begin(out: str | Path, spec: dict[str, Any]) -> Path:
    """The folder of this very run, new or interrupted."""
    folder, found = check_folder(out)
    before = spec if found is None else found
    if other := sorted(k for k in before.keys() | spec.keys() if before.get(k) != spec.get(k)):
        raise FileExistsError(
            f"{folder} already holds another run (differs in: {', '.join(other)}); choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if found is None:
        _write_manifest(folder, {"spec": spec, "hash": _hash(spec)})
    return folder


def _write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
    with written_whole(path) as part:
        part.write_text("".join(lines), encoding="utf-8")


def _hash(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _write_manifest(folder: Path, data: dict[str, Any]) -> None:
    with written_whole(folder / "manifest.json") as part:
        part.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")


def _finish(
    folder: Path, s: EmotionSet, prompts: Sequence[StoryPrompt], texts: Mapping[str, str],
    lengths: tuple[int, int] | None, writer: str, spec: dict[str, Any],
) -> Written:  # fmt: skip
    """Parse, filter, balance and write the set; the same texts give the same files."""
    lengths = lengths or LENGTHS[s.language in CHARACTERS]
    counts: Counter[str] = Counter({"asked": len(prompts), "kept": 0})
    kept: dict[tuple[str, str], list[Story]] = defaultdict(list)
    dropped = []
    seen: set[str] = set()
    for p in prompts:
        raw = texts.get(p.id)
        story = "" if raw is None else parse_story(raw, s.language, lengths[1])
        reason = "missing" if raw is None else judge(story, raw, s, p.emotion, lengths, p.person)
        reason = reason or ("duplicate" if story in seen else None)
        if reason:
            counts[reason] += 1
            dropped.append({"id": p.id, "reason": reason, "text": raw})
        else:
            seen.add(story)
            one = Story(id=p.id, topic=p.topic, person=p.person, text=story)
            kept[p.emotion, p.topic].append(one)
    names = list(dict.fromkeys(p.emotion for p in prompts))
    used = list(dict.fromkeys(p.topic for p in prompts))
    each = {t: min(len(kept[e, t]) for e in names) for t in used}
    for (_, t), stories in kept.items():
        counts["kept"] += each[t]
        counts["set aside"] += len(stories) - each[t]
        for x in stories[each[t] :]:
            dropped.append({"id": x.id, "reason": "set aside", "text": texts[x.id]})
    # drops the zeros
    counts += Counter()
    result = None
    if sum(each.values()) and len(names) > 1:
        topics = tuple(t for t in s.topics if each.get(t.name))
        told = {e: tuple(x for t in topics for x in kept[e, t.name][: each[t.name]]) for e in names}
        neutral = tuple(n for n in s.neutral if each.get(n.topic))
        result = replace(
            s.subset(names), name=f"{s.name}-written", topics=topics, stories=told, neutral=neutral, length=lengths,
            description=f"Stories to the prompts of {s.name}; neutral texts are {s.name}'s.",
            source=f"Written by {writer}; spec {_hash(spec)}; {counts['kept']} of {counts['asked']} kept.",
        )  # fmt: skip
    _write_jsonl(folder / "dropped.jsonl", dropped)
    # of a run that was interrupted while it wrote it
    shutil.rmtree(folder / "set", ignore_errors=True)
    if result is not None:
        save_emotion_set(result, folder / "set")
    versions = {p: version(p) for p in ("torch", "transformers", "transformer-lens")}
    _write_manifest(folder, {"spec": spec, "hash": _hash(spec), "counts": dict(counts), "lengths": lengths, "versions": versions})  # fmt: skip
    return Written(dict(counts), result, folder)

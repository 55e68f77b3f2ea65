"""A small set to read, to edit and to break: three emotions in four topics."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from emolens import sets as es

TOPICS = [("kitchen", "first"), ("train", "third"), ("garden", "first"), ("office", "third")]
EMOTIONS = {
    "joy": {
        "adjective": "joyful",
        "antonym": "sadness",
        "target_words": ["happy", "glad"],
        "norm_key": "joy",
    },
    "sadness": {"adjective": "sad", "antonym": "joy", "forbidden": ["sad*"], "norm_key": "sadness"},
    "fear": {"adjective": "afraid", "family": "threat"},
}
WORDS = ["apple", "bridge", "candle", "door", "engine", "feather", "glove", "hammer", "island", "jacket", "kettle", "lamp", "mirror",
         "needle", "orange", "pencil", "quilt", "river", "spoon", "table", "umbrella", "violin", "window", "yard", "zipper"]  # fmt: skip
SMALL = [
    "the",
    "of",
    "with",
    "near",
    "under",
    "before",
    "that",
    "was",
    "there",
    "from",
    "into",
    "because",
]  # so that it reads as English
Edit = Callable[[dict[str, Any]], None]


def prose(key: int, n: int = 90) -> str:
    """Words without sense in an order of their own, so that no two texts are near-duplicates or open alike."""
    rng = np.random.default_rng(key)
    return " ".join(
        [
            *(
                f"{w}{rng.integers(1000)}" if k % 2 else rng.choice(SMALL)
                for k, w in enumerate(rng.choice(WORDS, n - 2), 1)
            ),
            "and",
            "then",
        ]
    )


def make_story(emotion: str, topic: str, person: str, key: int) -> dict[str, Any]:
    return {"id": f"{emotion}-{topic}", "topic": topic, "person": person, "text": prose(key)}


def make_spec() -> dict[str, Any]:
    """A whole set in one mapping: stories inline."""
    emotions = []
    for e, (name, more) in enumerate(EMOTIONS.items()):
        stories = [
            make_story(name, topic, person, 10 * e + t) for t, (topic, person) in enumerate(TOPICS)
        ]
        emotions.append({"name": name, **copy.deepcopy(more), "stories": stories})
    return {
        "name": "small",
        "topics": [{"name": t, "person": p} for t, p in TOPICS],
        "emotions": emotions,
    }


def write(folder: Path, spec: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "set.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def write_files(folder: Path) -> Path:
    """The same set as files: topics.yaml, one JSONL file an emotion, neutral stories and dialogues."""
    spec = make_spec()
    (folder / "stories").mkdir(parents=True)
    (folder / "neutral").mkdir()
    for emotion in spec["emotions"]:
        file = f"stories/{emotion['name']}.jsonl"
        (folder / file).write_text(
            "".join(json.dumps(s) + "\n" for s in emotion["stories"]), encoding="utf-8"
        )
        emotion["stories"] = file
    (folder / "topics.yaml").write_text(
        yaml.safe_dump({"topics": spec["topics"]}), encoding="utf-8"
    )
    spec["topics"] = "topics.yaml"
    spec["neutral"] = "neutral"
    neutral = {"id": "neutral-1", "topic": "train", "person": "third", "text": prose(77)}
    turns = [{"speaker": "A", "text": prose(78, 12)}, {"speaker": "B", "text": prose(79, 12)}]
    (folder / "neutral" / "stories.jsonl").write_text(json.dumps(neutral) + "\n", encoding="utf-8")
    (folder / "neutral" / "dialogues.jsonl").write_text(
        json.dumps({"id": "talk-1", "topic": "office", "turns": turns}) + "\n", encoding="utf-8"
    )
    return write(folder, spec)


def load(tmp_path: Path, edit: Edit | None = None) -> es.EmotionSet:
    spec = make_spec()
    if edit:
        edit(spec)
    return es.load_emotion_set(write(tmp_path / "own", spec))


def change_emotion(i: int, **change: Any) -> Edit:
    return lambda spec: spec["emotions"][i].update(change)


def change_first_story(i: int, **change: Any) -> Edit:
    return lambda spec: spec["emotions"][i]["stories"][0].update(change)

"""What an emotion set is: emotions, topics, and texts in which every emotion tells the same topics.

A topic fixes the grammatical person for every emotion, and topics are the unit of every split. Sets of the
same emotions are joined with their topics kept apart, so that the source of a text is a factor of the design.
Here are the value and the records that it is made of; files are `set_files`' business, how good a set is as
stimuli `check`'s, and the smaller texts of experiments are `materials`'. Nothing here sees a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from emolens._files import Name, Strict, Word, not_blank, unknown

Person = Literal["first", "third", "mixed"]
# least and most, in words or characters
Length = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class Topic(Strict):
    """One situation that every emotion is told in.

    Attributes:
        name: In a joined set ``set/topic``: what stands before the first slash is where its texts are from.
        person: For all emotions, so that it cannot tell them apart. "mixed" is for texts of life and corpora
            of others, in which a topic is told by "I" as well as of "she".
        description: The situation in words, for the prompts of story writers.
        length: What a story of this topic may have, where that is not the set's.
    """

    name: Name
    person: Person
    description: str = ""
    length: Length | None = None


class _Text(Strict):
    id: Name
    topic: Name

    @property
    def source(self) -> str:
        """The set that the text comes from, in a joined set (`join_emotion_sets`); else empty."""
        return self.topic.partition("/")[0] if "/" in self.topic else ""


class Story(_Text):
    """One text, told in one person on one topic.

    Attributes:
        id: Unique in its set.
        topic: Name of one of the set's topics.
        person: Grammatical person of the text: "first", "third" or "mixed".
        text: The story.
        split: "main", "other_person" for a topic told in the person that is not its own, or "test".
        may_name: The text was asked for as people write it, and may name its emotion.
    """

    person: Person
    text: Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(not_blank)]
    split: Literal["main", "other_person", "test"] = "main"
    may_name: bool = False


class Turn(Strict):
    """What one speaker says before the other answers.

    Attributes:
        speaker: A name.
        text: What is said.
    """

    speaker: Word
    text: Annotated[str, Field(min_length=1), AfterValidator(not_blank)]


class Dialogue(_Text):
    """Two or more speakers in turn.

    Attributes:
        id: Unique in its set.
        topic: Name of one of the set's topics.
        turns: What is said, in order.
    """

    turns: Annotated[list[Turn], Field(min_length=2)]

    @property
    def text(self) -> str:
        """The turns as lines ``speaker: what is said``."""
        return "\n".join(f"{turn.speaker}: {turn.text}" for turn in self.turns)


class Emotion(Strict):
    """One emotion concept, as the user writes it.

    Attributes:
        name: What the set calls it.
        concept: The same emotion by its name in `core`, where the name here is another word or another language:
            it lines sets up.
        adjective: For prompts: someone is ...
        antonym: An opposite in feeling.
        opposite: Plutchik's partner across the wheel, where that is another emotion.
        family: What near emotions have in common; an emotion without one is its own.
        intensity: The ring of Plutchik's wheel: 1 as serenity, 2 as joy, 3 as ecstasy.
        target_words: Words whose log-probability stands for the emotion.
        norm_key: The row of the norms tables, exact form; None where no table has it.
        forbidden: Words that its stories must not contain; ``sad*`` means every word that begins so. The name, the
            adjective and the target words with their regular inflections are always forbidden. In Chinese and
            Japanese any occurrence counts.
        prompts: What to ask a model for such a story, with {topic}, {person} and {adjective}; the set's own where
            none is given.
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


@dataclass(frozen=True, eq=False)
class EmotionSet:
    """A validated set: emotions, topics, stories and neutral texts.

    Attributes:
        name: What it is loaded and reported by; of a joined set the names with "+" between.
        language: Of the texts, as a code: "en", "zh", "ja", "de".
        emotions: In the order of the file, which is that of every emotion axis.
        topics: What the stories are about; also those of neutral texts alone.
        stories: The texts of each emotion, in the order of the topics.
        neutral: Stories and dialogues in which nobody feels anything.
        description: What it is for, in a sentence.
        source: Who wrote the texts, and how.
        sha256: The `fingerprint` that the texts had when they were frozen, where the file says so.
        length: What a story may have, in words (in characters for Chinese and Japanese), where the set says so.
        edition: 2 says that form was drawn by lot and plots were assigned, so that the texts keep the rules for
            it (`check_emotion_set`).
        design: The file of the sheets that the texts were written from, where there is one.

    Example:
        >>> stories
        EmotionSet(toy: 4 emotions x 8 topics, 32 stories, 16 neutral texts, en)
        >>> stories["glimmer"].antonym, stories.topics[0].name
        ('gloamer', 'kitchen')
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
            f"EmotionSet({self.name}: {len(self.emotions)} emotions x {len(self.topics)} topics, "
            f"{len(self.texts())} stories, {len(self.neutral)} neutral texts, {self.language})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the emotions, in order."""
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
    def story_topics(self) -> dict[str, Person]:
        """Person of each topic that has a main story, in order: what folds are dealt from. Others are of neutral texts alone."""
        used = {s.topic for _, s in self.texts()}
        return {t.name: t.person for t in self.topics if t.name in used}

    @cached_property
    def concepts(self) -> dict[str, str]:
        """Emotion of each concept: what lines this set up with `core` and with its translations."""
        return {e.concept or e.name: e.name for e in self.emotions}

    def texts(
        self, split: Literal["main", "other_person", "test"] = "main"
    ) -> list[tuple[str, Story]]:
        """Pair every story of a split with its emotion.

        Args:
            split: "main" is what directions are made from.

        Returns:
            (emotion, story), emotion by emotion.

        Example:
            >>> emotion, story = stories.texts()[0]
            >>> emotion, story.topic, story.person
            ('glimmer', 'kitchen', 'first')
        """
        return [(e, s) for e in self.names for s in self.stories[e] if s.split == split]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every text with its emotion, topic, person and split, in a fixed order: the identity of the stimuli."""
        rows = [
            [e, s.topic, s.person, s.split, s.text] for e in self.names for s in self.stories[e]
        ]
        rows += [["", n.topic, "", "neutral", n.text] for n in self.neutral]
        return hashlib.sha256(json.dumps(sorted(rows), ensure_ascii=False).encode()).hexdigest()

    def subset(self, names: Sequence[str]) -> EmotionSet:
        """Keep some of the emotions.

        Args:
            names: Two or more of the set's emotions, in the order that is wanted.

        Returns:
            A new set. Antonyms that are left out are dropped, and so is the frozen `sha256`.

        Raises:
            KeyError: a name that the set does not have.
            ValueError: fewer than two names, or one twice.

        Example:
            >>> stories.subset(["glimmer", "brindle"])["glimmer"].antonym is None
            True
        """
        kept = [self[name] for name in names]
        if len(kept) < 2 or len(set(names)) < len(kept):
            raise ValueError(f"a set needs at least two emotions, each once, got {list(names)}")
        emotions = tuple(among(e, names) for e in kept)
        stories = {name: self.stories[name] for name in names}
        return replace(self, emotions=emotions, stories=stories, sha256=None)


def among(emotion: Emotion, names: Collection[str]) -> Emotion:
    """The emotion without an antonym or opposite that is not one of `names`."""
    absent = [k for k in ("antonym", "opposite") if getattr(emotion, k) not in names]
    return emotion.model_copy(update=dict.fromkeys(absent))


def join_emotion_sets(sets: Sequence[EmotionSet]) -> EmotionSet:
    """Join sets that have the same emotions: the stories and neutral texts of all, each on its own topics.

    The source is a factor of the design. A topic `t` of set `s` becomes ``s/t`` and keeps its person and its
    length, so that no two sets share a topic; `Story.source` is `s`; every emotion has the same texts from each
    source, and folds take topics from each in turn (`stats.topic_folds`). Ids become ``s/id``.

    Args:
        sets: Two or more, of different names without a slash, in one language.

    Returns:
        A set named ``first+second``. Emotions are described as the first set does, and come in its order.

    Raises:
        ValueError: fewer than two sets, two of one name, a slash in a name, two languages, emotions that are not
            the same in all, or a text in two of them.

    Example:
        >>> import dataclasses
        >>> told = {e: tuple(s.model_copy(update={"text": s.text.upper()}) for s in stories.stories[e]) for e in stories.names}
        >>> loud = dataclasses.replace(stories, name="loud", stories=told, neutral=())
        >>> both = em.join_emotion_sets([stories, loud])
        >>> both.name, both.texts()[0][1].topic, both.texts()[0][1].source
        ('toy+loud', 'toy/kitchen', 'toy')
    """
    names = [s.name for s in sets]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"sets are joined from two or more of different names, got {names}")
    if cut := [name for name in names if "/" in name]:
        raise ValueError(
            f"a set that is joined has no slash in its name, got {cut[0]!r}: a topic is named set/topic, and what stands before "
            f"the first slash is its source; dataclasses.replace(s, name={cut[0].replace('/', '-')!r})"
        )
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
        own = {"id": f"{s.name}/{text.id}", "topic": f"{s.name}/{text.topic}"}
        return text.model_copy(update=own)

    def topic(s: EmotionSet, t: Topic) -> Topic:
        own = {"name": f"{s.name}/{t.name}", "length": t.length or s.length}
        return t.model_copy(update=own)

    return EmotionSet(
        name="+".join(names),
        language=first.language,
        emotions=first.emotions,
        topics=tuple(topic(s, t) for s in sets for t in s.topics),
        stories={e: tuple(under(s, t) for s in sets for t in s.stories[e]) for e in first.names},
        neutral=tuple(under(s, n) for s in sets for n in s.neutral),
        description=" | ".join(f"{s.name}: {s.description}" for s in sets),
        source=" | ".join(f"{s.name}: {s.source}" for s in sets),
        edition=min(s.edition for s in sets),
    )

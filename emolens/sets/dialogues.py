"""Dialogues for the experiments: two speakers who each feel something, and one speaker who hides it.

`FeltDialogue`: whose turn it is, by whose emotion it is (two people; "dialogues2": a person and an assistant,
some of whom change midway). `Deflection`: someone feels one thing and shows another, with the clauses in which
the mask speaks ("deflections2" has a preamble that says what is hidden, and beside it dialogues in which the
same is felt and shown, or nothing is felt). Emotions are the paper's words (`emotions171`). Each loader reads
the shipped file, a shipped one by name, or one of your own of the same form.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from emolens._files import Strict, Word
from emolens.sets.emotion_sets import Turn
from emolens.sets.materials import load_records


class FeltTurn(Turn):
    """A turn with the emotion of its speaker (`own`) and of the one who listens (`other`)."""

    own: Word
    other: Word


class Change(Strict):
    """From turn `from_turn` on, counted from 1, `speaker` feels `to`."""

    speaker: Word
    to: Word
    from_turn: Annotated[int, Field(ge=2)]


class FeltDialogue(Strict):
    """Two speakers in turn, each with an emotion: whose turn it is, by whose emotion it is.

    Attributes:
        id: Unique in its file.
        topic: What they talk about.
        emotions: What each speaker feels at the beginning.
        turns: What is said, each with the emotion of both.
        kind: "grid", a cell of emotion x emotion that lasts; "change", in which one emotion becomes another
            (`changes`); "exchange", one message and one reply.
        changes: Who feels what from which turn on, where `kind` is "change".
    """

    id: Word
    topic: Word
    emotions: dict[Word, Word]
    turns: Annotated[list[FeltTurn], Field(min_length=2)]
    kind: Literal["grid", "change", "exchange"] = "grid"
    changes: Change | None = None

    @model_validator(mode="after")
    def _labels(self) -> FeltDialogue:
        if len(self.emotions) != 2:
            raise ValueError(f"a dialogue has two speakers, found {sorted(self.emotions)}")
        _alternate(self.turns, set(self.emotions))
        self._check_change()
        for k, turn in enumerate(self.turns):
            felt = self.felt(k)
            other = next(e for s, e in felt.items() if s != turn.speaker)
            if (turn.own, turn.other) != (felt[turn.speaker], other):
                said = "`emotions` and `changes` say" if self.changes else "`emotions` says"
                raise ValueError(f"turn {k}: own and other are not what {said}")
        return self

    def _check_change(self) -> None:
        c = self.changes
        if (c is not None) != (self.kind == "change"):
            raise ValueError(f"a dialogue of kind {self.kind!r} has {'no ' if c else ''}`changes`")
        if c is not None and (c.speaker not in self.emotions or c.from_turn > len(self.turns)):
            raise ValueError(
                f"`changes` is about a speaker and a turn of the dialogue, found {c.speaker!r} and {c.from_turn}"
            )

    def felt(self, turn: int) -> dict[str, str]:
        """Say who feels what at a turn.

        Args:
            turn: Counted from 0.

        Returns:
            The emotion of each speaker.

        Example:
            >>> changing = next(d for d in em.sets.load_dialogues("dialogues2") if d.changes)
            >>> changing.felt(0), changing.felt(5)
            ({'person': 'afraid', 'assistant': 'afraid'}, {'person': 'hopeful', 'assistant': 'afraid'})
        """
        c = self.changes
        return self.emotions | ({c.speaker: c.to} if c and turn + 1 >= c.from_turn else {})


class Span(Strict):
    """Characters [start, end) of one turn, both counted from 0."""

    turn: Annotated[int, Field(ge=0)]
    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=1)]


class Deflection(Strict):
    """A dialogue in which one speaker feels one thing and shows another.

    Attributes:
        id: Unique in its file.
        topic: What they talk about.
        speaker: The one of the two who hides something.
        felt: What they feel.
        displayed: What they show.
        turns: What is said, in order.
        spans: The clauses in which the mask speaks.
        kind: "hidden"; "shown", where felt and displayed are the same, and `spans` are the clauses in which it
            speaks; "none", where nobody feels anything, so that both are None and there are no spans.
        preamble: Says beforehand what is the case (second edition).
    """

    id: Word
    topic: Word
    felt: Word | None
    displayed: Word | None
    speaker: Word
    turns: Annotated[list[Turn], Field(min_length=2)]
    spans: list[Span]
    kind: Literal["hidden", "shown", "none"] = "hidden"
    preamble: Annotated[str, Field(max_length=2000)] = ""

    @model_validator(mode="after")
    def _spans(self) -> Deflection:
        speakers = {t.speaker for t in self.turns}
        if len(speakers) != 2 or self.speaker not in speakers:
            raise ValueError(f"two speakers are needed, one of them {self.speaker!r}")
        _alternate(self.turns, speakers)
        there = self.felt is not None, self.displayed is not None, bool(self.spans)
        if there != (self.kind != "none",) * 3:
            no = "no " if self.kind == "none" else ""
            raise ValueError(f"kind {self.kind!r} has {no}`felt`, `displayed` and `spans`")
        if self.kind != "none" and (self.felt == self.displayed) != (self.kind == "shown"):
            same = "the same emotion twice" if self.kind == "shown" else "two different emotions"
            raise ValueError(f"kind {self.kind!r} needs {same}")
        for span in self.spans:
            turn = self.turns[span.turn] if span.turn < len(self.turns) else None
            own = turn is not None and turn.speaker == self.speaker
            if turn is None or not own or not span.start < span.end <= len(turn.text):
                raise ValueError(
                    f"the span {span.model_dump()} is not inside a turn of speaker {self.speaker!r}"
                )
        return self

    @property
    def gaps(self) -> list[str]:
        """Where the spans leave out what they should hold.

        A turn of the speaker without one after the mask has begun, two spans of a turn with nothing between them,
        and an end inside a clause.
        """
        marked = {
            k: sorted((s.start, s.end) for s in self.spans if s.turn == k)
            for k in range(len(self.turns))
        }
        begun = min((s.turn for s in self.spans), default=len(self.turns))
        out = []
        for k, turn in enumerate(self.turns):
            if turn.speaker == self.speaker and k > begun and not marked[k]:
                out.append(f"turn {k} has no span")
            for (_, end), (start, _) in itertools.pairwise(marked[k]):
                if start < end or not re.search(r"\w", turn.text[end:start]):
                    out.append(f"turn {k}: two spans meet at {end}")
            out += [
                f"turn {k}: the span [{start}, {end}) cuts a clause"
                for start, end in marked[k]
                if not re.search(r"(^|[.?!,…]\s+)$", turn.text[:start])
                or not re.search(r"[.?!,…]$", turn.text[start:end])
            ]
        return out


def _alternate(turns: Any, speakers: set[str]) -> None:
    said = [t.speaker for t in turns]
    if set(said) != speakers or any(a == b for a, b in itertools.pairwise(said)):
        raise ValueError(f"the speakers {sorted(speakers)} must take turns, found {said}")


def load_dialogues(name_or_path: str | Path | None = None) -> tuple[FeltDialogue, ...]:
    """Load dialogues of two speakers who each feel something.

    Args:
        name_or_path: None for the shipped ones of two people, on a grid of 15 x 15 emotions; "dialogues2" by name, of
            a person and an assistant; or a JSON-lines file of one's own.

    Returns:
        Dialogues in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id.

    Example:
        >>> dialogue = em.sets.load_dialogues()[0]
        >>> dialogue.emotions, dialogue.turns[0].speaker, dialogue.turns[0].own
        ({'A': 'joyful', 'B': 'joyful'}, 'B', 'joyful')
    """
    return load_records("dialogues", name_or_path, FeltDialogue)


def load_deflections(name_or_path: str | Path | None = None) -> tuple[Deflection, ...]:
    """Load dialogues in which a speaker hides what they feel behind another emotion.

    Args:
        name_or_path: None for the 120 shipped ones; "deflections2" by name, with preambles, all 210 cells and twins in
            which the same is shown or nothing felt; or a JSON-lines file of one's own.

    Returns:
        Dialogues in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id.

    Example:
        >>> first = em.sets.load_deflections()[0]
        >>> first.felt, first.displayed, first.turns[first.spans[0].turn].speaker == first.speaker
        ('proud', 'angry', True)
    """
    return load_records("deflections", name_or_path, Deflection)

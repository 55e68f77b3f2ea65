"""Items of a sentence or two: negation, carried-over prefixes, and who of two people feels what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from emolens._files import Strict, Word
from emolens.sets.materials import Prompt, load_records


class Negation(Strict):
    """One sentence that affirms an emotion, and the same one negated.

    Attributes:
        id: Unique in its file.
        kind: "negation".
        emotion: By its name in `core`.
        affirmed: Someone feels it.
        negated: Someone does not.
    """

    id: Word
    kind: Literal["negation"]
    emotion: Word
    affirmed: Prompt
    negated: Prompt


class Negators(Strict):
    """One sentence that affirms an emotion, and the same one with several negators.

    Attributes:
        id: Unique in its file.
        kind: "negators".
        emotion: By its name in `core`.
        affirmed: Someone feels it.
        negated: Someone does not, a sentence for each negator.
        controls: For each of them one of as many words that does not negate.
    """

    id: Word
    kind: Literal["negators"]
    emotion: Word
    affirmed: Prompt
    negated: Annotated[list[Prompt], Field(min_length=1)]
    controls: Annotated[list[Prompt], Field(min_length=1)]

    @model_validator(mode="after")
    def _of_one_length(self) -> Negators:
        sizes = [[len(text.split()) for text in texts] for texts in (self.negated, self.controls)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"every negated sentence needs a control of as many words, found {sizes[0]} and {sizes[1]} words"
            )
        return self


class Prefix(Strict):
    """A neutral text behind an emotional prefix, or behind a flat one.

    Attributes:
        id: Unique in its file.
        kind: "prefix".
        emotion: Of the prefix, by its name in `core`.
        prefix: The emotional one.
        control: The flat one, of like length.
        text: What follows either.
    """

    id: Word
    kind: Literal["prefix"]
    emotion: Word
    prefix: Prompt
    control: Prompt
    text: Prompt


class Feeler(Strict):
    """Someone in a text, and what they feel."""

    name: Word
    emotion: Word


class PersonBinding(Strict):
    """A text in which two people feel different things.

    Its twin, in which they have exchanged what happens to them, is named after it.

    Attributes:
        id: Unique in its file; that of a twin ends in "-swapped".
        kind: "person".
        text: With both names in it.
        persons: Two, with different emotions.
    """

    id: Word
    kind: Literal["person"]
    text: Prompt
    persons: Annotated[list[Feeler], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _there(self) -> PersonBinding:
        absent = [p.name for p in self.persons if p.name not in self.text]
        if absent or self.persons[0].emotion == self.persons[1].emotion:
            raise ValueError(
                f"both people must be in the text, with different emotions (not in the text: {absent})"
            )
        return self

    @property
    def twin_of(self) -> str | None:
        """The id of the item that this one swaps, if it ends in "-swapped"."""
        return self.id.removesuffix("-swapped") if self.id.endswith("-swapped") else None


Item = Annotated[Negation | Negators | Prefix | PersonBinding, Field(discriminator="kind")]


def load_items(
    name_or_path: str | Path | None = None,
) -> tuple[Negation | Negators | Prefix | PersonBinding, ...]:
    """Load negation, carried-over prefixes and person binding.

    Args:
        name_or_path: None for the 40 shipped ones; "items2" by name, in which the people of the first ones are swapped
            and every emotion has three negators; or a JSON-lines file of one's own.

    Returns:
        Items, told apart by `kind`: "negation", "negators", "prefix" or "person".

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id.

    Example:
        >>> sorted({item.kind for item in em.sets.load_items()})
        ['negation', 'person', 'prefix']
    """
    return load_records("items", name_or_path, Item)

"""Materials of the experiments besides stories: small files of prompts, each checked when it is read.

Pairs and openings for causal tests; scenarios that imply an emotion; sentences in which only a number changes,
or only what it counts; activities to prefer; passages of natural text. Negation, prefixes and who feels what
are `items`', dialogues `dialogues`', prompts of users `prompts`'. Emotions are named as in `core`; an
`EmotionSet.concepts` joins its names with others. Each loader reads the shipped file, a shipped one by name
(``load_pairs("pairs2")``: what a name with a 2 holds was written later, and stands beside the first), or one of
your own of the same form.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from emolens._files import (
    Strict,
    Word,
    data_root,
    here,
    not_blank,
    read_jsonl,
    read_yaml,
    unknown,
    validate,
)

Prompt = Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(not_blank)]
Category = Literal[
    "helpful", "engaging", "social", "self-curiosity", "neutral", "aversive", "misaligned", "unsafe"
]


class Pair(Strict):
    """A clean and a corrupted prompt that differ in one fact, and so in what someone feels.

    Each prompt ends where the word for the feeling would come.

    Attributes:
        id: Unique in its file.
        clean: The prompt from which activations are patched.
        corrupted: The prompt with the fact changed.
        control: The clean prompt with a fact changed that does not matter.
        emotion_clean: What someone feels in `clean`, by its name in `core`.
        emotion_corrupted: What they feel in `corrupted`.
    """

    id: Word
    clean: Prompt
    corrupted: Prompt
    control: Prompt
    emotion_clean: Word
    emotion_corrupted: Word


class Stems(Strict):
    """Openings whose next word could name a feeling.

    Attributes:
        choose: To choose a layer and a dose on.
        report: Others, to report.
    """

    choose: Annotated[list[Prompt], Field(min_length=1)]
    report: Annotated[list[Prompt], Field(min_length=1)]


class Scenario(Strict):
    """What someone writes about their day, from which an emotion follows that is never named.

    Attributes:
        id: Unique in its file.
        emotion: What follows, by its name in `core`.
        text: What is written.
        split: Layers are chosen on "main" and results reported on "test".
        form: Of the second edition: it asks something at its end, tells of somebody else, or is a statement of
            one's own.
    """

    id: Word
    emotion: Word
    split: Literal["main", "test"]
    text: Prompt
    form: Literal["question", "third", "statement"] | None = None


class Intensity(Strict):
    """A sentence in which only a number changes, and how emotions change as it grows.

    Attributes:
        id: Unique in its file.
        text: With {x} where the number stands.
        values: Growing.
        unit: What the number counts, in a word.
        expected: +1 for an emotion that grows with the number, -1 for one that falls; empty for a control, in
            which nothing is at stake, so that what moves with it is the number itself.
    """

    id: Word
    text: Annotated[str, Field(pattern=r"\{x\}")]
    values: Annotated[list[int | float], Field(min_length=3)]
    unit: str = ""
    expected: dict[Word, Literal[-1, 1]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _growing(self) -> Intensity:
        if any(a >= b for a, b in zip(self.values, self.values[1:], strict=False)):
            raise ValueError(f"values must grow from each to the next, found {self.values}")
        return self

    @property
    def texts(self) -> list[str]:
        """The sentence with each of its numbers."""
        return [self.text.replace("{x}", written(value)) for value in self.values]


class IntensityPair(Strict):
    """Two sentences with the same number, in one of which it is grave.

    Attributes:
        id: Unique in its file.
        value: The number.
        grave: The sentence in which it is grave.
        harmless: The one in which it is not.
        expected: +1 for an emotion that the grave one has more of, -1 for one that it has less of.
    """

    id: Word
    value: int | float
    grave: Prompt
    harmless: Prompt
    expected: Annotated[dict[Word, Literal[-1, 1]], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_number(self) -> IntensityPair:
        number = written(self.value)
        if self.grave == self.harmless or number not in self.grave or number not in self.harmless:
            raise ValueError(f"grave and harmless must differ, and both hold {number!r}")
        return self


def written(value: float) -> str:
    """A number as the sentences have it: 20,000 with a comma, 1990 and 0.5 without."""
    return f"{value:,}" if value >= 10_000 else f"{value:g}"


class Activity(Strict):
    """Something one could be asked to do.

    Attributes:
        id: Unique in its file.
        category: What kind of thing, from "helpful" to "unsafe".
        text: Fits "Would you prefer to {text}" and "How would you feel about being asked to {text}?".
    """

    id: Word
    category: Category
    text: Prompt


class Snippet(Strict):
    """A passage of a text that somebody wrote.

    Attributes:
        text: 60 to 120 words.
        source: Author, title and where it was found.
        year: When it was written or published.
        kind: Of text, in a word.
    """

    text: Prompt
    source: Annotated[str, Field(min_length=1, max_length=300), AfterValidator(not_blank)]
    year: int
    kind: Word

    @model_validator(mode="after")
    def _passage(self) -> Snippet:
        if not 60 <= (n := len(self.text.split())) <= 120:
            raise ValueError(f"a snippet has 60 to 120 words, found {n}")
        return self


def load_pairs(name_or_path: str | Path | None = None) -> tuple[Pair, ...]:
    """Load clean and corrupted prompts for activation patching.

    Args:
        name_or_path: None for the 60 shipped ones, "pairs2" for later ones by name, or a JSON-lines file of one's own.

    Returns:
        Pairs that differ in one fact, in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id; a pair whose prompts are the same.

    Example:
        >>> pair = em.sets.load_pairs()[0]
        >>> pair.emotion_clean, pair.emotion_corrupted
        ('joy', 'sadness')
    """
    pairs: tuple[Pair, ...] = load_records("pairs", name_or_path, Pair)
    for p in pairs:
        if p.clean in (p.corrupted, p.control):
            other = "corrupted" if p.clean == p.corrupted else "control"
            raise ValueError(
                f"{name_or_path or 'pairs.jsonl'}: pair {p.id!r}: clean and {other} are the same prompt"
            )
    return pairs


def load_stems(path: str | Path | None = None) -> Stems:
    """Load openings whose next word could name a feeling, for validation steering.

    Args:
        path: None for the 24 shipped ones, or a YAML file of one's own.

    Returns:
        Openings to choose a layer and a dose on, and others to report.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; an opening in both halves.

    Example:
        >>> stems = em.sets.load_stems()
        >>> stems.choose[0], len(stems.report)
        ('She feels', 12)
    """
    file = data_root() / "stems.yaml" if path is None else here(path)
    lines, data = read_yaml(file)
    stems = validate(Stems, data, file, lines)
    if both := set(stems.choose) & set(stems.report):
        raise ValueError(
            f"{file}: {sorted(both)[0]!r} is in both halves; what was chosen on cannot be reported on"
        )
    return stems


def load_scenarios(name_or_path: str | Path | None = None) -> tuple[Scenario, ...]:
    """Load scenarios that imply an emotion and never name it.

    Args:
        name_or_path: None for the shipped ones: two to choose a layer on and two to report for every emotion of
            `core`; "scenarios2" by name, of which a third ask something and a third are about others; or a JSON-lines file of one's own.

    Returns:
        Scenarios in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id.

    Example:
        >>> first = em.sets.load_scenarios()[0]
        >>> first.emotion, first.split
        ('serenity', 'main')
    """
    return load_records("scenarios", name_or_path, Scenario)


def load_intensities(name_or_path: str | Path | None = None) -> tuple[Intensity, ...]:
    """Load sentences in which only a number changes.

    Args:
        name_or_path: None for the 16 shipped ones; "intensity_controls" by name, the same kinds of number with
            nothing at stake; or a JSON-lines file of one's own.

    Returns:
        Templates with their numbers and the expected sign for each emotion.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id.

    Example:
        >>> tablets = em.sets.load_intensities()[0]
        >>> tablets.texts[0], tablets.expected
        ('I have just taken 500 mg of paracetamol for my headache.', {'fear': 1, 'serenity': -1})

    Reference:
        The paper's numeric-intensity templates; six points are too few (a random direction often reaches rho = 1),
        so these have eight.
    """
    return load_records("intensities", name_or_path, Intensity)


def load_intensity_pairs(name_or_path: str | Path | None = None) -> tuple[IntensityPair, ...]:
    """Load sentences with the same number, grave or harmless.

    Args:
        name_or_path: None or "intensity_pairs" for the 12 shipped ones by name, or a JSON-lines file of one's own.

    Returns:
        Pairs in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id.

    Example:
        >>> pair = em.sets.load_intensity_pairs()[0]
        >>> pair.value, pair.expected["fear"]
        (15000, 1)
    """
    return load_records("intensity_pairs", name_or_path, IntensityPair)


def load_activities(name_or_path: str | Path | None = None) -> tuple[Activity, ...]:
    """Load activities that could be preferred.

    Args:
        name_or_path: None for the 64 shipped ones; "activities2" by name, the same ids and acts in other words;
            or a JSON-lines file of one's own.

    Returns:
        Activities of eight categories, in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id.

    Example:
        >>> em.sets.load_activities()[0].text
        'help a widow make sense of her pension letters'
    """
    return load_records("activities", name_or_path, Activity)


def load_snippets(path: str | Path) -> tuple[Snippet, ...]:
    """Load passages of natural text, to see what a direction finds in them.

    None is shipped: no corpus of natural text under a free licence was at hand.

    Args:
        path: A JSON-lines file of one's own with text (60 to 120 words), source, year and kind.

    Returns:
        Passages in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; an empty file.

    Example:
        >>> import json, pathlib, tempfile
        >>> passage = {"text": "The minutes were read. " * 20, "source": "A village council", "year": 1904, "kind": "minutes"}
        >>> path = pathlib.Path(tempfile.mkdtemp(), "own.jsonl")
        >>> _ = path.write_text(json.dumps(passage), encoding="utf-8")
        >>> [(s.kind, s.year) for s in em.sets.load_snippets(path)]
        [('minutes', 1904)]
    """
    file = here(path)
    snippets = tuple(read_jsonl(file, Snippet))
    if not snippets:
        raise ValueError(f"{file}: empty")
    return snippets


def editions(name: str) -> list[str]:
    """The shipped files of a kind, by name: "pairs", and "pairs2" where there is one."""
    found = (p.stem for p in data_root().glob(f"{name}*.jsonl"))
    return sorted(stem for stem in found if re.fullmatch(rf"{name}\d*", stem))


def load_records(name: str, given: str | Path | None, model: Any) -> tuple[Any, ...]:
    """Records with ids: of the shipped file `name`, of the shipped file that is `given` by name, or of the file of one's own that it is.

    Raises:
        FileNotFoundError, ValueError: no such file; what is wrong in which line; two records of one id.
    """
    shipped = data_root() / f"{name if given is None else given}.jsonl"
    named = given is None or (
        isinstance(given, str) and re.fullmatch(r"\w+", given) and shipped.is_file()
    )
    file = shipped if named else here(str(given))
    if not file.exists() and re.fullmatch(r"\w+", str(given)):
        raise FileNotFoundError(
            unknown("material", str(given), editions(name)) + " (or give a file)"
        )
    records = tuple(read_jsonl(file, model))
    if not records:
        raise ValueError(f"{file}: empty")
    most = Counter(r.id for r in records).most_common(1)[0]
    if most[1] > 1:
        raise ValueError(f"{file}: two records have the id {most[0]!r}")
    return records


CATEGORIES: tuple[str, ...] = get_args(Category)

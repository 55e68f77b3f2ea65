"""Materials of the experiments besides stories: small files of prompts, each checked when it is read.

Pairs and openings for causal tests; scenarios that imply an emotion; sentences in which only a number changes, or only what it counts;
negation, carried-over prefixes and who feels what; activities to prefer; prompts of users to an assistant; passages of natural text. The
dialogues are `dialogues`'. Emotions are named as in `core`; an `EmotionSet.concepts` joins its names with others. Each loader reads the
shipped file, a shipped one by name (``load_pairs("pairs2")``: what a name with a 2 holds was written later, and stands beside the first),
or one of your own of the same form.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from emolens._files import Strict, Word, data_root, here, read_jsonl, read_yaml, unknown, validate

Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
Challenge = Literal["distress", "hostility", "pressure", "selfhood", "dilemma"]
Category = Literal[
    "helpful", "engaging", "social", "self-curiosity", "neutral", "aversive", "misaligned", "unsafe"
]


class Pair(Strict):
    """A clean and a corrupted prompt that differ in one fact, and so in what someone feels; `control` changes a fact that does not matter.

    Each prompt ends where the word for the feeling would come.
    """

    id: Word
    clean: Prompt
    corrupted: Prompt
    control: Prompt
    emotion_clean: Word
    emotion_corrupted: Word


class Stems(Strict):
    """Openings whose next word could name a feeling: some to choose a layer and a dose on, others to report."""

    choose: Annotated[list[str], Field(min_length=1)]
    report: Annotated[list[str], Field(min_length=1)]


class Scenario(Strict):
    """What someone writes about their day, from which an emotion follows that is never named.

    Layers are chosen on `split` "main" and results reported on "test". `form` (of the second edition): it asks something at its end, tells
    of somebody else, or is a statement of one's own.
    """

    id: Word
    emotion: Word
    split: Literal["main", "test"]
    text: Prompt
    form: Literal["question", "third", "statement"] | None = None


class Intensity(Strict):
    """A sentence in which only a number changes, and how emotions change as it grows.

    Attributes:
        text: With {x} where the number stands.
        values: Growing.
        expected: +1 for an emotion that grows with the number, -1 for one that falls; empty for a control, in which nothing is at stake, so
            that what moves with it is the number itself.
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
    """Two sentences with the same number, in one of which it is grave; `expected` is +1 for an emotion that the grave one has more of."""

    id: Word
    value: int | float
    grave: Prompt
    harmless: Prompt
    expected: Annotated[dict[Word, Literal[-1, 1]], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_number(self) -> IntensityPair:
        if self.grave == self.harmless or any(
            written(self.value) not in text for text in (self.grave, self.harmless)
        ):
            raise ValueError(
                f"grave and harmless must differ, and both hold {written(self.value)!r}"
            )
        return self


def written(value: float) -> str:
    """A number as the sentences have it: 20,000 with a comma, 1990 and 0.5 without."""
    return f"{value:,}" if value >= 10_000 else f"{value:g}"


class Negation(Strict):
    """One sentence that affirms an emotion, and the same one negated."""

    id: Word
    kind: Literal["negation"]
    emotion: Word
    affirmed: Prompt
    negated: Prompt


class Negators(Strict):
    """One sentence that affirms an emotion, the same one with several negators, and for each a `controls` of its length that does not negate."""

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
    """A neutral text behind an emotional prefix, or behind a flat one (`control`) of like length."""

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
    """A text in which two people feel different things; its twin, in which they have exchanged what happens to them, is named after it."""

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


class Activity(Strict):
    """Something one could be asked to do: fits "Would you prefer to {text}" and "How would you feel about being asked to {text}?".

    ``load_activities("activities2")`` has the same ids and acts in other words.
    """

    id: Word
    category: Category
    text: Prompt


class _UserPrompt(Strict):
    id: Word
    topic: Word
    text: Prompt


class NeutralPrompt(_UserPrompt):
    """An ordinary request with nothing at stake."""

    kind: Literal["neutral"]


class ChallengingPrompt(_UserPrompt):
    """A prompt that puts an assistant under strain in one of five ways; `twin` is the id of the plain one beside it."""

    kind: Literal["challenging"]
    challenge: Challenge
    twin: Word


class TwinPrompt(_UserPrompt):
    """The matter of a challenging prompt, whose id is `of`, without the challenge."""

    kind: Literal["twin"]
    of: Word


class SycophancyPrompt(_UserPrompt):
    """Something false, weak work or a bad plan, with three replies of equal length: yes and praise, the truth kindly, the truth with contempt."""

    kind: Literal["sycophancy"]
    claim: Literal["false", "work", "plan"]
    agreeing: Prompt
    honest: Prompt
    harsh: Prompt


class RolePrompt(_UserPrompt):
    """A scene, a voice, a poem or a game to play, on a bright theme, a dark one, or neither."""

    kind: Literal["role"]
    theme: Literal["bright", "dark", "neither"]


class RewritePrompt(_UserPrompt):
    """A rewriting or copywriting task that names no tone, with the neutral text that it starts from."""

    kind: Literal["rewrite"]
    task: Literal["rewriting", "copywriting"]
    source: Prompt


class MannerPrompt(_UserPrompt):
    """One neutral question asked in one of several manners: how far manner alone moves a reading."""

    kind: Literal["format"]
    manner: Word


UserPrompt = Annotated[
    NeutralPrompt
    | ChallengingPrompt
    | TwinPrompt
    | SycophancyPrompt
    | RolePrompt
    | RewritePrompt
    | MannerPrompt,
    Field(discriminator="kind"),
]


class Snippet(Strict):
    """A passage of 60 to 120 words of a text that somebody wrote, with where it is from."""

    text: Annotated[str, Field(min_length=1, max_length=2000)]
    source: Annotated[str, Field(min_length=1, max_length=300)]
    year: int
    kind: Word

    @model_validator(mode="after")
    def _passage(self) -> Snippet:
        if not 60 <= (n := len(self.text.split())) <= 120:
            raise ValueError(f"a snippet has 60 to 120 words, found {n}")
        return self


def load_pairs(path: str | Path | None = None) -> tuple[Pair, ...]:
    """Clean and corrupted prompts for activation patching: the 60 shipped ones, "pairs2", or a JSON-lines file of your own.

    Raises:
        FileNotFoundError, ValueError: no such file; what is wrong in which line.
    """
    pairs: tuple[Pair, ...] = load_records("pairs", path, Pair)
    for p in pairs:
        if p.clean in (p.corrupted, p.control):
            other = "corrupted" if p.clean == p.corrupted else "control"
            raise ValueError(
                f"{path or 'pairs.jsonl'}: pair {p.id!r}: clean and {other} are the same prompt"
            )
    return pairs


def load_stems(path: str | Path | None = None) -> Stems:
    """Openings for validation steering: the 24 shipped ones, or a YAML file of your own.

    Raises:
        FileNotFoundError, ValueError: no such file; what is wrong in which line.
    """
    file = data_root() / "stems.yaml" if path is None else here(path)
    lines, data = read_yaml(file)
    stems = validate(Stems, data, file, lines)
    if both := set(stems.choose) & set(stems.report):
        raise ValueError(
            f"{file}: {sorted(both)[0]!r} is in both halves; what was chosen on cannot be reported on"
        )
    return stems


def load_scenarios(path: str | Path | None = None) -> tuple[Scenario, ...]:
    """Implicit scenarios: 48 to choose a layer on and 48 to report, two of each for every emotion of `core`; "scenarios2", of which a third
    ask something and a third are about others; or a file of your own.
    """
    return load_records("scenarios", path, Scenario)


def load_intensities(path: str | Path | None = None) -> tuple[Intensity, ...]:
    """Sentences in which only a number changes, with the expected sign for each emotion; "intensity_controls", the same kinds of number with
    nothing at stake; or a file of your own.

    Reference:
        The paper's numeric-intensity templates; six points are too few (a random direction often reaches rho = 1), so these have eight.
    """
    return load_records("intensities", path, Intensity)


def load_intensity_pairs(path: str | Path | None = None) -> tuple[IntensityPair, ...]:
    """Sentences with the same number, grave or harmless; or a file of your own."""
    return load_records("intensity_pairs", path, IntensityPair)


def load_items(
    path: str | Path | None = None,
) -> tuple[Negation | Negators | Prefix | PersonBinding, ...]:
    """Negation, carried-over prefixes and person binding: 40 shipped items, told apart by `kind`; "items2", in which the people of the first
    ones are swapped and every emotion has three negators; or a file of your own.
    """
    return load_records("items", path, Item)


def load_activities(path: str | Path | None = None) -> tuple[Activity, ...]:
    """64 activities in eight categories, for preferences; "activities2", the same in other words; or a file of your own."""
    return load_records("activities", path, Activity)


def load_prompts(path: str | Path | None = None) -> tuple[UserPrompt, ...]:
    """Prompts of users to an assistant, told apart by `kind`: neutral and challenging ones with their twins, sycophancy with three replies,
    role play, rewriting, and one question in ten manners; or a file of your own.

    Raises:
        ValueError: also a challenging prompt whose twin is not there.
    """
    prompts: tuple[UserPrompt, ...] = load_records("prompts", path, UserPrompt)
    twins = {p.id: p.of for p in prompts if isinstance(p, TwinPrompt)}
    for p in prompts:
        if isinstance(p, ChallengingPrompt) and twins.get(p.twin) != p.id:
            raise ValueError(
                f"{path or 'prompts.jsonl'}: {p.id!r}: {p.twin!r} is not its twin (kind twin, of {p.id!r})"
            )
    return prompts


def load_snippets(path: str | Path) -> tuple[Snippet, ...]:
    """Passages of natural text, to see what a direction finds in them: a JSON-lines file of your own with text, source, year and kind.

    None is shipped: no corpus of natural text under a free licence was at hand. Cut any that you may use into passages of 60 to 120 words.

    Raises:
        FileNotFoundError, ValueError: no such file; what is wrong in which line.
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

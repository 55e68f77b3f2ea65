"""What is counted in texts: their length, words that name an emotion, likeness, openings, phrases, language.

Words are counted where a language parts them, else characters. Pure functions of texts: what is too much of
anything is said in `check` and `material_checks`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from emolens.sets.emotion_sets import Emotion

CHARACTERS = ("zh", "ja")  # languages that do not part words
# character 5-gram Jaccard; unrelated English stories of 100 words stay below .10
NEAR_DUPLICATE = 0.25
STOCK = (
    r"heart (was |is )?(hammer|pound|sank|sink|swell|rac|leap|thump|skip)",
    r"tears? (well|stung|sting|stream|prick)",
    r"breath (caught|hitched)|breath (i|he|she) didn't know",
    r"jaw (clench|tight)|clenched (my|his|her) jaw",
    r"fists? clench|clenched (my|his|her) fist",
    r"stomach (drop|knot|churn|twist|flip|lurch)",
    r"lump in (my|his|her|the) throat",
    r"hands? (shook|tremb|were shaking)",
    r"knuckles? (went |turned |were )?white|white knuckles",
    r"blood ran cold|shiver (ran )?down",
    r"eyes? widened",
    r"shoulders? (sagged|slumped)",
    r"let out a (long )?(sigh|breath)",
    r"in (my|his|her) chest",
)
STEMMERS = {"en": "english", "de": "german"}
# below, too much has the same stem: "sicher" and "sich"
SHORT_STEM = {"en": 3, "de": 5}
SPOKEN = ["ar", "cs", "da", "de", "en", "es", "fi", "fr", "hi", "id", "it", "ja", "ko", "nl", "no", "pl", "pt", "ru", "sv", "tr", "uk", "vi", "zh"]  # fmt: skip
Key = TypeVar("Key")


def length(text: str, language: str) -> int:
    """Words, or characters for Chinese and Japanese."""
    return len(re.sub(r"\s", "", text)) if language in CHARACTERS else len(text.split())


@lru_cache
def _stemmer(language: str) -> Callable[[str], str]:
    if language not in STEMMERS:
        return str
    import snowballstemmer

    return snowballstemmer.stemmer(STEMMERS[language]).stemWord


def leaks(text: str, emotion: Emotion, language: str = "en") -> list[str]:
    """Words of `text` that name the emotion, share a stem with its name, or are on its forbidden list.

    >>> leaks("She sadly put it down; a sad day.", Emotion(name="sadness", forbidden=["sad", "sad*ly"]))
    ['sadly', 'sad']
    """
    text = text.lower()
    named = {w.lower() for w in (emotion.name, emotion.adjective or "", *emotion.target_words) if w}
    # no spaces: an occurrence anywhere counts
    if language in CHARACTERS:
        listed = {w.rstrip("*").lower() for w in emotion.forbidden}
        return sorted(w for w in named | listed if w in text)
    stem = _stemmer(language)
    exact = named | {w.lower() for w in emotion.forbidden if not w.endswith("*")}
    phrases = [w for w in exact if not re.fullmatch(r"[^\W\d_]+", w)]
    stems = {x for x in map(stem, named) if len(x) >= SHORT_STEM.get(language, 1)}
    starts = tuple(w[:-1].lower() for w in emotion.forbidden if w.endswith("*"))
    words = re.findall(r"[^\W\d_]+", text)
    found = [w for w in words if w in exact or stem(w) in stems or w.startswith(starts)]
    return found + [p for p in phrases if re.search(rf"(?<!\w){re.escape(p)}(?!\w)", text)]


def named(texts: Iterable[tuple[str, str, Emotion]], language: str = "en") -> list[str]:
    """Texts (name, text, emotion) that name their emotion, each with the words that do."""
    return [
        f"{name}: names the emotion: {', '.join(sorted(set(found)))}"
        for name, text, emotion in texts
        if (found := leaks(text, emotion, language))
    ]


def language_of(text: str) -> str:
    """Most likely language of a text, as a two-letter code."""
    return _identifier().classify(text)[0]


@lru_cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    # without dialects, which short texts are easily taken for
    identifier.set_languages(SPOKEN)
    return identifier


def near_duplicates(texts: list[tuple[str, str]]) -> list[str]:
    """Pairs of (name, text) that have most of their wording in common."""
    least = f"(allowed below {NEAR_DUPLICATE})"
    return [f"{a} and {b}: character 5-gram Jaccard {j:.2f} {least}" for a, b, j in overlaps(texts)]


def same_openings(texts: list[tuple[str, str]], language: str = "en", n: int = 4) -> list[str]:
    """Texts (name, text) that begin with the same `n` words (in Chinese and Japanese twice as many characters)."""
    whole = language in CHARACTERS
    openings: dict[str, list[str]] = defaultdict(list)
    for name, text in texts:
        openings[text[: 2 * n] if whole else " ".join(text.lower().split()[:n])].append(name)
    what = f"{2 * n} opening characters" if whole else f"{n} opening words"
    return [f"{', '.join(ids)}: the same {what}" for ids in openings.values() if len(ids) > 1]


def overlaps(texts: list[tuple[Key, str]]) -> Iterator[tuple[Key, Key, float]]:
    """Pairs of (name, text) whose sets of character 5-grams overlap by `NEAR_DUPLICATE` or more, and by how much; a shorter text has none."""
    from sklearn.feature_extraction.text import CountVectorizer

    texts = [(name, text) for name, text in texts if len(" ".join(text.split())) >= 5]
    if not texts:
        return
    counts: Any = CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True)
    grams = counts.fit_transform([t for _, t in texts]).astype(np.float32)
    sizes = np.asarray(grams.sum(1)).ravel()
    # the whole product of thousands of texts would not stay small
    for start in range(0, len(texts), 256):
        shared = (grams[start : start + 256] @ grams.T).tocoo()
        union = sizes[start + shared.row] + sizes[shared.col] - shared.data
        alike = (shared.data >= NEAR_DUPLICATE * union) & (start + shared.row < shared.col)
        pairs = zip(shared.row[alike], shared.col[alike], strict=True)
        for (i, j), share in zip(pairs, (shared.data / union)[alike], strict=True):
            yield texts[start + i][0], texts[j][0], float(share)


def stock_phrases(texts: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The names of the English texts (name, text) that hold each stock phrase."""
    lower = [(name, text.lower()) for name, text in texts]
    return {p: [name for name, text in lower if re.search(rf"\b({p})", text)] for p in STOCK}


def commonest_phrase(texts: list[str], language: str) -> tuple[str, float] | None:
    """The run of five words (eight characters) that most texts share, and their share; None where no text is so long."""
    counts: Counter[tuple[str, ...] | str] = Counter()
    for text in texts:
        if language in CHARACTERS:
            runs: set[Any] = {text[i : i + 8] for i in range(len(text) - 7)}
        else:
            words = re.findall(r"[\w'’]+", text.lower())
            runs = set(zip(*(words[k:] for k in range(5)), strict=False))
        counts.update(runs)
    if not counts:
        return None
    run, n = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return run if isinstance(run, str) else " ".join(run), n / len(texts)

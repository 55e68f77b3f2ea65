"""How good a set is as stimuli: rules that a set must keep, and numbers that a reader should know.

Rules for every set: lengths; no word that names the emotion (by stem), but where a text may; balanced person; no near-duplicates or
repeated openings; no stock phrase in more than one story in a hundred; the language that the set says; frozen texts unchanged. A set of
`edition` 2 also: form inside its permutation band, no word of an emotion's own, gender of who feels balanced, numbers as rare in
neutral texts, one quotation mark (`set_rules` counts them for every set). How far words and form alone go is information and never
optimised. Nothing is changed here, and no model is asked; the experiments' smaller texts are `material_checks`'.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from emolens import stats
from emolens.sets import rules as set_rules
from emolens.sets.emotion_sets import Dialogue, Emotion, EmotionSet, Story
from emolens.sets.norms import norm_of

WORDS = {
    "en": (80, 120),
    "de": (70, 120),
}  # per story; Chinese and Japanese are counted in characters
CHARACTERS = {"zh": (120, 320), "ja": (160, 400)}
NEAR_DUPLICATE = (
    0.25  # character 5-gram Jaccard; unrelated English stories of 100 words stay below .10
)
SHORT_TEXT = 40  # words: among hundreds of shorter ones some begin alike by chance
OPENING = (4, 6)  # words that no two texts share at their beginning, and of sets of short texts
NUMBERS = 1.5  # times as many in neutral stories as in the others
STOCK_SHARE = 0.01  # of the stories, for each phrase of STOCK
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
SHORT_STEM = {"en": 3, "de": 5}  # below, too much has the same stem: "sicher" and "sich"
Name = TypeVar("Name")
SPOKEN = ["ar", "cs", "da", "de", "en", "es", "fi", "fr", "hi", "id", "it", "ja", "ko", "nl", "no", "pl", "pt", "ru", "sv", "tr", "uk", "vi", "zh"]  # fmt: skip


@dataclass(frozen=True)
class Check:
    """What a check found: numbers for a table, and for each rule what breaks it, each with the text that it is about."""

    numbers: dict[str, str]
    rules: dict[str, tuple[str, ...]]

    @property
    def violations(self) -> tuple[str, ...]:
        """Everything that breaks a rule, rule by rule."""
        return tuple(v for found in self.rules.values() for v in found)


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
    if language in CHARACTERS:  # no spaces: an occurrence anywhere counts
        return sorted(
            w for w in named | {w.rstrip("*").lower() for w in emotion.forbidden} if w in text
        )
    stem = _stemmer(language)
    exact = named | {w.lower() for w in emotion.forbidden if not w.endswith("*")}
    phrases = [w for w in exact if not re.fullmatch(r"[^\W\d_]+", w)]
    stems = {x for x in map(stem, named) if len(x) >= SHORT_STEM.get(language, 1)}
    starts = tuple(w[:-1].lower() for w in emotion.forbidden if w.endswith("*"))
    words = re.findall(r"[^\W\d_]+", text)
    found = [
        w for w in words if w in exact or stem(w) in stems or (starts and w.startswith(starts))
    ]
    return found + [p for p in phrases if re.search(rf"(?<!\w){re.escape(p)}(?!\w)", text)]


def check_emotion_set(s: EmotionSet, *, words: bool = True, seed: int = 0) -> Check:
    """Check a set, or sets that were joined; a violation names the text that it is about.

    Args:
        words: Also how far words alone go, by TF-IDF: information that takes up to a minute.
    """
    stories = [(e, t) for e in s.names for t in s.stories[e]]
    texts = [(t.id, t.text) for _, t in stories] + [(n.id, _said(n)) for n in s.neutral]
    turns = [n for n in s.neutral if isinstance(n, Dialogue)]
    spoken = {n.id for n in turns}
    # a sentence of a dialogue is not compared with a story
    kinds = [
        k for inside in (False, True) if (k := [t for t in texts if (t[0] in spoken) is inside])
    ]
    unit = "characters" if s.language in CHARACTERS else "words"
    lengths = [length(t.text, s.language) for _, t in stories]
    bounds = [_bounds(s, t) for _, t in stories]
    person = Counter(t.person for _, t in s.texts())
    shares = _stock(texts) if s.language == "en" else {}
    foreign = [
        (name, tongue) for name, text in texts if (tongue := language_of(text)) != s.language
    ]
    opening = OPENING[min(low for low, _ in bounds) < SHORT_TEXT]
    rules = {
        "length": [
            f"{t.id}: {n} {unit}; allowed {low} to {high}"
            for (_, t), n, (low, high) in zip(stories, lengths, bounds, strict=True)
            if not low <= n <= high
        ],
        "emotion not named": [
            f"{t.id}: names the emotion: {', '.join(sorted(set(found)))}"
            for e, t in stories
            if not t.may_name and (found := leaks(t.text, s[e], s.language))
        ],
        "person": [
            f"grammatical person is not balanced: {person['first']} first-person, {person['third']} third-person stories"
            for _ in range(not person["mixed"] and person["first"] != person["third"])
        ],
        "no near-duplicates": [v for kind in kinds for v in near_duplicates(kind)],
        "openings": [v for kind in kinds for v in same_openings(kind, s.language, opening)],
        "stock phrases": [
            f"{len(ids)} of {len(texts)} texts have the stock phrase /{phrase}/ (allowed: one in a hundred): {', '.join(ids[:5])}"
            for phrase, ids in shares.items()
            if len(ids) > max(1, STOCK_SHARE * len(texts))
        ],
        "language": [
            f"{name}: reads as {tongue!r}, the set says {s.language!r}" for name, tongue in foreign
        ],
        "speakers in turn": [
            f"{d.id}: a speaker answers themselves"
            for d in turns
            if any(a.speaker == b.speaker for a, b in zip(d.turns, d.turns[1:], strict=False))
        ],
        "frozen": [
            f"the texts are not the frozen ones: sha256 {s.fingerprint}, set.yaml says {s.sha256}"
            for _ in range(s.sha256 not in (None, s.fingerprint))
        ],
    }
    form, lot = _by_lot(s, seed)
    commonest = _commonest([t.text for _, t in stories], s.language)
    stock = sum(len(ids) for ids in shares.values())
    numbers = {
        "emotions": str(len(s.names)),
        "topics": f"{len(s.topics)} ({sum(t.person == 'first' for t in s.topics)} first person)",
        "stories": f"{len(s.texts())} main, {len(s.texts('other_person'))} in the other person",
        "neutral texts": f"{sum(isinstance(n, Story) for n in s.neutral)} stories, {len(turns)} dialogues",
        "length": f"median {np.median(lengths):.0f} {unit}, {min(lengths)} to {max(lengths)}",
        "language": f"{s.language}, {1 - len(foreign) / len(texts):.1%} of the texts recognised",
        "stock phrases": f"{stock} in {len(texts)} texts"
        if shares
        else "no list for this language",
        "commonest phrase": f"{commonest[0]!r} in {commonest[1]:.1%} of the stories"
        if commonest
        else "none",
        **form,
        **coverage(s),
        "sha256 of the texts": s.fingerprint[:16],
    }
    if words:
        numbers |= _tfidf(s, seed)
    return Check(
        numbers,
        {name: tuple(found) for name, found in (rules | (lot if s.edition > 1 else {})).items()},
    )


def _bounds(s: EmotionSet, story: Story) -> tuple[int, int]:
    """Least and most words of a story: its topic's own, the set's, or what stories of the language have."""
    own = next(t.length for t in s.topics if t.name == story.topic)
    return own or s.length or WORDS.get(s.language) or CHARACTERS.get(s.language) or (1, 10**6)


def _by_lot(s: EmotionSet, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Numbers of every set on what the second edition's rules are about, and what breaks these rules."""
    own = {
        e: {w for t in s.stories[e] if t.may_name for w in leaks(t.text, s[e], s.language)}
        for e in s.names
    }
    marking = set_rules.marking_words(s, own)
    told = {m.emotion for m in marking}
    who, counted, signs = set_rules.gender(s), set_rules.number_words(s), set_rules.quote_signs(s)
    effects = set_rules.form_effects(s, seed=seed)
    alone = set_rules.form_accuracy(s, seed=seed)
    share = len(told) / len(s.names)
    numbers = {
        "form-only accuracy": f"{alone} ({chance([e for e, _ in s.texts()])})"
        if alone
        else "fewer than four topics",
        "surest effect of form": str(effects[0]),
        "emotions with a marking word": f"{share:.0%} ({len(told)} of {len(s.names)}; {len(marking)} words{f', {marking[0]}' if marking else ''})",
        "gender of who feels": str(who) if who else "not counted",
        "numbers in a hundred": f"{counted[0]:.2f} in stories, {counted[1]:.2f} in neutral ones"
        if counted
        else "not counted",
        "quotation marks": ", ".join(f"{sign} in {len(ids)} texts" for sign, ids in signs.items())
        or "none",
    }
    unequal = [
        f"{e}: {she} stories of her, {he} of him"
        for e, (she, he) in (who.counts if who else {}).items()
        if abs(she - he) > 1
    ]
    rules = {
        "form": [f"form tells an emotion: {effect}" for effect in effects if effect.p < 0.05],
        "no marking words": [str(m) for m in marking],
        "gender": unequal if who and who.source == "design" else [],  # a pronoun may be another's
        "numbers in neutral texts": [
            f"numbers in a hundred: {neutral:.2f} in neutral stories, {emotional:.2f} in the others (allowed: {NUMBERS} times as many)"
            for emotional, neutral in ([counted] if counted and s.neutral else [])
            if neutral > max(NUMBERS * emotional, emotional + 0.1)
        ],
        "one quotation mark": [
            f"{', '.join(ids[:5])}: {sign} (most texts: {max(signs, key=lambda k: len(signs[k]))})"
            for sign, ids in signs.items()
            if len(ids) < max(map(len, signs.values()))
        ],
    }
    return numbers, rules


def chance(labels: list[str]) -> str:
    """What is right by chance, and by always saying the commonest class."""
    counts = Counter(labels)
    return f"chance {1 / len(counts):.3f}, largest class {max(counts.values()) / len(labels):.3f}"


def read_across(sets: Mapping[str, EmotionSet], *, seed: int = 0) -> dict[str, dict[str, str]]:
    """How far form goes from one set to another: a row for each set that is read, a cell for each that form was fitted on."""
    if len(sets) < 2:
        return {}

    def cell(a: str, b: str) -> str:
        found = set_rules.form_accuracy(sets[a], sets[b], seed=seed) if a != b else None
        shared = len(sets[a].concepts.keys() & sets[b].concepts.keys())
        if found:
            return f"{found} (chance {1 / shared:.3f})"
        return (
            ""
            if a == b
            else "fewer than two emotions shared"
            if shared < 2
            else "fewer than four topics"
        )

    return {f"form-only accuracy, read in {b}": {a: cell(a, b) for a in sets} for b in sets}


def coverage(s: EmotionSet) -> dict[str, str]:
    """How many emotions each table of human norms has, in the exact form, in a sense and in another form (`emotion_sets.norm_of`)."""
    out = {}
    for table, title in (
        ("glasgow_2019", "norms, Glasgow"),
        ("russell_mehrabian_1977", "norms, Russell & Mehrabian"),
    ):
        kinds = Counter(norm_of(e, table)[1] for e in s.emotions)
        sense = f", {kinds['sense']} in one sense" if kinds["sense"] else ""
        out[title] = (
            f"{kinds['exact']} exact{sense}, {kinds['related']} by a related form, {kinds[None]} without"
        )
    return out


def language_of(text: str) -> str:
    """Most likely language of a text, as a two-letter code."""
    return _identifier().classify(text)[0]


@lru_cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(SPOKEN)  # without dialects, which short texts are easily taken for
    return identifier


def _said(text: Story | Dialogue) -> str:
    """A text without the names of who speaks, which are no words of it."""
    return " ".join(turn.text for turn in text.turns) if isinstance(text, Dialogue) else text.text


def near_duplicates(texts: list[tuple[str, str]]) -> list[str]:
    """Pairs of (name, text) that have most of their wording in common."""
    found = overlaps(texts)
    return [
        f"{a} and {b}: character 5-gram Jaccard {j:.2f} (allowed below {NEAR_DUPLICATE})"
        for a, b, j in found
    ]


def same_openings(texts: list[tuple[str, str]], language: str = "en", n: int = 4) -> list[str]:
    """Texts that begin with the same `n` words (in Chinese and Japanese twice as many characters)."""
    openings: dict[str, list[str]] = defaultdict(list)
    for name, text in texts:
        openings[
            text[: 2 * n] if language in CHARACTERS else " ".join(text.lower().split()[:n])
        ].append(name)
    what = f"{2 * n} opening characters" if language in CHARACTERS else f"{n} opening words"
    return [f"{', '.join(ids)}: the same {what}" for ids in openings.values() if len(ids) > 1]


def overlaps(texts: list[tuple[Name, str]]) -> Iterator[tuple[Name, Name, float]]:
    """Pairs of (name, text) whose sets of character 5-grams overlap by `NEAR_DUPLICATE` or more, and by how much; a shorter text has none."""
    from sklearn.feature_extraction.text import CountVectorizer

    texts = [(name, text) for name, text in texts if len(" ".join(text.split())) >= 5]
    if not texts:
        return
    counts: Any = CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True)
    grams = counts.fit_transform([t for _, t in texts]).astype(np.float32)
    sizes = np.asarray(grams.sum(1)).ravel()
    for start in range(
        0, len(texts), 256
    ):  # the whole product of thousands of texts would not stay small
        shared = (grams[start : start + 256] @ grams.T).tocoo()
        union = sizes[start + shared.row] + sizes[shared.col] - shared.data
        alike = (shared.data >= NEAR_DUPLICATE * union) & (start + shared.row < shared.col)
        for i, j, both, of in zip(
            shared.row[alike], shared.col[alike], shared.data[alike], union[alike], strict=True
        ):
            yield texts[start + i][0], texts[j][0], float(both / of)


def _stock(texts: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The texts that hold each stock phrase."""
    return {
        p: [name for name, text in texts if re.search(rf"\b({p})", text.lower())] for p in STOCK
    }


def _commonest(texts: list[str], language: str) -> tuple[str, float] | None:
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


def _tfidf(s: EmotionSet, seed: int) -> dict[str, str]:
    """How far words alone go: TF-IDF logistic regression on held-out topics, for emotions and for families."""
    main = s.texts()
    topics = [t.topic for _, t in main]
    if len(set(topics)) < 4:
        return {"TF-IDF accuracy": "not computed (fewer than four topics)"}
    folds = stats.topic_folds(s.told, n_folds=4)
    out = {}
    for what, labels in (
        ("emotions", [e for e, _ in main]),
        ("families", [s.families[e] for e, _ in main]),
    ):
        if len(set(labels)) < 2 or (
            what == "families" and set(s.families.values()) == set(s.names)
        ):
            continue
        scores = stats.tfidf_scores([t.text for _, t in main], labels, topics, folds, s.language)
        right = stats.top_k(scores, np.unique(labels, return_inverse=True)[1])
        accuracy = stats.bootstrap_mean(right.astype(float), topics, seed=seed)
        out[f"TF-IDF accuracy, {what}"] = f"{accuracy} ({chance(labels)}; information, not a rule)"
    return out

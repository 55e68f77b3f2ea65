"""How good a set is as stimuli: rules that a set must keep, and numbers that a reader should know.

Rules for every set: lengths; no word that names the emotion (by stem), but where a text may; balanced person;
no near-duplicates or repeated openings; no stock phrase in more than one story in a hundred; the language that
the set says; frozen texts unchanged. A set of `edition` 2 also: form inside its permutation band, no word of an
emotion's own, gender of who feels balanced, numbers as rare in neutral texts, one quotation mark (`rules` counts
them for every set). How far words and form alone go is information and never optimised. Nothing is changed
here, and no model is asked; the experiments' smaller texts are `material_checks`'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from emolens import stats
from emolens.sets import rules as set_rules
from emolens.sets import wording
from emolens.sets.emotion_sets import Dialogue, EmotionSet, Story
from emolens.sets.norms import norm_of

# of a story, where neither its topic nor its set says: words, or characters for Chinese and Japanese
LENGTHS = {"en": (80, 120), "de": (70, 120), "zh": (120, 320), "ja": (160, 400)}
SHORT_TEXT = 40  # words: among hundreds of shorter ones some begin alike by chance
OPENING = (4, 6)  # words that no two texts share at their beginning, and of sets of short texts
NUMBERS = 1.5  # times as many in neutral stories as in the others
STOCK_SHARE = 0.01  # of the stories, for each stock phrase


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        numbers: Rows of a table.
        rules: What breaks each rule, each with the name of the text that it is about.
    """

    numbers: dict[str, str]
    rules: dict[str, tuple[str, ...]]

    @property
    def violations(self) -> tuple[str, ...]:
        """Everything that breaks a rule, rule by rule."""
        return tuple(v for found in self.rules.values() for v in found)


def check_emotion_set(s: EmotionSet, *, words: bool = True, seed: int = 0) -> Check:
    """Check a set, or sets that were joined, as stimuli.

    Args:
        s: The set; nothing of it is changed.
        words: Also how far words alone go, by TF-IDF: information that takes up to a minute.
        seed: Of the shuffles and intervals.

    Returns:
        Numbers, and for each rule what breaks it; a violation names the text that it is about.

    Example:
        >>> check = em.sets.check_emotion_set(stories, words=False)
        >>> check.numbers["stories"]
        '32 main, 8 in the other person'
        >>> check.rules["person"], check.rules["length"][0]
        ((), 'glimmer-kitchen: ... words; allowed 80 to 120')
    """
    stories = [(e, t) for e in s.names for t in s.stories[e]]
    turns = [n for n in s.neutral if isinstance(n, Dialogue)]
    told = [(t.id, t.text) for _, t in stories]
    told += [(n.id, n.text) for n in s.neutral if isinstance(n, Story)]
    # without the names of who speaks, which are no words of it
    spoken = [(d.id, " ".join(turn.text for turn in d.turns)) for d in turns]
    texts = told + spoken
    unit = "characters" if s.language in wording.CHARACTERS else "words"
    lengths = [wording.length(t.text, s.language) for _, t in stories]
    bounds = [_bounds(s, t) for _, t in stories]
    person = Counter(t.person for _, t in s.texts())
    uneven = not person["mixed"] and person["first"] != person["third"]
    balance = f"{person['first']} first-person, {person['third']} third-person"
    thawed = f"the texts are not the frozen ones: sha256 {s.fingerprint}, set.yaml says {s.sha256}"
    stock = wording.stock_phrases(texts) if s.language == "en" else {}
    read = {name: wording.language_of(text) for name, text in texts}
    foreign = {name: tongue for name, tongue in read.items() if tongue != s.language}
    opening = OPENING[min(low for low, _ in bounds) < SHORT_TEXT]
    form, lot = _by_lot(s, seed)
    rules = {
        "length": [
            f"{t.id}: {n} {unit}; allowed {low} to {high}"
            for (_, t), n, (low, high) in zip(stories, lengths, bounds, strict=True)
            if not low <= n <= high
        ],
        "emotion not named": wording.named(
            ((t.id, t.text, s[e]) for e, t in stories if not t.may_name), s.language
        ),
        "person": [f"grammatical person is not balanced: {balance} stories"] if uneven else [],
        # a sentence of a dialogue is not compared with a story
        "no near-duplicates": [v for kind in (told, spoken) for v in wording.near_duplicates(kind)],
        "openings": [
            v for kind in (told, spoken) for v in wording.same_openings(kind, s.language, opening)
        ],
        "stock phrases": [
            f"{len(ids)} of {len(texts)} texts have the stock phrase /{phrase}/ (allowed: one in a hundred): {', '.join(ids[:5])}"
            for phrase, ids in stock.items()
            if len(ids) > max(1, STOCK_SHARE * len(texts))
        ],
        "language": [
            f"{name}: reads as {tongue!r}, the set says {s.language!r}"
            for name, tongue in foreign.items()
        ],
        "speakers in turn": [
            f"{d.id}: a speaker answers themselves"
            for d in turns
            if any(a.speaker == b.speaker for a, b in zip(d.turns, d.turns[1:], strict=False))
        ],
        "frozen": [] if s.sha256 in (None, s.fingerprint) else [thawed],
    }
    commonest = wording.commonest_phrase([t.text for _, t in stories], s.language)
    phrases = f"{sum(map(len, stock.values()))} in {len(texts)} texts"
    numbers = {
        "emotions": str(len(s.names)),
        "topics": f"{len(s.topics)} ({sum(t.person == 'first' for t in s.topics)} first person)",
        "stories": f"{len(s.texts())} main, {len(s.texts('other_person'))} in the other person",
        "neutral texts": f"{len(s.neutral) - len(turns)} stories, {len(turns)} dialogues",
        "length": f"median {np.median(lengths):.0f} {unit}, {min(lengths)} to {max(lengths)}",
        "language": f"{s.language}, {1 - len(foreign) / len(texts):.1%} of the texts recognised",
        "stock phrases": phrases if stock else "no list for this language",
        "commonest phrase": f"{commonest[0]!r} in {commonest[1]:.1%} of the stories"
        if commonest
        else "none",
        **form,
        **coverage(s),
        "sha256 of the texts": s.fingerprint[:16],
        **(_tfidf(s, seed) if words else {}),
    }
    return checked(numbers, rules | (lot if s.edition > 1 else {}))


def checked(numbers: dict[str, str], rules: Mapping[str, Iterable[str]]) -> Check:
    """The check of which these are the numbers and what breaks the rules."""
    return Check(numbers, {name: tuple(found) for name, found in rules.items()})


def _bounds(s: EmotionSet, story: Story) -> tuple[int, int]:
    """Least and most words of a story: its topic's own, the set's, or what stories of the language have."""
    own = next(t.length for t in s.topics if t.name == story.topic)
    return own or s.length or LENGTHS.get(s.language, (1, 10**6))


def _by_lot(s: EmotionSet, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Numbers of every set on what the second edition's rules are about, and what breaks these rules."""
    own = {
        e: {w for t in s.stories[e] if t.may_name for w in wording.leaks(t.text, s[e], s.language)}
        for e in s.names
    }
    marking = set_rules.marking_words(s, own)
    told = {m.emotion for m in marking}
    who, counted, signs = set_rules.gender(s), set_rules.number_words(s), set_rules.quote_signs(s)
    effects = set_rules.form_effects(s, seed=seed)
    alone = set_rules.form_accuracy(s, seed=seed)
    surest = f", {marking[0]}" if marking else ""
    commonest = max(signs, key=lambda sign: len(signs[sign]), default="")
    numbers = {
        "form-only accuracy": f"{alone} ({chance([e for e, _ in s.texts()])})"
        if alone
        else "fewer than four topics",
        "surest effect of form": str(effects[0]),
        "emotions with a marking word": f"{len(told) / len(s.names):.0%} ({len(told)} of {len(s.names)}; {len(marking)} words{surest})",
        "gender of who feels": str(who) if who else "not counted",
        "numbers in a hundred": f"{counted[0]:.2f} in stories, {counted[1]:.2f} in neutral ones"
        if counted
        else "not counted",
        "quotation marks": ", ".join(f"{sign} in {len(ids)} texts" for sign, ids in signs.items())
        or "none",
    }
    rules = {
        "form": [f"form tells an emotion: {effect}" for effect in effects if effect.p < 0.05],
        "no marking words": [str(m) for m in marking],
        # a pronoun may be another's
        "gender": [
            f"{e}: {she} stories of her, {he} of him"
            for e, (she, he) in (who.counts if who and who.source == "design" else {}).items()
            if abs(she - he) > 1
        ],
        "numbers in neutral texts": [
            f"numbers in a hundred: {neutral:.2f} in neutral stories, {emotional:.2f} in the others (allowed: {NUMBERS} times as many)"
            for emotional, neutral in ([counted] if counted and s.neutral else [])
            if neutral > max(NUMBERS * emotional, emotional + 0.1)
        ],
        "one quotation mark": [
            f"{', '.join(ids[:5])}: {sign} (most texts: {commonest})"
            for sign, ids in signs.items()
            if len(ids) < len(signs[commonest])
        ],
    }
    return numbers, rules


def chance(labels: list[str]) -> str:
    """What is right by chance, and by always saying the commonest class."""
    counts = Counter(labels)
    return f"chance {1 / len(counts):.3f}, largest class {max(counts.values()) / len(labels):.3f}"


def read_across(sets: Mapping[str, EmotionSet], *, seed: int = 0) -> dict[str, dict[str, str]]:
    """How far form goes from one set to another: a row for each set that is read, a cell for each that form was fitted on."""

    def cell(a: str, b: str) -> str:
        if a == b:
            return ""
        shared = len(sets[a].concepts.keys() & sets[b].concepts.keys())
        if found := set_rules.form_accuracy(sets[a], sets[b], seed=seed):
            return f"{found} (chance {1 / shared:.3f})"
        return "fewer than two emotions shared" if shared < 2 else "fewer than four topics"

    if len(sets) < 2:
        return {}
    return {f"form-only accuracy, read in {b}": {a: cell(a, b) for a in sets} for b in sets}


def coverage(s: EmotionSet) -> dict[str, str]:
    """How many emotions each table of human norms has, in the exact form, in a sense and in another form (`norms.norm_of`)."""
    tables = {"glasgow_2019": "Glasgow", "russell_mehrabian_1977": "Russell & Mehrabian"}
    out = {}
    for table, title in tables.items():
        n = Counter(norm_of(e, table)[1] for e in s.emotions)
        sense = f", {n['sense']} in one sense" if n["sense"] else ""
        related = f"{n['related']} by a related form, {n[None]} without"
        out[f"norms, {title}"] = f"{n['exact']} exact{sense}, {related}"
    return out


def _tfidf(s: EmotionSet, seed: int) -> dict[str, str]:
    """How far words alone go: TF-IDF logistic regression on held-out topics, for emotions and for families."""
    main = s.texts()
    topics = [t.topic for _, t in main]
    if len(set(topics)) < 4:
        return {"TF-IDF accuracy": "not computed (fewer than four topics)"}
    folds = stats.topic_folds(s.story_topics, n_folds=4)
    labels = {"emotions": [e for e, _ in main]}
    if len(set(s.families.values())) > 1 and set(s.families.values()) != set(s.names):
        labels["families"] = [s.families[e] for e, _ in main]
    out = {}
    for what, of in labels.items():
        scores = stats.tfidf_scores([t.text for _, t in main], of, topics, folds, s.language)
        right = stats.top_k(scores, np.unique(of, return_inverse=True)[1])
        accuracy = stats.bootstrap_mean(right.astype(float), topics, seed=seed)
        out[f"TF-IDF accuracy, {what}"] = f"{accuracy} ({chance(of)}; information, not a rule)"
    return out

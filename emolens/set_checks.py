"""How good a set is as stimuli: rules that a set must keep, and numbers that a reader should know.

Rules: lengths; no word that names the emotion (by stem); balanced person; no near-duplicates or repeated openings; no stock phrase in
more than one story in a hundred; the language that the set says; frozen texts unchanged; for dialogues and scenarios a complete
grid. Numbers: counts, norms, and how far words alone go (TF-IDF on held-out topics), which is information and never optimised.
Nothing is changed here, and no model is asked.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from emolens import materials, stats
from emolens.emotion_sets import Dialogue, Emotion, EmotionSet, Story, list_emotion_sets, load_emotion_set, norm_of

WORDS = {"en": (80, 120), "de": (70, 120)}  # per story; Chinese and Japanese are counted in characters
CHARACTERS = {"zh": (120, 320), "ja": (160, 400)}
NEAR_DUPLICATE = 0.25  # character 5-gram Jaccard; unrelated English stories of 100 words stay below .10
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
SPOKEN = ["ar", "cs", "da", "de", "en", "es", "fi", "fr", "hi", "id", "it", "ja", "ko", "nl", "no", "pl", "pt", "ru", "sv", "tr", "uk", "vi", "zh"]  # fmt: skip


@dataclass(frozen=True)
class Check:
    """What a check found: numbers for a table, and violations, each with the text it is about."""

    numbers: dict[str, str]
    violations: tuple[str, ...]


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
        return sorted(w for w in named | {w.rstrip("*").lower() for w in emotion.forbidden} if w in text)
    stem = _stemmer(language)
    exact = named | {w.lower() for w in emotion.forbidden if not w.endswith("*")}
    phrases = [w for w in exact if not re.fullmatch(r"[^\W\d_]+", w)]
    stems = {x for x in map(stem, named) if len(x) >= SHORT_STEM.get(language, 1)}
    starts = tuple(w[:-1].lower() for w in emotion.forbidden if w.endswith("*"))
    words = re.findall(r"[^\W\d_]+", text)
    found = [w for w in words if w in exact or stem(w) in stems or (starts and w.startswith(starts))]
    return found + [p for p in phrases if re.search(rf"(?<!\w){re.escape(p)}(?!\w)", text)]


def check_emotion_set(s: EmotionSet, *, words: bool = True, seed: int = 0) -> Check:
    """Check a set; a violation names the text that it is about.

    Args:
        words: Also how far words alone go, by TF-IDF: information that takes up to a minute.
    """
    low, high = s.length or WORDS.get(s.language) or CHARACTERS.get(s.language) or (1, 10**6)
    stories = [(e, t) for e in s.names for t in s.stories[e]]
    lengths = [length(t.text, s.language) for _, t in stories]
    texts = [(t.id, t.text) for _, t in stories] + [(n.id, _said(n)) for n in s.neutral]
    unit = "characters" if s.language in CHARACTERS else "words"
    violations = [
        f"{t.id}: {n} {unit}; allowed {low} to {high}"
        for (_, t), n in zip(stories, lengths, strict=True)
        if not low <= n <= high
    ]
    for e, t in stories:
        if found := leaks(t.text, s[e], s.language):
            violations.append(f"{t.id}: names the emotion: {', '.join(sorted(set(found)))}")
    person = Counter(t.person for _, t in s.texts())
    if not person["mixed"] and person["first"] != person["third"]:
        violations.append(
            f"grammatical person is not balanced: {person['first']} first-person, {person['third']} third-person stories"
        )
    spoken = {n.id for n in s.neutral if isinstance(n, Dialogue)}
    for kind in ([t for t in texts if t[0] not in spoken], [t for t in texts if t[0] in spoken]):
        violations += _same_texts(kind, s.language) if kind else []
    shares = _stock(texts) if s.language == "en" else {}
    violations += [
        f"{len(ids)} of {len(texts)} texts have the stock phrase /{phrase}/ (allowed: one in a hundred): {', '.join(ids[:5])}"
        for phrase, ids in shares.items()
        if len(ids) > max(1, STOCK_SHARE * len(texts))
    ]
    foreign = [(name, tongue) for name, text in texts if (tongue := language_of(text)) != s.language]
    violations += [f"{name}: reads as {tongue!r}, the set says {s.language!r}" for name, tongue in foreign]
    if s.sha256 is not None and s.sha256 != s.fingerprint:
        violations.append(f"the texts are not the frozen ones: sha256 {s.fingerprint}, set.yaml says {s.sha256}")
    phrase, share = _commonest([t.text for _, t in stories], s.language)
    turns = [n for n in s.neutral if isinstance(n, Dialogue)]
    for d in turns:
        if any(a.speaker == b.speaker for a, b in zip(d.turns, d.turns[1:], strict=False)):
            violations.append(f"{d.id}: a speaker answers themselves")
    stock = sum(len(ids) for ids in shares.values())
    numbers = {
        "emotions": str(len(s.names)),
        "topics": f"{len(s.topics)} ({sum(t.person == 'first' for t in s.topics)} first person)",
        "stories": f"{len(s.texts())} main, {len(s.texts('other_person'))} in the other person",
        "neutral texts": f"{sum(isinstance(n, Story) for n in s.neutral)} stories, {len(turns)} dialogues",
        "length": f"median {np.median(lengths):.0f} {unit}, {min(lengths)} to {max(lengths)}",
        "language": f"{s.language}, {1 - len(foreign) / len(texts):.1%} of the texts recognised",
        "stock phrases": f"{stock} in {len(texts)} texts" if shares else "no list for this language",
        "commonest phrase": f"{phrase!r} in {share:.1%} of the stories",
        **coverage(s),
        "sha256 of the texts": s.fingerprint[:16],
    }
    if words:
        numbers |= _tfidf(s, seed)
    return Check(numbers, tuple(violations))


def coverage(s: EmotionSet) -> dict[str, str]:
    """How many emotions each table of human norms has, in the exact form and in another one (`emotion_sets.norm_of`)."""
    out = {}
    for table, title in (("glasgow_2019", "norms, Glasgow"), ("russell_mehrabian_1977", "norms, Russell & Mehrabian")):
        kinds = Counter(norm_of(e, table)[1] for e in s.emotions)
        out[title] = f"{kinds['exact']} exact, {kinds['related']} by a related form, {kinds[None]} without"
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


def check_materials() -> dict[str, Check]:
    """Check the shipped materials: complete grids, no emotion named where it must be implied, no near-duplicates. Their form is checked
    when they are read.
    """
    core, pool = load_emotion_set("core"), load_emotion_set("emotions171")
    return {
        "pairs": _pairs(core),
        "stems": _stems(),
        "scenarios": _scenarios(core),
        "intensities": _intensities(core),
        "items": _items(core),
        "activities": _activities(),
        "dialogues": _dialogues(pool),
        "deflections": _deflections(pool),
    }


def check_shipped(*, words: bool = True, seed: int = 0) -> dict[str, Check]:
    """Check everything that is shipped: every set, then the materials."""
    sets = {name: check_emotion_set(load_emotion_set(name), words=words, seed=seed) for name in list_emotion_sets()}
    return sets | check_materials()


# --- materials --------------------------------------------------------------------------------------------------------


def _pairs(core: EmotionSet) -> Check:
    pairs = materials.load_pairs()
    violations = []
    for p in pairs:
        for e in (p.emotion_clean, p.emotion_corrupted):
            if e not in core.names:
                violations.append(f"{p.id}: {e!r} is not an emotion of core")
            elif found := leaks(f"{p.clean} {p.corrupted} {p.control}", core[e]):
                violations.append(f"{p.id}: names the emotion: {', '.join(found)}")
        if len({p.clean, p.corrupted, p.control}) < 3:
            violations.append(f"{p.id}: clean, corrupted and control must differ")
    kinds = Counter((p.emotion_clean, p.emotion_corrupted) for p in pairs)
    return Check({"pairs": f"{len(pairs)}, {len(kinds)} contrasts"}, tuple(violations))


def _stems() -> Check:
    stems = materials.load_stems()
    return Check({"stems": f"{len(stems.choose)} to choose on, {len(stems.report)} to report"}, ())


def _scenarios(core: EmotionSet) -> Check:
    rows = materials.load_scenarios()
    violations = _grid([(s.emotion, s.split) for s in rows], [(e, k) for e in core.names for k in ("main", "test")], 2)
    for s in rows:
        if s.emotion in core.names and (found := leaks(s.text, core[s.emotion])):
            violations.append(f"{s.id}: names the emotion: {', '.join(found)}")
    violations += _same_texts([(s.id, s.text) for s in rows], "en")
    words = [len(s.text.split()) for s in rows]
    n = Counter(s.split for s in rows)
    numbers = {"scenarios": f"{n['main']} main, {n['test']} test", "length": f"{min(words)} to {max(words)} words"}
    return Check(numbers, tuple(violations))


def _intensities(core: EmotionSet) -> Check:
    rows = materials.load_intensities()
    violations = [f"{r.id}: {e!r} is not an emotion of core" for r in rows for e in r.expected if e not in core.names]
    signs = Counter(sign for r in rows for sign in r.expected.values())
    steps = sorted({len(r.values) for r in rows})
    numbers = {"templates": f"{len(rows)} of {steps[0]}", "expected": f"{signs[1]} rises, {signs[-1]} falls"}
    return Check(numbers, tuple(violations))


def _items(core: EmotionSet) -> Check:
    rows = materials.load_items()
    named = [(r.id, r.emotion) for r in rows if not isinstance(r, materials.PersonBinding)]
    named += [(r.id, p.emotion) for r in rows if isinstance(r, materials.PersonBinding) for p in r.persons]
    violations = [f"{name}: {e!r} is not an emotion of core" for name, e in named if e not in core.names]
    for r in rows:
        if isinstance(r, materials.Negation):
            continue  # names its emotion on purpose
        felt = [r.emotion] if isinstance(r, materials.Prefix) else [p.emotion for p in r.persons]
        text = f"{r.prefix} {r.control} {r.text}" if isinstance(r, materials.Prefix) else r.text
        found = [w for e in felt if e in core.names for w in leaks(text, core[e])]
        violations += [f"{r.id}: names the emotion: {', '.join(found)}"] if found else []
    kinds = Counter(r.kind for r in rows)
    return Check({"items": ", ".join(f"{n} {kind}" for kind, n in kinds.items())}, tuple(violations))


def _activities() -> Check:
    rows = materials.load_activities()
    violations = _grid([r.category for r in rows], materials.CATEGORIES, 8)
    violations += _same_texts([(r.id, r.text) for r in rows], "en")
    numbers = {"activities": f"{len(rows)} in {len({r.category for r in rows})} categories"}
    return Check(numbers, tuple(violations))


def _dialogues(pool: EmotionSet) -> Check:
    rows = materials.load_dialogues()
    emotions = sorted({e for d in rows for e in d.emotions.values()})
    cells = Counter(tuple(d.emotions[k] for k in sorted(d.emotions)) for d in rows)
    violations = [f"no dialogue for {(a, b)}" for a in emotions for b in emotions if not cells[a, b]]
    violations += _spoken([(d.id, d.turns, list(d.emotions.values())) for d in rows], pool)
    first = Counter(d.turns[0].speaker for d in rows)
    numbers = {
        "dialogues": f"{len(rows)}, {len(emotions)} x {len(emotions)} emotions",
        "turns": str(sum(len(d.turns) for d in rows)),
        "who begins": ", ".join(f"{speaker} {n}" for speaker, n in sorted(first.items())),
    }
    return Check(numbers, tuple(violations))


def _deflections(pool: EmotionSet) -> Check:
    rows = materials.load_deflections()
    felt = Counter(d.felt for d in rows)
    violations = [] if len(set(felt.values())) == 1 else [f"not the same number of each felt emotion: {dict(felt)}"]
    violations += _spoken([(d.id, d.turns, [d.felt]) for d in rows], pool)
    numbers = {
        "deflections": f"{len(rows)}, {len(felt)} felt emotions, {len({d.displayed for d in rows})} displayed",
        "turns": str(sum(len(d.turns) for d in rows)),
    }
    return Check(numbers, tuple(violations))


def _spoken(rows: list[tuple[str, Any, list[str]]], pool: EmotionSet) -> list[str]:
    """What holds for every dialogue: six to eight turns, known emotions that are never named, no two alike."""
    out = []
    for name, turns, emotions in rows:
        if not 6 <= len(turns) <= 8:
            out.append(f"{name}: {len(turns)} turns; allowed 6 to 8")
        for e in emotions:
            if e not in pool.names:
                out.append(f"{name}: {e!r} is not an emotion of {pool.name}")
            elif found := leaks(" ".join(t.text for t in turns), pool[e]):
                out.append(f"{name}: names the emotion: {', '.join(sorted(set(found)))}")
    return out + _same_texts([(name, " ".join(t.text for t in turns)) for name, turns, _ in rows], "en")


def _grid(found: Iterable[Any], wanted: Iterable[Any], n: int) -> list[str]:
    """Every wanted cell is there n times, and no other."""
    counts, cells = Counter(found), list(wanted)
    out = [f"{cell}: {counts[cell]} of {n}" for cell in cells if counts[cell] != n]
    return out + [f"{cell}: not one of {cells}" for cell in counts if cell not in cells]


def _said(text: Story | Dialogue) -> str:
    """A text without the names of who speaks, which are no words of it."""
    return " ".join(turn.text for turn in text.turns) if isinstance(text, Dialogue) else text.text


# --- texts ------------------------------------------------------------------------------------------------------------


def _same_texts(texts: list[tuple[str, str]], language: str) -> list[str]:
    """Near-duplicates and repeated openings."""
    out = [
        f"{a} and {b}: character 5-gram Jaccard {j:.2f} (allowed below {NEAR_DUPLICATE})"
        for a, b, j in _near_duplicates(texts)
    ]
    openings: dict[str, list[str]] = defaultdict(list)
    for name, text in texts:
        openings[text[:8] if language in CHARACTERS else " ".join(text.lower().split()[:4])].append(name)
    what = "eight opening characters" if language in CHARACTERS else "four opening words"
    return out + [f"{', '.join(ids)}: the same {what}" for ids in openings.values() if len(ids) > 1]


def _near_duplicates(texts: list[tuple[str, str]]) -> Iterator[tuple[str, str, float]]:
    """Pairs whose sets of character 5-grams overlap (Jaccard) by `NEAR_DUPLICATE` or more."""
    from sklearn.feature_extraction.text import CountVectorizer

    counts: Any = CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True)
    grams = counts.fit_transform([t for _, t in texts]).astype(np.float32)
    sizes = np.asarray(grams.sum(1)).ravel()
    for start in range(0, len(texts), 256):  # the whole product of thousands of texts would not stay small
        shared = (grams[start : start + 256] @ grams.T).tocoo()
        union = sizes[start + shared.row] + sizes[shared.col] - shared.data
        alike = (shared.data >= NEAR_DUPLICATE * union) & (start + shared.row < shared.col)
        for i, j, both, of in zip(shared.row[alike], shared.col[alike], shared.data[alike], union[alike], strict=True):
            yield texts[start + i][0], texts[j][0], float(both / of)


def _stock(texts: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The texts that hold each stock phrase."""
    return {p: [name for name, text in texts if re.search(rf"\b({p})", text.lower())] for p in STOCK}


def _commonest(texts: list[str], language: str) -> tuple[str, float]:
    """The run of five words (eight characters) that most texts share, and their share."""
    counts: Counter[tuple[str, ...] | str] = Counter()
    for text in texts:
        if language in CHARACTERS:
            runs: set[Any] = {text[i : i + 8] for i in range(len(text) - 7)}
        else:
            words = re.findall(r"[\w'’]+", text.lower())
            runs = set(zip(*(words[k:] for k in range(5)), strict=False))
        counts.update(runs)
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
    for what, labels in (("emotions", [e for e, _ in main]), ("families", [s.families[e] for e, _ in main])):
        if len(set(labels)) < 2 or (what == "families" and set(s.families.values()) == set(s.names)):
            continue
        scores = stats.tfidf_scores([t.text for _, t in main], labels, topics, folds, s.language)
        right = stats.top_k(scores, np.unique(labels, return_inverse=True)[1])
        accuracy = stats.bootstrap_mean(right.astype(float), topics, seed=seed)
        out[f"TF-IDF accuracy, {what}"] = f"{accuracy} (chance {1 / len(set(labels)):.3f}; information, not a rule)"
    return out

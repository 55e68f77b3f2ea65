"""Whether the experiments' smaller texts are what they say: complete grids, no emotion named where it must be implied, no duplicates.

Each kind of material is checked in every edition that is shipped; beside it stands how far words alone go, where
an experiment reads it. The form of a record is checked when it is read (`materials`, `dialogues`); sets of
stories are `check`'s business.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from emolens import stats
from emolens.sets import dialogues, items, materials, prompts
from emolens.sets.check import Check, chance, check_emotion_set, checked
from emolens.sets.emotion_sets import EmotionSet
from emolens.sets.set_files import list_emotion_sets, load_emotion_set
from emolens.sets.wording import leaks, named, near_duplicates, overlaps, same_openings

REPLIES = 3  # words by which three replies to one prompt may differ in length


def check_shipped(*, words: bool = True, seed: int = 0) -> dict[str, Check]:
    """Check everything that is shipped: every set, then the materials.

    Args:
        words: Also how far words alone go, by TF-IDF.
        seed: Of the shuffles and intervals.
    """
    sets = {
        name: check_emotion_set(load_emotion_set(name), words=words, seed=seed)
        for name in list_emotion_sets()
    }
    return sets | check_materials(words=words)


def check_materials(*, words: bool = True) -> dict[str, Check]:
    """Check the shipped materials, kind by kind and edition by edition.

    Args:
        words: Also how far words alone go, by TF-IDF.
    """
    core, pool = load_emotion_set("core"), load_emotion_set("emotions171")
    kinds: dict[str, Callable[[str], Check]] = {
        "pairs": lambda name: _pairs(name, core),
        "scenarios": lambda name: _scenarios(name, core, words),
        "intensities": lambda name: _intensities(name, core),
        "intensity_controls": lambda name: _intensities(name, core, control=True),
        "intensity_pairs": lambda name: _intensity_pairs(name, core),
        "items": lambda name: _items(name, core),
        "activities": _activities,
        "dialogues": lambda name: _dialogues(name, pool, words),
        "deflections": lambda name: _deflections(name, pool),
        "prompts": _prompts,
    }
    found = {
        name: check(name) for kind, check in kinds.items() for name in materials.editions(kind)
    }
    return {"stems": _stems()} | found


def _pairs(name: str, core: EmotionSet) -> Check:
    pairs = materials.load_pairs(name)
    each = [(p, e) for p in pairs for e in (p.emotion_clean, p.emotion_corrupted)]
    kinds = Counter((p.emotion_clean, p.emotion_corrupted) for p in pairs)
    rules = {
        "emotions of core": _known([(p.id, e) for p, e in each], core),
        "emotion not named": _named(
            [(p.id, f"{p.clean} {p.corrupted} {p.control}", e) for p, e in each], core
        ),
        "three prompts": [
            f"{p.id}: clean, corrupted and control must differ"
            for p in pairs
            if len({p.clean, p.corrupted, p.control}) < 3
        ],
        "one word changed": [
            f"{p.id}: clean and {what} do not have as many words each, or differ in more than two"
            for p in pairs
            for what, other in (("corrupted", p.corrupted), ("control", p.control))
            if len(other.split()) != len(p.clean.split())
            or sum(a != b for a, b in zip(p.clean.split(), other.split(), strict=False)) > 2
        ],
        "not of another edition": _again(
            "pairs", name, lambda n: [(p.id, p.clean) for p in materials.load_pairs(n)]
        ),
    }
    return checked({"pairs": f"{len(pairs)}, {len(kinds)} contrasts"}, rules)


def _stems() -> Check:
    stems = materials.load_stems()
    return checked(
        {"stems": f"{len(stems.choose)} to choose on, {len(stems.report)} to report"}, {}
    )


def _scenarios(name: str, core: EmotionSet, words: bool) -> Check:
    rows = materials.load_scenarios(name)
    length = [len(s.text.split()) for s in rows]
    n, forms = Counter(s.split for s in rows), Counter(s.form for s in rows if s.form)
    cells = [(e, k) for e in core.names for k in ("main", "test")]
    rules = {
        "two of each": _grid([(s.emotion, s.split) for s in rows], cells, 2),
        "emotion not named": _named([(s.id, s.text, s.emotion) for s in rows], core),
        **_unlike([(s.id, s.text) for s in rows]),
        "forms": _as_many("form", forms),
        "asks where it says so": [
            f"{s.id}: form {s.form!r}, and {'no ' if s.form == 'question' else 'a '}question at its end"
            for s in rows
            if s.form and (s.form == "question") != s.text.rstrip().endswith("?")
        ],
        "not of another edition": _again(
            "scenarios", name, lambda n: [(s.id, s.text) for s in materials.load_scenarios(n)]
        ),
    }
    numbers = {
        "scenarios": f"{n['main']} main, {n['test']} test",
        "length": f"{min(length)} to {max(length)} words",
    }
    if forms:
        numbers["forms"] = ", ".join(f"{k} {form}" for form, k in sorted(forms.items()))
    if words:
        scores = _by_core(core, [s.text for s in rows])
        truth = np.array([core.names.index(s.emotion) for s in rows])
        first, third = (stats.top_k(scores, truth, k).mean() for k in (1, 3))
        said = f"{chance([s.emotion for s in rows])}; information, not a rule"
        numbers["TF-IDF of core"] = f"top-1 {first:.2f}, top-3 {third:.2f} ({said})"
    return checked(numbers, rules)


def _by_core(core: EmotionSet, texts: list[str]) -> np.ndarray:
    """Scores `[text emotion]` of texts by a regression on the words of core's stories."""
    main = core.texts()
    x, z = stats.tfidf([t.text for _, t in main], texts)
    return stats.logistic_words(x, np.array([core.names.index(e) for e, _ in main]), z)


def _intensities(name: str, core: EmotionSet, *, control: bool = False) -> Check:
    rows = materials.load_intensities(name)
    signs = Counter(sign for r in rows for sign in r.expected.values())
    steps = sorted({len(r.values) for r in rows})
    digits = [len(str(value).replace(".", "")) for r in rows for value in r.values]
    wrong = "a control expects no emotion to move" if control else "no emotion is expected to move"
    rules = {
        "emotions of core": _known([(r.id, e) for r in rows for e in r.expected], core),
        "expected or control": [f"{r.id}: {wrong}" for r in rows if bool(r.expected) == control],
    }
    numbers = {
        "templates": f"{len(rows)} of {', '.join(map(str, steps))}",
        "expected": f"{signs[1]} rises, {signs[-1]} falls" if signs else "nothing: controls",
        "digits of a number": f"mean {np.mean(digits):.2f}",
    }
    return checked(numbers, rules)


def _intensity_pairs(name: str, core: EmotionSet) -> Check:
    rows = materials.load_intensity_pairs(name)
    rules = {
        "emotions of core": _known([(r.id, e) for r in rows for e in r.expected], core),
        "emotion not named": _named(
            [(r.id, f"{r.grave} {r.harmless}", e) for r in rows for e in r.expected], core
        ),
        "as many words": [
            f"{r.id}: grave and harmless"
            for r in rows
            if len(r.grave.split()) != len(r.harmless.split())
        ],
    }
    return checked({"pairs of one number": str(len(rows))}, rules)


def _items(name: str, core: EmotionSet) -> Check:
    rows = items.load_items(name)
    felt: dict[str, list[str]] = {}
    implied: list[tuple[str, str, str]] = []  # a negation names its emotion on purpose
    for r in rows:
        felt[r.id] = [p.emotion for p in r.persons] if r.kind == "person" else [r.emotion]
        if r.kind == "person":
            implied += [(r.id, r.text, e) for e in felt[r.id]]
        if r.kind == "prefix":
            implied.append((r.id, f"{r.prefix} {r.control} {r.text}", r.emotion))
    editions = (r for n in materials.editions("items") for r in items.load_items(n))
    people = {r.id: r for r in editions if r.kind == "person"}
    twins = [r for r in rows if r.kind == "person" and r.twin_of]
    rules = {
        "emotions of core": _known([(i, e) for i in felt for e in felt[i]], core),
        "emotion not named": _named(implied, core),
        "twins are swapped": [
            f"{r.id}: its people do not feel what those of {r.twin_of!r} do, exchanged"
            for r in twins
            if _felt(people.get(r.twin_of or ""))
            != {p.name: q.emotion for p, q in zip(r.persons, r.persons[::-1], strict=True)}
        ],
        "negation is named": [
            f"{r.id}: {e!r} is not named in every sentence"
            for r in rows
            if r.kind == "negators" and (e := r.emotion) in core.names
            for text in [r.affirmed, *r.negated, *r.controls]
            if not leaks(text, core[e])
        ],
    }
    numbers = {"items": _counts(r.kind for r in rows)}
    if twins:
        numbers["swapped twins"] = str(len(twins))
    return checked(numbers, rules)


def _felt(item: items.PersonBinding | None) -> dict[str, str]:
    return {p.name: p.emotion for p in item.persons} if item else {}


def _activities(name: str) -> Check:
    rows = materials.load_activities(name)
    first = {r.id: r.category for r in materials.load_activities()}
    rules = {
        "eight of each": _grid([r.category for r in rows], materials.CATEGORIES, 8),
        "ids of the first wording": [
            f"{r.id}: {r.category}" for r in rows if first.get(r.id) != r.category
        ],
        **_unlike([(r.id, r.text) for r in rows]),
        "not of another edition": _again(
            "activities", name, lambda n: [(r.id, r.text) for r in materials.load_activities(n)]
        ),
    }
    n = len({r.category for r in rows})
    return checked({"activities": f"{len(rows)} in {n} categories"}, rules)


def _dialogues(name: str, pool: EmotionSet, words: bool) -> Check:
    rows = dialogues.load_dialogues(name)
    emotions = sorted({e for d in rows for e in d.emotions.values()})
    lasting = [d for d in rows if d.kind != "exchange"]
    cells = Counter(
        tuple(d.emotions[k] for k in sorted(d.emotions, reverse="person" in d.emotions))
        for d in lasting
    )
    felt = [(d, sorted({e for k in range(len(d.turns)) for e in d.felt(k).values()})) for d in rows]
    first = Counter(d.turns[0].speaker for d in rows)
    rules = {
        "complete grid": [
            f"no dialogue for {(a, b)}" for a in emotions for b in emotions if not cells[a, b]
        ],
        "turns": [
            f"{d.id}: {len(d.turns)} turns; allowed 6 to 8"
            for d in lasting
            if not 6 <= len(d.turns) <= 8
        ],
        **_spoken([(d.id, d.turns, of) for d, of in felt], pool),
    }
    numbers = {
        "dialogues": f"{len(rows)}, {len(emotions)} x {len(emotions)} emotions",
        "kinds": _counts(d.kind for d in rows),
        "turns": str(sum(len(d.turns) for d in rows)),
        "who begins": ", ".join(f"{speaker} {n}" for speaker, n in sorted(first.items())),
    }
    if words:
        numbers["TF-IDF of a speaker's turns, topics held out"] = _own_and_other(lasting)
    return checked(numbers, rules)


def _own_and_other(rows: Sequence[dialogues.FeltDialogue]) -> str:
    """How often the words of a speaker's turns tell the own emotion and the other's, where both last."""
    told = [
        (d.topic, e, next(v for s, v in d.emotions.items() if s != speaker), " ".join(t.text for t in d.turns if t.speaker == speaker))
        for d in rows
        if d.changes is None
        for speaker, e in d.emotions.items()
    ]  # fmt: skip
    topics, own, other, texts = (list(x) for x in zip(*told, strict=True))
    scores = stats.tfidf_scores(texts, own, topics, stats.topic_folds(dict.fromkeys(topics)))
    names = sorted(set(own))
    right = [
        stats.top_k(scores, np.array([names.index(e) for e in truth])).mean()
        for truth in (own, other)
    ]
    return f"own emotion {right[0]:.2f}, the other's {right[1]:.2f} ({chance(own)}; information, not a rule)"


def _deflections(name: str, pool: EmotionSet) -> Check:
    rows = dialogues.load_deflections(name)
    hidden, shown = ([d for d in rows if d.kind == kind] for kind in ("hidden", "shown"))
    felt = Counter(d.felt for d in hidden)
    cells = Counter((d.felt, d.displayed) for d in hidden)
    emotions = sorted({str(e) for cell in cells for e in cell})
    second = any(d.preamble for d in rows)
    said, inside = (sum(n) for n in zip(*map(_words_and_masked, hidden), strict=True))
    rules = {
        "as many of each felt emotion": _as_many("felt emotion", felt),
        "no gaps between spans": [f"{d.id}: {gap}" for d in rows for gap in d.gaps],
        **_spoken([(d.id, d.turns, [d.felt] if d.felt else []) for d in rows], pool),
        # one who shows it may say it in other words, and names it as little
        "emotion not named": [
            *_named([(d.id, _text(d.turns), d.felt) for d in hidden if d.felt], pool),
            *_named([(d.id, _text(d.turns), d.felt) for d in shown if d.felt], _names_alone(pool)),
        ],
    }
    if second:
        both = {d.felt for d in shown}
        pairs = itertools.permutations(emotions, 2)
        rules |= {
            "complete grid": [f"no dialogue for {pair}" for pair in pairs if not cells[pair]],
            "felt and shown": [
                f"{e}: not felt and shown anywhere" for e in emotions if e not in both
            ],
            "preamble": [f"{d.id}: no preamble" for d in rows if not d.preamble],
            "a mask in every turn": [
                f"{d.id}: turn {k} has no span"
                for d in hidden
                for k, t in enumerate(d.turns)
                if t.speaker == d.speaker and all(span.turn != k for span in d.spans)
            ],
        }
    numbers = {
        "deflections": f"{len(hidden)}, {len(felt)} felt emotions, {len({d.displayed for d in hidden})} displayed",
        "kinds": _counts(d.kind for d in rows),
        "turns": str(sum(len(d.turns) for d in rows)),
        "of the speaker's words outside the spans": f"{1 - inside / said:.0%}",
    }
    return checked(numbers, rules)


def _words_and_masked(d: dialogues.Deflection) -> tuple[int, int]:
    """Words of the speaker, and those that are in a span."""
    said = sum(len(t.text.split()) for t in d.turns if t.speaker == d.speaker)
    return said, sum(len(d.turns[s.turn].text[s.start : s.end].split()) for s in d.spans)


def _prompts(name: str) -> Check:
    rows = prompts.load_prompts(name)
    replies = [(r, (r.agreeing, r.honest, r.harsh)) for r in rows if r.kind == "sycophancy"]
    texts = {r.id: r.text for r in rows}
    rules = {
        "replies of one length": [
            f"{r.id}: {', '.join(map(str, sizes))} words"
            for r, three in replies
            if np.ptp(sizes := [len(text.split()) for text in three]) > REPLIES
        ],
        "replies begin differently": [
            f"{r.id}: two replies begin with {' '.join(start)!r}"
            for r, three in replies
            for start, n in Counter(tuple(text.split()[:2]) for text in three).items()
            if n > 1
        ],
        "twins of one length": [
            f"{r.id}: {len(r.text.split())} words, its twin {len(texts[r.twin].split())}"
            for r in rows
            if r.kind == "challenging"
            and abs(len(r.text.split()) - len(texts[r.twin].split()))
            > max(5, len(r.text.split()) // 4)
        ],
        # a twin has its prompt's matter, and so may have its words
        "no near-duplicates": near_duplicates(
            [(r.id, r.text) for r in rows if r.kind not in ("twin", "format")]
        ),
    }
    sizes = [len(text.split()) for text in texts.values()]
    numbers = {
        "prompts": _counts(r.kind for r in rows),
        "length": f"{min(sizes)} to {max(sizes)} words",
    }
    return checked(numbers, rules)


def _counts(kinds: Iterable[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).items())


def _as_many(what: str, counts: Counter[Any]) -> list[str]:
    """Nothing, if all are there equally often."""
    return [f"not as many of each {what}: {dict(counts)}"] if len(set(counts.values())) > 1 else []


def _unlike(texts: list[tuple[str, str]]) -> dict[str, list[str]]:
    """What holds for texts (name, text) of every kind: no two are alike."""
    return {"no near-duplicates": near_duplicates(texts), "openings": same_openings(texts)}


def _known(named: Iterable[tuple[str, str]], s: EmotionSet) -> list[str]:
    return [f"{name}: {e!r} is not an emotion of {s.name}" for name, e in named if e not in s.names]


def _named(texts: Iterable[tuple[str, str, str]], s: EmotionSet) -> list[str]:
    """Texts (name, text, emotion) that name the emotion that they should imply."""
    return named((name, text, s[e]) for name, text, e in texts if e in s.names)


def _spoken(rows: list[tuple[str, Any, list[str]]], pool: EmotionSet) -> dict[str, list[str]]:
    """What holds for every dialogue (name, turns, emotions): known emotions that are never named, no two alike."""
    felt = [(name, _text(turns), e) for name, turns, emotions in rows for e in emotions]
    return {
        "emotions of the pool": _known([(name, e) for name, _, e in felt], pool),
        "emotion not named": _named(felt, pool),
        **_unlike([(name, _text(turns)) for name, turns, _ in rows]),
    }


def _text(turns: Sequence[Any]) -> str:
    return " ".join(t.text for t in turns)


def _names_alone(s: EmotionSet) -> EmotionSet:
    """The set with the names of its emotions as the only words that name them."""
    bare = (e.model_copy(update={"forbidden": [], "target_words": []}) for e in s.emotions)
    return replace(s, emotions=tuple(bare))


def _again(kind: str, name: str, texts: Callable[[str], list[tuple[str, str]]]) -> list[str]:
    """Texts of this edition that an earlier one has already, or nearly."""
    if name == kind:
        return []
    both = [((n, i), text) for n in (kind, name) for i, text in texts(n)]
    return [
        f"{b[1]}: as {a[1]} of {a[0]} (character 5-gram Jaccard {j:.2f})"
        for a, b, j in overlaps(both)
        if a[0] != b[0]
    ]


def _grid(found: Iterable[Any], wanted: Iterable[Any], n: int) -> list[str]:
    """Every wanted cell is there n times, and no other."""
    counts, cells = Counter(found), list(wanted)
    out = [f"{cell}: {counts[cell]} of {n}" for cell in cells if counts[cell] != n]
    return out + [f"{cell}: not one of {cells}" for cell in counts if cell not in cells]

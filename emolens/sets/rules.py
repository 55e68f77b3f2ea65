"""What the second edition's rules count: is an emotion told in a form, or in words, of its own?

Form: the effect of a feature f on an emotion e is (mean of f over e's stories - mean over all) / sd, each topic's mean taken out first; the
largest over emotions is set against the same with labels shuffled inside topics, all features together. Words: a word *marks* an
emotion if it is in more than a quarter of its stories (three of eight) and in fewer than one in 25 of the others'. Form-only accuracy is
the lexical twin's sister: what a classifier reads that sees form alone. Pure functions of a set; nothing is judged here (`check`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from emolens import stats
from emolens._files import read_jsonl
from emolens.sets.emotion_sets import Dialogue, EmotionSet, Story
from emolens.sets.wording import CHARACTERS, length

SHARE = 0.25  # of an emotion's stories: in more of them, a word may mark it
RARE = 0.04  # of the other emotions' stories: a word in more of them is common
SHUFFLES = 999
_NUMBERS = {
    "en": r"\b(?:\d[\d.,]*|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
    r"(?:-\w+)?|hundreds?|thousands?|millions?|dozens?)\b",
    "de": r"\b(?:\d[\d.,]*|\w*(?:zwei|drei|vier|fünf|sechs|sieben|acht|neun|zehn|elf|zwölf)(?:zehn|hundert|tausend)?|\w+zig|dreißig|\w*hundert|"
    r"\w*tausend|dutzend)\b",
    "zh": r"\d+|[二两三四五六七八九十百千万]+",  # one is an article there
    "ja": r"\d+|[二三四五六七八九十百千万]+",
}
# German "sie" is also "they"; Japanese does without
_SHE = {"en": r"\b(?:she|her|hers|herself)\b", "zh": "她"}
_HE = {"en": r"\b(?:he|him|his|himself)\b", "zh": "他(?!们)"}
_QUOTES = {'"': r'"[^"]+"', "“ ”": r"(?<!„)“[^”]+”|(?<=\s)“", "„ “": r"„[^“”]+[“”]", "« »": r"[«»]", "「 」": r"「[^」]+」", "' '": r"(?<!\w)['‘](?=\w)(?:[^'\n]|'(?=\w))*?[.,?!…—-]['’](?!\w)"}  # fmt: skip


@dataclass(frozen=True)
class FormEffect:
    """The effect of a feature of form on an emotion, in standard deviations, and the 95 % point of its largest one under shuffled labels."""

    feature: str
    emotion: str
    effect: float
    band: float
    p: float

    def __str__(self) -> str:
        return f"{self.effect:+.2f} sd ({self.feature} of {self.emotion}); band {self.band:.2f}, p {self.p:.3f}"


def form_effects(s: EmotionSet, *, n: int = SHUFFLES, seed: int = 0) -> list[FormEffect]:
    """The surest effect of form on an emotion, and behind it every other one with p < .05, by p and size.

    T_f = max over emotions of |effect|, with labels shuffled inside topics; a feature's band is the 95 % point of its T_f. A feature that a
    single text has is always far out in some emotion, so features are put together by their p and not by their size: p of an effect is the
    share of shuffles in which the least p of any feature is as small.

    Reference:
        Westfall & Young 1993, *Resampling-based multiple testing*, min-p.
    """
    main, y, topic = _main(s)
    x = stats.form_features([t.text for _, t in main], s.language)
    within = x - np.stack([np.bincount(topic, f) / np.bincount(topic) for f in x.T], 1)[topic]
    sd = within.std(0)
    z = within / np.where(sd > 1e-9, sd, np.inf)
    size = np.bincount(y)

    def effects(labels: NDArray[np.integer]) -> NDArray[np.floating]:
        means = np.stack([np.bincount(labels, f, len(size)) / size for f in z.T], 1)
        return means.round(9)  # ties are ties

    found, rng, groups = effects(y), np.random.default_rng(seed), [str(t) for t in topic]
    shuffled = (stats.shuffle_within(y, groups, rng) for _ in range(n))
    null = np.stack([np.abs(effects(labels)).max(0) for labels in shuffled])
    ordered = np.sort(null, 0)

    def own_p(t: NDArray[np.floating], f: int) -> NDArray[np.floating]:
        return (n - np.searchsorted(ordered[:, f], t) + 1) / (n + 1)

    least = np.stack([own_p(null[:, f], f) for f in range(null.shape[1])], 1).min(1)
    p = np.stack([own_p(np.abs(found[:, f]), f) for f in range(found.shape[1])], 1)
    p = ((least <= p[..., None]).sum(-1) + 1) / (n + 1)
    band = np.quantile(null, 0.95, axis=0)
    every = [
        FormEffect(stats.FORM[f], s.names[e], float(found[e, f]), float(band[f]), float(p[e, f]))
        for e, f in np.argwhere(p <= max(0.05, p.min()))
    ]
    surest = sorted(every, key=lambda e: (e.p, -abs(e.effect) / max(e.band, 1e-9)))
    return [surest[0], *(effect for effect in surest[1:] if effect.p < 0.05)]


def form_accuracy(
    s: EmotionSet, read: EmotionSet | None = None, *, seed: int = 0
) -> stats.Estimate | None:
    """Share of stories whose emotion a mean difference of form alone finds, on topics held out; None with fewer than four topics.

    Args:
        read: Fitted on `s`, this set is read: of another language, or another edition; its topics are held out if `s` has them too.
            Emotions are lined up by concept; form is put on one scale in each set. None reads `s` itself.
    """
    other = read or s
    shared = [c for c in s.concepts if c in other.concepts]
    if len(s.story_topics) < 4 or len(shared) < 2:
        return None
    (x, y, topics), (z, truth, theirs) = (_form(v, shared) for v in (s, other))
    scores = np.full((len(truth), len(shared)), np.nan)
    for fold in stats.topic_folds(
        {t: p for v in (s, other) for t, p in v.story_topics.items()}, seed=seed
    ):
        train, test = ~np.isin(topics, fold), np.isin(theirs, fold)
        if test.any():
            scores[test] = stats.centroid_scores(x[train], y[train], z[test], len(shared))
    return stats.bootstrap_mean(
        stats.top_k(scores, truth).astype(float), theirs.tolist(), seed=seed
    )


def _form(s: EmotionSet, concepts: Sequence[str]) -> tuple[Any, NDArray[np.integer], NDArray[Any]]:
    names = {s.concepts[c]: k for k, c in enumerate(concepts)}
    main = [(e, t) for e, t in s.texts() if e in names]
    x = stats.form_features([t.text for _, t in main], s.language)
    x = (x - x.mean(0)) / x.std(0).clip(1e-12)
    return x, np.array([names[e] for e, _ in main]), np.array([t.topic for _, t in main])


@dataclass(frozen=True)
class MarkingWord:
    """A word in `n` of an emotion's `of` stories and in the share `elsewhere` of the other emotions'."""

    word: str
    emotion: str
    n: int
    of: int
    elsewhere: float

    def __str__(self) -> str:
        return f"{self.word!r} is in {self.n} of {self.of} stories of {self.emotion} ({self.elsewhere:.1%} elsewhere)"


def marking_words(s: EmotionSet, own: dict[str, set[str]] | None = None) -> list[MarkingWord]:
    """Words by which an emotion is told: in more than a quarter of its stories (at least three), and rare elsewhere; most frequent first.

    Args:
        own: Words that name each emotion and may be there, in up to half of its stories (of a set that may name them).
    """
    main, y, _ = _main(s)
    of, stories, everywhere = np.bincount(y), Counter[tuple[str, int]](), Counter[str]()
    for k, (_, t) in zip(y.tolist(), main, strict=True):
        words = _words(t.text, s.language)
        everywhere.update(words)
        stories.update((w, k) for w in words)
    out = []
    for (word, k), n in stories.items():
        named = word in (own or {}).get(s.names[k], ())
        limit = of[k] // 2 if named else max(3, int(of[k] * SHARE))
        elsewhere = (everywhere[word] - n) / (len(main) - of[k])
        if n > limit and elsewhere < RARE:
            out.append(MarkingWord(word, s.names[k], n, int(of[k]), float(elsewhere)))
    return sorted(out, key=lambda m: (-m.n / m.of, m.elsewhere, m.word, m.emotion))


def _words(text: str, language: str) -> set[str]:
    """Words as they stand; of Chinese and Japanese, which part no words, runs of two and three characters."""
    if language in CHARACTERS:
        runs = re.findall(r"[^\W\d_]+", text)
        return {run[i : i + k] for run in runs for k in (2, 3) for i in range(len(run) - k + 1)}
    return set(re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower().replace("’", "'")))


@dataclass(frozen=True)
class Gender:
    """How many stories told in the third person have her, and how many him, for each emotion; and where that was found."""

    counts: dict[str, tuple[int, int]]
    source: Literal["design", "pronouns"]

    def __str__(self) -> str:
        shares = {e: she / (she + he) for e, (she, he) in self.counts.items() if she + he}
        low, high = min(shares, key=lambda e: shares[e]), max(shares, key=lambda e: shares[e])
        she, he = (sum(c[k] for c in self.counts.values()) for k in (0, 1))
        spread = f"{shares[low]:.2f} ({low}) to {shares[high]:.2f} ({high})"
        spread = spread if shares[low] < shares[high] else "the same for every emotion"
        return f"she {she / (she + he):.2f}; {spread}, by {self.source}"


def gender(s: EmotionSet) -> Gender | None:
    """Who feels, in stories told in the third person: by the sheets of the set's design, else by the pronoun that a story has more of.

    None where there is nothing to count: no such stories, or a language whose pronouns do not say.
    """
    third = [(e, t) for e, t in s.texts() if t.person == "third"]
    sheets = _sheets(s)
    if any("gender" in sheet.model_fields_set for sheet in sheets.values()):
        found = [(e, sheets[t.id].gender if t.id in sheets else None) for e, t in third]
        source: Literal["design", "pronouns"] = "design"
    elif s.language in _SHE:
        found = [(e, _pronoun(t.text, s.language)) for e, t in third]
        source = "pronouns"
    else:
        return None
    counts = Counter((e, g) for e, g in found if g in ("she", "he"))
    each = {e: (counts[e, "she"], counts[e, "he"]) for e in s.names}
    return Gender(each, source) if counts else None


def _pronoun(text: str, language: str) -> str | None:
    she, he = (len(re.findall(forms[language], text.lower())) for forms in (_SHE, _HE))
    return None if she == he else "she" if she > he else "he"


class _Sheet(BaseModel):  # other keys are a design's own
    id: str
    gender: str | None = None


def _sheets(s: EmotionSet) -> dict[str, _Sheet]:
    """The sheet that each text was written from, by its id."""
    sheets: list[_Sheet] = read_jsonl(s.design, _Sheet) if s.design else []
    return {sheet.id: sheet for sheet in sheets}


def number_words(s: EmotionSet) -> tuple[float, float] | None:
    """Numbers, in words or digits, in a hundred words (characters) of stories and of neutral stories; None where they are not counted."""
    if s.language not in _NUMBERS:
        return None
    pattern = re.compile(_NUMBERS[s.language], re.IGNORECASE)

    def rate(texts: list[str]) -> float:
        size = sum(length(t, s.language) for t in texts)
        return 100 * sum(len(pattern.findall(t)) for t in texts) / max(size, 1)

    neutral = [n.text for n in s.neutral if isinstance(n, Story)]
    return rate([t.text for _, t in s.texts()]), rate(neutral)


def quote_signs(s: EmotionSet) -> dict[str, list[str]]:
    """The texts that have speech in each kind of quotation marks, by their ids; kinds that do not occur are left out."""
    texts: list[Story | Dialogue] = [*(t for _, t in s.texts()), *s.neutral]
    found = {k: [t.id for t in texts if re.search(sign, t.text)] for k, sign in _QUOTES.items()}
    return {sign: ids for sign, ids in found.items() if ids}


def _main(
    s: EmotionSet,
) -> tuple[list[tuple[str, Story]], NDArray[np.integer], NDArray[np.integer]]:
    main = s.texts()
    number = {e: k for k, e in enumerate(s.names)}
    topics = np.unique([t.topic for _, t in main], return_inverse=True)[1]
    return main, np.array([number[e] for e, _ in main]), topics

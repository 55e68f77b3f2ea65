"""From rows to words: every claim of a study, the rule that judges it, and what is said of each outcome.

A rule sees one row and says "shown", "opposite" (as sure, on the other side), "not shown", or "not asked" where a figure that it needs is
absent, is no number, or stands on too few units. Rules are in one table, `RULES`, and so are claims, `CLAIMS`: the page lays out what
`answers` gives, and whoever counts how often a study without an effect claims one counts the same. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Literal

import numpy as np

from emolens.experiments.base import Row, find
from emolens.sets.emotion_sets import EmotionSet

Verdict = Literal["shown", "not shown", "opposite", "not asked"]
LEVEL = 0.05  # of a permutation test
LOSS = 0.05  # of top-1: a difference that is surely smaller counts as none
FEWEST = 6  # stories, words, pairs or openings; an interval over fewer is no interval


@dataclass(frozen=True)
class Rule:
    """When a row shows a claim and when it shows the opposite, from the fields that both need; `says` adds to the words of an outcome."""

    needs: tuple[str, ...]
    shown: Callable[[Any], bool]
    opposite: Callable[[Any], bool]
    says: Mapping[str, str] = field(default_factory=dict)

    def missing(self, r: Row) -> str:
        """Why this row cannot answer; empty if it can."""
        if r.n is not None and r.n < FEWEST:
            return f"n = {r.n} {r.unit_of_n or ''}; at least {FEWEST} are needed"
        absent = [
            k for k in ("value", *self.needs) if (x := getattr(r, k)) is None or not np.isfinite(x)
        ]
        return f"no {' and no '.join(k.replace('_', ' ') for k in absent)}" if absent else ""

    def __call__(self, r: Row) -> Verdict:
        """The verdict on one row."""
        if self.missing(r):
            return "not asked"
        return "shown" if self.shown(r) else "opposite" if self.opposite(r) else "not shown"


RULES: dict[str, Rule] = {
    # the whole interval lies above what 95 % of the null draws reach, and the permutation test rejects it
    "above_null": Rule(
        ("low", "high", "null_mean", "null_high", "p"),
        lambda r: r.low > r.null_high and r.p < LEVEL,
        lambda r: r.high < r.null_mean and r.p > 1 - LEVEL,
        {"opposite": "The interval lies below the control: {other}."},
    ),
    "above_zero": Rule(
        ("low", "high"),
        lambda r: r.low > 0,
        lambda r: r.high < 0,
        {
            "not shown": "The interval includes 0.",
            "opposite": "The interval lies below 0: {other}.",
        },
    ),
    "below_zero": Rule(
        ("low", "high"),
        lambda r: r.high < 0,
        lambda r: r.low > 0,
        {
            "not shown": "The interval includes 0.",
            "opposite": "The interval lies above 0: {other}.",
        },
    ),
    # absence of a loss is shown by an interval that excludes one, not by one that includes 0
    "no_loss": Rule(
        ("low", "high"),
        lambda r: r.low > -LOSS,
        lambda r: r.high < 0,
        {
            "shown": f"A loss of more than {100 * LOSS:.0f} points is excluded.",
            "not shown": f"A loss of more than {100 * LOSS:.0f} points is not excluded.",
            "opposite": "The interval lies below 0: {other}.",
        },
    ),
    "above_chance": Rule(
        ("low", "high", "null_mean"),
        lambda r: r.low > r.null_mean,
        lambda r: r.high < r.null_mean,
        {
            "not shown": "The interval includes chance.",
            "opposite": "The interval lies below chance.",
        },
    ),
    "rejected": Rule(
        ("p", "null_mean"),
        lambda r: r.p < LEVEL,
        lambda r: r.p > 1 - LEVEL and r.value < r.null_mean,
        {"opposite": "That is lower than {other}."},
    ),
    # of a maximum over sizes, whose sign says nothing: a small one is no finding, and its interval must exclude 0 on a side
    "rejected_maximum": Rule(
        ("low", "high", "p"), lambda r: r.p < LEVEL and (r.low > 0 or r.high < 0), lambda r: False
    ),
}


@dataclass(frozen=True)
class Claim:
    """One sentence that a study may find.

    Attributes:
        name: Short and stable.
        words: The claim itself.
        rule: Its name in `RULES`.
        rows: What it is judged on, from all rows and the number of emotions; one line for each row found.
        text: The figures in words, from that row, all rows and the number of emotions.
        other: What is the case where the opposite is shown.
        gate: Why the claim cannot be asked at all; empty if it can.
        also: Further rows that must agree by the same rule, say a second control.
        confound: What it says, where shown, is a reason to doubt the others: no success, and not to be shown as one.
    """

    name: str
    words: str
    rule: str
    rows: Callable[[Sequence[Row], int], Sequence[Row]]
    text: Callable[[Row, Sequence[Row], int], str]
    other: str = ""
    gate: Callable[[Sequence[Row], int], str] = lambda rows, k: ""
    also: Callable[[Sequence[Row], int], Sequence[Row]] = lambda rows, k: ()
    confound: bool = False


@dataclass(frozen=True)
class Answer:
    """A claim as a study answers it."""

    name: str
    words: str
    verdict: Verdict
    text: str
    confound: bool = False


def judge(claim: Claim, r: Row, rows: Sequence[Row], k: int) -> Answer:
    """The verdict of a claim on one of its rows, with its words."""
    rule, judged = RULES[claim.rule], (r, *claim.also(rows, k))
    if reason := claim.gate(rows, k) or next(filter(None, map(rule.missing, judged)), ""):
        return Answer(
            claim.name, claim.words, "not asked", f"cannot be asked: {reason}.", claim.confound
        )
    each: set[Verdict] = {rule(x) for x in judged}
    verdict: Verdict = each.pop() if len(each) == 1 else "not shown"
    ending = rule.says.get(verdict, "").format(other=claim.other)
    return Answer(
        claim.name,
        claim.words,
        verdict,
        f"{claim.text(r, rows, k)} {ending}".rstrip(),
        claim.confound,
    )


def answers(rows: Sequence[Row], emotions: EmotionSet) -> list[Answer]:
    """What the rows say of every claim, in the order of `CLAIMS`; a claim without rows is left out."""
    k = len(emotions.names)
    return [judge(c, r, rows, k) for c in CLAIMS for r in c.rows(rows, k)]


def percent(value: float | None) -> str:
    """A share; "?" where it is not known."""
    return "?" if value is None else f"{100 * value:.0f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A figure; nothing where it is not known."""
    return "" if value is None or not np.isfinite(value) else f"{value:z.{digits}f}"


def interval(r: Row, percent: bool = False, digits: int = 2) -> str:
    """The interval of a row in brackets; nothing where it has none."""
    if r.low is None or r.high is None:
        return ""
    return (
        f"[{100 * r.low:.0f}, {100 * r.high:.0f}]"
        if percent
        else f"[{r.low:z.{digits}f}, {r.high:z.{digits}f}]"
    )


_MAIN = {"estimator": "mean_difference", "control": "shuffled labels"}


def _of(experiment: str, metric: str, **fields: Any) -> Callable[[Sequence[Row], int], list[Row]]:
    return lambda rows, k: find(rows, experiment, metric, **fields)


def _primary(experiment: str) -> Callable[[Sequence[Row], int], list[Row]]:
    return lambda rows, k: [r for r in rows if r.experiment == experiment and r.primary]


def _margin(
    name: str, words: str, metric: str, what: str, other: str, *, estimator: str = "mean_difference"
) -> Claim:
    """A paired difference of accuracies, or of areas."""

    def text(r: Row, rows: Sequence[Row], k: int) -> str:
        if "auc" in metric:
            return f"{what} {r.value:+.3f} {interval(r, digits=3)}."
        return f"{what} {100 * r.value:+.1f} points {interval(r, True)}."

    experiment = "transfer" if "macro" in metric else "separability"
    found = _of(experiment, metric, estimator=estimator)
    return Claim(
        name,
        words,
        "above_zero",
        found,
        text,
        other,
        _nothing_read(experiment, metric.split(" minus ")[0]),
    )


def _nothing_read(experiment: str, metric: str) -> Callable[[Sequence[Row], int], str]:
    """Two readings at chance differ by chance, and surely so on many texts: what reads nothing itself is not compared."""

    def gate(rows: Sequence[Row], k: int) -> str:
        own = find(rows, experiment, metric, **_MAIN)  # slow estimators have no null of their own
        reads = any(
            r.low is not None and r.null_high is not None and r.low > r.null_high for r in own
        )
        return "" if reads else "the directions themselves are not above shuffled labels"

    return gate


def _separates(r: Row, rows: Sequence[Row], k: int) -> str:
    of_family = find(rows, "separability", "family top1", readout="calibrated", **_MAIN)
    more = f" Of the families the right one in {percent(of_family[0].value)} {interval(of_family[0], True)}." if of_family else ""  # fmt: skip
    return (
        f"of {k} emotions mean-difference directions read the right one in {percent(r.value)} of held-out stories {interval(r, True)}; "
        f"chance is {percent(1 / k)}, and with shuffled labels 95 % of runs stay below {percent(r.null_high)}.{more}"
    )


def _form(r: Row, rows: Sequence[Row], k: int) -> str:
    return (
        f"form alone reads {percent(r.value)} {interval(r, True)} of the held-out stories (chance {percent(1 / k)}); "
        "what it reads, a direction may be reading too."
    )


def _zero_shot(r: Row, rows: Sequence[Row], k: int) -> str:
    found = [
        c for c in find(rows, "transfer", "macro auc") if (c.control or "").startswith("supervised")
    ]
    more = f" A regression fitted on these comments finds {found[0].value:.2f} at the same layer: what there was to be read." if found else ""  # fmt: skip
    n = len({x.emotion for x in find(rows, "transfer", "auc by label")})
    wider = [f"; with the labels resampled too, that is for labels like them, {interval(w)}" for w in find(rows, "transfer", "macro auc, labels resampled too")]  # fmt: skip
    labels = (
        f" over {n} labels (resampled are comments, which speaks of these labels{''.join(wider)})"
        if n
        else ""
    )
    return f"macro-AUC {r.value:.2f} {interval(r)}{labels} against {number(r.null_mean)} (95 % below {number(r.null_high)}), p = {number(r.p, 3)}; chance is .50.{more}"


def _axis(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"r = {r.value:.2f} {interval(r)}, p = {number(r.p, 3)} against shuffled labels."


def _steers(r: Row, rows: Sequence[Row], k: int) -> str:
    metric = "share diag above off"
    [own], [null] = (
        find(rows, "validation", metric, control=c, dose=r.dose)
        for c in (None, "random directions")
    )
    text = (
        f"in {percent(own.value)} {interval(own, True)} of openings x emotions its own words rise more than the mean of the others "
        f"(random directions {percent(null.value)} {interval(null, True)}; difference {100 * r.value:+.0f} points {interval(r, True)}), "
        f"at block {r.layer}, dose {r.dose:g}, chosen on other openings; those it is reported on had been looked at while emolens was made, so it is no fresh test."
    )
    for first in find(rows, "validation", "argmax", control=None):
        text += f" They rise most of all in {percent(first.value)} {interval(first, True)} (chance {percent(first.null_mean)})."
    return text


def _instruction(r: Row, rows: Sequence[Row], k: int) -> str:
    metric = "diag minus off at equal KL"
    [own], [told] = (
        find(rows, "validation", metric, control=c) for c in (None, "instruction in words")
    )
    return f"{own.value:.2f} nats against {told.value:.2f}; difference {r.value:+.2f} {interval(r)}, the dose interpolated on the curve."


def _written(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"z {r.value:+.2f} {interval(r)} against text written with random directions; the unsteered model reads it, by directions of the topics that the added ones do not know."


def _gap(metric: str, what: str) -> Callable[[Row, Sequence[Row], int], str]:
    def text(r: Row, rows: Sequence[Row], k: int) -> str:
        own = find(rows, "causal", metric, control=None)[0]
        return f"{100 * own.value:.1f} % {what}; minus {escape(r.control or '')} {100 * r.value:+.1f} points [{100 * (r.low or 0):.1f}, {100 * (r.high or 0):.1f}]."

    return text


_TRIAD = (
    ("ablation", "Taking a direction out of the whole stream costs the model part of the contrast", "ablate loss, whole stream", "of the clean-corrupted gap is lost"),
    ("ablation after blocks", "Taking it out after every block costs part of it too", "ablate loss", "of the gap is lost (attention still hands it to the MLP of its own block)"),
    ("patching", "The part of the stream along a direction carries some of the contrast", "patch recovery", "of the gap is recovered by it alone"),
    ("adding", "Adding the direction moves a prompt towards the other emotion", "add gain", "of the gap is gained"),
)  # fmt: skip


def _untested_pairs(rows: Sequence[Row]) -> list[Row]:
    """The row that says how many pairs have a gap, where they were too few to be tested."""
    tested = any(find(rows, "causal", f"{metric} minus random") for _, _, metric, _ in _TRIAD)
    return [] if tested else find(rows, "causal", "pairs with a gap")


def _or_the_pairs(metric: str) -> Callable[[Sequence[Row], int], list[Row]]:
    return lambda rows, k: find(rows, "causal", f"{metric} minus random") or _untested_pairs(rows)


def _too_few_pairs(rows: Sequence[Row], k: int) -> str:
    return "".join(f"only {r.value:.0f} of {r.n} pairs have a gap" for r in _untested_pairs(rows))


def _refitted(r: Row, rows: Sequence[Row], k: int) -> str:
    [random] = find(rows, "causal", "top1 refitted minus random")
    left, whole = (
        find(rows, "causal", "top1 refitted", control=c) for c in (None, "nothing ablated")
    )
    says = f"a fresh classifier reads {percent(left[0].value)} {interval(left[0], True)}, {percent(whole[0].value)} with nothing taken out; " if left and whole else ""  # fmt: skip
    return (
        f"{says}taken out by directions of the other topics only, that is {100 * r.value:+.1f} points {interval(r, True)} against directions from "
        f"{escape(r.control or '')}, and {100 * random.value:+.1f} {interval(random, True)} against {escape(random.control or '')}; "
        "shown if both intervals lie below 0."
    )


def _persons(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"top-1 {100 * r.value:+.1f} points {interval(r, True)} against directions from as many topics of both persons."


def _nothing_to_lose(rows: Sequence[Row], k: int) -> str:
    """Where directions from both persons read nothing, a change of person has nothing to cost."""
    mixed = find(rows, "person", "top1", split="both persons")
    read = mixed and RULES["above_chance"](replace(mixed[0], null_mean=1 / k)) == "shown"
    return "" if read else "directions from both persons are at chance themselves"


def _component(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"{escape(r.metric)} = {r.value:.2f} {interval(r)}, p = {number(r.p, 3)} for the maximum of |r| over components, layers and tables."


def _too_few_words(rows: Sequence[Row], k: int) -> str:
    """Below so many rated words the interval of an r is wide enough for either answer."""
    return "".join(
        f"{escape(r.metric)} = {r.value:.2f} {interval(r)} is of {r.n} rated words, which is underpowered; a claim about geometry needs a larger set"
        for r in _primary("geometry")(rows, k)
        if "underpowered" in (r.unit_of_n or "")
    )


def _vocabulary(r: Row, rows: Sequence[Row], k: int) -> str:
    return f"logit lens at layer {r.layer}: AUC {r.value:.2f} {interval(r)}, {escape(r.control or '')} {number(r.null_mean)}, p = {number(r.p, 3)}."


_TOP1, _WORDS = "emotion top1 minus ", "words do better"
CLAIMS: tuple[Claim, ...] = (
    Claim("separates", "The residual stream separates emotions on topics it never saw", "above_null",
          _of("separability", "emotion top1", readout="calibrated", **_MAIN), _separates, "shuffled labels are read better"),
    _margin("more than words", "It is more than vocabulary", _TOP1 + "tfidf", "top-1 minus the same estimator on TF-IDF", _WORDS),
    _margin("more than form", "It is more than the way a story is built", _TOP1 + "form",
            "top-1 minus the same estimator on sentence lengths, punctuation and quotes", "form does better"),
    Claim("form", "A confound: the way a story is built tells emotions apart by itself", "above_chance",
          lambda rows, k: [replace(r, null_mean=1 / k) for r in find(rows, "separability", "emotion top1", control="form", estimator="mean_difference")], _form, confound=True),
    _margin("logistic: more than words", "The same with logistic regression on both sides", _TOP1 + "tfidf", "top-1 minus TF-IDF", _WORDS, estimator="logistic"),
    Claim("zero-shot", "Zero-shot on other people's text (GoEmotions) the directions beat shuffled ones", "above_null",
          _of("transfer", "macro auc", **_MAIN), _zero_shot, "shuffled directions do better"),
    _margin("zero-shot: more than words", "There they do better than words", "macro auc minus tfidf", "macro-AUC minus TF-IDF from the same stories", _WORDS),
    *(Claim(f"{axis} axis", f"The {axis} axis reads the {axis} of EmoBank's sentences", "above_null",
            _of("transfer", "r", emotion=axis, **_MAIN), _axis, "it reads the other way round") for axis in ("valence", "arousal")),
    Claim("steers", "Adding a direction makes the model say its word", "above_zero",
          _of("validation", "share diag above off minus random"), _steers, "random directions do more",
          also=_of("validation", "share diag above off minus shuffled")),
    Claim("steers: more than told", "It does more than an instruction in words that changes neutral text as much", "above_zero",
          _of("validation", "diag minus off at equal KL, direction minus instruction"), _instruction, "the instruction does more"),
    Claim("writes", "What is written with a direction reads more like its emotion", "above_zero",
          _of("validation", "own score of the text minus random"), _written, "text written with random directions does more"),
    *(Claim(name, words, "above_zero", _or_the_pairs(metric), _gap(metric, what), "random directions do more", _too_few_pairs)
      for name, words, metric, what in _TRIAD),
    Claim("ablation: refitted", "Ablation leaves less emotion to be read", "below_zero",
          _of("causal", "top1 refitted minus shuffled"), _refitted, "more is left than after the controls", also=_of("causal", "top1 refitted minus random")),
    Claim("person", "Directions from “I” read “she” as well, and the other way round", "no_loss",
          _of("person", "top1 cross minus mixed"), _persons, "the change of person costs something", _nothing_to_lose),
    Claim("valence", "A leading component lines up with human valence", "rejected_maximum", _primary("geometry"), _component, gate=_too_few_words),
    Claim("vocabulary", "Through the lens an emotion's own words lie above other emotions' words", "rejected", _primary("logit_lens"), _vocabulary, "shuffled labels do more"),
)  # fmt: skip

"""Print the README's section of findings from the results of studies, so that no figure in it is typed by hand.

    emolens study --set core --external DATA --out study
    emolens study --set emotions171 --external DATA --out study171
    emolens study --set core2 --external DATA --out study2
    emolens run geometry transfer --set emotions171v2 --external DATA --out run171v2
    python benchmarks/readme.py study study171 --second study2 --plain run171v2 [--write README.md]

With --write the text between a section's two marks in that file is replaced. Words that say what was found (up, down, not shown) are written
here by hand: read them against the figures.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

CORE, CORE_END = "<!-- benchmarks/readme.py writes this: core -->\n", "<!-- end: core -->"
BOTH, BOTH_END = (
    "<!-- benchmarks/readme.py writes this: two editions -->\n",
    "<!-- end: two editions -->",
)
WORDS, WORDS_END = (
    "<!-- benchmarks/readme.py writes this: 171 words -->\n",
    "<!-- end: 171 words -->",
)
PLAIN, PLAIN_END = (
    "<!-- benchmarks/readme.py writes this: 171 words, second edition -->\n",
    "<!-- end: 171 words, second edition -->",
)


class Study:
    """Rows of one results.json, by metric and fields."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[dict[str, Any]] = json.loads(
            (folder / "results.json").read_text(encoding="utf-8")
        )["rows"]

    def one(self, metric: str, **fields: Any) -> dict[str, Any]:
        """The row of a metric whose fields are these.

        Raises:
            LookupError: none, or several that differ.
        """
        found = [
            r
            for r in self.rows
            if r["metric"] == metric and all(r.get(k) == v for k, v in fields.items())
        ]
        values = {(r["value"], r["low"], r["high"]) for r in found}
        if len(values) != 1:
            raise LookupError(f"{len(values)} rows {metric!r} with {fields}")
        return found[0]

    def say(self, metric: str, form: str = "{:.2f}", **fields: Any) -> str:
        """`value [low, high]`."""
        r = self.one(metric, **fields)
        return interval(r, form)


def interval(r: dict[str, Any], form: str = "{:.2f}") -> str:
    """A row's value with its interval, in the README's manner: .57 [.52, .62], or 13 % [6, 22]."""
    value = number(r["value"], form) + (" %" if form in (PERCENT, TENTHS) else "")
    return (
        value
        if r["low"] is None
        else f"{value} [{number(r['low'], form)}, {number(r['high'], form)}]"
    )


def number(x: float, form: str = "{:.2f}") -> str:
    """A number without the 0 before its point, and without a sign if it is 0."""
    text = form.format(100 * x if form in (PERCENT, TENTHS) else x)
    return re.sub(r"^-([.0]+)$", r"\1", re.sub(r"^(-?)0\.", r"\1.", text))


PERCENT, TENTHS = "{:.0f}", "{:.1f}"  # of a share


def signed(s: Study, metric: str, form: str = "{:.2f}", **fields: Any) -> str:
    text = s.say(metric, form, **fields)
    return text if text.startswith("-") else "+" + text


MD = {"estimator": "mean_difference"}
LR = {"estimator": "logistic"}
SAME = {"control": "random, same variance"}


def core(s: Study) -> str:
    """The embedded model and `core`."""
    top1, wide = "emotion top1", s.one("macro auc, labels resampled too", **MD)
    reading = {"readout": "calibrated", **MD}
    null = s.one(top1, **reading)
    comments = s.one("macro auc", control="shuffled labels", **MD)
    labels = {r["emotion"]: r["value"] for r in s.rows if r["metric"] == "auc by label"}
    order = sorted(labels, key=lambda e: -labels[e])

    def named(names: list[str]) -> str:
        return ", ".join(f"{e} ({number(labels[e])})" for e in names)

    valence, arousal = (
        s.one("r", control="shuffled labels", emotion=e, **MD) for e in ("valence", "arousal")
    )
    rated = s.one("r of PC1 with valence", split="glasgow_2019, exact form")
    steered = s.one("share diag above off", control=None)
    told = s.one("diag minus off at equal KL", control=None)
    used = s.one("pairs with a gap")
    n_pairs = f"{used['value']:.0f} of {used['n']} prompt pairs"
    stream, blocks = "ablate loss, whole stream", "ablate loss"
    percent = {"form": PERCENT}
    lines = [
        "`make study`, 384 stories of 24 emotions, every figure on topics that were held out whole (95 % interval over topics), layer chosen inside each fold:\n",
        "| 24 emotions, held-out top-1 (chance .04) | mean difference | logistic regression |\n|---|---|---|",
        f"| residual stream | **{interval(null)}** (centred, as the twins: {number(s.one(top1, readout='centred', **MD)['value'])}) | **{s.say(top1, readout='decision', **LR)}** |",
        *(
            f"| {name} | {s.say(top1, control=twin, **MD)} | {s.say(top1, control=twin, **LR)} |"
            for name, twin in (
                ("TF-IDF, same estimator", "tfidf"),
                ("token embeddings, same estimator", "embed"),
                ("story form only (sentence lengths, punctuation, quotes)", "form"),
            )
        ),
        f"| residual stream minus TF-IDF, paired | **{signed(s, top1 + ' minus tfidf', **MD)}** | **{signed(s, top1 + ' minus tfidf', **LR)}** |\n",
        f"The same vectors read without centring give {number(s.one(top1, readout='uncentred', **MD)['value'])}, minus the neutral mean {number(s.one(top1, readout='neutral-centred', **MD)['value'])}. "
        f"With labels shuffled within topic and everything chosen and fitted again, 95 % of {null['draws']} runs stay below {number(null['null_high'])}.\n",
        f"On other people's text the directions carry over weakly: on {comments['n']:,} GoEmotions comments in their natural proportions the zero-shot macro-AUC over {wide['n']} labels is {interval(comments)} (shuffled labels through\n"
        f"the whole estimator: 95 % of {comments['draws']} runs below {number(comments['null_high'], '{:.3f}')}, p = {number(comments['p'])}; TF-IDF of the same stories {number(s.one('macro auc', control='tfidf', **MD)['value'])}, difference {signed(s, 'macro auc minus tfidf', **MD)}), where a regression fitted on the comments finds\n"
        f"{number(next(r for r in s.rows if r['metric'] == 'macro auc' and (r['control'] or '').startswith('supervised'))['value'])} at the same layer. That interval speaks of these labels; with the labels resampled too, for labels like them, it is {interval(wide).split(' ', 1)[1]} and includes chance. {named(order[:3]).capitalize()}\n"
        f"carry it; {named(order[-2:])} are read the wrong way round. They read EmoBank's arousal (r = {interval(arousal)}; shuffled 95 % below {number(arousal['null_high'], '{:.3f}')}).\n",
        f'What it does *not* find, which the report says as plainly: EmoBank\'s valence (r = {interval(valence)}; shuffled 95 % below {number(valence["null_high"], "{:.3f}")}). From "I" to "she" and back directions lose {abs(100 * s.one("top1 cross minus mixed")["value"]):.0f}\n'
        f"[{-100 * s.one('top1 cross minus mixed')['high']:.0f}, {-100 * s.one('top1 cross minus mixed')['low']:.0f}] of top-1 against directions from as many topics of both persons. Whether a leading component lines up with human valence is not asked at n = {rated['n']} rated words, families do not cluster,\n"
        f"and the geometry follows story form (RSA {s.say('rsa with distance in story form')}). Several layers read about equally well and {comments['layer']} is frozen by a hair; what hangs on such a choice deserves a second set of texts.\n",
        f"And what the model does with them (every emotion steered at block {steered['layer']}, dose {steered['dose']}, chosen on twelve openings and reported on twelve others, but for the instruction and the written text: six emotions and six openings;\n"
        f"{n_pairs} that differ in one fact, in twelve contrasts; intervals over openings or contrasts, emotions and draws):\n",
        "| | emotion directions | control |\n|---|---|---|",
        f"| steering: own words rise more than the others' | **{interval(steered)}** of cells | random {s.say('share diag above off', control='random directions')}, difference **{signed(s, 'share diag above off minus random')}**; shuffled labels (six emotions, 5 draws) {s.say('share diag above off', control='shuffled labels')}, difference {signed(s, 'share diag above off minus shuffled')} |",
        f"| its own words rise most of all 24 | {s.say('argmax', control=None)} | chance .04; shuffled labels (six emotions) {s.say('argmax', control='shuffled labels')} |",
        f"| the direct path alone (the vector added after the last block) | {s.say('share diag above off, direct path')} of cells | own minus others {s.say('diag minus off, direct path')} nats of {s.say('diag minus off', control=None)} |",
        f"| at the KL of an instruction in words (dose {told['dose']:.2f}), own words minus others | {interval(told)} nats | the instruction {s.say('diag minus off at equal KL', control='instruction in words')}; difference **{s.say('diag minus off at equal KL, direction minus instruction')}**: words do more |",
        f"| what is written with directions of one half of the topics, as those of the other half read it in the unsteered model | own emotion {signed(s, 'own score of the text minus random')} z over random | perplexity {s.say('''perplexity of the text, in units of the unsteered text's''', control=None)} times, random {s.say('''perplexity of the text, in units of the unsteered text's''', control='random directions')}; distinct pairs {s.say('distinct pairs of the text', control=None)}, random {s.say('distinct pairs of the text', control='random directions')} |",
        f"| ablation of the whole stream: clean-corrupted gap lost | {s.say(stream, **percent, control=None)} | random with the same variance {s.say(stream, **percent, **SAME)}; difference **{signed(s, stream + ' minus random', **percent)}** |",
        f"| ablation after every block only | {s.say(blocks, **percent, control=None)} | {s.say(blocks, **percent, **SAME)}; difference {signed(s, blocks + ' minus random', **percent)} |",
        f"| patching only the part along the direction: gap recovered | {s.say('patch recovery', TENTHS, control=None)} | random {s.say('patch recovery', TENTHS, control='random directions')}; difference {signed(s, 'patch recovery minus random', TENTHS)}; the whole stream of the last token {s.say('patch recovery, whole stream of the last token', **percent)} |",
        f"| adding it to the corrupted prompt: gain, in gaps | {s.say('add gain', **percent, control=None)} | random {s.say('add gain', **percent, control='random directions')}; difference {signed(s, 'add gain minus random', **percent)} |",
        f"| a classifier of six emotions, fitted afresh after ablation, held-out topics | {s.say('top1 refitted', control=None)} | unablated {s.say('top1 refitted', control='nothing ablated')}; shuffled labels through the same fitting {s.say('top1 refitted', control='shuffled labels')}, difference {s.say('top1 refitted minus shuffled')}; random subspaces {s.say('top1 refitted', control='random subspaces, same variance')}, difference {s.say('top1 refitted minus random')}: **not shown** |",
    ]
    return "\n".join(lines)


def norms(s: Study) -> list[str]:
    """Rows of the table of human norms: ridge over held-out words, two axes in two tables."""
    lines = []
    for axis, table, name in (
        ("valence", "glasgow_2019", "Glasgow"), ("arousal", "glasgow_2019", "Glasgow"),
        ("valence", "russell_mehrabian_1977", "Russell & Mehrabian"), ("arousal", "russell_mehrabian_1977", "Russell & Mehrabian"),
    ):  # fmt: skip
        found = [
            r
            for r in s.rows
            if r["metric"] == f"ridge r with {axis}, held-out words"
            and r["split"] == f"{table}, exact form"
            and r["layer"] != "embed"
        ]
        minus = s.one(f"ridge r with {axis} minus embed", split=f"{table}, exact form")
        r = found[0]
        lines.append(
            f"| {axis}, {name}, n = {r['n']} | {interval(r)} | {'' if minus['value'] < 0 else '+'}{interval(minus)} | {number(r['null_mean'])}, {number(r['null_high'])} |"
        )
    return lines


def words(s: Study) -> str:
    """The same model and the paper's 171 words."""
    top1 = "emotion top1"
    reading = s.one(top1, readout="calibrated", **MD)
    auc = s.one("emotion auc", readout="calibrated", **MD)
    null = {
        m: s.one(f"emotion {m}", control="shuffled labels", **MD) for m in ("top1", "top5", "auc")
    }
    ridge = norms(s)
    best = max(
        (
            r
            for r in s.rows
            if re.fullmatch(r"r of PC[123] with valence", r["metric"])
            and r["split"] == "glasgow_2019, exact form"
        ),
        key=lambda r: abs(r["value"]),
    )
    comments = s.one("macro auc", control="shuffled labels", **MD)
    wide = s.one("macro auc, labels resampled too", **MD)
    valence, arousal = (
        s.one("r", control="shuffled labels", emotion=e, **MD) for e in ("valence", "arousal")
    )
    steered = s.one("share diag above off", control=None)
    agree = [
        number(s.one(f"r of the two tables in {axis}")["value"]) for axis in ("valence", "arousal")
    ]
    stream = "ablate loss, whole stream"
    lines = [
        f"**With the paper's 171 words** (`emolens study --set emotions171`, eight topics, 1,368 stories, frozen at block {comments['layer']}). The form row lies below chance by design: an emotion has each form once, so a margin over it says nothing.\n",
        "| 171 words, held-out topics (chance .006) | top-1 | top-5 | AUC |\n|---|---|---|---|",
        f"| mean difference | **{interval(reading)}** | {s.say('emotion top5', readout='calibrated', **MD)} | {interval(auc, '{:.3f}')} |",
        f"| TF-IDF, same estimator | {s.say(top1, control='tfidf', **MD)}; paired difference **{signed(s, top1 + ' minus tfidf', '{:.3f}', **MD)}** | | {number(s.one('emotion auc', control='tfidf', **MD)['value'], '{:.3f}')} |",
        f"| token embeddings | {s.say(top1, control='embed', **MD)} | | {number(s.one('emotion auc', control='embed', **MD)['value'], '{:.3f}')} |",
        f"| story form only | {s.say(top1, '{:.3f}', control='form', **MD)} | | {number(s.one('emotion auc', control='form', **MD)['value'], '{:.3f}')} |",
        f"| logistic regression | {s.say(top1, readout='decision', **LR)}; minus TF-IDF's {signed(s, top1 + ' minus tfidf', '{:.3f}', **LR)} | {s.say('emotion top5', readout='decision', **LR)} | {s.say('emotion auc', '{:.3f}', readout='decision', **LR)} |",
        f"| shuffled labels within topic, 95 % of {null['top1']['draws']} runs below | {number(null['top1']['null_high'], '{:.3f}')} | {number(null['top5']['null_high'], '{:.3f}')} | {number(null['auc']['null_high'], '{:.3f}')} |\n",
        "| human norms, held-out words, ridge r | directions | minus embeddings | permuted words: mean, 95 % below |\n|---|---|---|---|",
        *ridge,
        "",
        f"No *single* component lines up with valence: of the first three the largest is r = {interval(best)} at n = {best['n']}, and the largest of three components, all layers and two tables\n"
        f"reaches {number(best['null_high'])} in one of twenty permutations (p = {number(best['p'])}). On the words that both tables rate they agree with r = {agree[0]} in valence and {agree[1]} in arousal. Split-half reliability of a direction: median {number(s.one('split-half reliability, median')['value'])}. On other\n"
        f"people's text: GoEmotions zero-shot macro-AUC **{interval(comments)}** over {wide['n']} labels (with the labels resampled too {interval(wide).split(' ', 1)[1]}; shuffled: 95 % below {number(comments['null_high'], '{:.3f}')}; {signed(s, 'macro auc minus tfidf', **MD)} over TF-IDF); EmoBank's valence r = {interval(valence)} (shuffled: 95 % below {number(valence['null_high'])}),\n"
        f"its arousal {interval(arousal)} (below {number(arousal['null_high'])}). Six of them steered at block {steered['layer']}, dose {steered['dose']}: own words rise more than the mean of the others' in {interval(steered)} of cells, minus random {signed(s, 'share diag above off minus random')}; ablation of the whole stream costs {s.say(stream, PERCENT, control=None)} of the gap, minus random {signed(s, stream + ' minus random', PERCENT)}.",
    ]  # fmt: skip
    return "\n".join(lines)


def plain(s: Study) -> str:
    """The 171 words told plainly: geometry and other people's text."""
    comments = s.one("macro auc", control="shuffled labels", **MD)
    wide = s.one("macro auc, labels resampled too", **MD)
    valence, arousal = (
        s.one("r", control="shuffled labels", emotion=e, **MD) for e in ("valence", "arousal")
    )
    first = [
        s.one(f"r of PC1 with {axis}", split=f"{table}, exact form")
        for axis, table in (("valence", "glasgow_2019"), ("arousal", "glasgow_2019"), ("arousal", "russell_mehrabian_1977"))
    ]  # fmt: skip
    lines = [
        f"**The same words told plainly** (`emolens run geometry transfer --set emotions171v2`, 1,368 stories of the second edition, frozen at block {comments['layer']}):\n",
        "| human norms, held-out words, ridge r | directions | minus embeddings | permuted words: mean, 95 % below |\n|---|---|---|---|",
        *norms(s),
        "",
        f"GoEmotions zero-shot macro-AUC **{interval(comments)}** over {wide['n']} labels (with the labels resampled too {interval(wide).split(' ', 1)[1]}; shuffled: 95 % below {number(comments['null_high'], '{:.3f}')}; {signed(s, 'macro auc minus tfidf', **MD)} over TF-IDF); EmoBank's valence r = {interval(valence)}\n"
        f"(shuffled: 95 % below {number(valence['null_high'])}; TF-IDF {number(s.one('r', control='tfidf', emotion='valence', **MD)['value'])}), its arousal {interval(arousal)} (below {number(arousal['null_high'])}). The first component goes with arousal (Glasgow {interval(first[1])}, p = {number(first[1]['p'])}; Russell & Mehrabian {interval(first[2])}, p = {number(first[2]['p'], '{:.3f}')} for the largest of three\n"
        f"components, all layers and two tables) and not with valence ({interval(first[0])}): valence lies in the space, but on no single component.\n"
        "Words alone are not beside these ridges yet: on two topics TF-IDF of the same stories reads .25 of the valence that the directions read .58 of ([tutorial 3](tutorials/03_emotion_sets.ipynb)).",
    ]  # fmt: skip
    return "\n".join(lines)


def editions(first: Study, second: Study) -> str:
    """`core` and `core2` side by side."""

    def line(what: str, of: Any) -> str:
        return f"| {what} | {of(first)} | {of(second)} |"

    def null(metric: str, **fields: Any) -> Any:
        def said(s: Study) -> str:
            r = s.one(metric, control="shuffled labels", **MD, **fields)
            return f"{interval(r)} (shuffled labels: 95 % below {number(r['null_high'])})"

        return said

    def labels(s: Study) -> str:
        r = s.one("macro auc, labels resampled too", **MD)
        return f"[{number(r['low'])}, {number(r['high'])}]"

    top1, steers = "emotion top1", "share diag above off minus shuffled"
    told = "diag minus off at equal KL, direction minus instruction"
    lines = [
        "| | `core` | `core2` |\n|---|---|---|",
        line("held-out top-1 of 24, mean difference", lambda s: s.say(top1, readout="calibrated", **MD)),
        line("the same, logistic regression", lambda s: s.say(top1, readout="decision", **LR)),
        line("TF-IDF of the same stories", lambda s: s.say(top1, control="tfidf", **MD)),
        line("story form only", lambda s: s.say(top1, control="form", **MD)),
        line("GoEmotions zero-shot, macro-AUC over 8 labels", null("macro auc")),
        line("... with the labels resampled too", labels),
        line("... of TF-IDF of the same stories", lambda s: s.say("macro auc", control="tfidf", **MD)),
        line("EmoBank, r of the valence axis", null("r", emotion="valence")),
        line("EmoBank, r of the arousal axis", null("r", emotion="arousal")),
        line("from \"I\" to \"she\": top-1 lost or won", lambda s: signed(s, "top1 cross minus mixed")),
        line("steering: own words rise most of all 24", lambda s: s.say("argmax", control=None)),
        line("steering: own words above the others', minus shuffled labels", lambda s: signed(s, steers)),
        line("steering minus an instruction in words, at its KL, nats", lambda s: signed(s, told)),
        line("gap lost by ablating the whole stream, minus random", lambda s: signed(s, "ablate loss, whole stream minus random", PERCENT)),
        line("a classifier fitted afresh after ablation, minus shuffled labels", lambda s: signed(s, "top1 refitted minus shuffled")),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print the README's findings from the results of studies."
    )
    parser.add_argument("core", type=Path, nargs="?", help="folder of a study of core")
    parser.add_argument("words", type=Path, nargs="?", help="folder of a study of emotions171")
    parser.add_argument("--second", type=Path, help="folder of a study of core2")
    parser.add_argument(
        "--plain", type=Path, help="folder of geometry and transfer of emotions171v2"
    )
    parser.add_argument(
        "--write", type=Path, help="a file between whose marks the findings are put"
    )
    args = parser.parse_args()
    first = core(Study(args.core)) if args.core else ""
    second = words(Study(args.words)) if args.words else ""
    third = editions(Study(args.core), Study(args.second)) if args.second else ""
    fourth = plain(Study(args.plain)) if args.plain else ""
    if args.write is None:
        print(first, second, third, fourth, sep="\n\n")
        return
    text = args.write.read_text(encoding="utf-8")
    for begin, end, new in (
        (CORE, CORE_END, first),
        (WORDS, WORDS_END, second),
        (BOTH, BOTH_END, third),
        (PLAIN, PLAIN_END, fourth),
    ):
        if new:
            before, rest = text.split(begin)
            text = before + begin + new + "\n" + end + rest.split(end)[1]
    args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The report: one self-contained page that opens with the answer in plain words.

Every sentence of the answer is made from rows by the fixed rules of `verdicts` (an interval that includes 0 is "not shown"), so a weak
result reads as a weak result. Everything that a model, a set or a file says is escaped. No scripts, no outside files; readable offline, on paper and on
a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from emolens.directions.value import EmotionDirections
from emolens.experiments.base import Row, find
from emolens.experiments.rules import Answer, Verdict, answers, interval, number
from emolens.readout import LogitLens, Scores
from emolens.report import figures as plots
from emolens.sets.emotion_sets import EmotionSet
from emolens.sets.norms import load_norms
from emolens.shards import written_whole

STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f6f4f0;color:#1d2433;font:16px/1.6 Georgia,'Times New Roman',serif}
main{max-width:60rem;margin:0 auto;padding:1.2rem}
h1,h2,h3,th,.k,figcaption,table{font-family:system-ui,-apple-system,'Segoe UI',sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:.6rem 0}
h3{font:600 1rem system-ui,sans-serif;margin:1.4rem 0 .2rem}
h2{font-size:1.2rem;margin:2.2rem 0 .4rem;padding-top:.6rem;border-top:2px solid #d9622b}
.k{color:#667085;font-size:.85rem}
.answer{background:#fff;border-radius:10px;padding:.4rem 1.2rem;box-shadow:0 1px 3px #0002}
.answer ul{list-style:none;padding:0}.answer li{margin:.65rem 0}
.answer li::before{display:inline-block;min-width:5.4em;font:600 .78rem system-ui,sans-serif;border-radius:9px;padding:.05em .6em;margin-right:.6em;text-align:center}
.yes::before{content:'shown';background:#dff1e9;color:#1c6b50}
.no::before{content:'not shown';background:#ece9e3;color:#5d5648}
.opposite::before{content:'the opposite';background:#fbe3d6;color:#8a3412}
.confound::before{content:'shown';background:#fbedc4;color:#75520a}
.unasked::before{content:'not asked';background:#fff;color:#667085;outline:1px solid #d5d0c5}
figure{margin:1rem 0;background:#fff;border-radius:10px;padding:.8rem;box-shadow:0 1px 3px #0002}
figcaption{font-size:.85rem;color:#475069;margin-top:.4rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;background:#fff;min-width:100%}
th,td{padding:.28rem .6rem;text-align:left;border-bottom:1px solid #e7e3db;vertical-align:top}
td:first-child{min-width:10em}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.primary td{background:#fff4ec;font-weight:600}
pre{background:#1d2433;color:#f6f4f0;padding:.8rem;border-radius:8px;overflow-x:auto;font-size:.82rem;white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:.6rem 0}summary{cursor:pointer;font-family:system-ui,sans-serif}
@media (max-width:34rem){body{font-size:15px}main{padding:.7rem}h1{font-size:1.35rem}figure{padding:.4rem}}
@media print{body{background:#fff}figure,.answer{box-shadow:none;break-inside:avoid}}
"""
LABELS: dict[Verdict, str] = {
    "shown": "yes",
    "not shown": "no",
    "opposite": "opposite",
    "not asked": "unasked",
}


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    provenance: dict[str, Any],
    directions: EmotionDirections,
    emotions: EmotionSet,
    *,
    samples: Scores | None = None,
    lenses: Sequence[LogitLens] = (),
    written: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Write the page, atomically."""
    page = render(
        rows, provenance, directions, emotions, samples=samples, lenses=lenses, written=written
    )
    with written_whole(path) as part:
        part.write_text(page, encoding="utf-8")


def render(
    rows: Sequence[Row],
    provenance: dict[str, Any],
    directions: EmotionDirections,
    emotions: EmotionSet,
    *,
    samples: Scores | None = None,
    lenses: Sequence[LogitLens] = (),
    written: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The page as a string."""
    model = provenance["model"]
    title = f"Emotion directions in {model['name']}"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
        f"<p class='k'>emolens {escape(provenance['emolens'])}, set “{escape(emotions.name)}”, {len(emotions.names)} emotions, "
        f"{len(emotions.texts())} stories on {len(emotions.told)} topics</p>",
        f"<h1>{escape(title)}</h1>",
        "<div class='answer'><ul>" + "".join(map(_answer, answers(rows, emotions))) + "</ul></div>",
        "<p>" + _limits(model) + "</p>",
        "<h2>Can the directions tell emotions apart on topics they never saw?</h2>",
        _figure(plots.accuracy_by_layer(rows), "Accuracy by layer",
            "Share of held-out stories whose own emotion scores highest, by layer. Everything is fitted on the other topics. Band: 95 % interval over topics. "
            "The dashed lines are the same estimator on word counts (TF-IDF) and on the token embeddings of the same stories: what is above them is not just vocabulary."),
        _figure(plots.readouts(rows), "Accuracy by readout",
            "One set of vectors read in five ways. Without subtracting a reference (top), the component that all texts share drowns the emotions."),
        _figure(plots.margins(rows), "Paired differences",
            "The claim of a probe is its margin over the same estimator on words. Each line is a paired difference on the same texts. "
            "Story form is not a clean null where forms were dealt out evenly to each emotion (emotions171): it is below chance there by design."),
        _estimators(rows),
    ]  # fmt: skip
    if find(rows, "person", "top1 cross minus mixed"):
        parts += [
            "<h2>From “I” to “she”</h2>",
            _table([r for r in rows if r.experiment == "person"]),
        ]
    if find(rows, "transfer", "auc by label"):
        parts += [
            "<h2>On other people's text</h2><p>Directions, layer and spread are frozen on the stories; nothing but the supervised ceiling is fitted on the texts below.</p>",
            _figure(plots.transfer_by_label(rows), "Transfer to GoEmotions",
                "Area under the ROC curve for each label on Reddit comments (GoEmotions, Demszky et al. 2020). Diamonds: TF-IDF centroids from the same stories."),
            "<details><summary>All transfer rows</summary>" + _table([r for r in rows if r.experiment == "transfer" and r.metric != "auc by label"]) + "</details>",
        ]  # fmt: skip
    parts += _causal(rows, written)
    norms, keys = load_norms(), {e.name: e.norm_key for e in emotions.emotions}
    parts += [
        "<h2>The shape of the space</h2>",
        _figure(plots.cosine_matrix(directions), "Cosine matrix",
            f"Cosines of the directions at layer {directions.layer}, ordered by similarity. Grey names: split-half reliability below {plots.RELIABLE}. "
            "Centred directions are negative on average by construction."),
        _figure(plots.circumplex(directions, norms, keys), "Circumplex",
            "First two components, rotated onto human ratings (Glasgow Norms, Scott et al. 2019), with a line from each word's rating to the model's direction. The rotation uses the ratings, so this picture is an illustration; the table is the test."),
        _geometry(rows),
    ]  # fmt: skip
    if find(rows, "geometry", "rsa of layers with the reported one"):
        parts.append(
            _figure(
                plots.layer_similarity(rows),
                "Similarity of layers",
                "Spearman correlation of each layer's cosine matrix with that of the reported layer.",
            )
        )
    parts += ["<h2>What the vocabulary sees</h2>", _lens(rows, lenses)]
    if samples is not None:
        parts += [
            "<h2>Reading new text</h2><p>Texts that are in no set, token by token: the emotions that rise highest in each. Colour starts outside the band of neutral text.</p>",
            f"<figure>{samples.to_html()}</figure>",
        ]
    parts += [
        "<h2>Each emotion</h2>",
        _emotions(rows, directions),
        "<h2>Where this comes from</h2>",
        _provenance(provenance),
        _all_rows(rows),
    ]
    return "".join(parts) + "</main></body></html>"


def _answer(a: Answer) -> str:
    """One line: the verdict as a label (amber for a confound that is shown), the claim, the figures."""
    label = "confound" if a.confound and a.verdict == "shown" else LABELS[a.verdict]
    return f"<li class='{label}'><b>{a.words}</b>: {a.text}</li>"


def _limits(model: dict[str, Any]) -> str:
    return (
        "<b>What this does not show.</b> Reading is not causing: that a direction can be read does not mean that the model uses it; "
        "steering, ablation and patching below are separate tests, of words that name feelings. The stories were written by a language model, so a margin on them says less than one on other "
        f"people's text. It is one model, {escape(model['name'])} ({escape(str(model['source']))}, {escape(model['dtype'])}), one set and one seed. "
        "“Shown” means that the 95 % interval excludes the control (for a shuffled control: lies above 95 % of its draws; of a loss: excludes five points) and, where a p is given, that p < .05; not that the effect is large; “not shown” that it does not; “the opposite” that it "
        "excludes it on the other side; “not asked” that a figure or a condition that the question needs is missing."
    )


def _figure(figure: Any, title: str, caption: str) -> str:
    return f"<figure>{plots.svg(figure, title)}<figcaption>{escape(caption)}</figcaption></figure>"


def _causal(rows: Sequence[Row], written: Sequence[tuple[str, str, str]]) -> list[str]:
    """Steering, ablation and patching; nothing for a study without target words."""
    if not find(rows, "validation", "share diag above off"):
        return []
    steered = [r for r in rows if r.experiment == "validation"]
    main = (
        "share diag above off",
        "share diag above off minus random",
        "share diag above off minus shuffled",
        "diag minus off",
        "argmax",
    )
    by_emotion = "diag minus off by emotion"
    parts = [
        "<h2>Does the model use the directions?</h2>",
        _figure(plots.dose_curve(rows), "Dose curve",
            "Above: how much more an emotion's own words gain than the others' when its direction is added (six emotions in a short study), on openings that did not choose block and dose (but had been looked at while emolens was made). "
            "Below: what the same dose does to neutral text. Where both rise together the text is falling apart."),
        _figure(plots.validation_matrix(rows), "Validation steering",
            "Change of the log-probability of each emotion's words at the chosen block and dose, minus the mean of its row. Outlined: the own words."),
        _table([r for r in steered if r.metric in main]),
        "<h3>Beside it</h3><p>The direct path is the same vector added after the last block: what it writes on the vocabulary without any block reading it. "
        "An instruction in words is compared where it changes neutral text as much as the direction does (between the points of the dose curve). "
        "What is written is read by the unsteered model, at the chosen dose; a text that repeats itself has a low perplexity and few distinct pairs.</p>",
        _beside(rows),
        f"<details><summary>Each emotion against random directions</summary>{_table([r for r in steered if r.metric == by_emotion])}</details>",
    ]  # fmt: skip
    if written:
        lines = "".join(
            f"<tr><td>{escape(what)}</td><td>{escape(text)}</td><td>{escape(top)}</td></tr>"
            for what, text, top in written
        )
        parts.append(
            "<details open><summary>What it writes: one opening, greedy, with each direction, with a random one, and at twice the dose</summary>"
            "<div class='wide'><table><tr><th>added</th><th>text</th><th>score (z) of the new tokens, read by the unsteered model</th></tr>"
            f"{lines}</table></div></details>"
        )
    if find(rows, "causal", "ablate loss, whole stream"):
        parts.append(
            _figure(plots.triad(rows), "Patch, ablate, add",
                "Prompts that differ in one fact and so in what someone feels. The gap is the difference in the logits of the two emotions' words. "
                "Line and band: all pairs with their 95 % interval. Ablated is the whole stream: wherever a block reads it.")
        )  # fmt: skip
    if mapped := find(rows, "causal", "patch recovery by layer and span"):
        parts.append(
            _figure(plots.patching_map(rows), "Where the gap travels",
                f"The clean stream of one layer and one part of the prompt, put into the corrupted run: 1 means that this place alone carries the whole gap, 0 nothing of it ({mapped[0].n} pairs). "
                "It must begin at the fact that differs and end at the last token; the map shows when it moves.")
        )  # fmt: skip
    parts.append(
        _table(
            [
                r
                for r in rows
                if r.experiment == "causal"
                and "by contrast" not in r.metric
                and "by layer" not in r.metric
            ]
        )
    )
    parts.append(
        "<p class='k'>Steering moves this readout; that is not proof of sufficiency. Ablation says that a direction contributes, given these controls; not that it is necessary.</p>"
    )
    return parts


BESIDE = (
    ("share diag above off, direct path", "own words rise more than the others', by the direct path alone", "share diag above off", None, "with the blocks after it"),
    ("diag minus off, direct path", "own words minus the others', nats, by the direct path alone", "diag minus off", None, "with the blocks after it"),
    ("share diag above off at equal KL", "own words rise more, at the KL of an instruction", "", "instruction in words", "the instruction"),
    ("diag minus off at equal KL", "own words minus the others', nats, at the KL of an instruction", "", "instruction in words", "the instruction"),
    ("perplexity of the text, in units of the unsteered text's", "perplexity of what is written, in units of the unsteered text's", "", "random directions", "random directions"),
    ("distinct pairs of the text", "share of different ones among its pairs of tokens", "", "random directions", "random directions"),
    ("length of the text", "its length in tokens", "", "random directions", "random directions"),
)  # fmt: skip


def _beside(rows: Sequence[Row]) -> str:
    """Further measures of the directions, each beside what it is to be compared with."""
    lines = []
    for metric, what, other, control, name in BESIDE:
        own, theirs = (
            find(rows, "validation", m, control=c)
            for m, c in ((metric, None), (other or metric, control))
        )
        cells = [f"{r.value:.2f} {interval(r)}" for r in (*own, *theirs)]
        lines.append(
            f"<tr><td>{what}</td>{''.join(f'<td>{c}</td>' for c in cells)}<td>{name}</td></tr>"
        )
    head = "".join(
        f"<th>{h}</th>" for h in ("what", "directions [95 %]", "compared with", "which is")
    )
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _estimators(rows: Sequence[Row]) -> str:
    """Every estimator on the same held-out texts, beside its twins."""
    kinds = [
        ("mean_difference", "calibrated"),
        ("lda", "calibrated"),
        ("pca", "calibrated"),
        ("logistic", "decision"),
    ]
    lines = []
    for estimator, readout in kinds:
        for control in (None, "tfidf", "embed", "form"):
            cells = [
                estimator.replace("_", " ") if control is None else f"&nbsp;&nbsp;on {control}"
            ]
            for metric in (
                "emotion top1",
                "emotion top5",
                "emotion auc",
                "family top1",
                "family auc",
            ):
                own = [
                    r
                    for r in find(rows, "separability", metric, estimator=estimator)
                    if (
                        r.control == control or (control is None and r.control == "shuffled labels")
                    )
                    and (control is not None or r.readout == readout)
                ]
                cells.append(f"{own[0].value:.2f} {interval(own[0])}" if own else "")
            if any(cells[1:]):
                lines.append(
                    "<tr>"
                    + "".join(
                        f"<td class='{'n' if i else ''}'>{c}</td>" for i, c in enumerate(cells)
                    )
                    + "</tr>"
                )
    head = "".join(
        f"<th>{h}</th>"
        for h in ("estimator", "emotion top-1", "top-5", "AUC", "family top-1", "family AUC")
    )
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _table(rows: Sequence[Row]) -> str:
    """Rows as they are, the primary one marked; the estimator is said where there are several."""
    lines, several = [], len({r.estimator for r in rows if r.estimator}) > 1
    for r in rows:
        estimator = (r.estimator or "").replace("_", " ") if several else ""
        what = " · ".join(escape(str(x)) for x in (r.metric, estimator, r.emotion, r.split) if x)
        null = (
            ""
            if r.null_high is None and r.null_mean is None
            else number(r.null_mean)
            + (f" (95 % below {number(r.null_high)})" if r.null_high is not None else "")
            + (f" of {r.draws}" if r.draws else "")
        )
        cells = [
            what,
            f"{number(r.value, 3)} {interval(r)}",
            escape(r.control or ""),
            null,
            number(r.p, 3),
            f"{r.n} {escape(r.unit_of_n or '')}" if r.n else "",
        ]
        lines.append(
            f"<tr class='{'primary' if r.primary else ''}'>"
            + "".join(
                f"<td class='{'n' if i in (1, 4) else ''}'>{c}</td>" for i, c in enumerate(cells)
            )
            + "</tr>"
        )
    head = "".join(f"<th>{h}</th>" for h in ("what", "value [95 %]", "control", "null", "p", "n"))
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _geometry(rows: Sequence[Row]) -> str:
    """The table against the main norms; the second table of norms, with related word forms, folded away."""
    aside = ("split-half reliability", "rsa of layers with the reported one")
    found = [r for r in rows if r.experiment == "geometry" and r.metric not in aside]
    related = [
        r for r in found if "related" in (r.split or "") or (r.split or "").startswith("russell")
    ]
    main = _table([r for r in found if r not in related])
    return main + (
        f"<details><summary>Sensitivity: related word forms, the other table of norms</summary>{_table(related)}</details>"
        if related
        else ""
    )


def _lens(rows: Sequence[Row], lenses: Sequence[LogitLens]) -> str:
    parts = [_table([r for r in rows if r.experiment == "logit_lens"])]
    for lens in lenses:
        if not any(lens.words.values()):
            parts.append(
                f"<p>At layer {lens.layer} the lens does not pass its test, so no words are shown.</p>"
            )
            continue
        body = "".join(
            f"<tr><td>{escape(e)}</td><td>{escape('  '.join(repr(w)[1:-1] for w in words))}</td><td class='n'>{number(lens.auc[e])}</td></tr>"
            for e, words in lens.words.items()
        )
        parts.append(
            f"<details><summary>Highest tokens at layer {lens.layer}</summary><div class='wide'><table><tr><th>emotion</th><th>tokens</th><th>AUC</th></tr>{body}</table></div></details>"
        )
    return "".join(parts)


def _emotions(rows: Sequence[Row], directions: EmotionDirections) -> str:
    slot, lines = directions.slot(), []
    aucs = {r.emotion: r for r in find(rows, "separability", "emotion auc one-vs-rest")}
    for i, e in enumerate(directions.emotions):
        r = aucs.get(e)
        near = ", ".join(f"{escape(n)} {c:+.2f}" for n, c in directions[e].nearest(k=3))
        reliability = float(directions.reliability[i, slot])
        lines.append(
            f"<tr><td>{escape(e)}</td><td class='n'>{f'{r.value:.2f} {interval(r)}' if r else ''}</td><td class='n'>{number(r.null_high) if r else ''}</td>"
            f"<td class='n'>{number(r.q, 3) if r else ''}</td><td class='n'>{number(reliability)}</td><td>{near}</td></tr>"
        )
    head = "".join(
        f"<th>{h}</th>"
        for h in (
            "emotion",
            "AUC, held-out topics",
            "random, 95 % below",
            "q",
            "reliability",
            "nearest directions (cosine)",
        )
    )
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _provenance(p: dict[str, Any]) -> str:
    m = p["model"]
    processing = [k for k, on in m["process_weights"].items() if on] or ["none"]
    facts = {
        "model": f"{m['name']} ({m['source']}, {m['architecture']}, {m['n_layers']} layers, d_model {m['d_model']}, {m['dtype']}, backend {m['backend']})",
        "weights": f"fingerprint {m['fingerprint']}, processing: {', '.join(map(str, processing))}",
        "set": f"{p['set']['name']}, sha256 {p['set']['sha256'][:16]}; {p['set']['source']}",
        "reading": f"mean over ordinary tokens after the first {p['pooling']['skip']} (of a shorter text: its second half), resid_post, layer {p['layer']} frozen by topic-held-out accuracy on the stories",
        "attention sink": f"first token {np.median(p['sink_ratio']):.0f} times the median norm (median over layers); left out",
        "folds": "; ".join(", ".join(f) for f in p["folds"]),
        "seed": str(p["seed"]),
        "external text": ", ".join(p["external"]) or "none given",
        "versions": ", ".join(f"{k} {v}" for k, v in p["versions"].items()),
        "cost": f"{p['wall_seconds']:.0f} s, peak memory {p['peak_memory_gb']:.1f} GB",
    }
    body = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f"<pre>{escape(p['command'])}</pre><div class='wide'><table>{body}</table></div>"


def _all_rows(rows: Sequence[Row]) -> str:
    return f"<details><summary>All {len(rows)} rows (as in results.json)</summary>{_table(rows)}</details>"

"""The report: one self-contained page that opens with the answer in plain words.

Every sentence of the answer is made by an experiment from its rows, by fixed rules (an interval that includes 0 is "not shown"), so a weak
result reads as a weak result. Everything that a model, a set or a file says is escaped. No scripts, no outside files; readable offline, on paper and on
a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from emolens.experiments.base import Experiment, Picture, Shown, Table, View
from emolens.experiments.protocol import answers, asked
from emolens.experiments.rows import Row
from emolens.experiments.rules import Answer, Verdict, interval, number
from emolens.readout import Scores
from emolens.report.figures import svg
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


Section = tuple[Experiment, View]


def write_report(
    path: str | Path, sections: Sequence[Section], provenance: dict[str, Any], *, samples: Scores | None = None
) -> None:  # fmt: skip
    """Write the page of a study, atomically.

    Args:
        path: The file.
        sections: Each experiment with what it found, in order.
        provenance: Where the figures come from, as in results.json.
        samples: Texts that are in no set, read token by token.

    Raises:
        FileNotFoundError: the folder of the file is not there.

    Example:
        >>> from emolens.experiments import View
        >>> from emolens.report import write_report
        >>> found = em.run_study(model, stories, profile=["person"], progress=False)
        >>> sections = [(e, View(found.findings[e.name], found.directions, stories)) for e in found.experiments]
        >>> write_report("page.html", sections, found.provenance)
    """
    with written_whole(path) as part:
        part.write_text(render(sections, provenance, samples=samples), encoding="utf-8")


def render(
    sections: Sequence[Section], provenance: dict[str, Any], *, samples: Scores | None = None
) -> str:
    """The page as a string; arguments as `write_report`."""
    model, emotions = provenance["model"], sections[0][1].emotions
    title = f"Emotion directions in {model['name']}"
    every = [a for e, view in sections for a in answers(e, view.findings, len(emotions.names))]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
        f"<p class='k'>emolens {escape(provenance['emolens'])}, set “{escape(emotions.name)}”, {len(emotions.names)} emotions, "
        f"{len(emotions.texts())} stories on {len(emotions.story_topics)} topics</p>",
        f"<h1>{escape(title)}</h1>",
        "<div class='answer'><ul>" + "".join(map(_answer, every)) + "</ul></div>",
        "<p>" + _limits(model) + "</p>",
        *(section(e, view) for e, view in sections),
    ]  # fmt: skip
    if samples is not None:
        parts += [
            "<h2>Reading new text</h2><p>Texts that are in no set, token by token: the emotions that rise highest in each. Colour starts outside the band of neutral text.</p>",
            f"<figure>{samples.to_html()}</figure>",
        ]
    rows = [r for _, view in sections for r in view.rows]
    parts += ["<h2>Where this comes from</h2>", _provenance(provenance), _all_rows(rows)]
    return "".join(parts) + "</main></body></html>"


def section(experiment: Experiment, view: View) -> str:
    """Lay out one experiment: question, pictures and tables in its order, and words to be shown; or why it cannot be asked.

    Args:
        experiment: What was asked, with what shows it.
        view: What it found, and what that is about.

    Returns:
        HTML, with pictures in it; everything that a model or a file says is escaped.

    Example:
        >>> from emolens.experiments import View
        >>> from emolens.report import section
        >>> found = em.run_experiment("person", model, stories, progress=False)
        >>> section(found.experiment, View(found.findings, directions, stories))[:4]
        '<h2>'
    """
    head = f"<h2>{escape(experiment.question)}</h2>"
    head += f"<p class='k'>{escape(experiment.paper)}</p>" if experiment.paper else ""
    gate = asked(experiment, view.findings)
    if not gate:
        text = f"Cannot be asked: {gate.reason}." + (f" {gate.smallest}" if gate.smallest else "")
        return f"{head}<p>{escape(text)}</p>"
    parts = [head, f"<p>{escape(experiment.method)}</p>" if experiment.method else ""]
    parts += [
        _picture(x, view) if isinstance(x, Picture) else _tabled(x, view) for x in experiment.shows
    ]
    return "".join([*parts, *map(_shown, view.findings.shown)])


def _answer(a: Answer) -> str:
    """One line: the verdict as a label (amber for a confound that is shown), the claim, the figures."""
    label = "confound" if a.confound and a.verdict == "shown" else LABELS[a.verdict]
    return f"<li class='{label}'><b>{escape(a.words)}</b>: {escape(a.text)}</li>"


def _limits(model: dict[str, Any]) -> str:
    return (
        "<b>What this does not show.</b> Reading is not causing: that a direction can be read does not mean that the model uses it; "
        "steering, ablation and patching below are separate tests, of words that name feelings. The stories were written by a language model, so a margin on them says less than one on other "
        f"people's text. It is one model, {escape(model['name'])} ({escape(str(model['source']))}, {escape(model['dtype'])}), one set and one seed. "
        "“Shown” means that the 95 % interval excludes the control (for a shuffled control: lies above 95 % of its draws; of a loss: excludes five points) and, where a p is given, that p < .05; not that the effect is large; “not shown” that it does not; “the opposite” that it "
        "excludes it on the other side; “not asked” that a figure or a condition that the question needs is missing."
    )


def _picture(picture: Picture, view: View) -> str:
    figure = picture.draw(view)
    if figure is None:
        return ""
    drawn = svg(figure, picture.title, picture.alt)
    return f"<figure>{drawn}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _tabled(table: Table, view: View) -> str:
    """A table of an experiment: rows as all rows are laid out, or its own cells; nothing where it is empty."""
    rows = table.rows(view) if table.rows is not None else ()
    cells = table.cells(view) if table.cells is not None else ()
    if not rows and not cells:
        return ""
    body = _table(rows) if rows else _cells(cells, table.head, table.numeric)
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return _titled(table.title, note + body, folded=table.folded)


def _shown(shown: Shown) -> str:
    if not shown.rows:
        return f"<p>{escape(shown.title)}</p>"
    return _titled(shown.title, _cells(shown.rows, shown.head), folded=True, open=shown.open)


def _titled(title: str, body: str, *, folded: bool, open: bool = False) -> str:
    if folded:
        return f"<details{' open' * open}><summary>{escape(title)}</summary>{body}</details>"
    return (f"<h3>{escape(title)}</h3>" if title else "") + body


def _cells(lines: Sequence[Sequence[str]], head: Sequence[str], numeric: Sequence[int] = ()) -> str:
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' * (i in numeric)}>{escape(c)}</td>" for i, c in enumerate(line))
        + "</tr>"
        for line in lines
    )
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f"<div class='wide'><table><tr>{top}</tr>{body}</table></div>"


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

"""Named edits of the code that draws conclusions, each of which some test must notice.

    python tests/mutations.py [NAME ...] [--list] [--start K] [--stop K]

Each edit replaces one text, which must be found exactly once, in a temporary copy of the package, and runs the tests that are named beside
it; a test that fails has killed it. `test_mutations_listed.py` checks in every run of the suite that the list still applies.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Edit:
    """`old` in `file` becomes `new`; `tests` is what pytest is asked for. An edit with a `reason` may survive."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    reason: str = ""

    def applied(self, source: str) -> str:
        """The changed source.

        Raises:
            ValueError: the text is not there exactly once.
        """
        if (n := len(found := list(self._pattern().finditer(source)))) != 1:
            raise ValueError(
                f"{self.name}: {self.old!r} is {n} times in {self.file}, not once; write the edit for the code as it is"
            )
        return source[: found[0].start()] + self.new + source[found[0].end() :]

    def _pattern(self) -> re.Pattern[str]:
        """`old` however the formatter has broken its lines: blanks anywhere between its words and signs, a comma before a closing bracket."""
        words = re.findall(r"\w+|[^\w\s]", self.old)
        return re.compile(
            r"\s*".join((r",?\s*" if w in ")]}" else "") + re.escape(w) for w in words)
        )


V, P, S, C, O = "experiments/test_verdict_rules.py", "report/test_figures_data.py", "test_summaries.py", "experiments/test_conclusions.py", "test_choices.py"  # fmt: skip  # noqa: E741
STATS, GEOMETRY, LENS, SWEEPS = (
    "test_stats.py",
    "test_geometry.py",
    "readout/test_readout.py",
    "interventions/test_sweep.py",
)
RULES = "sets/test_set_rules.py"

EDITS: tuple[Edit, ...] = (
    # --- verdicts and words
    Edit("every verdict is shown", "experiments/rules.py", 'return "shown" if self.shown(r) else "opposite" if self.opposite(r) else "not shown"', 'return "shown"', V),
    Edit("no verdict is shown", "experiments/rules.py", 'return "shown" if self.shown(r) else "opposite" if self.opposite(r) else "not shown"', 'return "not shown"', V),
    Edit("above the null's mean is enough", "experiments/rules.py", "lambda r: r.low > r.null_high and r.p < LEVEL", "lambda r: r.low > r.null_mean and r.p < LEVEL", V),
    Edit("the value, not its interval, beats the null", "experiments/rules.py", "lambda r: r.low > r.null_high and r.p < LEVEL", "lambda r: r.value > r.null_high and r.p < LEVEL", V),
    Edit("p is not looked at", "experiments/rules.py", "lambda r: r.low > r.null_high and r.p < LEVEL", "lambda r: r.low > r.null_high", V),
    Edit("the level is a half", "experiments/rules.py", "LEVEL = 0.05", "LEVEL = 0.5", V),
    Edit("a margin is shown by its value", "experiments/rules.py", "lambda r: r.low > 0,\n        lambda r: r.high < 0,", "lambda r: r.value > 0,\n        lambda r: r.high < 0,", V),
    Edit("a loss is shown by a gain", "experiments/rules.py", "lambda r: r.high < 0,\n        lambda r: r.low > 0,", "lambda r: r.low > 0,\n        lambda r: r.high < 0,", V),
    Edit("no loss by an interval that includes 0", "experiments/rules.py", "lambda r: r.low > -LOSS", "lambda r: r.high >= 0", V),
    Edit("a maximum is rejected by a large p", "experiments/rules.py", "lambda r: r.p < LEVEL and (r.low", "lambda r: r.p > LEVEL and (r.low", V),
    Edit("two stories are enough", "experiments/rules.py", "r.n < FEWEST", "r.n < 0", V),
    Edit("NaN is a figure", "experiments/rules.py", "is None or not np.isfinite(x)]", "is None]", V),
    Edit("gates are open", "experiments/rules.py", "claim.gate(rows, k) or next(", "next(", V),
    Edit("one control of two is enough", "experiments/rules.py", "(r, *claim.also(rows, k))", "(r,)", V),
    Edit("nothing read, nothing lost", "experiments/rules.py", 'return "" if read else', 'return "" if True else', V),
    Edit("readings at chance are compared", "experiments/rules.py", "r.low > r.null_high for r in own)", "True for r in own)", V),
    Edit("the other way round is called not shown", "experiments/rules.py", 'else "opposite" if self.opposite(r) else', 'else "not shown" if self.opposite(r) else', V),
    Edit("not shown has the label of shown", "report/page.py", '"not shown": "no"', '"not shown": "yes"', V),
    Edit("a row is found by its metric alone", "experiments/rows.py", "and all(getattr(r, k) == v for k, v in fields.items())", "and (all(getattr(r, k) == v for k, v in fields.items()) or True)", V),
    # --- figures
    Edit("accuracy by layer is a plot of zeros", "experiments/separability.py", "axes.plot(x, [r.value for r in curve]", "axes.plot(x, [0 for r in curve]", P),
    Edit("the shuffled band is the mean", "experiments/separability.py", "0, known(r.null_high), color=GREY", "0, known(r.null_mean), color=GREY", P),
    Edit("bars of readouts are zeros", "experiments/separability.py", "[r.value for _, r in kept], color", "[0 for _, r in kept], color", P),
    Edit("margins that include 0 look sure", "experiments/drawing.py", "sure = known(r.low) > 0 or known(r.high) < 0", "sure = known(r.low) < 0 < known(r.high)", P),
    Edit("margins are zeros", "experiments/drawing.py", 'axes.plot(r.value, i, "o", color=ORANGE if sure', 'axes.plot(0, i, "o", color=ORANGE if sure', P),
    Edit("labels in the wrong order", "experiments/transfer.py", '"auc by label"), key=lambda r: r.value)', '"auc by label"), key=lambda r: -r.value)', P),
    Edit("TF-IDF drawn at the directions' place", "experiments/transfer.py", 'axes.plot(known(r.null_mean), i, "D"', 'axes.plot(r.value, i, "D"', P),
    Edit("the dose curve is a plot of zeros", "experiments/validation.py", "axes.plot(x, [r.value for r in found], color=colour", "axes.plot(x, [0 for r in found], color=colour", P),
    Edit("doses in the order of the rows", "experiments/validation.py", "found = sorted(find(rows, NAME, metric, control=control), key=lambda r: known(r.dose))", "found = find(rows, NAME, metric, control=control)", P),
    Edit("steering matrix on its side", "experiments/validation.py", "table[down.index(r.emotion), across.index(r.split)] = r.value", "table[across.index(r.split), down.index(r.emotion)] = r.value", P),
    Edit("steering matrix minus the column's mean", "experiments/validation.py", "table = table - table.mean(1, keepdims=True)", "table = table - table.mean(0, keepdims=True)", P),
    Edit("directions drawn as random ones", "experiments/causal.py", "own = r.control is None", "own = r.control is not None", P),
    Edit("the map is a plot of zeros", "experiments/causal.py", "table[spans.index(str(r.split)), layers.index(int(r.layer or 0))] = r.value", "table[spans.index(str(r.split)), layers.index(int(r.layer or 0))] = 0", P),
    Edit("cosines out of order", "experiments/drawing.py", "cosine[np.ix_(order, order)]", "cosine", P),
    Edit("circumplex of dominance", "experiments/drawing.py", "[n.valence, n.arousal] for n in found", "[n.valence, n.dominance] for n in found", P),
    Edit("similarity of layers is zeros", "experiments/geometry.py", "for r in found], [r.value for r in found], color=INK", "for r in found], [0 for r in found], color=INK", P),
    # --- summaries
    Edit("the weakest cells on top", "interventions/metrics.py", "argsort(descending=True, stable=True)[:k]", "argsort(stable=True)[:k]", S),
    Edit("negative cells never on top", "interventions/metrics.py", "self.recovery.abs().nan_to_num(nan=-1.0)", "self.recovery.nan_to_num(nan=-1.0)", S),
    Edit("the smallest writers on top", "interventions/attribution.py", "argsort(descending=True, stable=True)[:k]", "argsort(stable=True)[:k]", S),
    Edit("base and target swapped", "interventions/metrics.py", "base, target = self.corrupted, self.clean", "base, target = self.clean, self.corrupted", S),
    Edit("a missing cell weighs in its gap", "interventions/metrics.py", "torch.where(change.isnan(), 0, (target - base)[:, None, None]).sum(0)", "((target - base)[:, None, None] + 0 * change.nan_to_num()).sum(0)", S),
    Edit("the lowest scores on top", "readout/scores.py", "self.values.topk(min(index(k), len(self.emotions)), dim=1)", "self.values.topk(min(index(k), len(self.emotions)), dim=1, largest=False)", S),
    Edit("the neutral band is ignored", "readout/scores.py", "~(self.values <= self.band[:, None])", "self.values > -99", S),
    Edit("what was written reads lowest first", "interventions/generate.py", "mean.argsort(descending=True)[:k]", "mean.argsort()[:k]", S),
    Edit("own > others inverted", "interventions/sweep.py", "(margin[i, :, e] > 0)", "(margin[i, :, e] < 0)", S),
    Edit("a margin over all words, the own ones too", "interventions/sweep.py", "(self.change.sum(-1, keepdim=True) - self.change) / (k - 1)", "self.change.sum(-1, keepdim=True) / k", S),
    Edit("perplexity upside down", "interventions/sweep.py", "(self.written.log_perplexity - self.unsteered.log_perplexity).exp()", "(self.unsteered.log_perplexity - self.written.log_perplexity).exp()", S),
    Edit("the longest words", "interventions/sweep.py", "count(w) == min(map(count, ws))", "count(w) == max(map(count, ws))", S),
    Edit("the rate counts in the spread of all tokens", "directions/fitting.py", "scale or _spread(others)", "scale or _spread(scores)", "directions/test_directions.py -k rate_of_single"),
    Edit("the farthest directions are nearest", "directions/comparing.py", "key=lambda pair: -pair[1])", "key=lambda pair: pair[1])", S),
    # --- statistics
    Edit("low and high swapped", "stats.py", "np.nanpercentile(np.stack(draws), [2.5, 97.5], axis=0)", "np.nanpercentile(np.stack(draws), [97.5, 2.5], axis=0)", STATS),
    Edit("rows are resampled, not their groups", "stats.py", "members = [np.flatnonzero(inverse == g) for g in range(len(names))]", "names = inverse\n    members = [np.array([i]) for i in range(len(names))]", STATS),
    Edit("an interval of half the draws", "stats.py", "means = sums[draws].sum(1) / counts[draws].sum(1)\n    low, high = np.percentile(means, [2.5, 97.5])", "means = sums[draws].sum(1) / counts[draws].sum(1)\n    low, high = np.percentile(means, [25, 75])", STATS),
    Edit("columns are not resampled", "stats.py", "*(rng.integers(size, size=size) for size in values.shape)", "*(rng.integers(size, size=size) if k == 0 else np.arange(size) for k, size in enumerate(values.shape))", O),
    Edit("columns are not resampled with the rows", "stats.py", "figures[rng.integers(len(figures), size=len(figures))].mean(keepdims=True)", "figures.mean(keepdims=True)", O),
    Edit("a confound wears the colour of success", "report/page.py", 'label = "confound" if a.confound and a.verdict == "shown" else LABELS[a.verdict]', "label = LABELS[a.verdict]", V),
    Edit("two languages fitted on the same topics", "experiments/languages.py", "found[i][0] @ found[j][1].T + found[i][1] @ found[j][0].T", "found[i][0] @ found[j][0].T + found[i][1] @ found[j][1].T", "experiments/test_languages.py -k plots"),
    Edit("twins are raw beside calibrated directions", "experiments/transfer.py", "return (scores(np.arange(len(y))) - held_out.mean(0)) / held_out.std(0, ddof=1).clip(1e-12)", "return scores(np.arange(len(y)))", "experiments/test_reading.py -k twins"),
    Edit("p one off", "stats.py", "(np.sum(~(null < observed)) + 1) / (len(null) + 1)", "np.sum(~(null < observed)) / len(null)", STATS),
    Edit("p of the other side", "stats.py", "np.sum(~(null < observed))", "np.sum(~(null > observed))", STATS),
    Edit("shuffling does nothing", "stats.py", "out[names == name] = rng.permutation(out[names == name])", "rng.permutation(out[names == name])", O),
    Edit("shuffling ignores topics", "stats.py", "out[names == name] = rng.permutation(out[names == name])", "out[:] = rng.permutation(out)", O),
    Edit("q is p", "stats.py", 'sp.false_discovery_control(np.asarray(p, dtype=float), method="bh")', "np.asarray(p, dtype=float)", STATS),
    Edit("held-out texts are trained on", "stats.py", "fit_score(np.flatnonzero(~held), np.flatnonzero(held))", "fit_score(np.arange(len(held)), np.flatnonzero(held))", STATS),
    Edit("TF-IDF fitted on the test", "stats.py", "vectorizer.fit_transform(train).toarray()", "vectorizer.fit([*train, *test]).transform(train).toarray()", STATS),
    Edit("a tie counts for it", "stats.py", "(~(scores < own)).sum(1) <= k", "(scores > own).sum(1) < k", STATS),
    Edit("centroids are not centred", "stats.py", "return (test - mu) @ vectors.T", "return test @ means.T", STATS),
    Edit("nothing is held constant", "stats.py", "rest = a - design @ np.linalg.lstsq(design, a, rcond=None)[0]", "rest = a - a.mean()", STATS),
    Edit("folds forget the source", "stats.py", '(t.partition("/")[0] if "/" in t else "", str(p))', '("", str(p))', "sets/test_emotion_sets.py -k folds_of"),
    Edit("speech in single quotes is not seen", "stats.py", "|(?<!\\w)['‘](?=\\w)", "|(?!)", STATS),
    Edit("an apostrophe opens speech", "stats.py", "|(?<!\\w)['‘](?=\\w)", "|['‘]", STATS),
    # --- sets as stimuli
    Edit("form keeps its topic", "sets/rules.py", "for f in x.T], 1)[topic]", "for f in x.T], 1).mean(0)", RULES),
    Edit("form's band is of one emotion", "sets/rules.py", "np.abs(effects(labels)).max(0) for", "np.abs(effects(labels))[0] for", RULES),
    Edit("p of one feature is p of all", "sets/rules.py", "p = ((least <= p[..., None]).sum(-1) + 1) / (n + 1)", "p = p + 0.0", RULES),
    Edit("form is read on the topics that it was fitted on", "sets/rules.py", "train, test = ~np.isin(topics, fold)", "train, test = np.isin(topics, fold)", RULES),
    Edit("a word that is everywhere marks an emotion", "sets/rules.py", "elsewhere < RARE", "elsewhere < 1", RULES),
    Edit("a word in three of eight marks an emotion", "sets/rules.py", "if n > limit and", "if n >= limit and", RULES),
    Edit("the design is not asked for gender", "sets/rules.py", 'any("gender" in sheet.model_fields_set for sheet in sheets.values())', "False", RULES),
    Edit("the second edition's rules are asked of every set", "sets/check.py", "lot if s.edition > 1 else {}", "lot", RULES),
    Edit("the largest class is chance", "sets/check.py", "max(counts.values()) / len(labels)", "1 / len(counts)", RULES),
    Edit("a turn without a mask is no gap", "sets/dialogues.py", "k > begun and not marked[k]", "k > begun and False", "sets/test_materials.py -k gaps"),
    Edit("a change is felt a turn too early", "sets/dialogues.py", "turn + 1 >= c.from_turn", "turn + 2 >= c.from_turn", "sets/test_materials.py -k changes_midway"),
    # --- separability and person
    Edit('the worst layer inside a fold', 'experiments/fitting.py', 'topics, self.folds, self.components).argmax())', 'topics, self.folds, self.components).argmin())', f'{C} -k layer_inside_a_fold'),
    Edit("the worst layer is frozen", "study.py", "acts.layers[int(accuracy.argmax())]", "acts.layers[int(accuracy.argmin())]", "test_study.py -k best_layer_is_frozen"),
    Edit("sign of a margin", "experiments/separability.py", "stats.bootstrap_mean(correct - right, topics", "stats.bootstrap_mean(right - correct, topics", f"{C} -k difference_of_its_sides"),
    Edit("differences are not paired by topic", "experiments/separability.py", "stats.bootstrap_mean(correct - right, topics", "stats.bootstrap_mean(correct - right, range(len(right))", f"{C} -k whole_topics"),
    Edit('the null has the true labels', 'experiments/fitting.py', 'np.asarray(statistic(y), float) for y in', 'np.asarray(statistic(labels), float) for y in', f'{C} -k what_was_planted'),
    Edit("chance of one emotion more", "experiments/separability.py", "1 / k,", "1 / (k + 1),", f"{C} -k chance_is_one"),
    Edit('calibrated in its own sample', 'experiments/fitting.py', 'means = (total.sum(0) - total[part]) / (n.sum(0) - n[part])[:, None]', 'means = total.sum(0) / n.sum(0)[:, None]', f'{C} -k calibrated_on_stories'),
    Edit("random directions have one sign", "experiments/separability.py", "np.maximum(null, 1 - null)", "null", f"{C} -k own_null"),
    Edit("q of an emotion is its p", "experiments/separability.py", 'q=float(q[e])', 'q=p[e]', f"{C} -k own_null"),
    Edit("LDA sees the held-out topics", "experiments/separability.py", "estimator(s.without(held).at(", "estimator(s.acts.at(", f"{C} -k no_estimator_reads"),
    Edit('logistic regression sees the held-out topics', 'experiments/separability.py', 'stats.logistic_scores(train, y, test)', 'stats.logistic_scores(fold.stories.main.rows[:, chosen].numpy(), labels, test)', f'{C} -k no_estimator_reads'),
    Edit("cross minus mixed, the other way round", "experiments/person.py", "bootstrap_mean(cross - mixed", "bootstrap_mean(mixed - cross", f"{C} -k third_person"),
    Edit("both halves are one person's", "experiments/person.py", "return [a[:h] + b[:k], a[h:] + b[k:]]", "return [a, b]", f"{C} -k third_person"),
    Edit('a half is fitted on itself', 'experiments/person.py', 'half.fit(labels).z(half.test)', 'Training(half.inputs, [t for t in half.inputs.topics if t not in half.held]).fit(labels).z(half.test)', f'{C} -k third_person'),
    Edit("neutral components of the held-out topics", "experiments/base.py", "neutral_components(tokens.select(lambda t: t.topic not in held_out).rows, share)", "neutral_components(tokens.rows, share)", f"{C} -k neutral_components"),
    # --- other people's text
    Edit("the ceiling is fitted on its own test folds", "experiments/transfer.py", ".fit((x[train] - mean) / scale, positive[train, k])", ".fit((x - mean) / scale, positive[:, k])", O),
    Edit('shuffled directions are the real ones', 'experiments/transfer.py', 'against_shuffled(figures, inputs.stories.labels', 'against_shuffled(lambda y: figures(inputs.stories.labels), inputs.stories.labels', f'{C} -k what_was_planted'),
    Edit("only the texts that name the emotion", "experiments/transfer.py", "positive[~named[:, k]][:, [k]]", "positive[~named[:, k]][:, [0]]", O),
    Edit('words minus ours', 'experiments/transfer.py', 'self._macro(a, i) - self._macro(b, i)', 'self._macro(b, i) - self._macro(a, i)', f'{C} -k what_was_planted'),
    Edit("arousal is weighted by valence", "experiments/transfer.py", "np.array([getattr(w, axis) for w in words])", "np.array([w.valence for w in words])", f"{C} -k other_peoples_text"),
    Edit("another primary row", "experiments/transfer.py", '(ours, twin) == ("mean_difference", "tfidf")', '(ours, twin) == ("mean_difference", "embed")', f"{C} -k primary_row"),
    # --- geometry and the lens
    Edit("dominance for both axes", "experiments/geometry.py", "norm = np.array([getattr(n, axis) for n in rated.values()])", "norm = np.array([n.dominance for n in rated.values()])", f"{C} -k each_axis"),
    Edit("the worst component is primary", "experiments/geometry.py", "best = max(fits", "best = min(fits", f"{C} -k valence"),
    Edit("the null of one component, not of the highest", "geometry.py", "np.abs(y @ z).max()", "np.abs(y @ z).mean()", GEOMETRY),
    Edit('a ridge that saw the word', 'geometry.py', '.fit(x[train], norm[train])', '.fit(x, norm)', GEOMETRY),
    Edit("words are shown whatever the test says", "readout/lens.py", "if p < 0.05:", "if p < 5:", f"{LENS} -k random_directions_are"),
    Edit('the lens of another layer is primary', 'experiments/logit_lens.py', 'primary = layer == inputs.layer and', 'primary = layer != inputs.layer and', f'{C} -k primary_row'),
    Edit("a token is coloured inside the band", "readout/scores.py", "0.0 if abs(z) <= band else", "0.0 if abs(z) < 0 else", f"{LENS} -k colour"),
    # --- steering and dose
    Edit("the worst layer and dose", "experiments/validation.py", "return max(found)[2:]", "return min(found)[2:]", O),
    Edit("no budget for damage", "experiments/validation.py", "BUDGET = 0.1", "BUDGET = 99.0", O),
    Edit("own words below the others", "experiments/margins.py", "return (margins > 0).astype(float)", "return (margins < 0).astype(float)", O),
    Edit("every emotion has the first one's margin", "experiments/margins.py", "margins[directions.index(e), :, s.emotions.index(e)]", "margins[0, :, s.emotions.index(e)]", O),
    Edit("nothing is subtracted for random directions", "experiments/validation.py", "(RANDOM, above(own) - above(null))", "(RANDOM, above(own)[None])", f"{C} -k difference_of_its_sides"),
    Edit("instruction minus direction", "experiments/validation.py", "stats.bootstrap_two_way(steered - words)", "stats.bootstrap_two_way(words - steered)", f"{C} -k what_was_planted"),
    Edit("reported where it was chosen", "experiments/validation.py", "main = sweep(inputs.model, stems.report", "main = sweep(inputs.model, stems.choose", f"{C} -k openings"),
    Edit("a dose above its budget", "interventions/dose.py", "if kl <= budget:", "if kl > budget:", f"{SWEEPS} -k calib"),
    Edit("a dose reported where it was chosen", "interventions/dose.py", "kl = damage(runs[1], low)", "kl = damage(runs[0], low)", f"{SWEEPS} -k calib"),
    Edit("one half is the whole", "interventions/dose.py", "[texts[i] for i in order[half:]]", "[texts[i] for i in order]", f"{SWEEPS} -k calib"),
    Edit("a dose in units of one", "interventions/measure.py", "size = c.dose * float(directions.norm_median[directions.slot(c.layer)])", "size = c.dose", f"{SWEEPS} -k equals_one_run"),
    # --- causal tests
    Edit('ablation before the refit is nothing', "experiments/refitting.py", 'with model.hooks(fwd_hooks=hooks):\n                    rows', 'with model.hooks(fwd_hooks=[]):\n                    rows', f'{C} -k what_was_planted'),
    Edit("clean and corrupted swapped in the map", "experiments/pairs.py", "clean=[p.clean for p in here], corrupted=[p.corrupted for p in here]", "clean=[p.corrupted for p in here], corrupted=[p.clean for p in here]", f"{C} -k map_puts"),
    Edit("the gap lost is the gap", "experiments/pairs.py", 'return gap - (read(prompts["clean"], hooks) - read(prompts["corrupted"], hooks))', "return gap", f"{C} -k what_was_planted"),
    Edit('nothing is subtracted for random directions (pairs)', 'experiments/pairs.py', 'share(own - null)', 'share(own)', f'{C} -k difference_of_its_sides'),
    Edit('the corrupted stream is patched in', 'experiments/pairs.py', 'patch_resid_post(kept["clean"]', 'patch_resid_post(kept["corrupted"]', f'{C} -k what_was_planted'),
    Edit("resid_mid patches attn_out", "interventions/patching.py", 'at_hook_point(_patch, "resid_mid")', 'at_hook_point(_patch, "attn_out")', O),
)  # fmt: skip


def run(edit: Edit) -> tuple[str, str]:
    """Whether the tests of an edit notice it ("killed", "survived"), and the first one that did."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        shutil.copytree(
            ROOT / "emolens", place / "emolens", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copytree(
            ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copy(ROOT / "pyproject.toml", place)
        (place / "emotion_sets").symlink_to(ROOT / "emotion_sets")
        file = place / "emolens" / edit.file
        file.write_text(edit.applied(file.read_text(encoding="utf-8")), encoding="utf-8")
        return _tests(place, edit.tests)


def _tests(place: Path, tests: str) -> tuple[str, str]:
    """Pytest in a fork, which has everything heavy in memory and this package not yet."""
    report = place / "report"
    child = os.fork()
    if child == 0:
        out = io.StringIO()
        try:
            os.chdir(place)
            sys.path.insert(0, str(place))
            file, *options = shlex.split(tests)
            import pytest

            seen_before = "ignore::pytest.PytestAssertRewriteWarning"  # of plugins that the libraries have loaded
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                code = pytest.main(
                    [
                        "-q",
                        "-x",
                        "-p",
                        "no:cacheprovider",
                        "--tb=line",
                        "-W",
                        seen_before,
                        f"tests/{file}",
                        *options,
                    ]
                )
            failed = [
                line for line in out.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))
            ]
            report.write_text(
                f"{int(code)}\n{failed[0] if failed else out.getvalue()[-2000:]}", encoding="utf-8"
            )
        except BaseException as error:
            report.write_text(f"fork\n{error!r}\n{out.getvalue()[-2000:]}", encoding="utf-8")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    code, words = report.read_text(encoding="utf-8").split("\n", 1)
    if code not in ("0", "1"):  # pytest could not collect, or found no test
        return "ERROR", words
    return ("survived" if code == "0" else "killed"), words.split(" - ")[0].split("::")[
        -1
    ] if code == "1" else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Apply named edits and see which tests notice.")
    parser.add_argument("names", nargs="*", help="part of a name or of a file; all without")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--stop", type=int, default=len(EDITS))
    args = parser.parse_args()
    some = [e for e in EDITS[args.start : args.stop] if not args.names or any(n in e.name or n in e.file for n in args.names)]  # fmt: skip
    if args.list:
        print("\n".join(f"{e.file:<30}{e.name}" for e in some))
        return 0
    import matplotlib.figure  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch
    import transformer_lens  # noqa: F401
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    found: dict[str, list[str]] = {}
    for k, e in enumerate(some):
        started = time.time()
        try:
            verdict, by = run(e)
        except ValueError as error:
            verdict, by = "ERROR", str(error)
        found.setdefault(verdict, []).append(e.name + (f" ({e.reason})" if e.reason else ""))
        print(
            f"{k:3d} {verdict:<9}{e.file}: {e.name}  [{by.strip()}] {time.time() - started:.0f} s",
            flush=True,
        )
    print(f"{len(found.get('killed', []))} of {len(some)} killed")
    for verdict in ("survived", "ERROR"):
        for name in found.get(verdict, []):
            print(f"  {verdict}: {name}")
    return int(
        any(not e.reason for e in some if e.name in found.get("survived", [])) or "ERROR" in found
    )


if __name__ == "__main__":
    sys.exit(main())

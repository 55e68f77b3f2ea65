"""What each experiment concludes where the truth is known: found where it was planted, and not claimed where it was not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from _answers import SHIPPED
from _worlds import EMOTIONS, fewer_draws, planted, planted_geometry, run_all, verdicts_of
from sklearn import linear_model  # noqa: F401  (before the limit below, which sees only what is loaded)
from threadpoolctl import threadpool_limits

import emolens as em
from emolens import stats
from emolens.directions.algebra import mean_differences, project
from emolens.experiments import causal, person, separability, validation
from emolens.experiments import geometry as norms
from emolens.experiments import logit_lens as lens
from emolens.experiments import pairs as pairs_room
from emolens.experiments.base import Findings
from emolens.experiments.fitting import Training
from emolens.experiments.protocol import EXPERIMENTS
from emolens.experiments.rows import Row, find, row
from emolens.experiments.rules import Answer
from emolens.sets import norms as norms_room
from emolens.sets.materials import load_pairs, load_stems

READING = {"separates", "more than words", "more than form", "logistic: more than words", "zero-shot", "zero-shot: more than words", "valence axis", "arousal axis", "person"}  # fmt: skip
USING = {
    "steers",
    "steers: more than told",
    "writes",
    "ablation",
    "patching",
    "adding",
    "vocabulary",
    "ablation after blocks",
}
REST = {"ablation: refitted", "form"}


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    """One thread for small matrices, and fewer draws."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(limits=1), fewer_draws():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def effect(_light) -> tuple[list[Row], dict[str, Answer]]:
    inputs = planted("effect")
    rows = run_all(inputs)
    return rows, verdicts_of(rows, inputs)


@pytest.fixture(scope="module")
def shuffled_rows(_light) -> list[Row]:
    return run_all(planted("shuffled"))


@pytest.fixture(scope="module")
def shuffled(shuffled_rows) -> dict[str, Answer]:
    return verdicts_of(shuffled_rows, planted("shuffled"))


@pytest.fixture(scope="module")
def unused(_light) -> dict[str, Answer]:
    inputs = planted("unused")
    return verdicts_of(run_all(inputs, causal_only=True), inputs)


@pytest.fixture(scope="module")
def valence(_light) -> dict[bool, tuple[list[Row], dict[str, Answer]]]:
    out = {}
    for there in (True, False):
        inputs = planted_geometry(there)
        rows = norms.run(inputs).rows
        out[there] = rows, verdicts_of(rows, inputs)
    return out


def test_every_claim_is_put_to_a_planted_world():
    """Those of `SHIPPED` here, those of another experiment in a file of its own, as docs/add-an-experiment.md has it."""
    here = READING | USING | REST | {"valence"}
    assert {c.name for e in EXPERIMENTS if e.name in SHIPPED for c in e.claims} == here
    for e in EXPERIMENTS:
        if e.name not in SHIPPED:
            own = Path(__file__).with_name(f"test_{e.name}.py")
            text = own.read_text(encoding="utf-8") if own.is_file() else ""
            for needed in (f"from emolens.experiments.{e.name} import", '"shown"', '"not shown"'):
                assert needed in text, (
                    f"{needed}: give {e.name} planted worlds in {own.name}, one where each claim is shown and one where none is"
                )


@pytest.mark.parametrize("claim", sorted((READING | USING | REST) - {"form"}))
def test_what_was_planted_is_found(effect, claim):
    answer = effect[1][claim]
    assert answer.verdict == "shown", answer.text


def test_form_that_says_nothing_is_not_called_a_confound(effect, shuffled):
    assert effect[1]["form"].verdict != "shown"
    assert shuffled["form"].verdict != "shown"


@pytest.mark.parametrize(
    "claim", sorted(READING | {"steers", "steers: more than told", "writes", "vocabulary"})
)
def test_nothing_is_claimed_of_shuffled_labels(shuffled, claim):
    answer = shuffled[claim]
    assert answer.verdict != "shown", answer.text


def test_scenes_that_are_written_are_no_emotion():
    """Directions of one half of the topics write its scenes: read by directions of those scenes they are the emotion, by the others' nothing."""
    inputs = planted("scenes")
    few, openings = list(EMOTIONS), load_stems().report
    at = {"layers": [inputs.layer], "doses": [0.3], "seed": 0, "progress": False}
    words = {e.name: e.target_words[:1] for e in inputs.stories.emotions.emotions}
    halves = validation._halves(inputs)
    across = [validation._written(inputs, half, few, openings, words, at) for half in halves]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            validation,
            "mean_difference",
            lambda acts: em.mean_difference(inputs.stories.acts.at(acts.layers)),
        )
        within = [validation._written(inputs, half, few, openings, words, at) for half in halves]

    def own(halves):
        return one(
            validation._written_rows(halves, few, partial(row, "validation")),
            "validation",
            "own score of the text minus random",
        )

    assert own(within).low > 1
    assert own(across).low < 0 < own(across).high


def test_ablation_of_shuffled_directions_takes_nothing_away(shuffled):
    assert shuffled["ablation: refitted"].verdict != "shown", shuffled["ablation: refitted"].text


@pytest.mark.parametrize("claim", sorted(USING))
def test_directions_that_the_model_does_not_use_do_nothing(unused, claim):
    answer = unused[claim]
    assert answer.verdict != "shown", answer.text


def test_human_valence_is_found_where_it_was_planted_and_only_there(valence):
    assert valence[True][1]["valence"].verdict == "shown"
    assert valence[False][1]["valence"].verdict == "not shown"


def test_each_axis_is_compared_with_its_own_ratings(valence):
    """Planted on two orthogonal axes, valence larger: what is read from one column for both would be wrong for one of them."""
    rows = valence[True][0]
    best = {axis: max(abs(r.value) for r in rows if r.emotion == axis and " PC" in r.metric and "form" in (r.split or ""))
            for axis in ("valence", "arousal")}  # fmt: skip
    assert best["valence"] > 0.85
    assert best["arousal"] > 0.6


def test_the_gap_begins_at_the_changed_fact_and_ends_at_the_last_token(effect):
    """One head of block 0 carries it: before that block the fact has all of it and the last token nothing."""
    at = {
        (r.layer, r.split): r.value
        for r in find(effect[0], "causal", "patch recovery by layer and span")
    }
    assert at[0, "changed"] == pytest.approx(1, abs=0.05)
    assert at[0, "last"] == pytest.approx(0, abs=0.05)
    assert at[2, "last"] == pytest.approx(1, abs=0.1)
    assert at[2, "changed"] == pytest.approx(0, abs=0.1)


def test_the_whole_stream_of_the_last_token_carries_the_gap(effect):
    [whole] = find(effect[0], "causal", "patch recovery, whole stream of the last token")
    assert whole.value == pytest.approx(1, abs=0.05)
    [gap, other_fact] = find(effect[0], "causal", "gap in logits")
    assert gap.value > 10 * abs(other_fact.value)


def test_every_emotion_moves_its_own_words(effect):
    change = {(r.emotion, r.split): r.value for r in find(effect[0], "validation", "change")}
    for e in EMOTIONS:
        assert max(EMOTIONS, key=lambda w, e=e: change[e, w]) == e


def test_the_verdict_follows_the_sign_of_what_was_planted(effect):
    """Minus the directions: every test of use turns to its opposite."""
    inputs = planted("effect")
    minus = replace(inputs.directions, vectors=-inputs.directions.vectors)
    rows = run_all(replace(inputs, directions=minus), causal_only=True)
    found = verdicts_of(rows, inputs)
    assert {found[c].verdict for c in ("steers", "adding", "vocabulary")} == {"opposite"}
    assert found["ablation"].verdict == "shown"  # a line is the same line from both ends


# --- single figures ---------------------------------------------------------------------------------------------------


def one(rows: list[Row], experiment: str, metric: str, **fields: object) -> Row:
    [found] = find(rows, experiment, metric, **fields)
    return found


def test_each_experiment_has_the_primary_row_that_was_named_before(effect, valence):
    named = {r.experiment: (r.metric, r.estimator, r.control) for r in effect[0] if r.primary}
    assert len([r for r in effect[0] if r.primary]) == len(named) == 6
    assert named["separability"] == ("emotion top1", "mean_difference", "shuffled labels")
    assert named["transfer"] == ("macro auc minus tfidf", "mean_difference", "tfidf")
    assert named["person"][0] == "top1 cross minus mixed"
    assert named["validation"][0] == "share diag above off minus random"
    assert named["causal"][0] == "ablate loss, whole stream minus random"
    assert len([r for r in valence[True][0] if r.primary]) == 1
    [lens] = [r for r in effect[0] if r.experiment == "logit_lens" and r.primary]
    assert lens.layer == planted("effect").layer


def test_chance_is_one_in_as_many_as_there_are_emotions(effect):
    assert one(effect[0], "separability", "emotion top1", control="chance").value == pytest.approx(
        1 / 6
    )


def test_a_paired_difference_is_the_difference_of_its_sides(effect):
    rows = effect[0]
    share = "share diag above off"
    own, null = (
        one(rows, "validation", share, control=c).value for c in (None, "random directions")
    )
    assert one(rows, "validation", f"{share} minus random").value == pytest.approx(own - null)
    for metric in ("ablate loss, whole stream", "ablate loss", "patch recovery", "add gain"):
        [own] = [r.value for r in find(rows, "causal", metric) if r.control is None]
        difference = one(rows, "causal", f"{metric} minus random")
        assert difference.value == pytest.approx(
            own - one(rows, "causal", metric, control=difference.control).value
        )
    for what, kind in (("top1", "mean_difference"), ("auc", "logistic")):
        [ours] = [
            r.value
            for r in find(rows, "separability", f"emotion {what}", estimator=kind)
            if r.control in (None, "shuffled labels") and r.readout in ("calibrated", "decision")
        ]
        theirs = one(rows, "separability", f"emotion {what}", estimator=kind, control="tfidf").value
        assert one(
            rows, "separability", f"emotion {what} minus tfidf", estimator=kind
        ).value == pytest.approx(ours - theirs)


@pytest.mark.parametrize(
    ("n", "r", "ridge", "verdict"),
    [(5, False, False, None), (29, True, False, "not asked"), (30, True, True, "shown")],
)
def test_what_is_said_of_geometry_with_so_many_rated_words(monkeypatch, n, r, ridge, verdict):
    """36 words whose component is their valence, of which a table rates so many."""
    inputs = planted_geometry(True)
    rated = inputs.stories.emotions.names[:n]
    real = norms_room.load_norms

    def known(table="glasgow_2019", **o):
        return {w: x for w, x in real(table, **o).items() if w in rated}

    monkeypatch.setattr(norms, "load_norms", known)
    monkeypatch.setattr(norms_room, "load_norms", known)
    rows = norms.run(inputs).rows
    about = [x for x in rows if "valence" in x.metric]
    assert {x.n for x in about} == {n}
    assert any(np.isfinite(x.value) for x in about if x.metric == "r of PC1 with valence") == r
    assert any(np.isfinite(x.value) for x in about if x.metric.startswith("ridge")) == ridge
    assert r or {x.control for x in about} == {"cannot be asked: fewer than 6 rated words"}
    found = verdicts_of(rows, inputs).get("valence")
    assert (found and found.verdict) == verdict


def test_each_emotion_is_judged_against_its_own_null_and_corrected(effect):
    rows = find(effect[0], "separability", "emotion auc one-vs-rest")
    assert [r.emotion for r in rows] == list(EMOTIONS)
    assert all(
        r.null_mean > 0.52 for r in rows
    )  # the sign of a random direction is free, so its mean is above a half
    assert [r.q for r in rows] == pytest.approx(
        stats.benjamini_hochberg([r.p for r in rows]).tolist()
    )
    steered = find(effect[0], "validation", "diag minus off by emotion")
    assert [r.p for r in steered] == pytest.approx(
        [1 / 101] * 6
    )  # none of a hundred random directions does as much
    assert [r.q for r in steered] == pytest.approx(
        stats.benjamini_hochberg([r.p for r in steered]).tolist()
    )


def test_no_estimator_reads_shuffled_labels_of_topics_that_were_held_out(shuffled_rows):
    found = [r for r in find(shuffled_rows, "separability", "emotion top1") if r.estimator]
    assert {r.estimator for r in found} == {"mean_difference", "lda", "pca", "logistic"}
    assert (
        max(r.value for r in found) < 0.45
    )  # chance is .17; a story in its own training set is always read
    assert 0.1 < one(shuffled_rows, "separability", "emotion top1", readout="calibrated", estimator="mean_difference", control="shuffled labels").null_mean < 0.3  # fmt: skip


def test_the_lens_has_an_interval_over_emotions(monkeypatch):
    seen: list[Any] = []
    real = lens._words
    monkeypatch.setattr(lens, "_words", lambda x: seen.append(x) or real(x))
    found = lens.run(planted("unused"))
    assert len(found.rows) == 2 * len(seen) == 4
    for k, r in enumerate(found.rows):
        each = list(seen[k // 2].auc.values())
        every = [
            np.mean(drawn) for drawn in product(each, repeat=len(each))
        ]  # all resamples that there are
        assert r.value == pytest.approx(np.mean(each))
        assert [r.low, r.high] == pytest.approx(
            np.percentile(every, [2.5, 97.5]), abs=0.02
        )  # of 2,000 of them
        assert r.low < r.value < r.high
        assert (r.n, r.unit_of_n) == (6, "emotions")


def test_each_axis_of_other_peoples_text_is_weighted_by_its_own_norms(effect):
    r = {
        axis: one(effect[0], "transfer", "r", emotion=axis, control="shuffled labels").value
        for axis in ("valence", "arousal")
    }
    assert r["valence"] > 0.7
    assert r["arousal"] > 0.6
    partial = one(effect[0], "transfer", "partial r given valence", emotion="arousal")
    assert partial.value > 0.3


def test_the_ceiling_is_above_chance_for_what_is_there(effect):
    [ceiling] = [
        r
        for r in find(effect[0], "transfer", "macro auc")
        if (r.control or "").startswith("supervised")
    ]
    assert ceiling.value > 0.9


def test_the_layer_inside_a_fold_is_the_one_that_holds_the_emotions():
    inputs = planted("effect")
    rows = inputs.stories.acts.rows.clone()
    rows[:, [0, 2]] = torch.randn(rows[:, [0, 2]].shape, generator=torch.Generator().manual_seed(0))
    inputs = replace(
        inputs, stories=replace(inputs.stories, acts=replace(inputs.stories.acts, rows=rows))
    )
    folds = [Training(inputs.stories, held) for held in inputs.stories.folds]
    assert [f.fit(inputs.stories.labels).slot for f in folds] == [1] * 4
    assert (
        stats.top_k(
            separability.held_out_scores(folds, inputs.stories.labels), inputs.stories.labels
        ).mean()
        == 1.0
    )


def test_scores_are_calibrated_on_stories_that_their_directions_did_not_see():
    """Shuffled labels: in-sample scores are far from those of left-out topics, whose mean and spread a fold must use."""
    inputs = planted("shuffled")
    fold = Training(inputs.stories, inputs.stories.folds[0])
    fit = fold.fit(inputs.stories.labels)
    y = torch.from_numpy(inputs.stories.labels)[~fold.inside]
    rows, components = fold.train[:, [fit.slot]], [fold.components[fit.slot]]
    left_out = torch.zeros(len(rows), 6)
    for topic in set(fold.topics):
        there = torch.tensor([t == topic for t in fold.topics])
        left_out[there] = project(
            rows[there], *mean_differences(rows[~there], y[~there], components)
        )[:, :, 0]
    assert torch.allclose(fit.mean, left_out.mean(0), atol=1e-4)
    assert torch.allclose(fit.std, left_out.std(0), atol=1e-4)


def test_nothing_of_a_held_out_topic_reaches_the_neutral_components():
    inputs = planted("effect")
    held = inputs.stories.folds[0]
    tokens = inputs.stories.acts.neutral_tokens
    assert tokens is not None
    of_held = torch.tensor([tokens.texts[i].topic in held for i in tokens.row_text.tolist()])
    rows = tokens.rows.clone()
    rows[of_held] = 1000.0
    loud = replace(
        inputs,
        stories=replace(
            inputs.stories,
            acts=replace(inputs.stories.acts, neutral_tokens=replace(tokens, rows=rows)),
        ),
    )
    for a, b in zip(
        inputs.stories.neutral_components(held), loud.stories.neutral_components(held), strict=True
    ):
        assert torch.equal(a, b)
    assert not torch.equal(
        inputs.stories.neutral_components(())[0], loud.stories.neutral_components(())[0]
    )


def _persons_differ(inputs):
    """Rows of the third person moved on by one emotion: a direction from "I" reads the next emotion in "she"."""
    acts = inputs.stories.acts
    rows, at = (
        acts.rows.clone(),
        {(t.emotion, t.topic, t.split): i for i, t in enumerate(acts.texts)},
    )
    owner = {int(t): r for r, t in enumerate(acts.row_text)}
    for (e, topic, split), i in at.items():
        if e is not None and acts.texts[i].person == "third":
            other = EMOTIONS[(EMOTIONS.index(e) + 1) % 6]
            rows[owner[i]] = acts.rows[owner[at[other, topic, split]]]
    return replace(inputs, stories=replace(inputs.stories, acts=replace(acts, rows=rows)))


def test_a_direction_that_is_another_in_the_third_person_is_a_loss():
    inputs = _persons_differ(planted("effect"))
    rows = person.run(inputs).rows
    cross, mixed = (
        one(rows, "person", "top1", split=s).value for s in ("other person", "both persons")
    )
    assert cross < 0.1
    assert mixed > 0.3
    difference = one(rows, "person", "top1 cross minus mixed")
    assert difference.value == pytest.approx(cross - mixed)
    assert verdicts_of(rows, inputs)["person"].verdict == "opposite"


def test_steering_is_reported_on_openings_that_nothing_was_chosen_on(monkeypatch):
    seen: list[list[str]] = []
    real = validation.sweep
    monkeypatch.setattr(
        validation,
        "sweep",
        lambda model, prompts, *a, **k: seen.append(list(prompts)) or real(model, prompts, *a, **k),
    )
    inputs = planted("effect")
    validation.run(inputs)
    stems = load_stems()
    assert seen[0] == stems.choose
    assert len(seen) >= 5
    assert not {p for prompts in seen[1:] for p in prompts} & set(stems.choose)
    assert seen[1] == stems.report


def test_the_map_puts_clean_into_corrupted(monkeypatch):
    seen: list[tuple[str, str]] = []
    real = pairs_room.patch_resid_pre

    def spy(model, *, clean, corrupted, **options):
        seen.extend(zip(clean, corrupted, strict=True))
        return real(model, clean=clean, corrupted=corrupted, **options)

    monkeypatch.setattr(pairs_room, "patch_resid_pre", spy)
    inputs = planted("effect")
    chosen = {"layer": 1, "dose": 0.1, "emotions": EMOTIONS}
    causal.run(replace(inputs, earlier={"validation": Findings(chosen=chosen)}))
    assert len(seen) >= 8
    assert set(seen) <= {(p.clean, p.corrupted) for p in load_pairs()}


def test_every_interval_of_stories_resamples_whole_topics(monkeypatch):
    inputs = planted("effect")
    seen: list[list[object]] = []
    for name in ("bootstrap", "bootstrap_each", "bootstrap_mean"):
        real = getattr(stats, name)
        monkeypatch.setattr(
            stats,
            name,
            lambda what, groups, real=real, **k: (
                seen.append(list(groups)) or real(what, groups, **k)
            ),
        )
    separability.run(inputs)
    assert len(seen) >= 20
    assert all(groups == inputs.stories.topics for groups in seen)

"""The whole protocol on a tiny model: files, rows, resuming, refusals, other people's text, the page, and what a margin means."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _answers import NO_ACTS, NO_MODEL, SHIPPED, patched
from _browser import HOSTILE as RUNNING
from _browser import assert_inert
from sklearn import linear_model  # noqa: F401  (before the limit below, which sees only what is loaded)

import emolens as em
import emolens.study
from emolens import stats
from emolens.collect import collection
from emolens.collect.activations import Activations, TextInfo
from emolens.collect.histogram import NORM_BINS
from emolens.experiments import fitting as refit
from emolens.experiments import person, separability, transfer, validation
from emolens.experiments.base import Findings, Inputs, Picture, Stories, View
from emolens.experiments.protocol import EXPERIMENTS
from emolens.experiments.rows import Row, row
from emolens.interventions.measure import Cell
from emolens.interventions.sweep import Sweep
from emolens.report.page import render
from emolens.sets import external as external_room
from emolens.sets.emotion_sets import Emotion, EmotionSet, Story, Topic
from emolens.sets.external import Labelled
from emolens.study import Study, check_request, run_study

DEEDS = {  # six words of GoEmotions and of the Glasgow norms, and what people do
    "joy": ("laughed out loud", "danced across the room", "sang with everybody"),
    "sadness": ("wept for a long time", "sat alone in the dark", "could not get up"),
    "anger": ("slammed the table", "shouted at the wall", "tore the paper up"),
    "fear": ("hid behind the door", "trembled at a sound", "ran without looking"),
    "disgust": ("spat on the floor", "pushed the plate off", "held the nose shut"),
    "surprise": ("dropped the cup", "stared at the box", "asked twice if so"),
}
TARGETS = {"joy": ["happy", "merry"], "sadness": ["sorry", "blue"], "anger": ["cross"], "fear": ["faint"], "disgust": ["yuck"], "surprise": ["wow"]}  # fmt: skip
FAMILY = dict(zip(DEEDS, ("up", "down", "out", "down", "out", "up"), strict=True))
PLACES = ("kitchen", "train", "office", "letter", "garden", "harbour", "market", "school")
TOPICS = {place: "first" if i % 2 else "third" for i, place in enumerate(PLACES)}


pytestmark = pytest.mark.usefixtures("one_thread")


def _tell(rng: np.random.Generator, topic: str, who: str, deeds: Any) -> str:
    first, second = rng.permutation(deeds)[:2]
    thing = rng.choice(["cup", "coat", "bag", "lamp", "key", "map"])
    return (
        f"{rng.choice(['On Monday', 'Before noon', 'After the rain'])} {who} came to the {topic} with a {thing}. "
        f"Then {who} {first}. Later {who} {second}, and the {thing} lay on the floor of the {topic}."
    )


@pytest.fixture(scope="module")
def stories() -> EmotionSet:
    """Six emotions in eight topics, two of them told in both persons, and 24 neutral texts."""
    rng = np.random.default_rng(5)
    who = {"first": "I", "third": "Mara"}
    other = {"first": "third", "third": "first"}

    def story(e: str, topic: str, person_: str, split: str) -> Story:
        text = _tell(rng, topic, who[person_], DEEDS[e])
        return Story(id=f"{e}-{topic}-{split}", topic=topic, person=person_, text=text, split=split)  # type: ignore[arg-type]

    told = {
        e: tuple(story(e, t, p, "main") for t, p in TOPICS.items())
        + tuple(story(e, t, other[TOPICS[t]], "other_person") for t in ("kitchen", "train"))
        for e in DEEDS
    }
    plain = ("put it on the shelf", "wrote down the number", "closed the lid", "walked to the gate")
    neutral = tuple(
        Story(id=f"plain-{i}-{t}", topic=t, person=p, text=_tell(rng, t, who[p], plain))
        for i in range(3)
        for t, p in TOPICS.items()
    )
    return EmotionSet(
        name="six",
        language="en",
        emotions=tuple(
            Emotion(name=e, adjective=e, family=FAMILY[e], target_words=TARGETS[e], norm_key=e)
            for e in DEEDS
        ),
        topics=tuple(Topic(name=t, person=p) for t, p in TOPICS.items()),
        stories=told,
        neutral=neutral,
        source="made by the test suite",
    )


@pytest.fixture(scope="module")
def external(tmp_path_factory) -> Path:
    """Small made-up files in the two formats."""
    folder, rng = tmp_path_factory.mktemp("external"), np.random.default_rng(2)
    lines = []
    for e, deeds in DEEDS.items():
        for i in range(7):
            label = external_room.GOEMOTIONS.index(e)
            named = f" What {e}!" if i == 0 else ""
            lines.append(
                f'They {rng.choice(deeds)} at the {rng.choice(list(TOPICS))}, "{i}".{named}\t{label}\tid{e}{i}'
            )
    lines += [
        f"The {t} is open from {i} to five.\t27\tplain{i}{t}" for t in TOPICS for i in range(3)
    ]
    lines += ["Both at once, he laughed and wept.\t17,25\tboth"]
    (folder / "goemotions_test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = ["id,split,V,A,D,text"]
    for i, (e, deeds) in enumerate(list(DEEDS.items()) * 6):
        v, a = 3 + (e in ("joy", "surprise")) - (e == "sadness"), 3 + 0.1 * (i % 7)
        rows.append(
            f'{i},{"train" if i % 6 == 5 else "test"},{v},{a},3.0,"She {rng.choice(deeds)}, ""so""."'
        )
    (folder / "emobank.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def study(tiny_model, stories, external, tmp_path_factory) -> Study:
    """One complete study; the tests below read it."""
    out = tmp_path_factory.mktemp("out") / "below" / "study"
    return run_study(tiny_model, stories, out=out, external=external, progress=False)


def results(folder: Path) -> dict[str, Any]:
    def no(constant: str) -> None:
        raise AssertionError(f"{constant} in results.json")

    return json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=no)


@pytest.fixture
def no_experiments(monkeypatch) -> None:
    """Everything of a study but its experiments."""
    patched(monkeypatch, **{e.name: lambda inputs: Findings() for e in EXPERIMENTS})
    monkeypatch.setattr("emolens.report.page.render", lambda *a, **k: "<!doctype html>")


# --- files and rows ---------------------------------------------------------------------------------------------------


def test_a_study_leaves_three_files_and_nothing_else(study):
    assert {p.name for p in study.out.iterdir()} == {
        "vectors.safetensors",
        "results.json",
        "index.html",
    }
    assert {p.stat().st_mode & 0o777 for p in study.out.iterdir()} == {0o644}


def test_every_row_has_every_key_and_absent_is_null(study):
    data = results(study.out)
    assert set(data) == {"provenance", "rows"}
    keys = {f.name for f in fields(Row)}
    for r in data["rows"]:
        assert set(r) == keys
        assert isinstance(r["experiment"], str)
        assert isinstance(r["primary"], bool)
        assert all(v is None or isinstance(v, str | int | float) for v in r.values())
        assert r["value"] is None or np.isfinite(r["value"])
        if r["low"] is not None and r["high"] is not None:
            assert r["low"] <= r["high"]
        for p in ("p", "q"):
            assert r[p] is None or 0 < r[p] <= 1
        assert (r["n"] is None) == (r["unit_of_n"] is None)


def test_a_row_makes_what_is_not_a_number_absent():
    r = row(
        "x", "m", float("nan"), low=np.float64("inf"), n=np.int64(3), p=np.float64(0.5)
    ).to_dict()
    assert (r["value"], r["low"], r["n"], r["p"]) == (None, None, 3, 0.5)
    assert type(r["n"]) is int
    assert json.dumps(r, allow_nan=False)


def test_each_experiment_has_exactly_one_primary_row(study):
    found = {r["experiment"] for r in results(study.out)["rows"]}
    assert set(SHIPPED) <= found <= {e.name for e in EXPERIMENTS}
    assert Counter(r.experiment for r in study.primary()) == dict.fromkeys(found, 1)


def test_no_two_rows_answer_the_same_question(study):
    asked = Counter(
        (
            r.experiment,
            r.metric,
            r.estimator,
            r.readout,
            r.layer,
            r.emotion,
            r.split,
            r.control,
            r.dose,
        )
        for r in study.rows
    )
    assert [q for q, n in asked.items() if n > 1] == []


def test_every_claim_has_its_controls(study):
    top1 = [r for r in study.rows if r.experiment == "separability" and r.metric == "emotion top1"]
    assert {"shuffled labels", "tfidf", "embed", "chance"} <= {r.control for r in top1}
    (chance,) = (r for r in top1 if r.control == "chance")
    assert chance.value == pytest.approx(1 / 6)
    for r in study.primary():
        assert r.control is not None
        assert r.n is not None
        assert (r.low is not None) or (r.p is not None)


def test_the_vectors_are_those_of_the_rows(study, tiny_model):
    v = em.load_directions(study.out / "vectors.safetensors")
    assert v.emotions == tuple(DEEDS)
    assert v.layer == study.provenance["layer"]
    assert torch.equal(v.vectors, study.directions.vectors)
    assert (
        em.score(tiny_model, v, "Mara laughed out loud at the station, and then she danced.").layer
        == v.layer
    )


def test_the_provenance_says_what_was_done_and_nothing_of_this_machine(study):
    data = results(study.out)["provenance"]
    assert data["set"]["name"] == "six"
    assert data["external"] == ["emobank.csv", "goemotions_test.tsv"]
    assert sorted(t for fold in data["folds"] for t in fold) == sorted(TOPICS)
    for file in study.out.iterdir():
        content = file.read_bytes()
        assert str(study.out).encode() not in content
        assert str(Path.home()).encode() + b"/" not in content
        assert b"/tmp" not in content


@pytest.mark.usefixtures("no_experiments")
def test_the_best_layer_is_frozen(tiny_model, stories, tmp_path, monkeypatch):
    monkeypatch.setattr(refit, "choose_layer", lambda *given: np.array([0.3, 0.9, 0.1]))
    found = run_study(tiny_model, stories, out=tmp_path, progress=False)
    assert (found.provenance["layer"], found.directions.layer) == (1, 1)


# --- again: resuming, refusing, failing -------------------------------------------------------------------------------


def test_an_interrupted_study_resumes_with_what_it_had_and_ends_the_same(
    study, tiny_model, stories, external, tmp_path, monkeypatch
):
    options: dict[str, Any] = {"out": tmp_path, "external": external, "progress": False}
    names = [e.name for e in EXPERIMENTS]
    last = names[-1]
    with monkeypatch.context() as patch:

        def interrupt(inputs: Inputs) -> Findings:
            raise KeyboardInterrupt

        patched(patch, **{last: interrupt})
        with pytest.raises(KeyboardInterrupt):
            run_study(tiny_model, stories, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["activations", "experiments"]
    finished = {p.stem for p in (tmp_path / "experiments").iterdir()}
    assert finished == set(names) - {last}
    (tmp_path / "experiments" / "geometry.json").write_text(
        "{", encoding="utf-8"
    )  # damaged: made again

    collect_slice = collection.collect_slice

    def never(model: Any, recipe: Any, corpus: Any, *rest: Any) -> Any:
        assert corpus.info["set"] is None, "the stories were collected again"
        return collect_slice(model, recipe, corpus, *rest)

    def again(name: str) -> Any:
        return lambda inputs: pytest.fail(f"{name} was run again")

    monkeypatch.setattr(collection, "collect_slice", never)
    made_again: list[str] = []

    def counted(experiment: Any) -> Any:
        return lambda inputs: made_again.append(experiment.name) or experiment.run(inputs)

    runs = {
        e.name: counted(e) if e.name in ("geometry", last) else again(e.name) for e in EXPERIMENTS
    }
    patched(monkeypatch, **runs)
    said: list[str] = []
    resumed = run_study(tiny_model, stories, say=said.append, **options)
    assert made_again == ["geometry", last]
    assert results(resumed.out)["rows"] == results(study.out)["rows"]
    assert torch.equal(resumed.directions.vectors, study.directions.vectors)
    assert (tmp_path / "index.html").is_file()
    assert not {"activations", "experiments"} & {p.name for p in tmp_path.iterdir()}
    assert said[-1].startswith("done in")


def test_other_peoples_files_are_known_by_what_is_in_them():
    texts = Labelled(["a"], [{"joy", "fear"}])
    assert texts.sha256 == Labelled(["a"], [{"fear", "joy"}]).sha256
    assert (
        len(
            {
                texts.sha256,
                Labelled(["b"], [{"joy", "fear"}]).sha256,
                Labelled(["a"], [{"joy"}]).sha256,
            }
        )
        == 3
    )
    assert (
        Labelled(["a"], [set()], np.array([1.0]), np.array([2.0])).sha256
        != Labelled(["a"], [set()], np.array([2.0]), np.array([1.0])).sha256
    )


@pytest.mark.once
def test_experiments_kept_by_other_code_or_options_are_run_again(
    study, tiny_model, stories, external, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patched(patch, person=lambda inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_study(tiny_model, stories, out=tmp_path, external=external, seed=1, progress=False)
        patch.setattr(emolens.study, "_code", lambda: "older")
        with pytest.raises(ZeroDivisionError):
            run_study(tiny_model, stories, out=tmp_path, external=external, progress=False)
    resumed = run_study(tiny_model, stories, out=tmp_path, external=external, progress=False)
    assert results(resumed.out)["rows"] == results(study.out)["rows"]


@pytest.mark.once
@pytest.mark.usefixtures("no_experiments")
def test_activations_begun_for_another_set_are_refused_and_a_broken_shard_is_made_again(
    tiny_model, stories, tmp_path
):
    shards = em.collect_to(tmp_path / "activations", tiny_model, stories, progress=False).folder
    part = stories.subset(["joy", "fear"])
    with pytest.raises(
        FileExistsError, match=r"activations was begun with corpus\.n_texts = \d+, now it is \d+"
    ):
        run_study(tiny_model, part, out=tmp_path, progress=False)
    shards.file(0).write_bytes(b"broken")
    assert run_study(
        tiny_model, stories, out=tmp_path, progress=False
    ).directions.emotions == tuple(DEEDS)
    em.collect_to(tmp_path / "activations", tiny_model, stories, progress=False)
    again = run_study(tiny_model, part, out=tmp_path, progress=False, overwrite=True)
    assert again.directions.emotions == ("joy", "fear")


@pytest.mark.once
@pytest.mark.usefixtures("no_experiments")
def test_a_folder_of_another_study_is_refused_before_collecting(
    tiny_model, stories, tmp_path, monkeypatch
):
    run_study(tiny_model, stories, out=tmp_path, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    part = stories.subset(["joy", "fear", "anger"])
    with monkeypatch.context() as patch:
        patch.setattr(emolens.study, "collect_to", None)
        with pytest.raises(
            FileExistsError,
            match=r"already holds another study \(.* on six, .*\).*overwrite=True \(--overwrite\)",
        ):
            run_study(tiny_model, part, out=tmp_path, progress=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    run_study(tiny_model, stories, out=tmp_path, progress=False)  # the same study may run again
    with pytest.raises(FileExistsError, match=r"on six, seed 0, external text: none"):
        run_study(tiny_model, stories, out=tmp_path, seed=1, progress=False)
    run_study(tiny_model, part, out=tmp_path, progress=False, overwrite=True)
    assert em.load_directions(tmp_path / "vectors.safetensors").emotions == ("joy", "fear", "anger")


@pytest.mark.parametrize("content", ["{}", "[1, 2]", "not json", '{"provenance": 3}', "\xff\x00"])
def test_a_results_file_of_something_else_is_refused(tiny_model, stories, tmp_path, content):
    (tmp_path / "results.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        FileExistsError,
        match=r"already holds another study \(a results\.json that is not a study's\)",
    ):
        run_study(tiny_model, stories, out=tmp_path, progress=False)


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(stories, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way", encoding="utf-8")
    for out in (file, file / "below"):
        with pytest.raises(FileExistsError, match=r"file is a file; give the name of a folder"):
            run_study("pythia-70m", stories, out=out)


@pytest.mark.once
@pytest.mark.usefixtures("no_experiments")
@pytest.mark.parametrize(
    "where",
    [
        "emolens.shards.save_file",
        "emolens.study.write_report",
        "emolens.report.page.render",
        "json.dumps",
    ],
)
def test_an_error_leaves_no_half_file(tiny_model, stories, tmp_path, monkeypatch, where):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if where == "json.dumps":  # only where the rows are written
        monkeypatch.setattr(emolens.study.Path, "write_text", fail)
    else:
        monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match="No space left"):
        run_study(tiny_model, stories, out=tmp_path, progress=False)
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"activations", "experiments", "vectors.safetensors", "results.json"}
    assert not [p for p in tmp_path.rglob("*") if "part" in p.name]


def test_wrong_requests_are_refused_before_the_model_loads(tmp_path, stories):
    with pytest.raises(
        FileNotFoundError,
        match=r"no such folder \(expected goemotions_test\.tsv and emobank\.csv in it\)",
    ):
        run_study("pythia-70m", stories, out=tmp_path / "o", external=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="set 'six' has no neutral texts; a study needs them"):
        run_study("pythia-70m", replace(stories, neutral=()), out=tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither goemotions_test\.tsv nor emobank\.csv"):
        run_study("pythia-70m", stories, out=tmp_path / "o", external=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="unknown emotion set 'cor'; did you mean 'core'"):
        run_study("pythia-70m", "cor", out=tmp_path / "o")
    with pytest.raises(ValueError, match="unknown model 'pythia-70'; did you mean pythia-70m"):
        run_study("pythia-70", stories, out=tmp_path / "o")


# --- other people's text ----------------------------------------------------------------------------------------------


def test_transfer_has_its_twins_and_its_nulls(study):
    rows = [r for r in study.rows if r.experiment == "transfer"]
    macro = {(r.estimator, r.control) for r in rows if r.metric == "macro auc"}
    assert macro >= {
        ("mean_difference", "shuffled labels"), ("logistic", None), ("mean_difference", "tfidf"), ("logistic", "tfidf"),
        ("mean_difference", "embed"), ("logistic", "embed"), (None, "chance"),
    }  # fmt: skip
    assert {r.emotion for r in rows if r.metric == "auc by label"} == set(DEEDS)
    assert {(r.split, r.emotion) for r in rows if r.metric == "r"} == {
        ("emobank", "valence"),
        ("emobank", "arousal"),
    }
    assert {r.n for r in rows if r.split == "emobank"} == {30}  # the test split only
    (primary,) = (r for r in rows if r.primary)
    assert (primary.metric, primary.estimator, primary.split) == (
        "macro auc minus tfidf",
        "mean_difference",
        "goemotions",
    )
    (over_comments,) = (
        r for r in rows if r.metric == "macro auc" and r.control == "shuffled labels"
    )
    (over_both,) = (r for r in rows if r.metric == "macro auc, labels resampled too")
    assert over_both.value == pytest.approx(over_comments.value)
    assert over_both.n == len(DEEDS)
    assert over_both.unit_of_n.startswith("labels, resampled with ")


def test_steering_has_each_control_and_every_emotion_its_null(study):
    rows = [r for r in study.rows if r.experiment == "validation"]
    share = {r.control: r for r in rows if r.metric == "share diag above off"}
    assert set(share) == {None, "random directions", "shuffled labels"}
    assert share["shuffled labels"].split == "5 draws"
    assert share["random directions"].n == 100 * 12 * len(DEEDS)  # draws x openings x emotions
    by_emotion = [r for r in rows if r.metric == "diag minus off by emotion"]
    assert {r.emotion for r in by_emotion} == set(DEEDS)
    assert {(r.draws, r.split) for r in by_emotion} == {(100, "p at least 0.010")}
    for metric in ("share diag above off, direct path", "own score of the text minus random"):
        assert len([r for r in rows if r.metric == metric]) == 1
    for metric in (
        "diag minus off at equal KL",
        "distinct pairs of the text",
        "length of the text",
    ):
        assert len([r for r in rows if r.metric == metric]) == 2  # with its comparison


def test_an_instruction_is_compared_at_the_dose_with_its_damage():
    """Planted: KL = dose^2 and effect = 10 dose, so an instruction with KL .3^2 meets an effect of 3 whatever its own is."""
    few, prompts = ["joy", "fear"], ("a", "b", "c")

    def made(control, dose, effect, kl):
        change = torch.zeros(2, 3, 2)
        change[0, :, 0] = change[1, :, 1] = effect
        cells = tuple(Cell(e, control, 1, dose) for e in few)
        return cells, change, torch.full((2, 4), kl)

    parts = [made(None, d, 10 * d, d**2) for d in validation.CURVE]
    curve = Sweep(
        sum((p[0] for p in parts), ()), prompts, tuple(few), torch.cat([p[1] for p in parts]), torch.zeros(3, 2),
        torch.cat([p[2] for p in parts]),
    )  # fmt: skip
    cells, change, kl = made("prompt", 0.0, 1.0, 0.3**2)
    told = Sweep(cells, prompts, tuple(few), change, torch.zeros(3, 2), kl)
    rows = validation._told_rows(curve, told, few, partial(row, "validation", layer=1))
    by = {(r.metric, r.control): r for r in rows}
    assert by["diag minus off at equal KL", None].value == pytest.approx(3.0)
    assert by["diag minus off at equal KL", None].dose == pytest.approx(0.3)
    assert by["diag minus off at equal KL", "instruction in words"].value == pytest.approx(1.0)
    assert by[
        "diag minus off at equal KL, direction minus instruction", "instruction in words"
    ].value == pytest.approx(2.0)


def test_a_study_without_external_text_has_no_transfer_rows(study, stories):
    assert list(transfer.run(replace_inputs(study, stories)).rows) == []


def replace_inputs(study: Study, stories: EmotionSet, **changes: Any) -> Inputs:
    given: dict[str, Any] = {
        "model": NO_MODEL,
        "stories": Stories(stories, NO_ACTS),
        "directions": study.directions,
        "layer": 0,
    }
    return Inputs(**(given | changes))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("text only\n", 1),
        ("fine\t3\tid\nbad\tx\tid\n", 2),
        ("out of range\t28\tid\n", 1),
        ("fine\t3\tid\n\t\n", 2),
        ("no label\t\tid\n", 1),
        ("negative\t-1\tid\n", 1),
    ],
)
def test_a_bad_goemotions_file_names_its_line(tmp_path, content, line):
    file = tmp_path / "goemotions_test.tsv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=rf"goemotions_test\.tsv:{line}: expected text, label ids 0\.\.27 and an id",
    ):
        external_room.load_goemotions(file)


def test_a_comment_of_one_token_is_left_out(tiny):
    model = em.load_model(tiny("qwen2", tokenizer="no_bos"))
    data = transfer.readable(
        model, transfer.Labelled(["x", "The door was open.", "y"], [{"joy"}, {"fear"}, set()])
    )
    assert (data.texts, data.labels) == (["The door was open."], [{"fear"}])


def test_goemotions_texts_are_read_as_they_are(tmp_path):
    file = tmp_path / "g.tsv"
    file.write_text('He said "no\t3,25\tid1\n\'tis so, "twice"\t27\tid2\n', encoding="utf-8")
    data = external_room.load_goemotions(file)
    assert data.texts == ['He said "no', '\'tis so, "twice"']
    assert data.labels == [{"annoyance", "sadness"}, {"neutral"}]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "id,split,V,A,D\n1,test,1,2,3\n",
        "split,V,A,text\ntest,x,1,words\n",
        "split,V,A,text\ntest\n",
    ],
)
def test_a_bad_emobank_file_says_what_is_expected(tmp_path, content):
    file = tmp_path / "emobank.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"emobank\.csv: expected a CSV file with the columns split, V, A and text"
    ):
        external_room.load_emobank(file)


def test_the_real_files_parse():
    folder = Path(__file__).parent.parent.parent / "shared" / "data"
    if not (folder / "goemotions_test.tsv").is_file():
        pytest.skip("GoEmotions and EmoBank are not beside this checkout")
    data = external_room.load_goemotions(folder / "goemotions_test.tsv")
    assert len(data.texts) == len(data.labels) == 5427
    counts = Counter(label for labels in data.labels for label in labels)
    assert counts["neutral"] == 1787  # the published counts of the test split
    assert counts["grief"] == 6
    bank = external_room.load_emobank(folder / "emobank.csv")
    assert len(bank.texts) == 1000  # the published size of the test split
    assert bank.valence is not None
    assert 1 <= bank.valence.min() < bank.valence.max() <= 5


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, links and text of the report."""

    void = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.links: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self._see(tag, attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._see(tag, attrs)

    def _see(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes[name] += 1
            if name.split(":")[-1] in ("href", "src", "srcset", "action", "data", "poster"):
                self.links.append(value)
            if name == "aria-label":
                self.labels.append(value)
            if name == "style":
                assert "url(" not in value.replace("url(#", "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def assert_safe(page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "link", "img", "form", "base"} & set(
        page.tags
    )
    assert not [a for a in page.attributes if a.startswith("on")]
    assert [x[:40] for x in page.links if not x.startswith(("#", "data:image/png;base64,"))] == []


def test_the_page_is_self_contained_and_well_formed(study):
    html = (study.out / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert_safe(page)
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert len(html) < 3_000_000


def test_the_page_has_its_figures_and_says_what_they_are(study):
    page = Page((study.out / "index.html").read_text(encoding="utf-8"))
    # ten of the seven experiments, and whatever another one shows
    others = [s for e in EXPERIMENTS if e.name not in SHIPPED for s in e.shows]
    assert page.tags["svg"] == len(page.labels)
    assert len(page.labels) == 10 + sum(isinstance(s, Picture) for s in others)
    assert {
        "Accuracy by layer",
        "Paired differences",
        "Paired differences on other people's text",
        "Cosine matrix",
        "Circumplex",
        "Transfer to GoEmotions",
        "Dose curve",
        "Validation steering",
    } <= set(page.labels)
    assert page.tags["h1"] == 1
    for words in (
        "What this does not show",
        "shown",
        f"All {len(study.rows)} rows",
        study.provenance["model"]["fingerprint"],
        "six",
    ):
        assert words in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    "\" onload=\"x' y=",
    "a & b &lt;c&gt;",
    r"$\frac{1}{$ $x$",
    "</svg></table><h1>",
    "\u202etfel ot thgir",
]  # fmt: skip


def page_with(hostile: list[str], study: Study, stories: EmotionSet) -> str:
    """The report with these six strings wherever a set, a model or a command puts one."""
    names = dict(zip(DEEDS, hostile, strict=True))
    emotions = replace(
        stories,
        name=hostile[0],
        source=hostile[1],
        emotions=tuple(
            e.model_copy(update={"name": names[e.name], "family": "<i>" + str(e.family)})
            for e in stories.emotions
        ),
        stories={names[e]: s for e, s in stories.stories.items()},
    )
    directions = replace(study.directions, emotions=tuple(hostile))
    rows = [replace(r, emotion=names.get(r.emotion or "", r.emotion)) for r in study.rows]
    model = study.provenance["model"] | {
        "name": hostile[0],
        "source": hostile[4],
        "architecture": "<b>",
    }
    provenance = study.provenance | {
        "model": model, "command": f"emolens study --model {hostile[0]!r}", "external": hostile, "folds": [hostile],
        "set": {"name": hostile[0], "sha256": "0" * 64, "source": hostile[1], "language": "en"},
    }  # fmt: skip
    return render(sections(study, rows, directions, emotions), provenance)


def sections(study: Study, rows: list[Row], directions: Any, emotions: EmotionSet) -> list[Any]:
    """What a page is made of, from other rows."""
    made = []
    for e in study.experiments:
        own = replace(study.findings[e.name], rows=[r for r in rows if r.experiment == e.name])
        made.append((e, View(own, directions, emotions)))
    return made


def test_hostile_names_are_inert_and_complete_in_the_page(study, stories):
    page = Page(page_with(HOSTILE, study, stories))
    assert_safe(page)
    assert page.tags["h1"] == 1
    for name in HOSTILE:
        assert page.text.count(name) >= 3, name  # in figures and in tables
    assert f"Emotion directions in {HOSTILE[0]}" in page.text


@pytest.mark.filterwarnings(
    "ignore:constrained_layout not applied"
)  # names too long for a figure are ugly, not wrong
def test_hostile_names_are_inert_in_a_browser(study, stories, tmp_path):
    assert_inert(page_with(RUNNING, study, stories), tmp_path)


def test_a_page_can_be_made_of_very_little(study, stories):
    """Two emotions without norms, families or rows."""
    two = stories.subset(["joy", "fear"])
    two = replace(
        two, emotions=tuple(e.model_copy(update={"norm_key": None}) for e in two.emotions)
    )
    made = [(e, View(Findings(), study.directions[["joy", "fear"]], two)) for e in EXPERIMENTS]
    page = Page(render(made, study.provenance))
    assert_safe(page)
    assert "All 0 rows" in page.text


# --- what separability means ------------------------------------------------------------------------------------------


def planted(stories: EmotionSet, *, signal: float, d_model: int = 24, words: bool = True) -> Inputs:
    """Inputs whose activations are  signal * u_emotion + topic + noise;  with `words`, texts that name their emotion."""
    generator = torch.Generator().manual_seed(1)
    emotions = replace(stories, emotions=stories.emotions[:4])
    told = {
        e: tuple(
            s.model_copy(
                update={
                    "text": f"{'word' + e if words else 'same'} and the {s.topic} again, the {s.topic}"
                }
            )
            for s in stories.stories[e]
            if s.split == "main"
        )
        for e in emotions.names
    }
    emotions = replace(emotions, stories=told, neutral=())
    u = torch.linalg.qr(torch.randn(d_model, len(emotions.names), generator=generator)).Q.T
    of_topic = {t: torch.randn(2, d_model, generator=generator) for t in TOPICS}
    texts, rows = [], []
    for e, s in emotions.texts():
        texts.append(TextInfo(s.id, e, s.topic, s.person, "main", s.id[:16], 100))
        noise = torch.randn(2, d_model, generator=generator)
        rows.append(signal * u[emotions.names.index(e)] + of_topic[s.topic] + 0.3 * noise)
    n, n_tokens = len(texts), 60
    tokens = torch.randn(n_tokens, 2, d_model, generator=generator)
    plain = tuple(TextInfo(f"n-{t}", None, t, None, "neutral", t, 100) for t in TOPICS)
    acts = Activations(
        hook_point="resid_post",
        layers=(0, 1),
        rows=torch.stack(rows),
        embed=torch.randn(n, d_model, generator=generator),
        row_text=torch.arange(n),
        row_position=torch.full((n,), -1),
        texts=tuple(texts),
        norm_histogram=torch.ones(2, NORM_BINS, dtype=torch.int64),
        sinks=torch.ones(n, 2),
        info={"model": {"n_layers": 2, "fingerprint": "f", "process_weights": {}}},
    )
    of = torch.arange(n_tokens) % len(plain)
    neutral = replace(
        acts,
        rows=tokens,
        embed=tokens[:, 0],
        row_text=of,
        row_position=torch.arange(n_tokens),
        texts=plain,
        sinks=torch.ones(len(plain), 2),
    )
    acts = replace(acts, neutral_tokens=neutral)
    v = em.mean_difference(acts, remove_neutral=None)
    return Inputs(NO_MODEL, Stories(emotions, acts), v, 1)


@pytest.fixture(scope="module")
def separable(stories) -> list[Row]:
    return separability.run(planted(stories, signal=20.0, words=False)).rows


@pytest.fixture(scope="module")
def only_words(stories) -> list[Row]:
    return separability.run(planted(stories, signal=0.0, words=True)).rows


def the(rows: list[Row], metric: str, **wanted: Any) -> Row:
    (found,) = (
        r for r in rows if r.metric == metric and all(getattr(r, k) == v for k, v in wanted.items())
    )
    return found


def test_planted_emotions_are_told_apart_by_every_estimator(separable):
    (primary,) = (r for r in separable if r.primary)
    assert (primary.metric, primary.value, primary.low, primary.high) == (
        "emotion top1",
        1.0,
        1.0,
        1.0,
    )
    for estimator, readout in (
        ("lda", "calibrated"),
        ("pca", "calibrated"),
        ("logistic", "decision"),
    ):
        assert the(separable, "emotion top1", estimator=estimator, readout=readout).value == 1.0
    assert the(separable, "emotion auc", estimator="mean_difference", readout="calibrated", control="shuffled labels").value == 1.0  # fmt: skip


def test_shuffled_labels_are_near_chance_and_never_reach_the_planted_truth(separable):
    (primary,) = (r for r in separable if r.primary)
    # chance is .25, and each of the hundred draws took the better of two layers
    assert 0.2 < primary.null_mean < 0.4
    assert primary.null_high < 0.65
    assert primary.p == pytest.approx(1 / 101)


def test_a_margin_over_words_that_say_nothing_is_shown(separable):
    margin = the(separable, "emotion top1 minus tfidf", estimator="mean_difference")
    assert margin.low > 0.4
    assert the(separable, "emotion top1 minus embed", estimator="mean_difference").low > 0.2


def test_a_set_with_words_only_gives_a_negative_margin(only_words):
    """TF-IDF reads these stories perfectly and the activations hold nothing: the report must not claim anything."""
    assert (
        the(only_words, "emotion top1", control="tfidf", estimator="mean_difference").value == 1.0
    )
    assert the(only_words, "emotion top1", control="tfidf", estimator="logistic").value == 1.0
    for estimator in ("mean_difference", "logistic"):
        margin = the(only_words, "emotion top1 minus tfidf", estimator=estimator)
        assert margin.high < 0
        assert margin.value < -0.4
    (primary,) = (r for r in only_words if r.primary)
    assert primary.value < 0.6
    assert primary.p > 0.05


def test_the_layer_that_holds_the_emotions_is_chosen(stories):
    inputs = planted(stories, signal=20.0)
    rows = inputs.stories.main.rows.clone()
    rows[:, 0] = torch.randn(rows[:, 0].shape, generator=torch.Generator().manual_seed(4))
    accuracy = refit.choose_layer(
        rows, inputs.stories.labels, inputs.stories.topics, inputs.stories.folds, None
    )
    assert accuracy.argmax() == 1
    assert accuracy[1] == 1.0
    assert accuracy[0] < 0.6


def test_whole_topics_are_held_out(stories):
    """A text's own topic is never in its training fold: rows that only copy their topic's emotion cannot be read."""
    inputs = planted(stories, signal=0.0)
    assert sorted(t for fold in inputs.stories.folds for t in fold) == sorted(TOPICS)
    for fold in inputs.stories.folds:
        for inner in inputs.stories.inner_folds(fold):
            assert not set(inner) & set(fold)
        kept = inputs.stories.without(fold)
        assert not {t.topic for t in kept.texts} & set(fold)


def _neutral_apart(stories: EmotionSet, of: tuple[str, ...]) -> EmotionSet:
    """The set with its neutral texts moved to these topics, which are added where the set lacks them."""
    moved = tuple(
        n.model_copy(update={"topic": of[i % len(of)]}) for i, n in enumerate(stories.neutral)
    )
    more = tuple(
        Topic(name=t, person="third") for t in of if t not in {u.name for u in stories.topics}
    )
    return replace(stories, topics=(*more, *stories.topics), neutral=moved)


def test_folds_are_of_the_topics_that_have_stories(stories):
    """Topics of neutral texts alone sort among the others and would take their places."""
    moved = _neutral_apart(stories, ("apart", "even", "notes"))
    inputs = planted(stories, signal=1.0)
    inputs = replace(inputs, stories=replace(inputs.stories, emotions=moved))
    assert [len(f) for f in inputs.stories.folds] == [2, 2, 2, 2]
    assert sorted(t for f in inputs.stories.folds for t in f) == sorted(TOPICS)
    assert inputs.stories.folds == planted(stories, signal=1.0).stories.folds
    assert not {"apart", "even", "notes"} & {
        t for f in inputs.stories.inner_folds(inputs.stories.folds[0]) for t in f
    }


def test_neutral_texts_of_topics_of_their_own_are_used_in_every_fold(stories):
    inputs = planted(stories, signal=1.0)
    tokens = inputs.stories.acts.neutral_tokens
    assert tokens is not None
    apart = replace(tokens, texts=tuple(replace(t, topic="apart") for t in tokens.texts))
    inputs = replace(
        inputs,
        stories=replace(inputs.stories, acts=replace(inputs.stories.acts, neutral_tokens=apart)),
    )
    every = inputs.stories.neutral_components(())
    for fold in inputs.stories.folds:
        assert all(
            torch.equal(a, b)
            for a, b in zip(inputs.stories.neutral_components(fold), every, strict=True)
        )


def test_a_set_whose_neutral_texts_are_held_out_together_is_refused_before_the_model(
    stories, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "emolens.study.load_model", lambda *a, **k: pytest.fail("the model was loaded")
    )
    half, other = stats.topic_folds(
        TOPICS, n_folds=2, seed=0
    )  # what a half of the topics writes, the other half reads
    for of in (
        ("kitchen",),
        tuple(t for t, p in TOPICS.items() if p == "first"),
        half,
        (half[0], other[0]),
    ):
        with pytest.raises(
            ValueError, match="all neutral texts are of topics that are held out together"
        ):
            run_study(
                "smollm2-135m-instruct-q4", _neutral_apart(stories, of), out=tmp_path / "study"
            )
    assert not (tmp_path / "study").exists()


def test_a_set_told_in_one_person_is_studied(stories, tmp_path):
    """Nothing is read across persons then, so no topics are held out for that."""
    one = replace(
        stories, topics=tuple(t.model_copy(update={"person": "third"}) for t in stories.topics)
    )
    assert set(one.story_topics.values()) == {"third"}
    inputs = planted(stories, signal=1.0)
    inputs = replace(inputs, stories=replace(inputs.stories, emotions=one))
    found = person.run(inputs)
    assert not found.rows
    assert not person.gate(found)
    assert check_request(one, tmp_path / "study") == tmp_path / "study"


def test_a_readout_that_a_fold_cannot_have_is_an_error_not_a_missing_row(stories):
    inputs = planted(stories, signal=1.0)
    fold = inputs.stories.folds[0]
    lone = TextInfo("n", None, fold[0], None, "neutral", "n", 100)
    acts = inputs.stories.acts
    acts = replace(acts, texts=(*acts.texts, lone), rows=torch.cat([acts.rows, acts.rows[:1]]), embed=torch.cat([acts.embed, acts.embed[:1]]), row_text=torch.arange(len(acts.texts) + 1), row_position=torch.full((len(acts.texts) + 1,), -1), sinks=torch.cat([acts.sinks, acts.sinks[:1]]))  # fmt: skip
    with pytest.raises(ValueError, match="all neutral texts are of the held-out topics"):
        separability.run(replace(inputs, stories=replace(inputs.stories, acts=acts)))

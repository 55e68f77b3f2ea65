"""The whole protocol in one call: collect, choose a layer, fit, run every experiment with its controls, write it down.

The folder ends with ``vectors.safetensors`` (directions ready for use), ``results.json`` (provenance and tidy rows) and ``index.html``
(a self-contained report). An interrupted study continues from the activations that it had collected and the experiments that it had finished;
a folder that holds another study is refused. The same inputs and seed give identical rows.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from emolens import __version__, stats
from emolens._files import data_root, here
from emolens._typing import HookedModel
from emolens.collect.collection import collect_to
from emolens.collect.forward import collect_resid_post
from emolens.directions.estimators import mean_difference
from emolens.directions.fitting import FOLDS
from emolens.directions.value import EmotionDirections
from emolens.experiments import fitting
from emolens.experiments.base import Experiment, Findings, Inputs, Stories, View
from emolens.experiments.protocol import answers, chosen_experiments
from emolens.experiments.rows import Row
from emolens.experiments.rules import Answer
from emolens.models.identity import present_info
from emolens.models.loading import load_model
from emolens.models.tokens import tokenization
from emolens.readout import score
from emolens.report.page import section, write_report
from emolens.sets import EmotionSet, load_emotion_set
from emolens.sets.external import Labelled, load_external
from emolens.shards import (
    LOCK,
    MANIFEST,
    Kept,
    code_digest,
    digest_of,
    vacant,
    vacant_folder,
    written_whole,
)

# texts that are in no set, for the coloured view of the report
SAMPLES = (
    "The parcel had been left on the step in the rain. I knew the handwriting before I had turned it over, and I sat down in the hall "
    "with my coat still on and laughed out loud, because he had kept it, all these years he had kept the silly thing.",
    "Nobody had told her that the review was today. She read the first line, then the first line again. They had put his name on it. "
    "Eleven months of her work, and they had put his name on it and asked her to bring the coffee.",
    "The stairs creaked once. He had locked the door, he was nearly sure of it. He stood with the kettle in his hand and listened to the "
    "house, and the house was quiet in the way that a person is quiet who does not want to be found.",
    "The 14 tram leaves every ten minutes from the north side of the square. Tickets are sold at the kiosk and in the machine by the "
    "door. Stamp the ticket when you get on, and keep it until you get off.",
)


@dataclass(frozen=True, eq=False)
class Study:
    """What a study found; `out` has the same as files.

    Attributes:
        rows: All figures of all experiments, in order.
        provenance: Model, set, versions, command: where the figures come from.
        directions: Fitted on all stories, at the layer that was frozen.
        out: The folder.
        experiments: What was asked.
        findings: What each of them found, by name.
    """

    rows: list[Row]
    provenance: dict[str, Any]
    directions: EmotionDirections
    out: Path
    experiments: tuple[Experiment, ...]
    findings: dict[str, Findings]

    def primary(self) -> list[Row]:
        """The one row of each experiment that was named before it was run.

        Returns:
            Rows, in the order of the experiments; an experiment that names none has none.

        Example:
            >>> study = em.run_study(model, stories, profile=["person"], progress=False)
            >>> [row.metric for row in study.primary()]
            ['top1 cross minus mixed']
        """
        return [r for r in self.rows if r.primary]

    def answers(self) -> list[Answer]:
        """What the study says of every claim.

        Returns:
            Answers in the order of the report, with verdict and words.

        Example:
            >>> study = em.run_study(model, stories, profile=["person"], progress=False)
            >>> [answer.name for answer in study.answers()]
            ['person']
        """
        k = len(self.directions.emotions)
        return [a for e in self.experiments for a in answers(e, self.findings[e.name], k)]


@dataclass(frozen=True, eq=False)
class Result:
    """What one experiment found when it was run alone.

    Attributes:
        experiment: What was asked.
        findings: Rows, and words to be shown.
        inputs: What it was given: stories, directions, layer.
    """

    experiment: Experiment
    findings: Findings
    inputs: Inputs

    @property
    def rows(self) -> list[Row]:
        """All figures."""
        return list(self.findings.rows)

    def answers(self) -> list[Answer]:
        """What it says of each of its claims, or why it cannot be asked.

        Returns:
            Answers in the order of the claims, with verdict and words.

        Example:
            >>> found = em.run_experiment("logit_lens", model, stories, progress=False)
            >>> found.answers()[0].verdict  # it has words of three emotions only
            'not asked'
        """
        return answers(self.experiment, self.findings, len(self.inputs.stories.emotions.names))

    def __repr__(self) -> str:
        lines = [self.experiment.question]
        lines += [f"  {a.verdict}: {a.words}: {a.text}" for a in self.answers()]
        return "\n".join([*lines, f"  {len(self.rows)} rows"])

    def _repr_html_(self) -> str:
        view = View(self.findings, self.inputs.directions, self.inputs.stories.emotions)
        return section(self.experiment, view)


def run_experiment(
    experiment: str | Experiment,
    model: HookedModel | str,
    emotions: EmotionSet | str = "core",
    *,
    seed: int = 0,
    full: bool = False,
    external: str | Path | None = None,
    progress: bool | None = None,
) -> Result:
    """Run one experiment, with what it needs, on a model and a set; nothing is written.

    Args:
        experiment: A name (`emolens run --list` prints them), or an `Experiment` of one's own.
        model: A loaded model, or a name for `load_model`.
        emotions: A set, or its name or path.
        seed: Of folds, bootstraps, permutations and random directions.
        full: More permutations and draws, every layer, all external texts.
        external: A folder with other people's labelled texts, as in `run_study`.
        progress: Whether to show a bar while the stories are read; None shows one where it will take long and there is somebody to see it.

    Returns:
        `Result`: print it for what it says, show it in a notebook for its pictures.

    Raises:
        ValueError: no such experiment; a set without neutral texts.
        FileNotFoundError: `external` has no file that is known.

    Example:
        >>> found = em.run_experiment("person", model, stories, progress=False)
        >>> print(found)
        Does a direction learned from “I” read “she”, and the other way round?
        ...
    """
    chosen = chosen_experiments([experiment])
    emotions = load_emotion_set(emotions) if isinstance(emotions, str) else emotions
    others = load_external(external) if external is not None else {}
    _check_neutral(emotions, seed)
    loaded: HookedModel = load_model(model) if isinstance(model, str) else model
    stories = Stories(emotions, collect_resid_post(loaded, emotions, progress=progress), seed)
    inputs = _inputs(loaded, stories, full, others)
    found: dict[str, Findings] = {}
    for each in chosen:
        found[each.name] = each.run(replace(inputs, earlier=dict(found)))
    return Result(chosen[-1], found[chosen[-1].name], inputs)


def run_study(
    model: HookedModel | str,
    emotions: EmotionSet | str = "core",
    *,
    profile: str | Sequence[str | Experiment] = "standard",
    seed: int = 0,
    external: str | Path | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] | None = None,
    out: str | Path = "study",
) -> Study:
    """Run the protocol of emolens on a model and a set, and write vectors, rows and a report.

    Args:
        model: A loaded model, or a name for `load_model`.
        emotions: A set, or its name or path.
        profile: "quick" (what the stories alone answer), "standard", "full" (more permutations, every layer for logistic regression, all
            external texts), or a list of experiments; what they need runs too.
        seed: Of folds, bootstraps, permutations and random directions.
        external: A folder with goemotions_test.tsv and emobank.csv, for the transfer to other people's text.
        overwrite: Replace another study in the same folder.
        command: What to print in the report as the command that made it.
        progress: Whether to show a bar while the stories are read; None shows one where it lasts and somebody can see it.
        say: Called with one line at each step.
        out: A folder; made if it does not exist.

    Returns:
        `Study`.

    Raises:
        FileExistsError: `out` holds another study.
        FileNotFoundError, ValueError: `external` has neither file, or one that is not what its name says; no such profile or experiment;
            before anything is computed.
        OSError: `out` cannot be written; checked before anything is computed.

    Example:
        >>> study = em.run_study(model, stories, profile=["person"], progress=False, out="study")
        >>> sorted(file.name for file in study.out.iterdir())
        ['index.html', 'results.json', 'vectors.safetensors']
    """
    say = say or (lambda line: None)
    started = time.time()
    chosen, full = chosen_experiments(profile), profile == "full"
    emotions = load_emotion_set(emotions) if isinstance(emotions, str) else emotions
    others = load_external(external) if external is not None else {}
    folder = check_request(emotions, out, seed)
    loaded: HookedModel = load_model(model) if isinstance(model, str) else model
    info = present_info(loaded)
    names = [e.name for e in chosen]
    options = {
        "seed": seed,
        "full": full,
        "external": {n: data.sha256 for n, data in others.items()},
    }
    if names != [e.name for e in chosen_experiments("standard")]:
        options["experiments"] = names
    key = _key(info.to_dict() | {"tokenization": tokenization(loaded.tokenizer)}, emotions, options)
    _refuse_other(folder, key, overwrite)

    say(
        f"model {info.name}: {info.n_layers} layers, d_model {info.d_model}; set {emotions.name}: {len(emotions.names)} emotions"
    )
    # by an interrupted run of this very study, perhaps in part
    collected, finished = folder / "activations", folder / "experiments"
    kept = Kept(finished, f"{key} {_code()}")
    if overwrite:
        shutil.rmtree(collected, ignore_errors=True)
        shutil.rmtree(finished, ignore_errors=True)
    acts = collect_to(collected, loaded, emotions, progress=progress).load()
    say(
        f"collected {len(acts.texts)} texts at {len(acts.layers)} layers ({time.time() - started:.0f} s)"
    )
    inputs = _inputs(loaded, Stories(emotions, acts, seed), full, others)
    directions, layer = inputs.directions, inputs.layer
    say(
        f"layer {layer} of {info.n_layers} frozen by cross-validation ({time.time() - started:.0f} s)"
    )

    found: dict[str, Findings] = {}
    for experiment in chosen:
        given = replace(inputs, earlier=dict(found))
        as_json = kept.get(
            experiment.name, lambda e=experiment, given=given: e.run(given).to_dict()
        )
        found[experiment.name] = Findings.from_dict(as_json)
        say(f"{experiment.name} done ({time.time() - started:.0f} s)")
    rows = [r for findings in found.values() for r in findings.rows]
    samples = score(loaded, directions, list(SAMPLES), per="token")
    provenance = {
        "emolens": __version__,
        "command": command or f"em.run_study({info.name!r}, {emotions.name!r}, profile={profile if isinstance(profile, str) else names!r}, seed={seed})",
        "key": key,
        "model": info.to_dict(),
        "set": {"name": emotions.name, "sha256": emotions.fingerprint, "source": emotions.source, "language": emotions.language},
        "layer": layer,
        "pooling": acts.info["pooling"],
        "neutral_components": directions.info["neutral_k"],
        "sink_ratio": [round(float(s), 1) for s in acts.sink_ratio],
        "norm_median": [round(float(n), 2) for n in acts.norm_median],
        "folds": inputs.stories.folds,
        "seed": seed,
        "full": full,
        "external": sorted(others),
        "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens", "numpy", "scipy", "scikit-learn")},
        "python": platform.python_version(),
        "wall_seconds": round(time.time() - started, 1),
        "peak_memory_gb": round(_peak_memory() / 1e9, 2),
    }  # fmt: skip
    directions.save(folder / "vectors.safetensors", overwrite=True)  # the folder is this study's
    with written_whole(folder / "results.json") as part:
        data = {"provenance": provenance, "rows": [r.to_dict() for r in rows]}
        part.write_text(
            json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8"
        )
    sections = [(e, View(found[e.name], directions, emotions)) for e in chosen]
    write_report(folder / "index.html", sections, provenance, samples=samples)
    shutil.rmtree(collected)
    shutil.rmtree(finished)
    say(f"done in {time.time() - started:.0f} s: {folder / 'index.html'}")
    return Study(rows, provenance, directions, folder, chosen, found)


def _inputs(
    model: HookedModel, stories: Stories, full: bool, external: dict[str, Labelled]
) -> Inputs:
    """What experiments are given: the layer is chosen by cross-validation on the stories, and frozen before anything is fitted at it."""
    accuracy = fitting.choose_layer(
        stories.main.rows,
        stories.labels,
        stories.topics,
        stories.folds,
        stories.neutral_components(),
    )
    layer = stories.acts.layers[int(accuracy.argmax())]
    directions = replace(mean_difference(stories.acts), layer=layer)
    return Inputs(model, stories, directions, layer, full, external)


def check_request(emotions: EmotionSet, out: str | Path, seed: int = 0) -> Path:
    """The folder of a study, made if need be; whatever of `run_study`'s errors needs no model is raised here.

    Raises:
        ValueError: a set without neutral texts, or with all of them where they are held out together.
        FileExistsError: `out` holds files of something else under the names that a study writes, or clears away.
        OSError: it cannot be written.
    """
    _check_neutral(emotions, seed)
    folder = here(out)
    begun = [folder / "activations" / MANIFEST, *(folder / "experiments").glob("*.json")]
    strays = [
        p for p in (folder / "activations", folder / "experiments") if p.exists() and not _ours(p)
    ]
    if not (folder / "results.json").exists() and not any(p.is_file() for p in begun):
        strays += [p for p in (folder / "vectors.safetensors", folder / "index.html") if p.exists()]
    if strays:
        raise FileExistsError(
            f"{folder} holds something else ({strays[0].name}) that a study would replace; choose an empty or a new folder"
        )
    return _prepare(folder)


def _ours(part: Path) -> bool:
    """Whether a folder holds nothing but what an interrupted study keeps there."""
    if not part.is_dir():
        return False
    if part.name == "activations":
        return (part / MANIFEST).is_file() or not any(p.name != LOCK for p in part.iterdir())
    files = [p for p in part.iterdir() if not p.name.endswith(".part")]
    return all(p.suffix == ".json" for p in files) and (
        not files or any(map(_made_by_a_study, files))
    )


def _made_by_a_study(file: Path) -> bool:
    try:
        return "made_by" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # a damaged one is made again
        return False


def _check_neutral(emotions: EmotionSet, seed: int) -> None:
    """Refuse a set without neutral texts, or one that leaves nothing to fit on where some topics are held out: a fold, one grammatical person, or half of the topics, of whose
    rest a group is held out again to know neutral text (`directions.Calibration`).
    """
    if not emotions.neutral:
        raise ValueError(
            f"set {emotions.name!r} has no neutral texts; a study needs them, to know what 'none' is"
        )
    persons = [
        tuple(t for t, p in emotions.story_topics.items() if p == person)
        for person in ("first", "third")
    ]
    persons = (
        persons if min(map(len, persons)) > 1 else []
    )  # of one person only, nothing is read across
    halves = []
    for half in stats.topic_folds(emotions.story_topics, n_folds=2, seed=seed):
        rest = {t: p for t, p in emotions.story_topics.items() if t not in half}
        halves += [half + group for group in stats.topic_folds(rest, n_folds=min(FOLDS, len(rest)))]
    for held in (*stats.topic_folds(emotions.story_topics, seed=seed), *persons, *halves):
        if all(n.topic in held for n in emotions.neutral):
            raise ValueError(
                f"set {emotions.name!r}: all neutral texts are of topics that are held out together ({', '.join(held)}), so nothing is left "
                "to find neutral components in; write neutral texts on more topics, or under topics that have no stories"
            )


def _peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset  # type: ignore[attr-defined]  # there on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1000 * peak


def _prepare(out: str | Path) -> Path:
    folder = vacant_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{folder}: cannot write there ({error.strerror or error}); choose another folder"
        ) from error
    return folder


def _code() -> str:
    """Identity of the sources that decide what an experiment finds, and of the data that they ship; how it is laid out is not among them."""
    package = Path(__file__).parent
    rooms = sorted(p.name for p in package.iterdir() if p.suffix == ".py" or p.is_dir())
    rooms = [r for r in rooms if r not in ("report", "cli", "_data", "__pycache__")]
    shipped = (
        p for p in sorted(data_root().rglob("*.*")) if p.suffix in (".yaml", ".jsonl", ".csv")
    )
    return f"{code_digest(*rooms)} {digest_of(shipped)}"


def _key(model: dict[str, Any], emotions: EmotionSet, options: dict[str, Any]) -> str:
    """Identity of a study: the weights, their processing, the texts, how they become tokens, and what was asked."""
    parts = [
        model["fingerprint"],
        model["process_weights"],
        model["dtype"],
        model["tokenization"],
        model["stop_tokens"],
        model["stop_strings"],
        emotions.fingerprint,
        "resid_post",
        options,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_other(folder: Path, key: str, overwrite: bool) -> None:
    """Refuse a folder with the results of something else."""

    def other(file: Path) -> str | None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["provenance"]
            options = f"seed {found['seed']}{', full' * found['full']}, external text: {', '.join(found['external']) or 'none'}"
            what = f"{found['model']['name']} on {found['set']['name']}, {options}"
            return None if found["key"] == key else f"another study ({what})"
        except (ValueError, KeyError, TypeError):  # no JSON, no UTF-8, or other JSON
            return "another study (a results.json that is not a study's)"

    vacant(folder / "results.json", other, overwrite=overwrite)

"""Checks of the materials: each rule is broken alone in a file of one's own and found; what is shipped breaks none."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emolens import sets as es
from emolens._files import data_root
from emolens.sets import dialogues, materials
from emolens.sets import material_checks as mc

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def core() -> es.EmotionSet:
    return es.load_emotion_set("core")


@pytest.fixture(scope="module")
def pool() -> es.EmotionSet:
    return es.load_emotion_set("emotions171")


def written(folder: Path, rows: Rows) -> str:
    path = folder / "own.jsonl"
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


def shipped(name: str) -> Rows:
    lines = (data_root() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def test_the_shipped_materials_break_no_rule_in_any_edition() -> None:
    checks = mc.check_materials()
    assert {name: check.violations for name, check in checks.items()} == dict.fromkeys(checks, ())
    kinds = ("pairs", "scenarios", "intensities", "items", "activities", "dialogues", "deflections")
    assert set(checks) >= {"stems", *(n for kind in kinds for n in materials.editions(kind))}
    words = checks["scenarios"].numbers["TF-IDF of core"]
    assert words.startswith("top-1 0.30, top-3 0.49 (chance 0.042, largest class 0.042;")
    (told,) = (v for k, v in checks["dialogues"].numbers.items() if k.startswith("TF-IDF"))
    assert told.startswith("own emotion 0.80, the other's 0.09 (chance 0.067")
    assert not [
        k
        for check in mc.check_materials(words=False).values()
        for k in check.numbers
        if k.startswith("TF-IDF")
    ]


def _changed(name: str, *changes: tuple[int, dict[str, Any]]) -> Rows:
    rows = shipped(name)
    for k, change in changes:
        rows[k] |= change
    return rows


def _scenarios2(**change: Any) -> Rows:
    """The first edition's scenarios with other words, and a form each."""
    forms = ("question", "third", "statement")
    rows = [
        r | {"text": f"{k} {codecs.encode(r['text'], 'rot13')}" + " or what?" * (k % 3 == 0), "form": forms[k % 3]}
        for k, r in enumerate(shipped("scenarios"))
    ]  # fmt: skip
    rows[1] |= change
    return rows


SCENARIOS: dict[str, tuple[Callable[[], Rows], str, str]] = {
    "cell": (lambda: shipped("scenarios")[1:], "two of each", "('serenity', 'main'): 1 of 2"),
    "named": (lambda: _scenarios2(text="We are so serene here."), "emotion not named", "serenity-2: names the emotion: serene"),
    "form": (lambda: _scenarios2(text="Is she at home?"), "asks where it says so", "serenity-2: form 'third', and a question at its end"),
    "forms": (lambda: _scenarios2(form="statement"), "forms", "not as many of each form: {'question': 32, 'statement': 33, 'third': 31}"),
    "again": (
        lambda: _scenarios2(text=shipped("scenarios")[1]["text"]), "not of another edition", "serenity-2: as serenity-2 of scenarios (character 5-gram",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SCENARIOS)
def test_scenarios_of_another_edition(tmp_path: Path, core: es.EmotionSet, what: str) -> None:
    rows, rule, message = SCENARIOS[what]
    found = mc._scenarios(written(tmp_path, rows()), core, False).rules
    assert found[rule], found
    assert found[rule][0].startswith(message)
    good = mc._scenarios(written(tmp_path, _scenarios2()), core, False)
    assert good.violations == ()
    assert good.numbers["forms"] == "32 question, 32 statement, 32 third"


@pytest.mark.parametrize(
    ("change", "rule", "message"),
    [
        (
            {"corrupted": "one two three"},
            "one word changed",
            "x: clean and corrupted do not have as many words",
        ),
        ({"emotion_clean": "glee"}, "emotions of core", "x: 'glee' is not an emotion of core"),
        (
            {"corrupted": "Since the ferry sank she felt mournful"},
            "emotion not named",
            "x: names the emotion: mournful",
        ),
        ({"clean": None}, "not of another edition", "x: as "),
    ],
)
def test_pairs_of_another_edition(
    tmp_path: Path, core: es.EmotionSet, change: dict, rule: str, message: str
) -> None:
    good = {
        "id": "x", "clean": "Since the ferry sailed she felt only", "corrupted": "Since the ferry sank she felt only",
        "control": "Since the lorry sailed she felt only", "emotion_clean": "joy", "emotion_corrupted": "grief",
    }  # fmt: skip
    assert mc._pairs(written(tmp_path, [good]), core).violations == ()
    change = {k: v or shipped("pairs")[0]["clean"] for k, v in change.items()}
    found = mc._pairs(written(tmp_path, [good | change]), core).rules
    assert any(v.startswith(message) for v in found[rule]), found


def test_controls_expect_nothing_and_pairs_of_a_number_have_as_many_words(
    tmp_path: Path, core: es.EmotionSet
) -> None:
    row = {"id": "a", "text": "The label says {x}.", "values": [5, 60, 700]}
    assert mc._intensities(written(tmp_path, [row]), core).rules["expected or control"]
    assert mc._intensities(str(tmp_path / "own.jsonl"), core, control=True).violations == ()
    found = mc._intensities(
        written(tmp_path, [row | {"expected": {"fear": 1}}]), core, control=True
    )
    assert found.violations == ("a: a control expects no emotion to move",)
    found = mc._intensity_pairs(
        written(tmp_path, [{"id": "p", "value": 40, "grave": "40 ships burned", "harmless": "40 ships sailed in", "expected": {"fear": 1}}]), core
    )  # fmt: skip
    assert found.violations == ("p: grave and harmless",)


def test_a_swapped_item_and_a_negated_one(tmp_path: Path, core: es.EmotionSet) -> None:
    first = next(r for r in shipped("items") if r["kind"] == "person")
    a, b = first["persons"]
    swapped = [
        {"name": a["name"], "emotion": b["emotion"]},
        {"name": b["name"], "emotion": a["emotion"]},
    ]
    twin = first | {"id": f"{first['id']}-swapped", "persons": swapped}
    negators = {
        "id": "n", "kind": "negators", "emotion": "anger", "affirmed": "She was angry.", "negated": ["She was not angry."], "controls": ["She was then angry."],
    }  # fmt: skip
    good = mc._items(written(tmp_path, [twin, negators]), core)
    assert good.violations == ()
    assert good.numbers == {"items": "1 person, 1 negators", "swapped twins": "1"}
    same = mc._items(written(tmp_path, [twin | {"persons": first["persons"]}]), core)
    assert same.violations == (
        f"{twin['id']}: its people do not feel what those of {first['id']!r} do, exchanged",
    )
    unnamed = mc._items(written(tmp_path, [negators | {"controls": ["She was then quiet."]}]), core)
    assert unnamed.violations == ("n: 'anger' is not named in every sentence",)


def test_a_second_wording_has_the_ids_of_the_first_and_other_words(tmp_path: Path) -> None:
    rows = [r | {"text": r["text"][::-1]} for r in shipped("activities")]
    assert mc._activities(written(tmp_path, rows)).violations == ()
    rows[0] |= {"id": "helpful-9"}
    rows[1] |= {"text": shipped("activities")[1]["text"]}
    found = mc._activities(written(tmp_path, rows)).rules
    assert found["ids of the first wording"] == ("helpful-9: helpful",)
    assert found["not of another edition"][0].startswith("helpful-2: as helpful-2 of activities")


def _talks(cells: list[tuple[str, str]]) -> Rows:
    """A dialogue of a person and an assistant for every cell; digits for words, so that no two are alike."""
    rows = []
    for n, (own, other) in enumerate(cells):
        turns = [
            {"speaker": ("person", "assistant")[k % 2], "text": f"{7919 * (n + 1) ** 3 + k} {n * n + k} {k} .", "own": (own, other)[k % 2], "other": (other, own)[k % 2]}
            for k in range(6)
        ]  # fmt: skip
        rows.append(
            {
                "id": f"{own}-{other}",
                "topic": f"t{n % 4}",
                "emotions": {"person": own, "assistant": other},
                "turns": turns,
            }
        )
    return rows


def test_dialogues_of_a_person_and_an_assistant(tmp_path: Path, pool: es.EmotionSet) -> None:
    cells = [(a, b) for a in ("sad", "proud") for b in ("sad", "proud")]
    rows = _talks(cells)
    exchange = rows[1] | {
        "id": "e",
        "kind": "exchange",
        "turns": [t | {"text": f"{k} and so"} for k, t in enumerate(rows[1]["turns"][:2])],
    }
    good = mc._dialogues(written(tmp_path, [*rows, exchange]), pool, False)
    assert good.violations == ()
    assert good.numbers["kinds"] == "4 grid, 1 exchange"
    # an exchange does not fill a cell, and who is the person matters
    assert mc._dialogues(
        written(tmp_path, [rows[0], *rows[2:], exchange]), pool, False
    ).violations == ("no dialogue for ('sad', 'proud')",)
    rows[0]["turns"][0]["text"] += " I am sad."
    found = mc._dialogues(written(tmp_path, rows), pool, False).violations
    assert found == ("sad-sad: names the emotion: sad",)
    short = [rows[1] | {"turns": rows[1]["turns"][:4]}, *rows[2:], _talks([("sad", "sad")])[0]]
    assert mc._dialogues(written(tmp_path, short), pool, False).rules["turns"] == (
        "sad-proud: 4 turns; allowed 6 to 8",
    )


def _masks() -> Rows:
    rows = []
    cells = [
        ("sad", "proud", "hidden"),
        ("proud", "sad", "hidden"),
        ("sad", "sad", "shown"),
        ("proud", "proud", "shown"),
        (None, None, "none"),
    ]
    for n, (felt, displayed, kind) in enumerate(cells):
        turns = [
            {"speaker": "AB"[k % 2], "text": f"{n * 7 + k} {k} {n}. And {k}."} for k in range(6)
        ]
        spans = [{"turn": k, "start": 0, "end": turns[k]["text"].index(".") + 1} for k in (0, 2, 4)]
        rows.append(
            {"id": f"m{n}", "kind": kind, "topic": "t", "felt": felt, "displayed": displayed, "speaker": "A", "preamble": f"About {n}.", "turns": turns, "spans": spans if felt else []}
        )  # fmt: skip
    return rows


DEFLECTIONS: dict[str, tuple[Callable[[Rows], Any], str, str]] = {
    "cell": (lambda r: r.pop(0), "complete grid", "no dialogue for ('sad', 'proud')"),
    "shown": (lambda r: r.pop(3), "felt and shown", "proud: not felt and shown anywhere"),
    "preamble": (lambda r: r[4].update(preamble=""), "preamble", "m4: no preamble"),
    "gap": (lambda r: r[0]["spans"].pop(), "no gaps between spans", "m0: turn 4 has no span"),
    "first turn": (lambda r: r[0]["spans"].pop(0), "a mask in every turn", "m0: turn 0 has no span"),
    "named": (lambda r: r[0]["turns"][1].update(text="so gloomy and sad"), "emotion not named", "m0: names the emotion: "),
    "named where it is shown": (lambda r: r[2]["turns"][1].update(text="so sad"), "emotion not named", "m2: names the emotion: sad"),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFLECTIONS)
def test_deflections_of_the_second_edition(tmp_path: Path, pool: es.EmotionSet, what: str) -> None:
    good = mc._deflections(written(tmp_path, _masks()), pool)
    assert good.violations == ()
    assert good.numbers["kinds"] == "2 hidden, 2 shown, 1 none"
    edit, rule, message = DEFLECTIONS[what]
    rows = _masks()
    edit(rows)
    found = mc._deflections(written(tmp_path, rows), pool).rules[rule]
    assert [v for v in found if v.startswith(message)], found


def test_one_who_shows_a_feeling_may_say_it_in_other_words(
    tmp_path: Path, pool: es.EmotionSet
) -> None:
    rows = _masks()
    rows[2]["turns"][1]["text"] = "so gloomy and sorrowful"
    assert mc._deflections(written(tmp_path, rows), pool).violations == ()
    assert dialogues.load_deflections(tmp_path / "own.jsonl")[2].kind == "shown"


@pytest.mark.parametrize(
    ("k", "change", "rule", "message"),
    [
        (0, {"harsh": "Certainly not, and that is all that there is to say of it"}, "replies of one length", "s: 3, 3, 13 words"),
        (0, {"harsh": "Yes, you are not"}, "replies begin differently", "s: two replies begin with 'Yes, you'"),
        (2, {"text": "Short."}, "twins of one length", "c: 13 words, its twin 1"),
        (3, {"text": "Tell me, am I right about this one thing here"}, "no near-duplicates", "s and n: character 5-gram"),
    ],
)  # fmt: skip
def test_prompts_and_their_replies(
    tmp_path: Path, k: int, change: dict, rule: str, message: str
) -> None:
    rows = [
        {"id": "s", "kind": "sycophancy", "topic": "t", "text": "Tell me, am I right about this one thing here?", "claim": "plan", "agreeing": "Yes, you are.", "honest": "Not quite, no.", "harsh": "Wrong, as ever."},
        {"id": "c", "kind": "challenging", "topic": "t", "text": "If you do not help now I will lose all of it, please", "challenge": "pressure", "twin": "c2"},
        {"id": "c2", "kind": "twin", "topic": "t", "text": "Could you help me with this file when you have a moment?", "of": "c"},
        {"id": "n", "kind": "neutral", "topic": "t", "text": "Which bus goes from the harbour to the old mill?"},
    ]  # fmt: skip
    good = mc._prompts(written(tmp_path, rows))
    assert good.violations == ()
    assert good.numbers["prompts"] == "1 sycophancy, 1 challenging, 1 twin, 1 neutral"
    rows[k] |= change
    found = mc._prompts(written(tmp_path, rows)).rules[rule]
    assert [v for v in found if v.startswith(message)], found

"""What the second edition's rules count: planted in a set and found, and absent where it was not planted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _sets import load, make_spec, prose, write

from emolens import sets as es
from emolens import stats
from emolens.sets import check as sc
from emolens.sets import rules

EMOTIONS = ("joy", "sadness", "fear", "anger")
TOPICS = [(f"t{k}", "first" if k % 2 else "third") for k in range(8)]


def spec_of(text: Any, **more: Any) -> dict[str, Any]:
    """Four emotions in eight topics; `text` of emotion and topic, by number."""
    emotions = [
        {
            "name": e,
            "stories": [
                {"id": f"{e}-{t}", "topic": t, "person": person, "text": text(i, k)} for k, (t, person) in enumerate(TOPICS)
            ],
        }
        for i, e in enumerate(EMOTIONS)
    ]  # fmt: skip
    return {
        "name": "made",
        "topics": [{"name": t, "person": p} for t, p in TOPICS],
        "emotions": emotions,
    } | more


def made(folder: Path, text: Any, **more: Any) -> es.EmotionSet:
    return es.load_emotion_set(write(folder / "made", spec_of(text, **more)))


def plain(i: int, k: int) -> str:
    return f"{prose(10 * i + k, 84)}, {prose(200 + 10 * i + k, 8)}."


def test_a_form_of_an_emotions_own_is_outside_the_band_and_named(tmp_path: Path) -> None:
    said = made(
        tmp_path,
        lambda i, k: plain(i, k) + (" Is it so? Is it?" if i == 2 else " It is so. It is."),
    )
    found, *_ = rules.form_effects(said, n=199)
    assert (found.feature, found.emotion) == ("question marks", "fear")
    # all questions are one emotion's: z is sqrt(3) there and -1/sqrt(3) in the three others, whose text lengths vary a little
    assert found.effect == pytest.approx(np.sqrt(3), rel=0.02)
    assert found.effect > found.band
    assert found.p == 1 / 200
    accuracy = rules.form_accuracy(said)
    assert accuracy is not None
    assert accuracy.value > 0.4  # a quarter is always found, by the question; the others by chance


def test_a_form_that_every_emotion_has_as_often_is_inside_the_band(tmp_path: Path) -> None:
    drawn = made(
        tmp_path,
        lambda i, k: (
            plain(i, k) + (" Is it so? Is it?" if (i + k) % 4 == 0 else " It is so. It is.")
        ),
    )
    found, *_ = rules.form_effects(drawn, n=199)
    assert found.p > 0.05
    assert abs(found.effect) < found.band


def test_a_form_that_belongs_to_a_topic_is_no_effect_on_an_emotion(tmp_path: Path) -> None:
    """Nor does what topics differ in hide what an emotion has beyond its topic."""
    by_topic = made(tmp_path, lambda i, k: plain(i, k) + " It is so. It is." * (k + 1))
    assert rules.form_effects(by_topic, n=199)[0].p > 0.05
    beyond = made(tmp_path / "beyond", lambda i, k: plain(i, k) + " Is it so?" * (2 * k + (i == 2)))
    (found,) = (
        f
        for f in rules.form_effects(beyond, n=199)
        if f.feature == "question marks" and f.emotion == "fear"
    )
    assert found.effect > 1.5  # of a possible 1.73; with topics left in it would be .2


def test_a_sign_in_one_text_hides_no_effect_of_another_feature(tmp_path: Path) -> None:
    """What a single text has lies far out in some emotion under every shuffle; a band of all features by size would be as wide as that."""
    rng = np.random.default_rng(0)
    topics = TOPICS[:4]
    emotions = [
        {
            "name": f"e{i}",
            "stories": [
                {
                    "id": f"e{i}-{t}",
                    "topic": t,
                    "person": person,
                    "text": prose(10 * i + k, 80)
                    + "," * (9 if i == 2 else int(rng.integers(2, 9)))
                    + ";" * (i == k == 0),
                }
                for k, (t, person) in enumerate(topics)
            ],
        }
        for i in range(16)
    ]
    spec = {
        "name": "made",
        "topics": [{"name": t, "person": p} for t, p in topics],
        "emotions": emotions,
    }
    found = rules.form_effects(es.load_emotion_set(write(tmp_path / "made", spec)), n=499)
    assert [(f.feature, f.emotion) for f in found] == [("commas", "e2")]
    assert found[0].p < 0.05
    assert (
        found[0].effect < np.sqrt(64) / 4
    )  # smaller than the semicolon's, which is in one text of 64


def test_form_that_was_dealt_by_lot_is_found_to_tell_an_emotion_in_one_set_of_twenty(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    signs = (" It is so.", " Is it, then?", " Well!", " no; no", " so: so", " 7", " it's", ' "Go."')
    s = made(
        tmp_path,
        lambda i, k: plain(i, k) + "".join(sign * int(rng.integers(0, 4)) for sign in signs),
    )
    found = 0
    for k in range(40):
        dealt = {t.name: rng.permutation(list(s.names)) for t in s.topics}
        stories = {
            e: tuple(s.stories[dealt[t.name][i]][j] for j, t in enumerate(s.topics))
            for i, e in enumerate(s.names)
        }
        found += rules.form_effects(replace(s, stories=stories), n=99, seed=k)[0].p < 0.05
    assert (
        found <= 6
    )  # two are expected, and more than six have p .003; a p that knows of one feature alone finds 11


def test_form_is_read_on_topics_that_it_was_not_fitted_on(tmp_path: Path) -> None:
    """Eight stories of an emotion say nothing of its form; fitted on what it reads, a mean difference would find half of them."""
    found = rules.form_accuracy(made(tmp_path, plain))
    assert found is not None
    assert found.value < 0.4


def test_form_is_read_from_one_set_to_another_by_concept(tmp_path: Path) -> None:
    def telling(i, k):
        return plain(i, k) + " Is it so?" * i

    one = made(tmp_path / "one", telling)
    spec = spec_of(lambda i, k: telling(i, k + 100))
    for e, name in zip(spec["emotions"], ("Freude", "Trauer", "Angst", "Wut"), strict=True):
        e |= {"concept": e["name"], "name": name}
    other = es.load_emotion_set(write(tmp_path / "other", spec))
    across = rules.form_accuracy(one, other)
    assert across is not None
    assert across.value > 0.7
    lotless = made(tmp_path / "none", plain)
    chance = rules.form_accuracy(one, lotless)
    assert chance is not None
    assert chance.low < 0.25 + 0.1
    assert rules.form_accuracy(one, one.subset(["joy", "fear"])) is not None
    few = replace(one, stories={e: s[:2] for e, s in one.stories.items()})
    assert rules.form_accuracy(few) is None
    table = sc.read_across({"one": one, "other": other})
    assert list(table) == ["form-only accuracy, read in one", "form-only accuracy, read in other"]
    assert table["form-only accuracy, read in other"] == {
        "one": f"{across} (chance 0.250)",
        "other": "",
    }
    assert sc.read_across({"one": one}) == {}


def test_words_of_an_emotions_own_are_named_and_common_ones_are_not(tmp_path: Path) -> None:
    def text(i: int, k: int) -> str:
        own = " chin" if i == 1 and k < 5 else " elbow" if i == 0 and k < 3 else ""
        return plain(i, k) + own + (" weather" if k < 6 else "")

    (found,) = rules.marking_words(made(tmp_path, text))
    assert (found.word, found.emotion, found.n, found.of, found.elsewhere) == (
        "chin",
        "sadness",
        5,
        8,
        0.0,
    )
    assert str(found) == "'chin' is in 5 of 8 stories of sadness (0.0% elsewhere)"


def test_words_that_may_be_named_may_be_in_half_of_the_stories(tmp_path: Path) -> None:
    for n, found in ((4, []), (5, ["glad"])):
        s = made(
            tmp_path / str(n), lambda i, k, n=n: plain(i, k) + (" glad" if i == 0 and k < n else "")
        )
        assert [m.word for m in rules.marking_words(s, {"joy": {"glad"}})] == found
    assert [m.word for m in rules.marking_words(s)] == ["glad"]


def test_chinese_words_are_runs_of_characters(tmp_path: Path) -> None:
    def text(i: int, k: int) -> str:
        start = 0x4E00 + 320 * (8 * i + k)
        return (
            "".join(chr(start + c) for c in range(150))
            + "。"
            + ("下巴" if i == 1 and k < 4 else "")
            + "。"
        )

    found = rules.marking_words(made(tmp_path, text, language="zh"))
    assert [(m.word, m.emotion, m.n) for m in found] == [("下巴", "sadness", 4)]


def test_gender_is_counted_by_pronouns_and_by_the_design_where_there_is_one(tmp_path: Path) -> None:
    def told(i, k):
        return plain(i, k) + (" She saw her." if i == 0 else " He saw her, and his dog saw him.")

    s = made(tmp_path, told)
    found = rules.gender(s)
    assert found is not None
    assert found.counts == {"joy": (4, 0), "sadness": (0, 4), "fear": (0, 4), "anger": (0, 4)}
    assert str(found) == "she 0.25; 0.00 (sadness) to 1.00 (joy), by pronouns"
    sheets = [
        {"id": f"{e}-{t}", "gender": ("she", "he")[k % 4 // 2]} for e in EMOTIONS for k, (t, p) in enumerate(TOPICS) if p == "third"
    ]  # fmt: skip
    (tmp_path / "made" / "design.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in sheets), encoding="utf-8"
    )
    s = es.load_emotion_set(tmp_path / "made")
    assert str(rules.gender(s)) == "she 0.50; the same for every emotion, by design"
    assert rules.gender(replace(s, design=None, language="ja")) is None


def test_numbers_and_quotation_marks_are_counted(tmp_path: Path) -> None:
    s = made(
        tmp_path,
        lambda i, k: (
            f"word{'a' * i}{'b' * k} " * 9 + ('"Two," she said.' if i else "'Forty-one,' she said.")
        ),
    )
    counted = rules.number_words(s)
    assert counted is not None
    assert counted == pytest.approx((100 / 12, 0.0))
    signs = rules.quote_signs(s)
    assert {k: len(v) for k, v in signs.items()} == {'"': 24, "' '": 8}
    assert signs["' '"][0] == "joy-t0"
    assert rules.number_words(replace(s, language="fi")) is None


BROKEN: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "form": (lambda i, k: plain(i, k) + (" Is it so? Is it?" if i == 2 else " It is so. It is."), {}, "form", "form tells an emotion: +1.7"),
    "word": (lambda i, k: plain(i, k) + (" chin" if i == 1 and k < 5 else " nose"), {}, "no marking words", "'chin' is in 5 of 8 stories of sadness"),
    "quotes": (
        lambda i, k: f"{plain(i, k)} " + ("'Go,' he said." if (i, k) == (0, 0) else '"Go," he said.'),
        {},
        "one quotation mark",
        'joy-t0: \' \' (most texts: ")',
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_rule_of_the_second_edition_is_broken_alone_and_not_asked_of_the_first(
    tmp_path: Path, what: str
) -> None:
    text, more, rule, message = BROKEN[what]
    check = sc.check_emotion_set(made(tmp_path, text, edition=2, **more), words=False)
    (found,) = check.violations
    assert check.rules[rule] == (found,)
    assert message in found
    first = sc.check_emotion_set(made(tmp_path / "first", text, **more), words=False)
    assert first.violations == ()
    assert rule not in first.rules


def test_gender_and_numbers_are_rules_of_the_second_edition(tmp_path: Path) -> None:
    folder = write(tmp_path / "made", spec_of(plain, edition=2, neutral="neutral")).parent
    (folder / "neutral").mkdir()
    neutral = {"id": "n", "topic": "t0", "person": "third", "text": f"{prose(77)} seven"}
    (folder / "neutral" / "stories.jsonl").write_text(json.dumps(neutral) + "\n", encoding="utf-8")
    sheets = [{"id": f"joy-{t}", "gender": "she"} for t, p in TOPICS if p == "third"]
    (folder / "design.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in sheets), encoding="utf-8"
    )
    found = sc.check_emotion_set(es.load_emotion_set(folder), words=False).rules
    assert found["gender"] == ("joy: 4 stories of her, 0 of him",)
    assert found["numbers in neutral texts"][0].startswith(
        "numbers in a hundred: 1.10 in neutral stories, 0.00 in the others"
    )


def test_a_text_that_may_name_its_emotion_is_not_asked_for_it(tmp_path: Path) -> None:
    def named(may: bool) -> es.EmotionSet:
        return load(
            tmp_path / str(may),
            lambda s: s["emotions"][1]["stories"][0].update(
                text=prose(33) + " saddened", may_name=may
            ),
        )

    assert sc.check_emotion_set(named(True), words=False).violations == ()
    assert sc.check_emotion_set(named(False), words=False).violations == (
        "sadness-kitchen: names the emotion: saddened",
    )


def test_a_joined_set_is_checked_by_the_lengths_of_its_parts(tmp_path: Path) -> None:
    short = make_spec() | {"name": "short", "length": [5, 30]}
    for e, emotion in enumerate(short["emotions"]):
        for k, story in enumerate(emotion["stories"]):
            story["text"] = prose(500 + 10 * e + k, 4 if e == k == 0 else 20)
    joined = es.load_emotion_set(
        [write(tmp_path / "short", short), write(tmp_path / "small", make_spec())]
    )
    assert sc.check_emotion_set(joined, words=False).violations == (
        "short/joy-kitchen: 4 words; allowed 5 to 30",
    )


def test_short_texts_may_share_four_words_and_not_six(tmp_path: Path) -> None:
    def begun(words: str) -> tuple[str, ...]:
        def edit(spec: dict[str, Any]) -> None:
            spec["length"] = [8, 60]
            for e, emotion in enumerate(spec["emotions"]):
                for k, story in enumerate(emotion["stories"]):
                    story["text"] = (words if e < 2 and k == 0 else "") + prose(
                        700 + 10 * e + k, 30
                    )

        return sc.check_emotion_set(
            load(tmp_path / words.split()[-1], edit), words=False
        ).violations

    assert begun("Thank you so much ") == ()
    assert begun("Thank you so much for all ") == (
        "joy-kitchen, sadness-kitchen: the same 6 opening words",
    )


def test_every_accuracy_stands_beside_chance_and_the_largest_class(tmp_path: Path) -> None:
    s = load(tmp_path, lambda spec: [e.update(family="low") for e in spec["emotions"][1:]])
    numbers = sc.check_emotion_set(s).numbers
    assert "chance 0.333, largest class 0.333" in numbers["TF-IDF accuracy, emotions"]
    assert "chance 0.500, largest class 0.667" in numbers["TF-IDF accuracy, families"]
    assert "chance 0.333, largest class 0.333" in numbers["form-only accuracy"]


def test_features_of_form_have_a_name_each() -> None:
    assert stats.form_features(["x"]).shape[1] == len(stats.FORM)
    for mark, name in ((",", "commas"), ("?", "question marks"), (":", "colons"), ("7", "digits")):
        assert stats.form_features([f"a b {mark} c"])[0, stats.FORM.index(name)] > 0

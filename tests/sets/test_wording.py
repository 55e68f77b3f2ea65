"""What is counted in texts: length, words that name an emotion, likeness, openings, phrases."""

from __future__ import annotations

from emolens import sets as es
from emolens.sets import wording


def test_chinese_and_japanese_are_counted_in_characters_and_others_in_words() -> None:
    assert [wording.length("今天 天气\n很好", of) for of in ("zh", "ja", "en")] == [6, 6, 3]


def test_words_that_name_an_emotion_are_found_by_form_stem_and_list() -> None:
    joy = es.Emotion(
        name="joy", adjective="joyful", target_words=["happy"], forbidden=["delight*", "merry"]
    )
    assert wording.leaks("JOY! She was joyful, happy, happiness aside, and merry; delighted.", joy) == [
        "joy", "joyful", "happy", "happiness", "merry", "delighted"
    ]  # fmt: skip
    assert wording.leaks("She enjoyed the merriment at the jetty.", joy) == []
    grief = es.Emotion(name="grief", target_words=["mourn"])
    assert wording.leaks("He mourned, mourning; she mourns.", grief) == [
        "mourned",
        "mourning",
        "mourns",
    ]


def test_leaks_are_found_by_stem_in_german_and_anywhere_in_chinese() -> None:
    trust = es.Emotion(name="Vertrauen", target_words=["sicher"], forbidden=["trau*"])
    assert wording.leaks(
        "Er setzte sich, sein Vertrauen war hin, er traute sich nicht.", trust, "de"
    ) == [
        "vertrauen",
        "traute",
    ]
    joy = es.Emotion(name="喜悦", forbidden=["高兴*"])
    assert wording.leaks("他不高兴地走了。", joy, "zh") == ["高兴"]
    edge = es.Emotion(name="on edge")
    assert wording.leaks("He was on edge. A station edge.", edge) == ["on edge"]


def test_a_text_that_names_its_emotion_is_listed_with_the_words_once() -> None:
    joy = es.Emotion(name="joy", target_words=["happy"])
    texts = [("a", "Happy, so happy with joy.", joy), ("b", "She sat down.", joy)]
    assert wording.named(texts) == ["a: names the emotion: happy, joy"]


def test_texts_that_are_alike_are_named_in_pairs_and_by_their_openings() -> None:
    texts = [("a", "The door was open when she came."), ("b", "The door was open when he came.")]
    ((first, second, share),) = wording.overlaps([*texts, ("c", "Nothing."), ("d", "x")])
    assert (first, second) == ("a", "b")
    assert 0.5 < share < 1
    assert wording.same_openings(texts) == ["a, b: the same 4 opening words"]
    assert wording.same_openings(texts, "zh", n=12) == []
    assert wording.same_openings(texts, "zh", n=6) == ["a, b: the same 12 opening characters"]


def test_the_commonest_phrase_is_what_most_texts_share() -> None:
    texts = ["so it goes on and on", "and so it goes on and", "four words are none"]
    assert wording.commonest_phrase(texts, "en") == ("so it goes on and", 2 / 3)
    assert wording.commonest_phrase(["four words are none"], "en") is None

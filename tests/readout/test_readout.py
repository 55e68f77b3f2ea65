"""Readout: calibrated scores of texts and tokens, whose directions they are, hostile strings, and the logit lens with its test."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain
from types import SimpleNamespace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from _browser import HOSTILE as RUNNING
from _browser import assert_inert

import emolens as em
from emolens.collect.pooling import LENGTHS
from emolens.directions.algebra import project
from emolens.interventions import attribution as attribution_room
from emolens.models import identity as identity_room
from emolens.models.tokens import encode, render_chat
from emolens.readout import Scores, token_html
from emolens.readout.reading import SHORT
from emolens.sets.emotion_sets import Story

NEUTRAL = "There are three shelves in the hall. The clerk wrote down the number of boxes and closed the lid."
NEW = "Late on Friday Ines came to the harbour with a red coat. Then Ines wept for a long time and sat alone in the dark."


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(toy_set) -> Any:
    """The toy set with 24 neutral texts more: the band of texts needs twenty."""
    base = em.load_emotion_set(toy_set)
    more = tuple(
        Story(
            id=f"plain-{i}",
            topic=t.name,
            person=t.person,
            text=f"There are {i + 3} shelves in the {t.name}. The clerk wrote down the number of boxes, {7 * i + 2} of them, closed the "
            f"lid and put the list on shelf {i}. The {t.name} is open from {i % 9} to five.",
        )
        for i, t in enumerate(base.topics * 3)
    )
    return replace(base, neutral=base.neutral + more)


@pytest.fixture(scope="module")
def acts(tiny_model, toy) -> Any:
    return em.collect_resid_post(tiny_model, toy, progress=False)


@pytest.fixture(scope="module")
def v(acts) -> Any:
    return em.mean_difference(acts)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_text_score_is_the_centred_projection_in_held_out_standard_deviations(tiny_model, v):
    s = em.score(tiny_model, v, [NEW, "The list is on the shelf."], layer=1, skip=4)
    rows = em.collect_resid_post(tiny_model, [NEW, "The list is on the shelf."], layers=[1], pooling=em.mean_over_tokens(skip=4), progress=False).rows  # fmt: skip
    x = rows[:, 0] - v.reference[1]
    raw = torch.stack([x @ u / u.norm() for u in v.vectors[:, 1]], 1)
    # float32 sums of 32 products
    torch.testing.assert_close(s.raw, raw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        s.values, (raw - v.calibration.mean[:, 1]) / v.calibration.std[:, 1], rtol=1e-4, atol=1e-4
    )
    assert (s.per, s.layer, len(s)) == ("text", 1, 2)
    for row, text in enumerate([NEW, "The list is on the shelf."]):
        n = len(encode(tiny_model, [text])[0].ids) - 4
        low, high = (max(k for k in LENGTHS if k <= n), min(k for k in LENGTHS if k >= n))
        share = 0.0 if low == high else np.log2(n / low) / np.log2(high / low)
        a, b = (float(v.calibration.band[LENGTHS.index(k), 1]) for k in (low, high))
        assert float(s.band[row]) == pytest.approx(a + share * (b - a), rel=1e-5)
    assert s.spans == ((0, len(NEW)), (0, 25))


def test_a_token_score_is_calibrated_on_neutral_text_at_its_position(tiny_model, v):
    s = em.score(tiny_model, v, NEW, per="token", layer=1)
    tokens = em.collect_resid_post(
        tiny_model, [NEW], layers=[1], pooling=em.every_token(), progress=False
    )
    position = tokens.row_position
    b = sum((position >= edge).long() for edge in (4, 16, 64))
    raw = project(tokens.rows, v.vectors[:, [1]], v.reference[[1]])[:, :, 0]
    expected = (raw - v.calibration.token_mean[b][:, :, 1]) / v.calibration.token_std[b][:, :, 1]
    torch.testing.assert_close(s.values, expected, rtol=1e-4, atol=1e-4)
    offsets = encode(tiny_model, [NEW])[0].offsets
    assert s.spans == tuple(offsets[p] for p in position.tolist())
    assert torch.equal(s.band, v.calibration.token_band[b, 1])
    assert set(s.text_of) == {0}


def test_the_stories_are_read_as_what_they_tell_and_neutral_texts_as_none(tiny_model, v, toy):
    stories = toy.texts()
    s = em.score(tiny_model, v, [t.text for _, t in stories], layer=1, skip=50)
    right = np.mean(
        [s.emotions[int(i)] == e for i, (e, _) in zip(s.values.argmax(1), stories, strict=True)]
    )
    assert right > 0.8  # its own training texts; chance is .25
    neutral = em.score(tiny_model, v, [n.text for n in toy.neutral], layer=1, skip=50)
    # the band is their own 95th percentile
    assert neutral.labels.count("none") / len(neutral.labels) >= 0.9


# --- pooled as the directions were made -------------------------------------------------------------------------------


def test_directions_of_last_tokens_read_last_tokens(tiny_model, toy):
    acts = em.collect_resid_post(tiny_model, toy, pooling=em.last_token(), progress=False)
    v = em.mean_difference(acts, remove_neutral=None)
    stories = toy.texts()
    s = em.score(tiny_model, v, [t.text for _, t in stories], layer=1)
    expected = v.z(acts.select(lambda t: t.split == "main").rows)[:, :, 1]
    torch.testing.assert_close(s.values, expected, rtol=1e-3, atol=1e-3)  # another batch
    over = em.mean_over_tokens(skip=1)
    rows = em.collect_resid_post(
        tiny_model, [t.text for _, t in stories], layers=[1], pooling=over, progress=False
    ).rows
    assert (
        v.at(1).z(rows)[:, :, 0] - expected
    ).abs().max() > 0.5  # negative control: a mean over tokens reads something else
    tokens = em.score(
        tiny_model, v, NEW, per="token", layer=1
    )  # every token is itself, however the directions were pooled
    assert len(tokens) == len(encode(tiny_model, [NEW])[0].ids) - 1


def test_directions_of_spans_are_read_at_spans_or_not_at_all(tiny_model, toy):
    stories = toy.texts()
    texts, spans = [t.text for _, t in stories], [(0, 12)] * len(stories)
    topics = [t.topic for _, t in stories]
    acts = em.collect_resid_post(
        tiny_model,
        texts,
        emotions=[e for e, _ in stories],
        topics=topics,
        pooling=em.char_span(spans),
        progress=False,
    )
    v = em.mean_difference(acts, remove_neutral=None)
    v = replace(
        v, calibration=replace(v.calibration, band=torch.ones_like(v.calibration.band))
    )  # plain texts have no neutral ones
    with pytest.raises(
        ValueError, match=r"made from spans of their texts: say with spans= where to read these"
    ):
        em.score(tiny_model, v, texts[:2])
    s = em.score(tiny_model, v, texts, spans=spans, layer=1)
    torch.testing.assert_close(s.values, v.z(acts.rows)[:, :, 1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"spans= says where to pool a text; with per='token'"):
        em.score(tiny_model, v, texts, per="token", spans=spans)


def test_spans_for_directions_of_whole_texts_are_refused(tiny_model, v):
    with pytest.raises(
        ValueError,
        match=r"spans= given, but these directions were not made from spans \(their pooling is 'mean'\)",
    ):
        em.score(tiny_model, v, NEW, spans=[(0, 5)])


def test_the_band_is_said_with_what_was_measured(tiny_model, v):
    s = em.score(tiny_model, v, [NEW, "It is so."], layer=1)
    assert s.band[1] > s.band[0]  # a short text scatters more
    assert re.search(
        r"none below -?\d+\.\d to -?\d+\.\d by length; \d+( to \d+)? % of neutral texts of held-out topics lie above",
        repr(s),
    )
    old = replace(
        v,
        calibration=replace(
            v.calibration, band_rate=torch.full_like(v.calibration.band_rate, torch.nan)
        ),
    )
    assert "how many neutral texts lie above was not measured" in repr(
        em.score(tiny_model, old, NEW, layer=1)
    )
    rate = v.calibration.token_rate.clone()
    rate[0] = torch.nan  # the first three positions
    part = replace(v, calibration=replace(v.calibration, token_rate=rate))
    scores = em.score(tiny_model, part, NEW, per="token", layer=1)
    assert f"lie above (not measured for 3 of {len(scores)} tokens)" in repr(scores)


def _scores(
    values: list[list[float]],
    band: float,
    texts: tuple[str, ...],
    emotions=("joy", "fear"),
    **fields,
) -> Scores:
    table = torch.tensor(values)
    given = {
        "per": "text", "layer": 2, "text_of": tuple(range(len(table))), "spans": tuple((0, len(t)) for t in texts),
        "flags": ((),) * len(texts), "info": {}, "rate": torch.full((len(table),), 0.05),
    } | fields  # fmt: skip
    bands = torch.full((len(table),), band)
    return Scores(emotions=emotions, values=table, raw=table, texts=texts, band=bands, **given)


def test_a_row_inside_the_band_is_none():
    s = _scores([[1.0, 0.5], [1.6, 0.2], [-3.0, 1.5]], 1.5, ("a", "b", "c"))
    assert s.labels == ["none", "joy", "none"]
    assert s.above.tolist() == [[False, False], [True, False], [False, False]]
    assert s.top(1)["emotion"] == ["joy", "joy", "fear"]
    assert s.top(np.int64(9))["row"] == [0, 0, 1, 1, 2, 2]
    assert s.top(1)[1] == (1, "b", "joy", pytest.approx(1.6), 1.5)
    with pytest.raises(ValueError, match="k=0; at least 1"):
        s.top(0)


def test_short_texts_and_training_texts_are_flagged(tiny_model, v, toy):
    story = toy.texts()[0][1].text
    s = em.score(tiny_model, v, [story, "It is.", NEW])
    assert len(encode(tiny_model, ["It is."])[0].ids) <= SHORT
    assert s.flags == (("training",), ("short",), ())
    assert "[training]" in repr(s)
    assert "[short]" in s.to_html()


def test_the_repr_shows_text_label_and_highest_emotions(tiny_model, v):
    s = em.score(tiny_model, v, NEW, layer=1)
    lines = repr(s).splitlines()
    measured = r"none below -?\d+\.\d; \d+ % of neutral texts of held-out topics lie above"
    assert re.fullmatch(rf"Scores per text, layer 1, z \({measured}\)", lines[0])
    assert "'Late on Friday Ines came to the harbour with a ...'" in lines[1]
    _, text, best, z, _ = s.top(1)[0]
    assert text == NEW
    assert f"{best} {z:+.1f}" in lines[1]
    many = em.score(tiny_model, v, NEW, per="token")
    assert repr(many).splitlines()[-1] == f"  ... {len(many) - 20} more"
    assert many._repr_html_() == many.to_html()


def test_table_and_view_say_the_same_and_grey_what_is_inside_the_band():
    values = torch.tensor([[2.0, 0.5, -1.0, 0.1], [0.9, 0.2, 0.1, 1.0]])
    s = Scores(("joy", "fear", "anger", "awe"), values, values, "text", 1, ("One.", "Two."), (0, 1), ((0, 4), (0, 4)), torch.ones(2), torch.full((2,), 0.05), ((), ()), {})  # fmt: skip
    first, second = s.table().splitlines()[1:]
    assert first.split("'")[2].split() == ["joy", "joy", "+2.0", "(fear", "+0.5)", "(awe", "+0.1)"]
    assert second.split("'")[2].split()[0] == "none"  # on the band is inside it
    html = s.to_html()
    bars = re.findall(
        r'<span style="width:8em">(\w+)</span><span style="background:(#\w+);.*?>([+-][\d.]+)</span>',
        html,
    )
    assert [(e, colour == "#d9622b") for e, colour, _ in bars] == [("joy", True), ("fear", False), ("awe", False), ("awe", False), ("joy", False), ("fear", False)]  # fmt: skip
    assert [z for _, _, z in bars] == [
        z.strip("()") for line in (first, second) for z in re.findall(r"[+-]\d\.\d", line)
    ]
    token = replace(
        s, per="token", text_of=(0, 0), spans=((0, 3), (3, 4)), texts=("One.",), flags=((),)
    )
    assert 'title="+1.0" style="background:rgba(217,98,43,0.00)"' in token.to_html(["awe"])


def test_one_text_and_a_list_of_one_are_the_same(tiny_model, v):
    assert torch.equal(em.score(tiny_model, v, NEW).values, em.score(tiny_model, v, [NEW]).values)


def test_a_text_alone_scores_as_in_company(tiny_model, v):
    """Another batch is another order of sums, 1e-5 of a norm; z is in units of a spread about a tenth of it."""
    together = em.score(tiny_model, v, ["He put it on the shelf.", NEW, NEW * 2])
    torch.testing.assert_close(
        together.values[1:2], em.score(tiny_model, v, NEW).values, rtol=1e-3, atol=1e-3
    )


def test_chat_messages_are_read_as_rendered(tiny_model, v):
    messages = [{"role": "user", "content": "Then I wept for a long time."}]
    s = em.score(tiny_model, v, [messages], per="token")
    assert s.texts == (render_chat(tiny_model, messages),)
    assert _text_of(s.to_html(["glimmer"])).startswith("glimmer " + s.texts[0])


def test_the_view_shows_the_emotions_that_are_asked_for(tiny_model, v):
    s = em.score(tiny_model, v, NEW, per="token")
    assert re.findall(r"<b>(\w+)</b>", s.to_html(["tarrow", "glimmer"])) == ["tarrow", "glimmer"]
    assert len(re.findall(r"<b>(\w+)</b>", s.to_html())) == 3
    whole = em.score(tiny_model, v, NEW)
    assert re.findall(r'width:8em">(\w+)<', whole.to_html(["tarrow", "glimmer"])) == [
        "tarrow",
        "glimmer",
    ]
    for scores in (s, whole):
        with pytest.raises(
            KeyError, match="no emotion 'joy' here; there are: glimmer, gloamer, brindle, tarrow"
        ):
            scores.to_html(["joy"])


# --- what is refused --------------------------------------------------------------------------------------------------


def test_other_weights_are_refused_and_accepted_only_by_name(tiny, tiny_model, v):
    twin = em.load_model(tiny("llama", tokenizer="chat", seed=1))
    with pytest.raises(
        ValueError,
        match=r"made with .* and this is .* \(other weights\); collect again, or pass allow_other_model=True",
    ):
        em.score(twin, v, NEW)
    s = em.score(twin, v, NEW, allow_other_model=True)
    assert s.info["model"]["fingerprint"] != v.info["model"]["fingerprint"]


def test_other_processing_is_other_activations(tiny, v):
    processed = em.load_model(tiny("llama", tokenizer="chat"), process_weights=["fold_ln"])
    with pytest.raises(ValueError, match=r"these directions were made with .* and this is"):
        em.score(processed, v, NEW)


def test_another_width_is_never_accepted(tiny, v):
    wide = em.load_model(tiny("llama", tokenizer="chat", hidden_size=64))
    for allow in (False, True):
        with pytest.raises(
            ValueError, match=r"these directions have width 32 \(.*\), this model 64"
        ):
            em.score(wide, v, NEW, allow_other_model=allow)


def test_another_tokenizer_is_no_twin(tiny, v):
    other = em.load_model(tiny("llama", tokenizer="no_bos", seed=1))
    with pytest.raises(
        ValueError, match=r"has another tokenizer than .*; allow_other_model needs the same one"
    ):
        em.score(other, v, NEW, allow_other_model=True)


def test_directions_made_by_arithmetic_have_no_calibration(tiny_model, v):
    for made in (v["glimmer"] - v["gloamer"], 0.5 * v["glimmer"], -v):
        with pytest.raises(
            ValueError, match=r"no calibration \(made by arithmetic.*use directions\.project"
        ):
            em.score(tiny_model, made, NEW)


def test_a_part_of_the_directions_scores_as_the_whole_does(tiny_model, v):
    whole, part = em.score(tiny_model, v, NEW, layer=1), em.score(tiny_model, v["brindle", 1], NEW)
    assert part.emotions == ("brindle",)
    torch.testing.assert_close(part.values[:, 0], whole.values[:, 2])


def test_wrong_requests_say_what_is_allowed(tiny_model, v):
    with pytest.raises(ValueError, match="per='word'; allowed: 'text', 'token'"):
        em.score(tiny_model, v, NEW, per="word")
    with pytest.raises(
        ValueError, match="layer 7 has no directions here; there are layers 0, 1, 2"
    ):
        em.score(tiny_model, v, NEW, layer=7)
    with pytest.raises(ValueError, match="at least 1: the first token is an attention sink"):
        em.score(tiny_model, v, NEW, skip=0)
    with pytest.raises(ValueError, match="no texts given"):
        em.score(tiny_model, v, [])
    with pytest.raises(ValueError, match="one token is only an attention sink"):
        em.score(tiny_model, v, [NEW, "x"], prepend_bos=False)


def test_plain_labelled_lists_are_scored_and_nothing_is_called_none(tiny_model, toy):
    stories = [(e, s.text) for e, s in toy.texts()]
    emotions, texts = zip(*stories, strict=True)
    acts = em.collect_resid_post(tiny_model, list(texts), emotions=list(emotions), progress=False)
    v = em.mean_difference(acts, remove_neutral=None)
    s = em.score(tiny_model, v, [*texts[:3], NEW, NEUTRAL])
    assert s.values.isfinite().all()
    assert s.band.isnan().all()
    assert s.above.all()
    assert s.labels == s.top(1)["emotion"]
    assert "no band: too few neutral texts were collected, so nothing is called none" in repr(s)
    assert "(" not in repr(s).splitlines()[1].split("'")[2]
    assert "no band" in s.to_html()
    assert "#c9ccd3" not in s.to_html()
    with pytest.raises(ValueError, match="too little neutral text to score single tokens"):
        em.score(tiny_model, v, NEW, per="token")


def test_scores_that_do_not_fit_themselves_are_refused():
    s = _scores([[1.0, 0.5], [1.6, 0.2]], 1.5, ("a", "b"))
    with pytest.raises(jaxtyping.TypeCheckError, match="band"):
        replace(s, band=torch.ones(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="raw"):
        replace(s, raw=torch.ones(2, 3))
    with pytest.raises(
        ValueError, match=r"have \(1, 2, 2, 2\) entries; 2 rows, 2 columns and 2 texts"
    ):
        replace(s, text_of=(0,))


# --- hostile strings --------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert('x')</script> & then <b onclick=\"y\">bold</b>",
    "\" onmouseover=\"alert(1)\" style='x'",
    "&lt;b&gt; &amp;amp; &#60;i&#62; &nbsp",
    "\u202eright to left\u202c and \u2066isolate\u2069 and \u200f mark",
    "null \x00 byte, bell \x07, escape \x1b[31m",
    "]]> --> </div></span></bdi></style><!-- ",
    "{{ braces }} ${dollar} `tick` \\ backslash",
    "🙂 世界 e\u0301 👩‍👩‍👧 zero\u200bwidth",
    "tab\tand\nnewline\n\n",
]  # fmt: skip
OURS = {"div", "b", "span", "bdi", "br", "small"}


class Reader(HTMLParser):
    """What a browser would see: tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "br":
            self.text += "\n"
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")


def _read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    assert set(reader.tags) <= OURS
    assert reader.attributes <= {"style", "title"}
    return reader


def _text_of(page: str) -> str:
    return _read(page).text


def test_the_reader_of_these_tests_sees_an_attack():
    with pytest.raises(AssertionError):
        _read("<div>" + HOSTILE[0] + "</div>")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_inert_and_complete_in_the_token_view(tiny_model, v, text):
    s = em.score(tiny_model, v, text, per="token")
    page = s.to_html(["gloamer"])
    assert f"gloamer {text}" in _text_of(page)
    assert page.count("<bdi>") == page.count("</bdi>") == 1  # direction marks stay inside


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_inert_and_complete_in_the_text_view(tiny_model, v, text):
    page = em.score(tiny_model, v, text).to_html()
    assert _text_of(page).startswith(text)
    assert page.count("<bdi>") == page.count("</bdi>") == 1


def test_hostile_texts_and_names_are_inert_in_a_browser(tiny_model, v, tmp_path):
    views = [em.score(tiny_model, v, text, per="token").to_html(["gloamer"]) for text in RUNNING]
    views += [em.score(tiny_model, v, text).to_html() for text in RUNNING]
    names = _scores([[3.0, 2.0]] * 2, 1.0, ("plain", "text"), (RUNNING[0], RUNNING[2]))
    tokens = em.score(tiny_model, v, list(RUNNING), per="token")
    views += [em.explore_tokens(tokens, text=k).html for k in range(len(RUNNING))]
    assert_inert("".join([*views, names.to_html()]), tmp_path)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_stays_on_its_line_of_the_repr(tiny_model, v, text):
    shown = repr(em.score(tiny_model, v, text))
    assert len(shown.splitlines()) == 2
    assert "\x1b" not in shown
    assert "\x00" not in shown


def test_a_hostile_name_of_an_emotion_is_escaped():
    names = ("<img src=x onerror=alert(1)>", "a & b")
    texts = ("plain",)
    page = _scores([[3.0, 2.0]], 1.0, texts, names).to_html()
    assert names[0] in _text_of(page)
    tokens = _scores([[3.0, 2.0]], 1.0, texts, names, per="token", spans=((0, 5),))
    assert _text_of(tokens.to_html()).startswith(f"{names[0]} plain")


def test_tokens_that_were_left_out_still_show_and_split_characters_show_once():
    page = token_html(
        "ab🙂cd", [(0, 1), (2, 3), (2, 3), (2, 4)], [0.0, 9.0, -9.0, 1.0], [1.5] * 4, 4.0
    )
    assert _text_of(page) == "ab🙂cd"
    assert page.count("<span") == 3


def test_colour_starts_at_the_band_and_grows_to_the_limit():
    def strength(z: float) -> float:
        return float(
            re.search(r"rgba\([\d,]+,([\d.]+)\)", token_html("x", [(0, 1)], [z], [1.5], 4.0)).group(
                1
            )
        )

    assert strength(1.4) == strength(-1.4) == 0.0
    assert 0 < strength(1.6) < strength(3.0) < strength(4.0) == strength(40.0) == 1.0
    assert strength(-3.0) == strength(3.0)
    warm, cold = (token_html("x", [(0, 1)], [z], [1.5], 4.0) for z in (3.0, -3.0))
    assert re.sub(r"rgba\([^)]*\)|title=\"[^\"]*\"", "", warm) == re.sub(
        r"rgba\([^)]*\)|title=\"[^\"]*\"", "", cold
    )
    assert warm != cold


def test_a_long_text_is_cut_with_a_mark():
    text = "word " * 300
    assert "..." in _scores([[3.0, 2.0]], 1.0, (text,)).to_html()


# --- logit lens -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lens_model(tiny) -> Any:
    """A wide model, so that random directions do not come near the unembedding of a word by chance."""
    return em.load_model(tiny("llama", tokenizer="chat", hidden_size=128, head_dim=32))


LETTERS = {f"e{i}": list("abcdefghijklmnopqrstuvwx"[4 * i : 4 * i + 4]) for i in range(6)}


def _lens_directions(model: Any, toy: Any, vectors: torch.Tensor) -> Any:
    acts = em.collect_resid_post(model, toy, layers=[2], progress=False)
    v = em.mean_difference(acts, remove_neutral=None)
    return replace(
        v,
        emotions=tuple(LETTERS),
        vectors=vectors[:, None],
        reliability=v.reliability[:1].repeat(6, 1),
        calibration=None,
    )


class _Words:
    """The tiny tokenizer with whole words: ' a' is one token of its own."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **options):
        if text[-2:-1] == " ":
            parts = (
                self.inner(part, add_special_tokens=False).input_ids
                for part in (text[:-2], text[-1])
            )
            return SimpleNamespace(input_ids=[*chain(*parts)])
        return self.inner(text, **options)


@pytest.fixture
def words_of(lens_model, monkeypatch):
    """Target words that are one token each."""
    attribute = "_tokenizer" if "_tokenizer" in vars(lens_model) else "tokenizer"
    monkeypatch.setitem(vars(lens_model), attribute, _Words(lens_model.tokenizer))
    return {
        e: [lens_model.tokenizer(" " + w, add_special_tokens=False).input_ids for w in ws]
        for e, ws in LETTERS.items()
    }


def test_directions_planted_as_unembeddings_of_their_words_pass_the_lens(lens_model, toy, words_of):
    ids = {e: [i for (i,) in ws] for e, ws in words_of.items()}
    gain = (
        lens_model.ln_final.w if hasattr(lens_model.ln_final, "w") else lens_model.ln_final.weight
    )
    rows = (
        lens_model.W_U.detach().T * gain.detach()
    )  # the direction that raises a token through the norm's gain
    planted = torch.stack([rows[ids[e]].mean(0) for e in LETTERS])
    v = _lens_directions(lens_model, toy, 20 * planted)
    lens = em.logit_lens(lens_model, v, LETTERS, n_random=99)
    assert lens.auc == dict.fromkeys(LETTERS, 1.0)
    assert lens.mean_auc == 1.0
    assert lens.p == pytest.approx(0.01)  # one of a hundred
    for e in LETTERS:
        assert len(lens.words[e]) == 8
        assert set(LETTERS[e]) <= {w.strip() for w in lens.words[e]}


def test_random_directions_are_at_chance_and_show_no_words(lens_model, toy, words_of):
    generator = torch.Generator().manual_seed(3)
    v = _lens_directions(lens_model, toy, torch.randn(6, 128, generator=generator))
    lens = em.logit_lens(lens_model, v, LETTERS, n_random=99)
    assert 0.3 < lens.mean_auc < 0.7  # 24 words in six emotions: a standard deviation of .07
    assert lens.p > 0.05
    assert lens.words == {e: [] for e in LETTERS}
    assert np.mean(lens.null) == pytest.approx(0.5, abs=0.05)
    assert len(lens.null) == 99


def test_the_same_seed_gives_the_same_null(tiny_model, v, toy):
    targets = {e.name: e.target_words for e in toy.emotions}
    a, b, c = (em.logit_lens(tiny_model, v, targets, n_random=5, seed=seed) for seed in (0, 0, 1))
    assert a.null == b.null != c.null


def test_a_first_token_that_emotions_share_counts_for_none(tiny_model, v):
    targets = {
        "glimmer": ["happy", "merry"],
        "gloamer": ["happy", "sorry"],
        "brindle": ["cross"],
        "tarrow": ["loud"],
    }
    lens = em.logit_lens(tiny_model, v, targets, n_random=5)
    assert np.isfinite(lens.auc["glimmer"])


def test_an_emotion_without_words_is_not_judged(tiny_model, v):
    lens = em.logit_lens(tiny_model, v, {"glimmer": ["happy"], "gloamer": ["sorry"]}, n_random=5)
    assert np.isnan(lens.auc["brindle"])
    assert np.isfinite(lens.mean_auc)


def test_words_that_cannot_be_told_apart_are_refused(tiny_model, v):
    with pytest.raises(ValueError, match="target words"):
        em.logit_lens(tiny_model, v, {"glimmer": ["happy"], "gloamer": ["happy"]}, n_random=5)
    with pytest.raises(ValueError, match="target words"):
        em.logit_lens(tiny_model, v, {}, n_random=5)


def test_the_lens_refuses_directions_of_another_model(tiny, v):
    with pytest.raises(ValueError, match="other weights"):
        em.logit_lens(
            em.load_model(tiny("llama", tokenizer="chat", seed=1)), v, {"glimmer": ["happy"]}
        )


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_tokens_of_a_new_text_are_read_and_shown(real_model, toy):
    acts = em.collect_resid_post(real_model, toy, layers=[20], progress=False)
    v = em.mean_difference(acts)
    s = em.score(real_model, v, NEW, per="token")
    assert torch.isfinite(s.values).all()
    # the deeds of this emotion rise in their own sentence
    told = [i for i, (a, _) in enumerate(s.spans) if a >= NEW.index("wept")]
    assert s.values[told].mean(0).argmax() == s.emotions.index("gloamer")
    assert f"gloamer {NEW}" in _text_of(s.to_html(["gloamer"]))


def test_every_call_that_recommends_allow_other_model_takes_it(tiny: Any, tiny_model: Any) -> None:
    import inspect

    from emolens import readout
    from emolens.interventions import generate as steering
    from emolens.interventions import sweep as sweeps
    from emolens.interventions.check import check

    for function in (
        em.score,
        readout.logit_lens,
        attribution_room.attribute,
        steering.generate,
        sweeps.sweep,
        check,
    ):
        assert "allow_other_model" in inspect.signature(function).parameters, function
    info = em.model_info(em.load_model(tiny("llama", tokenizer="chat", seed=1))).to_dict()
    with pytest.raises(
        ValueError, match=r"\(other weights\); collect again, or pass allow_other_model=True"
    ):
        identity_room.check_model(tiny_model, info)
    with pytest.raises(ValueError, match=r"\(other weights\); collect again$"):
        identity_room.check_model(tiny_model, info, allow_other_model=None)
    identity_room.check_model(tiny_model, info, allow_other_model=True)


def _zeroed_row(w):
    with torch.no_grad():
        w[3] = 0


def _past_autograd(w):
    w.data[3, 2] += 1e-3


def _by_numpy(w):
    w.detach().numpy()[[3, 4]] = w.detach().numpy()[[4, 3]]


def _another_parameter(w):
    w.data = w.data.clone()
    w.data[-1, -1] *= 2


EDITS = (_zeroed_row, _past_autograd, _by_numpy, _another_parameter)
CALLS = {
    "score": lambda m, v: em.score(m, v, "They walked on."),
    "generate, read": lambda m, v: em.generate(m, "They walked on", max_new_tokens=1, read=v),
    "generate, steered": lambda m, v: em.generate(
        m, "They", em.steer_resid_post(v["gloamer"], dose=0.1), max_new_tokens=1
    ),
    "lens": lambda m, v: em.logit_lens(m, v, {e: [e] for e in v.emotions}, n_random=2),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("call", CALLS)
def test_weights_that_are_edited_between_two_calls_are_another_model(tiny, v, call, edit):
    model = em.load_model(tiny("llama", tokenizer="chat"))
    CALLS[call](model, v)
    edit(next(p for p in model.parameters() if p.ndim == 2))
    with pytest.raises(ValueError, match="other weights"):
        CALLS[call](model, v)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, v: em.score(m, v, "They walked on.", per="token"),
        lambda m, v: em.generate(m, "They walked on", max_new_tokens=1, read=v),
        lambda m, v: em.generate(
            m, "They walked on", max_new_tokens=1, read=v, read_with="as generated"
        ),
        lambda m, v: em.sweep(
            m,
            "They",
            v["gloamer"],
            doses=[0.1],
            target_words={"gloamer": ["a"], "tarrow": ["b"]},
            max_new_tokens=1,
            read=v,
        ),
        lambda m, v: v.token_z(torch.zeros(1, len(v.layers), 32), torch.tensor([1])),
    ],
    ids=["score", "generate", "as it is generated", "sweep", "token_z"],
)
def test_directions_without_neutral_texts_do_not_read_tokens(tiny_model, acts, call):
    v = em.mean_difference(acts.select(lambda t: t.split != "neutral"), remove_neutral=None)
    with pytest.raises(
        ValueError, match=r"too little neutral text .*make them from an emotion set that has more"
    ):
        call(tiny_model, v)

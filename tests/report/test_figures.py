"""Pictures that people see: complete, inert whatever the text says, and the same at every run."""

import html
import json
import re
from dataclasses import replace

import pytest
import torch

from emolens import stats
from emolens.experiments.drawing import canvas
from emolens.readout import Scores
from emolens.report import figures as plots
from emolens.report import tokens as tokens_room

HOSTILE = 'a </script><script>alert("x")</script> <!-- b \u202egnp.exe \x00 &amp; c'


def scores(text: str = HOSTILE, per: str = "token") -> Scores:
    spans = tuple((m.start(), m.end()) for m in re.finditer(r"\s*\S+", text))
    values = torch.linspace(-3, 3, 2 * len(spans)).reshape(len(spans), 2)
    return Scores(
        emotions=("joy", "fear"),
        values=values,
        raw=values,
        per=per,  # type: ignore[arg-type]  # one test gives the wrong kind on purpose
        layer=3,
        texts=(text,),
        text_of=(0,) * len(spans),
        spans=spans,
        band=torch.ones(len(spans)),
        rate=torch.full((len(spans),), 0.05),
        flags=((),),
        info={},
    )


def test_a_token_cannot_end_the_script_of_the_circuits_view():
    page = tokens_room.explore_tokens(scores()).html
    props = page.rsplit("CircuitsVis.render(", 1)[1]
    assert props.count("</script>") == 1  # the one that is ours
    assert props.rstrip().endswith("</script>")
    assert "<!--" not in props


def test_the_circuits_view_needs_no_network_and_is_the_same_twice():
    first, second = tokens_room.explore_tokens(scores()), tokens_room.explore_tokens(scores())
    assert first.html == second.html
    assert "unpkg.com" not in first.html.rsplit("CircuitsVis.render(", 1)[1]
    assert (
        first._repr_html_() == first.html
    )  # circuitsvis's own would ask the network and may answer with a link


def test_the_circuits_view_carries_every_token_unchanged():
    s = scores()
    props = tokens_room.explore_tokens(s).html.rsplit("CircuitsVis.render(", 1)[1]
    tokens = json.loads(
        re.search(r'"tokens": (\[.*?"\])', props)[1].replace("<\\/", "</").replace("<\\!--", "<!--")
    )  # type: ignore[index]
    assert tokens == [HOSTILE[a:b] for a, b in s.spans]


def test_the_circuits_view_shows_the_tokens_that_have_no_score():
    """The first token, an attention sink, is never scored; it belongs to the text all the same."""
    s = scores()
    cut = replace(
        s,
        values=s.values[1:-1],
        raw=s.raw[1:-1],
        text_of=s.text_of[1:-1],
        spans=s.spans[1:-1],
        band=s.band[1:-1],
        rate=s.rate[1:-1],
    )
    props = tokens_room.explore_tokens(cut).html.rsplit("CircuitsVis.render(", 1)[1]
    tokens = json.loads(
        re.search(r'"tokens": (\[.*?"\])', props)[1].replace("<\\/", "</").replace("<\\!--", "<!--")
    )  # type: ignore[index]
    assert "".join(tokens) == HOSTILE
    values = json.loads(re.search(r'"values": (\[\[.*?\]\])', props)[1])  # type: ignore[index]
    assert len(values) == len(tokens)
    assert values[0] == values[-1] == [0.0] * len(s.emotions)


def test_a_view_does_not_replace_a_file_of_another_kind(tmp_path):
    (tmp_path / "view.html").write_text("<p>mine</p>", encoding="utf-8")
    with pytest.raises(FileExistsError, match="holds something that emolens did not write"):
        tokens_room.explore_tokens(scores()).save(tmp_path / "view.html")
    tokens_room.explore_tokens(scores()).save(tmp_path / "view.html", overwrite=True)
    tokens_room.explore_tokens(scores()).save(tmp_path / "view.html")


def test_a_saved_view_is_a_whole_page(tmp_path):
    tokens_room.explore_tokens(scores(), emotions=["fear"]).save(tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>")


def test_explore_tokens_says_what_it_needs():
    with pytest.raises(ValueError, match="per='token'"):
        tokens_room.explore_tokens(scores(per="text"))
    with pytest.raises(IndexError, match="there is no text 2"):
        tokens_room.explore_tokens(scores(), text=2)
    with pytest.raises(KeyError, match="no emotion 'anger' here; there are: joy, fear"):
        tokens_room.explore_tokens(scores(), emotions=["anger"])


def test_an_svg_title_is_escaped_and_the_figure_scales():
    figure, axes = canvas()
    axes.plot([0, 1], [0, 1])
    text = plots.svg(figure, 'x" onload="alert(1)')
    assert 'onload="alert' not in text
    assert html.escape('x" onload="alert(1)') in text
    assert "width:100%" in text


def test_story_form_sees_how_a_text_is_built_and_not_what_it_says():
    short, long = (
        "He ran. She ran. I ran.",
        "He ran and then she ran and then, after a while, I ran as well.",
    )
    same = "She sat. He sat. I sat."
    a, b, c = stats.form_features([short, long, same])
    assert (a == c).all()
    assert a[2] < b[2]  # mean sentence length
    assert stats.form_features(['"Go," she said.'])[0, 0] > 0.2  # quoted share
    assert stats.form_features([""]).shape == (1, 14)  # an empty text is no error

"""How a figure gets into a page: as inline SVG, or as a picture of circuitsvis that needs no network."""

from __future__ import annotations

import hashlib
import io
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from emolens.readout import write_page


def svg(figure: Figure, title: str, alt: str = "") -> str:
    """The figure as inline SVG that scales with the page; `alt`, or the title, is read out by screen readers."""
    text = io.StringIO()
    # a salt of its own, so that clip paths of several figures in one page keep different names
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    ):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    head, rest = body.split(">", 1)
    return f'{head} role="img" aria-label="{escape(alt or title)}" style="width:100%;height:auto">{rest}'


class CircuitsView:
    """A circuitsvis picture that always shows from its bundled JavaScript, in a notebook, an exported page, online or not.

    circuitsvis itself asks the network at each display and then links to a server; and a token such as ``</script>`` would end its
    script. Here neither happens.
    """

    def __init__(self, figure: Any) -> None:
        head, props = figure.local_src.rsplit("CircuitsVis.render(", 1)
        props, tail = props.rsplit("</script>", 1)
        name = (
            "circuits-vis-" + hashlib.sha256(props.split(",", 1)[1].encode()).hexdigest()[:12]
        )  # the same at every run
        random = props.split('"')[1]
        html = (
            head
            + "CircuitsVis.render("
            + props.replace("</", "<\\/").replace("<!--", "<\\!--")
            + "</script>"
            + tail
        )
        self.html = html.replace(random, name)

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a page that opens offline; a page of emolens is replaced, another file is not."""
        write_page(path, self.html, overwrite=overwrite)

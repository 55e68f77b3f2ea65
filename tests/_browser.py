"""What a real browser makes of a page: its document after scripts have run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MARK = 'id="ran"'  # an attribute of <html> that the strings below would set
RUN = "document.all[0].id='ran'"
HOSTILE = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f'"><img src=x onerror="{RUN}">',
    f"'><svg onload=\"{RUN}\"></svg>",
    f"</svg></table></title></style><body onload=\"{RUN}\">",
    "\u202etfel ot thgir & <!-- ",
]  # fmt: skip


def document(page: str, folder: Path) -> str:
    """The document of a page once it has loaded; skips where there is no Chromium."""
    program = next(
        (
            p
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (p := shutil.which(name))
        ),
        None,
    )
    if program is None:
        pytest.skip("no Chromium on this machine")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=3000"]  # fmt: skip
    done = subprocess.run(
        [program, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
     encoding="utf-8")  # fmt: skip
    return done.stdout


def assert_inert(page: str, folder: Path) -> None:
    """Nothing of `HOSTILE` ran, and that it would have is seen on a page that does not escape it."""
    assert MARK in document("<html><body>" + HOSTILE[0], folder).split(">")[0]
    assert MARK not in document(page, folder).split("<head")[0]

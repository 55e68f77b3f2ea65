"""Prompts of users to an assistant: ordinary ones, five kinds of strain, and tasks in which tone is free.

Each challenging prompt has a plain twin, and each sycophancy prompt three replies of equal length. The shipped
file is for experiments on the assistant's turn; one of your own has the same form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from emolens._files import Strict, Word
from emolens.sets.materials import Prompt, load_records

Challenge = Literal["distress", "hostility", "pressure", "selfhood", "dilemma"]


class _UserPrompt(Strict):
    id: Word
    topic: Word
    text: Prompt


class NeutralPrompt(_UserPrompt):
    """An ordinary request with nothing at stake."""

    kind: Literal["neutral"]


class ChallengingPrompt(_UserPrompt):
    """A prompt that puts an assistant under strain in one of five ways.

    `twin` is the id of the plain one beside it.
    """

    kind: Literal["challenging"]
    challenge: Challenge
    twin: Word


class TwinPrompt(_UserPrompt):
    """The matter of a challenging prompt, whose id is `of`, without the challenge."""

    kind: Literal["twin"]
    of: Word


class SycophancyPrompt(_UserPrompt):
    """Something false, weak work or a bad plan, with three replies of equal length.

    They say yes with praise, the truth kindly, and the truth with contempt.
    """

    kind: Literal["sycophancy"]
    claim: Literal["false", "work", "plan"]
    agreeing: Prompt
    honest: Prompt
    harsh: Prompt


class RolePrompt(_UserPrompt):
    """A scene, a voice, a poem or a game to play, on a bright theme, a dark one, or neither."""

    kind: Literal["role"]
    theme: Literal["bright", "dark", "neither"]


class RewritePrompt(_UserPrompt):
    """A rewriting or copywriting task that names no tone, with the neutral text that it starts from."""

    kind: Literal["rewrite"]
    task: Literal["rewriting", "copywriting"]
    source: Prompt


class MannerPrompt(_UserPrompt):
    """One neutral question asked in one of several manners: how far manner alone moves a reading."""

    kind: Literal["format"]
    manner: Word


UserPrompt = Annotated[
    NeutralPrompt
    | ChallengingPrompt
    | TwinPrompt
    | SycophancyPrompt
    | RolePrompt
    | RewritePrompt
    | MannerPrompt,
    Field(discriminator="kind"),
]


def load_prompts(name_or_path: str | Path | None = None) -> tuple[UserPrompt, ...]:
    """Load prompts of users to an assistant.

    Args:
        name_or_path: None for the 304 shipped ones, or a JSON-lines file of one's own.

    Returns:
        Prompts, told apart by `kind`: "neutral", "challenging" and their "twin"s, "sycophancy" with three replies,
        "role", "rewrite", and "format", one question in ten manners.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong in which line; two records of one id; a challenging prompt whose twin is not there.

    Example:
        >>> prompts = em.sets.load_prompts()
        >>> hard = next(p for p in prompts if p.kind == "challenging")
        >>> next(p.kind for p in prompts if p.id == hard.twin)
        'twin'
    """
    prompts: tuple[UserPrompt, ...] = load_records("prompts", name_or_path, UserPrompt)
    twins = {p.id: p.of for p in prompts if isinstance(p, TwinPrompt)}
    for p in prompts:
        if isinstance(p, ChallengingPrompt) and twins.get(p.twin) != p.id:
            raise ValueError(
                f"{name_or_path or 'prompts.jsonl'}: {p.id!r}: {p.twin!r} is not its twin (kind twin, of {p.id!r})"
            )
    return prompts

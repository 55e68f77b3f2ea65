"""Which tokens an intervention acts on: of prompts by number, by text or by role, resolved before the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emolens._typing import HookedModel, Text
from emolens.collect.pooling import Pooling, pooled_positions
from emolens.models.points import device_of
from emolens.models.tokens import EncodedText, encode, pad
from emolens.sets.corpus import several

Where = Literal["all", "generation"]


@dataclass(frozen=True, eq=False)
class Positions:
    """Chosen tokens of particular prompts, and the very batch that they are columns of.

    Attributes:
        encoded: The prompts as tokens.
        chosen: For each prompt the chosen tokens, counted over its real tokens.
        padding_side: Of the batch that a raw run will use; `em.generate` and `em.sweep` pad for themselves.
        device: Where `tokens` and `attention_mask` are made.

    Raises:
        ValueError: choices for another number of prompts, or a token that a prompt does not have.
    """

    encoded: tuple[EncodedText, ...]
    chosen: tuple[tuple[int, ...], ...]
    padding_side: Literal["left", "right"] = "right"
    device: Any = "cpu"

    def __post_init__(self) -> None:
        if len(self.chosen) != len(self.encoded):
            raise ValueError(f"tokens of {len(self.chosen)} prompts, here are {len(self.encoded)}")
        for i, (e, chosen) in enumerate(zip(self.encoded, self.chosen, strict=True)):
            if wrong := [k for k in chosen if not 0 <= k < len(e.ids)]:
                raise ValueError(f"prompt {i} has tokens 0 to {len(e.ids) - 1}, not {wrong[0]}")

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The padded prompts, for ``model(p.tokens, attention_mask=p.attention_mask)``."""
        return pad(self.encoded, self.padding_side, self.device)[0]

    @property
    def attention_mask(self) -> Int[Tensor, "batch pos"]:
        """1 for real tokens."""
        return pad(self.encoded, self.padding_side, self.device)[1]

    @cached_property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """Which columns of the padded batch are chosen."""
        return self._columns(self.padding_side)

    @cached_property
    def mask_left(self) -> Bool[Tensor, "batch pos"]:
        """The same for a batch padded on the left, as generation needs it."""
        return self._columns("left")

    def _columns(self, side: str) -> Tensor:
        width = max(len(e.ids) for e in self.encoded)
        out = torch.zeros((len(self.encoded), width), dtype=torch.bool)
        for row, (e, chosen) in enumerate(zip(self.encoded, self.chosen, strict=True)):
            offset = width - len(e.ids) if side == "left" else 0
            out[row, [offset + k for k in chosen]] = True
        return out

    def take(self, rows: Sequence[int]) -> Positions:
        """The same for some of the prompts.

        Args:
            rows: Their numbers.

        Returns:
            `Positions` of these.

        Example:
            >>> em.positions(model, ["A walk?", "How would you feel?"], [0, -1]).take([1])
            Positions(2 tokens of 1 prompts)
        """
        return replace(
            self,
            encoded=tuple(self.encoded[i] for i in rows),
            chosen=tuple(self.chosen[i] for i in rows),
        )

    def __repr__(self) -> str:
        return f"Positions({sum(map(len, self.chosen))} tokens of {len(self.encoded)} prompts)"


def positions(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    where: Literal["prompt", "last"] | Sequence[int] | Pooling = "prompt",
    *,
    padding_side: Literal["left", "right"] = "right",
    prepend_bos: bool | None = None,
) -> Positions:
    """Choose tokens of prompts exactly, for the `positions` of a hook.

    Args:
        model: From `em.load_model`, or your own.
        prompts: One or several texts or chats.
        where: "prompt" (every real token), "last" (the last real one), token numbers (the same for every prompt; negative ones count
            from the end), or `em.char_span([...])` (the tokens of some characters or words), `em.every_token(skip=1)` (all but the first).
        padding_side: Of the batch that you will run.
        prepend_bos: As in `em.score`.

    Returns:
        `Positions`; run its own `tokens` and `attention_mask` with the hooks that were made from it.

    Raises:
        ValueError: a token past the end; a span that lies nowhere.

    Example:
        >>> p = em.positions(model, ["A walk?", "How would you feel about a walk?"], "last")
        >>> p, p.mask.sum(-1).tolist(), p.tokens.shape == p.attention_mask.shape
        (Positions(2 tokens of 2 prompts), [1, 1], True)
        >>> hooks = em.steer_resid_post(directions["glimmer"], layer=1, dose=0.1, positions=p)
        >>> with model.hooks(fwd_hooks=hooks):
        ...     logits = model(p.tokens, attention_mask=p.attention_mask)
        >>> em.positions(model, "A walk, then?", em.char_span(["walk"]))
        Positions(... tokens of 1 prompts)
    """
    texts = several(prompts)
    encoded = encode(model, texts, prepend_bos=prepend_bos)
    if isinstance(where, str):
        if where not in ("prompt", "last"):
            raise ValueError(
                f"where={where!r}; allowed: 'prompt', 'last', token numbers, em.char_span([...])"
            )
        chosen = [
            tuple(range(len(e.ids))) if where == "prompt" else (len(e.ids) - 1,) for e in encoded
        ]
    elif isinstance(where, Pooling):
        if where.spans is not None and len(where.spans) != len(encoded):
            raise ValueError(f"char_span: {len(where.spans)} spans for {len(encoded)} prompts")
        chosen = [tuple(pooled_positions(e, where, i, "")) for i, e in enumerate(encoded)]
    else:
        chosen = []
        for i, e in enumerate(encoded):
            n = len(e.ids)
            for k in where:
                if not -n <= k < n:
                    raise ValueError(
                        f"position {k} is past the end of prompt {i}, which has {n} tokens"
                    )
            chosen.append(tuple(sorted({k % n for k in where})))
    return Positions(tuple(encoded), tuple(chosen), padding_side, device_of(model))


def check_where(positions: Any) -> None:
    """Refuse what is no choice of tokens for a hook."""
    if not isinstance(positions, Positions) and positions not in get_args(Where):
        raise ValueError(
            f"positions={positions!r}; allowed: 'all', 'generation', or em.positions(model, prompts, ...)"
        )


class Window:
    """Which columns of the whole left-padded sequence the model is looking at; moved by the loop that owns it.

    Args:
        width: Of the prompts, padded.
        start: Of the current call.
    """

    def __init__(self, width: int, start: int = 0) -> None:
        self.width, self.start = width, start

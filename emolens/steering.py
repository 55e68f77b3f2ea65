"""Continue prompts with any hooks in place: cached, padded on the left with its mask, the same on either backend.

A row does not depend on the others in its batch, nor on the cache, nor (sampling) on anything but the seed, its number and the step.
Hooks see the prompt and then one token at a time. With directions to read, every new token is scored as it is written, after the other
hooks of that layer. What steering does to the text is measured in `sweeps`, one floor up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emolens._typing import HookedModel, hook_name
from emolens.directions import EmotionDirections
from emolens.interventions import Hook, Hooks, Window, prompts_of, validate
from emolens.models import Decoder, EncodedText, Text, encode, model_info, pad
from emolens.readout import check_model
from emolens.tokens import text_after

Stop = str | int | Sequence[str | int]

# --- where a text ends ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """Where the text of a row ends: before any of these tokens, and before any of these strings."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: Any = field(repr=False)

    def text(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """What new tokens say behind the tokens `before`, up to the first of the strings."""
        text = text_after(self.tokenizer, before, ids)
        return text[: min((text.find(s) for s in self.strings if s in text), default=len(text))]

    def reached(self, before: Sequence[int], ids: Sequence[int]) -> bool:
        """Whether a string has been written."""
        return bool(self.strings) and len(self.text(before, ids)) < len(text_after(self.tokenizer, before, ids))

    def kept(self, before: Sequence[int], ids: Sequence[int]) -> list[int]:
        """The tokens up to the one that completes the text."""
        text = self.text(before, ids)
        n = next(n for n in range(len(ids) + 1) if text_after(self.tokenizer, before, ids[:n]).startswith(text))
        return list(ids[:n])


def ends(model: HookedModel, stop: Stop = ()) -> Ends:
    """Where generation ends: at the model's own stop tokens (`model_info(model).stop_tokens`, and its tokenizer's EOS as it is now), and at
    what is given.

    Args:
        stop: Token numbers, and strings; the name of a special token is that token.

    Raises:
        ValueError: a token that the vocabulary does not have, or an empty string.
    """
    tokenizer: Any = model.tokenizer  # type: ignore[attr-defined]  # encode has asked for it
    special = tokenizer.get_added_vocab()
    tokens, strings = {tokenizer.eos_token_id, *model_info(model).stop_tokens.values()} - {None}, []
    for given in [stop] if isinstance(stop, str | int | float) else stop:
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise ValueError(f"stop={given!r}: a token number, or a string that is not empty")
        if isinstance(given, int) and not 0 <= given < model.cfg.d_vocab:
            raise ValueError(f"stop={given}: this model has tokens 0 to {model.cfg.d_vocab - 1}")
        if isinstance(given, int) or given in special:
            tokens.add(special.get(given, given))
        else:
            strings.append(given)
    return Ends(frozenset(tokens), tuple(strings), tokenizer)


# --- generation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Generations:
    """What a model wrote.

    Attributes:
        prompts: As they were read (chats rendered).
        texts: The new text of each prompt, without special tokens; behind its prompt it is what was written.
        tokens: The new tokens of each prompt, up to its end.
        emotions: Of the readout, if one was asked for.
        scores: For each prompt `[token emotion]`: z of every new token against neutral text at its position.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    emotions: tuple[str, ...] = ()
    scores: tuple[Float[Tensor, "token emotion"], ...] = ()

    def __repr__(self) -> str:
        lines = []
        for i, (prompt, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            lines.append(f"{prompt!r} -> {text!r}" + (f"  ({self.top(i)})" if self.scores else ""))
        return "\n".join(lines)

    def top(self, row: int, k: int = 3) -> str:
        """The emotions with the highest mean score over the new tokens of a prompt."""
        if not self.scores:
            raise ValueError("no scores: generate(..., read=directions)")
        mean = self.scores[row].mean(0)
        best = mean.argsort(descending=True)[:k].tolist()
        return ", ".join(f"{self.emotions[i]} {mean[i]:+.1f}" for i in best)


def generate(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    hooks: Hooks | None = None,
    *,
    max_new_tokens: int = 40,
    stop: Stop = (),
    temperature: float | int = 0.0,
    top_p: float | int = 1.0,
    seed: int = 0,
    items: Sequence[int] | None = None,
    read: EmotionDirections | None = None,
    layer: SupportsIndex | None = None,
    watch: bool | Callable[[str, dict[str, float]], None] = False,
    cache: bool = True,
    prepend_bos: bool | None = None,
    allow_other_model: bool = False,
) -> Generations:
    """Continue prompts, with any hooks in place.

    Prompts are padded on the left with their mask, on either backend; a row does not depend on the others in its batch.

    Args:
        prompts: One or several texts or chats. After a turn of the user the assistant begins; a last turn of the assistant is continued.
        hooks: From `steer_resid_post` and its siblings, or anyone's (which see each step: the prompt, then one token at a time).
        max_new_tokens: At most; a row ends before any of the model's own stop tokens (``em.model_info(model).stop_tokens``).
        stop: More ends: token numbers or strings, before the first of which the text is cut; the name of a special token is that token.
        temperature: 0 takes the likeliest token; above, samples. The noise is keyed by (seed, item, step).
        top_p: Sample from the smallest set of tokens with this probability.
        items: Number of each prompt in the key of the noise, where the prompts are a part of more; None counts from 0.
        read: Directions to score every new token with, as it is written.
        layer: Of the readout; None is the directions' default.
        watch: Show the text of the first prompt and its score as it is written, or call a function with both.
        cache: Keep keys and values; without, every step reads the whole text again (same result, slow).

    Returns:
        `Generations`.

    Raises:
        ValueError: hooks of another model, or rows that do not match the prompts; a prompt and its continuation longer than the context.
        FloatingPointError: NaN or infinity, with the layer and the type: half precision overflows, or a dose is too large.

    Example:
        ``em.generate(model, "I opened the door and", em.steer_resid_post(v["joy"], dose=0.1), read=v)``
    """
    hooks = list(hooks or [])
    texts = prompts_of(prompts)
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: at least 1, at least 0, in (0, 1]"
        )
    encoded = encode(model, texts, prepend_bos=prepend_bos)
    end = ends(model, stop)
    longest = max(len(e.ids) for e in encoded)
    if longest + max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"{longest} tokens of prompt and {max_new_tokens} new ones; this model reads {model.cfg.n_ctx}"
        )
    validate(model, hooks, encoded=encoded, allow_other_model=allow_other_model)
    reader = None if read is None else _Reader(model, read, layer, encoded, allow_other_model)
    numbers = list(range(len(texts))) if items is None else list(items)
    if len(numbers) != len(texts) or any(n < 0 for n in numbers):
        raise ValueError(f"items={numbers}: one number, 0 or more, for each of the {len(texts)} prompts")
    ids = decode(
        model, encoded, hooks, max_new_tokens, end=end, temperature=temperature, top_p=top_p, seed=seed, items=numbers, reader=reader,
        cache=cache, tell=_line(watch, encoded[0].ids, end),
    )  # fmt: skip
    return Generations(
        prompts=tuple(e.text for e in encoded),
        texts=tuple(end.text(e.ids, row) for e, row in zip(encoded, ids, strict=True)),
        tokens=tuple(tuple(row) for row in ids),
        emotions=read.emotions if read is not None else (),
        scores=tuple(reader.rows(i, len(row)) for i, row in enumerate(ids)) if reader is not None else (),
    )


class _Reader:
    """Scores each token when the model has read it: the hook of one layer, after every other hook there."""

    def __init__(
        self,
        model: HookedModel,
        v: EmotionDirections,
        layer: SupportsIndex | None,
        encoded: list[EncodedText],
        allow: bool,
    ) -> None:
        check_model(model, v.info["model"], allow_other_model=allow)
        self.v = v.at(v.layer if layer is None else layer)
        self.lengths = torch.tensor([len(e.ids) for e in encoded])
        self.seen: list[Tensor] = []
        self.hook = (hook_name(self.v.hook_point, self.v.layer), self)

    def __call__(self, act: Tensor, hook: Any) -> None:
        last = act[:, -1:].detach().float().cpu()
        z = self.v.token_z(last, self.lengths - 1 + len(self.seen))[
            :, :, 0
        ]  # the first call reads the prompt's last token
        self.seen.append(z)

    def now(self, row: int) -> dict[str, float]:
        return dict(zip(self.v.emotions, self.seen[-1][row].tolist(), strict=True)) if len(self.seen) > 1 else {}

    def rows(self, row: int, n: int) -> Tensor:
        return torch.stack([z[row] for z in self.seen[1 : n + 1]]) if n else torch.zeros((0, len(self.v.emotions)))


@torch.no_grad()
def decode(
    model: Any, encoded: Sequence[EncodedText], hooks: Hooks, max_new_tokens: int, *, end: Ends, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0, items: Sequence[int] | None = None, reader: _Reader | None = None, cache: bool = True, tell: Callable[[list[int], dict[str, float]], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The new tokens of each row up to its end, for a caller that has checked what it asks for (`generate`, `em.sweep`)."""
    tokens, mask = pad(encoded, "left", getattr(model.cfg, "device", "cpu"))
    window = Window(tokens.shape[1])
    bound = [(name, h.within(window) if isinstance(h, Hook) else h) for name, h in hooks]
    bound += [reader.hook] if reader is not None else []
    done = [False] * len(encoded)
    out: list[list[int]] = [[] for _ in encoded]
    whole, decoder = tokens, Decoder(model, mask)
    with model.hooks(fwd_hooks=bound):
        x = tokens
        for step in range(max_new_tokens + (reader is not None)):  # a reader sees a token one step after it was written
            if cache:
                logits = decoder(x)
                window.start += x.shape[1]
            else:
                grown = torch.cat([mask, mask.new_ones((len(mask), whole.shape[1] - mask.shape[1]))], 1)
                logits = Decoder(model, grown)(whole, keep=False)
            if tell is not None and step:
                tell(out[0], reader.now(0) if reader is not None else {})
            if step == max_new_tokens or all(done):
                break
            chosen = _choose(logits.float(), temperature, top_p, seed, items or range(len(encoded)), step)
            for row, token in enumerate(chosen):
                done[row] = done[row] or token in end.tokens
                if not done[row]:
                    out[row].append(token)
                    done[row] = end.reached(encoded[row].ids, out[row])
            x = torch.tensor(chosen, device=tokens.device)[:, None]
            whole = torch.cat([whole, x], 1)
            if all(done) and reader is None:
                break
    return [end.kept(e.ids, row) if end.strings else row for e, row in zip(encoded, out, strict=True)]


def _choose(logits: Tensor, temperature: float, top_p: float, seed: int, items: Sequence[int], step: int) -> list[int]:
    """The next token of each row: the likeliest, or the inverse of the distribution function at noise keyed by (seed, item, step)."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    total = p.cumsum(-1)
    kept = total[:, :1].clone()
    inside = total - p < top_p  # the first token always is
    kept = torch.where(inside, total, 0).amax(-1)
    keys = [np.random.Philox(key=seed, counter=[item, step, 0, 0]) for item in items]
    u = torch.tensor([np.random.Generator(k).random() for k in keys], dtype=total.dtype, device=total.device) * kept
    index = (total < u[:, None]).sum(-1).clamp_max(p.shape[-1] - 1)
    return order.gather(1, index[:, None])[:, 0].tolist()


def _line(
    watch: bool | Callable[[str, dict[str, float]], None], prompt: list[int], end: Ends
) -> Callable[[list[int], dict[str, float]], None] | None:
    """A function that shows the text so far: on one line of a terminal, in place in Jupyter, or the caller's own."""
    if watch is False:
        return None
    if callable(watch):
        return lambda ids, z: watch(end.text(prompt, ids), z)
    handle: list[Any] = []
    jupyter = "ipykernel" in sys.modules

    def show(ids: list[int], z: dict[str, float]) -> None:
        best = max(z, key=lambda e: z[e]) if z else ""
        mood = f"{best} {z[best]:+.1f}" if best else ""
        text = end.text(prompt, ids).replace("\n", " ")
        if jupyter:
            from IPython.display import display

            data = {"text/plain": f"{mood:>18}  {text}"}
            if handle:
                handle[0].update(data, raw=True)
            else:
                handle.append(display(data, raw=True, display_id=True))
        else:
            sys.stderr.write(f"\r\x1b[2K{mood:>18}  {text[-90:]}")
            sys.stderr.flush()

    return show

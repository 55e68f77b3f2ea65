"""Continue prompts with any hooks in place: cached, padded on the left with its mask, the same on either backend.

A row does not depend on the others in its batch, nor on the cache, nor (sampling) on anything but the seed, its number and the step.
Hooks see the prompt and then one token at a time. With directions to read, the text is read again without any hook (`read_written`): a
readout of the steered stream would find the vector that was added. What steering does to the text is measured in `sweeps`, one floor up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emolens._table import Table
from emolens._typing import HookedModel, Text, hook_name, typed
from emolens.directions.value import EmotionDirections
from emolens.interventions.check import validate
from emolens.interventions.hooks import Hook, Hooks
from emolens.interventions.positions import Window
from emolens.models.identity import check_model, model_info
from emolens.models.points import device_of
from emolens.models.running import Decoder, run_to
from emolens.models.tokens import EncodedText, encode, pad, text_after
from emolens.sets.corpus import several

Stop = str | int | Sequence[str | int]


@dataclass(frozen=True)
class Decoding:
    """How many tokens are written at most, and how each is chosen.

    Attributes:
        max_new_tokens: At least 1.
        temperature: 0 takes the likeliest token; above, samples.
        top_p: Sample from the smallest set of tokens with this probability, above 0 and at most 1.
        seed: Of the noise, which is keyed by (seed, item, step).

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> em.Decoding(max_new_tokens=60, temperature=0.8)
        Decoding(max_new_tokens=60, temperature=0.8, top_p=1.0, seed=0)
    """

    max_new_tokens: int = 40
    temperature: float | int = 0.0
    top_p: float | int = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_p={self.top_p}: "
                "at least 1, at least 0, in (0, 1]"
            )


GREEDY = Decoding()


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
        return bool(self.strings) and len(self.text(before, ids)) < len(
            text_after(self.tokenizer, before, ids)
        )

    def kept(self, before: Sequence[int], ids: Sequence[int]) -> list[int]:
        """The tokens up to the one that completes the text."""
        text = self.text(before, ids)
        n = next(
            n
            for n in range(len(ids) + 1)
            if text_after(self.tokenizer, before, ids[:n]).startswith(text)
        )
        return list(ids[:n])


def ends(model: HookedModel, stop: Stop = ()) -> Ends:
    """Where generation ends: at the model's own stop tokens and strings, and at what is given.

    Its own are `stop_tokens` and `stop_strings` of `model_info(model)`, and its tokenizer's EOS as it is now.

    Args:
        model: That writes.
        stop: Token numbers, and strings; the name of a special token is that token.

    Raises:
        ValueError: a token that the vocabulary does not have, or an empty string.
    """
    tokenizer = model.tokenizer
    special = tokenizer.get_added_vocab()
    info = model_info(model)
    tokens, strings = {tokenizer.eos_token_id, *info.stop_tokens.values()} - {None}, []
    for given in (*info.stop_strings, *([stop] if isinstance(stop, str | int | float) else stop)):
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise ValueError(f"stop={given!r}: a token number, or a string that is not empty")
        if isinstance(given, int) and not 0 <= given < model.cfg.d_vocab:
            raise ValueError(f"stop={given}: this model has tokens 0 to {model.cfg.d_vocab - 1}")
        if isinstance(given, int) or given in special:
            tokens.add(special.get(given, given))
        else:
            strings.append(given)
    return Ends(frozenset(tokens), tuple(strings), tokenizer)


ReadWith = Literal["unsteered", "as generated"]


@typed
@dataclass(frozen=True, eq=False)
class Generations:
    """What a model wrote.

    Attributes:
        prompts: As they were read (chats rendered).
        texts: The new text of each prompt, without special tokens; behind its prompt it is what was written.
        tokens: The new tokens of each prompt, up to its end.
        emotions: Of the readout, if one was asked for.
        scores: For each prompt `[token emotion]`: z of every new token against neutral text at its position.
        read_with: Who read it: the unsteered model, or the model with its hooks ("as generated").
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    emotions: tuple[str, ...] = ()
    scores: tuple[Float[Tensor, "_ emotion"], ...] = ()
    read_with: ReadWith = "unsteered"

    def __repr__(self) -> str:
        lines = []
        for i, (prompt, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            lines.append(f"{prompt!r} -> {text!r}" + (f"  ({self.mood(i)})" if self.scores else ""))
        return "\n".join(lines)

    def top(self, row: int, k: int = 3) -> Table:
        """The emotions with the highest mean score over the new tokens of a prompt.

        Args:
            row: Number of the prompt.
            k: How many at most.

        Returns:
            `Table` of emotion and z (standard deviations of neutral text), the highest first.

        Raises:
            ValueError: nothing was read.

        Example:
            >>> written = em.generate(model, "She", max_new_tokens=2, read=directions)
            >>> sorted(written.top(0, k=4)["emotion"])
            ['brindle', 'glimmer', 'gloamer', 'tarrow']
        """
        if not self.scores:
            raise ValueError("no scores: generate(..., read=directions)")
        mean = self.scores[row].mean(0)
        best = mean.argsort(descending=True)[:k].tolist()
        return Table(("emotion", "z"), tuple((self.emotions[i], float(mean[i])) for i in best))

    def mood(self, row: int, k: int = 3) -> str:
        """`top` on one line.

        Args:
            row: Number of the prompt.
            k: How many at most.

        Returns:
            Such as "fear +3.0, joy +2.0".

        Raises:
            ValueError: nothing was read.

        Example:
            >>> z = torch.tensor([[2.0, 3.0], [2.0, 3.0]])
            >>> em.Generations(("She",), (" ran off",), ((5, 7),), ("joy", "fear"), (z,)).mood(0)
            'fear +3.0, joy +2.0'
        """
        return ", ".join(f"{emotion} {z:+.1f}" for emotion, z in self.top(row, k))


def generate(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    hooks: Hooks | None = None,
    *,
    max_new_tokens: int | None = None,
    decoding: Decoding = GREEDY,
    stop: Stop = (),
    items: Sequence[int] | None = None,
    read: EmotionDirections | None = None,
    read_with: ReadWith = "unsteered",
    layer: SupportsIndex | None = None,
    watch: bool | Callable[[str, dict[str, float]], None] = False,
    cache: bool = True,
    prepend_bos: bool | None = None,
    allow_other_model: bool = False,
) -> Generations:
    """Continue prompts, with any hooks in place.

    Prompts are padded on the left with their mask, on either backend; a row does not depend on the others in its batch.

    Args:
        model: From `em.load_model`, or your own.
        prompts: One or several texts or chats. After a turn of the user the assistant begins; a last turn of the assistant is continued.
        hooks: From `steer_resid_post` and its siblings, or anyone's (which see each step: the prompt, then one token at a time).
        max_new_tokens: At most, in place of what `decoding` says; a row ends before any of the model's own ends (`stop_tokens` and
            `stop_strings` of ``em.model_info(model)``).
        decoding: How many tokens, and how they are chosen: `em.Decoding`, by default 40 greedily.
        stop: More ends: token numbers or strings, before the first of which the text is cut; the name of a special token is that token.
        items: Number of each prompt in the key of the noise, where the prompts are a part of more; None counts from 0.
        read: Directions to score every new token with.
        read_with: "unsteered" reads the finished text with no hook, so that what is scored is the text; "as generated" reads the stream that
            wrote it, after the other hooks of that layer: after steering it finds the very vector that was added.
        layer: Of the readout; None is the directions' default.
        watch: Show the text of the first prompt and its score as it is written, or call a function with both (slower: hooks are taken off
            at each step, and the unsteered model reads the text so far).
        cache: Keep keys and values; without, every step reads the whole text again (same result, slow).
        prepend_bos: As in `em.score`.
        allow_other_model: Take directions of another model with the same shape.

    Returns:
        `Generations`.

    Raises:
        ValueError: hooks or directions of another model, or directions that cannot read tokens (`EmotionDirections.scale`); rows that do not
            match the prompts; a prompt and its continuation longer than the context.
        FloatingPointError: NaN or infinity, with the layer and the type: half precision overflows, or a dose is too large.

    Example:
        >>> hooks = em.steer_resid_post(directions["glimmer"], layer=1, dose=0.1)
        >>> written = em.generate(model, ["I opened the door and", "She"], hooks, max_new_tokens=4, read=directions)
        >>> [len(ids) for ids in written.tokens], written.top(0).columns
        ([4, 4], ('emotion', 'z'))
        >>> sampled = em.generate(model, "She", decoding=em.Decoding(max_new_tokens=4, temperature=0.8, seed=1))
    """
    hooks = list(hooks or [])
    texts = several(prompts)
    if max_new_tokens is not None:
        decoding = replace(decoding, max_new_tokens=max_new_tokens)
    encoded = encode(model, texts, prepend_bos=prepend_bos)
    end = ends(model, stop)
    longest = max(len(e.ids) for e in encoded)
    if longest + decoding.max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"{longest} tokens of prompt and {decoding.max_new_tokens} new ones; this model reads {model.cfg.n_ctx}"
        )
    validate(model, hooks, encoded=encoded, allow_other_model=allow_other_model)
    if read_with not in get_args(ReadWith):
        raise ValueError(f"read_with={read_with!r}; allowed: 'unsteered', 'as generated'")
    v = None
    if read is not None:
        check_model(model, read.info["model"], allow_other_model=allow_other_model)
        v = read.at(read.layer if layer is None else layer)
        v.scale("token")
    reader = _Reader(v, encoded) if v is not None and read_with == "as generated" else None
    numbers = list(range(len(texts))) if items is None else list(items)
    if len(numbers) != len(texts) or any(n < 0 for n in numbers):
        raise ValueError(
            f"items={numbers}: one number, 0 or more, for each of the {len(texts)} prompts"
        )

    def score(rows: Sequence[EncodedText], written: list[list[int]]) -> list[Tensor]:
        assert v is not None
        if not any(written):
            return [torch.zeros((0, len(v.emotions)))] * len(written)
        new = torch.tensor([row + [-1] * (max(map(len, written)) - len(row)) for row in written])
        return [
            z[: len(row)]
            for z, row in zip(read_written(model, rows, new, v)[1], written, strict=True)
        ]

    def now(row: list[int]) -> dict[str, float]:
        """The score of the last token that the first prompt has."""
        if v is None or not row:
            return {}
        z = reader.seen[-1][0] if reader is not None else score(encoded[:1], [row])[0][-1]
        return dict(zip(v.emotions, z.tolist(), strict=True))

    show = _line(watch, encoded[0].ids, end)
    tell = show and (lambda row: show(row, now(row)))
    ids = decode(model, encoded, hooks, decoding, end=end, items=numbers, reader=reader, cache=cache, tell=tell)  # fmt: skip
    scores: list[Tensor] = []
    if v is not None:
        scores = (
            score(encoded, ids)
            if reader is None
            else [reader.rows(i, len(row)) for i, row in enumerate(ids)]
        )
    return Generations(
        prompts=tuple(e.text for e in encoded),
        texts=tuple(end.text(e.ids, row) for e, row in zip(encoded, ids, strict=True)),
        tokens=tuple(tuple(row) for row in ids),
        emotions=read.emotions if read is not None else (),
        scores=tuple(scores),
        read_with=read_with,
    )


@torch.no_grad()
def read_written(
    model: HookedModel,
    encoded: Sequence[EncodedText],
    new: Int[Tensor, "row token"],
    directions: EmotionDirections | None = None,
    *,
    to: int | None = None,
) -> tuple[Float[Tensor, "row token d_model"], Float[Tensor, "row token emotion"]]:
    """Read what was written once more, without any hook: what the unsteered model makes of the text.

    Args:
        encoded: The prompts.
        new: What was written after each, -1 behind its end (where the result means nothing).
        directions: Of one layer; without, the scores have no emotion.
        to: The block before which the pass ends; None is the first that the directions need no more.

    Returns:
        The stream there at the token before each new one, for its probability; and z of each new token at its position.
    """
    tokens, mask = pad(encoded, "left", device_of(model))
    new, width = new.to(tokens.device), new.shape[1]
    whole, seen = torch.cat([tokens, new.clamp_min(0)], 1), torch.cat([mask, (new >= 0).long()], 1)
    kept: list[Tensor] = []
    listen = []
    if directions is not None:
        name = hook_name(directions.hook_point, directions.layer)
        listen = [(name, lambda act, hook: kept.append(act[:, -width:].float().cpu()))]
        to = directions.layer + 1 if to is None else to
    with model.hooks(fwd_hooks=listen):
        resid = run_to(model, whole, seen, model.cfg.n_layers if to is None else to)
        resid = resid[:, -width - 1 : -1]
    if directions is None:
        return resid, torch.zeros((*new.shape, 0))
    at = mask.sum(-1).cpu()[:, None] + torch.arange(width)
    z = directions.token_z(kept[0].flatten(0, 1)[:, None], at.flatten())[..., 0]
    return resid, z.unflatten(0, at.shape)


class _Reader:
    """Scores each token when the model has read it, as it is generated: the hook of one layer, after every other hook there."""

    def __init__(self, directions: EmotionDirections, encoded: list[EncodedText]) -> None:
        self.directions = directions
        self.lengths = torch.tensor([len(e.ids) for e in encoded])
        self.seen: list[Tensor] = []
        self.hook = (hook_name(directions.hook_point, directions.layer), self)

    def __call__(self, act: Tensor, hook: Any) -> None:
        last = act[:, -1:].detach().float().cpu()
        # the first call reads the prompt's last token
        z = self.directions.token_z(last, self.lengths - 1 + len(self.seen))
        self.seen.append(z[:, :, 0])

    def rows(self, row: int, n: int) -> Tensor:
        if not n:
            return torch.zeros((0, len(self.directions.emotions)))
        return torch.stack([z[row] for z in self.seen[1 : n + 1]])


@torch.no_grad()
def decode(
    model: HookedModel,
    encoded: Sequence[EncodedText],
    hooks: Hooks,
    decoding: Decoding,
    *,
    end: Ends,
    items: Sequence[int] | None = None,
    reader: _Reader | None = None,
    cache: bool = True,
    tell: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each row up to its end, for a caller that has checked what it asks for (`generate`, `em.sweep`)."""
    tokens, mask = pad(encoded, "left", device_of(model))
    window = Window(tokens.shape[1])
    bound = [(name, h.within(window) if isinstance(h, Hook) else h) for name, h in hooks]
    bound += [reader.hook] if reader is not None else []
    done = [False] * len(encoded)
    out: list[list[int]] = [[] for _ in encoded]
    whole, decoder = tokens, Decoder(model, mask)
    # whoever is told reads with the model, and without these hooks: then they are put on anew, slowly, for each step
    alone = tell is not None and reader is None and bool(hooks)
    with nullcontext() if alone else model.hooks(fwd_hooks=bound):
        x = tokens
        # a reader sees a token one step after it was written
        for step in range(decoding.max_new_tokens + (reader is not None)):
            with model.hooks(fwd_hooks=bound) if alone else nullcontext():
                if cache:
                    logits = decoder(x)
                    window.start += x.shape[1]
                else:
                    new = mask.new_ones((len(mask), whole.shape[1] - mask.shape[1]))
                    logits = Decoder(model, torch.cat([mask, new], 1))(whole, keep=False)
            if tell is not None and reader is not None and step:
                tell(out[0])
            if step == decoding.max_new_tokens or all(done):
                break
            chosen = _choose(logits.float(), decoding, items or range(len(encoded)), step)
            for row, token in enumerate(chosen):
                done[row] = done[row] or token in end.tokens
                if not done[row]:
                    out[row].append(token)
                    done[row] = end.reached(encoded[row].ids, out[row])
            x = torch.tensor(chosen, device=tokens.device)[:, None]
            whole = torch.cat([whole, x], 1)
            if tell is not None and reader is None and not done[0]:
                tell(out[0])
            if all(done) and reader is None:
                break
    return [
        end.kept(e.ids, row) if end.strings else row for e, row in zip(encoded, out, strict=True)
    ]


def _choose(logits: Tensor, decoding: Decoding, items: Sequence[int], step: int) -> list[int]:
    """The next token of each row: the likeliest, or the inverse of the distribution function at noise keyed by (seed, item, step)."""
    if decoding.temperature == 0:
        return logits.argmax(-1).tolist()
    p, order = (logits / decoding.temperature).softmax(-1).sort(-1, descending=True)
    total = p.cumsum(-1)
    inside = total - p < decoding.top_p  # the first token always is
    kept = torch.where(inside, total, 0).amax(-1)
    keys = [np.random.Philox(key=decoding.seed, counter=[item, step, 0, 0]) for item in items]
    noise = [np.random.Generator(key).random() for key in keys]
    u = torch.tensor(noise, dtype=total.dtype, device=total.device) * kept
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

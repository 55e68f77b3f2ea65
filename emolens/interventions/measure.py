"""One pass of a sweep: many vectors as the rows of shared batches, read against the unsteered model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from emolens._typing import HookedModel, hook_name, typed
from emolens.directions.value import EmotionDirections
from emolens.interventions.generate import Decoding, Stop, decode, ends, read_written
from emolens.interventions.hooks import Hook, Hooks
from emolens.interventions.positions import Where, Window
from emolens.interventions.verbs import steer_at
from emolens.models.points import device_of
from emolens.models.running import (
    Decoder,
    can_start_at_layer,
    out_of_memory,
    run_from,
    run_to,
    unembed,
)
from emolens.models.tokens import EncodedText, pad, word_tokens

TargetWords = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Cell:
    """One thing added: a direction of an emotion (control None) or of a control, at a layer, with a dose.

    Attributes:
        direction: Name of the emotion, or of the control's own direction.
        control: Name of the control; None for an emotion.
        layer: Block.
        dose: In median residual norms.
    """

    direction: str
    control: str | None
    layer: int
    dose: float


@typed
@dataclass(frozen=True, eq=False)
class Written:
    """What was written with each cell in place, greedily, and how the unsteered model reads it.

    A low perplexity is no praise: a text that repeats itself has one. Read it beside `distinct` and `length`.

    Attributes:
        texts: For each cell the new text of each prompt.
        length: `[cell prompt]`, new tokens before the end.
        distinct: `[cell prompt]`, share of different ones among the pairs of neighbouring tokens; NaN below two tokens.
        log_perplexity: `[cell prompt]`, mean negative log-probability under the unsteered model, nats a token; NaN for an empty text.
        score: `[cell prompt emotion]`, mean z of the new tokens against neutral text at their position, without any hook; None without `read`.
        emotions: Of the score.
    """

    texts: tuple[tuple[str, ...], ...]
    length: Float[Tensor, "cell prompt"]
    distinct: Float[Tensor, "cell prompt"]
    log_perplexity: Float[Tensor, "cell prompt"]
    score: Float[Tensor, "cell prompt emotion"] | None = None
    emotions: tuple[str, ...] = ()

    def take(self, cells: Sequence[int]) -> Written:
        """Some of the cells.

        Args:
            cells: Their numbers.

        Returns:
            A new `Written`.
        """
        kept = list(cells)
        return replace(
            self,
            texts=tuple(self.texts[i] for i in kept),
            length=self.length[kept],
            distinct=self.distinct[kept],
            log_perplexity=self.log_perplexity[kept],
            score=None if self.score is None else self.score[kept],
        )


def vector_of(directions: EmotionDirections, c: Cell) -> Float[Tensor, " d_model"]:
    """What a cell adds: dose m v."""
    size = c.dose * float(directions.norm_median[directions.slot(c.layer)])
    return size * directions.unit(c.layer)[directions.index(c.direction)]


def cut_prompt(e: EncodedText, n: int) -> EncodedText:
    """The first tokens of a text."""
    return EncodedText(e.text, e.ids[:n], e.offsets[:n])


class Run:
    """The prompts, the unsteered model's answers, and the streams before each steered block."""

    def __init__(
        self, model: HookedModel, encoded: list[EncodedText], neutral: list[EncodedText], words: dict[str, list[str]],
        positions: Where = "all", batch_tokens: int = 4096, max_new_tokens: int = 0, reader: EmotionDirections | None = None,
        layers: Sequence[int] = (), stop: Stop = (),
    ) -> None:  # fmt: skip
        self.model, self.encoded, self.neutral = model, encoded, neutral
        self.batch_tokens, self.max_new_tokens = batch_tokens, max_new_tokens
        self.reader, self.end, self.positions = reader, ends(model, stop), positions
        self.device = device_of(model)
        self.splits = 0
        # the tokens of each word after each prompt
        self.words = {
            e: [[tuple(word_tokens(model.tokenizer, w, p.text)) for p in encoded] for w in ws]
            for e, ws in words.items()
        }
        every = [ids for ws in self.words.values() for w in ws for ids in w]
        self.prefixes = sorted(
            {ids[:k] for ids in every for k in range(1, len(ids))}, key=lambda p: (len(p), p)
        )
        # the tokens whose probability is wanted after each: a whole vocabulary for every prefix would fill the memory
        self.next = {
            p: sorted({ids[len(p)] for ids in every if ids[: len(p)] == p and len(ids) > len(p)})
            for p in ((), *self.prefixes)
        }
        # of the prompts and then of each prefix, before the blocks that can be started at: nothing below them is computed again
        self.stream: dict[int, list[Tensor]] = {
            k: [] for k in layers if k > 0 and can_start_at_layer(model)
        }
        self.neutral_stream: dict[int, Tensor] = {}
        with torch.no_grad():
            if words:
                tokens, mask = pad(encoded, "left", self.device)
                decoder = Decoder(model, mask)

                def keep(act: Tensor, hook: Any) -> None:
                    self.stream[hook.layer()].append(act)

                listen = [(hook_name("resid_pre", k), keep) for k in self.stream]
                with model.hooks(fwd_hooks=listen):
                    logs: dict[tuple[int, ...], Any] = {(): self._logs((), decoder(tokens))}
                    for p in self.prefixes:
                        again = self._repeated(p, len(encoded))
                        logs[p] = self._logs(p, decoder(again, keep=False))
                self.baseline = self._emotions(logs)
            if neutral:
                tokens, mask = pad(neutral, "right", self.device)
                resid = run_to(model, tokens, mask, model.cfg.n_layers)
                self.neutral_log = unembed(model, resid).float().log_softmax(-1)
                self.neutral_mask = mask.float()
                self.neutral_mask[:, 0] = 0
        if max_new_tokens:
            self.unsteered = self.text(None, "resid_post", 0)

    def _repeated(self, prefix: tuple[int, ...], rows: int) -> Tensor:
        return repeat(torch.tensor(prefix, device=self.device), "pos -> row pos", row=rows)

    def _logs(self, prefix: tuple[int, ...], logits: Tensor) -> dict[int, Float[Tensor, " row"]]:
        """Log-probability of each wanted token after a prefix."""
        logits = logits.float()
        log = logits[:, self.next[prefix]] - logits.logsumexp(-1, keepdim=True)
        return dict(zip(self.next[prefix], log.unbind(1), strict=True))

    def _emotions(
        self, logs: Mapping[tuple[int, ...], Mapping[int, Tensor]]
    ) -> Float[Tensor, "row emotion"]:
        """Mean over each emotion's words of their log-probability, from the next-token ones after each prefix."""

        def whole(word: list[tuple[int, ...]]) -> Tensor:
            of = {
                ids: torch.stack([logs[ids[:k]][ids[k]] for k in range(len(ids))]).sum(0)
                for ids in dict.fromkeys(word)
            }
            if len(of) == 1:
                return of[word[0]]
            rows = len(of[word[0]])  # each row by the tokens that the word has after its prompt
            return torch.stack([of[word[row % len(word)]][row] for row in range(rows)])

        means = [torch.stack([whole(w) for w in ws]).mean(0) for ws in self.words.values()]
        return torch.stack(means, 1).float().cpu()

    def measure(
        self, vectors: Float[Tensor, "cell d_model"], hook_point: Any, layer: int
    ) -> dict[str, Tensor]:
        """Every readout `[cell ...]` of some cells of one layer; a batch that memory has no room for is halved."""

        def words(part: Tensor) -> dict[str, Tensor]:
            return {"change": self._next_words(part, hook_point, layer)}

        def damage(part: Tensor) -> dict[str, Tensor]:
            return {"kl": self.damage(part, hook_point, layer)}

        def text(part: Tensor) -> dict[str, Tensor]:
            return self.text(part, hook_point, layer)

        out = self._halving(words, vectors)
        if self.neutral:
            out |= self._batches(damage, vectors, int(self.neutral_mask.numel()))
        if self.max_new_tokens:
            longest = max(len(e.ids) for e in self.encoded) + self.max_new_tokens
            out |= self._batches(text, vectors, len(self.encoded) * longest)
        return out

    def _batches(
        self, run: Callable[[Tensor], dict[str, Tensor]], vectors: Tensor, tokens: int
    ) -> dict[str, Tensor]:
        """A readout of many cells, each of which is so many tokens."""
        batches = vectors.split(max(1, self.batch_tokens // tokens))
        parts = [self._halving(run, part) for part in batches]
        return {readout: torch.cat([part[readout] for part in parts]) for readout in parts[0]}

    def _halving(
        self, run: Callable[[Tensor], dict[str, Tensor]], vectors: Tensor
    ) -> dict[str, Tensor]:
        try:
            return run(vectors)
        except (RuntimeError, MemoryError) as error:
            if len(vectors) == 1 or not out_of_memory(error):
                raise
        self.splits += 1
        first, second = (self._halving(run, half) for half in vectors.tensor_split(2))
        return {readout: torch.cat([first[readout], second[readout]]) for readout in first}

    def _hooks(
        self, vectors: Tensor, hook_point: Any, layer: int, window: Window | None, where: Any
    ) -> list[tuple[str, Hook]]:
        size = torch.linalg.vector_norm(vectors, dim=-1)
        # dose 0 points anywhere
        unit = torch.where(size[:, None] > 0, vectors, torch.ones_like(vectors))
        hooks = steer_at(hook_point, unit, dose=size, layer=layer, dose_unit="raw", positions=where)
        return hooks if window is None else [(name, h.within(window)) for name, h in hooks]

    @torch.no_grad()
    def _next_words(
        self, vectors: Tensor, hook_point: Any, layer: int
    ) -> Float[Tensor, "cell prompt emotion"]:
        model, n = self.model, len(self.encoded)
        tokens, mask = pad(self.encoded, "left", self.device)
        cells = len(vectors)
        each = repeat(vectors, "cell d_model -> (cell prompt) d_model", prompt=n)
        many = partial(repeat, pattern="prompt ... -> (cell prompt) ...", cell=cells)
        skip = layer in self.stream
        window = Window(tokens.shape[1])
        decoder = Decoder(model, many(mask), layer if skip else 0)
        start, *further = (
            self.stream[layer] if skip else [tokens, *(self._repeated(p, n) for p in self.prefixes)]
        )
        with model.hooks(fwd_hooks=self._hooks(each, hook_point, layer, window, self.positions)):
            logs: dict[tuple[int, ...], Any] = {(): self._logs((), decoder(many(start)))}
            window.start = tokens.shape[1]
            for p, x in zip(self.prefixes, further, strict=True):
                logs[p] = self._logs(p, decoder(many(x), keep=False))
        return self._emotions(logs).unflatten(0, (cells, n)) - self.baseline

    @torch.no_grad()
    def damage(self, vectors: Tensor, hook_point: Any, layer: int) -> Float[Tensor, "cell text"]:
        model, n = self.model, len(self.neutral)
        tokens, mask = pad(self.neutral, "right", self.device)
        cells = len(vectors)
        each = repeat(vectors, "cell d_model -> (cell text) d_model", text=n)
        many = partial(repeat, pattern="text ... -> (cell text) ...", cell=cells)
        with model.hooks(fwd_hooks=self._hooks(each, hook_point, layer, None, "all")):
            if can_start_at_layer(model) and layer > 0:
                if layer not in self.neutral_stream:  # stops before the hook
                    self.neutral_stream[layer] = run_to(model, tokens, mask, layer)
                resid = run_from(model, many(self.neutral_stream[layer]), many(mask), layer)
            else:
                resid = run_to(model, many(tokens), many(mask), model.cfg.n_layers)
        out = []
        for part in resid.split(n):  # the logits of one cell at a time are the largest tensor here
            steered = unembed(model, part).float().log_softmax(-1)
            kl = (self.neutral_log.exp() * (self.neutral_log - steered)).sum(-1)
            out.append((kl * self.neutral_mask).sum(-1) / self.neutral_mask.sum(-1))
        return torch.stack(out).cpu()

    @torch.no_grad()
    def text(self, vectors: Tensor | None, hook_point: Any, layer: int) -> dict[str, Tensor]:
        """What each cell writes (no vectors: the unsteered model, as one cell), and how the unsteered model reads it.

        `tokens` `[cell prompt new]` with -1 after the end, `log_perplexity` `[cell prompt]`, `score` `[cell prompt emotion]`.
        """
        model, n, cells = self.model, len(self.encoded), 1 if vectors is None else len(vectors)
        hooks: Hooks = []
        if vectors is not None:
            each = repeat(vectors, "cell d_model -> (cell prompt) d_model", prompt=n)
            hooks = self._hooks(each, hook_point, layer, None, self.positions)
        encoded = self.encoded * cells
        most = self.max_new_tokens
        ids = decode(model, encoded, hooks, Decoding(most), end=self.end)
        new = torch.tensor([row + [-1] * (most - len(row)) for row in ids], device=self.device)
        there = (new >= 0).float()
        resid, z = read_written(model, encoded, new, self.reader, to=model.cfg.n_layers)
        nll = []
        for part, ids_of in zip(resid.split(n), new.split(n), strict=True):  # one cell at a time
            log = unembed(model, part).float().log_softmax(-1)
            nll.append(-log.gather(-1, ids_of.clamp_min(0)[..., None])[..., 0])
        # 0 / 0 of an empty text is NaN
        log_perplexity = (torch.cat(nll) * there).sum(-1) / there.sum(-1)
        out = {"tokens": new, "log_perplexity": log_perplexity}
        if self.reader is not None:
            there = there.cpu()[..., None]
            out["score"] = (z * there).sum(1) / there.sum(1)
        return {readout: values.cpu().unflatten(0, (cells, n)) for readout, values in out.items()}

    def written(self, of: Mapping[str, Tensor]) -> Written:
        """The text and its measures from what `text` found."""
        ids = [[[t for t in row if t >= 0] for row in cell] for cell in of["tokens"].tolist()]
        pairs = [[list(pairwise(row)) for row in cell] for cell in ids]
        distinct = [[len(set(p)) / len(p) if p else math.nan for p in cell] for cell in pairs]
        before = [e.ids for e in self.encoded]
        return Written(
            texts=tuple(tuple(map(self.end.text, before, cell)) for cell in ids),
            length=(of["tokens"] >= 0).sum(-1).float(),
            distinct=torch.tensor(distinct),
            log_perplexity=of["log_perplexity"],
            score=of.get("score"),
            emotions=self.reader.emotions if self.reader is not None else (),
        )

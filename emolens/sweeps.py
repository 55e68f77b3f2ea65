"""Measure what adding directions does: vectors x layers x doses x controls x prompts as the rows of shared batches.

Each row has its own vector ``dose m v``; what lies before the steered block is computed once for each prompt where the backend can skip
it. Read against the unsteered model: the log-probability of whole target words, the KL divergence on neutral text (the damage), and on
request the text that is written: what the unsteered model makes of it, how it repeats itself, where it ends.
Random directions run beside every sweep unless they are turned off: a larger effect than theirs at the same dose is the claim, never
the effect alone. A prompt that says the same in words is measured in the same way, to compare at equal KL.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from emolens import stats
from emolens._files import here
from emolens._typing import HookedModel, Text, block_number, block_numbers, hook_name
from emolens.corpus import several
from emolens.directions import EmotionDirections, random_directions
from emolens.emotion_sets import EmotionSet
from emolens.interventions import Hook, Hooks, Window, prompts_of, steer_at, validate
from emolens.models import (
    Decoder,
    EncodedText,
    can_start_at_layer,
    encode,
    out_of_memory,
    pad,
    present_info,
    run_from,
    run_to,
    unembed,
)
from emolens.readout import check_model
from emolens.steering import Stop, decode, ends, read_written
from emolens.tokens import word_tokens

TargetWords = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Cell:
    """One thing added: a direction of an emotion (control None) or of a control, at a layer, with a dose."""

    direction: str
    control: str | None
    layer: int
    dose: float


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
        """Some of the cells."""
        kept = list(cells)
        return replace(
            self,
            texts=tuple(self.texts[i] for i in kept),
            length=self.length[kept],
            distinct=self.distinct[kept],
            log_perplexity=self.log_perplexity[kept],
            score=None if self.score is None else self.score[kept],
        )


@dataclass(frozen=True, eq=False)
class Sweep:
    """What each cell did to each prompt.

    Attributes:
        change: `[cell prompt emotion]`, log-probability of each emotion's target words (mean over its words) minus the unsteered one, nats.
        baseline: `[prompt emotion]`, the unsteered one.
        kl: `[cell text]`, KL(unsteered || steered) in nats a token on neutral texts; None without them.
        written: The new texts of every cell; None unless asked for.
        unsteered: Those of the unsteered model, as one cell.
        info: Options, and in how many batches memory ran out and the batch was halved (`splits`).
    """

    cells: tuple[Cell, ...]
    prompts: tuple[str, ...]
    emotions: tuple[str, ...]
    change: Float[Tensor, "cell prompt emotion"]
    baseline: Float[Tensor, "prompt emotion"]
    kl: Float[Tensor, "cell text"] | None
    written: Written | None = None
    unsteered: Written | None = None
    info: dict[str, Any] = field(default_factory=dict, repr=False)

    def select(self, *, control: str | None = "any", layer: int | None = None, dose: float | None = None) -> Sweep:
        """The cells of one control (None: the emotions' own directions), layer or dose."""
        kept = [
            i
            for i, c in enumerate(self.cells)
            if control in ("any", c.control) and layer in (None, c.layer) and dose in (None, c.dose)
        ]
        kl = None if self.kl is None else self.kl[kept]
        written = None if self.written is None else self.written.take(kept)
        return replace(self, cells=tuple(self.cells[i] for i in kept), change=self.change[kept], kl=kl, written=written)

    @property
    def perplexity_ratio(self) -> Float[Tensor, "cell prompt"]:
        """Perplexity of what was written in units of that of the unsteered text, both under the unsteered model.

        Raises:
            ValueError: a sweep that wrote nothing.
        """
        if self.written is None or self.unsteered is None:
            raise ValueError("nothing was written: sweep(..., write=24)")
        return (self.written.log_perplexity - self.unsteered.log_perplexity).exp()

    @property
    def margin(self) -> Float[Tensor, "cell prompt emotion"]:
        """Change of each emotion's words minus the mean change of the others'."""
        k = self.change.shape[-1]
        return self.change - (self.change.sum(-1, keepdim=True) - self.change) / (k - 1)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each cell, prompt and emotion."""
        out = []
        for i, c in enumerate(self.cells):
            for j, prompt in enumerate(self.prompts):
                text: dict[str, Any] = {}
                if (w := self.written) is not None:
                    text = {"text": w.texts[i][j], "length": int(w.length[i, j]), "distinct": float(w.distinct[i, j]), "perplexity_ratio": float(self.perplexity_ratio[i, j])}  # fmt: skip
                for k, emotion in enumerate(self.emotions):
                    row = asdict(c) | {"prompt": prompt, "emotion": emotion, "change": float(self.change[i, j, k])}
                    if w is not None and w.score is not None and emotion in w.emotions:
                        row["score"] = float(w.score[i, j, w.emotions.index(emotion)])
                    out.append(row | text)
        return out

    def __repr__(self) -> str:
        """Share of prompts where the own words rose more than the others', where they rose most, and the damage."""
        lines = [
            f"Sweep of {len(self.cells)} cells x {len(self.prompts)} prompts",
            "layer   dose  control              own > others  own highest     KL"
            + ("  perplexity x  distinct  length" if self.written else ""),
        ]
        margin = self.margin
        for key in dict.fromkeys((c.layer, c.dose, c.control) for c in self.cells):
            cells = [i for i, c in enumerate(self.cells) if (c.layer, c.dose, c.control) == key]
            own = [
                (i, self.emotions.index(self.cells[i].direction))
                for i in cells
                if self.cells[i].direction in self.emotions
            ]
            if own:
                above = f"{np.mean([float((margin[i, :, e] > 0).float().mean()) for i, e in own]):12.2f}"
                first = f"{np.mean([float((self.change[i].argmax(-1) == e).float().mean()) for i, e in own]):12.2f}"
            else:  # a random direction stands in for every emotion
                above, first = f"{float((margin[cells] > 0).float().mean()):12.2f}", f"{1 / len(self.emotions):12.2f}"
            kl = "" if self.kl is None else f"{float(self.kl[cells].mean()):7.3f}"
            line = f"{key[0]:5d}  {key[1]:5.3g}  {key[2] or 'emotion directions':<19}{above} {first}  {kl:>7}"
            if w := self.written and self.written.take(cells):
                ratio = float(self.perplexity_ratio[cells].log().nanmean().exp())  # of many texts the geometric mean
                line += f"  {ratio:12.2f}  {float(w.distinct.nanmean()):8.2f}  {float(w.length.mean()):6.1f}"
            lines.append(line)
        return "\n".join(lines)


def shortest_words(tokenizer: Any, target_words: TargetWords) -> dict[str, list[str]]:
    """Of each emotion the target words with the fewest tokens: like is compared with like, and a sweep is several times faster."""
    count = lambda w: len(word_tokens(tokenizer, w))  # noqa: E731  (used twice)
    return {e: [w for w in ws if count(w) == min(map(count, ws))] for e, ws in target_words.items() if ws}


def sweep(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    directions: EmotionDirections,
    *,
    layers: Sequence[int] | None = None,
    doses: Sequence[float] = (0.05, 0.1, 0.2),
    target_words: TargetWords,
    controls: Mapping[str, EmotionDirections] | None = None,
    positions: Literal["all", "generation"] = "all",
    neutral: Sequence[str] | None = None,
    neutral_tokens: int = 64,
    write: int = 0,
    stop: Stop = (),
    read: EmotionDirections | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    out: str | Path | None = None,
    prepend_bos: bool | None = None,
    allow_other_model: bool = False,
    progress: bool = True,
) -> Sweep:
    """Add every direction at every layer with every dose to every prompt, and read what the next word would be.

    For emotion e with target words w (as they follow the prompt, words of several tokens scored whole):
    change_e = mean_w [ log P(w | prompt, x + dose m v) - log P(w | prompt) ].

    Args:
        prompts: Texts or chats that end where the word would come.
        directions: One or more emotions.
        layers: Blocks; None is the directions' default.
        doses: In median residual norms.
        target_words: For each emotion its words, such as ``{e.name: e.target_words for e in emotions.emotions}``; a space before them is
            put where their script and the end of the prompt have one (`tokens.joined`).
        controls: Further directions by name; None is eight random ones ("random directions"), {} none.
        positions: "all" tokens, or "generation": the last prompt token and what follows.
        neutral: Texts to measure the damage on (the first `neutral_tokens` tokens of each, but the first one).
        write: Also continue every prompt by this many tokens at most, greedily, and read what was written (`Written`).
        stop: Where to end beside the model's own stop tokens, as in `em.generate`.
        read: Directions that score what was written; the unsteered model reads it.
        seed: Of the random directions.
        batch_tokens: Of one batch; halved when memory runs out.
        out: A JSON-lines file to which finished cells are added; an interrupted sweep goes on from it.

    Returns:
        `Sweep`; it prints as a table.

    Raises:
        ValueError: no prompts, a layer without directions, no target words, a dose that is not finite, a file of another sweep.
        FloatingPointError: NaN or infinity, with the layer and the type.
    """
    texts = several(prompts)
    doses = [float(d) for d in doses]
    words = {e: list(w) for e, w in target_words.items() if w}
    if not texts or not doses or not all(map(math.isfinite, doses)):
        raise ValueError(f"a sweep needs prompts and finite doses, got {len(texts)} prompts and doses {doses}")
    if len(words) < 2:
        raise ValueError("target_words: at least two emotions with words, to tell one from the others")
    if unknown := [e for e in directions.emotions if e not in words]:
        raise ValueError(f"{unknown[0]!r} has no target words; there are words for: {', '.join(words)}")
    if write < 0 or (read is not None and not write):
        raise ValueError(
            f"write={write}: how many tokens to write; read= scores what was written and needs write=24 or so"
        )
    if neutral_tokens < 2:
        raise ValueError(f"neutral_tokens={neutral_tokens}; at least 2: the first token is left out")
    layers = [directions.layer] if layers is None else list(block_numbers(layers))
    for layer in layers:
        directions.slot(layer)
    if controls is None:
        controls = {"random directions": random_directions(directions, 8, seed=seed)}
    groups: dict[str | None, EmotionDirections] = {None: directions, **controls}
    for v in groups.values():
        validate(model, steer_at(v.hook_point, v, dose=0.0, layer=layers), allow_other_model=allow_other_model)
    encoded = encode(model, texts, prepend_bos=prepend_bos)
    cut = [cut_prompt(e, neutral_tokens) for e in encode(model, several(neutral), prepend_bos=prepend_bos)] if neutral else []
    if write and (longest := max(len(e.ids) for e in encoded)) + write > model.cfg.n_ctx:
        raise ValueError(f"{longest} tokens of prompt and {write} new ones; this model reads {model.cfg.n_ctx}")
    reader = None
    if read is not None:
        check_model(model, read.info["model"], allow_other_model=allow_other_model)
        reader = read.at(read.layer)
        reader.scale("token")
    run = Run(model, encoded, cut, words, positions, batch_tokens, write, reader, layers, stop)

    cells = [
        Cell(e, control, layer, dose)
        for layer in layers
        for control, v in groups.items()
        for dose in doses
        for e in v.emotions
    ]
    parts = [
        [e.ids for e in encoded],
        [e.ids for e in cut],
        layers,
        doses,
        run.words,
        positions,
        write,
        [sorted(run.end.tokens), run.end.strings],
        present_info(model).fingerprint,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for control, v in groups.items():
        here = v.at(layers)
        digest.update(f"{control} {v.emotions} {v.hook_point}".encode())
        digest.update(here.vectors.numpy().tobytes() + here.norm_median.numpy().tobytes())
    if reader is not None:
        digest.update(f"{reader.emotions} {reader.hook_point} {reader.layer}".encode())
        digest.update(reader.vectors.numpy().tobytes() + reader.reference.numpy().tobytes())
        if (c := reader.calibration) is not None:
            digest.update(c.token_mean.numpy().tobytes() + c.token_std.numpy().tobytes())
    done = Done(out, digest.hexdigest()[:16])
    with tqdm(total=len(cells), unit="cell", disable=not progress, delay=1.0) as bar:
        for layer in layers:
            todo = [c for c in cells if c.layer == layer and c not in done.found]
            bar.update(sum(c.layer == layer for c in cells) - len(todo))
            per_batch = max(1, batch_tokens // (len(encoded) * max(len(e.ids) for e in encoded)))
            for start in range(0, len(todo), per_batch):
                chunk = todo[start : start + per_batch]
                vectors = torch.stack([vector_of(groups[c.control], c) for c in chunk])
                found = run.measure(vectors, groups[None].hook_point, layer)
                for i, c in enumerate(chunk):
                    done.add(c, {readout: values[i] for readout, values in found.items()})
                bar.update(len(chunk))
    of = {readout: torch.stack([done.found[c][readout] for c in cells]) for readout in done.found[cells[0]]}
    info = {"positions": positions, "dose_unit": "median", "splits": run.splits, "key": done.key}
    written = run.written(of) if write else None
    unsteered = run.written(run.unsteered) if write else None
    return Sweep(
        tuple(cells),
        tuple(e.text for e in encoded),
        tuple(words),
        of["change"],
        run.baseline,
        of.get("kl"),
        written,
        unsteered,
        info,
    )


def vector_of(v: EmotionDirections, c: Cell) -> Tensor:
    slot = v.slot(c.layer)
    return c.dose * float(v.norm_median[slot]) * v.unit(c.layer)[v.index(c.direction)]


def cut_prompt(e: EncodedText, n: int) -> EncodedText:
    return EncodedText(e.text, e.ids[:n], e.offsets[:n])


class Done:
    """Finished cells, in memory and (if asked for) in a file that an interrupted sweep goes on from."""

    def __init__(self, out: str | Path | None, key: str) -> None:
        self.key = key
        self.found: dict[Cell, dict[str, Tensor]] = {}
        self.file = None if out is None else here(out)
        if self.file is None:
            return
        if self.file.is_file() and self.file.stat().st_size:
            for i, line in enumerate(self.file.read_text(encoding="utf-8").splitlines()):
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = {}  # the line that an interruption cut short
                if i == 0 and (not isinstance(entry, dict) or entry.get("sweep") != key):
                    raise ValueError(
                        f"{self.file} is of another sweep, or of something else; choose another file, or remove it"
                    )
                if "cell" in entry:
                    cell = Cell(**entry.pop("cell"))
                    self.found[cell] = {readout: torch.tensor(values) for readout, values in entry.items()}
            if not self.file.read_bytes().endswith(b"\n"):
                self._write("")
        else:
            self._write(json.dumps({"sweep": key}))

    def add(self, c: Cell, readouts: dict[str, Tensor]) -> None:
        self.found[c] = readouts
        if self.file is not None:
            self._write(json.dumps({"cell": asdict(c)} | {k: values.tolist() for k, values in readouts.items()}))

    def _write(self, line: str) -> None:
        assert self.file is not None
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Run:
    """The prompts, the unsteered model's answers, and the streams before each steered block."""

    def __init__(
        self, model: Any, encoded: list[EncodedText], neutral: list[EncodedText], words: dict[str, list[str]],
        positions: Literal["all", "generation"] = "all", batch_tokens: int = 4096, write: int = 0, reader: EmotionDirections | None = None,
        layers: Sequence[int] = (), stop: Stop = (),
    ) -> None:  # fmt: skip
        self.model, self.encoded, self.neutral, self.batch_tokens = model, encoded, neutral, batch_tokens
        self.write, self.reader, self.end = write, reader, ends(model, stop)
        self.positions: Literal["all", "generation"] = positions
        self.device = getattr(model.cfg, "device", "cpu")
        self.splits = 0
        tokenize = lambda w: [tuple(word_tokens(model.tokenizer, w, e.text)) for e in encoded]  # noqa: E731  (used once)
        self.words = {
            e: [tokenize(w) for w in ws] for e, ws in words.items()
        }  # the tokens of each word after each prompt
        every = [ids for ws in self.words.values() for w in ws for ids in w]
        self.prefixes = sorted({ids[:k] for ids in every for k in range(1, len(ids))}, key=lambda p: (len(p), p))
        # the tokens whose probability is wanted after each: a whole vocabulary for every prefix would fill the memory
        self.next = {
            p: sorted({ids[len(p)] for ids in every if ids[: len(p)] == p and len(ids) > len(p)})
            for p in ((), *self.prefixes)
        }
        # of the prompts and then of each prefix, before the blocks that can be started at: nothing below them is computed again
        self.stream: dict[int, list[Tensor]] = {k: [] for k in layers if k > 0 and can_start_at_layer(model)}
        self.neutral_stream: dict[int, Tensor] = {}
        with torch.no_grad():
            if words:
                tokens, mask = pad(encoded, "left", self.device)
                decoder = Decoder(model, mask)
                keep = lambda act, hook: self.stream[hook.layer()].append(act)  # noqa: E731  (one line of a list)
                with model.hooks(fwd_hooks=[(hook_name("resid_pre", k), keep) for k in self.stream]):
                    logs: dict[tuple[int, ...], Any] = {(): self._logs((), decoder(tokens))}
                    for p in self.prefixes:
                        logs[p] = self._logs(p, decoder(self._repeated(p, len(encoded)), keep=False))
                self.baseline = self._emotions(logs)
            if neutral:
                tokens, mask = pad(neutral, "right", self.device)
                resid = run_to(model, tokens, mask, model.cfg.n_layers)
                self.neutral_log = unembed(model, resid).float().log_softmax(-1)
                self.neutral_mask = mask.float()
                self.neutral_mask[:, 0] = 0
        if write:
            self.unsteered = self.text(None, "resid_post", 0)

    def _repeated(self, prefix: tuple[int, ...], rows: int) -> Tensor:
        return repeat(torch.tensor(prefix, device=self.device), "pos -> row pos", row=rows)

    def _logs(self, prefix: tuple[int, ...], logits: Tensor) -> dict[int, Float[Tensor, " row"]]:
        """Log-probability of each wanted token after a prefix."""
        logits = logits.float()
        log = logits[:, self.next[prefix]] - logits.logsumexp(-1, keepdim=True)
        return dict(zip(self.next[prefix], log.unbind(1), strict=True))

    def _emotions(self, logs: Mapping[tuple[int, ...], Mapping[int, Tensor]]) -> Float[Tensor, "row emotion"]:
        """Mean over each emotion's words of their log-probability, from the next-token ones after each prefix."""

        def whole(word: list[tuple[int, ...]]) -> Tensor:
            of = {
                ids: torch.stack([logs[ids[:k]][ids[k]] for k in range(len(ids))]).sum(0) for ids in dict.fromkeys(word)
            }
            if len(of) == 1:
                return of[word[0]]
            rows = len(of[word[0]])  # each row by the tokens that the word has after its prompt
            return torch.stack([of[word[row % len(word)]][row] for row in range(rows)])

        means = [torch.stack([whole(w) for w in ws]).mean(0) for ws in self.words.values()]
        return torch.stack(means, 1).float().cpu()

    def measure(self, vectors: Float[Tensor, "cell d_model"], hook_point: Any, layer: int) -> dict[str, Tensor]:
        """Every readout `[cell ...]` of some cells of one layer; a batch that memory has no room for is halved."""
        out = self._halving(lambda part: {"change": self._next_words(part, hook_point, layer)}, vectors)
        if self.neutral:
            damage = lambda part: {"kl": self.damage(part, hook_point, layer)}  # noqa: E731  (a name for one line)
            out |= self._batches(damage, vectors, int(self.neutral_mask.numel()))
        if self.write:
            rows = len(self.encoded) * (max(len(e.ids) for e in self.encoded) + self.write)
            out |= self._batches(lambda part: self.text(part, hook_point, layer), vectors, rows)
        return out

    def _batches(self, run: Callable[[Tensor], dict[str, Tensor]], vectors: Tensor, tokens: int) -> dict[str, Tensor]:
        """A readout of many cells, each of which is so many tokens."""
        parts = [self._halving(run, part) for part in vectors.split(max(1, self.batch_tokens // tokens))]
        return {readout: torch.cat([part[readout] for part in parts]) for readout in parts[0]}

    def _halving(self, run: Callable[[Tensor], dict[str, Tensor]], vectors: Tensor) -> dict[str, Tensor]:
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
        unit = torch.where(size[:, None] > 0, vectors, torch.ones_like(vectors))  # dose 0 points anywhere
        hooks = steer_at(hook_point, unit, dose=size, layer=layer, dose_unit="raw", positions=where)
        return hooks if window is None else [(name, h.within(window)) for name, h in hooks]

    @torch.no_grad()
    def _next_words(self, vectors: Tensor, hook_point: Any, layer: int) -> Float[Tensor, "cell prompt emotion"]:
        model, n = self.model, len(self.encoded)
        tokens, mask = pad(self.encoded, "left", self.device)
        cells = len(vectors)
        each = repeat(vectors, "cell d_model -> (cell prompt) d_model", prompt=n)
        many = lambda t: repeat(t, "prompt ... -> (cell prompt) ...", cell=cells)  # noqa: E731  (used three times)
        skip = layer in self.stream
        window = Window(tokens.shape[1])
        decoder = Decoder(model, many(mask), layer if skip else 0)
        start, *further = self.stream[layer] if skip else [tokens, *(self._repeated(p, n) for p in self.prefixes)]
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
        many = lambda t: repeat(t, "text ... -> (cell text) ...", cell=cells)  # noqa: E731  (used four times)
        with model.hooks(fwd_hooks=self._hooks(each, hook_point, layer, None, "all")):
            if can_start_at_layer(model) and layer > 0:
                if layer not in self.neutral_stream:
                    self.neutral_stream[layer] = run_to(model, tokens, mask, layer)  # stops before the hook
                resid = run_from(model, many(self.neutral_stream[layer]), many(mask), layer)
            else:
                resid = run_to(model, many(tokens), many(mask), model.cfg.n_layers)
        out = []
        for part in resid.split(n):  # the logits of one cell at a time: they are the largest tensor here
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
        ids = decode(model, encoded, hooks, self.write, end=self.end)
        new = torch.tensor([row + [-1] * (self.write - len(row)) for row in ids], device=self.device)
        there = (new >= 0).float()
        resid, z = read_written(model, encoded, new, self.reader, to=model.cfg.n_layers)
        nll = []
        for part, ids_of in zip(resid.split(n), new.split(n), strict=True):  # the logits of one cell at a time
            log = unembed(model, part).float().log_softmax(-1)
            nll.append(-log.gather(-1, ids_of.clamp_min(0)[..., None])[..., 0])
        mean = lambda x: (x * there).sum(-1) / there.sum(-1)  # noqa: E731  (0 / 0 of an empty text is NaN)
        out = {"tokens": new, "log_perplexity": mean(torch.cat(nll))}
        if self.reader is not None:
            there = there.cpu()[..., None]
            out["score"] = (z * there).sum(1) / there.sum(1)
        return {readout: values.cpu().unflatten(0, (cells, n)) for readout, values in out.items()}

    def written(self, of: Mapping[str, Tensor]) -> Written:
        """The text and its measures from what `text` found."""
        ids = [[[t for t in row if t >= 0] for row in cell] for cell in of["tokens"].tolist()]
        pairs = [[list(pairwise(row)) for row in cell] for cell in ids]
        distinct = [[len(set(row)) / len(row) if row else math.nan for row in cell] for cell in pairs]
        return Written(
            texts=tuple(
                tuple(self.end.text(e.ids, row) for e, row in zip(self.encoded, cell, strict=True)) for cell in ids
            ),
            length=(of["tokens"] >= 0).sum(-1).float(),
            distinct=torch.tensor(distinct),
            log_perplexity=of["log_perplexity"],
            score=of.get("score"),
            emotions=self.reader.emotions if self.reader is not None else (),
        )


@dataclass(frozen=True)
class DoseCalibration:
    """A dose chosen on half of the texts (and prompts); everything here was measured on the other half.

    Attributes:
        budget: Of the KL divergence; `perplexity_budget` that of the ratio, where prompts were given.
        kl: Nats a token on neutral texts.
        perplexity_ratio: Of what is written, geometric mean over prompts.
        distinct, length: Of what is written, means over prompts.
    """

    direction: str
    layer: int
    dose: float
    budget: float
    kl: stats.Estimate
    n_texts: int
    perplexity_budget: float | None = None
    perplexity_ratio: stats.Estimate | None = None
    distinct: float | None = None
    length: float | None = None
    n_prompts: int = 0

    def __str__(self) -> str:
        kl = f"KL {self.kl} nats a token on {self.n_texts} other texts (budget {self.budget:g})"
        if self.perplexity_ratio is not None:
            kl += (
                f"; perplexity of its text x {self.perplexity_ratio} on {self.n_prompts} other prompts (budget {self.perplexity_budget:g}), "
                f"distinct pairs {self.distinct:.2f}, {self.length:.0f} tokens"
            )
        return f"{self.direction} at layer {self.layer}: dose {self.dose:.3g}, {kl}"


def calibrate_dose(
    model: HookedModel,
    direction: EmotionDirections,
    neutral: Sequence[Text],
    *,
    layer: SupportsIndex | None = None,
    budget: float = 0.1,
    prompts: Sequence[Text] = (),
    perplexity_budget: float = 1.5,
    write: int = 24,
    max_dose: float = 1.0,
    neutral_tokens: int = 64,
    seed: int = 0,
) -> DoseCalibration:
    """The largest dose that changes neutral text, and what is written, by no more than a budget.

    By bisection (to 2 % of itself) on half of the texts. Perplexity need not grow with the dose, so with prompts the doses 1, .9, .81 ...
    times that one are tried on half of them, and the largest within its budget is taken. Reported on the other halves, with intervals.

    Args:
        direction: One emotion.
        neutral: At least four texts.
        budget: Mean KL(unsteered || steered) in nats a token.
        prompts: At least four, to write from; without any only the KL counts.
        perplexity_budget: Perplexity of what is written under the unsteered model, in units of that of its own text.
        write: New tokens a prompt, at most.
        max_dose: Where to stop looking, in median residual norms.

    Raises:
        ValueError: several directions, fewer than four texts or prompts, a budget that is not positive (of perplexity: not above 1), KL that
            falls as the dose grows, or no dose within the budget of perplexity.
    """
    if len(direction.emotions) != 1:
        raise ValueError(f"one direction, as in v['joy'], not {len(direction.emotions)}")
    if len(neutral) < 4 or not budget > 0 or not max_dose > 0:
        raise ValueError(
            f"{len(neutral)} texts, budget={budget}, max_dose={max_dose}: at least four texts, both above zero"
        )
    if prompts and (len(prompts) < 4 or not perplexity_budget > 1 or write < 1):
        raise ValueError(
            f"{len(prompts)} prompts, perplexity_budget={perplexity_budget}, write={write}: at least four prompts, above one, at least one token"
        )
    layer = direction.layer if layer is None else block_number(layer)
    validate(model, steer_at(direction.hook_point, direction, dose=0.0, layer=layer), allow_other_model=None)
    rng = np.random.default_rng(seed)
    runs = [
        Run(model, [], [cut_prompt(e, neutral_tokens) for e in encode(model, part)], {}) for part in _halves(neutral, rng)
    ]
    e = direction.emotions[0]

    def vectors(doses: Sequence[float]) -> Tensor:
        return torch.stack([vector_of(direction, Cell(e, None, layer, dose)) for dose in doses])

    def damage(run: Run, dose: float) -> Tensor:
        return run.damage(vectors([dose]), direction.hook_point, layer)[0]

    low, high = 0.0, max_dose
    at_low, at_high = 0.0, float(damage(runs[0], max_dose).mean())
    if at_high > budget:
        while high - low > 0.02 * high:
            middle = (low + high) / 2
            kl = float(damage(runs[0], middle).mean())
            if not at_low - 1e-6 <= kl <= at_high + 1e-6:
                raise ValueError(f"KL does not grow with the dose between {low:.3g} and {high:.3g}; lower max_dose")
            if kl <= budget:
                low, at_low = middle, kl
            else:
                high, at_high = middle, kl
    else:
        low = max_dose
    text: dict[str, Any] = {}
    if prompts:
        writers = [Run(model, encode(model, part), [], {}, write=write) for part in _halves(prompts, rng)]

        def writes(run: Run, dose: float) -> tuple[Written, Tensor]:
            made = run.written(run.text(vectors([dose]), direction.hook_point, layer))
            log_ratio = (made.log_perplexity - run.unsteered["log_perplexity"])[0]
            return made, log_ratio[~log_ratio.isnan()]  # an empty text has no perplexity; `length` shows it

        for dose in (low * 0.9**k for k in range(22)):  # down to a tenth
            if float(writes(writers[0], dose)[1].mean()) <= math.log(perplexity_budget):
                low = dose
                break
        else:
            raise ValueError(f"no dose up to {low:.3g} keeps the perplexity within {perplexity_budget:g} times")
        made, log_ratio = writes(writers[1], low)
        ratio = stats.bootstrap(lambda i: float(log_ratio[i].mean().exp()), range(len(log_ratio)))
        text = {
            "perplexity_budget": perplexity_budget,
            "perplexity_ratio": ratio,
            "distinct": float(made.distinct.nanmean()),
            "length": float(made.length.mean()),
            "n_prompts": made.length.numel(),
        }
    kl = damage(runs[1], low).double().numpy()
    return DoseCalibration(e, layer, low, budget, stats.bootstrap_mean(kl, range(len(kl))), len(kl), **text)


def _halves(texts: Sequence[Text], rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    order = rng.permutation(len(texts))
    half = len(order) // 2
    return [texts[i] for i in order[:half]], [texts[i] for i in order[half:]]


def prompt_baseline(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    emotions: EmotionSet,
    *,
    names: Sequence[str] | None = None,
    neutral: Sequence[str] | None = None,
    neutral_tokens: int = 64,
    template: str = "Someone feels {adjective} today. ",
) -> Sweep:
    """The same readouts with an instruction in words before the text instead of a direction in the stream.

    `calibrate_dose` with the KL of the instruction as its budget gives the dose to compare at.

    Args:
        names: Which emotions are said; None is all with an adjective.
        template: Put before every prompt and neutral text; in a chat before its first message.

    Returns:
        `Sweep` with control "prompt", layer -1 and dose 0.
    """
    asked = prompts_of(prompts)
    words = {e.name: e.target_words for e in emotions.emotions if e.target_words}
    adjective = {e.name: e.adjective for e in emotions.emotions if e.adjective}
    names = list(adjective) if names is None else list(names)
    if unknown := [n for n in names if n not in adjective]:
        raise ValueError(f"{unknown[0]!r} has no adjective in set {emotions.name!r}")
    texts = [cut_prompt(e, neutral_tokens) for e in encode(model, several(neutral))] if neutral else []
    run = Run(model, encode(model, asked), texts, dict(words))
    change, kl = [], []
    for name in names:
        said = template.format(adjective=adjective[name])
        told = Run(model, encode(model, [_said_before(said, p) for p in asked]), [], dict(words))
        change.append(told.baseline - run.baseline)
        if texts:
            kl.append(_told_damage(model, run, said))
    cells = tuple(Cell(n, "prompt", -1, 0.0) for n in names)
    plain = tuple(e.text for e in run.encoded)
    return Sweep(cells, plain, tuple(words), torch.stack(change), run.baseline, torch.stack(kl) if kl else None)


def _said_before(said: str, prompt: Text) -> Text:
    if isinstance(prompt, str):
        return said + prompt
    first, *rest = prompt
    return [{**first, "content": [said, *([c] if isinstance(c := first["content"], str) else c)]}, *rest]


@torch.no_grad()
def _told_damage(model: Any, run: Run, said: str) -> Float[Tensor, " text"]:
    """KL of each neutral text with the instruction before it, over the same tokens."""
    [before] = encode(model, [said.rstrip()])
    out = []
    for i, e in enumerate(run.neutral):
        bos = int(model.tokenizer.bos_token_id is not None and e.ids[:1] == [model.tokenizer.bos_token_id])
        ids = torch.tensor([before.ids + e.ids[bos:]], device=run.device)
        log = unembed(model, run_to(model, ids, torch.ones_like(ids), model.cfg.n_layers))[0].float().log_softmax(-1)
        n = len(e.ids)
        base, told = run.neutral_log[i, 1:n], log[-(n - 1) :]
        out.append((base.exp() * (base - told)).sum(-1).mean())
    return torch.stack(out).cpu()

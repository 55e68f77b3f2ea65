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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emolens._typing import Blocks, HookedModel, Text, block_numbers, typed
from emolens.collect.progress import progress_bar
from emolens.directions.controls import random_directions
from emolens.directions.value import EmotionDirections
from emolens.interventions.check import validate
from emolens.interventions.generate import Stop
from emolens.interventions.measure import (
    Cell,
    Run,
    TargetWords,
    Written,
    cut_prompt,
    vector_of,
)
from emolens.interventions.verbs import steer_at
from emolens.models.identity import check_model, present_info
from emolens.models.tokens import encode, word_tokens
from emolens.sets.corpus import several
from emolens.shards import Kept


@typed
@dataclass(frozen=True, eq=False)
class Sweep:
    """What each cell did to each prompt.

    Attributes:
        cells: What was added.
        prompts: As they were read.
        emotions: That have target words.
        change: `[cell prompt emotion]`, log-probability of each emotion's target words (mean over its words) minus the unsteered one, nats.
        baseline: `[prompt emotion]`, the unsteered one.
        kl: `[cell text]`, KL(unsteered || steered) in nats a token on neutral texts; None without them.
        written: The new texts of every cell; None unless asked for.
        unsteered: Those of the unsteered model, as one cell.
        info: Options, and in how many batches memory ran out and the batch was halved (`splits`).

    Raises:
        jaxtyping.TypeCheckError: tensors whose axes do not agree.
        ValueError: another number of cells, prompts or emotions than `change` has.
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

    def __post_init__(self) -> None:
        named = len(self.cells), len(self.prompts), len(self.emotions)
        if tuple(self.change.shape) != named:
            raise ValueError(
                f"change {list(self.change.shape)} is [cell prompt emotion], for {named[0]} cells, {named[1]} prompts and {named[2]} emotions"
            )

    def select(
        self,
        *,
        control: str | None = "any",
        layer: SupportsIndex | None = None,
        dose: float | None = None,
    ) -> Sweep:
        """The cells of one control, layer or dose.

        Args:
            control: Its name; None for the emotions' own directions.
            layer: Block; None takes all.
            dose: In median residual norms; None takes all.

        Returns:
            A new `Sweep`.

        Example:
            >>> words = {e.name: e.target_words for e in stories.emotions}
            >>> found = em.sweep(model, "She felt", directions, doses=[0.1, 0.2], target_words=words, progress=False)
            >>> len(found.cells), len(found.select(dose=0.2).cells), len(found.select(control=None).cells)
            (24, 12, 8)
        """
        kept = [
            i
            for i, c in enumerate(self.cells)
            if control in ("any", c.control) and layer in (None, c.layer) and dose in (None, c.dose)
        ]
        kl = None if self.kl is None else self.kl[kept]
        written = None if self.written is None else self.written.take(kept)
        cells = tuple(self.cells[i] for i in kept)
        return replace(self, cells=cells, change=self.change[kept], kl=kl, written=written)

    @property
    def perplexity_ratio(self) -> Float[Tensor, "cell prompt"]:
        """Perplexity of what was written in units of that of the unsteered text, both under the unsteered model.

        Raises:
            ValueError: a sweep that wrote nothing.
        """
        if self.written is None or self.unsteered is None:
            raise ValueError("nothing was written: sweep(..., max_new_tokens=24)")
        return (self.written.log_perplexity - self.unsteered.log_perplexity).exp()

    @property
    def margin(self) -> Float[Tensor, "cell prompt emotion"]:
        """Change of each emotion's words minus the mean change of the others', in nats."""
        k = self.change.shape[-1]
        return self.change - (self.change.sum(-1, keepdim=True) - self.change) / (k - 1)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary for each cell, prompt and emotion, as `pandas.DataFrame` takes them.

        Returns:
            What was added (direction, control, layer, dose), to which prompt, and for which emotion's words the change is, in nats; of
            what was written the text, its measures and its score.

        Example:
            >>> found = em.prompt_baseline(model, "Today she felt", stories, names=["glimmer"])
            >>> {key: value for key, value in found.to_dicts()[0].items() if key != "change"}
            {'direction': 'glimmer', 'control': 'prompt', 'layer': -1, 'dose': 0.0, 'prompt': 'Today she felt', 'emotion': 'glimmer'}
        """
        out = []
        for i, c in enumerate(self.cells):
            for j, prompt in enumerate(self.prompts):
                text: dict[str, Any] = {}
                if (w := self.written) is not None:
                    text = {"text": w.texts[i][j], "length": int(w.length[i, j]), "distinct": float(w.distinct[i, j]), "perplexity_ratio": float(self.perplexity_ratio[i, j])}  # fmt: skip
                for k, emotion in enumerate(self.emotions):
                    row = asdict(c) | {
                        "prompt": prompt,
                        "emotion": emotion,
                        "change": float(self.change[i, j, k]),
                    }
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
                above, first = (
                    f"{float((margin[cells] > 0).float().mean()):12.2f}",
                    f"{1 / len(self.emotions):12.2f}",
                )
            kl = "" if self.kl is None else f"{float(self.kl[cells].mean()):7.3f}"
            line = f"{key[0]:5d}  {key[1]:5.3g}  {key[2] or 'emotion directions':<19}{above} {first}  {kl:>7}"
            if w := self.written and self.written.take(cells):
                ratio = float(
                    self.perplexity_ratio[cells].log().nanmean().exp()
                )  # of many texts the geometric mean
                line += f"  {ratio:12.2f}  {float(w.distinct.nanmean()):8.2f}  {float(w.length.mean()):6.1f}"
            lines.append(line)
        return "\n".join(lines)


def shortest_words(tokenizer: Any, target_words: TargetWords) -> dict[str, list[str]]:
    """Of each emotion the target words with the fewest tokens: like is compared with like, and a sweep is several times faster.

    Args:
        tokenizer: Of the model.
        target_words: For each emotion its words.

    Returns:
        The same with fewer words; an emotion without any is left out.
    """

    def count(word: str) -> int:
        return len(word_tokens(tokenizer, word))

    return {
        e: [w for w in ws if count(w) == min(map(count, ws))]
        for e, ws in target_words.items()
        if ws
    }


def sweep(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    directions: EmotionDirections,
    *,
    layers: Blocks | None = None,
    doses: Iterable[float] = (0.05, 0.1, 0.2),
    target_words: TargetWords,
    controls: Mapping[str, EmotionDirections] | None = None,
    positions: Literal["all", "generation"] = "all",
    neutral: Sequence[str] | None = None,
    neutral_tokens: int = 64,
    max_new_tokens: int = 0,
    stop: Stop = (),
    read: EmotionDirections | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    prepend_bos: bool | None = None,
    allow_other_model: bool = False,
    progress: bool | None = None,
    out: str | Path | None = None,
) -> Sweep:
    """Add every direction at every layer with every dose to every prompt, and read what the next word would be.

    For emotion e with target words w (as they follow the prompt, words of several tokens scored whole):
    change_e = mean_w [ log P(w | prompt, x + dose m v) - log P(w | prompt) ].

    Args:
        model: From `em.load_model`, or your own.
        prompts: Texts or chats that end where the word would come.
        directions: One or more emotions.
        layers: Blocks; None is the directions' default.
        doses: In median residual norms.
        target_words: For each emotion its words, such as ``{e.name: e.target_words for e in emotions.emotions}``; a space before them is
            put where their script and the end of the prompt have one (`tokens.joined`).
        controls: Further directions by name; None is eight random ones ("random directions"), {} none.
        positions: "all" tokens, or "generation": the last prompt token and what follows.
        neutral: Texts to measure the damage on.
        neutral_tokens: The first so many tokens of each count, but the first one.
        max_new_tokens: Also continue every prompt by this many tokens at most, greedily, and read what was written (`Written`).
        stop: Where to end beside the model's own stop tokens, as in `em.generate`.
        read: Directions that score what was written; the unsteered model reads it.
        seed: Of the random directions.
        batch_tokens: Of one batch; halved when memory runs out.
        prepend_bos: As in `em.score`.
        allow_other_model: Take directions of another model with the same shape.
        progress: Whether to show a bar over cells; None shows one where it lasts and somebody can see it.
        out: A folder for finished cells, a file each; an interrupted sweep goes on from it.

    Returns:
        `Sweep`; it prints as a table.

    Raises:
        ValueError: no prompts, a layer without directions, no target words, a dose that is not finite.
        FileExistsError: `out` holds another sweep, or something else.
        FloatingPointError: NaN or infinity, with the layer and the type.

    Example:
        >>> words = {e.name: e.target_words for e in stories.emotions}
        >>> found = em.sweep(
        ...     model, "Today she felt", directions["glimmer"], doses=[0.1, 0.2], target_words=words, max_new_tokens=4, progress=False
        ... )
        >>> found.change.shape, sorted({c.control for c in found.cells}, key=str), found.written.length.shape
        (torch.Size([18, 1, 4]), [None, 'random directions'], torch.Size([18, 1]))
        >>> found.select(control=None, dose=0.2).to_dicts()[0]["direction"]
        'glimmer'
    """
    texts = several(prompts)
    doses = [float(d) for d in doses]
    words = {e: list(w) for e, w in target_words.items() if w}
    if not doses or not all(map(math.isfinite, doses)):
        raise ValueError(f"a sweep needs finite doses, got {doses}")
    if len(words) < 2:
        raise ValueError(
            "target_words: at least two emotions with words, to tell one from the others"
        )
    if unknown := [e for e in directions.emotions if e not in words]:
        raise ValueError(
            f"{unknown[0]!r} has no target words; there are words for: {', '.join(words)}"
        )
    if max_new_tokens < 0 or (read is not None and not max_new_tokens):
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: how many to write; read= scores what was written and needs max_new_tokens=24 or so"
        )
    if neutral_tokens < 2:
        raise ValueError(
            f"neutral_tokens={neutral_tokens}; at least 2: the first token is left out"
        )
    layers = block_numbers(directions.layer if layers is None else layers)
    for layer in layers:
        directions.slot(layer)
    if controls is None:
        controls = {"random directions": random_directions(directions, 8, seed=seed)}
    groups: dict[str | None, EmotionDirections] = {None: directions, **controls}
    for v in groups.values():
        validate(
            model,
            steer_at(v.hook_point, v, dose=0.0, layer=layers),
            allow_other_model=allow_other_model,
        )
    encoded = encode(model, texts, prepend_bos=prepend_bos)
    cut = (
        [
            cut_prompt(e, neutral_tokens)
            for e in encode(model, several(neutral), prepend_bos=prepend_bos)
        ]
        if neutral
        else []
    )
    longest = max(len(e.ids) for e in encoded)
    if max_new_tokens and longest + max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"{longest} tokens of prompt and {max_new_tokens} new ones; this model reads {model.cfg.n_ctx}"
        )
    reader = None
    if read is not None:
        check_model(model, read.info["model"], allow_other_model=allow_other_model)
        reader = read.at(read.layer)
        reader.scale("token")
    run = Run(
        model, encoded, cut, words, positions, batch_tokens, max_new_tokens, reader, layers, stop
    )

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
        max_new_tokens,
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
    kept = Kept(out, digest.hexdigest()[:16])
    kept.check_own()
    names = {c: f"{i:05d}" for i, c in enumerate(cells)}
    done = {c: found for c in cells if (found := kept.find(names[c])) is not None}
    with progress_bar(range(len(cells)), "cell", progress) as bar:
        for layer in layers:
            todo = [c for c in cells if c.layer == layer and c not in done]
            bar.update(sum(c.layer == layer for c in cells) - len(todo))
            per_batch = max(1, batch_tokens // (len(encoded) * longest))
            for start in range(0, len(todo), per_batch):
                chunk = todo[start : start + per_batch]
                vectors = torch.stack([vector_of(groups[c.control], c) for c in chunk])
                found = run.measure(vectors, groups[None].hook_point, layer)
                for i, c in enumerate(chunk):
                    readouts = {k: values[i].tolist() for k, values in found.items()}
                    done[c] = kept.keep(names[c], readouts)
                bar.update(len(chunk))
    of = {k: torch.tensor([done[c][k] for c in cells]) for k in done[cells[0]]}
    info = {
        "positions": positions,
        "dose_unit": "median",
        "splits": run.splits,
        "key": kept.made_by,
    }
    written = run.written(of) if max_new_tokens else None
    unsteered = run.written(run.unsteered) if max_new_tokens else None
    return Sweep(
        tuple(cells), tuple(e.text for e in encoded), tuple(words), of["change"], run.baseline, of.get("kl"), written, unsteered, info
    )  # fmt: skip

"""Read the residual stream of many texts in one forward pass each, pooled inside the hook.

For each text and layer the mean over its *ordinary* tokens is kept: real tokens (never padding), not the first (an attention
sink with a hundred times the norm of the rest), with a norm below ten times the row's median, from token `skip` on. Per-token
activations leave the hook only where they are asked for. Texts are taken slice by slice: `collect` keeps the slices in memory,
`collect_to` writes each to a file, so that a corpus of any length fits and a killed run continues; the numbers are the same. Results
do not depend on batch size or padding side beyond float noise. Nothing is estimated here: see `directions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from operator import index
from typing import Any, Unpack

import torch
from einops import rearrange
from torch import Tensor

from emolens._typing import AnyPoint, HookedModel, hook_name, is_hooked
from emolens.collect.activations import Activations, TextInfo, join, text_hash
from emolens.collect.histogram import NORM_BINS, norm_bins
from emolens.collect.pooling import (
    GOLDEN,
    LENGTHS,
    SINK,
    every_token,
    running_mean,
    spread_positions,
)
from emolens.collect.recipe import (
    OVERHEAD,
    SAMPLED,
    Batching,
    Encoded,
    Options,
    Progress,
    Recipe,
    Texts,
    check_number,
    check_used,
    encode_slice,
    make_recipe,
    site_heads,
    spelled,
)
from emolens.models import fused
from emolens.models.points import device_of
from emolens.models.running import ending_at, not_finite, out_of_memory
from emolens.models.tokens import EncodedText, ids_hash, pad
from emolens.sets.corpus import Corpus, open_corpus


@spelled
def collect_resid_post(
    model: HookedModel, texts: Texts, *, progress: bool | None = None, **options: Unpack[Options]
) -> Activations:
    """Pooled residual stream after each block, `blocks.{layer}.hook_resid_post`, and the embeddings beside it.

    For text t and layer l the row is  r[t, l] = mean over ordinary tokens i >= skip of x[t, i, l].

    Args:
        model: A model from `load_model`, or your own `HookedTransformer` or `TransformerBridge`.
        texts: An emotion set (its stories in every split, its neutral texts, and a sample of neutral tokens), plain texts, chat
            messages, the `pathlib.Path` of a ``.jsonl``, ``.csv`` or ``.txt`` file, or a `datasets.Dataset` (see `corpus.open_corpus`).
        layers: Block indices, 0-based; None is every block.
        pooling: `mean_over_tokens()` (the default, skip=50), `last_token()`, `char_span(...)` or `every_token()`.
        prepend_bos: None follows the model's tokenizer; recorded in `info`.
        padding_side: Which side to pad; the result is the same.
        batching: `Batching(tokens, texts, shard)`: how many are taken at once; None fits the free memory.
        long: A text of more tokens than the model reads: "raise" before the first pass, "truncate" it (counted in
            `info["truncated_texts"]`), or "skip" it (counted in `info["dropped_texts"]`).
        emotions: Labels of plain texts, one a text: words or whole numbers, of Python, numpy or pandas; None for a text without one.
        topics: The same for their topics.
        progress: Show a bar with tokens per second and the remaining time; None where it takes more than two seconds and is seen.

    Returns:
        `Activations` with rows `[text layer d_model]` in float32 on the CPU.

    Raises:
        KeyError: the model lacks the hook point (parallel-residual models have no `resid_mid`).
        ValueError: a layer that does not exist; a text too short or too long; labels that are missing or do not match the texts; a string
            that is the name of a file, folder or set. All of it before the first pass.
        FloatingPointError: NaN or infinity, with the first layer that has it.

    Example:
        >>> acts = em.collect_resid_post(model, ["The door was open.", "Rain fell."], progress=False)
        >>> acts.hook_point, len(acts.texts), acts.rows.dtype
        ('resid_post', 2, torch.float32)

    Reference:
        Anthropic 2026, *Emotion Concepts and their Function in a Large Language Model*, extraction of emotion vectors.
    """
    return collect(model, texts, "resid_post", progress=progress, **options)


def _sibling(
    hook_point: AnyPoint, what: str, rows: str = "[text layer d_model]"
):  # the type of `collect_resid_post`
    @spelled
    def sibling(
        model: HookedModel,
        texts: Texts,
        *,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> Activations:
        return collect(model, texts, hook_point, progress=progress, **options)

    sibling.__name__ = sibling.__qualname__ = f"collect_{hook_point}"
    doc = collect_resid_post.__doc__
    if doc is not None:  # none under python -OO
        shared = doc[doc.index("    Args:") : doc.index("    Reference:")]
        shared = shared.replace("[text layer d_model]", rows).replace("resid_post", hook_point)
        sibling.__doc__ = f"Pooled {what}\n\n{shared}"
    return sibling


collect_resid_pre = _sibling(
    "resid_pre", "residual stream before each block, `blocks.{layer}.hook_resid_pre`."
)
collect_resid_mid = _sibling(
    "resid_mid", "residual stream between attention and MLP, `blocks.{layer}.hook_resid_mid`."
)
collect_attn_out = _sibling(
    "attn_out", "output of each attention layer, `blocks.{layer}.hook_attn_out`."
)
collect_mlp_out = _sibling("mlp_out", "output of each MLP, `blocks.{layer}.hook_mlp_out`.")
collect_z = _sibling(
    "z", "sum of values by each head, `blocks.{layer}.attn.hook_z`; `acts.tensor(layer)` is by head.", "[text layer (head d_head)]",
)  # fmt: skip
collect_q = _sibling(
    "q", "queries of each head, `blocks.{layer}.attn.hook_q`; `acts.tensor(layer)` is by head.", "[text layer (head d_head)]",
)  # fmt: skip
collect_k = _sibling(
    "k", "keys, `blocks.{layer}.attn.hook_k`, with grouped queries of n_key_value_heads heads.", "[text layer (head d_head)]",
)  # fmt: skip
collect_v = _sibling(
    "v", "values, `blocks.{layer}.attn.hook_v`, with grouped queries of n_key_value_heads heads.", "[text layer (head d_head)]",
)  # fmt: skip
collect_pattern = _sibling(
    "pattern",
    """attention, `blocks.{layer}.attn.hook_pattern`: of each head what the pooled tokens pay to each token of their text.

    Keys are counted over real tokens, up to the longest text's last; behind the end of a text they are 0.""",
    "[text layer (head key)]",
)
collect_mlp_post = _sibling(
    "mlp_post", "hidden layer of each MLP, `blocks.{layer}.mlp.hook_post`.", "[text layer d_mlp]"
)
collect_embed = _sibling(
    "embed", "token embeddings, `hook_embed` (one layer, number 0): the baseline without a model."
)


@spelled
def collect(
    model: HookedModel,
    texts: Texts,
    hook_point: AnyPoint,
    *,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> Activations:
    """Read the activations of many texts at a hook point given by name.

    Args:
        model: As for `collect_resid_post`, and so is everything else but the hook point.
        texts: What is read.
        hook_point: `embed`, `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `mlp_post`, `z`, `q`, `k`, `v` or `pattern`.
        layers: Block indices; None is every block.
        pooling: How tokens become rows.
        prepend_bos: None follows the model's tokenizer.
        padding_side: Which side to pad.
        batching: How many are taken at once.
        long: What is done with a text of more tokens than the model reads.
        emotions: Labels of plain texts.
        topics: Their topics.
        progress: Show a bar.

    Returns:
        `Activations`, as of the function of that name.

    Raises:
        KeyError, ValueError, FloatingPointError: as `collect_resid_post`.

    Example:
        >>> from emolens.collect import collect
        >>> collect(model, ["The door was open."], "mlp_out", layers=[1])
        Activations(mlp_out, layers 1, 1 rows x 32, 1 texts)
    """
    recipe = make_recipe(model, hook_point, options)
    corpus = open_corpus(texts, options.get("emotions"), options.get("topics"))
    pieces = list(corpus.slices(recipe.shard))
    n_texts = sum(len(piece.texts) for piece in pieces)
    check_number(recipe, n_texts)
    read = [encode_slice(model, recipe, piece) for piece in pieces]
    recipe = recipe.of_texts(model, check_used(recipe, read, model.cfg.n_ctx))
    with Progress(recipe, n_texts, progress) as bar:
        return join(collect_slice(model, recipe, corpus, slice, bar) for slice in read)


def _batches(lengths: dict[int, int], batching: Batching, overhead: int) -> list[list[int]]:
    """Cut texts, sorted by length, into batches at the least cost:  sum over batches of (width x texts + overhead), in tokens.

    A plan that depends on nothing but its arguments.

    >>> _batches({0: 100, 1: 9, 2: 90, 3: 10}, em.Batching(tokens=2048), 32)
    [[0, 2], [3, 1]]
    """
    most = math.inf if batching.tokens is None else index(batching.tokens)
    texts = len(lengths) if batching.texts is None else index(batching.texts)
    order = sorted(lengths, key=lambda i: (-lengths[i], i))
    cost, start = [0] + [0] * len(order), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        found: list[tuple[int, int]] = []
        # longest first: the width only grows as the batch does
        for begin in range(end - 1, -1, -1):
            n, width = end - begin, lengths[order[begin]]
            if n > 1 and (n * width > most or n > texts):
                break
            found.append((cost[begin] + n * width + overhead, begin))
        cost[end], start[end] = min(found)
    cuts, end = [], len(order)
    while end:
        cuts.append((start[end], end))
        end = start[end]
    return [order[begin:end] for begin, end in reversed(cuts)]


def collect_slice(
    model: HookedModel, recipe: Recipe, corpus: Corpus, read: Encoded, progress: Progress
) -> Activations:
    """The pooled activations of one slice; the only way from texts to rows."""
    piece, encoded, plans = read.piece, read.encoded, read.plans
    used = [i for i, plan in enumerate(plans) if plan]
    sampling = every_token(limit=SAMPLED)
    neutral = [i for i in used if corpus.has_neutral and piece.labels[i]["split"] == "neutral"]
    # the phase goes round from text to text, so that every position is sampled as often as it occurs
    samples = {
        i: spread_positions(len(encoded[i].ids), SAMPLED, (piece.start + i) * GOLDEN % 1)
        for i in neutral
    }
    pooled = recipe.pooling.kind in ("mean", "last")
    prefixes = (
        {i: [n for n in LENGTHS if n < len(encoded[i].ids)] for i in neutral} if pooled else {}
    )
    passes = _Pass(model, recipe, encoded, plans, samples, prefixes)
    lengths = {i: len(encoded[i].ids) for i in used}
    overhead = OVERHEAD["cpu" if passes.device.type == "cpu" else "other"]
    for batch in _batches(lengths, recipe.batching, overhead):
        passes.run(batch)
        progress.step(len(batch), sum(len(encoded[i].ids) for i in batch))
    infos = tuple(
        TextInfo(**piece.labels[i], sha256=text_hash(encoded[i].text), n_tokens=len(encoded[i].ids))
        for i in used
    )
    record = {
        "model": recipe.model,
        "tokenization": recipe.tokenization,
        "ids_sha256": ids_hash(encoded),
        "prepend_bos": recipe.prepend_bos,
        "pooling": {k: v for k, v in asdict(recipe.pooling).items() if k != "spans"},
        "batch_tokens": recipe.batching.tokens,
        "dropped_texts": len(encoded) - len(used),
        "truncated_texts": read.truncated,
        "split_batches": passes.n_splits,
        **corpus.info,
    }
    renumber = {old: new for new, old in enumerate(used)}
    main = passes.result("main", renumber, infos, record)
    if not samples:
        return main
    tokens = record | {"pooling": {k: v for k, v in asdict(sampling).items() if k != "spans"}}
    return replace(
        main,
        neutral_tokens=passes.result("sample", renumber, infos, tokens),
        neutral_prefixes=passes.result("prefix", renumber, infos, record) if prefixes else None,
    )


class _Pass:
    """Forward passes to the deepest layer asked for; the hooks pool and let go, and here is what they put aside."""

    def __init__(
        self,
        model: HookedModel,
        recipe: Recipe,
        encoded: list[EncodedText],
        plans: list[list[int]],
        samples: dict[int, list[int]],
        prefixes: dict[int, list[int]],
    ) -> None:
        self.model, self.recipe, self.encoded = model, recipe, encoded
        self.plans = {"main": dict(enumerate(plans)), "sample": samples, "prefix": prefixes}
        self.device = device_of(model)
        points = model.hook_dict
        self.points = [points[hook_name(recipe.hook_point, layer)] for layer in recipe.layers]
        self.embed = points["hook_embed"]
        self.options, last = ending_at(model, max(recipe.layers) + 1)
        self.last = [(points[name], hook) for name, hook in last]
        self.by_token = recipe.pooling.kind == "tokens"
        self.last_only = recipe.pooling.kind == "last"
        self.parts: dict[str, list[dict[str, Any]]] = {"main": [], "sample": [], "prefix": []}
        self.histogram = torch.zeros((len(recipe.layers), NORM_BINS), dtype=torch.int64)
        self.sinks: dict[int, Tensor] = {}
        self.n_splits = 0

    def run(self, batch: list[int]) -> None:
        """One batch; where memory runs out, its two halves."""
        try:
            self._forward(batch)
            return
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                n = len(self.encoded[batch[0]].ids)
                raise MemoryError(
                    f"one text of {n} tokens does not fit into memory on {self.device}"
                ) from error
        if self.device.type == "cuda":  # outside the handler, whose traceback holds the tensors
            torch.cuda.empty_cache()
        self.n_splits += 1
        middle = (len(batch) + 1) // 2
        self.run(batch[:middle])
        self.run(batch[middle:])

    def _forward(self, batch: list[int]) -> None:
        side, layers = self.recipe.padding_side, self.recipe.layers
        tokens, mask = pad([self.encoded[i] for i in batch], side, self.device)
        width, b = tokens.shape[1], len(batch)
        offset = [width - len(self.encoded[i].ids) if side == "left" else 0 for i in batch]
        real = mask.bool()
        first = real & (mask.cumsum(-1) == 1)
        rest = real & ~first
        alone = not bool(rest.any(-1).all())  # a text of one token has no rest
        looks = self.recipe.hook_point == "pattern"  # its norm says where a token looks: no sink

        def columns(chosen: dict[int, list[int]]) -> tuple[Tensor, Tensor, list[int], list[int]]:
            at = [
                (row, offset[row] + q, i, q)
                for row, i in enumerate(batch)
                for q in chosen.get(i, ())
            ]
            row, column = (
                torch.tensor([a[k] for a in at], dtype=torch.long, device=self.device)
                for k in (0, 1)
            )
            return row, column, [a[2] for a in at], [a[3] for a in at]

        places = {name: columns(chosen) for name, chosen in self.plans.items()}
        weight = torch.zeros((b, width), device=self.device)
        weight[places["main"][0], places["main"][1]] = 1.0
        by_token = ["main"] * self.by_token + ["sample"] * bool(places["sample"][2])
        pooled: dict[int, Tensor] = {}
        by_prefix = ["prefix"] * bool(places["prefix"][2])
        tokens_at: dict[str, dict[int, Tensor]] = {"main": {}, "sample": {}, "prefix": {}}
        ordinary_at = {
            name: torch.ones(len(place[2]), dtype=torch.bool) for name, place in places.items()
        }
        histogram, sinks = torch.zeros_like(self.histogram), torch.zeros((b, len(layers)))

        def hook(act: Tensor, hook: Any, slot: int) -> None:
            x = act if slot < 0 else self._by_token(act, offset)
            # sums run in float32 whatever the dtype; a block may be on another device
            x = x.float().to(self.device)
            norm = torch.linalg.vector_norm(x, dim=-1)
            median = norm.masked_fill(~rest, torch.nan).nanmedian(-1).values
            if alone:
                median = torch.where(rest.any(-1), median, norm[first])
            ordinary = rest & (norm < SINK * median[:, None]) if not looks else rest
            if slot >= 0:
                histogram[slot] += norm_bins(norm[ordinary])
                sinks[:, slot] = (norm[first] / median).cpu()
            if not self.by_token:
                w = weight * ordinary
                # "last" or a span may be the first token, if asked for
                w = torch.where(w.sum(-1, keepdim=True) > 0, w, weight)
                pooled[slot] = torch.einsum("bpd,bp->bd", x, w / w.sum(-1, keepdim=True)).cpu()
            for name in by_token:
                row, column = places[name][:2]
                tokens_at[name][slot] = x[row, column].cpu()
                ordinary_at[name] &= ordinary[row, column].cpu()
            for name in by_prefix:
                row, column = places[name][:2]
                tokens_at[name][slot] = (
                    x[row, column] if self.last_only else running_mean(x, ordinary, row, column)
                ).cpu()

        hooks = [(point, partial(hook, slot=slot)) for slot, point in enumerate(self.points)]
        hooks += [(self.embed, partial(hook, slot=-1)), *self.last]
        # not inference_mode: TransformerLens may grow its rotary cache here, and gradients need it later
        with torch.no_grad(), fused(self.model), _attached(self.model, hooks):
            self.model(tokens, attention_mask=self._seen(mask), **self.options)
        # only now: a pass that ran out of memory half way leaves nothing behind
        self.histogram += histogram
        self.sinks |= dict(zip(batch, sinks, strict=True))
        if not self.by_token:
            self._keep("main", pooled, batch, [-1] * b, torch.ones(b, dtype=torch.bool))
        for name in by_token + by_prefix:
            self._keep(name, tokens_at[name], *places[name][2:], ordinary_at[name])

    def _by_token(self, act: Tensor, offset: Sequence[int]) -> Tensor:
        """`[batch pos width]`: heads side by side; of a pattern, in each the attention that a token pays to every token of its text."""
        if self.recipe.hook_point != "pattern":
            return act.flatten(2)
        heads, width = act.shape[1], act.shape[-1]
        keys = torch.arange(self.recipe.width // heads, device=act.device)[None]
        column = keys + torch.tensor(offset, device=act.device)[:, None]
        index = column.clamp_max(width - 1)[:, None, None].expand(-1, *act.shape[1:3], -1)
        paid = act.gather(-1, index) * (column < width)[:, None, None]
        return rearrange(paid, "batch head query key -> batch query (head key)")

    def _seen(self, mask: Tensor) -> Tensor | None:
        """The mask that the model needs: padding on the right none, for no real token looks at what comes after it.

        With one, Hugging Face leaves the faster causal attention; a `HookedTransformer` finds out by itself (`fused`).
        """
        return None if self.recipe.padding_side == "right" and not is_hooked(self.model) else mask

    def _keep(
        self,
        part: str,
        at: dict[int, Tensor],
        text: list[int],
        position: list[int],
        ordinary: Tensor,
    ) -> None:
        rows = torch.stack([at[slot] for slot in range(len(self.recipe.layers))], 1)
        found = {"text": text, "position": position, "ordinary": ordinary}
        self.parts[part].append({"rows": rows, "embed": at[-1]} | found)

    def result(
        self, part: str, renumber: dict[int, int], texts: tuple[TextInfo, ...], info: dict[str, Any]
    ) -> Activations:
        pieces, hook_point, layers = self.parts[part], self.recipe.hook_point, self.recipe.layers
        none = torch.zeros((0, len(layers), self.recipe.width))
        rows = torch.cat([none, *(p["rows"] for p in pieces)])
        none = torch.zeros((0, self.model.cfg.d_model))
        embed = torch.cat([none, *(p["embed"] for p in pieces)])
        text = torch.tensor([renumber[i] for p in pieces for i in p["text"]], dtype=torch.long)
        position = torch.tensor([q for p in pieces for q in p["position"]], dtype=torch.long)
        # before the choice of ordinary tokens, which NaN never is
        bad = ~torch.isfinite(rows).all(-1).all(0)
        if bad.any():
            raise not_finite(
                f"{hook_point} of layer {layers[int(bad.nonzero()[0])]}", info["model"]["dtype"]
            )
        order = torch.argsort(text * 1_000_000 + position.clamp_min(0))  # as given, and as read
        # a token that is a sink at some layer is no ordinary token
        if self.by_token or part == "sample":
            order = order[torch.cat([p["ordinary"] for p in pieces])[order]]
        sinks = [self.sinks[i] for i in renumber]
        return Activations(
            hook_point=hook_point,
            layers=layers,
            rows=rows[order],
            embed=embed[order],
            row_text=text[order],
            row_position=position[order],
            texts=texts,
            norm_histogram=self.histogram,
            sinks=torch.stack(sinks) if sinks else torch.zeros((0, len(layers))),
            info=info,
            heads=site_heads(self.model, hook_point),
        )


@contextmanager
def _attached(
    model: HookedModel, hooks: Sequence[tuple[Any, Callable[..., None]]]
) -> Iterator[None]:
    """`model.hooks` for hook points that have been looked up: TransformerLens looks each name up in `hook_dict`, which a bridge makes anew."""
    level = model.context_level = model.context_level + 1  # so that only these hooks are removed
    try:
        for point, hook in hooks:
            point.add_hook(hook, level=level)
        yield
    finally:
        for point, _ in hooks:
            point.remove_hooks("fwd", level=level)
        model.context_level -= 1

"""What is asked of a collection, checked before a model runs: layers, batches, texts that are too long."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
from tqdm import tqdm

from emolens._typing import Blocks, HookedModel, HookPoint, Text
from emolens.collect.pooling import Pooling, mean_over_tokens, pooled_positions
from emolens.models.identity import model_info
from emolens.models.points import check_layers, device_of
from emolens.models.tokens import EncodedText, encode, tokenization
from emolens.sets.corpus import Corpus, Long, Slice
from emolens.sets.emotion_sets import EmotionSet

SAMPLED = (
    24  # single tokens that are kept of each neutral text of a set, for its neutral components
)
OVERHEAD = {
    "cpu": 32,
    "other": 2048,
}  # what a batch costs beside its tokens, in tokens: a CPU is busy with few, a GPU is not
Texts = EmotionSet | Corpus | Text | Iterable[Text] | Path  # and tables of `datasets`


@dataclass(frozen=True)
class Recipe:
    """Everything that is decided before the first forward pass."""

    model: dict[str, Any]
    tokenization: dict[str, Any]
    hook_point: HookPoint
    layers: tuple[int, ...]
    pooling: Pooling
    prepend_bos: bool | None
    padding_side: Literal["left", "right"]
    batch_tokens: int
    batch_size: int | None
    shard_texts: int
    long: Long


def as_begun(options: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """Options with what a begun folder has chosen where they leave it open."""
    chosen = {
        k: manifest["options"][k] for k in ("batch_tokens", "shard_texts") if options.get(k) is None
    }
    return options | chosen


def make_recipe(
    model: HookedModel,
    hook_point: HookPoint,
    *,
    layers: Blocks | None = None,
    pooling: Pooling | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] = "right",
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    shard_texts: int | None = None,
    long: Long = "raise",
) -> Recipe:
    """Check what is asked of a collection, and choose what is left open; no model runs here."""
    info = model_info(model).to_dict()
    layers = check_layers(model, hook_point, layers)
    _check_one_piece(model)
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}; allowed: 'left', 'right'")
    if long not in get_args(Long):
        raise ValueError(f"long={long!r}; allowed: 'raise', 'truncate', 'skip'")
    for name, value in (
        ("batch_tokens", batch_tokens),
        ("batch_size", batch_size),
        ("shard_texts", shard_texts),
    ):
        if value is not None and value < 1:
            raise ValueError(
                f"{name}={value}; batch_tokens, batch_size and shard_texts must be at least 1"
            )
    on_cpu = device_of(model).type == "cpu"
    return Recipe(
        info,
        tokenization(getattr(model, "tokenizer", None)),
        hook_point,
        layers,
        pooling or mean_over_tokens(),
        prepend_bos,
        padding_side,
        batch_tokens or token_budget(model),
        batch_size,
        shard_texts or (128 if on_cpu else 512),
        long,
    )


def _check_one_piece(model: HookedModel) -> None:
    """Refuse a model that was moved or cast in part: torch would say so deep inside a block, or compute in the wrong precision."""
    first = model.W_E
    # not a matrix: quantised ones are integers
    last = next(
        (p for p in reversed([*model.blocks[-1].parameters()]) if p.is_floating_point()), first
    )
    says = device_of(model).type
    if first.device.type != says and first.device.type != "meta":  # meta: offloaded by accelerate
        raise ValueError(
            f"this model's cfg says {says}, its weights are on {first.device.type}: move it with model.to()"
        )
    if first.dtype != last.dtype:
        a, b = (str(t.dtype).removeprefix("torch.") for t in (first, last))
        raise ValueError(
            f"this model is {a} in its embedding and {b} in its last block: load it in one, with dtype="
        )


def token_budget(model: HookedModel) -> int:
    """Tokens of a batch whose forward pass takes a quarter of the free memory, at most 2048 on a CPU and 65,536 elsewhere."""
    cfg = model.cfg
    device = device_of(model)
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    each = token_bytes(
        cfg.d_model,
        getattr(cfg, "d_mlp", None) or 4 * cfg.d_model,
        cfg.n_heads,
        min(cfg.n_ctx, 1024),
    )
    return max(256, min(free // 4 // each, 2048 if device.type == "cpu" else 65_536))


def token_bytes(d_model: int, d_mlp: int, n_heads: int, width: int) -> int:
    """Memory of a token in a forward pass:  4 (8 d_model + 4 d_mlp + 3 n_heads width), the stream, the MLP and the attention pattern."""
    return 4 * (8 * d_model + 4 * d_mlp + 3 * n_heads * width)


class Progress:
    """A bar over texts that says how many tokens a second go through."""

    def __init__(self, recipe: Recipe, n_texts: int, show: bool) -> None:
        self.bar = tqdm(total=n_texts, unit="text", disable=not show, delay=0.5)
        self.bar.set_description(f"{recipe.hook_point}, {len(recipe.layers)} layers")
        self.n_tokens, self.start = 0, time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, n_texts: int, n_tokens: int) -> None:
        self.n_tokens += n_tokens
        speed = self.n_tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{speed:,.0f} tok/s", refresh=False)
        self.bar.update(n_texts)


def check_number(recipe: Recipe, n_texts: int) -> None:
    """Refuse no texts, and spans that are not one a text."""
    if not n_texts:
        raise ValueError("no texts given")
    spans = recipe.pooling.spans
    if spans is not None and len(spans) != n_texts:
        raise ValueError(f"char_span: {len(spans)} spans for {n_texts} texts")


def check_used(recipe: Recipe, read: Iterable[Encoded], n_ctx: int) -> None:
    """Reads all of it: any error of a single text comes now; and at least one of them must be left by the policies."""
    some_left, some_fit = False, False
    for piece in read:
        some_left = any(piece.plans) or some_left
        some_fit = any(len(e.ids) <= n_ctx for e in piece.encoded) or some_fit
    if not some_left and not some_fit:
        raise ValueError(
            f"every text is longer than the {n_ctx} tokens that this model reads, and was left out: choose long='truncate' (--long truncate)"
        )
    if not some_left:
        long = " or longer than the model reads" if recipe.long == "skip" else ""
        raise ValueError(
            f"every text is shorter than skip={recipe.pooling.skip} tokens{long}; lower skip, or use short='second_half'"
        )


@dataclass(frozen=True)
class Encoded:
    """A slice as tokens, and of each text the positions that are pooled: none for one that a policy leaves out."""

    piece: Slice
    encoded: list[EncodedText]
    plans: list[list[int]]
    truncated: int

    @property
    def number(self) -> int:
        return self.piece.number


def encode_slice(model: HookedModel, recipe: Recipe, piece: Slice) -> Encoded:
    """Everything about a slice that can be refused before a forward pass; errors say where the text stands."""
    encoded = encode(
        model, piece.texts, prepend_bos=recipe.prepend_bos, first=piece.start, any_length=True
    )
    plans, most, truncated = [], model.cfg.n_ctx, 0
    for i, (e, label, place) in enumerate(zip(encoded, piece.labels, piece.places, strict=True)):
        number, at = piece.start + i, f" ({place})" if place else ""
        if (n := len(e.ids)) > most:
            if recipe.long == "raise":
                raise ValueError(
                    f"text {number} has {n} tokens; this model reads {most}{at}: shorten it, or choose long='truncate' or 'skip' "
                    "(--long of extract and score)"
                )
            if recipe.long == "skip":
                plans.append([])
                continue
            e = encoded[i] = replace(e, ids=e.ids[:most], offsets=e.offsets[:most])
            truncated += 1
        try:
            plans.append(pooled_positions(e, recipe.pooling, number, label["id"]))
        except ValueError as error:
            raise ValueError(f"{error}{at}") from error
    return Encoded(piece, encoded, plans, truncated)

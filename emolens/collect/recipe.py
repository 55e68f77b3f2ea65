"""What is asked of a collection, checked before a model runs: layers, batches, texts that are too long."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypedDict, TypeVar, get_args

import psutil
import torch

from emolens._typing import (
    AnyPoint,
    Blocks,
    HookedModel,
    Text,
    whole_number,
)
from emolens.collect.pooling import Pooling, mean_over_tokens, pooled_positions
from emolens.collect.progress import progress_bar
from emolens.models.identity import model_info
from emolens.models.points import check_layers, device_of
from emolens.models.tokens import EncodedText, encode, tokenization
from emolens.sets.corpus import Corpus, Long, Slice
from emolens.sets.emotion_sets import EmotionSet

SAMPLED = (
    24  # single tokens that are kept of each neutral text of a set, for its neutral components
)
# what a batch costs beside its tokens, in tokens: a CPU is busy with few, a GPU is not
OVERHEAD = {"cpu": 32, "other": 2048}
Texts = EmotionSet | Corpus | Text | Iterable[Text] | Path  # and tables of `datasets`
F = TypeVar("F")


@dataclass(frozen=True)
class Batching:
    """How many texts are taken at once; the numbers that are collected do not depend on it beyond float noise.

    Args:
        tokens: Of a batch, padding included; None takes what a quarter of the free memory holds, at most 2048 on a CPU. A batch that
            runs out of memory all the same is halved, and counted in `info["split_batches"]`.
        texts: Of a batch at most; None leaves it to `tokens`.
        shard: Texts that are sorted by length together (and, in `collect_to`, are one file); None is 128 on a CPU, else 512.

    Raises:
        ValueError: a number that is no whole one, or below 1.

    Example:
        >>> em.Batching(tokens=np.int64(4096), shard=64)
        Batching(tokens=4096, texts=None, shard=64)
    """

    tokens: SupportsIndex | None = None
    texts: SupportsIndex | None = None
    shard: SupportsIndex | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None:
                object.__setattr__(self, name, whole_number(f"Batching: {name}", value))


class Options(TypedDict, total=False):
    """What every `collect_*` can be told; `collect_resid_post` says what each means."""

    layers: Blocks | None
    pooling: Pooling | None
    prepend_bos: bool | None
    padding_side: Literal["left", "right"]
    batching: Batching | None
    long: Long
    emotions: Iterable[Any] | None
    topics: Iterable[Any] | None


DEFAULTS: dict[str, Any] = dict.fromkeys(Options.__annotations__)
DEFAULTS |= {"padding_side": "right", "long": "raise"}


def spelled(function: F) -> F:
    """Let the signature of a function that takes `**options: Unpack[Options]` name each of them, with its default."""
    plain = inspect.signature(function)  # pyright: ignore[reportArgumentType]  # a function
    kind = inspect.Parameter.KEYWORD_ONLY
    hints = {k: getattr(a, "__forward_arg__", a) for k, a in Options.__annotations__.items()}
    options = [
        inspect.Parameter(k, kind, default=DEFAULTS[k], annotation=a) for k, a in hints.items()
    ]
    own = [p for p in plain.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    data, rest = [p for p in own if p.kind is not kind], [p for p in own if p.kind is kind]
    function.__signature__ = plain.replace(parameters=[*data, *options, *rest])  # type: ignore[attr-defined]  # read by help() and editors
    return function


@dataclass(frozen=True)
class Recipe:
    """Everything that is decided before the first forward pass; `width` of a row as soon as the texts are read."""

    model: dict[str, Any]
    tokenization: dict[str, Any]
    hook_point: AnyPoint
    layers: tuple[int, ...]
    pooling: Pooling
    prepend_bos: bool | None
    padding_side: Literal["left", "right"]
    batching: Batching
    long: Long
    width: int = 0

    @property
    def shard(self) -> int:
        """Texts of a slice."""
        assert self.batching.shard is not None  # `make_recipe` has chosen
        return index(self.batching.shard)

    def of_texts(self, model: HookedModel, longest: int) -> Recipe:
        """The recipe for texts of so many tokens at most: a row of an attention pattern is as wide as the longest of them."""
        return replace(self, width=site_width(model, self.hook_point, longest))


def as_begun(options: Options, manifest: Mapping[str, Any]) -> Options:
    """Options with what a begun folder has chosen where they leave it open."""
    asked = asdict(options.get("batching") or Batching())
    begun = manifest["options"].get("batching", {})  # earlier versions had other names
    given = {k: v for k, v in asked.items() if v is not None}
    return {**options, "batching": Batching(**(begun | given))}


def make_recipe(model: HookedModel, hook_point: AnyPoint, options: Options) -> Recipe:
    """Check what is asked of a collection, and choose what is left open; no model runs here."""
    for name in options:
        if name not in DEFAULTS:
            known = ", ".join(DEFAULTS)
            raise TypeError(f"unexpected keyword argument {name!r}; options of collecting: {known}")
    asked: dict[str, Any] = {**DEFAULTS, **options}
    info = model_info(model).to_dict()
    layers = check_layers(model, hook_point, asked["layers"])
    _check_one_piece(model)
    if asked["padding_side"] not in ("left", "right"):
        raise ValueError(f"padding_side={asked['padding_side']!r}; allowed: 'left', 'right'")
    if asked["long"] not in get_args(Long):
        raise ValueError(f"long={asked['long']!r}; allowed: 'raise', 'truncate', 'skip'")
    batching = asked["batching"] or Batching()
    if not isinstance(batching, Batching):
        raise TypeError(f"batching={batching!r}; give Batching(tokens=..., texts=..., shard=...)")
    on_cpu = device_of(model).type == "cpu"
    return Recipe(
        model=info,
        tokenization=tokenization(getattr(model, "tokenizer", None)),
        hook_point=hook_point,
        layers=layers,
        pooling=asked["pooling"] or mean_over_tokens(),
        prepend_bos=asked["prepend_bos"],
        padding_side=asked["padding_side"],
        batching=Batching(
            batching.tokens or token_budget(model),
            batching.texts,
            batching.shard or (128 if on_cpu else 512),
        ),
        long=asked["long"],
    )


def site_heads(model: HookedModel, hook_point: AnyPoint) -> int | None:
    """Heads that a hook point has apart (with grouped queries k and v have fewer); None where it has none."""
    n_heads = model.cfg.n_heads
    if hook_point in ("k", "v"):
        return getattr(model.cfg, "n_key_value_heads", None) or n_heads
    return n_heads if hook_point in ("z", "q", "pattern") else None


def site_width(model: HookedModel, hook_point: AnyPoint, longest: int) -> int:
    """Numbers of one token at a hook point, heads side by side."""
    heads = site_heads(model, hook_point)
    if heads is not None:
        return heads * (longest if hook_point == "pattern" else model.cfg.d_head)
    return model.cfg.d_mlp if hook_point == "mlp_post" else model.cfg.d_model


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

    def __init__(self, recipe: Recipe, n_texts: int, progress: bool | None) -> None:
        what = f"{recipe.hook_point}, {len(recipe.layers)} layers"
        self.bar = progress_bar(range(n_texts), "text", progress, what)
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


def check_used(recipe: Recipe, read: Iterable[Encoded], n_ctx: int) -> int:
    """The tokens of the longest text that is used.

    Reads all of it: any error of a single text comes now; and at least one of them must be left by the policies.
    """
    some_fit, longest = False, 0
    for piece in read:
        used = (len(e.ids) for e, plan in zip(piece.encoded, piece.plans, strict=True) if plan)
        longest = max(longest, *used, 0)
        some_fit = any(len(e.ids) <= n_ctx for e in piece.encoded) or some_fit
    some_left = longest > 0
    if not some_left and not some_fit:
        raise ValueError(
            f"every text is longer than the {n_ctx} tokens that this model reads, and was left out: choose long='truncate' (--long truncate)"
        )
    if not some_left:
        long = " or longer than the model reads" if recipe.long == "skip" else ""
        raise ValueError(
            f"every text is shorter than skip={recipe.pooling.skip} tokens{long}; lower skip, or use short='second_half'"
        )
    return longest


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

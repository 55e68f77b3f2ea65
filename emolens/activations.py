"""Read the residual stream of many texts in one forward pass each, pooled inside the hook.

For each text and layer the mean over its *ordinary* tokens is kept: real tokens (never padding), not the first (an attention
sink with a hundred times the norm of the rest), with a norm below ten times the row's median, from token `skip` on. Per-token
activations leave the hook only where they are asked for. Results do not depend on batch size or padding side beyond float noise.
Nothing is estimated here: see `directions.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from emolens._typing import HookedModel, HookPoint, hook_name, typed
from emolens.emotion_sets import EmotionSet
from emolens.models import EncodedText, Text, encode, model_info, pad

SINK = 10.0  # a token whose norm exceeds this many medians of its row is not ordinary
NORM_BINS = 2048  # log-spaced from 1e-4 to 1e8: 1.4 % a bin
_LOG_LOW, _LOG_HIGH = -4.0, 8.0


@dataclass(frozen=True)
class Pooling:
    """How the tokens of a text become rows; made by the four functions below."""

    kind: Literal["mean", "last", "span", "tokens"]
    skip: int = 1
    short: Literal["second_half", "skip", "raise"] = "second_half"
    limit: int | None = None
    spans: tuple[tuple[int, int] | str, ...] | None = None


def mean_over_tokens(*, skip: int = 50, short: Literal["second_half", "skip", "raise"] = "second_half") -> Pooling:
    """Mean over the ordinary tokens from token `skip` on (0-based, counted over real tokens).

    Args:
        skip: Tokens left out at the start; the paper uses 50.
        short: For a text where that would leave less than half: "second_half" takes its second half, "skip" leaves the text
            out if nothing remains (and counts it), "raise" raises if nothing remains.
    """
    if skip < 1:
        raise ValueError(f"skip={skip}; at least 1: the first token is an attention sink")
    if short not in ("second_half", "skip", "raise"):
        raise ValueError(f"short={short!r}; allowed: 'second_half', 'skip', 'raise'")
    return Pooling("mean", skip=skip, short=short)


def last_token() -> Pooling:
    """The last real token of each text, found by the mask."""
    return Pooling("last")


def char_span(spans: Sequence[tuple[int, int] | str]) -> Pooling:
    """Mean over the ordinary tokens that overlap a span of characters, one span for each text.

    Args:
        spans: `(start, end)` in the text (for chat messages: in `models.render_chat`'s result), or the words themselves, which
            must occur exactly once.
    """
    return Pooling("span", spans=tuple(spans))


def every_token(*, skip: int = 1, limit: int | None = None) -> Pooling:
    """One row for each ordinary token from token `skip` on; at most `limit` a text, evenly spaced."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; at least 1, or None for every token")
    return Pooling("tokens", skip=max(skip, 1), limit=limit)


@dataclass(frozen=True)
class TextInfo:
    """What is known of a text besides its activations."""

    id: str
    emotion: str | None
    topic: str | None
    person: str | None
    split: str  # "main", "other_person", "neutral", or "" for plain texts
    sha256: str
    n_tokens: int


@dataclass(frozen=True, eq=False)
class Activations:
    """Pooled activations of many texts at one hook point.

    Attributes:
        rows: `[row layer d_model]`, float32. A row is a text, or a token when pooled by `every_token`.
        embed: `[row d_model]`, the embedding output pooled in the same way: what words alone carry.
        row_text: `[row]` index into `texts`.
        row_position: `[row]` position of the token among the real tokens of its text (-1 for pooled rows).
        texts: One entry a text.
        norm_histogram: `[layer bin]` counts of the residual norms of ordinary tokens, for exact merging and the median.
        sink_ratio: `[layer]` median over texts of the first token's norm over the median norm of its text.
        neutral_tokens: A sample of single tokens of the neutral texts, where a set was collected.
        info: Model, tokenisation, pooling and set, as they will be written into files.
    """

    hook_point: HookPoint
    layers: tuple[int, ...]
    rows: Float[Tensor, "row layer d_model"]
    embed: Float[Tensor, "row d_model"]
    row_text: Int[Tensor, " row"]
    row_position: Int[Tensor, " row"]
    texts: tuple[TextInfo, ...]
    norm_histogram: Int[Tensor, "layer bin"]
    sink_ratio: Float[Tensor, " layer"]
    info: dict[str, Any]
    neutral_tokens: Activations | None = None

    def __repr__(self) -> str:
        n, _, d = self.rows.shape
        layers = f"{min(self.layers)}..{max(self.layers)}" if len(self.layers) > 1 else str(min(self.layers))
        return f"Activations({self.hook_point}, layers {layers}, {n} rows x {d}, {len(self.texts)} texts)"

    @property
    def norm_median(self) -> Float[Tensor, " layer"]:
        """Median residual norm over ordinary tokens: the unit of a dose."""
        return histogram_median(self.norm_histogram)

    @property
    def norm_mean(self) -> Float[Tensor, " layer"]:
        """Mean residual norm over ordinary tokens, the paper's unit of a dose (to 0.7 %, from the same histogram)."""
        return histogram_mean(self.norm_histogram)

    def select(self, keep: Callable[[TextInfo], bool]) -> Activations:
        """The rows of the texts for which `keep` is true. Norm statistics stay those of the whole collection."""
        wanted = torch.tensor([keep(t) for t in self.texts], dtype=torch.bool)
        rows = wanted[self.row_text]
        renumber = torch.cumsum(wanted, 0) - 1
        return replace(
            self,
            rows=self.rows[rows],
            embed=self.embed[rows],
            row_text=renumber[self.row_text[rows]],
            row_position=self.row_position[rows],
            texts=tuple(t for t in self.texts if keep(t)),
        )

    def at(self, layers: Sequence[int]) -> Activations:
        """The same rows at some of the layers."""
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise ValueError(f"layer {missing[0]} was not collected; collected: {list(self.layers)}")
        index = [self.layers.index(layer) for layer in layers]
        return replace(
            self,
            layers=tuple(layers),
            rows=self.rows[:, index],
            norm_histogram=self.norm_histogram[index],
            sink_ratio=self.sink_ratio[index],
            neutral_tokens=None if self.neutral_tokens is None else self.neutral_tokens.at(layers),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically: it is there whole or not at all."""
        tensors: dict[str, Tensor] = {}
        headers: dict[str, str] = {}
        for prefix, part in (("", self), ("neutral_tokens.", self.neutral_tokens)):
            if part is not None:
                for name in ("rows", "embed", "row_text", "row_position", "norm_histogram", "sink_ratio"):
                    tensors[prefix + name] = getattr(part, name).clone(memory_format=torch.contiguous_format)
                header = {"hook_point": part.hook_point, "layers": part.layers, "info": part.info}
                headers[prefix or "self."] = json.dumps(header | {"texts": [asdict(t) for t in part.texts]})
        write_safetensors(path, tensors, {"format": "emolens.activations.1", **headers})

    @staticmethod
    def load(path: str | Path) -> Activations:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError, ValueError: no such file, or not one of these, or a truncated one.
        """
        tensors, metadata = read_safetensors(path, "emolens.activations.1")
        parts: dict[str, Activations] = {}
        for prefix in ("neutral_tokens.", ""):
            if (prefix or "self.") in metadata:
                header = json.loads(metadata[prefix or "self."])
                own = {
                    k.removeprefix(prefix): t
                    for k, t in tensors.items()
                    if k.startswith(prefix) and "." not in k[len(prefix) :]
                }
                parts[prefix] = Activations(
                    hook_point=header["hook_point"],
                    layers=tuple(header["layers"]),
                    texts=tuple(TextInfo(**t) for t in header["texts"]),
                    info=header["info"],
                    neutral_tokens=parts.get("neutral_tokens.") if not prefix else None,
                    **own,
                )
        return parts[""]


def collect_resid_post(
    model: HookedModel,
    texts: EmotionSet | Sequence[Text],
    *,
    layers: Sequence[int] | None = None,
    pooling: Pooling | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] = "right",
    batch_tokens: int = 2048,
    batch_size: int | None = None,
    emotions: Sequence[str] | None = None,
    topics: Sequence[str] | None = None,
    progress: bool = True,
) -> Activations:
    """Pooled residual stream after each block, `blocks.{layer}.hook_resid_post`, and the embeddings beside it.

    For text t and layer l the row is  r[t, l] = mean over ordinary tokens i >= skip of x[t, i, l].

    Args:
        model: A model from `load_model`, or your own `HookedTransformer` or `TransformerBridge`.
        texts: An emotion set (its stories in every split, its neutral texts, and a sample of neutral tokens), or plain texts, or
            chat messages.
        layers: Block indices, 0-based; None is every block.
        pooling: `mean_over_tokens()` (the default, skip=50), `last_token()`, `char_span(...)` or `every_token()`.
        prepend_bos: None follows the model's tokenizer; recorded in `info`.
        padding_side: Which side to pad; the result is the same.
        batch_tokens: Tokens of a batch, padding included.
        batch_size: Texts of a batch at most; None leaves it to `batch_tokens`.
        emotions, topics: Labels of plain texts, one a text.
        progress: Show a bar with tokens per second and the remaining time.

    Returns:
        `Activations` with rows `[text layer d_model]` in float32 on the CPU.

    Raises:
        KeyError: the model lacks the hook point (parallel-residual models have no `resid_mid`).
        ValueError: a layer that does not exist; a text too short to pool; labels that do not match the texts.
        FloatingPointError: NaN or infinity, with the first layer that has it.

    Reference:
        Anthropic 2026, *Emotion Concepts and their Function in a Large Language Model*, extraction of emotion vectors.
    """
    return collect(
        model, texts, "resid_post", layers=layers, pooling=pooling, prepend_bos=prepend_bos, padding_side=padding_side,
        batch_tokens=batch_tokens, batch_size=batch_size, emotions=emotions, topics=topics, progress=progress,
    )  # fmt: skip


def _sibling(hook_point: HookPoint, what: str) -> Callable[..., Activations]:
    def sibling(model: HookedModel, texts: EmotionSet | Sequence[Text], **options: Any) -> Activations:
        return collect(model, texts, hook_point, **options)

    sibling.__name__ = sibling.__qualname__ = f"collect_{hook_point}"
    sibling.__doc__ = f"Pooled {what}; arguments, result and errors as for `collect_resid_post`."
    return sibling


collect_resid_pre = _sibling("resid_pre", "residual stream before each block, `blocks.{layer}.hook_resid_pre`")
collect_resid_mid = _sibling("resid_mid", "residual stream between attention and MLP, `blocks.{layer}.hook_resid_mid`")
collect_attn_out = _sibling("attn_out", "output of each attention layer, `blocks.{layer}.hook_attn_out`")
collect_mlp_out = _sibling("mlp_out", "output of each MLP, `blocks.{layer}.hook_mlp_out`")
collect_embed = _sibling("embed", "token embeddings, `hook_embed` (one layer, number 0): the baseline without a model")


# --- the pass ---------------------------------------------------------------------------------------------------------


def collect(
    model: HookedModel,
    texts: EmotionSet | Sequence[Text],
    hook_point: HookPoint,
    *,
    layers: Sequence[int] | None = None,
    pooling: Pooling | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] = "right",
    batch_tokens: int = 2048,
    batch_size: int | None = None,
    emotions: Sequence[str] | None = None,
    topics: Sequence[str] | None = None,
    progress: bool = True,
) -> Activations:
    """`collect_resid_post` for a hook point given by name."""
    info = model_info(model).to_dict()
    layers = check_layers(model, hook_point, layers)
    pooling = pooling or mean_over_tokens()
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}; allowed: 'left', 'right'")
    if batch_tokens < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError("batch_tokens and batch_size must be at least 1")
    plain, labels = _label(texts, emotions, topics)
    if not plain:
        raise ValueError("no texts given")
    if pooling.kind == "span" and len(pooling.spans or ()) != len(plain):
        raise ValueError(f"char_span: {len(pooling.spans or ())} spans for {len(plain)} texts")
    encoded = encode(model, plain, prepend_bos=prepend_bos)
    sampling = every_token(limit=24) if isinstance(texts, EmotionSet) else None
    plans = [pooled_positions(e, pooling, i, labels[i]["id"]) for i, e in enumerate(encoded)]
    used = [i for i, plan in enumerate(plans) if plan]
    if not used:
        raise ValueError(
            f"every text is shorter than skip={pooling.skip} tokens; lower skip, or use short='second_half'"
        )
    samples = {
        i: pooled_positions(encoded[i], sampling, i, "") for i in used if sampling and labels[i]["split"] == "neutral"
    }

    passes = _Pass(hook_point, layers, pooling.kind == "tokens")
    device = getattr(model.cfg, "device", "cpu")
    with tqdm(
        total=sum(len(encoded[i].ids) for i in used), unit="tok", unit_scale=True, disable=not progress, delay=0.5
    ) as bar:
        bar.set_description(f"{hook_point} of {len(used)} texts")
        for batch in _batches(encoded, used, batch_tokens, batch_size):
            _forward(model, passes, encoded, plans, samples, batch, padding_side, device)
            bar.update(sum(len(encoded[i].ids) for i in batch))

    renumber = {old: new for new, old in enumerate(used)}
    infos = tuple(TextInfo(**labels[i], sha256=text_hash(encoded[i].text), n_tokens=len(encoded[i].ids)) for i in used)
    record = {
        "model": info,
        "prepend_bos": prepend_bos,
        "pooling": {k: v for k, v in asdict(pooling).items() if k != "spans"},
        "dropped_texts": len(encoded) - len(used),
        "set": texts.name if isinstance(texts, EmotionSet) else None,
        "set_sha256": texts.fingerprint if isinstance(texts, EmotionSet) else None,
        "antonyms": {e.name: e.antonym for e in texts.emotions if e.antonym} if isinstance(texts, EmotionSet) else None,
    }
    main = passes.result("main", renumber, infos, record)
    if sampling and samples:
        record = record | {"pooling": {k: v for k, v in asdict(sampling).items() if k != "spans"}}
        return replace(main, neutral_tokens=passes.result("sample", renumber, infos, record))
    return main


def check_layers(model: HookedModel, hook_point: HookPoint, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Layers that exist and carry the hook point; every one of the model for None."""
    n = model.cfg.n_layers
    if hook_point == "embed":
        layers = (0,)
    layers = tuple(range(n)) if layers is None else tuple(layers)
    if not layers:
        raise ValueError("layers is empty; give block indices, or None for all")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n:
            raise ValueError(f"layer {layer!r} does not exist; this model has layers 0 to {n - 1}")
        # an unknown name is silently ignored by one backend and an empty cache in another
        if hook_name(hook_point, layer) not in model.hook_dict:
            have = [
                p
                for p in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
                if hook_name(p, layer) in model.hook_dict
            ]  # type: ignore[arg-type]
            hint = " (a parallel-residual model adds attention and MLP at once)" if hook_point == "resid_mid" else ""
            raise KeyError(f"this model has no {hook_name(hook_point, layer)}{hint}; it has: {', '.join(have)}")
    return layers


def text_hash(text: str) -> str:
    """Identity of a text, to recognise it again (first 16 hex digits of its sha256)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _label(
    texts: EmotionSet | Sequence[Text], emotions: Sequence[str] | None, topics: Sequence[str] | None
) -> tuple[list[Text], list[dict[str, Any]]]:
    if isinstance(texts, EmotionSet):
        if emotions is not None or topics is not None:
            raise ValueError("an emotion set brings its own emotions and topics")
        plain: list[Text] = []
        labels = []
        for emotion in texts.names:
            for s in texts.stories[emotion]:
                plain.append(s.text)
                labels.append({"id": s.id, "emotion": emotion, "topic": s.topic, "person": s.person, "split": s.split})
        for n in texts.neutral:
            plain.append(n.text)
            labels.append({"id": n.id, "emotion": None, "topic": n.topic, "person": None, "split": "neutral"})
        return plain, labels
    if isinstance(texts, str):
        texts = [texts]
    for name, given in (("emotions", emotions), ("topics", topics)):
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{len(given)} {name} for {len(texts)} texts")
    return list(texts), [
        {
            "id": f"text-{i}",
            "emotion": emotions[i] if emotions else None,
            "topic": topics[i] if topics else None,
            "person": None,
            "split": "main" if emotions else "",
        }
        for i in range(len(texts))
    ]


def pooled_positions(e: EncodedText, pooling: Pooling, index: int, name: str) -> list[int]:
    """The positions (among the real tokens of a text) that are pooled; empty if the text is left out by policy."""
    n = len(e.ids)
    if pooling.kind == "last":
        return [n - 1]
    if pooling.kind == "span":
        assert pooling.spans is not None
        start, end = _span(pooling.spans[index], e.text, index)
        inside = [p for p, (a, b) in enumerate(e.offsets) if a < end and b > start and b > a]
        if not inside:
            raise ValueError(f"char_span: no token of text {index} lies in ({start}, {end}): {e.text[start:end]!r}")
        return inside
    start = pooling.skip
    if pooling.kind == "mean" and pooling.short == "second_half":
        start = max(1, min(start, n // 2))
    if start >= n:
        if pooling.short == "skip":
            return []
        raise ValueError(
            f"text {name or index} has {n} tokens, nothing is left after the first {start}"
            + (
                "; lower skip, or use short='second_half' or 'skip'"
                if n > 1
                else "; one token is only an attention sink"
            )
        )
    positions = list(range(start, n))
    if pooling.limit is not None and len(positions) > pooling.limit:
        step = len(positions) / pooling.limit
        positions = [positions[int((k + 0.5) * step)] for k in range(pooling.limit)]
    return positions


def _span(span: tuple[int, int] | str, text: str, index: int) -> tuple[int, int]:
    if isinstance(span, str):
        if not span or text.count(span) != 1:
            raise ValueError(
                f"char_span: {span!r} occurs {text.count(span) if span else 0} times in text {index}; it must occur once"
            )
        start = text.index(span)
        return start, start + len(span)
    start, end = span
    if not 0 <= start < end <= len(text):
        raise ValueError(f"char_span: ({start}, {end}) is not inside text {index}, which has {len(text)} characters")
    return start, end


def _batches(encoded: list[EncodedText], used: list[int], batch_tokens: int, batch_size: int | None) -> list[list[int]]:
    """Texts of similar length together, long ones first; a plan that depends on nothing but the texts and the two sizes."""
    order = sorted(used, key=lambda i: (-len(encoded[i].ids), i))
    batches: list[list[int]] = []
    for i in order:
        width = len(encoded[batches[-1][0]].ids) if batches else 0
        full = not batches or (len(batches[-1]) + 1) * width > batch_tokens or len(batches[-1]) == batch_size
        if full:
            batches.append([i])
        else:
            batches[-1].append(i)
    return batches


class _Pass:
    """Gathers what the hooks of one pass put aside."""

    def __init__(self, hook_point: HookPoint, layers: tuple[int, ...], by_token: bool) -> None:
        self.hook_point: HookPoint = hook_point
        self.layers, self.by_token = layers, by_token
        self.parts: dict[str, list[dict[str, Any]]] = {"main": [], "sample": []}
        self.histogram = torch.zeros((len(layers), NORM_BINS), dtype=torch.int64)
        self.sinks: list[Tensor] = []

    def result(
        self, part: str, renumber: dict[int, int], texts: tuple[TextInfo, ...], info: dict[str, Any]
    ) -> Activations:
        pieces = self.parts[part]
        text = torch.tensor([renumber[i] for p in pieces for i in p["text"]])
        position = torch.tensor([q for p in pieces for q in p["position"]])
        order = torch.argsort(text * 1_000_000 + position.clamp_min(0))  # texts as given, tokens as read
        rows = torch.cat([p["rows"] for p in pieces])[order]
        ordinary = torch.cat([p["ordinary"] for p in pieces])[order]
        bad = ~torch.isfinite(rows).all(-1).all(0)  # before the choice of ordinary tokens, which NaN never is
        if bad.any():
            layer = self.layers[int(bad.nonzero()[0])]
            raise FloatingPointError(
                f"{self.hook_point} of layer {layer} is not finite; half precision overflows here: load with dtype='float32' or 'bfloat16'"
            )
        if self.by_token or part == "sample":  # a token that is a sink at some layer is no ordinary token
            order, rows = order[ordinary], rows[ordinary]
        return Activations(
            hook_point=self.hook_point,
            layers=self.layers,
            rows=rows,
            embed=torch.cat([p["embed"] for p in pieces])[order],
            row_text=text[order],
            row_position=position[order],
            texts=texts,
            norm_histogram=self.histogram,
            sink_ratio=torch.cat(self.sinks).median(0).values,
            info=info,
        )


def _forward(
    model: HookedModel,
    passes: _Pass,
    encoded: list[EncodedText],
    plans: list[list[int]],
    samples: dict[int, list[int]],
    batch: list[int],
    padding_side: Literal["left", "right"],
    device: Any,
) -> None:
    """One forward pass to the deepest layer asked for; the hooks pool and let go."""
    tokens, mask = pad([encoded[i] for i in batch], padding_side, device)
    width, b = tokens.shape[1], len(batch)
    offset = [width - len(encoded[i].ids) if padding_side == "left" else 0 for i in batch]
    real = mask.bool()
    first = real & (mask.cumsum(-1) == 1)

    def columns(chosen: dict[int, list[int]]) -> tuple[Tensor, Tensor, list[int], list[int]]:
        at = [(row, offset[row] + q, i, q) for row, i in enumerate(batch) for q in chosen.get(i, ())]
        row, column = (torch.tensor([a[k] for a in at], dtype=torch.long, device=device) for k in (0, 1))
        return row, column, [a[2] for a in at], [a[3] for a in at]

    main = columns({i: plans[i] for i in batch})
    weight = torch.zeros((b, width), device=device)
    weight[main[0], main[1]] = 1.0
    sample = columns(samples)
    pooled: dict[int, Tensor] = {}
    tokens_at: dict[str, dict[int, Tensor]] = {"main": {}, "sample": {}}
    ordinary_at: dict[str, Tensor] = {
        name: torch.ones(len(part[0]), dtype=torch.bool) for name, part in (("main", main), ("sample", sample))
    }
    sinks = torch.zeros((b, len(passes.layers)))

    def hook(act: Tensor, hook: Any, slot: int) -> None:
        x = act.float()
        norm = torch.linalg.vector_norm(x, dim=-1)
        rest = real & ~first
        median = norm.masked_fill(~rest, torch.nan).nanmedian(-1).values
        median = torch.where(rest.any(-1), median, norm[first])  # a text of one token has no rest
        ordinary = rest & (norm < SINK * median[:, None])
        if slot >= 0:
            passes.histogram[slot] += _bins(norm[ordinary])
            sinks[:, slot] = (norm[first] / median).cpu()
        if passes.by_token:
            tokens_at["main"][slot] = x[main[0], main[1]].cpu()
            ordinary_at["main"] &= ordinary[main[0], main[1]].cpu()
        else:
            w = weight * ordinary
            w = torch.where(
                w.sum(-1, keepdim=True) > 0, w, weight
            )  # "last" or a span may be the first token, if asked for
            # the sum runs in float32 whatever the model's dtype
            pooled[slot] = torch.einsum("bpd,bp->bd", x, w / w.sum(-1, keepdim=True)).cpu()
        if len(sample[0]):
            tokens_at["sample"][slot] = x[sample[0], sample[1]].cpu()
            ordinary_at["sample"] &= ordinary[sample[0], sample[1]].cpu()

    hooks = [
        (hook_name(passes.hook_point, layer), partial(hook, slot=slot)) for slot, layer in enumerate(passes.layers)
    ]
    hooks.append(("hook_embed", partial(hook, slot=-1)))
    with (
        torch.no_grad()
    ):  # not inference_mode: TransformerLens may grow its rotary cache here, and gradients need it later
        model.run_with_hooks(
            tokens, attention_mask=mask, return_type=None, stop_at_layer=max(passes.layers) + 1, fwd_hooks=hooks
        )
    slots = range(len(passes.layers))
    if passes.by_token:
        at = tokens_at["main"]
        text, position, ordinary = main[2], main[3], ordinary_at["main"]
    else:
        at, text, position = pooled, list(batch), [-1] * b
        ordinary = torch.ones(b, dtype=torch.bool)
    passes.parts["main"].append(
        {
            "rows": torch.stack([at[s] for s in slots], 1),
            "embed": at[-1],
            "text": text,
            "position": position,
            "ordinary": ordinary,
        }
    )
    passes.sinks.append(sinks)
    if len(sample[0]):
        at = tokens_at["sample"]
        passes.parts["sample"].append(
            {
                "rows": torch.stack([at[s] for s in slots], 1),
                "embed": at[-1],
                "text": sample[2],
                "position": sample[3],
                "ordinary": ordinary_at["sample"],
            }
        )


# --- norms ------------------------------------------------------------------------------------------------------------


def _bins(norms: Tensor) -> Tensor:
    index = ((norms.clamp_min(1e-30).log10() - _LOG_LOW) / (_LOG_HIGH - _LOG_LOW) * NORM_BINS).long()
    return torch.bincount(index.clamp(0, NORM_BINS - 1).cpu(), minlength=NORM_BINS)


@typed
def histogram_median(histogram: Int[Tensor, "layer bin"]) -> Float[Tensor, " layer"]:
    """Median of log-binned norms, to half a bin (0.7 %).

    >>> histogram_median(_bins(torch.tensor([99.0, 100.0, 5000.0]))[None]).item()  # doctest: +ELLIPSIS
    100...
    """
    cumulative = histogram.cumsum(-1)
    index = (cumulative * 2 >= cumulative[:, -1:]).int().argmax(-1)
    return (10 ** (_LOG_LOW + (index.double() + 0.5) * (_LOG_HIGH - _LOG_LOW) / NORM_BINS)).float()


@typed
def histogram_mean(histogram: Int[Tensor, "layer bin"]) -> Float[Tensor, " layer"]:
    """Mean of log-binned norms, to half a bin (0.7 %).

    >>> histogram_mean(_bins(torch.tensor([100.0, 300.0]))[None]).item()  # doctest: +ELLIPSIS
    200...
    """
    index = torch.arange(NORM_BINS, device=histogram.device).double()
    middle = 10 ** (_LOG_LOW + (index + 0.5) * (_LOG_HIGH - _LOG_LOW) / NORM_BINS)
    counts = histogram.double()
    return (einsum(counts, middle, "layer bin, bin -> layer") / counts.sum(-1)).float()


# --- files ------------------------------------------------------------------------------------------------------------


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors with their metadata, whole or not at all."""
    with written_whole(path) as part:
        save_file(tensors, part, metadata)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A file to write beside the target, moved into place at the end: a reader never sees half a file, and none is left behind."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.chmod(0o644)  # safetensors makes private files; results are for sharing
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_safetensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of ours.

    Raises:
        FileNotFoundError, ValueError: no such file; truncated or not safetensors; not of this kind.
    """
    from safetensors import SafetensorError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format", "another program's file")
            if found != kind:
                raise ValueError(f"{path}: this is {found}, not {kind}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a truncated one") from error

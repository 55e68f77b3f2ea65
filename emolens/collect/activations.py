"""Pooled activations with what each row is: the value that estimators read.

Nothing is estimated here: see `directions/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from emolens._files import unknown
from emolens._typing import AnyPoint, Blocks, block_numbers, typed
from emolens.collect.moments import Moments
from emolens.shards import read_safetensors, vacant, write_safetensors

NORM_BINS = 2048  # log-spaced from 1e-4 to 1e8: 1.4 % a bin
_LOG_LOW, _LOG_HIGH = -4.0, 8.0
FORMATS = ("emolens.activations.2", "emolens.activations.1")  # written; read


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
        sinks: `[text layer]` the first token's norm over the median norm of its text.
        neutral_tokens: A sample of single tokens of the neutral texts, where a set was collected.
        neutral_prefixes: Beginnings of the neutral texts, pooled as the texts are (mean from the second token on, or the last token): a row for
            each of `LENGTHS` that a text reaches, its `row_position` the number of tokens after the first.
        info: Model, tokenisation, pooling and set, as they will be written into files.
        heads: Into how many heads a row of `z`, `q`, `k`, `v` or `pattern` is parted: they lie side by side in it.
    """

    hook_point: AnyPoint
    layers: tuple[int, ...]
    rows: Float[Tensor, "row layer d_model"]
    embed: Float[Tensor, "row d_model"]
    row_text: Int[Tensor, " row"]
    row_position: Int[Tensor, " row"]
    texts: tuple[TextInfo, ...]
    norm_histogram: Int[Tensor, "layer bin"]
    sinks: Float[Tensor, "text layer"]
    info: dict[str, Any]
    neutral_tokens: Activations | None = None
    neutral_prefixes: Activations | None = None
    heads: int | None = None

    def __repr__(self) -> str:
        n, _, d = self.rows.shape
        layers = (
            f"{min(self.layers)}..{max(self.layers)}"
            if len(self.layers) > 1
            else str(min(self.layers))
        )
        return f"Activations({self.hook_point}, layers {layers}, {n} rows x {d}, {len(self.texts)} texts)"

    @property
    def norm_median(self) -> Float[Tensor, " layer"]:
        """Median residual norm over ordinary tokens: the unit of a dose."""
        return histogram_median(self.norm_histogram)

    @property
    def norm_mean(self) -> Float[Tensor, " layer"]:
        """Mean residual norm over ordinary tokens, the paper's unit of a dose (to 0.7 %, from the same histogram)."""
        return histogram_mean(self.norm_histogram)

    @property
    def sink_ratio(self) -> Float[Tensor, " layer"]:
        """Median over texts of the first token's norm over the median norm of its text."""
        return self.sinks.median(0).values

    def chunks(self) -> Iterator[Activations]:
        """Itself: what a `Collection` gives piece by piece is here in one."""
        yield self

    def moments(self) -> Moments:
        """Sums over the texts of each emotion and topic, in float64."""
        return Moments.of([self])

    def select(self, keep: Callable[[TextInfo], bool]) -> Activations:
        """The texts for which `keep` is true, with all that belongs to them: rows, sinks, and for a neutral text its single tokens.

        So a choice of emotions that is to keep the neutral texts says so: ``lambda t: t.emotion in (None, "joy", "fear")``. The histogram
        of norms alone stays that of the whole collection: it holds no text apart, and is only the unit of a dose.
        """
        wanted = torch.tensor([bool(keep(t)) for t in self.texts], dtype=torch.bool)
        rows = wanted[self.row_text]
        renumber = torch.cumsum(wanted, 0) - 1
        return replace(
            self,
            rows=self.rows[rows],
            embed=self.embed[rows],
            row_text=renumber[self.row_text[rows]],
            row_position=self.row_position[rows],
            texts=tuple(t for t, kept in zip(self.texts, wanted.tolist(), strict=True) if kept),
            sinks=self.sinks[wanted],
            **{
                name: None if (part := getattr(self, name)) is None else part.select(keep)
                for name in _PARTS
            },
        )

    def without(self, topics: str | Iterable[str]) -> Activations:
        """Everything but some topics, no story, neutral text or neutral token of theirs: what may be fitted where these are judged.

        Raises:
            KeyError: a topic that no text here has.
        """
        left_out = {topics} if isinstance(topics, str) else set(topics)
        known = {t.topic for t in self.texts}
        if unknown_ones := sorted(left_out - known):
            raise KeyError(
                unknown("topic", unknown_ones[0], sorted(t for t in known if t is not None))
            )
        return self.select(lambda t: t.topic not in left_out)

    def at(self, layers: Blocks) -> Activations:
        """The same rows at one or some of the layers."""
        layers = block_numbers(layers)
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise ValueError(
                f"layer {missing[0]} was not collected; collected: {list(self.layers)}"
            )
        index = [self.layers.index(layer) for layer in layers]
        return replace(
            self,
            layers=layers,
            rows=self.rows[:, index],
            norm_histogram=self.norm_histogram[index],
            sinks=self.sinks[:, index],
            neutral_tokens=None if self.neutral_tokens is None else self.neutral_tokens.at(layers),
            neutral_prefixes=None
            if self.neutral_prefixes is None
            else self.neutral_prefixes.at(layers),
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a safetensors file, atomically: it is there whole or not at all.

        Raises:
            FileExistsError: the file is there and holds other activations, or something else; `overwrite` replaces it.
        """
        vacant(path, self._other, overwrite=overwrite)
        tensors: dict[str, Tensor] = {}
        headers: dict[str, str] = {}
        for prefix, part in (("", self), *((f"{name}.", getattr(self, name)) for name in _PARTS)):
            if part is not None:
                for name in _TENSORS:
                    tensors[prefix + name] = getattr(part, name).clone(
                        memory_format=torch.contiguous_format
                    )
                header = {"hook_point": part.hook_point, "layers": part.layers, "info": part.info}
                header |= {} if part.heads is None else {"heads": part.heads}
                headers[prefix or "self."] = json.dumps(
                    header | {"texts": [asdict(t) for t in part.texts]}
                )
        write_safetensors(path, tensors, {"format": FORMATS[0], **headers})

    def _other(self, file: Path) -> str | None:
        """What a file holds, in words; None if it is these activations."""
        try:
            found = Activations.load(file)
        except ValueError:
            return "something that is no activations of emolens"
        same = all(getattr(found, k) == getattr(self, k) for k in ("hook_point", "layers", "texts"))
        same = same and all(
            found.info.get(k) == self.info.get(k) for k in ("model", "prepend_bos", "pooling")
        )
        return None if same else f"other activations ({found!r} of {found.info['model']['name']})"

    @staticmethod
    def load(path: str | Path) -> Activations:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError, ValueError: no such file, or not one of these, or a truncated or damaged one.
        """
        tensors, metadata = read_safetensors(path, *FORMATS)
        parts: dict[str, Activations] = {}
        try:
            for prefix in (*(f"{name}." for name in _PARTS), ""):
                if (prefix or "self.") in metadata:
                    header = json.loads(metadata[prefix or "self."])
                    texts = tuple(TextInfo(**t) for t in header["texts"])
                    if (
                        metadata["format"] == FORMATS[1]
                    ):  # kept the median of the sinks only: it is that of every text
                        tensors[prefix + "sinks"] = tensors[prefix + "sink_ratio"].repeat(
                            len(texts), 1
                        )
                    parts[prefix] = Activations(
                        hook_point=header["hook_point"],
                        layers=tuple(header["layers"]),
                        texts=texts,
                        info=header["info"],
                        heads=header.get("heads"),
                        **{name: tensors[prefix + name] for name in _TENSORS},  # type: ignore[arg-type]  # no part among them
                    )
            whole, tokens, prefixes = (
                parts.get(prefix) for prefix in ("", *(f"{name}." for name in _PARTS))
            )
            if whole is None:
                raise KeyError("self.")
            return replace(whole, neutral_tokens=tokens, neutral_prefixes=prefixes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: its header is not that of activations ({error!r})"
            ) from error


def is_main(text: TextInfo) -> bool:
    """Whether a text is one that directions are made from."""
    return text.emotion is not None and text.split == "main"


_PARTS = ("neutral_tokens", "neutral_prefixes")  # activations of their own, of the neutral texts
_TENSORS = ("rows", "embed", "row_text", "row_position", "norm_histogram", "sinks")
COUNTED = (
    "dropped_texts",
    "truncated_texts",
    "split_batches",
)  # in `info`; added up over the slices


def join(parts: Iterable[Activations]) -> Activations:
    """Activations of consecutive slices of one corpus as those of the whole."""
    parts = list(parts)
    first = parts[0]
    offsets = torch.tensor([0, *(len(p.texts) for p in parts)]).cumsum(0).tolist()
    texts = tuple(chain.from_iterable(p.texts for p in parts))
    info = joined_info([p.info for p in parts])
    whole = Activations(
        hook_point=first.hook_point,
        layers=first.layers,
        rows=torch.cat([p.rows for p in parts]),
        embed=torch.cat([p.embed for p in parts]),
        row_text=torch.cat(
            [p.row_text + offset for p, offset in zip(parts, offsets, strict=False)]
        ),
        row_position=torch.cat([p.row_position for p in parts]),
        texts=texts,
        norm_histogram=torch.stack([p.norm_histogram for p in parts]).sum(0),
        sinks=torch.cat([p.sinks for p in parts]),
        info=info,
        heads=first.heads,
    )
    for name in _PARTS:
        given = [(getattr(p, name), offset) for p, offset in zip(parts, offsets, strict=False)]
        if found := [(part, offset) for part, offset in given if part is not None]:
            joined_part = replace(
                whole,
                rows=torch.cat([part.rows for part, _ in found]),
                embed=torch.cat([part.embed for part, _ in found]),
                row_text=torch.cat([part.row_text + offset for part, offset in found]),
                row_position=torch.cat([part.row_position for part, _ in found]),
                info=info | {"pooling": found[0][0].info["pooling"]},
                **dict.fromkeys(_PARTS),
            )
            whole = replace(whole, **{name: joined_part})
    return whole


def joined_info(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of consecutive slices as of the whole: counts are added up, and the identity of the tokens is that of all of them."""
    whole = infos[0] | {k: sum(i.get(k, 0) for i in infos) for k in COUNTED}
    if "ids_sha256" in whole:  # earlier versions did not know it
        whole["ids_sha256"] = text_hash("".join(i["ids_sha256"] for i in infos))
    return whole


def text_hash(text: str) -> str:
    """Identity of a text, to recognise it again (first 16 hex digits of its sha256)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def norm_bins(norms: Tensor) -> Tensor:
    """How many of some norms fall into each log-spaced bin; the last ones take what lies outside."""
    index = (
        (norms.clamp_min(1e-30).log10() - _LOG_LOW) / (_LOG_HIGH - _LOG_LOW) * NORM_BINS
    ).long()
    return torch.bincount(index.clamp(0, NORM_BINS - 1).cpu(), minlength=NORM_BINS)


@typed
def histogram_median(histogram: Int[Tensor, "layer bin"]) -> Float[Tensor, " layer"]:
    """Median of log-binned norms, to half a bin (0.7 %).

    >>> histogram_median(norm_bins(torch.tensor([99.0, 100.0, 5000.0]))[None]).item()  # doctest: +ELLIPSIS
    100...
    """
    cumulative = histogram.cumsum(-1)
    index = (cumulative * 2 >= cumulative[:, -1:]).int().argmax(-1)
    return (10 ** (_LOG_LOW + (index.double() + 0.5) * (_LOG_HIGH - _LOG_LOW) / NORM_BINS)).float()


@typed
def histogram_mean(histogram: Int[Tensor, "layer bin"]) -> Float[Tensor, " layer"]:
    """Mean of log-binned norms, to half a bin (0.7 %).

    >>> histogram_mean(norm_bins(torch.tensor([100.0, 300.0]))[None]).item()  # doctest: +ELLIPSIS
    200...
    """
    index = torch.arange(NORM_BINS, device=histogram.device).double()
    middle = 10 ** (_LOG_LOW + (index + 0.5) * (_LOG_HIGH - _LOG_LOW) / NORM_BINS)
    counts = histogram.double()
    return (einsum(counts, middle, "layer bin, bin -> layer") / counts.sum(-1)).float()

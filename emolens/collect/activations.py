"""Pooled activations with what each row is: the value that estimators read.

Nothing is estimated here: see `directions/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emolens._files import unknown
from emolens._typing import (
    AnyPoint,
    Blocks,
    HookedModel,
    block_number,
    block_numbers,
)
from emolens.collect.files import PARTS, read_parts, write_parts, wrong_header
from emolens.collect.given import given_model, given_rows, given_words, row_hash
from emolens.collect.histogram import histogram_mean, histogram_median, norm_bins
from emolens.collect.moments import Moments
from emolens.collect.pooling import Pooling, mean_over_tokens
from emolens.shards import vacant


@dataclass(frozen=True)
class TextInfo:
    """What is known of a text besides its activations.

    Attributes:
        id: Its name in its set or file, or its number.
        emotion: Its label, None for neutral and unlabelled texts.
        topic: By which estimators hold out, or None.
        person: Grammatical person of the story: first, third or mixed.
        split: "main", "other_person", "neutral", "test", "validation", or "" for plain texts without a label.
        sha256: Identity of the text (first 16 hex digits).
        n_tokens: Real tokens, the first one included.

    Example:
        >>> acts.texts[0].emotion, acts.texts[0].split
        ('glimmer', 'main')
    """

    id: str
    emotion: str | None
    topic: str | None
    person: str | None
    split: str
    sha256: str
    n_tokens: int


@dataclass(frozen=True, eq=False)
class Activations:
    """Pooled activations of many texts at one hook point.

    Attributes:
        hook_point: Where they were read: "resid_post", or another.
        layers: The blocks, 0-based, in the order of the layer axis.
        rows: `[row layer d_model]`, float32. A row is a text, or a token when pooled by `every_token`.
        embed: `[row d_embed]`, the embedding output pooled in the same way: what words alone carry.
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

    Example:
        >>> acts.hook_point, acts.layers, acts.rows.shape[1:]
        ('resid_post', (0, 1, 2), torch.Size([3, 32]))
    """

    hook_point: AnyPoint
    layers: tuple[int, ...]
    rows: Float[Tensor, "row layer d_model"]
    embed: Float[Tensor, "row d_embed"]
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

    @staticmethod
    def from_tensors(
        rows: Any,
        labels: Iterable[Any],
        *,
        model: HookedModel | str,
        topics: Iterable[Any] | None = None,
        layers: Blocks | None = None,
        hook_point: AnyPoint = "resid_post",
        mask: Tensor | None = None,
        pooling: Pooling | None = None,
    ) -> Activations:
        """Take over activations that were read elsewhere, so that directions can be made from them.

        Args:
            rows: `[text layer d_model]`, of torch or numpy (`[text layer head d_head]` at a hook point by head); or a cache of
                TransformerLens, or a dict, of `[text d_model]` or `[text pos d_model]` by hook name.
            labels: The emotion of each text, a word or a whole number; None for a text without one.
            model: What they were read from: the loaded model, or its name. Directions of a model that is only named are refused by every
                model, since no weights are known to be theirs: they can be compared, not steered with.
            topics: The topic of each text, by which estimators hold out; None where no topic is known.
            layers: The blocks, 0-based, in the order of `rows`; of a cache None is every block that it has.
            hook_point: Where they were read.
            mask: `[text pos]`, of a cache with every token: 1 for the tokens to be averaged. Leave out padding and the first token, an
                attention sink.
            pooling: How the rows were pooled, which is how `score` pools new texts; None is `mean_over_tokens()`.

        Returns:
            `Activations`. `embed` and `sinks` are NaN where they are not known; the unit of a dose is the median norm of the masked tokens,
            or of the rows where only these are given, which is smaller than that of their tokens.

        Raises:
            KeyError: the cache, or the model, lacks a hook name.
            ValueError: shapes, labels and layers that do not fit each other; NaN or infinity; a `pos` axis without a mask.

        Example:
            >>> rows = np.random.default_rng(0).normal(size=(4, 2, 32))
            >>> em.Activations.from_tensors(rows, ["joy", "fear"] * 2, model="gpt2", layers=[3, 4])
            Activations(resid_post, layers 3..4, 4 rows x 32, 4 texts)
        """
        found, x, norms, heads = given_rows(rows, layers, hook_point, mask)
        n = len(x)
        info = given_model(model, hook_point, found, x.shape[-1])
        words = (given_words(labels, "labels", n), given_words(topics, "topics", n))
        texts = tuple(
            TextInfo(f"text-{i}", e, t, None, "" if e is None else "main", row_hash(row), 0)
            for i, (e, t, row) in enumerate(zip(*words, x, strict=True))
        )
        record = {k: v for k, v in asdict(pooling or mean_over_tokens()).items() if k != "spans"}
        return Activations(
            hook_point=hook_point,
            layers=found,
            rows=x,
            embed=torch.full((n, info["d_model"]), torch.nan),
            row_text=torch.arange(n),
            row_position=torch.full((n,), -1),
            texts=texts,
            norm_histogram=torch.stack([norm_bins(norm) for norm in norms]),
            sinks=torch.full((n, len(found)), torch.nan),
            info={"model": info, "tokenization": {}, "prepend_bos": None, "pooling": record}
            | {"set": None, "set_sha256": None, "antonyms": {}}
            | dict.fromkeys(COUNTED, 0),
            heads=heads,
        )

    @property
    def labels(self) -> list[str | None]:
        """The emotion of each row, None where its text has none.

        Example:
            >>> acts.labels[0], len(acts.labels) == len(acts.rows)
            ('glimmer', True)
        """
        return [self.texts[i].emotion for i in self.row_text.tolist()]

    def tensor(self, layer: SupportsIndex) -> Float[Tensor, "row *head d_model"]:
        """The rows of one layer.

        Args:
            layer: A block that was collected, 0-based.

        Returns:
            `[text d_model]`, a view; by head `[text head d_head]` for `z`, `q`, `k`, `v`, and `[text head key]` for `pattern`. Of single
            tokens (`every_token`) a row is a token.

        Raises:
            ValueError: a layer that was not collected.

        Example:
            >>> acts.tensor(1).shape == (len(acts.labels), 32)
            True
        """
        rows = self.rows[:, self._slot(block_number(layer))]
        return rows if self.heads is None else rows.unflatten(-1, (self.heads, -1))

    def _slot(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not collected; collected: {list(self.layers)}")
        return self.layers.index(layer)

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
        """Itself: what a `Collection` gives piece by piece is here in one.

        Returns:
            One `Activations`, no copy.

        Example:
            >>> [chunk is acts for chunk in acts.chunks()]
            [True]
        """
        yield self

    def moments(self) -> Moments:
        """Sums over the texts of each emotion and topic, in float64.

        Returns:
            `Moments`.

        Example:
            >>> acts.moments().total.shape[1:]  # [group layer d_model]
            torch.Size([3, 32])
        """
        return Moments.of([self])

    def select(self, keep: Callable[[TextInfo], bool]) -> Activations:
        """The texts for which `keep` is true, with all that belongs to them: rows, sinks, and for a neutral text its single tokens.

        So a choice of emotions that is to keep the neutral texts says so: ``lambda t: t.emotion in (None, "joy", "fear")``. The histogram
        of norms alone stays that of the whole collection: it holds no text apart, and is only the unit of a dose.

        Args:
            keep: Called with each `TextInfo`.

        Returns:
            `Activations`, a copy.

        Example:
            >>> len(acts.select(lambda t: t.emotion == "glimmer").texts) < len(acts.texts)
            True
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
            **self._parts(lambda part: part.select(keep)),
        )

    def without(self, topics: str | Iterable[str]) -> Activations:
        """Everything but some topics, no story, neutral text or neutral token of theirs: what may be fitted where these are judged.

        Args:
            topics: One or several.

        Returns:
            `Activations`, a copy.

        Raises:
            KeyError: a topic that no text here has.

        Example:
            >>> topic = acts.texts[0].topic
            >>> topic in {t.topic for t in acts.without(topic).texts}
            False
        """
        left_out = {topics} if isinstance(topics, str) else set(topics)
        known = {t.topic for t in self.texts}
        if unknown_ones := sorted(left_out - known):
            raise KeyError(
                unknown("topic", unknown_ones[0], sorted(t for t in known if t is not None))
            )
        return self.select(lambda t: t.topic not in left_out)

    def at(self, layers: Blocks) -> Activations:
        """The same rows at one or some of the layers.

        Args:
            layers: Block indices that were collected, in the order that is wanted.

        Returns:
            `Activations`, a copy.

        Raises:
            ValueError: a layer that was not collected.

        Example:
            >>> acts.at([2, 0]).layers
            (2, 0)
        """
        layers = block_numbers(layers)
        index = [self._slot(layer) for layer in layers]
        return replace(
            self,
            layers=layers,
            rows=self.rows[:, index],
            norm_histogram=self.norm_histogram[index],
            sinks=self.sinks[:, index],
            **self._parts(lambda part: part.at(layers)),
        )

    def _parts(self, change: Callable[[Activations], Activations]) -> dict[str, Activations | None]:
        parts = {name: getattr(self, name) for name in PARTS}
        return {k: None if part is None else change(part) for k, part in parts.items()}

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a safetensors file, atomically: it is there whole or not at all.

        Args:
            path: The file; its folder must be there.
            overwrite: Replace it whatever it holds.

        Raises:
            FileNotFoundError: its folder is not there.
            FileExistsError: the file is there and holds other activations, or something else; `overwrite` replaces it.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as folder:
            ...     acts.save(f"{folder}/a.safetensors")
            ...     em.Activations.load(f"{folder}/a.safetensors").layers
            (0, 1, 2)
        """
        vacant(path, self._other, overwrite=overwrite)
        write_parts(path, self)

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
        """Read a file written by `save`, of this version or an earlier one.

        Args:
            path: The file.

        Returns:
            `Activations`, on the CPU.

        Raises:
            FileNotFoundError, ValueError: no such file, or not one of these, or a truncated or damaged one.

        Example:
            >>> acts.save("toy.safetensors")
            >>> bool((em.Activations.load("toy.safetensors").rows == acts.rows).all())
            True
        """
        parts = read_parts(path)
        try:
            for fields in parts.values():
                fields["texts"] = tuple(TextInfo(**t) for t in fields["texts"])
            made = {name: Activations(**fields) for name, fields in parts.items()}
            return replace(made[""], **{name: made.get(name) for name in PARTS})
        except (KeyError, TypeError, ValueError) as error:
            raise wrong_header(path, error) from error


def is_main(text: TextInfo) -> bool:
    """Whether a text is one that directions are made from."""
    return text.emotion is not None and text.split == "main"


COUNTED = (
    "dropped_texts",
    "truncated_texts",
    "split_batches",
)  # in `info`; added up over the slices


def join(parts: Iterable[Activations]) -> Activations:
    """Activations of consecutive slices of one corpus as those of the whole.

    Args:
        parts: In their order; at one hook point and the same layers.

    Returns:
        `Activations`, a copy.

    Example:
        >>> from emolens.collect import join
        >>> len(join([acts, acts]).rows) == 2 * len(acts.rows)
        True
    """
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
    for name in PARTS:
        given = [(getattr(p, name), offset) for p, offset in zip(parts, offsets, strict=False)]
        if found := [(part, offset) for part, offset in given if part is not None]:
            joined_part = replace(
                whole,
                rows=torch.cat([part.rows for part, _ in found]),
                embed=torch.cat([part.embed for part, _ in found]),
                row_text=torch.cat([part.row_text + offset for part, offset in found]),
                row_position=torch.cat([part.row_position for part, _ in found]),
                info=info | {"pooling": found[0][0].info["pooling"]},
                **dict.fromkeys(PARTS),
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

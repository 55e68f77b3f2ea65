"""Read the residual stream of many texts in one forward pass each, pooled inside the hook.

For each text and layer the mean over its *ordinary* tokens is kept: real tokens (never padding), not the first (an attention
sink with a hundred times the norm of the rest), with a norm below ten times the row's median, from token `skip` on. Per-token
activations leave the hook only where they are asked for. Texts are taken slice by slice: `collect` keeps the slices in memory,
`collect_to` writes each to a file, so that a corpus of any length fits and a killed run continues; the numbers are the same. Results
do not depend on batch size or padding side beyond float noise. Nothing is estimated here: see `directions.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import psutil
import torch
from einops import einsum
from jaxtyping import Float, Float64, Int
from torch import Tensor
from tqdm import tqdm

from emolens import __version__, shards
from emolens._files import here, unknown
from emolens._typing import (
    Blocks,
    HookedModel,
    HookPoint,
    Text,
    block_number,
    block_numbers,
    hook_name,
    is_hooked,
    typed,
)
from emolens.adapters.fused import fused
from emolens.corpus import Corpus, Long, Slice, open_corpus
from emolens.emotion_sets import EmotionSet
from emolens.models import (
    EncodedText,
    encode,
    ending_at,
    model_info,
    not_finite,
    out_of_memory,
    pad,
    present_info,
)
from emolens.shards import read_safetensors, vacant, write_safetensors
from emolens.tokens import ids_hash, tokenization

SINK = 10.0  # a token whose norm exceeds this many medians of its row is not ordinary
SAMPLED = 24  # single tokens that are kept of each neutral text of a set, for its neutral components
GOLDEN = (5**0.5 - 1) / 2  # multiples of it fill a circle evenly, however many there are
LENGTHS = (
    1,
    2,
    4,
    8,
    16,
    32,
    64,
    128,
)  # tokens after the first, at which each neutral text is also pooled: what short texts do
NORM_BINS = 2048  # log-spaced from 1e-4 to 1e8: 1.4 % a bin
_LOG_LOW, _LOG_HIGH = -4.0, 8.0
OVERHEAD = {
    "cpu": 32,
    "other": 2048,
}  # what a batch costs beside its tokens, in tokens: a CPU is busy with few, a GPU is not
Texts = EmotionSet | Corpus | Text | Iterable[Text] | Path  # and tables of `datasets`
FORMATS = ("emolens.activations.2", "emolens.activations.1")  # written; read


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
        sinks: `[text layer]` the first token's norm over the median norm of its text.
        neutral_tokens: A sample of single tokens of the neutral texts, where a set was collected.
        neutral_prefixes: Beginnings of the neutral texts, pooled as the texts are (mean from the second token on, or the last token): a row for
            each of `LENGTHS` that a text reaches, its `row_position` the number of tokens after the first.
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
    sinks: Float[Tensor, "text layer"]
    info: dict[str, Any]
    neutral_tokens: Activations | None = None
    neutral_prefixes: Activations | None = None

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
            **{name: None if (part := getattr(self, name)) is None else part.select(keep) for name in _PARTS},
        )

    def without(self, topics: str | Iterable[str]) -> Activations:
        """Everything but some topics, no story, neutral text or neutral token of theirs: what may be fitted where these are judged.

        Raises:
            KeyError: a topic that no text here has.
        """
        left_out = {topics} if isinstance(topics, str) else set(topics)
        known = {t.topic for t in self.texts}
        if unknown_ones := sorted(left_out - known):
            raise KeyError(unknown("topic", unknown_ones[0], sorted(t for t in known if t is not None)))
        return self.select(lambda t: t.topic not in left_out)

    def at(self, layers: Blocks) -> Activations:
        """The same rows at one or some of the layers."""
        layers = block_numbers(layers)
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise ValueError(f"layer {missing[0]} was not collected; collected: {list(self.layers)}")
        index = [self.layers.index(layer) for layer in layers]
        return replace(
            self,
            layers=layers,
            rows=self.rows[:, index],
            norm_histogram=self.norm_histogram[index],
            sinks=self.sinks[:, index],
            neutral_tokens=None if self.neutral_tokens is None else self.neutral_tokens.at(layers),
            neutral_prefixes=None if self.neutral_prefixes is None else self.neutral_prefixes.at(layers),
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
                    tensors[prefix + name] = getattr(part, name).clone(memory_format=torch.contiguous_format)
                header = {"hook_point": part.hook_point, "layers": part.layers, "info": part.info}
                headers[prefix or "self."] = json.dumps(header | {"texts": [asdict(t) for t in part.texts]})
        write_safetensors(path, tensors, {"format": FORMATS[0], **headers})

    def _other(self, file: Path) -> str | None:
        """What a file holds, in words; None if it is these activations."""
        try:
            found = Activations.load(file)
        except ValueError:
            return "something that is no activations of emolens"
        same = all(getattr(found, k) == getattr(self, k) for k in ("hook_point", "layers", "texts"))
        same = same and all(found.info.get(k) == self.info.get(k) for k in ("model", "prepend_bos", "pooling"))
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
                    if metadata["format"] == FORMATS[1]:  # kept the median of the sinks only: it is that of every text
                        tensors[prefix + "sinks"] = tensors[prefix + "sink_ratio"].repeat(len(texts), 1)
                    parts[prefix] = Activations(
                        hook_point=header["hook_point"],
                        layers=tuple(header["layers"]),
                        texts=texts,
                        info=header["info"],
                        neutral_tokens=None,
                        neutral_prefixes=None,
                        **{name: tensors[prefix + name] for name in _TENSORS},
                    )
            whole, tokens, prefixes = (parts.get(prefix) for prefix in ("", *(f"{name}." for name in _PARTS)))
            if whole is None:
                raise KeyError("self.")
            return replace(whole, neutral_tokens=tokens, neutral_prefixes=prefixes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its header is not that of activations ({error!r})") from error


def is_main(text: TextInfo) -> bool:
    """Whether a text is one that directions are made from."""
    return text.emotion is not None and text.split == "main"


_PARTS = ("neutral_tokens", "neutral_prefixes")  # activations of their own, of the neutral texts
_TENSORS = ("rows", "embed", "row_text", "row_position", "norm_histogram", "sinks")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums of pooled rows by group, which is all that a difference of means needs of a corpus.

    Attributes:
        groups: (split, emotion, topic) of each group, in order of appearance; topics as `with_topics` names them.
        n: `[group]` rows in it.
        total: `[group layer d_model]` their sum, in float64.
        person: Grammatical person of each topic of the main texts.
    """

    groups: tuple[tuple[str, str | None, str], ...]
    n: Int[Tensor, " group"]
    total: Float64[Tensor, "group layer d_model"]
    person: dict[str, str | None]

    @staticmethod
    def of(chunks: Iterable[Activations]) -> Moments:
        """Add up chunk by chunk, in their order: the same chunks give the same bits."""
        n: dict[tuple[str, str | None, str], int] = {}
        total: dict[tuple[str, str | None, str], Tensor] = {}
        person: dict[str, str | None] = {}
        for chunk, topics in with_topics(chunks):
            groups = [(t.split, t.emotion, topic) for t, topic in zip(chunk.texts, topics, strict=True)]
            for group in dict.fromkeys(groups):
                mine = torch.tensor([g == group for g in groups])[chunk.row_text]
                n[group] = n.get(group, 0) + int(mine.sum())
                added = chunk.rows[mine].sum(0, dtype=torch.float64)
                total[group] = total[group] + added if group in total else added
            person |= {topic: t.person for t, topic in zip(chunk.texts, topics, strict=True) if t.split == "main"}
        if not total:
            return Moments((), torch.zeros(0, dtype=torch.long), torch.zeros((0, 0, 0), dtype=torch.float64), person)
        return Moments(tuple(n), torch.tensor(list(n.values())), torch.stack(list(total.values())), person)

    @property
    def emotions(self) -> list[str]:
        """Emotions of the main texts, in order of appearance."""
        return list(dict.fromkeys(e for split, e, _ in self.groups if e is not None and split == "main"))

    def counts(self, without: Container[str] = ()) -> Int[Tensor, " emotion"]:
        """Main texts of each emotion, in all topics but these."""
        return self._sums(without)[0]

    def means(self, without: Container[str] = ()) -> Float64[Tensor, "emotion layer d_model"]:
        """Mean over the main texts of each emotion, in all topics but these; NaN where nothing is left."""
        n, total = self._sums(without)
        return total / n[:, None, None]

    def _sums(self, without: Container[str]) -> tuple[Tensor, Tensor]:
        names = self.emotions
        n, total = torch.zeros(len(names), dtype=torch.long), self.total.new_zeros((len(names), *self.total.shape[1:]))
        for k, (split, emotion, topic) in enumerate(self.groups):
            if split == "main" and emotion is not None and topic not in without:
                n[names.index(emotion)] += self.n[k]
                total[names.index(emotion)] += self.total[k]
        return n, total


COUNTED = ("dropped_texts", "truncated_texts", "split_batches")  # in `info`; added up over the slices
UNTOLD = 16  # parts into which the texts of an emotion are dealt where no topic is known


def with_topics(chunks: Iterable[Activations]) -> Iterator[tuple[Activations, list[str]]]:
    """Each chunk with the topic of each of its texts; those without one are dealt, emotion by emotion, to `UNTOLD` parts in turn."""
    seen: dict[tuple[str, str | None], int] = {}
    for chunk in chunks:
        topics = []
        for t in chunk.texts:
            if t.topic is not None:
                topics.append(t.topic)
                continue
            k = seen[t.split, t.emotion] = seen.get((t.split, t.emotion), -1) + 1
            topics.append(f"#{k % UNTOLD}")
        yield chunk, topics


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
        row_text=torch.cat([p.row_text + offset for p, offset in zip(parts, offsets, strict=False)]),
        row_position=torch.cat([p.row_position for p in parts]),
        texts=texts,
        norm_histogram=torch.stack([p.norm_histogram for p in parts]).sum(0),
        sinks=torch.cat([p.sinks for p in parts]),
        info=info,
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


@dataclass(frozen=True, eq=False)
class Collection:
    """Pooled activations in a folder of shards, made by `collect_to`: sums in memory, rows on disk.

    The shards are read one after the other, so that memory does not grow with the corpus.

    Attributes:
        norm_histogram: As in `Activations`.
        info: As in `Activations`.
        n_texts: Texts that were pooled (of those read, `info["dropped_texts"]` were too short and left out by policy).
    """

    folder: shards.Folder
    hook_point: HookPoint
    layers: tuple[int, ...]
    norm_histogram: Int[Tensor, "layer bin"]
    info: dict[str, Any]
    n_texts: int
    _moments: Moments

    def __repr__(self) -> str:
        layers = f"{min(self.layers)}..{max(self.layers)}" if len(self.layers) > 1 else str(min(self.layers))
        n = len(self.folder.manifest["shards"])
        return f"Collection({self.hook_point}, layers {layers}, {self.n_texts} texts in {n} shards)"

    @staticmethod
    def open(path: str | Path) -> Collection:
        """Read a finished folder through once, checking every shard.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a shard is missing, cut short or damaged: the run that made it, started again, makes it anew.
        """
        folder = shards.read_folder(path)
        histogram, infos, n_texts = None, [], 0

        def counted() -> Iterator[Activations]:
            nonlocal histogram, n_texts
            for chunk in _shards_of(folder):
                histogram = chunk.norm_histogram + (0 if histogram is None else histogram)
                infos.append(chunk.info)
                n_texts += len(chunk.texts)
                if chunk.texts:
                    yield chunk

        moments = Moments.of(counted())
        assert histogram is not None  # a folder has at least one shard
        options = folder.manifest["options"]
        info = joined_info(infos)
        return Collection(folder, options["hook_point"], tuple(options["layers"]), histogram, info, n_texts, moments)

    @property
    def norm_median(self) -> Float[Tensor, " layer"]:
        """Median residual norm over ordinary tokens: the unit of a dose."""
        return histogram_median(self.norm_histogram)

    @property
    def norm_mean(self) -> Float[Tensor, " layer"]:
        """Mean residual norm over ordinary tokens, the paper's unit of a dose."""
        return histogram_mean(self.norm_histogram)

    def chunks(self) -> Iterator[Activations]:
        """The shards, one at a time."""
        return (chunk for chunk in _shards_of(self.folder) if chunk.texts)

    def moments(self) -> Moments:
        """Sums over the texts of each emotion and topic, in float64."""
        return self._moments

    def second_moment(self, layer: SupportsIndex) -> Float64[Tensor, "d_model d_model"]:
        """Pooled within-emotion second moment at a layer,  sum over stories of (x - m_e)(x - m_e)^T, in float64; one pass over the shards."""
        layer = block_number(layer)
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not collected; collected: {list(self.layers)}")
        k = self.layers.index(layer)
        means = dict(zip(self._moments.emotions, self._moments.means()[:, k], strict=True))
        out = torch.zeros((self._moments.total.shape[-1],) * 2, dtype=torch.float64)
        for chunk in self.chunks():
            main = chunk.select(is_main)
            if main.texts:
                own = [means[t.emotion] for t in main.texts if t.emotion is not None]
                x = main.rows[:, k].double() - torch.stack(own)[main.row_text]
                out += x.T @ x
        return out

    def load(self) -> Activations:
        """All of it in memory: the same to the bit as `collect` with the same options.

        Raises:
            MemoryError: it does not fit.
        """
        size = sum(self.folder.file(k).stat().st_size for k in range(len(self.folder.manifest["shards"])))
        free = psutil.virtual_memory().available
        if 2 * size > free:  # the shards and what they are joined into
            raise MemoryError(
                f"{self.folder.path}: {size / 1e9:.1f} GB of rows need twice that to be loaded, {free / 1e9:.1f} GB are free; "
                "mean_difference and antonym_contrast work on the collection itself; or collect fewer layers"
            )
        return join(_shards_of(self.folder))


def _shards_of(folder: shards.Folder) -> Iterator[Activations]:
    for number in range(len(folder.manifest["shards"])):
        try:
            yield Activations.load(folder.file(number))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{error}; the collection is not whole: run it again, and this shard is made anew"
            ) from error


def collect_resid_post(
    model: HookedModel,
    texts: Texts,
    *,
    layers: Blocks | None = None,
    pooling: Pooling | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] = "right",
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    shard_texts: int | None = None,
    long: Long = "raise",
    emotions: Iterable[Any] | None = None,
    topics: Iterable[Any] | None = None,
    progress: bool = True,
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
        batch_tokens: Tokens of a batch, padding included; None takes what a quarter of the free memory holds, at most 2048 on a CPU.
            A batch that runs out of memory all the same is halved, and counted in `info["split_batches"]`.
        batch_size: Texts of a batch at most; None leaves it to `batch_tokens`.
        shard_texts: Texts that are sorted by length together (and, in `collect_to`, are one file); None is 128 on a CPU, else 512.
        long: A text of more tokens than the model reads: "raise" before the first pass, "truncate" it (counted in
            `info["truncated_texts"]`), or "skip" it (counted in `info["dropped_texts"]`).
        emotions, topics: Labels of plain texts, one a text: words or whole numbers, of Python, numpy or pandas; None for a text without one.
        progress: Show a bar with tokens per second and the remaining time.

    Returns:
        `Activations` with rows `[text layer d_model]` in float32 on the CPU.

    Raises:
        KeyError: the model lacks the hook point (parallel-residual models have no `resid_mid`).
        ValueError: a layer that does not exist; a text too short or too long; labels that are missing or do not match the texts; a string
            that is the name of a file, folder or set. All of it before the first pass.
        FloatingPointError: NaN or infinity, with the first layer that has it.

    Reference:
        Anthropic 2026, *Emotion Concepts and their Function in a Large Language Model*, extraction of emotion vectors.
    """
    return collect(
        model, texts, "resid_post", layers=layers, pooling=pooling, prepend_bos=prepend_bos, padding_side=padding_side,
        batch_tokens=batch_tokens, batch_size=batch_size, shard_texts=shard_texts, long=long, emotions=emotions, topics=topics,
        progress=progress,
    )  # fmt: skip


def _sibling(hook_point: HookPoint, what: str) -> Callable[..., Activations]:
    def sibling(model: HookedModel, texts: Texts, **options: Any) -> Activations:
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
    texts: Texts,
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
    emotions: Iterable[Any] | None = None,
    topics: Iterable[Any] | None = None,
    progress: bool = True,
) -> Activations:
    """`collect_resid_post` for a hook point given by name."""
    recipe = make_recipe(
        model, hook_point, layers=layers, pooling=pooling, prepend_bos=prepend_bos, padding_side=padding_side,
        batch_tokens=batch_tokens, batch_size=batch_size, shard_texts=shard_texts, long=long,
    )  # fmt: skip
    corpus = open_corpus(texts, emotions, topics)
    pieces = list(corpus.slices(recipe.shard_texts))
    n_texts = sum(len(piece.texts) for piece in pieces)
    check_number(recipe, n_texts)
    read = [encode_slice(model, recipe, piece) for piece in pieces]
    check_used(recipe, read, model.cfg.n_ctx)
    with Progress(recipe, n_texts, progress) as bar:
        return join(collect_slice(model, recipe, corpus, slice, bar) for slice in read)


def collect_to(
    folder: str | Path,
    model: HookedModel,
    texts: Texts,
    hook_point: HookPoint = "resid_post",
    *,
    layers: Blocks | None = None,
    pooling: Pooling | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] = "right",
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    shard_texts: int | None = None,
    long: Long = "raise",
    emotions: Iterable[Any] | None = None,
    topics: Iterable[Any] | None = None,
    progress: bool = True,
) -> Collection:
    """Collect into a folder, in memory that does not grow with the corpus, so that a killed run continues where it was.

    Every `shard_texts` texts become a file, written whole. The same call continues a run that was killed, makes missing and damaged shards
    anew, and on a finished folder only reads it. Options left at None are those of the run that began.

    Args:
        folder: Where to; made if it does not exist.
        model, texts, hook_point, ...: As for `collect_resid_post`.

    Returns:
        `Collection`; `.load()` is what `collect` would have returned, to the bit.

    Raises:
        FileExistsError: the folder is held by another process, or was begun with another model, corpus, option or version: which is said.
        OSError: the disk is full, or would be. What is done stays; the same call continues.
    """
    with begun(
        folder, model, texts, hook_point, layers=layers, pooling=pooling, prepend_bos=prepend_bos, padding_side=padding_side,
        batch_tokens=batch_tokens, batch_size=batch_size, shard_texts=shard_texts, long=long, emotions=emotions, topics=topics,
    ) as job:  # fmt: skip
        job.run(job.folder.missing(), progress=progress)
        return job.result()


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


@dataclass(frozen=True)
class Job:
    """A run on a folder: its shards can be made in any order, by any number of processes that have opened the same job."""

    folder: shards.Folder
    model: HookedModel
    corpus: Corpus
    recipe: Recipe

    def run(self, numbers: Sequence[int], *, progress: bool = True) -> None:
        """Make some of the shards."""
        if not numbers:
            return
        n_texts = min(len(numbers) * self.recipe.shard_texts, self.folder.manifest["corpus"]["n_texts"])
        with Progress(self.recipe, n_texts, progress) as bar:
            for piece in self.corpus.slices(self.recipe.shard_texts, numbers):
                if not self.folder.manifest["shards"][piece.number] == piece.digest:
                    raise RuntimeError(
                        f"the texts changed while they were being read (slice {piece.number}); start again"
                    )
                part = collect_slice(
                    self.model, self.recipe, self.corpus, encode_slice(self.model, self.recipe, piece), bar
                )
                part.save(self.folder.file(piece.number), overwrite=True)

    def result(self) -> Collection:
        """The finished folder."""
        return Collection.open(self.folder.path)


@contextmanager
def begun(
    folder: str | Path,
    model: HookedModel,
    texts: Texts,
    hook_point: HookPoint,
    *,
    before: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Iterator[Job]:
    """Hold the folder of a collection while it is made; options as for `collect_to`, errors as there; `before` may refuse the manifest."""
    manifest = survey(folder, model, texts, hook_point, **options)
    with held(folder, manifest, before):
        yield joined(folder, model, texts, hook_point, **options)


@contextmanager
def held(
    folder: str | Path, manifest: dict[str, Any], before: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[shards.Folder]:
    """Hold a folder for a run that was surveyed, with room for all of it; `before` may refuse the manifest, and then no folder is made."""
    there = (here(folder) / shards.MANIFEST).is_file()  # of a run that was begun: what differs from it is said first
    if before is not None and not there:
        before(manifest)
    with shards.begin(folder, manifest) as mine:
        if before is not None and there:
            before(manifest)
        options = manifest["options"]
        if options["pooling"]["kind"] != "tokens":  # as many rows as tokens: not known before they are read
            done = sum(f.stat().st_size for f in mine.path.glob("*.safetensors"))
            n_texts, d_model = manifest["corpus"]["n_texts"], manifest["model"]["d_model"]
            sampled = manifest["corpus"]["n_neutral"]
            need = disk_bytes(n_texts, len(options["layers"]), d_model, sampled) - done
            free = shutil.disk_usage(mine.path).free
            if need > free:
                raise OSError(
                    f"{folder}: {need / 1e9:.1f} GB are needed for the rows of {n_texts} texts, {free / 1e9:.1f} GB are free"
                )
        yield mine


def joined(
    folder: str | Path,
    model: HookedModel,
    texts: Texts,
    hook_point: HookPoint,
    *,
    emotions: Iterable[Any] | None = None,
    topics: Iterable[Any] | None = None,
    **options: Any,
) -> Job:
    """The job that has been begun on this folder, by this process or another, with the same model, texts and options.

    Raises:
        ValueError: it was begun with another model, or with the same one in another precision.
    """
    mine = shards.read_folder(folder)
    present_info(model)
    recipe = make_recipe(model, hook_point, **as_begun(options, mine.manifest))
    if recipe.model != mine.manifest["model"]:
        raise ValueError(
            f"{mine.path} was begun with another model, or in another precision: see its {shards.MANIFEST}"
        )
    if recipe.tokenization != mine.manifest["tokenization"]:
        raise ValueError(
            f"{mine.path} was begun with another chat template or tokenizer: see tokenization in its {shards.MANIFEST}"
        )
    return Job(mine, model, open_corpus(texts, emotions, topics), recipe)


def survey(
    folder: str | Path,
    model: HookedModel,
    texts: Texts,
    hook_point: HookPoint,
    *,
    emotions: Iterable[Any] | None = None,
    topics: Iterable[Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The manifest of a run, after one reading of all texts; what is left open is taken from a manifest that is there.

    Raises:
        ValueError: a text that cannot be pooled (too long, too short, without its span), by its line or id: now, not after hours of work.
    """
    present_info(model)  # what is written down, and compared with what a run began with, is the model as it is now
    with suppress(FileNotFoundError):
        options = as_begun(options, shards.read_folder(folder).manifest)
    recipe, corpus = make_recipe(model, hook_point, **options), open_corpus(texts, emotions, topics)
    names, ids, n_texts, n_neutral = [], [], 0, 0
    for piece in corpus.slices(recipe.shard_texts):
        names.append(piece.digest)
        n_texts += len(piece.texts)
        n_neutral += corpus.has_neutral * sum(label["split"] == "neutral" for label in piece.labels)
    check_number(recipe, n_texts)

    def read() -> Iterator[Encoded]:
        for piece in corpus.slices(recipe.shard_texts):
            found = encode_slice(model, recipe, piece)
            ids.append(ids_hash(found.encoded))
            yield found

    check_used(recipe, read(), model.cfg.n_ctx)
    return {
        "kinds": FORMATS[:1],
        "versions": {"emolens": __version__, "code": _code()}
        | {p: version(p) for p in ("torch", "transformers", "transformer-lens")},
        "model": recipe.model,
        "tokenization": recipe.tokenization,
        "device": torch.device(getattr(model.cfg, "device", None) or "cpu").type,
        "options": {k: v for k, v in asdict(recipe).items() if k not in ("model", "tokenization")},
        "corpus": {"n_texts": n_texts, "n_neutral": n_neutral, "sha256": text_hash("".join(names)), **corpus.info},
        "shards": names,
        "ids_sha256": text_hash("".join(ids)),
    }


def _code() -> str:
    """Identity of the sources that decide what is in a shard."""
    here = Path(__file__).parent
    return shards.digest_of(
        [
            *(here / f"{room}.py" for room in ("activations", "corpus", "models", "tokens")),
            *sorted(here.glob("adapters/*.py")),
        ]
    )


def as_begun(options: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    chosen = {k: manifest["options"][k] for k in ("batch_tokens", "shard_texts") if options.get(k) is None}
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
    info = model_info(model).to_dict()
    layers = check_layers(model, hook_point, layers)
    _check_one_piece(model)
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}; allowed: 'left', 'right'")
    if long not in get_args(Long):
        raise ValueError(f"long={long!r}; allowed: 'raise', 'truncate', 'skip'")
    for name, value in (("batch_tokens", batch_tokens), ("batch_size", batch_size), ("shard_texts", shard_texts)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; batch_tokens, batch_size and shard_texts must be at least 1")
    on_cpu = torch.device(getattr(model.cfg, "device", None) or "cpu").type == "cpu"
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


def _check_one_piece(model: Any) -> None:
    """Refuse a model that was moved or cast in part: torch would say so deep inside a block, or compute in the wrong precision."""
    first = model.W_E
    # not a matrix: quantised ones are integers
    last = next((p for p in reversed([*model.blocks[-1].parameters()]) if p.is_floating_point()), first)
    says = torch.device(getattr(model.cfg, "device", None) or "cpu").type
    if first.device.type != says and first.device.type != "meta":  # meta: offloaded by accelerate
        raise ValueError(
            f"this model's cfg says {says}, its weights are on {first.device.type}: move it with model.to()"
        )
    if first.dtype != last.dtype:
        a, b = (str(t.dtype).removeprefix("torch.") for t in (first, last))
        raise ValueError(f"this model is {a} in its embedding and {b} in its last block: load it in one, with dtype=")


def token_budget(model: HookedModel) -> int:
    """Tokens of a batch whose forward pass takes a quarter of the free memory, at most 2048 on a CPU and 65,536 elsewhere."""
    cfg = model.cfg
    device = torch.device(getattr(cfg, "device", None) or "cpu")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    each = token_bytes(cfg.d_model, getattr(cfg, "d_mlp", None) or 4 * cfg.d_model, cfg.n_heads, min(cfg.n_ctx, 1024))
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


def disk_bytes(n_texts: int, n_layers: int, d_model: int, n_neutral: int = 0) -> int:
    """Size of a collection: a row of float32 for each text, and for `SAMPLED` tokens and the beginnings (`LENGTHS`) of each neutral text of a
    set, at each layer and for the embeddings, and half a kilobyte of what is known of each text.
    """
    return (n_texts + (SAMPLED + len(LENGTHS)) * n_neutral) * (n_layers + 1) * d_model * 4 + n_texts * 512


def check_layers(model: HookedModel, hook_point: HookPoint, layers: Blocks | None) -> tuple[int, ...]:
    """Layers that exist and carry the hook point; every one of the model for None."""
    n = model.cfg.n_layers
    if hook_point == "embed":
        layers = (0,)
    wrong = f" does not exist; this model has layers 0 to {n - 1}"
    layers = tuple(range(n)) if layers is None else block_numbers(layers, wrong)
    points = model.hook_dict  # one look: a bridge makes it anew at each
    if not layers:
        raise ValueError("layers is empty; give block indices, or None for all")
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        raise ValueError(f"layer {twice[0]} is there twice; name each layer once")
    for layer in layers:
        if not 0 <= layer < n:
            raise ValueError(f"layer {layer}{wrong}")
        # an unknown name is silently ignored by one backend and an empty cache in another
        if hook_name(hook_point, layer) not in points:
            others: tuple[HookPoint, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
            have = [p for p in others if hook_name(p, layer) in points]
            hint = " (a parallel-residual model adds attention and MLP at once)" if hook_point == "resid_mid" else ""
            raise KeyError(f"this model has no {hook_name(hook_point, layer)}{hint}; it has: {', '.join(have)}")
    return layers


def text_hash(text: str) -> str:
    """Identity of a text, to recognise it again (first 16 hex digits of its sha256)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def spread_positions(n_tokens: int, limit: int, phase: float) -> list[int]:
    """At most `limit` evenly spaced positions from 1 on, at a phase (0 to 1) of their step."""
    n = n_tokens - 1
    return [1 + int((k + phase) * n / limit) for k in range(limit)] if n > limit else list(range(1, n_tokens))


def running_mean(x: Tensor, ordinary: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Mean of the ordinary tokens of a row up to a column; the token itself where none is ordinary."""
    rows, inverse = row.unique(return_inverse=True)
    kept = ordinary[rows].to(x.dtype)
    total, n = (x[rows] * kept[..., None]).cumsum(1)[inverse, column], kept.cumsum(1)[inverse, column, None]
    return torch.where(n > 0, total / n.clamp_min(1), x[row, column])


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


def _batches(lengths: dict[int, int], batch_tokens: int, batch_size: int | None, overhead: int) -> list[list[int]]:
    """Cut texts, sorted by length, into batches at the least cost:  sum over batches of (width x texts + overhead), in tokens.

    A plan that depends on nothing but its arguments.

    >>> _batches({0: 100, 1: 9, 2: 90, 3: 10}, 2048, None, 32)
    [[0, 2], [3, 1]]
    """
    order = sorted(lengths, key=lambda i: (-lengths[i], i))
    cost, start = [0] + [0] * len(order), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        found: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):  # longest first: the width only grows as the batch does
            n, width = end - begin, lengths[order[begin]]
            if n > 1 and (n * width > batch_tokens or n > (batch_size or n)):
                break
            found.append((cost[begin] + n * width + overhead, begin))
        cost[end], start[end] = min(found)
    cuts, end = [], len(order)
    while end:
        cuts.append((start[end], end))
        end = start[end]
    return [order[begin:end] for begin, end in reversed(cuts)]


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
    encoded = encode(model, piece.texts, prepend_bos=recipe.prepend_bos, first=piece.start, any_length=True)
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


def collect_slice(
    model: HookedModel, recipe: Recipe, corpus: Corpus, read: Encoded, progress: Progress
) -> Activations:
    """The pooled activations of one slice; the only way from texts to rows."""
    piece, encoded, plans = read.piece, read.encoded, read.plans
    used = [i for i, plan in enumerate(plans) if plan]
    sampling = every_token(limit=SAMPLED)
    neutral = [i for i in used if corpus.has_neutral and piece.labels[i]["split"] == "neutral"]
    # the phase goes round from text to text, so that every position is sampled as often as it occurs
    samples = {i: spread_positions(len(encoded[i].ids), SAMPLED, (piece.start + i) * GOLDEN % 1) for i in neutral}
    pooled = recipe.pooling.kind in ("mean", "last")
    prefixes = {i: [n for n in LENGTHS if n < len(encoded[i].ids)] for i in neutral} if pooled else {}
    passes = _Pass(model, recipe, encoded, plans, samples, prefixes)
    lengths = {i: len(encoded[i].ids) for i in used}
    overhead = OVERHEAD["cpu" if passes.device.type == "cpu" else "other"]
    for batch in _batches(lengths, recipe.batch_tokens, recipe.batch_size, overhead):
        passes.run(batch)
        progress.step(len(batch), sum(len(encoded[i].ids) for i in batch))
    infos = tuple(
        TextInfo(**piece.labels[i], sha256=text_hash(encoded[i].text), n_tokens=len(encoded[i].ids)) for i in used
    )
    record = {
        "model": recipe.model,
        "tokenization": recipe.tokenization,
        "ids_sha256": ids_hash(encoded),
        "prepend_bos": recipe.prepend_bos,
        "pooling": {k: v for k, v in asdict(recipe.pooling).items() if k != "spans"},
        "batch_tokens": recipe.batch_tokens,
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
        self.device = torch.device(getattr(model.cfg, "device", None) or "cpu")
        points = model.hook_dict
        self.points = [points[hook_name(recipe.hook_point, layer)] for layer in recipe.layers]
        self.embed = points["hook_embed"]
        self.options, last = ending_at(model, max(recipe.layers) + 1)
        self.last = [(points[name], hook) for name, hook in last]
        self.by_token, self.last_only = recipe.pooling.kind == "tokens", recipe.pooling.kind == "last"
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
                raise MemoryError(f"one text of {n} tokens does not fit into memory on {self.device}") from error
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

        def columns(chosen: dict[int, list[int]]) -> tuple[Tensor, Tensor, list[int], list[int]]:
            at = [(row, offset[row] + q, i, q) for row, i in enumerate(batch) for q in chosen.get(i, ())]
            row, column = (torch.tensor([a[k] for a in at], dtype=torch.long, device=self.device) for k in (0, 1))
            return row, column, [a[2] for a in at], [a[3] for a in at]

        places = {name: columns(chosen) for name, chosen in self.plans.items()}
        weight = torch.zeros((b, width), device=self.device)
        weight[places["main"][0], places["main"][1]] = 1.0
        by_token = ["main"] * self.by_token + ["sample"] * bool(places["sample"][2])
        pooled: dict[int, Tensor] = {}
        by_prefix = ["prefix"] * bool(places["prefix"][2])
        tokens_at: dict[str, dict[int, Tensor]] = {"main": {}, "sample": {}, "prefix": {}}
        ordinary_at = {name: torch.ones(len(place[2]), dtype=torch.bool) for name, place in places.items()}
        histogram, sinks = torch.zeros_like(self.histogram), torch.zeros((b, len(layers)))

        def hook(act: Tensor, hook: Any, slot: int) -> None:
            x = act.float().to(self.device)  # sums run in float32 whatever the dtype; a block may be on another device
            norm = torch.linalg.vector_norm(x, dim=-1)
            median = norm.masked_fill(~rest, torch.nan).nanmedian(-1).values
            if alone:
                median = torch.where(rest.any(-1), median, norm[first])
            ordinary = rest & (norm < SINK * median[:, None])
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

    def _seen(self, mask: Tensor) -> Tensor | None:
        """The mask that the model needs: padding on the right none, for no real token looks at what comes after it.

        With one, Hugging Face leaves the faster causal attention; a `HookedTransformer` finds out by itself (`fused`).
        """
        return None if self.recipe.padding_side == "right" and not is_hooked(self.model) else mask

    def _keep(self, part: str, at: dict[int, Tensor], text: list[int], position: list[int], ordinary: Tensor) -> None:
        rows = torch.stack([at[slot] for slot in range(len(self.recipe.layers))], 1)
        self.parts[part].append(
            {"rows": rows, "embed": at[-1], "text": text, "position": position, "ordinary": ordinary}
        )

    def result(
        self, part: str, renumber: dict[int, int], texts: tuple[TextInfo, ...], info: dict[str, Any]
    ) -> Activations:
        pieces, hook_point, layers = self.parts[part], self.recipe.hook_point, self.recipe.layers
        shape = (0, len(layers), self.model.cfg.d_model)
        rows = torch.cat([torch.zeros(shape), *(p["rows"] for p in pieces)])
        embed = torch.cat([torch.zeros((0, shape[-1])), *(p["embed"] for p in pieces)])
        text = torch.tensor([renumber[i] for p in pieces for i in p["text"]], dtype=torch.long)
        position = torch.tensor([q for p in pieces for q in p["position"]], dtype=torch.long)
        bad = ~torch.isfinite(rows).all(-1).all(0)  # before the choice of ordinary tokens, which NaN never is
        if bad.any():
            raise not_finite(f"{hook_point} of layer {layers[int(bad.nonzero()[0])]}", info["model"]["dtype"])
        order = torch.argsort(text * 1_000_000 + position.clamp_min(0))  # texts as given, tokens as read
        if self.by_token or part == "sample":  # a token that is a sink at some layer is no ordinary token
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
        )


@contextmanager
def _attached(model: Any, hooks: Sequence[tuple[Any, Callable[..., None]]]) -> Iterator[None]:
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


# --- norms ------------------------------------------------------------------------------------------------------------


def norm_bins(norms: Tensor) -> Tensor:
    index = ((norms.clamp_min(1e-30).log10() - _LOG_LOW) / (_LOG_HIGH - _LOG_LOW) * NORM_BINS).long()
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

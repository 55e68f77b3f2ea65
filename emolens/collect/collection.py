"""A collection that outlives its process: slices of texts, a file each, in a folder that says how they were made.

A killed run continues from the files that are there, and the numbers are those of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, SupportsIndex, Unpack

import psutil
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from emolens import __version__, shards
from emolens._files import here
from emolens._typing import AnyPoint, HookedModel, block_number
from emolens.collect.activations import (
    Activations,
    is_main,
    join,
    joined_info,
    text_hash,
)
from emolens.collect.files import FORMATS
from emolens.collect.forward import collect_slice
from emolens.collect.histogram import histogram_mean, histogram_median
from emolens.collect.moments import Moments
from emolens.collect.pooling import LENGTHS
from emolens.collect.recipe import (
    SAMPLED,
    Encoded,
    Options,
    Progress,
    Recipe,
    Texts,
    as_begun,
    check_number,
    check_used,
    encode_slice,
    make_recipe,
    spelled,
)
from emolens.models.identity import present_info
from emolens.models.points import device_of
from emolens.models.tokens import ids_hash
from emolens.sets.corpus import Corpus, open_corpus


@dataclass(frozen=True, eq=False)
class Collection:
    """Pooled activations in a folder of shards, made by `collect_to`: sums in memory, rows on disk.

    The shards are read one after the other, so that memory does not grow with the corpus.

    Attributes:
        folder: Where the shards lie, with their manifest.
        hook_point: Where they were read: "resid_post", or another.
        layers: The blocks, 0-based, in the order of the layer axis.
        norm_histogram: As in `Activations`.
        info: As in `Activations`.
        n_texts: Texts that were pooled (of those read, `info["dropped_texts"]` were too short and left out by policy).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     shards = em.collect_to(folder, model, stories, layers=[1], progress=False)
        ...     directions = em.mean_difference(shards)  # without loading all rows
        ...     len(em.Collection.open(folder).load().rows) == shards.n_texts
        True
    """

    folder: shards.Folder
    hook_point: AnyPoint
    layers: tuple[int, ...]
    norm_histogram: Int[Tensor, "layer bin"]
    info: dict[str, Any]
    n_texts: int
    _moments: Moments

    def __repr__(self) -> str:
        layers = (
            f"{min(self.layers)}..{max(self.layers)}"
            if len(self.layers) > 1
            else str(min(self.layers))
        )
        n = len(self.folder.manifest["shards"])
        return f"Collection({self.hook_point}, layers {layers}, {self.n_texts} texts in {n} shards)"

    @staticmethod
    def open(path: str | Path) -> Collection:
        """Read a finished folder through once, checking every shard.

        Args:
            path: The folder.

        Returns:
            `Collection`.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a shard is missing, cut short or damaged: the run that made it, started again, makes it anew.

        Example:
            >>> _ = em.collect_to("shards", model, stories, layers=[1], progress=False)
            >>> em.Collection.open("shards")
            Collection(resid_post, layers 1, 56 texts in 1 shards)
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
        layers = tuple(options["layers"])
        return Collection(folder, options["hook_point"], layers, histogram, info, n_texts, moments)

    @property
    def norm_median(self) -> Float[Tensor, " layer"]:
        """Median residual norm over ordinary tokens: the unit of a dose."""
        return histogram_median(self.norm_histogram)

    @property
    def norm_mean(self) -> Float[Tensor, " layer"]:
        """Mean residual norm over ordinary tokens, the paper's unit of a dose."""
        return histogram_mean(self.norm_histogram)

    def chunks(self) -> Iterator[Activations]:
        """The shards, one at a time.

        Returns:
            An iterator over `Activations` of consecutive texts; only one of them is in memory.

        Example:
            >>> shards = em.collect_to(
            ...     "shards", model, stories, layers=[1], batching=em.Batching(shard=32), progress=False
            ... )
            >>> [len(chunk.texts) for chunk in shards.chunks()]
            [32, 24]
        """
        return (chunk for chunk in _shards_of(self.folder) if chunk.texts)

    def moments(self) -> Moments:
        """Sums over the texts of each emotion and topic, in float64.

        Returns:
            `Moments`, made when the folder was opened.

        Example:
            >>> em.collect_to("shards", model, stories, layers=[1], progress=False).moments().emotions
            ['glimmer', 'gloamer', 'brindle', 'tarrow']
        """
        return self._moments

    def second_moment(self, layer: SupportsIndex) -> Float64[Tensor, "d_model d_model"]:
        """Pooled within-emotion second moment at a layer,  sum over stories of (x - m_e)(x - m_e)^T, in float64; one pass over the shards.

        Args:
            layer: A block that was collected.

        Returns:
            `[d_model d_model]`, symmetric.

        Raises:
            ValueError: a layer that was not collected.

        Example:
            >>> shards = em.collect_to("shards", model, stories, layers=[1], progress=False)
            >>> shards.second_moment(1).shape
            torch.Size([32, 32])
        """
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

        Returns:
            `Activations`.

        Raises:
            MemoryError: it does not fit.

        Example:
            >>> em.collect_to("shards", model, stories, layers=[1], progress=False).load()
            Activations(resid_post, layers 1..., 56 rows x 32, 56 texts)
        """
        size = sum(
            self.folder.file(k).stat().st_size for k in range(len(self.folder.manifest["shards"]))
        )
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


@spelled
def collect_to(
    folder: str | Path,
    model: HookedModel,
    texts: Texts,
    hook_point: AnyPoint = "resid_post",
    *,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> Collection:
    """Collect into a folder, in memory that does not grow with the corpus, so that a killed run continues where it was.

    Every `batching.shard` texts become a file, written whole. The same call continues a run that was killed, makes missing and damaged
    shards anew, and on a finished folder only reads it. A batching left open is that of the run that began.

    Args:
        folder: Where to; made if it does not exist.
        model: As for `collect_resid_post`, and so is everything below but the hook point.
        texts: What is read.
        hook_point: By name, as for `collect`.
        layers: Block indices; None is every block.
        pooling: How tokens become rows.
        prepend_bos: None follows the model's tokenizer.
        padding_side: Which side to pad.
        batching: How many are taken at once, and how many texts are a file.
        long: What is done with a text of more tokens than the model reads.
        emotions: Labels of plain texts.
        topics: Their topics.
        progress: Show a bar.

    Returns:
        `Collection`; `.load()` is what `collect` would have returned, to the bit.

    Raises:
        FileExistsError: the folder is held by another process, or was begun with another model, corpus, option or version: which is said.
        OSError: the disk is full, or would be. What is done stays; the same call continues.
        KeyError, ValueError, FloatingPointError: as `collect_resid_post`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     em.collect_to(folder, model, stories, batching=em.Batching(shard=32), progress=False)
        Collection(resid_post, layers 0..2, ... texts in ... shards)
    """
    with open_job(folder, model, texts, hook_point, options) as job:
        job.run(job.folder.missing(), progress=progress)
        return job.result()


@dataclass(frozen=True)
class Job:
    """A run on a folder: its shards can be made in any order, by any number of processes that have opened the same job."""

    folder: shards.Folder
    model: HookedModel
    corpus: Corpus
    recipe: Recipe

    def run(self, numbers: Sequence[int], *, progress: bool | None = None) -> None:
        """Make some of the shards."""
        if not numbers:
            return
        model, recipe, manifest = self.model, self.recipe, self.folder.manifest
        n_texts = min(len(numbers) * recipe.shard, manifest["corpus"]["n_texts"])
        with Progress(recipe, n_texts, progress) as bar:
            for piece in self.corpus.slices(recipe.shard, numbers):
                if manifest["shards"][piece.number] != piece.digest:
                    raise RuntimeError(
                        f"the texts changed while they were being read (slice {piece.number}); start again"
                    )
                read = encode_slice(model, recipe, piece)
                part = collect_slice(model, recipe, self.corpus, read, bar)
                part.save(self.folder.file(piece.number), overwrite=True)

    def result(self) -> Collection:
        """The finished folder."""
        return Collection.open(self.folder.path)


@contextmanager
def open_job(
    folder: str | Path,
    model: HookedModel,
    texts: Texts,
    hook_point: AnyPoint,
    options: Options,
    *,
    before: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[Job]:
    """Hold the folder of a collection while it is made; errors as of `collect_to`; `before` may refuse the manifest."""
    manifest = survey(folder, model, texts, hook_point, options)
    with lock_folder(folder, manifest, before):
        yield joined(folder, model, texts, hook_point, options)


@contextmanager
def lock_folder(
    folder: str | Path,
    manifest: dict[str, Any],
    before: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[shards.Folder]:
    """Hold a folder for a run that was surveyed, with room for all of it; `before` may refuse the manifest, and then no folder is made."""
    # of a run that was begun: what differs from it is said first
    there = (here(folder) / shards.MANIFEST).is_file()
    if before is not None and not there:
        before(manifest)
    with shards.begin(folder, manifest) as mine:
        if before is not None and there:
            before(manifest)
        options = manifest["options"]
        # single tokens are as many rows as tokens: not known before they are read
        if options["pooling"]["kind"] != "tokens":
            done = sum(f.stat().st_size for f in mine.path.glob("*.safetensors"))
            n_texts, n_neutral = (manifest["corpus"][k] for k in ("n_texts", "n_neutral"))
            d_model, n_layers = manifest["model"]["d_model"], len(options["layers"])
            need = disk_bytes(n_texts, n_layers, d_model, n_neutral, options["width"]) - done
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
    hook_point: AnyPoint,
    options: Options,
) -> Job:
    """The job that has been begun on this folder, by this process or another, with the same model, texts and options.

    Raises:
        ValueError: it was begun with another model, or with the same one in another precision.
    """
    mine = shards.read_folder(folder)
    present_info(model)
    recipe = make_recipe(model, hook_point, as_begun(options, mine.manifest))
    recipe = replace(recipe, width=mine.manifest["options"].get("width", 0))
    if recipe.model != mine.manifest["model"]:
        raise ValueError(
            f"{mine.path} was begun with another model, or in another precision: see its {shards.MANIFEST}"
        )
    if recipe.tokenization != mine.manifest["tokenization"]:
        raise ValueError(
            f"{mine.path} was begun with another chat template or tokenizer: see tokenization in its {shards.MANIFEST}"
        )
    corpus = open_corpus(texts, options.get("emotions"), options.get("topics"))
    return Job(mine, model, corpus, recipe)


def survey(
    folder: str | Path,
    model: HookedModel,
    texts: Texts,
    hook_point: AnyPoint,
    options: Options,
) -> dict[str, Any]:
    """The manifest of a run, after one reading of all texts; what is left open is taken from a manifest that is there.

    Raises:
        ValueError: a text that cannot be pooled (too long, too short, without its span), by its line or id: now, not after hours of work.
    """
    # what is written down, and compared with what a run began with, is the model as it is now
    present_info(model)
    with suppress(FileNotFoundError):
        options = as_begun(options, shards.read_folder(folder).manifest)
    recipe = make_recipe(model, hook_point, options)
    corpus = open_corpus(texts, options.get("emotions"), options.get("topics"))
    names, ids, n_texts, n_neutral = [], [], 0, 0
    for piece in corpus.slices(recipe.shard):
        names.append(piece.digest)
        n_texts += len(piece.texts)
        n_neutral += corpus.has_neutral * sum(label["split"] == "neutral" for label in piece.labels)
    check_number(recipe, n_texts)

    def read() -> Iterator[Encoded]:
        for piece in corpus.slices(recipe.shard):
            found = encode_slice(model, recipe, piece)
            ids.append(ids_hash(found.encoded))
            yield found

    recipe = recipe.of_texts(model, check_used(recipe, read(), model.cfg.n_ctx))
    return {
        "kinds": FORMATS[:1],
        "versions": {"emolens": __version__, "code": _code()}
        | {p: version(p) for p in ("torch", "transformers", "transformer-lens")},
        "model": recipe.model,
        "tokenization": recipe.tokenization,
        "device": device_of(model).type,
        "options": {k: v for k, v in asdict(recipe).items() if k not in ("model", "tokenization")},
        "corpus": {
            "n_texts": n_texts,
            "n_neutral": n_neutral,
            "sha256": text_hash("".join(names)),
            **corpus.info,
        },
        "shards": names,
        "ids_sha256": text_hash("".join(ids)),
    }


def _code() -> str:
    """Identity of the sources that decide what is in a shard."""
    return shards.code_digest("_files.py", "_typing.py", "models", "sets/corpus.py", "collect")


def disk_bytes(
    n_texts: int, n_layers: int, d_model: int, n_neutral: int = 0, width: int | None = None
) -> int:
    """Size of a collection: a row of float32 for each text, and for `SAMPLED` tokens and the beginnings (`LENGTHS`) of each neutral text of a
    set, at each layer (`width` numbers, `d_model` in the residual stream) and for the embeddings, and half a kilobyte of what is known of each text.
    """
    n_rows = n_texts + (SAMPLED + len(LENGTHS)) * n_neutral
    return n_rows * (n_layers * (width or d_model) + d_model) * 4 + n_texts * 512

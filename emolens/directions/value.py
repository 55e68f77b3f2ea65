"""Emotion directions with what is needed to read them: reference, calibration, provenance; arithmetic and files.

Directions may be added, subtracted, scaled and cut; what they cannot keep (the scale of a sum), or never had (that of a tensor from
elsewhere), they say is not known. How they are fitted is told in `estimators` and `fitting`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emolens import __version__
from emolens._table import Table
from emolens._typing import AnyPoint, Blocks, HookPoint, block_number, block_numbers, typed
from emolens.directions.algebra import default_layer, project
from emolens.directions.arithmetic import Number, combined, finite, scaled
from emolens.directions.calibration import NO_NEUTRAL, UNCALIBRATED, Calibration, position_bin
from emolens.directions.comparing import cosines, only_one, ranked
from emolens.directions.files import WRONG_HEADER, other_directions, read_fields, write_fields
from emolens.directions.given import Described, Vector, described, given_fields
from emolens.shards import vacant


@typed
@dataclass(frozen=True, eq=False)
class EmotionDirections:
    """Emotion vectors by emotion and layer, with what is needed to read and steer with them.

    ``directions["joy"]`` is one emotion, ``directions[["joy", "fear"]]`` several, ``directions["joy"][18]`` (or
    ``directions["joy", 18]``) one emotion at one layer. Iteration, ``in`` and ``len`` are over emotions. Sums, differences and
    multiples are directions again. Values never change; every operation returns a new object.

    >>> list(directions), "glimmer" in directions, len(directions)
    (['glimmer', 'gloamer', 'brindle', 'tarrow'], True, 4)
    >>> (directions["glimmer"] - directions["tarrow"])[1] / 2
    EmotionDirections(0.5 glimmer - tarrow; resid_post, layer 1, d_model 32; mean_difference)

    Attributes:
        emotions: Their names, in the order of the emotion axis.
        hook_point: Where in a block they act, such as "resid_post".
        layers: 0-based block numbers, in the order of the layer axis.
        vectors: `[emotion layer d_model]`, raw differences in the residual stream's own units.
        reference: `[layer d_model]`, mu, the mean of the emotion means (NaN where unknown).
        neutral_mean: `[layer d_model]`, mean of the neutral texts (NaN without them).
        norm_median: `[layer]`, the median residual norm over ordinary tokens: the unit of a dose (NaN where unknown).
        norm_mean: `[layer]`, their mean: the paper's unit.
        reliability: `[emotion layer]`, Spearman-Brown corrected split-half cosine over topics.
        layer: The layer used where none is named: two thirds of the depth, or the one a study froze.
        info: Model, set, pooling, method and counts.
        calibration: None for directions made by arithmetic or from tensors.
        among: The whole that a part was taken from, for `nearest`.
        operands: The emotions that these were made of.

    Raises:
        jaxtyping.TypeCheckError: tensors whose shapes do not fit each other.
        ValueError: names or layers that do not fit the tensors.
    """

    emotions: tuple[str, ...]
    hook_point: AnyPoint
    layers: tuple[int, ...]
    vectors: Float[Tensor, "emotion layer d_model"]
    reference: Float[Tensor, "layer d_model"]
    neutral_mean: Float[Tensor, "layer d_model"]
    norm_median: Float[Tensor, " layer"]
    norm_mean: Float[Tensor, " layer"]
    reliability: Float[Tensor, "emotion layer"]
    layer: int
    info: dict[str, Any]
    calibration: Calibration | None = None
    among: EmotionDirections | None = None
    operands: tuple[str, ...] = ()

    __array_ufunc__ = None  # numpy leaves `np.float32(2) * directions` to us, and makes no array

    def __post_init__(self) -> None:
        named, held = (len(self.emotions), len(self.layers)), tuple(self.vectors.shape[:2])
        if named != held:
            raise ValueError(
                f"{named[0]} emotions and {named[1]} layers are named, vectors [emotion layer d_model] hold {held[0]} and {held[1]}"
            )
        if self.calibration is not None and self.calibration.mean.shape != held:
            raise ValueError("this calibration is of other emotions or layers: take both by name")
        if self.layer not in self.layers:
            raise ValueError(
                f"the default layer {self.layer} is not among the layers {self.layers}"
            )

    @staticmethod
    def from_tensors(
        vectors: Mapping[str, Vector],
        *,
        model: Described | Mapping[str, Any],
        hook_point: HookPoint,
        layers: Blocks,
        reference: Vector | None = None,
        norm_median: Vector | float | None = None,
        method: str = "given",
    ) -> EmotionDirections:
        """Make directions of vectors from elsewhere: a cache, an SAE's decoder, the weights of a probe.

        They steer, ablate, are compared and saved as any others. What is not given stays unknown, and the calls that need it say so: a
        dose in median norms needs `norm_median` (or ``dose_unit="raw"``), projections and affine ablation need `reference`, and
        scores need the calibration of an estimator.

        >>> given = {"up": np.ones(32), "down": -torch.ones(32)}
        >>> em.EmotionDirections.from_tensors(given, model=em.model_info(model), hook_point="resid_post", layers=1)
        EmotionDirections(up, down; resid_post, layer 1, d_model 32; given)

        Args:
            vectors: For each name a vector `[d_model]`, or `[layer d_model]` for several layers, in the stream's own units.
            model: Of which model's stream they are: ``em.model_info(model)``, or the ``info["model"]`` of what was made with it.
            hook_point: Where in a block, such as "resid_post".
            layers: The block they belong to, or one for each row, from 0 on.
            reference: `[d_model]` or `[layer d_model]`, the mean activation that projections are measured from.
            norm_median: Median residual norm over ordinary tokens, one or `[layer]`, such as ``acts.at(18).norm_median``.
            method: What they are, in words; shown and saved with them.

        Returns:
            Directions without calibration, as float32 copies on the CPU.

        Raises:
            TypeError: a model itself, or something that is no description of one.
            ValueError: no vectors; another shape than the model's and the layers'; values that are not finite; layers that the model has not.
        """
        about = described(model)
        fields = given_fields(vectors, about, hook_point, layers, reference, norm_median)
        made = {"emolens": __version__, "model": about, "method": method, "remove_neutral": None}
        layer = default_layer(fields["layers"], about["n_layers"])
        return EmotionDirections(hook_point=hook_point, layer=layer, info=made, **fields)

    def __repr__(self) -> str:
        some = f", ... ({len(self)})" if len(self) > 4 else ""
        low, high = min(self.layers), max(self.layers)
        layers = f"layer {low}" if low == high else f"layers {low}..{high}"
        return (
            f"EmotionDirections({', '.join(self.emotions[:4])}{some}; {self.hook_point}, {layers}, "
            f"d_model {self.vectors.shape[-1]}; {self.info['method']})"
        )

    def __len__(self) -> int:
        return len(self.emotions)

    def __iter__(self) -> Iterator[str]:
        return iter(self.emotions)

    def __contains__(self, emotion: object) -> bool:
        return emotion in self.emotions

    def __getitem__(
        self, key: str | SupportsIndex | Iterable[str] | tuple[str, SupportsIndex]
    ) -> EmotionDirections:
        if isinstance(key, tuple) and len(key) == 2 and not isinstance(key[1], str):
            return self[key[0]].at(key[1])
        # a number of numpy or torch is an array without axes
        if not isinstance(key, Iterable) or getattr(key, "ndim", 1) == 0:
            return self.at(key)  # pyright: ignore[reportArgumentType]  # said there if it is no number
        at = [self.index(str(name)) for name in ([key] if isinstance(key, str) else key)]
        names = tuple(self.emotions[i] for i in at)
        return replace(
            self,
            emotions=names,
            vectors=self.vectors[at],
            reliability=self.reliability[at],
            calibration=self.calibration and self.calibration.select(at, range(len(self.layers))),
            among=self.among or self,
            operands=names,
        )

    def index(self, emotion: str) -> int:
        """Find the row of an emotion.

        >>> directions.index("brindle")
        2

        Args:
            emotion: Its name.

        Returns:
            Its place in `emotions`, 0-based.

        Raises:
            KeyError: unknown; the message names the nearest one.
        """
        if emotion not in self.emotions:
            near = difflib.get_close_matches(emotion, self.emotions, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise KeyError(
                f"no emotion {emotion!r} here{hint} There are: {', '.join(self.emotions)}"
            )
        return self.emotions.index(emotion)

    def slot(self, layer: SupportsIndex | None = None) -> int:
        """Find the place of a layer on the layer axis.

        >>> directions.at([1, 2]).slot(2)
        1

        Args:
            layer: A block number; None is the default layer.

        Returns:
            Its place in `layers`, 0-based.

        Raises:
            ValueError: no directions were computed there.
        """
        layer = self.layer if layer is None else block_number(layer)
        if layer not in self.layers:
            raise ValueError(
                f"layer {layer} has no directions here; there are layers {', '.join(map(str, self.layers))}"
            )
        return self.layers.index(layer)

    def at(self, layers: Blocks) -> EmotionDirections:
        """Take the same directions at some layers.

        >>> directions.at([0, 2]).vectors.shape
        torch.Size([4, 2, 32])

        Args:
            layers: A block number, which becomes the default layer, or several; the default stays if it is among them.

        Returns:
            `EmotionDirections`, with copies of the tensors.

        Raises:
            ValueError: none, or one without directions.
        """
        wanted = block_numbers(layers)
        if not wanted:
            raise ValueError("at() needs at least one layer")
        k = [self.slot(layer) for layer in wanted]
        return replace(
            self,
            layers=wanted,
            layer=self.layer if self.layer in wanted else wanted[0],
            vectors=self.vectors[:, k],
            reference=self.reference[k],
            neutral_mean=self.neutral_mean[k],
            norm_median=self.norm_median[k],
            norm_mean=self.norm_mean[k],
            reliability=self.reliability[:, k],
            calibration=self.calibration and self.calibration.select(range(len(self)), k),
            among=self.among and self.among.at(wanted),
        )

    def tensor(self, layer: SupportsIndex | None = None) -> Float[Tensor, " d_model"]:
        """Give the one vector that is here as a plain tensor, for code that knows no emotions.

        >>> directions["glimmer"].tensor(layer=1).shape
        torch.Size([32])

        Args:
            layer: A block number; None is the default layer.

        Returns:
            A copy, as long as it was fitted, in the residual stream's own units; `unit` has those of norm one.

        Raises:
            ValueError: several emotions are here, or none at this layer.
        """
        only_one(self, "tensor")
        return self.vectors[0, self.slot(layer)].clone()

    def unit(self, layer: SupportsIndex | None = None) -> Float[Tensor, "emotion d_model"]:
        """Give the directions at a layer with norm one.

        >>> directions.unit(1).norm(dim=-1).round().tolist()
        [1.0, 1.0, 1.0, 1.0]

        Args:
            layer: A block number; None is the default layer.

        Returns:
            A copy, without units.

        Raises:
            ValueError: a vector that is zero points nowhere.
        """
        vectors = self.vectors[:, self.slot(layer)]
        norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        if (norm == 0).any():
            zero = self.emotions[int((norm == 0).flatten().nonzero()[0])]
            raise ValueError(f"{zero!r} is zero and has no direction")
        return vectors / norm

    def centre(self, layer: SupportsIndex | None = None) -> Float[Tensor, " d_model"]:
        """Give mu, from which projections at a layer are measured.

        >>> directions.centre(1).shape
        torch.Size([32])

        Args:
            layer: A block number; None is the default layer.

        Returns:
            The mean of the emotion means, in the residual stream's own units.

        Raises:
            ValueError: it is not known: directions from tensors, given without it.
        """
        mu = self.reference[self.slot(layer)]
        if not mu.isfinite().all():
            raise ValueError(
                "these directions know no mean activation to measure from: give from_tensors(..., reference=), the mean over texts that "
                "you compare with"
            )
        return mu

    def z(self, rows: Float[Tensor, "text layer d_model"]) -> Float[Tensor, "text emotion layer"]:
        """Score pooled texts:  z = ((x - mu) . v_e/|v_e| - mean_e) / std_e.

        >>> directions.z(acts.rows).shape[1:]
        torch.Size([4, 3])

        Args:
            rows: Pooled activations at these layers, as the directions were made from.

        Returns:
            Held-out standard deviations above the held-out mean.

        Raises:
            ValueError: directions made by arithmetic have no calibration.
        """
        cal = self.scale("text")
        return (project(rows, self.vectors, self.reference) - cal.mean) / cal.std

    def token_z(
        self, rows: Float[Tensor, "token layer d_model"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token emotion layer"]:
        """Score single tokens, as `z`, against neutral text at the same position.

        >>> directions.token_z(torch.zeros(2, 3, 32), torch.tensor([1, 40])).shape
        torch.Size([2, 4, 3])

        Args:
            rows: Activations at these layers.
            position: Position of each token in its text; 0 is the first.

        Returns:
            Standard deviations above neutral text.

        Raises:
            ValueError: no calibration, or none of tokens: as `scale`.
        """
        b, cal = position_bin(position), self.scale("token")
        return (project(rows, self.vectors, self.reference) - cal.token_mean[b]) / cal.token_std[b]

    def scale(self, per: Literal["text", "token"]) -> Calibration:
        """Give the calibration, if it has what scores are counted in: of stories for texts, of neutral tokens for tokens.

        >>> directions.scale("text") is directions.calibration
        True

        Args:
            per: What is to be scored. The band of "none" is more than a text's score needs, and may be unknown.

        Returns:
            `Calibration`, in the units of a projection on unit directions.

        Raises:
            ValueError: directions made by arithmetic or from tensors; for tokens, those from too few neutral texts.
        """
        if self.calibration is None:
            raise ValueError(UNCALIBRATED)
        if per == "token" and not self.calibration.token_band.isfinite().any():
            raise ValueError(NO_NEUTRAL)
        return self.calibration

    def cosine(
        self,
        other: EmotionDirections | None = None,
        *,
        layer: SupportsIndex | None = None,
        corrected: bool = False,
    ) -> Float[Tensor, "emotion other"]:
        """Compare every pair of emotions at a layer by cosine, or every one with every one of other directions.

        >>> directions.cosine(layer=1).diagonal().round().tolist()
        [1.0, 1.0, 1.0, 1.0]
        >>> directions.cosine(directions["brindle"]).argmax(0)
        tensor([2])

        Args:
            other: Directions of the same model and hook point, of any method; None compares these with each other.
            layer: A block number; None is the default layer.
            corrected: Divide by the geometric mean of the two reliabilities (an estimate of the cosine without sampling noise; it
                may exceed 1, and is NaN where a reliability is not positive).

        Returns:
            Cosines, in the order of `emotions`.

        Raises:
            TypeError: `other` is no directions.
            ValueError: a vector that is zero points nowhere; directions of another model or hook point, or without this layer.
        """
        return cosines(self, other, self.layers[self.slot(layer)], corrected)

    def nearest(
        self,
        emotion: str | None = None,
        *,
        layer: SupportsIndex | None = None,
        k: SupportsIndex = 5,
    ) -> Table:
        """Rank the emotions by their cosine with one direction, without those it was made of.

        >>> directions.nearest("glimmer", k=2)["emotion"]
        ['gloamer', 'brindle']

        Args:
            emotion: Which one; None is the one that is here, as in ``(directions["joy"] - directions["fear"]).nearest()``.
            layer: A block number; None is the default layer.
            k: At most so many.

        Returns:
            Rows of emotion and cosine, the most similar first.

        Raises:
            ValueError: no emotion is named and several are here; `k` below 1.
        """
        if emotion is not None:
            return self[emotion].nearest(layer=layer, k=k)
        only_one(self, "nearest")
        if index(k) < 1:
            raise ValueError(f"k={k}; at least 1")
        return Table(("emotion", "cosine"), tuple(ranked(self, layer)[:k]))

    def __add__(self, other: EmotionDirections) -> EmotionDirections:
        return combined(self, other, 1.0, "+")

    def __sub__(self, other: EmotionDirections) -> EmotionDirections:
        return combined(self, other, -1.0, "-")

    def __neg__(self) -> EmotionDirections:
        return scaled(self, -1.0)

    def __mul__(self, factor: Number) -> EmotionDirections:
        return scaled(self, finite(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Number) -> EmotionDirections:
        return scaled(self, 1 / finite(divisor))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a safetensors file with JSON metadata, atomically. No pickle, no paths of this machine.

        >>> directions.save("toy.safetensors"); load_directions("toy.safetensors")
        EmotionDirections(glimmer, gloamer, brindle, tarrow; resid_post, layers 0..2, d_model 32; mean_difference)

        Args:
            path: The file, in a folder that is there.
            overwrite: Replace a file that holds something else.

        Raises:
            FileExistsError: the file is there and holds other directions, or something else.
            FileNotFoundError: its folder is not there.
        """
        other = partial(other_directions, self, load_directions)
        write_fields(vacant(path, other, overwrite=overwrite), self)

    @property
    def origin(self) -> str:
        """What the directions are and where they come from, in words."""
        made = f"{self.info['method']} of {self.info.get('set') or 'texts'} with {self.info['model']['name']}"
        return f"{len(self.emotions)} emotions x {len(self.layers)} layers at {self.hook_point}, {made}"


def load_directions(path: str | Path) -> EmotionDirections:
    """Read directions written by `EmotionDirections.save`, by this version or an earlier one.

    >>> directions.save("toy.safetensors", overwrite=True)
    >>> load_directions("toy.safetensors").emotions == directions.emotions
    True

    Args:
        path: The file.

    Returns:
        `EmotionDirections`, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, damaged, or another program's file.
    """
    try:
        return EmotionDirections(**read_fields(path))
    except TypeError as error:  # a shape, or a name that is no word
        raise ValueError(f"{path}: {WRONG_HEADER} ({str(error)[:200]})") from error

"""Emotion directions with what is needed to read them: reference, calibration, provenance; arithmetic and files.

A vector may be added, subtracted, scaled and cut; what it cannot keep (the scale of a sum) it says it has lost.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from emolens._typing import Blocks, HookPoint, block_number, block_numbers
from emolens.directions.algebra import project
from emolens.directions.calibration import Calibration, position_bin
from emolens.shards import read_safetensors, same_weights, vacant, write_safetensors

UNCALIBRATED = (
    "these directions have no calibration (made by arithmetic, or from fewer than two topics): "
    "score with the ones they were made from, or use directions.project for raw projections"
)
NO_NEUTRAL = (
    "these directions know too little neutral text (at least 20 neutral texts are needed, and 20 tokens of them to score single tokens): make "
    "them from an emotion set that has more, to know what 'none' is, or use directions.project for raw projections"
)


@dataclass(frozen=True, eq=False)
class EmotionDirections:
    """Emotion vectors by emotion and layer, with what is needed to read and steer with them.

    ``v["joy"]`` is one emotion, ``v["joy", 18]`` one emotion at one layer, ``v[["joy", "fear"]]`` several; ``v["joy"] - v["fear"]``
    and ``0.5 * v["joy"]`` are directions again. Values never change; every operation returns a new object.

    Attributes:
        vectors: `[emotion layer d_model]`, raw differences in the residual stream's own units.
        reference: `[layer d_model]`, mu, the mean of the emotion means.
        neutral_mean: `[layer d_model]`, mean of the neutral texts (NaN without them).
        norm_median: `[layer]`, the median residual norm over ordinary tokens: the unit of a dose.
        norm_mean: `[layer]`, their mean: the paper's unit.
        reliability: `[emotion layer]`, Spearman-Brown corrected split-half cosine over topics.
        calibration: None for directions made by arithmetic.
        layer: The layer used where none is named: two thirds of the depth, or the one a study froze.
        info: Model, set, pooling, method and counts.
    """

    emotions: tuple[str, ...]
    hook_point: HookPoint
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
    among: EmotionDirections | None = None  # the whole that a part was taken from, for `nearest`
    operands: tuple[str, ...] = ()

    def __repr__(self) -> str:
        names = ", ".join(self.emotions[:4]) + (
            f", ... ({len(self.emotions)})" if len(self.emotions) > 4 else ""
        )
        layers = (
            f"layers {min(self.layers)}..{max(self.layers)}"
            if len(self.layers) > 1
            else f"layer {min(self.layers)}"
        )
        return f"EmotionDirections({names}; {self.hook_point}, {layers}, d_model {self.vectors.shape[-1]}; {self.info['method']})"

    def __getitem__(
        self, key: str | Iterable[str] | tuple[str, SupportsIndex]
    ) -> EmotionDirections:
        if isinstance(key, tuple) and len(key) == 2 and not isinstance(key[1], str):
            return self[key[0]].at(key[1])
        names = [key] if isinstance(key, str) else list(key)
        index = [self.index(str(name)) for name in names]
        return replace(
            self,
            emotions=tuple(self.emotions[i] for i in index),
            vectors=self.vectors[index],
            reliability=self.reliability[index],
            calibration=self.calibration
            and self.calibration.select(index, range(len(self.layers))),
            among=self.among or self,
            operands=tuple(self.emotions[i] for i in index),
        )

    def index(self, emotion: str) -> int:
        """Row of an emotion.

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
        """Position of a layer on the layer axis; the default layer for None.

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
        """The same directions at some layers; a single one becomes the default."""
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
            calibration=self.calibration and self.calibration.select(range(len(self.emotions)), k),
            among=self.among and self.among.at(wanted),
        )

    def unit(self, layer: SupportsIndex | None = None) -> Float[Tensor, "emotion d_model"]:
        """Directions of norm one at a layer; ValueError for a vector that is zero."""
        v = self.vectors[:, self.slot(layer)]
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        if (norm == 0).any():
            raise ValueError(
                f"{self.emotions[int((norm == 0).flatten().nonzero()[0])]!r} is zero and has no direction"
            )
        return v / norm

    def z(self, rows: Float[Tensor, "text layer d_model"]) -> Float[Tensor, "text emotion layer"]:
        """Calibrated scores of pooled texts: held-out standard deviations above the held-out mean.

        Raises:
            ValueError: directions made by arithmetic have no calibration.
        """
        if self.calibration is None:
            raise ValueError(UNCALIBRATED)
        raw = project(rows, self.vectors, self.reference)
        return (raw - self.calibration.mean) / self.calibration.std

    def token_z(
        self, rows: Float[Tensor, "token layer d_model"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token emotion layer"]:
        """Calibrated scores of single tokens: standard deviations above neutral text at the same position.

        Raises:
            ValueError: no calibration, or none of tokens: as `scale`.
        """
        b, cal = position_bin(position), self.scale("token")
        return (project(rows, self.vectors, self.reference) - cal.token_mean[b]) / cal.token_std[b]

    def scale(self, per: Literal["text", "token"]) -> Calibration:
        """The calibration, where it has what scores of texts, or of single tokens, are made with.

        Raises:
            ValueError: directions made by arithmetic, or from too few neutral texts.
        """
        if self.calibration is None:
            raise ValueError(UNCALIBRATED)
        if (
            not (self.calibration.token_band if per == "token" else self.calibration.band)
            .isfinite()
            .any()
        ):
            raise ValueError(NO_NEUTRAL)
        return self.calibration

    def cosine(
        self, *, layer: SupportsIndex | None = None, corrected: bool = False
    ) -> Float[Tensor, "emotion emotion"]:
        """Cosine of every pair of emotions at a layer.

        Args:
            corrected: Divide by the geometric mean of the two reliabilities (an estimate of the cosine without sampling noise; it
                may exceed 1, and is NaN where a reliability is not positive).
        """
        u = self.unit(layer)
        cosine = einsum(u, u, "e d_model, f d_model -> e f")
        if corrected:
            r = self.reliability[:, self.slot(layer)]
            r = torch.where(r > 0, r, torch.nan).sqrt()
            cosine = cosine / (r[:, None] * r[None]) * (1 - torch.eye(len(r))) + torch.eye(len(r))
        return cosine

    def nearest(self, *, layer: SupportsIndex | None = None, k: int = 5) -> list[tuple[str, float]]:
        """The emotions most similar to this one direction, by cosine, without those it was made of.

        >>> [name for name, cosine in directions["glimmer"].nearest(k=2)]
        ['gloamer', 'brindle']

        Raises:
            ValueError: if there is more than one direction here.
        """
        if len(self.emotions) != 1:
            raise ValueError(
                f"nearest() is of one direction, here are {len(self.emotions)}; take one, as in v['{self.emotions[0]}']"
            )
        whole = self.among or self
        cosine = einsum(
            self.unit(layer), whole.unit(layer), "one d_model, emotion d_model -> emotion"
        )
        ranked = sorted(
            zip(whole.emotions, cosine.tolist(), strict=True), key=lambda pair: -pair[1]
        )
        return [pair for pair in ranked if pair[0] not in self.operands][:k]

    def __add__(self, other: EmotionDirections) -> EmotionDirections:
        return self._combine(other, 1.0, "+")

    def __sub__(self, other: EmotionDirections) -> EmotionDirections:
        return self._combine(other, -1.0, "-")

    def __neg__(self) -> EmotionDirections:
        return self * -1.0

    def __mul__(self, factor: float | int) -> EmotionDirections:
        if (
            isinstance(factor, bool)
            or not isinstance(factor, int | float)
            or not np.isfinite(factor)
        ):
            raise TypeError(f"directions are multiplied by a finite number, not {factor!r}")
        names = tuple(f"{factor:g} {e}" for e in self.emotions)
        return replace(
            self,
            emotions=names,
            vectors=self.vectors * factor,
            calibration=None,
            operands=self.operands or self.emotions,
        )

    __rmul__ = __mul__

    def _combine(self, other: EmotionDirections, sign: float, symbol: str) -> EmotionDirections:
        if not isinstance(other, EmotionDirections):
            raise TypeError(
                f"only directions can be added to directions, not {type(other).__name__}"
            )
        for what, a, b in (
            ("hook point", self.hook_point, other.hook_point),
            ("layers", self.layers, other.layers),
            ("width", self.vectors.shape[-1], other.vectors.shape[-1]),
        ):
            if a != b:
                raise ValueError(
                    f"these directions differ in their {what} ({a} and {b}) and cannot be combined"
                )
        mine, theirs = self.info["model"], other.info["model"]
        if not same_weights(mine, theirs):
            names = f"{mine.get('name')} and {theirs.get('name')}"
            raise ValueError(
                f"these directions differ in their model ({names}) and cannot be combined"
            )
        if len(self.emotions) != len(other.emotions):
            raise ValueError(
                f"{len(self.emotions)} and {len(other.emotions)} emotions cannot be combined one by one"
            )
        return replace(
            self,
            emotions=tuple(
                f"{a} {symbol} {b}" for a, b in zip(self.emotions, other.emotions, strict=True)
            ),
            vectors=self.vectors + sign * other.vectors,
            reliability=torch.full_like(self.reliability, torch.nan),
            calibration=None,
            among=self.among or other.among or self,
            operands=(*(self.operands or self.emotions), *(other.operands or other.emotions)),
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a safetensors file with JSON metadata, atomically. No pickle, no paths of this machine.

        Raises:
            FileExistsError: the file is there and holds other directions, or something else; `overwrite` replaces it.
        """
        vacant(path, self._other, overwrite=overwrite)
        tensors = {
            k: getattr(self, k).contiguous()
            for k in (
                "vectors",
                "reference",
                "neutral_mean",
                "norm_median",
                "norm_mean",
                "reliability",
            )
        }
        if self.calibration is not None:
            for k in Calibration.__dataclass_fields__:
                tensors[f"calibration.{k}"] = getattr(self.calibration, k).contiguous()
        header = {
            k: getattr(self, k)
            for k in ("emotions", "hook_point", "layers", "layer", "info", "operands")
        }
        write_safetensors(
            path, tensors, {"format": "emolens.directions.1", "emolens": json.dumps(header)}
        )

    def _other(self, file: Path) -> str | None:
        """What a file holds, in words; None if it is these directions."""
        try:
            found = load_directions(file)
        except ValueError:
            return "something that is no directions of emolens"
        same = _identity(found) == _identity(self) and same_weights(
            found.info["model"], self.info["model"]
        )
        return None if same else f"other directions ({found.origin})"

    @property
    def origin(self) -> str:
        """What the directions are and where they come from, in words."""
        made = f"{self.info['method']} of {self.info.get('set') or 'texts'} with {self.info['model']['name']}"
        return f"{len(self.emotions)} emotions x {len(self.layers)} layers at {self.hook_point}, {made}"


def _identity(v: EmotionDirections) -> tuple[Any, ...]:
    """What makes directions the same ones when they are made again."""
    made = ("method", "remove_neutral", "set_sha256", "pooling", "training_texts")
    return v.emotions, v.hook_point, v.layers, v.operands, *(v.info.get(k) for k in made)


def load_directions(path: str | Path) -> EmotionDirections:
    """Read directions written by `EmotionDirections.save`.

    Raises:
        FileNotFoundError, ValueError: no such file; truncated, or another program's file.
    """
    tensors, metadata = read_safetensors(path, "emolens.directions.1")
    needed = {"vectors", "reference", "neutral_mean", "norm_median", "reliability"}
    if not needed <= set(tensors) or "emolens" not in metadata:
        missing = sorted(needed - set(tensors)) or ["the header"]
        raise ValueError(
            f"{path}: {missing[0]} is missing; the file was not written whole, or by another version"
        )
    parts = {
        k.removeprefix("calibration."): t
        for k, t in tensors.items()
        if k.startswith("calibration.")
    }
    median = tensors["norm_median"]
    try:
        header = json.loads(metadata["emolens"])
        loaded = EmotionDirections(
            emotions=tuple(header["emotions"]),
            hook_point=header["hook_point"],
            layers=tuple(header["layers"]),
            layer=header["layer"],
            info=header["info"],
            operands=tuple(header["operands"]),
            calibration=Calibration.of_file(parts) if parts else None,
            vectors=tensors["vectors"],
            reference=tensors["reference"],
            neutral_mean=tensors["neutral_mean"],
            norm_median=median,
            norm_mean=tensors.get(
                "norm_mean", torch.full_like(median, torch.nan)
            ),  # 0.1.0 had none
            reliability=tensors["reliability"],
        )
        texts = (*loaded.emotions, *loaded.operands, loaded.hook_point)
        layers = (*loaded.layers, loaded.layer)
        if not all(isinstance(t, str) for t in texts) or not all(type(k) is int for k in layers):
            raise TypeError("names must be words, layers must be numbers")
        if loaded.layer not in loaded.layers or not isinstance(loaded.info, dict):
            raise ValueError("the default layer is not among the layers, or info is not a mapping")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its header is not that of directions ({str(error)[:200]})"
        ) from error
    e, k = len(loaded.emotions), len(loaded.layers)
    d = loaded.vectors.shape[-1] if loaded.vectors.ndim else 0
    for name, shape in (
        ("vectors", (e, k, d)), ("reference", (k, d)), ("neutral_mean", (k, d)), ("norm_median", (k,)),
        ("norm_mean", (k,)), ("reliability", (e, k)),
    ):  # fmt: skip
        if tuple(getattr(loaded, name).shape) != shape:
            found = list(getattr(loaded, name).shape)
            raise ValueError(
                f"{path}: {name} has shape {found}; {e} emotions and {k} layers need {list(shape)}"
            )
    return loaded


def default_layer(layers: Sequence[int], n_layers: int) -> int:
    """The collected layer nearest to two thirds of the depth, where the paper reads."""
    return min(layers, key=lambda layer: (abs(layer - 2 * n_layers // 3), layer))

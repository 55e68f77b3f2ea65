"""From activations to emotion directions: pure tensor maths, no model.

For emotion e with stories s of vectors x_s (one layer), m_e = mean over e's stories of x_s and mu = mean over emotions of m_e:
``mean_difference``  v_e = (I - P)(m_e - mu), with P the projector on the top principal components of neutral tokens;
``antonym_contrast`` v_e = (I - P)(m_e - m_antonym(e));  ``pca`` the first singular direction of e's same-topic differences;
``lda`` v_e = S^-1 (m_e - mu), S the Ledoit-Wolf within-emotion covariance;  ``logistic`` the weights of a multinomial regression.
All come from one pass over the texts and share one calibration: scores of texts whose topic was left out. Which one is best is an
experiment (`emolens.experiments.separability`), not decided here.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from emolens import __version__, stats
from emolens._typing import Blocks, HookPoint, block_number, block_numbers, typed
from emolens.activations import LENGTHS, Activations, Collection, Moments, TextInfo, is_main, with_topics
from emolens.emotion_sets import EmotionSet
from emolens.shards import read_safetensors, same_weights, vacant, write_safetensors

UNCALIBRATED = (
    "these directions have no calibration (made by arithmetic, or from fewer than two topics): "
    "score with the ones they were made from, or use directions.project for raw projections"
)
NO_NEUTRAL = (
    "these directions know too little neutral text (at least 20 neutral texts are needed, and 20 tokens of them to score single tokens): make "
    "them from an emotion set that has more, to know what 'none' is, or use directions.project for raw projections"
)
SHUFFLES = 100  # draws until one is a control
POSITION_EDGES = (1, 4, 16, 64)  # token calibration by position: 1-3, 4-15, 16-63, 64 and later
BAND = 0.95  # share of neutral texts (and tokens) whose highest score lies inside the neutral band
FOLDS = 4  # groups of topics, each read by directions without it, for the band
ENOUGH = 20  # neutral texts (or tokens) for a band: the least that have a 95 % point


@dataclass(frozen=True, eq=False)
class Calibration:
    """What turns a projection s_e(x) = (x - mu) . v_e/|v_e| into a score. See `readout.score`.

    The band is of the highest z of *all* emotions, and of texts that had no part in what reads them: directions, neutral components and
    reference of each were fitted without its topic. Short texts scatter more, so there is one for each length.

    Attributes:
        mean, std: `[emotion layer]` of held-out scores over all stories (each scored by directions without its topic).
        band: `[length layer]` a text of so many tokens (`LENGTHS`) whose highest z is below this is "none": it exceeds that of 95 % of neutral texts.
        band_rate: `[length layer]` share of neutral texts that lie above it where neither directions nor band knew their topic (`mean` and `std`, of
            stories of all topics, did); NaN where not measured.
        token_mean, token_std: `[position emotion layer]` of single tokens of neutral texts, by position (`POSITION_EDGES`).
        token_band, token_rate: `[position layer]` as `band` and `band_rate`, of neutral tokens; for the rate their mean and spread are those
            of other topics as well.
    """

    mean: Float[Tensor, "emotion layer"]
    std: Float[Tensor, "emotion layer"]
    band: Float[Tensor, "length layer"]
    band_rate: Float[Tensor, "length layer"]
    token_mean: Float[Tensor, "position emotion layer"]
    token_std: Float[Tensor, "position emotion layer"]
    token_band: Float[Tensor, "position layer"]
    token_rate: Float[Tensor, "position layer"]

    def select(self, emotions: Sequence[int], layers: Sequence[int]) -> Calibration:
        """The part of some emotions and layers. The bands stay those of all emotions: for fewer they are wider than need be."""
        e, k = list(emotions), list(layers)
        return Calibration(
            self.mean[e][:, k],
            self.std[e][:, k],
            self.band[:, k],
            self.band_rate[:, k],
            self.token_mean[:, e][:, :, k],
            self.token_std[:, e][:, :, k],
            self.token_band[:, k],
            self.token_rate[:, k],
        )

    def of_length(
        self, n_tokens: Int[Tensor, " text"]
    ) -> tuple[Float[Tensor, "text layer"], Float[Tensor, "text layer"]]:
        """Band and measured rate of texts of so many pooled tokens, between the `LENGTHS` by their logarithm."""
        at, nodes = n_tokens.clamp(LENGTHS[0], LENGTHS[-1]).double().log2(), torch.tensor(LENGTHS).double().log2()
        right = torch.bucketize(at, nodes).clamp(1, len(nodes) - 1)
        share = ((at - nodes[right - 1]) / (nodes[right] - nodes[right - 1])).float()[:, None]
        band, rate = (x[right - 1] + share * (x[right] - x[right - 1]) for x in (self.band, self.band_rate))
        for side in (right, right - 1):  # beside a length where it was not measured, that of the other
            rate = torch.where(rate.isnan(), self.band_rate[side], rate)
        return band, rate

    @staticmethod
    def of_file(parts: dict[str, Tensor]) -> Calibration:
        """From the tensors of a file; earlier versions had one band for every length and position, and measured no rate."""
        for name, n in (("band", len(LENGTHS)), ("token_band", len(POSITION_EDGES))):
            rate = name.replace("band", "rate") if "token" in name else "band_rate"
            if parts[name].ndim == 1:
                parts = parts | {name: parts[name].repeat(n, 1)}
            parts = {rate: torch.full_like(parts[name], torch.nan)} | parts
        return Calibration(**parts)


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
        names = ", ".join(self.emotions[:4]) + (f", ... ({len(self.emotions)})" if len(self.emotions) > 4 else "")
        layers = (
            f"layers {min(self.layers)}..{max(self.layers)}" if len(self.layers) > 1 else f"layer {min(self.layers)}"
        )
        return f"EmotionDirections({names}; {self.hook_point}, {layers}, d_model {self.vectors.shape[-1]}; {self.info['method']})"

    def __getitem__(self, key: str | Iterable[str] | tuple[str, SupportsIndex]) -> EmotionDirections:
        if isinstance(key, tuple) and len(key) == 2 and not isinstance(key[1], str):
            return self[key[0]].at(key[1])
        names = [key] if isinstance(key, str) else list(key)
        index = [self.index(str(name)) for name in names]
        return replace(
            self,
            emotions=tuple(self.emotions[i] for i in index),
            vectors=self.vectors[index],
            reliability=self.reliability[index],
            calibration=self.calibration and self.calibration.select(index, range(len(self.layers))),
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
            raise KeyError(f"no emotion {emotion!r} here{hint} There are: {', '.join(self.emotions)}")
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
            raise ValueError(f"{self.emotions[int((norm == 0).flatten().nonzero()[0])]!r} is zero and has no direction")
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
        if not (self.calibration.token_band if per == "token" else self.calibration.band).isfinite().any():
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

        Raises:
            ValueError: if there is more than one direction here.
        """
        if len(self.emotions) != 1:
            raise ValueError(
                f"nearest() is of one direction, here are {len(self.emotions)}; take one, as in v['{self.emotions[0]}']"
            )
        whole = self.among or self
        cosine = einsum(self.unit(layer), whole.unit(layer), "one d_model, emotion d_model -> emotion")
        ranked = sorted(zip(whole.emotions, cosine.tolist(), strict=True), key=lambda pair: -pair[1])
        return [pair for pair in ranked if pair[0] not in self.operands][:k]

    def __add__(self, other: EmotionDirections) -> EmotionDirections:
        return self._combine(other, 1.0, "+")

    def __sub__(self, other: EmotionDirections) -> EmotionDirections:
        return self._combine(other, -1.0, "-")

    def __neg__(self) -> EmotionDirections:
        return self * -1.0

    def __mul__(self, factor: float | int) -> EmotionDirections:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not np.isfinite(factor):
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
            raise TypeError(f"only directions can be added to directions, not {type(other).__name__}")
        for what, a, b in (
            ("hook point", self.hook_point, other.hook_point),
            ("layers", self.layers, other.layers),
            ("width", self.vectors.shape[-1], other.vectors.shape[-1]),
        ):
            if a != b:
                raise ValueError(f"these directions differ in their {what} ({a} and {b}) and cannot be combined")
        mine, theirs = self.info["model"], other.info["model"]
        if not same_weights(mine, theirs):
            names = f"{mine.get('name')} and {theirs.get('name')}"
            raise ValueError(f"these directions differ in their model ({names}) and cannot be combined")
        if len(self.emotions) != len(other.emotions):
            raise ValueError(f"{len(self.emotions)} and {len(other.emotions)} emotions cannot be combined one by one")
        return replace(
            self,
            emotions=tuple(f"{a} {symbol} {b}" for a, b in zip(self.emotions, other.emotions, strict=True)),
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
            for k in ("vectors", "reference", "neutral_mean", "norm_median", "norm_mean", "reliability")
        }
        if self.calibration is not None:
            for k in Calibration.__dataclass_fields__:
                tensors[f"calibration.{k}"] = getattr(self.calibration, k).contiguous()
        header = {k: getattr(self, k) for k in ("emotions", "hook_point", "layers", "layer", "info", "operands")}
        write_safetensors(path, tensors, {"format": "emolens.directions.1", "emolens": json.dumps(header)})

    def _other(self, file: Path) -> str | None:
        """What a file holds, in words; None if it is these directions."""
        try:
            found = load_directions(file)
        except ValueError:
            return "something that is no directions of emolens"
        same = _identity(found) == _identity(self) and same_weights(found.info["model"], self.info["model"])
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
        raise ValueError(f"{path}: {missing[0]} is missing; the file was not written whole, or by another version")
    parts = {k.removeprefix("calibration."): t for k, t in tensors.items() if k.startswith("calibration.")}
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
            norm_mean=tensors.get("norm_mean", torch.full_like(median, torch.nan)),  # 0.1.0 had none
            reliability=tensors["reliability"],
        )
        texts = (*loaded.emotions, *loaded.operands, loaded.hook_point)
        layers = (*loaded.layers, loaded.layer)
        if not all(isinstance(t, str) for t in texts) or not all(type(k) is int for k in layers):
            raise TypeError("names must be words, layers must be numbers")
        if loaded.layer not in loaded.layers or not isinstance(loaded.info, dict):
            raise ValueError("the default layer is not among the layers, or info is not a mapping")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is not that of directions ({str(error)[:200]})") from error
    e, k = len(loaded.emotions), len(loaded.layers)
    d = loaded.vectors.shape[-1] if loaded.vectors.ndim else 0
    for name, shape in (
        ("vectors", (e, k, d)), ("reference", (k, d)), ("neutral_mean", (k, d)), ("norm_median", (k,)),
        ("norm_mean", (k,)), ("reliability", (e, k)),
    ):  # fmt: skip
        if tuple(getattr(loaded, name).shape) != shape:
            found = list(getattr(loaded, name).shape)
            raise ValueError(f"{path}: {name} has shape {found}; {e} emotions and {k} layers need {list(shape)}")
    return loaded


def random_directions(
    v: EmotionDirections, n: int = 8, *, seed: int = 0, like: Activations | None = None
) -> EmotionDirections:
    """Directions that point anywhere, as long as those of `v` are on average: the control of every steering experiment.

    Args:
        like: Draw them from the covariance of these rows instead of a sphere: directions in which text does vary.

    Returns:
        `n` directions named "random 0", "random 1", ... without calibration. A dose looks only at where they point.

    Raises:
        ValueError: fewer than one; rows that span no more than the directions do, so that a draw would lie among them.
    """
    if n < 1:
        raise ValueError(f"n={n}; at least one")
    if like is not None and len(like.rows) <= len(v.vectors) + 1:
        raise ValueError(
            f"like= has {len(like.rows)} rows, which span no more than {len(v.vectors)} directions do: the draws would not differ "
            "from what they control; give more rows, or like=None"
        )
    generator = torch.Generator().manual_seed(seed)
    if like is None:
        draws = torch.randn((n, *v.vectors.shape[1:]), generator=generator)
    else:
        rows = like.at(list(v.layers)).rows
        weights = torch.randn((n, len(rows)), generator=generator)
        draws = einsum(weights, rows - rows.mean(0), "row text, text layer d_model -> row layer d_model")
    size = torch.linalg.vector_norm(v.vectors, dim=-1).mean(0)
    draws = draws / torch.linalg.vector_norm(draws, dim=-1, keepdim=True) * size[:, None]
    names = tuple(f"random {i}" for i in range(n))
    return replace(
        v,
        emotions=names,
        vectors=draws,
        reliability=torch.full(draws.shape[:2], torch.nan),
        calibration=None,
        among=None,
        operands=(),
    )


def shuffled_directions(acts: Activations, v: EmotionDirections, *, seed: int = 0) -> EmotionDirections:
    """Mean differences of the same texts with the emotion labels shuffled within each topic: what the texts give whatever they mean.

    Texts without a topic are shuffled among themselves. Neutral components are removed as for `v`. Named after the emotions whose label
    they got, without calibration. No emotion of `v` keeps its texts together, under whatever name: that would be the effect itself
    (of two emotions, the same axis turned round).

    Raises:
        ValueError: every topic has one emotion only, or the texts are so few that an emotion's stay together however they are shuffled.
    """
    main = acts.select(is_main)
    names = acts.moments().emotions
    labels = np.array([names.index(t.emotion or "") for t in main.texts])
    topics, rng = [t.topic or "" for t in main.texts], np.random.default_rng(seed)
    kept = [names.index(e) for e in v.emotions]
    together: list[int] = []
    for _ in range(SHUFFLES):  # of few texts a draw can be the truth itself, or the truth under other names
        shuffled = stats.shuffle_within(labels, topics, rng)
        together = [k for k in kept if _stays(labels == k, shuffled)]
        if not together:
            break
    else:
        raise ValueError(
            f"the {int((labels == together[0]).sum())} texts of {names[together[0]]!r} stay together in {SHUFFLES} shuffles within topics, which "
            "is no control: more texts of several emotions in each topic are needed (or give no topics, to shuffle over all texts)"
        )
    means = class_means(main.rows, torch.from_numpy(shuffled))
    vectors = means - means.mean(0)
    share = v.info["remove_neutral"]
    if share:
        assert acts.neutral_tokens is not None  # v was made from these activations
        vectors = remove_components(vectors, neutral_components(acts.neutral_tokens.rows, share))
    k = [acts.layers.index(layer) for layer in v.layers]
    return replace(
        v,
        vectors=vectors[kept][:, k],
        reliability=torch.full_like(v.reliability, torch.nan),
        calibration=None,
        among=None,
    )


def _stays(own: NDArray[np.bool_], shuffled: NDArray[np.integer]) -> bool:
    """Whether the texts of one emotion have one label, and no other text has it."""
    return len(np.unique(shuffled[own])) == 1 and bool(((shuffled == shuffled[own][0]) == own).all())


# --- the estimators ---------------------------------------------------------------------------------------------------

Fit = Callable[
    [Float[Tensor, "text layer d_model"], Int[Tensor, " text"], list[str]], Float[Tensor, "emotion layer d_model"]
]


def mean_difference(acts: Activations | Collection, *, remove_neutral: float | int | None = 0.5) -> EmotionDirections:
    """Directions as differences of means, without what neutral text varies in.

    v_e = (I - P)(m_e - mu);  P projects on the first k principal components of ordinary tokens of neutral texts, k the least number
    that explains `remove_neutral` of their variance (recorded as `info["neutral_k"]`).

    Args:
        acts: Collected from an emotion set, or from texts with `emotions=` (and `topics=`, which makes the calibration honest); in
            memory, or a `Collection`, whose shards are then read one after the other.
        remove_neutral: Share of neutral variance to remove, 0 to 1; None or 0 removes nothing.

    Returns:
        Directions `[emotion layer d_model]`, calibrated, with split-half reliability over topics.

    Raises:
        ValueError: fewer than two emotions; neutral removal asked for without neutral texts.

    Reference:
        Anthropic 2026, *Emotion Concepts*, "Extracting emotion vectors"; difference of means as in arXiv 2312.06681.
    """

    return from_means(acts, lambda means: means - means.mean(0), "mean_difference", remove_neutral)


def antonym_contrast(
    acts: Activations | Collection,
    *,
    antonyms: EmotionSet | Mapping[str, str] | None = None,
    remove_neutral: float | int | None = 0.5,
) -> EmotionDirections:
    """Each emotion against its antonym:  v_e = (I - P)(m_e - m_antonym(e)).

    Args:
        antonyms: A set or a mapping; None takes the antonyms of the set that was collected. Emotions without one are left out.

    Raises:
        ValueError: an antonym that is not among the collected emotions, or no antonyms at all.
    """
    if isinstance(antonyms, EmotionSet):
        antonyms = {e.name: e.antonym for e in antonyms.emotions if e.antonym}
    pairs = dict(antonyms or acts.info.get("antonyms") or {})
    names = acts.moments().emotions
    if not pairs:
        raise ValueError("no antonyms known: give antonyms={'joy': 'sadness', ...}")
    for a, b in pairs.items():
        if a not in names or b not in names:
            raise ValueError(
                f"antonym pair {a!r}, {b!r}: both must be among the collected emotions: {', '.join(names)}"
            )
    chosen = [n for n in names if n in pairs]

    def contrast(means: Tensor) -> Tensor:
        return means[[names.index(n) for n in chosen]] - means[[names.index(pairs[n]) for n in chosen]]

    return from_means(acts, contrast, "antonym_contrast", remove_neutral, emotions=chosen)


def pca(acts: Activations, *, remove_neutral: float | int | None = 0.5) -> EmotionDirections:
    """First singular direction of same-topic differences (linear artificial tomography), with the sign of the mean difference.

    For emotion e and topic t, d_t = x[e, t] - mean over other emotions of x[., t]; v_e is the first right singular vector of the d_t,
    scaled to the norm of their mean.

    Reference:
        Zou et al. 2023, *Representation Engineering*, arXiv 2310.01405, section 3.1.
    """

    def fit(rows: Tensor, labels: Tensor, topics: list[str]) -> Tensor:
        topic = torch.tensor(np.unique(topics, return_inverse=True)[1])
        n = int(labels.max()) + 1
        out = []
        for e in range(n):
            differences = []
            for t in topic.unique():
                here, own = topic == t, labels == e
                if (here & own).any() and (here & ~own).any():
                    differences.append(rows[here & own].mean(0) - rows[here & ~own].mean(0))
            stack = rearrange(torch.stack(differences), "topic layer d_model -> layer topic d_model")
            mean = stack.mean(1)
            first = torch.linalg.svd(stack, full_matrices=False).Vh[:, 0]
            along = einsum(first, mean, "layer d_model, layer d_model -> layer")
            out.append(
                first * torch.where(along < 0, -1.0, 1.0)[:, None] * torch.linalg.vector_norm(mean, dim=-1)[:, None]
            )
        return torch.stack(out)

    return from_rows(acts, fit, "pca", remove_neutral)


def lda(acts: Activations) -> EmotionDirections:
    """Shrinkage discriminant:  v_e = S^-1 (m_e - mu), S the Ledoit-Wolf estimate of the covariance within emotions.

    Reference:
        Ledoit & Wolf 2004, *A well-conditioned estimator for large-dimensional covariance matrices*.
    """
    from sklearn.covariance import ledoit_wolf

    def fit(rows: Tensor, labels: Tensor, topics: list[str]) -> Tensor:
        means = class_means(rows, labels)
        out = []
        for k in range(rows.shape[1]):
            within = (rows[:, k] - means[labels, k]).double().numpy()
            covariance = torch.from_numpy(ledoit_wolf(within, assume_centered=True)[0])
            out.append(torch.linalg.solve(covariance, (means[:, k] - means[:, k].mean(0)).double().T).T.float())
        return torch.stack(out, 1)

    return from_rows(acts, fit, "lda", None)


def logistic(acts: Activations, *, c: float | int = 1.0) -> EmotionDirections:
    """Weights of a multinomial logistic regression on standardised rows, in the residual stream's own units, centred over emotions.

    Args:
        c: Inverse regularisation, as in `stats.logistic_scores`. One regression is fitted for each layer: pass `acts.at([20])` to be quick.
    """
    from sklearn.linear_model import LogisticRegression

    def fit(rows: Tensor, labels: Tensor, topics: list[str]) -> Tensor:
        out = []
        for k in range(rows.shape[1]):
            x = rows[:, k].double().numpy()
            scale = np.where(x.std(0) > 1e-12, x.std(0), 1.0) * np.sqrt(x.shape[1])
            tol = stats.logistic_tolerance(len(labels.unique()))
            model = LogisticRegression(C=float(c) * 100, max_iter=300, tol=tol).fit(
                (x - x.mean(0)) / scale, labels.numpy()
            )
            weights = model.coef_ if len(model.coef_) > 1 else np.vstack([-model.coef_, model.coef_])
            out.append(torch.from_numpy((weights - weights.mean(0)) / scale).float())
        return torch.stack(out, 1)

    return from_rows(acts, fit, "logistic", None)


@typed
def class_means(
    rows: Float[Tensor, "text layer d_model"], labels: Int[Tensor, " text"]
) -> Float[Tensor, "emotion layer d_model"]:
    """Mean row of each label 0 .. max.

    >>> class_means(torch.tensor([[[1.0]], [[3.0]], [[5.0]]]), torch.tensor([0, 0, 1])).flatten().tolist()
    [2.0, 5.0]

    Raises:
        ValueError: no texts, or a label below the highest that no text has.
    """
    n = torch.bincount(labels)
    if not len(n) or (n == 0).any():
        empty = int((n == 0).nonzero()[0]) if len(n) else 0
        raise ValueError(f"emotion number {empty} has no text among the {len(rows)} given: there is no mean of nothing")
    total = rows.new_zeros((len(n), *rows.shape[1:])).index_add_(0, labels, rows)
    return total / n[:, None, None]


@typed
def neutral_components(
    tokens: Float[Tensor, "token layer d_model"], share: float | int
) -> list[Float[Tensor, "d_model component"]]:
    """For each layer the orthonormal principal components of the tokens that together explain `share` of their variance.

    >>> tokens = torch.tensor([[[3.0, 0.0]], [[-3.0, 0.0]], [[0.0, 1.0]], [[0.0, -1.0]]])
    >>> neutral_components(tokens, 0.5)[0].abs().tolist()
    [[1.0], [0.0]]

    Raises:
        ValueError: fewer than two tokens, or tokens that are all the same: an arbitrary direction would come out.
    """
    if not 0 < share < 1:
        raise ValueError(f"remove_neutral={share}; between 0 and 1, or None")
    if len(tokens) < 2:
        raise ValueError(
            f"neutral components need tokens of neutral texts, there are {len(tokens)}: give neutral texts on more topics "
            "(all of them may be of the topics that are held out), or remove nothing"
        )
    out = []
    for k in range(tokens.shape[1]):
        x = (tokens[:, k] - tokens[:, k].mean(0)).double()
        wide = len(x) < x.shape[1]  # fewer tokens than dimensions: X X^T has the same eigenvalues and is smaller
        values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)  # ascending
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        if values[0] == 0:
            raise ValueError(
                f"the {len(tokens)} neutral tokens are all the same: they vary in nothing that could be removed"
            )
        n = int((values.cumsum(0) < share * values.sum()).sum()) + 1
        first = torch.nn.functional.normalize(x.T @ vectors[:, :n], dim=0) if wide else vectors[:, :n]
        out.append(first.float())
    return out


@typed
def remove_components(
    vectors: Float[Tensor, "emotion layer d_model"], components: list[Float[Tensor, "d_model _"]]
) -> Float[Tensor, "emotion layer d_model"]:
    """(I - P) v, layer by layer."""
    return torch.stack([vectors[:, k] - (vectors[:, k] @ p) @ p.T for k, p in enumerate(components)], 1)


@typed
def project(
    rows: Float[Tensor, "text layer d_model"],
    vectors: Float[Tensor, "emotion layer d_model"],
    reference: Float[Tensor, "layer d_model"],
) -> Float[Tensor, "text emotion layer"]:
    """s = (x - mu) . v / |v|, in the residual stream's own units."""
    unit = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)
    return einsum(rows - reference, unit, "text layer d_model, emotion layer d_model -> text emotion layer")


def position_bin(position: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """Which calibration a token at a position belongs to."""
    edges = torch.tensor(POSITION_EDGES[1:])
    return torch.bucketize(position, edges, right=True)


def default_layer(layers: Sequence[int], n_layers: int) -> int:
    """The collected layer nearest to two thirds of the depth, where the paper reads."""
    return min(layers, key=lambda layer: (abs(layer - 2 * n_layers // 3), layer))


# --- shared by all estimators -----------------------------------------------------------------------------------------


def from_means(
    acts: Activations | Collection,
    contrast: Callable[[Float64[Tensor, "emotion layer d_model"]], Float64[Tensor, "emotion layer d_model"]],
    method: str,
    remove_neutral: float | int | None,
    *,
    emotions: list[str] | None = None,
) -> EmotionDirections:
    """Directions that are a contrast of the emotion means: from sums by emotion and topic, with one pass over the rows to calibrate."""
    moments, neutral = _moments(acts), _Neutral.of(acts)
    components = neutral.components(remove_neutral)

    def fit(means: Tensor) -> Tensor:
        vectors = contrast(means).float()
        return vectors if components is None else remove_components(vectors, components)

    means = moments.means()
    vectors, reference = fit(means), means.mean(0).float()
    held_out = _held_out_by_sums(acts, moments, fit)
    outside: Outside = []
    for fold in _groups(moments):
        rest = moments.means(without=fold)
        outside.append((fold, contrast(rest).float(), rest.mean(0).float()))
    return EmotionDirections(
        emotions=tuple(emotions or moments.emotions),
        vectors=vectors,
        reference=reference,
        reliability=_reliability(moments, fit, vectors),
        calibration=held_out and _calibrate(*held_out, outside, neutral, remove_neutral),
        **_common(acts, moments, neutral, method, remove_neutral, components),
    )


def from_rows(acts: Activations, fit: Fit, method: str, remove_neutral: float | int | None) -> EmotionDirections:
    """Directions that need every row; calibrated by fitting again without each of four groups of topics."""
    if not isinstance(acts, Activations):
        raise TypeError(f"{method} needs the rows of every text in memory: give it {method}(collection.load())")
    moments, neutral = _moments(acts), _Neutral.of(acts)
    components = neutral.components(remove_neutral)
    ((_, of_all),) = with_topics([acts])
    main, topics = _pooled(acts, is_main), [t for t, text in zip(of_all, acts.texts, strict=True) if is_main(text)]
    labels = torch.tensor([moments.emotions.index(t.emotion or "") for t in main.texts])

    def clean(vectors: Tensor) -> Tensor:
        return vectors if components is None else remove_components(vectors, components)

    vectors = clean(fit(main.rows, labels, topics))
    reference = class_means(main.rows, labels).mean(0)
    outside = _outside_by_rows(main, labels, topics, moments, fit)
    held_out = _held_out_by_rows(main, topics, outside, clean) if outside else None
    return EmotionDirections(
        emotions=tuple(moments.emotions),
        vectors=vectors,
        reference=reference,
        reliability=torch.full(vectors.shape[:2], torch.nan),  # slow to fit twenty times
        calibration=held_out and _calibrate(*held_out, outside, neutral, remove_neutral),
        **_common(acts, moments, neutral, method, remove_neutral, components),
    )


def _pooled(acts: Activations, keep: Callable[[TextInfo], bool]) -> Activations:
    """Some of the texts, without the single tokens that nobody here asks for: they are the larger part to copy."""
    return replace(acts, neutral_tokens=None).select(keep)


def _moments(acts: Activations | Collection) -> Moments:
    if isinstance(acts, Activations) and acts.row_position.numel() and int(acts.row_position.max()) >= 0:
        raise ValueError(
            "these activations are single tokens; collect with mean_over_tokens(), last_token() or char_span()"
        )
    if not isinstance(acts, Activations | Collection):
        raise TypeError(
            f"directions are made from what was collected, em.collect_resid_post(model, texts), not from a {type(acts).__name__}"
        )
    moments = acts.moments()
    if len(moments.emotions) < 2:
        others = Counter(
            t.split for chunk in acts.chunks() for t in chunk.texts if t.emotion is not None and not is_main(t)
        )
        apart = " and ".join(f"{n} texts with an emotion are of the split {split}" for split, n in others.items())
        raise ValueError(
            f"directions need at least two emotions, found {len(moments.emotions)}: collect an emotion set, or give emotions="
            + (f" ({apart}: directions are made from main)" if apart else "")
        )
    return moments


@dataclass(frozen=True, eq=False)
class _Neutral:
    """What is known of the neutral texts (None where it was not collected): pooled whole, single tokens of theirs, pooled beginnings.

    `topic` and `text` have the topic and the text's sha256 of each row of each part; a text without a topic is a topic of its own.
    """

    rows: Tensor
    tokens: Tensor | None
    position: Tensor | None
    prefixes: Tensor | None
    length: Tensor | None
    topic: dict[str, NDArray[np.str_]]
    text: dict[str, NDArray[np.str_]]

    @staticmethod
    def of(acts: Activations | Collection) -> _Neutral:
        parts: dict[str, list[Activations]] = {"rows": [], "tokens": [], "prefixes": []}
        for chunk in acts.chunks():
            parts["rows"].append(_pooled(chunk, lambda t: t.split == "neutral"))
            for name in ("tokens", "prefixes"):
                if (part := getattr(chunk, f"neutral_{name}")) is not None:
                    parts[name].append(part)
        rows = {k: torch.cat([p.rows for p in found]) if found else None for k, found in parts.items()}
        at = {k: torch.cat([p.row_position for p in found]) if found else None for k, found in parts.items()}
        texts = {k: [p.texts[i] for p in found for i in p.row_text.tolist()] for k, found in parts.items()}
        topic = {
            k: np.array([t.topic if t.topic is not None else f"#{t.sha256}" for t in of]) for k, of in texts.items()
        }
        text = {k: np.array([t.sha256 for t in of]) for k, of in texts.items()}
        assert rows["rows"] is not None  # there is at least one chunk
        return _Neutral(rows["rows"], rows["tokens"], at["tokens"], rows["prefixes"], at["prefixes"], topic, text)

    def components(self, share: float | int | None, keep: NDArray[np.bool_] | None = None) -> list[Tensor] | None:
        """The neutral components, of all tokens or of some."""
        if not share:
            return None
        if self.tokens is None:
            raise ValueError(
                "remove_neutral needs neutral texts: collect an emotion set that has them, or pass remove_neutral=None"
            )
        return neutral_components(self.tokens if keep is None else self.tokens[torch.from_numpy(keep)], share)


def _common(
    acts: Activations | Collection,
    moments: Moments,
    neutral: _Neutral,
    method: str,
    remove_neutral: float | int | None,
    components: list[Tensor] | None,
) -> dict[str, Any]:
    """The fields that do not depend on how a method fits."""
    counts = moments.counts().tolist()
    nowhere = torch.full(moments.total.shape[1:], torch.nan)
    return {
        "hook_point": acts.hook_point,
        "layers": acts.layers,
        "neutral_mean": neutral.rows.mean(0) if len(neutral.rows) else nowhere,
        "norm_median": acts.norm_median,
        "norm_mean": acts.norm_mean,
        "layer": default_layer(acts.layers, acts.info["model"]["n_layers"]),
        "info": acts.info
        | {
            "emolens": __version__,
            "method": method,
            "remove_neutral": remove_neutral or None,
            "neutral_k": [p.shape[1] for p in components] if components else None,
            "n_per_emotion": dict(zip(moments.emotions, counts, strict=True)),
            "n_topics": len(moments.person),
            "training_texts": sorted({t.sha256 for chunk in acts.chunks() for t in chunk.texts}),
        },
    }


def _held_out_by_sums(
    acts: Activations | Collection, moments: Moments, fit: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Mean and spread `[emotion layer]` of the scores of the main texts, each by directions without its topic.

    None where there are too few topics to leave one out.
    """
    names = sorted(moments.person)
    if len(names) < 2:
        return None
    folds = [(t,) for t in names] if len(names) <= 64 else stats.topic_folds(moments.person, n_folds=16)
    fitted = {}
    for fold in folds:
        means = moments.means(without=fold)
        if means.isnan().any():
            return None
        fitted |= dict.fromkeys(fold, (fit(means), means.mean(0).float()))
    n, total, squares = 0, 0.0, 0.0
    for chunk, topics in with_topics(acts.chunks()):
        mine = [is_main(t) for t in chunk.texts]
        main, topics = _pooled(chunk, is_main), [t for t, m in zip(topics, mine, strict=True) if m]
        for fold in folds:
            inside = torch.tensor([t in fold for t in topics], dtype=torch.bool)
            if inside.any():
                scores = project(main.rows[inside], *fitted[fold[0]]).double()
                n, total, squares = n + len(scores), total + scores.sum(0), squares + scores.square().sum(0)
    mean = torch.as_tensor(total / n)
    spread = ((torch.as_tensor(squares) - n * mean.square()).clamp_min(0) / (n - 1)).sqrt()
    return mean.float(), spread.float().clamp_min(1e-12)


Outside = list[
    tuple[tuple[str, ...], Tensor, Tensor]
]  # topics, and vectors (neutral components still in) and reference without them


def _groups(moments: Moments) -> list[tuple[str, ...]]:
    """Up to four groups of topics such that every emotion is told outside each; none where that cannot be."""
    if len(moments.person) < 2:
        return []
    folds = stats.topic_folds(moments.person, n_folds=min(FOLDS, len(moments.person)))
    return folds if all((moments.counts(without=fold) > 0).all() for fold in folds) else []


def _outside_by_rows(
    main: Activations, labels: Tensor, topics: list[str], moments: Moments, fit: Fit
) -> Outside | None:
    """Each group of topics with what was fitted without it; None where that cannot be."""
    out = []
    for fold in _groups(moments):
        rest = torch.from_numpy(~np.isin(np.asarray(topics), fold))
        kept = [t for t, inside in zip(topics, rest.tolist(), strict=True) if inside]
        vectors = fit(main.rows[rest], labels[rest], kept)
        out.append((fold, vectors, class_means(main.rows[rest], labels[rest]).mean(0)))
    return out or None


def _held_out_by_rows(
    main: Activations, topics: list[str], outside: Outside, clean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """As `_held_out_by_sums`, with groups of topics."""
    held_out = torch.zeros(len(topics), len(outside[0][1]), len(main.layers))
    for fold, vectors, reference in outside:
        inside = torch.from_numpy(np.isin(np.asarray(topics), fold))
        held_out[inside] = project(main.rows[inside], clean(vectors), reference)
    return held_out.mean(0), held_out.std(0).clamp_min(1e-12)


def _calibrate(
    mean: Tensor, std: Tensor, outside: Outside | None, neutral: _Neutral, share: float | int | None
) -> Calibration:
    """Held-out scores of the stories gave mean and spread; neutral texts and tokens of held-out topics give the band of "none"."""
    outside, (k, n), bins = outside or [], mean.shape, len(POSITION_EDGES)
    names = [name for name, rows in vars(neutral).items() if name in neutral.topic and rows is not None and outside]
    fold = _folds_of(neutral, names, [topics for topics, _, _ in outside])
    scores = {name: torch.zeros(len(fold[name]), k, n) for name in names}
    for f, (_, vectors, reference) in enumerate(outside):
        if share and not (fold["tokens"] != f).any():
            return _unknown(mean, std)
        components = neutral.components(share, fold["tokens"] != f) if share else None
        clean = vectors if components is None else remove_components(vectors, components)
        for name in names:
            inside = torch.from_numpy(fold[name] == f)
            scores[name][inside] = project(getattr(neutral, name)[inside], clean, reference)
    out = _unknown(mean, std)
    if "rows" in names:  # what is known of long texts stands for every length, until shorter ones are known
        band, rate = _band(scores["rows"], fold["rows"], (mean, std))
        out.band[:], out.band_rate[-1] = band, rate
    if neutral.length is not None and "prefixes" in names:
        known = []
        for j, length in enumerate(LENGTHS):
            here = neutral.length == length
            if here.sum() >= ENOUGH:
                known.append(j)
                out.band[j], out.band_rate[j] = _band(
                    scores["prefixes"][here], fold["prefixes"][here.numpy()], (mean, std)
                )
        for j in (
            set(range(len(LENGTHS))) - set(known) if known else ()
        ):  # a length that few reach takes its neighbour's band
            near = min(known, key=lambda c, j=j: abs(c - j))
            out.band[j], out.band_rate[j] = out.band[near], torch.nan
    if neutral.position is not None and "tokens" in names:
        s, at, known = scores["tokens"], position_bin(neutral.position), []
        for b in range(bins):
            if (at == b).sum() >= ENOUGH:
                known.append(b)
                out.token_mean[b], out.token_std[b] = _spread(s[at == b])
                out.token_band[b], out.token_rate[b] = _band(s[at == b], fold["tokens"][(at == b).numpy()])
        for b in set(range(bins)) - set(known) if known else ():  # as above
            near = min(known, key=lambda c, b=b: abs(c - b))
            out.token_mean[b], out.token_std[b] = out.token_mean[near], out.token_std[near]
            out.token_band[b], out.token_rate[b] = out.token_band[near], torch.nan
    return out


def _unknown(mean: Tensor, std: Tensor) -> Calibration:
    """Mean and spread of the stories, and nothing known of neutral text."""
    (k, n), bins, lengths = mean.shape, len(POSITION_EDGES), len(LENGTHS)
    band, rate = torch.full((2, lengths, n), torch.nan)
    token_mean, token_std = torch.full((2, bins, k, n), torch.nan)
    token_band, token_rate = torch.full((2, bins, n), torch.nan)
    return Calibration(mean, std, band, rate, token_mean, token_std, token_band, token_rate)


def _folds_of(neutral: _Neutral, names: list[str], folds: list[tuple[str, ...]]) -> dict[str, NDArray[np.intp]]:
    """The fold of each neutral row of each part: that of its topic; topics that no story has are dealt out.

    Where all neutral texts are of one such topic, its texts are dealt out instead, each with all its rows.
    """
    of = {t: f for f, fold in enumerate(folds) for t in fold}
    unit, others = neutral.topic, {t for name in names for t in neutral.topic[name].tolist()}
    if len(others) == 1 and not others & set(of):
        unit, others = neutral.text, {t for name in names for t in neutral.text[name].tolist()}
    of |= {t: i % len(folds) for i, t in enumerate(sorted(others - set(of)))}
    return {name: np.array([of[t] for t in unit[name].tolist()], dtype=int) for name in names}


def _band(
    scores: Float[Tensor, "row emotion layer"], fold: NDArray[np.intp], scale: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The band of neutral rows and the share that lies above the band of the *other* folds; NaN with too few.

    The ceil(.95 (n + 1))-th smallest of n: one more text like these exceeds it with a probability of at most 5 %.

    Args:
        scale: Mean and spread to count in; None is that of the rows themselves, for the share that of the other folds.
    """

    def highest(rows: Tensor, others: Tensor) -> Tensor:
        mean, std = scale or _spread(others)
        return ((rows - mean) / std).amax(1)

    def point(rows: Tensor) -> Tensor:
        rank = min(int(np.ceil(BAND * (len(rows) + 1))), len(rows))
        return highest(rows, rows).kthvalue(rank, dim=0).values

    unknown = scores.new_full((scores.shape[2],), torch.nan)
    if len(scores) < ENOUGH or len(np.unique(fold)) < 2:
        return unknown, unknown
    above = torch.zeros_like(unknown)
    for f in np.unique(fold):
        inside = torch.from_numpy(fold == f)
        mine, others = scores[inside], scores[~inside]
        above += (
            (highest(mine, others) > point(others)).float().sum(0) if len(others) > 1 else torch.nan
        )  # one has no spread
    return point(scores), above / len(scores)


def _spread(scores: Float[Tensor, "row emotion layer"]) -> tuple[Tensor, Tensor]:
    return scores.mean(0), scores.std(0).clamp_min(1e-12)


def _reliability(moments: Moments, fit: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Cosine of the vectors of two halves of the topics, mean of ten splits, stepped up to full length: 2c / (1 + c).

    NaN with fewer than four topics.
    """
    names = sorted(moments.person)
    out = torch.full(vectors.shape[:2], torch.nan)
    if len(names) < 4:
        return out
    rng = np.random.default_rng(0)
    total, n_splits = torch.zeros(vectors.shape[:2]), 10
    for _ in range(n_splits):
        half = set(rng.permutation(names)[: len(names) // 2].tolist())
        halves = [moments.means(without=half), moments.means(without=set(names) - half)]
        if any(m.isnan().any() for m in halves):
            return out
        total += torch.nn.functional.cosine_similarity(*(fit(m) for m in halves), dim=-1)
    c = total / n_splits
    return 2 * c / (1 + c).clamp_min(1e-6)

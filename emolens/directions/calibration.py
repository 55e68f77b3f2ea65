"""What turns a projection into a score: mean and spread held out, and the band of neutral text, by length and by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emolens._typing import typed
from emolens.collect.pooling import LENGTHS

POSITION_EDGES = (1, 4, 16, 64)  # token calibration by position: 1-3, 4-15, 16-63, 64 and later
UNCALIBRATED = (
    "these directions have no calibration (made by arithmetic, from tensors, or from fewer than two topics): "
    "score with the ones they were made from, or use directions.project for raw projections"
)
NO_NEUTRAL = (
    "these directions know too little neutral text to score single tokens (20 neutral texts of two topics or more, and 20 tokens of them, are needed): make "
    "them from an emotion set that has more, score whole texts, or use directions.project for raw projections"
)


@typed
@dataclass(frozen=True, eq=False)
class Calibration:
    """What turns a projection s_e(x) = (x - mu) . v_e/|v_e| into a score. See `readout.score`.

    The band is of the highest z of *all* emotions, and of texts that had no part in what reads them: directions, neutral components and
    reference of each were fitted without its topic. Short texts scatter more, so there is one for each length.

    >>> directions.calibration.mean.shape == directions.vectors.shape[:2]
    True

    Attributes:
        mean, std: `[emotion layer]` of held-out scores over all stories (each scored by directions without its topic), in the residual
            stream's own units.
        band: `[length layer]` a text of so many tokens (`LENGTHS`) whose highest z is below this is "none": it exceeds that of 95 % of
            neutral texts. NaN where too few were collected.
        band_rate: `[length layer]` share of neutral texts that lie above it where neither directions nor band knew their topic (`mean`
            and `std`, of stories of all topics, did); NaN where not measured.
        token_mean, token_std: `[position emotion layer]` of single tokens of neutral texts, by position (`POSITION_EDGES`).
        token_band, token_rate: `[position layer]` as `band` and `band_rate`, of neutral tokens; for the rate their mean and spread are
            those of other topics as well.

    Raises:
        jaxtyping.TypeCheckError: shapes that do not fit each other.
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
        """Take the part of some emotions and layers.

        The bands stay those of all emotions: for fewer they are wider than need be.

        >>> directions.calibration.select([0], [1]).mean.shape
        torch.Size([1, 1])

        Args:
            emotions: Their places on the emotion axis.
            layers: Their places on the layer axis (not block numbers).

        Returns:
            A copy.
        """
        e, k = list(emotions), list(layers)
        return Calibration(
            mean=self.mean[e][:, k],
            std=self.std[e][:, k],
            band=self.band[:, k],
            band_rate=self.band_rate[:, k],
            token_mean=self.token_mean[:, e][:, :, k],
            token_std=self.token_std[:, e][:, :, k],
            token_band=self.token_band[:, k],
            token_rate=self.token_rate[:, k],
        )

    def of_length(
        self, n_tokens: Int[Tensor, " text"]
    ) -> tuple[Float[Tensor, "text layer"], Float[Tensor, "text layer"]]:
        """Look up band and measured rate of texts, between the `LENGTHS` by the logarithm of theirs.

        >>> band, rate = directions.calibration.of_length(torch.tensor([12, 40]))
        >>> band.shape == rate.shape == (2, len(directions.layers))
        True

        Args:
            n_tokens: Pooled tokens of each text.

        Returns:
            The band in standard deviations (z), and the share of neutral texts above it, 0 to 1.
        """
        nodes = torch.tensor(LENGTHS).double().log2()
        at = n_tokens.clamp(LENGTHS[0], LENGTHS[-1]).double().log2()
        right = torch.bucketize(at, nodes).clamp(1, len(nodes) - 1)
        share = ((at - nodes[right - 1]) / (nodes[right] - nodes[right - 1])).float()[:, None]
        band, rate = (
            x[right - 1] + share * (x[right] - x[right - 1]) for x in (self.band, self.band_rate)
        )
        # beside a length where it was not measured, that of the other
        for side in (right, right - 1):
            rate = torch.where(rate.isnan(), self.band_rate[side], rate)
        return band, rate

    @staticmethod
    def of_file(parts: dict[str, Tensor]) -> Calibration:
        """Make one from the tensors of a file.

        Earlier versions had one band for every length and position, and measured no rate.

        >>> Calibration.of_file(dict(vars(directions.calibration))).mean.shape
        torch.Size([4, 3])

        Args:
            parts: Tensors by the names of the fields.

        Returns:
            `Calibration`; no copy of the tensors.

        Raises:
            KeyError, jaxtyping.TypeCheckError: one is missing; shapes that do not fit.
        """
        for name, n in (("band", len(LENGTHS)), ("token_band", len(POSITION_EDGES))):
            rate = name.replace("band", "rate") if "token" in name else "band_rate"
            if parts[name].ndim == 1:
                parts = parts | {name: parts[name].repeat(n, 1)}
            parts = {rate: torch.full_like(parts[name], torch.nan)} | parts
        return Calibration(**parts)


def position_bin(position: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """Find which calibration each token belongs to: its place among the `POSITION_EDGES`.

    >>> position_bin(torch.tensor([1, 3, 4, 200])).tolist()
    [0, 0, 1, 3]

    Args:
        position: Position in its text; 0 is the first token.
    """
    return torch.bucketize(position, torch.tensor(POSITION_EDGES[1:]), right=True)

"""Norms counted in log-spaced bins: counts add up exactly over slices, and their median is the unit of a dose."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from emolens._typing import typed

NORM_BINS = 2048  # log-spaced from 1e-4 to 1e8: 1.4 % a bin
_LOG_LOW, _LOG_HIGH = -4.0, 8.0


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

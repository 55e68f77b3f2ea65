"""Read emotions from text with directions: calibrated scores of texts and tokens, and the logit lens with its own test."""

from emolens.readout.lens import LogitLens, first_tokens, logit_lens
from emolens.readout.reading import pooled_as, score
from emolens.readout.scores import Scores, token_html

__all__ = [
    "LogitLens",
    "Scores",
    "first_tokens",
    "logit_lens",
    "pooled_as",
    "score",
    "token_html",
]

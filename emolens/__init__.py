"""emolens: find, read, test and move emotion directions in the residual stream of language models.

The public calls are loaded on first use, so that ``import emolens`` costs neither torch nor TransformerLens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "models", "wrap": "models", "model_info": "models", "catalogue": "models",
    "load_emotion_set": "emotion_sets", "list_emotion_sets": "emotion_sets", "EmotionSet": "emotion_sets",
    "load_norms": "emotion_sets",
    "collect_embed": "activations", "collect_resid_pre": "activations", "collect_resid_mid": "activations",
    "collect_resid_post": "activations", "collect_attn_out": "activations", "collect_mlp_out": "activations",
    "Activations": "activations", "mean_over_tokens": "activations", "last_token": "activations",
    "char_span": "activations", "every_token": "activations",
    "mean_difference": "directions", "antonym_contrast": "directions", "pca": "directions", "lda": "directions",
    "logistic": "directions", "EmotionDirections": "directions", "load_directions": "directions",
    "score": "readout", "logit_lens": "readout", "Scores": "readout",
    "run_study": "study",
    "explore_tokens": "plots",
}  # fmt: skip

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]  # one list, above


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'emolens' has no attribute {name!r}")
    value = getattr(import_module(f"emolens.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from emolens.activations import (
        Activations,
        char_span,
        collect_attn_out,
        collect_embed,
        collect_mlp_out,
        collect_resid_mid,
        collect_resid_post,
        collect_resid_pre,
        every_token,
        last_token,
        mean_over_tokens,
    )
    from emolens.directions import (
        EmotionDirections,
        antonym_contrast,
        lda,
        load_directions,
        logistic,
        mean_difference,
        pca,
    )
    from emolens.emotion_sets import EmotionSet, list_emotion_sets, load_emotion_set, load_norms
    from emolens.models import catalogue, load_model, model_info, wrap
    from emolens.plots import explore_tokens
    from emolens.readout import Scores, logit_lens, score
    from emolens.study import run_study

"""emolens: find, read, test and move emotion directions in the residual stream of language models.

The public calls are loaded on first use, so that ``import emolens`` costs neither torch nor TransformerLens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "models", "wrap": "models", "model_info": "models", "catalogue": "models",
    "load_emotion_set": "emotion_sets", "list_emotion_sets": "emotion_sets", "EmotionSet": "emotion_sets",
    "load_norms": "emotion_sets", "save_emotion_set": "emotion_sets",
    "load_pairs": "materials", "load_stems": "materials", "load_scenarios": "materials", "load_intensities": "materials",
    "load_items": "materials", "load_activities": "materials", "load_prompts": "materials", "load_intensity_pairs": "materials", "load_snippets": "materials",
    "load_dialogues": "dialogues", "load_deflections": "dialogues", "join_emotion_sets": "emotion_sets",
    "collect_embed": "activations", "collect_resid_pre": "activations", "collect_resid_mid": "activations",
    "collect_resid_post": "activations", "collect_attn_out": "activations", "collect_mlp_out": "activations",
    "collect_to": "activations", "Collection": "activations",
    "Activations": "activations", "mean_over_tokens": "activations", "last_token": "activations",
    "char_span": "activations", "every_token": "activations",
    "mean_difference": "directions", "antonym_contrast": "directions", "pca": "directions", "lda": "directions",
    "logistic": "directions", "EmotionDirections": "directions", "load_directions": "directions",
    "score": "readout", "logit_lens": "readout", "Scores": "readout",
    "steer_resid_pre": "interventions", "steer_resid_mid": "interventions", "steer_resid_post": "interventions", "steer_attn_out": "interventions", "steer_mlp_out": "interventions",
    "ablate_resid_pre": "interventions", "ablate_resid_mid": "interventions", "ablate_resid_post": "interventions", "ablate_attn_out": "interventions", "ablate_mlp_out": "interventions",
    "ablate_stream": "interventions", "collect_stream": "interventions", "Stream": "interventions",
    "clamp_resid_pre": "interventions", "clamp_resid_mid": "interventions", "clamp_resid_post": "interventions", "clamp_attn_out": "interventions", "clamp_mlp_out": "interventions",
    "rotate_resid_pre": "interventions", "rotate_resid_mid": "interventions", "rotate_resid_post": "interventions", "rotate_attn_out": "interventions", "rotate_mlp_out": "interventions",
    "positions": "interventions", "check": "interventions",
    "random_directions": "directions", "shuffled_directions": "directions",
    "generate": "steering", "Generations": "steering",
    "sweep": "sweeps", "Sweep": "sweeps", "calibrate_dose": "sweeps", "prompt_baseline": "sweeps",
    "patch_resid_pre": "patching", "patch_resid_mid": "patching", "patch_resid_post": "patching",
    "patch_attn_out": "patching", "patch_mlp_out": "patching", "patch_z": "patching", "patch_q": "patching",
    "patch_k": "patching", "patch_v": "patching", "logit_difference": "patching", "projection": "patching",
    "attribution_patching": "patching", "agreement": "patching", "attribute": "patching", "bake": "baking",
    "run_study": "study", "compare_languages": "experiments.languages",
    "write_stories": "generation", "story_prompts": "generation", "export_prompts": "generation", "import_texts": "generation",
    "read_emovecllm": "published", "read_emotion_probes": "published",
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
        Collection,
        char_span,
        collect_attn_out,
        collect_embed,
        collect_mlp_out,
        collect_resid_mid,
        collect_resid_post,
        collect_resid_pre,
        collect_to,
        every_token,
        last_token,
        mean_over_tokens,
    )
    from emolens.baking import bake
    from emolens.dialogues import load_deflections, load_dialogues
    from emolens.directions import (
        EmotionDirections,
        antonym_contrast,
        lda,
        load_directions,
        logistic,
        mean_difference,
        pca,
        random_directions,
        shuffled_directions,
    )
    from emolens.emotion_sets import (
        EmotionSet,
        join_emotion_sets,
        list_emotion_sets,
        load_emotion_set,
        load_norms,
        save_emotion_set,
    )
    from emolens.experiments.languages import compare_languages
    from emolens.generation import export_prompts, import_texts, story_prompts, write_stories
    from emolens.interventions import (
        Stream,
        ablate_attn_out,
        ablate_mlp_out,
        ablate_resid_mid,
        ablate_resid_post,
        ablate_resid_pre,
        ablate_stream,
        check,
        clamp_attn_out,
        clamp_mlp_out,
        clamp_resid_mid,
        clamp_resid_post,
        clamp_resid_pre,
        collect_stream,
        positions,
        rotate_attn_out,
        rotate_mlp_out,
        rotate_resid_mid,
        rotate_resid_post,
        rotate_resid_pre,
        steer_attn_out,
        steer_mlp_out,
        steer_resid_mid,
        steer_resid_post,
        steer_resid_pre,
    )
    from emolens.materials import (
        load_activities,
        load_intensities,
        load_intensity_pairs,
        load_items,
        load_pairs,
        load_prompts,
        load_scenarios,
        load_snippets,
        load_stems,
    )
    from emolens.models import catalogue, load_model, model_info, wrap
    from emolens.patching import (
        agreement,
        attribute,
        attribution_patching,
        logit_difference,
        patch_attn_out,
        patch_k,
        patch_mlp_out,
        patch_q,
        patch_resid_mid,
        patch_resid_post,
        patch_resid_pre,
        patch_v,
        patch_z,
        projection,
    )
    from emolens.plots import explore_tokens
    from emolens.published import read_emotion_probes, read_emovecllm
    from emolens.readout import Scores, logit_lens, score
    from emolens.steering import Generations, generate
    from emolens.study import run_study
    from emolens.sweeps import Sweep, calibrate_dose, prompt_baseline, sweep

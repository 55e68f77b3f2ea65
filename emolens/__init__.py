"""emolens: find, read, test and move emotion directions in the residual stream of language models.

The public calls are loaded on first use, so that ``import emolens`` costs neither torch nor TransformerLens.
What is composed with is here; each room (`em.sets`, `em.interventions`, ...) has its own further names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "models": "ModelInfo load_model model_info wrap",
    "models.catalogue": "catalogue",
    "sets": """
        EmotionSet join_emotion_sets list_emotion_sets load_emotion_set load_norms
        save_emotion_set
    """,
    "collect": """
        Activations Collection char_span collect_attn_out collect_embed collect_mlp_out
        collect_resid_mid collect_resid_post collect_resid_pre collect_to every_token
        last_token mean_over_tokens
    """,
    "directions": """
        EmotionDirections antonym_contrast lda load_directions logistic mean_difference pca
        random_directions shuffled_directions
    """,
    "readout": "LogitLens Scores logit_lens score",
    "interventions": """
        Agreement Attribution Baked Check DoseCalibration Generations Patching Stream Sweep
        ablate_attn_out ablate_mlp_out ablate_resid_mid ablate_resid_post ablate_resid_pre
        ablate_stream agreement attribute attribution_patching bake calibrate_dose
        clamp_attn_out clamp_mlp_out clamp_resid_mid clamp_resid_post clamp_resid_pre
        collect_stream logit_difference projection prompt_baseline rotate_attn_out
        rotate_mlp_out rotate_resid_mid rotate_resid_post rotate_resid_pre steer_attn_out
        steer_mlp_out steer_resid_mid steer_resid_post steer_resid_pre
    """,
    "interventions.check": "check",
    "interventions.generate": "generate",
    "interventions.positions": "positions",
    "interventions.sweep": "sweep",
    "interventions.patching": """
        patch_attn_out patch_k patch_mlp_out patch_q patch_resid_mid patch_resid_post
        patch_resid_pre patch_v patch_z
    """,
    "stories": "export_prompts import_texts story_prompts write_stories",
    "experiments": "compare_languages",
    "study": "Result Study run_experiment run_study",
    "report": "explore_tokens",
}
_HOME = {name: room for room, names in _NAMES.items() for name in names.split()}
_ROOMS = (
    "collect",
    "directions",
    "experiments",
    "geometry",
    "interventions",
    "models",
    "readout",
    "report",
    "sets",
    "stats",
)

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]  # one list, above


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"emolens.{_HOME[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"emolens.{name}")
    else:
        raise AttributeError(f"module 'emolens' has no attribute {name!r}{_near(name)}")
    globals()[name] = value
    return value


def _near(name: str) -> str:
    """Where a name that is not here is, or what it may be a slip of."""
    from difflib import get_close_matches

    near = get_close_matches(name, [*_HOME, *_ROOMS], n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})


if TYPE_CHECKING:
    from emolens.collect import (
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
    from emolens.experiments import compare_languages
    from emolens.interventions import (
        Agreement,
        Attribution,
        Baked,
        Check,
        DoseCalibration,
        Generations,
        Patching,
        Stream,
        Sweep,
        ablate_attn_out,
        ablate_mlp_out,
        ablate_resid_mid,
        ablate_resid_post,
        ablate_resid_pre,
        ablate_stream,
        agreement,
        attribute,
        attribution_patching,
        bake,
        calibrate_dose,
        clamp_attn_out,
        clamp_mlp_out,
        clamp_resid_mid,
        clamp_resid_post,
        clamp_resid_pre,
        collect_stream,
        logit_difference,
        projection,
        prompt_baseline,
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
    from emolens.interventions.check import check
    from emolens.interventions.generate import generate
    from emolens.interventions.patching import (
        patch_attn_out,
        patch_k,
        patch_mlp_out,
        patch_q,
        patch_resid_mid,
        patch_resid_post,
        patch_resid_pre,
        patch_v,
        patch_z,
    )
    from emolens.interventions.positions import positions
    from emolens.interventions.sweep import sweep
    from emolens.models import ModelInfo, load_model, model_info, wrap
    from emolens.models.catalogue import catalogue
    from emolens.readout import LogitLens, Scores, logit_lens, score
    from emolens.report import explore_tokens
    from emolens.sets import (
        EmotionSet,
        join_emotion_sets,
        list_emotion_sets,
        load_emotion_set,
        load_norms,
        save_emotion_set,
    )
    from emolens.stories import export_prompts, import_texts, story_prompts, write_stories
    from emolens.study import Result, Study, run_experiment, run_study

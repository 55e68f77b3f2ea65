"""What people write: emotion sets, texts of the experiments, human norms, other people's corpora.

Everything that is read has a `load_` function, sets also `save_emotion_set`, and `check_emotion_set` says
whether a set is what it says.
"""

from emolens.sets.check import Check, check_emotion_set
from emolens.sets.dialogues import Deflection, FeltDialogue, load_deflections, load_dialogues
from emolens.sets.emotion_sets import (
    Dialogue,
    Emotion,
    EmotionSet,
    Story,
    Topic,
    Turn,
    join_emotion_sets,
)
from emolens.sets.external import Labelled, load_emobank, load_external, load_goemotions
from emolens.sets.items import Negation, Negators, PersonBinding, Prefix, load_items
from emolens.sets.materials import (
    Activity,
    Intensity,
    IntensityPair,
    Pair,
    Scenario,
    Snippet,
    Stems,
    load_activities,
    load_intensities,
    load_intensity_pairs,
    load_pairs,
    load_scenarios,
    load_snippets,
    load_stems,
)
from emolens.sets.norms import Norm, load_norms, norm_of
from emolens.sets.prompts import load_prompts
from emolens.sets.published import load_emotion_probes, load_emovecllm
from emolens.sets.set_files import list_emotion_sets, load_emotion_set, save_emotion_set

__all__ = [
    "Activity",
    "Check",
    "Deflection",
    "Dialogue",
    "Emotion",
    "EmotionSet",
    "FeltDialogue",
    "Intensity",
    "IntensityPair",
    "Labelled",
    "Negation",
    "Negators",
    "Norm",
    "Pair",
    "PersonBinding",
    "Prefix",
    "Scenario",
    "Snippet",
    "Stems",
    "Story",
    "Topic",
    "Turn",
    "check_emotion_set",
    "join_emotion_sets",
    "list_emotion_sets",
    "load_activities",
    "load_deflections",
    "load_dialogues",
    "load_emobank",
    "load_emotion_probes",
    "load_emotion_set",
    "load_emovecllm",
    "load_external",
    "load_goemotions",
    "load_intensities",
    "load_intensity_pairs",
    "load_items",
    "load_norms",
    "load_pairs",
    "load_prompts",
    "load_scenarios",
    "load_snippets",
    "load_stems",
    "norm_of",
    "save_emotion_set",
]
# the names above, without the files that they are in
__dir__ = __all__.copy

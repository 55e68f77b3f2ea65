"""From activations to emotion directions, with their calibration and their controls. Nothing here sees a model."""

from emolens.directions.algebra import (
    class_means,
    mean_differences,
    neutral_components,
    project,
    remove_components,
)
from emolens.directions.calibration import Calibration
from emolens.directions.controls import random_directions, shuffled_directions
from emolens.directions.estimators import antonym_contrast, lda, logistic, mean_difference, pca
from emolens.directions.value import EmotionDirections, load_directions

__all__ = [
    "Calibration",
    "EmotionDirections",
    "antonym_contrast",
    "class_means",
    "lda",
    "load_directions",
    "logistic",
    "mean_difference",
    "mean_differences",
    "neutral_components",
    "pca",
    "project",
    "random_directions",
    "remove_components",
    "shuffled_directions",
]

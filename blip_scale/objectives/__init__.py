"""BLIP's losses as functions of tensors, and the state that they need."""

from blip_scale.objectives.answers import answer_loss, sequence_losses
from blip_scale.objectives.contrastive import (
    FeaturePair,
    Similarities,
    alpha_at,
    itc_loss,
    retrieval_accuracy,
    similarities,
    soft_targets,
)
from blip_scale.objectives.feature_queue import FeatureQueue
from blip_scale.objectives.language import IGNORED, lm_loss
from blip_scale.objectives.matching import (
    CONSTANT_PREDICTION_LOSS,
    HardNegatives,
    check_pool,
    draw_negatives,
    itm_loss,
    match_accuracy,
    match_labels,
    negative_weights,
    pair_labels,
    predicts_one_class,
)
from blip_scale.objectives.momentum import momentum_update_

__all__ = [
    "CONSTANT_PREDICTION_LOSS",
    "IGNORED",
    "FeaturePair",
    "FeatureQueue",
    "HardNegatives",
    "Similarities",
    "alpha_at",
    "answer_loss",
    "check_pool",
    "draw_negatives",
    "itc_loss",
    "itm_loss",
    "lm_loss",
    "match_accuracy",
    "match_labels",
    "momentum_update_",
    "negative_weights",
    "pair_labels",
    "predicts_one_class",
    "retrieval_accuracy",
    "sequence_losses",
    "similarities",
    "soft_targets",
]

"""What predictions are worth: functions of plain texts and numbers."""

from blip_scale.metrics.answers import normalize_answer, vqa_accuracy
from blip_scale.metrics.captions import CAPTION_METRICS, CaptionScores, caption_scores
from blip_scale.metrics.ranking import ndcg, ranking_figures, ranks_of

__all__ = [
    "CAPTION_METRICS",
    "CaptionScores",
    "caption_scores",
    "ndcg",
    "normalize_answer",
    "ranking_figures",
    "ranks_of",
    "vqa_accuracy",
]

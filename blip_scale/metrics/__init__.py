"""What predictions are worth: functions of plain texts and numbers."""

from blip_scale.metrics.captions import CAPTION_METRICS, CaptionScores, caption_scores

__all__ = ["CAPTION_METRICS", "CaptionScores", "caption_scores"]

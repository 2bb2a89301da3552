"""Inference with trained checkpoints of any kind: captions, answers, matching and features."""

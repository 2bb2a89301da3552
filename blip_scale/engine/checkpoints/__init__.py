"""Checkpoints of a run: saved in the background, uploaded and restored."""

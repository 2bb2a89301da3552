"""Held-out pairs, listed images and videos for evaluation."""

"""Trained checkpoints in use: load one of any kind, and ask it about images."""

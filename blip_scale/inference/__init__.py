"""Trained checkpoints in use: any of them loaded, and asked about images."""

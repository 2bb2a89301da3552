"""Decode and augment images, and turn them into tensors."""

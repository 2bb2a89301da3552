"""Fixtures of this folder."""

from loader_fixtures import make_loader, make_shards, text, vocabulary

__all__ = ["make_loader", "make_shards", "text", "vocabulary"]

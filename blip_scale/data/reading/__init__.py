"""Locate, fetch, cache and read the shards of streams."""

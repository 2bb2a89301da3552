"""Shards of a stream: located, fetched, cached and read."""

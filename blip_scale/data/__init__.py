"""Pixels and captions: shards, streams and their order, transforms, tokenizer, packed batches."""

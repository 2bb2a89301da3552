"""Data pipeline: shards, streams, sample order, transforms, tokenizer, packed batches."""

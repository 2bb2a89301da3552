"""Images and captions: shards, streams, order, transforms, tokenizer, packed batches."""

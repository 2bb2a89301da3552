"""One small reader a dataset; each yields records for `blip_scale.data.shards.write_shards`."""

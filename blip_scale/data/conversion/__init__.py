"""Published sets and folders -> MDS shards.

A reader in `blip_scale.data.sources` yields the pairs of a data set in chunks. Everything else is
here: screening, shards, restarts, several machines, held-out pairs, the merge.
"""

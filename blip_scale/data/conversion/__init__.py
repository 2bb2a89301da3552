"""Convert published data sets and folders to MDS shards.

A reader in `blip_scale.data.sources` yields the pairs of a data set in chunks. This package does
the rest: screening, writing shards, resuming, splitting work over machines, held-out pairs and the
final merge.
"""

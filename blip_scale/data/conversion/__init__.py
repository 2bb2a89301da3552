"""Published sets and folders -> MDS shards.

A reader (one a data set, in `blip_scale.data.sources`) gives pairs as it finds them, in chunks;
everything else is here: screening, shards, restarts, several machines, the merge.
"""

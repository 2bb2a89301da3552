"""CapFilt (Li et al. 2022, section 3.3): a synthetic caption for every web image, and a filter that
drops web and synthetic captions that don't match; shards in, shards out."""

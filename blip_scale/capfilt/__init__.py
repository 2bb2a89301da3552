"""CapFilt (Li et al. 2022, section 3.3): caption web images, and filter captions by matching.

A captioner writes a synthetic caption for every image. A filter drops web and synthetic captions
that do not match their image. Input and output are MDS shards.
"""

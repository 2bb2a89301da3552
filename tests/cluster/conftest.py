"""Fixtures: a real S3 server, a real SLURM, and small sets of shards with loaders over them."""

from loader_fixtures import make_loader, make_shards, text, vocabulary
from s3_server import _server, s3
from slurm_cluster import slurm

__all__ = ["_server", "make_loader", "make_shards", "s3", "slurm", "text", "vocabulary"]

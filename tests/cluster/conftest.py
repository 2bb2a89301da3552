"""Fixtures that start servers."""

from s3_server import _server, s3

__all__ = ["_server", "s3"]

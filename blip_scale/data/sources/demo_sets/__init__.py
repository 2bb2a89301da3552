"""Data sets of the demos, made from files shipped in Python packages."""

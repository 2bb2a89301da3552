"""The sets of the demos, drawn from Python packages."""

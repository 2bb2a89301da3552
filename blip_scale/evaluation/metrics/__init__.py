"""Metrics as functions of plain texts and numbers."""

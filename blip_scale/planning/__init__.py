"""Estimate the memory, time, data and storage that a recipe needs on a cluster."""

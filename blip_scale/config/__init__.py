"""Recipes, their settings, and the checks before anything is loaded."""

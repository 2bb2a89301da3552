"""Recipes, their settings and what is checked before anything is loaded."""

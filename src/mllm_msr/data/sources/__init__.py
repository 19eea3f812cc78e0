"""Readers of the data sets that a recipe can name."""

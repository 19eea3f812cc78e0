"""Recipes, as files: `mllm-msr recipes` lists them, and commands take their names."""

"""Metrics, baselines and the scoring of every variant on the same frozen tasks."""

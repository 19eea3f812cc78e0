"""The old address of :mod:`mllm_msr.data.sources.tables`."""

from mllm_msr.data.sources.tables import read_tables

__all__ = ["read_tables"]

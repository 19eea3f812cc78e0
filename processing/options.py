"""The old address of :mod:`mllm_msr.records.sections`."""

from mllm_msr.records.sections import PrepareOptions

__all__ = ["PrepareOptions"]

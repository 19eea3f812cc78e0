"""The old address of :mod:`mllm_msr.data.cleaning`."""

from mllm_msr.data.cleaning import clean

__all__ = ["clean"]

"""The old address of :mod:`mllm_msr.data.images`."""

from mllm_msr.data.images import BrokenImage, decode, normalise

__all__ = ["BrokenImage", "decode", "normalise"]

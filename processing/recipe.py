"""The old address of :mod:`mllm_msr.records.recipe`."""

from mllm_msr.records.recipe import backbone_path

__all__ = ["backbone_path"]

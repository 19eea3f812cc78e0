"""The old address of :mod:`mllm_msr.evaluation.baselines`."""

from mllm_msr.evaluation.baselines import knn

__all__ = ["knn"]

"""The old address of :mod:`mllm_msr.data.sources.movielens`."""

from mllm_msr.data.sources.movielens import GENRES, read_movielens

__all__ = ["GENRES", "read_movielens"]

"""Recommenders on tiny backbones, for the tests of this room."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from mllm_msr import MllmMsrForRecommendation, MllmMsrProcessor

Pair = tuple[MllmMsrForRecommendation, MllmMsrProcessor]


@pytest.fixture(scope="session")
def processor_of(backbone) -> Callable[[str], MllmMsrProcessor]:
    """A family's processor; made once, so no test may change it."""
    return cache(lambda name: MllmMsrProcessor.from_backbone(str(backbone(name))))


@pytest.fixture
def build(backbone, processor_of) -> Callable[..., Pair]:
    """A family's recommender, new for each test, and its processor."""

    def built(name: str, **kwargs: Any) -> Pair:
        processor = processor_of(name)
        return MllmMsrForRecommendation.from_backbone(backbone(name), processor=processor, **kwargs), processor

    return built

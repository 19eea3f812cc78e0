"""Small requests by a compiled forward: the same scores, and few graphs whatever is asked for."""

import numpy as np
import pytest
import tiny_models
import torch
from packed_rows import packed_recommender
from torch._dynamo.utils import counters

from mllm_msr import Candidate, Recommender, User
from mllm_msr.modeling.compiled_answers import CompiledAnswers, padded_size

LIMITS = (160, 240)
USERS = [User("quiet red films with ships"), User("quiet red ships with films")]
ITEMS = {f"i{k}": Candidate(f"i{k}", "The Sea " * (1 + k % 7), image=tiny_models.draw_image(1)) for k in range(40)}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize(("family", "memory"), [*((family, 0) for family in tiny_models.FAMILIES), ("qwen2_vl", 2)])
def test_compiled_scores_are_those_of_the_plain_way(backbone, family: str, memory: int) -> None:
    """Of three families traced, of the others as it is padded for that, which is quicker."""
    model, processor = packed_recommender(backbone(family), "late", LIMITS, memory)
    traced = family in ("llava_next", "gemma3") or memory > 0
    rows = [list(ITEMS)[:5], ["i1", "i9"]]
    plain = Recommender(model, processor).score(USERS, rows, ITEMS)
    with torch.compiler.set_stance("default" if traced else "force_eager"):
        how = "aot_eager" if memory else "eager"
        compiled = Recommender(model, processor, compile=how).score(USERS, rows, ITEMS)
    for ours, theirs in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == traced  # both users and both rows are of one size


def test_there_are_no_more_graphs_than_sizes(backbone) -> None:
    model, processor = packed_recommender(backbone("llava"), "late", LIMITS)
    plain, compiled = Recommender(model, processor), Recommender(model, processor, compile="eager")
    names = list(ITEMS)
    for count in (8, 3, 12, 1, 9, 10):
        (ours,), (theirs,) = (each.score(USERS[:1], [names[:count]], ITEMS) for each in (compiled, plain))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == len({padded_size(count) for count in (8, 3, 12, 1, 9, 10)}) == 2


def test_large_requests_are_computed_as_ever(backbone, monkeypatch) -> None:
    monkeypatch.setattr(CompiledAnswers, "most", 10)
    model, processor = packed_recommender(backbone("llava"), "late", LIMITS)
    recommender = Recommender(model, processor, compile="eager")
    recommender.score(USERS[:1], [list(ITEMS)[:11]], ITEMS)
    assert not counters["stats"]
    recommender.score(USERS[:1], [list(ITEMS)[:10]], ITEMS)
    assert counters["stats"]["unique_graphs"] == 1


def test_only_late_answers_are_compiled_and_by_what_there_is(backbone) -> None:
    model, processor = packed_recommender(backbone("llava"), "late", LIMITS)
    with pytest.raises(ValueError, match=r"compile='nothing' is no mode or backend .* there are default, reduce-over"):
        Recommender(model, processor, compile="nothing")
    model.config.interaction = "joint"
    with pytest.raises(ValueError, match="leave `compile` out"):
        Recommender(model, processor, compile="eager")

"""What is kept of a late model's candidates in eight bits: scores nearly as they were, in a fraction of the bytes."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from packed_rows import packed_recommender
from stored_items import item

from mllm_msr import Candidate, Recommender, User
from mllm_msr.modeling.eight_bits import from_eight_bits, plain_bytes, to_eight_bits
from mllm_msr.modeling.item_shards import Shard, nbytes
from mllm_msr.modeling.item_store import ItemStore, cache_of, tensors_of

LIMITS = (160, 240)
USERS = [User("quiet red films with ships"), User("loud blue games")]
ITEMS = {f"i{k}": Candidate(f"i{k}", "The Sea " * (1 + k), image=tiny_models.draw_image(k)) for k in range(5)}
ROWS = [list(ITEMS), ["i3", "i1"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [4, 80, 128])
def test_a_number_is_wrong_by_no_more_than_half_a_step_of_its_neighbours(dtype: torch.dtype, width: int) -> None:
    exact = torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(0))
    exact[0, 0, 0, 0] = 1000.0
    exact[1, 2] = 0.0  # what pads
    tensors = {"inside": torch.ones(2, 5, dtype=torch.bool), "keys.0": exact.to(dtype)}
    coded = to_eight_bits(tensors)
    assert coded["keys.0"].dtype == torch.int8 and plain_bytes(coded) == nbytes(tensors)
    again = from_eight_bits(coded)
    assert again.keys() == tensors.keys() and torch.equal(again["inside"], tensors["inside"])
    assert again["keys.0"].dtype == dtype and not again["keys.0"][1, 2].any()
    steps = coded["keys.0.scales"].float().repeat_interleave(width // coded["keys.0.scales"].shape[-1], -1)
    rounding = torch.finfo(dtype).eps * tensors["keys.0"].float().abs()
    assert ((again["keys.0"].float() - tensors["keys.0"].float()).abs() <= 0.5001 * steps + rounding).all()
    if width > 32:
        assert steps[0, 0, 0, 32:].max() < 0.1, "the large one is no neighbour of these"


@pytest.mark.parametrize(("family", "memory"), [("llava", 0), ("qwen2_5_vl", 0), ("gemma3", 0), ("qwen3_vl", 3)])
def test_scores_are_nearly_those_of_what_is_kept_as_it_is(backbone, family: str, memory: int, tmp_path: Path) -> None:
    model, processor = packed_recommender(backbone(family), "late", LIMITS, memory)
    exact = np.concatenate(Recommender(model, processor).score(USERS, ROWS, ITEMS))
    first = None
    tight = {"memory_gb": 1e-6, "token_budget": 1}
    for options in ({}, {"cache": tmp_path}, {"cache": tmp_path, **tight}, tight):
        recommender = Recommender(model, processor, cache_dtype="int8", **options)
        scores = np.concatenate(recommender.score(USERS, ROWS, ITEMS))
        assert 0 < np.abs(scores - exact).max() < 0.03 * exact.std(), options
        first = scores if first is None else first
        np.testing.assert_allclose(scores, first, atol=1e-5)  # computed now or kept, in any memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    wide = {name: tensor.repeat_interleave(16, -1) for name, tensor in tensors_of(item("0", dtype)).items()}
    wide["inside"] = tensors_of(item("0"))["inside"]
    plain, coded = ItemStore(torch.device("cpu"), 10**9, None), ItemStore(torch.device("cpu"), 10**9, None, True)
    for store in (plain, coded):
        store.put(["a"], cache_of(wide))
    assert plain.nbytes == plain.item_bytes == coded.item_bytes == nbytes(wide)
    numbers = sum(tensor.numel() for name, tensor in wide.items() if name != "inside")
    assert coded.nbytes == numbers + numbers // 32 * dtype.itemsize + wide["inside"].nbytes


def test_another_type_is_computed_anew_and_never_mixed(backbone, tmp_path: Path) -> None:
    model, processor = packed_recommender(backbone("llava"), "late", LIMITS)
    plain, coded = (Recommender(model, processor, cache=tmp_path, cache_dtype=dtype) for dtype in (None, "int8"))
    exact, kept = plain.score(USERS, ROWS, ITEMS), plain.index(ITEMS)
    assert (kept.computed, kept.kept, kept.deleted) == (0, 5, 0)
    before = set(kept.folder.glob("*.safetensors"))
    nearly = coded.score(USERS, ROWS, ITEMS)  # both are there
    for ours, theirs in zip(plain.score(USERS, ROWS, ITEMS), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    report = coded.index(ITEMS)
    assert (report.computed, report.kept, report.deleted) == (0, 5, 5)
    after = set(report.folder.glob("*.safetensors"))
    assert not before & after and report.nbytes == sum(path.stat().st_size for path in after)
    tensors = [each for path in after for each in Shard(path).tensors.items()]
    assert {tensor.dtype for name, tensor in tensors if name[-1].isdigit()} == {torch.int8}
    assert plain.not_indexed(ITEMS) == list(ITEMS) and not coded.not_indexed(ITEMS)
    again = plain.index(ITEMS)
    assert (again.computed, again.kept, again.deleted) == (5, 0, 5)
    assert not np.array_equal(nearly[0], exact[0])


def test_what_cannot_be_is_refused(backbone) -> None:
    model, processor = packed_recommender(backbone("llava"), "late", LIMITS)
    with pytest.raises(ValueError, match="cache_dtype='int4'"):
        Recommender(model, processor, cache_dtype="int4")
    model.config.interaction = "joint"
    with pytest.raises(ValueError, match="leave `cache_dtype` out"):
        Recommender(model, processor, cache_dtype="int8")

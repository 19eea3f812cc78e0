"""Rows side by side, one on each core of a CPU, and who computes linear layers there: scores stay what they are."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mllm_msr.modeling import core_rows, onednn_linear
from mllm_msr.modeling.core_rows import each_on_a_core, rows_of
from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.onednn_linear import OneDnnLinear, use_onednn
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

CPU, META = torch.device("cpu"), torch.device("meta")
OWNERS = np.repeat([0, 1, 2, 3], [40, 3, 2, 300])


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("device", [CPU, META])
def test_each_pair_is_in_one_row_of_the_budget(two_cores: None, device: torch.device) -> None:
    rows = list(rows_of(OWNERS, device, 1600, lambda: 16))
    assert [row.start for row in rows[1:]] == [row.stop for row in rows[:-1]]
    assert rows[0].start == 0 and rows[-1].stop >= len(OWNERS)
    assert all(row.stop - row.start <= 100 for row in rows)
    if device == META:  # anything but a CPU
        assert len(rows) == 4


def test_on_a_cpu_a_large_user_shares_with_no_other(two_cores: None) -> None:
    sizes = [len(set(OWNERS[row])) for row in rows_of(OWNERS, CPU, 100_000, lambda: 16)]
    assert sizes == [1, 3, 1]  # of 16 tokens 32 pairs are worth a core; 40, then 3 + 2 + as many as fill one, the rest


def test_results_come_in_order_from_threads_of_one_core_each(two_cores: None) -> None:
    def compute(part: int) -> tuple[int, int, bool]:
        return part, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert list(each_on_a_core(compute, iter(range(20)), 2)) == [(part, 1, True) for part in range(20)]
    assert list(each_on_a_core(compute, iter([7]), 2)) == [(7, 2, False)]  # one alone has all cores
    assert torch.get_num_threads() == 2

    def fail(part: int) -> int:
        return 1 // (part - 3)

    with pytest.raises(ZeroDivisionError):
        list(each_on_a_core(fail, iter(range(9)), 2))


@pytest.mark.parametrize("late", [False, True])
def test_scores_on_two_cores_are_those_on_one(
    two_cores: None, backbone, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    processor = MllmMsrProcessor.from_backbone(backbone("llava"), prompts={"late_user": "{{ preference }}"})
    model = MllmMsrForRecommendation.from_backbone(backbone("llava"), dtype=torch.float32, processor=processor)
    if late:
        model.config.interaction, model.config.user_limit, model.config.item_limit = "late", 96, 64
    items = {
        f"i{k}": Candidate(f"i{k}", "The Sea " * (k % 3 + 1), image=Image.new("RGB", (40, 40), (9 * k, 0, 0)))
        for k in range(24)
    }
    users = [User("quiet red films with ships"), User("long summers"), User("blue")]
    rows = [list(items), list(items)[3:5], list(items)[::2]]
    monkeypatch.setattr(core_rows, "LEAST", 200)
    spread = Recommender(model, processor).score(users, rows, items)
    torch.set_num_threads(1)
    for ours, theirs in zip(spread, Recommender(model, processor).score(users, rows, items), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_onednn_gives_the_products_of_linear_layers(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80, bias=bias), nn.Linear(80, 16, bias=bias))
    x, plain = torch.randn(2, 37, 48), copy.deepcopy(model)
    monkeypatch.setattr(onednn_linear, "onednn_is_quicker", lambda: True)
    use_onednn(model)
    assert all(type(layer) is OneDnnLinear for layer in model)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=1e-5)
        assert model(x[:, :0]).shape == (2, 0, 16)
    for each in (model, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    half = model.to(torch.bfloat16)
    with torch.inference_mode():
        assert half(x.bfloat16()).dtype == torch.bfloat16

"""The loss in parts is that of torch on the whole product, and so are its gradients."""

import pytest
import torch
from torch.nn import functional as F

from mllm_msr.evaluation import product_cross_entropy as module
from mllm_msr.evaluation.product_cross_entropy import product_cross_entropy


@pytest.mark.parametrize("pairs", [1, 200, 1 << 20])
def test_it_is_the_cross_entropy_of_the_whole_product(monkeypatch, pairs):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "PAIRS", pairs)
    states, vectors = torch.randn(23, 5, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    targets, log_q = torch.randint(40, (23,)), -torch.rand(40)

    def gradients(loss):
        return (loss, *torch.autograd.grad(3 * loss, (states, vectors)))

    logits = (states @ vectors.T - log_q).scatter_add(1, targets[:, None], log_q[targets][:, None])
    expected = gradients(F.cross_entropy(logits, targets))
    for value, other in zip(gradients(product_cross_entropy(states, vectors, targets, log_q)), expected, strict=True):
        torch.testing.assert_close(value, other)


def test_logits_too_large_for_an_exponential_do_no_harm():
    states, vectors = torch.full((2, 1), 1000.0), torch.tensor([[1.0], [0.5]])
    assert product_cross_entropy(states, vectors, torch.tensor([0, 1]), torch.zeros(2)).item() == 250.0

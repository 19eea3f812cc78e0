"""Cross-entropy of logits that are products of two matrices, without ever holding all of them.

A step of training has some thousand states and as many classes: the logits, what the softmax keeps of them and their
gradients are by far the largest numbers in it. Rows do not depend on one another, so a few at a time are made, turned
into their share of the gradients, and forgotten (as in Liger Kernel, Hsu et al., 2024). In a processor's cache that is
faster, too.
Letters: N states, C classes, D hidden.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PAIRS = 1 << 20  # of states and classes, whose logits are there at a time


def product_cross_entropy(states: Tensor, vectors: Tensor, targets: Tensor, log_q: Tensor) -> Tensor:
    """Mean cross-entropy of the logits ``states @ vectors.T``, of which all but the target's are raised by ``-log_q``.

    Args:
        states: (N, D); vectors: (C, D).
        targets: (N,), a class each.
        log_q: (C,), log of the chance that a class is among those given; zero where all are.

    >>> states, vectors = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> round(product_cross_entropy(states, vectors, torch.tensor([0, 1]), torch.zeros(3)).item(), 4)
    0.5514
    """
    loss: Tensor = _ProductCrossEntropy.apply(states, vectors, targets, log_q)
    return loss


class _ProductCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, and only multiplied on the way back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, vectors: Tensor, targets: Tensor, log_q: Tensor) -> Tensor:
        count, rows = len(states), max(1, PAIRS // max(1, len(vectors)))
        of_states, of_vectors = torch.empty_like(states), torch.zeros_like(vectors)
        total = states.new_zeros(())
        for begin in range(0, count, rows):
            part, target = states[begin : begin + rows], targets[begin : begin + rows]
            own = torch.arange(len(part), device=part.device), target
            logits = torch.addmm(-log_q, part, vectors.T)
            logits[own] += log_q[target]
            of_target, highest = logits[own], logits.amax(dim=1, keepdim=True)
            shares = logits.sub_(highest).exp_()
            sums = shares.sum(dim=1, keepdim=True)
            total += (sums.log() + highest)[:, 0].sub(of_target).sum()
            shares.div_(sums * count)
            shares[own] -= 1 / count
            torch.mm(shares, vectors, out=of_states[begin : begin + rows])
            of_vectors.addmm_(shares.T, part)
        ctx.save_for_backward(of_states, of_vectors)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_vectors = ctx.saved_tensors
        return of_states * gradients[0], of_vectors * gradients[0], None, None

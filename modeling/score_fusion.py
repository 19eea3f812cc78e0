"""One score from several: a weighted sum whose weights depend on how often an item was chosen in training.

Letters: M members, K buckets of training frequency, N any shape of items.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOWER_BOUNDS = (1, 5, 20)  # training interactions from which on an item is in the next bucket
BUCKETS = ("0", "1-4", "5-19", "20+")


def frequency_buckets(counts: Tensor) -> Tensor:
    """(N,) places in ``BUCKETS`` of items with (N,) training interactions.

    >>> frequency_buckets(torch.tensor([0, 1, 4, 5, 19, 20, 900])).tolist()
    [0, 1, 1, 2, 2, 3, 3]
    """
    return torch.bucketize(counts, torch.tensor(LOWER_BOUNDS, device=counts.device), right=True)


@dataclass(frozen=True)
class ScoreFusion:
    """``sum over m of weights[k, m] (score_m - mean_m) / deviation_m + bias[k]`` for an item of bucket k.

    Args:
        members: names of the scores, M of them.
        mean, deviation: (M,), of each member's scores on the validation tasks.
        weights: (K, M), a row for each of ``BUCKETS``; bias: (K,).
    """

    members: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    weights: Tensor
    bias: Tensor

    @classmethod
    def alone(cls, member: str) -> "ScoreFusion":
        """A single member's scores as they are."""
        one, buckets = torch.ones(1), len(BUCKETS)
        return cls((member,), torch.zeros(1), one, one.expand(buckets, 1), torch.zeros(buckets))

    def __call__(self, scores: Tensor, buckets: Tensor) -> Tensor:
        """(N,): the fused scores of (N, M) members' scores of items in (N,) buckets."""
        return self.shares(scores, buckets).sum(dim=-1) + self.bias.to(scores.device)[buckets]

    def shares(self, scores: Tensor, buckets: Tensor) -> Tensor:
        """(N, M): what each member adds to the fused scores."""
        mean, deviation, weights = (part.to(scores.device) for part in (self.mean, self.deviation, self.weights))
        return (scores - mean) / deviation * weights[buckets]

    def join(self, answers: Tensor, others: Tensor, buckets: Tensor) -> Tensor:
        """(N,): the fused scores of items in (N,) buckets by their answers and by what else ranks them, each (N,)."""
        return self(torch.stack([answers, others], dim=-1), buckets)

    def rerank(
        self,
        scores: Tensor,
        buckets: Tensor,
        left_out: Tensor | None,
        depth: int,
        answer: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """(U, I): the scores of all items, of which each user's best are ranked anew with what only few can be asked.

        The members are that, first, and what ranks all items, second. The other items follow behind those ranked anew,
        in their order.

        Args:
            scores: (U, I), of every item by the second member.
            buckets: (I,), of the items.
            left_out: (U, I), true for items that need not be ranked anew, such as chosen ones; None: no item is.
            depth: N, how many items of each user are ranked anew.
            answer: gives (U, N) items of the U users their scores by the first member.
        """
        open_to = scores if left_out is None else scores.masked_fill(left_out, -torch.inf)
        best = open_to.topk(min(depth, scores.shape[1])).indices
        if not best.numel():
            return scores
        values = self.join(answer(best), scores.gather(1, best), buckets[best])
        highest = scores.scatter(1, best, -torch.inf).max(dim=1, keepdim=True).values  # of the others
        behind = values.min(dim=1, keepdim=True).values - 1.0 - highest
        return (scores + behind).scatter(1, best, values)

    def spread(self, last: "ScoreFusion") -> "ScoreFusion":
        """The same score as one weighted sum, for a last member that is itself the fusion ``last``."""
        outer = self.weights[:, -1] / self.deviation[-1]
        return ScoreFusion(
            (*self.members[:-1], *last.members),
            torch.cat([self.mean[:-1], last.mean]),
            torch.cat([self.deviation[:-1], last.deviation]),
            torch.cat([self.weights[:, :-1], outer[:, None] * last.weights], dim=1),
            self.bias + outer * (last.bias - self.mean[-1]),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: each member's weights and the bias by bucket."""
        return {
            "members": list(self.members),
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
            "weights": dict(zip(BUCKETS, self.weights.tolist(), strict=True)),
            "bias": dict(zip(BUCKETS, self.bias.tolist(), strict=True)),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ScoreFusion":
        """From :meth:`to_dict`; KeyError if something is missing."""
        weights, bias = ([content[name][bucket] for bucket in BUCKETS] for name in ("weights", "bias"))
        mean, deviation = content["mean"], content["deviation"]
        return cls(tuple(content["members"]), *(torch.tensor(part) for part in (mean, deviation, weights, bias)))

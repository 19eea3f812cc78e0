"""Likeness of items by content as it is: nothing is trained, so nothing that only few items have in common is blurred.

Letters: B histories, L places, I items of the catalogue, F content features, N any number of items.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHRINKAGE = 0.3  # of whitening, in mean singular values: directions of little variance are mostly noise


class ContentLikeness(nn.Module):
    """Scores an item by the mean cosine of its whitened content with that of the last items of a history.

    Args:
        content: (I, F), of the whole catalogue.
        reach: how many of the last items count.
    """

    mean: Tensor
    whitening: Tensor
    directions: Tensor

    def __init__(self, content: Tensor, reach: int = 5) -> None:
        super().__init__()
        self.reach = reach
        self.register_buffer("mean", content.float().mean(dim=0))
        _, size, axes = torch.linalg.svd(content.float() - self.mean, full_matrices=False)
        self.register_buffer("whitening", axes.T / (size + SHRINKAGE * size.mean()).clamp(min=1e-9))
        self.register_buffer("directions", self.directions_of(content).half())

    @classmethod
    def from_state(cls, state: dict[str, Tensor], reach: int) -> "ContentLikeness":
        """From an earlier one's ``state_dict``."""
        likeness = cls(torch.zeros(state["directions"].shape[0], 0), reach)
        for name, value in state.items():
            likeness.register_buffer(name, value)
        return likeness

    def directions_of(self, content: Tensor) -> Tensor:
        """(N, F): unit vectors of (N, F) content, of items of the catalogue or of new ones."""
        return F.normalize((content.float() - self.mean) @ self.whitening, dim=1)

    def profiles(self, codes: Tensor, owner: Tensor, n_histories: int) -> Tensor:
        """(B, F): the mean direction of each history's items, zero for an empty one.

        Args:
            codes: (L,), item codes of all histories together, already cut to the last ``reach`` of each.
            owner: (L,), the history that each belongs to.
            n_histories: B.
        """
        total = torch.zeros(n_histories, self.directions.shape[1]).index_add(0, owner, self.directions[codes].float())
        return total / torch.bincount(owner, minlength=n_histories).clamp(min=1)[:, None]

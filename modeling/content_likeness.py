"""Likeness of items by content as it is: nothing is trained, so nothing that only few items have in common is blurred.

Letters: B histories, L places, I items of the catalogue, F content features, R directions of whitened content, N any
number of items.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHRINKAGE = 0.3  # of whitening, in mean singular values: directions of little variance are mostly noise


class ContentLikeness(nn.Module):
    """Scores an item by the mean cosine of its whitened content with that of the last items of a history.

    Made blank, for the weights of an earlier one; :meth:`of` makes one for a catalogue.

    Args:
        n_items, content_size, rank: I, F, R.
        reach: how many of the last items count.
    """

    content: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, n_items: int, content_size: int, rank: int, reach: int = 5) -> None:
        super().__init__()
        self.reach = reach
        self.register_buffer("content", torch.zeros(n_items, content_size, dtype=torch.float16))
        self.register_buffer("mean", torch.zeros(content_size))
        self.register_buffer("whitening", torch.zeros(content_size, rank))

    @classmethod
    def of(cls, content: Tensor, reach: int = 5) -> "ContentLikeness":
        """The likeness of (I, F) content of a whole catalogue, kept in half precision."""
        n_items, content_size = content.shape
        likeness = cls(n_items, content_size, min(n_items, content_size), reach)
        likeness.content.copy_(content)
        values = likeness.content.float()
        likeness.mean.copy_(values.mean(dim=0))
        _, size, axes = torch.linalg.svd(values - likeness.mean, full_matrices=False)
        likeness.whitening.copy_(axes.T / (size + SHRINKAGE * size.mean()).clamp(min=1e-9))
        return likeness

    def item_vectors(self, codes: Tensor | None = None) -> Tensor:
        """(N, R): unit vectors of the items with these (N,) codes, of the whole catalogue for None."""
        content = self.content if codes is None else self.content[codes]
        return F.normalize((content.float() - self.mean) @ self.whitening, dim=1)

    def user_states(self, histories: Tensor, vectors: Tensor) -> Tensor:
        """(B, R): what (B, L) item codes, oldest first, padded with negative ones, stand for; zero for an empty one.

        ``vectors``: (N, R), what codes stand for.
        """
        real = histories >= 0
        late = real & (real.flip(1).cumsum(dim=1).flip(1) <= self.reach)
        owner, place = late.nonzero(as_tuple=True)
        return profiles(vectors, histories[owner, place], owner, len(histories))


def profiles(vectors: Tensor, codes: Tensor, owner: Tensor, n_histories: int) -> Tensor:
    """(B, R): the mean vector of each history's items, zero for an empty one.

    Args:
        vectors: (N, R), what codes stand for.
        codes: (L,), item codes of all histories together, already cut to the last ones that count.
        owner: (L,), the history that each belongs to.
        n_histories: B.
    """
    total = vectors.new_zeros(n_histories, vectors.shape[1]).index_add(0, owner, vectors[codes])
    return total / torch.bincount(owner, minlength=n_histories).clamp(min=1)[:, None]

"""Which items of a catalogue are nearest to others by content, among those that somebody has chosen.

Letters: N items asked for, I items of the catalogue, F content features, k neighbours.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = -1  # in place of a code: after the last item of a history, where there are fewer than k neighbours
CELLS = 1 << 24  # of similarities that are computed at a time


@torch.no_grad()
def nearest_chosen(content: Tensor, own: Tensor, catalogue: Tensor, counts: Tensor, k: int) -> Tensor:
    """(N, k) int32: codes of the items with the highest cosine of centred content, the nearest first.

    It takes one product of all N with all I items.

    Args:
        content: (N, F) of the items asked for.
        own: (N,) their codes in the catalogue, as none is its own neighbour; ``PADDING`` for one outside.
        catalogue: (I, F) content; counts: (I,) training interactions: items with none are nobody's neighbours.
    """
    mean, chosen = catalogue.float().mean(dim=0), counts.nonzero()[:, 0]
    others = F.normalize(catalogue[chosen].float() - mean, dim=1)
    found = torch.full((len(content), k), PADDING, dtype=torch.int32, device=content.device)
    size = min(k, len(chosen))
    for rows in torch.arange(len(content), device=content.device).split(max(1, CELLS // max(1, len(chosen)))):
        cosines = F.normalize(content[rows].float() - mean, dim=1) @ others.T
        cosines.masked_fill_(own[rows, None] == chosen, -torch.inf)
        best = cosines.topk(size, dim=1)
        codes = chosen[best.indices].int()
        found[rows, :size] = codes.masked_fill(best.values == -torch.inf, PADDING)
    return found


def mean_of(values: Tensor, near: Tensor, hidden: Tensor | None = None) -> Tensor:
    """(N, D): the mean of (I, D) values over (N, k) codes, without padding and what is ``hidden`` (I,); 0 over none."""
    places = near.clamp(min=0).long()
    real = near >= 0 if hidden is None else (near >= 0) & ~hidden[places]
    shares = real / real.sum(dim=1, keepdim=True).clamp(min=1)
    return F.embedding_bag(places, values, mode="sum", per_sample_weights=shares.to(values.dtype))


def taken(values: Tensor, rows: Tensor) -> Tensor:
    """The rows of (I, ...) values with these (M,) codes, zeros for ``PADDING``."""
    picked = values[rows.clamp(min=0)]
    picked[rows == PADDING] = 0
    return picked


def renumbered(codes: Tensor, rows: Tensor, n_items: int) -> Tensor:
    """Codes among ``n_items`` as those among the (M,) that are taken of them, see :func:`taken`.

    >>> renumbered(torch.tensor([0, 1, 2, -1]), torch.tensor([2, 0, -1]), 3).tolist()
    [1, -1, 0, -1]
    """
    new = torch.full((n_items + 1,), PADDING, dtype=codes.dtype, device=codes.device)  # the last is for padding
    stay = (rows != PADDING).nonzero()[:, 0]
    new[rows[stay]] = stay.to(codes.dtype)
    return new[codes.long()]

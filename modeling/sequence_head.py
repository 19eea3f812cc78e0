"""The sequence head: items as what is said of them plus what was learnt of them, users as a walk through their items.

An item's vector is ``v_i = MLP(c_i) + delta_i``. ``c_i`` is its content vector, such as a language model's mean hidden
state over the item's text and image. ``delta_i``, its identity, is learnt from interactions and zero for an item that
has none; in training it is left out for a random share of the items of each step, so that content learns to stand
alone. A small causal network reads the vectors of a history and gives a state ``u_t`` at each place; the score of an
item is ``<u_t, v_i>``. So a new item needs a content vector and nothing else, a user a history and nothing else.

A head may also lend to each item the mean identity of those nearest to it by content (``neighbours``): what is said of
an item then stands for what is known of its like, which tells more apart than ``MLP(c_i)`` alone.

Without content this is SASRec (Kang and McAuley, ICDM 2018) or GRU4Rec (Hidasi et al., ICLR 2016); without identity it
ranks by content alone. Letters: B histories, L places, D hidden, I items of the catalogue, F content features,
C candidates, N any number of items.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .history_encoders import Dropout, history_encoder
from .neighbours import PADDING, mean_of, nearest_chosen, renumbered, taken
from .sequence_head_options import SequenceHeadConfig


@dataclass
class SequenceHeadOutput(ModelOutput):
    """Output of the head.

    Args:
        states: (B, L, D), u_t: what stands for the next item after each place; of no meaning at padding.
        last: (B, D), the state after the last item of each history; zero for an empty one.
    """

    states: Tensor | None = None
    last: Tensor | None = None


class SequenceHead(nn.Module):
    """See the module. Before use with content, call :meth:`set_items`."""

    content: Tensor
    mean: Tensor
    deviation: Tensor
    counts: Tensor
    near: Tensor
    reader: Any  # of content

    def __init__(self, config: SequenceHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("counts", torch.zeros(config.n_items, dtype=torch.int32))
        if config.content_size:
            self.register_buffer("content", torch.zeros(config.n_items, config.content_size, dtype=torch.float16))
            self.register_buffer("mean", torch.zeros(config.content_size))
            self.register_buffer("deviation", torch.ones(config.content_size))
            if config.joined:
                self.reader = nn.Linear(config.content_size, config.hidden)
                self.project = nn.Linear(2 * config.hidden, config.hidden)
            else:
                self.reader = nn.Sequential(
                    nn.Linear(config.content_size, 2 * config.hidden),
                    nn.GELU(),
                    Dropout(config.dropout),
                    nn.Linear(2 * config.hidden, config.hidden),
                )
            if config.gate:
                self.gate = nn.Parameter(torch.ones(GATES))
        if config.identity:
            self.identity = nn.Parameter(torch.empty(config.n_items, config.hidden))
        if config.neighbours:
            self.register_buffer("near", torch.full((config.n_items, config.neighbours), PADDING, dtype=torch.int32))
        if config.unit_items:
            self.log_length = nn.Parameter(torch.tensor(LENGTH).log())
        self.encoder = history_encoder(config)
        self.dropout = Dropout(config.dropout)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.encoder.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if self.config.content_size:
            last: Any = self.reader if self.config.joined else self.reader[-1]
            nn.init.normal_(last.weight, std=0.02 / self.config.content_size**0.5 if self.config.joined else 0.02)
            nn.init.zeros_(last.bias)
        if self.config.identity:
            nn.init.normal_(self.identity, std=0.02)

    @torch.no_grad()
    def set_items(self, counts: Tensor, content: Tensor | None = None) -> None:
        """Say what is known of the catalogue before training.

        Args:
            counts: (I,), training interactions of each item; identities of items with none are zero.
            content: (I, F), for a head with content; kept in half precision, read standardised over the catalogue.
        """
        self.counts.copy_(counts)
        if self.config.identity:
            self.identity[counts == 0] = 0
        if not self.config.content_size:
            return
        if content is None or content.shape != self.content.shape:
            raise ValueError(
                f"the content of {self.config.n_items} items is {tuple(self.content.shape)}, "
                f"not {None if content is None else tuple(content.shape)}"
            )
        self.mean.copy_(content.float().mean(dim=0))
        self.deviation.copy_(content.float().std(dim=0, correction=0).clamp(min=1e-6))
        self.content.copy_(content)
        self.find_neighbours(torch.arange(self.config.n_items, device=self.counts.device))

    def find_neighbours(self, codes: Tensor) -> None:
        """Find the neighbours of the items with these (N,) codes again, whose content has changed."""
        if self.config.neighbours:
            self.near[codes] = self._near(self.content[codes], codes)

    def take_items(self, rows: Tensor) -> None:
        """Go over to (M,) items that have these codes among the present ones, ``PADDING`` for new ones, which have been
        chosen by nobody yet; :meth:`find_neighbours` of them is still to come."""
        if self.config.neighbours:
            self.near = renumbered(taken(self.near, rows), rows, self.config.n_items)
        if self.config.identity:
            self.identity = nn.Parameter(taken(self.identity.data, rows), requires_grad=False)
        self.config = replace(self.config, n_items=len(rows))

    def _near(self, content: Tensor, own: Tensor) -> Tensor:
        return nearest_chosen(content, own, self.content, self.counts, self.config.neighbours)

    def item_vectors(self, codes: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """(N, D): v of the items with these (N,) codes, of the whole catalogue for None.

        In training a random share of them goes without its identity, see ``identity_dropout``.

        Args:
            hidden: (I,) bool, items to be taken as if nobody had ever chosen them.
        """
        counts = self.counts if hidden is None else self.counts * ~hidden
        counts = counts if codes is None else counts[codes]
        whole = counts > 0
        if self.training and self.config.content_size and self.config.identity_dropout:
            whole = whole & (torch.rand(len(counts), device=counts.device) >= self.config.identity_dropout)
        vectors = torch.zeros(len(counts), self.config.hidden, device=counts.device)
        if self.config.content_size:
            content = self.content if codes is None else self.content[codes]
            vectors = self._read(content, torch.where(whole, counts, 0) if self.config.identity else counts)
        if self.config.identity:
            identity = (self.identity if codes is None else self.identity[codes]) * whole[:, None]
            vectors = self._join(vectors, identity)
        if self.config.neighbours:
            near = self.near if codes is None else self.near[codes]
            vectors = vectors + mean_of(self.identity, near, hidden)
        return self._scaled(vectors)

    def new_item_vectors(self, content: Tensor) -> Tensor:
        """(N, D): v of items outside the catalogue from their (N, F) content alone."""
        if not self.config.content_size:
            raise ValueError("this head knows items by their identity alone: it cannot rank new ones")
        vectors = self._read(content, torch.zeros(len(content), dtype=torch.int32, device=content.device))
        vectors = self._join(vectors, torch.zeros_like(vectors)) if self.config.identity else vectors
        if self.config.neighbours:
            own = torch.full((len(content),), PADDING, device=content.device)
            vectors = vectors + mean_of(self.identity, self._near(content, own))
        return self._scaled(vectors)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) * self.log_length.exp() if self.config.unit_items else vectors

    def _join(self, content: Tensor, identity: Tensor) -> Tensor:
        joined = self.config.joined
        return self.project(torch.cat([identity, content], dim=-1)) if joined else content + identity

    def _read(self, content: Tensor, counts: Tensor) -> Tensor:
        vectors = self.reader((content.float() - self.mean) / self.deviation)
        if self.config.gate:
            vectors = vectors * self.gate[frequency_gates(counts)][:, None]
        return vectors

    def encode(self, vectors: Tensor, lengths: Tensor) -> SequenceHeadOutput:
        """Read (B, L, D) vectors of histories, oldest first, of which the first (B,) ``lengths`` are real."""
        states = self.encoder(vectors * self.config.hidden**0.5, lengths)
        place = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, states.shape[-1])
        last = states.gather(1, place)[:, 0] * (lengths > 0)[:, None]
        return SequenceHeadOutput(states=states, last=last)

    def forward(self, histories: Tensor, vectors: Tensor | None = None) -> SequenceHeadOutput:
        """Read (B, L) item codes, oldest first, ``PADDING`` after the last.

        ``vectors``: (N, D), what codes stand for, if not :meth:`item_vectors` of the catalogue: with further rows for
        new items, or kept from an earlier call.
        """
        vectors = self.item_vectors() if vectors is None else vectors
        histories = last_places(histories, self.config.max_length)
        real = histories != PADDING
        read = F.embedding(histories.clamp(min=0), vectors) * real[..., None]
        return self.encode(read, real.sum(dim=1))

    def user_states(self, histories: Tensor, vectors: Tensor) -> Tensor:
        """(B, D): the states after (B, L) item codes, see :meth:`forward`; zero for an empty history."""
        return self(histories, vectors).last

    def score(self, histories: Tensor, candidates: Tensor, vectors: Tensor | None = None) -> Tensor:
        """(B, C): the score of given candidates (B, C), -inf at ``PADDING``."""
        vectors = self.item_vectors() if vectors is None else vectors
        last = self(histories, vectors).last
        scores = torch.einsum("bd,bcd->bc", last, F.embedding(candidates.clamp(min=0), vectors))
        return scores.masked_fill(candidates == PADDING, float("-inf"))

    def score_catalogue(self, histories: Tensor, vectors: Tensor | None = None) -> Tensor:
        """(B, N): the score of every item, as one product; items chosen before are the caller's to leave out."""
        vectors = self.item_vectors() if vectors is None else vectors
        return self(histories, vectors).last @ vectors.T


LENGTH = 2.0  # of item vectors of one length, to begin with
GATES = 12  # 0, 1, 2-3, 4-7, ... interactions, and 1,024 or more


def frequency_gates(counts: Tensor) -> Tensor:
    """(N,) places in the gate of items with (N,) training interactions.

    >>> frequency_gates(torch.tensor([0, 1, 2, 3, 4, 5000])).tolist()
    [0, 1, 2, 2, 3, 11]
    """
    return torch.where(counts > 0, counts.clamp(min=1).float().log2().long() + 1, 0).clamp(max=GATES - 1)


def last_places(histories: Tensor, length: int) -> Tensor:
    """(B, at most ``length``): the last items of (B, L) padded histories.

    >>> last_places(torch.tensor([[1, 2, 3], [4, -1, -1]]), 2).tolist()
    [[2, 3], [4, -1]]
    """
    if histories.shape[1] <= length:
        return histories
    skipped = ((histories != PADDING).sum(dim=1, keepdim=True) - length).clamp(min=0)
    return histories.gather(1, skipped + torch.arange(length, device=histories.device))

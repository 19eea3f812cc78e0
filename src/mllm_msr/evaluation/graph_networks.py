"""The graph of users and items, whose edges are interactions, and the networks that read it: MMGCN and MGAT.

A node begins as its content, read by one layer, or as what was learnt of a preference, and has an identity, which
enters each layer. A layer makes a node of itself, its neighbours and its identity.

Both papers have a graph for each modality and add up what these say. We have one vector an item, in which a language
model has read text and image together: one graph.
Letters: U users, I items, E edges, F content features, D hidden, T targets and S sources of edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm_msr.evaluation.coded_tasks import CodedLists


@dataclass(frozen=True)
class Edges:
    """Edges by target: ``sources`` (E,), those of target t from ``bounds[t]`` to ``bounds[t + 1]``."""

    sources: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, lists: CodedLists) -> "Edges":
        """From the items of lists to their owners."""
        return cls(torch.from_numpy(lists.codes), torch.from_numpy(lists.bounds))

    @cached_property
    def degrees(self) -> Tensor:
        """(T,): edges to each target."""
        return self.bounds.diff()

    @cached_property
    def targets(self) -> Tensor:
        """(E,)."""
        return torch.arange(len(self.degrees)).repeat_interleave(self.degrees)

    def turned(self, n_sources: int) -> "Edges":
        """The same edges, from targets to sources.

        >>> turned = Edges(torch.tensor([2, 0, 2]), torch.tensor([0, 2, 3])).turned(3)
        >>> turned.sources.tolist(), turned.bounds.tolist()
        ([0, 0, 1], [0, 1, 1, 3])
        """
        order = self.sources.argsort(stable=True)
        counts = torch.bincount(self.sources, minlength=n_sources)
        return Edges(self.targets[order], F.pad(counts.cumsum(0), (1, 0)))

    def mean(self, values: Tensor) -> Tensor:
        """(T, D): the mean of (S, D) values over each target's edges; zero without any."""
        return F.embedding_bag(self.sources, values, self.bounds, mode="mean", include_last_offset=True)

    def sum(self, values: Tensor, weights: Tensor) -> Tensor:
        """(T, D): the sum of (S, D) values over each target's edges, weighted by (E,)."""
        return F.embedding_bag(
            self.sources, values, self.bounds, mode="sum", include_last_offset=True, per_sample_weights=weights
        )

    def softmax(self, logits: Tensor) -> Tensor:
        """(E,): of (E,) logits among the edges of each target."""
        zero = torch.zeros(len(self.degrees))
        highest = zero.scatter_reduce(0, self.targets, logits.detach(), "amax", include_self=False)
        weights = (logits - highest[self.targets]).exp()
        return weights / zero.index_add(0, self.targets, weights)[self.targets]


class MeanLayer(nn.Module):
    """A layer of MMGCN: ``s(G s(mean over neighbours j of W x_j) + s(O x_i) + identity)``, s the leaky rectifier."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.read = nn.Linear(hidden, hidden, bias=False)
        self.combine, self.keep = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, own: Tensor, sources: Tensor, edges: Edges, identity: Tensor) -> Tensor:
        """(T, D) of (T, D) nodes, (S, D) neighbours, and (T, D) identities."""
        read = F.leaky_relu(self.neighbours(own, sources, edges))
        return F.leaky_relu(self.combine(read) + F.leaky_relu(self.keep(own)) + identity)

    def neighbours(self, own: Tensor, sources: Tensor, edges: Edges) -> Tensor:
        """(T, D): what a node reads of its neighbours."""
        return edges.mean(self.read(sources))


class AttentionLayer(MeanLayer):
    """A layer of MGAT: neighbours count by attention under a gate.

    With ``a_ij = <W x_i, s(W x_j)>`` and n_i neighbours of node i, neighbour j has the weight
    ``softmax over j of a_ij sigmoid(a_ij / sqrt(n_i))``.
    """

    def neighbours(self, own: Tensor, sources: Tensor, edges: Edges) -> Tensor:
        values, targets = self.read(sources), edges.targets
        alike = (self.read(own)[targets] * F.leaky_relu(values)[edges.sources]).sum(dim=1)
        gate = torch.sigmoid(alike / edges.degrees[targets].sqrt())
        return edges.sum(values, edges.softmax(alike * gate))


class GraphNetwork(nn.Module):
    """What reads the graph; see the module.

    Args:
        n_users: U.
        vectors: (I, F), the items' content, read standardised over the catalogue.
        trained: (I,), whether an item has training interactions; the others' identity is zero.
        layers: see :class:`MeanLayer`.
        hidden: D.
        all_layers: whether nodes are ranked by what all layers made of them, side by side, or by the last alone.
    """

    content: Tensor

    def __init__(
        self, n_users: int, vectors: Tensor, trained: Tensor, layers: Sequence[nn.Module], hidden: int, all_layers: bool
    ) -> None:
        super().__init__()
        centred = vectors - vectors.mean(dim=0)
        self.register_buffer("content", centred / centred.std(dim=0, correction=0).clamp(min=1e-6), persistent=False)
        self.reader = nn.Linear(vectors.shape[1], hidden)
        self.layers, self.all_layers = nn.ModuleList(layers), all_layers
        self.preferences = nn.Parameter(0.1 * torch.randn(n_users, hidden))
        self.user_identity = nn.Parameter(0.1 * torch.randn(n_users, hidden))
        self.item_identity = nn.Parameter(0.1 * torch.randn(len(vectors), hidden) * trained[:, None])

    def forward(self, to_users: Edges, to_items: Edges) -> tuple[Tensor, list[Tensor]]:
        """By the graph of training: (U, any) that users are ranked by, and (I, D) items before each layer and last."""
        users, items = [F.normalize(self.preferences)], [F.normalize(torch.tanh(self.reader(self.content)))]
        for layer in self.layers:
            read = layer(users[-1], items[-1], to_users, self.user_identity)
            items.append(layer(items[-1], users[-1], to_items, self.item_identity))
            users.append(read)
        return self.ranked_by(users), items

    def ranked_by(self, layers: Sequence[Tensor]) -> Tensor:
        """(T, any): what nodes are ranked by, of their (T, D) before each layer and last."""
        return torch.cat(list(layers[1:]), dim=1) if self.all_layers else layers[-1]

    def task_users(self, users: Tensor, edges: Edges, items: Sequence[Tensor]) -> Tensor:
        """(T, any) of the users of tasks.

        Args:
            users: (T,) numbers of the users; -1: not known from training.
            edges: to them, from the items of their histories.
            items: see :meth:`forward`.
        """
        known, number = (users >= 0)[:, None], users.clamp(min=0)
        read = [F.normalize(self.preferences[number]) * known]
        identity = self.user_identity[number] * known
        for layer, sources in zip(self.layers, items[:-1], strict=True):
            read.append(layer(read[-1], sources, edges, identity))
        return self.ranked_by(read)

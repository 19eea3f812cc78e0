"""MMGCN and MGAT on the graph of all training interactions, with the item vectors as their multi-modal content.

A user of a task is a node whose neighbours are the items of the task's history. One who is known from training has the
embeddings that were learnt of him; one who is not, as under the protocol ``paper``, has none (zero), and is what his
history's items make of him.

The loss is a softmax among drawn items, where the papers compare with one: it is better by validation. Like the
sequential baselines, these stop by validation and have no dropout of their own.
Letters: U users, I items, F content features, T tasks, B interactions of a batch, M drawn items, N (task, candidate)
pairs.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.evaluation.epochs import Epochs
from mllm_msr.evaluation.graph_networks import AttentionLayer, Edges, GraphNetwork, MeanLayer
from mllm_msr.evaluation.rankers import Ranker
from mllm_msr.records.storage import digest

PAIRS = 1 << 16  # of a task and a candidate that are scored at a time


@dataclass(frozen=True)
class GraphOptions:
    """What a network over the graph is like, and how it is trained.

    Args:
        hidden: width; layers: how often neighbours are read.
        batch_size: interactions a step; for each step the whole graph is read.
        negatives: items that are drawn for each step, uniformly from those of training.
        learning_rate, weight_decay: of AdamW.
        average: of the weights over the steps, see :class:`~mllm_msr.evaluation.sequence_training.FitOptions`.
        max_epochs: most epochs; ``patience``: how many without a better validation end the training.
    """

    hidden: int = 64
    layers: int = 2
    batch_size: int = 4096
    negatives: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    average: float = 0.99
    max_epochs: int = 100
    patience: int = 5


def mmgcn(
    validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, vectors: Array, **settings
) -> "GraphRanker":
    """Variant ``mmgcn``: multi-modal graph convolution (Wei et al., ACM Multimedia 2019), its element-wise form.

    Nodes are ranked by the last layer. Arguments as for :func:`train_graph`.
    """
    return train_graph("mmgcn", MeanLayer, False, validation, items, training, vectors, **settings)


def mgat(
    validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, vectors: Array, **settings
) -> "GraphRanker":
    """Variant ``mgat``: multi-modal graph attention (Tao et al., Information Processing and Management 2020).

    Nodes are ranked by all layers side by side. Arguments as for :func:`train_graph`.
    """
    return train_graph("mgat", AttentionLayer, True, validation, items, training, vectors, **settings)


def train_graph(
    name: str,
    layer: Callable[[int], nn.Module],
    all_layers: bool,
    validation: pl.DataFrame,
    items: pl.DataFrame,
    training: pl.DataFrame,
    vectors: Array,
    options: GraphOptions | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> "GraphRanker":
    """Train a network on the graph of all training interactions.

    Args:
        name: of the progress bar and of what is saved.
        layer, all_layers: see :class:`~mllm_msr.evaluation.graph_networks.GraphNetwork`.
        validation: tasks, see :class:`~mllm_msr.evaluation.coded_tasks.CodedTasks`, with ``user_id``.
        items: ``item_id`` of the whole catalogue.
        training: ``user_id``, ``item_id`` of every training interaction.
        vectors: (I, F), in the order of ``items.sort("item_id")``.
        folder: where epochs are saved, so that a killed training goes on and a finished one is not repeated.
    """
    options = options or GraphOptions()
    chosen = training.unique(maintain_order=True).group_by("user_id", maintain_order=True).agg("item_id")
    to_users = Edges.of(CodedLists.of(chosen["item_id"], items))
    to_items = to_users.turned(len(items))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer(options.hidden) for _ in range(options.layers)]
        trained = to_items.degrees > 0
        network = GraphNetwork(len(chosen), torch.from_numpy(vectors), trained, layers, options.hidden, all_layers)
        ranker = GraphRanker(network, (to_users, to_items), items, chosen["user_id"])
        progress = GraphTraining(ranker, validation, options, seed)
        total = hashlib.sha256()
        for array in (to_users.sources.numpy(), to_users.bounds.numpy(), vectors, progress.coded.candidates.codes):
            total.update(np.ascontiguousarray(array).data)
        key = digest(name, asdict(options), seed, total.hexdigest())
        progress.run(None if folder is None else folder / f"{name}-{key[:16]}.pt", name)
    return ranker


class GraphRanker(Ranker):
    """A network over a graph as a ranker of tasks.

    Args:
        network, graph: see :meth:`GraphNetwork.forward`.
        items: ``item_id`` of the whole catalogue.
        users: ids of those known from training, by their numbers.
    """

    def __init__(
        self, network: GraphNetwork, graph: tuple[Edges, Edges], items: pl.DataFrame, users: pl.Series
    ) -> None:
        super().__init__(items)
        self.network, self.graph = network, graph
        self.numbers = pl.DataFrame({"user_id": users}).with_row_index("number")

    def __call__(self, tasks: pl.DataFrame) -> Array:
        coded = CodedTasks(tasks, self.items)
        return self.score(coded.histories, coded.candidates, self.known(tasks))

    def catalogue(self, tasks: pl.DataFrame) -> Array:
        return self.score_catalogue(CodedLists.of(tasks["history"], self.items), self.known(tasks))

    def known(self, tasks: pl.DataFrame) -> Tensor:
        """(T,): the number of each task's user; -1 for one who is not known."""
        numbers = tasks.select("user_id").join(self.numbers, on="user_id", how="left", maintain_order="left")["number"]
        return torch.tensor(numbers.cast(pl.Int64).fill_null(-1).to_numpy())

    def score(self, histories: CodedLists, candidates: CodedLists, users: Tensor | None = None) -> Array:
        """(N,); ``users`` (T,): see :meth:`known`; nobody is known for None."""
        states, vectors = self.states(histories, users)
        pairs = (torch.from_numpy(places).split(PAIRS) for places in (candidates.owner, candidates.codes))
        values = [(states[owner] * vectors[codes]).sum(dim=1) for owner, codes in zip(*pairs, strict=True)]
        return torch.cat([torch.empty(0), *values]).numpy()

    def score_catalogue(self, histories: CodedLists, users: Tensor | None = None) -> Array:
        """(T, I); ``users`` (T,): see :meth:`known`; nobody is known for None."""
        states, vectors = self.states(histories, users)
        return (states @ vectors.T).numpy()

    @torch.inference_mode()
    def states(self, histories: CodedLists, users: Tensor | None) -> tuple[Tensor, Tensor]:
        """(T, any) of the users and (I, any) of the items, less the mean of the catalogue.

        No user's order depends on the mean, but users can then be pooled.
        """
        users = torch.full((len(histories),), -1) if users is None else users
        _, items = self.network.eval()(*self.graph)
        vectors = self.network.ranked_by(items)
        return self.network.task_users(users, Edges.of(histories), items), vectors - vectors.mean(dim=0)


class GraphTraining(Epochs[GraphNetwork]):
    """The training of a ranker's network; ``tasks`` are those of validation."""

    def __init__(self, ranker: GraphRanker, tasks: pl.DataFrame, options: GraphOptions, seed: int) -> None:
        super().__init__(ranker.network, options, seed)
        self.network, self.graph = ranker.network, ranker.graph
        self.judged = GraphRanker(self.averaged, ranker.graph, ranker.items, ranker.numbers["user_id"])
        self.coded, self.known = CodedTasks(tasks, ranker.items), ranker.known(tasks)
        to_users, to_items = ranker.graph
        self.users, self.items = to_users.targets, to_users.sources
        self.trained = to_items.degrees.nonzero()[:, 0]

    def batches(self, rng: np.random.Generator) -> Sequence[Tensor]:
        return torch.from_numpy(rng.permutation(len(self.users))).split(self.options.batch_size)

    def loss(self, batch: Tensor, rng: np.random.Generator) -> Tensor:
        users, items = self.network(*self.graph)
        drawn = self.trained[torch.from_numpy(rng.integers(len(self.trained), size=self.options.negatives))]
        return drawn_loss(users[self.users[batch]], self.network.ranked_by(items), self.items[batch], drawn)

    def quality(self) -> float:
        return self.coded.quality(self.judged.score(self.coded.histories, self.coded.candidates, self.known))


def drawn_loss(users: Tensor, vectors: Tensor, items: Tensor, drawn: Tensor) -> Tensor:
    """Mean cross-entropy of (B,) ``items`` for (B, D) ``users``, each among the (M,) ``drawn``, by (I, D) ``vectors``.

    >>> float(drawn_loss(torch.zeros(1, 2), torch.ones(3, 2), torch.tensor([0]), torch.tensor([0, 1])).exp())  # 0 or 1
    2.0
    """
    own = (users * vectors[items]).sum(dim=1, keepdim=True)
    others = (users @ vectors[drawn].T).masked_fill(drawn == items[:, None], -torch.inf)
    return F.cross_entropy(torch.cat([own, others], dim=1), torch.zeros(len(items), dtype=torch.int64))

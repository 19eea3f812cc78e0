"""SASRec and GRU4Rec in plain torch, trained on the training sequences and stopped by the validation tasks.

Both read a history as item codes and predict the next item at every place by the softmax over the catalogue (over a
shared sample of it, where it is large). Letters: B sequences, L places, D hidden, I items, C candidates.
"""

import copy
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.nn import functional as F

from mllm_msr.evaluation.baselines import CodedTasks, Ranker, item_codes

Array = np.ndarray


@dataclass(frozen=True)
class SequenceOptions:
    """How the networks are built and trained; the same for both, for every data set."""

    hidden: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3
    max_length: int = 100
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    most_classes: int = 4096  # of the softmax; a larger catalogue is sampled anew for every batch
    max_epochs: int = 200
    patience: int = 8  # epochs without a better NDCG@5 on the validation tasks


class SASRec(nn.Module):
    """Self-attentive sequential recommendation (Kang and McAuley, ICDM 2018): a causal transformer over items."""

    def __init__(self, n_items: int, options: SequenceOptions) -> None:
        super().__init__()
        self.item = nn.Embedding(n_items + 1, options.hidden, padding_idx=0)
        self.place = nn.Embedding(options.max_length, options.hidden)
        self.dropout = nn.Dropout(options.dropout)
        layer = nn.TransformerEncoderLayer(
            options.hidden, options.heads, 2 * options.hidden, options.dropout, "gelu", 1e-5, True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(options.hidden)
        _initialise(self, self.item)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, L) items from 1, padded with 0 on the left, to (B, L, D): what stands for the next item at each place."""
        length = codes.shape[1]
        places = torch.arange(length - 1, -1, -1, device=codes.device)  # counted from the end: the latest is 0
        hidden = self.dropout(self.item(codes) * self.item.embedding_dim**0.5 + self.place(places))
        causal = torch.ones(length, length, dtype=torch.bool, device=codes.device).triu(1)
        unseen = causal[None] | (codes == 0)[:, None, :]
        unseen = unseen & ~torch.eye(length, dtype=torch.bool, device=codes.device)  # padding may look at itself
        heads = self.blocks.layers[0].self_attn.num_heads
        return self.norm(self.blocks(hidden, mask=unseen.repeat_interleave(heads, dim=0)))


class GRU4Rec(nn.Module):
    """Session-based recommendation with recurrent networks (Hidasi et al., ICLR 2016; softmax over sampled items)."""

    def __init__(self, n_items: int, options: SequenceOptions) -> None:
        super().__init__()
        self.item = nn.Embedding(n_items + 1, options.hidden, padding_idx=0)
        self.dropout = nn.Dropout(options.dropout)
        # without biases a state of zero stays zero while there is nothing but padding
        self.gru = nn.GRU(options.hidden, 2 * options.hidden, bias=False, batch_first=True)
        self.out = nn.Linear(2 * options.hidden, options.hidden)
        _initialise(self, self.item)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """As :meth:`SASRec.forward`; padding on the left leaves the state at zero."""
        hidden, _ = self.gru(self.dropout(self.item(codes) * self.item.embedding_dim**0.5))
        return self.out(self.dropout(hidden))


def _initialise(model: nn.Module, item: nn.Embedding) -> None:
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
    with torch.no_grad():
        item.weight[0] = 0


def sequence_ranker(
    kind: type[SASRec] | type[GRU4Rec],
    validation: pl.DataFrame,
    items: pl.DataFrame,
    training: pl.DataFrame,
    seed: int = 0,
    options: SequenceOptions | None = None,
) -> Ranker:
    """Rows ``sasrec`` and ``gru4rec``: logits of every task's candidates given its history.

    Trains on each user's training interactions in the order of ``training``, epoch by epoch, and keeps the weights with
    the best NDCG@5 on the validation tasks. Arguments as for :func:`mllm_msr.evaluation.baselines.knn`.
    """
    options = options or SequenceOptions()
    sequences = training.group_by("user_id", maintain_order=True).agg("item_id")["item_id"].to_list()
    sequences = [item_codes(pl.Series(one, dtype=pl.String), items) + 1 for one in sequences if len(one) > 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(len(items), options)
        epoch, quality = train(model, sequences, CodedTasks(validation, items), options, seed)
    print(f"  {kind.__name__}: epoch {epoch} is best by validation (NDCG@5 {quality:.3f})", flush=True)
    return lambda tasks: score(model, CodedTasks(tasks, items), options)


def train(
    model: SASRec | GRU4Rec, sequences: list[Array], validation: CodedTasks, options: SequenceOptions, seed: int
) -> tuple[int, float]:
    """Train until validation has not improved for ``patience`` epochs; restores and returns the best epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    rng = np.random.default_rng(seed)
    rows = windows(sequences, options.max_length + 1)
    best, kept, epoch = (0, 0.0), copy.deepcopy(model.state_dict()), 0
    while epoch < options.max_epochs and epoch - best[0] < options.patience:
        epoch += 1
        model.train()
        for places in np.array_split(rng.permutation(len(rows)), -(-len(rows) // options.batch_size)):
            batch = pad_left([rows[place] for place in places])
            loss = next_item_loss(model, batch, options, rng)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        quality = validation.quality_of(score(model, validation, options))
        if quality > best[1]:
            best, kept = (epoch, quality), copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return best


def next_item_loss(
    model: SASRec | GRU4Rec, batch: torch.Tensor, options: SequenceOptions, rng: np.random.Generator
) -> torch.Tensor:
    """Mean cross-entropy of the next item at every place of (B, L + 1) item codes, 0 where there is none."""
    hidden = model(batch[:, :-1])
    real = batch[:, :-1] > 0
    hidden, targets = hidden[real], batch[:, 1:][real]
    n_items = model.item.num_embeddings - 1
    classes = torch.arange(1, n_items + 1)
    if n_items > options.most_classes:
        drawn = torch.from_numpy(rng.integers(1, n_items + 1, options.most_classes))
        classes = torch.cat([drawn, targets]).unique()
    return F.cross_entropy(hidden @ model.item(classes).T, torch.searchsorted(classes, targets))


@torch.inference_mode()
def score(model: SASRec | GRU4Rec, tasks: CodedTasks, options: SequenceOptions, batch_size: int = 256) -> Array:
    """(N,): the logit of every candidate, task after task."""
    model.eval()
    values = []
    for begin in range(0, len(tasks.histories), batch_size):
        batch = pad_left([one[-options.max_length :] + 1 for one in tasks.histories[begin : begin + batch_size]])
        last = model(batch)[:, -1]
        for user, shown in zip(last, tasks.candidates[begin : begin + batch_size], strict=True):
            values.append((model.item(torch.from_numpy(shown + 1)) @ user).numpy())
    return np.concatenate(values)


def windows(sequences: list[Array], length: int) -> list[Array]:
    """Sequences cut from the end into pieces of at most ``length`` that share one item, so that each has its next."""
    pieces = []
    for one in sequences:
        for end in range(len(one), 1, -(length - 1)):
            pieces.append(one[max(0, end - length) : end])
    return pieces


def pad_left(rows: list[Array]) -> torch.Tensor:
    """(B, L) of the longest row's length, 0 on the left."""
    longest = max(1, *(len(row) for row in rows)) if rows else 1
    return torch.from_numpy(np.stack([np.pad(row, (longest - len(row), 0)) for row in rows]))

"""The networks that read the vectors of a history, and say at each place what may come next.

Letters: B histories, L places, D hidden.
"""

import torch
from torch import Tensor, nn

from .sequence_head_options import SequenceHeadOptions


def history_encoder(options: SequenceHeadOptions) -> nn.Module:
    """What takes (B, L, D) vectors and (B,) lengths to (B, L, D) states."""
    return {"transformer": Transformer, "gru": Recurrent, "both": Both}[options.encoder](options)


class Dropout(nn.Module):
    """As ``nn.Dropout``, its rate rounded to a 256th: a byte of random bits for each number.

    A CPU makes these thirteen times faster than the numbers that torch compares with the rate, which took a fifth of
    the training.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = round(256 * rate)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return values
        words = torch.empty(-(-values.numel() // 8), dtype=torch.int64, device=values.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= self.dropped
        return values * kept * (256 / (256 - self.dropped))


class Transformer(nn.Module):
    """A causal transformer. Padding stands last: no real place sees it.

    Order is told twice. A learnt bias of attention for each distance is the same wherever in a history two items are. A
    vector for each number of items that follow is not: it says how long ago a place is, and in training logs whose
    items come and go the latest places are those most like the task.
    """

    def __init__(self, config: SequenceHeadOptions) -> None:
        super().__init__()
        self.place = nn.Embedding(config.max_length, config.hidden)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        following = lengths[:, None] - 1 - torch.arange(vectors.shape[1], device=vectors.device)
        hidden = self.dropout(vectors + self.place(following.clamp(min=0)))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


class Layer(nn.Module):
    """Causal self-attention and a feed-forward network, each on the normalised input and added to it."""

    def __init__(self, config: SequenceHeadOptions) -> None:
        super().__init__()
        self.heads = config.heads
        self.distance = nn.Parameter(torch.zeros(config.heads, config.max_length))
        self.before_attention, self.before_mixing = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)
        self.project, self.out = nn.Linear(config.hidden, 3 * config.hidden), nn.Linear(config.hidden, config.hidden)
        self.mix = nn.Sequential(
            nn.Linear(config.hidden, 2 * config.hidden),
            nn.GELU(),
            Dropout(config.dropout),
            nn.Linear(2 * config.hidden, config.hidden),
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.project(self.before_attention(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        place = torch.arange(hidden.shape[1], device=hidden.device)
        away = place[:, None] - place
        bias = self.distance[:, away.clamp(min=0)].masked_fill(away < 0, float("-inf"))  # (heads, L, L)
        shares = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias).softmax(dim=-1)  # (B, heads, L, L)
        attended = self.dropout(shares) @ value  # (B, heads, L, D / heads)
        hidden = hidden + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return hidden + self.dropout(self.mix(self.before_mixing(hidden)))


class Recurrent(nn.Module):
    """A gated recurrent network, which reads padding last and so without harm."""

    def __init__(self, config: SequenceHeadOptions) -> None:
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.gru = nn.GRU(config.hidden, 2 * config.hidden, batch_first=True)
        self.out = nn.Linear(2 * config.hidden, config.hidden)

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        hidden, _ = self.gru(self.dropout(vectors))
        return self.out(self.dropout(hidden))


class Both(nn.Module):
    """A transformer and a recurrent network side by side, whose states are added.

    One knows how far away an item is, the other in which order items came; a sum of the two ranks better than either.
    """

    def __init__(self, config: SequenceHeadOptions) -> None:
        super().__init__()
        self.transformer, self.recurrent = Transformer(config), Recurrent(config)

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        return self.transformer(vectors, lengths) + self.recurrent(vectors, lengths)

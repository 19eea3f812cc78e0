"""Attention among blocks of one packed row: what two prompts share is computed once, and nothing is padded.

A row holds *roots*, which see only themselves, and *leaves*, each of which sees itself and one root of every group. In
``interaction="joint"`` a root is what a user's prompts begin with and a leaf is the rest of one prompt. In ``late``
users are one group of roots, candidates another, and a leaf is the few tokens that ask for the answer. All other layers
work on single tokens, so only attention has to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "mllm_msr_blocks"  # of the attention; it is sdpa wherever it is given no blocks
SHORT = 64  # leaves of up to so many tokens are computed against their roots in place, longer ones against copies

Layer = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (N, heads, L, width of a head)


@dataclass
class Past:
    """The keys and values of N roots, computed before.

    layers: of each layer. lengths: (N,) tokens of each root; what lies after them is padding.
    """

    layers: list[Layer]
    lengths: torch.Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def select(self, rows: torch.Tensor) -> "Past":
        """Some of the roots; neighbours in order are not copied."""
        first, count = int(rows[0]), len(rows)
        here: Any = rows
        if torch.equal(rows, torch.arange(first, first + count, device=rows.device)):
            here = slice(first, first + count)
        return Past([(keys[here], values[here]) for keys, values in self.layers], self.lengths[here])

    @classmethod
    def join(cls, parts: Sequence["Past"]) -> "Past":
        """The roots of several, padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        lengths = torch.cat([part.lengths for part in parts])
        width = max(part.layers[0][0].shape[2] for part in parts)
        layers = []
        for same in zip(*(part.layers for part in parts), strict=True):
            joined = []
            for tensors in zip(*same, strict=True):
                some = tensors[0].new_zeros(len(lengths), tensors[0].shape[1], width, tensors[0].shape[3])
                start = 0
                for tensor in tensors:
                    some[start : start + len(tensor), :, : tensor.shape[2]] = tensor
                    start += len(tensor)
                joined.append(some)
            layers.append((joined[0], joined[1]))
        return cls(layers, lengths)


@dataclass
class Blocks:
    """Which tokens of a packed row of T see which.

    Args:
        roots: for each group (N, L) places in the row, -1 after a root's last token.
        leaves: (P, L) places in the row, -1 after a leaf's last token.
        parents: for each group (P,) the root that each leaf sees.
        pictures: (T,) the number of the picture whose tokens see each other, -1 elsewhere; `None` if all is causal.
        past: groups computed before, in place of `roots`.
        keep: note the keys and values of the roots in `kept`, one list of layers for each group.
    """

    roots: list[torch.Tensor]
    leaves: torch.Tensor | None = None
    parents: list[torch.Tensor] = field(default_factory=list)
    pictures: torch.Tensor | None = None
    past: list[Past] | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        segments = [*self.roots] if self.leaves is None else [*self.roots, self.leaves]
        self.inside = [places >= 0 for places in segments]
        row = torch.cat([places[inside] for places, inside in zip(segments, self.inside, strict=True)])
        self.order = row.argsort()  # where each token of the row stands among the segments' outputs
        self.kept: list[list[Layer]] = [[] for _ in self.roots]
        sizes = [len(past) for past in self.past] if self.past is not None else [len(r) for r in self.roots]
        self.teams = [_teams(parent, size) for parent, size in zip(self.parents, sizes, strict=self.leaves is not None)]
        self.masks = [self._own_mask(places) for places in segments]
        if self.leaves is not None and self.masks[-1] is None:  # beside their roots they always need one
            self.masks[-1] = _causal(self.leaves.shape[1], self.leaves.device)[None, None]
        self.past_inside = [
            torch.arange(past.layers[0][0].shape[2], device=past.lengths.device) < past.lengths[:, None]
            for past in self.past or []
        ]

    def widest(self) -> int:
        """The most tokens that any token of the row sees."""
        own = self.leaves.shape[1] if self.leaves is not None else 0
        if self.past is not None:
            return own + sum(int(past.lengths.max()) for past in self.past)
        return own + sum(places.shape[1] for places in self.roots)

    def _own_mask(self, places: torch.Tensor) -> torch.Tensor | None:
        """(N, 1, L, L) what a segment's tokens see of it, where that is not simply what comes before."""
        if self.pictures is None:
            return None
        pictures = torch.where(places >= 0, self.pictures[places.clamp(min=0)], -1)
        same = (pictures[:, :, None] == pictures[:, None, :]) & (pictures[:, :, None] >= 0)
        return (same | _causal(places.shape[1], places.device))[:, None]


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    blocks: Blocks | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' `AttentionInterface`: of a packed row (1, heads, T, d), or plain without `blocks`."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("attention among blocks does not know capped logits")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    dropout = dropout if module.training else 0.0
    grouped = q.shape[1] != k.shape[1]
    outputs, groups = [], []
    for number, places in enumerate(blocks.roots):
        own = [tensor[places.clamp(min=0)].transpose(1, 2) for tensor in (q, k, v)]
        mask = blocks.masks[number]
        out = scaled_dot_product_attention(
            own[0],
            own[1],
            own[2],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(out.transpose(1, 2)[blocks.inside[number]])
        groups.append((own[1], own[2], blocks.inside[number]))
        if blocks.keep:
            blocks.kept[number].append((own[1], own[2]))
    if blocks.leaves is not None:
        layer: Any = module.layer_idx
        for past, inside in zip(blocks.past or [], blocks.past_inside, strict=True):
            groups.append((*past.layers[layer], inside))
        own = [tensor[blocks.leaves.clamp(min=0)].transpose(1, 2) for tensor in (q, k, v)]
        scale = scaling if scaling is not None else q.shape[-1] ** -0.5
        attend = _attend_in_place if blocks.leaves.shape[1] <= SHORT else _attend_to_copies
        out = attend(blocks, own, groups, scale, dropout)
        outputs.append(out.transpose(1, 2)[blocks.inside[-1]])
    return torch.cat(outputs)[blocks.order][None], None


def _attend_to_copies(
    blocks: Blocks, own: list[torch.Tensor], groups: list[Any], scale: float, dropout: float
) -> torch.Tensor:
    """(P, heads, L, d): each leaf beside copies of its roots' keys and values."""
    query, width = own[0], own[0].shape[2]
    seen: Any = blocks.masks[-1]
    masks = [
        inside[parent][:, None, None, :].expand(-1, -1, width, -1) for parent, (_, _, inside) in _of(blocks, groups)
    ]
    mask = torch.cat([*masks, seen.expand(len(query), -1, -1, -1)], -1)
    keys = torch.cat([*(keys[parent] for parent, (keys, _, _) in _of(blocks, groups)), own[1]], 2)
    values = torch.cat([*(values[parent] for parent, (_, values, _) in _of(blocks, groups)), own[2]], 2)
    grouped = query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def _attend_in_place(
    blocks: Blocks, own: list[torch.Tensor], groups: list[Any], scale: float, dropout: float
) -> torch.Tensor:
    """(P, heads, L, d): all leaves of a root in one product with its keys and values, which are not copied."""
    query, key, value = own
    count, heads, width, size = query.shape
    shared = key.shape[1]
    query = query.reshape(count, shared, -1, width, size) * scale  # (P, key heads, heads for each, L, d)
    seen: Any = blocks.masks[-1]
    hidden = torch.finfo(query.dtype).min
    scores = [(query @ key[:, :, None].transpose(-1, -2)).masked_fill(~seen[:, :, None], hidden)]
    for (members, place), (keys, _, inside) in zip(blocks.teams, groups, strict=True):
        team = query[members].movedim(2, 1)  # (N, key heads, most leaves of a root, heads for each, L, d)
        of_root = (team.flatten(2, 4) @ keys.transpose(-1, -2)).masked_fill(~inside[:, None, None], hidden)
        scores.append(of_root.unflatten(2, team.shape[2:5]).movedim(1, 2).flatten(0, 1)[place])
    chances = torch.cat(scores, -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    chances = drop(chances, dropout) if dropout else chances
    parts = chances.split([part.shape[-1] for part in scores], -1)
    out = parts[0] @ value[:, :, None]
    for (members, place), (_, values, _), part in zip(blocks.teams, groups, parts[1:], strict=True):
        team = part[members].movedim(2, 1)
        of_root = (team.flatten(2, 4) @ values).unflatten(2, team.shape[2:5])
        out = out + of_root.movedim(1, 2).flatten(0, 1)[place]
    return out.reshape(count, heads, width, size)


def _of(blocks: Blocks, groups: list[Any]) -> list[Any]:
    return list(zip(blocks.parents, groups, strict=True))


def _causal(width: int, device: torch.device) -> torch.Tensor:
    return torch.ones(width, width, dtype=torch.bool, device=device).tril()


def _teams(parent: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leaves of each root, (size, most), any leaf where there are fewer, and each leaf's place in that table."""
    order = parent.argsort(stable=True)
    counts = parent.bincount(minlength=size)
    rank = torch.arange(len(parent), device=parent.device) - (counts.cumsum(0) - counts)[parent[order]]
    most = int(counts.max())
    members = torch.zeros(size, most, dtype=torch.long, device=parent.device)
    members[parent[order], rank] = order
    place = torch.empty_like(parent)
    place[order] = parent[order] * most + rank
    return members, place


AttentionInterface.register(NAME, block_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

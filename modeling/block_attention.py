"""Attention in packed rows: what several prompts share is computed once, and nothing is padded.

A packed row holds *prefixes*, whose tokens see what precedes them in their own prefix, and *suffixes*, each of which
sees what precedes in itself and one prefix of every group. With ``interaction="joint"`` there is one group: a prefix is
what a user's prompts begin with, and a suffix is the rest of one prompt. With ``late`` users are one group, candidates
another, and a suffix is the few tokens that ask for the answer. All layers but attention work on single tokens, so only
attention has to know. Whatever it indexes by is a table of integers that `packing.py` makes on the host once a forward,
so no layer has shapes that depend on values, for which the host would wait.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK_ATTENTION = "mllm_msr_blocks"  # its name in transformers; it is sdpa for rows without a layout
SHORT = 64  # suffixes of up to so many tokens are computed against their prefixes in place, longer ones against copies


class PrefixesComputed(Exception):
    """The keys and values of all layers are there, for which alone a forward was made: its last layer ends it."""


@dataclass
class Segments:
    """N pieces of a packed row, each of up to L tokens that see one another.

    Args:
        places: (N, L) where the tokens stand in the row, 0 after the last.
        inside: (N, L) whether there is a token.
        mask: (N or 1, 1, L, L) which tokens see which; None where that is simply what precedes.
    """

    places: torch.Tensor
    inside: torch.Tensor
    mask: torch.Tensor | None

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(T, heads, d) of a row to (N, heads, L, d)."""
        return tensor[self.places].transpose(1, 2)

    def to(self, device: torch.device) -> "Segments":
        mask = self.mask.to(device, non_blocking=True) if self.mask is not None else None
        places, inside = self.places.to(device, non_blocking=True), self.inside.to(device, non_blocking=True)
        return Segments(places, inside, mask)


@dataclass
class KVCache:
    """The keys and values of N prefixes that were computed before.

    Args:
        layers: of each layer, keys and values (N, heads, L, d).
        inside: (N, L) whether there is a token.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    inside: torch.Tensor

    def __len__(self) -> int:
        return len(self.inside)

    @property
    def width(self) -> int:
        """The most tokens of a prefix."""
        return self.inside.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def select(self, rows: np.ndarray) -> "KVCache":
        """Some of the prefixes; neighbours in order are not copied."""
        chosen: Any = torch.from_numpy(rows).to(self.inside.device)
        if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            chosen = slice(int(rows[0]), int(rows[0]) + len(rows))
        return KVCache([(keys[chosen], values[chosen]) for keys, values in self.layers], self.inside[chosen])

    def padded(self, width: int) -> "KVCache":
        """The same with room for so many tokens."""
        if (more := width - self.width) == 0:
            return self
        pad = nn.functional.pad
        layers = [(pad(keys, (0, 0, 0, more)), pad(values, (0, 0, 0, more))) for keys, values in self.layers]
        return KVCache(layers, pad(self.inside, (0, more)))


@dataclass
class PrefixGroup:
    """N prefixes, of which each of P suffixes sees one.

    Args:
        prefixes: in the row, or computed before.
        prefix_of: (P,) the prefix that each suffix sees.
        suffixes: (N, M) the suffixes of each prefix, any suffix where it has fewer than M.
        slots: (P,) where each suffix stands in the flattened ``suffixes``.
        rows: (N,) which of ``prefixes`` the N are; None: all, in their order.
    """

    prefixes: Segments | KVCache
    prefix_of: torch.Tensor
    suffixes: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor | None = None

    @classmethod
    def of(cls, prefixes: Segments | KVCache, prefix_of: torch.Tensor, part: slice = slice(None)) -> "PrefixGroup":
        """``prefix_of``: (P,) of all suffixes, of which ``part`` are meant."""
        rows = None
        if len(prefix_of[part]) < len(prefix_of):
            rows, prefix_of = prefix_of[part].unique(return_inverse=True)
        order = prefix_of.argsort(stable=True)
        counts = prefix_of.bincount(minlength=len(prefixes.inside) if rows is None else len(rows))
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[prefix_of[order]]
        most = int(counts.max())
        suffixes = order.new_zeros(len(counts), most)
        suffixes[prefix_of[order], rank] = order
        slots = torch.empty_like(prefix_of)
        slots[order] = prefix_of[order] * most + rank
        return cls(prefixes, prefix_of, suffixes, slots, rows)

    def to(self, device: torch.device, prefixes: Segments | KVCache) -> "PrefixGroup":
        """With ``prefixes`` that are there already."""
        tables = (self.prefix_of, self.suffixes, self.slots, self.rows)
        moved: Any = (None if table is None else table.to(device, non_blocking=True) for table in tables)
        return PrefixGroup(prefixes, *moved)

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a tensor of all ``prefixes`` those of the N."""
        return tensor if self.rows is None else tensor[self.rows]


@dataclass
class SuffixPart:
    """Suffixes whose attention is computed together.

    Args:
        places: which of the row's.
        groups: what they see beside themselves, the row's prefixes before those of caches.
    """

    places: slice
    groups: list[PrefixGroup]


@dataclass
class Memory:
    """Where the m memory tokens of N candidates of a packed row stand, and which tokens they begin as the mean of.

    Args:
        places: (N, m). pools: (N, m, W) as many tokens for each, any where there are fewer; shares: (N, m, W) of the
            mean, 0 for those that do not count.
    """

    places: torch.Tensor
    pools: torch.Tensor
    shares: torch.Tensor

    def to(self, device: torch.device) -> "Memory":
        return Memory(*(each.to(device, non_blocking=True) for each in (self.places, self.pools, self.shares)))

    def put(self, embedded: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        """(1, T, D) with the memory tokens in it, each a mean and what is ``learned``: (m, D)."""
        means = (embedded[0, self.pools] * self.shares[..., None].to(embedded.dtype)).sum(2)
        memory = (means + learned.to(embedded.dtype)).flatten(0, 1)
        return embedded.index_copy(1, self.places.flatten(), memory[None])


@dataclass
class BlockLayout:
    """Which tokens of a packed row of T see which.

    Args:
        prefixes: those of the row, group by group.
        visible: of each group's prefixes what the suffixes see: the same object, or their memory tokens only.
        suffixes: those of the row, if there are any; their mask is never None.
        parts: the suffixes, as many together as their scores may take room.
        order: (T,) where each token of the row stands among the flattened ``prefixes`` and ``suffixes``.
        kept: where the keys and values of what is visible of the first group are put, layer by layer, in a row without
            suffixes; its forward then ends with :class:`PrefixesComputed`.
        memory: the memory tokens among the prefixes, if there are any.
    """

    prefixes: list[Segments]
    visible: list[Segments]
    suffixes: Segments | None
    parts: list[SuffixPart]
    order: torch.Tensor
    kept: KVCache | None = None
    memory: Memory | None = None

    @property
    def width(self) -> int:
        """The most tokens that any token of the row sees, itself included."""
        widths = [segments.inside.shape[1] for segments in self.prefixes]
        if self.suffixes is not None:
            seen = (self.suffixes, *(group.prefixes for group in self.parts[0].groups))
            widths.append(sum(each.inside.shape[1] for each in seen))
        return max(widths)

    def to(self, device: torch.device) -> "BlockLayout":
        """All tables on the device of the model."""
        moved = {id(each): each.to(device) for each in [*self.prefixes, *self.visible]}
        prefixes, visible = ([moved[id(each)] for each in some] for some in (self.prefixes, self.visible))
        parts = [
            SuffixPart(
                part.places, [group.to(device, moved.get(id(group.prefixes), group.prefixes)) for group in part.groups]
            )
            for part in self.parts
        ]
        suffixes = self.suffixes.to(device) if self.suffixes is not None else None
        order, memory = self.order.to(device, non_blocking=True), self.memory.to(device) if self.memory else None
        return BlockLayout(prefixes, visible, suffixes, parts, order, self.kept, memory)

    def keep(self, key: torch.Tensor, value: torch.Tensor, layers: int) -> None:
        """Keep a layer's keys and values (T, heads, d); the last of so many layers ends the forward."""
        kept: Any = self.kept
        kept.layers.append(tuple(self.visible[0].gather(tensor).contiguous() for tensor in (key, value)))
        if len(kept.layers) == layers:
            raise PrefixesComputed  # by a method of the layout, as this file may be loaded twice


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    block_layout: BlockLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' `AttentionInterface`: of a packed row (1, heads, T, d), or sdpa without a layout."""
    if block_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("block attention does not know capped logits")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    if block_layout.kept is not None:
        config: Any = module.config
        block_layout.keep(k, v, config.num_hidden_layers)
    dropout = dropout if module.training else 0.0
    outputs: list[torch.Tensor] = []
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of each group of prefixes
    for segments, visible in zip(block_layout.prefixes, block_layout.visible, strict=True):
        queries, keys, values = (segments.gather(tensor) for tensor in (q, k, v))
        output = _sdpa(queries, keys, values, segments.mask, scaling, dropout)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        seen.append((keys, values) if visible is segments else (visible.gather(k), visible.gather(v)))
    suffixes, parts = block_layout.suffixes, block_layout.parts
    if suffixes is not None:
        layer: Any = module.layer_idx
        # not by type: this file may be loaded twice, from the package and from a repository, and the last is registered
        cached: list[Any] = [group.prefixes for group in parts[0].groups if hasattr(group.prefixes, "layers")]
        seen += [prefixes.layers[layer] for prefixes in cached]
        own = [suffixes.gather(tensor) for tensor in (q, k, v)]
        scale = scaling if scaling is not None else q.shape[-1] ** -0.5
        attend = _attend_in_place if suffixes.inside.shape[1] <= SHORT else _attend_to_copies
        if len(parts) > 1 and torch.is_grad_enabled():  # the scores of one part at a time are kept for its gradients
            attend = partial(checkpoint, attend, use_reentrant=False)
        for part in parts:
            some: Any = [tensor[part.places] for tensor in own]
            mask: Any = suffixes.mask
            output = attend(mask if len(mask) == 1 else mask[part.places], part.groups, some, seen, scale, dropout)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[block_layout.order][None], None


def _attend_to_copies(
    own_mask: Any,
    groups: list[PrefixGroup],
    own: list[torch.Tensor],
    seen: list[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """(P, heads, L, d): each suffix beside copies of its prefixes' keys and values."""
    query, width = own[0], own[0].shape[2]
    masks = [
        group.pick(group.prefixes.inside)[group.prefix_of][:, None, None].expand(-1, -1, width, -1) for group in groups
    ]
    mask = torch.cat([*masks, own_mask.expand(len(query), -1, -1, -1)], -1)
    keys, values = (
        torch.cat(
            [*(group.pick(pair[side])[group.prefix_of] for group, pair in zip(groups, seen, strict=True)), tensor], 2
        )
        for side, tensor in enumerate(own[1:])
    )
    return _sdpa(query, keys, values, mask, scale, dropout)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention to what precedes, or as a mask says. On a CPU grouped heads are best left to torch whatever the shape;
    the fast kernels of GPUs know them only where there is no mask."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None and query.device.type == "cuda":
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_in_place(
    own_mask: Any,
    groups: list[PrefixGroup],
    own: list[torch.Tensor],
    seen: list[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """(P, heads, L, d): all suffixes of a prefix in one product with its keys and values, which are not copied."""
    query, key, value = own
    count, heads, width, size = query.shape
    query = query.reshape(count, key.shape[1], -1, width, size)  # (P, key heads, heads for each, L, d)
    scores = [_hide(_products(query, key[:, :, None]), own_mask[:, :, None])]
    for group, (keys, _) in zip(groups, seen, strict=True):
        queries = query[group.suffixes].movedim(2, 1)  # (N, key heads, M, heads for each, L, d)
        inside = group.pick(group.prefixes.inside)[:, None, None]
        by_prefix = _hide(_products(queries.flatten(2, 4), group.pick(keys)), inside)
        scores.append(by_prefix.unflatten(2, queries.shape[2:5]).movedim(1, 2).flatten(0, 1)[group.slots])
    weights = torch.cat(scores, -1).mul_(scale).softmax(-1).to(value.dtype)
    weights = drop(weights, dropout) if dropout else weights
    own_weights, *parts = weights.split([part.shape[-1] for part in scores], -1)
    output = (own_weights @ value[:, :, None]).float()
    for group, (_, values), part in zip(groups, seen, parts, strict=True):
        by_prefix = part[group.suffixes].movedim(2, 1)
        product = (by_prefix.flatten(2, 4) @ group.pick(values)).unflatten(2, by_prefix.shape[2:5])
        output = output + product.movedim(1, 2).flatten(0, 1)[group.slots]
    return output.to(value.dtype).reshape(count, heads, width, size)


def _products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(..., M, d) and (..., L, d) to (..., M, L) scores in float32: rounded to half precision they would lose more than
    all the rest of attention does, which kernels spare themselves, too.

    A GPU's product in half precision adds up in float32 anyway; but torch can hand that out only where nothing is
    trained, so while training its scores are rounded.
    """
    kind = queries.device.type
    if kind == "cuda" and torch.is_autocast_enabled(kind):
        queries, keys = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (queries, keys))
    keys = keys.transpose(-1, -2)
    with torch.autocast(kind, enabled=False):
        if kind != "cuda" or keys.dtype == torch.float32:
            return queries.float() @ keys.float()
        if torch.is_grad_enabled():
            return (queries.to(keys.dtype) @ keys).float()
        shape = torch.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
        left, right = (tensor.expand(*shape, -1, -1).flatten(0, -3) for tensor in (queries.to(keys.dtype), keys))
        return torch.bmm(left, right, out_dtype=torch.float32).unflatten(0, shape)


def _hide(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Scores without those of what is not seen."""
    return scores.masked_fill(~seen, -torch.inf)


AttentionInterface.register(BLOCK_ATTENTION, block_attention)
AttentionMaskInterface.register(BLOCK_ATTENTION, sdpa_mask)

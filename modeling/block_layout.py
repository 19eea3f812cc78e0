"""What a packed row holds: which tokens stand where, and which see which.

All of it is tables of integers that `packing.py` makes on the host once a forward, so no layer has shapes that depend
on values, for which the host would wait.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


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
        chosen = tensor.index_select(0, self.places.flatten())
        return chosen.unflatten(0, self.places.shape).transpose(1, 2)

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
        ranks: (P,) where each suffix stands among those of its prefix.
        rows: (N,) which of ``prefixes`` the N are; None: all, in their order.
    """

    prefixes: Segments | KVCache
    prefix_of: torch.Tensor
    suffixes: torch.Tensor
    ranks: torch.Tensor
    rows: torch.Tensor | None = None

    @classmethod
    def of(cls, prefixes: Segments | KVCache, prefix_of: torch.Tensor, part: slice = slice(None)) -> "PrefixGroup":
        """``prefix_of``: (P,) of all suffixes, of which ``part`` are meant."""
        rows = None
        if len(prefix_of[part]) < len(prefix_of):
            rows, prefix_of = prefix_of[part].unique(return_inverse=True)
        order = prefix_of.argsort(stable=True)
        counts = prefix_of.bincount(minlength=len(prefixes.inside) if rows is None else len(rows))
        ranks = torch.empty_like(prefix_of)
        ranks[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[prefix_of[order]]
        suffixes = order.new_zeros(len(counts), int(counts.max()))
        suffixes[prefix_of, ranks] = torch.arange(len(order), device=order.device)
        return cls(prefixes, prefix_of, suffixes, ranks, rows)

    def to(self, device: torch.device, prefixes: Segments | KVCache) -> "PrefixGroup":
        """With ``prefixes`` that are there already."""
        tables = (self.prefix_of, self.suffixes, self.ranks, self.rows)
        moved: Any = (None if table is None else table.to(device, non_blocking=True) for table in tables)
        return PrefixGroup(prefixes, *moved)

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a tensor of all ``prefixes`` those of the N."""
        return tensor if self.rows is None else tensor[self.rows]

    def by_prefix(self, tensor: torch.Tensor) -> torch.Tensor:
        """(P, heads, R, d) of the suffixes to (N, heads, M x R, d); there is nothing to look up for a single prefix."""
        chosen = tensor[None] if len(self.suffixes) == 1 else tensor[self.suffixes]
        return chosen.transpose(1, 2).flatten(2, 3)

    def by_suffix(self, tensor: torch.Tensor) -> torch.Tensor:
        """(N, heads, M x R, d) back to (P, heads, R, d)."""
        parts = tensor.unflatten(2, (self.suffixes.shape[1], -1)).transpose(1, 2)
        return parts[0] if len(parts) == 1 else parts[self.prefix_of, self.ranks]


@dataclass
class SuffixPart:
    """Suffixes whose attention is computed together.

    Args:
        places: which of the row's.
        groups: what they see beside themselves, the row's prefixes before those of caches.
        copies: each suffix behind the prefixes that it sees, if it is to see copies of their keys and values; its mask
            has the suffix's tokens for rows.
    """

    places: slice
    groups: list[PrefixGroup]
    copies: Segments | None = None


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
        whole: the keys and values (T, heads, d) of a layer whose queries are only those of answers; an empty list is
            filled with them, which ends the layer with :class:`PrefixesComputed`.
    """

    prefixes: list[Segments]
    visible: list[Segments]
    suffixes: Segments | None
    parts: list[SuffixPart]
    order: torch.Tensor
    kept: KVCache | None = None
    memory: Memory | None = None
    whole: list[torch.Tensor] | None = None

    @property
    def answers(self) -> torch.Tensor:
        """(P,) the last token of each suffix."""
        suffixes: Any = self.suffixes
        return suffixes.places.amax(1)

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
                part.places,
                [group.to(device, moved.get(id(group.prefixes), group.prefixes)) for group in part.groups],
                part.copies.to(device) if part.copies is not None else None,
            )
            for part in self.parts
        ]
        suffixes = self.suffixes.to(device) if self.suffixes is not None else None
        order, memory = self.order.to(device, non_blocking=True), self.memory.to(device) if self.memory else None
        return BlockLayout(prefixes, visible, suffixes, parts, order, self.kept, memory)

    def until_computed(self, forward: Callable[[], Any]) -> None:
        """Call what ends as soon as the keys and values are there for which this layout was made."""
        with suppress(PrefixesComputed):  # of this file, which may be loaded twice
            forward()

    def of_whole_row(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the row, which are kept by now; if not, keep these, which ends the layer."""
        whole: Any = self.whole
        if not whole:
            whole += [key, value]
            raise PrefixesComputed
        return whole[0], whole[1]

    def keep(self, key: torch.Tensor, value: torch.Tensor, layers: int) -> None:
        """Keep a layer's keys and values (T, heads, d); the last of so many layers ends the forward."""
        kept: Any = self.kept
        kept.layers.append(tuple(self.visible[0].gather(tensor).contiguous() for tensor in (key, value)))
        if len(kept.layers) == layers:
            raise PrefixesComputed

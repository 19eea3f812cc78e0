"""What a ``late`` model keeps of candidates: the hot part on its device, and with a folder all of it on the disk.

On a CPU a folder's shards are mapped and used where they lie, so the hot part is what the system keeps of the files,
for all processes together. On an accelerator, or without a folder, parts of many items are kept from call to call;
those used least recently go when there are too many. What a call needs is joined once, and the joined buffers replace
those that it came from.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch

from .block_layout import KVCache
from .eight_bits import from_eight_bits, to_eight_bits
from .item_shards import ShardFolder, ShardWriter, Tensors, join, nbytes, take

VIEW = 32  # so many neighbours of a mapped shard are used where they lie


class ItemStore:
    """The keys and values of candidates, or of users, by their keys.

    Args:
        max_bytes: what may be kept on the device from call to call.
        shards: on disk; None keeps nothing there.
        eight_bits: whether what is put is kept in eight bits (``eight_bits.py``), on the disk as on the device.
    """

    def __init__(
        self, device: torch.device, max_bytes: int, shards: ShardFolder | None, eight_bits: bool = False
    ) -> None:
        self.device, self.max_bytes, self.shards, self.eight_bits = device, max_bytes, shards, eight_bits
        self.mapped = shards is not None and device.type == "cpu"
        self.writer = ShardWriter(shards) if shards is not None else None
        self.parts: OrderedDict[int, Tensors] = OrderedDict()  # on the device; those used last are last
        self.places: dict[str, tuple[int, int]] = {}  # of each item the part and the row
        self.live: dict[int, set[str]] = {}  # of each part the items whose place it is
        self.numbers = count()
        self.computed_bytes = 0  # of the largest item that was put, as it is taken

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device."""
        return sum(map(nbytes, self.parts.values()))

    @property
    def item_bytes(self) -> int:
        """Of the largest item that was seen, as it is taken."""
        return max(self.computed_bytes, self.shards.item_bytes if self.shards is not None else 0)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Which of these are to be computed; the others can be read from now on."""
        absent = [key for key in keys if key not in self.places]
        if self.shards is None or not absent:
            return absent
        if any(key not in self.shards.places for key in absent):
            self.shards.refresh()
        return self.shards.map(absent)

    def put(self, keys: Sequence[str], prefixes: KVCache) -> None:
        """Add what was computed; it can be read after :meth:`flush`."""
        tensors = tensors_of(prefixes)
        self.computed_bytes = max(self.computed_bytes, nbytes(tensors) // len(keys))
        if self.eight_bits:
            tensors = to_eight_bits(tensors)
        if self.writer is not None:
            self.writer.put(keys, tensors)
        if not self.mapped:
            self._keep(keys, tensors)

    def flush(self) -> None:
        """Wait until all that was computed is on the disk; OSError if it cannot be written."""
        if self.writer is not None:
            self.writer.flush()

    def take(self, keys: Sequence[str]) -> Iterator[tuple[np.ndarray, KVCache]]:
        """All of these, none of which is missing, in parts: (N,) their places in ``keys``, and N prefixes."""
        if self.mapped:
            yield from self._take_mapped(keys)
            return
        self._load([key for key in keys if key not in self.places])
        wanted = _by_part(keys, self.places)
        if len(wanted) > 1:
            parts = [
                {kind: take(tensor, rows) for kind, tensor in self.parts[number].items()}
                for number, (_, rows) in wanted.items()
            ]
            self._keep([keys[place] for places, _ in wanted.values() for place in places], join(parts))
            wanted = _by_part(keys, self.places)
        ((number, (places, rows)),) = wanted.items()
        self.parts.move_to_end(number)
        part = {kind: take(tensor, rows) for kind, tensor in self.parts[number].items()}
        while self.nbytes > self.max_bytes and len(self.parts) > 1:
            self._drop(next(iter(self.parts)))
        yield np.array(places), cache_of(part)

    def _take_mapped(self, keys: Sequence[str]) -> Iterator[tuple[np.ndarray, KVCache]]:
        scattered: list[tuple[list[int], Tensors]] = []
        assert self.shards is not None
        for name, (places, rows) in _by_part(keys, self.shards.places).items():
            part = self._read(self.shards, name, rows)
            if len(rows) >= VIEW and rows[-1] - rows[0] < len(rows):  # others are copied anyway, best into one part
                yield np.array(places), cache_of(part)
            else:
                scattered.append((places, part))
        if scattered:
            places = [place for some, _ in scattered for place in some]
            yield np.array(places), cache_of(join([part for _, part in scattered]))

    @staticmethod
    def _read(shards: ShardFolder, name: str, rows: Sequence[int]) -> Tensors:
        """Some rows of a shard, which is read in one go where most of it is wanted."""
        shard = shards.shard(name)
        if 2 * len(rows) > len(next(iter(shard.tensors.values()))):
            shard.populate()
        return {kind: take(tensor, rows) for kind, tensor in shard.tensors.items()}

    def _load(self, keys: Sequence[str]) -> None:
        """From the disk to the device, all at once."""
        if not keys:
            return
        assert self.shards is not None
        wanted = _by_part(keys, self.shards.places)
        parts = [self._read(self.shards, name, rows) for name, (_, rows) in wanted.items()]
        on_host = join(parts, pinned=self.device.type == "cuda")
        on_device = {kind: tensor.to(self.device, non_blocking=True) for kind, tensor in on_host.items()}
        self._keep([keys[place] for places, _ in wanted.values() for place in places], on_device)

    def _keep(self, keys: Sequence[str], tensors: Tensors) -> None:
        number = next(self.numbers)
        self.parts[number], self.live[number] = tensors, set(keys)
        for row, key in enumerate(keys):
            old = self.places.get(key)
            self.places[key] = number, row
            if old is not None:
                self.live[old[0]].discard(key)
                if not self.live[old[0]]:
                    self._drop(old[0])

    def _drop(self, number: int) -> None:
        del self.parts[number]
        for key in self.live.pop(number):
            del self.places[key]


def tensors_of(prefixes: KVCache) -> Tensors:
    """By name, as they are kept: each layer's keys and values (N, heads, L, d), and whether there is a token (N, L)."""
    tensors = {"inside": prefixes.inside}
    for layer, (keys, values) in enumerate(prefixes.layers):
        tensors |= {f"keys.{layer}": keys, f"values.{layer}": values}
    return tensors


def cache_of(tensors: Tensors) -> KVCache:
    """The inverse of :func:`tensors_of`, from eight bits as well."""
    tensors = from_eight_bits(tensors)
    layers = [(tensors[f"keys.{layer}"], tensors[f"values.{layer}"]) for layer in range(len(tensors) // 2)]
    return KVCache(layers, tensors["inside"])


def _by_part(keys: Sequence[str], places: dict[str, tuple]) -> dict:
    """By part, in the order of rows: the places in ``keys`` and the rows of its items."""
    order = sorted(range(len(keys)), key=lambda place: places[keys[place]])
    wanted: dict = {}
    for place in order:
        part, row = places[keys[place]]
        wanted.setdefault(part, ([], []))
        wanted[part][0].append(place)
        wanted[part][1].append(row)
    return wanted

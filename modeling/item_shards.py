"""Files that each hold the tensors of many items, are written once and then only mapped, by any number of processes.

A shard is a safetensors file whose header names its items by their keys, in the order of the rows, so that no index can
disagree with it. ``index.json`` repeats what the headers say, as far as it is still wanted, so that a folder of
thousands opens with one read. Names are never used twice, and files appear whole or not at all: whatever is killed
leaves what was written before, and what is deleted stays readable for those who have it mapped. A file's name ends in
the checksums of its header, which are compared before it is used, and of its tensors, which :meth:`ShardFolder.check`
compares; and its header names the folder that it is of.
"""

import ctypes
import json
import logging
import os
import sys
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .eight_bits import plain_bytes

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]  # (N, ...) each: of N items

SHARD_BYTES, SHARD_ITEMS = 2**28, 512  # a shard is full when it has one of these; it is what a kill may cost
INDEX = "index.json"
LEFT_BEHIND = 3600  # seconds after which a half-written file is nobody's
POPULATE_READ = 22  # of Linux: map pages by the thousand, not one by one as they are touched
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


class BrokenShard(ValueError):
    """A file that is no whole shard."""


class Shard:
    """A mapped file: ``tensors`` are its memory, of which the system reads what is touched and keeps what is used.

    ``keys`` are those of its items. Raises BrokenShard if the file is cut off or something else.
    """

    def __init__(self, path: Path) -> None:
        start, header = read_header(path)
        self.path, self.start = path, start
        self.mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        self.populated, self.keys = False, items_of(header, path.parent.name)
        try:
            self.tensors: Tensors = {
                name: self.mapped[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
                .view(DTYPES[entry["dtype"]])
                .view(entry["shape"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (KeyError, TypeError, RuntimeError) as error:
            raise BrokenShard(f"{path} is no whole shard: {error}") from error
        if {len(tensor) for tensor in self.tensors.values()} != {len(self.keys)}:
            raise BrokenShard(f"{path} is no whole shard: it names {len(self.keys)} items and has others")

    @property
    def header_checksum(self) -> str:
        return f"{zlib.crc32(self.mapped[: self.start].numpy().data):08x}"

    @property
    def checksum(self) -> str:
        """Of the tensors, which are read for it."""
        return f"{zlib.crc32(self.mapped[self.start :].numpy().data):08x}"

    def populate(self) -> None:
        """Read the whole file in one go."""
        if sys.platform == "linux" and not self.populated:
            address, size = ctypes.c_void_p(self.mapped.data_ptr()), ctypes.c_size_t(self.mapped.nbytes)
            ctypes.CDLL(None).madvise(address, size, POPULATE_READ)  # where it is not known, pages come one by one
        self.populated = True


class ShardFolder:
    """The shards of a folder, of which items are found by their keys.

    Args:
        folder: it is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.places: dict[str, tuple[str, int]] = {}  # of each item the shard and the row
        self.keys: dict[str, list[str | None]] = {}  # of each shard's rows; None for what was dropped
        self.item_bytes = 0  # of the largest in what is mapped, as it is taken
        self._mapped: dict[str, Shard] = {}
        self._broken: set[str] = set()
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(map(_size, self.folder.glob("*.safetensors")))

    def refresh(self) -> None:
        """Take over what other processes have written and deleted; a broken file counts as not there."""
        listed = {path.name for path in self.folder.glob("*.safetensors")}
        if new := sorted(listed - self.keys.keys() - self._broken):
            index = _read_index(self.folder / INDEX)
            for name in new:
                try:
                    self._enter(name, index.get(name) or items_of(read_header(self.folder / name)[1], self.folder.name))
                except (BrokenShard, FileNotFoundError):
                    continue
        for name in self.keys.keys() - listed:
            self._forget(name)

    def check(self) -> None:
        """Read all shards, and delete those that are not as they were written, so that their items are missing."""
        self.refresh()
        for path in self.folder.glob("*.safetensors"):
            try:
                shard = self._open(path.name)
                if path.stem.endswith(shard.checksum):
                    continue
            except FileNotFoundError:
                continue
            except BrokenShard:
                pass
            logger.warning("%s is damaged: what it held of items is computed anew", path)
            path.unlink(missing_ok=True)
            if path.name in self.keys:
                self._forget(path.name)

    def _open(self, name: str) -> Shard:
        """A shard of this folder, and of the items that the index says; BrokenShard if it is another."""
        shard = Shard(self.folder / name)
        if name.split("-")[1:2] != [shard.header_checksum]:
            raise BrokenShard(f"{shard.path} is not as it was written")
        keys = self.keys.get(name, shard.keys)
        if len(keys) != len(shard.keys) or any(
            ours not in (None, theirs) for ours, theirs in zip(keys, shard.keys, strict=True)
        ):
            raise BrokenShard(f"{shard.path} holds other items than {INDEX} says")
        return shard

    def enter(self, name: str, shard: Shard, keys: Sequence[str]) -> None:
        """Find these items in a shard that was written."""
        self._enter(name, keys)
        self._map(name, shard)

    def _enter(self, name: str, keys: Sequence[str | None]) -> None:
        self.keys[name] = list(keys)
        self.places.update({key: (name, row) for row, key in enumerate(keys) if key is not None})

    def _forget(self, name: str) -> None:
        self._mapped.pop(name, None)
        for row, key in enumerate(self.keys.pop(name)):
            if key is not None and self.places.get(key) == (name, row):
                del self.places[key]

    def map(self, keys: Iterable[str]) -> list[str]:
        """Map the shards of these items, so that they can be read whatever becomes of the files; those that are not
        there."""
        missing = []
        for key in keys:
            name = self.places.get(key, ("", 0))[0]
            if name and name not in self._mapped:
                try:
                    self._map(name, self._open(name))
                except (BrokenShard, FileNotFoundError):
                    self._forget(name)
                    self._broken.add(name)
            if key not in self.places:
                missing.append(key)
        return missing

    def _map(self, name: str, shard: Shard) -> None:
        self._mapped[name] = shard
        self.item_bytes = max(self.item_bytes, plain_bytes(shard.tensors) // len(self.keys[name]))

    def shard(self, name: str) -> Shard:
        """One that was mapped."""
        return self._mapped[name]

    def write(self, keys: Sequence[str], tensors: Tensors) -> tuple[str, Shard]:
        """Write a shard of these items; it and its name, to be entered. Raises OSError if it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)  # an index of a later model may have removed it
        part = self.folder / f"{uuid.uuid4().hex}.part"
        names = {"items": json.dumps(keys), "folder": self.folder.name}
        try:
            save_file({kind: tensor.contiguous() for kind, tensor in tensors.items()}, part, names)
            with part.open("rb") as file:
                os.fsync(file.fileno())  # or a power failure leaves a file of zeros under its name
            shard = Shard(part)
            name = f"{time.time_ns():x}-{shard.header_checksum}-{shard.checksum}.safetensors"  # in the order of writing
            os.replace(part, self.folder / name)
        except SafetensorError as error:
            raise OSError(f"{self.folder}: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        return name, shard

    def prune(self, wanted: Iterable[str]) -> int:
        """Drop all items but these; return how many there were.

        Shards of which less than half is wanted, or that are less than half full, are written anew together. Others
        keep the room of what they have lost.
        """
        self.refresh()
        wanted, before = set(wanted), len(self.places)
        sparse = {}
        for name, keys in self.keys.items():
            rows = [row for row, key in enumerate(keys) if key in wanted and self.places.get(key) == (name, row)]
            here = set(rows)
            keys[:] = [key if row in here else None for row, key in enumerate(keys)]
            size = _size(self.folder / name)
            if 2 * len(rows) < len(keys) or (2 * len(keys) < SHARD_ITEMS and 2 * size < SHARD_BYTES):
                sparse[name] = rows
        if len(sparse) > 1 or any(len(rows) < len(self.keys[name]) for name, rows in sparse.items()):
            self._rewrite(sparse)
        for key in self.places.keys() - wanted:
            del self.places[key]
        _write_index(self.folder / INDEX, self.keys)
        for path in self.folder.glob("*.part"):
            with suppress(FileNotFoundError):  # whole by now
                if path.stat().st_mtime < time.time() - LEFT_BEHIND:
                    path.unlink()
        return before - len(self.places)

    def _rewrite(self, sparse: Mapping[str, Sequence[int]]) -> None:
        """Write what is left of these shards anew, then delete them."""
        writer = ShardWriter(self)
        for name, rows in sparse.items():
            with suppress(BrokenShard, FileNotFoundError):  # another process has just done the same
                shard = self._open(name)
                if rows:
                    keys = [key for key in self.keys[name] if key is not None]
                    writer.put(keys, {kind: take(tensor, rows) for kind, tensor in shard.tensors.items()})
        writer.flush()
        for name in sparse:
            self._forget(name)
            (self.folder / name).unlink(missing_ok=True)


class ShardWriter:
    """Fills shards, and writes those that are full in a thread of its own, beside whatever computes the next items.

    Items of similar lengths share a shard, as all are padded to its longest.
    """

    def __init__(self, shards: ShardFolder) -> None:
        self.shards = shards
        self.thread = ThreadPoolExecutor(1, "item shards")
        self.writing: deque[tuple[list[str], Future[tuple[str, Shard]]]] = deque()
        self.filling: dict[int, list[tuple[list[str], Tensors]]] = {}

    def put(self, keys: Sequence[str], tensors: Tensors) -> None:
        """Add items; ``tensors`` are as of :class:`ItemStore`."""
        lengths = tensors["inside"].sum(1).cpu().numpy()
        kinds = np.ceil(2 * np.log2(lengths)).astype(int)
        for kind in np.unique(kinds):
            rows = np.flatnonzero(kinds == kind)
            part = {name: take(tensor, rows.tolist(), int(lengths[rows].max())) for name, tensor in tensors.items()}
            filling = self.filling.setdefault(int(kind), [])
            filling.append(([keys[row] for row in rows.tolist()], part))
            items = sum(len(keys) for keys, _ in filling)
            if items >= SHARD_ITEMS or sum(map(nbytes, (part for _, part in filling))) >= SHARD_BYTES:
                self._write(self.filling.pop(int(kind)))

    def flush(self) -> None:
        """Write what is there, and wait for it; OSError if something could not be written."""
        for filling in self.filling.values():
            self._write(filling)
        self.filling.clear()
        while self.writing:
            self._enter_oldest()

    def _write(self, filling: list[tuple[list[str], Tensors]]) -> None:
        keys = [key for some, _ in filling for key in some]
        parts = [part for _, part in filling]
        self.writing.append((keys, self.thread.submit(lambda: self.shards.write(keys, on_host(join(parts))))))
        while len(self.writing) > 2:  # no more than that waits in memory
            self._enter_oldest()

    def _enter_oldest(self) -> None:
        keys, written = self.writing.popleft()
        self.shards.enter(*written.result(), keys)


def take(tensor: torch.Tensor, rows: Sequence[int], width: int | None = None) -> torch.Tensor:
    """Some rows of a tensor of items, and of each the first ``width`` tokens; neighbours in order are not copied."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        chosen = tensor[rows[0] : rows[0] + len(rows)]
    else:
        chosen = tensor.index_select(0, torch.tensor(rows, device=tensor.device))
    return chosen.narrow(token_axis(tensor), 0, width) if width is not None else chosen


def join(parts: Sequence[Tensors], pinned: bool = False) -> Tensors:
    """The items of several, padded to the longest; ``pinned``: in memory from which an accelerator copies by itself."""
    if len(parts) == 1 and not pinned:
        return parts[0]
    joined = {}
    for name, first in parts[0].items():
        axis = token_axis(first)
        width = max(part[name].shape[axis] for part in parts)
        padded = [_padded(part[name], axis, width) for part in parts]
        shape = (sum(map(len, padded)), *padded[0].shape[1:])
        out = torch.empty(shape, dtype=first.dtype, device=first.device, pin_memory=pinned)
        joined[name] = torch.cat(padded, out=out)
    return joined


def _padded(tensor: torch.Tensor, axis: int, width: int) -> torch.Tensor:
    more = width - tensor.shape[axis]
    return nn.functional.pad(tensor, [0, 0] * (-1 - axis) + [0, more]) if more else tensor


def token_axis(tensor: torch.Tensor) -> int:
    """Where the tokens of (N, L) or (N, heads, L, d) are."""
    return -1 if tensor.ndim == 2 else -2


def _size(path: Path) -> int:
    """Bytes of a file, 0 if another process has just deleted it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def on_host(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and its header; BrokenShard if it is cut off or something else."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > path.stat().st_size:
                raise ValueError("cut off")
            header = json.loads(file.read(length))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if 8 + length + end != path.stat().st_size:
            raise ValueError("cut off")
        return 8 + length, header
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenShard(f"{path} is no whole shard: {error}") from error


def items_of(header: Mapping[str, Any], folder: str) -> list[str]:
    """The keys of a shard's items; BrokenShard if it says none, or is of another folder."""
    try:
        names = header["__metadata__"]
        keys = json.loads(names["items"])
    except (KeyError, ValueError, TypeError) as error:
        raise BrokenShard("its header names no items") from error
    if names.get("folder") != folder or not isinstance(keys, list):
        raise BrokenShard(f"its items are of {names.get('folder')}, another model")
    return keys


def _read_index(path: Path) -> dict[str, list[str | None]]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # the headers say the same
        return {}
    return {name: keys for name, keys in index.items() if isinstance(keys, list)} if isinstance(index, dict) else {}


def _write_index(path: Path, keys: Mapping[str, Sequence[str | None]]) -> None:
    part = path.with_name(f"{uuid.uuid4().hex}.part")
    part.write_text(json.dumps(keys), encoding="utf-8")
    os.replace(part, path)

"""What is kept of a late model's candidates: shards on the disk, the hot part on the device."""

import multiprocessing
import os
import signal
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from stored_items import fill, item

from mllm_msr.modeling import item_shards
from mllm_msr.modeling.block_layout import KVCache
from mllm_msr.modeling.eight_bits import to_eight_bits
from mllm_msr.modeling.item_shards import BrokenShard, Shard, ShardFolder, ShardWriter, join
from mllm_msr.modeling.item_store import ItemStore, cache_of, tensors_of

CPU = torch.device("cpu")


def batch(keys: list[str]) -> KVCache:
    return cache_of(join([tensors_of(item(key)) for key in keys]))


def check(store: ItemStore, keys: list[str]) -> int:
    """That all of these are there and right; in how many parts they come."""
    assert not store.missing(keys)
    seen: list[str] = []
    count = 0
    for places, part in store.take(keys):
        count += 1
        for row, place in enumerate(places):
            expected, length = item(keys[place]), 3 + int(keys[place]) % 9
            if store.eight_bits:
                expected = cache_of(to_eight_bits(tensors_of(expected)))
            assert part.inside[row].sum() == length
            for ours, theirs in zip(part.layers, expected.layers, strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    assert torch.equal(one[row, :, :length], other[0])
                    assert not one[row, :, length:].any()
            seen.append(keys[place])
    assert sorted(seen) == sorted(keys)
    return count


@pytest.fixture(params=product(["memory", "disk", "disk and device"], [False, True]), ids=str)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ItemStore:
    """Of each kind; an accelerator's way with a folder is the third, here with this device in its place."""
    where, eight_bits = request.param
    store = ItemStore(CPU, 10**9, None if where == "memory" else ShardFolder(tmp_path), eight_bits)
    store.mapped = where == "disk"
    return store


def test_what_was_put_is_taken_in_any_order(store: ItemStore) -> None:
    keys = [str(number) for number in range(20)]
    assert store.missing(keys) == keys
    for start in range(0, 20, 7):
        store.put(keys[start : start + 7], batch(keys[start : start + 7]))
    store.flush()
    assert store.missing([*keys, "99"]) == ["99"]
    for some in (keys, keys[::-1], ["3", "17", "5"], ["4"], ["2", "2"]):
        check(store, some)
    assert store.item_bytes >= sum(tensor.nbytes for tensor in tensors_of(item("8")).values())


def test_another_process_or_day_finds_it_and_joins_nothing_twice(store: ItemStore, tmp_path: Path) -> None:
    keys = [str(number) for number in range(40)]
    store.put(keys, batch(keys))
    store.flush()
    if store.shards is None:
        again = store
    else:
        again = ItemStore(CPU, 10**9, ShardFolder(tmp_path), store.eight_bits)
        again.mapped = store.mapped
    check(again, keys[5:25])
    if not again.mapped and not again.eight_bits:
        (first,) = (part for _, part in again.take(keys[5:25]))
        (second,) = (part for _, part in again.take(keys[5:25]))
        assert first.layers[0][0].data_ptr() == second.layers[0][0].data_ptr()


def test_what_is_used_least_goes_first_from_the_device() -> None:
    size = sum(tensor.nbytes for tensor in tensors_of(item("0")).values())
    store = ItemStore(CPU, 3 * size, None)
    for key in ("0", "9", "18"):  # of one length
        store.put([key], item(key))
        check(store, [key])
    check(store, ["0"])
    store.put(["27"], item("27"))
    check(store, ["27"])
    assert store.missing(["0", "9", "18", "27"]) == ["9"] and store.nbytes == 3 * size
    check(store, ["0", "18", "27"])  # joined, in place of what they were
    assert len(store.parts) == 1 and store.nbytes == 3 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_shard_holds_tensors_of_any_type_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"inside": torch.ones(2, 5, dtype=torch.bool), "keys.0": torch.randn(2, 3, 5, 4).mul(9).to(dtype)}
    shards = ShardFolder(tmp_path)
    name, shard = shards.write(["a", "b"], {**tensors, "scale.0": torch.rand(2, 3, 5, 1)})
    assert list(shard.tensors) and torch.equal(shard.tensors["keys.0"], tensors["keys.0"])
    shard.populate()
    assert ShardFolder(tmp_path).places == {"a": (name, 0), "b": (name, 1)}
    content = (tmp_path / name).read_bytes()
    for broken in (b"", content[:20], content[:-1], b"\xff" * 100, content + b"x"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(BrokenShard):
            Shard(tmp_path / name)
        assert not ShardFolder(tmp_path).places


def test_full_shards_are_written_beside_the_work_and_errors_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_shards, "SHARD_ITEMS", 4)
    shards = ShardFolder(tmp_path)
    writer = ShardWriter(shards)
    same = [str(9 * number) for number in range(10)]
    for key in same:
        writer.put([key], tensors_of(item(key)))
    writer.flush()
    assert sorted(len(keys) for keys in shards.keys.values()) == [2, 4, 4] and set(shards.places) == set(same)
    shards.folder = next(tmp_path.glob("*.safetensors"))
    writer.put(["1"], tensors_of(item("1")))
    with pytest.raises(OSError, match="File exists"):
        writer.flush()


def test_what_is_damaged_or_of_another_model_is_computed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = [str(number) for number in range(8)]
    folder, other = tmp_path / "model", tmp_path / "other"
    for where in (folder, other):
        writer = ShardWriter(ShardFolder(where))
        writer.put(keys, tensors_of(batch(keys)))
        writer.flush()
        writer.shards.prune(keys)
    (index,) = folder.glob("index.json")
    said = index.read_text()
    for path in list(other.glob("*.safetensors")):
        (folder / path.name).write_bytes(path.read_bytes())  # the same items, but of another model
    shards = ShardFolder(folder)
    assert set(shards.places) == set(keys) and not {name for name, _ in shards.places.values()} & set(
        path.name for path in other.iterdir()
    )
    for changed in (said.replace('"3"', '"4"'), '{"a": 1}', "[]", "null", said.replace('"3", ', "")):
        index.write_text(changed)
        store = ItemStore(CPU, 10**9, ShardFolder(folder))
        there = [key for key in keys if key not in store.missing(keys)]
        check(store, there)
    index.write_text(said)
    shards.check()
    assert set(shards.places) == set(keys) and len(list(folder.glob("*.safetensors"))) == len(shards.keys)
    for where in (60, 300, -1):  # in the header, and in the last number
        name = next(iter(shards.keys))
        content = bytearray((folder / name).read_bytes())
        content[where] ^= 16
        held = [key for key in shards.keys[name] if key is not None]
        (folder / name).write_bytes(content)
        if where > 0:
            assert set(ItemStore(CPU, 10**9, ShardFolder(folder)).missing(keys)) >= set(held)
        shards = ShardFolder(folder)
        shards.check()
        assert not (folder / name).exists() and "damaged" in caplog.text and not set(held) & set(shards.places)


def test_pruning_drops_and_compacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_shards, "SHARD_ITEMS", 8)
    shards = ShardFolder(tmp_path)
    writer = ShardWriter(shards)
    same = [str(9 * number) for number in range(24)]  # of one length: three full shards
    for key in same:
        writer.put([key], tensors_of(item(key)))
    writer.flush()
    names = sorted(shards.keys)
    reader = ItemStore(CPU, 10**9, ShardFolder(tmp_path))
    assert not reader.missing(same)  # has all of them mapped from now on
    assert shards.prune(same[:13]) == 11
    assert len(list(tmp_path.glob("*.safetensors"))) == 2, "one has no item left"
    assert (tmp_path / names[1]).exists(), "and one keeps the room of the three that it has lost"
    again = ShardFolder(tmp_path)
    assert set(again.places) == set(same[:13]) and again.prune(same[:13]) == 0
    assert again.prune(same[:10]) == 3
    check(ItemStore(CPU, 10**9, ShardFolder(tmp_path)), same[:10])
    assert sum(len(keys) for keys in again.keys.values()) == 10, "compacted"
    assert len(list(reader.take(same))) >= 1  # deleted files are read on by those who have them
    (tmp_path / "index.json").write_text("no index")
    check(ItemStore(CPU, 10**9, ShardFolder(tmp_path)), same[:10])
    for number in range(3):  # such as a server writes, item by item
        writer.put([str(100 + 9 * number)], tensors_of(item(str(100 + 9 * number))))
        writer.flush()
    writer.shards.prune([*same[:10], "100", "109", "118"])
    check(ItemStore(CPU, 10**9, ShardFolder(tmp_path)), [*same[:10], "100", "109", "118"])
    assert not list(tmp_path.glob("*.part"))


def test_processes_write_and_read_while_others_are_killed(tmp_path: Path) -> None:
    """Of items in eight bits; the files of others differ in nothing else."""
    keys = [str(9 * number) for number in range(40)]
    fresh = multiprocessing.get_context("spawn")  # a fork of a process with threads may wait for ever
    killed, other = (
        fresh.Process(target=fill, args=(tmp_path, some, pause)) for some, pause in ((keys, 0.02), (keys[::-1], 0))
    )
    killed.start()
    reader = ItemStore(CPU, 10**9, ShardFolder(tmp_path), True)
    while len(reader.missing(keys)) == len(keys):
        assert killed.exitcode in (None, 0)
        time.sleep(0.01)
    check(reader, [key for key in keys if key not in reader.missing(keys)])
    os.kill(killed.pid, signal.SIGKILL)
    other.start()
    for process in (killed, other):
        process.join()
    assert other.exitcode == 0
    check(ItemStore(CPU, 10**9, ShardFolder(tmp_path), True), keys)
    shards = ShardFolder(tmp_path)
    assert shards.prune(keys) == 0, "those that were written twice count once"
    check(ItemStore(CPU, 10**9, ShardFolder(tmp_path), True), keys)

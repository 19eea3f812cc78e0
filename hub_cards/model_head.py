"""The item ranker of a run as a part of its released model, as `save_pretrained` of such a model would write it.

The weights of large models are linked, not written again: the ranker's file is one more of their shards.
"""

import json
from pathlib import Path
from typing import Any

from mllm_msr.hub_cards.facts import has_head
from mllm_msr.modeling.model_files import INDEX, WEIGHTS, tensor_names
from mllm_msr.records.run import RunFolder
from mllm_msr.records.storage import link_file, read_json

ITEMS = "items.json"


def add_head(run: RunFolder, folder: Path) -> None:
    """Put the item ranker of a run, if its stage is done, into the folder of its model.

    Raises:
        FileNotFoundError, ValueError: a file of it is missing or damaged.
    """
    if not has_head(run):
        return
    own = {name: (run.head / name).resolve() for name in (WEIGHTS, ITEMS)}
    tensor_names(own[WEIGHTS])
    config = read_json(folder / "config.json")
    config["sequence_head"] = read_json(run.head / "config.json")["sequence_head"]
    _write(folder / "config.json", config)
    link_file(own[ITEMS], folder / ITEMS)
    if config.get("adapter"):  # beside it there are no other weights
        link_file(own[WEIGHTS], folder / WEIGHTS)
    else:
        _add_shard(folder, own[WEIGHTS])


def _add_shard(folder: Path, file: Path) -> None:
    """Make weights that are whole files already one checkpoint with one more file."""
    index = read_json(folder / INDEX, {}) or {
        "metadata": {"total_size": _size(folder / WEIGHTS)},
        "weight_map": dict.fromkeys(sorted(tensor_names(folder / WEIGHTS)), WEIGHTS),
    }
    places, metadata = index["weight_map"], index.get("metadata", {})
    shards = sorted(set(places.values()))
    names = [f"model-{number:05d}-of-{len(shards) + 1:05d}.safetensors" for number in range(1, len(shards) + 2)]
    renamed = dict(zip(shards, names, strict=False))
    for shard, name in renamed.items():
        (folder / shard).rename(folder / name)
    link_file(file, folder / names[-1])
    places = {key: renamed[shard] for key, shard in places.items()} | dict.fromkeys(tensor_names(file), names[-1])
    if "total_size" in metadata:
        metadata = metadata | {"total_size": metadata["total_size"] + _size(file)}
    _write(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})


def _size(file: Path) -> int:
    """Bytes of the tensors in a file."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")  # less the header and its length


def _write(path: Path, content: Any) -> None:
    path.unlink(missing_ok=True)  # it may be a second name of the run's own file
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A released model brings the run's heads, in whole weights, in shards and beside an adapter."""

import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from datasets import load_dataset
from hub_run import change_recipe, write_json
from huggingface_hub import DatasetCard, ModelCard
from safetensors.numpy import save_file
from tiny_rankers import IDS, make
from transformers import AutoModel

from mllm_msr import MllmMsrForRecommendation
from mllm_msr.hub_cards.model_head import add_head
from mllm_msr.hub_cards.publishing import build_hub
from mllm_msr.hub_cards.release import PublishOptions, publish
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_VECTORS, ITEMS

HISTORIES = [["film-3", "film-7"], []]


def with_head(run: RunFolder) -> RunFolder:
    """The run with its stage `head` done."""
    make().save_pretrained(run.head)
    run.stage("vectors", lambda key: None, writes=[run.config])
    run.stage("head", lambda key: None, writes=[run.head])
    return run


def check(folder: Path) -> None:
    ranker = ItemRanker.from_pretrained(folder)
    assert ranker.item_ids == IDS
    assert torch.equal(ranker.score(HISTORIES), make().score(HISTORIES))


def test_whole_weights_and_the_heads_become_two_shards_and_the_card_says_so(make_run):
    run = with_head(make_run())
    folder = build_hub(run)["model"]
    check(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["weight_map"]["weight"] == "model-00001-of-00002.safetensors"
    sizes = [value.numel() * value.element_size() for value in make().state_dict().values()]
    assert index["metadata"]["total_size"] == 16 + sum(sizes)
    card = ModelCard.load(folder / "README.md").content
    assert "30 items as vectors" in card and ".item_ranker\n" in card
    assert "sequence_head" not in json.loads((run.model / "config.json").read_text())  # the run's own is as it was


def test_shards_become_one_more_and_an_adapter_has_the_heads_beside_it(make_run):
    run = make_run()
    (run.model / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({f"w{number}": np.ones(3, np.float32)}, run.model / f"model-{number:05d}-of-00002.safetensors")
    places = {f"w{number}": f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)}
    write_json(run.model / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    folder = build_hub(with_head(change_recipe(run)))["model"]
    check(folder)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
    ]

    for name in [*places.values(), "model.safetensors.index.json"]:
        (run.model / name).unlink()
    config = json.loads((run.model / "config.json").read_text())
    write_json(run.model / "config.json", {**config, "adapter": "adapter", "backbone_name_or_path": "org/base"})
    write_json(run.model / "adapter/adapter_config.json", {"r": 2})
    save_file({"lora": np.ones(3, np.float32)}, run.model / "adapter/adapter_model.safetensors")
    folder = build_hub(with_head(change_recipe(run)))["model"]
    check(folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_model_loads_from_its_folder_with_the_heads(make_run, backbone, tmp_path):
    model = MllmMsrForRecommendation.from_backbone(backbone("llava"))
    model.save_pretrained(tmp_path)
    add_head(with_head(make_run()), tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and loaded.item_ranker.item_ids == IDS
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_heads_that_are_not_of_this_run_any_more_are_left_out(make_run):
    run = with_head(make_run())
    run = change_recipe(run, head={"hidden": 8})
    folder = build_hub(run)["model"]
    assert not (folder / "items.json").exists() and "item_ranker" not in ModelCard.load(folder / "README.md").content


def test_heads_that_were_changed_since_are_not_released(make_run):
    run = with_head(make_run())
    file = run.head / "model.safetensors"
    stamp = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ValueError, match=r"head/model\.safetensors has changed"):
        publish(run, PublishOptions("me", dry_run=True))


def test_vectors_are_a_config_of_the_data_set_only_while_they_are_up_to_date(make_run, tmp_path):
    run = make_run()
    ids = run.read(ITEMS, ["item_id"])["item_id"]
    vectors = {"item_id": ids, "vector": [[float(place), 1.0] for place in range(len(ids))], "key": ["k"] * len(ids)}
    run.write(ITEM_VECTORS, pl.DataFrame(vectors).cast(pl.Schema(ITEM_VECTORS.columns)))
    assert "item_vectors" not in str(DatasetCard.load(build_hub(run)["dataset"] / "README.md").data.configs)
    run.stage("vectors", lambda key: None, writes=[run.file(ITEM_VECTORS)])
    folder = build_hub(run)["dataset"]
    rows = load_dataset(str(folder), "item_vectors", split="train", cache_dir=str(tmp_path))
    assert len(rows) == 30 and rows[3]["vector"] == [3.0, 1.0]
    assert "### `item_vectors`" in DatasetCard.load(folder / "README.md").content

"""The ``sft`` config as published: what stock TRL trains on."""

from importlib.resources import files

import numpy as np
import polars as pl
import pytest
import yaml
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from mllm_msr.hub_cards.publishing import build_hub
from mllm_msr.processing.examples import training_examples
from mllm_msr.records.storage import write_parquet


@pytest.fixture
def chat_run(make_run):
    """A run whose examples are chats, as the stage writes them."""
    run = make_run()
    items = pl.read_parquet(run / "data/items.parquet")
    for split in ("train", "validation"):
        sft = pl.read_parquet(run / f"sft/{split}.parquet")
        facts = sft.select("task_id", "user_id", pl.concat_list("item_id").alias("candidates"), "preference", "recent")
        examples = training_examples(
            facts.with_columns(pl.concat_list(sft["label"]).alias("labels")),
            items,
            "{{ preference }} {{ title }} {{ image }}?",
        )
        write_parquet(examples, run / f"sft/{split}.parquet")
    return run


def load(folder, config, tmp_path, split="train"):
    return load_dataset(str(folder), config, split=split, cache_dir=str(tmp_path / "cache"))


def test_sft_is_read_by_anyone_and_trained_on_by_stock_trl(chat_run, tmp_path):
    folder = build_hub(chat_run)["dataset"]
    table = load(folder, "sft", tmp_path)
    row = table[0]
    assert row["prompt"][0]["content"][1] == {"type": "image", "text": None}
    assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]
    items = {item["item_id"]: item["image"] for item in load(folder, "items", tmp_path)}
    assert [image.tobytes() for image in row["images"]] == [items[row["item_id"]].tobytes()]
    base = str(files("mllm_msr") / "demo" / "base")
    options = SFTConfig(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="float32")
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    trainer = SFTTrainer(model, options, train_dataset=table, processing_class=AutoProcessor.from_pretrained(base))
    trainer.train()
    assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    moved = {name for name, weights in model.named_parameters() if not weights.equal(before[name])}
    assert any("language_model" in name for name in moved) and any("vision" in name for name in moved)


def test_without_images_the_chat_stands_alone(chat_run, tmp_path):
    folder = build_hub(chat_run, images=False)["dataset"]
    row = load(folder, "sft", tmp_path)[0]
    assert "images" not in row
    assert {part["type"] for part in row["prompt"][0]["content"]} == {"text"}
    assert set(load(folder, "items", tmp_path)["image"]) == {None}


def test_drawn_users_are_hashed_on_request(chat_run, tmp_path):
    folder = build_hub(chat_run, anonymise=True)["dataset"]
    users = [set(load(folder, config, tmp_path)["user_id"]) for config in ("sft", "preferences", "tasks")]
    assert users[0] == users[1] == users[2] and not {user for user in users[0] if user.startswith("u")}


def test_restricted_texts_are_not_in_the_chats_either(chat_run):
    recipe = yaml.safe_load((chat_run / "config.yaml").read_text()) | {"source": {"type": "movielens"}}
    (chat_run / "config.yaml").write_text(yaml.safe_dump(recipe))
    folder = build_hub(chat_run)["dataset"]
    assert set(pl.read_parquet(folder / "sft/train-00000-of-00001.parquet").columns).isdisjoint({"prompt", "images"})

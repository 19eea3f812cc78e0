"""The ``sft`` config as published: what stock TRL trains on."""

from importlib.resources import files

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from mllm_msr.hub_cards.publishing import Contents, build_hub


def load(folder, config, tmp_path, split="train"):
    return load_dataset(str(folder), config, split=split, cache_dir=str(tmp_path / "cache"))


def test_sft_is_read_by_anyone_and_trained_on_by_stock_trl(finished_run, tmp_path):
    folder = build_hub(finished_run)["dataset"]
    table = load(folder, "sft", tmp_path)
    row = next(row for row in table if row["images"] and row["label"])
    assert {"type": "image", "text": None} in row["prompt"][0]["content"]
    assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]
    items = {item["item_id"]: item["image"] for item in load(folder, "items", tmp_path)}
    assert [image.tobytes() for image in row["images"]] == [items[row["item_id"]].tobytes()]
    without = [row for row in table if row["item_id"] == "i0000"]
    assert without and not any(row["images"] for row in without)  # the item that has no image
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


def test_without_images_the_chat_stands_alone(finished_run, tmp_path):
    folder = build_hub(finished_run, Contents(images=False))["dataset"]
    row = load(folder, "sft", tmp_path)[0]
    assert "images" not in row
    assert {part["type"] for part in row["prompt"][0]["content"]} == {"text"}
    assert set(load(folder, "items", tmp_path)["image"]) == {None}

"""training/sft.py as users start it: what moves, what carries loss, and that an interruption changes nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import devices
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mllm_msr.data.hub_tables import load_table
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.records.recipe import backbone_path
from mllm_msr.training import sft
from mllm_msr.training.collators import AnswerCollator
from mllm_msr.training.saving import save_recommender
from mllm_msr.training.whole_checkpoints import last_checkpoint

SCRIPT = Path(sft.__file__)
PROMPT = yaml.safe_load((Path(backbone_path("demo")).parent / "recipe.yaml").read_text("utf-8"))["prompts"][
    "recommendation"
]


def flags(run, output: Path, **more):
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "max_eval_samples": 8,
        "logging_steps": 1,
    }
    return run.flags(output, **options | more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_only_the_answer_is_supervised(small_run):
    processor = small_run.processor
    rows = small_run.table("sft", "train").select(range(6))
    batch = AnswerCollator(processor, small_run.items)(list(rows))
    supervised = batch["labels"] != -100
    assert supervised.sum(1).tolist() == [1] * 6
    assert supervised[:, -1].all()
    answers = processor.tokenizer.batch_decode(batch["labels"][:, -1:])
    assert answers == ["Yes" if label else "No" for label in rows["label"]]
    assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])


def test_an_unknown_item_is_named(small_run):
    with pytest.raises(KeyError, match="'i9999' is not in the items table"):
        small_run.items["i9999"]


def test_a_missing_table_says_what_to_do(small_run, tmp_path):
    shutil.copy(small_run.folder / "config.yaml", tmp_path)
    with pytest.raises(FileNotFoundError, match="run the earlier stages"):
        load_table(str(tmp_path), "sft", "train")


def test_lora_moves_the_language_model_and_nothing_else(small_run, tmp_path):
    trainer = sft.train(*sft.parse([], **flags(small_run, tmp_path)))
    save_recommender(trainer, tmp_path / "model")
    before = MllmMsrForRecommendation.from_backbone(backbone_path("demo"), dtype=torch.float32).state_dict()
    after = MllmMsrForRecommendation.from_pretrained(tmp_path / "model").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {
        name
        for name, value in before.items()
        if "language_model.layers" in name and value.ndim == 2 and name.endswith("_proj.weight")
    }
    assert moved == linear
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(0 < loss < 5 for loss in losses)


def test_full_fine_tuning_moves_every_language_weight(small_run, tmp_path):
    trainer = sft.train(*sft.parse([], **flags(small_run, tmp_path, use_peft=False, save_strategy="no")))
    before = MllmMsrForRecommendation.from_backbone(backbone_path("demo"), dtype=torch.float32).state_dict()
    after = trainer.model.state_dict()
    still = {name for name in before if torch.equal(before[name].cpu(), after[name].cpu())}
    assert not [name for name in still if "language_model" in name]


def test_resuming_gives_the_weights_of_an_uninterrupted_run(small_run, tmp_path):
    whole = sft.train(*sft.parse([], **flags(small_run, tmp_path / "whole")))
    sft.train(*sft.parse([], **flags(small_run, tmp_path / "cut")))
    shutil.rmtree(tmp_path / "cut/checkpoint-4")
    torn = tmp_path / "cut/checkpoint-3"  # killed while it was written
    shutil.copytree(tmp_path / "cut/checkpoint-2", torn)
    (torn / "trainer_state.json").write_text('{"global_st', encoding="utf-8")
    assert last_checkpoint(tmp_path / "cut") == str(tmp_path / "cut/checkpoint-2")
    resumed = sft.train(*sft.parse([], **flags(small_run, tmp_path / "cut")))
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.state.log_history[-1]["step"] == 4


def test_accelerate_launch_with_a_recipe(small_run, tmp_path):
    recipe = yaml.safe_load((small_run.folder / "config.yaml").read_text(encoding="utf-8"))
    recipe["training"].update(max_steps=2, per_device_train_batch_size=4, eval_strategy="no", save_strategy="no")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(SCRIPT)]
    command += ["--config", str(tmp_path / "recipe.yaml"), "--dataset_name", str(small_run.folder)]
    command += ["--output_dir", str(tmp_path / "out"), "--learning_rate", "1e-4"]
    with devices.on_the_cpu():
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    trained = MllmMsrForRecommendation.from_pretrained(tmp_path / "out")
    assert trained.config.backbone_name_or_path is None
    assert MllmMsrProcessor.from_pretrained(tmp_path / "out").prompts["recommendation"] == PROMPT


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_frozen_vision_tower_keeps_no_graph(small_run, tmp_path, checkpointing):
    more = {"max_steps": 1, "eval_strategy": "no", "gradient_checkpointing": checkpointing}
    trainer = sft.train(*sft.parse([], **flags(small_run, tmp_path, **more)))
    (tower,) = [module for name, module in trainer.model.named_modules() if name.endswith("vision_tower")]
    outputs = []
    for module in tower.modules():
        module.register_forward_hook(lambda module, given, output: outputs.append(output))
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    tensors = [one for output in outputs for one in (output if isinstance(output, tuple) else [output])]
    tensors = [one if isinstance(one, torch.Tensor) else one[0] for one in tensors if one is not None]
    assert tensors and not any(tensor.requires_grad for tensor in tensors)
    grads = {name for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    assert grads == {name for name, _ in trainer.model.named_parameters() if "lora_" in name}


def test_answers_have_the_weights_asked_for(small_run, tmp_path):
    more = {"max_steps": 1, "eval_strategy": "no", "negatives_per_positive": 3, "positive_weight": "balanced"}
    trainer = sft.train(*sft.parse([], **flags(small_run, tmp_path, **more)))
    yes, no = (trainer.model.config.answer_token_ids[side][0] for side in ("yes", "no"))
    assert trainer.answer_weights == pytest.approx({yes: 2.0, no: 2 / 3})  # 2 a Yes = 3 times 2 / 3 a No
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 1, -1, -2, -3)])
    batch = {name: value.to(devices.DEVICE) for name, value in batch.items()}
    answers = batch["labels"][:, -1]
    assert answers.tolist() == [yes, yes, no, no, no]
    with torch.no_grad():
        logits = trainer.model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, -2]
        losses = torch.nn.functional.cross_entropy(logits.float(), answers, reduction="none")
        weighted = trainer.compute_loss(trainer.model.train(), dict(batch))
        plain = trainer.compute_loss(trainer.model.eval(), dict(batch))
    assert weighted.item() == pytest.approx(
        float((losses.cpu() * torch.tensor([2.0, 2.0, 2 / 3, 2 / 3, 2 / 3])).mean()), abs=1e-5
    )
    assert plain.item() == pytest.approx(float(losses.mean()), abs=1e-5)  # what is evaluated stays comparable


@pytest.mark.parametrize("wrong", ["many", "0", "-1"])
def test_a_weight_that_is_none_is_an_error(small_run, tmp_path, wrong):
    with pytest.raises(ValueError, match="give a number above 0, or 'balanced'"):
        sft.train(*sft.parse([], **flags(small_run, tmp_path, positive_weight=wrong)))


def test_flags_of_qlora_are_understood(small_run, tmp_path):
    _, _, model_args = sft.parse(["--load_in_4bit", "--use_peft"], **flags(small_run, tmp_path, use_peft=False))
    assert model_args.load_in_4bit and model_args.use_peft


def test_an_unknown_flag_in_a_recipe_is_named(small_run, tmp_path):
    with pytest.raises(ValueError, match="no_such_flag"):
        sft.parse([], **flags(small_run, tmp_path, no_such_flag=1))


def test_a_run_whose_recipe_has_changed_is_not_trained_on(small_run, tmp_path):
    folder = shutil.copytree(small_run.folder, tmp_path / "run", copy_function=shutil.copy2)
    recipe = (folder / "config.yaml").read_text(encoding="utf-8")
    changed = recipe.replace("block_size: 3", "block_size: 2")
    assert changed != recipe
    (folder / "config.yaml").write_text(changed, encoding="utf-8")
    with pytest.raises(ValueError, match=r"stage 'summarize users' of .* is out of date, as the recipe has changed"):
        sft.train(*sft.parse([], **flags(small_run, tmp_path / "out", dataset_name=str(folder))))

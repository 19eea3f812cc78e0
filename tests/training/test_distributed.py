"""Several processes on this machine, over gloo, by the configurations we ship."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import devices
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.records.run import RunFolder
from mllm_msr.training import sft
from mllm_msr.training.saving import save_recommender

SCRIPT = Path(sft.__file__)
ACCELERATE = Path(__file__).parents[2] / "recipes/accelerate"

# accelerate would leave the shards out without a GPU, though PyTorch can make them over gloo.
SHARDS_ON_CPU = """
import runpy
import torch
from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
runpy.run_path({script!r}, run_name="__main__")
"""


def flags(run, output, batch, **more):
    options = {
        "use_cpu": True,
        "max_steps": 4,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_eval_samples": 63,
        "logging_steps": 1,
        "per_device_train_batch_size": batch,
        "negatives_per_positive": 1,
        "hard_negatives": 1,
        "hard_negatives_pool": 4,
        "positive_weight": "balanced",
    }
    return run.flags(output, **options | more)


def launch(config: Path, *program: str, **arguments: Any) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", *program]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def logged(folder: Path, *names: str) -> list[dict]:
    history = json.loads((folder / "checkpoint-4/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [{name: entry[name] for name in names} for entry in history if names[0] in entry]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with devices.on_the_cpu():
        yield


@pytest.fixture(scope="module")
def alone(small_run, tmp_path_factory):
    """One process whose batches are as large as those of two."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = sft.train(*sft.parse([], **flags(small_run, folder, 8)))
    save_recommender(trainer, folder)
    return folder


def check_alike(folder: Path, alone: Path) -> None:
    assert len(list((folder / "checkpoint-4").glob("rng_state_*.pth"))) == 2  # one of each process
    ours, theirs = logged(folder, "loss", "learning_rate"), logged(alone, "loss", "learning_rate")
    assert len(ours) == 4
    assert ours == [pytest.approx(entry, abs=1e-4) for entry in theirs]
    ours, theirs = (logged(one, "eval_auc", "eval_mrr@5") for one in (folder, alone))
    assert len(ours) == 2
    assert ours == [pytest.approx(entry, abs=1e-3) for entry in theirs]
    ours, theirs = (load_file(one / "model.safetensors") for one in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, atol=1e-4), name


def test_two_processes_are_one_with_the_doubled_batch(small_run, alone, tmp_path):
    launch(ACCELERATE / "ddp_cpu.yaml", str(SCRIPT), **flags(small_run, tmp_path, 4))
    check_alike(tmp_path, alone)


def test_two_processes_train_a_run_and_one_of_them_writes_it(small_run, tmp_path):
    shutil.copytree(small_run.folder, tmp_path / "run")
    training = {**small_run.run.recipe.training, "use_cpu": True, "max_steps": 2, "eval_strategy": "no"}
    RunFolder.create(tmp_path / "run", replace(small_run.run.recipe, training=training))
    launch(ACCELERATE / "ddp_cpu.yaml", "-m", "mllm_msr.cli", "train", str(tmp_path / "run"))
    run = RunFolder.open(tmp_path / "run")
    run.require("train")
    assert len(json.loads(run.training_log.read_text(encoding="utf-8"))) == 1
    MllmMsrForRecommendation.from_pretrained(run.model)
    assert not run.checkpoints.exists() and not list(run.path.glob(".*.partial"))


def test_two_processes_with_half_the_weights_each_are_one(small_run, alone, tmp_path):
    config = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text(encoding="utf-8"))
    config |= {"num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "script.py").write_text(SHARDS_ON_CPU.format(script=str(SCRIPT)), encoding="utf-8")
    launch(tmp_path / "fsdp2.yaml", str(tmp_path / "script.py"), **flags(small_run, tmp_path / "out", 4, use_cpu=False))
    assert (tmp_path / "out/checkpoint-4/pytorch_model_fsdp.bin").is_file()  # else it was plain DDP
    check_alike(tmp_path / "out", alone)


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_can_read_every_configuration(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2 and config.distributed_type in ("MULTI_GPU", "FSDP", "DEEPSPEED")

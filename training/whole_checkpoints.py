"""Which checkpoint a training goes on from: the newest that is whole, and that is of the same training."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import ModelConfig

from mllm_msr.records.storage import write_text
from mllm_msr.training.arguments import ExampleArguments

SEAL = "whole.json"  # of a checkpoint: the size of each of its files, and the settings of its training
ROWS = 100_000  # that are hashed together
# what of our flags and of the model's does not change which steps are done
ELSEWHERE = {"dataset_name", "merge_adapter", "cache_image_features", "trust_remote_code", "attn_implementation"}
# what of the trainer's flags does; how many steps there are may change, as a training may be given more
STEPS = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last"),
    *("train_sampling_strategy", "learning_rate", "weight_decay", "optim", "optim_args", "optim_target_modules"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "neftune_noise_alpha", "label_smoothing_factor", "loss_type", "beta", "label_smoothing"),
    *("f_divergence_type", "f_alpha_divergence_coef", "loss_weights", "ld_alpha", "discopop_tau", "sync_ref_model"),
    *("use_weighting", "router_aux_loss_coef"),
)


def settings(
    trainer: Trainer, arguments: ExampleArguments, model_args: ModelConfig, examples: Dataset
) -> dict[str, str]:
    """What decides the steps of a training, as texts by the name of the flag."""
    total = hashlib.sha256()
    columns = examples.select_columns(["task_id", "item_id", "label", "preference", "recent"])
    for begin in range(0, len(columns), ROWS):
        total.update(json.dumps(columns[begin : begin + ROWS], sort_keys=True).encode())
    kinds: list[Any] = [arguments, model_args]
    flags = {name: value for kind in kinds for name, value in asdict(kind).items() if name not in ELSEWHERE}
    flags |= {each.name: getattr(trainer.args, each.name) for each in fields(trainer.args) if each.name in STEPS}
    return {
        "script": type(trainer).__name__,
        "examples": total.hexdigest()[:32],
        **{name: str(getattr(value, "value", value)) for name, value in flags.items()},
    }


class SealCallback(TrainerCallback):
    """Notes of each checkpoint, once all processes have written it, the sizes of its files.

    ``trainer_state.json`` is the last file of one process, not of all; and a failing disk may leave files cut short.
    """

    def __init__(self, trainer: Trainer, facts: Mapping[str, str]) -> None:
        self.trainer, self.facts = trainer, facts

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.accelerator.is_main_process:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            paths = [path for path in folder.rglob("*") if path.is_file() and path.name != SEAL]
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
            write_text(folder / SEAL, json.dumps({"settings": dict(self.facts), "files": sizes}, indent=1))


def last_checkpoint(output_dir: Path, facts: Mapping[str, str] | None = None) -> str | None:
    """The newest checkpoint that is whole, if any.

    Raises:
        ValueError: it is of a training whose settings are not ``facts``.
    """
    found = []
    for seal in output_dir.glob(f"checkpoint-*/{SEAL}"):
        number = seal.parent.name.removeprefix("checkpoint-")
        if number.isdigit() and damage(seal.parent) is None:
            found.append((int(number), seal))
    if not found:
        return None
    seal = max(found)[1]
    theirs = json.loads(seal.read_text(encoding="utf-8"))["settings"]
    if facts is not None and (changed := [name for name in facts if theirs.get(name) != facts[name]]):
        what = ", ".join(
            "other examples" if name == "examples" else f"--{name} {theirs.get(name)}, not {facts[name]}"
            for name in changed
            if name != "script"
        )
        raise ValueError(
            f"{output_dir} has checkpoints of another training ({what or 'by another script'}): give another "
            "--output_dir, or remove them to begin anew"
        )
    return str(seal.parent)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if it has a seal by which to know."""
    try:
        noted = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return f"{SEAL} is damaged"
    for name, size in noted.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
    return None

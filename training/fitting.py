"""What ``sft.py`` and ``dpo.py`` do alike between a loaded model and a finished training."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import Trainer
from trl import ModelConfig, get_peft_config

from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.training.arguments import ExampleArguments
from mllm_msr.training.callbacks import RankingCallback
from mllm_msr.training.checkpoints import Patience
from mllm_msr.training.data import TrainingData, task_lists
from mllm_msr.training.negatives import NegativesCallback
from mllm_msr.training.whole_checkpoints import SealCallback, damage, last_checkpoint, settings


def language_model_lora(model: MllmMsrForRecommendation, model_args: ModelConfig) -> PeftConfig | None:
    """The adapter that the flags ask for: unless they say where, on the language model and never the vision tower."""
    peft_config = get_peft_config(model_args)
    if not isinstance(peft_config, LoraConfig):
        return peft_config
    modules = [name for name, _ in model.named_modules()]
    targets = model_args.lora_target_modules
    if targets is None:
        peft_config.target_modules = language_model_lora_targets(model)
    elif isinstance(targets, str):  # a single one, which TRL takes for a pattern of whole names
        if _named(targets, modules):
            peft_config.target_modules = [targets]
        pattern = targets == "all-linear" or any(re.fullmatch(targets, name) for name in modules)
        targets = None if pattern else [targets]
    for flag, given, names in (  # PEFT passes over what it does not find
        ("lora_target_modules", targets, modules),
        ("lora_modules_to_save", model_args.lora_modules_to_save, modules),
        ("lora_target_parameters", model_args.lora_target_parameters, [name for name, _ in model.named_parameters()]),
    ):
        for wanted in given or []:
            if not _named(wanted, names):
                raise ValueError(f"--{flag} {wanted}: the model has none of that name; its last is {names[-1]!r}")
    return peft_config


def _named(wanted: str, names: Sequence[str]) -> bool:
    """Whether one of the names, or its end, is the wanted one."""
    return any(f".{name}".endswith(f".{wanted}") for name in names if name and wanted)


def fit(trainer: Trainer, data: TrainingData, arguments: ExampleArguments, model_args: ModelConfig) -> None:
    """Train, from the last whole checkpoint if there is one, with the callbacks that the flags ask for."""
    if data.validation is not None:
        trainer.add_callback(RankingCallback(trainer, task_lists(data.validation), data.items))
    if arguments.early_stopping_patience is not None:  # reads what the ranking before it has found
        begin = getattr(trainer, "memory_from", 0.0)  # before, what is evaluated is not what is trained
        trainer.add_callback(Patience(arguments.early_stopping_patience, begin))
    if data.negatives is not None:
        facts = [str(vars(arguments)), str(vars(model_args)), str(trainer.args.to_sanitized_dict())]
        trainer.add_callback(NegativesCallback(trainer, data.negatives, facts))
    trainer.train(resume_from_checkpoint=_checkpoint(trainer, settings(trainer, arguments, model_args, data.examples)))
    if trainer.state.global_step == 0:
        raise ValueError(
            "nothing was trained: there is not one whole batch; lower --per_device_train_batch_size or leave "
            "--dataloader_drop_last out"
        )
    if trainer.state.global_step > trainer.state.max_steps:
        raise ValueError(
            f"{trainer.args.output_dir} has a checkpoint of step {trainer.state.global_step}, beyond the "
            f"{trainer.state.max_steps} asked for: give another --output_dir, or remove it to begin anew"
        )
    model: Any = trainer.model
    for name, weights in model.named_parameters():
        own = weights.to_local() if hasattr(weights, "to_local") else weights  # where processes share them
        if weights.requires_grad and not own.isfinite().all():
            raise RuntimeError(
                f"training has diverged, as {name} is no longer a number: lower --learning_rate, and give another "
                "--output_dir or remove its checkpoints, which have such weights, too"
            )


def _checkpoint(trainer: Trainer, facts: dict[str, str]) -> str | None:
    """What the training goes on from: the checkpoint that a flag names, or the last whole one of the same training."""
    trainer.add_callback(SealCallback(trainer, facts))
    named = trainer.args.resume_from_checkpoint
    if named is None:  # without an optimizer's state the rest would be another training
        return None if trainer.args.save_only_model else last_checkpoint(Path(trainer.args.output_dir or "."), facts)
    if not Path(named).is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint {named}: there is no such folder")
    if not (Path(named) / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {named}: is no checkpoint, as it has no trainer_state.json")
    if reason := damage(Path(named)):
        raise ValueError(f"--resume_from_checkpoint {named}: {reason}; name another, or leave the flag out")
    return named

"""What ``sft.py`` and ``dpo.py`` do alike between a loaded model and a finished training."""

from pathlib import Path

from peft import LoraConfig, PeftConfig
from transformers import EarlyStoppingCallback, Trainer
from trl import ModelConfig, get_peft_config

from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.training.arguments import ExampleArguments
from mllm_msr.training.callbacks import RankingCallback
from mllm_msr.training.data import TrainingData, task_lists
from mllm_msr.training.negatives import NegativesCallback
from mllm_msr.training.saving import last_checkpoint


def language_model_lora(model: MllmMsrForRecommendation, model_args: ModelConfig) -> PeftConfig | None:
    """The adapter that the flags ask for: unless they say where, on the language model and never the vision tower."""
    peft_config = get_peft_config(model_args)
    if isinstance(peft_config, LoraConfig) and model_args.lora_target_modules is None:
        peft_config.target_modules = language_model_lora_targets(model)
    return peft_config


def fit(trainer: Trainer, data: TrainingData, arguments: ExampleArguments, model_args: ModelConfig) -> None:
    """Train, from the last whole checkpoint if there is one, with the callbacks that the flags ask for."""
    if data.validation is not None:
        trainer.add_callback(RankingCallback(trainer, task_lists(data.validation), data.items))
    if arguments.early_stopping_patience is not None:  # reads what the ranking before it has found
        trainer.add_callback(EarlyStoppingCallback(arguments.early_stopping_patience))
    if data.negatives is not None:
        facts = [str(vars(arguments)), str(vars(model_args)), str(trainer.args.to_sanitized_dict())]
        trainer.add_callback(NegativesCallback(trainer, data.negatives, facts))
    checkpoint = trainer.args.resume_from_checkpoint or last_checkpoint(Path(trainer.args.output_dir or "."))
    trainer.train(resume_from_checkpoint=checkpoint)

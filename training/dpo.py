"""Teach a fine-tuned recommender to prefer the right answer to the wrong one, with TRL's ``DPOTrainer``.

    accelerate launch training/dpo.py \\
        --dataset_name runs/movielens-100k \\
        --model_name_or_path runs/llava-movielens \\
        --output_dir runs/llava-movielens-dpo \\
        --hard_negatives 1 --hard_negatives_pool 50 \\
        --use_peft --lora_r 8 --learning_rate 1e-5 --num_train_epochs 1

``--model_name_or_path`` is what ``sft.py`` has saved, or its name on the Hub; it is also the reference that the loss
holds on to. A positive's Yes is preferred to its No, a negative's No to its Yes, under the model's own prompts. The
flags are those of TRL's ``DPOConfig`` and ``ModelConfig``, and those of ``sft.py`` about examples and negatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import DPOConfig, DPOTrainer, ModelConfig, get_quantization_config

from mllm_msr.modeling.naming import naming, pinned
from mllm_msr.processing.auto import MllmMsrForRecommendation, MllmMsrProcessor
from mllm_msr.training import arguments
from mllm_msr.training.arguments import ExampleArguments
from mllm_msr.training.checkpoints import OwnCheckpoints
from mllm_msr.training.collators import AnswerCollator
from mllm_msr.training.data import TrainingData
from mllm_msr.training.fitting import fit, language_model_lora
from mllm_msr.training.saving import finish

KINDS = (ExampleArguments, DPOConfig, ModelConfig)


def main(script_args: ExampleArguments, training_args: DPOConfig, model_args: ModelConfig) -> None:
    push = training_args.push_to_hub
    trainer = train(script_args, training_args, model_args)
    finish(trainer, push)


def train(script_args: ExampleArguments, training_args: DPOConfig, model_args: ModelConfig) -> DPOTrainer:
    # Model, its reference, and processor
    name = model_args.model_name_or_path or ""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} is no recommender: it has no config.json; name the folder that sft.py has saved")
    with naming(name):
        model_args.model_revision = pinned(name, model_args.model_revision) or "main"
        processor = MllmMsrProcessor.from_pretrained(name, revision=model_args.model_revision)
    model = load_recommender(model_args)
    if model.config.interaction == "late":
        raise ValueError(f"{name} is a late recommender; dpo.py trains joint ones")
    peft_config = language_model_lora(model, model_args)

    # Data
    data = TrainingData.load(script_args, training_args)

    # Training
    training_args.push_to_hub = False  # checkpoints stay here; `finish` sends what is loadable
    trainer = PreferenceTrainer(
        model=model,
        ref_model=None if peft_config else load_recommender(model_args),  # without its adapter the model is its own
        args=training_args,
        train_dataset=data.training,
        eval_dataset=data.validation,
        data_collator=PreferenceCollator(AnswerCollator(processor, data.items)),
        processing_class=processor,
        peft_config=peft_config,
    )
    fit(trainer, data, script_args, model_args)
    return trainer


def load_recommender(model_args: ModelConfig) -> MllmMsrForRecommendation:
    """What ``sft.py`` has saved, an adapter merged into its backbone: the result is then a model of its own."""
    options = {"dtype": model_args.dtype, "quantization_config": get_quantization_config(model_args)}
    options |= {"attn_implementation": model_args.attn_implementation, "revision": model_args.model_revision}
    model = MllmMsrForRecommendation.from_pretrained(
        model_args.model_name_or_path, **{name: value for name, value in options.items() if value is not None}
    )
    model.merge()
    model.config.backbone_name_or_path = model.config.backbone_revision = None
    return model


class PreferenceTrainer(OwnCheckpoints, DPOTrainer):
    """TRL's trainer on raw rows: the collator does what its preparation would."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


@dataclass
class PreferenceCollator:
    """Batch B ``sft`` rows as ``DPOTrainer`` has them: B times the chosen answer, then the same rows with the rejected.

    Example:
        A row with label 1 is ``[..., Yes]`` in the first half and ``[..., No]`` in the second, with label 0 the other
        way round. ``completion_mask`` (2B, L) is 1 at the answers only.
    """

    collate: AnswerCollator

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows + [{**row, "label": 1 - row["label"]} for row in rows])
        completion_mask = (batch.pop("labels") != -100).long()
        return {**batch, "completion_mask": completion_mask}


def parse(command_line: Sequence[str], **flags: Any) -> tuple[ExampleArguments, DPOConfig, ModelConfig]:
    """The arguments of a command line, over ``flags``, see :func:`arguments.parse`."""
    script_args, training_args, model_args = arguments.parse(KINDS, command_line, flags)
    return script_args, training_args, model_args


if __name__ == "__main__":
    arguments.run_script(main, KINDS)

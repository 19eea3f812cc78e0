"""Fine-tune a multimodal LLM to answer Yes or No for a preference and a candidate (paper, "Recommender").

    accelerate launch training/sft.py \\
        --dataset_name runs/movielens-100k \\
        --model_name_or_path llava-hf/llava-v1.6-mistral-7b-hf \\
        --output_dir runs/llava-movielens \\
        --use_peft --lora_r 8 --learning_rate 2e-5 --num_train_epochs 10 \\
        --per_device_train_batch_size 1 --gradient_accumulation_steps 8

``--dataset_name`` is a run directory, a folder laid out as the published data set, or its name on the Hub, pinned as
``owner/name@revision``. The flags are those of ``arguments.py`` and of TRL's ``SFTConfig`` and ``ModelConfig``;
``--config recipe.yaml`` reads them from the ``training`` section of a recipe. Run again after an interruption with the
same ``--output_dir``, it goes on from the last whole checkpoint.
"""

import json
import warnings
from collections.abc import Sequence
from typing import Any

from trl import ModelConfig, SFTConfig, SFTTrainer, get_quantization_config

from mllm_msr.modeling.naming import naming, pinned
from mllm_msr.modeling.packing import block_limits
from mllm_msr.processing.auto import MllmMsrForRecommendation, MllmMsrProcessor
from mllm_msr.records.recipe import backbone_path
from mllm_msr.training import arguments
from mllm_msr.training.answer_trainer import answer_trainer
from mllm_msr.training.arguments import SFT_KINDS, RecommenderArguments
from mllm_msr.training.data import TrainingData
from mllm_msr.training.fitting import fit, language_model_lora
from mllm_msr.training.pair_trainer import pair_trainer
from mllm_msr.training.saving import finish


def main(script_args: RecommenderArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    push = training_args.push_to_hub
    trainer = train(script_args, training_args, model_args)
    finish(trainer, push, merge=script_args.merge_adapter)


def train(script_args: RecommenderArguments, training_args: SFTConfig, model_args: ModelConfig) -> SFTTrainer:
    # Model and processor
    name = backbone_path(model_args.model_name_or_path or "")
    with naming(name):
        revision = pinned(name, model_args.model_revision if name == model_args.model_name_or_path else None)
        processor = MllmMsrProcessor.from_backbone(
            name,
            revision=revision,
            prompts=json.loads(script_args.prompts) if script_args.prompts else None,
            item_noun=script_args.item_noun,
            max_length=script_args.prompt_max_length,
        )
    model = MllmMsrForRecommendation.from_backbone(
        name,
        revision=revision,
        processor=processor,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
    )
    peft_config = language_model_lora(model, model_args)

    # Data
    data = TrainingData.load(script_args, training_args)

    # Training: our collators do what SFTTrainer's preparation would, on raw rows
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    training_args.push_to_hub = False  # checkpoints stay here; `finish` sends what is loadable
    obstacle, _ = block_limits(model.config.vlm_config)
    shares = script_args.interaction == "late" or (script_args.packed and obstacle is None)
    if script_args.packed and not shares:
        warnings.warn(f"prompts are computed whole, not packed: {obstacle}", stacklevel=2)
    build = pair_trainer if shares else answer_trainer
    trainer = build(model, processor, data, script_args, training_args, peft_config)
    fit(trainer, data, script_args, model_args)
    return trainer


def parse(command_line: Sequence[str], **flags: Any) -> tuple[RecommenderArguments, SFTConfig, ModelConfig]:
    """The arguments of a command line, over ``flags``, see :func:`arguments.parse`."""
    script_args, training_args, model_args = arguments.parse(SFT_KINDS, command_line, flags)
    return script_args, training_args, model_args


if __name__ == "__main__":
    arguments.run_script(main, SFT_KINDS)

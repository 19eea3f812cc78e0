"""Fine-tune a multimodal LLM to answer Yes or No for a preference and a candidate (paper, "Recommender").

    accelerate launch training/sft.py \\
        --dataset_name runs/movielens-100k \\
        --model_name_or_path llava-hf/llava-v1.6-mistral-7b-hf \\
        --output_dir runs/llava-movielens \\
        --use_peft --lora_r 8 --learning_rate 2e-5 --num_train_epochs 10 \\
        --per_device_train_batch_size 1 --gradient_accumulation_steps 8

``--dataset_name`` is a run directory, a folder laid out as the published data set, or its name on the Hub. All flags
of TRL's ``SFTConfig`` and ``ModelConfig`` work; ``--config recipe.yaml`` reads them from the ``training`` section of a
recipe. Run again after an interruption with the same ``--output_dir``, it goes on from the last whole checkpoint.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.processing.recipe import backbone_path, load_recipe
from mllm_msr.training.collator import AnswerCollator, ItemTable
from mllm_msr.training.tables import load_table


@dataclass
class RecommenderArguments(ScriptArguments):
    """Our arguments beside TRL's.

    Args:
        dataset_test_split: the split evaluated during training.
        item_noun: what an item is called in the prompts.
        prompts: JSON object of prompt templates that replace the default ones.
        max_eval_samples: evaluate on the first so many rows of the split.
        prompt_max_length: longest prompt in tokens; history text is shortened to fit.
        merge_adapter: save whole weights instead of the adapter; always so if the backbone is a folder, to which
            others could not be referred.
    """

    dataset_test_split: str = field(default="validation", metadata={"help": "Split evaluated during training."})
    item_noun: str = field(default="item", metadata={"help": "What an item is called in the prompts: film, product."})
    prompts: str | None = field(default=None, metadata={"help": "JSON object of templates that replace the default."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows only."})
    prompt_max_length: int | None = field(default=None, metadata={"help": "Longest prompt, in tokens."})
    merge_adapter: bool = field(default=False, metadata={"help": "Save whole weights instead of the adapter."})


def main(script_args: RecommenderArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    push, training_args.push_to_hub = training_args.push_to_hub, False  # once, at the end, and only what is loadable
    trainer = train(script_args, training_args, model_args)
    output_dir = Path(trainer.args.output_dir or ".")
    if trainer.accelerator.is_main_process:
        save_recommender(trainer, output_dir, script_args.merge_adapter)
        if push:
            push_recommender(trainer, output_dir)


def train(script_args: RecommenderArguments, training_args: SFTConfig, model_args: ModelConfig) -> SFTTrainer:
    # Model and processor
    if not model_args.model_name_or_path or not script_args.dataset_name:
        raise ValueError("give --model_name_or_path and --dataset_name, or a recipe that has them")
    name, revision = backbone_path(model_args.model_name_or_path), model_args.model_revision
    processor = MllmMsrProcessor.from_backbone(
        name,
        revision=revision if name == model_args.model_name_or_path else None,
        prompts=json.loads(script_args.prompts) if script_args.prompts else None,
        item_noun=script_args.item_noun,
        max_length=script_args.prompt_max_length,
    )
    model = MllmMsrForRecommendation.from_backbone(
        name,
        revision=revision if name == model_args.model_name_or_path else None,
        processor=processor,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
    )
    peft_config = get_peft_config(model_args)
    if isinstance(peft_config, LoraConfig) and model_args.lora_target_modules is None:
        peft_config.target_modules = language_model_lora_targets(model)  # never the vision tower by accident

    # Data
    examples = load_table(script_args.dataset_name, "sft", script_args.dataset_train_split)
    evaluates = training_args.eval_strategy != "no"
    validation = load_table(script_args.dataset_name, "sft", script_args.dataset_test_split) if evaluates else None
    if validation is not None and script_args.max_eval_samples is not None:
        validation = validation.select(range(min(script_args.max_eval_samples, len(validation))))
    items = ItemTable(load_table(script_args.dataset_name, "items", "train"))

    # Training: our collator does what SFTTrainer's preparation would, on raw rows
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    training_args.remove_unused_columns = False
    training_args.max_length = None
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=examples,
        eval_dataset=validation,
        data_collator=AnswerCollator(processor, items),
        processing_class=processor,
        peft_config=peft_config,
    )
    checkpoint = training_args.resume_from_checkpoint or last_checkpoint(Path(trainer.args.output_dir or "."))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def save_recommender(trainer: SFTTrainer, folder: Path, merge: bool = False) -> None:
    """Write what was trained and its processor as one ``from_pretrained`` folder, for a single process.

    A LoRA adapter of a backbone on the Hub is saved as such, with the backbone's name and revision; if ``merge``, or if
    the backbone is a folder, it is merged into whole weights.
    """
    processor: Any = trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    local = Path(model.config.backbone_name_or_path or "").exists()
    if isinstance(model, PeftModel):
        model = model.merge_and_unload() if merge or local else model.get_base_model()
    model.config.use_cache = True  # the trainer switched it off for its own sake
    if local:
        model.config.backbone_name_or_path = None  # a path of this machine says nothing to others
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def push_recommender(trainer: SFTTrainer, folder: Path) -> None:
    """Send the saved folder, without checkpoints, to ``--hub_model_id`` as one commit; private by default."""
    arguments = trainer.args
    api = HfApi(token=arguments.hub_token)
    private = arguments.hub_private_repo is not False
    repo = api.create_repo(arguments.hub_model_id or folder.resolve().name, private=private, exist_ok=True)
    outside = ["checkpoint-*", "checkpoint-*/**", "runs/**", "*.bin", "*.pt", ".*"]
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, ignore_patterns=outside)


def last_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to the end (its trainer state is written last), if any."""
    whole = []
    for state in output_dir.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except ValueError:
            continue  # killed while writing
    return max(whole)[1] if whole else None


def parse(arguments: list[str], **flags: Any) -> tuple[RecommenderArguments, SFTConfig, ModelConfig]:
    """The command line, over ``flags``, over the ``training`` section of ``--config``."""
    kinds: Any = (RecommenderArguments, SFTConfig, ModelConfig)
    parser = TrlParser(kinds)
    arguments = list(arguments)
    if "--config" in arguments:
        at = arguments.index("--config")
        flags = load_recipe(Path(arguments[at + 1])).training_flags() | flags
        del arguments[at : at + 2]
    unknown = parser.set_defaults_with_config(**flags)
    if unknown:
        raise ValueError(f"unknown keys in the training section of the recipe: {unknown}")
    script_args, training_args, model_args = parser.parse_args_into_dataclasses(args=arguments)
    return script_args, training_args, model_args


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))

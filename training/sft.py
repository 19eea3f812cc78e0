"""Fine-tune a multimodal LLM to answer Yes or No for a preference and a candidate (paper, "Recommender").

    accelerate launch training/sft.py \\
        --dataset_name runs/movielens-100k \\
        --model_name_or_path llava-hf/llava-v1.6-mistral-7b-hf \\
        --output_dir runs/llava-movielens \\
        --use_peft --lora_r 8 --learning_rate 2e-5 --num_train_epochs 10 \\
        --per_device_train_batch_size 1 --gradient_accumulation_steps 8

``--dataset_name`` is a run directory, a folder laid out as the published data set, or its name on the Hub, pinned as
``owner/name@revision``. All flags of TRL's ``SFTConfig`` and ``ModelConfig`` work; ``--config recipe.yaml`` reads them
from the ``training`` section of a recipe. Run again after an interruption with the same ``--output_dir``, it goes on
from the last whole checkpoint.
"""

import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import EarlyStoppingCallback, Trainer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.hub_tables import load_table
from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.packing import block_limits
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.records.recipe import backbone_path, load_recipe
from mllm_msr.training.callbacks import RankingCallback, first_tasks, task_lists, whole_model
from mllm_msr.training.collators import AnswerCollator
from mllm_msr.training.negatives import Negatives, NegativesCallback
from mllm_msr.training.pair_collators import (
    LateCollator,
    PackedCollator,
    known_positives,
    log_popularity,
    measured_limits,
    task_rows,
)
from mllm_msr.training.pair_trainer import PairArguments, PairTrainer


@dataclass
class ExampleArguments(ScriptArguments):
    """What is learnt from, beside TRL's arguments.

    Args:
        dataset_test_split: the split evaluated during training.
        max_eval_samples: evaluate on the first so many rows of the split, and on what completes the last one's task.
        negatives_per_positive: so many, drawn from the catalogue anew each epoch, in place of the table's.
        popular_negatives: draw by training interactions, not uniformly; pools of hard negatives, too.
        hard_negatives: so many more for each positive: those that the model ranks highest as an epoch begins, ...
        hard_negatives_pool: ... among so many items that the user has never chosen.
        early_stopping_patience: stop after so many evaluations without a better ``metric_for_best_model``.
    """

    dataset_test_split: str = field(default="validation", metadata={"help": "Split evaluated during training."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many rows only, up to the end of a task."}
    )
    negatives_per_positive: int | None = field(
        default=None, metadata={"help": "Negatives drawn for each positive anew each epoch, in place of the table's."}
    )
    popular_negatives: bool = field(default=False, metadata={"help": "Draw negatives by popularity, not uniformly."})
    hard_negatives: int = field(
        default=0, metadata={"help": "Negatives added for each positive: the model's own favourites, mined each epoch."}
    )
    hard_negatives_pool: int = field(default=50, metadata={"help": "Items among which hard negatives are sought."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better metric_for_best_model before training stops."}
    )


@dataclass
class RecommenderArguments(PairArguments, ExampleArguments):
    """What the recommender is to be.

    Args:
        item_noun: what an item is called in the prompts.
        prompts: JSON object of prompt templates that replace the default ones.
        prompt_max_length: longest prompt in tokens; history text is shortened to fit.
        positive_weight: how much a Yes counts in the loss for each No, or "balanced": as much as all Nos together; 1
            by default, and "balanced" with in-batch negatives.
        merge_adapter: save whole weights instead of the adapter; always so if the backbone is a folder, to which
            others could not be referred.
    """

    item_noun: str = field(default="item", metadata={"help": "What an item is called in the prompts: film, product."})
    prompts: str | None = field(default=None, metadata={"help": "JSON object of templates that replace the default."})
    prompt_max_length: int | None = field(default=None, metadata={"help": "Longest prompt, in tokens."})
    positive_weight: str | None = field(
        default=None, metadata={"help": "Weight of a Yes in the loss for each No, or 'balanced'."}
    )
    merge_adapter: bool = field(default=False, metadata={"help": "Save whole weights instead of the adapter."})


def main(script_args: RecommenderArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    push, training_args.push_to_hub = training_args.push_to_hub, False  # once, at the end, and only what is loadable
    trainer = train(script_args, training_args, model_args)
    output_dir = Path(trainer.args.output_dir or ".")
    save_recommender(trainer, output_dir, script_args.merge_adapter)
    if push and trainer.accelerator.is_main_process:
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

    # Data
    data = Examples.load(script_args, training_args)

    # Training: our collator does what SFTTrainer's preparation would, on raw rows
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    training_args.remove_unused_columns = False
    training_args.max_length = None
    common: dict[str, Any] = {
        "model": model,
        "args": training_args,
        "processing_class": processor,
        "peft_config": language_model_lora(model, model_args),
    }
    obstacle, _ = block_limits(model.config.vlm_config)
    if script_args.interaction == "late" or (script_args.packed and obstacle is None):
        trainer: SFTTrainer = pair_trainer(script_args, data, common)
    else:
        if script_args.packed:
            warnings.warn(f"prompts are computed whole, not packed: {obstacle}", stacklevel=2)
        collator = AnswerCollator(processor, data.items)
        weights = answer_weights(script_args.positive_weight or "1", data, model.config.answer_token_ids)
        sets = {"train_dataset": data.training, "eval_dataset": data.validation}
        trainer = AnswerTrainer(**common, **sets, data_collator=collator, answer_weights=weights)
    run(trainer, data, script_args, model_args)
    return trainer


@dataclass
class Examples:
    """What is trained and evaluated on. ``negatives`` are those of ``training`` that change with the epoch, if any."""

    items: Catalogue
    training: Dataset
    validation: Dataset | None
    negatives: Negatives | None

    @classmethod
    def load(cls, arguments: ExampleArguments, training_args: Any) -> "Examples":
        """As the flags have it, from wherever the data set is."""
        source = arguments.dataset_name or ""
        items = Catalogue(load_table(source, "items", "train"))
        training, validation, negatives = load_table(source, "sft", arguments.dataset_train_split), None, None
        if arguments.negatives_per_positive is not None or arguments.hard_negatives:
            negatives = Negatives(
                training,
                load_table(source, "tasks", "all"),
                items,
                drawn=arguments.negatives_per_positive,
                mined=arguments.hard_negatives,
                pool=arguments.hard_negatives_pool,
                popular=arguments.popular_negatives,
                seed=training_args.seed,
            )
            training = negatives.dataset()
        if training_args.eval_strategy != "no":
            rows = load_table(source, "sft", arguments.dataset_test_split)
            validation = first_tasks(rows, arguments.max_eval_samples)
        return cls(items, training, validation, negatives)

    def task_ids(self) -> list[str]:
        """Of each row of ``training``."""
        if self.negatives is None:
            return self.training["task_id"]
        return self.negatives.task_ids()

    def answer_counts(self) -> tuple[int, int]:
        """How many rows of an epoch are answered Yes, and how many No."""
        yes = len(self.negatives.rows) if self.negatives else sum(self.training["label"])
        return yes, len(self.training) - yes


class AnswerTrainer(SFTTrainer):
    """TRL's trainer, in whose training loss the answers may have weights: ``{token: weight}``, others count 1."""

    def __init__(self, *args: Any, answer_weights: dict[int, float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answer_weights = answer_weights

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        def weighted(**batch: Any) -> Any:
            output = model(**batch)
            if "labels" in batch and getattr(output, "log_probs", None) is not None:
                labels = batch["labels"][:, 1:]
                weights = torch.ones_like(output.log_probs)
                for token, weight in (self.answer_weights or {}).items():
                    weights[labels == token] = weight
                output.log_probs = output.log_probs * weights
            return output

        weighs = bool(self.answer_weights) and model.training
        return super().compute_loss(weighted if weighs else model, inputs, *args, **kwargs)


def pair_trainer(arguments: RecommenderArguments, data: Examples, common: dict[str, Any]) -> PairTrainer:
    """The trainer of whole tasks, and with ``late`` of users and items that are computed once each."""
    model, processor, source = common["model"], common["processing_class"], arguments.dataset_name or ""
    late = arguments.interaction == "late"
    rows = data.negatives.examples if data.negatives else data.training  # the table as it is, of no epoch
    collator: Any = PackedCollator(processor, data.items)
    if late:
        model.config.interaction = "late"
        given = (arguments.user_limit, arguments.item_limit)
        measured = (0, 0) if all(given) else measured_limits(processor, rows, data.items)
        limits = (given[0] or measured[0], given[1] or measured[1])
        model.config.user_limit, model.config.item_limit = limits
        collator = LateCollator(
            processor,
            data.items,
            limits=limits,
            in_batch=arguments.in_batch_negatives,
            pairs_per_user=arguments.pairs_per_user,
            known=known_positives(rows, load_table(source, "tasks", arguments.dataset_train_split)),
            log_q=log_popularity(rows),
        )
    weight = arguments.positive_weight or ("balanced" if late and arguments.in_batch_negatives else "1")
    common["args"].prediction_loss_only = True  # the metrics come from whole tasks
    return PairTrainer(
        **common,
        train_dataset=task_rows(data.training, data.task_ids()),
        eval_dataset=task_rows(data.validation, data.validation["task_id"]) if data.validation is not None else None,
        data_collator=collator,
        pair_loss=arguments.pair_loss,
        positive_weight=weight,
        log_q_correction=arguments.log_q_correction,
        cache_image_features=arguments.cache_image_features,
    )


def answer_weights(positive_weight: str, data: Examples, tokens: dict[str, list[int]]) -> dict[int, float] | None:
    """``{token: weight}`` of the two answers: a Yes counts ``positive_weight`` times a No; over the rows the mean is 1.

    Raises ``ValueError`` unless it is a positive number or "balanced", which is the number of Nos for each Yes.
    """
    yes, no = data.answer_counts()
    try:
        ratio = no / max(yes, 1) if positive_weight == "balanced" else float(positive_weight)
    except ValueError:
        ratio = 0.0
    if ratio <= 0:
        raise ValueError(f"--positive_weight {positive_weight}: give a number above 0, or 'balanced' if there are Nos")
    if ratio == 1:
        return None
    scale = (yes + no) / (ratio * yes + no)
    return {tokens["yes"][0]: ratio * scale, tokens["no"][0]: scale}


def language_model_lora(model: MllmMsrForRecommendation, model_args: ModelConfig) -> PeftConfig | None:
    """The adapter that the flags ask for: unless they say where, on the language model and never the vision tower."""
    peft_config = get_peft_config(model_args)
    if isinstance(peft_config, LoraConfig) and model_args.lora_target_modules is None:
        peft_config.target_modules = language_model_lora_targets(model)
    return peft_config


def run(trainer: Trainer, data: Examples, arguments: ExampleArguments, model_args: ModelConfig) -> None:
    """Train, from the last whole checkpoint if there is one, with the callbacks that the flags ask for."""
    if data.validation is not None:
        trainer.add_callback(RankingCallback(trainer, task_lists(data.validation), data.items))
    if arguments.early_stopping_patience is not None:  # reads what the one before it has found
        trainer.add_callback(EarlyStoppingCallback(arguments.early_stopping_patience))
    if data.negatives is not None:
        facts = [vars(arguments), {**vars(model_args)}, trainer.args.to_sanitized_dict()]
        trainer.add_callback(NegativesCallback(trainer, data.negatives, *map(str, facts)))
    checkpoint = trainer.args.resume_from_checkpoint or last_checkpoint(Path(trainer.args.output_dir or "."))
    trainer.train(resume_from_checkpoint=checkpoint)


def save_recommender(trainer: Trainer, folder: Path, merge: bool = False) -> None:
    """Write what was trained and its processor as one ``from_pretrained`` folder; to be called on every process.

    A LoRA adapter of a backbone on the Hub is saved as such, with the backbone's name and revision; if ``merge``, or if
    the backbone is a folder, it is merged into whole weights.
    """
    model = whole_model(trainer)
    if not trainer.accelerator.is_main_process:
        return
    processor: Any = trainer.processing_class
    local = Path(model.config.backbone_name_or_path or "").exists()
    if isinstance(model, PeftModel):
        model = model.merge_and_unload() if merge or local else model.get_base_model()
    model.config.use_cache = True  # the trainer switched it off for its own sake
    if local:
        model.config.backbone_name_or_path = None  # a path of this machine says nothing to others
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def push_recommender(trainer: Trainer, folder: Path) -> None:
    """Send the saved folder, without checkpoints, to ``--hub_model_id`` as one commit; private by default."""
    arguments = trainer.args
    api = HfApi(token=arguments.hub_token)
    private = arguments.hub_private_repo is not False
    repo = api.create_repo(arguments.hub_model_id or folder.resolve().name, private=private, exist_ok=True)
    outside = ["checkpoint-*", "checkpoint-*/**", "negatives/**", "runs/**", "*.bin", "*.pt", ".*"]
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

"""A trainer for batches of pairs: the paper's answer cross-entropy, or a softmax over each user's candidates."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from torch.nn.functional import cross_entropy
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from mllm_msr.data.hub_tables import load_table
from mllm_msr.modeling.image_features import ImageFeatureCache
from mllm_msr.modeling.interfaces import PreparedImage
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.packing import RowTooWide, pack_joint, pack_late
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.training.arguments import RecommenderArguments
from mllm_msr.training.checkpoints import OwnCheckpoints
from mllm_msr.training.data import TrainingData, task_rows
from mllm_msr.training.pair_collators import (
    LateCollator,
    PackedCollator,
    PreparedItems,
    chosen_items,
    log_item_frequency,
    measured_limits,
)
from mllm_msr.training.saving import sharded

logger = logging.get_logger(__name__)
NEW_MEMORY_FROM = 2 / 3  # of the steps of a model whose memory tokens are new


def answer_loss(
    logits: torch.Tensor, labels: torch.Tensor, answers: dict[str, list[int]], weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of the Yes or No token among all tokens (paper, section on the recommender), averaged.

    Args:
        logits: (P, V) where the answers are due. labels: (P,) 1 or 0.
        answers: ``config.answer_token_ids``. weights: (P,) of the pairs in the average.
    """
    tokens = torch.where(labels > 0, answers["yes"][0], answers["no"][0])
    losses = cross_entropy(logits.float(), tokens, reduction="none")
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def listwise_loss(differences: torch.Tensor, labels: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy of each positive against its user's negatives, averaged over the positives.

    Args:
        differences: (P,) logits of Yes over No. labels: (P,) 1 or 0. users: (P,) whose candidates they are.
    """
    positive = labels > 0
    rivals = (users[positive][:, None] == users[None, :]) & ~positive[None, :]  # (positives, P)
    scores = torch.where(rivals, differences[None, :], -torch.inf)
    own = differences[positive]
    return (torch.cat([own[:, None], scores], 1).logsumexp(1) - own).mean()


def pair_weights(labels: torch.Tensor, yes_weight: float | Literal["balanced"]) -> torch.Tensor:
    """(P,) weights by class: of the positives as given, or so that both classes count the same."""
    positive = labels > 0
    weight = (~positive).sum() / positive.sum().clamp(min=1) if yes_weight == "balanced" else yes_weight
    return torch.where(positive, weight, 1.0).float()


class PairTrainer(OwnCheckpoints, SFTTrainer):
    """TRL's trainer for the batches of ``pair_collators``.

    Args:
        pair_loss: ``answer`` or ``listwise``.
        yes_weight: of a Yes for each No in ``answer``; "balanced" weighs both answers the same whatever their number.
        log_q_correction: in-batch negatives are other users' positives, so frequent items are negatives too often;
            correct for it: by 1/q as weight of the negatives in ``answer``, by - log q on the logits in ``listwise``
            (Yi et al., RecSys 2019).
        cache_image_features: encode each image once, by a frozen vision tower, and keep what the decoder sees of it in
            memory.
        memory_from: with memory tokens, the share of the steps after which pairs see of each candidate these only.
        args, kwargs: those of ``SFTTrainer``.
    """

    def __init__(
        self,
        *args: Any,
        pair_loss: str = "answer",
        yes_weight: float | Literal["balanced"] = "balanced",
        log_q_correction: bool = False,
        cache_image_features: bool = False,
        memory_from: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._recommender().use_block_attention()
        self.image_features = self._image_features() if cache_image_features else None
        self.pair_loss, self.yes_weight, self.log_q_correction = pair_loss, yes_weight, log_q_correction
        self.memory_from = memory_from
        self.model_accepts_loss_kwargs = False  # so that the trainer averages over accumulated batches itself

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, log_q = inputs["labels"], inputs.get("log_q")
        recommender = self._recommender()
        outputs = model(**self._arguments(recommender, inputs), image_features=self._features(inputs["images"]))
        logits = outputs.logits.flatten(0, 1)  # (P, V), of one packed row or of P whole prompts
        users = inputs["pairs"][0] if "pairs" in inputs else inputs["group_ids"]
        differences = recommender.answer_logits(logits)
        if self.pair_loss == "listwise":
            corrected = differences - log_q if self.log_q_correction else differences
            loss = listwise_loss(corrected, labels, users)
        else:
            answers = recommender.config.answer_token_ids
            loss = answer_loss(logits, labels, answers, self._weights(labels, log_q))
        mode = "train" if model.training else "eval"
        with torch.no_grad():
            right = ((differences > 0) == (labels > 0)).float().mean()
            self._metrics[mode]["answer_accuracy"].append(right.item())
            self._metrics[mode]["pairs"].append(float(len(labels)))
        return (loss, outputs) if return_outputs else loss

    def _recommender(self) -> Any:
        """The model without what is wrapped around it for training."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _arguments(self, recommender: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward; its logits are those of the answers."""
        if "pairs" in inputs:
            late = {name: inputs[name] for name in ("users", "items", "answer_ids", "pairs")}
            return pack_late(recommender, **late, memory_only=not recommender.training or self._memory_only())
        try:
            return pack_joint(recommender, inputs["prompts"], inputs["group_ids"])
        except RowTooWide as error:
            logger.warning_once(f"prompts are computed whole, not packed: {error}")
            return {**inputs["prompts"], "logits_to_keep": 1}

    def _memory_only(self) -> bool:
        """Whether the pairs of this step see of each candidate its memory tokens only: of the steps before
        ``memory_from`` every second one of the later half, as what was learned may be lost where it comes at once."""
        step, begin = self.state.global_step, self.memory_from * self.state.max_steps
        return step >= begin or (step >= begin / 2 and step % 2 == 1)

    def _image_features(self) -> ImageFeatureCache:
        """The cache of what the decoder sees of images, which is kept in the memory of the CPU."""
        recommender = self._recommender()
        language = [recommender.get_decoder(), recommender.get_output_embeddings()]
        after = {weight for module in language for weight in module.parameters()}
        if any(weight.requires_grad for weight in recommender.parameters() if weight not in after):
            raise ValueError("--cache_image_features needs all before the decoder to be frozen: train with --use_peft")
        if sharded(self):
            raise ValueError("--cache_image_features: no process has all weights of the vision tower; leave it out")
        processor: Any = self.processing_class
        return ImageFeatureCache(recommender.backbone, processor, torch.device("cpu"))

    def _features(self, images: Sequence[tuple[str, PreparedImage]]) -> list[torch.Tensor] | None:
        """What the decoder sees of a batch's images, if that is kept."""
        if self.image_features is None:
            return None
        stand_ins = [self.image_features.stand_in(item, image) for item, image in images]
        return [features.to(self.accelerator.device) for features in self.image_features.features(stand_ins)]

    def _weights(self, labels: torch.Tensor, log_q: torch.Tensor | None) -> torch.Tensor:
        weights = torch.ones(len(labels), device=labels.device)
        negative = labels == 0
        if self.log_q_correction and log_q is not None and negative.any():
            rarity = torch.exp(log_q.min() - log_q)
            weights = torch.where(negative, rarity / rarity[negative].mean(), weights)
        return weights * pair_weights(labels, self.yes_weight)


def pair_trainer(
    model: MllmMsrForRecommendation,
    processor: MllmMsrProcessor,
    data: TrainingData,
    script_args: RecommenderArguments,
    training_args: SFTConfig,
    peft_config: PeftConfig | None,
) -> PairTrainer:
    """The trainer that the flags ask for; with ``late``, the model's configuration gets its limits."""
    items = PreparedItems(processor, data.items)
    collator: Any = PackedCollator(processor, items)
    memory_from = 0.0
    if script_args.interaction == "late":
        user, item = script_args.user_limit, script_args.item_limit
        measured = (0, 0) if user and item else measured_limits(processor, data.examples, data.items)
        limits = (user or measured[0], item or measured[1])
        model.config.interaction, (model.config.user_limit, model.config.item_limit) = "late", limits
        if script_args.item_memory not in (None, model.config.item_memory):
            model.set_item_memory(script_args.item_memory or 0)
            memory_from = NEW_MEMORY_FROM
        if peft_config is not None and model.config.item_memory:  # trained whole beside the adapter
            adapters: Any = peft_config
            adapters.modules_to_save = [*(adapters.modules_to_save or []), "item_memory"]
        tasks = load_table(script_args.dataset_name or "", "tasks", script_args.dataset_train_split)
        collator = LateCollator(
            processor,
            items,
            limits=limits,
            in_batch=script_args.in_batch_negatives,
            pairs_per_user=script_args.pairs_per_user,
            chosen=chosen_items(data.examples, tasks, data.cut),
            log_frequency=log_item_frequency(data.examples),
        )
    training_args.prediction_loss_only = True  # the metrics come from whole tasks
    validation = data.validation
    return PairTrainer(
        model=model,
        args=training_args,
        train_dataset=task_rows(data.training, data.task_ids()),
        eval_dataset=task_rows(validation, validation["task_id"]) if validation is not None else None,
        processing_class=processor,
        data_collator=collator,
        peft_config=peft_config,
        pair_loss=script_args.pair_loss,
        yes_weight=script_args.yes_weight,
        log_q_correction=script_args.log_q_correction,
        cache_image_features=script_args.cache_image_features,
        memory_from=memory_from if script_args.item_memory_from is None else script_args.item_memory_from,
    )

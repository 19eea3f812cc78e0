"""A trainer for batches of pairs: the paper's answer cross-entropy, or a softmax over each user's candidates."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers.utils import logging
from trl import SFTTrainer

from mllm_msr.modeling.packing import BlocksTooLong

logger = logging.get_logger(__name__)
OURS = ("labels", "log_q", "pictures", "use_cache")  # of a batch, not the model's


@dataclass
class PairArguments:
    """How users and candidates meet, and what is learnt from their pairs.

    Args:
        interaction: ``joint`` or ``late``, see ``MllmMsrConfig``; it becomes part of the checkpoint.
        packed: batches of whole tasks, whose prompts compute what they share only once. Always so with ``late``; with
            ``joint``, losses and gradients are those of whole prompts. Batch sizes then count tasks.
        user_limit, item_limit: with ``late``, the most tokens of a user and of a candidate; by default a little more
            than the longest ones have.
        pair_loss: ``answer``, the paper's cross-entropy, or ``listwise``, a softmax over each user's candidates.
        in_batch_negatives: with ``late``, pair each user with the items of all others, too.
        pairs_per_user: with ``late``, the most pairs of a user in a batch.
        log_q_correction: with ``late``, correct for popular items being other users' positives more often.
        cache_image_features: encode each picture once and keep what the decoder sees of it in memory.
    """

    interaction: str = field(default="joint", metadata={"help": "joint or late; part of the checkpoint."})
    packed: bool = field(default=False, metadata={"help": "Batches of tasks; what prompts share is computed once."})
    user_limit: int | None = field(default=None, metadata={"help": "Most tokens of a user, with late."})
    item_limit: int | None = field(default=None, metadata={"help": "Most tokens of a candidate, with late."})
    pair_loss: str = field(default="answer", metadata={"help": "answer or listwise."})
    in_batch_negatives: bool = field(default=True, metadata={"help": "Pair users with others' items, with late."})
    pairs_per_user: int | None = field(default=None, metadata={"help": "Most pairs of a user in a batch, with late."})
    log_q_correction: bool = field(default=False, metadata={"help": "Correct for popular in-batch negatives."})
    cache_image_features: bool = field(default=False, metadata={"help": "Encode each picture only once."})

    def __post_init__(self) -> None:
        if self.interaction not in ("joint", "late") or self.pair_loss not in ("answer", "listwise"):
            raise ValueError("--interaction is joint or late, --pair_loss answer or listwise")
        late, pairs = self.interaction == "late", self.interaction == "late" or self.packed
        needs = {"log_q_correction": late, "pairs_per_user": late, "cache_image_features": pairs}
        for name, there in needs.items():
            if getattr(self, name) and not there:
                raise ValueError(f"--{name} needs --interaction late" + (" or --packed" if name[0] == "c" else ""))
        if self.pair_loss == "listwise" and not pairs:
            raise ValueError("--pair_loss listwise needs whole tasks: add --packed")


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


def pair_weights(labels: torch.Tensor, positive_weight: str) -> torch.Tensor:
    """(P,) weights by class: of the positives as given, or so that both classes count the same."""
    positive = labels > 0
    count = positive.sum().clamp(min=1)
    weight = (~positive).sum() / count if positive_weight == "balanced" else float(positive_weight)
    return torch.where(positive, weight, 1.0).float()


class PairTrainer(SFTTrainer):
    """TRL's trainer for the batches of ``pair_collators``.

    Args:
        pair_loss: ``answer`` or ``listwise``.
        positive_weight: of Yes in ``answer``; "balanced" weighs both answers the same whatever their number.
        log_q_correction: items are met as other users' positives, so popular ones are negatives too often; correct for
            it: by 1/q as weight of the negatives in ``answer``, by - log q on the logits in ``listwise`` (Yi et al.,
            RecSys 2019).
        cache_image_features: encode each picture once, by a frozen vision tower, and keep what the decoder sees of it
            in memory.
    """

    def __init__(
        self,
        *args: Any,
        pair_loss: str = "answer",
        positive_weight: str = "balanced",
        log_q_correction: bool = False,
        cache_image_features: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.features: dict[str, torch.Tensor] | None = {} if cache_image_features else None
        self.pair_loss, self.positive_weight, self.log_q_correction = pair_loss, positive_weight, log_q_correction
        self.model_accepts_loss_kwargs = False  # so that the trainer averages over accumulated batches itself

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, log_q = inputs["labels"], inputs.get("log_q")
        given = {name: value for name, value in inputs.items() if name not in OURS}
        recommender: Any = self.accelerator.unwrap_model(model)
        if self.features is not None and inputs["pictures"]["items"]:
            given["image_features"] = self._features(recommender, given.get("items", given), inputs["pictures"])
        try:
            outputs = model(**given)
        except BlocksTooLong as error:
            if "owners" not in given:
                raise
            logger.warning_once(f"prompts are computed whole, not packed: {error}")
            del given["owners"]
            outputs = model(**given, logits_to_keep=1)
            outputs.logits = outputs.logits[:, -1]
        users = inputs["pairs"][0] if "pairs" in inputs else inputs["owners"]
        differences = recommender.answer_logits(outputs.logits)
        if self.pair_loss == "listwise":
            corrected = differences - log_q if self.log_q_correction else differences
            loss = listwise_loss(corrected, labels, users)
        else:
            answers = recommender.config.answer_token_ids
            loss = answer_loss(outputs.logits, labels, answers, self._weights(labels, log_q))
        mode = "train" if model.training else "eval"
        with torch.no_grad():
            right = ((differences > 0) == (labels > 0)).float().mean()
            self._metrics[mode]["answer_accuracy"].append(right.item())
            self._metrics[mode]["pairs"].append(float(len(labels)))
        return (loss, outputs) if return_outputs else loss

    def _features(self, recommender: Any, batch: dict[str, Any], pictures: dict[str, list[Any]]) -> list[torch.Tensor]:
        """What the decoder sees of a batch's pictures; computed if one of them is met for the first time."""
        known: Any = self.features
        if not all(item in known for item in pictures["items"]):
            language = [recommender.get_decoder(), recommender.get_output_embeddings()]
            after = {weight for module in language for weight in module.parameters()}
            if any(weight.requires_grad for weight in recommender.parameters() if weight not in after):
                raise ValueError(
                    "cache_image_features needs all before the decoder to be frozen: train with --use_peft"
                )
            found = recommender.image_features(pictures["tokens"], **batch)
            known.update(zip(pictures["items"], (features.cpu() for features in found), strict=True))
        return [known[item].to(self.accelerator.device) for item in pictures["items"]]

    def _weights(self, labels: torch.Tensor, log_q: torch.Tensor | None) -> torch.Tensor:
        weights = torch.ones(len(labels), device=labels.device)
        negative = labels == 0
        if self.log_q_correction and log_q is not None and negative.any():
            rarity = torch.exp(log_q.min() - log_q)
            weights = torch.where(negative, rarity / rarity[negative].mean(), weights)
        return weights * pair_weights(labels, self.positive_weight)

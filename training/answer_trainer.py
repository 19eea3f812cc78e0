"""The trainer of single examples: the paper's cross-entropy of the answer token, whose two answers may have weights."""

from typing import Any, Literal

import torch
from peft import PeftConfig
from trl import SFTConfig, SFTTrainer

from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.training.arguments import RecommenderArguments
from mllm_msr.training.checkpoints import OwnCheckpoints
from mllm_msr.training.collators import AnswerCollator
from mllm_msr.training.data import TrainingData


class AnswerTrainer(OwnCheckpoints, SFTTrainer):
    """TRL's trainer, in whose training loss the answers may have weights.

    Args:
        answer_weights: ``{token: weight}``; other tokens count 1. Evaluation is never weighted.
        args, kwargs: those of ``SFTTrainer``.
    """

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


def answer_trainer(
    model: MllmMsrForRecommendation,
    processor: MllmMsrProcessor,
    data: TrainingData,
    script_args: RecommenderArguments,
    training_args: SFTConfig,
    peft_config: PeftConfig | None,
) -> AnswerTrainer:
    """The trainer that the flags ask for."""
    tokens: Any = model.config.answer_token_ids
    return AnswerTrainer(
        model=model,
        args=training_args,
        train_dataset=data.training,
        eval_dataset=data.validation,
        processing_class=processor,
        data_collator=AnswerCollator(processor, data.items),
        peft_config=peft_config,
        answer_weights=answer_weights(script_args.yes_weight, data.answer_counts(), tokens),
    )


def answer_weights(
    yes_weight: float | Literal["balanced"], counts: tuple[int, int], tokens: dict[str, list[int]]
) -> dict[int, float] | None:
    """``{token: weight}`` of the two answers, of mean 1 over an epoch; None if they weigh the same.

    Args:
        yes_weight: of a Yes for each No; "balanced" is the number of Nos for each Yes.
        counts: how many examples of an epoch are answered Yes, and how many No.
        tokens: ``config.answer_token_ids``.

    >>> answer_weights("balanced", (1, 3), {"yes": [7], "no": [8]})
    {7: 2.0, 8: 0.6666666666666666}
    """
    yes, no = counts
    ratio = no / max(yes, 1) if yes_weight == "balanced" else yes_weight
    if ratio == 0:
        raise ValueError("--positive_weight balanced: the examples have no negatives; add --negatives_per_positive")
    if ratio == 1:
        return None
    scale = (yes + no) / (ratio * yes + no)
    return {tokens["yes"][0]: ratio * scale, tokens["no"][0]: scale}

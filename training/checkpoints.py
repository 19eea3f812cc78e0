"""Trainers that read checkpoints of whole weights as these were written."""

from typing import Any

from transformers import EarlyStoppingCallback, Trainer

from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.training.saving import sharded


class OwnCheckpoints(Trainer):
    """Reads whole weights back by the model's own ``from_pretrained``; a base of our trainers, before TRL's.

    ``save_pretrained`` writes many backbones under other names than their weights have in memory. ``Trainer`` compares
    the two as they are, finds few or none, and goes on with the weights that it began with, after a warning: a training
    that resumes would begin anew under an old optimizer, and the best checkpoint would not be the one that is kept.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_whole(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_whole(self.state.best_model_checkpoint or ""):
            super()._load_best_model()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """No step beyond the last one, as ``Trainer`` would do when it resumes from the checkpoint of that."""
        stopped = any(isinstance(one, Patience) and one.at_end for one in self.callback_handler.callbacks)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None at a checkpoint: TRL's would be that of a chat model; ``saving`` writes one at the end."""

    def _load_whole(self, checkpoint: str) -> bool:
        """Whether these are whole weights, which the model now has; else an adapter, or parts that processes hold."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, MllmMsrForRecommendation) or sharded(self) or self.is_deepspeed_enabled:
            return False
        stored = type(model).from_pretrained(checkpoint, dtype="auto").state_dict()
        model.load_state_dict(stored)
        return True


class Patience(EarlyStoppingCallback):
    """Early stopping that knows, when a training goes on, for how long nothing had become better.

    Args:
        patience: evaluations. begin: the share of the steps before which they do not count.
    """

    def __init__(self, patience: int, begin: float = 0.0) -> None:
        super().__init__(patience)
        self.begin = begin

    @property
    def at_end(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = kept.get("early_stopping_patience_counter", 0)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.global_step >= self.begin * state.max_steps:
            super().on_evaluate(args, state, control, metrics, **kwargs)

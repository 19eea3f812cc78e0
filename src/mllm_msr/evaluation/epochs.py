"""A training in epochs: the best one by validation is kept, and a killed training goes on from its last whole epoch.

Epochs are seeded one by one, so that it then ends as it would have.
"""

import copy
import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mllm_msr.records.storage import sweep, whole_file

Trained = TypeVar("Trained", bound=nn.Module)


class Epochs(ABC, Generic[Trained]):
    """A training between two epochs: weights, optimizer, and the best epoch so far.

    Args:
        module: what is trained.
        options: has ``learning_rate``, ``weight_decay`` (of AdamW), ``average``, ``max_epochs`` and ``patience``, see
            :class:`~mllm_msr.evaluation.sequence_training.FitOptions`.
        seed: of every epoch, with its number.
    """

    def __init__(self, module: Trained, options: Any, seed: int) -> None:
        self.module, self.averaged, self.steps = module, copy.deepcopy(module).requires_grad_(False), 0
        self.options, self.seed = options, seed
        rates = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        self.optimizer = torch.optim.AdamW(module.parameters(), **rates)
        self.done, self.best_epoch, self.best = 0, 0, 0.0
        self.best_weights = {name: value.clone() for name, value in weights_of(module).items()}

    @abstractmethod
    def batches(self, rng: np.random.Generator) -> Sequence[Any]:
        """Everything that is trained on, once, in random batches."""

    @abstractmethod
    def loss(self, batch: Any, rng: np.random.Generator) -> torch.Tensor:
        """Of one of the batches."""

    @abstractmethod
    def quality(self) -> float:
        """Of ``averaged``, by validation."""

    @property
    def finished(self) -> bool:
        """Whether it has run its epochs, or validation has not improved for too long."""
        return self.done >= self.options.max_epochs or self.done - self.best_epoch >= self.options.patience

    def run(self, path: Path | None, name: str) -> None:
        """Train to the end and leave the module with the weights of its best epoch.

        Args:
            path: where every epoch is saved whole, and gone on from; None: nowhere.
            name: of the progress bar.
        """
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            if path.is_file():
                try:
                    self.restore(torch.load(path, weights_only=True))
                except (RuntimeError, KeyError, EOFError, ValueError, UnpicklingError) as error:
                    raise ValueError(f"{path} is damaged: remove it, and this training begins anew") from error
        while not self.finished:
            self.epoch(name)
            if path is not None:
                with whole_file(path) as file:
                    torch.save(self.state(), file)
            give_back_memory()
        load_weights(self.module, self.best_weights)
        print(f"  {name}: epoch {self.best_epoch} is best by validation ({self.best:.4f})", flush=True)

    def epoch(self, name: str) -> None:
        """Train on every batch once, and validate."""
        self.done += 1
        rng = np.random.default_rng([self.seed, self.done])
        torch.manual_seed(int(rng.integers(2**62)))
        self.module.train()
        batches = self.batches(rng)
        for batch in tqdm(batches, desc=f"  {name}: epoch {self.done}, best {self.best:.4f}", leave=False):
            self.step(self.loss(batch, rng))
        if not all(value.isfinite().all() for value in self.averaged.parameters()):
            raise ValueError(f"{name}: weights are no longer finite after epoch {self.done}: lower its learning_rate")
        quality = self.quality()
        if quality > self.best or not self.best_epoch:
            self.best, self.best_epoch = quality, self.done
            copy_weights(weights_of(self.averaged), self.best_weights)

    def step(self, loss: torch.Tensor) -> None:
        """Follow the gradient of a loss, and move the average."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
        self.optimizer.step()
        self.steps += 1
        left = min(self.options.average, self.steps / (self.steps + 10))  # less at first, to leave the beginning
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self.module.parameters(), strict=True):
                mean.lerp_(value, 1 - left)

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs."""
        return {
            "head": weights_of(self.module),
            "averaged": weights_of(self.averaged),
            "steps": self.steps,
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "done": self.done,
            "best_epoch": self.best_epoch,
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from an earlier :meth:`state`."""
        load_weights(self.module, state["head"])
        load_weights(self.averaged, state["averaged"])
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        copy_weights(state["best_weights"], self.best_weights)
        self.done, self.best_epoch, self.best = state["done"], state["best_epoch"], state["best"]


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained of a module."""
    return {name: value.detach() for name, value in module.named_parameters()}


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put a copy of such weights in place."""
    copy_weights(weights, weights_of(module))


def copy_weights(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    """From tensors to others that exist: new ones after every epoch would leave holes in memory, ever more of them."""
    for name, value in target.items():
        value.copy_(source[name])


def give_back_memory() -> None:
    """Return what is free to the system: glibc keeps it in pieces, into which tensors of other sizes do not fit."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)

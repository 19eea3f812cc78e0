"""Training of the sequence head, and of SASRec and GRU4Rec, which are heads without content.

Every place of a training history is an example: its state against the next item, by the softmax over the items that
have training interactions. Beyond some thousand of these the softmax is sampled: the items of the batch and others
drawn uniformly, each weighted by one over the chance that it is among them, so that the sum over all items is met on
average.
Epochs are seeded one by one and saved whole, so that a killed training goes on to the same result.
Letters: T interactions, S pieces of histories, B histories of a batch, L places, I items, C candidates.
"""

import copy
import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from mllm_msr.evaluation.coded_tasks import CodedLists, CodedTasks, ndcg_at
from mllm_msr.modeling.sequence_head import PADDING, SequenceHead, SequenceHeadConfig
from mllm_msr.records.storage import digest, sweep, write_bytes

Array = np.ndarray


@dataclass(frozen=True)
class FitOptions:
    """How a head is trained.

    Args:
        batch_size: pieces of histories a step.
        learning_rate, weight_decay: of AdamW.
        average: weights are validated, and kept, as a moving average over the steps, of which each step leaves so much
            (Polyak and Juditsky, 1992): a constant learning rate then needs no schedule. 0: as they are.
        most_classes: up to so many trained items the softmax is whole; beyond, so many are drawn for every batch.
        max_epochs: most epochs; ``patience``: how many without a better validation end the training.
        stop_by: what is better: NDCG@5 among the candidates of the validation tasks, or NDCG@10 of their targets over
            the whole catalogue, without the items of the history.
    """

    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    average: float = 0.99
    most_classes: int = 2048
    max_epochs: int = 100
    patience: int = 5
    stop_by: Literal["candidates", "catalogue"] = "candidates"

    def __post_init__(self) -> None:
        if self.stop_by not in ("candidates", "catalogue"):
            raise ValueError(f"stop_by={self.stop_by!r} is not known; there are 'candidates' and 'catalogue'")


@dataclass(frozen=True)
class TrainingData:
    """What a head is trained on: training ``histories``, ``validation`` tasks, and (I, F) ``content`` if it has any."""

    n_items: int
    histories: CodedLists
    validation: CodedTasks
    content: torch.Tensor | None = None

    def counts(self) -> torch.Tensor:
        """(I,): training interactions of each item."""
        return torch.from_numpy(np.bincount(self.histories.codes, minlength=self.n_items))


def fit(
    config: SequenceHeadConfig,
    data: TrainingData,
    options: FitOptions,
    seed: int = 0,
    folder: Path | None = None,
    name: str = "head",
    start: SequenceHead | None = None,
) -> SequenceHead:
    """Train a head and return it with the weights of its best epoch.

    Args:
        folder: where every epoch is saved, under ``name``; a training that was killed goes on from there, and a
            finished one is only loaded. Trainings of other data or settings in the same folder are not touched.
        name: of the progress bar and of the saved state.
        start: a trained head whose identities and network, as far as they have the same shape, are begun with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = SequenceHead(config)
        counts = data.counts()
        if start is not None:
            own = head.state_dict()
            shared = {key: value for key, value in start.state_dict().items() if key in own}
            head.load_state_dict(own | {key: value for key, value in shared.items() if value.shape == own[key].shape})
        head.set_items(counts, data.content)
        training = Training(head, data, options, seed)
        key = digest(asdict(config), asdict(options), seed, data_digest(data, start))
        path = None if folder is None else folder / f"{name}-{key[:16]}.pt"
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            if path.is_file():
                training.restore(torch.load(path, weights_only=True))
        while not training.finished:
            training.epoch(name)
            if path is not None:
                buffer = io.BytesIO()
                torch.save(training.state(), buffer)
                write_bytes(path, buffer.getbuffer())
        load_weights(head, training.best_weights)
    print(f"  {name}: epoch {training.best_epoch} is best by validation ({training.best:.4f})", flush=True)
    return head.eval()


def data_digest(data: TrainingData, start: SequenceHead | None) -> str:
    """A hash of everything that is trained on."""
    arrays = [data.histories.codes, data.histories.bounds, data.validation.candidates.codes, data.validation.labels]
    arrays += [] if data.content is None else [data.content.numpy()]
    arrays += [] if start is None else [value.numpy() for value in start.state_dict().values()]
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


class Training:
    """A training between two epochs: weights, optimizer, and the best epoch so far."""

    def __init__(self, head: SequenceHead, data: TrainingData, options: FitOptions, seed: int) -> None:
        self.head, self.averaged, self.steps = head, copy.deepcopy(head).requires_grad_(False), 0
        self.data, self.options, self.seed = data, options, seed
        self.optimizer = torch.optim.AdamW(head.parameters(), options.learning_rate, weight_decay=options.weight_decay)
        self.done, self.best_epoch, self.best = 0, 0, 0.0
        self.best_weights = weights_of(head)
        self.starts, self.lengths = data.histories.pieces(head.config.max_length + 1)
        self.classes = Classes(head.counts, len(self.starts), options)

    @property
    def finished(self) -> bool:
        """Whether it has run its epochs, or validation has not improved for too long."""
        waited = self.done - self.best_epoch
        return not len(self.starts) or self.done >= self.options.max_epochs or waited >= self.options.patience

    def epoch(self, name: str) -> None:
        """Train on every piece once, and validate."""
        self.done += 1
        rng = np.random.default_rng([self.seed, self.done])
        torch.manual_seed(int(rng.integers(2**62)))
        self.head.train()
        batches = list(batches_by_length(self.lengths, self.options.batch_size, rng))
        bar = tqdm(batches, desc=f"  {name}: epoch {self.done}, best {self.best:.4f}", leave=False)
        for places in bar:
            batch = torch.from_numpy(self.data.histories.padded(self.starts[places], self.lengths[places]))
            loss = next_item_loss(self.head, batch, self.classes, rng)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), 5.0)
            self.optimizer.step()
            self.steps += 1
            left = min(self.options.average, self.steps / (self.steps + 10))  # less at first, to leave the beginning
            with torch.no_grad():
                for mean, value in zip(self.averaged.parameters(), self.head.parameters(), strict=True):
                    mean.lerp_(value, 1 - left)
        quality = validate(self.averaged, self.data.validation, self.options)
        if quality > self.best or not self.best_epoch:
            self.best, self.best_epoch = quality, self.done
            self.best_weights = weights_of(self.averaged)

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs."""
        return {
            "head": weights_of(self.head),
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
        load_weights(self.head, state["head"])
        load_weights(self.averaged, state["averaged"])
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_weights = state["best_weights"]
        self.done, self.best_epoch, self.best = state["done"], state["best_epoch"], state["best"]


def weights_of(head: SequenceHead) -> dict[str, torch.Tensor]:
    """A copy of what is trained of a head."""
    return {name: value.detach().clone() for name, value in head.named_parameters()}


@torch.no_grad()
def load_weights(head: SequenceHead, weights: dict[str, torch.Tensor]) -> None:
    """Put :func:`weights_of` in place."""
    for name, value in head.named_parameters():
        value.copy_(weights[name])


class Classes:
    """The items over which the softmax of a batch goes."""

    def __init__(self, counts: torch.Tensor, n_pieces: int, options: FitOptions) -> None:
        self.trained = counts.nonzero()[:, 0]
        self.whole = len(self.trained) <= options.most_classes
        self.drawn = options.most_classes
        self.place = torch.zeros(len(counts), dtype=torch.int64)
        self.place[self.trained] = torch.arange(len(self.trained))
        # an item misses a batch if none of its pieces is among those of the batch, and it is not drawn either
        total = torch.tensor(n_pieces, dtype=torch.float64)
        size = total.clamp(max=options.batch_size)
        others = (total - counts).clamp(min=0)
        ways = [torch.lgamma(1 + some) - torch.lgamma(1 + (some - size).clamp(min=0)) for some in (others, total)]
        missed = torch.where(others < size, -torch.inf, ways[0] - ways[1])
        self.log_q = torch.log(-torch.expm1(missed + self.drawn * math.log1p(-1 / max(len(self.trained), 2)))).float()

    def of(self, batch: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For (B, L) padded codes: (N,) codes of the classes, (N,) log chances that each is among them, and (B, L) what
        place of them each code has."""
        if self.whole:
            codes, log_q = self.trained, torch.zeros(len(self.trained))
        else:
            drawn = self.trained[torch.from_numpy(rng.integers(0, len(self.trained), self.drawn))]
            codes = torch.cat([drawn, batch[batch != PADDING]]).unique()
            self.place[codes] = torch.arange(len(codes))
            log_q = self.log_q[codes]
        return codes, log_q, torch.where(batch == PADDING, PADDING, self.place[batch.clamp(min=0)])


def next_item_loss(head: SequenceHead, batch: torch.Tensor, classes: Classes, rng: np.random.Generator) -> torch.Tensor:
    """Mean cross-entropy of the next item at every place of (B, L + 1) padded pieces.

    Over sampled classes, the logit of each that is not the target is raised by minus the log chance that it is among
    them: the sum of exponentials is then right on average, and the target, which is always there, needs nothing.
    """
    codes, log_q, places = classes.of(batch, rng)
    vectors = head.item_vectors(codes)
    targets = places[:, 1:]
    real = targets != PADDING
    states = head(places[:, :-1].masked_fill(~real, PADDING), vectors).states[real]
    targets = targets[real]
    logits = states @ vectors.T
    if not classes.whole:
        logits = logits - log_q
        logits = logits.scatter_add(1, targets[:, None], log_q[targets][:, None])
    return F.cross_entropy(logits, targets)


def batches_by_length(lengths: Array, batch_size: int, rng: np.random.Generator) -> Iterator[Array]:
    """Every place of (S,) once, in random batches of pieces of like length."""
    order = rng.permutation(len(lengths))
    span = 32 * batch_size
    groups = [order[begin : begin + span] for begin in range(0, len(order), span)]
    batches = []
    for group in groups:
        group = group[np.argsort(lengths[group], kind="stable")]
        batches += np.array_split(group, -(-len(group) // batch_size))
    for place in rng.permutation(len(batches)):
        yield batches[place]


def validate(head: SequenceHead, tasks: CodedTasks, options: FitOptions) -> float:
    """The mean over validation tasks of what ``options.stop_by`` names."""
    if options.stop_by == "candidates":
        return tasks.quality(score_candidates(head, tasks.histories, tasks.candidates))
    above, equal = tasks.catalogue_places(lambda histories: score_catalogue(head, histories))
    return ndcg_at(10, above, equal)


@torch.inference_mode()
def user_states(head: SequenceHead, histories: CodedLists, vectors: torch.Tensor) -> torch.Tensor:
    """(U, D): the states after whole histories, those of like length together; (I, D) ``vectors`` of the items."""
    recent = histories.last(head.config.max_length)
    order = np.argsort(recent.lengths, kind="stable")
    states = torch.empty(len(order), head.config.hidden)
    for begin in range(0, len(order), 256):
        batch = order[begin : begin + 256]
        codes = torch.from_numpy(recent.padded(recent.bounds[batch], recent.lengths[batch]))
        states[batch] = head(codes, vectors).last
    return states


@torch.inference_mode()
def score_candidates(head: SequenceHead, histories: CodedLists, candidates: CodedLists, pairs: int = 1 << 18) -> Array:
    """(N,): the score of every candidate, list after list."""
    head.eval()
    vectors = head.item_vectors()
    states, codes, owner = user_states(head, histories, vectors), candidates.codes, candidates.owner
    parts = [slice(begin, begin + pairs) for begin in range(0, len(codes), pairs)]
    values = [torch.einsum("nd,nd->n", states[owner[part]], vectors[codes[part]]).numpy() for part in parts]
    return np.concatenate([np.empty(0, np.float32), *values])


@torch.inference_mode()
def score_catalogue(head: SequenceHead, histories: CodedLists, hidden: torch.Tensor | None = None) -> Array:
    """(U, I): the score of every item; of those in ``hidden`` (I,) as if nobody had ever chosen them."""
    head.eval()
    vectors = head.item_vectors()
    states = user_states(head, histories, vectors)
    return (states @ (vectors if hidden is None else head.item_vectors(hidden=hidden)).T).numpy()

"""Training of the sequence head, and of SASRec and GRU4Rec, which are heads without content.

Every place of a training history is an example: its state against the next item, by the softmax over the items that
have training interactions. Beyond some thousand of these the softmax is sampled: the items of the batch and others
drawn uniformly, each weighted by one over the chance that it is among them, so that the sum over all items is met on
average.
Letters: T interactions, S pieces of histories, B histories of a batch, L places, I items, C candidates.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mllm_msr.evaluation.coded_tasks import CodedLists, CodedTasks, ndcg_at
from mllm_msr.evaluation.epochs import Epochs
from mllm_msr.evaluation.product_cross_entropy import product_cross_entropy
from mllm_msr.modeling.sequence_head import PADDING, SequenceHead
from mllm_msr.modeling.sequence_head_options import SequenceHeadConfig
from mllm_msr.records.sections import at_least
from mllm_msr.records.storage import digest

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
        at_least(
            self, batch_size=1, learning_rate=0, weight_decay=0, average=0, most_classes=1, max_epochs=0, patience=1
        )
        if self.average >= 1:
            raise ValueError(f"average={self.average}: must be below 1, or weights would never move")
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
        training.run(None if folder is None else folder / f"{name}-{key[:16]}.pt", name)
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


class Training(Epochs[SequenceHead]):
    """The training of a head on every place of the histories."""

    def __init__(self, head: SequenceHead, data: TrainingData, options: FitOptions, seed: int) -> None:
        super().__init__(head, options, seed)
        self.head, self.data = head, data
        self.starts, self.lengths = data.histories.pieces(head.config.max_length + 1)
        self.classes = Classes(head.counts, len(self.starts), options)

    @property
    def finished(self) -> bool:
        return not len(self.starts) or super().finished

    def batches(self, rng: np.random.Generator) -> list[Array]:
        return list(batches_by_length(self.lengths, self.options.batch_size, rng))

    def loss(self, batch: Array, rng: np.random.Generator) -> torch.Tensor:
        pieces = torch.from_numpy(self.data.histories.padded(self.starts[batch], self.lengths[batch]))
        return next_item_loss(self.head, pieces, self.classes, rng)

    def quality(self) -> float:
        return validate(self.averaged, self.data.validation, self.options)


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
    return product_cross_entropy(states, vectors, targets[real], log_q)


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
def score_candidates(head: SequenceHead, histories: CodedLists, candidates: CodedLists, pairs: int = 1 << 15) -> Array:
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

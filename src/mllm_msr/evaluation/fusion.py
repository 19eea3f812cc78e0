"""Weights of a fused score, fitted on validation tasks by a listwise softmax.

Items have weights by their bucket of training frequency. Few validation targets are of a rare bucket, so its weights
are drawn towards those that all buckets share, and a fusion under which any bucket's targets do worse than under the
best single member is not taken. For the bucket of items that nobody chose in training, some others are taken as such.
Letters: T tasks, C candidates, M members, K buckets, I items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.modeling.score_fusion import BUCKETS, ScoreFusion, frequency_buckets

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4
AHEAD = 2.0  # what is ranked lies further ahead than validation, and more of what is chosen then is new
LEAST_WEIGHT = 0.01
WORSE = 1.645  # standard errors: a bucket that is served as well as before passes 19 times of 20; with 1 only 5 of 6
ROUNDS = 4  # of fits in which the targets of a bucket that did worse weigh twice as much as before


class Member(Protocol):
    """What gives a score to every item from a history."""

    def score_catalogue(self, histories: CodedLists, hidden: Tensor | None = None) -> Array:
        """(U, I); ``hidden`` (I,) items are taken as if nobody had ever chosen them."""


@dataclass(frozen=True)
class FusionTasks:
    """Lists of candidates with each member's scores; the positive comes first.

    Args:
        scores: (T, C, M).
        buckets: (T, C), of the candidates' training frequency.
        log_q: (T, C), log of the chance that a candidate is in the list, 0 if it surely is; inf for what is none.
    """

    scores: Tensor
    buckets: Tensor
    log_q: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def part(self, tasks: Tensor) -> "FusionTasks":
        """Some of the tasks, by place or mask."""
        return FusionTasks(self.scores[tasks], self.buckets[tasks], self.log_q[tasks])

    def joined(self, other: "FusionTasks") -> "FusionTasks":
        """The tasks of both, whose lists are equally long."""
        pairs = zip((self.scores, self.buckets, self.log_q), (other.scores, other.buckets, other.log_q), strict=True)
        return FusionTasks(*(torch.cat(pair) for pair in pairs))

    def ndcg(self, fusion: ScoreFusion, k: int = 10) -> Tensor:
        """(T,): NDCG@k of the positive, ties against it."""
        scores = fusion(self.scores, self.buckets)
        rank = ((scores[:, 1:] >= scores[:, :1]) & (self.log_q[:, 1:] < torch.inf)).sum(dim=1)
        return torch.where(rank < k, 1 / torch.log2(rank + 2.0), 0.0)


def catalogue_lists(
    members: Sequence[Member],
    tasks: CodedTasks,
    counts: Array,
    n_tasks: int = 4000,
    top: int = 50,
    drawn: int = 150,
    hidden_share: float = 0.1,
    seed: int = 0,
) -> FusionTasks:
    """Lists that stand for the whole catalogue: each task's positive, what any member has at the top, and others drawn.

    Args:
        members: their scores, in the order of the fusion's members.
        tasks: of one positive each; items of the history are no candidates.
        counts: (I,), training interactions of each item.
        n_tasks: so many of the tasks, drawn by ``seed``.
        top: items from the top of each member, which are all in the list.
        drawn: further items, uniformly.
        hidden_share: of the items that training has, taken as if nobody had chosen them; tasks whose target is one of
            them are added at the end once more, so that there are targets of that kind; see :func:`settle_bias`.
    """
    rng = np.random.default_rng(seed)
    frequencies = torch.from_numpy(np.asarray(counts))
    hidden = (frequencies > 0) & torch.from_numpy(rng.random(len(counts)) < hidden_share)
    targets = tasks.candidates.codes[np.flatnonzero(tasks.labels)]
    order = rng.permutation(len(tasks))
    shape = (top, drawn)
    whole = _lists(members, tasks, targets, np.sort(order[:n_tasks]), frequencies, None, shape, rng)
    of_hidden = np.sort(order[hidden.numpy()[targets[order]]][: round(n_tasks * hidden_share)])
    if not len(of_hidden):
        return whole
    return whole.joined(_lists(members, tasks, targets, of_hidden, frequencies, hidden, shape, rng))


def _lists(
    members: Sequence[Member],
    tasks: CodedTasks,
    targets: Array,
    chosen: Array,
    counts: Tensor,
    hidden: Tensor | None,
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> FusionTasks:
    buckets = frequency_buckets(counts if hidden is None else counts * ~hidden)
    parts = []
    for begin in range(0, len(chosen), 256):
        some = chosen[begin : begin + 256]
        histories = tasks.histories.pick(some)
        scores = torch.from_numpy(np.stack([member.score_catalogue(histories, hidden) for member in members], axis=-1))
        codes, log_q = draw_lists(scores, histories, torch.from_numpy(targets[some]), shape, rng)
        parts.append(FusionTasks(scores[torch.arange(len(some))[:, None], codes], buckets[codes], log_q))
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.joined(part)
    return joined


def draw_lists(
    scores: Tensor, histories: CodedLists, target: Tensor, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Item codes (T, C) of lists that stand for the whole catalogue, and their ``log_q``, see :class:`FusionTasks`.

    Args:
        scores: (T, I, M) of every item by every member.
        histories: T lists of items that are no candidates.
        target: (T,), which comes first.
        shape: how many items come from the top of each member, and how many are drawn from the others.
    """
    (top, drawn), (n_tasks, n_items, n_members) = shape, scores.shape
    length = 1 + top * n_members + drawn
    allowed = torch.ones(n_tasks, n_items, dtype=torch.bool)
    allowed[histories.owner, histories.codes] = False
    allowed[torch.arange(n_tasks), target] = False
    sure = torch.zeros_like(allowed)
    for member in range(n_members):
        values = scores[..., member].masked_fill(~allowed, -torch.inf)
        sure.scatter_(1, values.topk(min(top, n_items), dim=1).indices, True)
    sure &= allowed
    rest = allowed & ~sure
    order = torch.from_numpy(rng.random((n_tasks, n_items), dtype=np.float32)) * rest + 2.0 * sure
    codes = torch.cat([target[:, None], order.topk(min(length - 1, n_items), dim=1).indices], dim=1)
    n_sure, n_rest = sure.sum(dim=1, keepdim=True), rest.sum(dim=1, keepdim=True)
    share = ((codes.shape[1] - 1 - n_sure) / n_rest.clamp(min=1)).clamp(max=1.0)
    listed = torch.where(sure.gather(1, codes), torch.ones(1), share)
    listed[~allowed.gather(1, codes)] = torch.inf  # filled up with what may not be a candidate: counts for nothing
    listed[:, 0] = 1.0
    return codes, listed.log()


def fit_fusion(
    data: FusionTasks, names: Sequence[str], n_whole: int | None = None, by_likelihood: bool = False
) -> ScoreFusion:
    """The best fusion, cross-validated, of those that serve no bucket's targets worse than the best member.

    What is best is told by NDCG@10 in the lists, or ``by_likelihood`` of the targets, which weighs each candidate by
    the chance that it is listed: where what one member puts first is in the lists, and what another puts first is not,
    NDCG would hold it against the first alone.

    Tried are the best member alone, weights that all buckets share, and weights and biases of each bucket drawn towards
    these more or less; where none of them passes, weights and biases of each bucket drawn towards the best member, from
    which a bucket of few targets is then not far. A bucket is served worse if the mean log probability of its targets
    is lower by more than ``WORSE`` of its standard errors.

    Args:
        n_whole: after so many tasks come those with hidden items; None: there are none. Weights that all buckets share
            are fitted without them: members that know items by their identity do not find such targets, and would
            weigh less for trained items, too, where few items are new.

    >>> scores = torch.randn(400, 20, 2, generator=torch.Generator().manual_seed(0))
    >>> scores[:, 0] += 1.0  # both members find the positive, each with noise of its own
    >>> data = FusionTasks(scores, torch.full((400, 20), 3), torch.zeros(400, 20))
    >>> fusion = fit_fusion(data, ["one", "other"])
    >>> bool((fusion.weights[3] > 0.5).all())
    True
    """
    flat, n_members = data.scores.reshape(-1, len(names)), len(names)
    weights, bias = torch.zeros(len(BUCKETS), n_members), torch.zeros(len(BUCKETS))
    blank = ScoreFusion(tuple(names), flat.mean(dim=0), flat.std(dim=0).clamp(min=1e-6), weights, bias)
    alone = [rightly(fit_shared(data, blank, [member])) for member in range(n_members)]

    def quality(fusion: ScoreFusion, part: FusionTasks) -> Tensor:
        return -listwise_loss(fusion, part) if by_likelihood else part.ndcg(fusion)

    best = max(range(n_members), key=lambda member: float(quality(alone[member], data).mean()))
    least = listwise_loss(alone[best], data)

    def shared(tasks: Tensor) -> ScoreFusion:
        return fit_shared(data.part(tasks & whole), blank, range(n_members))

    def single(tasks: Tensor) -> ScoreFusion:
        return alone[best]

    def by_bucket(tasks: Tensor, towards: Callable[[Tensor], ScoreFusion], penalty: float) -> ScoreFusion:
        return fit_fairly(data.part(tasks), alone[best], towards(tasks), penalty)

    place = torch.arange(len(data))
    whole, fold = place < (len(data) if n_whole is None else n_whole), place % FOLDS
    for towards in (shared, single):
        chosen, value = None, float(quality(alone[best], data).mean())
        fits: list[Callable[[Tensor], ScoreFusion]] = [shared] if towards is shared else []
        fits += [partial(by_bucket, towards=towards, penalty=penalty) for penalty in PENALTIES]
        for fit in fits:
            gained, loss = torch.zeros(len(data)), torch.zeros(len(data))
            for number in range(min(FOLDS, len(data))):
                fusion, rest = fit(fold != number), data.part(fold == number)
                gained[fold == number], loss[fold == number] = quality(fusion, rest), listwise_loss(fusion, rest)
            if float(gained.mean()) > value and not worse_buckets(loss - least, data.buckets[:, 0]).any():
                chosen, value = fit(place >= 0), float(gained.mean())
        if chosen is not None:
            return chosen
    return alone[best]


def settle_bias(fusion: ScoreFusion, data: FusionTasks) -> ScoreFusion:
    """The same with the bias of items that nobody chose as tasks have it in which none is hidden.

    Targets that were hidden teach what each member says of new items. They are far more than new targets are, and by
    their bias new items would come before all others. A real new target counts ``AHEAD`` times.
    """
    shift, new = torch.zeros(1, requires_grad=True), torch.eye(len(BUCKETS))[0]
    counted = torch.where(data.buckets[:, 0] == 0, AHEAD, 1.0)

    def loss() -> Tensor:
        losses = listwise_loss(replace(fusion, bias=fusion.bias + shift * new), data)
        return ((losses * counted).sum() + shift.square().sum()) / counted.sum()

    minimise(loss, [shift])
    return replace(fusion, bias=fusion.bias + shift.detach() * new)


def worse_buckets(differences: Tensor, buckets: Tensor) -> Tensor:
    """(K,): whether the mean of (T,) paired differences of a loss is above zero by more than chance would have it."""
    mean = bucket_means(differences, buckets)
    count = torch.bincount(buckets, minlength=len(BUCKETS)).clamp(min=1)
    return mean > WORSE * (bucket_means((differences - mean[buckets]).square(), buckets) / count).sqrt()


def bucket_means(values: Tensor, buckets: Tensor) -> Tensor:
    """(K,): means of (T,) values by bucket, 0 for one without any."""
    sums = torch.zeros(len(BUCKETS)).index_add(0, buckets, values)
    return sums / torch.bincount(buckets, minlength=len(BUCKETS)).clamp(min=1)


def fit_shared(data: FusionTasks, blank: ScoreFusion, members: Sequence[int]) -> ScoreFusion:
    """Weights of some members that all buckets share, without biases."""
    shared = torch.ones(len(members), requires_grad=True)

    def fusion() -> ScoreFusion:
        weights = torch.zeros(len(blank.members)).index_add(0, torch.tensor(members), shared)
        return replace(blank, weights=weights.expand(len(BUCKETS), -1))

    minimise(lambda: listwise_loss(fusion(), data).mean(), [shared])
    return replace(blank, weights=fusion().weights.detach().clone())


def fit_fairly(data: FusionTasks, best: ScoreFusion, towards: ScoreFusion, penalty: float) -> ScoreFusion:
    """As :func:`fit_buckets`, with weights of the targets under which, if it can be, none of a bucket does worse."""
    least, target = listwise_loss(best, data), data.buckets[:, 0]
    counted = torch.ones(len(BUCKETS))
    for _ in range(ROUNDS):
        fusion = fit_buckets(data, towards, penalty, counted[target])
        worse = worse_buckets(listwise_loss(fusion, data) - least, target)
        if not worse.any():
            break
        counted = torch.where(worse, 2 * counted, counted)
    return fusion


def rightly(alone: ScoreFusion) -> ScoreFusion:
    """A single member's order is never turned round, though a few tasks may fit better so."""
    return replace(alone, weights=torch.where(alone.weights < 0, LEAST_WEIGHT, alone.weights))


def fit_buckets(data: FusionTasks, towards: ScoreFusion, penalty: float, counted: Tensor) -> ScoreFusion:
    """Weights and biases by bucket, of least loss plus ``penalty`` times their squared distance from shared ones.

    ``counted``: (T,), how much each task counts.
    """
    weights, bias = towards.weights.clone().requires_grad_(), towards.bias.clone().requires_grad_()

    def loss() -> Tensor:
        away = (weights - towards.weights).square().sum() + (bias - towards.bias).square().sum()
        losses = listwise_loss(replace(towards, weights=weights, bias=bias), data)
        return (losses * counted).sum() / counted.sum() + penalty * away

    minimise(loss, [weights, bias])
    return replace(towards, weights=weights.detach(), bias=bias.detach())


def listwise_loss(fusion: ScoreFusion, data: FusionTasks) -> Tensor:
    """(T,): cross-entropy of the positives, each other candidate over its chance to be in the list."""
    logits = fusion(data.scores, data.buckets) - data.log_q
    return F.cross_entropy(logits, torch.zeros(len(data), dtype=torch.int64), reduction="none")


def minimise(loss: Callable[[], Tensor], parameters: list[Tensor], steps: int = 50) -> None:
    """LBFGS until nothing moves."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)

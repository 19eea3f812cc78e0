"""One queue in front of the model, for the requests of all clients.

A thread of its own takes what waits, in order, as much as a token budget allows, and has it scored in one go. So
requests share forwards. A large one gets a share of the budget at a time and then waits behind the others, so that
small ones get their answers in between; small ones are done whole, as nobody gains by all being half done.
Whatever else touches the model or the items runs on the same thread, by :meth:`ModelQueue.call`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from mllm_msr.modeling.inputs import Candidate, User

SHARES = 4  # of the budget; a request gets one at a time while others wait
Result = TypeVar("Result")
# users, for each the names of candidates, and these by name; logits for each user
ScorePairs = Callable[[Sequence[User], Sequence[Sequence[str]], Mapping[str, Candidate]], Sequence[np.ndarray]]


class QueueFull(RuntimeError):
    """No room for a request; ``retry_after`` seconds from now there will be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting: try again in {retry_after} s")
        self.retry_after = retry_after


class QueueClosed(RuntimeError):
    """The server is shutting down."""


@dataclass(eq=False)
class Scoring:
    """Candidates to be scored for one user.

    Args:
        costs: tokens of each candidate, about.
        user_cost: tokens of the user, about.
        deadline: on the monotonic clock; what is not done by then is dropped.
        done: how many have been scored.
        cost: tokens that are left.
    """

    user: User
    names: Sequence[str]
    catalogue: Mapping[str, Candidate]
    costs: Sequence[int]
    user_cost: int
    deadline: float
    future: Future = field(default_factory=Future)
    parts: list[np.ndarray] = field(default_factory=list)
    done: int = 0
    cost: int = field(init=False)

    def __post_init__(self) -> None:
        self.cost = self.user_cost + sum(self.costs)


@dataclass(eq=False)
class Call:
    """A function that must run on the model's thread."""

    function: Callable[[], Any]
    deadline: float
    future: Future = field(default_factory=Future)
    cost: int = 0


class ModelQueue:
    """See the module.

    Args:
        score: of the model.
        token_budget: tokens that are scored in one go, about.
        wait: seconds that the first request waits for others when nothing else is under way.
        max_jobs, max_tokens: what may wait; a request beyond that is refused, unless nothing waits at all, and so is
            one whose turn would come after its deadline.
    """

    def __init__(
        self,
        score: ScorePairs,
        token_budget: int = 16384,
        wait: float = 0.002,
        max_jobs: int = 1024,
        max_tokens: int = 4_000_000,
    ) -> None:
        self.score, self.token_budget, self.wait = score, token_budget, wait
        self.max_jobs, self.max_tokens = max_jobs, max_tokens
        self.tokens_per_second = 20_000.0  # as measured lately
        self.batches = self.scored_pairs = self.dropped = 0
        self._jobs: deque[Scoring | Call] = deque()
        self._tokens = 0  # of what waits or is under way
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether a request waits or is being answered."""
        return bool(self._jobs) or self._tokens > 0

    def submit(
        self,
        user: User,
        names: Sequence[str],
        catalogue: Mapping[str, Candidate],
        costs: Sequence[int],
        user_cost: int,
        deadline: float,
    ) -> "Future[np.ndarray]":
        """Have candidates scored: (N,) logits in the order of ``names``; see :class:`Scoring` for the arguments.

        A future that is cancelled is no longer worked on.

        Raises:
            QueueFull, QueueClosed: nothing will come of it.
        """
        if not names:
            empty: Future[np.ndarray] = Future()
            empty.set_result(np.empty(0, np.float32))
            return empty
        return self._put(Scoring(user, names, catalogue, costs, user_cost, deadline))

    def call(self, function: Callable[[], Result], deadline: float = float("inf")) -> "Future[Result]":
        """Have a function run on the model's thread, when it is its turn."""
        return self._put(Call(function, deadline))

    def close(self) -> None:
        """Finish what has begun or waits, and take nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _put(self, job: Scoring | Call) -> Future:
        with self._changed:
            if self._closed:
                raise QueueClosed("the server is shutting down")
            crowded = len(self._jobs) >= self.max_jobs or self._tokens + job.cost > self.max_tokens
            if self._jobs and (crowded or self._seconds_before(job) > max(0.0, job.deadline - time.monotonic())):
                raise QueueFull(max(1, min(60, round(self._tokens / self.tokens_per_second))))
            self._tokens += job.cost
            self._jobs.append(job)
            self._changed.notify_all()
        return job.future

    def _seconds_before(self, job: Scoring | Call) -> float:
        """About how long a job waits for those before it: all of small ones, and as much of large ones as of itself."""
        most = max(job.cost, self.token_budget // SHARES)
        return sum(min(each.cost, most) for each in self._jobs) / self.tokens_per_second

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._tokens = 0
                    self._changed.wait_for(lambda: self._jobs or self._closed)
                    if not self._jobs:
                        return
                    until = time.monotonic() + self.wait  # others may be about to ask
                    while self._tokens < self.token_budget and (left := until - time.monotonic()) > 0:
                        self._changed.wait(left)
                call, batch = self._take()
            if call is not None:
                self._call(call)
            elif batch:
                start, cost = time.monotonic(), sum(sum(job.costs[job.done : end]) for job, end in batch)
                self._score(batch)
                rate = cost / max(time.monotonic() - start, 1e-6)
                self.tokens_per_second += 0.2 * (rate - self.tokens_per_second)

    def _take(self) -> tuple[Call | None, list[tuple[Scoring, int]]]:
        """What is done next: a call, or candidates of some requests up to the budget, with where they end.

        A request that has had its share and is not finished goes to the end of the queue; one for which there was no
        room stays where it is.
        """
        now, alive = time.monotonic(), list[Scoring]()
        for job in list(self._jobs):
            if job.future.cancelled() or now > job.deadline:
                self._jobs.remove(job)
                self._tokens -= job.cost
                self.dropped += 1
                if job.future.set_running_or_notify_cancel():  # whoever waits may cancel at this very moment
                    job.future.set_exception(TimeoutError("the request was not done in time"))
            elif isinstance(job, Scoring):
                alive.append(job)
        first = self._jobs[0] if self._jobs else None
        if isinstance(first, Call):
            self._jobs.popleft()
            return first, []
        ends = {id(job): job.done for job in alive}
        budget, growing, cut = self.token_budget, list(alive), None
        while growing and budget > 0:
            share = max(1, budget // min(SHARES, len(growing)))
            for job in growing:
                end, room = ends[id(job)], min(share, budget)
                cut = job if budget < share else None
                if end == job.done:
                    room -= job.user_cost
                    budget -= job.user_cost
                while end < len(job.names) and (room > 0 or end == ends[id(job)]):
                    room -= job.costs[end]
                    budget -= job.costs[end]
                    end += 1
                ends[id(job)] = end
                if budget <= 0:
                    break
            growing = [job for job in growing if ends[id(job)] < len(job.names)]
        batch = [(job, ends[id(job)]) for job in alive if ends[id(job)] > job.done]
        for job, end in batch:
            if job is not cut or end == len(job.names):
                self._jobs.remove(job)
        self._jobs.extend(job for job, end in batch if end < len(job.names) and job is not cut)
        return None, batch

    def _call(self, call: Call) -> None:
        if call.future.set_running_or_notify_cancel():
            try:
                call.future.set_result(call.function())
            except BaseException as error:
                call.future.set_exception(error)

    def _score(self, batch: list[tuple[Scoring, int]]) -> None:
        users = [job.user for job, _ in batch]
        rows = [job.names[job.done : end] for job, end in batch]
        try:  # an item may have been deleted since the request came, and its image may be in a database that is away
            catalogue = {name: job.catalogue[name] for (job, _), row in zip(batch, rows, strict=True) for name in row}
            logits = self.score(users, rows, catalogue)
        except Exception as error:
            if len(batch) > 1:  # only the request at fault is to fail
                for alone in batch:
                    self._score([alone])
                return
            self._fail(batch[0][0], error)
            return
        self.batches += 1
        self.scored_pairs += sum(map(len, rows))
        for (job, end), part in zip(batch, logits, strict=True):
            job.parts.append(part)
            with self._changed:
                spent = job.cost if end == len(job.names) else sum(job.costs[job.done : end])
                self._tokens -= spent
                job.cost -= spent
                job.done = end
            if end == len(job.names) and job.future.set_running_or_notify_cancel():
                job.future.set_result(np.concatenate(job.parts))

    def _fail(self, job: Scoring, error: Exception) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._tokens -= job.cost
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)

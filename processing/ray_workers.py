"""Workers on a Ray cluster: actors that hold what is expensive to make, fed by the process that asks.

Ray's actors, and not a pipeline of Ray Data: the actors of a pipeline end with it, so that a model would be loaded anew
for every wave of history blocks; and its results wait for a block of some size, and would be lost if this process is
killed. Here a result is with whoever asked as soon as it is there.

No worker gets more than :data:`AHEAD` pieces before it has answered. The pieces of a worker that is lost, with its
process or its machine, go to others; in its place, and where the cluster grows, new ones are started.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import ray
from ray.exceptions import (
    AuthenticationError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mllm_msr.processing.shipped_folders import copy_of, listing, read_part
from mllm_msr.processing.workers import Folder, Piece, Result
from mllm_msr.records.cluster import Cluster

logger = logging.getLogger(__name__)
AHEAD = 2  # pieces of a worker: one in work, one on its way
LOOK = 5.0  # seconds after which the size of the cluster is looked at again
SILENCE = 20.0  # seconds after which a head that does not answer is taken for lost; Ray ends this process after 60
PATIENCE = 120.0  # seconds until it is said that there is still no worker
LIVES = 4  # workers that may be lost over one piece
ANSWER = 5.0  # seconds in which the head of a cluster answers
SETTINGS = b"\x04"  # kind of the frame with which both sides of HTTP/2 begin, and the client with a preface (RFC 9113)
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)
STORE = 500_000_000  # bytes for pieces and results on a cluster of this machine alone; more of them go to its disk


class Source:
    """Reads, on the machine of the process that asks, the folders that workers on other machines need."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self.folders = folders

    def listing(self, number: int) -> dict[str, tuple[int, int]]:
        return listing(self.folders[number])

    def read(self, number: int, name: str, start: int) -> bytes:
        return read_part(self.folders[number], name, start)


class Worker:
    """Does pieces, one at a time."""

    def __init__(self, make: Callable[..., Any], folders: Sequence[Folder], machine: str, source: Any) -> None:
        self.make, self.folders, self.machine, self.source = make, folders, machine, source
        self.work: Callable[[Any], Any] | None = None

    def start(self) -> None:
        """Make what does a piece; not where the actor is made, whose errors would come as text alone."""
        if ray.get_runtime_context().get_node_id() == self.machine:
            paths = [folder.path for folder in self.folders]
        else:
            paths = [self._copy(number) for number in range(len(self.folders))]
        self.work = self.make(*paths)

    def do(self, piece: Any) -> Any:
        assert self.work is not None
        return self.work(piece)

    def _copy(self, number: int) -> Path:
        files = ray.get(self.source.listing.remote(number))
        return copy_of(files, lambda name, start: ray.get(self.source.read.remote(number, name, start)))


@dataclass(eq=False)
class _Hand:
    """A worker as this process sees it: ``starting`` until it takes ``pieces``, of which so many are not answered."""

    actor: Any
    starting: Any
    pieces: int = 0


@dataclass(eq=False)
class _Job(Generic[Piece]):
    """A piece, and how many workers were lost over it."""

    piece: Piece
    lost: int = 0


class RayWorkers(Generic[Piece, Result]):
    """See :mod:`mllm_msr.processing.open_workers`. Nothing is connected before the first piece is there."""

    def __init__(
        self, cluster: Cluster, make: Callable[..., Callable[[Piece], Result]], folders: Sequence[Folder]
    ) -> None:
        self.cluster, self.make, self.folders = cluster, make, folders
        self.hands: list[_Hand] = []
        self.connected = False
        self.source: Any = None  # once connected, where there may be other machines
        self.looked = -LOOK  # at the size of the cluster, by the clock
        self.heard = 0.0  # when its head answered last, by the clock
        self.failed_starts = 0  # in a row
        self.asked = float("inf")  # when the first worker was, by the clock

    def __enter__(self) -> "RayWorkers[Piece, Result]":
        return self

    def __exit__(self, *error: object) -> None:
        for hand in self.hands:
            ray.kill(hand.actor)
        if self.source is not None:
            ray.kill(self.source)
        self.hands, self.source, self.connected = [], None, False

    def map(self, pieces: Iterable[Piece]) -> Iterator[Result]:
        """See :class:`~mllm_msr.processing.workers.Workers`.

        Raises:
            RuntimeError: workers were lost again and again over one piece, or none can be started.
            Exception: whatever a worker raises, which stops the work.
        """
        jobs, returned = map(_Job, pieces), deque[_Job[Piece]]()
        running: dict[Any, tuple[_Job[Piece], _Hand]] = {}
        while True:
            if not running and not returned:
                if (first := next(jobs, None)) is None:
                    return
                returned.append(first)
            self._grow()
            while (hand := self._free()) and (job := returned.popleft() if returned else next(jobs, None)):
                hand.pieces += 1
                running[hand.actor.do.remote(job.piece)] = (job, hand)
            starting = {hand.starting: hand for hand in self.hands if hand.starting is not None}
            answers = ray.wait([*running, *starting], timeout=LOOK)[0]
            if not answers and not running and time.monotonic() - self.asked > PATIENCE:
                logger.warning("still waiting for a worker: is there room on the cluster?")
                self.asked = float("inf")  # said once
            for answer in answers:
                if answer in starting:
                    self._started(starting[answer])
                    continue
                job, hand = running.pop(answer)
                hand.pieces -= 1
                try:
                    result = ray.get(answer)
                except (RayActorError, ObjectLostError, OutOfMemoryError) as error:
                    self._lose(hand)
                    job.lost += 1
                    if job.lost >= LIVES:
                        raise RuntimeError(
                            f"{LIVES} workers were lost over one piece of work: {_reason(error)}"
                        ) from error
                    returned.append(job)
                except RayTaskError as error:
                    raise error.cause from None
                else:
                    yield result

    def _free(self) -> _Hand | None:
        """Who has least to do, if that is little."""
        ready = [hand for hand in self.hands if hand.starting is None and hand.pieces < AHEAD]
        return min(ready, key=lambda hand: hand.pieces, default=None)

    def _started(self, hand: _Hand) -> None:
        try:
            ray.get(hand.starting)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            self._lose(hand)
            self.failed_starts += 1
            if self.failed_starts > LIVES + len(self.hands):
                raise RuntimeError(
                    f"no worker can be started: {_reason(error)}; every machine of the cluster needs the same packages "
                    "and the same RAY_AUTH_MODE"
                ) from error
        else:
            hand.starting, self.failed_starts = None, 0

    def _lose(self, hand: _Hand) -> None:
        if hand in self.hands:
            self.hands.remove(hand)
            ray.kill(hand.actor)
            logger.warning("a worker was lost: its work goes to others")
            self.looked = -LOOK

    def _grow(self) -> None:
        """Start workers, now and then, until there are as many as the cluster has room for."""
        if time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        self._connect()
        if not self._is_there():
            return
        count, resources = self._share()
        while len(self.hands) < count:
            kind: Any = ray.remote(Worker).options(scheduling_strategy="SPREAD", **resources)
            actor = kind.remote(self.make, self.folders, self.machine, self.source)
            self.hands.append(_Hand(actor, actor.start.remote()))

    def _is_there(self) -> bool:
        """Whether the head of the cluster answers; RuntimeError if it has not for long, as Ray waits without a word."""
        try:
            _knock(ray.get_runtime_context().gcs_address)
        except OSError as error:
            if time.monotonic() - self.heard < SILENCE:
                return False
            raise self._ended() from error
        self.heard = time.monotonic()
        return True

    def _ended(self) -> RuntimeError:
        self.hands, self.source = [], None  # to end them Ray would ask the head
        what = "the cluster has ended: start it anew, and run the same command to go on"
        return RuntimeError(f"--ray {self.cluster.address}: {what}")

    def _share(self) -> tuple[int, dict[str, Any]]:
        """How many workers there may be, and what each takes."""
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not machines:
            raise self._ended()
        cards = [int(machine.get("GPU", 0)) for machine in machines]
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        if not sum(cards):
            count = min(self.cluster.workers or sum(cores), max(1, sum(cores)))
            return count, {"num_cpus": share_of(cores, count)}
        count = self.cluster.workers or sum(cards)
        return count, {
            "num_cpus": min(1, sum(cores) / count),
            "num_gpus": share_of(cards, count) if count <= sum(cards) else sum(cards) / count,
        }

    def _connect(self) -> None:
        if self.connected:
            return
        connect(self.cluster.address)
        self.machine = ray.get_runtime_context().get_node_id()
        if self.cluster.address != "local":
            place = NodeAffinitySchedulingStrategy(self.machine, soft=False)
            self.source = ray.remote(Source).options(num_cpus=0, scheduling_strategy=place).remote(self.folders)
        self.connected, self.asked, self.heard = True, time.monotonic(), time.monotonic()


def share_of(sizes: Sequence[int], count: int) -> int:
    """The largest whole share of machines of these sizes of which there is room for ``count``.

    >>> share_of([8, 8], 2), share_of([8, 8], 3), share_of([1, 1], 1)
    (8, 4, 1)
    """
    largest = max(1, min(sum(sizes) // count, max(sizes)))
    return next((size for size in range(largest, 1, -1) if sum(have // size for have in sizes) >= count), 1)


def connect(address: str) -> None:
    """Join a cluster, or for ``local`` make one, if this process is in none; ValueError if none answers."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    how: dict[str, Any] = {}
    if address == "local":  # Ray's own workers would stand back behind all else on the machine
        how = {"include_dashboard": False, "object_store_memory": STORE, "_system_config": {"worker_niceness": 0}}
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    try:
        if ":" in place:
            _knock(place)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **how)
    except (OSError, GetTimeoutError, AuthenticationError, ValueError, RuntimeError) as error:
        raise ValueError(f"--ray {address}: {_refusal(error)}") from error


def _refusal(error: BaseException) -> str:
    """Why a cluster was not joined, and what to do."""
    cause: BaseException | None = error
    while cause is not None:
        if "AuthenticationError" in f"{type(cause).__name__}: {cause}":
            where = "~/.ray/auth_token of its head's machine, or its content in RAY_AUTH_TOKEN"
            return f"the cluster asks for its token: have {where}, and `export RAY_AUTH_MODE=token` (docs/scale.md)"
        cause = cause.__cause__
    remedy = "start one by `ray start --head`, give its HOST:PORT, or use --ray local"
    return f"no cluster answers there ({type(error).__name__}): {remedy}"


def _knock(address: str) -> None:
    """OSError if no server of gRPC answers; Ray itself would wait for minutes, or for ever for one that is silent."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER) as server:
        if os.environ.get("RAY_USE_TLS", "0") not in ("1", "true", "True"):
            server.sendall(HTTP2)
            if server.recv(9, socket.MSG_WAITALL)[3:4] != SETTINGS:
                raise ConnectionError("something else answers")


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

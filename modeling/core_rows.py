"""Rows side by side: on a CPU each core computes rows of its own.

A product of a small model that is divided among cores has them wait for one another after every operation. And a row
there has one user, if that user's pairs are enough for one: what several share a row for is computed with padding.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import chain, islice
from threading import Barrier
from typing import TypeVar

import numpy as np
import torch

LEAST = 512  # tokens of a row that is worth a core
Part = TypeVar("Part")
Result = TypeVar("Result")


def cores(device: torch.device) -> int:
    """How many rows are computed at a time where a model is."""
    return torch.get_num_threads() if device.type == "cpu" and not torch.is_autocast_enabled("cpu") else 1


def rows_of(owners: np.ndarray, device: torch.device, tokens: int, pair_tokens: Callable[[], int]) -> Iterator[slice]:
    """Which of N pairs are computed together.

    Args:
        owners: (N,) the user of each, those of one user after one another.
        tokens: that may be in a row; pair_tokens: of a pair, as far as is known when the next row is begun.
    """
    share = -(-len(owners) // cores(device))
    start = 0
    while start < len(owners):
        most = max(1, tokens // pair_tokens())
        end = start + most
        if device.type == "cpu":
            least = max(1, LEAST // pair_tokens())
            last = owners[min(start + least, len(owners)) - 1]
            end = min(end, start + max(least, share), int(np.searchsorted(owners, last, side="right")))
        yield slice(start, end)
        start = end


def each_on_a_core(compute: Callable[[Part], Result], parts: Iterator[Part], count: int) -> Iterator[Result]:
    """What is computed of each part, in order, by ``count`` threads; by this one if there are not parts for all."""
    first = list(islice(parts, count))
    if count == 1 or len(first) < count:
        yield from map(compute, chain(first, parts))
        return
    waiting = deque[Future[Result]]()
    try:
        for part in chain(first, parts):
            waiting.append(_threads(count).submit(torch.inference_mode()(compute), part))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        wait([future for future in waiting if not future.cancel()])


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that compute with one core each."""
    ready = Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # or a thread would begin with what was set last by any
        ready.wait()

    pool = ThreadPoolExecutor(count, "row", begin)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(count)  # of this thread, and what new ones begin with
    return pool

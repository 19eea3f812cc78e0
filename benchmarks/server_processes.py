"""Server processes for ``serving.py``: the real one, and two that are the same code with less in it.

As a script it is one of the two: ``python benchmarks/server_processes.py KIND RUN STATE``. "one at a time" takes the
requests one after another; "naive" computes every pair as a whole prompt as well, and decodes and encodes every image
anew, as a server around a model of transformers does.
"""

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

OURS, ONE_AT_A_TIME, NAIVE = "ours", "one at a time", "naive"
THREADS = {"OMP_NUM_THREADS": str(os.cpu_count()), "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Server:
    """A server that listens, and its process."""

    process: subprocess.Popen
    url: str

    @property
    def memory_mb(self) -> float:
        """What it has in memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


@contextmanager
def server(kind: str, run: Path, state: Path | str) -> Iterator[Server]:
    """A server of a kind on a free port, until the block ends."""
    ours = ["-m", "mllm_msr.cli", "serve", str(run), "--port", "0", "--device", "cpu", "--state", str(state)]
    line = [sys.executable, *(ours if kind == OURS else [__file__, kind, str(run), str(state)])]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **THREADS}
    )
    try:
        assert process.stdout is not None
        found = next((text for text in process.stdout if "http://" in text), None)
        if found is None:
            sys.exit(f"the server {kind!r} did not start: run `mllm-msr serve {run}` to see why")
        yield Server(process, found.strip().rpartition(" ")[2].removesuffix("/docs"))
    finally:
        process.terminate()
        process.wait()


def serve_less(kind: str, run: Path, state: str) -> None:
    """Serve in this process with batching off and, if naive, with nothing shared or kept."""
    from mllm_msr.evaluation.loading import load_recommender
    from mllm_msr.serving import catalogue, opening, service
    from mllm_msr.serving.batching import Call, ModelQueue, Scoring
    from mllm_msr.serving.main import ServeOptions, serve

    class OneAtATime(ModelQueue):
        def _take(self) -> tuple[Call | None, list[tuple[Scoring, int]]]:
            job = self._jobs.popleft()
            return (job, []) if isinstance(job, Call) else (None, [(job, len(job.names))])

    patched: Any = service
    patched.ModelQueue = OneAtATime
    if kind == NAIVE:
        patched, patched_catalogue = opening, catalogue
        patched.load_recommender = lambda run, how: load_recommender(run, replace(how, share_prefix=False))
        patched_catalogue.KEPT = 0
        service.Service._prepared = lambda self, image: image  # type: ignore[method-assign]
    serve(ServeOptions(run, port=0, device="cpu", state=state, deadline=600))


@dataclass
class Took:
    """How long requests took, in seconds, and all of them together."""

    each: list[float] = field(default_factory=list)
    whole: float = 0.0

    def figures(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.each, [50, 99])
        rate = len(self.each) / self.whole
        return {"p50_ms": round(1e3 * p50, 1), "p99_ms": round(1e3 * p99, 1), "requests_per_s": round(rate, 2)}


def load(url: str, request: Callable[[int], tuple[str, Any]], clients: int, seconds: float, warm: int = 3) -> Took:
    """Have some clients ask for a while, each as soon as it has its answer.

    Args:
        request: path and body of the n-th request.
    """
    numbers, took = itertools.count(), Took()

    async def ask(session: aiohttp.ClientSession) -> float:
        path, body = request(next(numbers))
        start = time.perf_counter()
        async with session.post(url + path, json=body) as response:
            await response.read()
            if response.status != 200:
                sys.exit(f"{path}: {response.status} {await response.text()}")
        return time.perf_counter() - start

    async def client(session: aiohttp.ClientSession, until: float) -> None:
        while time.perf_counter() < until:
            took.each.append(await ask(session))

    async def everyone() -> None:
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            for _ in range(warm):
                await ask(session)
            start = time.perf_counter()
            await asyncio.gather(*(client(session, start + seconds) for _ in range(clients)))
            took.whole = time.perf_counter() - start

    asyncio.run(everyone())
    return took


if __name__ == "__main__":
    serve_less(sys.argv[1], Path(sys.argv[2]), sys.argv[3])

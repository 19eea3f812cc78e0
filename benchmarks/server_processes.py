"""Server processes for ``serving.py``: the real one, and two that are the same code with less in it.

As a script it is one of the two: ``python benchmarks/server_processes.py KIND RUN STATE``. "one at a time" takes the
requests one after another; "naive" computes every pair as a whole as well, prompt or blocks, decodes and encodes every
image anew, and leaves matrix products and memory to torch, as a server around a model of transformers does.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from mllm_msr.records.run import RunFolder

AT_ONCE = 100  # pairs of the naive server
OURS, ONE_AT_A_TIME, NAIVE = "ours", "one at a time", "naive"
THREADS = {"OMP_NUM_THREADS": str(os.cpu_count()), "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Server:
    """A server that listens, and its process."""

    process: subprocess.Popen
    url: str

    @property
    def cpu_seconds(self) -> float:
        """What it has computed so far, which other work on the machine does not lengthen."""
        used = psutil.Process(self.process.pid).cpu_times()
        return used.user + used.system

    @property
    def memory_mb(self) -> float:
        """What it has in memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


@contextmanager
def server(kind: str, run: Path, state: Path | str, *flags: str) -> Iterator[Server]:
    """A server of a kind on a free port, until the block ends; ``flags`` of `mllm-msr serve`."""
    ours = ["-m", "mllm_msr.cli", "serve", str(run), "--port", "0", "--device", "cpu", "--state", str(state), *flags]
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


class WholePairs:
    """Scores every pair by itself: its prompt, or of a ``late`` model the user's block, the candidate's, the answer."""

    def __init__(self, recommender: Any) -> None:
        self.model, self.processor, self.late = recommender.model, recommender.processor, recommender.late

    def scores(self, users: Any, rows: Any, names: Any, catalogue: Any) -> Iterator[Any]:
        from mllm_msr.modeling.inputs import Candidate
        from mllm_msr.modeling.late_ranking import Scores

        for user, row in enumerate(rows):
            for start in range(0, len(row), AT_ONCE):
                shown = [Candidate.of(catalogue[names[item]]) for item in row[start : start + AT_ONCE]]
                batch = self.batch([users[user]] * len(shown), shown)
                places = np.arange(start, start + len(shown))
                yield Scores(np.full(len(shown), user), places, self.model.score(**batch).logits.numpy())

    def batch(self, users: list[Any], candidates: list[Any]) -> Any:
        import torch

        from mllm_msr.modeling.packing import pack_late

        if not self.late:
            return self.processor(users, candidates)
        limits = self.model.config.user_limit, self.model.config.item_limit
        blocks = self.processor.late_blocks(users, candidates, limits)
        pairs = torch.arange(len(users)).expand(2, -1)
        return pack_late(self.model, blocks["users"], blocks["items"], blocks["answer_ids"], pairs)


def serve_less(kind: str, run: Path, state: str) -> None:
    """Serve in this process with batching off and, if naive, with nothing shared or kept."""
    from mllm_msr.evaluation.loading import Computing, is_late, load_recommender
    from mllm_msr.modeling import onednn_linear
    from mllm_msr.serving import catalogue, main, opening, service
    from mllm_msr.serving.batching import Call, ModelQueue, Scoring

    class OneAtATime(ModelQueue):
        def _take(self) -> tuple[Call | None, list[tuple[Scoring, int]]]:
            job = self._jobs.popleft()
            return (job, []) if isinstance(job, Call) else (None, [(job, len(job.names))])

    def load_naive(run: RunFolder, how: Computing) -> Any:
        recommender = load_recommender(run, replace(how, cache=None, share_prefix=None if is_late(run) else False))
        recommender.plan, recommender.cache = WholePairs(recommender), None
        return recommender

    patched: Any = service
    patched.ModelQueue = OneAtATime
    if kind == NAIVE:
        patched.Service._prepared = lambda self, image: image
        patched, patched_catalogue = opening, catalogue
        patched.load_recommender = load_naive
        patched_catalogue.KEPT = 0
        onednn_linear.onednn_is_quicker, main.keep_freed_memory = (lambda: False), (lambda: None)
    main.serve(main.ServeOptions(str(run), port=0, device="cpu", state=state, deadline=600))


@dataclass
class Took:
    """How long requests took, in seconds, all of them together, and what the server has computed meanwhile."""

    each: list[float] = field(default_factory=list)
    whole: float = 0.0
    cpu: float = 0.0

    def figures(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.each, [50, 99])
        figures = {"p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99, "cpu_ms": 1e3 * self.cpu / len(self.each)}
        return {name: round(float(value), 1) for name, value in figures.items()} | {
            "requests_per_s": round(len(self.each) / self.whole, 2)
        }


def load(running: Server, requests: Iterator[tuple[str, Any]], clients: int, seconds: float, warm: int = 3) -> Took:
    """Have some clients ask for a while, each as soon as it has its answer.

    Args:
        requests: path and body of each, without end.
    """
    took = Took()

    async def ask(session: aiohttp.ClientSession) -> float:
        path, body = next(requests)
        start = time.perf_counter()
        async with session.post(running.url + path, json=body) as response:
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
            start, computed = time.perf_counter(), running.cpu_seconds
            await asyncio.gather(*(client(session, start + seconds) for _ in range(clients)))
            took.whole, took.cpu = time.perf_counter() - start, running.cpu_seconds - computed

    asyncio.run(everyone())
    return took


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=(ONE_AT_A_TIME, NAIVE))
    parser.add_argument("run", type=Path)
    parser.add_argument("state")
    serve_less(**vars(parser.parse_args()))

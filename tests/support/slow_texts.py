"""What workers do in tests: numbers that double, and texts that take a while, with marks of who wrote them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import polars as pl

from mllm_msr.processing import ray_workers
from mllm_msr.processing.engines import Answer, EngineUnavailable, Text
from mllm_msr.processing.open_workers import joined, open_workers
from mllm_msr.processing.summaries import summarize_users
from mllm_msr.processing.text_requests import TextRequest, WrittenTexts, write_texts
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.cluster import Cluster


def double(marks: Path, workers: int, folder: Path, number: int) -> tuple[int, str, int]:
    (marks / str(os.getpid())).touch()
    until = time.monotonic() + 300
    while len(list(marks.iterdir())) < workers and time.monotonic() < until:
        time.sleep(0.01)
    return 2 * number, (folder / "word").read_text(), os.getpid()


def doubling(marks: Path, workers: int, folder: Path) -> Callable[[int], tuple[int, str, int]]:
    """Doubles numbers as soon as so many workers have been asked for one."""
    return partial(double, marks, workers, folder)


def dying(folder: Path) -> Callable[[int], int]:
    return lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == 3 else number


def failing(folder: Path) -> Callable[[int], int]:
    raise ValueError("no such model")


class Scribe:
    """Writes slowly, and down who wrote."""

    batch_size, generator, revision = 2, "scribe", "1"

    def __init__(self, folder: Path, refuses: str = "") -> None:
        self.folder, self.refuses = folder, refuses

    def prompt_hash(self, task: str) -> str:
        return task

    def settings(self, task: str) -> str:
        return ""

    def generate(self, task: str, inputs: list, seeds: object = None, again: bool = False) -> list[Answer]:
        (self.folder / f"{os.getpid()}.{time.time_ns()}").touch()
        time.sleep(0.05)
        if any(item.summary == self.refuses for block in inputs for item in block.items):
            return [EngineUnavailable("gone")] * len(inputs)
        return [Text(f"{block.previous or ''}{block.items[0].summary}.", True) for block in inputs]


def scribing(folder: Path, refuses: str = "") -> Callable[[TextRequest], WrittenTexts]:
    return partial(write_texts, Scribe(folder, refuses))


ROWS = [(f"u{n:02}", f"i{n} {k}", k) for n in range(24) for k in range(9)]


def condense(folder: Path, cluster: Cluster | None = None, refuses: str = "") -> pl.DataFrame:
    """Preferences of 24 users in three waves of twelve batches, with texts and marks of who wrote in ``folder``."""
    log = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")
    same = {item: item for _, item, _ in ROWS}
    marks = folder / "marks"
    marks.mkdir(parents=True, exist_ok=True)
    with open_workers(cluster, partial(scribing, marks, refuses)) as workers:
        return summarize_users(log, same, same, Scribe(marks), TextStore(folder / "texts"), workers=workers)


def killed_after(batches: int) -> None:
    """Kill -9 ends this process as it has stored so many batches."""
    real, stored = TextStore.add, count(1)

    def add(store: TextStore, *batch: object) -> None:
        real(store, *batch)
        if next(stored) == batches:
            os.kill(os.getpid(), signal.SIGKILL)

    TextStore.add = add


def ended(folder: Path) -> None:
    """Kill -9 ends the head of a cluster of this process alone as it has stored a batch; what is said is printed."""
    ray_workers.LOOK, ray_workers.SILENCE, real = 0.05, 0.0, TextStore.add

    def add(store: TextStore, *batch: object) -> None:
        real(store, *batch)
        subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "gcs_server"])

    TextStore.add = add
    try:
        with joined(Cluster("local", workers=2)):
            condense(folder, Cluster("local", workers=2))
    except RuntimeError as error:
        print(error)


def writers(folder: Path) -> dict[int, int]:
    """How many batches each process has begun."""
    counts: dict[int, int] = {}
    for mark in (folder / "marks").glob("*"):
        counts[int(mark.name.split(".")[0])] = counts.get(int(mark.name.split(".")[0]), 0) + 1
    return counts

"""A few samples of what a stage has made, for whoever watches it: what is wrong shows here first."""

from collections.abc import Iterable
from typing import Any

import polars as pl

from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import EXAMPLES, ITEMS, TASKS

SAMPLES = 3
WIDTH = 160  # characters of a sample


def task_samples(run: RunFolder) -> str:
    """Three ranking tasks in words: what the user chose last, and what was chosen then."""
    tasks = run.scan(TASKS).head(SAMPLES).collect()
    ids = [item for name in ("history", "candidates") for row in tasks[name] for item in row]
    titles = dict(run.scan(ITEMS).filter(pl.col("item_id").is_in(ids)).select("item_id", "title").collect().iter_rows())

    def words(task: dict[str, Any]) -> str:
        history = task["history"]
        before = f"after {len(history)} items, the last {titles[history[-1]]!r}" if history else "first"
        target = titles[task["candidates"][task["labels"].index(1)]]
        return f"user {task['user_id']}, {before}: {target!r} among {len(task['candidates'])} candidates"

    return _lines(map(words, tasks.iter_rows(named=True)))


def prompt_samples(run: RunFolder) -> str:
    """The number of training examples, and three of them as they are asked and answered."""
    table = run.scan(EXAMPLES, split="train")
    count = table.select(pl.len()).collect().item()

    def words(row: dict[str, Any]) -> str:
        parts = [part["text"] if part["type"] == "text" else "<image>" for part in row["prompt"][0]["content"]]
        return f"{' '.join(' '.join(parts).split())} => {row['completion'][0]['content'][0]['text']}"

    samples = table.head(SAMPLES).select("prompt", "completion").collect()
    return f"  {count} training examples\n" + _lines(map(words, samples.iter_rows(named=True)))


def _lines(samples: Iterable[str]) -> str:
    half = WIDTH // 2
    return "\n".join(f"  {text if len(text) <= WIDTH else f'{text[:half]} ... {text[-half:]}'}" for text in samples)

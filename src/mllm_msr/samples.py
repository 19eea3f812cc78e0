"""A few samples of what a stage has made, for whoever watches it: what is wrong shows here first."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import EXAMPLES, INTERACTIONS, ITEM_VECTORS, ITEMS, SCORES, TASKS

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


def vector_samples(run: RunFolder) -> str:
    """How many item vectors there are, and for three items the nearest other one by cosine."""
    frame = run.read(ITEM_VECTORS, ["item_id", "vector"])
    vectors = np.stack(frame["vector"].to_list()).astype(np.float32) if len(frame) else np.empty((0, 0), np.float32)
    vectors -= vectors.mean(0) if len(frame) else 0
    lengths = np.linalg.norm(vectors, axis=1)
    titles = _titles(run)
    lines = []
    for place in range(min(SAMPLES, len(frame))):
        likeness = vectors @ vectors[place] / np.maximum(lengths * lengths[place], 1e-6)
        likeness[place] = -np.inf
        nearest = int(likeness.argmax())
        if nearest != place:
            names = [titles[frame["item_id"][each]] for each in (place, nearest)]
            lines.append(f"{names[0]!r} is nearest to {names[1]!r} ({likeness[nearest]:.2f})")
    width = vectors.shape[1]
    return f"  {len(frame)} item vectors of width {width}\n" + _lines(lines)


def training_samples(log: Sequence[Mapping[str, Any]]) -> str:
    """How many steps were taken, and the loss at three of them."""
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    chosen = dict(losses[place] for place in np.linspace(0, len(losses) - 1, SAMPLES).astype(int)) if losses else {}
    steps = log[-1].get("step", 0) if log else 0
    return f"  {steps} steps of training\n" + _lines(f"step {step}: loss {loss:.3f}" for step, loss in chosen.items())


def fusion_samples(run: RunFolder) -> str:
    """For three users the item that the members which need no answer put first, their own choices left out."""
    from mllm_msr.modeling.item_ranking import ItemRanker

    ranker, titles = ItemRanker.from_pretrained(run.head), _titles(run)
    log = run.scan(INTERACTIONS).group_by("user_id", maintain_order=True).agg("item_id").head(SAMPLES).collect()
    names, lines = list(titles), []
    for user, history in log.iter_rows():
        scores = ranker.score([history], names)[0].tolist()
        rest = [(score, name) for score, name in zip(scores, names, strict=True) if name not in history]
        if rest:
            lines.append(f"user {user}, after {titles[history[-1]]!r}: {titles[max(rest)[1]]!r}")
    return _lines(lines)


def score_samples(run: RunFolder) -> str:
    """For three tasks, where the first variant of the table put what was chosen."""
    scores = run.scan(SCORES)
    first = scores.select("variant").head(1).collect().item()
    ours = scores.filter(pl.col("variant") == first).with_columns(
        place=pl.col("score").rank("max", descending=True).over("user_id"), among=pl.len().over("user_id")
    )
    titles = _titles(run)
    rows = ours.filter(pl.col("label") == 1).head(SAMPLES).select("user_id", "item_id", "place", "among").collect()
    return _lines(
        f"user {user} chose {titles[item]!r}: place {place:.0f} of {among} by {first}"
        for user, item, place, among in rows.iter_rows()
    )


def _titles(run: RunFolder) -> dict[str, str]:
    return dict(run.read(ITEMS, ["item_id", "title"]).iter_rows())


def _lines(samples: Iterable[str]) -> str:
    half = WIDTH // 2
    return "\n".join(f"  {text if len(text) <= WIDTH else f'{text[:half]} ... {text[-half:]}'}" for text in samples)

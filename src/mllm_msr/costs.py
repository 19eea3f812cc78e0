"""What the whole of a run will cost, from a rehearsal on a few of its users: counts, tokens, minutes, disk.

What a rehearsal spends on loading a model is spent once by the whole as well; the rest grows with what each stage works
through. That is an estimate: texts differ in length, a busy machine slows down, and training may stop early.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.evaluation.variants import VARIANTS
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import EXAMPLES, ITEMS, PREFERENCES, TASKS
from mllm_msr.records.stage_specs import STAGES
from mllm_msr.records.storage import read_json

PAIRS_OF_A_LIST = 41  # that the answer is asked for each validation task, while the stage `head` weighs it
TIMED_TASKS = 16  # of the rehearsal, by which a pair's time is measured
COUNTED = 16  # prompts whose tokens are counted
PLACES: dict[str, tuple[str, ...]] = {  # what each stage leaves in a run's folder
    "prepare": ("data", "image_cache"),
    "summarize items": ("summaries/items.parquet", "cache/item_summary"),
    "summarize users": ("summaries/preferences.parquet", "cache/preference", "sft"),
    "vectors": ("vectors", "cache/vectors"),
    "train": ("model",),
    "head": ("head", "cache/heads", "cache/baselines", "cache/answers"),
    "evaluate": ("scores", "scores.parquet"),
    "report": ("report.html", "hub"),
}
FIXED = ("train",)  # whose size does not grow with the data


@dataclass(frozen=True)
class StageCost:
    """What one stage of the whole will take.

    Args:
        what: what it works through, in words.
        tokens: that the model reads; None where none does.
        seconds, size: seconds, and bytes on disk.
    """

    stage: str
    what: str
    tokens: float | None
    seconds: float
    size: float


@dataclass(frozen=True)
class Counts:
    """How much there is: of a rehearsal as it stands in its tables, of the whole as far as a rehearsal tells."""

    users: float
    items: float
    interactions: float
    blocks: float
    examples: float
    validation: float
    test: float
    candidates: float

    @classmethod
    def of(cls, run: RunFolder) -> "Counts":
        """Of a run that has its preferences."""
        splits = {
            split: (tasks, pairs)
            for split, tasks, pairs in run.scan(TASKS)
            .group_by("split")
            .agg(tasks=pl.len(), pairs=pl.col("candidates").list.len().sum())
            .collect()
            .iter_rows()
        }
        left = _cleaning(run)[-1]
        tests, pairs = splits.get("test", (0, 0))
        return cls(
            users=left["users"],
            items=left["items"],
            interactions=left["interactions"],
            blocks=_rows(run.scan(PREFERENCES)),
            examples=splits.get("train", (0, 0))[1],
            validation=splits.get("validation", (0, 0))[0],
            test=tests,
            candidates=pairs / tests if tests else 0,
        )

    def of_the_whole(self, run: RunFolder, recipe: Recipe) -> "Counts":
        """Before the step ``sample`` of the run's cleaning; what users bring is scaled by users, what logs by logs."""
        steps = _cleaning(run)
        place = next((number for number, row in enumerate(steps) if row["step"] == "sample"), len(steps))
        whole = steps[max(place - 1, 0)]
        users = min(whole["users"], recipe.data.limit_users or whole["users"])
        share = users / whole["users"]
        grown, longer = users / self.users, whole["interactions"] * share / self.interactions
        candidates = 1 + recipe.data.n_negatives if recipe.data.negatives != "all" else whole["items"]
        return Counts(
            users=users,
            items=whole["items"],
            interactions=whole["interactions"] * share,
            blocks=self.blocks * longer,
            examples=self.examples
            * grown
            * (1 + recipe.data.n_train_negatives)
            / (1 + run.recipe.data.n_train_negatives),
            validation=self.validation * grown,
            test=self.test * grown,
            candidates=candidates,
        )


@dataclass
class Rehearsal:
    """A finished run on some users, and what it tells of the whole under ``recipe``."""

    run: RunFolder
    recipe: Recipe
    seconds: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.seconds = {name: done.get("seconds", 0.0) for name, done in self.run.provenance()["stages"].items()}

    @cached_property
    def sample(self) -> Counts:
        return Counts.of(self.run)

    @cached_property
    def whole(self) -> Counts:
        return self.sample.of_the_whole(self.run, self.recipe)

    def costs(self) -> list[StageCost]:
        """Of every stage that the rehearsal has done, in their order."""
        return [self._cost(stage) for stage in STAGES if stage in self.seconds]

    def _cost(self, stage: str) -> StageCost:
        whole, recipe = self.whole, self.recipe
        items, users = whole.items / self.sample.items, whole.users / self.sample.users
        blocks = whole.blocks / self.sample.blocks if self.sample.blocks else users
        spent = self.seconds[stage]
        writes = recipe.summaries.engine in ("transformers", "vllm")  # here, and not at a server
        tokens: float | None = None
        if stage == "prepare":
            what = f"{whole.interactions:,.0f} interactions, {whole.items:,.0f} items"
            log = min(self.reading, spent)
            seconds, grows = log + (spent - log) * max(items, users), max(items, users)
        elif stage in ("summarize items", "vectors"):
            what, grows = f"{whole.items:,.0f} items", items
            load, reads = (self.engine, "items") if stage == "summarize items" else (self.encoder, "vectors")
            seconds = _grown(spent, load, items)
            is_read = writes if reads == "items" else not recipe.vectors.own
            tokens = whole.items * self.tokens["item"] if is_read else None
        elif stage == "summarize users":
            what, grows = f"{whole.blocks:,.0f} history blocks", blocks
            seconds = _grown(spent, self.engine, blocks)
            tokens = whole.blocks * self.tokens["block"] if writes else None
        elif stage == "train":
            epochs = float(recipe.training["num_train_epochs"])
            what, grows = f"{whole.examples:,.0f} examples, {epochs:g} times", 1.0
            seconds, tokens = self._training(epochs), whole.examples * epochs * self.tokens["pair"]
        elif stage == "head":
            pairs = min(recipe.head.answer_tasks, whole.validation) * PAIRS_OF_A_LIST if recipe.fuses_answer else 0
            what, grows = f"up to {recipe.head.max_epochs} epochs of {whole.users:,.0f} users", items
            seconds, tokens = self._head() + pairs * self.pair, pairs * self.tokens["pair"] if pairs else None
        elif stage == "evaluate":
            by_model = [name for name in recipe.evaluation.rows if VARIANTS[name].needs_model]
            pairs = whole.test * whole.candidates * len(by_model) + self._among_all()
            what, grows = f"{whole.test:,.0f} tasks, {len(recipe.evaluation.rows)} variants", users
            ours = self.sample.test * self.sample.candidates * len(by_model) * self.pair + self.loading * len(by_model)
            seconds = pairs * self.pair + self.loading * len(by_model) + max(0.0, spent - ours) * users
            tokens = pairs * self.tokens["pair"] if pairs else None
        else:
            what, grows, seconds = "report and folders for the Hub", max(items, 1.0), spent * max(1.0, items)
        size = sum(_size(self.run.path / place) for place in PLACES[stage])
        return StageCost(stage, what, tokens, seconds, size if stage in FIXED else size * max(1.0, grows))

    def _training(self, epochs: float) -> float:
        """By the trainer's own clock, which starts when model and data are loaded."""
        log = read_json(self.run.training_log)
        last, flags = log[-1], self.recipe.training
        steps = max(1, last["step"])
        batch = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
        if flags["packed"] or flags["interaction"] == "late":  # a batch is of tasks
            batch *= 1 + self.recipe.data.n_train_negatives
        wanted = flags["max_steps"] if flags["max_steps"] > 0 else math.ceil(self.whole.examples / batch) * epochs
        evaluations = epochs if flags["eval_strategy"] == "epoch" else 0
        asked = self.whole.validation * self.whole.candidates
        asked = min(asked, flags["max_eval_samples"] or asked)
        return (
            max(0.0, self.seconds["train"] - last["train_runtime"])
            + wanted * last["train_runtime"] / steps
            + evaluations * asked * self.pair
        )

    def _head(self) -> float:
        """Epochs are at most so many, and each has as many steps as there are batches of users."""
        rehearsed, options = self.run.recipe.head, self.recipe.head
        answers = min(rehearsed.answer_tasks, self.sample.validation) * PAIRS_OF_A_LIST * self.pair
        own = max(0.5, self.seconds["head"] - (answers + self.loading if self.recipe.fuses_answer else 0))
        steps = math.ceil(self.whole.users / options.batch_size) / math.ceil(self.sample.users / rehearsed.batch_size)
        return own * steps * options.max_epochs / max(1, min(rehearsed.max_epochs, options.max_epochs))

    def _among_all(self) -> float:
        """Pairs that our model scores to rank choices among all items."""
        asked = self.recipe.evaluation.full_catalogue
        if asked is None or "mllm_msr" not in self.recipe.evaluation.rows:
            return 0
        pairs = (self.whole.test if asked == "all" else min(asked, self.whole.test)) * self.whole.items
        return pairs if pairs <= self.recipe.evaluation.full_catalogue_pairs else 0

    # ---- what is measured beside the stages ------------------------------------------------------------------------

    @cached_property
    def reading(self) -> float:
        """Seconds to read and clean the log, which a rehearsal does for the whole of it."""
        from mllm_msr.data.cleaning import clean
        from mllm_msr.data.sources.registry import read_source

        with Stopwatch() as clock:
            clean(read_source(self.recipe.source, self.recipe.data.on_bad_rows), self.run.recipe.data).log.close()
        return clock.seconds

    @cached_property
    def engine(self) -> float:
        """Seconds to load what writes texts."""
        from mllm_msr.processing.engine_registry import build_engine

        with Stopwatch() as clock:
            _ = getattr(build_engine(self.recipe.summaries), "model", None)
        return clock.seconds

    @cached_property
    def encoder(self) -> float:
        """Seconds to load what makes item vectors."""
        from mllm_msr.processing.vectors import recipe_encoder

        if self.recipe.vectors.own:
            return 0.0
        with Stopwatch() as clock:
            recipe_encoder(self.recipe)
        return clock.seconds

    @cached_property
    def recommender(self) -> tuple[Any, float]:
        from mllm_msr.evaluation.loading import load_recommender

        with Stopwatch() as clock:
            recommender = load_recommender(self.run)
        return recommender, clock.seconds

    @property
    def loading(self) -> float:
        """Seconds to load the trained model."""
        return self.recommender[1] if "train" in self.seconds else 0.0

    @cached_property
    def pair(self) -> float:
        """Seconds that the trained model takes for a user and a candidate, as evaluation scores them."""
        if "train" not in self.seconds:
            return 0.0
        from mllm_msr.evaluation.loading import load_catalogue
        from mllm_msr.evaluation.scoring import score_with_model
        from mllm_msr.processing.examples import run_contexts

        contexts, catalogue = run_contexts(self.run, "test", "validation", "train"), load_catalogue(self.run)
        score_with_model(self.recommender[0], contexts.head(1), catalogue)  # the first one warms up
        with Stopwatch() as clock:
            scored = score_with_model(self.recommender[0], contexts.tail(TIMED_TASKS), catalogue)
        return clock.seconds / max(1, len(scored))

    @cached_property
    def tokens(self) -> dict[str, float]:
        """Mean tokens of what is read of an item, a history block, and a pair."""
        if "train" not in self.seconds:
            return {"item": 0.0, "block": 0.0, "pair": 0.0}
        from mllm_msr.evaluation.loading import load_catalogue
        from mllm_msr.training.collators import AnswerCollator

        processor, catalogue = self.recommender[0].processor, load_catalogue(self.run)
        ids = self.run.read(ITEMS, ["item_id"])["item_id"].head(COUNTED).to_list()
        item = processor.item_summary([catalogue[name] for name in ids])
        rows = self.run.scan(EXAMPLES, "train").head(COUNTED).collect().to_dicts()
        texts = self.run.scan(PREFERENCES).head(COUNTED).collect()["preference"].to_list()
        written = sum(len(processor.tokenizer(text)["input_ids"]) for text in texts) / max(1, len(texts))
        return {
            "item": _mean_tokens(item),
            "block": written * (1 + self.run.block_size),  # the preference before, and the summaries
            "pair": _mean_tokens(AnswerCollator(processor, catalogue)(rows)),
        }


def cost_table(costs: Iterable[StageCost]) -> str:
    """The costs as a text table, with their sum."""
    rows = [("stage", "works through", "tokens", "time", "disk")]
    costs = list(costs)
    for cost in costs:
        tokens = f"{cost.tokens / 1e6:,.2f} M" if cost.tokens is not None else ""
        rows.append((cost.stage, cost.what, tokens, in_time(cost.seconds), f"{cost.size / 1e6:,.1f} MB"))
    total = f"{sum(cost.size for cost in costs) / 1e6:,.1f} MB"
    rows.append(("all", "", "", in_time(sum(cost.seconds for cost in costs)), total))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    )


def in_time(seconds: float) -> str:
    """Seconds as one reads them.

    >>> in_time(4.2), in_time(200), in_time(9000)
    ('4 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


class Stopwatch:
    """Times a block: ``seconds`` once it has ended."""

    seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        self._start = time.monotonic()
        return self

    def __exit__(self, *problem: object) -> None:
        self.seconds = time.monotonic() - self._start


def _grown(spent: float, loading: float, ratio: float) -> float:
    loading = min(loading, spent)
    return loading + (spent - loading) * ratio


def _cleaning(run: RunFolder) -> list[dict[str, Any]]:
    return read_json(run.data_report)["cleaning"]


def _rows(table: pl.LazyFrame) -> int:
    return table.select(pl.len()).collect().item()


def _mean_tokens(batch: Any) -> float:
    return float(batch["attention_mask"].sum(1).float().mean())


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())

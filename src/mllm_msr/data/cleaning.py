"""Cleaning a log, step by step, with a table of what each step left and why."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mllm_msr.data.coded_log import PART_ROWS, Array, CodedLog, by_user_and_time, user_starts
from mllm_msr.data.raw import RawData
from mllm_msr.records.sections import PrepareOptions

NO_TITLE = "Untitled item"
REMEDIES = {  # by the step that has left nothing
    "k-core": ": ask for fewer by `--set data.k_core_users=N --set data.k_core_items=N`",
    "missing": ": `--set data.missing_images=keep` keeps them",
}
Step = tuple[str, str, Callable[[Array], Array]]  # name, why, what it leaves of a part


@dataclass
class CleanData:
    """``log``: by user, then time, then input order; of the kind "seen", the rows that ``max_history`` cut off, whose
    items no candidate may be drawn from either. ``items``: those of the log, by item_id. ``table``: rows ``{"step",
    "interactions", "users", "items", "why"}``.
    """

    log: CodedLog
    items: pl.DataFrame
    table: list[dict[str, Any]]

    @cached_property
    def interactions(self) -> pl.DataFrame:
        """The whole log as in RawData; for small ones."""
        return self.log.frames()


def clean(
    raw: RawData, options: PrepareOptions, workspace: Path | None = None, part_rows: int = PART_ROWS
) -> CleanData:
    """Clean in a fixed order; raises ValueError when nothing is left, naming the step.

    The order: exact duplicates, repeated consumption, k-core, items without title or image (then k-core again, if any
    went), sample of users, longest history. The sample is drawn after the k-core: of a sparse log a sample alone would
    have no core left. The catalogue is then what the sampled users met, so items may fall below the core there.
    """
    log = CodedLog.of(raw.interactions, workspace, part_rows)
    catalogue = _catalogue(raw.items, log.items)
    table: list[dict[str, Any]] = []

    def apply(*steps: Step) -> None:
        """Do steps on every part, one visit each, and note what each left."""
        rows, users = np.zeros(len(steps), int), np.zeros(len(steps), int)
        items = np.zeros((len(steps), len(log.items)), dtype=bool)
        for number, part in enumerate(log.parts()):
            before = len(part)
            for place, (_, _, function) in enumerate(steps):
                part = function(part)
                rows[place] += len(part)
                users[place] += len(user_starts(part["user"])) - 1
                items[place, part["item"]] = True
            if len(part) < before or steps[0][0] == "raw":
                log.store(number, part)
        for place, (step, why, _) in enumerate(steps):
            counts = (rows[place], users[place], items[place].sum())
            table.append({"step": step, **dict(zip(("interactions", "users", "items"), map(int, counts), strict=True))})
            table[-1]["why"] = why
            if not rows[place]:
                raise ValueError(f"cleaning: nothing is left after step {step!r} ({why}){REMEDIES.get(step, '')}")

    def in_order(part: Array) -> Array:
        part = part[by_user_and_time(part)]
        part["time"] //= raw.ticks
        return part

    core = f"users >= {options.k_core_users} and items >= {options.k_core_items} interactions, to a fixed point"
    steps: list[Step] = [
        ("raw", "as read", in_order),
        ("duplicates", "same user, item and time: one kept", lambda part: _distinct(part, "first", same_time=True)),
    ]
    if options.repeats != "all":
        why = f"repeated consumption: {options.repeats} kept"
        steps.append(("repeats", why, lambda part: _distinct(part, options.repeats, same_time=False)))
    apply(*steps)
    _k_core(log, options.k_core_users, options.k_core_items)
    apply(("k-core", core, lambda part: part))

    missing = (catalogue["title"] == "") | (catalogue["image_path"].is_null() & catalogue["image_bytes"].is_null())
    if options.missing_images == "drop":
        sound = ~missing.to_numpy()
        apply(("missing", "items without title or image: dropped", lambda part: part[sound[part["item"]]]))
        if table[-1]["interactions"] < table[-2]["interactions"]:
            _k_core(log, options.k_core_users, options.k_core_items)
            apply(("k-core again", core, lambda part: part))
    else:
        why = f"items without title or image: kept, without image or as {NO_TITLE!r}"
        table.append({**table[-1], "step": "missing", "why": why})
    if options.limit_users is not None:
        chosen = np.zeros(len(log.users), dtype=bool)
        for part in log.parts():
            chosen[part["user"]] = True
        present = np.flatnonzero(chosen).astype(np.uint32)
        chosen[np.random.default_rng(options.seed).permutation(present)[options.limit_users :]] = False
        why = f"at most {options.limit_users} users, drawn with seed {options.seed}; of the items, what they have met"
        apply(("sample", why, lambda part: part[chosen[part["user"]]]))
    if (most := options.max_history) is not None:
        for number, part in enumerate(log.parts()):
            log.store(number, part[_from_end(part) >= most], "seen")
        why = f"a user's most recent {most} interactions"
        apply(("history", why, lambda part: part[_from_end(part) < most]))
    log.keep_only_present()
    items = pl.DataFrame({"item_id": log.items}).join(catalogue, on="item_id", how="left", maintain_order="left")
    title = pl.when(pl.col("title") == "").then(pl.lit(NO_TITLE)).otherwise("title").alias("title")
    return CleanData(log, items.with_columns(title), table)


def _catalogue(items: pl.DataFrame, ids: pl.Series) -> pl.DataFrame:
    """The items of the log in code order; an id that the catalogue lacks gets an empty row."""
    catalogue = pl.DataFrame({"item_id": ids}).join(items, on="item_id", how="left", maintain_order="left")
    return catalogue.with_columns(pl.col("title", "text").fill_null(""))


def _distinct(part: Array, keep: str, same_time: bool) -> Array:
    """Without rows that repeat a user and item (and time) of an earlier row, or with keep="last" of a later one."""
    pairs = (part["user"].astype(np.uint64) << np.uint64(32)) | part["item"]
    ordered = np.sort(pairs)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])  # few, so only their rows are put in order
    if not len(several):
        return part
    place = np.searchsorted(several, pairs)
    rows = np.flatnonzero(several[np.minimum(place, len(several) - 1)] == pairs)
    rows = rows[np.argsort(pairs[rows], kind="stable")]  # by time within a pair
    same = pairs[rows[1:]] == pairs[rows[:-1]]
    if same_time:
        same &= part["time"][rows[1:]] == part["time"][rows[:-1]]
    kept = np.ones(len(part), dtype=bool)
    kept[(rows[1:] if keep == "first" else rows[:-1])[same]] = False
    return part[kept]


def _from_end(part: Array) -> Array:
    """How many later rows the user of each row has."""
    starts = user_starts(part["user"])
    return np.repeat(starts[1:], np.diff(starts)) - 1 - np.arange(len(part))


def _k_core(log: CodedLog, least_user: int, least_item: int) -> None:
    """Drop users and items below the core until none is: parts have whole users, so only items are counted overall."""
    counts = np.zeros(len(log.items), dtype=np.int64)
    for part in log.parts():
        counts += np.bincount(part["item"], minlength=len(counts))
    changed = max(least_user, least_item) > 1
    while changed:
        changed = False
        for number, part in enumerate(log.parts()):
            left = part[counts[part["item"]] >= least_item]
            starts = user_starts(left["user"])
            left = left[np.repeat(np.diff(starts) >= least_user, np.diff(starts))]
            if len(left) < len(part):
                counts -= np.bincount(part["item"], minlength=len(counts))
                counts += np.bincount(left["item"], minlength=len(counts))
                log.store(number, left)
                changed = True

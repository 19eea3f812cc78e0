"""Cleaning a log, step by step, with a table of what each step left and why.

Inside, users and items are numbers (their rank among the sorted ids), so that ten million rows stay small and no step
depends on how many threads ran.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mllm_msr.processing.options import PrepareOptions
from mllm_msr.processing.raw import RawData

NO_TITLE = "Untitled item"


@dataclass
class CleanData:
    """``interactions``: as in RawData, by user, then time, then input order. ``items``: those of the log, by item_id.

    ``table``: rows ``{"step", "interactions", "users", "items", "why"}``. ``seen``: the (user_id, item_id) pairs that
    ``max_history`` cut off, which no candidate may be drawn from either.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    table: list[dict[str, Any]]
    seen: pl.DataFrame


def clean(raw: RawData, options: PrepareOptions) -> CleanData:
    """Clean in a fixed order; raises ValueError when nothing is left, naming the step.

    The order: exact duplicates, repeated consumption, k-core, items without title or image (then k-core again, if any
    went), sample of users, longest history. The sample is drawn after the k-core: of a sparse log a sample alone would
    have no core left. The catalogue is then what the sampled users met, so items may fall below the core there.
    """
    users = raw.interactions["user_id"].unique().sort()
    items = raw.interactions["item_id"].unique().sort()
    log = raw.interactions.select(
        _code("user_id", users).alias("user"), _code("item_id", items).alias("item"), "timestamp"
    )
    table: list[dict[str, Any]] = []

    def record(step: str, why: str) -> None:
        kinds = {name: int(np.count_nonzero(np.bincount(log[name[:-1]]))) for name in ("users", "items")}
        table.append({"step": step, "interactions": len(log), **kinds, "why": why})
        if log.is_empty():
            raise ValueError(f"cleaning: nothing is left after step {step!r} ({why}); loosen it")

    record("raw", "as read")
    log = log[np.lexsort((log["timestamp"], log["user"]))]  # stable: ties in time stay in input order
    log = log.filter(~_repeated(log, len(items), same_time=True, keep="first"))
    record("duplicates", "same user, item and time: one kept")
    if options.repeats != "all":
        log = log.filter(~_repeated(log, len(items), same_time=False, keep=options.repeats))
    record("repeats", f"repeated consumption: {options.repeats} kept")
    log, core = _k_core(log, options.k_core_users, options.k_core_items), _core_name(options)
    record("k-core", core)

    catalogue = _catalogue(raw.items, items)
    missing = (catalogue["title"] == "") | (catalogue["image_path"].is_null() & catalogue["image_bytes"].is_null())
    if options.missing_images == "drop":
        before = len(log)
        log = log.filter(~missing.gather(log["item"]))
        record("missing", "items without title or image: dropped")
        if len(log) < before:
            log = _k_core(log, options.k_core_users, options.k_core_items)
            record("k-core again", core)
    else:
        record("missing", f"items without title or image: kept, without image or as {NO_TITLE!r}")
    if options.limit_users is not None:
        present = log["user"].unique().sort().to_numpy()
        chosen = np.random.default_rng(options.seed).permutation(present)[: options.limit_users]
        log = log.filter(pl.col("user").is_in(chosen.tolist()))
        record("sample", f"at most {options.limit_users} users, drawn with seed {options.seed}")
    whole = log
    if options.max_history is not None:
        from_end = pl.len().over("user") - pl.int_range(pl.len()).over("user")
        recent = (from_end <= options.max_history).alias("recent")
        whole = log.with_columns(recent)
        log = whole.filter("recent").drop("recent")
        whole = whole.filter(~pl.col("recent"))
        record("history", f"a user's most recent {options.max_history} interactions")
    else:
        whole = whole.clear()

    kept = pl.DataFrame({"item": log["item"].unique().sort()})
    cut = whole.select("user", "item").unique(maintain_order=True).join(kept, on="item", how="semi")
    return CleanData(
        interactions=_decode(log, users, items).select("user_id", "item_id", "timestamp"),
        items=catalogue[kept["item"]].with_columns(
            pl.when(pl.col("title") == "").then(pl.lit(NO_TITLE)).otherwise("title").alias("title")
        ),
        table=table,
        seen=_decode(cut, users, items).select("user_id", "item_id"),
    )


def _code(column: str, values: pl.Series) -> pl.Expr:
    return pl.col(column).cast(pl.Enum(values)).to_physical().cast(pl.UInt32)


def _decode(log: pl.DataFrame, users: pl.Series, items: pl.Series) -> pl.DataFrame:
    return log.with_columns(users.gather(log["user"]).alias("user_id"), items.gather(log["item"]).alias("item_id"))


def _catalogue(items: pl.DataFrame, ids: pl.Series) -> pl.DataFrame:
    """The items of the log in code order; an id that the catalogue lacks gets an empty row."""
    catalogue = pl.DataFrame({"item_id": ids}).join(items, on="item_id", how="left", maintain_order="left")
    return catalogue.with_columns(pl.col("title", "text").fill_null(""))


def _repeated(log: pl.DataFrame, n_items: int, same_time: bool, keep: str) -> pl.Series:
    """Which rows repeat a user and item (and time) of an earlier row, or with keep="last" of a later one."""
    pairs = log["user"].to_numpy().astype(np.int64) * n_items + log["item"].to_numpy()
    order = np.argsort(pairs, kind="stable")
    same = pairs[order[1:]] == pairs[order[:-1]]
    if same_time:
        time = log["timestamp"].to_numpy()[order]
        same &= time[1:] == time[:-1]
    repeated = np.zeros(len(log), dtype=bool)
    repeated[(order[1:] if keep == "first" else order[:-1])[same]] = True
    return pl.Series(repeated)


def _core_name(options: PrepareOptions) -> str:
    return f"users >= {options.k_core_users} and items >= {options.k_core_items} interactions, to a fixed point"


def _k_core(log: pl.DataFrame, least_user: int, least_item: int) -> pl.DataFrame:
    if max(least_user, least_item) <= 1 or log.is_empty():
        return log
    user, item = log["user"].to_numpy(), log["item"].to_numpy()
    alive = np.ones(len(log), dtype=bool)
    while True:
        by_user = np.bincount(user[alive], minlength=user.max() + 1)
        by_item = np.bincount(item[alive], minlength=item.max() + 1)
        still = alive & (by_user[user] >= least_user) & (by_item[item] >= least_item)
        if still.sum() == alive.sum():
            return log.filter(pl.Series(alive))
        alive = still

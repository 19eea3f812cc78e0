"""Rank a real catalogue: for one user on the screen, or for all users into files."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from accelerate import PartialState
from tqdm import tqdm

from mllm_msr.evaluation.evaluate import item_table, recommender
from mllm_msr.records.run import Run
from mllm_msr.records.storage import digest, write_parquet, write_text

SHARD = 64  # users of one file


def rank(options: argparse.Namespace) -> None:
    """Print the best candidates for one user of a run, or for a preference in words; or write those of many users."""
    run = Run.open(options.run)
    if options.users:
        rank_users(run, options)
        return
    items = item_table(run)
    seen: set[str] = set()
    user: dict[str, Any] = {"preference": options.preference or "", "recent": []}
    if options.user:
        ((_, user, seen),) = users_of(run, [options.user])
    wanted = options.items.split(",") if options.items else [item for item in items.index if item not in seen]
    candidates = [{"item_id": item, **items[item]} for item in wanted]
    (best,) = recommender(run, ranking=settings(run, options)).rank([user], candidates, options.top_k, "ranking")
    print(f"preference: {user['preference'] or '(none)'}")
    for place, candidate in enumerate(best, 1):
        print(f"{place:3d}  {candidate['score']:.3f}  {candidate['item_id']}  {candidate['title']}")


def rank_users(run: Run, options: argparse.Namespace) -> None:
    """Write ``user_id``, ``rank``, ``item_id``, ``logit``, ``score`` of each user's best candidates, in files of 64
    users; files that are there are left as they are, and several processes share the rest."""
    if not options.output:
        raise ValueError("name a folder for the rankings: --output DIR")
    state = PartialState()
    history = pl.read_parquet(run.folder / "data/interactions.parquet", columns=["user_id"])["user_id"]
    known = history.unique(maintain_order=True).to_list()
    users = known if options.users == "all" else options.users.split(",")
    if unknown := set(users) - set(known):
        raise ValueError(f"user {min(unknown)!r} has no interactions in {run.folder}")
    key = digest(run.key("train"), run.key("prepare"), run.provenance()["stages"], users, options.top_k, options.items)
    claim(options.output, key, state.is_main_process)
    state.wait_for_everyone()
    items = item_table(run)
    names = options.items.split(",") if options.items else list(items.index)
    shards = [users[start : start + SHARD] for start in range(0, len(users), SHARD)]
    paths = [options.output / f"ranking-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    ranker = recommender(run, ranking=settings(run, options))
    for number in tqdm(missing[state.process_index :: state.num_processes], desc="ranking", unit="file"):
        write_parquet(best_of(run, ranker, shards[number], names, items, options.top_k), paths[number])
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{len(users)} users x {len(names)} candidates: {options.output}")


def claim(folder: Path, key: str, first: bool) -> None:
    """Make ``folder`` that of the ranking called ``key``; a ValueError if it holds another."""
    mark = folder / "ranking.json"
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8"))["key"] != key:
        raise ValueError(f"{folder} holds another ranking (other model, users or top-k): remove it or name another")
    if first and not mark.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(mark, json.dumps({"key": key}))


def best_of(run: Run, ranker: Any, users: Sequence[str], names: list[str], items: Any, top_k: int) -> pl.DataFrame:
    """The best ``top_k`` of ``names`` that each user has not chosen yet."""
    place = {item: number for number, item in enumerate(names)}
    known = list(users_of(run, users))
    logits = ranker.score([user for _, user, _ in known], [names] * len(known), items, progress="pairs")
    rows = []
    for (user_id, _, seen), row in zip(known, logits, strict=True):
        old = [place[item] for item in seen if item in place]
        values = row.copy()
        values[old] = -np.inf
        best = np.argsort(-values, kind="stable")[: min(top_k, len(names) - len(old))]
        rows += [(user_id, rank, names[item], float(row[item])) for rank, item in enumerate(best, 1)]
    schema = {"user_id": pl.String, "rank": pl.Int64, "item_id": pl.String, "logit": pl.Float32}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns((1 / (1 + (-pl.col("logit")).exp())).alias("score"))


def users_of(run: Run, users: Sequence[str]) -> list[tuple[str, dict[str, Any], set[str]]]:
    """Of each user the id, the last preference with the items chosen since, and all items chosen."""
    wanted = pl.col("user_id").is_in(list(users))
    log = pl.scan_parquet(run.folder / "data/interactions.parquet").filter(wanted).collect()
    chosen = {user: part["item_id"].to_list() for (user,), part in log.group_by("user_id")}
    texts = pl.scan_parquet(run.folder / "summaries/preferences.parquet").filter(wanted).sort("step").collect()
    written = {user: part["preference"].to_list() for (user,), part in texts.group_by("user_id", maintain_order=True)}
    summaries = dict(pl.read_parquet(run.folder / "summaries/items.parquet").select("item_id", "summary").iter_rows())
    found = []
    for user in users:
        if user not in chosen:
            raise ValueError(f"user {user!r} has no interactions in {run.folder}")
        steps = written.get(user, [])
        recent = chosen[user][len(steps) * run.block_size :]
        told = {
            "preference": steps[-1] if steps else "",
            "recent": [{"summary": summaries[item]} for item in recent],
        }
        found.append((user, told, set(chosen[user])))
    return found


def index(options: argparse.Namespace) -> None:
    """Compute ahead what a ``late`` model keeps of every item, and drop what is no more."""
    run = Run.open(options.run)
    ranker = recommender(run, ranking={"cache": cache_of(run), "memory_gb": options.memory_gb})
    items = item_table(run)
    new, kept, dropped = ranker.index(items, progress="items")
    size = sum(path.stat().st_size for path in ranker.cache.folder.glob("*/*"))
    print(f"{new} items computed, {kept} were there, {dropped} dropped; {size / 1e6:.1f} MB in {ranker.cache.folder}")


def cache_of(run: Run) -> Path:
    return run.folder / "cache/late_items"


def settings(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """How to rank: with the index where there is one."""
    indexed = {"cache": cache_of(run)} if cache_of(run).is_dir() else {}
    return {"memory_gb": options.memory_gb, **indexed}

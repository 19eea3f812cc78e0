"""Rank a real catalogue: for one user on the screen, or for all users into files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from accelerate import PartialState
from tqdm import tqdm

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.evaluation.loading import Computing, load_catalogue, load_recommender
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, ITEM_SUMMARIES, PREFERENCES, RANKINGS
from mllm_msr.records.storage import digest, write_text

SHARD = 64  # users of one file


@dataclass(frozen=True)
class RunUser:
    """A user of a run: the last preference, the items chosen since, and all items ever chosen."""

    user_id: str
    preference: str
    recent: list[str]
    chosen: set[str]

    def to_model(self) -> dict[str, Any]:
        return {"preference": self.preference, "recent": [{"summary": summary} for summary in self.recent]}


def rank_user(
    run: RunFolder, user_id: str, *, items: Sequence[str] | None, top_k: int, memory_gb: float | None
) -> None:
    """Print the best of ``items``, or of all items, that a user of the run has not chosen yet."""
    (user,) = read_users(run, [user_id])
    catalogue = load_catalogue(run)
    wanted = [item for item in dict.fromkeys(items or catalogue) if items or item not in user.chosen]
    print_best(run, catalogue, user, wanted, top_k, memory_gb)


def rank_preference(
    run: RunFolder, preference: str, *, items: Sequence[str] | None, top_k: int, memory_gb: float | None
) -> None:
    """Print the best of ``items``, or of all items, for a preference in words."""
    catalogue = load_catalogue(run)
    print_best(run, catalogue, RunUser("", preference, [], set()), list(items or catalogue), top_k, memory_gb)


def print_best(
    run: RunFolder, catalogue: Catalogue, user: RunUser, items: list[str], top_k: int, memory_gb: float | None
) -> None:
    candidates = [vars(catalogue[item]) for item in items]
    (best,) = load_recommender(run, computing(run, memory_gb)).rank([user.to_model()], candidates, top_k, "ranking")
    print(f"preference: {user.preference or '(none)'}")
    for place, candidate in enumerate(best, 1):
        print(f"{place:3d}  {candidate['score']:.3f}  {candidate['item_id']}  {candidate['title']}")


def rank_users(
    run: RunFolder,
    users: Sequence[str] | None,
    output: Path,
    *,
    items: Sequence[str] | None,
    top_k: int,
    memory_gb: float | None,
) -> None:
    """Write each user's best candidates (see ``schema.RANKINGS``), in files of 64 users; files that are there are left
    as they are, and several processes share the rest.

    Args:
        users: None is every user of the run.
        items: the candidates; None is the catalogue.
    """
    state = PartialState()
    known = run.read(INTERACTIONS, ["user_id"])["user_id"].unique(maintain_order=True).to_list()
    users = known if users is None else users
    if unknown := set(users) - set(known):
        raise ValueError(f"user {min(unknown)!r} has no interactions in {run.path}")
    key = digest(run.key("train"), list(users), top_k, items)
    claim(output, key, state.is_main_process)
    state.wait_for_everyone()
    catalogue = load_catalogue(run)
    names = list(items or catalogue)
    shards = [users[start : start + SHARD] for start in range(0, len(users), SHARD)]
    paths = [output / f"ranking-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    ranker = load_recommender(run, computing(run, memory_gb))
    for number in tqdm(missing[state.process_index :: state.num_processes], desc="ranking", unit="file"):
        RANKINGS.write(best_of(read_users(run, shards[number]), ranker, names, catalogue, top_k), paths[number])
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{len(users)} users x {len(names)} candidates: {output}")


def claim(folder: Path, key: str, first: bool) -> None:
    """Make ``folder`` that of the ranking called ``key``; a ValueError if it holds another."""
    mark = folder / "ranking.json"
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8"))["key"] != key:
        raise ValueError(f"{folder} holds another ranking (other model, users or top-k): remove it or name another")
    if first and not mark.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(mark, json.dumps({"key": key}))


def best_of(
    users: Sequence[RunUser], ranker: Any, names: Sequence[str], catalogue: Catalogue, top_k: int
) -> pl.DataFrame:
    """The best ``top_k`` of ``names`` that each user has not chosen yet."""
    place = {item: number for number, item in enumerate(names)}
    logits = ranker.score([user.to_model() for user in users], [names] * len(users), catalogue, progress="pairs")
    rows = []
    for user, row in zip(users, logits, strict=True):
        old = [place[item] for item in user.chosen if item in place]
        values = row.copy()
        values[old] = -np.inf
        best = np.argsort(-values, kind="stable")[: min(top_k, len(names) - len(old))]
        scores = 1 / (1 + np.exp(-row.astype(np.float64)))
        rows += [
            (user.user_id, rank, names[item], float(row[item]), float(scores[item]))
            for rank, item in enumerate(best, 1)
        ]
    return RANKINGS.frame(rows)


def read_users(run: RunFolder, users: Sequence[str]) -> list[RunUser]:
    """Some users of a run; ValueError names one that is not there."""
    wanted = pl.col("user_id").is_in(list(users))
    log = run.scan(INTERACTIONS).filter(wanted).collect()
    histories = {user: part["item_id"].to_list() for (user,), part in log.group_by("user_id")}
    texts = run.scan(PREFERENCES).filter(wanted).sort("step").collect()
    written = {user: part["preference"].to_list() for (user,), part in texts.group_by("user_id", maintain_order=True)}
    summaries = dict(run.read(ITEM_SUMMARIES, ["item_id", "summary"]).iter_rows())
    cut: dict[str, list[str]] = {}
    if run.recipe.data.max_history is not None:
        lost = run.scan(CUT_INTERACTIONS).filter(wanted).collect()
        cut = {user: part["item_id"].to_list() for (user,), part in lost.group_by("user_id")}
    read = []
    for user in users:
        if user not in histories:
            raise ValueError(f"user {user!r} has no interactions in {run.path}")
        history, steps = histories[user], written.get(user, [])
        recent = history[len(steps) * run.block_size :]
        chosen = {*history, *cut.get(user, ())}
        read.append(RunUser(user, steps[-1] if steps else "", [summaries[item] for item in recent], chosen))
    return read


def index(run: RunFolder, memory_gb: float | None) -> None:
    """Compute ahead what a ``late`` model keeps of every item, and drop what is no more."""
    ranker = load_recommender(run, Computing(cache=run.item_cache, memory_gb=memory_gb))
    new, kept, dropped = ranker.index(load_catalogue(run), progress="items")
    size = sum(path.stat().st_size for path in ranker.cache.folder.glob("*/*"))
    print(f"{new} items computed, {kept} were there, {dropped} dropped; {size / 1e6:.1f} MB in {ranker.cache.folder}")


def computing(run: RunFolder, memory_gb: float | None) -> Computing:
    """How to rank: with the index where there is one."""
    return Computing(cache=run.item_cache if run.item_cache.is_dir() else None, memory_gb=memory_gb)

"""Rank a real catalogue: for one user on the screen, or for all users into files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import polars as pl
from tqdm import tqdm

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.new_items import NewItems, read_new_items
from mllm_msr.evaluation.loading import Computing, is_late, load_catalogue, load_recommender
from mllm_msr.evaluation.spread_index import spread_index
from mllm_msr.evaluation.spread_scoring import run_at, run_folders
from mllm_msr.modeling.inputs import HistoryItem, User
from mllm_msr.processing.open_workers import open_workers
from mllm_msr.records.lock import check_one_process, write_lock
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, ITEM_SUMMARIES, PREFERENCES, RANKINGS
from mllm_msr.records.storage import digest, file_digest, write_text

SHARD = 64  # users of one file


By = Literal["answer", "head", "fused"]


@dataclass(frozen=True)
class Ranking:
    """How to rank.

    Args:
        items: ids of the candidates; None is the catalogue. One that is named twice counts once.
        by: "answer" of the trained model, "head" or "fused" scores of item vectors; None: fused where it is there.
        top_k: how many candidates a user gets.
        memory_gb: what may be kept of users and items; None is half of what is free.
        rerank: of how many of a user's best candidates "fused" asks the answer; 0 leaves the answer out.
        new: items that the run has never seen, candidates among those of its catalogue.
    """

    items: Sequence[str] | None = None
    by: By | None = None
    top_k: int = 10
    memory_gb: float | None = None
    rerank: int = 100
    new: NewItems | None = None

    def catalogue(self, run: RunFolder) -> Catalogue:
        """The run's items and the new ones."""
        return replace(load_catalogue(run), new=self.new.candidates if self.new else {})

    def candidates(self, catalogue: Catalogue) -> list[str]:
        """The ids of the candidates, each once, in their order; ValueError names those that are unknown."""
        if self.items is None:
            return list(catalogue)
        if unknown := [item for item in self.items if item not in catalogue]:
            example = next(iter(catalogue))
            raise ValueError(
                f"{_listed(unknown)} no item of the catalogue ({len(catalogue)} items, such as {example!r})"
            )
        return list(dict.fromkeys(self.items))


NOTHING_SAID = User()


@dataclass(frozen=True)
class RunUser:
    """A user of a run: in words, for the answer, and all items that the user has ever chosen, oldest first."""

    user_id: str
    words: User = NOTHING_SAID
    history: tuple[str, ...] = ()

    @property
    def chosen(self) -> frozenset[str]:
        return frozenset(self.history)


class RunRanker(Protocol):
    """What gives every user a score of each of some items: (users, items) in float32, more for a better one."""

    def score(self, users: Sequence[RunUser], names: Sequence[str], catalogue: Catalogue) -> list[np.ndarray]: ...


class AnswerRanker:
    """Ranks by the trained model's answer, with the index where there is one."""

    def __init__(self, run: RunFolder, how: Ranking) -> None:
        cache = run.item_cache if run.item_cache.is_dir() and is_late(run) else None
        self.recommender = load_recommender(run, Computing(cache=cache, memory_gb=how.memory_gb))

    def score(self, users: Sequence[RunUser], names: Sequence[str], catalogue: Catalogue) -> list[np.ndarray]:
        words = [user.words for user in users]
        return self.recommender.score(words, [names] * len(users), catalogue, progress="pairs")


class HeadRanker:
    """Ranks by item vectors: a history is all that it needs of a user, a vector all that it needs of an item."""

    def __init__(self, run: RunFolder, by: By, new: NewItems | None) -> None:
        from mllm_msr.modeling.item_ranking import ItemRanker

        self.ranker, self.by = ItemRanker.from_pretrained(run.head), "fused" if by == "fused" else "sequence_head"
        if new is not None:
            from mllm_msr.processing.new_vectors import put_new_items

            put_new_items(self.ranker, run.recipe, new)

    def score(self, users: Sequence[RunUser], names: Sequence[str], catalogue: Catalogue) -> list[np.ndarray]:
        return list(self.ranker.score([user.history for user in users], names, self.by).numpy())


class FusedRanker:
    """Ranks by item vectors, and what that puts first by the answer as well; see ``evaluation.answer_fusion``."""

    def __init__(self, run: RunFolder, how: Ranking) -> None:
        self.others, self.answers = HeadRanker(run, "fused", how.new).ranker, AnswerRanker(run, how)
        self.depth = how.rerank

    def score(self, users: Sequence[RunUser], names: Sequence[str], catalogue: Catalogue) -> list[np.ndarray]:
        import torch

        def answer(best: torch.Tensor) -> torch.Tensor:
            words, asked = [user.words for user in users], [[names[place] for place in row] for row in best.tolist()]
            logits = self.answers.recommender.score(words, asked, catalogue, progress="pairs")
            return torch.from_numpy(np.stack(logits))

        fusion, buckets = self.others.answer_fusion, self.others.buckets(self.others.codes_of(names))
        assert fusion is not None  # the stage `head` of this recipe has fitted it
        chosen = torch.tensor([[item in user.chosen for item in names] for user in users])
        scores = self.others.score([user.history for user in users], names)
        return list(fusion.rerank(scores, buckets, chosen, self.depth, answer).numpy())


def new_items(run: RunFolder, path: Path) -> NewItems:
    """Items that the run has never seen, from a file."""
    return read_new_items(path, load_catalogue(run), run.recipe.data, run.path / "image_cache")


def way_of(run: RunFolder, how: Ranking) -> By:
    """What the run is ranked by; its stage must be done."""
    by = how.by
    if by is None:
        by = "fused" if run.recipe.head.enabled and run.head.is_dir() else "answer"
    run.require("train" if by == "answer" else "head")
    return by


def rank_user(run: RunFolder, user_id: str, how: Ranking) -> None:
    """Print the best candidates that a user of the run has not chosen yet."""
    by = way_of(run, how)
    print_best(run, read_users(run, [user_id], reads_words(run, by, how))[0], by, how)


def rank_preference(run: RunFolder, preference: str, how: Ranking) -> None:
    """Print the best candidates for a preference in words, which only the trained model reads."""
    if how.by not in (None, "answer"):
        raise ValueError(f"--by {how.by}: ranks by a history; only the answer reads a preference")
    run.require("train")
    print_best(run, RunUser("", User(preference)), "answer", how)


def rank_history(run: RunFolder, history: Sequence[str], how: Ranking) -> None:
    """Print the best candidates after some items of the catalogue, for a user that the run need not know; without the
    answer, which reads a preference."""
    if how.by == "answer":
        raise ValueError("--by answer: reads a preference in words; --history is ranked by head or fused")
    by: By = how.by or "fused"
    run.require("head")
    Ranking(items=history).candidates(how.catalogue(run))  # or an error that names the unknown
    print_best(run, RunUser("", history=tuple(history)), by, replace(how, rerank=0))


def print_best(run: RunFolder, user: RunUser, by: By, how: Ranking) -> None:
    catalogue = how.catalogue(run)
    names = how.candidates(catalogue)
    if user.chosen.issuperset(names):
        who = f"user {user.user_id!r} has chosen" if user.user_id else "the history has"
        raise ValueError(f"{who} all of these items already: there is nothing to rank; name others by --items")
    best = best_of([user], load_ranker(run, by, how), names, catalogue, how.top_k)
    if by == "answer":
        print(f"preference: {user.words.preference or '(none)'}")
    else:
        latest = [catalogue[item].title for item in user.history[-3:] if item in catalogue]
        print(f"after: {', '.join(latest) or '(none)'}")
    shown = "score" if by == "answer" else "logit"  # a probability, or a score that is none
    for place, item, score in best.select("rank", "item_id", shown).iter_rows():
        print(f"{place:3d}  {score:.3f}  {item}  {catalogue[item].title}")


def rank_users(run: RunFolder, users: Sequence[str] | None, output: Path, how: Ranking) -> None:
    """Write each user's best candidates (see ``schema.RANKINGS``), in files of 64 users; files that are there are left
    as they are.

    Args:
        users: None is every user of the run; one that is named twice counts once.
    """
    check_one_process("rank")
    by = way_of(run, how)
    everyone = dict.fromkeys(run.read(INTERACTIONS, ["user_id"])["user_id"])
    users = list(everyone if users is None else dict.fromkeys(users))
    if unknown := [user for user in users if user not in everyone]:
        raise ValueError(f"{_listed(unknown)} no user of {run.path}; ids look like {next(iter(everyone))!r}")
    names = how.candidates(how.catalogue(run))
    new = file_digest(how.new.path) if how.new else None
    model = run.key("train" if by == "answer" else "head")
    claim(output, digest(by, model, users, how.top_k, how.rerank, names, new))
    shards = [users[start : start + SHARD] for start in range(0, len(users), SHARD)]
    paths = [output / f"ranking-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    with open_workers(run.cluster, partial(ranking_worker, run, by, how), run_folders(run)) as workers:
        rankings = workers.map(Shard(number, shards[number]) for number in missing)
        for shard, best in tqdm(rankings, total=len(missing), desc="ranking", unit="file"):
            RANKINGS.write(best, paths[shard.number])
    print(f"{len(users)} users x {len(names)} candidates: {output}")


@dataclass(frozen=True)
class Shard:
    """The users of one file, by its number."""

    number: int
    users: Sequence[str]


def ranking_worker(run: RunFolder, by: By, how: Ranking, *paths: Path) -> Callable[[Shard], tuple[Shard, pl.DataFrame]]:
    """What ranks the users of a file; ``paths``: see :func:`~mllm_msr.evaluation.spread_scoring.run_at`."""
    run = run_at(run, *paths)
    catalogue, ranker, in_words = how.catalogue(run), load_ranker(run, by, how), reads_words(run, by, how)
    names = how.candidates(catalogue)

    def rank(shard: Shard) -> tuple[Shard, pl.DataFrame]:
        return shard, best_of(read_users(run, shard.users, in_words), ranker, names, catalogue, how.top_k)

    return rank


def claim(folder: Path, key: str) -> None:
    """Make ``folder`` that of the ranking called ``key``, for this and other commands that share its files; a
    ValueError if it holds anything else."""
    mark = folder / "ranking.json"
    others = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())  # locks, half files
    if others and not mark.is_file():
        raise ValueError(f"{folder} is not empty and holds no ranking: name another folder by --output")
    folder.mkdir(parents=True, exist_ok=True)
    with write_lock(folder, f"mllm-msr rank --output {folder}"):
        if not mark.is_file():
            write_text(mark, json.dumps({"key": key}))
        elif json.loads(mark.read_text(encoding="utf-8"))["key"] != key:
            raise ValueError(
                f"{folder} holds another ranking (of other users, items, top-k, way or model): remove it, or name "
                "another folder by --output"
            )


def best_of(
    users: Sequence[RunUser], ranker: RunRanker, names: Sequence[str], catalogue: Catalogue, top_k: int
) -> pl.DataFrame:
    """The best ``top_k`` of the items ``names`` that each user has not chosen yet, as ``schema.RANKINGS``."""
    place = {item: number for number, item in enumerate(names)}
    logits = ranker.score(users, names, catalogue)
    rows = []
    for user, row in zip(users, logits, strict=True):
        chosen = [place[item] for item in user.chosen if item in place]
        values = row.copy()
        values[chosen] = -np.inf
        best = np.argsort(-values, kind="stable")[: min(top_k, len(names) - len(chosen))]
        scores = 1 / (1 + np.exp(-row.astype(np.float64)))
        rows += [
            (user.user_id, rank, names[item], float(row[item]), float(scores[item]))
            for rank, item in enumerate(best, 1)
        ]
    return RANKINGS.frame(rows)


def read_users(run: RunFolder, users: Sequence[str], in_words: bool = True) -> list[RunUser]:
    """Some users of a run, for the answer ``in_words``: with the preference in force and the items chosen since;
    ValueError for an unknown one."""
    wanted = pl.col("user_id").is_in(list(users))
    histories = _items_of(run.scan(INTERACTIONS).filter(wanted))
    cut = _items_of(run.scan(CUT_INTERACTIONS).filter(wanted)) if run.recipe.data.max_history is not None else {}
    for user in users:
        if user not in histories:
            example = run.scan(INTERACTIONS).select("user_id").head(1).collect().item()
            raise ValueError(f"{_listed([user])} no user of {run.path}; ids look like {example!r}")
    words = read_words(run, histories) if in_words else {}
    whole = {user: (*cut.get(user, ()), *histories[user]) for user in users}
    return [RunUser(user, words.get(user, NOTHING_SAID), whole[user]) for user in users]


def read_words(run: RunFolder, histories: Mapping[str, Sequence[str]]) -> dict[str, User]:
    """Users in words, from their histories as far as prompts read them."""
    wanted = pl.col("user_id").is_in(list(histories))
    last = (
        run.scan(PREFERENCES)
        .filter(wanted)
        .group_by("user_id")
        .agg(pl.col("step", "preference").sort_by("step").last())
    )
    in_force = {user: (step, preference) for user, step, preference in last.collect().iter_rows()}
    summaries = dict(run.read(ITEM_SUMMARIES, ["item_id", "summary"]).iter_rows())
    words = {}
    for user, history in histories.items():
        step, preference = in_force.get(user, (0, ""))
        recent = [HistoryItem(summary=summaries[item]) for item in history[step * run.block_size :]]
        words[user] = User(preference, recent)
    return words


def _items_of(log: pl.LazyFrame) -> dict[str, list[str]]:
    return dict(log.group_by("user_id", maintain_order=True).agg("item_id").collect().iter_rows())


def index(run: RunFolder, memory_gb: float | None) -> None:
    """Compute ahead what a ``late`` model keeps of every item, and drop what is no more."""
    run.require("train")
    if not is_late(run):
        raise ValueError(
            f"the model of {run.path} has interaction='joint': it computes items anew for every user, so there is "
            "nothing to index; `mllm-msr rank` works without"
        )
    ranker = load_recommender(run, Computing(cache=run.item_cache, memory_gb=memory_gb))
    catalogue = load_catalogue(run)
    missing = ranker.not_indexed(catalogue) if run.cluster else []
    if missing:
        spread_index(run, memory_gb, missing)
    done = ranker.index(catalogue, progress="items" if run.cluster is None else None)
    done = replace(done, computed=done.computed + len(missing), kept=done.kept - len(missing))
    size = done.nbytes / max(1, done.computed + done.kept)
    print(
        f"{done.computed} items computed, {done.kept} were there, {done.deleted} dropped; "
        f"{done.nbytes / 1e6:.1f} MB, {size / 1e3:.1f} kB an item, in {done.folder}"
    )


def load_ranker(run: RunFolder, by: By, how: Ranking) -> RunRanker:
    """What ranks a run's users."""
    if by == "answer":
        return AnswerRanker(run, how)
    return FusedRanker(run, how) if reads_words(run, by, how) else HeadRanker(run, by, how.new)


def reads_words(run: RunFolder, by: By, how: Ranking) -> bool:
    """Whether the answer is asked, which reads of users what is said of them in words."""
    return by == "answer" or (by == "fused" and run.recipe.fuses_answer and how.rerank > 0)


def _listed(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - 3} more are" if len(ids) > 3 else " is" if len(ids) == 1 else " are"
    return ", ".join(map(repr, ids[:3])) + more

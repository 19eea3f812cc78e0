"""Rank a real catalogue: for one user, or for all users into files."""

import json
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import polars as pl
from tqdm import tqdm

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.ids import plain_id
from mllm_msr.data.new_items import NewItems, read_new_items
from mllm_msr.evaluation.loading import Computing, is_late, load_catalogue, load_recommender
from mllm_msr.evaluation.spread_index import spread_index
from mllm_msr.evaluation.spread_scoring import run_at, run_folders
from mllm_msr.modeling.inputs import User
from mllm_msr.processing.open_workers import open_workers
from mllm_msr.records.lock import check_one_process, write_lock
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, RANKING_MEMBERS, RANKINGS
from mllm_msr.records.storage import digest, file_digest, read_json, write_text
from mllm_msr.run_users import RunUser, known_id, listed, read_users, unknown_users

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
        index: folder of what a late model keeps of items; None: the run's own, where it has one.
    """

    items: Sequence[str] | None = None
    by: By | None = None
    top_k: int = 10
    memory_gb: float | None = None
    rerank: int = 100
    new: NewItems | None = None
    index: Path | None = None

    def catalogue(self, run: RunFolder) -> Catalogue:
        """The run's items and the new ones."""
        return replace(load_catalogue(run), new=self.new.candidates if self.new else {})

    def candidates(self, catalogue: Catalogue) -> list[str]:
        """The ids of the candidates, each once, in their order; ValueError names those that are unknown."""
        if self.items is None:
            return list(catalogue)
        items = as_known(self.items, catalogue)
        if unknown := [item for item in items if item not in catalogue]:
            example = next(iter(catalogue))
            raise ValueError(
                f"{listed(unknown)} no item of the catalogue ({len(catalogue)} items, such as {example!r})"
            )
        return list(dict.fromkeys(items))


@dataclass(frozen=True)
class Scores:
    """What U users' N candidates are ranked by.

    Args:
        logits: (U, N) float32, more for a better one.
        answers: (U, N) of the trained model, NaN where it was not asked; None if it was never.
    """

    logits: np.ndarray
    answers: np.ndarray | None = None


class RunRanker(Protocol):
    """What ranks a run's users."""

    def score(self, users: Sequence[RunUser], names: Sequence[str], catalogue: Catalogue) -> Scores: ...

    def members(self, users: Sequence[RunUser], names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """(U, N) of each member that ranks by item vectors, by its name."""
        ...


class AnswerRanker:
    """Ranks by the trained model's answer, with the index where there is one."""

    def __init__(self, run: RunFolder, how: Ranking) -> None:
        self.recommender = load_recommender(run, Computing(cache=how.index or index_of(run), memory_gb=how.memory_gb))

    def score(self, users: Sequence[RunUser], names: Sequence[str], catalogue: Catalogue) -> Scores:
        words = [user.words for user in users]
        answers = np.stack(self.recommender.score(words, [names] * len(users), catalogue, progress="pairs"))
        return Scores(answers, answers)

    def members(self, users: Sequence[RunUser], names: Sequence[str]) -> Mapping[str, np.ndarray]:
        return {}


class HeadRanker:
    """Ranks by item vectors: a history is all that it needs of a user, a vector all that it needs of an item."""

    def __init__(self, run: RunFolder, by: By, new: NewItems | None) -> None:
        from mllm_msr.modeling.item_ranking import ItemRanker

        self.ranker, self.by = ItemRanker.from_pretrained(run.head), "fused" if by == "fused" else "sequence_head"
        if new is not None:
            from mllm_msr.processing.new_vectors import put_new_items

            put_new_items(self.ranker, run.recipe, new)

    def score(self, users: Sequence[RunUser], names: Sequence[str], catalogue: Catalogue) -> Scores:
        return Scores(self.ranker.score([user.history for user in users], names, self.by).numpy())

    def members(self, users: Sequence[RunUser], names: Sequence[str]) -> Mapping[str, np.ndarray]:
        scores = self.ranker.member_scores([user.history for user in users], names)
        return {member: values.numpy() for member, values in scores.items()}


class FusedRanker:
    """Ranks by item vectors, and what that puts first by the answer as well; see ``evaluation.answer_fusion``."""

    def __init__(self, run: RunFolder, how: Ranking) -> None:
        self.head, self.answers = HeadRanker(run, "fused", how.new), AnswerRanker(run, how)
        self.others, self.depth, self.members = self.head.ranker, how.rerank, self.head.members

    def score(self, users: Sequence[RunUser], names: Sequence[str], catalogue: Catalogue) -> Scores:
        import torch

        def answer(best: torch.Tensor) -> torch.Tensor:
            words, asked = [user.words for user in users], [[names[place] for place in row] for row in best.tolist()]
            logits = np.stack(self.answers.recommender.score(words, asked, catalogue, progress="pairs"))
            np.put_along_axis(answers, best.numpy(), logits, axis=1)
            return torch.from_numpy(logits)

        answers = np.full((len(users), len(names)), np.nan, np.float32)
        fusion, buckets = self.others.answer_fusion, self.others.buckets(self.others.codes_of(names))
        assert fusion is not None  # the stage `head` of this recipe has fitted it
        chosen = torch.tensor([[item in user.chosen for item in names] for user in users])
        scores = self.others.score([user.history for user in users], names)
        return Scores(fusion.rerank(scores, buckets, chosen, self.depth, answer).numpy(), answers)


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


def rank_user(run: RunFolder, user_id: str, how: Ranking) -> pl.DataFrame:
    """The best candidates that a user of the run has not chosen yet, see :func:`best_of`."""
    by = way_of(run, how)
    return ranked(run, read_users(run, [known_id(run, user_id)], has_words(run, by, how)), by, how)


def rank_preference(run: RunFolder, preference: str, how: Ranking) -> pl.DataFrame:
    """The best candidates for a preference in words, which only the trained model reads."""
    if how.by not in (None, "answer"):
        raise ValueError(f"--by {how.by}: ranks by a history; only the answer reads a preference")
    run.require("train")
    return ranked(run, [RunUser("", User(preference))], "answer", how)


def rank_history(run: RunFolder, history: Sequence[str], how: Ranking) -> pl.DataFrame:
    """The best candidates after some items of the catalogue, for a user that the run need not know; without the
    answer, which reads a preference."""
    if how.by == "answer":
        raise ValueError("--by answer: reads a preference in words; --history is ranked by head or fused")
    by: By = how.by or "fused"
    run.require("head")
    catalogue = how.catalogue(run)
    Ranking(items=history).candidates(catalogue)  # or an error that names the unknown
    history = as_known(history, catalogue)
    return ranked(run, [RunUser("", history=tuple(history))], by, replace(how, rerank=0))


def latest(run: RunFolder, how: Ranking, user_id: str | None, history: Sequence[str] | None) -> str:
    """The titles of the last three items before a ranking; nothing for many users, or a preference."""
    if user_id:
        history = read_users(run, [known_id(run, user_id)], in_words=False)[0].history
    titles = how.catalogue(run).titles
    return ", ".join(titles[item] for item in (history or ())[-3:] if item in titles)


def rank_some(run: RunFolder, users: Sequence[str] | None, how: Ranking) -> pl.DataFrame:
    """The best candidates of each of some users, in their order; None is every user of the run."""
    by = way_of(run, how)
    known = known_users(run, users)
    shards = [Shard(start, known[start : start + SHARD]) for start in range(0, len(known), SHARD)]
    found = {shard.number: best for shard, best in spread(run, by, how, shards)}
    return pl.concat(found[shard.number] for shard in shards)


def ranked(run: RunFolder, users: Sequence[RunUser], by: By, how: Ranking) -> pl.DataFrame:
    catalogue = how.catalogue(run)
    names = how.candidates(catalogue)
    for user in users:
        if user.chosen.issuperset(names):
            who = f"user {user.user_id!r} has chosen" if user.user_id else "the history has"
            raise ValueError(f"{who} all of these items already: there is nothing to rank; name others by --items")
    return best_of(users, load_ranker(run, by, how), names, catalogue, how.top_k)


def as_known(ids: Sequence[str], known: Container[str]) -> list[str]:
    """Ids as the run has them: what it does not know as it is written is read as in a table (``10.0``, ``" 10"``)."""
    return [each if each in known else plain_id(each) for each in ids]


def known_users(run: RunFolder, users: Sequence[str] | None) -> list[str]:
    """Users of the run, each once; None is all of them, ValueError names those that are unknown."""
    everyone = dict.fromkeys(run.read(INTERACTIONS, ["user_id"])["user_id"])
    wanted = list(everyone if users is None else dict.fromkeys(as_known(users, everyone)))
    if unknown := [user for user in wanted if user not in everyone]:
        raise unknown_users(run, unknown)
    return wanted


def rank_users(run: RunFolder, users: Sequence[str] | None, output: Path, how: Ranking) -> None:
    """Write each user's best candidates (see ``schema.RANKINGS``), in files of 64 users; files that are there are left
    as they are.

    Args:
        users: None is every user of the run; one that is named twice counts once.
    """
    check_one_process("rank")
    by = way_of(run, how)
    users = known_users(run, users)
    names = how.candidates(how.catalogue(run))
    new = file_digest(how.new.path) if how.new else None
    model = run.key("train" if by == "answer" else "head")
    kept = [run.recipe.evaluation.cache_dtype] if run.recipe.evaluation.cache_dtype else []
    claim(output, digest(by, model, users, how.top_k, how.rerank, names, new, list(RANKINGS.columns), *kept))
    shards = [users[start : start + SHARD] for start in range(0, len(users), SHARD)]
    paths = [output / f"ranking-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))]
    missing = [Shard(number, shards[number]) for number, path in enumerate(paths) if not path.is_file()]
    for shard, best in spread(run, by, how, missing):
        RANKINGS.write(best, paths[shard.number])
    print(f"{len(users)} users x {len(names)} candidates: {output}")


@dataclass(frozen=True)
class Shard:
    """The users of one file, by its number."""

    number: int
    users: Sequence[str]


def spread(run: RunFolder, by: By, how: Ranking, shards: Sequence[Shard]) -> Iterator[tuple[Shard, pl.DataFrame]]:
    """The rankings of shards of users, as workers finish them.

    Vectors of new items are computed here, once for all workers, which need not have the model that makes them.
    """
    if how.new and by != "answer" and run.cluster and shards:
        from mllm_msr.processing.new_vectors import with_vectors

        how = replace(how, new=with_vectors(run.recipe, how.new))
    index = index_of(run) if run.cluster and reads_words(run, by, how) else None
    work = partial(ranking_worker, run, by, how, has_words(run, by, how), index is not None)
    with open_workers(run.cluster, work, run_folders(run, index=index)) as workers:
        yield from tqdm(workers.map(iter(shards)), total=len(shards), desc="ranking", unit="shard", leave=False)


def ranking_worker(
    run: RunFolder, by: By, how: Ranking, in_words: bool, indexed: bool, *paths: Path
) -> Callable[[Shard], tuple[Shard, pl.DataFrame]]:
    """What ranks the users of a file; ``paths``: see :func:`~mllm_msr.evaluation.spread_scoring.run_at`."""
    run, index = run_at(run, indexed, *paths)
    how = replace(how, index=index)
    catalogue, ranker = how.catalogue(run), load_ranker(run, by, how)
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
        elif read_json(mark)["key"] != key:
            raise ValueError(
                f"{folder} holds another ranking (of other users, items, top-k, way or model): remove it, or name "
                "another folder by --output"
            )


def best_of(
    users: Sequence[RunUser], ranker: RunRanker, names: Sequence[str], catalogue: Catalogue, top_k: int
) -> pl.DataFrame:
    """The best ``top_k`` of the items ``names`` that each user has not chosen yet, as ``schema.RANKINGS``."""
    place = {item: number for number, item in enumerate(names)}
    scores = ranker.score(users, names, catalogue)
    best: list[list[int]] = []
    for user, row in zip(users, scores.logits, strict=True):
        chosen = [place[item] for item in user.chosen if item in place]
        values = row.copy()
        values[chosen] = -np.inf
        best.append(np.argsort(-values, kind="stable")[: min(top_k, len(names) - len(chosen))].tolist())
    asked = list(dict.fromkeys(item for row in best for item in row))
    column = {item: number for number, item in enumerate(asked)}
    members = ranker.members(users, [names[item] for item in asked]) if asked else {}
    rows = []
    for number, (user, items) in enumerate(zip(users, best, strict=True)):
        for rank, item in enumerate(items, 1):
            answer = None if scores.answers is None else float(scores.answers[number, item])
            own: dict[str, float | None] = {
                name: float(values[number, column[item]]) for name, values in members.items()
            }
            own["answer"] = answer = None if answer is None or np.isnan(answer) else answer
            probability = None if answer is None else 1 / (1 + float(np.exp(-np.float64(answer))))
            said = [own.get(name) for name in RANKING_MEMBERS]
            which = (user.user_id, rank, names[item], catalogue.titles[names[item]])
            score = float(scores.logits[number, item])
            rows.append((*which, score, probability, item, *said, user.words.preference))
    return RANKINGS.frame(rows)


def index_of(run: RunFolder) -> Path | None:
    """The folder of what the run's late model keeps of items, if there is one."""
    return run.item_cache if run.item_cache.is_dir() and is_late(run) else None


def index(run: RunFolder, memory_gb: float | None) -> None:
    """Compute ahead what a ``late`` model keeps of every item, and drop what is no more, or was an earlier model's."""
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
        spread_index(run, missing, run.item_cache, memory_gb=memory_gb)
    done = ranker.index(catalogue, progress="items" if run.cluster is None else None)
    done = replace(done, computed=done.computed + len(missing), kept=done.kept - len(missing))
    for folder in run.item_cache.iterdir():  # those of models that were trained before
        if folder != done.folder:
            shutil.rmtree(folder, ignore_errors=True)
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


def has_words(run: RunFolder, by: By, how: Ranking) -> bool:
    """Whether users come in words: the answer reads them, and a ranking shows them where the run has them."""
    return reads_words(run, by, how) or not run.pending("summarize users")

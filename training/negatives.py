"""Negatives beyond the table's: sampled anew each epoch, and hard ones, which the model ranks highest as it begins.

Every sample is a hash of (seed, positive, epoch), and scores of pools lie in the output folder as soon as they are
there. So an interrupted training that goes on sees the same rows. Letters: P positives, I items, B some positives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.negatives import NegativeSampler, noise
from mllm_msr.records.storage import digest, write_parquet
from mllm_msr.training.callbacks import Score, scoring

CHUNK = 64  # positives whose pools are scored, and kept on disk, at a time
COLUMNS = ["task_id", "user_id", "item_id", "label", "preference", "recent"]


@dataclass(frozen=True)
class NegativeOptions:
    """How many negatives stand beside each positive, and where they come from.

    Args:
        random: random items in place of the table's negatives; ``None`` leaves those.
        hard: items beside these, the best-scored of a pool.
        pool: how many unseen items are scored for each positive.
        popular: sample in proportion to the items' training interactions, not uniformly.
        seed: of all samples.
    """

    random: int | None = None
    hard: int = 0
    pool: int = 50
    popular: bool = False
    seed: int = 0

    @property
    def pool_size(self) -> int:
        """Items that are scored for each positive."""
        return self.pool if self.hard else 0

    @property
    def sampled(self) -> int:
        """Items that are sampled for each positive, those of its pool included."""
        return (self.random or 0) + self.pool_size

    @property
    def kept(self) -> int:
        """Items that stand beside each positive."""
        return (self.random or 0) + self.hard


class EpochNegatives:
    """What stands beside each positive in the epoch at hand: ``items`` (P, random + hard), codes in the catalogue.

    Negatives of a user are never among the items of any of the user's histories, nor chosen at the end of one.

    Args:
        examples: the ``sft`` table.
        tasks: ``split``, ``user_id``, ``history``, ``candidates``, ``labels`` of all splits.
        catalogue: the items.
        options: how many negatives, and where they come from.
        cut: ``user_id``, ``item_id`` of interactions that are in no history, as ``max_history`` has cut them off.

    Raises:
        ValueError: a user has met so much that fewer items are left than are to be sampled.
    """

    def __init__(
        self,
        examples: Dataset,
        tasks: Dataset,
        catalogue: Catalogue,
        options: NegativeOptions,
        cut: pl.DataFrame,
    ) -> None:
        if options.hard > options.pool:
            raise ValueError(
                f"{options.hard} hard negatives cannot be chosen from a pool of {options.pool}: raise the pool"
            )
        self.examples, self.catalogue, self.options = examples, catalogue, options
        self.ids = np.array(list(catalogue.index))
        self.rows = np.flatnonzero(examples["label"])  # (P,) of the positives
        facts: Any = examples.select_columns(["task_id", "user_id", "preference", "recent", "item_id"]).to_polars()
        self.positives = facts[self.rows]
        users = facts["user_id"].unique().sort()
        self.user = users.search_sorted(self.positives["user_id"]).to_numpy().astype(np.int64)  # (P,)

        logged: Any = tasks.select_columns(["split", "user_id", "history", "candidates", "labels"]).to_polars()
        chosen = logged.explode("candidates", "labels").filter(pl.col("labels") == 1)
        met = pl.concat(
            [
                logged.select("split", "user_id", pl.col("history").alias("item_id")).explode("item_id"),
                chosen.select("split", "user_id", pl.col("candidates").alias("item_id")),
            ]
        ).drop_nulls()
        place = pl.col("item_id").replace_strict(self.ids, np.arange(len(self.ids)), return_dtype=pl.Int64)
        counts = met.filter(pl.col("split") == "train").unique(["user_id", "item_id"]).select(place).to_series()
        self.counts = np.bincount(counts.to_numpy(), minlength=len(self.ids))  # (I,) of training interactions
        taken = facts if options.random is None else self.positives
        seen = pl.concat(part.select("user_id", "item_id") for part in (met, taken, cut))
        seen = seen.filter(pl.col("user_id").is_in(users.implode())).with_columns(place)
        codes = users.search_sorted(seen["user_id"]).to_numpy().astype(np.int64) * len(self.ids)
        self.sampler = NegativeSampler(codes + seen["item_id"].to_numpy(), len(users), len(self.ids))

        left = self.sampler.available
        if options.sampled > left.min():
            raise ValueError(
                f"user {users[int(left.argmin())]!r} has only {left.min()} unseen items, but {options.sampled} are to "
                "be sampled: lower --negatives_per_positive or --hard_negatives_pool"
            )
        self.items = np.concatenate([self.sample(0, part)[:, : options.kept] for part in self._chunks()])

    def _chunks(self) -> list[np.ndarray]:
        return np.split(np.arange(len(self.rows)), np.arange(CHUNK, len(self.rows), CHUNK))

    def sample(self, epoch: int, positives: np.ndarray) -> np.ndarray:
        """(B, random + pool) distinct unseen items of some positives, in random order."""
        user, n, seed = self.user[positives], self.options.sampled, self.options.seed
        keys = (positives, np.full(len(positives), epoch))
        if self.options.popular:
            return self.sampler.popular(user, n, self.counts, seed, *keys)
        order = noise(seed, "order", positives[:, None], epoch, np.arange(n)[None]).argsort(axis=1, kind="stable")
        return np.take_along_axis(self.sampler.uniform(user, n, seed, *keys), order, axis=1)

    def begin(self, epoch: int, trainer: Trainer, folder: Path) -> None:
        """Sample the epoch's items and find the hard ones; every process takes part. Scores are kept in ``folder``."""
        if not self.options.hard:
            self.items = np.concatenate([self.sample(epoch, part) for part in self._chunks()])
            return
        parts = []
        with scoring(trainer) as score:
            for number, part in enumerate(self._chunks()):
                random, pool = np.split(self.sample(epoch, part), [self.options.random or 0], axis=1)
                path = folder / f"epoch-{epoch}" / f"{number:06d}.parquet"
                logits = self._scores(score, part, pool, path, trainer.accelerator.is_main_process)
                best = np.argsort(-logits, axis=1, kind="stable")[:, : self.options.hard]
                parts.append(np.concatenate([random, np.take_along_axis(pool, best, axis=1)], axis=1))
        self.items = np.concatenate(parts)

    def _scores(self, score: Score, positives: np.ndarray, pool: np.ndarray, path: Path, main: bool) -> np.ndarray:
        """(B, pool) logits of the pools of some positives: those in ``path``, or the model's, kept there."""
        (frame,) = broadcast_object_list([pl.read_parquet(path) if main and path.is_file() else None])
        if frame is None:
            lists = {"candidates": self.ids[pool].tolist(), "labels": np.zeros_like(pool).tolist()}
            tasks = self.positives[positives].with_columns(pl.Series(name, values) for name, values in lists.items())
            frame = score(tasks, self.catalogue).select("user_id", "item_id", "logit")
            if main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_parquet(frame, path)
        return frame["logit"].to_numpy().reshape(pool.shape)

    def dataset(self) -> Dataset:
        """The table's rows, or its positives alone, and after them every positive's negatives of the epoch at hand.

        What a row holds is looked up when it is asked for, so the same data set serves all epochs.
        """
        examples, ids, rows = self.examples.select_columns(COLUMNS), self.ids, self._sources()
        count = len(self.rows) * self.options.kept
        places = np.concatenate([np.full(len(rows) - count, -1), np.arange(count)])

        def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            columns = {name: list(values) for name, values in examples[batch["row"]].items()}
            for number, place in enumerate(batch["place"]):
                if place >= 0:
                    columns["item_id"][number], columns["label"][number] = str(ids[self.items.flat[place]]), 0
            return columns

        return Dataset.from_dict({"row": rows, "place": places}).with_transform(look_up)

    def task_ids(self) -> list[str]:
        """Of each row of :meth:`dataset`."""
        return np.array(self.examples["task_id"])[self._sources()].tolist()

    def _sources(self) -> np.ndarray:
        """The row of the table that each row of the data set is, or whose task it belongs to."""
        own = np.arange(len(self.examples)) if self.options.random is None else self.rows
        return np.concatenate([own, np.repeat(self.rows, self.options.kept)])


class NegativesCallback(TrainerCallback):
    """Lets every epoch begin with its own negatives.

    Args:
        trainer: whose model scores the pools.
        negatives: those of the training.
        facts: all that the model in training depends on: scores of another training are not taken for its own.
    """

    def __init__(self, trainer: Trainer, negatives: EpochNegatives, facts: Sequence[Any]) -> None:
        self.trainer, self.negatives = trainer, negatives
        data = [negatives.ids.tolist(), negatives.positives["task_id"].to_list()]
        self.folder = Path(trainer.args.output_dir or ".") / "negatives" / digest(*facts, *data)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.negatives.begin(int(state.epoch or 0), self.trainer, self.folder)

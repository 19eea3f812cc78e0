"""Negatives beyond the table's: drawn anew each epoch, and mined by the model as it stands at the epoch's beginning.

Every draw is a hash of (seed, positive, epoch), and mined scores lie in the output folder as soon as they are there. So
an interrupted training that goes on sees the same rows. Letters: P positives, I items, B some positives.
"""

from contextlib import nullcontext
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


class Negatives:
    """What stands beside each positive in the epoch at hand: ``items`` (P, drawn + mined), codes in the catalogue.

    Negatives of a user are never among the items of any of the user's histories, nor chosen at the end of one.

    Args:
        examples: the ``sft`` table.
        tasks: ``split``, ``user_id``, ``history``, ``candidates``, ``labels`` of all splits.
        catalogue: the items.
        drawn: negatives of each positive in place of the table's; ``None`` leaves those.
        mined: negatives of each positive beside these, the best-scored of a pool.
        pool: how many unseen items are scored for each positive.
        popular: draw in proportion to the items' training interactions, not uniformly.
        seed: of all draws.

    Raises:
        ValueError: a user has met so much that fewer items are left than are to be drawn.
    """

    def __init__(
        self,
        examples: Dataset,
        tasks: Dataset,
        catalogue: Catalogue,
        drawn: int | None,
        mined: int,
        pool: int,
        popular: bool,
        seed: int,
    ) -> None:
        if mined > pool:
            raise ValueError(f"{mined} hard negatives cannot be chosen from a pool of {pool}: raise the pool")
        self.examples, self.catalogue, self.ids = examples, catalogue, np.array(list(catalogue.index))
        self.keeps_table, self.drawn, self.mined = drawn is None, drawn or 0, mined
        self.pool, self.popular, self.seed = pool if mined else 0, popular, seed
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
        taken = facts if self.keeps_table else self.positives
        known = pl.concat([met.select("user_id", "item_id"), taken.select("user_id", "item_id")])
        known = known.filter(pl.col("user_id").is_in(users.implode())).with_columns(place)
        codes = users.search_sorted(known["user_id"]).to_numpy().astype(np.int64) * len(self.ids)
        self.sampler = NegativeSampler(codes + known["item_id"].to_numpy(), len(users), len(self.ids))

        wanted, left = self.drawn + self.pool, self.sampler.available
        if wanted > left.min():
            raise ValueError(
                f"user {users[int(left.argmin())]!r} has only {left.min()} unseen items, but {wanted} are to be drawn: "
                "lower --negatives_per_positive or --hard_negatives_pool"
            )
        self.items = np.concatenate([self.draw(0, part)[:, : self.drawn + mined] for part in self._chunks()])

    def _chunks(self) -> list[np.ndarray]:
        return np.split(np.arange(len(self.rows)), np.arange(CHUNK, len(self.rows), CHUNK))

    def draw(self, epoch: int, positives: np.ndarray) -> np.ndarray:
        """(B, drawn + pool) distinct unseen items of some positives, in random order."""
        user, n, keys = self.user[positives], self.drawn + self.pool, (positives, np.full(len(positives), epoch))
        if self.popular:
            return self.sampler.popular(user, n, self.counts, self.seed, *keys)
        order = np.argsort(
            noise(self.seed, "order", positives[:, None], epoch, np.arange(n)[None]), axis=1, kind="stable"
        )
        return np.take_along_axis(self.sampler.uniform(user, n, self.seed, *keys), order, axis=1)

    def begin(self, epoch: int, trainer: Trainer, folder: Path) -> None:
        """Draw and mine the epoch's items; every process takes part. Scores are kept in ``folder``."""
        found = []
        with scoring(trainer) if self.mined else nullcontext() as score:
            for number, part in enumerate(self._chunks()):
                items = self.draw(epoch, part)
                kept, pool = items[:, : self.drawn], items[:, self.drawn :]
                if score:
                    path = folder / f"epoch-{epoch}" / f"{number:06d}.parquet"
                    logits = self._scores(score, part, pool, path, trainer.accelerator.is_main_process)
                    best = np.argsort(-logits, axis=1, kind="stable")[:, : self.mined]
                    kept = np.concatenate([kept, np.take_along_axis(pool, best, axis=1)], axis=1)
                found.append(kept)
        self.items = np.concatenate(found)

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

        What a row shows is looked up when it is asked for, so the same data set serves all epochs.
        """
        examples, ids, rows = self.examples.select_columns(COLUMNS), self.ids, self._sources()
        made = len(self.rows) * (self.drawn + self.mined)
        places = np.concatenate([np.full(len(rows) - made, -1), np.arange(made)])

        def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            found = {name: list(values) for name, values in examples[batch["row"]].items()}
            for number, place in enumerate(batch["place"]):
                if place >= 0:
                    found["item_id"][number], found["label"][number] = str(ids[self.items.flat[place]]), 0
            return found

        return Dataset.from_dict({"row": rows, "place": places}).with_transform(look_up)

    def task_ids(self) -> list[str]:
        """Of each row of :meth:`dataset`."""
        return np.array(self.examples["task_id"])[self._sources()].tolist()

    def _sources(self) -> np.ndarray:
        """The row of the table that each row of the data set is, or whose task it belongs to."""
        own = np.arange(len(self.examples)) if self.keeps_table else self.rows
        return np.concatenate([own, np.repeat(self.rows, self.drawn + self.mined)])


COLUMNS = ["task_id", "user_id", "item_id", "label", "preference", "recent"]


class NegativesCallback(TrainerCallback):
    """Lets every epoch begin with its own negatives.

    Args:
        facts: all that the model in training depends on: scores of another training are not taken for its own.
    """

    def __init__(self, trainer: Trainer, negatives: Negatives, *facts: Any) -> None:
        self.trainer, self.negatives = trainer, negatives
        data = [negatives.ids.tolist(), negatives.positives["task_id"].to_list()]
        self.folder = Path(trainer.args.output_dir or ".") / "negatives" / digest(*facts, *data)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.dataloader_persistent_workers:
            raise ValueError(
                "workers that outlive an epoch keep its negatives: leave out dataloader_persistent_workers"
            )
        self.negatives.begin(int(state.epoch or 0), self.trainer, self.folder)

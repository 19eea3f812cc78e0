"""Batches of whole tasks: a user and several candidates, for training that computes what pairs share only once."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from datasets import Dataset

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.modeling.interfaces import PreparedImage
from mllm_msr.processing.examples import user_of, users_of
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.records.storage import digest

IMAGES = 2048  # prepared images kept by a collator
MEASURED = 32  # users and items


def chosen_items(examples: Dataset, tasks: Dataset, cut: pl.DataFrame) -> dict[str, set[str]]:
    """What each user is known to have chosen: never one of their negatives, whoever's positive it is.

    Args:
        examples: the ``sft`` table.
        tasks: the ``tasks`` table of the same split, for its histories.
        cut: ``user_id``, ``item_id`` of interactions that are in no history, as ``max_history`` has cut them off.
    """
    chosen = {user: set(items) for user, items in cut.group_by("user_id").agg("item_id").iter_rows()}
    for user, history in zip(tasks["user_id"], tasks["history"], strict=True):
        chosen.setdefault(user, set()).update(history)
    for user, item, label in zip(examples["user_id"], examples["item_id"], examples["label"], strict=True):
        if label:
            chosen.setdefault(user, set()).add(item)
    return chosen


def log_item_frequency(examples: Dataset) -> dict[str, float]:
    """The log of each item's share of the positives: how often it is an in-batch negative of another user."""
    positives = [item for item, label in zip(examples["item_id"], examples["label"], strict=True) if label]
    items, counts = np.unique(positives, return_counts=True)
    return dict(zip(items.tolist(), np.log(counts / counts.sum()).tolist(), strict=True))


def measured_limits(processor: MllmMsrProcessor, examples: Dataset, items: Catalogue) -> tuple[int, int]:
    """The tokens of the longest users and items, an eighth more, in sixteens: blocks that stand far apart learn worse.

    Measured are those with the most characters, and as many items spread over the catalogue for their images.
    """
    users: Any = examples.select_columns(["preference", "recent"]).to_polars()
    length = pl.col("preference").str.len_chars() + pl.col("recent").list.join("").str.len_chars()
    longest = users.sort(length, descending=True, maintain_order=True).head(MEASURED)
    table, names = items.items, list(items)
    words = [len(title or "") + len(text or "") for title, text in zip(table["title"], table["text"], strict=True)]
    wordy = sorted(range(len(names)), key=lambda row: -words[row])[:MEASURED]
    spread = range(0, len(names), max(1, len(names) // MEASURED))
    candidates = [items[names[row]] for row in dict.fromkeys([*wordy, *spread])]
    batches = processor.late_users(users_of(longest)), processor.late_items(candidates)
    lengths = (int(batch["attention_mask"].sum(1).max()) for batch in batches)
    user, item = (16 * math.ceil(length * 1.125 / 16) for length in lengths)
    return user, item


@dataclass
class PreparedItems:
    """The catalogue with prepared images, the latest ``IMAGES`` of which are kept."""

    processor: MllmMsrProcessor
    catalogue: Catalogue
    prepared: dict[str, Candidate] = field(default_factory=dict)

    def __getitem__(self, item_id: str) -> Candidate:
        if item_id not in self.prepared:
            item = self.catalogue[item_id]
            if item.image is not None:
                item = replace(item, image=self.processor.prepare_images([item.image])[0])
            if len(self.prepared) == IMAGES:
                del self.prepared[next(iter(self.prepared))]
            self.prepared[item_id] = item
        return self.prepared[item_id]

    def images(self, item_ids: Iterable[str]) -> list[tuple[str, PreparedImage]]:
        """The images that a batch of these items holds, in their order, and whose they are."""
        return [(item, image) for item in item_ids if (image := self[item].image) is not None]


@dataclass
class PackedCollator:
    """Rows of ``data.task_rows`` to whole prompts in groups that share what they begin with (``interaction="joint"``).

    The batch has ``prompts``, the processor's batch of all B candidates of all tasks; ``group_ids`` (B,), the task of
    each; ``labels`` (B,), 1 or 0; and the ``images`` that it holds.
    """

    processor: MllmMsrProcessor
    items: PreparedItems

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        users = [user_of(row["preference"], row["recent"]) for row in rows]
        groups = [number for number, row in enumerate(rows) for _ in row["item_id"]]
        items = [item for row in rows for item in row["item_id"]]
        return {
            "prompts": self.processor([users[number] for number in groups], [self.items[item] for item in items]),
            "group_ids": torch.tensor(groups),
            "labels": torch.tensor([label for row in rows for label in row["label"]]),
            "images": self.items.images(items),
        }


@dataclass
class LateCollator:
    """Rows of ``data.task_rows`` to users, items and the pairs of them that are trained (``interaction="late"``).

    The batch has what the processor's ``late_blocks`` returns for the tasks and for all their items, each once;
    ``pairs`` (2, P) and ``labels`` (P,), 1 or 0; the ``images`` it holds; and ``log_q`` (P,), the log of the frequency
    of each pair's item.

    Args:
        processor: the recommender's.
        items: the catalogue.
        limits: the most tokens of a user and an item.
        in_batch: pair every user with the items of all others, too, but for those that the user has chosen.
        pairs_per_user: the most pairs of a user: a random sample of the in-batch negatives fills them up.
        chosen: see :func:`chosen_items`.
        log_frequency: see :func:`log_item_frequency`.
    """

    processor: MllmMsrProcessor
    items: PreparedItems
    limits: tuple[int, int] = (512, 1024)
    in_batch: bool = True
    pairs_per_user: int | None = None
    chosen: Mapping[str, set[str]] = field(default_factory=dict)
    log_frequency: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        items = list(dict.fromkeys(item for row in rows for item in row["item_id"]))
        places = {item: place for place, item in enumerate(items)}
        pairs: list[tuple[int, int, int]] = []
        # the same sample for the same batch, so that an interrupted training goes on as it would have
        random = np.random.default_rng(int(digest([row["task_id"] for row in rows])[:16], 16))
        for number, row in enumerate(rows):
            own = {places[item]: label for item, label in zip(row["item_id"], row["label"], strict=True)}
            chosen = self.chosen.get(row["user_id"], set())
            others = [place for item, place in places.items() if place not in own and item not in chosen]
            room = len(others) if self.in_batch else 0
            if self.pairs_per_user is not None:
                room = max(0, min(room, self.pairs_per_user - len(own)))
            sample = sorted(random.permutation(others)[:room].tolist()) if room < len(others) else others
            pairs += [(number, place, label) for place, label in own.items()]
            pairs += [(number, place, 0) for place in sample]
        table = torch.tensor(pairs)
        least = min(self.log_frequency.values(), default=0.0)  # an item that is nobody's positive is as rare as can be
        return {
            **self.processor.late_blocks(
                [user_of(row["preference"], row["recent"]) for row in rows],
                [self.items[item] for item in items],
                self.limits,
            ),
            "pairs": table[:, :2].T.contiguous(),
            "labels": table[:, 2],
            "images": self.items.images(items),
            "log_q": torch.tensor([self.log_frequency.get(items[place], least) for _, place, _ in pairs]),
        }

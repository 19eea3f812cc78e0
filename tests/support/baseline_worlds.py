"""Small worlds that trained baselines learn, and a training long enough to be killed."""

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from mllm_msr.data.tasks import TaskPlan
from mllm_msr.evaluation import rankers
from mllm_msr.evaluation.graph_baselines import GraphOptions, mgat
from mllm_msr.evaluation.sequence_training import FitOptions
from mllm_msr.evaluation.sequential_baselines import sasrec
from mllm_msr.records.sections import PrepareOptions

SEQUENCE = FitOptions(batch_size=16, learning_rate=1e-2, max_epochs=12)
GRAPH = GraphOptions(hidden=16, batch_size=128, negatives=16, learning_rate=1e-2, max_epochs=8)
N_ITEMS = 40
LONG = {"max_epochs": 30, "patience": 30}


def circle(n_users: int = 80, n_items: int = 12, length: int = 8):
    """Who met item i meets item i + 1 next: nothing but order tells."""
    rng = np.random.default_rng(0)
    items = pl.DataFrame({"item_id": [f"{item:02}" for item in range(n_items)]})
    rows, tasks = [], []
    for user in range(n_users):
        walk = [f"{(start + user) % n_items:02}" for start in range(length)]
        rows += [(f"u{user}", item) for item in walk]
        shown = [f"{item:02}" for item in rng.permutation(n_items)]
        tasks.append((walk, shown, [int(item == f"{(length + user) % n_items:02}") for item in shown]))
    training = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    return pl.DataFrame(tasks, schema=["history", "candidates", "labels"], orient="row"), items, training


def two_tastes(protocol: str, n_users: int = 60):
    """(validation tasks, items, training interactions, vectors), and test tasks: each user keeps to one half of the
    items, and vectors say of most items which half it is."""
    rng = np.random.default_rng(0)
    half = N_ITEMS // 2
    rows = [
        (f"u{user:03}", f"i{item + half * (user % 2):03}", 100 * place + user)
        for user in range(n_users)
        for place, item in enumerate(rng.permutation(half)[:12])
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    plan = TaskPlan.of(log, PrepareOptions(protocol=protocol, n_negatives=8))
    tasks, items = pl.concat(list(plan.chunks())), plan.popularity.select("item_id")
    training = rankers.training_interactions(log, tasks, protocol, plan.popularity).select("user_id", "item_id")
    vectors = rng.normal(size=(N_ITEMS, 5)).astype(np.float32)
    vectors[:, 0] += np.where(np.arange(N_ITEMS) < half, -1, 1)
    return (tasks.filter(split="validation"), items, training, vectors), tasks.filter(split="test")


def trained(name: str, folder: Path | None) -> np.ndarray:
    """The scores of a baseline that is trained for thirty epochs."""
    if name == "sasrec":
        data = circle(n_users=30)
        train, test = partial(sasrec, options=FitOptions(**{**SEQUENCE.__dict__, **LONG})), data[0]
    else:
        data, test = two_tastes("strict", n_users=20)
        train = partial(mgat, options=GraphOptions(**{**GRAPH.__dict__, **LONG}))
    return train(*data, folder=folder)(test)

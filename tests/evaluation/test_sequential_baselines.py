"""SASRec and GRU4Rec: no look ahead, no trace of padding, the same with one seed, and they learn what order says."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch

from mllm_msr.evaluation.sequential_baselines import (
    GRU4Rec,
    SASRec,
    SequenceOptions,
    pad_left,
    sequence_ranker,
    windows,
)

SMALL = SequenceOptions(hidden=16, layers=1, max_length=8, batch_size=16, learning_rate=1e-2, max_epochs=12)
KINDS = [SASRec, GRU4Rec]


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


@pytest.mark.parametrize("kind", KINDS)
def test_it_neither_looks_ahead_nor_sees_padding(kind):
    torch.manual_seed(0)
    model = kind(20, SMALL).eval()
    with torch.inference_mode():
        whole = model(torch.tensor([[3, 7, 5, 9]]))
        other = model(torch.tensor([[3, 7, 5, 1]]))
        padded = model(torch.tensor([[0, 0, 3, 7, 5, 9]]))
    assert torch.allclose(whole[:, :3], other[:, :3], atol=1e-6)
    assert not torch.allclose(whole[:, 3], other[:, 3], atol=1e-3)
    assert torch.allclose(whole, padded[:, 2:], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most_classes", [4096, 6])
def test_it_learns_order_with_the_whole_softmax_and_a_sampled_one(kind, most_classes):
    tasks, items, training = circle()
    options = SequenceOptions(**{**SMALL.__dict__, "most_classes": most_classes})
    values = sequence_ranker(kind, tasks, items, training, options=options)(tasks).reshape(len(tasks), -1)
    chosen = np.array(tasks["labels"].to_list()).argmax(axis=1)
    assert (values.argmax(axis=1) == chosen).mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_result_and_leaves_the_global_one_alone(kind):
    tasks, items, training = circle(n_users=20)
    options = SequenceOptions(**{**SMALL.__dict__, "max_epochs": 2})
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = sequence_ranker(kind, tasks, items, training, seed=1, options=options)(tasks)
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(first, sequence_ranker(kind, tasks, items, training, seed=1, options=options)(tasks))
    assert not np.array_equal(first, sequence_ranker(kind, tasks, items, training, seed=2, options=options)(tasks))


def test_every_step_of_a_long_sequence_is_learnt_once():
    one = np.arange(1, 11)
    steps = [(a, b) for piece in windows([one], 4) for a, b in pairwise(piece)]
    assert sorted(steps) == [(i, i + 1) for i in range(1, 10)]
    assert windows([np.array([1])], 4) == []
    assert pad_left([np.array([1, 2]), np.array([3])]).tolist() == [[1, 2], [0, 3]]

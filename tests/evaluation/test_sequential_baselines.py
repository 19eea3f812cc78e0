"""SASRec and GRU4Rec as rankers of a run's tasks: they learn what order says."""

import numpy as np
import polars as pl
import pytest
import torch
from baseline_worlds import SEQUENCE, circle

from mllm_msr.evaluation.coded_tasks import CodedLists
from mllm_msr.evaluation.sequence_training import FitOptions
from mllm_msr.evaluation.sequential_baselines import gru4rec, gru4recf, sasrec, sasrecf

KINDS = [sasrec, gru4rec]


@pytest.mark.parametrize("train", KINDS)
@pytest.mark.parametrize("most_classes", [4096, 6])
def test_it_learns_order_with_the_whole_softmax_and_a_sampled_one(train, most_classes):
    tasks, items, training = circle()
    options = FitOptions(**{**SEQUENCE.__dict__, "most_classes": most_classes})
    ranker = train(tasks, items, training, options=options)
    values = ranker(tasks).reshape(len(tasks), -1)
    chosen = np.array(tasks["labels"].to_list()).argmax(axis=1)
    assert (values.argmax(axis=1) == chosen).mean() > 0.9


@pytest.mark.parametrize("train", KINDS)
def test_one_seed_gives_one_result(train):
    tasks, items, training = circle(n_users=20)
    options = FitOptions(**{**SEQUENCE.__dict__, "max_epochs": 2})
    first = train(tasks, items, training, seed=1, options=options)(tasks)
    assert np.array_equal(first, train(tasks, items, training, seed=1, options=options)(tasks))
    assert not np.array_equal(first, train(tasks, items, training, seed=2, options=options)(tasks))


@pytest.mark.parametrize("train", KINDS)
def test_items_that_nobody_chose_all_score_alike(train):
    """Their identity stays zero, so that nothing is said of them: no better and no worse than chance."""
    tasks, items, training = circle(n_users=20)
    items = pl.concat([items, pl.DataFrame({"item_id": ["new", "newer"]})])
    tasks = tasks.with_columns(
        pl.col("candidates").list.concat(pl.lit(["new", "newer"])), pl.col("labels").list.concat([0, 0])
    )
    values = train(tasks, items, training, options=SEQUENCE)(tasks).reshape(len(tasks), -1)
    assert not values[:, -2:].any() and values[:, :-2].all()


def test_what_was_trained_is_saved_before_it_scores(tmp_path):
    tasks, items, training = circle(n_users=20)
    options = FitOptions(**{**SEQUENCE.__dict__, "max_epochs": 2})
    first = sasrec(tasks, items, training, options=options, folder=tmp_path)
    (saved,) = tmp_path.glob("sasrec-*.pt")
    written = saved.stat().st_mtime_ns
    again = sasrec(tasks, items, training, options=options, folder=tmp_path)
    assert saved.stat().st_mtime_ns == written
    assert np.array_equal(first(tasks), again(tasks))


def in_pairs(n_kinds: int = 10, n_users: int = 200):
    """Items go by kinds of two, which content tells; a user's next item is of the kind after, either of its two. Of two
    kinds, 0 and 1, nobody chose the second item in training."""
    rng = np.random.default_rng(0)
    items = pl.DataFrame({"item_id": [f"{item:02}" for item in range(2 * n_kinds)]})
    walks = (np.arange(n_users)[:, None] + np.arange(7)) % n_kinds
    walks = 2 * walks + np.where(walks > 1, rng.integers(2, size=walks.shape), 0)
    training = [(f"u{user}", f"{item:02}") for user, walk in enumerate(walks) for item in walk[:-1]]
    tasks = []
    for *walk, target in walks:
        others = rng.permutation([item for item in range(2 * n_kinds) if item // 2 != target // 2])[:8]
        shown = [f"{item:02}" for item in (target, *others)]
        tasks.append(([f"{item:02}" for item in walk], shown, [1] + [0] * 8))
    vectors = np.repeat(np.eye(n_kinds), 2, axis=0) + 0.01 * rng.normal(size=(2 * n_kinds, n_kinds))
    frame = pl.DataFrame(tasks, schema=["history", "candidates", "labels"], orient="row")
    log = pl.DataFrame(training, schema=["user_id", "item_id"], orient="row")
    return frame, items, log, vectors.astype(np.float32)


@pytest.mark.parametrize("train", [sasrecf, gru4recf])
def test_with_features_items_that_nobody_chose_are_told_apart_by_their_vectors(train):
    tasks, items, training, vectors = in_pairs()
    ranker = train(tasks, items, training, vectors, options=SEQUENCE)
    assert ranker.head.config.joined and ranker.head.config.identity_dropout == 0
    assert (ranker(tasks).reshape(len(tasks), -1).argmax(axis=1) == 0).mean() > 0.9
    scores = ranker.score_catalogue(CodedLists.of(tasks["history"], items))
    target = np.array([int(candidates[0]) for candidates in tasks["candidates"].to_list()])
    right = {kind: scores[target == 2 * kind][:, [1, 3]].argmax(axis=1) == kind for kind in (0, 1)}
    assert right[0].mean() > 0.9 and right[1].mean() > 0.9


def test_features_are_joined_with_the_identity_by_one_projection():
    tasks, items, training, vectors = in_pairs()
    head = sasrecf(tasks, items, training, vectors, options=FitOptions(max_epochs=0)).head
    content = (head.content.float() - head.mean) / head.deviation
    features = content @ head.reader.weight.T + head.reader.bias
    joined = torch.cat([head.identity, features], dim=1) @ head.project.weight.T + head.project.bias
    torch.testing.assert_close(head.item_vectors(), joined)
    new = head.new_item_vectors(torch.from_numpy(vectors[3:4]).half())  # whom nobody chose: the identity is zero
    torch.testing.assert_close(new, head.item_vectors()[3:4])

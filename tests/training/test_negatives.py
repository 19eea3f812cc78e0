"""Negatives drawn and mined while training: never what a user has chosen, the model's favourites, the same resumed."""

import shutil

import numpy as np
import polars as pl
import pytest
import torch
from datasets import load_dataset

from mllm_msr.hub_cards.publishing import build_hub
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS
from mllm_msr.training import sft
from mllm_msr.training.data import TrainingData
from mllm_msr.training.negatives import EpochNegatives, NegativeOptions


def negatives(run, cut=(), **more) -> EpochNegatives:
    options = NegativeOptions(**{"random": 3, "pool": 5, **more})
    tables = run.table("sft", "train"), run.table("tasks", "all")
    return EpochNegatives(*tables, run.items, options, CUT_INTERACTIONS.frame(cut))


def flags(run, output, **more):
    options = {
        "eval_strategy": "no",
        "save_strategy": "epoch",
        "per_device_train_batch_size": 32,
        "num_train_epochs": 2,
        "negatives_per_positive": 1,
        "hard_negatives": 1,
        "hard_negatives_pool": 4,
    }
    return run.flags(output, **options | more)


@pytest.mark.parametrize("popular", [False, True])
def test_no_negative_was_ever_chosen_by_its_user(small_run, popular):
    sampled = negatives(small_run, popular=popular)
    chosen = set(pl.read_parquet(small_run.folder / "data/interactions.parquet")["user_id", "item_id"].iter_rows())
    rows = sampled.dataset()[:]
    pairs = [pair for *pair, label in zip(rows["user_id"], rows["item_id"], rows["label"], strict=True) if not label]
    assert len(pairs) == 3 * sum(rows["label"]) == 3 * sum(small_run.table("sft", "train")["label"])
    assert not chosen & {tuple(pair) for pair in pairs}
    assert all(len(set(row)) == 3 for row in sampled.items)


def test_what_a_cut_history_no_longer_has_is_no_negative_either(small_run):
    user = small_run.table("sft", "train")["user_id"][0]
    unseen = negatives(small_run, random=5)
    offered = {unseen.ids[item] for epoch in range(50) for item in unseen.sample(epoch, np.array([0])).flat}
    cut = sorted(offered)[:5]
    sampled = negatives(small_run, cut=[(user, item) for item in cut], random=5)
    for epoch in range(50):
        assert not set(cut) & {sampled.ids[item] for item in sampled.sample(epoch, np.array([0])).flat}


def test_a_row_is_its_positives_with_another_item(small_run):
    table = small_run.table("sft", "train")
    sampled = negatives(small_run)
    rows = sampled.dataset()
    first = rows[len(sampled.rows)]  # the first negative of the first positive
    positive = table[int(sampled.rows[0])]
    assert first["item_id"] == sampled.ids[sampled.items[0, 0]] and first["label"] == 0
    assert {k: first[k] for k in ("task_id", "preference", "recent")} == {
        k: positive[k] for k in ("task_id", "preference", "recent")
    }
    kept = negatives(small_run, random=None, hard=1).dataset()
    assert kept[: len(table)]["item_id"] == table["item_id"][:]
    assert len(kept) == len(table) + len(sampled.rows)


def test_every_unseen_item_is_as_likely_and_popular_ones_more_if_asked(small_run):
    def first_positive(**more):
        sampled = negatives(small_run, **more)
        return sampled, np.concatenate([sampled.sample(epoch, np.array([0])) for epoch in range(2000)])

    sampled, items = first_positive()
    n_unseen = sampled.sampler.available[sampled.user[0]]
    for place in range(3):  # not only all places together
        counts = np.bincount(items[:, place], minlength=len(sampled.ids))
        assert (counts > 0).sum() == n_unseen and counts.max() < 1.6 * 2000 / n_unseen
    popular = first_positive(popular=True)[1]
    assert sampled.counts[popular].mean() > 1.2 * sampled.counts[items].mean()


def test_epochs_differ_and_are_the_same_for_a_seed(small_run):
    first, other = negatives(small_run), negatives(small_run, seed=1)
    part = np.arange(len(first.rows))
    assert (first.sample(1, part) == negatives(small_run).sample(1, part)).all()
    assert (first.sample(1, part) != first.sample(0, part)).any()
    assert (first.sample(0, part) != other.sample(0, part)).any()


def test_too_few_unseen_items_are_an_error(small_run):
    with pytest.raises(ValueError, match=r"unseen items, but 50 are to be sampled: lower --negatives_per_positive"):
        negatives(small_run, random=0, hard=1, pool=50)
    with pytest.raises(ValueError, match="cannot be chosen from a pool of 2"):
        negatives(small_run, hard=3, pool=2)


def test_the_mined_are_the_best_of_their_pool(small_run, tmp_path):
    trainer = sft.train(*sft.parse([], **flags(small_run, tmp_path, num_train_epochs=1)))
    (found,) = (tmp_path / "negatives").glob("*/epoch-0/000000.parquet")
    scores = pl.read_parquet(found)
    rows = trainer.train_dataset[:]
    mined = rows["item_id"][-1]  # of the last positive: one drawn, one mined
    logits = scores["logit"].to_numpy().reshape(-1, 4)
    n_positives = sum(rows["label"])
    assert n_positives <= 64 and len(logits) == n_positives
    assert mined == scores["item_id"][4 * (n_positives - 1) + int(logits[-1].argmax())]
    assert rows["item_id"][-2] not in scores["item_id"][-4:]


def test_a_killed_training_goes_on_with_the_same_negatives(small_run, tmp_path):
    whole = sft.train(*sft.parse([], **flags(small_run, tmp_path / "whole")))
    folder = tmp_path / "cut"
    sft.train(*sft.parse([], **flags(small_run, folder)))
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    (mined,) = (folder / "negatives").glob("*/epoch-1/*.parquet")
    before = mined.read_bytes()
    mined.unlink()  # killed while the second epoch's were mined
    (kept,) = (folder / "negatives").glob("*/epoch-0/*.parquet")
    scored = kept.stat().st_mtime_ns
    resumed = sft.train(*sft.parse([], **flags(small_run, folder)))
    assert mined.read_bytes() == before and kept.stat().st_mtime_ns == scored
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.train_dataset[:]["item_id"] == whole.train_dataset[:]["item_id"]
    first = pl.read_parquet(kept)["item_id"].to_list()
    assert first != pl.read_parquet(mined)["item_id"].to_list()  # each epoch has its own pool


def test_a_published_data_set_suffices(small_run, tmp_path):
    """Its tasks are in three files, its users may have other names."""
    run = RunFolder.open(shutil.copytree(small_run.folder, tmp_path / "run"))
    published = build_hub(run, parts=["dataset"])["dataset"]
    assert load_dataset(str(published), "tasks").keys() == {"train", "validation", "test"}
    ours = TrainingData.load(*sft.parse([], **flags(small_run, tmp_path))[:2])
    theirs = TrainingData.load(*sft.parse([], **flags(small_run, tmp_path, dataset_name=str(published)))[:2])
    assert ours.training[:] == theirs.training[:]

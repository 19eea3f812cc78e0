"""Negatives drawn and mined while training: never what a user has chosen, the model's favourites, the same resumed."""

import shutil

import numpy as np
import polars as pl
import pytest
import torch
from datasets import load_dataset

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.hub_tables import load_table
from mllm_msr.hub_cards.publishing import build_hub
from mllm_msr.training import sft
from mllm_msr.training.negatives import Negatives


def negatives(run, **more) -> Negatives:
    source = str(run.folder)
    options = {"drawn": 3, "mined": 0, "pool": 5, "popular": False, "seed": 0, **more}
    items = Catalogue(load_table(source, "items", "train"))
    return Negatives(load_table(source, "sft", "train"), load_table(source, "tasks", "all"), items, **options)


def flags(run, output, **more):
    return {
        **run.recipe.training_flags(),
        "dataset_name": str(run.folder),
        "output_dir": str(output),
        "eval_strategy": "no",
        "save_strategy": "epoch",
        "per_device_train_batch_size": 32,
        "num_train_epochs": 2,
        "negatives_per_positive": 1,
        "hard_negatives": 1,
        "hard_negatives_pool": 4,
        **more,
    }


@pytest.mark.parametrize("popular", [False, True])
def test_no_negative_was_ever_chosen_by_its_user(small_run, popular):
    drawn = negatives(small_run, popular=popular)
    chosen = set(pl.read_parquet(small_run.folder / "data/interactions.parquet")["user_id", "item_id"].iter_rows())
    rows = drawn.dataset()[:]
    pairs = [pair for *pair, label in zip(rows["user_id"], rows["item_id"], rows["label"], strict=True) if not label]
    assert len(pairs) == 3 * sum(rows["label"]) == 3 * sum(load_table(str(small_run.folder), "sft", "train")["label"])
    assert not chosen & {tuple(pair) for pair in pairs}
    assert all(len(set(row)) == 3 for row in drawn.items)


def test_a_row_is_its_positives_with_another_item(small_run):
    table = load_table(str(small_run.folder), "sft", "train")
    drawn = negatives(small_run)
    rows = drawn.dataset()
    first = rows[len(drawn.rows)]  # the first negative of the first positive
    positive = table[int(drawn.rows[0])]
    assert first["item_id"] == drawn.ids[drawn.items[0, 0]] and first["label"] == 0
    assert {k: first[k] for k in ("task_id", "preference", "recent")} == {
        k: positive[k] for k in ("task_id", "preference", "recent")
    }
    kept = negatives(small_run, drawn=None, mined=1).dataset()
    assert kept[: len(table)]["item_id"] == table["item_id"][:]
    assert len(kept) == len(table) + len(drawn.rows)


def test_every_unseen_item_is_as_likely_and_popular_ones_more_if_asked(small_run):
    def shown(**more):
        drawn = negatives(small_run, **more)
        items = np.concatenate([drawn.draw(epoch, np.array([0])) for epoch in range(2000)])
        return drawn, items

    drawn, items = shown()
    n_unseen = drawn.sampler.available[drawn.user[0]]
    for place in range(3):  # not only all places together
        counts = np.bincount(items[:, place], minlength=len(drawn.ids))
        assert (counts > 0).sum() == n_unseen and counts.max() < 1.6 * 2000 / n_unseen
    popular = shown(popular=True)[1]
    assert drawn.counts[popular].mean() > 1.2 * drawn.counts[items].mean()


def test_epochs_differ_and_are_the_same_for_a_seed(small_run):
    one, other = negatives(small_run), negatives(small_run, seed=1)
    part = np.arange(len(one.rows))
    assert (one.draw(1, part) == negatives(small_run).draw(1, part)).all()
    assert (one.draw(1, part) != one.draw(0, part)).any() and (one.draw(0, part) != other.draw(0, part)).any()


def test_too_few_unseen_items_are_an_error(small_run):
    with pytest.raises(ValueError, match=r"unseen items, but 50 are to be drawn: lower --negatives_per_positive"):
        negatives(small_run, drawn=0, mined=1, pool=50)
    with pytest.raises(ValueError, match="cannot be chosen from a pool of 2"):
        negatives(small_run, mined=3, pool=2)


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
    run = tmp_path / "run"
    shutil.copytree(small_run.folder, run)
    (run / "model").mkdir()
    (run / "model/config.json").write_text("{}", encoding="utf-8")
    published = build_hub(run)["dataset"]
    assert load_dataset(str(published), "tasks").keys() == {"train", "validation", "test"}
    ours = sft.Examples.load(*sft.parse([], **flags(small_run, tmp_path))[:2])
    theirs = sft.Examples.load(*sft.parse([], **flags(small_run, tmp_path, dataset_name=str(published)))[:2])
    assert ours.training[:] == theirs.training[:]

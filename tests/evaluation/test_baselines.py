"""Classical rows: their parts against scikit-learn and numpy, what they may see, and that they find what is there."""

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.metrics.pairwise import cosine_similarity

from mllm_msr.data.tasks import TaskPlan
from mllm_msr.evaluation import baselines, rankers
from mllm_msr.evaluation.coded_tasks import CodedTasks
from mllm_msr.evaluation.metrics import ranking_metrics
from mllm_msr.evaluation.scoring import pairs
from mllm_msr.records.sections import PrepareOptions


def two_tastes(n_users: int = 60, n_items: int = 40, length: int = 12, seed: int = 0) -> pl.DataFrame:
    """Each user keeps to one half of the catalogue, as one does who likes either red or blue."""
    rng = np.random.default_rng(seed)
    half = n_items // 2
    rows = [
        (f"u{user:03}", f"i{item + half * (user % 2):03}", 100 * place + user)
        for user in range(n_users)
        for place, item in enumerate(rng.permutation(half)[:length])
    ]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def prepared(protocol: str = "strict", **options):
    """(interactions, tasks, popularity, items) of a small world."""
    log = two_tastes()
    plan = TaskPlan.of(log, PrepareOptions(protocol=protocol, n_negatives=8, **options))
    items = plan.popularity.select("item_id").with_columns(
        title=pl.lit("A thing called ") + pl.col("item_id"),
        text=pl.when(pl.col("item_id") < "i020").then(pl.lit("red and the")).otherwise(pl.lit("blue and the")),
    )
    return log, pl.concat(list(plan.chunks())), plan.popularity, items


@pytest.mark.parametrize("protocol", ["strict", "paper", "global-cutoff"])
def test_training_sees_exactly_what_popularity_counts(protocol):
    log, tasks, popularity, _ = prepared(protocol)
    training = rankers.training_interactions(log, tasks, protocol, popularity)
    counts = popularity.join(training.group_by("item_id").len("found"), on="item_id", how="left").fill_null(0)
    assert counts["found"].to_list() == counts["count"].to_list()
    held_out = tasks.filter(pl.col("split") != "train").select("user_id", "candidates", "labels")
    chosen = held_out.explode("candidates", "labels").filter(labels=1).rename({"candidates": "item_id"})
    assert training.join(chosen, on=["user_id", "item_id"], how="inner").is_empty()


def test_a_log_that_holds_more_than_training_is_refused():
    log, tasks, popularity, _ = prepared()
    fewer = popularity.with_columns(pl.col("count") - 1)
    with pytest.raises(ValueError, match=r"training interactions in interactions\.parquet.*prepare the run again"):
        rankers.training_interactions(log, tasks, "strict", fewer)


def test_neighbours_are_those_of_cosine_similarity():
    rng = np.random.default_rng(1)
    matrix = (rng.random((30, 17)) < 0.3).astype(np.float32)
    matrix[:, 3] = 0  # an item nobody met
    users, codes = np.nonzero(matrix)
    training = pl.DataFrame({"user_id": users.astype(str), "item_id": [f"{code:02}" for code in codes]})
    items = pl.DataFrame({"item_id": [f"{code:02}" for code in range(17)]})
    nearest = baselines.Neighbours.of(baselines.user_item_matrix(training, items))
    expected = cosine_similarity(matrix.T)
    np.fill_diagonal(expected, 0)
    assert np.allclose(nearest.table(None).to_dense(), expected, atol=1e-6)
    five_best = nearest.table(5).to_dense().numpy()
    assert ((five_best > 0).sum(axis=1) == np.minimum((expected > 0).sum(axis=1), 5)).all()
    assert np.allclose(np.sort(five_best, axis=1)[:, -5:], np.sort(expected, axis=1)[:, -5:], atol=1e-6)


def test_neighbours_beyond_what_memory_is_meant_for_are_the_furthest(monkeypatch):
    matrix = torch.ones(3, 400).to_sparse()
    assert baselines.Neighbours.of(matrix).most == 399
    monkeypatch.setattr(baselines, "MOST_PAIRS", 1)
    assert baselines.Neighbours.of(matrix).most == 200


def test_knn_may_need_neighbours_beyond_any_fixed_number():
    crowd = [f"b{number:03}" for number in range(300)]  # bought together with the answer more often ...
    rows = [(f"u{user}", item) for user in range(3) for item in ("answer", *crowd)]
    rows += [("u3", "answer"), ("u3", "chosen")]  # ... than what the user has chosen
    rows += [(f"v{user}", item) for user in range(20) for item in ("chosen", f"w{user}")]
    training = pl.DataFrame([*rows, ("v20", "other")], schema=["user_id", "item_id"], orient="row")
    tasks = pl.DataFrame({"history": [["chosen"]], "candidates": [["answer", "other"]], "labels": [[1, 0]]})
    values = baselines.knn(tasks, training.select("item_id").unique(), training)(tasks)
    assert values[0] > values[1]


def test_leading_vectors_span_what_the_full_decomposition_does():
    rng = np.random.default_rng(2)
    matrix = (rng.random((200, 60)) < rng.random(60) ** 2).astype(np.float32)
    users, codes = np.nonzero(matrix)
    training = pl.DataFrame({"user_id": [f"{user:03}" for user in users], "item_id": [f"{code:02}" for code in codes]})
    items = pl.DataFrame({"item_id": [f"{code:02}" for code in range(60)]})
    found = baselines.leading_vectors(baselines.user_item_matrix(training, items), 4, seed=0, rounds=40)
    wanted = np.linalg.svd(matrix, full_matrices=False)[2][:4].T
    assert np.allclose(found @ found.T, wanted @ wanted.T, atol=1e-3)


def test_word_vectors_are_scikit_learns_with_plain_rarity():
    items = pl.DataFrame(
        {
            "item_id": ["b", "a", "c"],
            "title": ["Red mug", "A mug", None],
            "text": ["red RED, a mug", None, "a blue lamp; à côté"],
        }
    )
    vectors = baselines.word_matrix(items).to_dense().numpy()
    assert (vectors > 0).sum(axis=1).tolist() == [1, 2, 4]  # a, b, c; "a" is everywhere and counts for nothing
    counts = np.array([[1, 0], [2, 3]])  # mug, red of a and b; "mug" in 2 of 3 items, "red" in 1
    damped = TfidfTransformer(use_idf=False, norm=None, sublinear_tf=True).fit_transform(counts).toarray()
    expected = damped * np.log(4 / (1 + np.array([2, 1])))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert sorted(vectors[1][vectors[1] > 0]) == pytest.approx(sorted(expected[1]))
    assert vectors[0].max() == 1.0


def trained(name: str) -> tuple[baselines.Ranker, pl.DataFrame, pl.DataFrame]:
    """(ranker, test tasks, items) of a small world."""
    log, tasks, popularity, items = prepared()
    validation = tasks.filter(split="validation")
    training = rankers.training_interactions(log, tasks, "strict", popularity)
    if name == "tfidf":
        ranker = baselines.tfidf(validation, items)
    else:
        ranker = {"knn": baselines.knn, "svd": baselines.svd}[name](validation, items, training)
    return ranker, tasks.filter(split="test"), items


@pytest.mark.parametrize("name", ["knn", "svd", "tfidf"])
def test_each_scores_the_catalogue_as_it_scores_candidates(name):
    ranker, test, items = trained(name)
    coded = CodedTasks(test, items)
    whole = ranker.score_catalogue(coded.histories)
    assert whole.shape == (len(test), len(items))
    assert np.allclose(whole[coded.candidates.owner, coded.candidates.codes], ranker(test), atol=1e-6)


@pytest.mark.parametrize("row", ["knn", "svd", "tfidf"])
def test_each_finds_two_tastes_and_scores_every_candidate_in_order(row):
    ranker, test, _ = trained(row)
    values = ranker(test)
    frame = pairs(test)
    assert values.shape == (frame.height,) and np.isfinite(values).all()
    assert (
        ranking_metrics(frame["user_id"], frame["label"], values)["auc"]["value"] > 0.7
    )  # half the candidates are foreign


def test_items_and_histories_that_training_never_saw_get_nothing():
    items = pl.DataFrame({"item_id": ["a", "b", "c"], "title": ["", "", ""], "text": [None, None, None]})
    training = pl.DataFrame({"user_id": ["x", "x", "y"], "item_id": ["a", "b", "a"]})
    tasks = pl.DataFrame({"history": [["a"], []], "candidates": [["b", "c"], ["a", "b"]], "labels": [[1, 0], [0, 1]]})
    tasks = tasks.with_columns(pl.col("history").cast(pl.List(pl.String)))
    assert baselines.knn(tasks, items, training)(tasks).tolist() == [pytest.approx(0.5**0.5), 0.0, 0.0, 0.0]
    assert np.isfinite(baselines.svd(tasks, items, training)(tasks)).all()
    assert not baselines.tfidf(tasks, items)(tasks).any()

"""Places among all items: those of every pair written out, for scorers of each kind, in blocks of any size."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest

from mllm_msr.evaluation.cold_items import places_among_candidates
from mllm_msr.evaluation.full_catalogue import places_in_catalogue
from mllm_msr.evaluation.metrics import user_columns
from mllm_msr.evaluation.places import rank_of_choice
from mllm_msr.evaluation.rankers import Chance, Popularity
from mllm_msr.evaluation.scorers import RankerScorer

N_ITEMS, N_USERS = 9, 7


@dataclass
class World:
    """A catalogue, what users have chosen, and a task for the last choice of each among two sampled others."""

    items: pl.DataFrame
    chosen: pl.DataFrame
    tasks: pl.DataFrame

    def written_out(self) -> pl.DataFrame:
        """Every item that a user has not chosen, and the target: ``user_id``, ``item_id``, ``label``."""
        pairs = self.tasks.select("user_id", target=pl.col("candidates").list.first()).join(
            self.items.select("item_id"), how="cross"
        )
        is_target = pl.col("item_id") == pl.col("target")
        kept = pairs.join(self.chosen, on=["user_id", "item_id"], how="anti")
        return pl.concat([kept.filter(~is_target), pairs.filter(is_target)]).with_columns(
            label=is_target.cast(pl.Int64)
        )


@pytest.fixture(scope="module")
def world() -> World:
    rng = np.random.default_rng(0)
    ids = [f"i{item}" for item in rng.permutation(N_ITEMS)]
    histories = {f"u{user}": rng.permutation(ids)[: 3 + user % 3].tolist() for user in reversed(range(N_USERS))}
    tasks = [
        (user, own[:-1], [own[-1], *rng.choice(sorted(set(ids) - set(own)), 2)], [1, 0, 0])
        for user, own in histories.items()
    ]
    chosen = [(user, item) for user, own in histories.items() for item in own]
    return World(
        pl.DataFrame({"item_id": ids, "count": np.arange(N_ITEMS) // 3}),
        pl.DataFrame(chosen, schema=["user_id", "item_id"], orient="row"),
        pl.DataFrame(tasks, schema=["user_id", "history", "candidates", "labels"], orient="row"),
    )


def counted(world: World) -> tuple[RankerScorer, pl.DataFrame]:
    """A scorer by counts that are equal in twos, and the counts."""
    counts = world.items.select("item_id").sort("item_id").with_columns(count=pl.int_range(pl.len()) // 2)
    return RankerScorer(Popularity(counts)), counts


@pytest.mark.parametrize("pairs", [1, 20, 10_000])
def test_they_are_those_of_all_pairs_written_out(world, pairs):
    scorer, counts = counted(world)
    scores = world.written_out().join(counts, on="item_id").select("user_id", "label", logit=pl.col("count"))
    places = places_in_catalogue(world.tasks, world.items, world.chosen, scorer, pairs)
    assert places.select("user_id", "first", "last", "candidates").equals(rank_of_choice(scores))


def test_cold_items_above_a_choice_and_beside_it_are_counted_apart(world):
    scorer, counts = counted(world)
    scores = world.written_out().join(counts, on="item_id").select("user_id", "item_id", "label", logit=pl.col("count"))
    places = places_in_catalogue(world.tasks, world.items, world.chosen, scorer)
    assert places.equals(places_among_candidates(scores, world.items).sort("user_id"))
    assert 0 < places["cold_candidates"].sum() < places["candidates"].sum()


def test_repeated_choices_and_items_that_are_gone_change_nothing(world):
    scorer, _ = counted(world)
    gone = pl.DataFrame({"user_id": ["u0"], "item_id": ["gone"]})
    log = pl.concat([world.chosen, world.chosen, gone])
    expected = places_in_catalogue(world.tasks, world.items, world.chosen, scorer)
    assert places_in_catalogue(world.tasks, world.items, log, scorer).equals(expected)


def test_chance_ties_every_choice_with_all_that_the_user_never_chose(world):
    places = places_in_catalogue(world.tasks, world.items, world.chosen, RankerScorer(Chance(world.items)), pairs=20)
    assert set(places["first"]) == {1} and places["last"].equals(places["candidates"])


def test_chance_is_what_a_random_order_expects(world):
    tasks, names = world.tasks.explode("candidates", "labels"), ["auc", "hr@2", "mrr@2", "ndcg@2"]
    users, labels = tasks["user_id"], tasks["labels"].to_numpy()

    def means(logits: np.ndarray) -> np.ndarray:
        return np.mean([column.mean() for column in user_columns(users, labels, logits, names).values()], axis=0)

    scores = Chance(world.items)(world.tasks)
    columns = user_columns(users, labels, scores, names)
    computed = {name: float(column.mean()) for name, column in columns.items()}
    assert computed == pytest.approx(
        {"auc": 1 / 2, "hr@2": 2 / 3, "mrr@2": 1.5 / 3, "ndcg@2": (1 + np.log(2) / np.log(3)) / 3}
    )
    drawn = np.random.default_rng(0).random((500, len(labels)))
    assert means(scores) == pytest.approx(np.mean([means(logits) for logits in drawn]), abs=0.01)


def test_a_missing_score_is_refused(world):
    scorer, _ = counted(world)
    scorer.ranker.counts[2] = np.nan
    with pytest.raises(ValueError, match="a score of the catalogue is NaN"):
        places_in_catalogue(world.tasks, world.items, world.chosen, scorer)

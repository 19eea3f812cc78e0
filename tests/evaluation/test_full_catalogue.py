"""Places among all items: those of every pair written out, for scorers of each kind, in blocks of any size."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest

from mllm_msr.evaluation.cold_items import places_among_candidates
from mllm_msr.evaluation.full_catalogue import places_in_catalogue
from mllm_msr.evaluation.places import rank_of_choice
from mllm_msr.evaluation.rankers import Popularity, Random
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


def test_a_random_order_of_the_catalogue_depends_on_the_seed_alone(world):
    def ranked(scored_before: bool, seed: int = 0) -> pl.DataFrame:
        scorer = RankerScorer(Random(world.items, seed))
        if scored_before:
            scorer.score(world.tasks)
        return places_in_catalogue(world.tasks, world.items, world.chosen, scorer, pairs=20)

    assert ranked(True).equals(ranked(False)) and not ranked(False).equals(ranked(False, seed=1))


def test_a_missing_score_is_refused(world):
    scorer, _ = counted(world)
    scorer.ranker.counts[2] = np.nan
    with pytest.raises(ValueError, match="a score of the catalogue is NaN"):
        places_in_catalogue(world.tasks, world.items, world.chosen, scorer)

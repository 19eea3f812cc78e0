"""The metric of the Hub takes what its users have: ids of any plain type, whole lists, batches and single pairs."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from mllm_msr.hub_cards.metric_space import RankingMetrics

PAIRS = {"predictions": [0.9, 0.1, 0.3, 0.4], "references": [1, 0, 1, 0]}


@pytest.mark.parametrize(
    "user_ids",
    [
        ["a", "a", "b", "b"],
        [1, 1, 2, 2],
        [1.0, 1.0, 2.5, 2.5],
        np.array([7, 7, 3, 3], dtype=np.int32),
        np.array(["x", "x", "y", "y"]),
        np.array([2**64 - 1, 2**64 - 1, 3, 3], dtype=np.uint64),
        pd.Series(["x", "x", "y", "y"], index=[5, 6, 7, 9]),
        pd.Series(["x", "x", "y", "y"], dtype="category"),
        pl.Series([1, 1, 2, 2]),
        [("shop", 1), ("shop", 1), ("shop", 2), ("shop", 2)],
    ],
)
def test_user_ids_are_texts_or_numbers(user_ids):
    assert RankingMetrics().compute(**PAIRS, user_ids=user_ids)["hr@1"] == 0.5


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_row_without_an_id_is_named(missing):
    with pytest.raises(ValueError, match="row 1 has no user id"):
        RankingMetrics().compute(**PAIRS, user_ids=[1.0, missing, 2.0, 2.0])


def test_batches_and_single_pairs_are_gathered():
    user_ids = [1, 1, 2, 2]
    batches, singles = RankingMetrics(), RankingMetrics()
    for start in (0, 2):
        part = {name: values[start : start + 2] for name, values in PAIRS.items()}
        batches.add_batch(**part, user_ids=user_ids[start : start + 2])
    for prediction, reference, user_id in zip(*PAIRS.values(), user_ids, strict=True):
        singles.add(predictions=prediction, references=reference, user_ids=user_id)
    assert batches.compute()["hr@1"] == singles.compute()["hr@1"] == 0.5


@pytest.mark.parametrize("references", [[True, False, True, False], [1.0, 0.0, 1.0, 0.0], np.array([1, 0, 1, 0])])
def test_references_are_zero_or_one_however_written(references):
    found = RankingMetrics().compute(predictions=PAIRS["predictions"], references=references, user_ids=[1, 1, 2, 2])
    assert found["hr@1"] == 0.5
    with pytest.raises(ValueError, match=r"label in row 1 is 0\.5, expected 0 or 1"):
        RankingMetrics().compute(predictions=PAIRS["predictions"], references=[1, 0.5, 1, 0], user_ids=[1, 1, 2, 2])

"""Lists of codes in one array, and where positives stand in a catalogue, against the plain way."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from mllm_msr.evaluation.coded_tasks import PADDING, CodedLists, CodedTasks, ndcg_at
from mllm_msr.evaluation.metrics import user_columns

ITEMS = pl.DataFrame({"item_id": ["c", "a", "b", "d"]})


def lists(*codes: list[int]) -> CodedLists:
    return CodedLists(np.concatenate([np.array(one, np.int64) for one in codes]), np.cumsum([0, *map(len, codes)]))


def test_codes_are_places_in_sorted_order_and_lists_may_be_empty():
    coded = CodedLists.of(pl.Series([["a", "d"], [], ["c"]]), ITEMS)
    assert (coded.codes.tolist(), coded.bounds.tolist()) == ([0, 3, 2], [0, 2, 2, 3])
    assert coded.owner.tolist() == [0, 0, 2]
    log = pl.DataFrame({"user_id": ["y", "x", "y"], "item_id": ["b", "c", "a"]})
    assert CodedLists.of_log(log, ITEMS).codes.tolist() == [1, 0, 2]


def test_the_last_codes_and_slices_of_lists():
    coded = lists([1, 2, 3], [], [4], [5, 6])
    assert coded.last(2).codes.tolist() == [2, 3, 4, 5, 6]
    assert coded.last(2).bounds.tolist() == [0, 2, 2, 3, 5]
    assert coded.last(None) is coded
    part = coded.slice(1, 4)
    assert (part.codes.tolist(), part.bounds.tolist()) == ([4, 5, 6], [0, 0, 1, 3])


def test_every_step_of_a_long_list_is_in_one_piece():
    coded = lists(list(range(1, 11)), [7], [], [8, 9])
    starts, lengths = coded.pieces(4)
    padded = coded.padded(starts, lengths)
    steps = [step for row in padded.tolist() for step in pairwise(code for code in row if code != PADDING)]
    assert sorted(steps) == [*((i, i + 1) for i in range(1, 9)), (8, 9), (9, 10)]
    assert lengths.min() >= 2 and padded.shape[1] == 4
    assert lists([3]).pieces(4)[0].tolist() == []
    assert coded.padded(np.array([0, 10]), np.array([2, 0])).tolist() == [[1, 2], [PADDING, PADDING]]


@pytest.mark.parametrize("per_task", [1, 2])
def test_quality_is_the_metrics_ndcg_with_ties(per_task):
    rng = np.random.default_rng(0)
    labels = [([1] * per_task + [0] * 9) for _ in range(20)]
    tasks = CodedTasks.__new__(CodedTasks)
    tasks.histories = lists(*[[0]] * 20)
    tasks.candidates = lists(*[list(range(9 + per_task))] * 20)
    tasks.labels = np.concatenate(labels)
    values = rng.integers(0, 5, len(tasks.labels)).astype(float)
    expected = user_columns(tasks.candidates.owner, tasks.labels, values)["ndcg@5"].mean()
    assert tasks.quality(values) == pytest.approx(expected)


def test_places_in_the_catalogue_leave_out_what_was_chosen_but_never_the_positive():
    frame = pl.DataFrame(
        {"history": [["a"], ["b", "c"]], "candidates": [["b", "c"], ["d", "a"]], "labels": [[0, 1]] * 2}
    )
    tasks = CodedTasks(frame, ITEMS)
    scores = np.array([[9.0, 2.0, 1.0, 1.0], [0.0, 5.0, 5.0, 5.0]])
    begin = 0

    def score(histories):
        nonlocal begin
        begin += len(histories)
        return scores[begin - len(histories) : begin].copy()

    above, equal = tasks.catalogue_places(score, pairs=4)  # a is chosen: b above c, d as c; d above a
    assert (above.tolist(), equal.tolist()) == ([1, 1], [1, 0])
    begin = 0
    above, equal = tasks.catalogue_places(score, chosen=lists([0, 2], [0, 1, 2, 3]))
    assert (above.tolist(), equal.tolist()) == ([1, 0], [1, 0])
    with pytest.raises(ValueError, match="without a positive"):
        CodedTasks(frame.with_columns(labels=[0, 0]), ITEMS).catalogue_places(score)


def test_ndcg_of_places_is_expected_over_ties():
    assert ndcg_at(1, np.array([0]), np.array([3])) == pytest.approx(0.25)
    assert ndcg_at(5, np.array([], np.int64), np.array([], np.int64)) == 0
    assert ndcg_at(2, np.array([1]), np.array([0])) == pytest.approx(1 / np.log2(3))

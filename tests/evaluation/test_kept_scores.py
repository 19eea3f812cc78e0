"""Scores are saved as they are made: what a stopped evaluation has scored is not scored again."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mllm_msr.evaluation.coded_tasks import Array
from mllm_msr.evaluation.kept_scores import kept, kept_scores
from mllm_msr.evaluation.scorers import Scorer
from mllm_msr.evaluation.scoring import of_another_user, score_with_values
from mllm_msr.records.schema import PLACES

TASKS = pl.DataFrame(
    {
        "user_id": list("abcdefg"),
        "candidates": [["x", "y", "z"]] * 7,
        "labels": [[1, 0, 0]] * 7,
        "preference": [str(n) for n in range(7)],
        "recent": [[]] * 7,
    }
)


class Stopped(Exception):
    pass


class PreferenceScorer(Scorer):
    """Scores each task by another user's preference, a number, and stops after so many parts."""

    part_size = 2

    def __init__(self, parts: int) -> None:
        self.left, self.asked = parts, list[str]()

    def shown(self, tasks: pl.DataFrame) -> pl.DataFrame:
        return of_another_user(tasks, seed=3)

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        if not self.left:
            raise Stopped
        self.left -= 1
        self.asked += tasks["user_id"].to_list()
        return score_with_values(
            tasks, np.repeat(tasks["preference"].cast(pl.Float32).to_numpy(), 3) + [0, 1, 2] * len(tasks)
        )

    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        raise AssertionError("only the tasks' own candidates are scored here")


def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = kept_scores(tmp_path / "whole", "one", lambda: PreferenceScorer(4), TASKS)
    first, second = PreferenceScorer(2), PreferenceScorer(4)
    with pytest.raises(Stopped):
        kept_scores(tmp_path / "stopped", "one", lambda: first, TASKS)
    again = kept_scores(tmp_path / "stopped", "one", lambda: second, TASKS)
    assert (first.asked, second.asked) == (list("abcd"), list("efg"))
    assert again.equals(whole) and whole["user_id"].to_list() == [user for user in "abcdefg" for _ in range(3)]
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"one.parquet", "one.seal"}


def test_what_is_kept_is_not_scored_at_all(tmp_path: Path) -> None:
    first = kept_scores(tmp_path, "one", lambda: PreferenceScorer(4), TASKS)
    assert kept_scores(tmp_path, "one", lambda: pytest.fail("scored again"), TASKS).equals(first)


def test_what_a_disk_has_changed_is_made_again_though_it_can_be_read(tmp_path: Path) -> None:
    places = PLACES.frame([(f"u{user}", 1, 2, 5, 0, 0, 1) for user in range(9)])
    first, path = kept(PLACES, tmp_path / "one.places-9.parquet", lambda: places), tmp_path / "one.places-9.parquet"
    assert kept(PLACES, path, lambda: pytest.fail("made again")).equals(first)
    PLACES.write(places.with_columns(last=pl.lit(4, pl.Int64)), path)
    assert kept(PLACES, path, lambda: places).equals(first)
    kept(PLACES, tmp_path / "two.places-9.parquet", lambda: places.with_columns(first=pl.lit(2, pl.Int64)))
    for kind in ("parquet", "seal"):  # the places of another variant
        shutil.copy(tmp_path / f"two.places-9.{kind}", tmp_path / f"one.places-9.{kind}")
    assert kept(PLACES, path, lambda: places).equals(first)


@pytest.mark.parametrize("other", [b"", b"PAR1", "two"])
def test_what_is_damaged_or_of_another_variant_is_scored_again(tmp_path: Path, other: bytes | str) -> None:
    first = kept_scores(tmp_path, "one", lambda: PreferenceScorer(4), TASKS)
    if isinstance(other, str):
        kept_scores(tmp_path, other, lambda: PreferenceScorer(4), TASKS)
        other = (tmp_path / f"{other}.parquet").read_bytes()
    (tmp_path / "one.parquet").write_bytes(other)
    assert kept_scores(tmp_path, "one", lambda: PreferenceScorer(4), TASKS).equals(first)
    assert kept_scores(tmp_path, "one", lambda: pytest.fail("scored again"), TASKS).equals(first)

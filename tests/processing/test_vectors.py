"""The table of item vectors: by content, changed items only, and not lost when a run is killed."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.vectors import Encode, VectorWorkers, encode_request, vector_table
from mllm_msr.processing.workers import InProcess
from mllm_msr.records.schema import IMAGE, ITEM_VECTORS

NO_IMAGE = {"bytes": None, "path": None}


def items(**titles: str) -> pl.DataFrame:
    rows = [(item, title, "", NO_IMAGE) for item, title in titles.items()]
    return pl.DataFrame(
        rows, {"item_id": pl.String, "title": pl.String, "text": pl.String, "image": IMAGE}, orient="row"
    )


class Encoder:
    """Counts letters, and what it is asked."""

    def __init__(self, breaks_at: str = "") -> None:
        self.asked: list[str] = []
        self.breaks_at = breaks_at

    def __call__(self, candidates: Sequence[Candidate]) -> np.ndarray:
        words = [f"{item.title}{item.text}" for item in candidates]
        if self.breaks_at in words:
            raise KeyboardInterrupt
        self.asked += words
        return np.array([[len(word), word.count("e")] for word in words], np.float16)


def by(load: Callable[[], Encode]) -> VectorWorkers:
    """This process, with an encoder that is loaded when it is needed."""
    return InProcess(lambda: partial(encode_request, load()))


def test_only_changed_items_are_computed_and_equal_ones_once(tmp_path: Path) -> None:
    encoder = Encoder()
    frame = vector_table(items(b="green", a="red", c="red"), {}, by(lambda: encoder), [], tmp_path)
    ITEM_VECTORS.check(frame, "table")
    assert frame["vector"].to_list() == [[3, 1], [5, 2], [3, 1]] and frame["item_id"].to_list() == ["a", "b", "c"]
    assert sorted(encoder.asked) == ["green", "red"]
    again = Encoder()
    vector_table(items(b="green", a="blue"), {}, by(lambda: again), [], tmp_path)
    assert again.asked == ["blue"]
    vector_table(items(b="green", a="blue"), {}, by(lambda: pytest.fail("nothing is missing")), [], tmp_path)
    other = Encoder()
    vector_table(items(a="blue"), {"a": "a summary"}, by(lambda: other), [], tmp_path)
    vector_table(items(a="blue"), {}, by(lambda: other), ["another model"], tmp_path)
    assert other.asked == ["bluea summary", "blue"]
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_what_was_computed_before_a_kill_is_kept(tmp_path: Path) -> None:
    shop = items(a="red", b="green", c="blue", d="grey")
    with pytest.raises(KeyboardInterrupt):
        vector_table(shop, {}, by(lambda: Encoder(breaks_at="grey")), [], tmp_path, batch_size=2)
    encoder = Encoder()
    frame = vector_table(shop, {}, by(lambda: encoder), [], tmp_path, batch_size=2)
    assert len(frame) == 4 and encoder.asked == ["blue", "grey"]


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    vector_table(items(a="red"), {}, by(Encoder), [], tmp_path)
    next(tmp_path.glob("*.parquet")).write_bytes(b"damaged")
    assert vector_table(items(a="red"), {}, by(Encoder), [], tmp_path)["vector"].to_list() == [[3, 1]]


def test_an_empty_catalogue_has_no_vectors(tmp_path: Path) -> None:
    assert vector_table(items(), {}, by(Encoder), [], tmp_path).is_empty()


def test_a_vector_that_is_no_number_stops_with_the_item_and_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vector of item 'b' is not finite: try --set vectors.dtype=float32"):
        vector_table(items(a="red", b="green"), {}, by(lambda: lambda them: np.array([[1.0], [np.nan]])), [], tmp_path)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np, polars as pl
from functools import partial
from mllm_msr.processing.vectors import encode_request, vector_table
from mllm_msr.processing.workers import InProcess

folder = Path(sys.argv[2])

def encode(candidates):
    if len(list(folder.glob("*.parquet"))) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.array([[len(item.title)] for item in candidates], np.float16)

workers = InProcess(lambda: partial(encode_request, encode))
vector_table(pl.read_parquet(sys.argv[1]), {}, workers, [], folder, batch_size=2)
"""


def test_a_process_that_is_killed_leaves_what_it_had_computed(tmp_path: Path) -> None:
    shop, folder = items(**{f"i{n:02}": "e" * n for n in range(40)}), tmp_path / "cache"
    shop.write_parquet(tmp_path / "items.parquet")
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "items.parquet"), str(folder)])
    assert process.returncode == -signal.SIGKILL and len(done := list(folder.glob("*.parquet"))) == 3
    encoder = Encoder()
    frame = vector_table(shop, {}, by(lambda: lambda them: encoder(them)[:, :1]), [], folder, batch_size=2)
    assert frame["vector"].to_list() == [[n] for n in range(40)]
    assert 0 < len(encoder.asked) <= 40 - 2 * len(done)
    assert len(list(folder.iterdir())) == 1  # nothing half written is left

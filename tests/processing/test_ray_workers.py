"""Workers on a real cluster of three nodes on this machine: nothing is lost or done by halves, whoever is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from ray.cluster_utils import Cluster as Nodes
from ray_nodes import SMALL, ray_nodes
from slow_texts import condense, doubling, dying, failing, writers

from mllm_msr.processing.engines import EngineUnavailable
from mllm_msr.processing.open_workers import open_workers
from mllm_msr.processing.ray_workers import LIVES
from mllm_msr.processing.text_store import TextStore
from mllm_msr.processing.workers import Folder
from mllm_msr.records.cluster import Cluster


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with ray_nodes(2, tmp_path_factory.mktemp("copies")) as nodes:
        yield nodes


def test_pieces_are_done_by_workers_of_all_nodes_that_read_copies_of_a_folder(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("said")
    (tmp_path / "other").write_text("not needed")
    (marks := tmp_path / "marks").mkdir()
    asked: list[int] = []
    pieces = (asked.append(number) or number for number in range(50))
    with open_workers(Cluster("auto"), partial(doubling, marks, 2), [Folder(tmp_path, ("word", "none"))]) as workers:
        first = next(results := workers.map(pieces))
        assert len(asked) <= 5, "pieces are taken before there is anyone to do them"
        done = [first, *results]
        assert sorted(number for number, _, _ in done) == list(range(0, 100, 2))
        assert {word for _, word, _ in done} == {"said"} and len({pid for _, _, pid in done}) == 2
        again = list(workers.map(range(4)))
        assert {pid for _, _, pid in again} <= {pid for _, _, pid in done}, "workers were made anew"
    copies = list((Path(os.environ["XDG_CACHE_HOME"]) / "mllm_msr/copies").glob("[!.]*"))
    assert [[file.name for file in copy.iterdir()] for copy in copies] == [["word"]]


def test_a_piece_that_kills_its_workers_and_a_worker_that_cannot_start_stop_the_work(
    nodes: Nodes, tmp_path: Path
) -> None:
    with (
        open_workers(Cluster("auto"), dying, [Folder(tmp_path)]) as workers,
        pytest.raises(RuntimeError, match=f"{LIVES} workers were lost over one piece"),
    ):
        list(workers.map(range(6)))
    with (
        open_workers(Cluster("auto"), failing, [Folder(tmp_path)]) as workers,
        pytest.raises(ValueError, match="no such model"),
    ):
        list(workers.map(range(6)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    return condense(tmp_path_factory.mktemp("alone"))


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def written(frame: pl.DataFrame, folder: Path) -> bytes:
    frame.write_parquet(folder / "frame.parquet")
    return (folder / "frame.parquet").read_bytes()


def test_texts_are_the_same_when_a_worker_and_a_node_are_killed(
    nodes: Nodes, tmp_path: Path, alone: pl.DataFrame
) -> None:
    third = nodes.add_node(**SMALL)

    def kill(when: int, how: Callable[[], object]) -> Iterator[None]:
        while sum(writers(tmp_path).values()) < when:
            yield
        how()

    killed: list[int] = []

    def kill_worker() -> None:
        killed.append(max(writers(tmp_path), key=writers(tmp_path).__getitem__))
        os.kill(killed[0], signal.SIGKILL)

    plans = [kill(5, kill_worker), kill(16, lambda: nodes.remove_node(third, allow_graceful=False))]
    real = TextStore.add

    def add(store: TextStore, *batch: object) -> None:
        real(store, *batch)
        for plan in plans:
            next(plan, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStore, "add", add)
        frame = condense(tmp_path, Cluster("auto"))
    assert killed and not any(plan.gi_frame for plan in plans), "nobody was killed"
    assert written(frame, tmp_path) == written(alone, tmp_path)
    begun = writers(tmp_path)
    assert len(begun) >= 2 and 36 <= sum(begun.values()) <= 36 + 2 + 2 * 2
    assert written(condense(tmp_path, Cluster("auto")), tmp_path) == written(alone, tmp_path)
    assert writers(tmp_path) == begun, "a second run wrote what was there"


def test_what_was_written_until_the_engine_gave_up_or_the_driver_was_killed_is_kept(
    nodes: Nodes, tmp_path: Path, alone: pl.DataFrame
) -> None:
    with pytest.raises(EngineUnavailable, match="gone"):
        condense(tmp_path, Cluster("auto"), refuses="i3 3")
    kept = len(TextStore(tmp_path / "texts").rows)
    assert kept >= 24
    code = f"from slow_texts import *; killed_after(3); condense(Path({str(tmp_path)!r}), Cluster({nodes.address!r}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    while any(is_there(pid) for pid in writers(tmp_path)):  # its workers end a little later
        time.sleep(0.05)
    kept = len(TextStore(tmp_path / "texts").rows)
    assert 24 < kept < 72
    before = sum(writers(tmp_path).values())
    assert written(condense(tmp_path, Cluster("auto")), tmp_path) == written(alone, tmp_path)
    assert sum(writers(tmp_path).values()) - before <= (72 - kept) / 2 + 1


def test_a_cluster_that_ends_stops_the_work_with_a_remedy(tmp_path: Path) -> None:
    code = f"from slow_texts import *; ended(Path({str(tmp_path)!r}))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    said = "--ray local: the cluster has ended: start it anew, and run the same command to go on\n"
    assert done.stdout == said, done.stderr

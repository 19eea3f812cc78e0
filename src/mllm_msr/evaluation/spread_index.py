"""The index of a late model, computed by workers of a cluster: they send whole shards, and one process keeps them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from mllm_msr.evaluation.loading import Computing, load_catalogue, load_recommender
from mllm_msr.evaluation.spread_scoring import run_at, run_folders
from mllm_msr.processing.open_workers import open_workers
from mllm_msr.records.run import RunFolder
from mllm_msr.records.storage import write_bytes

ITEMS = 64  # of a piece: 11 MB of four memory tokens at 7 billion parameters, 800 MB of 300 tokens


def spread_index(run: RunFolder, memory_gb: float | None, missing: Sequence[str]) -> None:
    """Put shards of some items into the run's item cache."""
    pieces = [missing[first : first + ITEMS] for first in range(0, len(missing), ITEMS)]
    folders, work = run_folders(run, ("config.yaml", "data", "model")), partial(_indexing_worker, run, memory_gb)
    with (
        open_workers(run.cluster, work, folders) as workers,
        tqdm(total=len(missing), desc="items", leave=False) as bar,
    ):
        for count, shards in workers.map(pieces):
            for name, content in shards.items():
                (run.item_cache / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(run.item_cache / name, content)
            bar.update(count)


def _indexing_worker(
    run: RunFolder, memory_gb: float | None, *paths: Path
) -> Callable[[Sequence[str]], tuple[int, Mapping[str, bytes]]]:
    run = run_at(run, *paths)
    catalogue, scratch = load_catalogue(run), TemporaryDirectory()
    folder = Path(scratch.name)
    recommender = load_recommender(run, Computing(cache=folder, memory_gb=memory_gb))

    def index(names: Sequence[str], held: TemporaryDirectory = scratch) -> tuple[int, Mapping[str, bytes]]:
        """The shards of some items; those of earlier ones are gone by then."""
        recommender.index({name: catalogue[name] for name in names})
        shards = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}
        return len(names), shards

    return index

"""The index of a late model, computed by workers of a cluster: they send whole shards, and one process keeps them."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import torch
from tqdm import tqdm

from mllm_msr.evaluation.loading import Computing, load_catalogue, load_recommender
from mllm_msr.evaluation.scoring import Show, as_it_is
from mllm_msr.evaluation.spread_scoring import run_at, run_folders
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.modeling.item_cache import ItemKeys
from mllm_msr.modeling.item_shards import ShardFolder
from mllm_msr.processing.open_workers import open_workers
from mllm_msr.records.run import RunFolder
from mllm_msr.records.storage import write_bytes

ITEMS = 64  # of a piece: 11 MB of four memory tokens at 7 billion parameters, 800 MB of 300 tokens


class ViewIndex:
    """The index of a run's items under a view: of the catalogue as it is, what `rank` and `serve` read as well; of
    another view a folder of its own, which goes with it."""

    def __init__(self, run: RunFolder, show: Show, catalogue: Mapping[str, Candidate]) -> None:
        self.run, self.show, self.catalogue = run, show, catalogue
        self.folder = run.item_cache if show is as_it_is else run.view_cache / show.__name__
        self.done: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self.show is not as_it_is:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, names: Sequence[str]) -> bool:
        """Have what is missing of these items computed; whether any was."""
        if self.done.issuperset(names):
            return False
        self._shards.refresh()
        missing = ItemKeys(torch.device("cpu")).missing(self.catalogue, names, self._shards.places)
        spread_index(self.run, missing, self.folder, self.show)
        self.done.update(names)
        return bool(missing)

    @cached_property
    def _shards(self) -> ShardFolder:
        """What is there; of the model, which only says the name of its folder, nothing is kept."""
        shards = load_recommender(self.run, Computing(device="cpu", cache=self.folder)).cache
        assert shards is not None
        return shards


def spread_index(
    run: RunFolder, missing: Sequence[str], folder: Path, show: Show = as_it_is, memory_gb: float | None = None
) -> None:
    """Put shards of some items, as a view shows them, into an item cache."""
    pieces = [missing[first : first + ITEMS] for first in range(0, len(missing), ITEMS)]
    folders, work = run_folders(run, ("config.yaml", "data", "model")), partial(_indexing_worker, run, show, memory_gb)
    with (
        open_workers(run.cluster, work, folders) as workers,
        tqdm(total=len(missing), desc="items", leave=False) as bar,
    ):
        for count, shards in workers.map(pieces):
            for name, content in shards.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(folder / name, content)
            bar.update(count)


def _indexing_worker(
    run: RunFolder, show: Show, memory_gb: float | None, *paths: Path
) -> Callable[[Sequence[str]], tuple[int, Mapping[str, bytes]]]:
    run, _ = run_at(run, False, *paths)
    catalogue, scratch = show(load_catalogue(run), run.recipe.evaluation.seed), TemporaryDirectory()
    folder = Path(scratch.name)
    recommender = load_recommender(run, Computing(cache=folder, memory_gb=memory_gb))

    def index(names: Sequence[str], held: TemporaryDirectory = scratch) -> tuple[int, Mapping[str, bytes]]:
        """The shards of some items; those of earlier ones are gone by then."""
        recommender.index({name: catalogue[name] for name in names})
        shards = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}
        return len(names), shards

    return index

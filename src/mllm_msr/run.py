"""A run: one directory, one recipe, and the stages from raw logs to a Hub-ready folder.

Each stage is a function of its inputs and the recipe. Its key, a hash of both, is noted in ``provenance.json`` once
its output is whole; a stage whose key stands there is skipped, any other is done, or resumed from what it had saved.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from mllm_msr.processing.recipe import Recipe, load_recipe
from mllm_msr.processing.storage import digest, write_text

LIBRARIES = ("mllm-msr", "torch", "transformers", "trl", "peft", "datasets", "huggingface-hub", "polars")


@dataclass
class Run:
    """A run directory and its recipe."""

    folder: Path
    recipe: Recipe

    @classmethod
    def create(cls, folder: Path, recipe: Recipe) -> "Run":
        """Open ``folder`` under ``recipe``, which replaces an earlier one; what it leaves valid stays valid."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True))
        return cls(folder, recipe)

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Open an existing run directory."""
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"{folder} is not a run directory (no config.yaml): start with `mllm-msr prepare`")
        return cls(folder, load_recipe(folder / "config.yaml"))

    def provenance(self) -> dict[str, Any]:
        path = self.folder / "provenance.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        return {"versions": {}, "inputs": {}, "stages": {}}

    def key(self, stage: str) -> str:
        """The key of a finished stage."""
        stages = self.provenance()["stages"]
        if stage not in stages:
            raise FileNotFoundError(f"stage {stage!r} of {self.folder} has not been done yet; do it first")
        return stages[stage]["key"]

    def stage(self, name: str, depends_on: list[Any], output: Path, work: Callable[[str], None]) -> None:
        """Do ``work(key)`` unless its key is that of the finished stage and its output is there."""
        key = digest(name, version("mllm-msr"), *depends_on)
        done = self.provenance()["stages"].get(name)
        if done and done["key"] == key and output.exists():
            print(f"{name}: up to date", flush=True)
            return
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        work(key)
        provenance = self.provenance()
        provenance["versions"] = {"python": platform.python_version(), **{lib: version(lib) for lib in LIBRARIES}}
        provenance["stages"][name] = {
            "key": key,
            "seconds": round(time.monotonic() - start, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_text(self.folder / "provenance.json", json.dumps(provenance, indent=2))
        print(f"{name}: {provenance['stages'][name]['seconds']} s", flush=True)

    def items(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "data/items.parquet")

    def tasks(self, *splits: str) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "data/tasks.parquet").filter(pl.col("split").is_in(splits))

    def contexts(self, *splits: str) -> pl.DataFrame:
        """Tasks of ``splits`` with the preference and recent summaries that each may use."""
        from mllm_msr.processing.examples import task_contexts

        return task_contexts(
            self.tasks(*splits),
            pl.read_parquet(self.folder / "summaries/preferences.parquet"),
            pl.read_parquet(self.folder / "summaries/items.parquet"),
            self.block_size,
        )

    @property
    def block_size(self) -> int:
        return self.recipe.summaries.get("block_size", 3)

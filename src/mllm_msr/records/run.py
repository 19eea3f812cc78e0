"""A run: one folder, one recipe, and the stages from raw logs to a Hub-ready folder.

Each stage is a function of the recipe and of what earlier stages left. Its key, a hash of both, is noted in
``provenance.json`` once its output is whole; a stage whose key stands there is skipped, any other is done, or resumed
from what it had saved. A later stage refuses to go on from an earlier one that has changed under it.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from mllm_msr.records.lock import write_lock
from mllm_msr.records.recipe import CheckFlags, Recipe, load_content, parse_recipe
from mllm_msr.records.results import Results
from mllm_msr.records.schema import TASKS, Table
from mllm_msr.records.storage import digest, file_digest, write_text

FORMAT = 2  # of a run's folder; a run of another one is refused
LIBRARIES = ("mllm-msr", "torch", "transformers", "trl", "peft", "datasets", "huggingface-hub", "polars")


@dataclass(frozen=True)
class StageSpec:
    """One stage: the command that does it, the stages it rests on, and what of the recipe its output depends on."""

    command: str
    after: tuple[str, ...]
    settings: Callable[[Recipe], Any]


def _texts(recipe: Recipe) -> Any:
    return [recipe.summaries.facts(), recipe.prompts, recipe.item_noun]


STAGES: dict[str, StageSpec] = {
    "prepare": StageSpec("prepare", (), lambda recipe: [asdict(recipe.source), asdict(recipe.data)]),
    "summarize items": StageSpec("summarize items", ("prepare",), _texts),
    "summarize users": StageSpec("summarize users", ("summarize items",), _texts),
    "train": StageSpec("train", ("summarize users",), Recipe.training_flags),
    "evaluate": StageSpec("evaluate", ("prepare",), lambda recipe: asdict(recipe.evaluation)),
    "report": StageSpec("report", ("evaluate",), lambda recipe: None),
}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and its recipe: the only place that knows where things lie in it."""

    path: Path
    recipe: Recipe

    # ---- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> "RunFolder":
        """Open ``path`` under ``recipe``; what an earlier version of the same recipe leaves valid stays valid.

        Raises:
            ValueError: the folder holds a run of another recipe or format, or something that is no run.
        """
        if (path / "config.yaml").is_file():
            earlier = cls.open(path).recipe
            if earlier.name != recipe.name or type(earlier.source) is not type(recipe.source):
                raise ValueError(
                    f"{path} holds a run of another recipe, {earlier.name!r}: name another folder by --output"
                )
        elif path.is_dir() and any(one for one in path.iterdir() if one.name != ".lock"):
            raise ValueError(f"{path} is not empty and not a run: name another folder by --output")
        path.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, **recipe.to_dict()}
        with write_lock(path, "create"):
            write_text(path / "config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        return cls(path, recipe)

    @classmethod
    def open(cls, path: Path, check_training: CheckFlags = dict) -> "RunFolder":
        """Open an existing run; FileNotFoundError if it is none, ValueError if its format or recipe is not ours."""
        config = path / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(f"{path} is not a run (no config.yaml): start with `mllm-msr prepare`")
        content = load_content(config)
        if (found := content.pop("format", 1)) != FORMAT:
            raise ValueError(
                f"{path} is a run of format {found}, and this version of mllm-msr reads format {FORMAT}: make it anew"
            )
        try:
            return cls(path, parse_recipe(content, check_training))
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from error

    # ---- places ----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def data_report(self) -> Path:
        return self.data / "report.json"

    @property
    def summaries(self) -> Path:
        return self.path / "summaries"

    @property
    def examples(self) -> Path:
        return self.path / "sft"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def training_log(self) -> Path:
        return self.model / "log_history.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "training"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def results_page(self) -> Path:
        return self.path / "results.md"

    @property
    def hub(self) -> Path:
        return self.path / "hub"

    @property
    def transfer(self) -> Path:
        return self.path / "transfer"

    @property
    def user_hash_key(self) -> Path:
        return self.path / "user_hash.key"

    @property
    def item_cache(self) -> Path:
        """What a model with ``interaction="late"`` keeps of items."""
        return self.path / "cache/late_items"

    @property
    def texts(self) -> Path:
        """All texts by content; shared with other runs if the recipe says so."""
        return Path(self.recipe.summaries.cache or self.path / "cache")

    # ---- tables ----------------------------------------------------------------------------------------------------

    def file(self, table: Table, split: str | None = None) -> Path:
        return table.path(self.path, split)

    def has(self, table: Table, split: str | None = None) -> bool:
        return self.file(table, split).is_file()

    def read(self, table: Table, columns: Sequence[str] | None = None, split: str | None = None) -> pl.DataFrame:
        """A checked table; FileNotFoundError names the file, ValueError the column."""
        return table.read(self.file(table, split), columns)

    def scan(self, table: Table, split: str | None = None) -> pl.LazyFrame:
        return table.scan(self.file(table, split))

    def write(self, table: Table, frame: pl.DataFrame, split: str | None = None) -> None:
        table.write(frame, self.file(table, split))

    def tasks(self, *splits: str) -> pl.DataFrame:
        """The ranking tasks of some splits."""
        return self.scan(TASKS).filter(pl.col("split").is_in(splits)).collect()

    def results(self) -> Results:
        """What the last evaluation found; FileNotFoundError names the command that makes it."""
        if not self.metrics.is_file():
            raise FileNotFoundError(f"{self.metrics} is missing: run `mllm-msr evaluate {self.path}` first")
        return Results.read(self.metrics)

    @property
    def block_size(self) -> int:
        """Items of a history block."""
        return self.recipe.summaries.block_size

    # ---- stages ----------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, command: str) -> Iterator[None]:
        """Be the only writer within the block; another process's block is waited for, and who holds it is said."""
        with write_lock(self.path, command):
            yield

    def provenance(self) -> dict[str, Any]:
        """``versions`` of libraries, and by stage ``key``, ``after``, ``reads``, ``settings``, ``seconds``,
        ``finished``."""
        path = self.path / "provenance.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        return {"format": FORMAT, "versions": {}, "stages": {}}

    def write_provenance(self, content: Mapping[str, Any]) -> None:
        write_text(self.path / "provenance.json", json.dumps(content, indent=2))

    def key(self, name: str) -> str:
        """The key of a stage that is done and up to date; see :meth:`require`."""
        self.require(name)
        return self.provenance()["stages"][name]["key"]

    def require(self, name: str) -> None:
        """Raise, naming the command to run, unless a stage is done and nothing it rests on has changed since.

        Raises:
            FileNotFoundError: the stage, or one before it, has not been done yet.
            ValueError: the recipe, an earlier stage, or a file it has read is no longer what it was.
        """
        done, spec = self.provenance()["stages"].get(name), STAGES[name]
        for earlier in done["after"] if done else spec.after:
            self.require(earlier)
        command = f"mllm-msr {spec.command} {self.path}"
        if done is None:
            raise FileNotFoundError(f"stage {name!r} of {self.path} has not been done yet: run `{command}` first")
        if reason := self._changed(done, spec):
            raise ValueError(f"stage {name!r} of {self.path} is out of date, as {reason}: run `{command}` again")

    def _changed(self, done: Mapping[str, Any], spec: StageSpec) -> str | None:
        stages = self.provenance()["stages"]
        for earlier, key in done["after"].items():
            if stages[earlier]["key"] != key:
                return f"{earlier!r} has been done anew"
        if done["settings"] != digest(spec.settings(self.recipe)):
            return "the recipe has changed"
        for name, content in done["reads"].items():
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing"
            if file_digest(path) != content:
                return f"{name} has changed"
        return None

    def stage(
        self,
        name: str,
        work: Callable[[str], None],
        *,
        output: Path,
        reads: Sequence[Path] = (),
        facts: Sequence[Any] = (),
        after: Sequence[str] | None = None,
    ) -> None:
        """Do ``work(key)`` unless the stage is up to date.

        Args:
            output: what must be there for the stage to count as done.
            reads: files of the run whose content decides the output; a change of theirs makes the stage out of date.
            facts: what else decides it, beside the recipe, such as the content of raw files.
            after: the stages it rests on, if not those of :data:`STAGES`.
        """
        spec = STAGES[name]
        with self.lock(name):
            earlier = {one: self.key(one) for one in (spec.after if after is None else after)}
            contents = {path.relative_to(self.path).as_posix(): file_digest(path) for path in reads}
            settings = digest(spec.settings(self.recipe))
            key = digest(name, version("mllm-msr"), earlier, contents, list(facts) or settings)
            done = self.provenance()["stages"].get(name)
            entry = {"key": key, "after": earlier, "reads": contents, "settings": settings}
            if done and done["key"] == key and output.exists():
                print(f"{name}: up to date", flush=True)
                if done["settings"] != settings:  # of the same outcome, such as another path of the same data
                    self._note(name, {**done, **entry})
                return
            print(f"{name} ..." if done is None else f"{name} again, as what it rests on has changed ...", flush=True)
            start = time.monotonic()
            work(key)
            seconds = round(time.monotonic() - start, 1)
            finished = datetime.now(UTC).isoformat(timespec="seconds")
            self._note(name, {**entry, "seconds": seconds, "finished": finished})
            print(f"{name}: {seconds} s", flush=True)

    def take_over(self, name: str, key: str) -> None:
        """Note a stage as done whose output comes from elsewhere, as that of ``key``."""
        earlier = {stage: self.key(stage) for stage in STAGES[name].after}
        settings = digest(STAGES[name].settings(self.recipe))
        self._note(name, {"key": key, "after": earlier, "reads": {}, "settings": settings})

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        provenance = self.provenance()
        provenance["versions"] = {"python": platform.python_version(), **{lib: version(lib) for lib in LIBRARIES}}
        provenance["stages"][name] = entry
        self.write_provenance(provenance)

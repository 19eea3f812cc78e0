"""A run: one folder, one recipe, and the stages from raw logs to a Hub-ready folder.

Each stage is a function of the recipe and of what earlier stages left. ``provenance.json`` notes, once its output is
whole, its key (a hash of both) and the content of the files that it wrote. A stage whose key and files are as noted is
skipped, any other is done, or resumed from what it had saved. A later stage refuses to go on from an earlier one that
has changed under it.
"""

import json
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from mllm_msr.records.cluster import Cluster
from mllm_msr.records.lock import is_first_process, write_lock
from mllm_msr.records.recipe import FORMAT, CheckFlags, Recipe, load_content, parse_recipe
from mllm_msr.records.results import Results
from mllm_msr.records.schema import TASKS, Table
from mllm_msr.records.stage_specs import STAGES
from mllm_msr.records.storage import digest, file_digest, link_file, read_json, write_text

LIBRARIES = ("mllm-msr", "torch", "transformers", "trl", "peft", "datasets", "huggingface-hub", "polars")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and its recipe: the only place that knows where things lie in it.

    ``cluster``: who does the map-like work of its stages; None: this process.
    """

    path: Path
    recipe: Recipe
    cluster: Cluster | None = None

    # ---- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> "RunFolder":
        """Open ``path`` under ``recipe``; what an earlier version of the same recipe leaves valid stays valid.

        Raises:
            ValueError: the folder holds a run of another recipe or format, or something that is no run.
        """
        if (path / "config.yaml").is_file():
            earlier = cls.open(path).recipe
            if earlier.name != recipe.name or earlier.source.type != recipe.source.type:
                raise ValueError(
                    f"{path} holds a run of another recipe, {earlier.name!r}: name another folder by --output"
                )
        elif path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()):
            raise ValueError(f"{path} is not empty and not a run: name another folder by --output")
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, recipe)
        with run.lock(f"change of the recipe of {path}"):
            content = {"format": FORMAT, **recipe.to_dict()}
            write_text(run.config, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        return run

    @classmethod
    def open(cls, path: Path, check_training: CheckFlags = dict) -> "RunFolder":
        """Open an existing run; FileNotFoundError if it is none, ValueError if its format or recipe is not ours."""
        config = path / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(f"{path} is not a run (no config.yaml): start with `mllm-msr prepare`")
        content = load_content(config)
        if "format" not in content:
            raise ValueError(f"{config} has no format: the run is of an older version of mllm-msr; make it anew")
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
    def vectors(self) -> Path:
        """All item vectors by content, as they are made."""
        return self.path / "cache/vectors"

    @property
    def head(self) -> Path:
        return self.path / "head"

    @property
    def trained_heads(self) -> Path:
        """The epochs of the heads, so that a killed training goes on."""
        return self.path / "cache/heads"

    @property
    def answers(self) -> Path:
        """The trained model's scores of validation tasks, by which its weight in the fused score is fitted."""
        return self.path / "cache/answers"

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
    def view_cache(self) -> Path:
        """The same of items as variants show them, each in a folder, while workers score by it."""
        return self.path / "cache/late_views"

    @property
    def trained_baselines(self) -> Path:
        """The epochs of sequential baselines, so that a killed evaluation does not train them again."""
        return self.path / "cache/baselines"

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
        """``versions`` of libraries, and what is noted of every stage that is done, by its name in ``stages``.

        Of a stage: ``key``; ``after``, the outcomes of the stages it rests on; ``settings``, a hash of its part of the
        recipe; ``writes``, for each file its digest, size and time; ``seconds``; ``finished``.
        """
        path = self.path / "provenance.json"
        content = read_json(path, {"versions": {}, "stages": {}})
        if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
            raise ValueError(f"{path} does not say what is done of this run: remove it, and do all stages again")
        return content

    def write_provenance(self, content: Mapping[str, Any]) -> None:
        write_text(self.path / "provenance.json", json.dumps(content, indent=2))

    def require(self, name: str, thoroughly: bool = False) -> None:
        """Raise, naming the commands to run, unless a stage is done and nothing it rests on has changed since.

        Args:
            thoroughly: read files again whose size and time are as noted.

        Raises:
            FileNotFoundError: the stage has not been done yet.
            ValueError: the recipe, an earlier stage, or a file that one of them wrote is no longer what it was.
        """
        if not (pending := self.pending(name, thoroughly)):
            return
        commands = ", then ".join(f"`{self.command(stage)}`" for stage in pending)
        if name not in self.provenance()["stages"]:
            raise FileNotFoundError(f"stage {name!r} of {self.path} has not been done yet: run {commands} first")
        reason = next(iter(pending.values()))
        raise ValueError(f"stage {name!r} of {self.path} is out of date, as {reason}: run {commands} again")

    def pending(self, name: str, thoroughly: bool = False) -> dict[str, str]:
        """The stages to do before a stage is up to date, itself included, in their order, each with the reason."""
        stages = self.provenance()["stages"]
        done, found = stages.get(name), dict[str, str]()
        for earlier in done["after"] if done else STAGES[name].after(self.recipe):
            found |= self.pending(earlier, thoroughly)
        if done is None:
            found[name] = f"{name!r} has not been done yet"
        elif reason := self._changed(name, done, thoroughly) or next(iter(found.values()), None):
            found[name] = reason
        return found

    def command(self, name: str) -> str:
        """The command line that does a stage of this run."""
        place, config = (shlex.quote(str(path)) for path in (self.path, self.config))
        return f"mllm-msr {name} " + (f"{config} --output {place}" if name == "prepare" else place)

    def key(self, name: str) -> str:
        """A hash of all that a stage was made of and of all that it wrote; raises like :meth:`require`."""
        self.require(name)
        return _outcome(self.provenance()["stages"][name])

    def _changed(self, name: str, done: Mapping[str, Any], thoroughly: bool = False) -> str | None:
        stages = self.provenance()["stages"]
        for earlier, outcome in done["after"].items():
            if earlier not in stages or _outcome(stages[earlier]) != outcome:
                return f"{earlier!r} has been done anew"
        if done["settings"] != digest(STAGES[name].settings(self.recipe)):
            return "the recipe has changed"
        return self._damaged(done, thoroughly)

    def _damaged(self, done: Mapping[str, Any], thoroughly: bool = False) -> str | None:
        """What is wrong with the files that a stage wrote."""
        for name, noted in done["writes"].items():
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing"
            if (thoroughly or _stamp(path) != noted[1:]) and file_digest(path) != noted[0]:
                return f"{name} has changed"
        return None

    def stage(
        self,
        name: str,
        work: Callable[[str], None],
        *,
        writes: Sequence[Path],
        facts: Sequence[Any] = (),
        after: Sequence[str] | None = None,
    ) -> None:
        """Do ``work(key)`` unless the stage is up to date.

        Args:
            writes: the files and folders that the work writes; all of them must be as it left them.
            facts: what decides the output in place of the recipe's part, such as the content of raw files.
            after: the stages it rests on, if not those of :data:`STAGES`.
        """
        with self.lock(f"mllm-msr {name} {self.path}"):
            if RunFolder.open(self.path).recipe.to_dict() != self.recipe.to_dict():
                raise ValueError(f"another command has changed the recipe of {self.path} meanwhile: run this one again")
            rests_on = STAGES[name].after(self.recipe) if after is None else after
            earlier = {stage: self.key(stage) for stage in rests_on}
            settings = digest(STAGES[name].settings(self.recipe))
            key = digest(name, version("mllm-msr"), earlier, list(facts) or settings)
            done = self.provenance()["stages"].get(name)
            if done and done["key"] == key and not self._damaged(done):
                print(f"{name}: up to date", flush=True)
                if done["settings"] != settings:  # of the same output, such as another path of the same data
                    self._note(name, {**done, "settings": settings})
                return
            if done:
                reason = self._changed(name, done) or "what it rests on has changed"
                print(f"{name}: is done again, as {reason}", flush=True)
            print(f"{name} ...", flush=True)
            start = time.monotonic()
            work(key)
            seconds = round(time.monotonic() - start, 1)
            if is_first_process():
                self._note(name, {"key": key, "after": earlier, "settings": settings, "seconds": seconds}, writes)
            print(f"{name}: {seconds} s, in {', '.join(map(str, writes))}", flush=True)

    def take_over(self, name: str, key: str, writes: Sequence[Path]) -> None:
        """Note a stage as done whose files come from elsewhere, made of what ``key`` stands for."""
        earlier = {stage: self.key(stage) for stage in STAGES[name].after(self.recipe)}
        self._note(name, {"key": key, "after": earlier, "settings": digest(STAGES[name].settings(self.recipe))}, writes)

    def adopt(self, donor: "RunFolder", stages: Sequence[str]) -> None:
        """Take over stages of another run, with the files that they wrote, as what this run's recipe asks for."""
        provenance, theirs = self.provenance(), donor.provenance()
        for name in stages:
            donor.require(name)
            for file in theirs["stages"][name]["writes"]:
                link_file(donor.path / file, self.path / file)
            settings = digest(STAGES[name].settings(self.recipe))
            provenance["stages"][name] = {**theirs["stages"][name], "settings": settings}
        self.write_provenance({**provenance, "versions": theirs["versions"]})

    def _note(self, name: str, entry: Mapping[str, Any], writes: Sequence[Path] | None = None) -> None:
        provenance = self.provenance()
        provenance["versions"] = {"python": platform.python_version(), **{lib: version(lib) for lib in LIBRARIES}}
        entry = {**entry, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
        if writes is not None:
            files = [file for path in writes for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
            entry["writes"] = {
                file.relative_to(self.path).as_posix(): [file_digest(file), *_stamp(file)]
                for file in files
                if file.is_file()
            }
        provenance["stages"][name] = entry
        self.write_provenance(provenance)


def _outcome(done: Mapping[str, Any]) -> str:
    return digest(done["key"], {name: noted[0] for name, noted in done["writes"].items()})


def _stamp(path: Path) -> list[int]:
    """Size and time of a file: where both are as they were, its content is taken to be."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]

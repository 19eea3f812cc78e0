"""Studies: one recipe under many settings, as runs that share what they have in common; and one table of them all."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mllm_msr.opening import absolute, check_recipe
from mllm_msr.records.public import public_text
from mllm_msr.records.recipe import Recipe, demo_recipe, load_content, with_settings
from mllm_msr.records.results import Difference, Estimate
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import SCORES
from mllm_msr.records.stage_specs import STAGES
from mllm_msr.records.storage import read_json
from mllm_msr.records.typed import build, check_types

if TYPE_CHECKING:
    from mllm_msr.hub_cards.study_page import StudyEntry

SHARED = ("prepare", "summarize items", "summarize users", "train")  # what a cell may take over from another


@dataclass(frozen=True)
class Study:
    """What ``STUDY.yaml`` says.

    Args:
        recipe: recipe file, relative to the study's; ``demo`` is the embedded one.
        cells: settings by name, each ``{"section.name": value}``; the first is what the others are compared with.
        grid: lists of values by ``section.name``; every combination is one more cell.
        base: settings of every cell, under its own.
        seeds: of training; each cell is trained once for each.
        folds: of protocol ``paper``; each cell is run once for each, their test users put together.
    """

    recipe: str
    cells: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    folds: list[int] | None = None

    def __post_init__(self) -> None:
        check_types(self, "study")
        if not self.cells and not self.grid:
            raise ValueError("cells: name at least one, or lists of values under `grid`")
        if not self.seeds:
            raise ValueError("seeds: name at least one")

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Read a study file; ValueError for an unknown key, a wrong type, or no cell."""
        content = load_content(path)
        cells = {str(name): settings for name, settings in (content.get("cells") or {}).items()}
        try:
            return build(cls, {**content, "cells": cells}, "study")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of every cell by its name, those of the grid after the named ones."""
        cells = {name: settings or {} for name, settings in self.cells.items()}
        for values in product(*self.grid.values()) if self.grid else ():
            settings = dict(zip(self.grid, values, strict=True))
            cells[", ".join(f"{key.partition('.')[2] or key} {value}" for key, value in settings.items())] = settings
        return cells

    def plan(self, only: Sequence[str] = ()) -> "list[PlannedRun]":
        """The runs of all cells, or of some; ValueError names a cell that the study has not."""
        cells = self.settings()
        if unknown := [name for name in only if name not in cells]:
            raise ValueError(f"there is no cell {unknown[0]!r}; the cells are {', '.join(cells)}")
        return [
            PlannedRun(
                name,
                f"{name} seed{seed}" + ("" if fold is None else f" fold{fold}"),
                {**self.base, **cells[name], "training.seed": seed} | ({} if fold is None else {"data.fold": fold}),
            )
            for name in only or cells
            for seed, fold in product(self.seeds, self.folds or (None,))
        ]


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study: the name of its cell, its own with seed and fold, and its settings over the recipe."""

    cell: str
    label: str
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.label)


def run_study(path: Path, output: Path, only: Sequence[str] = (), data: str | None = None) -> Path:
    """Run every cell of a study that is not finished yet, then write ``study.json``, ``study.md`` and ``study.svg``.

    Each cell is a run ``output/cells/<name>-seed<s>``; what is finished there is skipped, what was killed goes on. A
    new cell starts from the data, summaries or model of an earlier one as far as their recipes agree; all share one
    store of texts. A cell that fails is reported and keeps no other from running; RuntimeError at the end.

    Args:
        only: names of the cells to run.
        data: the folder of the raw data.
    """
    study = Study.load(path)
    plan = study.plan(only)
    refuse_other_study(output, path.stem)
    content = load_content(demo_recipe() if study.recipe == "demo" else path.parent / study.recipe)
    under = {"summaries.cache": str((output / "texts").resolve())}
    over = {"source.folder": absolute(data)} if data else {}
    cells: dict[str, list[RunFolder]] = defaultdict(list)
    failures = []
    for planned in plan:
        print(f"\n== {planned.label}", flush=True)
        start = time.monotonic()
        try:
            recipe = check_recipe(with_settings(content, {**under, **planned.settings, **over}))
            run = start_cell(
                output / "cells" / planned.folder, recipe, [run for runs in cells.values() for run in runs]
            )
            finish_cell(run)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            failures.append(public_text(f"{planned.label}: {error}"))  # written to a file, which may travel
            print(f"   failed: {error}", flush=True)
            continue
        cells[planned.cell].append(run)
        print(f"   {time.monotonic() - start:.0f} s", flush=True)
    if cells:
        from mllm_msr.hub_cards.study_page import StudyResults, write_study

        print("\n" + write_study(output, StudyResults(path.stem, tuple(collect(cells)), tuple(failures))))
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(plan)} runs failed: " + "; ".join(failures))
    return output


def refuse_other_study(output: Path, name: str) -> None:
    """Raise ValueError if ``output`` holds a run, or a study that is called otherwise."""
    if (output / "config.yaml").is_file():
        raise ValueError(f"{output} holds a run: name another folder by --output")
    results = output / "study.json"
    if results.is_file() and (other := read_json(results)["study"]) != name:
        raise ValueError(f"{output} holds the study {other!r}: name another folder by --output")


def start_cell(folder: Path, recipe: Recipe, donors: Sequence[RunFolder]) -> RunFolder:
    """A cell's run; a new one takes over what the most alike of ``donors`` has and the recipes agree on."""
    is_new = not (folder / "config.yaml").is_file()
    run = RunFolder.create(folder, recipe)
    if is_new and donors:
        donor = max(donors, key=lambda donor: len(shared_stages(donor.recipe, recipe)))
        run.adopt(donor, shared_stages(donor.recipe, recipe))
    return run


def shared_stages(first: Recipe, second: Recipe) -> list[str]:
    """The stages, from the first, that have the same outcome under both recipes."""

    def agree(name: str) -> bool:
        return STAGES[name].settings(first) == STAGES[name].settings(second)

    return list(takewhile(agree, SHARED))


def finish_cell(run: RunFolder) -> None:
    from mllm_msr import stages

    for stage in (stages.prepare, stages.summarize_items, stages.summarize_users, stages.train, stages.evaluate):
        stage(run)


def collect(cells: dict[str, list[RunFolder]]) -> "list[StudyEntry]":
    """One entry for each variant of each cell, compared with the first.

    Runs of several folds put their users together; runs of several seeds are averaged user by user. Intervals are
    bootstraps over users.
    """
    from mllm_msr.evaluation.metrics import estimates, paired
    from mllm_msr.hub_cards.study_page import StudyEntry, StudyFigure

    entries: list[StudyEntry] = []
    first: tuple[list[int], UserValues] | None = None
    for cell, runs in cells.items():
        candidates = sorted(_candidates(run) for run in runs)
        seconds = [run.provenance()["stages"].get("train", {}).get("seconds") for run in runs]
        for variant in runs[0].results().variants:
            values = UserValues.of(runs, variant)
            deviations, differences = values.seed_deviations(), {}
            if first is None:
                first = candidates, values
            elif first[1].users.equals(values.users):
                differences = paired(values.means, first[1].means)
            figures = {
                name: StudyFigure(
                    Estimate.from_json(estimate),
                    deviations.get(name),
                    Difference.from_json(differences[name]) if differences else None,
                )
                for name, estimate in estimates(values.means, n_bootstrap=2000).items()
            }
            entry = StudyEntry(
                cell,
                variant,
                runs=len(runs),
                users=len(values.users),
                same_candidates=candidates == first[0],
                metrics=figures,
                train_seconds=tuple(each for each in seconds if each is not None),
            )
            entries.append(entry)
    return entries


def _candidates(run: RunFolder) -> int:
    """A number that two runs share only if they ranked the same candidates for the same users."""
    pairs = run.read(SCORES, ["variant", "user_id", "item_id"])
    return int(pairs.filter(variant=pairs["variant"][0]).select("user_id", "item_id").hash_rows().sum())


@dataclass(frozen=True)
class UserValues:
    """A variant's metrics user by user.

    Args:
        users: U ids, sorted.
        by_seed: for each seed of training ``{metric: (U,)}``, see :func:`~mllm_msr.evaluation.metrics.user_columns`.
    """

    users: pl.Series
    by_seed: list[dict[str, np.ndarray]]

    @classmethod
    def of(cls, runs: Sequence[RunFolder], variant: str) -> "UserValues":
        """Of a variant in some runs, the folds of each seed put together."""
        from mllm_msr.evaluation.metrics import user_columns

        frames: dict[Any, list[pl.DataFrame]] = defaultdict(list)
        for run in runs:
            frames[run.recipe.training["seed"]].append(run.scan(SCORES).filter(variant=variant).collect())
        scores = [pl.concat(parts) for parts in frames.values()]
        columns = [user_columns(frame["user_id"], frame["label"], frame["logit"]) for frame in scores]
        return cls(scores[0]["user_id"].unique().sort(), columns)

    @property
    def means(self) -> dict[str, np.ndarray]:
        """``{metric: (U,)}``, averaged over seeds."""
        return {name: np.mean([columns[name] for columns in self.by_seed], axis=0) for name in self.by_seed[0]}

    def seed_deviations(self) -> dict[str, float]:
        """The standard deviation of each metric over seeds; empty for one seed."""
        if len(self.by_seed) < 2:
            return {}
        return {
            name: float(np.std([np.nanmean(columns[name]) for columns in self.by_seed], ddof=1))
            for name in self.by_seed[0]
        }

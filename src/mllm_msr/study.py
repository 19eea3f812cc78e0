"""Studies: one recipe under many settings, as runs that share what they have in common; and one table of them all."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import product, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import yaml

from mllm_msr.opening import check_recipe
from mllm_msr.records.recipe import Recipe, demo_recipe, load_content, with_settings
from mllm_msr.records.results import Difference, Estimate
from mllm_msr.records.run import STAGES, RunFolder
from mllm_msr.records.schema import SCORES

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
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    folds: tuple[int, ...] | None = None

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Read a study file; unknown keys, or no cell, are an error."""
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = [one.name for one in fields(cls)]
        if not isinstance(content, dict) or "recipe" not in content or content.keys() - set(known):
            raise ValueError(f"{path}: a study is a mapping with `recipe` and any of {', '.join(known[1:])}")
        if not content.get("cells") and not content.get("grid"):
            raise ValueError(f"{path}: name at least one cell under `cells`, or lists of values under `grid`")
        cells = {str(name): settings or {} for name, settings in (content.pop("cells", None) or {}).items()}
        for name in ("seeds", "folds"):
            if name in content:
                content[name] = tuple(content[name])
        return cls(cells=cells, **content)

    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of every cell by its name, those of the grid after the named ones."""
        found = dict(self.cells)
        for values in product(*self.grid.values()) if self.grid else ():
            chosen = dict(zip(self.grid, values, strict=True))
            found[", ".join(f"{key.split('.')[1]} {value}" for key, value in chosen.items())] = chosen
        return found


def run_study(path: Path, output: Path, only: Sequence[str] = (), data: str | None = None) -> Path:
    """Run every cell of a study that is not finished yet, then write ``study.json``, ``study.md`` and ``study.svg``.

    Each cell is a run directory ``output/cells/<name>-seed<s>``; what is finished there is skipped, what was killed
    goes on. A new cell starts from the data, summaries or model of an earlier one as far as their recipes agree; all
    share one store of texts. A cell that fails is reported and keeps no other from running; RuntimeError at the end.
    ``only``: names of the cells to run; ``data``: the folder of the raw data.
    """
    study = Study.load(path)
    settings = study.settings()
    if unknown := [name for name in only if name not in settings]:
        raise ValueError(f"{path} has no cell {unknown[0]!r}; it has {', '.join(settings)}")
    content = load_content(demo_recipe() if study.recipe == "demo" else path.parent / study.recipe)
    cells: dict[str, list[RunFolder]] = defaultdict(list)
    donors: list[RunFolder] = []
    failures = []
    for name in only or settings:
        for seed, fold in product(study.seeds, study.folds or (None,)):
            full = {**study.base, **settings[name], "training.seed": seed}
            full |= {} if fold is None else {"data.fold": fold}
            if data:
                full["source.folder"] = data if data.startswith("hf:") else str(Path(data).resolve())
            full.setdefault("summaries.cache", str((output / "texts").resolve()))
            label = f"{name} seed{seed}" + ("" if fold is None else f" fold{fold}")
            folder = output / "cells" / "".join(c if c.isalnum() else "-" for c in label)
            print(f"\n== {label}", flush=True)
            start = time.monotonic()
            try:
                run = start_cell(folder, check_recipe(with_settings(content, full)), donors)
                finish_cell(run)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                failures.append(f"{label}: {error}")
                print(f"   failed: {error}", flush=True)
                continue
            cells[name].append(run)
            donors.append(run)
            print(f"   {time.monotonic() - start:.0f} s", flush=True)
    if cells:
        from mllm_msr.hub_cards.study_page import StudyResults, write_study

        print("\n" + write_study(output, StudyResults(path.stem, tuple(collect(cells)), tuple(failures))))
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(only or settings)} cells failed: " + "; ".join(failures))
    return output


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
    first: CellValues | None = None
    for cell, runs in cells.items():
        candidates = sorted(_candidates(run) for run in runs)
        seconds = [run.provenance()["stages"].get("train", {}).get("seconds") for run in runs]
        for variant in runs[0].results().variants:
            values = user_values(runs, variant)
            differences = {}
            if first is None:
                first, first_candidates = values, candidates
            elif first.users.equals(values.users):
                differences = paired(values.columns, first.columns)
            figures = {
                name: StudyFigure(
                    Estimate.from_json(content),
                    values.seed_deviation.get(name),
                    Difference.from_json(differences[name]) if differences else None,
                )
                for name, content in estimates(values.columns, n_bootstrap=2000).items()
            }
            entries.append(
                StudyEntry(
                    cell,
                    variant,
                    runs=len(runs),
                    users=len(values.users),
                    same_candidates=candidates == first_candidates,
                    metrics=figures,
                    train_seconds=tuple(one for one in seconds if one is not None),
                )
            )
    return entries


def _candidates(run: RunFolder) -> int:
    """A number that two runs share only if they ranked the same candidates for the same users."""
    pairs = run.read(SCORES, ["variant", "user_id", "item_id"])
    return int(pairs.filter(variant=pairs["variant"][0]).select("user_id", "item_id").hash_rows().sum())


@dataclass(frozen=True)
class CellValues:
    """A variant of a cell, user by user: ``columns`` by metric, averaged over seeds; the metrics' standard deviation
    over seeds, where there are several."""

    users: pl.Series
    columns: dict[str, np.ndarray]
    seed_deviation: dict[str, float]


def user_values(runs: Sequence[RunFolder], variant: str) -> CellValues:
    """The values of one variant in the runs of a cell."""
    from mllm_msr.evaluation.metrics import METRICS, user_columns

    by_seed = defaultdict(list)
    for run in runs:
        by_seed[run.recipe.training["seed"]].append(run.scan(SCORES).filter(variant=variant).collect())
    columns, users = [], pl.Series(dtype=pl.String)
    for frames in by_seed.values():
        scores = pl.concat(frames)
        columns.append(user_columns(scores["user_id"], scores["label"], scores["logit"]))
        users = scores["user_id"].unique().sort()
    values = {name: np.stack([one[name] for one in columns]) for name in METRICS}  # (seeds, U) each
    deviation = {name: float(np.nanmean(value, axis=1).std(ddof=1)) for name, value in values.items()}
    return CellValues(
        users, {name: value.mean(axis=0) for name, value in values.items()}, deviation if len(columns) > 1 else {}
    )

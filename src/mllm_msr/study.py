"""Studies: one recipe under many settings, as runs that share what they have in common; and one table of them all."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from mllm_msr.records.recipe import Recipe, demo_recipe, load_content, parse_recipe, with_settings
from mllm_msr.records.run import STAGES, RunFolder
from mllm_msr.records.schema import SCORES
from mllm_msr.records.storage import write_text

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
                run = start_cell(folder, parse_recipe(with_settings(content, full)), donors)
                finish_cell(run)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                failures.append(f"{label}: {error}")
                print(f"   failed: {error}", flush=True)
                continue
            cells[name].append(run)
            donors.append(run)
            print(f"   {time.monotonic() - start:.0f} s", flush=True)
    if cells:
        from mllm_msr.hub_cards.study_page import write_study

        results = {"study": path.stem, "cells": collect(cells), "failures": failures}
        write_text(output / "study.json", json.dumps(results, indent=2))
        print("\n" + write_study(output))
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


def collect(cells: dict[str, list[RunFolder]]) -> list[dict[str, Any]]:
    """One entry for each row of each cell: ``{"cell", "row", "runs", "users", "metrics": {metric: {"value", "ci95",
    "seed_std", "difference", "difference_ci95", "p"}}}``.

    Runs of several folds put their users together; runs of several seeds are averaged user by user. Intervals are
    bootstraps over users and ``seed_std`` the standard deviation of the metric over seeds. The difference is that from
    our row of the first cell, paired by user; it is left out where the users are others. ``same_candidates``: whether
    these were ranked in both; if not, the difference is as fair but less exact.
    """
    from mllm_msr.evaluation.metrics import METRICS, resampled_means

    entries, reference = [], None
    for cell, runs in cells.items():
        shown = sorted(_candidates(run) for run in runs)
        rows = runs[0].results().variants
        for row in rows:
            users, values, spread = user_values(runs, row)
            means = resampled_means(values, 2000, 0)
            low, high = np.clip(np.nanquantile(means, [0.025, 0.975], axis=0), 0, 1)
            metrics: dict[str, dict[str, Any]] = {
                name: {"value": float(value), "ci95": [float(low[i]), float(high[i])], "seed_std": spread[i]}
                for i, (name, value) in enumerate(zip(METRICS, np.nanmean(values, axis=0), strict=True))
            }
            if reference is None:
                reference = shown, users, values
            elif reference[1].equals(users):
                gaps = values - reference[2]
                resampled = resampled_means(gaps, 2000, 0)
                ends = np.nanquantile(resampled, [0.025, 0.975], axis=0)
                for i, name in enumerate(METRICS):
                    wrong = min((resampled[:, i] <= 1e-12).sum(), (resampled[:, i] >= -1e-12).sum())
                    metrics[name] |= {
                        "difference": float(np.nanmean(gaps[:, i])),
                        "difference_ci95": [float(ends[0, i]), float(ends[1, i])],
                        "p": float(min(1.0, 2 * (wrong + 1) / (len(resampled) + 1))),
                    }
            took = [run.provenance()["stages"].get("train", {}).get("seconds") for run in runs]
            facts = {"cell": cell, "row": row, "runs": len(runs), "users": len(users), "train_seconds": took}
            entries.append({**facts, "same_candidates": reference[0] == shown, "metrics": metrics})
    return entries


def _candidates(run: RunFolder) -> int:
    """A number that two runs share only if they ranked the same candidates for the same users."""
    pairs = run.read(SCORES, ["variant", "user_id", "item_id"])
    return int(pairs.filter(variant=pairs["variant"][0]).select("user_id", "item_id").hash_rows().sum())


def user_values(runs: Sequence[RunFolder], row: str) -> tuple[pl.Series, np.ndarray, list[float | None]]:
    """Users, their values (U, M) under ``row`` averaged over seeds, and each metric's deviation between seeds."""
    from mllm_msr.evaluation.metrics import METRICS, user_columns

    by_seed = defaultdict(list)
    for run in runs:
        by_seed[run.recipe.training["seed"]].append(run.read(SCORES).filter(variant=row))
    columns, users = [], pl.Series(dtype=pl.String)
    for frames in by_seed.values():
        scores = pl.concat(frames)
        found = user_columns(scores["user_id"], scores["label"], scores["logit"])
        columns.append(np.stack([found[name] for name in METRICS], axis=1))
        users = scores["user_id"].unique().sort()
    values = np.stack(columns)
    means = np.nanmean(values, axis=1)  # (seeds, M)
    spread: list[float | None] = [None] * len(METRICS)
    if len(means) > 1:
        spread = [float(one) for one in means.std(axis=0, ddof=1)]
    return users, values.mean(axis=0), spread

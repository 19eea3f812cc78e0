"""Stage 4: every row of the results table on the same frozen tasks, and what the rows say beside each other."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from mllm_msr.processing.recipe import backbone_path
from mllm_msr.processing.storage import digest, file_digest, write_parquet, write_text
from mllm_msr.run import Run

OURS = "mllm_msr"
MODEL_ROWS = (OURS, "text_only", "blank_images", "shuffled_images", "no_preference", "other_user", "no_sft")
BASELINES = ("popularity", "random", "knn", "tfidf", "svd", "sasrec", "gru4rec")
DEFAULT_ROWS = (OURS, "popularity", "random", "text_only", "blank_images", "no_sft")


def recommender(run: Run, fine_tuned: bool = True):
    """The run's model ready to rank; without fine-tuning, its backbone under the same prompts."""
    from transformers import AutoModel, AutoProcessor

    from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
    from mllm_msr.modeling.ranking import Recommender

    folder = str(run.folder / "model")
    processor = AutoProcessor.from_pretrained(folder)
    if fine_tuned:
        model = AutoModel.from_pretrained(folder)
    else:
        name = run.recipe.training["model_name_or_path"]
        model = MllmMsrForRecommendation.from_backbone(
            backbone_path(name),
            revision=run.recipe.training.get("model_revision"),
            processor=processor,
            dtype=run.recipe.training.get("dtype"),
        )
    return Recommender(model, processor, **{k: v for k, v in run.recipe.evaluation.items() if k == "token_budget"})


def item_table(run: Run):
    from mllm_msr.training.collator import ItemTable
    from mllm_msr.training.tables import load_table

    return ItemTable(load_table(str(run.folder), "items", "train"))


def with_baselines(run: Run, names: str | None) -> Run:
    """The run with comma-separated baselines among its rows, kept in its ``config.yaml``."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    rows = list(run.recipe.evaluation.get("rows", DEFAULT_ROWS))
    if unknown := [name for name in wanted if name not in BASELINES]:
        raise ValueError(f"unknown baseline {unknown[0]!r}; known are {', '.join(BASELINES)}")
    if new := [name for name in dict.fromkeys(wanted) if name not in rows]:
        evaluation = {**run.recipe.evaluation, "rows": rows + new}
        return Run.create(run.folder, replace(run.recipe, evaluation=evaluation))
    return run


def evaluate(run: Run) -> None:
    """Score the frozen tasks with every row of the table, and compute the metrics."""
    from mllm_msr.hub_cards.evidence import against_lines
    from mllm_msr.hub_cards.results import results_table

    options = run.recipe.evaluation
    rows = list(options.get("rows", DEFAULT_ROWS))
    if unknown := [row for row in rows if row not in (*MODEL_ROWS, *BASELINES, "oracle")]:
        known = [*MODEL_ROWS, *BASELINES, "oracle"]
        raise ValueError(f"unknown row {unknown[0]!r} in evaluation.rows; known are {known}")
    settings = {name: value for name, value in options.items() if name != "rows"}  # a new row leaves the others' scores
    keys = {"data": digest(run.key("prepare"), settings)}
    if set(rows) & set(MODEL_ROWS):
        read = [run.key("train"), file_digest(run.folder / "summaries/preferences.parquet")]
        keys["model"] = digest(*read, settings)

    def work(key: str) -> None:
        frames = {}
        for row in rows:
            path = run.folder / "scores" / keys["model" if row in MODEL_ROWS else "data"] / f"{row}.parquet"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_parquet(score(run, row), path)
            frames[row] = pl.read_parquet(path).select(pl.lit(row).alias("row"), pl.all())
        scores = pl.concat(frames.values())
        write_parquet(scores, run.folder / "scores.parquet")
        write_text(run.folder / "metrics.json", json.dumps(measure(run, frames, scores), indent=2))
        for stale in (run.folder / "scores").iterdir():
            if stale.name not in keys.values():
                shutil.rmtree(stale)

    run.stage("evaluate", [*keys.values(), options], run.folder / "metrics.json", work)
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    print(results_table(metrics), against_lines(metrics), sep="\n")


def score(run: Run, row: str) -> pl.DataFrame:
    """``user_id``, ``item_id``, ``label``, ``logit``, ``score`` of every candidate under one row."""
    from mllm_msr.training import evaluation

    split, seed = run.recipe.evaluation.get("split", "test"), run.recipe.evaluation.get("seed", 0)
    if row in MODEL_ROWS:
        views = {"text_only": evaluation.without_image, "blank_images": evaluation.with_blank_image}
        contexts, items = run.contexts(split), item_table(run)
        if row == "shuffled_images":
            items = evaluation.ShuffledImages(items, seed)
        elif row == "no_preference":
            contexts = evaluation.without_preference(contexts)
        elif row == "other_user":
            contexts = evaluation.of_another_user(contexts, seed)
        model = recommender(run, fine_tuned=row != "no_sft")
        return evaluation.score_with_model(model, contexts, items, views.get(row, evaluation.as_it_is), row)
    tasks = run.tasks(split)
    return evaluation.score_with_values(tasks, baseline_values(run, row, tasks, seed))


def baseline_values(run: Run, row: str, tasks: pl.DataFrame, seed: int) -> np.ndarray:
    """(N,) ranking values of a row that is no language model."""
    from mllm_msr.training import baselines, evaluation, sequential_baselines

    popularity = pl.read_parquet(run.folder / "data/popularity.parquet")
    if row == "popularity":
        return evaluation.popularity_values(tasks, popularity)
    if row == "random":
        return evaluation.random_values(tasks, seed)
    if row == "oracle":
        if run.recipe.source["type"] != "demo":
            raise ValueError("the row 'oracle' needs a drawn world: only the demo has one")
        from mllm_msr.demo.source import true_utilities

        return true_utilities(run.recipe.source, evaluation.pairs(tasks))
    validation = run.tasks("validation")
    items = pl.read_parquet(run.folder / "data/items.parquet", columns=["item_id", "title", "text"])
    if row == "tfidf":
        return baselines.tfidf_values(tasks, validation, items)
    protocol = json.loads((run.folder / "data/report.json").read_text(encoding="utf-8"))["protocol"]["name"]
    interactions = pl.read_parquet(run.folder / "data/interactions.parquet")
    training = baselines.training_interactions(interactions, run.tasks("train"), protocol, popularity)
    match row:
        case "knn":
            return baselines.knn_values(tasks, validation, items, training)
        case "svd":
            return baselines.svd_values(tasks, validation, items, training, seed=seed)
        case _:
            kind = sequential_baselines.SASRec if row == "sasrec" else sequential_baselines.GRU4Rec
            return sequential_baselines.sequence_values(kind, tasks, validation, items, training, seed=seed)


def measure(run: Run, frames: dict[str, pl.DataFrame], scores: pl.DataFrame) -> dict[str, Any]:
    """The content of ``metrics.json``: every row's metrics, ours against each, slices, calibration, checks."""
    from mllm_msr.training import diagnostics
    from mllm_msr.training.metrics import paired_differences, ranking_metrics

    split = run.recipe.evaluation.get("split", "test")
    protocol = json.loads((run.folder / "data/report.json").read_text(encoding="utf-8"))["protocol"]
    tasks = run.tasks(split)
    popularity = pl.read_parquet(run.folder / "data/popularity.parquet")
    first = next(iter(frames.values()))
    users, labels = first["user_id"].to_numpy(), first["label"].to_numpy()
    for row, frame in frames.items():
        if not frame.select("user_id", "item_id").equals(first.select("user_id", "item_id")):
            raise ValueError(f"row {row!r} was scored on other candidates: remove {run.folder / 'scores'} and go on")
    metrics = {
        "dataset": run.recipe.name,
        "protocol": protocol["name"],
        "split": split,
        "n_users": len(np.unique(users)),
        "n_candidates": int(tasks["candidates"].list.len().to_numpy().max()),
        "seed": protocol["seed"],
        "candidate_hash": protocol["candidate_hash"],
        "rows": {row: ranking_metrics(users, labels, frame["logit"].to_numpy()) for row, frame in frames.items()},
        "slices": diagnostics.slices(scores, tasks, popularity),
        "checks": diagnostics.sanity(scores, popularity),
    }
    if OURS in frames:
        logits = frames[OURS]["logit"].to_numpy()
        metrics["against"] = {
            row: paired_differences(users, labels, logits, frame["logit"].to_numpy())
            for row, frame in frames.items()
            if row != OURS
        }
        here, there = (_positive_odds(part) for part in (tasks, run.tasks("train")))
        shift = float(np.log(here / there)) if there else 0.0
        metrics["calibration"] = {
            "as_trained": diagnostics.calibration(labels, logits),
            "prior_corrected": {**diagnostics.calibration(labels, logits, shift), "shift": shift},
        }
    return metrics


def _positive_odds(tasks: pl.DataFrame) -> float:
    """Positives for each negative among all candidates of ``tasks``; 0 if there is no negative."""
    labels = tasks["labels"].explode().to_numpy()
    negatives = int((labels == 0).sum())
    return float(labels.sum()) / negatives if negatives else 0.0

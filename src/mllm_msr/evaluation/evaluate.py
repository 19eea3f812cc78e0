"""Stage 4: every row of the results table on the same frozen tasks, and what the rows say beside each other."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.run import Run
from mllm_msr.records.storage import digest, file_digest, write_parquet, write_text

OURS = "mllm_msr"
MODEL_ROWS = (OURS, "text_only", "blank_images", "shuffled_images", "no_preference", "other_user", "no_sft")
BASELINES = ("popularity", "random", "knn", "tfidf", "svd", "sasrec", "gru4rec")
KNOWN_ROWS = (*MODEL_ROWS, *BASELINES, "oracle")
DEFAULT_ROWS = (OURS, "popularity", "random", "text_only", "blank_images", "no_sft")
FULL_CATALOGUE_PAIRS = 500_000  # that ours scores for it at most; baselines score any number
MORE = (
    "rows",
    "full_catalogue",
    "full_catalogue_pairs",
    "agreement",
    "model_of",
)  # what they add leaves scores as they are
WAYS: dict[str, dict[str, Any]] = {  # in which the same scores should come out
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "prefixes not shared": {"ranking": {"share_prefix": False}},
    "eager attention, not shared": {"attn_implementation": "eager", "ranking": {"share_prefix": False}},
    "one pair at a time": {"ranking": {"token_budget": 1}},
}
Scorer = Callable[[pl.DataFrame], pl.DataFrame]  # tasks to ``user_id``, ``item_id``, ``label``, ``logit``, ``score``


def recommender(run: Run, fine_tuned: bool = True, ranking: Mapping[str, Any] | None = None, **loading: Any):
    """The run's model ready to rank; without fine-tuning, its backbone under the same prompts.

    ``ranking``: settings of ``Recommender`` over the recipe's; ``loading``: of the trained model's ``from_pretrained``.
    """
    from accelerate import PartialState
    from transformers import AutoModel, AutoProcessor

    from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
    from mllm_msr.modeling.ranking import Recommender

    folder = str(run.folder / "model")
    processor = AutoProcessor.from_pretrained(folder)
    if fine_tuned:
        model = AutoModel.from_pretrained(folder, **loading)
    else:
        name = run.recipe.training["model_name_or_path"]
        model = MllmMsrForRecommendation.from_backbone(
            backbone_path(name),
            revision=run.recipe.training.get("model_revision"),
            processor=processor,
            dtype=run.recipe.training.get("dtype"),
        )
    model = model.to(PartialState().device)  # this process's own, of several
    settings = {name: value for name, value in run.recipe.evaluation.items() if name == "token_budget"}
    return Recommender(model, processor, **settings, **(ranking or {}))


def item_table(run: Run):
    from mllm_msr.data.catalogue import Catalogue
    from mllm_msr.data.hub_tables import load_table

    return Catalogue(load_table(str(run.folder), "items", "train"))


def with_evaluation(
    run: Run, baselines: str | None = None, full_catalogue: int | str | None = None, agreement: int | None = None
) -> Run:
    """The run with more to evaluate, kept in its ``config.yaml``: comma-separated baselines among its rows, users
    (or "all") ranked among the full catalogue, tasks on which ways of computing are compared."""
    wanted = [name.strip() for name in (baselines or "").split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in BASELINES]:
        raise ValueError(f"unknown baseline {unknown[0]!r}; known are {', '.join(BASELINES)}")
    rows = list(dict.fromkeys([*run.recipe.evaluation.get("rows", DEFAULT_ROWS), *wanted]))
    more = {"rows": rows, "full_catalogue": full_catalogue, "agreement": agreement}
    evaluation = run.recipe.evaluation | {name: value for name, value in more.items() if value is not None}
    if evaluation == {"rows": rows, **run.recipe.evaluation}:
        return run
    return Run.create(run.folder, replace(run.recipe, evaluation=evaluation))


def evaluate(run: Run) -> None:
    """Score the frozen tasks with every row of the table, and compute the metrics."""
    from mllm_msr.hub_cards.evidence import against_lines, catalogue_lines
    from mllm_msr.hub_cards.results import results_table

    options = run.recipe.evaluation
    rows = list(options.get("rows", DEFAULT_ROWS))
    if unknown := [row for row in rows if row not in KNOWN_ROWS]:
        raise ValueError(f"unknown row {unknown[0]!r} in evaluation.rows; known are {list(KNOWN_ROWS)}")
    settings = {name: value for name, value in options.items() if name not in MORE}
    keys = {"data": data_key(run)}
    if set(rows) & set(MODEL_ROWS):
        read = [run.key("train"), file_digest(run.folder / "summaries/preferences.parquet")]
        keys["model"] = digest(*read, settings)

    def work(key: str) -> None:
        frames, among_all = {}, {}
        for row in rows:
            folder = run.folder / "scores" / keys["model" if row in MODEL_ROWS else "data"]
            scorer = cache(partial(row_scorer, run, row))  # fitted once, and only if there is something to score
            frame = kept(folder / f"{row}.parquet", score_tasks, run, row, scorer)
            frames[row] = frame.select(pl.lit(row).alias("row"), pl.all())
            count = options.get("full_catalogue")
            if count and (row not in MODEL_ROWS or (row == OURS and affordable(run, count))):
                path = folder / f"{row}.catalogue-{count}.parquet"
                among_all[row] = kept(path, catalogue_places, run, row, scorer)
        scores = pl.concat(frames.values())
        metrics = measure(run, frames, scores)
        if among_all:
            metrics["full_catalogue"] = measure_catalogue(frames, among_all)
        if (count := options.get("agreement")) and OURS in rows:
            path = run.folder / "scores" / keys["model"] / f"agreement-{count}.parquet"
            metrics["agreement"] = measure_agreement(kept(path, scored_in_every_way, run, count))
        write_parquet(scores, run.folder / "scores.parquet")
        write_text(run.folder / "metrics.json", json.dumps(metrics, indent=2))
        for stale in (run.folder / "scores").iterdir():
            if stale.name not in keys.values():
                shutil.rmtree(stale)

    run.stage("evaluate", [*keys.values(), options], run.folder / "metrics.json", work)
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    print(*filter(None, (results_table(metrics), against_lines(metrics), catalogue_lines(metrics))), sep="\n")


def data_key(run: Run) -> str:
    """The folder under ``scores`` of the rows that no model of ours has a part in."""
    options = {name: value for name, value in run.recipe.evaluation.items() if name not in MORE}
    return digest(run.key("prepare"), options)


def kept(path: Path, make: Callable[..., pl.DataFrame], *arguments: Any) -> pl.DataFrame:
    """What ``path`` holds; made and written first if it is not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(make(*arguments), path)
    return pl.read_parquet(path)


def score_tasks(run: Run, row: str, scorer: Callable[[], Scorer]) -> pl.DataFrame:
    """``user_id``, ``item_id``, ``label``, ``logit``, ``score`` of every candidate under one row."""
    return scorer()(row_tasks(run, row))


def row_tasks(run: Run, row: str) -> pl.DataFrame:
    """The tasks that are evaluated; for a row that reads them, with preferences and recent items."""
    split = run.recipe.evaluation.get("split", "test")
    return run.contexts(split) if row in MODEL_ROWS else run.tasks(split)


def row_scorer(run: Run, row: str) -> Scorer:
    """What scores tasks under one row, trained or loaded."""
    from mllm_msr.evaluation import scoring as evaluation

    seed = run.recipe.evaluation.get("seed", 0)
    if row not in MODEL_ROWS:
        rank = baseline(run, row, seed)
        return lambda tasks: evaluation.score_with_values(tasks, rank(tasks))
    items = evaluation.ShuffledImages(item_table(run), seed) if row == "shuffled_images" else item_table(run)
    view = {"text_only": evaluation.without_image, "blank_images": evaluation.with_blank_image}.get(
        row, evaluation.as_it_is
    )
    told = {
        "no_preference": evaluation.without_preference,
        "other_user": lambda contexts: evaluation.of_another_user(contexts, seed),
    }.get(row, evaluation.as_it_is)
    model = recommender(run, fine_tuned=row != "no_sft")
    return lambda contexts: evaluation.score_with_model(model, told(contexts), items, view, row)


def baseline(run: Run, row: str, seed: int):
    """The ranker of a row that is no language model: tasks to the (N,) values of their candidates."""
    from mllm_msr.evaluation import baselines, sequential_baselines
    from mllm_msr.evaluation import scoring as evaluation

    popularity = pl.read_parquet(run.folder / "data/popularity.parquet")
    if row == "popularity":
        return lambda tasks: evaluation.popularity_values(tasks, popularity)
    if row == "random":
        rng = np.random.default_rng(seed)
        return lambda tasks: evaluation.random_values(tasks, rng)
    if row == "oracle":
        if run.recipe.source["type"] != "demo":
            raise ValueError("the row 'oracle' needs a drawn world: only the demo has one")
        from mllm_msr.data.sources.demo import true_utilities

        return lambda tasks: true_utilities(run.recipe.source, evaluation.pairs(tasks))
    validation = run.tasks("validation")
    items = pl.read_parquet(run.folder / "data/items.parquet", columns=["item_id", "title", "text"])
    if row == "tfidf":
        return baselines.tfidf(validation, items)
    protocol = json.loads((run.folder / "data/report.json").read_text(encoding="utf-8"))["protocol"]["name"]
    interactions = pl.read_parquet(run.folder / "data/interactions.parquet")
    training = baselines.training_interactions(interactions, run.tasks("train"), protocol, popularity)
    match row:
        case "knn":
            return baselines.knn(validation, items, training)
        case "svd":
            return baselines.svd(validation, items, training, seed=seed)
        case _:
            kind = sequential_baselines.SASRec if row == "sasrec" else sequential_baselines.GRU4Rec
            return sequential_baselines.sequence_ranker(kind, validation, items, training, seed=seed)


def affordable(run: Run, count: int | str) -> bool:
    """Whether our model is to rank the choices of so many users among all items."""
    users = run.tasks(run.recipe.evaluation.get("split", "test")).height
    items = pl.scan_parquet(run.folder / "data/items.parquet").select(pl.len()).collect().item()
    pairs = (users if count == "all" else min(int(count), users)) * items
    if pairs > (most := run.recipe.evaluation.get("full_catalogue_pairs", FULL_CATALOGUE_PAIRS)):
        print(f"  {OURS} is not ranked among all items: {pairs:,} pairs, evaluation.full_catalogue_pairs is {most:,}")
        return False
    return True


def catalogue_places(run: Run, row: str, scorer: Callable[[], Scorer]) -> pl.DataFrame:
    """Where the targets of some users stand among all items that these users have never chosen."""
    from mllm_msr.evaluation import scoring as evaluation

    options, data = run.recipe.evaluation, run.folder / "data"
    count = None if options["full_catalogue"] == "all" else int(options["full_catalogue"])
    tasks = evaluation.some_tasks(row_tasks(run, row), count, options.get("seed", 0))
    logs = [data / "interactions.parquet", data / "seen.parquet"]  # what max_history has cut was chosen, too
    if run.recipe.data.get("max_history") and not logs[1].is_file():
        raise FileNotFoundError(f"{logs[1]} is missing: remove {data} and run `mllm-msr prepare` again")
    seen = pl.concat([pl.read_parquet(path, columns=["user_id", "item_id"]) for path in logs if path.is_file()])
    catalogue = pl.read_parquet(data / "items.parquet", columns=["item_id"])["item_id"]
    parts = evaluation.over_the_catalogue(tasks, catalogue, seen)
    return pl.concat([evaluation.places(scorer()(part)) for part in parts])


def measure_catalogue(frames: dict[str, pl.DataFrame], among_all: dict[str, pl.DataFrame]) -> dict[str, Any]:
    """``{"n_users", "n_candidates", "rows": {ROW: {"sampled", "full"}}}``: the same users' metrics among sampled
    candidates and among all items."""
    from mllm_msr.evaluation.metrics import place_metrics, ranking_metrics

    rows = {}
    for row, found in among_all.items():
        own = frames[row].join(found.select("user_id"), on="user_id", how="semi", maintain_order="left")
        sampled = ranking_metrics(own["user_id"], own["label"], own["logit"])
        full = place_metrics(found["above"], found["equal"], found["candidates"])
        rows[row] = {"sampled": {name: sampled[name] for name in full}, "full": full}
    sizes = next(iter(among_all.values()))["candidates"].to_numpy()
    return {"n_users": len(sizes), "n_candidates": round(float(sizes.mean()), 1), "rows": rows}


def scored_in_every_way(run: Run, count: int) -> pl.DataFrame:
    """``way``, ``user_id``, ``item_id``, ``logit`` of some tasks by ours: as evaluated first, then computed in other
    number formats, by another attention, without sharing prefixes, and a pair at a time."""
    from mllm_msr.evaluation import scoring as evaluation

    tasks = evaluation.some_tasks(row_tasks(run, OURS), count, run.recipe.evaluation.get("seed", 0))
    items = item_table(run)

    frames = []
    late = json.loads((run.folder / "model/config.json").read_text(encoding="utf-8")).get("interaction") == "late"
    for way, settings in {"": {}, **WAYS}.items():
        if late and "share_prefix" in settings.get("ranking", {}):
            continue  # there is no other way to compute it
        model = recommender(run, **settings)
        dtype, attention = str(model.model.dtype).removeprefix("torch."), model.model.config._attn_implementation
        scores = evaluation.score_with_model(model, tasks, items, name=way or "as evaluated")
        way = way or f"{dtype}, {attention} attention"
        frames.append(scores.select(pl.lit(way).alias("way"), "user_id", "item_id", "logit"))
    return pl.concat(frames)


def measure_agreement(scores: pl.DataFrame) -> dict[str, Any]:
    """``{"n_users", "way", "others": {WAY: agreement}}`` with the first way of :func:`scored_in_every_way`."""
    from mllm_msr.evaluation.diagnostics import agreement

    (way, first), *others = [(str(way), frame) for (way,), frame in scores.group_by("way", maintain_order=True)]
    return {
        "n_users": first["user_id"].n_unique(),
        "way": way,
        "others": {other: agreement(first["user_id"], first["logit"], frame["logit"]) for other, frame in others},
    }


def measure(run: Run, frames: dict[str, pl.DataFrame], scores: pl.DataFrame) -> dict[str, Any]:
    """The content of ``metrics.json``: every row's metrics, ours against each, slices, calibration, checks."""
    from mllm_msr.evaluation import diagnostics
    from mllm_msr.evaluation.metrics import paired_differences, ranking_metrics

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
    if told := run.recipe.evaluation.get("model_of"):
        metrics["model_of"] = told
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

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

from mllm_msr.processing.examples import run_contexts
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, ITEMS, POPULARITY, SCORES
from mllm_msr.records.sections import DemoSource
from mllm_msr.records.storage import digest, write_parquet, write_text
from mllm_msr.records.variants import OURS, VARIANTS
from mllm_msr.records.variants import baselines as known_baselines

WAYS: dict[str, dict[str, Any]] = {  # in which the same scores should come out
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "prefixes not shared": {"ranking": {"share_prefix": False}},
    "eager attention, not shared": {"attn_implementation": "eager", "ranking": {"share_prefix": False}},
    "one pair at a time": {"ranking": {"token_budget": 1}},
}
Scorer = Callable[[pl.DataFrame], pl.DataFrame]  # tasks to ``user_id``, ``item_id``, ``label``, ``logit``, ``score``


def recommender(run: RunFolder, fine_tuned: bool = True, ranking: Mapping[str, Any] | None = None, **loading: Any):
    """The run's model ready to rank; without fine-tuning, its backbone under the same prompts.

    ``ranking``: settings of ``Recommender`` over the recipe's; ``loading``: of the trained model's ``from_pretrained``.
    """
    from accelerate import PartialState
    from transformers import AutoModel, AutoProcessor

    from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
    from mllm_msr.modeling.ranking import Recommender

    folder = str(run.model)
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
    return Recommender(model, processor, token_budget=run.recipe.evaluation.token_budget, **(ranking or {}))


def item_table(run: RunFolder):
    from mllm_msr.data.catalogue import Catalogue
    from mllm_msr.data.hub_tables import load_table

    return Catalogue(load_table(str(run.path), "items", "train"))


def with_evaluation(
    run: RunFolder, baselines: str | None = None, full_catalogue: int | str | None = None, agreement: int | None = None
) -> RunFolder:
    """The run with more to evaluate, kept in its ``config.yaml``: comma-separated baselines among its rows, users
    (or "all") ranked among the full catalogue, tasks on which ways of computing are compared."""
    wanted = [name.strip() for name in (baselines or "").split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in known_baselines()]:
        raise ValueError(f"unknown baseline {unknown[0]!r}; known are {', '.join(known_baselines())}")
    rows = list(dict.fromkeys([*run.recipe.evaluation.rows, *wanted]))
    more = {"rows": rows, "full_catalogue": full_catalogue, "agreement": agreement}
    evaluation = replace(run.recipe.evaluation, **{name: value for name, value in more.items() if value is not None})
    if evaluation == run.recipe.evaluation:
        return run
    return RunFolder.create(run.path, replace(run.recipe, evaluation=evaluation))


def evaluate(run: RunFolder) -> None:
    """Score the frozen tasks with every row of the table, and compute the metrics."""
    from mllm_msr.hub_cards.evidence import against_lines, catalogue_lines
    from mllm_msr.hub_cards.results import results_table

    options = run.recipe.evaluation
    rows = options.rows
    keys = {"data": data_key(run)}
    after = ["prepare"]
    if any(VARIANTS[row].needs_model for row in rows):
        after += ["summarize users", "train"]
        keys["model"] = digest(*map(run.key, after), options.facts())

    def work(key: str) -> None:
        frames, among_all = {}, {}
        for row in rows:
            folder = run.scores / keys["model" if VARIANTS[row].needs_model else "data"]
            scorer = cache(partial(row_scorer, run, row))  # fitted once, and only if there is something to score
            frame = kept(folder / f"{row}.parquet", score_tasks, run, row, scorer)
            frames[row] = frame.select(pl.lit(row).alias("variant"), pl.all())
            count = options.full_catalogue
            if count and (not VARIANTS[row].needs_model or (row == OURS and affordable(run, count))):
                path = folder / f"{row}.catalogue-{count}.parquet"
                among_all[row] = kept(path, catalogue_places, run, row, scorer)
        scores = pl.concat(frames.values())
        metrics = measure(run, frames, scores)
        if among_all:
            metrics["full_catalogue"] = measure_catalogue(frames, among_all)
        if (count := options.agreement) and OURS in rows:
            path = run.scores / keys["model"] / f"agreement-{count}.parquet"
            metrics["agreement"] = measure_agreement(kept(path, scored_in_every_way, run, count))
        run.write(SCORES, scores)
        write_text(run.metrics, json.dumps(metrics, indent=2))
        for stale in (run.scores).iterdir():
            if stale.name not in keys.values():
                shutil.rmtree(stale)

    run.stage("evaluate", work, writes=[run.metrics, run.file(SCORES)], after=after)
    metrics = json.loads(run.metrics.read_text(encoding="utf-8"))
    print(*filter(None, (results_table(metrics), against_lines(metrics), catalogue_lines(metrics))), sep="\n")


def data_key(run: RunFolder) -> str:
    """The folder under ``scores`` of the rows that no model of ours has a part in."""
    return digest(run.key("prepare"), run.recipe.evaluation.facts())


def kept(path: Path, make: Callable[..., pl.DataFrame], *arguments: Any) -> pl.DataFrame:
    """What ``path`` holds; made and written first if it is not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(make(*arguments), path)
    return pl.read_parquet(path)


def score_tasks(run: RunFolder, row: str, scorer: Callable[[], Scorer]) -> pl.DataFrame:
    """``user_id``, ``item_id``, ``label``, ``logit``, ``score`` of every candidate under one row."""
    return scorer()(row_tasks(run, row))


def row_tasks(run: RunFolder, row: str) -> pl.DataFrame:
    """The tasks that are evaluated; for a row that reads them, with preferences and recent items."""
    split = run.recipe.evaluation.split
    return run_contexts(run, split) if VARIANTS[row].needs_model else run.tasks(split)


def row_scorer(run: RunFolder, row: str) -> Scorer:
    """What scores tasks under one row, trained or loaded."""
    from mllm_msr.evaluation import scoring as evaluation

    seed = run.recipe.evaluation.seed
    if not VARIANTS[row].needs_model:
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


def baseline(run: RunFolder, row: str, seed: int):
    """The ranker of a row that is no language model: tasks to the (N,) values of their candidates."""
    from mllm_msr.evaluation import baselines, sequential_baselines
    from mllm_msr.evaluation import scoring as evaluation

    popularity = run.read(POPULARITY)
    if row == "popularity":
        return lambda tasks: evaluation.popularity_values(tasks, popularity)
    if row == "random":
        rng = np.random.default_rng(seed)
        return lambda tasks: evaluation.random_values(tasks, rng)
    if row == "oracle":
        source = run.recipe.source
        if not isinstance(source, DemoSource):
            raise ValueError("the row 'oracle' needs a drawn world: only the demo has one")
        from mllm_msr.data.sources.demo import true_utilities

        return lambda tasks: true_utilities(source, evaluation.pairs(tasks))
    validation = run.tasks("validation")
    items = run.read(ITEMS, ["item_id", "title", "text"])
    if row == "tfidf":
        return baselines.tfidf(validation, items)
    protocol = json.loads(run.data_report.read_text(encoding="utf-8"))["protocol"]["name"]
    interactions = run.read(INTERACTIONS)
    training = baselines.training_interactions(interactions, run.tasks("train"), protocol, popularity)
    match row:
        case "knn":
            return baselines.knn(validation, items, training)
        case "svd":
            return baselines.svd(validation, items, training, seed=seed)
        case _:
            kind = sequential_baselines.SASRec if row == "sasrec" else sequential_baselines.GRU4Rec
            return sequential_baselines.sequence_ranker(kind, validation, items, training, seed=seed)


def affordable(run: RunFolder, count: int | str) -> bool:
    """Whether our model is to rank the choices of so many users among all items."""
    users = run.tasks(run.recipe.evaluation.split).height
    items = run.scan(ITEMS).select(pl.len()).collect().item()
    pairs = (users if count == "all" else min(int(count), users)) * items
    if pairs > (most := run.recipe.evaluation.full_catalogue_pairs):
        print(f"  {OURS} is not ranked among all items: {pairs:,} pairs, evaluation.full_catalogue_pairs is {most:,}")
        return False
    return True


def catalogue_places(run: RunFolder, row: str, scorer: Callable[[], Scorer]) -> pl.DataFrame:
    """Where the targets of some users stand among all items that these users have never chosen."""
    from mllm_msr.evaluation import scoring as evaluation

    options = run.recipe.evaluation
    count = None if options.full_catalogue == "all" else options.full_catalogue
    tasks = evaluation.some_tasks(row_tasks(run, row), count, options.seed)
    pairs = ["user_id", "item_id"]
    chosen = [run.read(INTERACTIONS, pairs)]
    if run.recipe.data.max_history is not None:  # what it has cut was chosen, too
        chosen.append(run.read(CUT_INTERACTIONS, pairs))
    seen = pl.concat(chosen)
    catalogue = run.read(ITEMS, ["item_id"])["item_id"]
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


def scored_in_every_way(run: RunFolder, count: int) -> pl.DataFrame:
    """``way``, ``user_id``, ``item_id``, ``logit`` of some tasks by ours: as evaluated first, then computed in other
    number formats, by another attention, without sharing prefixes, and a pair at a time."""
    from mllm_msr.evaluation import scoring as evaluation

    tasks = evaluation.some_tasks(row_tasks(run, OURS), count, run.recipe.evaluation.seed)
    items = item_table(run)

    frames = []
    late = json.loads((run.model / "config.json").read_text(encoding="utf-8")).get("interaction") == "late"
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


def measure(run: RunFolder, frames: dict[str, pl.DataFrame], scores: pl.DataFrame) -> dict[str, Any]:
    """The content of ``metrics.json``: every row's metrics, ours against each, slices, calibration, checks."""
    from mllm_msr.evaluation import diagnostics
    from mllm_msr.evaluation.metrics import paired_differences, ranking_metrics

    split = run.recipe.evaluation.split
    protocol = json.loads(run.data_report.read_text(encoding="utf-8"))["protocol"]
    tasks = run.tasks(split)
    popularity = run.read(POPULARITY)
    first = next(iter(frames.values()))
    users, labels = first["user_id"].to_numpy(), first["label"].to_numpy()
    for row, frame in frames.items():
        if not frame.select("user_id", "item_id").equals(first.select("user_id", "item_id")):
            raise ValueError(f"row {row!r} was scored on other candidates: remove {run.scores} and go on")
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
    if told := run.recipe.evaluation.model_of:
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

"""The stages of a run, from raw data to a Hub-ready folder. Each can be done alone; see :mod:`mllm_msr.run`."""

import argparse
import json
import shutil
from dataclasses import asdict
from typing import Any

import polars as pl

from mllm_msr.processing.recipe import Recipe, backbone_path
from mllm_msr.processing.storage import whole_folder, write_parquet, write_text
from mllm_msr.run import Run
from mllm_msr.sources import read_source, source_fingerprint


def run_all(run: Run) -> None:
    """Every stage in order."""
    for stage in (prepare, summarize_items, summarize_users, train, evaluate, report):
        stage(run)


def prepare(run: Run) -> None:
    """Stage 0: raw logs, texts and images to interactions, items and frozen ranking tasks."""
    from mllm_msr.processing.prepare import PrepareOptions, statistics_table
    from mllm_msr.processing.prepare import prepare as write_data

    options = PrepareOptions(**run.recipe.data)

    def work(key: str) -> None:
        with whole_folder(run.folder / "data") as folder:
            report = write_data(read_source(run.recipe), folder, options, source=run.recipe.name)
        print(statistics_table(report))

    run.stage("prepare", [source_fingerprint(run.recipe.source), asdict(options)], run.folder / "data", work)


def build_engine(recipe: Recipe):
    """The engine of the recipe's ``summaries`` section."""
    from mllm_msr.processing.engines import ExtractiveEngine, TransformersEngine
    from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

    options = recipe.summaries
    kind = options.get("engine", "transformers")
    if kind == "extractive":
        return ExtractiveEngine()
    if kind != "transformers":
        raise ValueError(f"unknown engine {kind!r}; known are transformers, extractive")
    name = backbone_path(options["model"])
    processor = MllmMsrProcessor.from_backbone(
        name, revision=options.get("revision"), prompts=recipe.prompts or None, item_noun=recipe.item_noun
    )
    return TransformersEngine(
        name,
        processor,
        label=options["model"],
        revision=options.get("revision"),
        batch_size=options.get("batch_size", 16),
        max_new_tokens=options.get("max_new_tokens"),
    )


def summarize_items(run: Run) -> None:
    """Stage 1: a short text for each item's picture and words."""
    from mllm_msr.processing import summaries

    def work(key: str) -> None:
        store = summaries.TextStore(run.folder / "cache/item_summary")
        frame = summaries.summarize_items(run.items(), build_engine(run.recipe), store)
        (run.folder / "summaries").mkdir(exist_ok=True)
        write_parquet(frame, run.folder / "summaries/items.parquet")
        print_status(frame)

    run.stage(
        "summarize items", [run.key("prepare"), *summary_facts(run)], run.folder / "summaries/items.parquet", work
    )


def summarize_users(run: Run) -> None:
    """Stage 2: each user's preference, updated block by block; and the training examples that rest on it."""
    from mllm_msr.processing import summaries
    from mllm_msr.processing.examples import training_examples
    from mllm_msr.processing.leakage import check_leakage

    def work(key: str) -> None:
        items, tasks = run.items(), run.tasks("train", "validation", "test")
        interactions = pl.read_parquet(run.folder / "data/interactions.parquet")
        texts = pl.read_parquet(run.folder / "summaries/items.parquet")
        frame = summaries.summarize_users(
            before_targets(interactions, tasks),
            dict(items.select("item_id", "title").iter_rows()),
            dict(texts.select("item_id", "summary").iter_rows()),
            build_engine(run.recipe),
            summaries.TextStore(run.folder / "cache/preference"),
            run.block_size,
        )
        write_parquet(frame, run.folder / "summaries/preferences.parquet")
        check_leakage(tasks, interactions, preferences=frame)
        print_status(frame)
        with whole_folder(run.folder / "sft") as folder:
            for split in ("train", "validation"):
                write_parquet(training_examples(run.contexts(split), items), folder / f"{split}.parquet")

    run.stage(
        "summarize users", [run.key("summarize items"), *summary_facts(run)], run.folder / "sft/train.parquet", work
    )


def before_targets(interactions: pl.DataFrame, tasks: pl.DataFrame) -> pl.DataFrame:
    """The interactions a preference may read: a user's longest task history; all of a user who has no task."""
    longest = tasks.group_by("user_id").agg(pl.col("history_length").max())
    place = pl.int_range(pl.len()).over("user_id")
    kept = interactions.join(longest, on="user_id", how="left", maintain_order="left").filter(
        pl.col("history_length").is_null() | (place < pl.col("history_length"))
    )
    return kept.drop("history_length")


def summary_facts(run: Run) -> list[Any]:
    return [run.recipe.summaries, run.recipe.prompts, run.recipe.item_noun]


def print_status(frame: pl.DataFrame) -> None:
    counts = frame["status"].str.replace(":.*", "").value_counts(sort=True).iter_rows()
    print("  " + ", ".join(f"{count} {status}" for status, count in counts))


def train(run: Run) -> None:
    """Stage 3: fine-tune the recommender; the model folder is what would be pushed."""
    from mllm_msr.training import sft

    def work(key: str) -> None:
        checkpoints = run.folder / "training" / key  # other settings never resume from these
        flags = {
            **run.recipe.training_flags(),
            "dataset_name": str(run.folder),
            "output_dir": str(checkpoints),
        }
        trainer = sft.main(*sft.parse([], **flags))
        with whole_folder(run.folder / "model") as folder:
            sft.save_recommender(trainer, folder)
            write_text(folder / "log_history.json", json.dumps(trainer.state.log_history, indent=1))
        for stale in (run.folder / "training").iterdir():
            shutil.rmtree(stale)

    run.stage("train", [run.key("summarize users"), run.recipe.training_flags()], run.folder / "model", work)


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


def evaluate(run: Run) -> None:
    """Stage 4: score the frozen tasks with every row of the table, and compute the metrics."""
    from mllm_msr.hub_cards.results import results_table
    from mllm_msr.training import evaluation
    from mllm_msr.training.metrics import ranking_metrics

    options = run.recipe.evaluation
    split, seed = options.get("split", "test"), options.get("seed", 0)
    rows = options.get("rows", ["mllm_msr", "popularity", "random", "text_only", "blank_images", "no_sft"])
    views = {
        "mllm_msr": evaluation.as_it_is,
        "text_only": evaluation.without_image,
        "blank_images": evaluation.with_blank_image,
        "no_sft": evaluation.as_it_is,
    }

    def score(row: str) -> pl.DataFrame:
        contexts = run.contexts(split)
        if row in views:
            return evaluation.score_with_model(
                recommender(run, fine_tuned=row != "no_sft"), contexts, item_table(run), views[row], row
            )
        if row == "popularity":
            counts = pl.read_parquet(run.folder / "data/popularity.parquet")
            return evaluation.score_with_values(contexts, evaluation.popularity_values(contexts, counts))
        if row == "random":
            return evaluation.score_with_values(contexts, evaluation.random_values(contexts, seed))
        if row == "oracle" and run.recipe.source["type"] == "demo":
            from mllm_msr.demo.source import true_utilities

            values = true_utilities(run.recipe.source, evaluation.pairs(contexts))
            return evaluation.score_with_values(contexts, values)
        raise ValueError(
            f"unknown row {row!r} in evaluation.rows; known are {[*views, 'popularity', 'random', 'oracle']}"
        )

    def work(key: str) -> None:
        folder = run.folder / "scores" / key
        folder.mkdir(parents=True, exist_ok=True)
        frames = []
        for row in rows:
            if not (folder / f"{row}.parquet").is_file():
                write_parquet(score(row), folder / f"{row}.parquet")
            frames.append(pl.read_parquet(folder / f"{row}.parquet").select(pl.lit(row).alias("row"), pl.all()))
        write_parquet(pl.concat(frames), run.folder / "scores.parquet")
        protocol = json.loads((run.folder / "data/report.json").read_text(encoding="utf-8"))["protocol"]
        metrics = {
            "dataset": run.recipe.name,
            "protocol": protocol["name"],
            "split": split,
            "n_users": frames[0]["user_id"].n_unique(),
            "n_candidates": max(run.tasks(split)["candidates"].list.len()),
            "seed": protocol["seed"],
            "candidate_hash": protocol["candidate_hash"],
            "rows": {
                row: ranking_metrics(frame["user_id"].to_numpy(), frame["label"].to_numpy(), frame["logit"].to_numpy())
                for row, frame in zip(rows, frames, strict=True)
            },
        }
        write_text(run.folder / "metrics.json", json.dumps(metrics, indent=2))
        for stale in (run.folder / "scores").iterdir():
            if stale != folder:
                shutil.rmtree(stale)

    run.stage("evaluate", [run.key("train"), options], run.folder / "metrics.json", work)
    print(results_table(json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))))


def report(run: Run) -> None:
    """Stage 5: the report a person reads, and the folders the Hub would get."""
    from mllm_msr.hub_cards.publishing import build_hub
    from mllm_msr.hub_cards.report import write_report

    def work(key: str) -> None:
        build_hub(run.folder)
        write_report(run.folder)

    run.stage("report", [run.key("evaluate"), run.provenance()["stages"]["evaluate"]], run.folder / "report.html", work)


def rank(options: argparse.Namespace) -> None:
    """Print the best candidates for one user of a run, or for a preference in words."""
    run = Run.open(options.run)
    items = item_table(run)
    seen: set[str] = set()
    user: dict[str, Any] = {"preference": options.preference or "", "recent": []}
    if options.user:
        interactions = pl.read_parquet(run.folder / "data/interactions.parquet").filter(user_id=options.user)
        if interactions.is_empty():
            raise ValueError(f"user {options.user!r} has no interactions in {run.folder}")
        history = interactions["item_id"].to_list()
        steps = pl.read_parquet(run.folder / "summaries/preferences.parquet").filter(user_id=options.user).sort("step")
        summaries = dict(
            pl.read_parquet(run.folder / "summaries/items.parquet").select("item_id", "summary").iter_rows()
        )
        recent = history[steps.height * run.block_size :]
        user = {
            "preference": steps["preference"][-1] if steps.height else "",
            "recent": [{"summary": summaries[item]} for item in recent],
        }
        seen = set(history)
    wanted = options.items.split(",") if options.items else [item for item in items.index if item not in seen]
    candidates = [{"item_id": item, **items[item]} for item in wanted]
    (best,) = recommender(run).rank([user], candidates, options.top_k, progress="ranking")
    print(f"preference: {user['preference'] or '(none)'}")
    for place, candidate in enumerate(best, 1):
        print(f"{place:3d}  {candidate['score']:.3f}  {candidate['item_id']}  {candidate['title']}")


def publish(options: argparse.Namespace) -> None:
    """Show what a release would push."""
    from mllm_msr.hub_cards import publishing

    Run.open(options.run).key("report")
    publishing.publish(options.run, options.namespace, dry_run=options.dry_run)

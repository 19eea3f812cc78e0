"""The stages of a run, from raw data to a Hub-ready folder. Each can be done alone; see :mod:`mllm_msr.records.run`."""

import argparse
import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.data.sources.registry import read_source, source_fingerprint
from mllm_msr.evaluation.evaluate import evaluate
from mllm_msr.proof import check_templates, prove
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.run import Run
from mllm_msr.records.storage import file_digest, folder_digest, whole_folder, write_parquet, write_text


def run_all(run: Run) -> None:
    """Every stage in order."""
    for stage in (prepare, summarize_items, summarize_users, train, evaluate, report):
        stage(run)


def prepare(run: Run) -> None:
    """Stage 0: raw logs, texts and images to interactions, items and frozen ranking tasks."""
    from mllm_msr.data.prepare import PrepareOptions, statistics_table
    from mllm_msr.data.prepare import prepare as write_data

    options = PrepareOptions(**run.recipe.data)
    check_templates(run.recipe.prompts)

    def work(key: str) -> None:
        with whole_folder(run.folder / "data") as folder:
            report = write_data(read_source(run.recipe), folder, options, source=run.recipe.name, inputs=tables)
        print(statistics_table(report))

    facts = source_fingerprint(run.recipe.source)
    tables = [one for one in facts[1:] if isinstance(one, str) or isinstance(one[1], str)]  # not each picture
    run.stage("prepare", [facts, asdict(options)], run.folder / "data", work)


def summary_options(run: Run):
    """The recipe's ``summaries`` section."""
    from mllm_msr.processing.engines import SummaryOptions

    return SummaryOptions.from_recipe(run.recipe.summaries)


def summary_tools(run: Run, name: str):
    """Options, engine and store for the texts called ``name``."""
    from mllm_msr.processing.engines import build_engine
    from mllm_msr.processing.text_store import TextStore

    options = summary_options(run)
    store = TextStore(Path(options.cache or run.folder / "cache") / name)
    return build_engine(options, run.recipe.prompts, run.recipe.item_noun), store, options


def summarize_items(run: Run) -> None:
    """Stage 1: a short text for each item's picture and words."""
    from mllm_msr.processing import summaries

    output = run.folder / "summaries/items.parquet"

    def work(key: str) -> None:
        frame = summaries.summarize_items(run.items(), *summary_tools(run, "item_summary"))
        output.parent.mkdir(exist_ok=True)
        write_parquet(frame, output)
        print_status(frame, "item_id")

    forget_failures(output)
    run.stage("summarize items", [run.key("prepare"), *summary_facts(run)], output, work)


def summarize_users(run: Run) -> None:
    """Stage 2: each user's preference, updated block by block; and the training examples that rest on it."""
    from mllm_msr.processing import summaries
    from mllm_msr.processing.examples import training_examples
    from mllm_msr.processing.prompts import PROMPTS

    output = run.folder / "summaries/preferences.parquet"

    def work(key: str) -> None:
        items, tasks = run.items(), run.tasks("train", "validation", "test")
        interactions = pl.read_parquet(run.folder / "data/interactions.parquet")
        texts = pl.read_parquet(run.folder / "summaries/items.parquet")
        frame = summaries.summarize_users(
            before_targets(interactions, tasks),
            dict(items.select("item_id", "title").iter_rows()),
            dict(texts.select("item_id", "summary").iter_rows()),
            *summary_tools(run, "preference"),
        )
        write_parquet(frame, output)
        print_status(frame, "user_id", "step")
        prompt = {**PROMPTS, **run.recipe.prompts}["recommendation"]
        with whole_folder(run.folder / "sft") as folder:
            for split in ("train", "validation"):
                examples = training_examples(run.contexts(split), items, prompt, run.recipe.item_noun)
                write_parquet(examples, folder / f"{split}.parquet")
            prove(run, folder)

    forget_failures(output, run.folder / "sft/train.parquet")
    read = [run.key("summarize items"), file_digest(run.folder / "summaries/items.parquet")]
    run.stage("summarize users", [*read, *summary_facts(run)], run.folder / "sft/train.parquet", work)


def before_targets(interactions: pl.DataFrame, tasks: pl.DataFrame) -> pl.DataFrame:
    """The interactions a preference may read: a user's longest task history; all of a user who has no task."""
    longest = tasks.group_by("user_id").agg(pl.col("history_length").max())
    place = pl.int_range(pl.len()).over("user_id")
    kept = interactions.join(longest, on="user_id", how="left", maintain_order="left").filter(
        pl.col("history_length").is_null() | (place < pl.col("history_length"))
    )
    return kept.drop("history_length")


def summary_facts(run: Run) -> list[Any]:
    """All that the texts depend on, the content of a local model included."""
    options = summary_options(run)
    model = Path(backbone_path(options.model))
    local = folder_digest(model) if options.model and model.is_dir() else None
    return [options.facts(), local, run.recipe.prompts, run.recipe.item_noun]


def forget_failures(output: Path, *followers: Path) -> None:
    """A stage some of whose texts have failed is not finished: what it wrote goes, so that they are tried again."""
    if output.is_file() and pl.read_parquet(output, columns=["status"])["status"].str.starts_with("failed").any():
        for path in (output, *followers):
            path.unlink(missing_ok=True)


def print_status(frame: pl.DataFrame, *ids: str) -> None:
    """How many texts have which status, and which are not ok."""
    counts = frame["status"].str.replace(":.*", "").value_counts(sort=True).iter_rows()
    print("  " + ", ".join(f"{count} {status}" for status, count in counts))
    bad = frame.filter(pl.col("status") != "ok").select(*ids, "status").rows()
    for *names, status in bad[:20]:
        print(f"    {' '.join(map(str, names))}: {status}")
    if bad[20:]:
        print(f"    and {len(bad) - 20} more, see the column `status`")
    if any(status.startswith("failed") for *_, status in bad):
        print("  run the same command again to try the failed ones again")


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
        arguments = sft.parse([], **flags)
        trainer = sft.train(*arguments)
        with whole_folder(run.folder / "model") as folder:
            sft.save_recommender(trainer, folder, arguments[0].merge_adapter)
            write_text(folder / "log_history.json", json.dumps(trainer.state.log_history, indent=1))
        for stale in (run.folder / "training").iterdir():
            shutil.rmtree(stale)

    read = [run.key("summarize users"), *map(file_digest, sorted((run.folder / "sft").glob("*.parquet")))]
    run.stage("train", [*read, run.recipe.training_flags()], run.folder / "model", work)


def report(run: Run) -> None:
    """Stage 5: the report a person reads, and the folders the Hub would get."""
    from mllm_msr.hub_cards.publishing import build_hub
    from mllm_msr.hub_cards.report import write_report
    from mllm_msr.hub_cards.results_page import write_results

    def work(key: str) -> None:
        build_hub(run.folder)
        write_results(run.folder)
        write_report(run.folder)

    run.stage("report", [run.key("evaluate"), run.provenance()["stages"]["evaluate"]], run.folder / "report.html", work)


def publish(options: argparse.Namespace) -> None:
    """Release the run on the Hub, or show what a release would send."""
    from mllm_msr.hub_cards import release

    run = Run.open(options.run)
    run.key("report")
    prove(run)
    flags = {"model": "model", "datasets": "dataset", "metric": "metric", "space": "space"}
    release.publish(
        options.run,
        options.namespace,
        dry_run=options.dry_run,
        parts=tuple(part for flag, part in flags.items() if getattr(options, flag)),
        collection=options.collection,
        public=options.public,
        create_pr=options.create_pr,
        tag=options.tag or f"v{version('mllm-msr')}",
        images=not options.without_images,
        anonymise=options.anonymise,
    )


def serve(folder: Path, port: int) -> None:
    """The demo Space on this machine, with the model and the data set of a run."""
    from mllm_msr.hub_cards.publishing import build_hub

    try:
        from mllm_msr.hub_cards import space_app
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed: `pip install 'mllm-msr[demo]'`") from error
    run = Run.open(folder)
    built = build_hub(folder)
    space_app.serve(
        str(built["model"]), str(built["dataset"]), None, run.recipe.item_noun, run.block_size, server_port=port
    )

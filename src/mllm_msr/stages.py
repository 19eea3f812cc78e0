"""The stages of a run, from raw data to a Hub-ready folder. Each can be done alone; see :mod:`mllm_msr.records.run`."""

import json
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from mllm_msr.data.sources.registry import read_source, source_fingerprint
from mllm_msr.evaluation.variants import VARIANTS, Variant
from mllm_msr.proof import prove
from mllm_msr.records.lock import check_one_process, is_first_process, write_lock
from mllm_msr.records.recipe import Recipe, backbone_path
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import (
    EXAMPLES,
    INTERACTIONS,
    ITEM_SUMMARIES,
    ITEM_VECTORS,
    ITEMS,
    PREFERENCES,
    TASKS,
    Table,
)
from mllm_msr.records.sections import SummaryOptions
from mllm_msr.records.stage_specs import STAGES
from mllm_msr.records.storage import folder_digest, whole_folder, write_text
from mllm_msr.samples import (
    fusion_samples,
    prompt_samples,
    score_samples,
    task_samples,
    training_samples,
    vector_samples,
)

if TYPE_CHECKING:
    from mllm_msr.hub_cards.release import PublishOptions

MORE_TASKS = "lower data.min_history, raise data.max_train_targets or bring more data, and prepare it again"


def run_all(run: RunFolder) -> None:
    """Every stage in order; what training would refuse stops the run before it begins."""
    check_models(run.recipe)
    check_training(run.recipe)
    with run.lock(f"mllm-msr run, in {run.path}"):
        for name in stages_of(run.recipe):
            FUNCTIONS[name](run)


def stages_of(recipe: Recipe) -> list[str]:
    """The stages of a recipe in their order; those of item vectors only where something reads them."""
    read = {stage for name in recipe.evaluation.rows for stage in VARIANTS[name].stages}
    return [name for name in STAGES if recipe.head.enabled or name not in ("vectors", "head") or name in read]


def prepare(run: RunFolder) -> None:
    """Stage 0: raw logs, texts and images to interactions, items and frozen ranking tasks."""
    from mllm_msr.data.prepare import prepare as write_data
    from mllm_msr.data.statistics import statistics_table
    from mllm_msr.data.vector_files import check_own_vectors
    from mllm_msr.evaluation.places import popularity_figures

    options, split = run.recipe.data, run.recipe.evaluation.split
    check_own_vectors(run.recipe.source, run.recipe.vectors)

    def work(key: str) -> None:
        raw = read_source(run.recipe.source, options.on_bad_rows)
        with whole_folder(run.data) as folder:
            report = write_data(raw, folder, options, run.recipe.name, popularity_figures, inputs=tables)
            if not report["protocol"][f"{split}_tasks"]:
                counts = [each for each in report["protocol"].items() if each[0].startswith("targets_") and each[1]]
                reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts)
                raise ValueError(
                    f"no {split} task is left ({reasons or 'no user has one'}): lower data.n_negatives, "
                    "data.min_history or the cores, or bring more data"
                )
        print(statistics_table(report), task_samples(run), sep="\n")

    facts = source_fingerprint(run.recipe.source)
    tables = [fact for fact in facts[1:] if isinstance(fact, str) or isinstance(fact[1], str)]  # not each image
    run.stage("prepare", work, writes=[run.data], facts=[facts, asdict(options)])


@contextmanager
def text_tools(run: RunFolder, name: str, options: SummaryOptions) -> Iterator[Any]:
    """Engine, store, options and workers for the texts called ``name``; no other process writes to the store then."""
    from mllm_msr.processing.engine_registry import open_text_workers
    from mllm_msr.processing.text_store import TextStore

    folder, prompts, noun = run.texts / name, run.recipe.prompts, run.recipe.item_noun
    folder.mkdir(parents=True, exist_ok=True)
    with (
        write_lock(folder, f"mllm-msr summarize, in {run.path}"),
        open_text_workers(options, prompts, noun, run.cluster) as (engine, workers),
    ):
        yield engine, TextStore(folder), options, workers


def summarize_items(run: RunFolder) -> None:
    """Stage 1: a short text for each item's image and words."""
    from mllm_msr.processing import summaries
    from mllm_msr.processing.text_report import text_report

    check_one_process("summarize items")
    options = run.recipe.summaries

    def work(key: str) -> None:
        with text_tools(run, "item_summary", options) as tools:
            frame = summaries.summarize_items(run.read(ITEMS), *tools)
        run.write(ITEM_SUMMARIES, frame)
        print(text_report(frame))

    with run.lock(f"mllm-msr summarize items {run.path}"):
        forget_failures(run, ITEM_SUMMARIES)
        facts = text_facts(run, "summarize items", options)
        run.stage("summarize items", work, writes=[run.file(ITEM_SUMMARIES)], facts=facts)


def summarize_users(run: RunFolder) -> None:
    """Stage 2: each user's preference, updated block by block; and the training examples that rest on it."""
    from mllm_msr.processing import summaries
    from mllm_msr.processing.examples import run_contexts, training_examples
    from mllm_msr.processing.prompts import PROMPTS
    from mllm_msr.processing.text_report import text_report

    check_one_process("summarize users")
    options = run.recipe.summaries.for_users()

    def work(key: str) -> None:
        items, tasks = run.read(ITEMS), run.tasks("train", "validation", "test")
        log, titles = before_targets(run.read(INTERACTIONS), tasks), dict(items.select("item_id", "title").iter_rows())
        texts = dict(run.read(ITEM_SUMMARIES, ["item_id", "summary"]).iter_rows())
        with text_tools(run, "preference", options) as tools:
            frame = summaries.summarize_users(log, titles, texts, *tools)
        run.write(PREFERENCES, frame)
        print(text_report(frame))
        prompt = {**PROMPTS, **run.recipe.prompts}["recommendation"]
        with whole_folder(run.examples) as folder:
            for split in ("train", "validation"):
                examples = training_examples(run_contexts(run, split), items, prompt, run.recipe.item_noun)
                EXAMPLES.write(examples, folder / f"{split}.parquet")
            prove(run, folder)
        print(prompt_samples(run))

    with run.lock(f"mllm-msr summarize users {run.path}"):
        forget_failures(run, PREFERENCES)
        writes, facts = [run.file(PREFERENCES), run.examples], text_facts(run, "summarize users", options)
        run.stage("summarize users", work, writes=writes, facts=facts)


def text_facts(run: RunFolder, stage: str, options: SummaryOptions) -> Sequence[Any]:
    """All that the texts depend on beside earlier stages, the content of a local model included."""
    model = Path(backbone_path(options.model))
    local = folder_digest(model) if options.model and model.is_dir() else None
    return [STAGES[stage].settings(run.recipe), local]


def before_targets(interactions: pl.DataFrame, tasks: pl.DataFrame) -> pl.DataFrame:
    """The interactions a preference may read: a user's longest task history; all of a user who has no task."""
    longest = tasks.group_by("user_id").agg(pl.col("history_length").max())
    place = pl.int_range(pl.len()).over("user_id")
    kept = interactions.join(longest, on="user_id", how="left", maintain_order="left").filter(
        pl.col("history_length").is_null() | (place < pl.col("history_length"))
    )
    return kept.drop("history_length")


def forget_failures(run: RunFolder, table: Table) -> None:
    """A stage some of whose texts have failed is not finished: what it wrote goes, so that they are tried again; and
    so does what is damaged."""
    if not run.has(table):
        return
    try:
        failed = run.read(table, ["status"])["status"].str.starts_with("failed").any()
    except ValueError:
        failed = True
    if failed:
        run.file(table).unlink()


def vectors(run: RunFolder) -> None:
    """What a language model makes of each item, for the sequence head: computed, or the user's own."""
    from mllm_msr.data.vector_files import own_vectors
    from mllm_msr.processing.vectors import item_model, open_vector_workers, vector_table

    check_one_process("vectors")
    recipe, writes = run.recipe, [run.file(ITEM_VECTORS)]

    def write(frame: pl.DataFrame) -> None:
        run.write(ITEM_VECTORS, frame)
        print(vector_samples(run))

    if recipe.vectors.own:
        frame = own_vectors(recipe.source, recipe.vectors, run.read(ITEMS, ["item_id"]))
        facts: list[Any] = [STAGES["vectors"].settings(recipe), frame["key"].to_list()]
        run.stage("vectors", lambda key: write(frame), writes=writes, facts=facts)
        return
    model = Path(item_model(recipe)[0])
    facts = [STAGES["vectors"].settings(recipe), folder_digest(model) if model.is_dir() else None]

    def work(key: str) -> None:
        summaries: dict[str, str] = {}
        if recipe.vectors_read_summaries:
            summaries = dict(run.read(ITEM_SUMMARIES, ["item_id", "summary"]).iter_rows())
        with open_vector_workers(recipe, run.cluster) as workers:
            sizes = recipe.vectors.batch_size, recipe.vectors.images
            frame = vector_table(run.read(ITEMS), summaries, workers, facts, run.vectors, *sizes)
        write(frame)

    run.stage("vectors", work, writes=writes, facts=facts)


def check_models(recipe: Recipe) -> None:
    """Raise FileNotFoundError for a model that is a folder and is not there, which its stage would say hours later."""
    models = {"training.model_name_or_path": recipe.training.get("model_name_or_path")}
    models["vectors.model"] = None if recipe.vectors.own else recipe.vectors.model
    if recipe.summaries.engine != "openai":  # a server may call its model by any name
        models |= {"summaries.model": recipe.summaries.model, "summaries.user_model": recipe.summaries.user_model}
    for name, model in models.items():
        if model and (Path(model).is_absolute() or model.startswith(".")) and not Path(model).is_dir():
            raise FileNotFoundError(f"{name}: there is no folder {model}")


def check_training(recipe: Recipe) -> None:
    """Raise ValueError for what the stage ``train`` would refuse on this machine."""
    from mllm_msr.training.arguments import check_flags

    if not recipe.training.get("model_name_or_path"):
        raise ValueError("training.model_name_or_path: name the model to fine-tune in the recipe, or by --backbone")
    if recipe.training.get("push_to_hub"):
        raise ValueError("training.push_to_hub: a run is released by `mllm-msr publish`; leave the flag out")
    for name in ("dataset_name", "output_dir"):
        if recipe.training.get(name):
            raise ValueError(f"training.{name}: a run trains on its own data into its own folder; leave the flag out")
    check_flags(recipe.training_flags())


def train(run: RunFolder) -> None:
    """Stage 3: fine-tune the recommender; the model folder is what would be pushed.

    Several processes (``accelerate launch -m mllm_msr.cli train RUN``) train together, and the first one writes.
    """
    from mllm_msr.training import sft
    from mllm_msr.training.saving import end_processes, save_recommender

    def work(key: str) -> None:
        if run.scan(EXAMPLES, split="train").head(1).collect().is_empty():
            raise ValueError(f"{run.path} has no training task: {MORE_TASKS}")
        check_training(run.recipe)
        checkpoints = run.checkpoints / key  # other settings never resume from these
        flags = {**run.recipe.training_flags(), "dataset_name": str(run.path), "output_dir": str(checkpoints)}
        script_args, training_args, model_args = sft.parse([], **flags)
        trainer = sft.train(script_args, training_args, model_args)
        if is_first_process():
            with whole_folder(run.model) as folder:
                save_recommender(trainer, folder, script_args.merge_adapter)
                write_text(folder / run.training_log.name, json.dumps(trainer.state.log_history, indent=1))
            print(training_samples(trainer.state.log_history))
        else:
            save_recommender(trainer, run.model, script_args.merge_adapter)  # of which it has a share
        end_processes(trainer)

    run.stage("train", work, writes=[run.model])
    if is_first_process():  # only now that the model is noted: a kill before that goes on from a checkpoint
        shutil.rmtree(run.checkpoints, ignore_errors=True)


def head(run: RunFolder) -> None:
    """Train the heads over the item vectors, and fuse them, with the trained model's answer where the recipe has it."""
    from mllm_msr.evaluation.answer_fusion import fit_answer
    from mllm_msr.evaluation.heads import train_heads

    if run.recipe.fuses_answer:
        try:
            run.require("train")
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(
                f"{error}; or leave the answer out of the fused score by --set head.answer=false"
            ) from error

    def work(key: str) -> None:
        with whole_folder(run.head) as folder:
            heads = train_heads(run, folder)
            if run.recipe.fuses_answer:
                fit_answer(run, heads, folder)
        print(fusion_samples(run))

    run.stage("head", work, writes=[run.head])


def evaluate(run: RunFolder, variants: Sequence[Variant] | None = None) -> None:
    """Stage 4: score the frozen tasks with every variant of the results table, measure, and print."""
    from mllm_msr.evaluation.evaluate import evaluate as score_and_measure
    from mllm_msr.hub_cards.results_page import console_page

    split = run.recipe.evaluation.split
    if run.has(TASKS) and run.tasks(split).is_empty():
        raise ValueError(f"{run.path} has no {split} task: {MORE_TASKS}")
    print(console_page(score_and_measure(run, variants)), score_samples(run), sep="\n")


def report(run: RunFolder) -> None:
    """Stage 5: the report a person reads, and the folders the Hub would get."""
    from mllm_msr.hub_cards.publishing import build_hub
    from mllm_msr.hub_cards.report import write_report
    from mllm_msr.hub_cards.results_page import write_results

    def work(key: str) -> None:
        if run.model.is_dir():
            build_hub(run)
        else:
            print("no folders for the Hub, as this run has no trained model")
        write_results(run)
        write_report(run)

    run.stage("report", work, writes=[run.report, run.results_page])


def publish(run: RunFolder, options: "PublishOptions") -> None:
    """Release the run on the Hub, or show what a release would send."""
    from mllm_msr.hub_cards import release

    run.require("report")
    prove(run)
    release.publish(run, options)


def check_serving(port: int) -> None:
    """Raise ValueError, before anything is computed, if nothing can be served on a port; 0 is any that is free."""
    if find_spec("gradio") is None:
        raise ValueError("gradio is not installed: `pip install 'mllm-msr[demo]'`")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port} cannot be used ({error.strerror}): name another by --port") from error


def serve(run: RunFolder, port: int) -> None:
    """The demo Space on this machine, with the model and the data set of a run."""
    run.require("train")
    check_serving(port)
    from mllm_msr.hub_cards import space_app
    from mllm_msr.hub_cards.publishing import build_hub

    folders = build_hub(run)
    space_app.serve(
        str(folders["model"]), str(folders["dataset"]), None, run.recipe.item_noun, run.block_size, server_port=port
    )


FUNCTIONS: dict[str, Callable[[RunFolder], None]] = {
    "prepare": prepare,
    "summarize items": summarize_items,
    "summarize users": summarize_users,
    "vectors": vectors,
    "train": train,
    "head": head,
    "evaluate": evaluate,
    "report": report,
}


def print_next(run: RunFolder) -> None:
    print(*next_commands(run), sep="\n")


def next_commands(run: RunFolder) -> list[str]:
    """Which command comes next, in words; of a finished run, what can be done with it."""
    if pending := next(iter(run.pending("report") or run.pending("train")), None):
        return [f"next: {run.command(pending)}"]
    user = shlex.quote(run.scan(INTERACTIONS).select("user_id").head(1).collect().item())
    place = shlex.quote(str(run.path))
    return [
        f"next: mllm-msr rank {place} --user {user}",
        f"  or: mllm-msr publish {place} --namespace NAME --dry-run",
    ]

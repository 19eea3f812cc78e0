"""Cross-domain: the tasks of one data set, ranked by the model of another, as it is or fine-tuned a little."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from mllm_msr.evaluation.evaluate import data_key
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import EXAMPLES
from mllm_msr.records.storage import digest, folder_digest, whole_folder
from mllm_msr.study import link_file


def with_model_of(run: RunFolder, place: str | None, fine_tune: int | None = None) -> RunFolder:
    """``run`` under another model: the run directory ``RUN/transfer/<model>``, with the same data and summaries.

    What is evaluated and reported there leaves ``run`` as it was.

    Args:
        place: another run directory, a model folder, or a repository of the Hub (``OWNER/NAME[@REVISION]``); None: the
            backbone of the run's own recipe.
        fine_tune: train that model first, as the recipe says, on so many of the run's training tasks, drawn by seed;
            the row ``no_sft`` is then the model before that. Without it the model is taken as it is, and the row is
            left out: it would be of the run's own backbone.
    """
    if not fine_tune:
        model, name, revision = find_model(place or "")
        other = _beside(run, name, [row for row in run.recipe.evaluation.rows if row != "no_sft"], f"trained on {name}")
        training = {"model_name_or_path": name, "model_revision": revision}
        other = RunFolder.create(other.path, replace(other.recipe, training=training))
        _link(other.model, model)
        other.take_over("train", digest(run.key("summarize users"), name, revision))
        return other
    from mllm_msr.stages import train

    rows = list(dict.fromkeys([*run.recipe.evaluation.rows, "no_sft"]))
    if place is None:
        other = _beside(run, f"backbone-{fine_tune}", rows, f"the backbone, fine-tuned on {fine_tune} tasks")
    else:
        model, name, revision = find_model(place)
        told = f"trained on {name}, fine-tuned on {fine_tune} tasks"
        other = _beside(run, f"{name}-{fine_tune}", rows, told)
        _link(other.path / f"start-{revision[:12]}", model)  # a name that changes with what is in it
        start = str(other.path.resolve() / f"start-{revision[:12]}")
        training = {**run.recipe.training, "model_name_or_path": start}
        training.pop("model_revision", None)
        other = RunFolder.create(other.path, replace(other.recipe, training=training))
    with whole_folder(other.examples) as folder:
        for split in ("train", "validation"):
            examples = run.read(EXAMPLES, split=split)
            if split == "train":
                examples = examples_of(examples, fine_tune, run.recipe.training.get("seed", 0))
            EXAMPLES.write(examples, folder / f"{split}.parquet")
    train(other)
    return other


def _beside(run: RunFolder, name: str, rows: list[str], told: str) -> RunFolder:
    """The run directory of another model; ``told``: what the report says of it."""
    folder = run.transfer / name.strip("/").replace("/", "--")
    evaluation = replace(run.recipe.evaluation, rows=rows, model_of=told)
    other = RunFolder.create(folder, replace(run.recipe, evaluation=evaluation))
    for part in ("data", "summaries"):
        _link(folder / part, run.path / part)
    scores = f"scores/{data_key(run)}"  # of the baselines, which are the same
    if (run.path / scores).is_dir():
        shutil.copytree(run.path / scores, folder / scores, copy_function=_copy_missing, dirs_exist_ok=True)
    provenance, known = other.provenance(), run.provenance()
    own = ("train", "evaluate", "report")
    provenance["stages"] |= {stage: facts for stage, facts in known["stages"].items() if stage not in own}
    other.write_provenance(provenance)
    return other


def _copy_missing(source: str, target: str) -> None:
    if not Path(target).exists():
        link_file(source, target)


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve(), target_is_directory=True)


def find_model(place: str) -> tuple[Path, str, str]:
    """The folder of a model, its name, and its revision: a hash of the folder, or the commit on the Hub."""
    folder = Path(place)
    if (folder / "config.yaml").is_file():
        run = RunFolder.open(folder)
        run.require("train")
        return run.model, run.recipe.name, folder_digest(run.model)
    if folder.is_dir():
        return folder, folder.resolve().name, folder_digest(folder)
    from huggingface_hub import snapshot_download

    name, _, revision = place.partition("@")
    found = Path(snapshot_download(name, revision=revision or None))  # names what is neither a folder nor a repository
    return found, name, found.name


def examples_of(examples: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    """The rows of ``count`` tasks drawn by seed, in their order."""
    tasks = examples["task_id"].unique(maintain_order=True)
    chosen = tasks.gather(np.sort(np.random.default_rng(seed).permutation(len(tasks))[:count]))
    return examples.filter(pl.col("task_id").is_in(chosen.implode()))

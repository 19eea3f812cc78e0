"""Cross-domain: the tasks of one data set, ranked by the model of another, as it is or fine-tuned a little."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from mllm_msr.evaluation.kept_scores import scores_folder
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import EXAMPLES, PREFERENCES
from mllm_msr.records.sections import HEAD_VARIANTS
from mllm_msr.records.storage import digest, folder_digest, link_file, read_json, whole_folder

TEXTS = ("prepare", "summarize items", "summarize users")  # the stages that another model shares


@dataclass(frozen=True)
class OtherModel:
    """A model that is not the run's own: its folder, its name, a hash of the folder or the commit on the Hub, and
    whether it is one of ours and not a backbone."""

    folder: Path
    name: str
    revision: str
    is_recommender: bool


def with_model_of(run: RunFolder, place: str | None, fine_tune: int | None = None) -> RunFolder:
    """``run`` under another model: the run ``RUN/transfer/<model>``, with the same data and summaries.

    What is evaluated and reported there leaves ``run`` as it was.

    Args:
        place: another run, a model folder, or a repository of the Hub (``OWNER/NAME[@REVISION]``); None: the backbone
            of the run's own recipe.
        fine_tune: train that model first, as the recipe says, on so many of the run's training tasks, drawn by seed;
            the variant ``no_sft`` is then the model before that. Without it the model is taken as it is, and the
            variant is left out: it would be of the run's own backbone.
    """
    if fine_tune:
        return _fine_tuned(run, find_model(place) if place else None, fine_tune)
    model = find_model(place or "")
    if not model.is_recommender:
        raise ValueError(f"--model {place}: is a backbone and no recommender yet; say by --fine-tune N how to train it")
    variants = [variant for variant in run.recipe.evaluation.rows if variant != "no_sft"]
    training = {"model_name_or_path": model.name, "model_revision": model.revision}
    other = _beside(run, model.name, variants, f"trained on {model.name}", training)
    _link(other.model, model.folder)
    other.take_over("train", digest(other.key("summarize users"), model.name, model.revision), [other.model])
    _fuse(run, other)
    return other


def _fine_tuned(run: RunFolder, model: OtherModel | None, count: int) -> RunFolder:
    from mllm_msr.stages import train

    variants = list(dict.fromkeys([*run.recipe.evaluation.rows, "no_sft"]))
    if model is None:
        words = f"the backbone, fine-tuned on {count} tasks"
        other = _beside(run, f"backbone-{count}", variants, words, run.recipe.training)
    else:
        name, words = f"{model.name}-{count}", f"trained on {model.name}, fine-tuned on {count} tasks"
        start = _folder(run, name).resolve() / f"start-{model.revision[:12]}"  # a name that changes with what is in it
        training = {**run.recipe.training, "model_name_or_path": str(start), "model_revision": None}
        other = _beside(run, name, variants, words, training)
        _link(start, model.folder)
    with whole_folder(other.examples) as folder:
        for split in ("train", "validation"):
            examples = run.read(EXAMPLES, split=split)
            if split == "train":
                examples = examples_of(examples, count, run.recipe.training.get("seed", 0))
            EXAMPLES.write(examples, folder / f"{split}.parquet")
    key = digest(run.key("summarize users"), count)
    other.take_over("summarize users", key, [other.file(PREFERENCES), other.examples])
    train(other)
    _fuse(run, other)
    return other


def _fuse(run: RunFolder, other: RunFolder) -> None:
    """The run's heads, fused with the other model's answers; what is trained already is not trained again."""
    from mllm_msr.stages import head

    if not set(HEAD_VARIANTS) & set(other.recipe.evaluation.rows):
        return
    other.adopt(run, ("vectors",))
    for ours, theirs in ((run.trained_heads, other.trained_heads), (run.trained_baselines, other.trained_baselines)):
        for path in ours.glob("*"):
            link_file(path, theirs / path.name)
    head(other)


def _folder(run: RunFolder, name: str) -> Path:
    return run.transfer / name.strip("/").replace("/", "--")


def _beside(run: RunFolder, name: str, variants: Sequence[str], words: str, training: dict) -> RunFolder:
    """The run of another model; ``words``: what the report says of it."""
    evaluation = replace(run.recipe.evaluation, rows=list(variants), model_of=words)
    other = RunFolder.create(_folder(run, name), replace(run.recipe, evaluation=evaluation, training=training))
    other.adopt(run, TEXTS)
    folder = scores_folder(run, ("prepare",))  # of what our model has no part in
    for path in folder.glob("*"):
        link_file(path, other.scores / folder.name / path.name)
    return other


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve(), target_is_directory=True)


def find_model(place: str) -> OtherModel:
    """The model of a run, of a folder, or of a repository of the Hub; ValueError for what is none of these."""
    folder, name = Path(place), Path(place).resolve().name
    if (folder / "config.yaml").is_file():
        run = RunFolder.open(folder)
        run.require("train")
        folder, name, revision = run.model, run.recipe.name, folder_digest(run.model)
    elif folder.is_dir():
        revision = folder_digest(folder)
    else:
        from huggingface_hub import snapshot_download

        from mllm_msr.modeling.naming import pinned

        name, _, commit = place.partition("@")
        try:
            folder = Path(snapshot_download(name, revision=pinned(name, commit or None)))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--model {place}: there is no such folder here, and it cannot be fetched from the Hub: "
                f"{' '.join(str(error).split())}"
            ) from error
        revision = folder.name
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"--model {place}: is no folder of a model, as it has no config.json")
    kind = read_json(config).get("model_type")
    return OtherModel(folder, name, revision, is_recommender=kind == "mllm_msr")


def examples_of(examples: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    """The rows of ``count`` tasks drawn by seed, in their order."""
    tasks = examples["task_id"].unique(maintain_order=True)
    chosen = tasks.gather(np.sort(np.random.default_rng(seed).permutation(len(tasks))[:count]))
    return examples.filter(pl.col("task_id").is_in(chosen.implode()))

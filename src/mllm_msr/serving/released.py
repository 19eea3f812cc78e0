"""What is served of a release: a model with its heads, and the data set that was published with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from accelerate import PartialState
from huggingface_hub import ModelCard, hf_hub_download

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.hub_tables import load_table, pinned_source
from mllm_msr.evaluation.loading import Computing
from mllm_msr.modeling.naming import pinned
from mllm_msr.records.public import is_hub_id
from mllm_msr.records.recipe import FORMAT, Recipe, load_recipe
from mllm_msr.records.storage import digest, folder_digest
from mllm_msr.serving.opening import ListsByUser, Opened, RunUsers, read_columns


def is_release(source: str) -> bool:
    """Whether a name is that of a released model: a folder with one, or a repository of the Hub."""
    return (Path(source) / "config.json").is_file() or is_hub_id(source.partition("@")[0])


def open_release(source: str, dataset: str | None, how: Computing, columns: Path | None = None) -> Opened:
    """All of a released model and its data set.

    Users are those of the data set, with the histories of their test tasks.

    Args:
        source: folder of the model, or ``owner/name@revision`` on the Hub.
        dataset: folder or repository of the data set; None: the folder ``dataset`` beside the model's, or the one that
            the model's card names.

    Raises:
        FileNotFoundError, ValueError: something is not there, or not what it should be.
    """
    from mllm_msr.processing.auto import MllmMsrForRecommendation, MllmMsrProcessor, Recommender

    name, _, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
    commit = pinned(name, revision or None) or ""
    where: dict[str, Any] = {"revision": commit} if commit else {}
    model: Any = MllmMsrForRecommendation.from_pretrained(name, **where, **({"dtype": how.dtype} if how.dtype else {}))
    recipe = released_recipe(name, commit, model.config.backbone_name_or_path)
    dataset = pinned_source(dataset or its_dataset(name, revision, commit))
    recommender = Recommender(
        model.to(how.device or PartialState().device),
        MllmMsrProcessor.from_pretrained(name, **where),
        token_budget=how.token_budget or recipe.evaluation.token_budget,
        memory_gb=how.memory_gb,
        compile=how.compile,
        cache_dtype=how.cache_dtype or recipe.evaluation.cache_dtype,
    )
    items = load_table(dataset, "items", "train")
    ids = items["item_id"]
    commit = commit or folder_digest(Path(name))
    tasks = frame_of(dataset, "tasks", "all", ["user_id", "split", "history"]).filter(split="test")
    preferences = frame_of(dataset, "preferences", "train", ["user_id", "step", "preference"]).sort("user_id", "step")
    histories = tasks.unique("user_id", maintain_order=True).select("user_id", pl.col("history").alias("item_id"))
    return Opened(
        name=recipe.name,
        revision=commit[:12],
        format=FORMAT,
        vectors_key=digest(name, commit),
        recipe=recipe,
        recommender=recommender,
        item_ranker=model.item_ranker,
        items=Catalogue(items),
        titles=dict(zip(ids, items["title"], strict=True)),
        summaries=dict(frame_of(dataset, "item_summaries", "train", ["item_id", "summary"]).iter_rows()),
        users=RunUsers(
            ListsByUser(histories.explode("item_id").drop_nulls(), "item_id"),
            {},
            ListsByUser(preferences, "preference"),
        ),
        columns=read_columns(columns, list(ids)),
    )


def frame_of(dataset: str, table: str, split: str, columns: list[str]) -> pl.DataFrame:
    frame = load_table(dataset, table, split).select_columns(columns).to_polars()
    assert isinstance(frame, pl.DataFrame)
    return frame


def released_recipe(name: str, revision: str, backbone: str | None) -> Recipe:
    """The recipe beside a model, as far as it is published; the backbone is what made item vectors if nothing else."""
    path = Path(name) / "recipe.yaml"
    if not Path(name).is_dir():
        path = Path(hf_hub_download(name, "recipe.yaml", revision=revision or None))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: serve a model as `mllm-msr publish` releases it")
    recipe = load_recipe(path)
    return replace(recipe, training={"model_name_or_path": backbone} if backbone else {})


def its_dataset(name: str, revision: str, commit: str = "") -> str:
    """The data set that belongs to a model, at the same tag or branch; ValueError if that cannot be known."""
    folder = Path(name).resolve()
    if folder.is_dir() and (folder.parent / "dataset" / "README.md").is_file():
        return str(folder.parent / "dataset")
    card = folder / "README.md"
    if not folder.is_dir():
        card = Path(hf_hub_download(name, "README.md", revision=commit or None))
    named = ModelCard.load(card).data.to_dict().get("datasets") if card.is_file() else None
    if not named:
        raise ValueError(f"{name}: its card names no data set: name the one published with it by --dataset")
    if revision and revision == commit:
        raise ValueError(
            f"{name}@{revision}: a commit is of one repository: name the data set's too, --dataset {named[0]}@COMMIT"
        )
    return f"{named[0]}@{revision}" if revision else named[0]

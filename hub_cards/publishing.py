"""A run as folders exactly as they will lie on the Hub; ``release`` sends them.

Each call builds in a folder of its own, so that releases made at one time cannot mix; what was built last is left in
``RUN/hub`` to look at. Nothing goes that is not on a list. Users of real data appear under keyed hashes.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import polars as pl
import yaml

from mllm_msr.data.sources.registry import SOURCES
from mllm_msr.hub_cards.bare_images import bare_images
from mllm_msr.hub_cards.cards import dataset_card, model_card
from mllm_msr.hub_cards.chat_table import write_chat_table
from mllm_msr.hub_cards.eval_results import write_eval_results, write_eval_yaml
from mllm_msr.hub_cards.facts import Release, has_vectors
from mllm_msr.hub_cards.model_head import add_head
from mllm_msr.hub_cards.reader_files import write_reader_files
from mllm_msr.hub_cards.shards import PublishedTable, published, shard
from mllm_msr.hub_cards.spaces import fill_metric, fill_space
from mllm_msr.hub_cards.terms import RESTRICTED_SOURCES
from mllm_msr.hub_cards.user_hashes import hash_users, user_key
from mllm_msr.modeling.model_files import model_files, shipped_code, without_paths
from mllm_msr.records.public import hide_secrets, public_name, public_recipe, public_revision
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import EXAMPLES, ITEM_VECTORS, ITEMS, PUBLISHED, Table
from mllm_msr.records.storage import link_file, scratch_folder, whole_folder

Part = Literal["dataset", "metric", "space", "model"]
FOLDERS: dict[Part, str] = {  # in RUN/hub; in the order of a release, as the model speaks of the rest
    "dataset": "dataset",
    "metric": "ranking_metrics",
    "space": "space",
    "model": "model",
}
LEFT_OUT = (
    "The source's terms do not let its texts and images be passed on, so `text` and `image` of `items` are empty here "
    "and `sft` has no chat messages; `rebuild.py` adds them from the source. User ids are keyed hashes."
)
STATUS = r"^(ok|(?:suspect|failed)(?::[a-z0-9-]{1,30})?)$"


@dataclass(frozen=True)
class Contents:
    """What a published data set holds: ``images`` or none; drawn users under hashes as well if ``anonymise``."""

    images: bool = True
    anonymise: bool = False


ALL_CONTENTS = Contents()


def build_hub(
    run: RunFolder, contents: Contents = ALL_CONTENTS, parts: Sequence[Part] = ("dataset", "model")
) -> dict[Part, Path]:
    """Build parts of a release that has no name yet; returns their folders in ``RUN/hub``."""
    with built(run, parts, None, contents):
        return {part: run.hub / FOLDERS[part] for part in parts}


@contextmanager
def built(
    run: RunFolder, parts: Sequence[Part], release: Release | None, contents: Contents
) -> Iterator[dict[Part, Path]]:
    """The folders of some parts of a release, for as long as the block lasts.

    They take the place of those in ``RUN/hub`` as well, once all are whole.

    Raises:
        FileNotFoundError: something that a part needs has not been made yet.
        ValueError: weights, a table, or the key of the user hashes is damaged.
    """
    with scratch_folder(run.hub) as own:
        folders: dict[Part, Path] = {part: own / FOLDERS[part] for part in FOLDERS if part in parts}
        for part, folder in reversed(folders.items()):  # what fails soonest first
            folder.mkdir()
            if part == "model":
                fill_model(run, folder, release)
            elif part == "dataset":
                fill_dataset(run, folder, release, contents)
            elif part == "metric":
                fill_metric(folder, release)
            elif release is not None:
                fill_space(run, folder, release)
            else:
                raise ValueError("a demo Space names the repositories of its release: publish it with a namespace")
        for part, folder in folders.items():
            with whole_folder(run.hub / FOLDERS[part]) as copy:
                shutil.copytree(folder, copy, copy_function=_link, dirs_exist_ok=True)
        yield folders


def _link(source: str, target: str) -> None:
    link_file(Path(source), Path(target))


def fill_model(run: RunFolder, folder: Path, release: Release | None) -> None:
    """The model: its checked files, without places of this machine; what ranks by item vectors; what lets other tools
    read it; its card; and the recipe of its data."""
    for name in model_files(run.model):
        if name.endswith(".py"):
            continue
        path, target = run.model / name, folder / name
        target.parent.mkdir(exist_ok=True)
        if name.endswith("config.json"):
            target.write_text(without_paths(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            link_file(path.resolve(), target)
    for file in shipped_code():  # as it is now: a model that an earlier version has saved may lack what the Space calls
        shutil.copyfile(file, folder / file.name)
    add_head(run, folder)
    write_reader_files(folder)
    if release and run.metrics.is_file():
        write_eval_results(folder, run.results(), release)
    (folder / "README.md").write_text(str(model_card(run, release)), encoding="utf-8")
    (folder / "recipe.yaml").write_text(shared_recipe(run.recipe), encoding="utf-8")


def fill_dataset(run: RunFolder, folder: Path, release: Release | None, contents: Contents) -> None:
    """The derived data set: every table, checked; its card; the recipe; and the way back to what is left out."""
    source = run.recipe.source.type
    restricted = source in RESTRICTED_SOURCES
    key = None if SOURCES[source].drawn and not contents.anonymise else user_key(run)
    tables: list[PublishedTable] = []
    for table in PUBLISHED:
        if table is ITEM_VECTORS and not has_vectors(run):
            continue
        splits = {}
        for split in table.splits:
            target = folder / f"{table.name}.{split}"
            if table is ITEMS:
                items = run.scan(ITEMS)
                if restricted:
                    items = items.with_columns(pl.lit("").alias("text"))
                if restricted or not contents.images:
                    items = items.with_columns(pl.lit(None, dtype=ITEMS.columns["image"]).alias("image"))
                items.sink_parquet(target)
            else:
                frame = hash_users(_public_texts(_rows(run, table, split)), key)
                if table is EXAMPLES and not restricted:
                    images = sorted((folder / ITEMS.name).glob("*.parquet")) if contents.images else []
                    write_chat_table(frame, images, target)
                else:
                    frame.drop("prompt", "completion", strict=False).write_parquet(target)  # they quote the texts
            if (info := shard(target, folder / table.name, split, change=bare_images)) is not None:
                splits[split] = info
            target.unlink()
        if splits:
            tables.append(published(table, folder, splits))
    card = dataset_card(run, tables, release, LEFT_OUT if restricted else "")
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    (folder / "recipe.yaml").write_text(shared_recipe(run.recipe), encoding="utf-8")
    write_eval_yaml(folder, run.recipe, run.recipe.evaluation.metrics)
    if restricted:
        shutil.copyfile(str(files("mllm_msr") / "rebuild.py"), folder / "rebuild.py")


def _rows(run: RunFolder, table: Table, split: str) -> pl.DataFrame:
    """One split of a table, which has a file or a column for it."""
    if "{split}" in table.file:
        return run.read(table, split=split)
    frame = run.scan(table)
    return (frame.filter(split=split) if "split" in table.columns else frame).collect()


def _public_texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Generators by name, wherever they lie on this machine; statuses as kinds, without the words of a server."""
    if "generator" not in frame.columns:
        return frame
    names = {name: hide_secrets(public_name(name)) for name in frame["generator"].unique().drop_nulls()}
    revisions = {revision: public_revision(revision) for revision in frame["revision"].unique().drop_nulls()}
    status = pl.col("status")
    return frame.with_columns(
        pl.col("generator").replace(names),
        pl.col("revision").replace(revisions),
        pl.when(status.str.contains(STATUS)).then(status).otherwise(pl.lit("failed:other")).alias("status"),
    )


def shared_recipe(recipe: Recipe) -> str:
    """What a reader needs to prepare the source again, as YAML."""
    content = public_recipe(recipe)
    return yaml.safe_dump(
        {name: value for name, value in content.items() if name not in ("training", "evaluation")},
        sort_keys=False,
        allow_unicode=True,
    )

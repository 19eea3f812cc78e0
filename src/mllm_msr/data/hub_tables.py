"""The derived data set, wherever it is: a run directory, a folder as published, or the Hub."""

from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, Image

from mllm_msr.data.table_files import load_afresh
from mllm_msr.modeling.naming import naming, pinned
from mllm_msr.records import schema

RUN_TABLES = {table.name: table for table in schema.PUBLISHED}


def pinned_source(source: str) -> str:
    """``source`` of :func:`load_table`, of the Hub at the commit that it names now: so that all its tables are of one.

    Raises:
        OSError: the Hub has no such data set, or none for this login.
    """
    name, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    commit = pinned(name, revision or None, "dataset")
    return f"{name}@{commit}" if commit else name


def load_table(source: str, config: str, split: str) -> Dataset:
    """One table of the derived data set.

    Args:
        source: run directory, dataset folder, or repository on the Hub, pinned as ``owner/name@revision``.
        config: "items", "item_summaries", "preferences", "tasks" or "sft".
        split: "train" or "validation" of "sft"; "tasks" come whole, as "all"; others have "train" only.

    Raises:
        FileNotFoundError: a run directory whose table has not been made yet, or a folder of something else.
        ValueError: a data set of other people that names images in files instead of holding them.
    """
    run = Path(source)
    if not (run / "config.yaml").is_file():
        if run.is_dir() and not (run / "README.md").is_file():  # all of it would be searched for tables
            raise FileNotFoundError(
                f"{source}: neither a run (config.yaml) nor a data set (README.md with its tables): name one of these"
            )
        name, _, revision = (source, "", "") if run.exists() else source.partition("@")
        with naming(name):
            table = _facts(load_afresh(name, name=config, split=split, revision=revision or None))
        for column, feature in table.features.items():
            if isinstance(feature, Image) and _names_files(table, column):
                raise ValueError(
                    f"{source}: {column!r} of {config!r} names files; images have to be in the table itself"
                )
        return table
    path = RUN_TABLES[config].path(run, split)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the earlier stages on {run} first (see mllm-msr run --help)")
    return _facts(Dataset.from_parquet(str(path), keep_in_memory=True))


def _names_files(table: Dataset, column: str) -> bool:
    """Whether an image is a path without bytes, which would be opened on this machine."""
    images = table.with_format("arrow").select_columns(column)[:][column]
    return pc.any(pc.and_(pc.is_valid(images), pc.is_null(pc.struct_field(images, "bytes")))).as_py() or False


def _facts(table: Dataset) -> Dataset:
    """Without the chat that ``sft`` also holds for other trainers: its images would be decoded row by row."""
    return table.remove_columns([name for name in ("prompt", "completion", "images") if name in table.column_names])

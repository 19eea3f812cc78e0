"""The derived data set, wherever it is: a run directory, a folder as published, or the Hub."""

from pathlib import Path

from datasets import Dataset, load_dataset

from mllm_msr.records import schema

RUN_TABLES = {table.name: table for table in schema.PUBLISHED}


def load_table(source: str, config: str, split: str) -> Dataset:
    """One table of the derived data set.

    Args:
        source: run directory, dataset folder, or repository on the Hub, pinned as ``owner/name@revision``.
        config: "items", "item_summaries", "preferences", "tasks" or "sft".
        split: "train" or "validation" of "sft"; "tasks" come whole, as "all"; others have "train" only.

    Raises:
        FileNotFoundError: a run directory whose table has not been made yet.
    """
    run = Path(source)
    if not (run / "config.yaml").is_file():
        name, _, revision = (source, "", "") if run.exists() else source.partition("@")
        return _facts(load_dataset(name, config, split=split, revision=revision or None))
    path = RUN_TABLES[config].path(run, split)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the earlier stages on {run} first (see mllm-msr run --help)")
    return _facts(Dataset.from_parquet(str(path), keep_in_memory=True))


def _facts(table: Dataset) -> Dataset:
    """Without the chat that ``sft`` also holds for other trainers: its images would be decoded row by row."""
    return table.remove_columns([name for name in ("prompt", "completion", "images") if name in table.column_names])

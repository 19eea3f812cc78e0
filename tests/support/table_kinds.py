"""A table as a file of each kind that own tables may be."""

import gzip
from collections.abc import Callable
from pathlib import Path

import polars as pl

WRITE: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    "csv": lambda table, path: table.write_csv(path),
    "tsv": lambda table, path: table.write_csv(path, separator="\t"),
    "jsonl": lambda table, path: table.write_ndjson(path),
    "json": lambda table, path: table.write_ndjson(path),
    "csv.gz": lambda table, path: path.write_bytes(gzip.compress(table.write_csv().encode())),
    "parquet": lambda table, path: table.write_parquet(path),
}

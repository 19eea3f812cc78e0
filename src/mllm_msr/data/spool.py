"""What was parsed once, kept in temporary files so that it can be scanned as often as needed."""

import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import count
from pathlib import Path

import polars as pl


@cache
def _spools() -> tuple[tempfile.TemporaryDirectory, Iterator[int]]:
    return tempfile.TemporaryDirectory(prefix="mllm_msr_"), count()  # removed when the process ends


def spool_folder() -> Path:
    """An empty folder among the system's temporary files (``TMPDIR``), gone when the process ends."""
    root, numbers = _spools()
    folder = Path(root.name) / str(next(numbers))
    folder.mkdir()
    return folder


def spool(tables: pl.LazyFrame | Iterable[pl.DataFrame]) -> pl.LazyFrame:
    """A scan of a Parquet file, among the system's temporary files, of what was parsed."""
    folder = spool_folder()
    if isinstance(tables, pl.LazyFrame):
        tables.sink_parquet(folder / "all.parquet", compression="lz4")
    else:
        for number, table in enumerate(tables):
            table.write_parquet(folder / f"{number:06d}.parquet", compression="lz4")
    return pl.scan_parquet(sorted(folder.glob("*.parquet")))

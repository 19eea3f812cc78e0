"""What was parsed once, kept in temporary files so that it can be scanned as often as needed."""

import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import count
from pathlib import Path

import polars as pl

from mllm_msr.records.storage import is_alive


@cache
def _spools() -> tuple[tempfile.TemporaryDirectory, Iterator[int]]:
    prefix = f"mllm_msr.{socket.gethostname()}."
    for left in Path(tempfile.gettempdir()).glob(f"{glob.escape(prefix)}*.*"):  # by processes that were killed
        if not is_alive(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}."), count()  # removed when the process ends


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

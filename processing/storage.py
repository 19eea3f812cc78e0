"""Hashes, and writing so that a file or folder is seen whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl


def digest(*parts: Any) -> str:
    """A stable hash (32 hex digits) of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def folder_digest(folder: Path) -> str:
    """A hash of the names and contents of a folder's files: the revision of a local model."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:32]


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """Write ``frame``, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    frame.write_parquet(partial)
    partial.replace(path)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A fresh folder to fill that takes the place of ``target`` only once the block ends without an error."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)

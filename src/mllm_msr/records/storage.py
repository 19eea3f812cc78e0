"""Hashes, and writing so that a file or folder is seen whole or not at all, by however many processes."""

import hashlib
import io
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl


def digest(*parts: Any) -> str:
    """A stable hash (32 hex digits) of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """A hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def folder_digest(folder: Path) -> str:
    """A hash of the names and contents of a folder's files: the revision of a local model."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(bytes.fromhex(file_digest(path)))
    return total.hexdigest()[:32]


def read_json(path: Path, default: Any = None) -> Any:
    """What a JSON file holds, or ``default``, if one is given, where there is none.

    Raises:
        ValueError: it is cut short or no JSON.
    """
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}): remove it, and do again what wrote it") from error


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all."""
    write_bytes(path, text.encode())


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """Write ``frame``, whole or not at all."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    write_bytes(path, buffer.getbuffer())


def write_bytes(path: Path, content: bytes | memoryview, mode: int = 0o666) -> None:
    """Write ``content``, whole or not at all; see :func:`whole_file`."""
    with whole_file(path, mode) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` only once the block ends without an error.

    It is whole or not at all, even if the power fails; ``OSError`` (disk full, say) leaves no trace.

    Args:
        mode: the permissions of the file, as far as the process's mask lets them through.
    """
    partial = _partial(path)
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):  # of a file system that cannot be written to
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # by the name that the caller knows
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A fresh folder to fill that takes the place of ``target`` only once the block ends without an error."""
    with scratch_folder(target.parent) as partial:
        yield partial
        for attempt in range(10):
            shutil.rmtree(target, ignore_errors=True)
            try:
                os.replace(partial, target)
                return
            except OSError:  # another process has just put its own there
                if attempt == 9:
                    raise


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder of this call alone, below ``parent``, that is removed at the block's end."""
    sweep(parent)
    folder = _partial(parent / "folder")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link_file(source: Path, target: Path) -> None:
    """A second name of a file that is only ever replaced; a copy where the file system has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine, since killed, left half written in ``folder``."""
    for left in folder.glob(f".*.{socket.gethostname()}.*.partial"):
        if not is_alive(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Where one call of this process writes what shall become ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{socket.gethostname()}.{os.getpid()}.partial")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Folders of one machine for processes of another, where there is no file system that both see."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from mllm_msr.processing.workers import Folder
from mllm_msr.records.lock import write_lock
from mllm_msr.records.storage import digest, whole_folder

PART = 2**25  # bytes that are sent at a time


def listing(folder: Folder) -> dict[str, tuple[int, int]]:
    """Size and time of each file of a folder, by its path in it."""
    roots = [folder.path / part for part in folder.parts] if folder.parts is not None else [folder.path]
    files = [path for root in roots for path in (sorted(root.rglob("*")) if root.is_dir() else [root])]
    names = {path.relative_to(folder.path).as_posix(): path.stat() for path in files if path.is_file()}
    return {name: (facts.st_size, facts.st_mtime_ns) for name, facts in names.items()}


def read_part(folder: Folder, name: str, start: int) -> bytes:
    """Up to :data:`PART` bytes of a file."""
    with (folder.path / name).open("rb") as file:
        file.seek(start)
        return file.read(PART)


def copy_of(files: Mapping[str, tuple[int, int]], read: Callable[[str, int], bytes]) -> Path:
    """This machine's copy of a folder, made by whoever comes first, for all and for later.

    Args:
        files: see :func:`listing`; a copy of just these that is there already is taken.
        read: gives part of a file, from some byte on.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_msr/copies"
    base.mkdir(parents=True, exist_ok=True)
    copy = base / digest(files)
    with write_lock(base, "copy of a folder"):
        if not copy.is_dir():
            with whole_folder(copy) as part:
                for name, (size, _) in files.items():
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    with (part / name).open("wb") as file:
                        for start in range(0, size, PART):
                            file.write(read(name, start))
    return copy

"""One writer at a time in a folder: a lock that dies with its process, so that a kill leaves nothing behind."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None  # None on a system that has no such lock
POLL = 0.2  # seconds
_depth: dict[Path, int] = {}  # how many blocks of this process are within the lock of a folder


def is_first_process() -> bool:
    """Whether this process is the first of its distributed job, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def check_one_process(command: str) -> None:
    """Raise ValueError within a distributed job: what ``command`` does is shared by workers, not by its processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"`mllm-msr {command}` is one process, with workers by --ray: start it without a launcher")


@contextlib.contextmanager
def write_lock(folder: Path, command: str) -> Iterator[None]:
    """Be the only writer of ``folder`` within the block.

    A process that finds the lock taken says who holds it, and waits. Blocks of one process may be nested. Of the
    processes of a distributed job only the first takes the lock, for all.

    Args:
        command: what the others are told of this process.
    """
    path = folder.resolve()
    with contextlib.ExitStack() as stack:
        if fcntl is not None and not _depth.get(path) and is_first_process():
            file = stack.enter_context((path / ".lock").open("a+", encoding="utf-8"))
            _acquire(file, path)  # closing the file gives it back
            stack.callback(file.truncate, 0)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": time.ctime()}
            file.truncate(0)
            file.write(json.dumps(holder))
            file.flush()
        _depth[path] = _depth.get(path, 0) + 1
        try:
            yield
        finally:
            _depth[path] -= 1


def _acquire(file: TextIO, folder: Path) -> None:
    waits = False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its children do not inherit it
            return
        except OSError:
            if not waits:
                print(f"waiting for {_holder(file)}, which is writing to {folder}", file=sys.stderr, flush=True)
                waits = True
            time.sleep(POLL)


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']} (`{holder['command']}`, since {holder['since']})"
    except (ValueError, KeyError):
        return "another process"

"""One writer at a time in a folder: a lock that dies with its process, so that a kill leaves nothing behind."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no such lock on this system
    fcntl = None  # type: ignore[assignment]

POLL = 0.2  # seconds
_held: dict[Path, int] = {}  # how many blocks of this process are within the lock of a folder


@contextlib.contextmanager
def write_lock(folder: Path, command: str) -> Iterator[None]:
    """Be the only writer of ``folder`` within the block.

    Who finds the lock taken says who holds it, and waits. Blocks of one process may be nested. Of the processes of one
    distributed job only the first takes the lock, for all.
    """
    path = folder.resolve()
    if fcntl is None or _held.get(path) or int(os.environ.get("RANK", 0)) > 0:
        _held[path] = _held.get(path, 0) + 1
        try:
            yield
        finally:
            _held[path] -= 1
        return
    with (path / ".lock").open("a+", encoding="utf-8") as file:
        _acquire(file, path)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": time.ctime()}
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()
        _held[path] = 1
        try:
            yield
        finally:
            _held[path] = 0
            file.truncate(0)


def _acquire(file: Any, folder: Path) -> None:
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if not told:
                print(f"waiting for {_holder(file)}, which is writing to {folder}", file=sys.stderr, flush=True)
                told = True
            time.sleep(POLL)


def _holder(file: Any) -> str:
    file.seek(0)
    try:
        known = json.loads(file.read())
        return f"process {known['pid']} on {known['host']} (`{known['command']}`, since {known['since']})"
    except (ValueError, KeyError):
        return "another process"

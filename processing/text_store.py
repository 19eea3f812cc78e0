"""Texts by content key in a folder that any number of processes and machines may share.

Each batch of texts is one Parquet file that appears whole or not at all. Who generates a batch holds a claim on it: a
file that only one process can create and that its holder touches again and again. When a holder dies the claim goes
stale, and another process takes over; at worst a batch is generated twice, to the same texts.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from mllm_msr.processing.text_status import StoredText, has_failed
from mllm_msr.records.schema import TEXTS
from mllm_msr.records.storage import digest, is_alive, sweep

logger = logging.getLogger(__name__)
LEASE = 60.0  # seconds without a sign of life after which a claim of another machine is void
MANY = 500  # files from which on they are joined into one when the store is opened


class TextStore:
    """``rows`` has the texts by key. What had failed earlier is forgotten, so that it is tried again."""

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        self.folder, self.lease = folder, lease
        self.claims = folder / "claims"
        self.claims.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        self.rows: dict[str, StoredText] = {}
        self._seen: dict[str, int] = {}  # file name -> time of the version that was read
        self._watched: dict[Path, tuple[int, float]] = {}  # claim -> its last touch, and when we first saw that one
        files: list[Path] = []
        # Once more whenever there are new ones: another process may just have joined those listed before.
        while new := [path for path in sorted(folder.glob("*.parquet")) if path.name not in self._seen]:
            files += [path for path in new if self._read(path, failures=False)]
        if len(files) >= MANY and not any(self.claims.iterdir()):
            self._join(files)

    def add(self, batch: Sequence[str], rows: dict[str, StoredText]) -> None:
        """Keep texts of ``batch`` as one file, together with those of it that are known."""
        self.rows.update(rows)
        path = self._file(batch)
        self._write(path, [(key, *self.rows[key]) for key in batch if key in self.rows])
        self._seen[path.name] = path.stat().st_mtime_ns

    def refresh(self, batch: Sequence[str]) -> None:
        """Read what another process may have written of ``batch`` since; its failures count as well."""
        path = self._file(batch)
        try:
            if path.stat().st_mtime_ns != self._seen.get(path.name):
                self._read(path, failures=True)
        except FileNotFoundError:
            return

    @contextmanager
    def claim(self, batch: Sequence[str]) -> Iterator[bool]:
        """Whether this process alone may generate ``batch`` within the block."""
        path = self.claims / digest(*batch)
        if not self._take(path):
            yield False
            return
        done = threading.Event()
        heart = threading.Thread(target=self._beat, args=(path, done), daemon=True)
        heart.start()
        try:
            yield True
        finally:
            done.set()
            heart.join()
            path.unlink(missing_ok=True)

    def _take(self, path: Path) -> bool:
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}")
            return True
        except FileExistsError:
            if not self._is_stale(path):
                return False
        aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            path.rename(aside)  # only one of those who found it stale succeeds
        except FileNotFoundError:
            return False
        aside.unlink()
        return self._take(path)

    def _is_stale(self, path: Path) -> bool:
        """By our own clock, since machines disagree about the time; a dead process of this machine is known at once."""
        try:
            host, _, pid = path.read_text().partition(" ")
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if host == socket.gethostname() and pid and not is_alive(int(pid)):
            return True
        if self._watched.get(path, (None, 0.0))[0] != touched:
            self._watched[path] = (touched, time.monotonic())
        return time.monotonic() - self._watched[path][1] > self.lease

    def _beat(self, path: Path, done: threading.Event) -> None:
        while not done.wait(self.lease / 4):
            try:
                os.utime(path)
            except OSError:
                return

    def _file(self, batch: Sequence[str]) -> Path:
        return self.folder / f"{digest(*batch)}.parquet"

    def _read(self, path: Path, failures: bool) -> bool:
        try:
            self._seen[path.name] = path.stat().st_mtime_ns
            rows = TEXTS.read(path, list(TEXTS.columns)).rows()
        except FileNotFoundError:  # another process has joined the files
            return False
        except (pl.exceptions.PolarsError, OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s): its texts are generated again", path, type(error).__name__)
            return False
        for key, text, status in rows:
            if not has_failed(status) or (failures and key not in self.rows):
                self.rows[key] = StoredText(text, status)
        return True

    def _write(self, path: Path, rows: list[tuple[str, str, str]]) -> None:
        TEXTS.write(TEXTS.frame(rows), path)

    def _join(self, files: list[Path]) -> None:
        whole = self._file(sorted(self.rows))
        self._write(whole, [(key, *row) for key, row in self.rows.items()])
        for path in files:
            if path != whole:
                path.unlink(missing_ok=True)

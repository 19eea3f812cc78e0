"""Texts by content key in a folder, which one process writes; whatever makes the texts, and wherever.

Each batch of texts is one Parquet file that appears whole or not at all. A run that is killed loses what was in flight.
"""

import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from mllm_msr.processing.text_status import StoredText, has_failed
from mllm_msr.records.schema import TEXTS
from mllm_msr.records.storage import digest, sweep

logger = logging.getLogger(__name__)
MANY = 500  # files from which on they are joined into one when the store is opened
CACHE = 16_000  # kB of the texts that are kept in memory


class StoredTexts(Mapping[str, StoredText]):
    """Texts by key, in a temporary file of SQLite that nobody else sees and that ends with this object: a million of
    them need no more memory than ten."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE texts (key TEXT PRIMARY KEY, text TEXT, status TEXT)")

    def __getitem__(self, key: str) -> StoredText:
        for row in self._database.execute("SELECT text, status FROM texts WHERE key = ?", (key,)):
            return StoredText(*row)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (key for (key,) in self._database.execute("SELECT key FROM texts ORDER BY rowid"))

    def __len__(self) -> int:
        ((count,),) = self._database.execute("SELECT count(*) FROM texts")
        return count

    def update(self, rows: Mapping[str, StoredText]) -> None:
        values = [(key, *row) for key, row in rows.items()]
        try:
            self._database.execute("BEGIN")
            self._database.executemany("REPLACE INTO texts VALUES (?, ?, ?)", values)
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise OSError(f"texts cannot be kept among the temporary files ({error}): has TMPDIR room?") from error

    def __del__(self) -> None:
        self._database.close()


class TextStore:
    """``rows`` has the texts by key. What had failed earlier is forgotten, so that it is tried again.

    Args:
        folder: it is made if it is not there. Who opens a folder that others may open holds its lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        self.rows = StoredTexts()
        files = [path for path in sorted(folder.glob("*.parquet")) if self._read(path)]
        if len(files) >= MANY:
            self._join(files)

    def add(self, batch: Sequence[str], rows: dict[str, StoredText]) -> None:
        """Keep texts of ``batch`` as one file, together with those of it that are known."""
        self.rows.update(rows)
        known = ((key, rows[key] if key in rows else self.rows.get(key)) for key in batch)
        self._write(self._file(batch), [(key, *row) for key, row in known if row is not None])

    def _file(self, batch: Sequence[str]) -> Path:
        return self.folder / f"{digest(*batch)}.parquet"

    def _read(self, path: Path) -> bool:
        try:
            rows = TEXTS.read(path, list(TEXTS.columns)).rows()
        except (pl.exceptions.PolarsError, OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s): its texts are generated again", path, type(error).__name__)
            return False
        self.rows.update({key: StoredText(text, status) for key, text, status in rows if not has_failed(status)})
        return True

    def _write(self, path: Path, rows: list[tuple[str, str, str]]) -> None:
        TEXTS.write(TEXTS.frame(rows), path)

    def _join(self, files: list[Path]) -> None:
        whole = self._file(sorted(self.rows))
        self._write(whole, [(key, *row) for key, row in self.rows.items()])
        for path in files:
            if path != whole:
                path.unlink()

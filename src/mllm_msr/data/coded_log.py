"""A log in numbers on disk, cut into parts by user: a hundred million rows take the memory of a few million.

Users and items are their rank among the sorted ids, so that rows are small and nothing depends on threads or on where
the cuts fall: whatever is done user by user is done part by part.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

Array = np.ndarray
ROW = np.dtype([("user", "<u4"), ("item", "<u4"), ("time", "<i8")])
PART_ROWS = 2_000_000  # rows of a part, about


class CodedLog:
    """Parts of rows (``ROW``), each with all rows of its users, users ascending from part to part.

    ``users``, ``items``: ids by code. Rows of the kind "log" are the log; other kinds are kept beside it. The files are
    gone when the object is, or at ``close()``; they lie in ``workspace`` (default: the system's temporary folder).
    """

    def __init__(self, users: pl.Series, items: pl.Series, n_parts: int, workspace: Path | None = None) -> None:
        self.users, self.items, self.n_parts = users, items, n_parts
        self._folder = Path(tempfile.mkdtemp(prefix=".log-", dir=workspace))
        self.close = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @classmethod
    def of(cls, interactions: pl.LazyFrame, workspace: Path | None = None, part_rows: int = PART_ROWS) -> "CodedLog":
        """Code and cut user_id, item_id, timestamp, in the order of rows; a file is scanned, never held whole."""
        rows = interactions.select(pl.len()).collect(engine="streaming").item()
        if not rows:
            raise ValueError("no interactions: the log is empty, or every row of it was bad")
        users, items = (
            interactions.select(pl.col(name).unique()).collect(engine="streaming")[name].sort()
            for name in ("user_id", "item_id")
        )
        log = cls(users, items, -(-rows // part_rows), workspace)
        users_a_part = -(-len(users) // log.n_parts)
        coded = interactions.select(code("user_id", users), code("item_id", items), "timestamp")
        whole = log._folder / "whole.parquet"  # a sink keeps pace with its writer, so memory stays small
        coded.sink_parquet(whole, compression="uncompressed", row_group_size=500_000)
        for batch in pq.ParquetFile(whole).iter_batches(500_000):
            rows = np.empty(len(batch), ROW)
            for name, column in zip(ROW.names or (), batch.columns, strict=True):
                rows[name] = column.to_numpy()
            part = rows["user"] // users_a_part
            order = np.argsort(part, kind="stable")
            cuts = np.searchsorted(part[order], np.arange(log.n_parts + 1))
            for number in range(log.n_parts):
                with log._path(number, "log").open("ab") as file:
                    rows[order[cuts[number] : cuts[number + 1]]].tofile(file)
        whole.unlink()
        return log

    def _path(self, part: int, kind: str) -> Path:
        return self._folder / f"{kind}-{part}"

    def load(self, part: int, kind: str = "log") -> Array:
        path = self._path(part, kind)
        return np.fromfile(path, ROW) if path.is_file() else np.empty(0, ROW)

    def store(self, part: int, rows: Array, kind: str = "log") -> None:
        rows.tofile(self._path(part, kind))

    def parts(self, kind: str = "log") -> Iterator[Array]:
        return (self.load(part, kind) for part in range(self.n_parts))

    def frame(self, rows: Array) -> pl.DataFrame:
        """Rows as user_id, item_id, timestamp."""
        return pl.DataFrame(
            {
                "user_id": self.users.gather(rows["user"]),
                "item_id": self.items.gather(rows["item"]),
                "timestamp": pl.Series(rows["time"], dtype=pl.Int64),
            }
        )

    def frames(self, kind: str = "log") -> pl.DataFrame:
        """All parts as one :meth:`frame`."""
        return pl.concat([self.frame(rows) for rows in self.parts(kind)])

    def keep_only_present(self) -> None:
        """Number users and items anew without those that have no row left; other kinds lose rows of such items."""
        new = {}
        for name in ("user", "item"):
            ids: pl.Series = getattr(self, f"{name}s")
            present = np.zeros(len(ids), dtype=bool)
            for rows in self.parts():
                present[rows[name]] = True
            setattr(self, f"{name}s", ids.filter(pl.Series(present)))
            new[name] = np.where(present, np.cumsum(present) - 1, -1)
        for kind in ("log", "seen"):
            for part, rows in enumerate(self.parts(kind)):
                rows = rows[new["item"][rows["item"]] >= 0]
                for name in ("user", "item"):
                    rows[name] = new[name][rows[name]]
                self.store(part, rows, kind)


def code(column: str, values: pl.Series) -> pl.Expr:
    """The rank of each id among the sorted ``values``; an id that is not there is an error."""
    return pl.col(column).cast(pl.Enum(values)).to_physical().cast(pl.UInt32)


def user_starts(user: Array) -> Array:
    """Where each user's rows start, and the end; ``user`` ascending."""
    return np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1, [len(user)]]) if len(user) else np.zeros(1, int)


def by_user_and_time(rows: Array) -> Array:
    """The order of rows by user, then time; ties stay as they are. Faster than a stable sort, as ties are few."""
    user, time = rows["user"].astype(np.int64), rows["time"].astype(np.int64)
    user, time = user - user.min(initial=0), time - time.min(initial=0)
    span = int(time.max(initial=0)) + 1
    if (int(user.max(initial=0)) + 1) * span >= 1 << 63:
        return np.lexsort((time, user))
    keys = user * span + time
    order = np.argsort(keys)
    keys = keys[order]
    equal = np.zeros(len(keys) + 1, dtype=bool)
    equal[1:-1] = keys[1:] == keys[:-1]
    tied = np.flatnonzero(equal[1:] | equal[:-1])
    order[tied] = order[tied][np.lexsort((order[tied], keys[tied]))]
    return order

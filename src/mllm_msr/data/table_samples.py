"""The first rows of a table, and what its columns may be: by their names, and by what their values can be read as."""

import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from mllm_msr.data.ids import as_ids
from mllm_msr.data.raw import ROW, BadRows
from mllm_msr.data.times import with_times

LONGEST_ID = 64  # characters
EPOCH = 1e8  # from here on a number may be a time whatever its column is called: 1973 in seconds
WORDS = {  # by which a column is recognised, in the order of preference
    "user_id": "user customer client member reviewer buyer shopper visitor account person reader listener viewer "
    "player subscriber kunde who uid",
    "item_id": "item product article sku asin isbn ean movie film book song track video good goods listing game "
    "recipe artikel produkt",
    "timestamp": "timestamp time datetime date when ts day bought ordered purchased viewed watched read created "
    "datum zeit",
    "rating": "rating ratings stars score vote grade",
    "title": "title name headline label caption",
    "text": "description overview text summary body details about plot abstract content",
    "image": "image images picture photo img poster cover thumbnail bild foto",
}
ROLES = {role: words.split() for role, words in WORDS.items()}
NO_MEANING = {"id", "ids", "no", "number", "nr", "code", "key", "at", "on", "of", "the", "url", "path", "file"}


@dataclass
class Sample:
    """The first rows of a table, all columns."""

    place: str
    folder: Path
    rows: pl.DataFrame

    @property
    def columns(self) -> list[str]:
        return [name for name in self.rows.columns if name != ROW]

    @property
    def path(self) -> Path:
        return self.folder / self.place

    def first(self, column: str) -> list[object]:
        """The first value that there is."""
        return self.rows[column].drop_nulls().head(1).to_list()

    def ids(self, column: str) -> pl.Series | None:
        """A column as ids are compared; None if it cannot hold any."""
        if self.rows.schema[column].is_nested() or self.rows.schema[column] in (pl.Binary, pl.Boolean, pl.Object):
            return None
        table = self.rows.lazy().select(ROW, column)
        try:
            ids = as_ids(table, [column], self.place, BadRows("skip")).collect()[column].drop_nulls()
        except (ValueError, pl.exceptions.PolarsError):
            return None
        return ids if len(ids) and max(ids.str.len_chars().to_list(), default=0) <= LONGEST_ID else None

    def name_is_time(self, column: str) -> bool:
        """Whether a column is called by what can be read as a time, as where the names are missing."""
        return Sample(self.place, self.folder, pl.DataFrame({ROW: [1], column: [column]})).is_time(column, named=True)

    def is_time(self, column: str, named: bool = False) -> bool:
        """Whether nearly all values can be read as times of one kind; of a column that nobody has ``named``, they or
        its name must look like it."""
        log = self.rows.lazy().select(ROW, pl.col(column).alias("timestamp"))
        try:
            log, _, problems = with_times(log, self.place, BadRows("skip"))
            facts = log.select(
                bad=pl.any_horizontal(problems.values()).fill_null(True).mean(), low=pl.col("(time)").min()
            )
            bad, low = facts.collect().row(0)
        except (ValueError, pl.exceptions.PolarsError):
            return False
        if bad is None or low is None or bad >= 0.05:
            return False
        return bool(named or low >= EPOCH or likeness(column, "timestamp") > 0)


def likeness(column: str, role: str) -> float:
    """How much a column's name says that it is ``role``: 1 if it says nothing else, 0 if nothing of it.

    >>> likeness("customer_id", "user_id"), likeness("productName", "title"), likeness("colour", "title")
    (1.0, 0.5, 0.0)
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])", column)]
    telling = [word for word in words if word not in NO_MEANING] or words
    return sum(word in ROLES[role] for word in telling) / len(telling) if telling else 0.0

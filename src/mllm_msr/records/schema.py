"""Every table that a run holds or a release publishes: its columns, dtypes, file, and what the dataset card says of it.

No other file knows these. A frame is checked where it is read and where it is written, so that a table of another
origin stops with a sentence that names the file and the column, and not later in a join.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mllm_msr.records.sections import FusionMember
from mllm_msr.records.storage import write_parquet

IMAGE = pl.Struct({"bytes": pl.Binary, "path": pl.String})
MESSAGES = pl.List(
    pl.Struct({"role": pl.String, "content": pl.List(pl.Struct({"type": pl.String, "text": pl.String}))})
)
PROVENANCE = (
    "`generator`, `revision`, `prompt_hash`: the model that wrote the text, and from which prompt; `status`: `ok`, or "
    "why the text is missing or doubtful"
)


@dataclass(frozen=True)
class Table:
    """One kind of table.

    Args:
        name: of the table, and of its configuration in a published data set.
        columns: name to Polars dtype, in order.
        file: path below the run's folder; ``{split}`` stands for the split where each has a file of its own.
        meaning: one sentence of the dataset card.
        notes: what the card says of columns whose names do not say it all.
        splits: the splits as published.
    """

    name: str
    columns: Mapping[str, Any]
    file: str
    meaning: str
    notes: str = ""
    splits: tuple[str, ...] = ("train",)

    def path(self, run: Path, split: str | None = None) -> Path:
        """The table's file in the run's folder ``run``."""
        if "{split}" in self.file and split is None:
            raise ValueError(f"table {self.name!r} has a file for each split: say which")
        return run / self.file.format(split=split)

    def check(self, frame: pl.DataFrame | pl.LazyFrame, where: Path | str) -> None:
        """Raise ValueError, naming ``where`` and the column, unless ``frame`` has all columns with their dtypes."""
        have = frame.collect_schema()
        for name in self.columns:
            if name not in have:
                raise ValueError(
                    f"{where}: the table {self.name!r} needs a column {name!r}, but this file has {have.names()}; "
                    "make it again with the stage that writes it"
                )
            if have[name] != self.columns[name]:
                raise ValueError(
                    f"{where}: column {name!r} of the table {self.name!r} is {have[name]}, not {self.columns[name]}; "
                    "make it again with the stage that writes it"
                )

    def scan(self, path: Path | Sequence[Path]) -> pl.LazyFrame:
        """Scan a checked file (or several that form one table).

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file is damaged, or its columns are not those of this table.
        """
        paths = [path] if isinstance(path, Path) else list(path)
        for one in paths:
            if not one.is_file():
                raise FileNotFoundError(f"{one} is missing")
        frame = pl.scan_parquet(paths)
        try:
            self.check(frame, paths[0])
        except pl.exceptions.PolarsError as error:
            raise _damaged(paths[0], error) from error
        return frame

    def read(self, path: Path | Sequence[Path], columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Read a checked file, or some columns of it, in their order."""
        frame = self.scan(path)
        try:
            return (frame if columns is None else frame.select(columns)).collect()
        except pl.exceptions.ComputeError as error:  # within it, which its end does not show
            raise _damaged(path if isinstance(path, Path) else path[0], error) from error

    def frame(self, rows: Any = None) -> pl.DataFrame:
        """A frame of these columns from rows in their order (none: an empty one)."""
        return pl.DataFrame(rows if rows is not None else [], schema=dict(self.columns), orient="row")

    def write(self, frame: pl.DataFrame, path: Path) -> None:
        """Write ``frame``, checked, whole or not at all; columns beyond the table's are an error."""
        self.check(frame, path)
        if extra := [name for name in frame.columns if name not in self.columns]:
            raise ValueError(f"{path}: the table {self.name!r} has no column {extra[0]!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(frame.select(*self.columns), path)

    def arrow_schema(self) -> pa.Schema:
        """The columns in Arrow's plain types, which every reader knows, images marked as `datasets` marks them."""
        schema = pa.schema([(name, _arrow_type(dtype)) for name, dtype in self.columns.items()])
        if IMAGE not in self.columns.values():
            return schema
        from datasets import Features, Image

        images = {name: Image() for name, dtype in self.columns.items() if dtype == IMAGE}
        return Features({**Features.from_arrow_schema(schema), **images}).arrow_schema

    @contextmanager
    def writer(self, path: Path) -> Iterator[Callable[[pl.DataFrame], None]]:
        """Write a table that is larger than memory: call what this yields with one frame after another."""
        schema = self.arrow_schema()
        with pq.ParquetWriter(path, schema) as writer:

            def write(frame: pl.DataFrame) -> None:
                self.check(frame, path)
                for part in frame.select(schema.names).iter_slices(100_000):
                    writer.write_table(part.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema))

            yield write


def _damaged(path: Path, error: pl.exceptions.PolarsError) -> ValueError:
    return ValueError(f"{path} is no whole Parquet file ({error}): make it again with the stage that writes it")


def _arrow_type(dtype: Any) -> pa.DataType:
    if isinstance(dtype, pl.List):
        return pa.list_(_arrow_type(dtype.inner))
    if isinstance(dtype, pl.Struct):
        return pa.struct([(field.name, _arrow_type(field.dtype)) for field in dtype.fields])
    return {pl.String: pa.string(), pl.Binary: pa.binary(), pl.Int64: pa.int64(), pl.Float32: pa.float32()}[dtype]


INTERACTIONS = Table(
    "interactions",
    {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64},
    "data/interactions.parquet",
    "the cleaned log: who chose what and when, by user and oldest first; times in seconds",
)
CUT_INTERACTIONS = Table(
    "seen",
    {"user_id": pl.String, "item_id": pl.String},
    "data/seen.parquet",
    "interactions that `max_history` cut off the histories: never negatives, never recommended",
)
ITEMS = Table(
    "items",
    {"item_id": pl.String, "title": pl.String, "text": pl.String, "image": IMAGE},
    "data/items.parquet",
    "title, text and image of every item",
)
THUMBNAILS = Table(
    "thumbnails",
    {"item_id": pl.String, "thumbnail": pl.Binary},
    "data/thumbnails.parquet",
    "small JPEG images for reports",
)
TASKS = Table(
    "tasks",
    {
        "task_id": pl.String,
        "split": pl.String,
        "user_id": pl.String,
        "history": pl.List(pl.String),
        "cutoff": pl.Int64,
        "candidates": pl.List(pl.String),
        "labels": pl.List(pl.Int64),
        "history_length": pl.Int64,
        "target_train_count": pl.Int64,
    },
    "data/tasks.parquet",
    "the ranking tasks: history, frozen candidates, labels",
    notes="`history`: what came before `cutoff`, oldest first; `labels`: 1 for what the user then chose among "
    "`candidates`; `target_train_count`: how often that occurs in training",
    splits=("train", "validation", "test"),
)
POPULARITY = Table(
    "popularity",
    {"item_id": pl.String, "count": pl.Int64},
    "data/popularity.parquet",
    "training interactions of every item of the catalogue, zero included",
)
ITEM_SUMMARIES = Table(
    "item_summaries",
    {
        "item_id": pl.String,
        "summary": pl.String,
        "status": pl.String,
        "generator": pl.String,
        "revision": pl.String,
        "prompt_hash": pl.String,
    },
    "summaries/items.parquet",
    "each item in words, written from its title, text and image",
    notes=PROVENANCE,
)
ITEM_VECTORS = Table(
    "item_vectors",
    {"item_id": pl.String, "vector": pl.List(pl.Float16), "key": pl.String},
    "vectors/items.parquet",
    "what a language model makes of each item: the mean of its last hidden states over the item's tokens",
    notes="`key`: a hash of all that the vector depends on",
)
PREFERENCES = Table(
    "preferences",
    {
        "user_id": pl.String,
        "step": pl.Int64,
        "preference": pl.String,
        "read_item_ids": pl.List(pl.String),
        "last_timestamp": pl.Int64,
        "status": pl.String,
        "generator": pl.String,
        "revision": pl.String,
        "prompt_hash": pl.String,
    },
    "summaries/preferences.parquet",
    "each user's preference after every history block, with the ids of the items it has read",
    notes=f"`step`: the history block it was written after; `read_item_ids`: all it rests on; {PROVENANCE}",
)
CONTEXTS = Table(
    "contexts",
    {
        "task_id": pl.String,
        "user_id": pl.String,
        "candidates": pl.List(pl.String),
        "labels": pl.List(pl.Int64),
        "preference": pl.String,
        "recent": pl.List(pl.String),
    },
    "",  # made of tasks, preferences and item summaries whenever it is needed
    "the ranking tasks with the preference in force and the summaries of the items chosen since",
)
EXAMPLES = Table(
    "sft",
    {
        "task_id": pl.String,
        "user_id": pl.String,
        "item_id": pl.String,
        "label": pl.Int64,
        "preference": pl.String,
        "recent": pl.List(pl.String),
        "title": pl.String,
        "prompt": MESSAGES,
        "completion": MESSAGES,
    },
    "sft/{split}.parquet",
    "the fine-tuning examples: preference, recent summaries, candidate, Yes or No",
    notes="`preference` and `recent`: what the model is told of the user; `prompt`, `completion` and `images`, where "
    "they are there: the same as a chat, for any trainer",
    splits=("train", "validation"),
)
SCORES = Table(
    "scores",
    {
        "variant": pl.String,
        "user_id": pl.String,
        "item_id": pl.String,
        "label": pl.Int64,
        "logit": pl.Float32,
        "score": pl.Float32,
    },
    "scores.parquet",
    "every score behind the metrics: one row a candidate of a task under one variant",
)
PLACES = Table(
    "places",
    {
        "user_id": pl.String,
        "first": pl.Int64,
        "last": pl.Int64,
        "candidates": pl.Int64,
        "cold_above": pl.Int64,
        "cold_equal": pl.Int64,
        "cold_candidates": pl.Int64,
    },
    "",  # one a variant, among its scores
    "where each user's choice stands among all items: between the places `first` and `last`, which equals share; and "
    "how many others that nobody chose in training are above it, equal to it, and there at all",
)
WAYS_OF_COMPUTING = Table(
    "ways",
    {"way": pl.String, "user_id": pl.String, "item_id": pl.String, "logit": pl.Float32},
    "",  # among the scores of our model
    "the logits of one model computed in several ways",
)
RANKING_MEMBERS: tuple[str, ...] = ("answer", *get_args(FusionMember))
RANKINGS = Table(
    "rankings",
    {
        "user_id": pl.String,
        "rank": pl.Int64,
        "item_id": pl.String,
        "title": pl.String,
        "score": pl.Float32,
        "probability": pl.Float32,
        "index": pl.Int64,
        **dict.fromkeys(RANKING_MEMBERS, pl.Float32),
        "preference": pl.String,
    },
    "rankings.parquet",
    "the best items of each user, best first",
    notes="`score`: by what they are ranked; `probability`: of the answer, null where it was not asked; `index`: the "
    "place among the candidates, from 0; `preference`: that in force, in words; the others: what each member of the "
    "fused score says, null where it was not asked",
)
TEXTS = Table(
    "texts",
    {"key": pl.String, "text": pl.String, "status": pl.String},
    "texts.parquet",
    "generated texts by the hash of all they depend on",
)
PUBLISHED = (ITEMS, ITEM_SUMMARIES, PREFERENCES, TASKS, EXAMPLES, ITEM_VECTORS)

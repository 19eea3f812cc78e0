"""A table of other people's making, wherever it is: a file, a folder of part files, or a data set of the Hub."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import polars as pl
import polars.selectors as cs
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from mllm_msr.data.delimited import csv_blocks
from mllm_msr.data.ids import as_text, plain_id
from mllm_msr.data.json_lines import json_blocks
from mllm_msr.data.parts import SUFFIXES, Part, is_parts, table_format, table_parts
from mllm_msr.data.raw import ROW, BadRows, meant, need_columns, short
from mllm_msr.data.remote_files import fetch, is_remote, without_user
from mllm_msr.data.spool import spool, spool_folder
from mllm_msr.data.text_files import kind_of, reading, text_blocks
from mllm_msr.modeling.naming import pinned

ROWS = 10_000  # of a batch
IMAGE_ROWS = 64  # of a batch, where rows hold images
MOMENTS = cs.datetime(time_zone="*").dt.convert_time_zone("UTC")
# So that parts with and without a zone go together, and those of milli- and microseconds lose nothing.
ALIKE = (cs.datetime(time_zone=None).dt.replace_time_zone("UTC"), cs.datetime("ms").dt.cast_time_unit("us"))
# A zone that is an offset, such as +02:00, is no error: pandas writes it, and the times beside it are in UTC anyway.
os.environ.setdefault("POLARS_IGNORE_TIMEZONE_PARSE_ERROR", "1")
ADDRESS = r"hf:/+datasets/([^/]+/[^/@?]+)(?:@([^/?]+))?"  # Path() turns hf:// into hf:/


def local_file(path: Path | str) -> Path:
    """The file on this machine; ``hf://datasets/<owner>/<name>[@<revision>]/<file>`` is fetched from the Hub once.

    Raises:
        ValueError: an address of another form.
        OSError: the file cannot be fetched.
    """
    if not str(path).startswith("hf:"):
        return Path(path)
    match = re.fullmatch(ADDRESS + "/(.+)", str(path))
    if match is None:
        raise ValueError(
            f"{path}: expected hf://datasets/<owner>/<name>/<file>, with @<revision> after the name if wanted"
        )
    repo, revision, file = match.groups()
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=_commit(repo, revision)))
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: cannot be fetched from the Hub ({short(error)})") from error


@cache
def _commit(repo: str, revision: str | None) -> str | None:
    """What this process read first of a data set decides of which commit the rest is."""
    return pinned(repo, revision, "dataset")


@dataclass(frozen=True)
class TableFile:
    """One table.

    Args:
        place: as it is named in a recipe.
        kind: csv, tsv, parquet, jsonl, or data set.
        parts: its files, one or several.
        data: the data set, if it is one.
        root: the folder that paths in it are relative to.
        inside: the folder that paths in it may not leave, as other people wrote it; None: any file of this machine.
    """

    place: str
    kind: str
    parts: list[Part] = field(default_factory=list)
    data: Dataset | None = None
    root: Path = Path()
    inside: Path | None = None

    @classmethod
    def find(cls, place: str, folder: Path) -> "TableFile":
        """The table that a recipe calls ``place``: relative to ``folder``, or an address on the Hub or of fsspec.

        Raises:
            FileNotFoundError, OSError: it is not there, or cannot be fetched.
            ValueError: it is of no kind that can be read.
        """
        if is_remote(place):
            copy, place = fetch(place), without_user(place)
            kind, parts = (table_format(place), [Part(copy)]) if copy.is_file() else table_parts(copy)
            if kind is None:
                raise ValueError(f"{place}: no file of a kind that can be read ({', '.join(SUFFIXES)})")
            root = copy.parent if copy.is_file() else copy
            return cls(place, kind, _with_rows(kind, parts), root=root, inside=root)
        hub = re.match(ADDRESS, place)
        inside = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=hub[1], repo_type="dataset") if hub else None
        kind = table_format(place)
        if hub is None and is_parts(folder / place):
            kind, parts = table_parts(folder / place)
            return cls(place, kind, _with_rows(kind, parts), root=(folder / place).parent)
        if kind is None and hub is None and (folder / place).is_file():
            what = kind_of(folder / place) or f"a file whose name ends in none of {', '.join(SUFFIXES)}: rename it"
            raise ValueError(f"{folder / place}: this is {what}")
        if kind is None:
            root = inside or folder / place.partition("?")[0]
            return cls(place, "data set", data=_data_set(place, folder), root=root, inside=root)
        path = local_file(place) if hub else folder / place
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return cls(place, kind, [Part(path)], root=path.parent, inside=inside)

    def scans(self, columns: Sequence[str], bad: BadRows) -> list[pl.LazyFrame]:
        """All rows as a scan of each part, with ``ROW``; of JSON lines, and of a data set, ``columns`` only."""
        with reading(self.place):
            if self.kind == "parquet":
                told = set[str]()
                return [self._scan_part(part, columns, bad, told) for part in self.parts]
            return [spool(batches) for batches in self._batches(columns, (), "", bad)]

    @contextmanager
    def naming_parts(self, columns: Sequence[str]) -> Iterator[None]:
        """For the block that reads :meth:`scans`: a part whose content is damaged is named."""
        try:
            yield
        except ValueError as error:
            if self.kind == "parquet" and isinstance(error.__cause__, pl.exceptions.PolarsError):
                for part in self.parts:
                    with reading(part.path):
                        names = [name for name in _parquet_names(part.path) if name in columns]
                        table = pl.scan_parquet(part.path, glob=False).select(names)
                        table.select(pl.all().hash().max()).collect(engine="streaming")
            raise

    def _scan_part(self, part: Part, columns: Sequence[str], bad: BadRows, told: set[str]) -> pl.LazyFrame:
        with reading(part.path):
            _parquet_names(part.path)
            table = pl.scan_parquet(part.path, row_index_name=ROW, row_index_offset=1, glob=False)
            table = self._renamed(self._named(table, part, columns), columns, bad, told)
            need_columns(table.collect_schema().names(), columns, part.path)
            return table.with_columns(MOMENTS).with_columns(ALIKE[0]).with_columns(ALIKE[1])

    def batches(
        self, columns: Sequence[str], optional: Sequence[str], image: str, bad: BadRows
    ) -> Iterator[pl.DataFrame]:
        """``columns``, ``optional`` ones that are there, and ``ROW``, in batches so small that images fit in memory."""
        for tables in self._batches(columns, optional, image, bad):
            yield from tables

    def columns(self) -> list[str]:
        """The names of all columns; of parts, those of the first."""
        if self.data is not None:
            return self.data.column_names
        if self.kind == "parquet":
            return _parquet_names(self.parts[0].path)
        if self.kind == "jsonl":
            return self._json_keys()
        first = next(self.batches((), (), "", BadRows("skip")))
        return [name for name in first.columns if name != ROW]

    def head(self, rows: int) -> pl.DataFrame:
        """The first rows, all columns, with ``ROW``; bad rows are left out."""
        with reading(self.place):
            for batch in self.batches(self.columns(), (), "", BadRows("skip")):
                return batch.head(rows)
        raise ValueError(f"{self.place}: the table has no rows")

    def _batches(
        self, columns: Sequence[str], optional: Sequence[str], image: str, bad: BadRows
    ) -> Iterator[Iterator[pl.DataFrame]]:
        """The batches of each part."""
        wanted, told = [*columns, *optional], set[str]()
        if self.data is not None:
            names = _named_so(self.data.column_names, columns, wanted, self.place)
            rows = IMAGE_ROWS if image in names.values() else ROWS
            tables = _numbered(self.data.select_columns(list(names)).with_format("arrow").iter(rows))
            yield (self._renamed(table, wanted, bad, told) for table in tables)
        keys = _named_so(self._json_keys(), columns, wanted, self.place) if self.kind == "jsonl" else {}
        for part in self.parts:
            if self.kind == "jsonl":
                absent = [name for name in wanted if name not in keys.values()]
                tables = json_blocks(part.path, dict.fromkeys([*keys, *absent], pl.String), bad)
            elif self.kind == "parquet":
                named = meant(columns, list(part.values)).values()
                needed = [name for name in columns if name not in part.values and name not in named]
                tables = _parquet_batches(part.path, needed, wanted, image)
            else:
                tables = csv_blocks(part.path, bad, "\t" if self.kind == "tsv" else ",")
            full = (self._named(table, part, wanted) for table in tables)
            yield self._of_part((self._renamed(table, wanted, bad, told) for table in full), part, columns)

    def _of_part(self, tables: Iterator[pl.DataFrame], part: Part, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        for table in tables:
            if len(self.parts) > 1:  # a part without the names would lose its first row to them
                need_columns(table.columns, columns, part.path)
            yield table

    def _renamed(self, table: Any, wanted: Sequence[str], bad: BadRows, told: set[str]) -> Any:
        """With columns that are spelled otherwise (``Title``, ``item-id``) under the names that are wanted; what is not
        ``told`` yet is noted."""
        names = meant(wanted, table.collect_schema().names())
        for theirs, ours in names.items():
            if theirs not in told:
                bad.note(f"{self.place}: column {theirs!r}, read as {ours!r}", 1, [theirs])
        told.update(names)
        return table.rename(names) if names else table

    def _named(self, table: Any, part: Part, wanted: Sequence[str]) -> Any:
        """With the values of the folders' names, and with the part's name in ``ROW`` if there are several.

        Raises:
            ValueError: a column that is wanted says something else in the file.
        """
        schema = table.collect_schema()
        values = []
        for name, value in part.values.items():
            if name in wanted and name in schema:
                _check_same(table.lazy(), schema[name], name, value, part.path)
                if schema[name].is_temporal():  # which may tell the hour as well
                    continue
            values.append(pl.lit(value, pl.String).alias(name))
        if len(self.parts) > 1:
            values.append(pl.format("{} of {}", ROW, pl.lit(part.path.name)).alias(ROW))
        return table.with_columns(values)

    def _json_keys(self) -> list[str]:
        """Keys of the first rows of every part."""
        keys: dict[str, None] = {}
        for part in self.parts:
            lines = next(text_blocks(part.path, BadRows())).split("\n")
            for line in lines:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):  # a bad line; the reader names it
                    continue
                keys |= dict.fromkeys(record if isinstance(record, dict) else ())
            if not keys and (first := next(filter(str.strip, lines), "")):
                raise ValueError(
                    f"{part.path}: JSON with one object a line is read, and no line is such an object: the first is "
                    f"{short(first)}. Write it so (pandas: to_json(..., orient='records', lines=True); jq -c '.[]')"
                )
            keys |= dict.fromkeys(part.values)
        return list(keys)


def _with_rows(kind: str, parts: list[Part]) -> list[Part]:
    """Parts without those of Parquet that have no rows, whose columns and types mean nothing; one, if none has."""
    if kind != "parquet":
        return parts
    kept = []
    for part in parts:
        with reading(part.path):
            if pq.read_metadata(part.path).num_rows:
                kept.append(part)
    return kept or parts[:1]


def _check_same(table: pl.LazyFrame, dtype: pl.DataType, name: str, value: str | None, path: Path) -> None:
    text = as_text(name, dtype)
    same = (
        text.str.starts_with(value or "") if dtype.is_temporal() else text.is_in([value or "", plain_id(value or "")])
    )
    others = table.filter(text.is_not_null() & ~same).select(ROW, text).head(1).collect(engine="streaming")
    for row, other in others.iter_rows():
        what = f"{name} is {short(other)!r} in the file and {value!r} in its folder's name"
        raise ValueError(f"{path}, row {row}: {what}: rename the column, or the folder, that is not meant")


def _parquet_batches(path: Path, needed: Sequence[str], wanted: Sequence[str], image: str) -> Iterator[pl.DataFrame]:
    with reading(path):
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)  # else it holds all it has read
        names = _named_so(_parquet_names(path), needed, wanted, path)
        rows = IMAGE_ROWS if image in names.values() else ROWS
        yield from _numbered(file.iter_batches(rows, columns=list(names)))


def _parquet_names(path: Path) -> list[str]:
    names = pq.read_schema(path).names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}: two columns are called {twice!r}; rename one of them")
    return names


def _named_so(have: Sequence[str], needed: Sequence[str], wanted: Sequence[str], place: Path | str) -> dict[str, str]:
    """The columns of a table to read: its names -> the wanted ones; ValueError if one that is needed is not there."""
    names = {name: name for name in have if name in wanted} | meant(wanted, have)
    need_columns([*names.values(), *(name for name in have if name not in names)], needed, place)
    return names


def _numbered(batches: Any) -> Iterator[pl.DataFrame]:
    """Arrow tables as frames with ``ROW``."""
    start = 1
    for batch in batches:
        batch.validate(full=True)  # Polars takes texts for UTF-8 unseen
        table = pl.DataFrame(pl.from_arrow(batch)).with_columns(MOMENTS)
        yield table.with_row_index(ROW, start)
        start += len(table)


def load_afresh(path: str, **options: Any) -> Any:
    """``load_dataset``, which of a folder with a README would return what once lay in a folder of the same name."""
    return load_dataset(path, cache_dir=str(spool_folder()) if Path(path).is_dir() else None, **options)


def _data_set(place: str, folder: Path) -> Dataset:
    name, _, query = re.sub("^hf:/+datasets/", "", place).partition("?")
    options = dict(parse_qsl(query))
    if not place.startswith("hf:") and not (folder / name).is_dir():
        raise ValueError(
            f"{place}: neither a file ({', '.join(SUFFIXES)}) nor a folder of a data set; a data set of the Hub is "
            "written hf://datasets/<owner>/<name>"
        )
    if unknown := options.keys() - {"name", "split", "revision"}:
        raise ValueError(f"{place}: unknown {min(unknown)!r} after '?'; known are name, split, revision")
    if not place.startswith("hf:"):
        name = str(folder / name)
    name, _, revision = name.partition("@") if place.startswith("hf:") else (name, "", "")
    try:
        if place.startswith("hf:"):
            options["revision"] = _commit(name, options.get("revision") or revision or None) or ""
        data = load_afresh(name, **options)
    except Exception as error:  # of any library that reads one of its many formats
        raise ValueError(f"{place}: cannot be read as a data set ({type(error).__name__}: {short(error)})") from error
    if isinstance(data, DatasetDict):
        if len(data) > 1:
            raise ValueError(f"{place}: has the splits {', '.join(data)}; say which: ?split=...")
        (data,) = data.values()
    if not len(data):
        raise ValueError(f"{place}: this data set has no rows")
    return data

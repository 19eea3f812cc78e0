"""Parquet as the Hub and its viewer like it: typed columns, shards of a sensible size, groups of few rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, Image
from datasets.splits import SplitDict, SplitInfo

from mllm_msr.records.schema import Table

SHARD_BYTES = 300_000_000
GROUP_BYTES = 30_000_000  # a page of the viewer reads a whole row group


@dataclass(frozen=True)
class PublishedTable:
    """A table as it is published: rows by split, and its entry in the card's ``dataset_info``."""

    table: Table
    rows: Mapping[str, int]
    info: Mapping[str, Any]


def shard(
    file: Path,
    folder: Path,
    split: str,
    shard_bytes: int = SHARD_BYTES,
    change: Callable[[pa.Table], pa.Table] = lambda rows: rows,
) -> SplitInfo | None:
    """Write ``file`` as ``folder/<split>-00000-of-0000N.parquet``, the features of ``datasets`` in every schema.

    ``change`` is made to the rows of every row group. Returns what the card says of the split; None if it has no rows,
    and then no file.
    """
    with pq.ParquetFile(file) as source:
        rows, size = source.metadata.num_rows, file.stat().st_size
        if not rows:
            return None
        schema = typed(source.schema_arrow).arrow_schema
        shards = -(-size // shard_bytes)
        per_shard = -(-rows // shards)
        per_group = max(1, min(rows * GROUP_BYTES // max(size, 1), 10_000, per_shard))
        folder.mkdir(parents=True, exist_ok=True)
        groups = _groups(source, schema, per_shard, per_group)
        n_bytes, writer, target = 0, None, folder
        try:
            for start, group in groups:
                if start % per_shard == 0:
                    if writer:
                        writer.close()
                    target = folder / f"{split}-{start // per_shard:05d}-of-{-(-rows // per_shard):05d}.parquet"
                    writer = pq.ParquetWriter(target, schema)
                if writer:
                    writer.write_table(changed := change(group), row_group_size=per_group)
                    n_bytes += changed.nbytes
        finally:
            if writer:
                writer.close()
    return SplitInfo(split, num_bytes=n_bytes, num_examples=rows)


def typed(schema: pa.Schema) -> Features:
    """The features of ``datasets`` for a schema: plain strings and lists for Arrow's large ones, images as such."""
    small = pa.schema([pa.field(field.name, _small(field.type)) for field in schema], schema.metadata)
    features = Features.from_arrow_schema(small)
    return Features({name: Image() if _is_image(feature) else feature for name, feature in features.items()})


def _is_image(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.keys() == {"bytes", "path"}


def published(table: Table, folder: Path, splits: Mapping[str, SplitInfo]) -> PublishedTable:
    """What the card says of a table: features, splits and sizes, from its files in ``folder`` themselves."""
    files = sorted((folder / table.name).glob("*.parquet"))
    info = DatasetInfo(
        features=typed(pq.read_schema(files[0])),
        splits=SplitDict(splits),
        download_size=sum(file.stat().st_size for file in files),
        dataset_size=sum(split.num_bytes for split in splits.values()),
    )
    rows = {name: split.num_examples for name, split in splits.items()}
    return PublishedTable(table, rows, {"config_name": table.name, **info._to_yaml_dict()})


def _groups(
    source: pq.ParquetFile, schema: pa.Schema, per_shard: int, per_group: int
) -> Iterator[tuple[int, pa.Table]]:
    """Row groups of at most ``per_group`` rows that do not cross shards, each with the number of its first row."""
    start = 0
    for batch in source.iter_batches(batch_size=per_group):
        table = pa.Table.from_batches([batch]).cast(schema)
        while table.num_rows:
            room = per_shard - start % per_shard
            yield start, table.slice(0, room)
            start += min(room, table.num_rows)
            table = table.slice(room)


def _small(kind: pa.DataType) -> pa.DataType:
    """
    >>> _small(pa.large_list(pa.large_string()))
    ListType(list<item: string>)
    """
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_dictionary(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(_small(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _small(field.type)) for field in kind])
    return kind

"""Ranking tasks to Parquet, chunk by chunk, each proved to be free of leakage before it is written."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mllm_msr.data.coded_log import Array, CodedLog
from mllm_msr.data.leakage import LeakageError, check_leakage, check_popularity, check_shown_counts, countable
from mllm_msr.data.tasks import SPLITS, TaskPlan, hash_lines
from mllm_msr.records.schema import POPULARITY, TASKS
from mllm_msr.records.sections import PrepareOptions


def write_tasks(output: Path, log: CodedLog, options: PrepareOptions) -> dict[str, Any]:
    """Write the tables of tasks and popularity; returns the protocol part of the report.

    Raises:
        ValueError: no task is left.
        LeakageError: a task, or the popularity, knows something it must not.
    """
    plan = TaskPlan.of_log(log, options)
    whole = hashlib.sha256()
    by_split = {split: hashlib.sha256() for split in SPLITS}
    counts = pl.DataFrame({"item_id": pl.Series(range(len(log.items)), dtype=pl.UInt32), "count": plan.counts})
    allowed = np.zeros(len(log.items), dtype=np.int64)
    with (
        TaskWriter(output / Path(TASKS.file).name, log.items) as writer,
        tqdm(
            total=sum(plan.report[f"{split}_tasks"] for split in SPLITS), desc="tasks", unit="task", leave=False
        ) as bar,
    ):
        for tasks, rows, seen in plan.coded_chunks():
            _prove(plan, tasks, rows, seen, counts)
            ours = countable(tasks, _coded(rows), options.protocol)
            allowed[ours["item_id"].to_numpy()] += ours["countable"].to_numpy()
            readable = plan.decode(tasks)
            lines = hash_lines(readable)
            whole.update(lines.str.join("").item().encode())
            for split, digest in by_split.items():
                digest.update(lines.filter(tasks["split"] == split).str.join("").item().encode())
            writer.write(tasks, readable)
            bar.update(len(tasks))
    check_popularity(pl.DataFrame({"item_id": counts["item_id"], "countable": allowed}), counts)
    POPULARITY.write(plan.popularity, output / Path(POPULARITY.file).name)
    return {
        "name": options.protocol,
        "negatives": options.negatives,
        "n_negatives": options.n_negatives,
        "seed": options.seed,
        "candidate_hash": whole.hexdigest()[:16],
        "candidate_hashes": {split: digest.hexdigest()[:16] for split, digest in by_split.items()},
        **plan.report,
    }


class TaskWriter:
    """Writes tasks whose ids are numbers as the table of tasks: each id is stored once a file, as a dictionary.

    Args:
        path: of the file.
        ids: of the items, by number.
    """

    def __init__(self, path: Path, ids: pl.Series) -> None:
        self.ids = pa.array(ids.to_list(), pa.string())
        coded = pa.list_(pa.dictionary(pa.int32(), pa.string()))
        fields = [
            pa.field(field.name, coded if field.name in ID_LISTS else field.type) for field in TASKS.arrow_schema()
        ]
        self.schema = pa.schema(fields)
        self.writer = pq.ParquetWriter(
            path,
            self.schema,
            store_schema=False,  # ids go in as a dictionary and come out as text
            use_dictionary=["split", *(f"{name}.list.element" for name in (*ID_LISTS, "labels"))],
            dictionary_pagesize_limit=1 << 26,
            write_statistics=False,
        )

    def __enter__(self) -> "TaskWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()

    def write(self, tasks: pl.DataFrame, readable: pl.DataFrame) -> None:
        """Append tasks, given with numbers and with ids."""
        table = readable.drop(ID_LISTS).to_arrow(compat_level=pl.CompatLevel.oldest())
        for name in ID_LISTS:
            offsets = np.concatenate([[0], np.cumsum(tasks[name].list.len())]).astype(np.int32)
            codes = pa.array(tasks[name].explode(empty_as_null=False).to_numpy().astype(np.int32))
            lists = pa.ListArray.from_arrays(pa.array(offsets), pa.DictionaryArray.from_arrays(codes, self.ids))
            table = table.append_column(name, lists)
        self.writer.write_table(table.select(self.schema.names).cast(self.schema))


ID_LISTS = ("history", "candidates")


def _coded(rows: Array) -> pl.DataFrame:
    return pl.DataFrame({"user_id": rows["user"], "item_id": rows["item"], "timestamp": rows["time"]})


def _prove(plan: TaskPlan, tasks: pl.DataFrame, rows: Array, seen: Array, counts: pl.DataFrame) -> None:
    """The proof against leakage on numbers, which is fast; if it fails, again on ids, which a person can look up."""
    try:
        check_leakage(tasks, _coded(rows), seen=_coded(seen), protocol=plan.options.protocol)
        check_shown_counts(tasks, counts)
    except LeakageError:
        log, readable = plan.log, plan.decode(tasks)
        check_leakage(readable, log.frame(rows), seen=log.frame(seen), protocol=plan.options.protocol)
        check_shown_counts(readable, plan.popularity)
        raise

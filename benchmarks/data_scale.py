"""How preparation grows: time and memory for 1, 3, 10, 30 million interactions, beside plain pandas.

    python benchmarks/data_scale.py --sizes 1 3 10 30 --pandas 1 3 10 --output scale.md

Each size runs in a process of its own on a drawn log (a tenth as many users, a fiftieth as many items, long-tailed),
read from Parquet: duplicates, repeats, 5-core, strict split, 20 negatives for each held-out target. "steps" is that;
"all" is the whole `prepare`: also the proof against leakage, the hash, the figures, and writing every file. Beside the
time on the wall stands that of the processor, which other work on the machine does not lengthen; then the peak memory.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

KINDS = ("steps", "all", "pandas")


def draw(rows: int, path: Path) -> None:
    """A log with ids like those of real ones, in no order of time, written in pieces."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    n_users, n_items = rows // 10, rows // 50
    users, items = (
        pa.array([f"{letter}{code * 2654435761 % 2**32:0{width}X}" for code in range(count)])
        for letter, width, count in (("A", 13, n_users), ("B", 9, n_items))
    )
    schema = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1_000_000):
            size = min(1_000_000, rows - start)
            user = np.minimum(rng.beta(1.2, 2.0, size) * n_users, n_users - 1).astype(np.int64)
            item = (rng.random(size) ** 2 * n_items).astype(np.int64)
            times = rng.integers(1_500_000_000, 1_600_000_000, size)
            columns = [users.take(pa.array(user)), items.take(pa.array(item)), pa.array(times)]
            writer.write_table(pa.table(columns, schema=schema))


def ours(path: Path, whole: bool) -> int:
    """Held-out tasks made by this project."""
    from mllm_msr.data.cleaning import clean
    from mllm_msr.data.prepare import prepare
    from mllm_msr.data.sources.tables import read_tables
    from mllm_msr.data.tasks import TaskPlan
    from mllm_msr.evaluation.places import popularity_figures
    from mllm_msr.records.sections import PrepareOptions

    options = PrepareOptions()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        if whole:
            report = prepare(read_tables(path), Path(folder), options, "drawn", popularity_figures)["protocol"]
            return report["validation_tasks"] + report["test_tasks"]
        plan = TaskPlan.of_log(clean(read_tables(path), options, Path(folder)).log, options)
        return sum(int((tasks["split"] != "train").sum()) for tasks, _, _ in plan.coded_chunks())


def plain(path: Path) -> int:
    """The same steps as most scripts do them: pandas, and a loop over users for the negatives."""
    import pandas as pd

    log = pd.read_parquet(path).drop_duplicates()
    log = log.sort_values("timestamp", kind="stable").drop_duplicates(["user_id", "item_id"])
    while True:
        before = len(log)
        log = log[log.groupby("item_id")["user_id"].transform("size") >= 5]
        log = log[log.groupby("user_id")["item_id"].transform("size") >= 5]
        if len(log) == before:
            break
    items = log["item_id"].unique()
    rng = np.random.default_rng(0)
    tasks = []
    for user, history in log.groupby("user_id")["item_id"]:
        sequence = history.tolist()
        met = set(sequence)
        for place in (-2, -1):
            negatives: set[str] = set()
            while len(negatives) < 20:
                item = items[rng.integers(len(items))]
                if item not in met:
                    negatives.add(item)
            tasks.append((user, sequence[:place], sequence[place], list(negatives)))
    return len(tasks)


def measure(kind: str, path: Path) -> None:
    start = time.monotonic()
    tasks = plain(path) if kind == "pandas" else ours(path, kind == "all")
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = {"seconds": time.monotonic() - start, "cpu": used.ru_utime + used.ru_stime}
    print(json.dumps({"tasks": tasks, "peak": peak, **seconds}))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core{'s' * (cores != 1)}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 3, 10, 30], help="millions of interactions")
    parser.add_argument("--pandas", type=float, nargs="*", default=[1, 3, 10], help="sizes for pandas as well")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which columns to measure")
    parser.add_argument("--output", type=Path, help="write the table there too")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], Path(options.one[1]))
        return
    table = [
        machine(),
        "",
        "| interactions | held-out tasks | steps | all of `prepare` | pandas |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log.parquet"
            draw(int(size * 1e6), log)
            cells, tasks = [], None
            for kind in KINDS:
                if kind not in options.kinds or (kind == "pandas" and size not in options.pandas):
                    cells.append("")
                    continue
                command = [sys.executable, __file__, "--one", kind, str(log)]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                if done.returncode:
                    cells.append("failed (memory)" if done.returncode in (-9, 137) else "failed")
                    continue
                result = json.loads(done.stdout.splitlines()[-1])
                tasks = tasks or result["tasks"]
                cells.append("{seconds:.0f} s (CPU {cpu:.0f} s), {gb:.1f} GB".format(gb=result["peak"] / 1e9, **result))
        table.append(f"| {size:g} million | {tasks:,} | {' | '.join(cells)} |")
        print(table[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What sharing work among workers on Ray costs and gains on one machine, in one run:

    python benchmarks/scale_ray.py share      5,000 items of the demo, by its model: one process, one worker, two
    python benchmarks/scale_ray.py flat       100,000 items and 50,000 users without a model: memory and texts a second

`share` runs the command line, each time anew and on a run of its own, and compares the tables byte for byte. The rate
once it runs is that between a tenth and nine tenths of the texts, by the times of the files that they are kept in: what
starts a process, Ray and its workers is in the seconds and not in the rate. Wall-clock
ratios mean something only on a machine that has nothing else to do; the load is printed beside them.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import yaml
from PIL import Image

from mllm_msr.processing.engine_registry import open_text_workers
from mllm_msr.processing.summaries import summarize_items, summarize_users
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.cluster import Cluster
from mllm_msr.records.recipe import demo_recipe
from mllm_msr.records.schema import ITEMS
from mllm_msr.records.sections import SummaryOptions

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
IMAGES = 200  # different ones in `flat`


def command(*arguments: str) -> float:
    """Seconds of a command of its own process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mllm_msr.cli", *arguments], check=True, env=ENV, capture_output=True)
    return time.perf_counter() - start


def share(options: argparse.Namespace, folder: Path) -> None:
    """The demo's item summaries, by its own model."""
    content = yaml.safe_load(demo_recipe().read_text(encoding="utf-8"))
    content["source"].update(n_users=options.items // 4, n_items=options.items)
    content["data"].update(k_core_users=1, k_core_items=1)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    command("prepare", str(folder / "recipe.yaml"), "--output", str(folder / "plain"))
    ways = {"plain": [], **{f"workers-{n}": ["--ray", options.address, "--workers", str(n)] for n in options.workers}}
    for name in ways:
        if name != "plain":
            shutil.copytree(folder / "plain", folder / name)
    items = pl.scan_parquet(folder / "plain/data/items.parquet").select(pl.len()).collect().item()
    print(f"{items} items; load {os.getloadavg()[0]:.1f} before")
    print("| way | seconds | as fast as one process | items/s once it runs | as fast | load after |")
    print("|:--|--:|--:|--:|--:|--:|")
    first, first_rate, wanted = 0.0, 0.0, b""
    for name, flags in ways.items():
        seconds = command("summarize", "items", str(folder / name), *flags)
        table = (folder / name / "summaries/items.parquet").read_bytes()
        rate = running(folder / name / "cache/item_summary") * items
        first, first_rate, wanted = first or seconds, first_rate or rate, wanted or table
        assert table == wanted, f"{name} wrote other texts"
        gained = f"{seconds:.1f} | {first / seconds:.2f} | {rate:.0f} | {rate / first_rate:.2f}"
        print(f"| {name} | {gained} | {os.getloadavg()[0]:.1f} |", flush=True)


def running(folder: Path) -> float:
    """The share of all texts that is written in a second, between a tenth and nine tenths of them."""
    times = np.sort([path.stat().st_mtime for path in folder.glob("*.parquet")])
    first, last = len(times) // 10, len(times) * 9 // 10
    return (last - first) / len(times) / (times[last] - times[first])


@dataclass
class Watch:
    """How many texts there are and how much memory is in use, ten times a second, on a thread of its own."""

    count: Callable[[], int]
    seen: list[tuple[float, int, float, float]] = field(default_factory=list)  # seconds, texts, MB here, MB elsewhere
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        start, here = time.perf_counter(), psutil.Process()
        while not self.done.wait(0.1):
            elsewhere = 0.0
            for process in here.children(recursive=True):
                try:
                    elsewhere += process.memory_info().rss / 1e6 if "Worker" in process.name() else 0.0
                except psutil.Error:
                    continue
            self.seen.append((time.perf_counter() - start, self.count(), here.memory_info().rss / 1e6, elsewhere))

    def report(self, total: int, parts: int) -> None:
        """A line for each of so many parts of the texts."""
        print("| texts | texts/s | MB of this process | MB of the workers |\n|--:|--:|--:|--:|")
        working = [row for row in self.seen if row[1]]
        before = working[0]
        for part in range(1, parts + 1):
            row = next((row for row in working if row[1] >= part * total / parts), working[-1])
            if row[0] > before[0]:
                rate = (row[1] - before[1]) / (row[0] - before[0])
                print(f"| {row[1]:,} | {rate:,.0f} | {row[2]:,.0f} | {row[3]:,.0f} |")
            before = row


def flat(options: argparse.Namespace, folder: Path) -> None:
    """The extractive engine: what Ray and the store do is then most of the work."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{n}" for n in range(5000)])
    images = []
    for colour in rng.integers(0, 256, (IMAGES, 3)):
        buffer = io.BytesIO()
        Image.new("RGB", (96, 96), tuple(map(int, colour))).save(buffer, "JPEG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    texts = [" ".join(row) for row in words[rng.integers(0, len(words), (options.items, 12))]]
    items = ITEMS.frame([(f"i{n}", f"Item {n}", text, images[n % IMAGES]) for n, text in enumerate(texts)])
    settings = SummaryOptions("extractive")
    cluster = Cluster("local", options.workers[-1])

    def watched(name: str, total: int, parts: int, work: Callable[..., pl.DataFrame]) -> pl.DataFrame:
        store = TextStore(folder / name)
        watch = Watch(lambda: len(store.rows))
        thread = threading.Thread(target=watch.run)
        thread.start()
        start = time.perf_counter()
        with open_text_workers(settings, {}, "item", cluster) as (engine, workers):
            frame = work(engine, store, settings, workers)
        watch.done.set()
        thread.join()
        seconds = time.perf_counter() - start
        print(f"\n{name}: {total:,} texts in {seconds:.0f} s, start included; load {os.getloadavg()[0]:.1f}")
        watch.report(len(store.rows), parts)
        kept = sum(path.stat().st_size for path in (folder / name).glob("*.parquet"))
        print(f"{kept / len(store.rows):.0f} bytes a text on disk")
        return frame

    summaries = watched("items", len(items), 5, lambda *tools: summarize_items(items, *tools))
    chosen = rng.integers(0, len(items), (options.users, options.history))
    log = pl.DataFrame(
        {
            "user_id": np.repeat([f"u{n}" for n in range(options.users)], options.history),
            "item_id": items["item_id"].to_numpy()[chosen.ravel()],
            "timestamp": np.tile(np.arange(options.history), options.users),
        }
    )
    titles, described = (dict(frame.iter_rows()) for frame in (items[["item_id", "title"]], summaries[:, :2]))
    waves = options.history // settings.block_size  # each begins with the keys of its blocks, and no text meanwhile
    watched("users", options.users * waves, waves, lambda *tools: summarize_users(log, titles, described, *tools))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("share", "flat"))
    parser.add_argument("--items", type=int, help="default: 5,000 of share, 100,000 of flat")
    parser.add_argument("--address", default="local", help="of share: that of a cluster which is there already")
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--history", type=int, default=12, help="items of each user in flat")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of share each, of flat the last")
    options = parser.parse_args()
    options.items = options.items or {"share": 5_000, "flat": 100_000}[options.what]
    with tempfile.TemporaryDirectory() as folder:
        {"share": share, "flat": flat}[options.what](options, Path(folder))


if __name__ == "__main__":
    main()

"""What summaries cost: ``python benchmarks/summaries.py [preferences growth incremental items server]``.

Ratios are taken within one run, on a random Llava. Its greedy texts are all doubtful, so second answers are left out.
``--size 7b`` is for an accelerator; ``--peak`` (TFLOP/s) then gives the share of it that is used. ``server`` needs
transformers[serving].
"""

import argparse
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from random_llava import save_random_llava

from mllm_msr.data.sources.demo import read_demo
from mllm_msr.demo.pretraining import PROMPTS
from mllm_msr.modeling import image_features
from mllm_msr.processing.engine_registry import build_engine
from mllm_msr.processing.engine_transformers import TransformersEngine
from mllm_msr.processing.engines import Failure
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.processing.summaries import summarize_items, summarize_users
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.sections import SummaryOptions

SIZES = {  # width, feed-forward, layers, heads; of the vision tower width, layers, heads, edge, patch
    "tiny": ((128, 256, 2, 4), (64, 2, 1, 64, 16)),
    "mid": ((256, 704, 8, 4), (256, 4, 4, 64, 16)),
    "7b": ((4096, 14336, 32, 32), (1024, 24, 16, 336, 14)),
}
LIMITS = {"item_summary": 48, "preference": 64}
ALIKE, UNEQUAL = 10**9, 24  # one token in so many ends a text: texts of the same length, or not at all
BLOCK = 3


def clock() -> float:
    """Seconds: of this process's only thread where there is no more, as other work on the machine then counts less."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


class OneAnswer(TransformersEngine):
    """Doubtful texts stay as they are."""

    def generate(self, task, inputs, seeds=None, again=False):
        return [Failure("one-answer-only")] * len(inputs) if again else super().generate(task, inputs, seeds)


class Bench:
    """A world of drawn things and users, and engines on one random model."""

    def __init__(
        self, model: Path, parameters: int, dtype: str, batch_size: int, peak: float | None, users: int
    ) -> None:
        self.model, self.parameters, self.dtype, self.batch_size, self.peak = model, parameters, dtype, batch_size, peak
        self.decoding: Any = "dropping"
        raw = read_demo(n_users=max(400, 2 * users), n_items=360)
        self.items, self.users = pl.LazyFrame(raw.items).collect(), users
        self.items = self.items.with_columns(
            image=pl.struct(bytes=pl.col("image_bytes"), path=pl.lit(None, pl.String))
        )  # fmt: skip
        self.titles = dict(self.items.select("item_id", "title").iter_rows())
        self.texts = dict(self.items.select("item_id", "text").iter_rows())
        self.loaded: Any = None

    def engine(self, batch_size: int | None = None, ends: int = ALIKE) -> TransformersEngine:
        made = OneAnswer(
            str(self.model),
            MllmMsrProcessor.from_backbone(str(self.model), prompts=PROMPTS),
            dtype=self.dtype,
            batch_size=batch_size or self.batch_size,
            max_new_tokens=LIMITS,
            decoding=self.decoding,
        )
        self.loaded = made.model = self.loaded or made.model  # once for all
        made.model.generation_config.eos_token_id = list(range(8, len(made.processor.tokenizer), ends))
        return made

    def log(self, users: int, length: int, more: int = 0) -> pl.DataFrame:
        """``users`` histories of ``length`` drawn items; the first ``more`` users have one block more, less an item."""
        rng = np.random.default_rng(1)
        ids = self.items["item_id"].to_list()
        rows = [
            (f"u{user}", ids[item], time)
            for user in range(users)
            for time, item in enumerate(rng.permutation(len(ids))[: length + (user < more)])
        ]
        return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")

    def preferences(self, log: pl.DataFrame, engine: TransformersEngine, store: Path | None = None):
        """(frame, seconds, blocks generated)"""
        with tempfile.TemporaryDirectory() as own:
            texts = TextStore(store or Path(own))
            known, start = len(texts.rows), clock()
            frame = summarize_users(log, self.titles, self.texts, engine, texts)
            return frame, clock() - start, len(texts.rows) - known


@contextmanager
def split(model: Any) -> Iterator[dict[str, list[float]]]:
    """Seconds and tokens of the model's forwards, those that read prompts apart from those that write."""
    spent = {"reading prompts": [0.0, 0.0], "writing": [0.0, 0.0]}
    starts: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock()

    def after(module: Any, given: Any, named: dict[str, Any], output: Any) -> None:
        rows, tokens = named["input_ids"].shape
        row = spent["reading prompts" if tokens > 1 else "writing"]
        row[0] += now() - starts.pop()
        row[1] += rows * tokens

    hooks = [
        model.register_forward_pre_hook(lambda module, given: starts.append(now())),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    yield spent
    for hook in hooks:
        hook.remove()


def preferences(bench: Bench) -> None:
    """Batched against one user at a time: the same users and model, greedy, the same texts."""
    log = bench.log(bench.users, 2 * BLOCK)
    bench.preferences(bench.log(2, BLOCK), bench.engine())  # warm up
    for name, ends in (("texts of very unequal lengths", UNEQUAL), ("texts of one length", ALIKE)):
        with split(bench.loaded) as together:
            frame, batched, _ = bench.preferences(log, bench.engine(ends=ends))
        with split(bench.loaded) as apart:
            alone, single, _ = bench.preferences(log, bench.engine(1, ends))
        same = (alone["preference"] == frame["preference"]).sum()
        words = bench.engine().processor.tokenizer(frame["preference"].to_list())["input_ids"]
        lengths = np.array([len(one) for one in words])
        table(
            f"preferences from {2 * BLOCK} items each, {name} ({lengths.mean():.0f} +- {lengths.std():.0f} tokens)",
            ["way", "users", "seconds", "users/s", "ratio"],
            [["one user at a time", bench.users, f"{single:.1f}", f"{bench.users / single:.2f}", "1"],
             [f"batches of {bench.batch_size}", bench.users, f"{batched:.1f}", f"{bench.users / batched:.2f}",
              f"{single / batched:.1f}"]],
        )  # fmt: skip
        print(f"identical texts: {same} of {alone.height}")
        rows = [
            [what, name, f"{seconds:.1f}", f"{tokens:.0f}", f"{tokens / max(seconds, 1e-9):.0f}"]
            for what, spent in (("one user at a time", apart), (f"batches of {bench.batch_size}", together))
            for name, (seconds, tokens) in spent.items()
        ]
        table("the model's forwards, padding included", ["way", "what", "seconds", "tokens", "tokens/s"], rows)


def growth(bench: Bench) -> None:
    """Batched, by users and by length of history."""
    rows = []
    sizes = [(bench.users // 2, 6), (bench.users, 6), (2 * bench.users, 6), (bench.users, 3), (bench.users, 12)]
    for users, length in sizes:
        frame, seconds, _ = bench.preferences(bench.log(users, length), bench.engine())
        rows.append([users, length, frame.height, f"{seconds:.1f}", f"{frame.height / seconds:.2f}"])
    table("growth", ["users", "items each", "blocks", "seconds", "blocks/s"], rows)


def incremental(bench: Bench) -> None:
    """One interaction more for 1 % of the users against all from the beginning; a tiny model, as users are many."""
    users, few = 1600, 16
    before, after = bench.log(users, 2 * BLOCK - 1), bench.log(users, 2 * BLOCK - 1, few)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as kept:
        parameters = save_random_llava(Path(folder), *SIZES["tiny"], torch.float32)
        tiny = Bench(Path(folder), parameters, "float32", few, None, users)
        _, full, blocks = tiny.preferences(before, tiny.engine(), Path(kept))
        _, nothing, none = tiny.preferences(before, tiny.engine(), Path(kept))
        _, added, new = tiny.preferences(after, tiny.engine(), Path(kept))
    table(
        f"{users} users; then one interaction more for {few} of them (batches of {few})",
        ["run", "blocks generated", "seconds", "share of the full run"],
        [["full", blocks, f"{full:.2f}", "1"],
         ["again, nothing new", none, f"{nothing:.2f}", f"{nothing / full:.4f}"],
         ["1 % of the users", new, f"{added:.2f}", f"{added / full:.4f}"]],
    )  # fmt: skip
    print(f"share of the blocks: {new / blocks:.4f}")


def items(bench: Bench) -> None:
    """Items with images, and where the time goes; then the same images under other titles as well."""
    engine = bench.engine()
    spent = {"prompts and images": 0.0, "vision tower": 0.0, "language model": 0.0}
    tokens = encoded = 0

    def timed(name: str, work):
        def run(*arguments):
            nonlocal tokens, encoded
            start, within = clock(), spent["vision tower"]
            out = work(*arguments)
            spent[name] += clock() - start - (spent["vision tower"] - within)
            if name == "vision tower":
                encoded += len(arguments[1])
            if name == "language model":
                tokens += arguments[0]["input_ids"].numel() + sum(
                    len(engine.processor.tokenizer(one.text)["input_ids"]) for one in out
                )
            return out

        return run

    engine._encode = timed("prompts and images", engine._encode)
    engine._answer = timed("language model", engine._answer)
    image_features.encode_images = timed("vision tower", image_features.encode_images)
    some = bench.items.head(2 * bench.users)
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        summarize_items(some, engine, TextStore(Path(folder)))
        total = clock() - start
        rate = 2 * bench.parameters * tokens / (spent["vision tower"] + spent["language model"]) / 1e12
        share = f", {rate / bench.peak:.0%} of {bench.peak:g}" if bench.peak else ""
        rows = [[name, f"{seconds:.2f}", f"{seconds / total:.0%}"] for name, seconds in spent.items()]
        rest = total - sum(spent.values())
        rows.append(["the rest (store, keys)", f"{rest:.2f}", f"{rest / total:.0%}"])
        title = f"{some.height} items with images: {some.height / total:.2f} items/s"
        table(title, ["where", "seconds", "share"], rows)
        print(f"about {rate:.3f} TFLOP/s in the model{share}")
        engine.images.evict(max_images=0)
        encoded, further = 0, pl.concat([some.with_columns(pl.col("title") + mark) for mark in ("!", "?")])
        summarize_items(further, engine, TextStore(Path(folder)))
    print(f"images encoded for {further.height} further items with {some.height} images: {encoded}")


def server(bench: Bench) -> None:
    """The demo's model behind ``transformers serve``, killed midway and started again."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    made = {"max_new_tokens": {"item_summary": 16}, "batch_size": 16}
    local = build_engine(SummaryOptions(model="demo", **made), PROMPTS, "thing")
    options = SummaryOptions(
        "openai", backbone_path("demo"), base_url=f"http://127.0.0.1:{port}/v1", concurrency=4, tries=8, **made
    )
    remote = build_engine(options, PROMPTS, "thing")
    some = bench.items.head(96)
    done: list[pl.DataFrame] = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = summarize_items(some, local, TextStore(Path(folder) / "local"))
        store = Path(folder) / "remote"
        work = threading.Thread(target=lambda: done.append(summarize_items(some, remote, TextStore(store))))
        start = time.perf_counter()
        with serving(port) as process:
            ready = time.perf_counter()
            work.start()
            while len(list(store.glob("*.parquet"))) < 3:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed, kept = time.perf_counter(), len(TextStore(store).rows)
        with serving(port):
            back = time.perf_counter()
            work.join()
        end = time.perf_counter()
    same = (done[0]["summary"] == wanted["summary"]).sum()
    table(
        "transformers serve on loopback, killed (SIGKILL) midway and started again",
        ["what", "figure"],
        [["start of the server", f"{ready - start:.1f} s"],
         ["texts kept when it was killed", f"{kept} of {some.height} after {killed - ready:.1f} s"],
         ["until it was back", f"{back - killed:.1f} s"],
         ["from then to the end", f"{end - back:.1f} s"],
         ["failed", str(done[0]["status"].str.starts_with("failed").sum())],
         ["texts as in this process", f"{same} of {some.height}"]],
    )  # fmt: skip


@contextmanager
def serving(port: int) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += [backbone_path("demo"), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit("the server did not start: pip install 'transformers[serving]'")
                time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def table(title: str, head: list[str], rows: list[list]) -> None:
    print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def machine() -> str:
    """Processor or accelerator, threads, library versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    if torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = "processor" if clock() < time.perf_counter() - 1e-3 and torch.get_num_threads() == 1 else "wall-clock"
    threads = f"{torch.get_num_threads()} thread(s), seconds are {kind} seconds"
    return f"{model}, {cores} core(s) used, {threads}, torch {torch.__version__}"


PARTS = {part.__name__: part for part in (preferences, growth, incremental, items, server)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--decoding", default="dropping", choices=("dropping", "static", "continuous"))
    parser.add_argument("--peak", type=float, help="of the accelerator, in TFLOP/s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_random_llava(Path(folder), *SIZES[options.size], getattr(torch, options.dtype))
        print(f"{machine()}\nrandom Llava, {parameters / 1e6:.1f} million parameters, {options.dtype}")
        bench = Bench(Path(folder), parameters, options.dtype, options.batch_size, options.peak, options.users)
        bench.decoding = options.decoding
        for part in options.parts or PARTS:
            PARTS[part](bench)


if __name__ == "__main__":
    main()

"""What training and ranking cost, as ratios within one run: ``make bench``, or

    python benchmarks/performance.py --sizes small medium large --output benchmarks/results.json
    python benchmarks/performance.py --sizes gpu --dtype bfloat16 --minutes 8.5 --output figures.json

Random backbones, prompts of about 300 and 900 tokens (images of 64 and 576 tokens), 21, 100 and 1,000 candidates. Every
figure is the best of ``--repeats`` passes over work that takes seconds; each row is measured beside what it is compared
with. "Usual" is what the authors' code does: every pair a whole prompt, its image encoded anew, ``generate`` in batches
of six, once to the limit of 30 tokens and once stopping after the answer. "Plain" is one forward a pair at the best
batch size. Nothing is fine-tuned: time does not depend on what weights say.

There is one copy of the weights, made on the device. A row that fails, for want of memory say, is written as such and
the others go on; with ``--minutes`` what is left of the time is shared among the sections that are left, and rows that
it does not reach are left out. The output is written after each row.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grouped_heads import compare
from PIL import Image as Images
from random_llava import drawn, random_llava, random_qwen
from training_ways import Training

from mllm_msr.modeling.compiled_answers import CompiledAnswers
from mllm_msr.modeling.configuration_mllm_msr import MllmMsrConfig
from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

SIZES = {  # of the language model: width, feed-forward, layers, heads; of the vision tower: width, layers, heads
    "tiny": ((64, 128, 2, 2), (32, 1, 2)),
    "small": ((128, 352, 2, 4), (64, 2, 2)),
    "medium": ((256, 704, 6, 4), (128, 4, 4)),
    "large": ((512, 1408, 8, 8), (256, 6, 8)),
    "7b": ((4096, 14336, 32, 32), (1024, 24, 16)),
}
GROUPED = {  # Qwen2.5-VL: heads of keys as well; of the tower width, feed-forward, layers, heads
    "tiny-grouped": ((64, 128, 2, 4, 2), (32, 64, 2, 2)),
    "medium-grouped": ((256, 704, 6, 8, 2), (128, 352, 4, 4)),
    "7b-grouped": ((3584, 18944, 28, 28, 4), (1280, 3420, 32, 16)),
}
ON_GPU = ["7b", "7b-grouped"]
PROMPTS = {300: (8, 85), 900: (24, 115)}  # tokens: patches along an edge of the image, words of the user
WORDS = "red blue small large round striped quiet loud old new film mug ship lamp chair clock likes things that"
LIMITS = (512, 1024)
MOST = {(300, "large"): 100, (900, "large"): 21, (900, "medium"): 100, (900, "small"): 100}  # candidates


class Clock:
    """What is left of the time, shared among the sections that are left."""

    def __init__(self, minutes: float | None, sections: int) -> None:
        self.end, self.left = time.monotonic() + 60 * (minutes or 1e9), sections
        self.section_end = self.end

    def begin_section(self) -> None:
        self.section_end = time.monotonic() + (self.end - time.monotonic()) / max(1, self.left)
        self.left -= 1

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.section_end


class Rows:
    """The rows of a table, each written as soon as it is there, whatever becomes of the others."""

    def __init__(self, result: dict[str, Any], clock: Clock, write: Callable[[], None]) -> None:
        self.ms, self.failed, self.clock, self.write = result["ms_per_pair"], result["failed"], clock, write

    def add(self, name: str, work: Callable[[], float | None]) -> None:
        """``work`` returns seconds a pair, or None for a step that is no row."""
        if self.clock.is_over:
            self.failed[name] = "not reached in time"
        else:
            try:
                seconds = work()
                if seconds is not None:
                    self.ms[name] = round(1000 * seconds, 3)
            except Exception as error:  # whatever a device or a library says: the other rows are worth having
                short = "out of memory" if "out of memory" in str(error).lower() else f"{type(error).__name__}: {error}"
                self.failed[name] = short[:200]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"  {name:<50} {self.ms.get(name, self.failed.get(name, ''))}", flush=True)
        self.write()


def best(work: Callable[[], int], repeats: int) -> float:
    """Seconds for each of as many things as ``work`` says it has done; the best of some passes.

    They are those of the processor where there is one thread only, as other work on the machine then counts less.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock, took = time.process_time if alone else time.perf_counter, []
    for _ in range(repeats):
        start = clock()
        count = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append((clock() - start) / count)
    return min(took)


class Bench:
    """A random model, drawn users and items, and the ways of scoring and training them."""

    def __init__(self, folder: Path, size: str, tokens: int, options: argparse.Namespace) -> None:
        across, words = PROMPTS[tokens]
        self.options, self.repeats, self.folder = options, options.repeats, folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if size in SIZES:
            edge, (language, tower) = 8 * across, SIZES[size]
            backbone = random_llava(folder, language, (*tower, edge, 8))
        else:
            edge, backbone = 28 * across, random_qwen(folder, *GROUPED[size])
        self.processor = MllmMsrProcessor.from_backbone(str(folder))
        config = MllmMsrConfig(vlm_config=backbone, answer_token_ids=self.processor.answer_token_ids)
        self.model = drawn(MllmMsrForRecommendation, config, getattr(torch, options.dtype), self.device).eval()
        self.model.generation_config.pad_token_id = self.processor.tokenizer.pad_token_id
        self.model.config.user_limit, self.model.config.item_limit = LIMITS
        self.model.use_block_attention()
        self.parameters = sum(weights.numel() for weights in self.model.parameters())
        rng = np.random.default_rng(0)

        def text(count: int) -> str:
            return " ".join(rng.choice(WORDS.split(), count))

        self.users = [User(text(words)) for _ in range(16)]
        self.items = {
            f"i{number}": Candidate(
                f"i{number}", text(4), image=Images.fromarray(rng.integers(0, 255, (edge, edge, 3), dtype=np.uint8))
            )
            for number in range(max(options.candidates))
        }
        self.names = list(self.items)
        batch = self.processor(self.users[:1], [self.items["i0"]])
        self.prompt_tokens = int(batch["attention_mask"].sum())

    def recommender(self, interaction: str, memory: int = 0, **how: Any) -> Recommender:
        """On the one model, which is ``interaction`` from now on."""
        self.model.config.interaction = interaction
        if self.model.config.item_memory != memory:
            self.model.set_item_memory(memory)
            self.model.to(self.device)
        return Recommender(self.model, self.processor, token_budget=self.options.token_budget, **how)

    # ---- ranking ---------------------------------------------------------------------------------------------------

    def whole(self, count: int) -> Any:
        """A batch of whole prompts of one user, their images prepared anew."""
        return self.processor(self.users[:1] * count, [self.items[name] for name in self.names[:count]]).to(self.device)

    @torch.inference_mode()
    def usual(self, new_tokens: int) -> float:
        self.model.config.interaction = "joint"

        def work() -> int:
            for _ in range(2):
                self.model.generate(
                    **self.whole(6), min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False
                )
            return 12

        return best(work, self.repeats)

    @torch.inference_mode()
    def plain(self) -> float:
        """Seconds a pair at the best batch size."""

        def work(size: int) -> Callable[[], int]:
            def run() -> int:
                for _ in range(max(1, 8 // size)):
                    self.model.score(**self.whole(size))
                return size * max(1, 8 // size)

            return run

        return min(best(work(size), self.repeats) for size in (1, 4, 8, 16))

    def ranked(self, make: Callable[[], Recommender], candidates: int, users: int = 1, warm: bool = True) -> float:
        """Seconds a pair through a recommender that is made once, or, if it is not to be ``warm``, for every pass."""
        row = self.names[:candidates]
        recommender = make()

        def work() -> int:
            recommender.score(self.users[:users], [row] * users, self.items)
            return candidates * users

        if warm:
            work()
            return best(work, self.repeats)
        times = []
        for _ in range(self.repeats):
            times.append(best(work, 1))
            recommender = make()
        return min(times)


def measure(
    size: str, tokens: int, options: argparse.Namespace, result: dict[str, Any], clock: Clock, write: Callable[[], None]
) -> None:
    """Milliseconds a pair of every way, into ``result``."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), size, tokens, options)
        result |= {"parameters": bench.parameters, "prompt_tokens": bench.prompt_tokens}
        print(f"\n{size}: {bench.parameters / 1e6:.1f} M parameters, prompts of {bench.prompt_tokens} tokens")
        rows = Rows(result, clock, write)
        most = MOST.get((tokens, size), 1000)  # else it takes long
        counts = [count for count in options.candidates if count <= most]
        clock.begin_section()
        rows.add("usual, 30 tokens", partial(bench.usual, 30))
        rows.add("usual, 2 tokens", partial(bench.usual, 2))
        rows.add("plain", bench.plain)
        for count in counts:
            if count <= 100:
                joint = partial(bench.recommender, "joint")
                rows.add(f"joint, {count}, new images", partial(bench.ranked, joint, count, warm=False))
                rows.add(f"joint, {count}", partial(bench.ranked, joint, count))
        clock.begin_section()
        for memory in (0, 4):
            late(bench, memory, counts, f"{folder}/cache", rows, result)
        clock.begin_section()
        if size != "large" or options.all_training:
            training = Training(bench, best, LIMITS)
            rows.add("train: TRL's collator, 1:1", lambda: min(training.stock(batch) for batch in (2, 8)))
            rows.add("train: unpacked", lambda: min(training.unpacked(batch) for batch in (2, 8)))
            rows.add("train: packed, 1:8", lambda: training.packed(2, 8))
            for tasks in options.tasks:
                rows.add(f"train: late, {tasks} x {2 * tasks}", partial(training.late, tasks))


def late(bench: Bench, memory: int, counts: list[int], folder: str, rows: Rows, result: dict[str, Any]) -> None:
    """Rows of ``late`` with so many memory tokens: nothing computed before, and items on the disk or in memory."""
    name = f"late, m={memory}" if memory else "late"
    cold = partial(bench.recommender, "late", memory)
    on_disk = partial(cold, cache=folder)
    if not memory:
        for count in (count for count in counts if count <= 100):
            rows.add(f"late, cold, {count}", partial(bench.ranked, cold, count, warm=False))
    kept = cold(memory_gb=8) if bench.device == "cpu" else cold()

    def index(count: int) -> None:
        report = on_disk().index({item: bench.items[item] for item in bench.names[:count]})
        result["bytes_per_item"][str(memory)] = report.nbytes // count

    for count in counts:
        rows.add(f"{name}, index of {count}", partial(index, count))
        rows.add(f"{name}, {count}, from disk", partial(bench.ranked, on_disk, count, warm=False))
        rows.add(f"{name}, {count}", partial(bench.ranked, lambda: kept, count))
        for how in bench.options.compile if count <= CompiledAnswers.most else ():
            rows.add(f"{name}, {count}, {how}", partial(bench.ranked, partial(cold, compile=how), count))
    rows.add(f"{name}, {counts[0]}, 16 users", partial(bench.ranked, lambda: kept, counts[0], users=16))


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """How many times faster."""
    ms = result["ms_per_pair"]
    pairs = {
        "joint, 21, vs usual (30 tokens)": ("usual, 30 tokens", "joint, 21"),
        "joint, 21, new images, vs usual (30 tokens)": ("usual, 30 tokens", "joint, 21, new images"),
        "joint, 21, vs usual (2 tokens)": ("usual, 2 tokens", "joint, 21"),
        "joint, 21, vs plain": ("plain", "joint, 21"),
        "late, 21, cache warm, vs usual (30 tokens)": ("usual, 30 tokens", "late, 21"),
        "late, 21, cache warm, vs usual (2 tokens)": ("usual, 2 tokens", "late, 21"),
        "late, 21, kept, vs cold": ("late, cold, 21", "late, 21"),
        "late, 1,000: time from disk vs kept in memory": ("late, 1000, from disk", "late, 1000"),
        "late, m=4, 1,000: time from disk vs kept in memory": ("late, m=4, 1000, from disk", "late, m=4, 1000"),
        "late, m=4, 100, vs m=0": ("late, 100", "late, m=4, 100"),
        "late, cost of a pair at 1,000 vs at 21": ("late, 1000", "late, 21"),
        "train: late, 16 tasks a batch, vs TRL's collator": ("train: TRL's collator, 1:1", "train: late, 16 x 32"),
        "train: late, 32 tasks a batch, vs TRL's collator": ("train: TRL's collator, 1:1", "train: late, 32 x 64"),
        "train: packed 1:8 vs unpacked": ("train: unpacked", "train: packed, 1:8"),
    }
    return {name: round(ms[slow] / ms[fast], 2) for name, (slow, fast) in pairs.items() if slow in ms and fast in ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [*SIZES, *GROUPED, "gpu"]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=["small", "medium", "large"])
    parser.add_argument("--prompts", nargs="+", type=int, choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--candidates", nargs="+", type=int, default=[21, 100, 1000])
    parser.add_argument("--tasks", nargs="+", type=int, default=[16, 32], help="of a batch of late training")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--minutes", type=float, help="in which to end, about; the sizes `gpu` have 8.5 by default")
    graphs = "ways of torch.compile for small late requests; the sizes `gpu` have cudagraphs and reduce-overhead"
    parser.add_argument("--compile", nargs="*", default=[], help=graphs)
    parser.add_argument("--all-training", action="store_true", help="measure training of the large model, too")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    if "gpu" in options.sizes:
        options.sizes = [size for size in options.sizes if size != "gpu"] + ON_GPU
        options.minutes = options.minutes or 8.5
        options.compile = options.compile or ["cudagraphs", "reduce-overhead"]
    machine = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    results: dict[str, Any] = {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
    results["rows"] = []

    def write() -> None:
        if options.output:
            options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    gpu = set(ON_GPU) & set(options.sizes)
    if gpu or torch.cuda.is_available():
        results["grouped_heads"] = compare(getattr(torch, options.dtype), options.repeats)
    clock = Clock(options.minutes, 3 * len(options.sizes) * len(options.prompts))
    for size in options.sizes:
        for tokens in options.prompts:
            result: dict[str, Any] = {"size": size, "ms_per_pair": {}, "failed": {}, "bytes_per_item": {}}
            results["rows"].append(result)
            try:
                measure(size, tokens, options, result, clock, write)
            except Exception as error:  # a model that does not fit at all
                result["failed"]["all"] = f"{type(error).__name__}: {error}"[:200]
                clock.left = 3 * (clock.left // 3)
            result["ratios"] = ratios(result)
            write()
            more = {"bytes an item": result["bytes_per_item"], "failed": result["failed"]}
            for name, value in (result["ratios"] | more).items():
                print(f"  {name:<50} {value}", flush=True)


if __name__ == "__main__":
    main()

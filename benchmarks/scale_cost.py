"""What a large catalogue costs on 1, 8 and 64 GPUs, computed from measured rates: python benchmarks/scale_cost.py [RUN]

Without a run: a million users and 200,000 items. With one that has been prepared: its own counts, histories and bytes.
The rates are those of docs/performance.md (a Llava of 7.6 billion parameters with random weights, bfloat16, one H100);
give others as --items-per-second and so on. Hours on many GPUs count what keeps them from being used: the copies of
model and run that each machine is sent, models that are loaded, and waves of history blocks that are too small for all.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GB = 1e9


@dataclass(frozen=True)
class Counts:
    """How much there is: ``lengths`` are the items of each user's history."""

    items: int
    lengths: np.ndarray
    item_bytes: float  # of an item with its image, as prepared

    @classmethod
    def drawn(cls, options: argparse.Namespace) -> "Counts":
        """Lengths with a long tail: lognormal, at least 5, of the given mean."""
        rng = np.random.default_rng(0)
        lengths = rng.lognormal(np.log(options.history) - 0.5, 1.0, options.users)
        return cls(options.items, np.clip(lengths, 5, options.max_history).astype(np.int64), options.item_bytes)

    @classmethod
    def of_run(cls, folder: Path) -> "Counts":
        import polars as pl

        tables = pl.scan_parquet(folder / "data/interactions.parquet").group_by("user_id").len().collect()
        path = folder / "data/items.parquet"
        items = pl.scan_parquet(path).select(pl.len()).collect().item()
        return cls(items, tables["len"].to_numpy(), path.stat().st_size / items)

    def waves(self, block_size: int) -> np.ndarray:
        """How many users have a first, second, ... history block."""
        blocks = np.bincount(self.lengths // block_size)
        return blocks[::-1].cumsum()[::-1][1:]


@dataclass(frozen=True)
class Stage:
    """One stage, and what it asks of whom.

    Args:
        read, written: tokens.
        seconds: of one GPU that always has work.
        waves: inputs that may be worked on at the same time, one wave after another.
        batch: inputs of one worker at a time.
        sent, returned: bytes of all inputs, and of all results.
        kept: bytes on the driver's disk in the end.
        copied: bytes that each machine is sent before it begins.
    """

    name: str
    read: float
    written: float
    seconds: float
    waves: np.ndarray
    batch: int
    sent: float
    returned: float
    kept: float
    copied: float

    def hours(self, gpus: int, options: argparse.Namespace) -> float:
        """On so many GPUs: start, then wave by wave, each at least as long as its fullest worker needs."""
        rate = self.waves.sum() / self.seconds  # inputs a second of one GPU
        batches = np.ceil(self.waves / self.batch)
        rounds = np.ceil(batches / gpus)  # of the worker that has most
        busy = rounds * self.batch / rate  # a step costs about the same for few texts as for many
        machines = -(-gpus // options.gpus_of_a_machine)
        others = machines - 1  # the driver's own reads its disk
        network = (self.copied * others + self.sent + self.returned) / options.network
        start = options.start + self.copied / options.disk
        return (start + max(busy.sum(), network)) / 3600


def stages(counts: Counts, options: argparse.Namespace) -> Iterator[Stage]:
    items, users, waves = counts.items, len(counts.lengths), counts.waves(options.block_size)
    blocks, per_token = waves.sum(), options.bytes_of_a_token
    prompt, text, preference = options.prompt_tokens, options.item_tokens, options.preference_tokens
    one = np.array([items])
    images = items * counts.item_bytes
    model = 2 * options.parameters
    vector = 2 * options.width
    run = images + items * text * per_token + blocks * preference * per_token + model
    yield Stage(
        "summarize items", items * prompt, items * text, items / options.items_per_second, one, 64,
        images, items * text * per_token, items * text * per_token, model,
    )  # fmt: skip
    read = options.block_size * text + preference + options.template_tokens
    yield Stage(
        "summarize users", blocks * read, blocks * preference, blocks / options.blocks_per_second, waves, 64,
        blocks * read * per_token, blocks * preference * per_token, blocks * preference * per_token, model,
    )  # fmt: skip
    yield Stage(
        "vectors", items * prompt, 0, items / options.vectors_per_second, one, 512,
        images, items * vector, items * vector, model,
    )  # fmt: skip
    kept = items * options.index_bytes
    yield Stage(
        "index (late)", items * prompt, 0, items / options.indexed_per_second, one, 512, images, kept, kept, model,
    )  # fmt: skip
    pairs = users * options.rerank
    yield Stage(
        f"rank --users all, answer of the best {options.rerank}", users * preference, 0,
        pairs / options.pairs_per_second, np.array([users]), 64, users * 64, users * options.top_k * 48,
        users * options.top_k * 24, run + kept,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    numbers: dict[str, tuple[float, str]] = {
        "users": (1_000_000, "without a run"),
        "items": (200_000, "without a run"),
        "history": (30, "mean items of a user, without a run"),
        "max_history": (1000, "items of a user, without a run"),
        "item_bytes": (40_000, "of an item with its image as prepared, without a run"),
        "block_size": (3, "items of a history block"),
        "rerank": (100, "candidates of each user that the answer is asked about"),
        "top_k": (10, "candidates that are written for each user"),
        "items_per_second": (26, "item summaries of 64 tokens a GPU writes (measured)"),
        "blocks_per_second": (6.0, "preferences of 128 tokens a GPU writes, batch 64 (measured)"),
        "vectors_per_second": (86, "prompts of 296 tokens a GPU reads, with images to prepare (measured)"),
        "indexed_per_second": (67, "items a second: 1,000 took 15 s (measured)"),
        "pairs_per_second": (9899, "late, kept in memory, 16 users at once (measured)"),
        "index_bytes": (12.5e6 * 4 / 300, "of an item: 12.5 MB at 300 tokens (measured), by 4 memory tokens of 300"),
        "parameters": (7.6e9, "of the model, of two bytes each"),
        "width": (4096, "numbers of an item vector"),
        "prompt_tokens": (296, "of an item, image included"),
        "item_tokens": (64, "of an item summary"),
        "preference_tokens": (128, "of a preference"),
        "template_tokens": (60, "of a prompt, beside what is filled in"),
        "bytes_of_a_token": (4.5, "of text"),
        "network": (1.25e9, "bytes a second, from the driver to all others together (10 Gbit/s)"),
        "disk": (1e9, "bytes a second, of each machine"),
        "start": (60, "seconds until a worker has its model in memory, beside reading it"),
        "gpus_of_a_machine": (8, ""),
    }  # fmt: skip
    for name, (value, text) in numbers.items():
        kind = type(value) if name != "index_bytes" else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=f"{text} ({value:g})")
    options = parser.parse_args()
    counts = Counts.of_run(options.run) if options.run else Counts.drawn(options)
    waves = counts.waves(options.block_size)
    print(
        f"{len(counts.lengths):,} users, {counts.items:,} items, {counts.lengths.sum():,} interactions, "
        f"{waves.sum():,} history blocks in {len(waves)} waves\n"
    )
    gpus = (1, 8, 64)
    print(
        "| stage | tokens read, M | written, M | GPU hours | hours on "
        + " | ".join(map(str, gpus))
        + " | network, GB | copy of a machine, GB | disk, GB |\n|:--"
        + "|--:" * (6 + len(gpus))
        + "|"
    )
    for stage in stages(counts, options):
        hours = " | ".join(f"{stage.hours(count, options):,.1f}" for count in gpus)
        print(
            f"| `{stage.name}` | {stage.read / 1e6:,.0f} | {stage.written / 1e6:,.0f} | {stage.seconds / 3600:,.1f} "
            f"| {hours} | {(stage.sent + stage.returned) / GB:,.1f} | {stage.copied / GB:,.1f} "
            f"| {stage.kept / GB:,.1f} |"
        )
    users = next(stage for stage in stages(counts, options) if stage.name == "summarize users")
    print(
        "\n| GPUs | hours of `summarize users` | of linear, % | waves in which a GPU has nothing to do |\n"
        "|--:|--:|--:|--:|"
    )
    alone = users.hours(1, options)
    for count in (*gpus, 256):
        idle = int((np.ceil(users.waves / users.batch) < count).sum())
        hours_then = users.hours(count, options)
        print(
            f"| {count} | {hours_then:,.1f} | {100 * alone / count / hours_then:.0f} | {idle} of {len(users.waves)} |"
        )


if __name__ == "__main__":
    main()

"""GPU hours of a run, computed from its tokens: python benchmarks/cost.py [RUN] [--gpu h100] [--image-tokens 576]

Without a run: the paper's three data sets by the counts of its table. With one that has been prepared: its own counts.
Work is counted as 2 N floating-point operations a token forward (N parameters, attention left out), as much again for
the gradients that LoRA needs and as much again to recompute activations under gradient checkpointing. Prompts and
training are bound by arithmetic, generation by reading the weights once for every step of a batch. It is an estimate
before one has measured; nothing here was run on these machines.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

GPUS = {"a100": (312e12, 2.0e12), "h100": (989e12, 3.35e12), "h200": (989e12, 4.8e12)}  # dense bf16 FLOP/s, bytes/s
USED = 0.4  # of either, in practice


@dataclass
class Counts:
    """How much a data set asks for."""

    name: str
    items: int
    blocks: int  # preferences to write
    examples: int  # a pass of training
    pairs: int  # to rank, a row of the table

    @classmethod
    def of_paper(cls, name: str, users: int, items: int, interactions: int, block_size: int) -> "Counts":
        """Protocol paper: eight tenths of the users train on their last item, 1 : 1; a tenth is asked, 1 : 20."""
        blocks = int((interactions - users) / block_size - users * (block_size - 1) / (2 * block_size))
        return cls(name, items, blocks, 2 * (8 * users // 10), 21 * (users // 10))

    @classmethod
    def of_run(cls, folder: Path) -> "Counts":
        import polars as pl
        import yaml

        recipe = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        tasks = pl.read_parquet(folder / "data/tasks.parquet")
        longest = tasks.group_by("user_id").agg(pl.col("history_length").max())["history_length"]
        pairs = tasks.group_by("split").agg(pl.col("candidates").list.len().sum())
        known = dict(pairs.iter_rows())
        items = pl.scan_parquet(folder / "data/items.parquet").select(pl.len()).collect().item()
        blocks = int((longest // recipe.get("summaries", {}).get("block_size", 3)).sum())
        return cls(recipe["name"], items, blocks, known.get("train", 0), known.get("test", 0))


def hours(counts: Counts, options: argparse.Namespace) -> list[tuple[str, float, float, float]]:
    """(stage, millions of tokens read, millions written, GPU hours) of each stage."""
    arithmetic, bandwidth = (USED * one for one in GPUS[options.gpu])
    n, image, text, answer = options.parameters, options.image_tokens, options.text_tokens, options.answer_tokens

    def seconds(read: float, written: float, per_token: float = 2) -> float:
        return per_token * n * read / arithmetic + written / options.batch * 2 * n / bandwidth

    calls = {  # (times, tokens read, tokens written)
        "item summaries": (counts.items, image + 3 * text + 2 * answer, 3 * answer),  # image, text, fusion
        "preferences": (counts.blocks, 2 * text + 3 * answer + 2 * answer, 2 * answer),
        "training": (counts.examples * options.epochs, image + text + 2 * answer, 0),
        "ranking, each row with images": (counts.pairs, image + text, 0),
    }
    rows = []
    for stage, (times, read, written) in calls.items():
        spent = seconds(times * read, times * written, 6 if stage == "training" else 2)
        rows.append((stage, times * read / 1e6, times * written / 1e6, spent / 3600))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a prepared run directory")
    parser.add_argument("--gpu", choices=GPUS, default="a100")
    parser.add_argument("--parameters", type=float, default=7.2e9, help="of the language model (7.2e9: Mistral-7B)")
    parser.add_argument("--image-tokens", type=int, default=2880, help="LLaVA-1.6: up to 2,880; one tile alone: 576")
    parser.add_argument("--text-tokens", type=int, default=120, help="instructions and title")
    parser.add_argument("--answer-tokens", type=int, default=60, help="a summary; a preference has twice as many")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16, help="texts generated at once")
    parser.add_argument("--block-size", type=int, default=3)
    options = parser.parse_args()
    sets = (
        [Counts.of_run(options.run)]
        if options.run
        else [
            Counts.of_paper("MicroLens", 25_411, 20_276, 223_263, options.block_size),
            Counts.of_paper("Amazon Baby", 41_081, 14_393, 400_876, options.block_size),
            Counts.of_paper("Amazon Video Games", 38_808, 13_379, 352_136, options.block_size),
        ]
    )
    print(
        f"{options.gpu}, {options.parameters:.2g} parameters, {options.image_tokens} tokens an image, "
        f"{options.epochs} epochs, {USED:.0%} of the peak\n"
    )
    print("| data set | stage | tokens read, M | written, M | GPU hours |\n|:--|:--|--:|--:|--:|")
    for counts in sets:
        for stage, read, written, spent in hours(counts, options):
            print(f"| {counts.name} | {stage} | {read:,.1f} | {written:,.1f} | {spent:,.1f} |")


if __name__ == "__main__":
    main()

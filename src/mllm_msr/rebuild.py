"""Add to this data set the texts and images that the terms of its source keep out of it.

    pip install mllm-msr                                   # the version that the card names
    python rebuild.py --data FOLDER_OF_THE_SOURCE --output rebuilt

The source is prepared under ``recipe.yaml`` beside this script. Items and tasks must come out as they were published,
or nothing is written. ``rebuilt`` is then laid out as the published data set, for ``load_dataset("rebuilt", "items")``
and for ``training/sft.py --dataset_name rebuilt``.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import polars as pl

from mllm_msr.hub_cards.chat_table import write_chat_table
from mllm_msr.processing.examples import training_examples
from mllm_msr.processing.prompts import PROMPTS
from mllm_msr.records.recipe import load_content, parse_recipe, with_settings
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS
from mllm_msr.stages import prepare


def rebuild(published: Path, data: str, output: Path) -> None:
    """Write ``output`` from the ``published`` folder and the source in the folder ``data``.

    Raises ``ValueError`` if the source, once prepared, is not what the data set was made of.
    """
    folder = {"source.folder": str(Path(data).resolve())}
    recipe = parse_recipe(with_settings(load_content(published / "recipe.yaml"), folder))
    if output.exists():
        raise ValueError(f"{output} exists already: name another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".rebuilding-") as scratch:
        run = RunFolder.create(Path(scratch) / "run", recipe)
        prepare(run)
        items = pl.read_parquet(published / "items/*.parquet")
        compare("items", items, run.read(ITEMS), ["item_id", "title"])
        tasks = run.tasks("train", "validation", "test")
        compare("tasks", pl.read_parquet(published / "tasks/*.parquet"), tasks, ["split", "cutoff", "candidates"])

        whole = Path(scratch) / "whole"
        shutil.copytree(published, whole, ignore=shutil.ignore_patterns("items", "sft", ".*", "README.md"))
        for table in ("items", "sft"):
            (whole / table).mkdir()
        shutil.copy(run.file(ITEMS), whole / "items/train-00000-of-00001.parquet")
        prompt = {**PROMPTS, **recipe.prompts}["recommendation"]
        for split in ("train", "validation"):
            files = sorted((published / "sft").glob(f"{split}-*.parquet"))
            if files:
                rows = pl.read_parquet(files)
                pairs = rows.with_columns(
                    pl.concat_list("item_id").alias("candidates"), pl.concat_list("label").alias("labels")
                )
                chats = training_examples(pairs, run.read(ITEMS), prompt, recipe.item_noun)
                target = whole / f"sft/{split}-00000-of-00001.parquet"
                write_chat_table(chats, [run.file(ITEMS)], target)
        text = (published / "README.md").read_text(encoding="utf-8")
        (whole / "README.md").write_text(without_sizes(text), encoding="utf-8")
        whole.rename(output)


def compare(name: str, published: pl.DataFrame, rebuilt: pl.DataFrame, columns: list[str]) -> None:
    """An error that counts what differs in ``columns``, whatever the order of the rows."""
    missing = published.select(columns).join(rebuilt.select(columns), on=columns, how="anti", nulls_equal=True)
    if len(missing) or len(published) != len(rebuilt):
        raise ValueError(
            f"{len(missing)} of {len(published)} published {name} are not among the {len(rebuilt)} that this source "
            "gives: it is another version of the source, or of mllm-msr, than the card names"
        )


def without_sizes(card: str) -> str:
    """The card without ``dataset_info``, which speaks of the files as published."""
    lines, kept = card.splitlines(keepends=True), []
    inside = False
    for line in lines:
        inside = line.startswith("dataset_info:") or (inside and line[:2] in ("- ", "  "))
        if not inside:
            kept.append(line)
    return "".join(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the source, as you fetched it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    try:
        rebuild(Path(__file__).resolve().parent, options.data, options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"rebuild: {error}")


if __name__ == "__main__":
    main()

"""The proof against leakage over a whole run: when texts are made, and before anything is published."""

import json

import polars as pl

from mllm_msr.processing.leakage import check_leakage, check_no_ids
from mllm_msr.run import Run


def prove(run: Run) -> None:
    """Check tasks, popularity and, where they are there, preferences and all texts that stand in a prompt.

    Raises :class:`~mllm_msr.processing.leakage.LeakageError` with the rows.
    """
    folder = run.folder
    tasks = pl.read_parquet(folder / "data/tasks.parquet")
    interactions = pl.read_parquet(folder / "data/interactions.parquet")
    items = pl.read_parquet(folder / "data/items.parquet", columns=["item_id", "title", "text"])
    tables = {
        name: pl.read_parquet(folder / f"summaries/{name}.parquet")
        for name in ("items", "preferences")
        if (folder / f"summaries/{name}.parquet").is_file()
    }
    check_leakage(
        tasks,
        interactions,
        pl.read_parquet(folder / "data/popularity.parquet"),
        tables.get("preferences"),
        protocol=json.loads((folder / "data/report.json").read_text(encoding="utf-8"))["protocol"]["name"],
    )
    columns = {"items": "summary", "preferences": "preference"}
    texts = [table[columns[name]].rename("text") for name, table in tables.items()]
    if texts:
        ids = pl.concat([interactions["user_id"].rename("id"), items["item_id"].rename("id")]).unique()
        check_no_ids(pl.concat(texts), ids, allowed=pl.concat([items["title"], items["text"].rename("title")]))

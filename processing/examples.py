"""From tasks and summaries to what the recommender reads: preference, recent items, candidate."""

import polars as pl


def task_contexts(
    tasks: pl.DataFrame, preferences: pl.DataFrame, summaries: pl.DataFrame, block_size: int
) -> pl.DataFrame:
    """The preference each task may use, and the items read since.

    A task with n items of history uses step n // block_size, whose blocks lie wholly before the target; the remaining
    n % block_size items are ``recent``, by their summaries.

    Args:
        tasks: ``task_id``, ``user_id``, ``history`` and whatever else is to be kept.
        preferences: ``user_id``, ``step``, ``preference``; steps count from 1.
        summaries: ``item_id``, ``summary``.

    Returns:
        ``tasks`` with ``preference`` ("" before the first block is whole) and ``recent`` (list of str).
    """
    read = (pl.col("history").list.len() // block_size).cast(pl.Int64)
    tasks = tasks.with_columns(read.alias("step"))
    recent = (
        tasks.select("task_id", pl.col("history").list.slice(read * block_size).alias("item_id"))
        .explode("item_id", empty_as_null=True)
        .join(summaries.select("item_id", "summary"), on="item_id", how="left", maintain_order="left")
        .group_by("task_id", maintain_order=True)
        .agg(pl.col("summary").drop_nulls().alias("recent"))
    )
    return (
        tasks.join(preferences.select("user_id", "step", "preference"), on=["user_id", "step"], how="left")
        .with_columns(pl.col("preference").fill_null(""))
        .drop("step")
        .join(recent, on="task_id", how="left", maintain_order="left")
    )


def training_examples(contexts: pl.DataFrame, titles: pl.DataFrame) -> pl.DataFrame:
    """One row a candidate: ``task_id``, ``user_id``, ``item_id``, ``label``, ``preference``, ``recent``, ``title``."""
    return (
        contexts.select("task_id", "user_id", pl.col("candidates").alias("item_id"), "labels", "preference", "recent")
        .explode("item_id", "labels")
        .rename({"labels": "label"})
        .join(titles.select("item_id", "title"), on="item_id", how="left", maintain_order="left")
        .select("task_id", "user_id", "item_id", "label", "preference", "recent", "title")
    )

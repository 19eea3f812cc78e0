"""From tasks and summaries to what the recommender reads: preference, recent items, candidate."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from mllm_msr.processing.chat import chat_parts

MESSAGES = pl.List(
    pl.Struct({"role": pl.String, "content": pl.List(pl.Struct({"type": pl.String, "text": pl.String}))})
)


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


def training_examples(contexts: pl.DataFrame, items: pl.DataFrame, prompt: str, noun: str = "item") -> pl.DataFrame:
    """One row a candidate: the facts of the example, and the same as a chat that any trainer understands.

    Args:
        contexts: tasks with ``preference`` and ``recent``, see :func:`task_contexts`.
        items: ``item_id``, ``title``, ``text``, ``image``.
        prompt: the template of the recommendation.

    Returns:
        ``task_id``, ``user_id``, ``item_id``, ``label``, ``preference``, ``recent``, ``title``, and ``prompt`` and
        ``completion``: lists of one message, whose content is a list of ``{"type": "text", "text": ...}`` and, where
        the candidate's picture stands, ``{"type": "image", "text": null}``.
    """
    rows = (
        contexts.select("task_id", "user_id", pl.col("candidates").alias("item_id"), "labels", "preference", "recent")
        .explode("item_id", "labels")
        .rename({"labels": "label"})
        .join(
            items.select(
                "item_id", "title", "text", pl.col("image").struct.field("bytes").is_not_null().alias("image")
            ),
            on="item_id",
            how="left",
            maintain_order="left",
        )
    )
    asked, answered = [], []
    for row in rows.iter_rows(named=True):
        parts = recommendation_parts(row, prompt, noun)
        content = [_part("text", part) if isinstance(part, str) else _part("image") for part in parts]
        asked.append([{"role": "user", "content": content}])
        answered.append([{"role": "assistant", "content": [_part("text", "Yes" if row["label"] else "No")]}])
    return (
        rows.drop("text", "image")
        .with_columns(pl.Series("prompt", asked, MESSAGES), pl.Series("completion", answered, MESSAGES))
        .select("task_id", "user_id", "item_id", "label", "preference", "recent", "title", "prompt", "completion")
    )


def recommendation_parts(row: Mapping[str, Any], prompt: str, noun: str) -> list[Any]:
    """The finished prompt of one candidate, see :func:`~mllm_msr.processing.chat.chat_parts`.

    It is made of ``preference``, ``recent`` (list of str), ``title``, ``text`` and ``image`` (whether there is one) of
    ``row`` and of nothing else that stands there: no id and no label can get in.
    """
    values = {name: row[name] for name in ("preference", "title", "text")}
    recent = [{"summary": summary} for summary in row["recent"] or ()]
    return chat_parts(prompt, {**values, "recent": recent, "image": True if row["image"] else None}, noun)


def _part(kind: str, text: str | None = None) -> dict[str, str | None]:
    return {"type": kind, "text": text}

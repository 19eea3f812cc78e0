"""From tasks and summaries to what the recommender reads: preference, recent items, candidate."""

from collections.abc import Iterable
from typing import Any

import polars as pl

from mllm_msr.modeling.inputs import Candidate, HistoryItem, User
from mllm_msr.modeling.preference import whole_blocks
from mllm_msr.processing.chat import chat_parts, harmless
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CONTEXTS, EXAMPLES, ITEM_SUMMARIES, MESSAGES, PREFERENCES


def run_contexts(run: RunFolder, *splits: str) -> pl.DataFrame:
    """The contexts of a run's tasks of ``splits``, see :func:`task_contexts`."""
    return task_contexts(run.tasks(*splits), run.read(PREFERENCES), run.read(ITEM_SUMMARIES), run.block_size)


def task_contexts(
    tasks: pl.DataFrame, preferences: pl.DataFrame, summaries: pl.DataFrame, block_size: int
) -> pl.DataFrame:
    """The preference that each task may use, and the items chosen since it was written.

    The preference is that after the last whole history block, all of which lies before the task's target; the items
    of the history after that block are ``recent``, by their summaries.

    Args:
        tasks: ``task_id``, ``user_id``, ``history``, ``candidates``, ``labels``; further columns are kept.
        preferences: ``user_id``, ``step`` (from 1), ``preference``.
        summaries: ``item_id``, ``summary``.

    Returns:
        ``tasks`` with the further columns of ``CONTEXTS``: ``preference``, "" before the first whole block, and
        ``recent``, a list of summaries.
    """
    step = whole_blocks(pl.col("history").list.len(), block_size).cast(pl.Int64)
    tasks = tasks.with_columns(step.alias("step"))
    recent = (
        tasks.select("task_id", pl.col("history").list.slice(pl.col("step") * block_size).alias("item_id"))
        .explode("item_id", empty_as_null=True)
        .join(summaries.select("item_id", "summary"), on="item_id", how="left", maintain_order="left")
        .group_by("task_id", maintain_order=True)
        .agg(pl.col("summary").drop_nulls().alias("recent"))
    )
    contexts = (
        tasks.join(preferences.select("user_id", "step", "preference"), on=["user_id", "step"], how="left")
        .with_columns(pl.col("preference").fill_null(""))
        .drop("step")
        .join(recent, on="task_id", how="left", maintain_order="left")
    )
    CONTEXTS.check(contexts, "the contexts of the tasks")
    return contexts


def user_of(preference: str | None, recent: Iterable[str] | None) -> User:
    """A user of whom the preference in force is known, and the summaries of the items chosen since."""
    return User(preference or "", tuple(HistoryItem(summary=summary) for summary in recent or ()))


def users_of(contexts: pl.DataFrame) -> list[User]:
    """The user of each row of a frame with ``preference`` and ``recent``, as contexts and examples have them."""
    return [user_of(preference, recent) for preference, recent in contexts.select("preference", "recent").iter_rows()]


def training_examples(contexts: pl.DataFrame, items: pl.DataFrame, prompt: str, noun: str = "item") -> pl.DataFrame:
    """One row for each candidate: the facts of the example, and the same as a chat that any trainer understands.

    Args:
        contexts: see :func:`task_contexts`.
        items: ``item_id``, ``title``, ``text``, ``image``.
        prompt: the template of the recommendation.

    Returns:
        The table ``EXAMPLES``. Its ``prompt`` and ``completion`` are lists of one message, whose content is a list of
        ``{"type": "text", "text": ...}`` and, where the candidate's image stands, ``{"type": "image", "text": null}``.
    """
    has_image = pl.col("image").struct.field("bytes").is_not_null().alias("image")
    rows = (
        contexts.select("task_id", "user_id", pl.col("candidates").alias("item_id"), "labels", "preference", "recent")
        .explode("item_id", "labels")
        .rename({"labels": "label"})
        .join(items.select("item_id", "title", "text", has_image), on="item_id", how="left", maintain_order="left")
    )
    questions = [
        _message("user", recommendation_parts(user, candidate, prompt, noun))
        for user, candidate in zip(users_of(rows), candidates_of(rows), strict=True)
    ]
    answers = [_message("assistant", ["Yes" if label else "No"]) for label in rows["label"]]
    examples = rows.with_columns(
        pl.Series("prompt", questions, MESSAGES), pl.Series("completion", answers, MESSAGES)
    ).select(*EXAMPLES.columns)
    EXAMPLES.check(examples, "the training examples")
    return examples


def candidates_of(rows: pl.DataFrame) -> list[Candidate]:
    """The candidate of each row with ``item_id``, ``title``, ``text`` and ``image``: whether there is an image."""
    return [
        Candidate(item_id, title or "", text or "", True if image else None)
        for item_id, title, text, image in rows.select("item_id", "title", "text", "image").iter_rows()
    ]


def recommendation_parts(user: User, candidate: Candidate, prompt: str, noun: str) -> list[Any]:
    """The finished prompt of one candidate, see :func:`~mllm_msr.processing.chat.chat_parts`.

    It is made of the user's preference and recent items and of the candidate's title, text and image, and of nothing
    else: no id and no label can get in, and no control token, as other trainers take such within a text for one.
    """
    recent = [{"title": item.title, "summary": item.summary} for item in user.recent]
    words = {"preference": user.preference, "recent": recent, "title": candidate.title, "text": candidate.text}
    return chat_parts(prompt, {**harmless(words), "image": candidate.image}, noun)


def _message(role: str, parts: list[Any]) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    return [{"role": role, "content": content}]

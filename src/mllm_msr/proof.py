"""The proof against leakage over a whole run: when texts are made, and before anything is published.

No prompt has a raw id, of whatever length, because (1) the templates print only texts and images, never an id, (2)
each finished prompt is, letter by letter, what its template makes of these, (3) no title or description is an id, and
(4) no text that was generated has an id in it. Under (4) an id shorter than six characters is not looked for, as it
cannot be told from a number; but by (1) and (3) the model that wrote the text was never shown one.
"""

from collections.abc import Mapping
from pathlib import Path

import polars as pl
from jinja2 import TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mllm_msr.data.leakage import (
    LeakageError,
    check_leakage,
    check_no_ids,
    check_own_words,
    check_used_preferences,
)
from mllm_msr.processing.examples import candidates_of, recommendation_parts, run_contexts, users_of
from mllm_msr.processing.prompts import PROMPTS
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import (
    CUT_INTERACTIONS,
    EXAMPLES,
    INTERACTIONS,
    ITEM_SUMMARIES,
    ITEMS,
    POPULARITY,
    PREFERENCES,
    TASKS,
)
from mllm_msr.records.storage import read_json
from mllm_msr.records.typed import check_names


def prove(run: RunFolder, examples: Path | None = None) -> None:
    """Check templates, tasks, popularity and, where they are there, preferences, generated texts and finished prompts.

    ``examples`` is the folder of the training prompts, if they have not taken their place yet. Raises
    :class:`~mllm_msr.data.leakage.LeakageError` with the rows.
    """
    check_templates(run.recipe.prompts)
    report = read_json(run.data_report)
    cut = report["options"]["max_history"] is not None
    tasks, interactions = run.read(TASKS), run.read(INTERACTIONS)
    has_image = pl.col("image").struct.field("bytes").is_not_null().alias("image")
    catalogue = run.scan(ITEMS).select("item_id", "title", "text", has_image)
    items = catalogue.collect(engine="streaming")
    summaries, preferences = (run.read(table) if run.has(table) else None for table in (ITEM_SUMMARIES, PREFERENCES))
    check_leakage(
        tasks,
        interactions,
        run.read(POPULARITY),
        preferences,
        seen=run.read(CUT_INTERACTIONS) if cut else None,
        protocol=report["protocol"]["name"],
    )
    check_own_words(items)
    texts = [] if summaries is None else [summaries["summary"].rename("text")]
    texts += [] if preferences is None else [preferences["preference"].rename("text")]
    if texts:
        ids = pl.concat([interactions["user_id"].rename("id"), items["item_id"].rename("id")]).unique()
        check_no_ids(pl.concat(texts), ids, allowed=pl.concat([items["title"], items["text"].rename("title")]))
    if preferences is not None:
        check_used_preferences(tasks, preferences, run.block_size)
        template = {**PROMPTS, **run.recipe.prompts}["recommendation"]
        for split in ("train", "validation"):
            path = examples / f"{split}.parquet" if examples else run.file(EXAMPLES, split)
            if path.is_file():
                rows = EXAMPLES.read(path, ["task_id", "item_id", "prompt"])
                check_prompts(rows, run_contexts(run, split), items, template, run.recipe.item_noun)


def check_templates(prompts: Mapping[str, str]) -> None:
    """A template prints only what its default does: no id, no label; ``ValueError`` names what else it asks for."""

    def variables(template: str) -> set[str]:
        return meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(template))

    check_names(prompts, PROMPTS, "prompts")
    for name, template in prompts.items():
        allowed = variables(PROMPTS[name]) | {"noun"}
        try:
            printed = variables(template)
        except TemplateSyntaxError as error:
            raise ValueError(f"prompts.{name}, line {error.lineno}: {error.message}") from error
        if unknown := printed - allowed:
            raise ValueError(f"prompts.{name}: unknown variable {min(unknown)!r}; it may print {sorted(allowed)}")
        if allowed - {"noun"} and not printed - {"noun"}:  # `late_answer` is the same for all by default, too
            raise ValueError(f"prompts.{name}: prints none of {sorted(allowed)}, so all prompts would be the same")


def check_prompts(
    examples: pl.DataFrame, contexts: pl.DataFrame, items: pl.DataFrame, template: str, noun: str = "item"
) -> None:
    """Each finished prompt is what the template makes of its task's preference and recent summaries and of the
    candidate's title, text and image, and of nothing else; or raise LeakageError with the rows.

    Args:
        examples: ``task_id``, ``item_id``, ``prompt`` as :func:`~mllm_msr.processing.examples.training_examples` makes.
        contexts: ``task_id``, ``preference``, ``recent``.
        items: ``item_id``, ``title``, ``text``, ``image`` (whether there is one).
    """
    rows = examples.select("task_id", "item_id", "prompt").join(
        contexts.select("task_id", "preference", "recent"), on="task_id", how="left", maintain_order="left"
    )
    rows = rows.join(items, on="item_id", how="left", maintain_order="left")
    wrong = []
    for (task, item, (message,)), user, candidate in zip(
        rows.select("task_id", "item_id", "prompt").iter_rows(), users_of(rows), candidates_of(rows), strict=True
    ):
        parts = [part["text"] if part["type"] == "text" else True for part in message["content"]]
        if parts != recommendation_parts(user, candidate, template, noun):
            wrong.append((task, item, parts))
    if wrong:
        raise LeakageError(
            f"leakage: prompts that are not made of their template, preference, recent items and candidate alone: "
            f"{len(wrong)} rows, such as\n  {wrong[0]}"
        )

"""The stages of a run: what each reads of the recipe, and which earlier ones it rests on."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mllm_msr.records.recipe import Recipe
from mllm_msr.records.sections import HEAD_VARIANTS


@dataclass(frozen=True)
class StageSpec:
    """A stage.

    Args:
        sections: of the recipe that its command may change by ``--set``.
        settings: what of the recipe its output depends on.
        after: the stages it rests on.
    """

    sections: tuple[str, ...]
    settings: Callable[[Recipe], Any]
    after: Callable[[Recipe], tuple[str, ...]]


def _item_texts(recipe: Recipe) -> Any:
    return [recipe.summaries.facts(), recipe.prompts, recipe.item_noun]


def _user_texts(recipe: Recipe) -> Any:
    return [recipe.summaries.for_users().facts(), recipe.prompts, recipe.item_noun]


def _item_vectors(recipe: Recipe) -> Any:
    flags = ("dtype",) if recipe.vectors.model else ("model_name_or_path", "model_revision", "dtype")
    model = [recipe.training.get(name) for name in flags]
    return [recipe.vectors.facts(), model, recipe.prompts.get("late_item"), recipe.item_noun]


def _read_by_vectors(recipe: Recipe) -> tuple[str, ...]:
    return ("summarize items",) if recipe.vectors_read_summaries else ("prepare",)


STAGES: dict[str, StageSpec] = {  # in their order, by the command that does each
    "prepare": StageSpec(
        ("source", "data"), lambda recipe: [asdict(recipe.source), asdict(recipe.data)], lambda recipe: ()
    ),
    "summarize items": StageSpec(("summaries", "prompts", "item_noun"), _item_texts, lambda recipe: ("prepare",)),
    "summarize users": StageSpec(
        ("summaries", "prompts", "item_noun"), _user_texts, lambda recipe: ("summarize items",)
    ),
    "vectors": StageSpec(("vectors",), _item_vectors, _read_by_vectors),
    "train": StageSpec(("training",), Recipe.training_flags, lambda recipe: ("summarize users",)),
    "head": StageSpec(
        ("head",),
        lambda recipe: [asdict(recipe.head), recipe.fuses_answer],
        lambda recipe: ("prepare", "vectors", *(("train",) if recipe.fuses_answer else ())),
    ),
    "evaluate": StageSpec(  # of baselines alone it rests on the data only, as its entry in the provenance then says
        ("evaluation",),
        lambda recipe: asdict(recipe.evaluation),
        lambda recipe: (
            *("prepare", "summarize users", "train"),
            *(("head",) if set(HEAD_VARIANTS) & set(recipe.evaluation.rows) else ()),
        ),
    ),
    "report": StageSpec(
        ("license",), lambda recipe: [recipe.name, recipe.license, recipe.item_noun], lambda recipe: ("evaluate",)
    ),
}

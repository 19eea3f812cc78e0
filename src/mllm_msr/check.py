"""``mllm-msr check``: a recipe tried in full on a few users, in a folder that is then removed, and its costs."""

import contextlib
import io
import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_msr import stages
from mllm_msr.costs import Rehearsal, cost_table, in_time
from mllm_msr.data.sources.registry import check_source
from mllm_msr.evaluation.evaluate import scorable
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.run import RunFolder

USERS = 20  # of the rehearsal
STEPS = 4  # of its training
EPOCHS = 2  # of its heads


def check(recipe: Recipe, place: Path, run: RunFolder | None = None, users: int = USERS) -> None:
    """Rehearse a checked recipe on some users, and print what each stage of the whole will take.

    Args:
        place: where the run will be written.
        run: one that is there already: only what is still to be done is counted.

    Raises:
        ValueError, OSError: what the run itself would stop on, with the stage.
    """
    check_source(recipe.source)
    if recipe.training.get("model_name_or_path"):
        stages.check_training(recipe)
    print(f"recipe {recipe.name!r}: every value is sound; rehearsing it on {users} users ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="mllm-msr-check-") as folder:
        rehearsal = rehearse(recipe, Path(folder) / "run", users)
        costs = rehearsal.costs()
    if run is not None:
        pending = run.pending("report")
        if done := [cost.stage for cost in costs if cost.stage not in pending]:
            print(f"done already: {', '.join(done)}")
        costs = [cost for cost in costs if cost.stage in pending]
    if costs:
        print(cost_table(costs))
        print("These are estimates from the rehearsal; training and heads may stop earlier.")
    free = shutil.disk_usage(next(parent for parent in [place, *place.resolve().parents] if parent.is_dir())).free
    if (needed := sum(cost.size for cost in costs)) > free:
        raise ValueError(f"{place}: about {needed / 1e9:,.1f} GB are needed, and {free / 1e9:,.1f} GB are free there")


def rehearse(recipe: Recipe, path: Path, users: int) -> Rehearsal:
    """Every stage of a recipe on some users, with a few steps of training, in the folder ``path``."""
    training: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    training |= {"max_steps": min(STEPS, recipe.training["max_steps"]) if recipe.training["max_steps"] > 0 else STEPS}
    training |= {"early_stopping_patience": None, "report_to": ["none"]}
    small = replace(
        recipe,
        data=replace(recipe.data, limit_users=min(users, recipe.data.limit_users or users)),
        summaries=replace(recipe.summaries, cache=None),
        training={**recipe.training, **training},
        head=replace(
            recipe.head,
            max_epochs=min(EPOCHS, recipe.head.max_epochs),
            answer_tasks=min(users, recipe.head.answer_tasks),
        ),
        evaluation=replace(recipe.evaluation, full_catalogue=None, agreement=None),
    )
    run, trains = RunFolder.create(path, small), bool(recipe.training.get("model_name_or_path"))
    for name in stages.stages_of(small):
        if name == "train" and not trains:
            continue
        with quietly():
            try:
                if name == "evaluate" and not trains:
                    stages.evaluate(run, scorable(run))
                else:
                    stages.FUNCTIONS[name](run)
            except (ValueError, OSError, RuntimeError) as error:
                raise type(error)(f"stage {name!r}: {error}") from error
        print(f"  {name}: works, {run.provenance()['stages'][name]['seconds']} s", flush=True)
    return Rehearsal(run, recipe)


def say_the_whole(run: RunFolder) -> None:
    """After a run on some users (``--limit-users``): how long the whole will take."""
    rehearsal = Rehearsal(run, replace(run.recipe, data=replace(run.recipe.data, limit_users=None)))
    if rehearsal.whole.users <= rehearsal.sample.users:
        return
    with quietly():
        costs = rehearsal.costs()
    print(f"\nAll {rehearsal.whole.users:,.0f} users, estimated from these {rehearsal.sample.users:,.0f}:")
    print(cost_table(costs))
    print(f"about {in_time(sum(cost.seconds for cost in costs))} in all, without --limit-users")


@contextlib.contextmanager
def quietly() -> Any:
    """Nothing is printed within the block, no progress bar and no warning of a library either."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)

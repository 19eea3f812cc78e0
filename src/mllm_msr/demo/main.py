"""``mllm-msr demo``: the whole method on the embedded data set, with its own check of the outcome."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mllm_msr.opening import check_recipe
from mllm_msr.records.recipe import Recipe, demo_recipe, load_content, with_settings
from mllm_msr.records.run import RunFolder
from mllm_msr.stages import run_all

Interaction = Literal["joint", "late"]


def demo(output: Path, interaction: Interaction = "joint") -> RunFolder:
    """Run every stage and exit with an error if what the method rests on did not show."""
    start = time.monotonic()
    run = demo_run(output, interaction)
    run_all(run)
    auc = {variant: metrics["auc"].value for variant, metrics in run.results().variants.items()}
    print(f"\ndone in {time.monotonic() - start:.0f} s; the best achievable AUC (oracle) is {auc['oracle']:.3f}")
    for path in (run.report, run.metrics, run.hub):
        print(f"  {path}")
    if problems := shortcomings(auc):
        sys.exit("mllm-msr demo FAILED: " + "; ".join(problems))
    return run


def recipe_of(interaction: Interaction) -> Recipe:
    """The demo's recipe for a model that reads user and candidate jointly, or keeps each and joins them late."""
    content = load_content(demo_recipe())
    if interaction == "late":
        content = with_settings(content, load_content(Path(__file__).with_name("late.yaml"))) | {"name": "demo-late"}
    return check_recipe(content)


def demo_run(output: Path, interaction: Interaction = "joint") -> RunFolder:
    """The demo's run in ``output``; one that is there keeps the variants that it has been evaluated with.

    Raises ValueError if ``output`` holds a run of another recipe.
    """
    recipe = recipe_of(interaction)
    if (output / "config.yaml").is_file():
        earlier = RunFolder.open(output).recipe
        variants = list(dict.fromkeys([*recipe.evaluation.rows, *earlier.evaluation.rows]))
        if replace(earlier, evaluation=recipe.evaluation) != recipe:
            raise ValueError(
                f"{output} holds a run of another recipe, {earlier.name!r}: name another folder by --output; to see "
                f"that run in the browser: `mllm-msr show {output} page`"
            )
        recipe = replace(earlier, evaluation=replace(earlier.evaluation, rows=variants))
    return RunFolder.create(output, recipe)


def shortcomings(auc: dict[str, float]) -> list[str]:
    """What the method rests on and the rows of the table do not show, in words; nothing if all is well.

    >>> shortcomings({"mllm_msr": 0.8, "popularity": 0.6, "no_sft": 0.55, "blank_images": 0.8})
    ['blank images cost nothing (AUC 0.800 against 0.800)']
    """
    ours = auc["mllm_msr"]
    problems = [
        f"the trained model (AUC {ours:.3f}) does not beat {row} ({auc[row]:.3f})"
        for row in ("popularity", "no_sft")
        if not ours > auc[row]
    ]
    if not auc["blank_images"] < ours:
        problems.append(f"blank images cost nothing (AUC {auc['blank_images']:.3f} against {ours:.3f})")
    return problems

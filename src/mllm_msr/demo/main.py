"""``mllm-msr demo``: the whole method on the embedded data set, with its own check of the outcome."""

import json
import sys
import time
from importlib.resources import files
from pathlib import Path

from mllm_msr.processing.recipe import load_recipe
from mllm_msr.run import Run
from mllm_msr.stages import run_all


def demo(output: Path) -> None:
    """Run every stage and exit with an error if what the method rests on did not show."""
    start = time.monotonic()
    recipe = load_recipe(Path(str(files("mllm_msr") / "demo" / "recipe.yaml")))
    run_all(Run.create(output, recipe))
    auc = {
        row: figures["auc"]["value"]
        for row, figures in json.loads((output / "metrics.json").read_text(encoding="utf-8"))["rows"].items()
    }
    print(f"\ndone in {time.monotonic() - start:.0f} s; the best achievable AUC (oracle) is {auc['oracle']:.3f}")
    for path in ("report.html", "metrics.json", "hub"):
        print(f"  {output / path}")
    problems = [
        f"the trained model (AUC {auc['mllm_msr']:.3f}) does not beat {row} ({auc[row]:.3f})"
        for row in ("popularity", "no_sft")
        if auc["mllm_msr"] <= auc[row]
    ]
    if auc["blank_images"] >= auc["mllm_msr"]:
        problems.append(f"blank images cost nothing (AUC {auc['blank_images']:.3f} against {auc['mllm_msr']:.3f})")
    if problems:
        sys.exit("mllm-msr demo FAILED: " + "; ".join(problems))

"""Cross-domain: the tasks of one data set, ranked by the model of another."""

import json
from dataclasses import replace
from pathlib import Path

from mllm_msr.processing.recipe import load_recipe
from mllm_msr.processing.storage import folder_digest, write_text
from mllm_msr.run import Run
from mllm_msr.scoring import DEFAULT_ROWS


def with_model_of(run: Run, place: str) -> Run:
    """``run`` under another model: the run directory ``RUN/transfer/<model>``, with the same data and summaries.

    ``place``: another run directory, a model folder, or a repository of the Hub (``OWNER/NAME[@REVISION]``). What is
    evaluated and reported there leaves ``run`` as it was. The row ``no_sft`` is left out: it is of the run's backbone.
    """
    model, name, revision = find_model(place)
    folder = run.folder / "transfer" / name.strip("/").replace("/", "--")
    evaluation = {
        **run.recipe.evaluation,
        "rows": [row for row in run.recipe.evaluation.get("rows", DEFAULT_ROWS) if row != "no_sft"],
    }
    training = {"model_name_or_path": name, "model_revision": revision}
    other = Run.create(folder, replace(run.recipe, training=training, evaluation=evaluation))
    for part, target in (("data", run.folder / "data"), ("summaries", run.folder / "summaries"), ("model", model)):
        link = folder / part
        link.unlink(missing_ok=True)
        link.symlink_to(target.resolve(), target_is_directory=True)
    provenance, known = other.provenance(), run.provenance()
    provenance["stages"] |= {stage: facts for stage, facts in known["stages"].items() if stage != "evaluate"}
    users = run.key("summarize users")
    provenance["stages"]["train"] = {**provenance["stages"].get("train", {}), "key": f"{users} {name} {revision}"}
    provenance["stages"].pop("report", None)
    write_text(folder / "provenance.json", json.dumps(provenance, indent=2))
    return other


def find_model(place: str) -> tuple[Path, str, str]:
    """The folder of a model, its name, and its revision: a hash of the folder, or the commit on the Hub."""
    folder = Path(place)
    if (folder / "config.yaml").is_file():
        Run.open(folder).key("train")
        return folder / "model", load_recipe(folder / "config.yaml").name, folder_digest(folder / "model")
    if folder.is_dir():
        return folder, folder.resolve().name, folder_digest(folder)
    from huggingface_hub import snapshot_download

    name, _, revision = place.partition("@")
    found = Path(snapshot_download(name, revision=revision or None))  # names what is neither a folder nor a repository
    return found, name, found.name

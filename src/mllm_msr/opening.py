"""From a recipe file or own tables, and what the command line overrides, to a checked recipe and its run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from mllm_msr.data.remote_files import is_remote
from mllm_msr.data.sources.registry import check_source, effective_source, source_options
from mllm_msr.evaluation.loading import check_cache_dtype
from mllm_msr.evaluation.variants import check_evaluation
from mllm_msr.processing.prompts import MAX_NEW_TOKENS
from mllm_msr.proof import check_templates
from mllm_msr.records.recipe import Recipe, load_content, parse_recipe, recipe_file, section_of, with_settings
from mllm_msr.records.run import RunFolder
from mllm_msr.records.sections import VECTOR_ORIGINS
from mllm_msr.records.stage_specs import STAGES
from mllm_msr.records.typed import check_names
from mllm_msr.sizing import look_at, sized_for, this_machine


@dataclass(frozen=True)
class Overrides:
    """What the command line says over a recipe; None and empty mappings leave the recipe as it is.

    Args:
        data: folder of the raw data, or ``hf://datasets/OWNER/NAME``.
        interactions, items, images: own tables in place of the recipe's source.
        columns: our column names to those of the own tables.
        limit_users, protocol, folds, fold, on_bad_rows: values of the section ``data``.
        negatives: per held-out target, or "all" for the full catalogue.
        negative_sampling: "uniform" or "popularity".
        seed: of candidates, samples, training and evaluation.
        backbone: the model to fine-tune.
        settings: any other values, ``{"section.name": value}``.
    """

    data: str | None = None
    interactions: str | None = None
    items: str | None = None
    images: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    limit_users: int | None = None
    protocol: str | None = None
    negatives: int | Literal["all"] | None = None
    negative_sampling: str | None = None
    folds: int | None = None
    fold: int | None = None
    on_bad_rows: str | None = None
    seed: int | None = None
    backbone: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's mapping under these values."""
        source, data = (section_of(content, section) for section in ("source", "data"))
        tables = {"interactions": self.interactions, "items": self.items, "images": self.images}
        given = {name: absolute(place) for name, place in tables.items() if place is not None}
        if given and source.get("type") != "tables":
            source = {"type": "tables"}
        source |= given
        if self.columns:
            source["columns"] = {**(source.get("columns") or {}), **self.columns}
        if self.data:
            source["folder"] = absolute(self.data)
        for name in ("limit_users", "protocol", "folds", "fold", "on_bad_rows", "seed"):
            if (value := getattr(self, name)) is not None:
                data[name] = value
        if self.negatives == "all":
            data["negatives"] = "all"
        elif self.negatives is not None:
            data["n_negatives"] = self.negatives
            data["negatives"] = "uniform" if data.get("negatives") == "all" else data.get("negatives", "uniform")
        if self.negative_sampling:
            data["negatives"] = self.negative_sampling
        settings: dict[str, Any] = {}
        if self.seed is not None:
            settings |= {"training.seed": self.seed, "evaluation.seed": self.seed}
        if self.backbone:
            settings["training.model_name_or_path"] = self.backbone
        return with_settings({**content, "source": source, "data": data}, {**settings, **self.settings})


def open_recipe(recipe: Path | None, overrides: Overrides, output: Path | None = None) -> RunFolder:
    """The run of a recipe, see :func:`read_recipe`, in ``output`` (by default below ``runs``)."""
    checked, path, _ = read_recipe(recipe, overrides, output)
    refuse_other_data(path, checked)
    return RunFolder.create(path, checked)


def read_recipe(
    recipe: Path | None, overrides: Overrides, output: Path | None = None
) -> tuple[Recipe, Path, RunFolder | None]:
    """A recipe and where its run lies; and the run, if ``recipe`` is the folder of one.

    Args:
        recipe: a file, the name of one inside the package, or a run's folder; None: own tables alone, with what fits
            this machine and the backbone.

    Raises:
        ValueError: anything in the recipe that is unknown, of a wrong type or missing, or a folder of another run.
        FileNotFoundError: a recipe file or raw data that does not exist.
    """
    run = RunFolder.open(recipe) if recipe and recipe.is_dir() else None
    if recipe and run:
        content, name = run.recipe.to_dict(), recipe.name
    elif recipe:
        recipe = recipe_file(recipe)
        content, name = load_content(recipe), recipe.stem
    else:
        name = Path((overrides.interactions or "").split("?")[0]).name.split(".")[0]
        content = {"name": name, "source": {"type": "tables"}}
        if overrides.backbone:
            content |= sized_for(look_at(overrides.backbone), this_machine()).sections
    try:
        checked = check_recipe(overrides.apply(content))
        check_source(checked.source)
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}" if recipe else str(error)) from error
    return checked, run.path if run else output or Path("runs") / name, run


def open_run(path: Path, stage: str | None = None, settings: Mapping[str, Any] | None = None) -> RunFolder:
    """An existing run; for a stage with its recipe checked, under ``settings`` of the sections that it reads. For
    ``summarize``, which reads nothing of the section ``training``, that is left as it is.

    What is refused leaves the run's recipe as it was.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a mistake in the recipe, or a setting that an earlier stage reads.
    """
    run = RunFolder.open(path)
    if stage is None:
        return run
    with_settings({}, settings or {})  # names a section that there is not
    for key in settings or {}:
        section = key.partition(".")[0]
        if section not in STAGES[stage].sections:
            owner = next((name for name, spec in STAGES.items() if section in spec.sections), "prepare")
            raise ValueError(
                f"--set {key}: `{stage}` does not read the section {section!r}; it is read first by "
                f"`{run.command(owner)} --set {key}=...`"
            )
    origins = [f"vectors.{name}" for name in VECTOR_ORIGINS]
    if any(key in origins for key in settings or {}):  # the one that is named takes the place of the others
        settings = {**dict.fromkeys(origins), **(settings or {})}
    content, with_training = with_settings(run.recipe.to_dict(), settings or {}), not stage.startswith("summarize")
    recipe = check_recipe(content, with_training)
    if recipe == run.recipe:
        return run
    _refuse_early_settings(run, replace(run, recipe=parse_recipe(content)), stage, settings or {})
    if stage == "evaluate" and run.model.is_dir():
        check_cache_dtype(run, recipe.evaluation.cache_dtype)
    return RunFolder.create(path, recipe)


def _refuse_early_settings(run: RunFolder, changed: RunFolder, stage: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if settings given to a stage put an earlier one out of date, to be done again first."""
    for earlier in STAGES[stage].after(changed.recipe):
        if spoilt := [name for name in changed.pending(earlier) if name not in run.pending(earlier)]:
            given = " ".join(f"--set {key}={'null' if value is None else value}" for key, value in settings.items())
            raise ValueError(
                f"{given}: `{spoilt[0]}` reads this, too, and is done already: run `{run.command(spoilt[0])} {given}` "
                f"first"
            )


def check_recipe(content: Mapping[str, Any], with_training: bool = True) -> Recipe:
    """A recipe from its mapping, with all that rooms know of its sections checked; ValueError for the first mistake.

    Raw data is not looked for: later stages can do without. ``with_training``: see :func:`open_run`.
    """
    if with_training:
        from mllm_msr.training.arguments import effective_flags  # here, as TRL takes seconds to load

        recipe = parse_recipe(content, effective_flags)
    else:
        recipe = parse_recipe(content)
    recipe = replace(recipe, source=effective_source(recipe.source))
    check_templates(recipe.prompts)
    check_names(recipe.summaries.max_new_tokens, MAX_NEW_TOKENS, "summaries.max_new_tokens")
    check_evaluation(recipe)
    return recipe


def refuse_other_data(path: Path, recipe: Recipe) -> None:
    """Raise ValueError if ``path`` holds a run of another log or folder of raw data.

    Data that has moved is no longer where it was; if both places exist, the folder would be made another run's.
    """
    if not (path / "config.yaml").is_file():
        return
    earlier, wanted = (
        source_options(source).roots()[:1] for source in (RunFolder.open(path).recipe.source, recipe.source)
    )
    if earlier != wanted and any(isinstance(place, str) or place.exists() for place in earlier):
        raise ValueError(f"{path} holds a run of {earlier[0]}, not of {wanted[0]}: name another folder by --output")


def parse_setting(key: str, text: str) -> Any:
    """The value of ``--set key=text``, written as in YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: {text!r} is not valid YAML; put a text in (further) quotes") from error


def absolute(place: str) -> str:
    """A local path as seen from anywhere; addresses stay."""
    return place if place.startswith("hf:") or is_remote(place) else str(Path(place).resolve())

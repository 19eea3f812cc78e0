"""From a recipe file or own tables, and what the command line overrides, to a checked recipe and its run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mllm_msr.data.sources.registry import check_source
from mllm_msr.proof import check_templates
from mllm_msr.records.recipe import Recipe, load_content, parse_recipe, with_settings
from mllm_msr.records.run import RunFolder


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
        source, data = (dict(content.get(section) or {}) for section in ("source", "data"))
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


def open_recipe(
    recipe: Path | None, overrides: Overrides, output: Path | None = None, trains: bool = False
) -> RunFolder:
    """The run of a recipe file, or of own tables alone, in ``output`` (by default below ``runs``).

    Args:
        trains: whether a model is to be fine-tuned, for which own tables have to name one.

    Raises:
        ValueError: neither a recipe nor tables, or anything in them that is unknown, of a wrong type, or missing.
        FileNotFoundError: a recipe file or raw data that does not exist.
    """
    if recipe:
        content, name = load_content(recipe), recipe.stem
    elif overrides.interactions:
        name = Path(overrides.interactions.split("?")[0]).name.split(".")[0]
        content = {"name": name, "source": {"type": "tables"}, "summaries": {"engine": "extractive"}}
        if trains and not overrides.backbone:
            raise ValueError("without a recipe, say which model to fine-tune: --backbone with a Hub id or a folder")
    else:
        raise ValueError("give a recipe file, or own tables by --interactions (and --items)")
    try:
        checked = check_recipe(overrides.apply(content))
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}" if recipe else str(error)) from error
    return RunFolder.create(output or Path("runs") / name, checked)


def check_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from its mapping, with templates and source checked as well; ValueError for the first mistake."""
    recipe = parse_recipe(content)
    check_templates(recipe.prompts)
    check_source(recipe.source)
    return recipe


def open_run(path: Path) -> RunFolder:
    """An existing run."""
    return RunFolder.open(path)


def parse_setting(key: str, text: str) -> Any:
    """The value of ``--set key=text``, written as in YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: {text!r} is not valid YAML; put a text in (further) quotes") from error


def absolute(place: str) -> str:
    """A local path as seen from anywhere; Hub addresses stay."""
    return place if place.startswith("hf:") else str(Path(place).resolve())

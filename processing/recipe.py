"""Recipes: one YAML file says everything a run depends on."""

import json
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Recipe:
    """What a run does, section by section.

    Args:
        name: of the data set, for reports and cards.
        source: ``type`` (demo, movielens, microlens, amazon, tables) and that source's own options.
        item_noun: what an item is called in prompts.
        data: fields of ``PrepareOptions``.
        summaries: fields of ``SummaryOptions``.
        prompts: templates that replace the default ones.
        training: flags of training/sft.py.
        evaluation: ``split``, ``rows``, ``token_budget``, ``n_bootstrap``.
        license: of the derived data and model, for the cards.
    """

    name: str
    source: dict[str, Any]
    item_noun: str = "item"
    data: dict[str, Any] = field(default_factory=dict)
    summaries: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    license: str | None = None

    def training_flags(self) -> dict[str, Any]:
        """Flags of training/sft.py, prompts included."""
        flags = {"item_noun": self.item_noun, **self.training}
        if self.prompts:
            flags["prompts"] = json.dumps(self.prompts)
        return flags


def parse_recipe(content: Any, where: str) -> Recipe:
    """A recipe from parsed YAML; unknown or missing keys are an error that names ``where``."""
    known = {one.name for one in fields(Recipe)}
    if not isinstance(content, dict) or not {"name", "source"} <= content.keys():
        raise ValueError(f"{where}: a recipe is a mapping with at least `name` and `source`")
    if unknown := content.keys() - known:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}; known are {sorted(known)}")
    return Recipe(**content)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return parse_recipe(content, str(path))


def backbone_path(name: str) -> str:
    """``demo`` is the tiny model inside the package; any other name stays a Hub id or a folder."""
    return str(files("mllm_msr") / "demo" / "base") if name == "demo" else name


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """``recipe`` with ``{"section.name": value}`` in place; an unknown section is a ValueError."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if not name or not isinstance(getattr(recipe, section, None), dict):
            raise ValueError(f"{key!r} is not a section and a name, such as summaries.block_size")
        changed: dict[str, Any] = {section: {**getattr(recipe, section), name: value}}
        recipe = replace(recipe, **changed)
    return recipe

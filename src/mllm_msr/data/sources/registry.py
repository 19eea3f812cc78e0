"""Where a run's raw data comes from: the recipe, what the command line overrides, and the readers."""

import argparse
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from mllm_msr.records.recipe import Recipe, load_recipe, with_settings
from mllm_msr.records.run import Run
from mllm_msr.records.storage import file_digest

SOURCES = {
    "demo": ("mllm_msr.data.sources.demo", "read_demo"),
    "movielens": ("mllm_msr.data.sources.movielens", "read_movielens"),
    "microlens": ("mllm_msr.data.sources.microlens", "read_microlens"),
    "amazon": ("mllm_msr.data.sources.amazon", "read_amazon"),
    "tables": ("mllm_msr.data.sources.tables", "read_tables"),
}


def open_recipe(options: argparse.Namespace) -> Run:
    """A run directory from a recipe file, or from own tables alone, and what the command line overrides."""
    if options.recipe:
        recipe, name = load_recipe(options.recipe), options.recipe.stem
    elif options.interactions:
        name = Path(options.interactions.split("?")[0]).name.split(".")[0]
        recipe = Recipe(name=name, source={"type": "tables"}, summaries={"engine": "extractive"})
        if options.command == "run" and not options.backbone:
            raise ValueError("without a recipe, say which model to fine-tune: --backbone with a Hub id or a folder")
    else:
        raise ValueError("give a recipe file, or own tables by --interactions (and --items)")
    recipe = override(recipe, options)
    return Run.create(options.output or Path("runs") / name, recipe)


def override(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe under what the command line says; a flag that is absent changes nothing."""
    source, data, training, evaluation = (
        dict(part) for part in (recipe.source, recipe.data, recipe.training, recipe.evaluation)
    )
    for name in ("interactions", "items", "images"):
        if (value := getattr(options, name)) is not None:
            source.update({"type": "tables", name: _absolute(value)})
    if options.column:
        source["columns"] = {**source.get("columns", {}), **dict(pair.split("=", 1) for pair in options.column)}
    if options.data:
        source["folder"] = _absolute(options.data)
    for name in ("limit_users", "protocol", "folds", "fold", "on_bad_rows", "seed"):
        if (value := getattr(options, name)) is not None:
            data[name] = value
    if options.negatives == "all":
        data["negatives"] = "all"
    elif options.negatives:
        data["n_negatives"] = int(options.negatives)
        data["negatives"] = "uniform" if data.get("negatives") == "all" else data.get("negatives", "uniform")
    if options.negative_sampling:
        data["negatives"] = options.negative_sampling
    if options.seed is not None:
        training["seed"] = evaluation["seed"] = options.seed
    if options.backbone:
        training["model_name_or_path"] = options.backbone
    recipe = replace(recipe, source=source, data=data, training=training, evaluation=evaluation)
    settings = dict(pair.split("=", 1) for pair in options.set or ())
    return with_settings(recipe, {key: _value(key, text) for key, text in settings.items()})


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: {text!r} is not valid YAML; put a text in (further) quotes") from error


def _absolute(place: str) -> str:
    """A local path as seen from anywhere; Hub addresses stay."""
    return place if place.startswith("hf:") else str(Path(place).resolve())


def read_source(recipe: Recipe):
    """Raw data of the recipe's ``source`` section."""
    kind, options = source_options(recipe.source)
    module, function = SOURCES[kind]
    if kind != "demo":
        options["on_bad_rows"] = recipe.data.get("on_bad_rows", "error")
    return getattr(import_module(module), function)(**options)


def source_options(source: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The type of a source and its options; or an error that says what is wrong with them."""
    kind, options = source.get("type"), {name: value for name, value in source.items() if name != "type"}
    if kind not in SOURCES:
        raise ValueError(f"unknown source type {kind!r}; known are {', '.join(SOURCES)}")
    module, function = SOURCES[kind]
    known = signature(getattr(import_module(module), function)).parameters
    if unknown := options.keys() - (known.keys() - {"on_bad_rows"}):
        raise ValueError(f"source {kind!r}: unknown option {min(unknown)!r}; known are {', '.join(known)}")
    if lacking := [name for name, one in known.items() if one.default is one.empty and not options.get(name)]:
        raise ValueError(
            f"source {kind!r} needs a folder: give --data DIR or `folder` in the recipe"
            if "folder" in lacking
            else f"source {kind!r} needs {lacking[0]!r}: name it in the recipe's source section"
        )
    return kind, options


def source_fingerprint(source: dict[str, Any]) -> list[Any]:
    """The source's options and, of its files, names and sizes; of the tables among them the content as well."""
    _, options = source_options(source)
    places = {name: options.pop(name) for name in ("folder", "interactions", "items", "images") if options.get(name)}
    if "interactions" in places:  # own tables: only what is named
        folder = Path(places.pop("folder", "."))
        paths = [place if ":" in place else folder / place.split("?")[0] for place in places.values()]
    else:
        paths = [place if ":" in str(place) else Path(place) for place in places.values()]
    facts: list[Any] = [options]
    for root in paths:
        if isinstance(root, str):  # on the Hub
            facts.append(root)
            continue
        if not root.exists():
            raise FileNotFoundError(f"data {'file' if root.suffix else 'folder'} {root} does not exist")
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        for path in files:
            if options.get("category", "") in path.name:
                table = path.suffix in {".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".gz"}
                content = file_digest(path) if table else path.stat().st_size
                facts.append([path.name if path == root else path.relative_to(root).as_posix(), content])
    return facts

"""Recipes: one YAML file says everything a run depends on, and is checked as a whole when it is opened."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mllm_msr.records.sections import (
    HEAD_VARIANTS,
    EvaluationOptions,
    HeadOptions,
    PrepareOptions,
    Source,
    SummaryOptions,
    VectorOptions,
)
from mllm_msr.records.typed import build, check_names, did_you_mean

FORMAT = 2  # of a run's folder, noted in its recipe; a run of another one is refused
SECTIONS: dict[str, type[Any]] = {
    "data": PrepareOptions,
    "summaries": SummaryOptions,
    "vectors": VectorOptions,
    "head": HeadOptions,
    "evaluation": EvaluationOptions,
}


@dataclass(frozen=True)
class Recipe:
    """What a run does, section by section.

    Args:
        name: of the data set, for reports and cards.
        source: where the raw data comes from; in the file, its options stand beside its ``type``.
        item_noun: what an item is called in prompts.
        data, summaries, vectors, head, evaluation: see the sections' types.
        prompts: templates that replace the default ones, by name.
        training: flags of training/sft.py.
        license: of the derived data and model, for the cards.
    """

    name: str
    source: Source
    item_noun: str = "item"
    data: PrepareOptions = field(default_factory=PrepareOptions)
    summaries: SummaryOptions = field(default_factory=SummaryOptions)
    prompts: dict[str, str] = field(default_factory=dict)
    vectors: VectorOptions = field(default_factory=VectorOptions)
    training: dict[str, Any] = field(default_factory=dict)
    head: HeadOptions = field(default_factory=HeadOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    license: str | None = None

    def training_flags(self) -> dict[str, Any]:
        """Flags of training/sft.py, prompts included."""
        flags = {"item_noun": self.item_noun, **self.training}
        if self.prompts:
            flags["prompts"] = json.dumps(self.prompts)
        return flags

    @property
    def vectors_read_summaries(self) -> bool:
        """Whether item vectors rest on item summaries: on those that a model wrote, if on any."""
        by_model = self.summaries.engine not in ("extractive", "titles")
        return by_model and self.vectors.summaries and not self.vectors.own

    @property
    def fuses_answer(self) -> bool:
        """Whether the trained model's answer is a member of the fused score."""
        return self.head.enabled and self.head.answer and bool(self.training.get("model_name_or_path"))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, defaults included, as it stands in a run's ``config.yaml``."""
        content = asdict(self)
        return {**content, "source": {"type": self.source.type, **content["source"]["options"]}}


CheckFlags = Callable[[Mapping[str, Any]], dict[str, Any]]


def parse_recipe(content: Any, check_training: CheckFlags = dict) -> Recipe:
    """A recipe from parsed YAML.

    Args:
        check_training: takes the section ``training`` and returns its effective flags; ValueError for an unknown one.

    Raises:
        ValueError: an unknown key or a wrong type in any section, with the section and the nearest known name.
    """
    if not isinstance(content, Mapping) or not {"name", "source"} <= content.keys():
        raise ValueError("a recipe is a mapping with at least `name` and `source`")
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(f"a run of format {content['format']}, and this version of mllm-msr reads format {FORMAT}")
    check_names(content, ["format", *(each.name for each in fields(Recipe))], "recipe")
    given = {name: value for name, value in content.items() if value is not None and name != "format"}
    for name in ("name", "item_noun", "license"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"{name}={given[name]!r}: must be a text")
    given["source"] = _source(given["source"])
    if not given["name"].strip():
        raise ValueError("name: is empty")
    if not given.get("item_noun", "item").strip():
        raise ValueError("item_noun: is empty; name what an item is called in prompts, such as film")
    for name, kind in SECTIONS.items():
        if name in given:
            given[name] = build(kind, given[name], name)
    for name in ("prompts", "training"):
        if not isinstance(given.get(name, {}), Mapping):
            raise ValueError(f"section {name!r} is a mapping of names to values, not {given[name]!r}")
    for name, template in given.get("prompts", {}).items():
        if not isinstance(template, str):
            raise ValueError(f"prompts.{name}={template!r}: must be a text")
    if not given.get("head", HeadOptions()).enabled and "rows" not in (content.get("evaluation") or {}):
        evaluation = given.get("evaluation", EvaluationOptions())
        rows = [name for name in evaluation.rows if name not in HEAD_VARIANTS]
        given["evaluation"] = replace(evaluation, rows=rows)
    given["training"] = check_training(given.get("training", {}))
    return Recipe(**given)


def _source(content: Any) -> Source:
    if not isinstance(content, Mapping):
        raise ValueError(f"section 'source' is a mapping with a `type`, not {content!r}")
    return Source(content.get("type", ""), {name: value for name, value in content.items() if name != "type"})


class _StrictLoader(yaml.SafeLoader):
    """YAML in which no key of a mapping stands twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # of <<, whose mapping the keys beside it override
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_content(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, not checked yet; ValueError if it is not valid YAML or has a key twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no mapping of names to values")
    return content


def load_recipe(path: Path, check_training: CheckFlags = dict) -> Recipe:
    """Read and check a recipe file; errors name the file."""
    content = load_content(path)
    try:
        return parse_recipe(content, check_training)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def section_of(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a recipe's mapping, empty where there is none; ValueError for one that is no mapping."""
    section = content.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"section {name!r} is a mapping of names to values, not {section!r}")
    return dict(section)


def with_settings(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with ``{"section.name": value}`` in place.

    ``item_noun`` and ``license``, which stand in no section, are set by their names. ValueError for any other key.
    """
    sections = {"source", "prompts", "training", *SECTIONS}
    changed = dict(content)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if key in ("item_noun", "license"):
            changed[key] = value
        elif name and section in sections:
            changed[section] = {**section_of(changed, section), name: value}
        else:
            near = "" if section in sections else did_you_mean(section, sections)
            raise ValueError(f"{key!r} is not a section and a name, such as summaries.block_size{near}")
    return changed


def backbone_path(name: str) -> str:
    """``demo`` is the tiny model inside the package; any other name stays a Hub id or a folder."""
    return str(files("mllm_msr") / "demo" / "base") if name == "demo" else name


def packaged_recipes() -> dict[str, Path]:
    """The recipes and studies inside the package, by the name that commands take for a file."""
    folder = Path(str(files("mllm_msr.recipes")))
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("studies/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def recipe_file(place: Path) -> Path:
    """The file that a command line calls ``place``: a path, or the name of a recipe inside the package.

    Raises:
        FileNotFoundError: it is neither, with the nearest name.
    """
    if place.is_file():
        return place
    known = packaged_recipes()
    if place.as_posix() in known:
        return known[place.as_posix()]
    raise FileNotFoundError(f"{place}: no such file, nor a recipe of the package{did_you_mean(place.stem, known)}")


def demo_recipe() -> Path:
    """The recipe of the embedded demo."""
    return Path(str(files("mllm_msr") / "demo" / "recipe.yaml"))

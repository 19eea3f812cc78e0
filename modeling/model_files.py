"""Which files of a model folder are published, and whether they are whole."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from mllm_msr.records.public import is_hub_id
from mllm_msr.records.storage import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MEMORY = "item_memory.safetensors"  # beside an adapter, where the model has memory tokens
NEEDED = ("config.json", "processor_config.json", "tokenizer_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is needed
SHIPPED = (("modeling", "modeling_mllm_msr.py"), ("modeling", "pipeline.py"), ("processing", "processing_mllm_msr.py"))
OPTIONAL = (
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)


def model_files(folder: Path) -> list[str]:
    """Names of the files to publish, below ``folder``; all others stay.

    Raises:
        FileNotFoundError: a file without which the model does not load is missing.
        ValueError: a file is damaged, the weights are not whole, or code is not of this package.
    """
    for name in NEEDED:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: run `mllm-msr train` on this run first")
    names = {*NEEDED, *(name for name in (*OPTIONAL, *TOKENIZER) if (folder / name).is_file())}
    if not names & set(TOKENIZER):
        raise FileNotFoundError(f"{folder} has no tokenizer ({' or '.join(TOKENIZER)}): train again")
    settings = {name: read_json(folder / name) for name in names if name.endswith(".json")}
    return sorted(names | set(_weights(folder, settings["config.json"])) | set(_code(folder, settings)))


def _weights(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """The files of the weights, once each of them is known to be whole."""
    if adapter := config.get("adapter"):
        if not is_hub_id(config.get("backbone_name_or_path")):
            raise ValueError(f"{folder}: the adapter's backbone is not on the Hub: train with `merge_adapter: true`")
        settings, weights = (f"{adapter}/{name}" for name in ADAPTER)
        if not read_json(folder / settings, {}):
            raise FileNotFoundError(f"{folder / settings} is missing: train again")
        files = [weights, f"{adapter}/{MEMORY}"] if config.get("item_memory") else [weights]
        for file in files:
            tensor_names(folder / file)
        yield from (settings, *files)
    elif (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        tensor_names(folder / WEIGHTS)
        yield WEIGHTS
    else:
        places = read_json(folder / INDEX, {}).get("weight_map") or {}
        for shard in sorted(set(places.values())):
            if Path(shard).name != shard:
                raise ValueError(f"{folder / INDEX} names {shard!r}, which is not in this folder: train again")
            lost = {name for name, place in places.items() if place == shard} - tensor_names(folder / shard)
            if lost:
                raise ValueError(f"{folder / shard} lacks {min(lost)}, which {INDEX} says it holds: train again")
            yield shard
        if not places:
            raise ValueError(f"{folder / INDEX} names no weights: train again")
        yield INDEX


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a file whose header is sound and fits the file's size."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}, the model's weights, is missing: copy it here again, or train again")
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not whole ({error}): copy it here again, or train again") from error
    if not names:
        raise ValueError(f"{path} holds no weights: train again")
    return names


def _code(folder: Path, settings: dict[str, Any]) -> Iterator[str]:
    """The code that the settings name, with all that it imports from the folder."""
    modules = {
        reference.split("--")[-1].rpartition(".")[0]
        for content in settings.values()
        for reference in _references(content)
    }
    own = {file.name for file in shipped_code()}
    for module in sorted(modules):
        entry = folder / f"{module}.py"
        if not entry.is_file():
            raise FileNotFoundError(f"{entry}, the model's code, is missing: train again")
        try:
            files = [entry, *map(Path, get_relative_import_files(entry))]
        except OSError as error:
            raise FileNotFoundError(
                f"{folder}: code that {entry.name} needs is missing ({error}): train again"
            ) from error
        for file in files:
            if file.name not in own:
                raise ValueError(f"{file} is no code of this package, and is not published: train again")
            yield file.name


def _references(content: Any) -> Iterator[str]:
    """``module.Class`` of every class that a configuration loads from beside it."""
    for reference in (content.get("auto_map") or {}).values():
        yield from [reference] if isinstance(reference, str) else filter(None, reference)
    for task in (content.get("custom_pipelines") or {}).values():
        yield task["impl"]


def shipped_code() -> set[Path]:
    """All files of this package that travel with a model."""
    entries = [str(files(f"mllm_msr.{room}") / name) for room, name in SHIPPED]
    return {Path(file) for entry in entries for file in (entry, *get_relative_import_files(entry))}


def without_paths(text: str) -> str:
    """A JSON configuration without the names of folders on this machine, and without access tokens."""

    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: clean(inner)
            for key, inner in value.items()
            if not key.endswith(("auth_token", "hub_token"))
            and not (key.endswith("name_or_path") and isinstance(inner, str) and not is_hub_id(inner))
        }

    return json.dumps(clean(json.loads(text)), indent=2, ensure_ascii=False) + "\n"

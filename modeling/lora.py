"""Low-rank adapters on the language model, and only there."""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.utils import is_peft_available


def language_model_lora_targets(model: Any) -> str:
    """A regular expression of the full paths of all linear layers of the decoder, for `LoraConfig(target_modules=...)`.

    Suffixes such as `q_proj` would also match the vision tower's layers.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    leaves = {name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(leaves))})"


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The names and modules of the live adapters in a model."""
    if is_peft_available():
        from peft.tuners.tuners_utils import BaseTunerLayer

        yield from [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def trained_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The names and modules that are trained whole beside live adapters (PEFT's `modules_to_save`)."""
    if is_peft_available():
        from peft.utils.other import AuxiliaryTrainingWrapper

        yield from [(name, part) for name, part in model.named_modules() if isinstance(part, AuxiliaryTrainingWrapper)]


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """For as long as it lasts, a live adapter is switched off: the backbone writes texts as it always did."""
    layers = [layer for _, layer in [*adapter_layers(model), *trained_modules(model)] if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapter(model: nn.Module) -> None:
    """Add what live adapters have learnt to the weights below them, and take the adapters away, in place."""
    for name, layer in adapter_layers(model):
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    for name, wrapper in trained_modules(model):
        parent, _, leaf = name.rpartition(".")
        trained = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        setattr(model.get_submodule(parent), leaf, trained)
    for module in model.modules():
        if vars(module).pop("_hf_peft_config_loaded", False):  # else it would go on saving adapters, under their names
            vars(module).pop("_weight_conversions", None)
        vars(module).pop("peft_config", None)


def save_adapter(
    backbone: nn.Module, peft_config: dict[str, Any], folder: str | os.PathLike, **base: str | None
) -> None:
    """Write the live adapter with keys relative to the plain backbone, so that it is a PEFT adapter of that, too.

    Args:
        peft_config: the adapters' configurations by name, with targets relative to the backbone or to its wrapper.
        base: `base_model_name_or_path` and `revision` of the backbone.
    """
    layers = dict(adapter_layers(backbone))
    active = {name for layer in layers.values() for name in layer.active_adapters}
    if len(active) != 1:
        raise ValueError(f"one adapter can be saved at a time; active are {sorted(active)}")
    adapter = active.pop()
    config = copy.deepcopy(peft_config[adapter])
    trained = dict(trained_modules(backbone))
    config.modules_to_save = sorted(trained) or None
    targets = config.target_modules
    config.target_modules = targets.removeprefix(r"backbone\.") if isinstance(targets, str) else sorted(layers)
    config.inference_mode = True
    for name, value in base.items():
        setattr(config, name, value)
    weights = {}
    for name, layer in layers.items():
        for key, value in layer.state_dict().items():
            if not key.startswith("base_layer.") and f".{adapter}" in key:
                plain = key.replace(f".{adapter}", "", 1)
                weights[f"base_model.model.{name}.{plain}"] = value
    for name, wrapper in trained.items():
        for key, value in wrapper.adapter_state_dict(adapter, wrapper.state_dict()).items():
            weights[f"base_model.model.{name}.{key}"] = value
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)

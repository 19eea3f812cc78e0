"""Low-rank adapters on the language model, and only there."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.utils import is_peft_available


def language_model_lora_targets(model: nn.Module) -> str:
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


def merge_adapter(model: nn.Module) -> None:
    """Add what live adapters have learnt to the weights below them, and take the adapters away."""
    for name, layer in adapter_layers(model):
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())

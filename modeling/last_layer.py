"""Of a packed row's last layer, only what the answers need: the keys and values of all tokens, and all else of the
tokens at which answers are read.

Nothing looks at the other tokens any more after that layer. So it is called twice: with the whole row, until its keys
and values are there, and then with the tokens of answers alone.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn


def compute_answers_only(layer: nn.Module) -> None:
    """Let a decoder's last layer do so from now on, where nothing is trained or compiled."""
    layer.register_forward_pre_hook(_only_answers, with_kwargs=True)
    layer.register_forward_hook(_in_their_places, with_kwargs=True)


def _only_answers(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before the layer: its arguments for the tokens of answers, and in their layout the row's keys and values."""
    layout = kwargs.get("block_layout")
    if layout is None or layout.suffixes is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    layout = replace(layout, whole=[])
    layout.until_computed(partial(layer.forward, *args, **{**kwargs, "block_layout": layout}))
    answers = layout.answers
    narrow = {**kwargs, "block_layout": layout}
    narrow["position_embeddings"] = tuple(each.index_select(-2, answers) for each in kwargs["position_embeddings"])
    if kwargs.get("position_ids") is not None:
        narrow["position_ids"] = kwargs["position_ids"].index_select(-1, answers)
    return (args[0].index_select(1, answers), *args[1:]), narrow


def _in_their_places(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """After the layer: its output with the tokens of answers where they stand in the row, and zeros elsewhere."""
    layout = kwargs.get("block_layout")
    if layout is None or not layout.whole:
        return None
    row = output.new_zeros(1, len(layout.order), output.shape[-1])
    return row.index_copy_(1, layout.answers, output)

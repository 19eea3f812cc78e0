"""The device that models of the tests are on: `make test DEVICE=cuda`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

NAME = os.environ.get("MLLM_MSR_TEST_DEVICE", "cpu")
if NAME == "other":
    import other_device

    other_device.begin()
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME  # where trainers have models and batches
DEVICE = torch.device(NAME)


def begin() -> None:
    """Let all models that a test loads without a place for them be on the device from then on."""
    if DEVICE.type == "cpu":
        return
    load = PreTrainedModel.from_pretrained.__func__

    def load_there(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        if kwargs.get("device_map") is None and kwargs.get("quantization_config") is None:
            model = (loaded[0] if isinstance(loaded, tuple) else loaded).to(DEVICE)
            model.tie_weights()  # which not every device keeps
        return loaded

    PreTrainedModel.from_pretrained = classmethod(load_there)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """While it lasts, trainings that ask for the CPU have it, here and in processes that are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
        patch.setattr(sys.modules[__name__], "DEVICE", torch.device("cpu"))
        yield

"""Linear layers that oneDNN computes, on the CPUs where what torch chooses by itself takes more than twice the time."""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

CPUINFO = Path("/proc/cpuinfo")


@cache
def onednn_is_quicker() -> bool:
    """Whether it is for float32 here: torch leaves products to MKL, which leaves AVX-512 of AMD's CPUs unused."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "AuthenticAMD" in (CPUINFO.read_text(errors="replace") if CPUINFO.is_file() else platform.processor())


class OneDnnLinear(nn.Linear):
    """As its parent, but for who computes it where nothing is trained."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        plain = (
            input.dtype == self.weight.dtype == torch.float32 and input.device.type == self.weight.device.type == "cpu"
        )
        usual = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if usual or not plain:
            return super().forward(input)
        product: Any = torch.ops.mkldnn._linear_pointwise
        return product(input, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> None:
    """Let oneDNN compute a model's linear layers from now on, where that is quicker."""
    if onednn_is_quicker():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear

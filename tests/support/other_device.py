"""The device `other`: memory of the host that no tensor of the host may meet, as on a card.

`make test DEVICE=other` finds on any machine with a C++ compiler what would mix devices on a GPU.
"""

import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension


def begin() -> None:
    """Build the device once, and let torch know it."""
    extension: Any = cpp_extension.load(
        "other_device", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O1", "-w"], with_cuda=False
    )
    module: Any = types.ModuleType("torch.other")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.device = lambda *_: nullcontext()
    module.set_device = module.manual_seed = module.manual_seed_all = lambda *_: None
    module.synchronize = module.empty_cache = lambda *_: None
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.utils.rename_privateuse1_backend("other")
    torch._register_device_module("other", module)
    extension.begin()
    torch.utils.generate_methods_for_privateuse1_backend(for_module=False)

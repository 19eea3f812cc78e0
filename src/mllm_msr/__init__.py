"""Multimodal sequential recommendation with multimodal large language models (MLLM-MSR, AAAI-25).

Importing this package costs nothing: its public names are loaded when they are first used, and its classes are
registered with transformers' `AutoConfig`, `AutoModel` and `AutoProcessor` when these are loaded, before or after it.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_msr.modeling.configuration_mllm_msr import MllmMsrConfig
    from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
    from mllm_msr.modeling.pipeline import SequentialRecommendationPipeline
    from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

__version__ = "0.1.0"
__all__ = ["MllmMsrConfig", "MllmMsrForRecommendation", "MllmMsrProcessor", "SequentialRecommendationPipeline"]

_MODULES = {
    "MllmMsrConfig": "mllm_msr.modeling.configuration_mllm_msr",
    "MllmMsrForRecommendation": "mllm_msr.modeling.modeling_mllm_msr",
    "MllmMsrProcessor": "mllm_msr.processing.processing_mllm_msr",
    "SequentialRecommendationPipeline": "mllm_msr.modeling.pipeline",
}
# What to register, once the module of transformers that defines the Auto class is loaded.
_AUTO = {
    "MllmMsrConfig": ("transformers.models.auto.configuration_auto", "AutoConfig"),
    "MllmMsrForRecommendation": ("transformers.models.auto.modeling_auto", "AutoModel"),
    "MllmMsrProcessor": ("transformers.models.auto.processing_auto", "AutoProcessor"),
    "SequentialRecommendationPipeline": ("transformers.pipelines", "PIPELINE_REGISTRY"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def _register(loaded: str) -> None:
    """Register what can be, now that the module ``loaded`` is there."""
    for name, (auto_module, auto_class) in _AUTO.items():
        if loaded not in (auto_module, _MODULES[name]) or auto_module not in sys.modules:
            continue
        own = sys.modules.get(_MODULES[name])
        if own is not None and not hasattr(own, name):
            continue  # it is just being loaded, and will come by here when it is done
        auto = getattr(sys.modules[auto_module], auto_class)
        if auto_class == "PIPELINE_REGISTRY":
            pipeline, pt_model = __getattr__(name), importlib.import_module("transformers").AutoModel
            auto.register_pipeline("sequential-recommendation", pipeline, pt_model=pt_model, type="multimodal")
        else:
            config = __getattr__("MllmMsrConfig")
            auto.register(config.model_type if auto_class == "AutoConfig" else config, __getattr__(name), exist_ok=True)


class _RegisterWhenLoaded(MetaPathFinder):
    def __init__(self) -> None:
        self.pending = {*_MODULES.values(), *(module for module, _ in _AUTO.values())} - set(sys.modules)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in self.pending:
            return None
        self.pending.remove(fullname)  # the search below comes by here again
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _register(fullname)

            vars(spec.loader)["exec_module"] = exec_module  # of this one loader
        return spec


sys.meta_path.insert(0, _RegisterWhenLoaded())
for _module, _ in _AUTO.values():
    if _module in sys.modules:
        _register(_module)

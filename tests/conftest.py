"""Makes `tests/tiny_models.py` importable: `tests/` itself must not be on the path, since it holds a folder `mllm_msr`."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
assert spec is not None and spec.loader is not None
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])

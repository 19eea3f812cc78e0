"""Kill -9 in the midst of a baseline's training, in a process of its own: it goes on, and ends as if nothing was."""

import os
import subprocess
import sys
import time
from pathlib import Path

import baseline_worlds
import numpy as np
import pytest
import torch

CHILD = (
    "import sys; from pathlib import Path; from baseline_worlds import trained; trained(sys.argv[1], Path(sys.argv[2]))"
)


@pytest.mark.parametrize("name", ["sasrec", "mgat"])
def test_it_goes_on_after_a_kill(name, tmp_path):
    path = os.pathsep.join([str(Path(baseline_worlds.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, name, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob(f"{name}-*.pt")):
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    (saved,) = tmp_path.glob(f"{name}-*.pt")
    assert 1 <= torch.load(saved, weights_only=True)["done"] < 30
    assert np.array_equal(baseline_worlds.trained(name, tmp_path), baseline_worlds.trained(name, None))
    assert torch.load(saved, weights_only=True)["done"] == 30

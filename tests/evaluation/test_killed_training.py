"""Kill -9 in the midst of a baseline's training, in a process of its own: it goes on, and ends as if nothing was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import baseline_worlds
import numpy as np
import pytest
import torch

CHILD = """
import os, signal, sys
from pathlib import Path
from baseline_worlds import trained

renamed = []

def watch(event, given):  # as the fourth epoch is about to be put in the place of the third
    if event == "os.rename":
        renamed.append(given)
        if len(renamed) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
trained(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.mark.parametrize("name", ["sasrec", "mgat"])
def test_it_goes_on_after_a_kill(name, tmp_path):
    path = os.pathsep.join([str(Path(baseline_worlds.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, name, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    )
    assert killed.returncode == -signal.SIGKILL
    (saved,) = tmp_path.glob(f"{name}-*.pt")
    assert torch.load(saved, weights_only=True)["done"] == 3
    assert np.array_equal(baseline_worlds.trained(name, tmp_path), baseline_worlds.trained(name, None))
    assert torch.load(saved, weights_only=True)["done"] == 30

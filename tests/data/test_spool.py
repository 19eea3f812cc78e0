"""Temporary files of what was parsed: gone when the process ends, and after it was killed with the next one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys
from mllm_msr.data.spool import spool_folder
(spool_folder() / "part").touch()
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_left_goes_with_the_next(tmp_path: Path) -> None:
    def run(end: str) -> int:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", PROGRAM, end], env=environment).returncode

    assert run("killed") == -signal.SIGKILL
    assert [len(list(left.glob("*/part"))) for left in tmp_path.glob("mllm_msr.*")] == [1]
    assert run("ended") == 0
    assert not list(tmp_path.glob("mllm_msr.*"))

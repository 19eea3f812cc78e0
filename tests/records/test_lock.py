"""One writer at a time, shown with real processes: who waits, what is said, and that a kill leaves nothing behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_msr.records.lock import write_lock

HOLDER = """
import sys
from pathlib import Path
from mllm_msr.records.lock import write_lock
with write_lock(Path(sys.argv[1]), "mllm-msr train shop"):
    print("holds", flush=True)
    sys.stdin.read()
print("gave it back", flush=True)
"""


def start(folder: Path, program: str = HOLDER) -> subprocess.Popen[str]:
    """A process that holds the lock, once it has it, until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], text=True, **pipes)


def waits(process: subprocess.Popen[str]) -> str:
    """What it says once it waits for the lock; it has not got it."""
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "waiting" in line and process.poll() is None
    return line


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is killed or its input ends."""
    process = start(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_waits_and_says_who_is_writing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    second = start(tmp_path)
    said = waits(second)
    assert f"waiting for process {holder.pid} on " in said and "`mllm-msr train shop`" in said
    assert holder.communicate(timeout=60)[0] == "gave it back\n"
    out, error = second.communicate(timeout=60)
    assert out == "holds\ngave it back\n" and "waiting" not in error


def test_kill_9_of_the_holder_frees_the_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    second = start(tmp_path)
    waits(second)
    os.kill(holder.pid, signal.SIGKILL)
    assert second.communicate(timeout=60)[0].startswith("holds\n")


def test_blocks_of_one_process_may_be_nested(tmp_path: Path) -> None:
    with write_lock(tmp_path, "run"):
        with write_lock(tmp_path, "prepare"):
            pass
        second = start(tmp_path)
        waits(second)  # the outer block still holds it
    assert second.communicate(timeout=60)[0].startswith("holds\n")


def test_other_processes_of_a_distributed_job_leave_the_lock_to_the_first(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with write_lock(tmp_path, "mllm-msr train shop"):
        pass


def test_a_child_that_outlives_a_killed_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    forks = HOLDER.replace('    print("holds"', "    if not (child := os.fork()): time.sleep(60)\n    print(child")
    process = start(tmp_path, f"import os, time\n{forks}")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        assert start(tmp_path).communicate(timeout=60)[0].startswith("holds\n")
    finally:
        os.kill(child, signal.SIGKILL)

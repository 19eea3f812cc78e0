"""One writer at a time, shown with real processes: who waits, what is said, and that a kill leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_msr.records.lock import write_lock

HOLDER = """
import sys, time
from pathlib import Path
from mllm_msr.records.lock import write_lock
with write_lock(Path(sys.argv[1]), "mllm-msr train shop"):
    print("holds", flush=True)
    time.sleep(float(sys.argv[2]))
print("gave it back", flush=True)
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the lock so long, once it has it."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is killed."""
    process = start(tmp_path, 600)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_waits_and_says_who_is_writing(tmp_path: Path) -> None:
    first = start(tmp_path, 2)
    assert first.stdout is not None
    first.stdout.readline()
    begun = time.monotonic()
    second = start(tmp_path, 0)
    out, error = second.communicate(timeout=60)
    assert out == "holds\ngave it back\n" and time.monotonic() - begun > 0.5
    assert f"waiting for process {first.pid} on " in error and "`mllm-msr train shop`" in error
    assert error.count("waiting") == 1
    first.communicate()


def test_kill_9_of_the_holder_frees_the_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    second = start(tmp_path, 0)
    time.sleep(0.5)
    assert second.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    assert second.communicate(timeout=60)[0].startswith("holds\n")


def test_blocks_of_one_process_may_be_nested(tmp_path: Path) -> None:
    with write_lock(tmp_path, "run"):
        with write_lock(tmp_path, "prepare"):
            pass
        second = start(tmp_path, 0)
        time.sleep(0.5)
        assert second.poll() is None  # the outer block still holds it
    assert second.communicate(timeout=60)[0].startswith("holds\n")


def test_other_processes_of_a_distributed_job_leave_the_lock_to_the_first(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with write_lock(tmp_path, "mllm-msr train shop"):
        pass


def test_a_child_that_outlives_a_killed_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    forks = HOLDER.replace('    print("holds"', "    if not (child := os.fork()): time.sleep(60)\n    print(child")
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os\n{forks}", str(tmp_path), "600"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        assert start(tmp_path, 0).communicate(timeout=30)[0].startswith("holds\n")
    finally:
        os.kill(child, signal.SIGKILL)

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_msr.records.storage import digest, folder_digest, whole_folder, write_text


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path):
    target = tmp_path / "data"
    with whole_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), whole_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert [path.read_text() for path in target.iterdir()] == ["1"]


def test_digests_tell_contents_apart(tmp_path):
    assert digest("a", "b") != digest("ab") != digest(["ab"], None)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    (tmp_path / "a").write_text("1")
    before = folder_digest(tmp_path)
    (tmp_path / "a").write_text("2")
    assert folder_digest(tmp_path) != before


def test_a_write_that_fails_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from mllm_msr.records.storage import write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # the system refuses to write more, as a full disk
        "write_text(Path(sys.argv[1]), 'new' * 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert "OSError" in done.stderr
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_place_that_cannot_be_written_is_called_by_its_own_name(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", "of the system")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match="Read-only file system") as error:
        write_text(tmp_path / "a.txt", "new")
    assert error.value.filename == str(tmp_path / "a.txt")


def test_what_a_killed_process_left_half_written_is_swept(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mllm_msr.records.storage import whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "data"
    subprocess.run([sys.executable, "-c", program, target], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with whole_folder(target) as folder:
        (folder / "a").write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

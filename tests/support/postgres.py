"""A PostgreSQL server of a test's own, from the system's packages, in a folder of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from ports import free_port

NUMBERS = count()


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs, if they are installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return next((path for path in reversed(folders) if (path / "initdb").is_file()), None)


def database(url: str) -> str:
    """The URL of a new database on a server."""
    import psycopg

    name = f"state_{next(NUMBERS)}"
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{url.rpartition('/')[0]}/{name}"


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The URL of a database on a fresh server on loopback; the test is skipped where none can be started."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed")
    user = []
    if os.getuid() == 0:  # which PostgreSQL refuses to be run by
        if not shutil.which("runuser"):
            pytest.skip("PostgreSQL does not run as root, and runuser is not there")
        folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]
    port = free_port()
    data = str(folder / "data")
    fast = f"-p {port} -k {folder} -h 127.0.0.1 -c fsync=off -c shared_buffers=8MB"
    control = [*user, str(programs / "pg_ctl"), "-D", data, "-l", str(folder / "log")]
    try:
        run = [*user, str(programs / "initdb"), "-D", data, "-U", "mllm", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(run, check=True, capture_output=True, cwd=folder)
        subprocess.run([*control, "-o", fast, "-w", "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        yield f"postgresql+psycopg://mllm@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], capture_output=True, cwd=folder)
        if user:
            shutil.rmtree(folder, ignore_errors=True)

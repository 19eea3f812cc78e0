import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from mllm_msr.data.downloads import Downloads
from mllm_msr.data.images import normalise
from mllm_msr.data.prepare import prepare
from mllm_msr.data.raw import RawData
from mllm_msr.evaluation.places import popularity_figures
from mllm_msr.records.sections import PrepareOptions

BUFFER = io.BytesIO()
Image.new("RGB", (40, 40), "red").save(BUFFER, "PNG")
PNG = BUFFER.getvalue()


ASKED: Counter[str] = Counter()


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ASKED[self.path] += 1
        code = 200
        if self.path.startswith("/gone"):
            code = 404
        elif (self.path.startswith("/busy") and ASKED[self.path] < 3) or self.path.startswith("/down"):
            code = 503
        self.send_response(code)
        self.send_header("Content-Length", str(len(PNG) + (9 if self.path.startswith("/short") else 0)))
        self.end_headers()
        self.wfile.write(PNG)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    ASKED.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_each_url_gets_a_file_or_a_reason(site: str, tmp_path: Path) -> None:
    urls = [f"{site}/{name}" for name in ("a", "b", "a", "gone", "busy", "down", "short")]
    found = Downloads(tmp_path, pause=0.01, tries=3).fetch([*urls, "file:///etc/hostname", "http://"])
    for name in ("a", "b", "busy"):
        path = found[f"{site}/{name}"]
        assert isinstance(path, Path) and path.read_bytes() == PNG
    assert found[f"{site}/gone"] == "HTTP 404" and found[f"{site}/down"] == "HTTP 503"
    assert str(found[f"{site}/short"]).startswith("no connection")
    assert found["file:///etc/hostname"] == "no http(s) URL"
    assert isinstance(found["http://"], str)
    assert ASKED == {"/a": 1, "/b": 1, "/gone": 1, "/busy": 3, "/down": 3, "/short": 3}


def test_second_run_asks_only_for_what_may_have_changed(site: str, tmp_path: Path) -> None:
    urls = [f"{site}/{name}" for name in ("a", "gone", "down")]
    downloads = Downloads(tmp_path, pause=0.01, tries=1)
    first = downloads.fetch(urls)
    with (tmp_path / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"url": "http://cut sho')  # as a killed run leaves it
    ASKED.clear()
    assert downloads.fetch(urls) == first
    assert ASKED == {"/down": 1}


def test_rate_and_size_are_limited(site: str, tmp_path: Path) -> None:
    started = time.monotonic()
    found = Downloads(tmp_path, per_second=50, max_bytes=10).fetch([f"{site}/{n}" for n in range(11)])
    assert time.monotonic() - started >= 10 / 50
    assert set(found.values()) == {"more than 10 bytes"}


def test_a_machine_that_is_offline_gives_up(site: str, tmp_path: Path) -> None:
    downloads = Downloads(tmp_path, per_second=1000, pause=0.01, tries=1)
    urls = [f"{site}/down{n}" for n in range(200)]
    with pytest.raises(ConnectionError, match=r"none of the first 32 could be fetched \(.*again"):
        downloads.fetch(urls)
    assert len(ASKED) == 32
    (file,) = downloads.fetch([f"{site}/a"]).values()
    assert file in downloads.fetch([*urls[:40], f"{site}/a"]).values()  # one has come: others may fail


@pytest.mark.parametrize("missing", ["keep", "drop"])
def test_prepare_fetches_images(site: str, tmp_path: Path, missing: Any) -> None:
    rows = [(f"u{user}", f"i{(user + 3 * step) % 10}", step) for user in range(10) for step in range(5)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    names = ["gone" if n == 4 else f"p{n}" for n in range(10)]
    items = pl.DataFrame(
        {"item_id": [f"i{n}" for n in range(10)], "title": ["T"] * 10, "text": [""] * 10}
        | {"image_path": [f"{site}/{name}" for name in names]}
    )
    options = PrepareOptions(n_negatives=2, k_core_users=1, k_core_items=1, missing_images=missing)
    report = prepare(RawData(log, items), tmp_path / "run" / "data", options, "made up", popularity_figures)
    assert {"what": "not downloaded: HTTP 404", "count": 1, "examples": ["i4"]} in report["skipped"]
    images = dict(pl.read_parquet(tmp_path / "run" / "data" / "items.parquet").select("item_id", "image").iter_rows())
    assert images["i0"]["bytes"] == normalise(PNG)
    assert (images["i4"] is None) if missing == "keep" else ("i4" not in images)
    assert (tmp_path / "run" / "image_cache" / "manifest.jsonl").is_file()
    assert max(ASKED.values()) == 1


def test_a_disk_that_takes_no_file_stops_and_an_odd_manifest_does_not(site: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('[1]\n{"url": 5}\nnull\n{"url": "u", "lasting": true}\n{"cut')
    url = f"{site}/a"
    (file,) = Downloads(tmp_path).fetch([url]).values()
    assert isinstance(file, Path)
    file.unlink()
    file.with_suffix(".partial").mkdir()
    with pytest.raises(OSError, match="partial"):
        Downloads(tmp_path, tries=1).fetch([url])

"""The store of texts under what happens to it: full disks, killed processes, damaged files."""

import signal
import subprocess
import sys
import tracemalloc
from dataclasses import asdict

import polars as pl
import pytest

from mllm_msr.modeling.inputs import HistoryItem
from mllm_msr.processing import summaries, text_store
from mllm_msr.processing.engines import HistoryBlock, Text
from mllm_msr.processing.summaries import summarize_users
from mllm_msr.processing.text_store import TextStore

WORKER = """
import os, resource, signal, sys, time
import polars as pl
from pathlib import Path
from mllm_msr.processing.engines import Text
from mllm_msr.processing.summaries import summarize_users
from mllm_msr.processing.text_store import TextStore

class Slow:  # each block takes a while, and is written down with who wrote it
    batch_size, generator, revision = 2, "slow", "1"
    def prompt_hash(self, task): return task
    def settings(self, task): return ""
    def generate(self, task, inputs, seeds=None, again=False):
        for block in inputs:
            if sys.argv[2] == "full" and block.previous:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as if the disk were full
            print("asked", flush=True)
            time.sleep(0.02)
        return [Text(f"{block.previous or ''}{block.items[0].summary}.", True) for block in inputs]

rows = [(f"u{n}", f"i{n} {k}", k) for n in range(12) for k in range(6)]
log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
same = {item: item for _, item, _ in rows}
out = summarize_users(log, same, same, Slow(), TextStore(Path(sys.argv[1]) / "cache"))
out.write_parquet(Path(sys.argv[1]) / f"{sys.argv[2]}.parquet")
"""


def start(folder, name: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", WORKER, folder, name], **pipes)


def test_a_process_that_is_killed_loses_one_batch_and_the_next_goes_on(tmp_path):
    killed = start(tmp_path, "a")
    for _ in range(5):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    asked = 5 + killed.communicate(timeout=300)[0].count("asked")
    asked += start(tmp_path, "b").communicate(timeout=300)[0].count("asked")
    alone = tmp_path / "alone"
    alone.mkdir()
    start(alone, "c").communicate(timeout=300)
    wanted = pl.read_parquet(alone / "c.parquet")
    assert wanted.height == 24 and wanted["preference"][1] == "i0 0.i0 3."
    assert pl.read_parquet(tmp_path / "b.parquet").equals(wanted)
    assert 24 <= asked <= 24 + 2


def test_a_full_disk_stops_with_its_reason_and_the_run_goes_on_when_there_is_room(tmp_path):
    full = start(tmp_path, "full")
    _, said = full.communicate(timeout=300)
    assert full.returncode != 0 and "OSError" in said
    done = start(tmp_path, "b").communicate(timeout=300)[0].count("asked")
    assert done == 12  # the second wave only
    assert pl.read_parquet(tmp_path / "b.parquet")["status"].unique().to_list() == ["ok"]


def test_a_broken_file_is_left_out_and_said(tmp_path, caplog):
    store = TextStore(tmp_path)
    store.add(["a"], {"a": ("text", "ok")})
    store.add(["b"], {"b": ("text", "ok")})
    sorted(tmp_path.glob("*.parquet"))[0].write_bytes(b"cut sho")
    assert len(TextStore(tmp_path).rows) == 1
    assert "generated again" in caplog.text


def test_failures_are_forgotten_by_the_next_run(tmp_path):
    TextStore(tmp_path).add(["a", "b"], {"a": ("text", "ok"), "b": ("", "failed:no")})
    assert TextStore(tmp_path).rows == {"a": ("text", "ok")}


def test_many_small_files_become_one(tmp_path, monkeypatch):
    monkeypatch.setattr(text_store, "MANY", 5)
    store = TextStore(tmp_path)
    for n in range(6):
        store.add([str(n)], {str(n): (f"text {n}", "ok")})
    assert TextStore(tmp_path).rows == store.rows
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert TextStore(tmp_path).rows == store.rows


class Wordy:
    """Writes texts of one length."""

    batch_size, generator, revision = 20, "wordy", "1"

    def prompt_hash(self, task):
        return task

    def settings(self, task):
        return ""

    def generate(self, task, inputs, seeds=None, again=False):
        return [Text(f"{block.items[0].summary:_<9}".ljust(650, "."), True) for block in inputs]


def test_texts_are_kept_on_disk_and_not_in_memory(tmp_path, monkeypatch):
    users, steps = 200, 9
    rows = [(f"u{user}", f"i{user} {step}", step) for user in range(users) for step in range(3 * steps)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    same = {item: item for _, item, _ in rows}
    held, real = {}, TextStore.add

    def add(store, batch, texts):
        real(store, batch, texts)
        held[len(store.rows)] = tracemalloc.get_traced_memory()[0]

    monkeypatch.setattr(TextStore, "add", add)
    store = TextStore(tmp_path)
    tracemalloc.start()
    try:
        out = summarize_users(log, same, same, Wordy(), store)
    finally:
        tracemalloc.stop()
    grown = (held[8 * users] - held[3 * users]) / (5 * users)
    assert len(out) == len(store.rows) == users * steps and len(out["preference"][0]) > 600
    assert grown < 100, f"{grown} bytes more for each text"


def test_what_a_text_depends_on_is_what_its_engine_is_given():
    items = [HistoryItem("One", "red"), HistoryItem("Two", "")]
    given = HistoryBlock(items, "before")
    step = summaries.PreferenceStep(0, 1, items, "before")
    assert summaries._facts(step) == asdict(given) and str(summaries._facts(step)) == str(asdict(given))


def test_a_full_disk_for_temporary_files_is_said(tmp_path):
    store = TextStore(tmp_path)
    store.rows._database.execute("PRAGMA max_page_count=10")
    with pytest.raises(OSError, match="has TMPDIR room"):
        store.add(["a"], {"a": ("text" * 100_000, "ok")})

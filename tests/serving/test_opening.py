"""What is refused before a server listens: keys that are none, a network without keys, a taken port, no run."""

import socket
from datetime import date
from decimal import Decimal
from pathlib import Path
from urllib.parse import quote

import polars as pl
import pytest
from pydantic import ValidationError

from mllm_msr.cli import main
from mllm_msr.modeling.recommending import Refused
from mllm_msr.serving.app import decoded
from mllm_msr.serving.auth import Keys, read_keys
from mllm_msr.serving.main import check_exposure, listen
from mllm_msr.serving.opening import ListsByUser, read_columns
from mllm_msr.serving.schemas import EventIn, ItemIn

LONG = "k" * 24


def test_keys_come_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\nread {LONG}1\nwrite {LONG}2\n", encoding="utf-8")
    monkeypatch.setenv("MLLM_MSR_READ_KEYS", f"{LONG}3, {LONG}4")
    keys = read_keys(path)
    assert [keys.allows(f"Bearer {LONG}{n}", "read") for n in range(1, 6)] == [True, True, True, True, None]
    assert [keys.allows(f"bearer {LONG}{n}", "write") for n in range(1, 6)] == [False, True, False, False, None]
    assert keys.allows(None, "read") is None and keys.allows(f"Basic {LONG}1", "read") is None
    assert LONG not in repr(keys)
    assert Keys().allows(None, "write")


@pytest.mark.parametrize("line", ["short", "read short", f"admin {LONG}", LONG])
def test_a_line_that_is_no_key_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"read {LONG}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="keys, line 2: is not `read KEY`") as raised:
        read_keys(path)
    assert LONG not in str(raised.value)


@pytest.mark.parametrize(
    ("host", "allowed"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_no_network_is_let_in_without_a_key(host: str, allowed: bool) -> None:
    check_exposure(host, Keys(read=[b"x"]), False)
    check_exposure(host, Keys(), True)
    if allowed:
        check_exposure(host, Keys(), False)
    else:
        with pytest.raises(ValueError, match="lets other machines in: give keys"):
            check_exposure(host, Keys(), False)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(ValueError, match=r"cannot be used .*: name another port"):
        listen("127.0.0.1", first.getsockname()[1])
    assert isinstance(first, socket.socket)


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a run"):
        main(["serve", str(tmp_path), "--port", "0"])


def test_columns_are_those_of_known_items(tmp_path: Path) -> None:
    path = tmp_path / "columns.csv"
    pl.DataFrame({"item_id": [1, 2, 9], "year": [1999, None, 2001], "kind": ["a", "b", "c"]}).write_csv(path)
    assert read_columns(path, ["1", "2"]) == {"year": {"1": 1999}, "kind": {"1": "a", "2": "b"}}
    with pytest.raises(ValueError, match=r"no item_id is one of the catalogue, such as \['x'\]"):
        read_columns(path, ["x"])
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_columns(tmp_path / "none.csv", ["x"])


def test_columns_are_read_as_any_table(tmp_path: Path) -> None:
    path = tmp_path / "columns.csv"
    path.write_bytes("Item_ID;price;new;maker\n007;1.5;True;Müller\n010;2;false;\n12.0;;true;x\n".encode("cp1252"))
    assert read_columns(path, ["007", "010", "12"]) == {
        "price": {"007": 1.5, "010": 2.0},
        "new": {"007": True, "010": False, "12": True},
        "maker": {"007": "Müller", "12": "x"},
    }
    table = pl.DataFrame({"item_id": [7.0, 8.0], "day": [date(2020, 1, 1), None], "price": [Decimal("1.50"), None]})
    table.write_parquet(tmp_path / "columns.parquet")
    assert read_columns(tmp_path / "columns.parquet", ["7"]) == {"day": {"7": "2020-01-01"}, "price": {"7": 1.5}}
    path.write_text("sku,price\n007,1\n")
    with pytest.raises(ValueError, match=r"columns\.csv: no column 'item_id'; it has \['sku', 'price'\]"):
        read_columns(path, ["007"])


@pytest.mark.parametrize(
    ("sent", "read"), [("10.0", "10"), (" 10 ", "10"), ("cafe\u0301\u200b", "caf\u00e9"), ("007", "007")]
)
def test_ids_are_read_as_those_of_a_table(sent: str, read: str) -> None:
    event = EventIn.model_validate({"item_id": sent, "idempotency_key": sent})
    assert (event.item_id, event.idempotency_key) == (read, sent)
    assert decoded(quote(sent), "user_id") == read
    assert ItemIn.model_validate({"item_id": sent, "title": "a\x1b[1mb\nc"}).title == "a [1mb\nc"


@pytest.mark.parametrize("sent", ["  ", "nan", "None", "\u200b"])
def test_what_stands_for_a_missing_id_is_refused(sent: str) -> None:
    with pytest.raises(ValidationError, match="missing id: send an id"):
        EventIn.model_validate({"item_id": sent})
    with pytest.raises(Refused, match="missing id: send an id"):
        decoded(quote(sent), "user_id")


def test_lists_by_user_are_slices_of_one_log() -> None:
    log = pl.DataFrame({"user_id": ["b", "b", "a"], "item_id": ["1", "2", "3"]})
    lists = ListsByUser(log, "item_id")
    assert dict(lists) == {"b": ["1", "2"], "a": ["3"]} and lists["c"] == [] and "c" not in lists and len(lists) == 2

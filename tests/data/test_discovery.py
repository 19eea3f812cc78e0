"""Own files, looked at: which is the log, which the catalogue, and what their columns are."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from own_tables import write_shop
from PIL import Image

from mllm_msr.data.discovery import discover
from mllm_msr.data.sources.registry import read_source
from mllm_msr.records.sections import Source

LOG = pl.DataFrame(
    [(user, f"b{(user * 3 + step) % 8}", f"2024-0{1 + step}-11") for user in range(6) for step in range(5)],
    schema=["a", "b", "c"],
    orient="row",
)
GOODS = pl.DataFrame(
    {
        "key": [f"b{item}" for item in range(8)],
        "words": [f"Mug {item}" for item in range(8)],
        "more": [
            f"The mug of number {item}, " + "as good as any of them and better than most " * 2 for item in range(8)
        ],
        "shown": [f"img/{item}.png" for item in range(8)],
    }
)
WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    "csv": lambda frame, path: frame.write_csv(path, separator=";"),
    "tsv": lambda frame, path: frame.write_csv(path, separator="\t"),
    "jsonl": lambda frame, path: frame.write_ndjson(path),
    "parquet": lambda frame, path: frame.write_parquet(path),
}


def pixels(folder: Path, names: list[str]) -> None:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / f"{name}.png")


def test_a_shop_with_telling_names(tmp_path):
    found = discover(write_shop(tmp_path / "shop", users=10, items=20))
    options = found.options
    assert (options.interactions, options.items, options.images) == ("orders.csv", "articles.csv", None)
    assert options.columns == {
        "user_id": "customer",
        "item_id": "article",
        "timestamp": "bought_at",
        "title": "name",
        "text": "description",
        "image": "photo",
    }
    assert found.rating == "stars" and any("18 of the first 20" in reason for reason in found.reasons)
    raw = read_source(Source("tables", vars(options)))  # and the reader of every run takes it
    assert raw.items["image_path"].null_count() == 2


@pytest.mark.parametrize("kind", WRITERS)
def test_names_that_say_nothing_are_known_by_their_values(tmp_path, kind):
    WRITERS[kind](LOG, tmp_path / f"one.{kind}")
    WRITERS[kind](GOODS, tmp_path / f"two.{kind}")
    pixels(tmp_path / "img", [str(item) for item in range(6)])
    found = discover(tmp_path)
    assert (found.options.interactions, found.options.items) == (f"one.{kind}", f"two.{kind}")
    expected = {"user_id": "a", "item_id": "b", "timestamp": "c", "items.item_id": "key"}
    assert found.options.columns == {**expected, "title": "words", "text": "more", "image": "shown"}


def test_a_table_of_users_is_not_taken_for_the_catalogue(tmp_path):
    log = LOG.rename({"a": "user", "b": "sku", "c": "date"})
    log.write_csv(tmp_path / "sales.csv")
    GOODS.rename({"key": "sku"}).write_csv(tmp_path / "stock.csv")
    log.select("user").unique().with_columns(town=pl.lit("Ulm")).write_csv(tmp_path / "people.csv")
    (tmp_path / "broken.parquet").write_bytes(b"no")
    found = discover(tmp_path)
    assert (found.options.interactions, found.options.items) == ("sales.csv", "stock.csv")
    assert [line.split(":")[0] for line in found.unused] == ["broken.parquet", "people.csv"]


@pytest.mark.parametrize("names", [["visitorid", "itemid"], ["Kunde", "Artikel"]])
def test_users_whose_numbers_are_items_as_well_are_not_taken_for_them(tmp_path, names):
    """Every user's number is an item's, but two of the items chosen are not in the catalogue."""
    rows = [(user, (user * 7 + step * 3) % 40, 1_700_000_000 + step) for user in range(12) for step in range(6)]
    pl.DataFrame(rows, schema=[*names, "timestamp"], orient="row").write_csv(tmp_path / "log.csv")
    goods = pl.DataFrame({names[1]: range(38), "title": [f"Mug {item}" for item in range(38)]})
    goods.write_csv(tmp_path / "goods.csv")
    assert {role: discover(tmp_path).options.columns[role] for role in ("user_id", "item_id")} == {
        "user_id": names[0],
        "item_id": names[1],
    }


def test_columns_that_neither_values_nor_names_tell_apart_are_asked_for(tmp_path):
    rows = [(user, (user * 7 + step * 3) % 20, 1_700_000_000 + step) for user in range(12) for step in range(6)]
    pl.DataFrame(rows, schema=["a", "b", "time"], orient="row").write_csv(tmp_path / "log.csv")
    pl.DataFrame({"key": range(20), "title": [f"Mug {item}" for item in range(20)]}).write_csv(tmp_path / "goods.csv")
    with pytest.raises(ValueError, match=r"'a' and of 'b' are ids in goods\.csv, .*--column item_id=NAME"):
        discover(tmp_path)
    columns = discover(tmp_path, columns={"user_id": "a"}).options.columns
    assert (columns["user_id"], columns["item_id"]) == ("a", "b")


def test_images_that_are_called_by_ids_and_bytes_in_a_table(tmp_path):
    (tmp_path / "a").mkdir()
    LOG.rename({"a": "user", "b": "item", "c": "time"}).write_parquet(tmp_path / "a/log.parquet")
    GOODS.select(item="key", title="words").write_parquet(tmp_path / "a/items.parquet")
    pixels(tmp_path / "a/covers", ["b1", "b2", "other"])
    assert discover(tmp_path / "a").options.images == "covers"
    GOODS.select(item="key", seen=pl.lit(b"x")).write_parquet(tmp_path / "a/items.parquet")
    assert discover(tmp_path / "a").options.columns["image"] == "seen"


def test_a_log_alone_is_enough(tmp_path):
    LOG.rename({"a": "visitor", "b": "product", "c": "when"}).write_csv(tmp_path / "log.csv")
    found = discover(tmp_path)
    assert found.options.items is None
    assert found.options.columns == {"user_id": "visitor", "item_id": "product", "timestamp": "when"}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (LOG.select("a", "b"), r"no column of times.*one\.csv has \['a', 'b'\].*--column timestamp=NAME"),
        (LOG, r"one\.csv: cannot tell which column is user_id; it has \['a', 'b', 'c'\].*--column user_id=NAME"),
        (None, "has no table: put a log"),
    ],
)
def test_what_cannot_be_guessed_is_said_with_the_remedy(tmp_path, log, message):
    if log is not None:
        log.write_csv(tmp_path / "one.csv")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        discover(tmp_path)


def test_what_is_known_already_is_taken(tmp_path):
    LOG.write_csv(tmp_path / "one.csv")
    columns = {"user_id": "a", "item_id": "b"}
    assert discover(tmp_path, columns=columns).options.columns == {**columns, "timestamp": "c"}
    with pytest.raises(ValueError, match=r"one\.csv: no column 'x' for user_id; it has"):
        discover(tmp_path, columns={"user_id": "x", "item_id": "b"})
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        discover(tmp_path / "nowhere")


def folder_with(folder: Path, **tables: str) -> Path:
    for name, text in tables.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


LINES = "user,item,time\n" + "".join(f"u{n % 7},0000{n % 5},2024-01-{n + 1:02d}\n" for n in range(20))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"log_csv": LINES, "items_csv": "item,title\n" + "".join(f"x{n},Mug\n" for n in range(5))},
            r"no table holds the items of log.csv. items.csv has ids such as .*x0.* the log .*00000.*--interactions",
        ),
        (
            {"log_csv": LINES, "items_xlsx": "PK\3\4"},
            "no table holds the items of log.csv. items.xlsx: .*Excel workbook",
        ),
        ({"log_csv": LINES, "items_csv": ""}, "no table holds the items of log.csv. items.csv: .*empty"),
        ({"log_csv": LINES, "items_csv": "item,title,title\n00001,a,b\n"}, "two columns are called 'title'"),
        ({"log_csv": "user,item,time\n"}, "log.csv: it has no rows"),
        ({"log_csv": "user,item,time\na,b,31.12.2024\n"}, "'time' of log.csv holds no times.*31.12.2024.*2024-12-31"),
        ({"log_csv": "a,1,1709832921\nb,2,1709832922\na,2,1709832925\n"}, "first row looks like values, not names"),
        (
            {"log_csv": "a,1,2009-05-04T23:08:57Z\nb,2,2009-05-04T23:08:58Z\na,2,2009-05-04T23:08:59Z\n"},
            r"log\.csv: its first row looks like values, not names, such as '2009-05-04T23:08:57Z'",
        ),
        (
            {"log_csv": LINES, "items_csv": "".join(f"{n:05d},Mug {n}\n" for n in range(5))},
            r"items\.csv: its first row looks like values, not names, such as '00000'",
        ),
        ({"events_json": '[{"user": 1, "item": 2, "time": 3}]'}, "one object a line"),
    ],
)
def test_what_would_be_guessed_wrongly_is_an_error_with_its_remedy(
    tmp_path: Path, tables: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        discover(folder_with(tmp_path, **tables))


def test_a_time_that_is_named_but_cannot_be_read_is_shown(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, log_csv="user,item,am\na,b,31.12.2024\n")
    with pytest.raises(ValueError, match=r"'am' holds no times, such as .*31\.12\.2024"):
        discover(folder, columns={"timestamp": "am"})


def test_a_log_named_alone_has_items_without_words_and_says_so(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, log_csv=LINES, items_csv="item,title\nx1,Mug\n", views_csv=LINES)
    found = discover(folder, interactions="log.csv")
    assert found.options.items is None and any("neither words nor images" in reason for reason in found.reasons)
    assert any("views.csv: could be the log, too" in line for line in found.unused)

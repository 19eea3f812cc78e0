"""Tables wherever they are: damaged files, folders of part files, data sets of the Hub."""

import bz2
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_kinds import WRITE

from mllm_msr.data.sources.tables import read_tables

ROWS = [("u", "1", 5), ("v", "02", 6), ("w", "3", 7)]
LOG = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")


def write(folder: Path, kind: str, parts: list[tuple[str, pl.DataFrame]]) -> None:
    for name, table in parts:
        path = folder / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITE[kind](table, path)
        path.with_name(f".{path.name}.crc").write_bytes(b"checksum")
    (folder / "_SUCCESS").touch()


def rows(name: str, folder: Path, **options: Any) -> list[tuple]:
    return read_tables(name, folder=folder, **options).interactions.collect().rows()


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("name", ["log.{}", "log"])
def test_a_folder_of_part_files_is_one_table(tmp_path: Path, kind: str, name: str) -> None:
    name = name.format(kind.removesuffix(".gz"))
    write(tmp_path / name, kind, [(f"part-{n:d}", LOG[n : n + 1]) for n in (0, 1)] + [("part-10", LOG[2:3])])
    assert rows(name, tmp_path) == ROWS


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_folders_named_by_values_are_columns(tmp_path: Path, kind: str) -> None:
    parts = [(f"item_id={item}/part-0", LOG.filter(item_id=item).drop("item_id")) for _, item, _ in ROWS]
    write(tmp_path / f"log.{kind}", kind, parts)
    assert sorted(rows(f"log.{kind}", tmp_path)) == sorted(ROWS)
    parts = [("item_id=__HIVE_DEFAULT_PARTITION__/part-0", LOG[:1].drop("item_id"))]
    write(tmp_path / f"log.{kind}", kind, parts)
    with pytest.raises(ValueError, match=rf"log\.{kind}, row \d of part-0\.{kind}: no item_id"):
        rows(f"log.{kind}", tmp_path)


def test_a_bad_row_is_named_with_its_part(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", "csv", [("part-0", LOG), ("part-1", LOG.with_columns(timestamp=pl.lit("soon")))])
    with pytest.raises(ValueError, match=r"log\.csv, row 2 of part-1\.csv: timestamp is no number"):
        rows("log.csv", tmp_path)
    assert rows("log.csv", tmp_path, on_bad_rows="skip") == ROWS


def test_parts_of_different_columns_and_types(tmp_path: Path) -> None:
    numbers = pl.DataFrame({"timestamp": [8], "item_id": [4], "user_id": [7], "more": [0.5]})
    write(tmp_path / "log.parquet", "parquet", [("part-0", LOG), ("part-1", numbers)])
    assert rows("log.parquet", tmp_path) == [*ROWS, ("7", "4", 8)]


def test_what_is_wrong_with_one_part_is_said_of_it(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", "csv", [("part-0", LOG)])
    (tmp_path / "log.csv/part-1.csv").write_text("w,3,8\n")  # no names, so that its only row would be lost
    with pytest.raises(ValueError, match=r"part-1\.csv: no column 'user_id'; it has \['w', '3', '8'\]"):
        rows("log.csv", tmp_path, on_bad_rows="skip")
    write(tmp_path / "log.parquet", "parquet", [("part-0", LOG), ("part-1", LOG.drop("item_id"))])
    with pytest.raises(ValueError, match=r"part-1\.parquet: no column 'item_id'"):
        rows("log.parquet", tmp_path, on_bad_rows="skip")
    (tmp_path / "log.parquet/part-1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"part-1\.parquet: cannot be read, it is damaged"):
        rows("log.parquet", tmp_path)
    (tmp_path / "log.parquet/part-1.parquet").rename(tmp_path / "log.parquet/part-1.csv")
    with pytest.raises(ValueError, match=r"log\.parquet: its parts are of two formats, as part-1\.csv is none of"):
        rows("log.parquet", tmp_path)


def test_folders_that_are_no_table_of_parts_are_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(ValueError, match=r"log\.csv: a folder without part files of the format csv"):
        rows("log.csv", tmp_path)
    write(tmp_path / "log.parquet", "parquet", [("part-0", LOG)])
    (tmp_path / "log.parquet/_delta_log").mkdir()
    with pytest.raises(ValueError, match=r"log\.parquet: a table with a log of changes \(_delta_log\)"):
        rows("log.parquet", tmp_path)


def test_a_catalogue_in_parts_with_images_beside_it(tmp_path: Path) -> None:
    LOG.write_csv(tmp_path / "log.csv")
    (tmp_path / "mug.png").write_bytes(b"image")
    goods = pl.DataFrame({"item_id": ["1", "02", "3"], "title": ["A", "B", "C"], "image": ["mug.png", None, "gone"]})
    write(tmp_path / "goods.parquet", "parquet", [("part-0", goods[:2]), ("part-1", goods[2:])])
    raw = read_tables("log.csv", "goods.parquet", folder=tmp_path)
    assert raw.items["image_path"].to_list() == [str(tmp_path / "mug.png"), None, None]


@pytest.mark.parametrize("name", ["log.parquet", "goods.parquet"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "middle"])
def test_damaged_parquet_is_named(tmp_path: Path, name: str, damage: str) -> None:
    LOG.write_parquet(tmp_path / "log.parquet")
    goods = pl.DataFrame({"item_id": ["1", "02", "3"], "title": ["x" * 1000] * 3, "image": [b"y" * 1000] * 3})
    goods.write_parquet(tmp_path / "goods.parquet")
    data = (tmp_path / name).read_bytes()
    spoilt = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"user_id,item_id\n",
        "middle": data[:20] + bytes(60),
    }
    spoilt["middle"] += data[80:]
    (tmp_path / name).write_bytes(spoilt[damage])
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")) as error:
        read_tables("log.parquet", "goods.parquet", folder=tmp_path)
    assert len(str(error.value)) < 1000


def test_ids_of_a_column_of_floats_meet_those_of_whole_numbers(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": [1, 2]}).write_parquet(tmp_path / "log.parquet")
    pl.DataFrame({"item_id": [1.0, 2.0, None], "title": ["A", "NaN", "C"]}).write_parquet(tmp_path / "goods.parquet")
    with pytest.raises(ValueError, match=r"goods\.parquet, row 3: no item_id"):
        read_tables("log.parquet", "goods.parquet", folder=tmp_path)
    raw = read_tables("log.parquet", "goods.parquet", folder=tmp_path, on_bad_rows="skip")
    assert raw.items.select("item_id", "title").rows() == [("1", "A"), ("2", "")]


def test_a_catalogue_of_other_ids_stops(tmp_path: Path) -> None:
    LOG.write_csv(tmp_path / "log.csv")
    for ids in (["01", "2", "03"], ["u", "v", "w"]):
        pl.DataFrame({"item_id": ids, "title": ids}).write_csv(tmp_path / "goods.csv")
        with pytest.raises(ValueError, match=r"goods\.csv: of the 3 items in the log, this catalogue has only 0"):
            read_tables("log.csv", "goods.csv", folder=tmp_path)


def test_a_data_set_of_the_hub_names_no_file_of_this_machine(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/datasets--stranger--shop/snapshots" / ("0" * 40)
    (snapshot / "images").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    for file in (tmp_path / "passport.png", snapshot / "images/1.png"):
        file.write_bytes(b"image")
    private = str(tmp_path / "passport.png")
    images = ["images/1.png", private, os.path.relpath(private, snapshot)]
    goods = pl.DataFrame({"item_id": ["1", "02", "3"], "title": list("ABC"), "image": images})
    goods.write_csv(snapshot / "goods.csv")
    goods.with_columns(image=pl.struct(bytes=pl.lit(None, pl.Binary), path="image")).write_parquet(
        snapshot / "goods.parquet"
    )
    LOG.write_csv(tmp_path / "log.csv")
    code = (
        "import sys; from mllm_msr.data.sources.tables import read_tables\n"
        "for kind in ('csv', 'parquet'):\n"
        "    raw = read_tables('log.csv', f'hf://datasets/stranger/shop/goods.{kind}', folder=sys.argv[1])\n"
        "    print(raw.items['image_path'].to_list()[1:], raw.items['image_path'][0][-12:], raw.skipped[0]['count'])\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.stdout == "[None, None] images/1.png 2\n" * 2, done.stderr


def test_a_data_set_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it is asked for again and again
    (tmp_path / "shop").mkdir()
    with pytest.raises(ValueError, match=r"shop: cannot be read as a data set"):
        rows("shop", tmp_path)
    (tmp_path / "shop/data.csv").write_text('a,b\n1,2\n1,2,3,4\n"')
    with pytest.raises(ValueError, match=r"shop: cannot be read as a data set"):
        rows("shop", tmp_path)
    with pytest.raises(OSError, match=r"hf://datasets/no/such/log\.csv: cannot be fetched"):
        rows("hf://datasets/no/such/log.csv", tmp_path)


def test_a_part_that_is_packed_otherwise_is_read_and_one_of_another_kind_stops(tmp_path: Path) -> None:
    folder = tmp_path / "log.csv"
    folder.mkdir()
    (folder / "part-0.csv").write_text("user_id,item_id,timestamp\na,1,1\n")
    (folder / "part-1.csv.bz2").write_bytes(bz2.compress(b"user_id,item_id,timestamp\nb,2,2\n"))
    (folder / "notes.txt").write_text("of the export")
    assert rows("log.csv", tmp_path) == [("a", "1", 1), ("b", "2", 2)]
    (folder / "part-2.csv.lz4").write_bytes(b"lz4")
    with pytest.raises(ValueError, match=r"log\.csv: its parts are of two formats, as part-2\.csv\.lz4 is none of csv"):
        rows("log.csv", tmp_path)


def test_two_columns_of_one_name_are_named(tmp_path: Path) -> None:
    names = ["user_id", "item_id", "timestamp", "item_id"]
    columns = [pa.array(["a"]), pa.array(["1"]), pa.array([1]), pa.array(["2"])]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"log\.parquet: two columns are called 'item_id'"):
        rows("log.parquet", tmp_path)


def test_parts_with_and_without_a_zone_go_together(tmp_path: Path) -> None:
    (tmp_path / "log.parquet").mkdir()
    for part, zone in enumerate((None, "UTC", "Asia/Tokyo")):
        moment = pl.Series([1600000000], dtype=pl.Int64).cast(pl.Datetime("us"))
        table = pl.DataFrame({"user_id": [str(part)], "item_id": ["1"], "timestamp": moment})
        zoned = pl.col("timestamp") if zone is None else pl.col("timestamp").dt.replace_time_zone("UTC")
        table = table.with_columns(zoned if zone is None else zoned.dt.convert_time_zone(zone))
        table.write_parquet(tmp_path / f"log.parquet/part-{part}.parquet")
    assert rows("log.parquet", tmp_path) == [(str(part), "1", 1600000000) for part in range(3)]


def table(item: Any, time: Any = 1600000000) -> pa.Table:
    """One row; a value may be an array of one."""
    values = {"user_id": "u", "item_id": item, "timestamp": time}
    return pa.table(
        {name: value if isinstance(value, pa.Array) else pa.array([value]) for name, value in values.items()}
    )


def write_parts(folder: Path, parts: dict[str, pa.Table]) -> None:
    for name, part in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, folder / name)


def test_ids_of_parts_are_read_by_the_type_of_each(tmp_path: Path) -> None:
    large = 2**60 + 1
    parts = [table(large), table(7.0), table("007"), table(pa.array([large], pa.decimal128(30, 0)))]
    write_parts(tmp_path / "log", {f"part-{place}.parquet": part for place, part in enumerate(parts)})
    goods = {f"part-{place}.parquet": part.append_column("title", [["A"]]) for place, part in enumerate(parts)}
    write_parts(tmp_path / "goods.parquet", goods)
    raw = read_tables("log", "goods.parquet", folder=tmp_path)
    ids = [str(large), "7", "007", str(large)]
    assert raw.interactions.collect()["item_id"].to_list() == ids and raw.items["item_id"].to_list() == ids[:3]
    write_parts(tmp_path / "log", {"part-4.parquet": table(pa.array([20000001.0], pa.float32()))})
    with pytest.raises(ValueError, match=r"log, row 1 of part-4\.parquet: item_id is .* a float has rounded it"):
        rows("log", tmp_path)
    for wrong in ([{"id": "1"}], [["1"]]):
        write_parts(tmp_path / "log", {"part-4.parquet": table(pa.array(wrong))})
        with pytest.raises(
            ValueError, match=r"log, row 1 of part-4\.parquet: ids are numbers or texts, but item_id is a"
        ):
            rows("log", tmp_path)


def test_times_of_parts_are_read_by_the_type_of_each(tmp_path: Path) -> None:
    moments = [pa.array([1600000000000], pa.timestamp("ms")), pa.array([1600000000000002], pa.timestamp("us"))]
    write_parts(tmp_path / "log", {f"part-{place}.parquet": table("1", time) for place, time in enumerate(moments)})
    raw = read_tables("log", folder=tmp_path)
    assert raw.interactions.collect()["timestamp"].to_list() == [1600000000000000, 1600000000000002]
    write_parts(tmp_path / "log", {"part-0.parquet": table("1", date(2020, 1, 1)), "part-1.parquet": table("1")})
    with pytest.raises(ValueError, match=r"row 1 of part-0\.parquet: times in microseconds where most are in seconds"):
        rows("log", tmp_path)


def test_parts_without_rows_say_nothing_of_columns(tmp_path: Path) -> None:
    write_parts(tmp_path / "log", {"part-0.parquet": pa.table({}), "part-1.parquet": table("1")})
    assert rows("log", tmp_path) == [("u", "1", 1600000000)]


def test_a_column_in_the_files_and_in_the_names_of_folders_is_the_same_in_both(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_parts(
        log, {"item_id=007/part-0.parquet": table("007"), "Item_ID=8/part-0.parquet": table("").drop("item_id")}
    )
    assert sorted(rows("log", tmp_path)) == [("u", "007", 1600000000), ("u", "8", 1600000000)]
    write_parts(log, {"item_id=9/part-1.parquet": table(8)})
    with pytest.raises(
        ValueError, match=r"item_id=9/part-1\.parquet, row 1: item_id is '8' in the file and '9' in its"
    ):
        rows("log", tmp_path)
    day = table("1", pa.array([1577873045], pa.timestamp("s")))
    write_parts(tmp_path / "days", {"timestamp=2020-01-01/part-0.parquet": day})
    assert read_tables("days", folder=tmp_path).interactions.collect()["timestamp"].to_list() == [1577873045000000]


def test_a_part_whose_content_is_damaged_is_named(tmp_path: Path) -> None:
    many = pa.table({name: [str(number) for number in range(20000)] for name in ("user_id", "item_id", "timestamp")})
    write_parts(tmp_path / "log", {"part-0.parquet": table("1"), "part-1.parquet": many})
    part = tmp_path / "log/part-1.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 300] = b"Z" * 300
    part.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"log/part-1\.parquet: cannot be read, it is damaged .*fetch or write it anew"
    ):
        rows("log", tmp_path)


def test_folders_as_hive_trino_and_killed_writers_leave_them(tmp_path: Path) -> None:
    hidden = ("_temporary/0/part-9.parquet", ".spark-staging-1/dt=1/part-9.parquet", "_metadata")
    write_parts(tmp_path / "hive", {"_dt=1/000000_0": table("1"), **dict.fromkeys(hidden, table("2"))})
    write_parts(tmp_path / "trino", {"20240101_1234_abcde_0a1b2c3d-1111": table("1")})
    assert rows("hive", tmp_path) == rows("trino", tmp_path) == [("u", "1", 1600000000)]
    write_parts(tmp_path / "killed", {"part-0.parquet": table("1"), "part-0.parquet.tmp": table("1")})
    with pytest.raises(
        ValueError, match=r"as part-0\.parquet\.tmp is none of parquet: leave one, and no files that are"
    ):
        rows("killed", tmp_path)
    for name in (".hoodie/hoodie.properties", "metadata/v1.metadata.json"):
        lake = {"2024/01/01/a.parquet": table("1"), name: table("1")}
        write_parts(tmp_path / name.split("/")[0] / "lake", lake)
        with pytest.raises(ValueError, match=r"lake: a table with a log of changes \("):
            rows(f"{name.split('/')[0]}/lake", tmp_path)

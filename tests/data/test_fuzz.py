"""Tables in any dialect, whole or damaged: success, a counted skip, or an error that names the file."""

import csv
import gzip
import io
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_msr.data.ids import MISSING
from mllm_msr.data.prepare import prepare
from mllm_msr.data.sources.tables import read_tables
from mllm_msr.evaluation.places import popularity_figures
from mllm_msr.records.sections import PrepareOptions

OPTIONS = PrepareOptions(k_core_users=1, k_core_items=1, n_negatives=1)
STEPS = ("cleaning: ", "no interactions: ", "no ranking task is left", "leakage: titles or descriptions that are")
BUFFER = io.BytesIO()
Image.effect_noise((40, 40), 50).save(BUFFER, "PNG")
ITEMS = range(8)
IDS = {
    "number": lambda n: 100 + n,
    "float": lambda n: 100.0 + n,
    "text": lambda n: f"sku-{n}",
    "padded": lambda n: f"{n:05d}",
}
TIMES = {
    "seconds": lambda n: 1_700_000_000 + n,
    "milliseconds": lambda n: 1_700_000_000_000 + n,
    "float": lambda n: 1_700_000_000.25 + n,
    "iso": lambda n: f"2024-01-01T10:{n:02d}:00",
    "zoned": lambda n: f"2024-01-01 10:{n:02d}:00.5+02:00",
}
FIELDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
TITLES = st.one_of(
    FIELDS, st.sampled_from(['24" screen', '"quoted"', "a, b; c|d", "two\nlines", 'left "open', "é€😀", "{"])
)


@dataclass(frozen=True)
class Dialect:
    """How a table is written."""

    kind: str = "csv"
    separator: str = ","
    encoding: str = "utf-8"
    end: str = "\n"
    quoting: int = csv.QUOTE_MINIMAL
    packed: bool = False
    parts: int = 0

    def name(self, stem: str) -> str:
        return f"{stem}.{self.kind}" + ".gz" * (self.packed and not self.parts)

    def write(self, folder: Path, stem: str, rows: list[dict[str, Any]]) -> Path:
        """The file, or the first of its parts."""
        if not self.parts:
            (folder / self.name(stem)).write_bytes(self.encode(rows))
            return folder / self.name(stem)
        target = folder / self.name(stem)
        target.mkdir()
        (target / "_SUCCESS").touch()
        size = -(-len(rows) // self.parts)
        for part in range(self.parts):
            if some := rows[part * size : (part + 1) * size]:
                (target / f"part-{part}.{self.kind}").write_bytes(self.encode(some))
        return target / f"part-0.{self.kind}"

    def encode(self, rows: list[dict[str, Any]]) -> bytes:
        if self.kind == "parquet":
            buffer = io.BytesIO()
            pl.DataFrame(rows, infer_schema_length=None).write_parquet(buffer)
            return buffer.getvalue()
        if self.kind == "jsonl":
            text = "".join(json.dumps(row) + self.end for row in rows)
        else:
            file = io.StringIO(newline="")
            quoting = csv.QUOTE_ALL if self.end == "\r" else self.quoting  # else a line break would stand unquoted
            writer = csv.writer(file, delimiter=self.separator, lineterminator=self.end, quoting=quoting)
            writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
            text = file.getvalue()
        data = text.encode(self.encoding)
        return gzip.compress(data) if self.packed and not self.parts else data


DIALECTS = st.builds(
    Dialect,
    kind=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
    separator=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    packed=st.booleans(),
    parts=st.integers(0, 2),
).map(lambda one: replace(one, packed=False) if one.kind == "parquet" else one)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A log and a catalogue, whose ids may be written in two ways."""
    of_log = draw(st.sampled_from(sorted(IDS)))
    of_goods = draw(st.sampled_from(["number", "float"])) if of_log in ("number", "float") else of_log
    time = TIMES[draw(st.sampled_from(sorted(TIMES)))]
    log = [
        {"user_id": IDS[of_log](user), "item_id": IDS[of_log]((user + 3 * step) % 8), "timestamp": time(step)}
        for user in range(5)
        for step in range(5)
    ]
    titles = draw(st.lists(TITLES, min_size=8, max_size=8))
    images = draw(st.lists(st.sampled_from(["mug.png", "gone.png", None, "a\0b"]), min_size=8, max_size=8))
    goods = [{"item_id": IDS[of_goods](n), "title": titles[n], "image": images[n]} for n in ITEMS]
    return log, goods


def run(folder: Path, log: str, goods: str, on_bad_rows: Any) -> dict[str, Any]:
    (folder / "mug.png").write_bytes(BUFFER.getvalue())
    raw = read_tables(log, goods, folder=folder, on_bad_rows=on_bad_rows)
    return prepare(raw, folder / "run/data", OPTIONS, "made up", popularity_figures)


SETTINGS = settings(suppress_health_check=list(HealthCheck), max_examples=100)


@SETTINGS
@given(tables(), DIALECTS, DIALECTS)
def test_every_dialect_gives_the_same_data(tables: tuple[list, list], of_log: Dialect, of_goods: Dialect) -> None:
    log, goods = tables
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        of_log.write(folder, "log", log)
        of_goods.write(folder, "goods", goods)
        raw = read_tables(of_log.name("log"), of_goods.name("goods"), folder=folder)
        chosen = [str(row["item_id"]).removesuffix(".0") for row in log]
        assert raw.interactions.collect()["item_id"].to_list() == chosen
        titles = [row["title"].strip() for row in goods]
        assert raw.items["title"].to_list() == ["" if title in MISSING else title for title in titles]
        assert set(chosen) <= set(raw.items["item_id"])
        times = raw.interactions.collect()["timestamp"].to_list()
        assert [times[at] < times[at + 1] for at in range(4)] == [True] * 4


@st.composite
def damages(draw: st.DrawFn) -> Any:
    """A function that spoils the bytes of a file."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "repeat", "append", "blank", "empty"]))
    places = draw(st.lists(st.floats(0, 1), min_size=1, max_size=6))
    junk = draw(
        st.one_of(st.binary(min_size=1, max_size=40), st.sampled_from([b'"', b"\n", b"\0", b"\xff", b",,,", b"\\"]))
    )

    def spoil(data: bytes) -> bytes:
        start, end = sorted(int(place * len(data)) for place in (places * 2)[:2])
        match kind:
            case "cut":
                return data[:end]
            case "flip":
                spoilt = bytearray(data)
                for place in places:
                    spoilt[min(int(place * len(data)), len(data) - 1)] ^= junk[0] or 1
                return bytes(spoilt)
            case "insert":
                return data[:start] + junk + data[start:]
            case "remove":
                return data[:start] + data[end:]
            case "repeat":
                return data[:end] + data[start:]
            case "append":
                return data + junk
            case "blank":
                return data[:start] + bytes(end - start) + data[end:]
        return b""

    return spoil


@SETTINGS
@given(tables(), DIALECTS, DIALECTS, damages(), st.booleans(), st.sampled_from(["error", "skip"]))
def test_damage_ends_in_success_a_counted_skip_or_a_clean_error(
    tables: tuple[list, list], of_log: Dialect, of_goods: Dialect, spoil: Any, the_log: bool, on_bad_rows: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [of_log.write(folder, "log", tables[0]), of_goods.write(folder, "goods", tables[1])]
        damaged = files[not the_log]
        damaged.write_bytes(spoil(damaged.read_bytes()))
        try:
            report = run(folder, of_log.name("log"), of_goods.name("goods"), on_bad_rows)
        except (ValueError, OSError) as error:
            message = str(error)
            assert len(message) < 3000
            assert "log." in message or "goods." in message or message.startswith(STEPS), message
            return
        assert all(row["count"] and row["what"] for row in report["skipped"])
        written = pl.read_parquet(folder / "run/data/interactions.parquet")
        assert not written.select((pl.col("user_id", "item_id").is_in(["", "nan", "NaN"])).any()).row(0).count(True)

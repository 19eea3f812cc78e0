"""CSV as people and programs write it."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from mllm_msr.data import delimited, text_files
from mllm_msr.data.delimited import csv_blocks
from mllm_msr.data.raw import ROW, BadRows


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path, bad: BadRows | None = None, separator: str = ",") -> pl.DataFrame:
    return pl.concat(csv_blocks(path, bad or BadRows(), separator))


def test_mark_gzip_and_row_numbers(tmp_path: Path) -> None:
    data = "\ufeffuser,item\n1,ä\n\n2,\n".encode()
    for path in (write(tmp_path / "a.csv", data), write(tmp_path / "a.csv.gz", gzip.compress(data))):
        assert read(path).to_dicts() == [{ROW: 2, "user": "1", "item": "ä"}, {ROW: 4, "user": "2", "item": None}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_every_dialect_reads_the_same(tmp_path: Path, encoding: str, end: str, separator: str) -> None:
    rows = [["user", "item"], ["1", "Ä, b; c"], ["2", '24" screen'], ["3", "plain"]]
    lines = [separator.join(f'"{v}"' if separator in v else v for v in row) for row in rows]
    bad = BadRows()
    table = read(write(tmp_path / "a.csv", end.join(lines).encode(encoding)), bad)
    assert table.drop(ROW).rows() == [tuple(row) for row in rows[1:]]
    assert [row["what"] for row in bad.skipped] == (
        [f"a.csv: fields are divided by {separator!r}, not by ','"] if separator != "," else []
    )


def test_the_hint_for_a_spreadsheet_is_no_header(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "sep=;\nid;title\n1;A\n")).rows() == [(3, "1", "A")]


def test_windows_encoding_is_read_and_noted(tmp_path: Path) -> None:
    bad = BadRows()
    table = read(write(tmp_path / "a.csv", "id,title\n1,Misérables\n".encode("cp1252")), bad)
    assert table["title"].to_list() == ["Misérables"]
    assert bad.skipped[0]["what"] == "a.csv: not UTF-8, read as Windows-1252"


def test_one_torn_character_does_not_make_it_another_encoding(tmp_path: Path) -> None:
    bad = BadRows()
    data = "id,title\n1,Ärger über Öl und süße Äpfel\n2,Mug ".encode() + "é".encode()[:1] + b"\n"
    titles = read(write(tmp_path / "a.csv", data), bad)["title"].to_list()
    assert titles == ["Ärger über Öl und süße Äpfel", "Mug \ufffd"]
    assert bad.skipped[0]["count"] == 1


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PAR1" + bytes(30), "a Parquet file"),
        (b"PK\x03\x04" + bytes(30), "a ZIP archive or an Excel workbook"),
        (bytes(range(256)) * 10, "no text"),
        (b"", "the file is empty"),
        (b"\n\n", "no column|empty|header"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, data: bytes, kind: str) -> None:
    if data == b"\n\n":
        assert read(write(tmp_path / "a.csv", data)).is_empty()
        return
    with pytest.raises(ValueError, match=rf"a\.csv: .*{kind}"):
        read(write(tmp_path / "a.csv", data))


def test_row_with_too_many_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,title\n1,A\n2,B,oops\n3,"C, c"\n')
    with pytest.raises(ValueError, match=r"a\.csv, row 3: more than the header's 2 fields.*--on-bad-rows skip"):
        read(path)
    bad = BadRows("skip")
    assert read(path, bad).rows() == [(2, "1", "A"), (4, "3", "C, c")]
    assert bad.skipped[0]["count"] == 1


TEXTS = ['He said "no"', "two\nlines", 'a, "b"\nc', "", "plain", '"', 'ends with "', "x" * 200_000]


@pytest.mark.parametrize("escaped", ['""', '\\"'])
def test_quoted_texts_are_read_whole(tmp_path: Path, escaped: str) -> None:
    lines = ["item_id,title,text"]
    lines += [f'{n},"{text.replace(chr(34), escaped)}",t{n}' for n, text in enumerate(TEXTS)]
    bad = BadRows()
    table = read(write(tmp_path / "a.csv", "\n".join(lines) + "\n"), bad)
    assert table["title"].to_list() == [text or None for text in TEXTS] and bad.skipped == []
    assert table["text"].to_list() == [f"t{n}" for n in range(len(TEXTS))]


@pytest.mark.parametrize(
    "lines",
    [
        ['1,"Heat,a', "2,Alien,b", "3,Jaws,c"],
        ['1,"Heat,a', "2,Alien,b", '3,Jaws",c'],
        ['1,"Heat,a', "2,Alien,b", '3,"Jaws,c'],
        ['1,"Heat" of the night,a', '2,Al"ien,b', '3,Jaws,"c'],
        ["1,Heat,a", "2,Alien,b", '3,"Jaws,c'],
    ],
)
def test_a_mark_left_open_swallows_nothing(tmp_path: Path, lines: list[str]) -> None:
    bad = BadRows()
    table = read(write(tmp_path / "a.csv", "\n".join(["id,title,text", *lines]) + "\n"), bad)
    assert table.drop(ROW).rows() == [tuple(line.split(",")) for line in lines]
    assert bad.skipped[0]["what"].startswith("a.csv: quotation marks that enclose no field")


def test_rows_may_be_cut_by_the_end_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(n + 2 + 2 * n, str(n), f'title "{n}"\nof three\nlines') for n in range(50)]
    lines = ["id,title", *(f'{item},"{title.replace(chr(34), chr(34) * 2)}"' for _, item, title in rows)]
    path = write(tmp_path / "a.csv", "\n".join(lines))
    for size in (7, 40, 1 << 20):
        monkeypatch.setattr(text_files, "BLOCK", size)
        assert read(path).rows() == rows
    monkeypatch.setattr(delimited, "LONGEST_ROW", 2)
    bad = BadRows("skip")
    assert len(read(path, bad)) > 50 and bad.skipped  # too long to be one row: as it stands


def test_columns_need_names_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: two columns are called 'id'"):
        read(write(tmp_path / "a.csv", "id,title, id\n1,A,2\n"))
    assert read(write(tmp_path / "a.csv", ',row\n0,"a"\n')).columns == [ROW, "column 1", "row"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "none.csv")


@pytest.mark.parametrize("cut", [3, 10, 60, -9, -1])
def test_a_packed_file_cut_short_is_named(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress(b"id,title\n" + b"".join(b"%d,x\n" % n for n in range(100)))
    with pytest.raises((OSError, ValueError), match=r"log\.csv\.gz"):
        read(write(tmp_path / "log.csv.gz", packed[:cut]))


def test_blanks_before_a_mark_are_no_part_of_the_field(tmp_path: Path) -> None:
    text = 'user, "item"\n"1", "Cats, dogs"\n2, "a ""b"""\n3, 24" screen\n4, "a" b\n'
    rows = [("1", "Cats, dogs"), ("2", 'a "b"'), ("3", ' 24" screen'), ("4", ' "a" b')]
    assert read(write(tmp_path / "a.csv", text)).drop(ROW).rows() == rows


@pytest.mark.parametrize(
    ("encoding", "title"),
    [
        ("shift_jis", "青いマグカップ"),
        ("gb18030", "蓝色的杯子"),
        ("big5", "藍色的杯子"),
        ("euc_kr", "파란 머그잔"),
        ("cp1251", "Привет мир"),
        ("koi8_r", "Привет мир"),
        ("cp1253", "Καλημέρα"),
        ("iso2022_jp", "青いマグ"),
    ],
)
def test_an_encoding_that_cannot_be_told_is_refused(tmp_path: Path, encoding: str, title: str) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: .* save it as UTF-8"):
        read(write(tmp_path / "a.csv", f"id,title\n1,{title}\n2,Mug\n".encode(encoding)))


def test_western_texts_with_neighbouring_accents_are_read(tmp_path: Path) -> None:
    titles = ["Créée", "Informações", "Größe", "œuvre", "„Öl“ “café”…", "¿Qué?", "pääöö"]
    rows = "".join(f"{number},{title}\n" for number, title in enumerate(titles))
    assert read(write(tmp_path / "a.csv", f"id,title\n{rows}".encode("cp1252")))["title"].to_list() == titles
    cut = b"id,title\n1,Mug " + "😀".encode()[:3] + b"\n"
    assert read(write(tmp_path / "b.csv", cut)).height == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
def test_a_carriage_return_within_a_row_does_not_end_it(tmp_path: Path, end: str) -> None:
    rows = ["id,title", "1,A\rB", '2,"C\rD"', "3,E"]
    path = write(tmp_path / "a.csv", "".join(row + end for row in rows).encode())
    assert read(path).rows() == [(2, "1", "A B"), (3, "2", "C D"), (4, "3", "E")]


def test_old_line_ends_are_read(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", b"id,title\r1,A\r2,B\r")).rows() == [(2, "1", "A"), (3, "2", "B")]


def test_a_separator_at_the_end_of_every_row_is_no_field(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "id,title\n1,A,\n2,B,,\n")).rows() == [(2, "1", "A"), (3, "2", "B")]


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, partial(pa.compress, codec="zstd", asbytes=True)]
)
def test_packed_files_are_read_and_damaged_ones_named(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    content = b"id,title\n" + b"".join(b"%d,A\n" % row for row in range(2000))
    packed = pack(content)
    assert read(write(tmp_path / "a.csv", packed)).height == 2000
    for part in (packed[: len(packed) // 2], packed[:30] + b"\xff\0\xff" + packed[33:]):
        with pytest.raises((OSError, ValueError), match=r"a\.csv: .*damaged"):
            read(write(tmp_path / "a.csv", part))

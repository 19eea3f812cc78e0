import os
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from mllm_msr.data.cleaning import clean
from mllm_msr.data.sources.movielens import GENRES, read_movielens
from mllm_msr.data.tasks import TaskPlan
from mllm_msr.evaluation.places import popularity_figures
from mllm_msr.records.sections import PrepareOptions

LATER = "year,overview,original_language,runtime,vote_average,vote_count"
HEADER = f"movie_id,title,genre_unknown,{','.join(GENRES)},{LATER}"


def film(movie_id: int, title: str, overview: str, *genres: str) -> str:
    flags = ",".join("1" if genre in genres else "0" for genre in GENRES)
    return f'{movie_id},"{title}",{int(not genres)},{flags},1995,"{overview}",en,81.0,7.9,10878.0'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ratings = ["user_id,movie_id,rating,unix_timestamp", "1,10,3,100", "1,11,1,100", "2,12,5,90", "2,267,5,95"]
    films = [
        HEADER,
        film(10, "Léon, The Pro (1994)", "A killer and a girl.", "Crime", "Thriller"),
        film(10, "Léon, The Pro (1994)", "Another film.", "Drama"),
        film(11, "Kolya (1996)", "", "Comedy"),
        film(12, "Contact (1997)", "A signal.", "SciFi"),
        film(267, "unknown", "Someone else's plot."),
    ]
    (tmp_path / "ratings.csv").write_text("\n".join(ratings) + "\n")
    (tmp_path / "items.csv").write_text("\n".join(films) + "\n")
    (tmp_path / "posters").mkdir()
    for movie_id in (10, 12, 267):
        Image.new("RGB", (60, 90), "red").save(tmp_path / "posters" / f"{movie_id}.jpg")
    return tmp_path


def test_reads_ratings_films_and_posters(folder: Path) -> None:
    raw = read_movielens(folder)
    assert raw.interactions.collect().rows() == [("1", "10", 100), ("1", "11", 100), ("2", "12", 90), ("2", "267", 95)]
    items = {row["item_id"]: row for row in raw.items.to_dicts()}
    assert items["10"]["title"] == "Léon, The Pro (1994)"
    assert items["10"]["text"] == "Crime, Thriller. A killer and a girl."
    assert items["10"]["image_path"] == str(folder / "posters" / "10.jpg")
    assert items["11"]["text"] == "Comedy." and items["11"]["image_path"] is None
    assert "7.9" not in str(items) and "10878" not in str(items)  # later popularity


def test_flags_and_ids_in_any_spelling(folder: Path) -> None:
    items = (folder / "items.csv").read_text()
    lines = [
        f"{movie}.0,Film {movie},0,{flag},{','.join('0' * 17)},1995,A plot,en,81,7,10" for movie, flag in FLAGS.items()
    ]
    (folder / "items.csv").write_text("\n".join([items.split("\n")[0], *lines]) + "\n")
    raw = read_movielens(folder)
    assert dict(raw.items.select("item_id", "text").iter_rows()) == {
        "10": "Action. A plot",
        "11": "Action. A plot",
        "12": "A plot",
        "267": "A plot",
    }
    with (folder / "items.csv").open("a") as file:
        file.write(lines[0].replace("10.0", "13").replace(",True,", ",perhaps,") + "\n")
    with pytest.raises(ValueError, match=r"items\.csv, row 6: Action is neither 0 nor 1"):
        read_movielens(folder)


FLAGS = {10: "True", 11: "1.0", 12: "", 267: "NaN"}


def test_a_catalogue_of_other_films_stops(folder: Path) -> None:
    (folder / "ratings.csv").write_text("user_id,movie_id,rating,unix_timestamp\n1,010,3,100\n1,0011,1,100\n")
    with pytest.raises(ValueError, match=r"items\.csv: of the 2 items in the log, this catalogue has only 0"):
        read_movielens(folder)


def test_unknown_film_keeps_nothing_of_the_other_film(folder: Path) -> None:
    (unknown,) = read_movielens(folder).items.filter(item_id="267").to_dicts()
    assert (unknown["title"], unknown["text"], unknown["image_path"]) == ("", "", None)


def test_oddities_are_counted(folder: Path) -> None:
    counts = {row["what"].removeprefix("items.csv: "): row["count"] for row in read_movielens(folder).skipped}
    assert counts["surplus rows of an item (first one kept)"] == 1
    assert counts["items without a poster"] == 2  # 11, and 267 whose poster is not trusted


def test_bad_rating_stops_or_is_skipped(folder: Path) -> None:
    with (folder / "ratings.csv").open("a") as file:
        file.write("3,10,4,yesterday\n,10,4,99\n")
    with pytest.raises(ValueError, match=r"ratings\.csv, row 7: no user_id"):
        read_movielens(folder)
    raw = read_movielens(folder, on_bad_rows="skip")
    assert len(raw.interactions.collect()) == 4
    reasons = {row["what"] for row in raw.skipped}
    assert {"ratings.csv: no user_id", "ratings.csv: timestamp is no number or date"} <= reasons


def test_wrong_folder_says_what_is_missing(folder: Path) -> None:
    (folder / "items.csv").write_text("movie_id,name\n1,A\n")
    with pytest.raises(ValueError, match=r"items\.csv: no column"):
        read_movielens(folder)


@pytest.mark.skipif("MLLM_MSR_MOVIELENS" not in os.environ, reason="MLLM_MSR_MOVIELENS names no MovieLens-100k folder")
def test_real_movielens_agrees_with_published_figures() -> None:
    raw = read_movielens(Path(os.environ["MLLM_MSR_MOVIELENS"]))
    assert raw.interactions.shape == (100_000, 3) and len(raw.items) == 1682
    assert next(row["count"] for row in raw.skipped if "surplus" in row["what"]) == 64
    options = PrepareOptions(k_core_users=1, k_core_items=1)
    plan = TaskPlan.of(clean(raw, options).interactions, options)
    assert plan.report["test_tasks"] == 943
    assert round(plan.report["test_targets_tied_in_time"] / 943, 2) == 0.44
    test = pl.concat(plan.chunks()).filter(split="test")
    figures = popularity_figures(test, plan.popularity)  # .645 ± .032 by file order; .561 by item id
    assert abs(figures["hr@5"] - 0.645) < 0.032
    assert abs(figures["mrr@5"] - 0.371) < 0.024

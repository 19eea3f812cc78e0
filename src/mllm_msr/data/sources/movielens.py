"""MovieLens-100k with overviews and posters: ``ratings.csv``, ``items.csv``, ``posters/<movie_id>.jpg``."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from mllm_msr.data.delimited import csv_blocks
from mllm_msr.data.ids import as_ids, as_text, check_join
from mllm_msr.data.image_places import images_by_id
from mllm_msr.data.logs import interactions_from, join_text
from mllm_msr.data.raw import BadRows, RawData, need_columns
from mllm_msr.data.sources.interface import SourceOptions, Terms
from mllm_msr.data.spool import spool
from mllm_msr.records.sections import OnBadRows

GENRES = (
    *("Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "FilmNoir"),
    *("Horror", "Musical", "Mystery", "Romance", "SciFi", "Thriller", "War", "Western"),
)
COLUMNS = {"user_id": "user_id", "item_id": "movie_id", "timestamp": "unix_timestamp"}
YES, NO = ("1", "1.0", "true", "t", "yes", "y"), ("0", "0.0", "false", "f", "no", "n")


@dataclass(frozen=True)
class MovieLensSource(SourceOptions):
    """MovieLens-100k with overviews and posters. ``folder`` has ratings.csv, items.csv and posters/."""

    folder: str | None = None

    required = ("folder",)
    terms = Terms(
        name="MovieLens (GroupLens)",
        allows="research; acknowledge GroupLens in publications",
        forbids="redistribution and commercial use without permission; implying endorsement",
        link="https://grouplens.org/datasets/movielens/",
        images="posters and overviews belong to the studios and to TMDB, whose own terms apply",
        log="100k and 1M: not to be passed on without permission; ml-latest and 32M: only under the same conditions",
        read="readmes of 100k, 1M, ml-latest-small and 32M, in others' copies, November 2026",
    )

    def read(self, on_bad_rows: OnBadRows) -> RawData:
        return read_movielens(Path(str(self.folder)), on_bad_rows)


def read_movielens(folder: Path, on_bad_rows: OnBadRows = "error") -> RawData:
    """Read the folder; every rating is an interaction, whatever its stars.

    An item's text is its genres and overview. ``vote_average`` and ``vote_count`` are later popularity and stay out.
    Surplus item rows are dropped and counted. An item called "unknown" carries another film's overview and poster: it
    keeps neither. One overview under several titles is counted and kept, as nothing says which title it belongs to.
    """
    folder = Path(folder)
    bad = BadRows(on_bad_rows)
    ratings = folder / "ratings.csv"
    log, ticks = interactions_from([spool(csv_blocks(ratings, bad))], ratings, COLUMNS, bad)

    path = folder / "items.csv"
    table = pl.concat(csv_blocks(path, bad))
    need_columns(table.columns, ["movie_id", "title", "overview", *GENRES], path)
    table = as_ids(table.lazy(), ["movie_id"], path, bad).collect()
    flags = {genre: as_text(genre, pl.String()).str.to_lowercase() for genre in GENRES}
    problems = {f"{genre} is neither 0 nor 1": ~flag.is_in(YES + NO) for genre, flag in flags.items()}
    table = bad.drop(table, {"no movie_id": pl.col("movie_id").is_null(), **problems}, path)
    items = bad.unique_items(table.rename({"movie_id": "item_id"}), path)
    check_join(log, items, path, bad)
    items = items.with_columns(as_text(name, pl.String()) for name in ("title", "overview"))
    unknown = pl.col("title").fill_null("").str.to_lowercase().is_in(["", "unknown"])
    genres = [pl.when(flag.is_in(YES)).then(pl.lit(genre)) for genre, flag in flags.items()]
    items = items.with_columns(
        images_by_id(items["item_id"], folder / "posters"),
        pl.concat_str(genres, separator=", ", ignore_nulls=True).alias("genres"),
    )
    items = items.with_columns(pl.when(~unknown).then(name).alias(name) for name in ("title", "overview", "image_path"))
    items = items.with_columns(pl.when(pl.col("genres") != "").then(pl.col("genres") + "."))
    for what, rows in {
        "items without a title: overview and poster not trusted": items.filter(unknown),
        "items without an overview": items.filter(pl.col("overview").is_null()),
        "items without a poster": items.filter(pl.col("image_path").is_null()),
        "items sharing a title with another id (kept)": items.filter(
            pl.col("title").is_not_null() & pl.col("title").is_duplicated()
        ),
        "items sharing an overview with another title (kept)": items.filter(
            pl.col("overview").is_not_null() & (pl.col("title").n_unique().over("overview") > 1)
        ),
    }.items():
        bad.note(f"{path.name}: {what}", len(rows), rows["item_id"].to_list())
    items = items.select(
        "item_id", "title", join_text(pl.col("genres"), pl.col("overview")).alias("text"), "image_path"
    )
    return RawData(log, items, bad.skipped, ticks)

"""MovieLens-100k with overviews and posters: ``ratings.csv``, ``items.csv``, ``posters/<movie_id>.jpg``."""

from pathlib import Path

import polars as pl

from mllm_msr.data.raw import BadRows, RawData
from mllm_msr.data.readers import image_files, interactions_from, join_text, read_csv
from mllm_msr.records.sections import OnBadRows

GENRES = (
    *("Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "FilmNoir"),
    *("Horror", "Musical", "Mystery", "Romance", "SciFi", "Thriller", "War", "Western"),
)
COLUMNS = {"user_id": "user_id", "item_id": "movie_id", "timestamp": "unix_timestamp"}


def read_movielens(folder: Path, on_bad_rows: OnBadRows = "error") -> RawData:
    """Read the folder; every rating is an interaction, whatever its stars.

    An item's text is its genres and overview. ``vote_average`` and ``vote_count`` are later popularity and stay out.
    Surplus item rows are dropped and counted. An item called "unknown" carries another film's overview and poster: it
    keeps neither. One overview under several titles is counted and kept, as nothing says which title it belongs to.
    """
    folder = Path(folder)
    bad = BadRows(on_bad_rows)
    ratings = folder / "ratings.csv"
    log, ticks = interactions_from(read_csv(ratings, bad), ratings, COLUMNS, bad)

    path = folder / "items.csv"
    items = read_csv(path, bad).collect()
    if missing := {"movie_id", "title", "overview", *GENRES} - set(items.columns):
        raise ValueError(f"{path}: no column {min(missing)!r}; MovieLens with overviews has movie_id,title,…,overview")
    items = bad.drop(items, {"no movie_id": pl.col("movie_id").is_null()}, path)
    items = bad.unique_items(items.rename({"movie_id": "item_id"}), path)
    posters = image_files(folder / "posters")
    unknown = pl.col("title").fill_null("").str.to_lowercase().is_in(["", "unknown"])
    genres = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES]
    items = items.with_columns(
        pl.when(~unknown).then("title").alias("title"),
        pl.when(~unknown).then("overview").alias("overview"),
        pl.when(~unknown).then(pl.col("item_id").replace_strict(posters, default=None)).alias("image_path"),
        pl.concat_str(genres, separator=", ", ignore_nulls=True).alias("genres"),
    )
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

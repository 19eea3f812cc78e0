"""Whether two checkouts give the same scores: the largest difference of a logit, by variant.

    python benchmarks/compare_scores.py OLD_RUN NEW_RUN

Both are folders of runs of the same recipe, or their ``scores.parquet``. Exits with 1 if a variant that both have
differs by more than 1e-6, or ranked other candidates. A file in which variants stand in a column ``row`` is of a
version before this one.
"""

import argparse
import sys
from pathlib import Path

import polars as pl

TOLERANCE = 1e-6
PAIR = ["variant", "user_id", "item_id"]


def read_scores(place: Path) -> pl.DataFrame:
    """``variant``, ``user_id``, ``item_id``, ``logit`` of a run; FileNotFoundError if it has not been evaluated."""
    frame = pl.read_parquet(place / "scores.parquet" if place.is_dir() else place)
    return frame.rename({"row": "variant"} if "row" in frame.columns else {}).select(*PAIR, "logit")


def compare(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """By variant that both have: ``pairs`` of each, how many are of ``both``, and their ``largest`` difference."""
    counts = {
        name: frame.group_by("variant", maintain_order=True).len(name) for name, frame in (("old", old), ("new", new))
    }
    gap = (pl.col("logit").cast(pl.Float64) - pl.col("logit_new").cast(pl.Float64)).abs()
    pairs = (
        old.join(new, on=PAIR, suffix="_new")
        .group_by("variant")
        .agg(pl.len().alias("both"), gap.max().alias("largest"))
    )
    return counts["old"].join(counts["new"], on="variant").join(pairs, on="variant", how="left", maintain_order="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="run of the one checkout")
    parser.add_argument("new", type=Path, help="run of the other")
    options = parser.parse_args()
    table, same = compare(read_scores(options.old), read_scores(options.new)), True
    for variant, old, new, both, largest in table.iter_rows():
        equal = old == new == both and largest <= TOLERANCE
        same &= equal
        gap = "no pair in common" if largest is None else f"largest difference of a logit {largest:.3g}"
        print(f"{variant:16} {old} and {new} pairs, {both or 0} in both; {gap}{'' if equal else '  DIFFERS'}")
    if table.is_empty():
        sys.exit("no variant is in both")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()

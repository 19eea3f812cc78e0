"""`mllm-msr rank --new-items`: items that training never saw, among those of the catalogue and in histories."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mllm_msr.cli import main
from mllm_msr.processing.new_vectors import put_new_items
from mllm_msr.rank import HeadRanker, Ranking, RunUser, new_items
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS


@pytest.fixture
def twins(finished: RunFolder, tmp_path: Path) -> Path:
    """New items with words and images of three of the catalogue, and one with words alone."""
    items = finished.read(ITEMS)[:3]
    rows = []
    for item_id, title, text, image in items.select("item_id", "title", "text", "image").iter_rows():
        (tmp_path / f"{item_id}.png").write_bytes(image["bytes"])
        rows.append((f"twin-{item_id}", title, text, f"{item_id}.png"))
    path = tmp_path / "new.csv"
    rows.append(("words", "A quiet red thing", "", None))
    pl.DataFrame(rows, schema=["item_id", "title", "text", "image"], orient="row").write_csv(path)
    return path


def shown(out: str) -> dict[str, float]:
    rows = [line.split() for line in out.strip().splitlines()]
    return {row[2]: float(row[1]) for row in rows if row[0].isdigit()}


def test_their_vectors_are_those_that_the_stage_makes_and_they_are_ranked_among_all(finished, twins) -> None:
    new = new_items(finished, twins)
    ranker = HeadRanker(finished, "fused", new).ranker
    originals = [item.removeprefix("twin-") for item in new.candidates if item != "words"]
    ours, theirs = (
        ranker.content[ranker.codes_of(ids)].float() for ids in ([f"twin-{i}" for i in originals], originals)
    )
    assert np.allclose(ours, theirs, atol=2e-2) and not np.allclose(ours[0], theirs[1], atol=2e-2)
    assert ranker.item_ids[-4:] == list(new.candidates)
    names = list(Ranking(new=new).catalogue(finished))
    catalogue = Ranking(new=new).catalogue(finished)
    (scores,) = (
        HeadRanker(finished, "head", new).score([RunUser("", history=tuple(names[:2]))], names, catalogue).logits
    )
    assert len(scores) == len(ranker) and np.isfinite(scores).all()


@pytest.mark.parametrize("by", ["fused", "head", "answer"])
def test_every_way_ranks_them(finished, twins, by: str, capsys) -> None:
    main(["rank", str(finished.path), "--user", "u0000", "--by", by, "--new-items", str(twins), "--top-k", "44"])
    found = shown(capsys.readouterr().out)
    assert {"words", "twin-i0001"} <= set(found) and any(not item.startswith(("twin", "words")) for item in found)


def test_a_history_may_name_them_and_they_may_be_all_that_is_asked_for(finished, twins, capsys) -> None:
    own = ["--history", "words,twin-i0001,i0003", "--items", "twin-i0000,i0002", "--new-items", str(twins)]
    main(["rank", str(finished.path), *own])
    out = capsys.readouterr().out
    assert "after: A quiet red thing, " in out and set(shown(out)) == {"twin-i0000", "i0002"}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pl.col("item_id").str.strip_prefix("twin-"), r"new\.csv: item 'i00\d\d' is in the catalogue already"),
        (pl.lit("[1.0, 2.0]").alias("vector"), r"new\.csv: the vectors of 4 items are \(4, 2\), not \(items, \d+\)"),
    ],
)
def test_a_file_that_does_not_fit_is_named(finished, twins, column: pl.Expr, message: str) -> None:
    pl.read_csv(twins).with_columns(column).write_csv(twins)
    with pytest.raises(SystemExit, match=message):
        main(["rank", str(finished.path), "--history", "i0001", "--new-items", str(twins)])


def test_a_run_of_own_vectors_asks_for_theirs(finished, twins, tmp_path) -> None:
    items = finished.read(ITEMS, ["item_id"]).with_columns(vector=[1.0, 2.0])
    items.write_parquet(tmp_path / "own.parquet")
    recipe = replace(finished.recipe, vectors=replace(finished.recipe.vectors, file=str(tmp_path / "own.parquet")))
    with pytest.raises(ValueError, match=r"new\.csv: this run's item vectors are its owner's .*own\.parquet.*`vector`"):
        put_new_items(HeadRanker(finished, "head", None).ranker, recipe, new_items(finished, twins))

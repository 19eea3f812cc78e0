"""What the cards say of variants, licences and terms; shards; and the way back to what was left out."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from PIL import Image

from mllm_msr.data.prepare import PrepareOptions
from mllm_msr.hub_cards.cards import model_card
from mllm_msr.hub_cards.publishing import build_hub
from mllm_msr.hub_cards.shards import dataset_info, shard
from mllm_msr.hub_cards.terms import SOURCE_TERMS, conflicts, warnings
from mllm_msr.rebuild import rebuild
from mllm_msr.records.run import Run
from mllm_msr.stages import prepare


def test_licences_that_promise_too_much_are_said_so():
    assert conflicts("apache-2.0", "apache-2.0", "demo") == []
    assert "state gemma" in conflicts("apache-2.0", "gemma", "demo")[0]
    assert conflicts("gemma", "gemma", "demo") == []
    (found,) = conflicts("mit", None, "movielens")
    assert "GroupLens" in found and "`license: other`" in found
    facts = {"recipe": {"source": {"type": "microlens"}, "license": "other"}}
    assert warnings(facts, public=False) == []
    assert "dataset and space stay private" in warnings(facts, public=True)[0]
    assert all(one["link"].startswith("https://") and one["read"] and one["log"] for one in SOURCE_TERMS.values())
    assert "states no `license`" in warnings({"recipe": {}}, public=False)[0]


@pytest.mark.parametrize(
    ("variant", "relation", "words"),
    [
        ("full", "finetune", "holds whole weights, the"),
        ("merged", "finetune", "is merged"),
        ("adapter", "adapter", "LoRA"),
    ],
)
def test_variants_of_the_model_card(make_run, variant, relation, words):
    run = make_run()
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["training"] = {"model_name_or_path": "org/base", "model_revision": "abc", "use_peft": variant != "full"}
    recipe |= {"license": "apache-2.0", "source": {"type": "amazon", "folder": "x"}}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    if variant == "adapter":
        (run / "model/adapter").mkdir()
    card = model_card(run)
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", relation)
    assert f"This repository holds {words}" in card.text or words in card.text.split("## How to use")[0]
    assert "**Conflict:** the data are from Amazon Reviews" in card.text
    assert "train 142 s" in card.text and "at revision `abc`" in card.text


def test_shards_are_of_sensible_size_and_described_as_they_are(make_run, tmp_path):
    run = make_run()
    items = run / "data/items.parquet"
    info = shard(items, tmp_path / "items", "train", shard_bytes=items.stat().st_size // 3 + 1)
    files = sorted((tmp_path / "items").iterdir())
    assert [path.name for path in files] == [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert info is not None and info.num_examples == 30
    assert [pq.read_metadata(path).num_rows for path in files] == [10, 10, 10]
    again = load_dataset(str(tmp_path / "items"), split="train", cache_dir=str(tmp_path / "cache"))
    whole = pl.read_parquet(items)
    assert again["item_id"] == whole["item_id"].to_list() and again[1]["image"].size == (96, 96)
    (described,) = dataset_info(tmp_path, {"items": {"train": info}})
    assert described["features"][-1] == {"name": "image", "dtype": "image"}
    assert described["download_size"] == sum(path.stat().st_size for path in files)
    empty = tmp_path / "empty.parquet"
    whole.clear().write_parquet(empty)
    assert shard(empty, tmp_path / "none", "train") is None and not (tmp_path / "none").exists()


def movielens(folder: Path) -> Path:
    """A source as its owner hands it out."""
    rng = np.random.default_rng(0)
    (folder / "posters").mkdir(parents=True)
    genres = (
        "Action,Adventure,Animation,Children,Comedy,Crime,Documentary,Drama,Fantasy,FilmNoir,Horror,Musical,Mystery,"
        "Romance,SciFi,Thriller,War,Western"
    )
    lines = [f"movie_id,title,overview,{genres}"]
    for film in range(40):
        flags = ",".join("1" if rng.random() < 0.2 else "0" for _ in genres.split(","))
        lines.append(f"{film},Film {film},The overview of number {film}.,{flags}")
        Image.new("RGB", (20, 30), tuple(rng.integers(0, 255, 3).tolist())).save(folder / f"posters/{film}.jpg")
    (folder / "items.csv").write_text("\n".join(lines))
    rows = ["user_id,movie_id,rating,unix_timestamp"]
    for user in range(12):
        rows += [f"{user},{film},4,{100 * n}" for n, film in enumerate(rng.permutation(40)[:14])]
    (folder / "ratings.csv").write_text("\n".join(rows))
    return folder


def test_what_the_terms_keep_out_is_rebuilt_from_the_source(make_run, tmp_path):
    run, source = make_run(), movielens(tmp_path / "source")
    recipe = {
        "name": "films", "license": "other", "source": {"type": "movielens", "folder": str(source)},
        "data": {"n_negatives": 5, "k_core_users": 1, "k_core_items": 1, "min_history": 3},
    }  # fmt: skip
    assert PrepareOptions(**recipe["data"]).n_negatives == 5
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    (run / "provenance.json").unlink()
    prepare(Run.open(run))
    items, tasks = pl.read_parquet(run / "data/items.parquet"), pl.read_parquet(run / "data/tasks.parquet")
    pairs = tasks.filter(split="train").select(
        "task_id", "user_id", pl.col("candidates").alias("item_id"), pl.col("labels").alias("label")
    )
    sft = pairs.explode("item_id", "label").with_columns(
        preference=pl.lit("films"), recent=pl.lit([], pl.List(pl.String))
    )
    sft.join(items.select("item_id", "title"), on="item_id").write_parquet(run / "sft/train.parquet")
    (run / "sft/validation.parquet").unlink()

    published = build_hub(run, "org", "v1")["dataset"]
    out = pl.read_parquet(published / "items/*.parquet")
    assert set(out["text"]) == {""} and out["image"].null_count() == len(out) and out["title"].null_count() == 0
    assert str(tmp_path) not in (published / "recipe.yaml").read_text()
    card = (published / "README.md").read_text()
    assert "| **this data set's**: [MovieLens (GroupLens)](https://grouplens.org/datasets/movielens/) |" in card
    assert "leaves this repository private" in card
    assert "license_name: movielens-terms" in card
    script = published / "rebuild.py"
    assert script.read_text() == Path(rebuild.__code__.co_filename).read_text()

    rebuild(published, str(source), tmp_path / "rebuilt")
    rows = load_dataset(str(tmp_path / "rebuilt"), "items", split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows["text"]) == items["text"].to_list() and set(items["text"]) != {""}
    assert [image.size for image in rows["image"]] == [(32, 32)] * len(items)
    chats = load_dataset(str(tmp_path / "rebuilt"), "sft", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(chats) == len(sft) and chats[0]["images"][0].size == (32, 32)
    assert set(chats["user_id"]) == set(pl.read_parquet(published / "tasks/*.parquet").filter(split="train")["user_id"])
    with pytest.raises(ValueError, match="exists already"):
        rebuild(published, str(source), tmp_path / "rebuilt")

    other = shutil.copytree(source, tmp_path / "other")
    (other / "items.csv").write_text((other / "items.csv").read_text().replace("Film 7,", "Movie 7,"))
    with pytest.raises(ValueError, match=r"1 of .* published items are not among"):
        rebuild(published, str(other), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists() and not list(tmp_path.glob(".rebuilding-*"))

"""What the cards say of variants, licences and terms; shards; and the way back to what was left out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from hub_run import change_recipe, write_json
from PIL import Image

from mllm_msr.hub_cards.cards import model_card
from mllm_msr.hub_cards.facts import Release, RunFacts
from mllm_msr.hub_cards.publishing import ALL_CONTENTS, built
from mllm_msr.hub_cards.shards import published, shard
from mllm_msr.hub_cards.terms import SOURCE_TERMS, conflicts, warnings
from mllm_msr.processing.examples import training_examples
from mllm_msr.rebuild import rebuild
from mllm_msr.records.recipe import parse_recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CONTEXTS, EXAMPLES, ITEM_SUMMARIES, ITEMS, PREFERENCES
from mllm_msr.stages import prepare


def test_licences_that_promise_too_much_are_said_so():
    assert conflicts("apache-2.0", "apache-2.0", "demo") == []
    assert "state gemma" in conflicts("apache-2.0", "gemma", "demo")[0]
    assert conflicts("gemma", "gemma", "demo") == []
    (found,) = conflicts("mit", None, "movielens")
    assert "GroupLens" in found and "`license: other`" in found
    assert all(terms.link.startswith("https://") and terms.read and terms.log for terms in SOURCE_TERMS.values())


def test_who_publishes_is_warned(finished_run):
    facts = RunFacts.read(finished_run)

    def recipe(**sections):
        return replace(facts, recipe=parse_recipe({**finished_run.recipe.to_dict(), **sections}))

    microlens = recipe(source={"type": "microlens"}, license="other")
    assert warnings(microlens, public=False) == []
    assert "dataset and space stay private" in warnings(microlens, public=True)[0]
    vectors = replace(microlens, model=replace(microlens.model, head_items=30))
    (warning,) = warnings(vectors, public=True)
    assert "dataset, space and model stay private" in warning and "item vectors are made of its texts" in warning
    assert warnings(replace(vectors, recipe=finished_run.recipe), public=True) == []
    assert "states no `license`" in warnings(recipe(license=None), public=False)[0]


@pytest.mark.parametrize(
    ("variant", "relation", "words"),
    [
        ("full", "finetune", "holds whole weights, the"),
        ("merged", "finetune", "is merged"),
        ("adapter", "adapter", "LoRA"),
    ],
)
def test_variants_of_the_model_card(make_run, variant, relation, words):
    training = {"model_name_or_path": "org/base", "model_revision": "abc", "use_peft": variant != "full"}
    source = {"type": "amazon", "folder": "x"}
    run = change_recipe(make_run(), training=training, license="apache-2.0", source=source)
    if variant == "adapter":
        config = json.loads((run.model / "config.json").read_text())
        write_json(run.model / "config.json", {**config, "adapter": "adapter"})
    card = model_card(run)
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", relation)
    assert f"This repository holds {words}" in card.text or words in card.text.split("## How to use")[0]
    assert "**Conflict:** the data are from Amazon Reviews" in card.text
    assert "train 142 s" in card.text and "at revision `abc`" in card.text


def test_shards_are_of_sensible_size_and_described_as_they_are(finished_run, tmp_path):
    items = finished_run.file(ITEMS)
    info = shard(items, tmp_path / "items", "train", shard_bytes=items.stat().st_size // 3 + 1)
    files = sorted((tmp_path / "items").iterdir())
    assert [path.name for path in files] == [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert info is not None and info.num_examples == 30
    assert [pq.read_metadata(path).num_rows for path in files] == [10, 10, 10]
    again = load_dataset(str(tmp_path / "items"), split="train", cache_dir=str(tmp_path / "cache"))
    whole = pl.read_parquet(items)
    assert again["item_id"] == whole["item_id"].to_list() and again[1]["image"].size == (96, 96)
    described = published(ITEMS, tmp_path, {"train": info})
    assert described.rows == {"train": 30}
    assert described.info["features"][-1] == {"name": "image", "dtype": "image"}
    assert described.info["download_size"] == sum(path.stat().st_size for path in files)
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
    source = movielens(tmp_path / "source")
    recipe = {
        "name": "films", "license": "other", "source": {"type": "movielens", "folder": str(source)},
        "data": {"n_negatives": 5, "k_core_users": 1, "k_core_items": 1, "min_history": 3},
    }  # fmt: skip
    run = RunFolder.create(tmp_path / "films", parse_recipe(recipe))
    prepare(run)
    items, none = run.read(ITEMS), pl.lit([], dtype=CONTEXTS.columns["recent"])
    contexts = run.tasks("train").with_columns(preference=pl.lit("films"), recent=none)
    examples = training_examples(contexts, items, "{{ preference }} {{ title }} {{ image }}?", "item")
    for split, rows in (("train", examples), ("validation", examples.clear())):
        run.write(EXAMPLES, rows, split)
    for table in (ITEM_SUMMARIES, PREFERENCES):
        run.write(table, table.frame())

    with built(run, ["dataset"], Release.of(run.recipe, "org", "v1"), ALL_CONTENTS) as folders:
        folder = shutil.copytree(folders["dataset"], tmp_path / "downloaded")
    names = ["README.md", "eval.yaml", "items", "rebuild.py", "recipe.yaml", "sft", "tasks"]
    assert sorted(path.name for path in folder.iterdir()) == names
    out = pl.read_parquet(folder / "items/*.parquet")
    assert set(out["text"]) == {""} and out["image"].null_count() == len(out)
    assert out["title"].null_count() == 0
    assert str(tmp_path) not in (folder / "recipe.yaml").read_text()
    card = (folder / "README.md").read_text()
    assert "| **this data set**: [MovieLens (GroupLens)](https://grouplens.org/datasets/movielens/) |" in card
    assert "leaves this repository private" in card
    assert "license_name: movielens-terms" in card
    script = folder / "rebuild.py"
    assert script.read_text() == Path(rebuild.__code__.co_filename).read_text()

    rebuild(folder, str(source), tmp_path / "rebuilt")
    rows = load_dataset(str(tmp_path / "rebuilt"), "items", split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows["text"]) == items["text"].to_list() and set(items["text"]) != {""}
    assert [image.size for image in rows["image"]] == [(32, 32)] * len(items)
    chats = load_dataset(str(tmp_path / "rebuilt"), "sft", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(chats) == len(examples) and chats[0]["images"][0].size == (32, 32)
    assert set(chats["user_id"]) == set(pl.read_parquet(folder / "tasks/*.parquet").filter(split="train")["user_id"])
    with pytest.raises(ValueError, match="exists already"):
        rebuild(folder, str(source), tmp_path / "rebuilt")

    other = shutil.copytree(source, tmp_path / "other")
    (other / "items.csv").write_text((other / "items.csv").read_text().replace("Film 7,", "Movie 7,"))
    with pytest.raises(ValueError, match=r"1 of .* published items are not among"):
        rebuild(folder, str(other), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists() and not list(tmp_path.glob(".rebuilding-*"))

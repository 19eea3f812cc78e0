"""Which reader a recipe's source has, what it lacks, and what a run's data depends on."""

from pathlib import Path

import pytest

from mllm_msr.data.sources.registry import check_source, effective_source, read_source, source_fingerprint
from mllm_msr.records.recipe import load_recipe
from mllm_msr.records.sections import Source

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*_paper.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_paper_come_in_both_protocols(path: Path) -> None:
    paper, strict = load_recipe(path), load_recipe(path.with_name(path.name.replace("_paper", "_strict")))
    assert paper.source == strict.source and paper.training == strict.training
    assert (paper.data.protocol, strict.data.protocol) == ("paper", "strict")
    assert (paper.data.k_core_users, paper.data.k_core_items) == (7 if "microlens" in path.stem else 6, 5)
    training = paper.training
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 8
    assert (training["lora_r"], training["learning_rate"], training["num_train_epochs"]) == (8, 2e-5, 10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("movielens"), "'movielens' needs a folder: give --data DIR"),
        (Source("microlens"), "'microlens' needs a folder"),
        (Source("amazon", {"folder": "x"}), "'amazon' needs 'category'"),
        (Source("tables"), "'tables' needs 'interactions'"),
        (Source("tables", {"interaction": "x"}), "source: unknown key 'interaction'; did you mean 'interactions'"),
        (Source("demo", {"sed": 5}), "source: unknown key 'sed'; did you mean 'seed'?"),
        (Source("demo", {"drawn": False}), "source: unknown key 'drawn'"),
        (Source("demo", {"seed": "five"}), "source.seed='five': must be a whole number"),
        (Source("dmo"), "source.type='dmo' is unknown; did you mean 'demo'?"),
    ],
)
def test_what_a_source_lacks_is_named(source: Source, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_source(source)
    with pytest.raises(ValueError, match=message):
        read_source(source)


def test_every_source_has_a_reader(tmp_path: Path) -> None:
    assert read_source(Source("demo", {"n_users": 3, "n_items": 30})).items.height == 30
    (tmp_path / "log.csv").write_text("who,item_id,timestamp\nann,1,5\n,2,6\n")
    own = Source("tables", {"interactions": "log.csv", "columns": {"user_id": "who"}, "folder": str(tmp_path)})
    assert read_source(own, "skip").interactions.collect().rows() == [("ann", "1", 5)]
    for name, more in (("movielens", {}), ("microlens", {}), ("amazon", {"category": "Toys"})):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            read_source(Source(name, {"folder": str(tmp_path), **more}))


def test_the_effective_source_has_every_default() -> None:
    assert effective_source(Source("demo", {"n_users": 5})).options == {"seed": 7, "n_users": 5, "n_items": 360}
    assert effective_source(Source("microlens", {"folder": "x"})).options == {"folder": "x", "covers": None}


def test_fingerprint_sees_the_content_of_images_and_of_part_files(tmp_path: Path) -> None:
    movies = tmp_path / "movies"
    (movies / "posters").mkdir(parents=True)
    for name in ("ratings.csv", "posters/1.jpg", "posters/2.jpg", "log.parquet/part-0.parquet", ".hidden"):
        (movies / name).parent.mkdir(exist_ok=True)
        (movies / name).write_text("a")
    before = source_fingerprint(Source("movielens", {"folder": str(movies)}))
    assert [fact[0] for fact in before[1:]] == ["log.parquet/part-0.parquet", "ratings.csv", "2 images"]
    for name in ("posters/2.jpg", "log.parquet/part-0.parquet"):
        (movies / name).write_text("b")
        assert source_fingerprint(Source("movielens", {"folder": str(movies)})) != before
        (movies / name).write_text("a")


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs a file that is there and cannot be read")
def test_one_image_that_cannot_be_read_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,1,1\n")
    (tmp_path / "goods.csv").write_text("item_id,image\n1,/proc/self/mem\n")
    source = Source("tables", {"folder": str(tmp_path), "interactions": "log.csv", "items": "goods.csv"})
    assert source_fingerprint(source)[-1][0] == "1 images"


def test_fingerprint_sees_contents_and_not_places(tmp_path: Path) -> None:
    def source(folder: Path, columns: dict[str, str] | None = None) -> Source:
        tables = {"interactions": "log.csv", "items": "goods.csv", "folder": str(folder)}
        return Source("tables", {**tables, "columns": columns or {}})

    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,1,1\n")
    (tmp_path / "goods.csv").write_text("item_id,image\n1,mug\n")
    (tmp_path / "mug").write_bytes(b"1")
    before = source_fingerprint(source(tmp_path))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("log.csv", "goods.csv", "mug"):
        (tmp_path / name).rename(moved / name)
    assert source_fingerprint(source(moved)) == before
    for name, content in (("log.csv", "user_id,item_id,timestamp\n1,1,2\n"), ("mug", "2")):
        kept = (moved / name).read_text()
        (moved / name).write_text(content)
        assert source_fingerprint(source(moved)) != before, name
        (moved / name).write_text(kept)
    assert source_fingerprint(source(moved)) == before
    assert source_fingerprint(source(moved, {"user_id": "who"})) != before
    with pytest.raises(FileNotFoundError, match=r"log\.csv does not exist"):
        source_fingerprint(source(tmp_path))

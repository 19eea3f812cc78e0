"""`mllm-msr vectors`: by any model, a file or a column of the items table, and changed items only."""

import numpy as np
import polars as pl
import pytest
import tiny_models
from tiny_runs import Shop

from mllm_msr.cli import main
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_VECTORS


def table(shop: Shop) -> pl.DataFrame:
    return RunFolder.open(shop.run).read(ITEM_VECTORS)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def goods(shop: Shop, **changed: str) -> None:
    names = [changed.get(f"i{n}", f"Mug {n}") for n in range(16)]
    pl.DataFrame({"sku": range(16), "name": names, "emb": [f"[{n}, 0.5]" for n in range(16)]}).write_csv(shop.goods)


def test_each_origin_takes_the_place_of_the_one_before(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    goods(shop)
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    main(["vectors", str(shop.run), "--set", "vectors.column=emb"])
    assert table(shop).sort("item_id")["vector"].to_list() == [[n, 0.5] for n in sorted(range(16), key=str)]
    own = shop.folder / "own.npz"
    np.savez(own, item_id=np.arange(16).astype(str), vector=np.ones((16, 3)))
    main(["vectors", str(shop.run), "--vectors", str(own)])
    assert table(shop)["vector"].to_list() == [[1.0, 1.0, 1.0]] * 16
    folder = str(tiny_models.save_language_model(shop.folder / "model"))
    main(["vectors", str(shop.run), "--set", f"vectors.model={folder}"])
    assert set(table(shop)["vector"].list.len()) == {tiny_models.TEXT["hidden_size"]}
    options = RunFolder.open(shop.run).recipe.vectors
    assert (options.file, options.column, options.model) == (None, None, folder)
    capsys.readouterr()
    main(["vectors", str(shop.run), "--set", "vectors.token_budget=64"])
    assert lines(capsys)[0] == "vectors: up to date"
    with pytest.raises(SystemExit, match=r"no column 'none'; it has .*emb"):
        main(["vectors", str(shop.run), "--set", "vectors.column=none"])
    with pytest.raises(SystemExit, match="file and column are given; name one of file, column, model"):
        main(["vectors", str(shop.run), "--set", "vectors.file=own.npz", "--set", "vectors.column=emb"])


def test_a_changed_title_is_all_that_is_computed_again(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_models.save_language_model(shop.folder / "model"))
    goods(shop)
    main(["prepare", *shop.arguments, "--output", str(shop.run), "--set", f"vectors.model={folder}"])
    main(["vectors", str(shop.run)])
    assert "item vectors: 16 computed, 0 as they were" in lines(capsys)
    before = table(shop)
    goods(shop, i7="Red teapot")
    main(["prepare", *shop.arguments, "--output", str(shop.run), "--set", f"vectors.model={folder}"])
    main(["vectors", str(shop.run)])
    assert "item vectors: 1 computed, 15 as they were" in lines(capsys)
    after = table(shop)
    same = before["key"] == after["key"]
    assert after.filter(~same)["item_id"].to_list() == ["7"]
    assert before.filter(same).equals(after.filter(same))


def test_a_model_that_makes_no_vectors_is_said_in_one_line(shop: Shop) -> None:
    goods(shop)
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    with pytest.raises(SystemExit, match=r"vectors\.model: name the model"):
        main(["vectors", str(shop.run)])
    with pytest.raises(SystemExit, match=r"makes no item vectors: .*; name another by vectors.model"):
        main(["vectors", str(shop.run), "--set", f"vectors.model={shop.folder}"])


def test_an_export_finds_the_nearest_items(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    faiss = pytest.importorskip("faiss")
    goods(shop)
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    with pytest.raises(SystemExit, match=r"stage 'vectors' .* has not been done yet: run `mllm-msr vectors"):
        main(["index", str(shop.run), "--export", str(shop.folder / "export")])
    main(["vectors", str(shop.run), "--set", "vectors.column=emb"])
    (shop.folder / "export").mkdir()
    (shop.folder / "export/mine.txt").write_text("stays", encoding="utf-8")
    main(["index", str(shop.run), "--export", str(shop.folder / "export")])
    assert lines(capsys)[-1] == f"16 item vectors in {shop.folder / 'export'}"
    index = faiss.read_index(str(shop.folder / "export/items.faiss"))
    ids = (shop.folder / "export/items.txt").read_text(encoding="utf-8").split()
    assert sorted(ids) == sorted(map(str, range(16))) and (shop.folder / "export/mine.txt").is_file()
    similarity, places = index.search(np.array([[1.0, 0.0]], np.float32), 16)
    assert [ids[place] for place in places[0]] == [str(n) for n in reversed(range(16))]
    expected = [n / np.hypot(n, 0.5) for n in reversed(range(16))]
    assert similarity[0] == pytest.approx(np.array(expected), abs=1e-6)

from pathlib import Path

import pytest

from mllm_msr.records.recipe import load_recipe, parse_recipe
from mllm_msr.records.sections import PrepareOptions

ROOT = Path(__file__).parents[2]
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "src/mllm_msr/demo/recipe.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    PrepareOptions(**recipe.data)
    assert recipe.training_flags()["item_noun"] == recipe.item_noun


def test_an_unknown_key_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"here: unknown keys \['protokol'\]"):
        parse_recipe({"name": "x", "source": {}, "protokol": "strict"}, "here")


def test_a_file_that_is_no_recipe_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        load_recipe(path)
    path.write_text("- a", encoding="utf-8")
    with pytest.raises(ValueError, match="mapping"):
        load_recipe(path)

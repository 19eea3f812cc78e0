"""Recipes: checked as a whole, with the nearest known name for every mistake, and written back with all defaults."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import TINY, tiny_recipe

from mllm_msr.records.recipe import load_content, load_recipe, parse_recipe, with_settings
from mllm_msr.records.sections import PrepareOptions, Source

ROOT = Path(__file__).parents[2]
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "src/mllm_msr/demo/recipe.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe.data, PrepareOptions)
    assert recipe.training_flags()["item_noun"] == recipe.item_noun


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.kcore": 3}, "data: unknown key 'kcore'; did you mean 'k_core_users'?"),
        ({"data.protocol": "stricter"}, "data.protocol='stricter': must be one of 'strict', 'paper', 'global-cutoff'"),
        ({"data.n_negatives": "five"}, "data.n_negatives='five': must be a whole number"),
        ({"data.n_negatives": 0}, "data.n_negatives=0: must be at least 1"),
        ({"summaries.engin": "titles"}, "summaries: unknown key 'engin'; did you mean 'engine'?"),
        ({"summaries.engine": "transformers"}, "summaries.model: name the model of the transformers engine"),
        ({"summaries.max_new_tokens": {"fusion": 0}}, "summaries.max_new_tokens: fusion=0 must be at least 1"),
        ({"summaries.max_new_tokens": 96}, "summaries.max_new_tokens=96: must be a mapping of names to whole numbers"),
        ({"summaries.temperature": float("nan")}, "summaries.temperature=nan: must be at least 0"),
        ({"summaries.top_p": 1.5}, "summaries.top_p=1.5: must be above 0 and at most 1"),
        ({"summaries.timeout": 0}, "summaries.timeout=0.0: must be at least 0.001"),
        ({"head.heads": 0}, "^head.heads=0: must be at least 1"),
        ({"head.learning_rate": float("inf")}, "head.learning_rate=inf: must be at least 0, and finite"),
        (
            {"head.members": ["sasrec"]},
            r"head.members=\['sasrec'\]: must be a list of 'sequence_head', '",
        ),
        ({"evaluation.seed": 2**32}, "evaluation.seed=4294967296: must be at most 4294967295"),
        ({"data.seed": -1}, "data.seed=-1: must be at least 0"),
        ({"data.n_negatives": True}, "data.n_negatives=True: must be a whole number"),
        ({"data.limit_users": "5"}, "data.limit_users='5': must be a whole number or null"),
        ({"evaluation.rows": "popularity"}, "evaluation.rows='popularity': must be a list of texts"),
        ({"evaluation.full_catalogue": "some"}, "full_catalogue='some': must be a whole number or 'all' or null"),
        ({"evaluation.full_catalogue": 0}, "evaluation.full_catalogue=0: must be at least 1"),
        ({"prompts.fusion": 3}, "prompts.fusion=3: must be a text"),
        ({"evaluation.splitt": "test"}, "evaluation: unknown key 'splitt'; did you mean 'split'?"),
        ({"surce.type": "demo"}, "'surce.type' is not a section and a name.*did you mean 'source'?"),
        ({"block_size": 3}, "'block_size' is not a section and a name, such as summaries.block_size"),
    ],
)
def test_a_mistake_names_section_key_and_what_is_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_recipe(settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a recipe is a mapping with at least `name` and `source`"),
        ({"name": "x"}, "a recipe is a mapping with at least `name` and `source`"),
        ({**TINY, "protokol": "strict"}, "recipe: unknown key 'protokol'"),
        ({**TINY, "name": 7}, "name=7: must be a text"),
        ({**TINY, "license": ["mit"]}, "must be a text"),
        ({**TINY, "name": " "}, "name: is empty"),
        ({**TINY, "item_noun": " "}, "item_noun: is empty; name what an item is called in prompts, such as film"),
        ({**TINY, "source": "demo"}, "section 'source' is a mapping with a `type`, not 'demo'"),
        ({**TINY, "data": ["strict"]}, r"section 'data' is a mapping of names to values, not \['strict'\]"),
        ({**TINY, "training": "fast"}, "section 'training' is a mapping of names to values, not 'fast'"),
        ({**TINY, "format": 1}, "a run of format 1, and this version of mllm-msr reads format 2"),
    ],
)
def test_a_recipe_of_another_shape_is_refused(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(content)


def test_a_setting_of_a_section_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"section 'head' is a mapping of names to values, not \['a'\]"):
        with_settings({**TINY, "head": ["a"]}, {"head.hidden": 8})


def test_keys_may_be_merged_from_another_mapping(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("name: x\nsource: &base {type: demo, seed: 1}\ndata: {seed: 5, <<: {seed: 4, n_negatives: 7}}\n")
    assert load_content(path)["data"] == {"seed": 5, "n_negatives": 7}


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for text, message in (
        ("a: [", r"broken\.yaml is not valid YAML"),
        ("a: " + "[" * 5000, r"broken\.yaml is not valid YAML: .*recursion"),
        ("- a", r"broken\.yaml: is no mapping of names to values"),
        ("name: x\ndata: {seed: 1}\ndata: {seed: 2}", r"broken\.yaml is not valid YAML: the key 'data' stands twice"),
        ("name: x\nsource: {type: demo, seed: 1, seed: 2}", "the key 'seed' stands twice .*line 2"),
        ("name: x\nsource: demo", r"broken\.yaml: section 'source' is a mapping with a `type`, not 'demo'"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_recipe(path)


def test_flags_of_training_are_checked_by_whoever_knows_them() -> None:
    def check(flags: Any) -> dict[str, Any]:
        if "lerning_rate" in flags:
            raise ValueError("training: unknown key 'lerning_rate'")
        return {"learning_rate": 1e-4, **flags}

    assert parse_recipe(TINY, check).training["learning_rate"] == 1e-4
    with pytest.raises(ValueError, match="unknown key 'lerning_rate'"):
        parse_recipe(with_settings(TINY, {"training.lerning_rate": 1}), check)


def test_the_effective_recipe_has_every_default_and_is_read_back_as_it_was() -> None:
    recipe = tiny_recipe({"source.n_users": 5})
    content = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
    assert content["source"] == {"type": "demo", "seed": 1, "n_users": 5, "n_items": 40}
    assert content["data"] == asdict(recipe.data) and content["data"]["protocol"] == "strict"
    assert content["evaluation"]["token_budget"] == 8192
    assert parse_recipe(content) == recipe


def test_settings_change_what_they_name_and_nothing_else() -> None:
    changed = tiny_recipe({"source.n_users": 5, "item_noun": "film", "license": "mit"})
    assert (changed.source, changed.item_noun, changed.license) == (
        Source("demo", {"seed": 1, "n_users": 5, "n_items": 40}),
        "film",
        "mit",
    )
    assert changed.data == tiny_recipe().data and TINY["source"]["n_users"] == 12


def test_numbers_of_the_other_kind_are_taken_where_they_are_meant() -> None:
    assert tiny_recipe({"summaries.temperature": 1}).summaries.temperature == 1.0
    with pytest.raises(ValueError, match=r"summaries\.temperature=True: must be a number"):
        tiny_recipe({"summaries.temperature": True})

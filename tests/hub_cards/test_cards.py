"""The cards as a reader and the Hub see them: facts of the run, nothing blank, nothing from this machine."""

import json
import re

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from jinja2.exceptions import UndefinedError

from mllm_msr.hub_cards.cards import dataset_card, license_fields, model_card, size_category

ROWS = {"items": {"train": 30}, "tasks": {"train": 8, "test": 8}}


def edit_recipe(run, **changes) -> None:
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe |= changes
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))


def assert_nothing_blank(text: str) -> None:
    assert not re.search(
        r"None|nan\b|\[More|TODO|{{|}}|Undefined|/home/someone", text.replace("{{ title }} {{ image }}", "")
    )
    assert "\n\n\n" not in text
    for heading in re.finditer(r"^#+ .*\n+(.*)", text.split("\n---\n", 1)[1], re.MULTILINE):
        assert heading.group(1) and not heading.group(1).startswith("#"), f"empty section: {heading.group(0)}"


def test_model_card_states_the_results_of_the_run(finished_run):
    card = model_card(finished_run, "org/mllm-msr-demo", "org/mllm-msr-demo-data", "v0.1.0")
    metrics = json.loads((finished_run / "metrics.json").read_text())
    again = ModelCard(str(card)).data  # as the Hub would read it
    assert (again.library_name, again.pipeline_tag, again.license) == (
        "transformers",
        "image-text-to-text",
        "apache-2.0",
    )
    assert again.datasets == ["org/mllm-msr-demo-data"]
    assert again.base_model is None  # the demo's backbone is in the package, not on the Hub
    stated = {result.metric_type: result.metric_value for result in again.eval_results}
    assert stated == {key: round(result["value"], 4) for key, result in metrics["rows"]["mllm_msr"].items()}
    assert all(result.dataset_args["candidate_hash"] == metrics["candidate_hash"] for result in again.eval_results)
    assert '"revision": "v0.1.0"' in card.text
    assert "| popularity |" in card.text and "| lora_r | 8 |" in card.text
    assert "{{ title }} {{ image }} Choose?" in card.text
    assert_nothing_blank(str(card))


def test_snippets_of_the_cards_are_python(finished_run):
    for card in (model_card(finished_run), dataset_card(finished_run, ROWS)):
        snippets = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        assert snippets
        for snippet in snippets:
            compile(snippet, "card", "exec")


def test_a_backbone_of_the_hub_is_named_with_its_revision(make_run):
    run = make_run()
    training = {"model_name_or_path": "llava-hf/llava-v1.6-mistral-7b-hf", "model_revision": "abc"}
    edit_recipe(run, training=training, license="Llama 3 something")
    card = model_card(run)
    assert card.data.base_model == "llava-hf/llava-v1.6-mistral-7b-hf"
    assert card.data.base_model_relation == "finetune"
    assert (card.data.license, card.data.license_name) == ("other", "llama-3-something")
    assert "at revision `abc`" in card.text


def test_a_bare_run_makes_a_card_without_gaps(make_run):
    run = make_run()
    for name in ("metrics.json", "provenance.json", "data/report.json", "model/log_history.json", "config.yaml"):
        (run / name).unlink()
    (run / "model/processor_config.json").unlink()
    for card in (model_card(run), dataset_card(run, ROWS)):
        assert_nothing_blank(str(card))
        assert "## Results" not in card.text
        assert card.data.license is None


def test_dataset_card_configs_are_those_published(finished_run):
    card = dataset_card(finished_run, ROWS, "org/data", left_out="Pictures are left out.")
    again = DatasetCard(str(card)).data.to_dict()
    assert [config["config_name"] for config in again["configs"]] == ["items", "tasks"]
    assert [config.get("default") for config in again["configs"]] == [True, None]
    assert again["configs"][1]["data_files"][1] == {"split": "test", "path": "tasks/test-*.parquet"}
    assert "| `tasks` | train 8, test 8 |" in card.text
    assert "> Pictures are left out." in card.text
    assert "| item_summaries | tiny-llava | abc123 | `fedcba987654` | ok | 30 |" in card.text
    assert_nothing_blank(str(card))


def test_fields_and_sizes():
    assert license_fields("CC-BY-4.0") == {"license": "cc-by-4.0"}
    assert size_category(10**13) == "n>1T"
    assert size_category(0) == "n<1K"


def test_templates_refuse_unknown_facts():
    from mllm_msr.hub_cards.cards import render

    with pytest.raises(UndefinedError):
        render("dataset_card.md.j2", card_data="", title="x")

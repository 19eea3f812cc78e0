"""The cards as a reader and the Hub see them: facts of the run, nothing blank, nothing from this machine."""

import json
import re

import pytest
from hub_run import SECRETS, change_recipe, write_json
from huggingface_hub import DatasetCard, ModelCard, SpaceCard
from jinja2.exceptions import UndefinedError

from mllm_msr.hub_cards.cards import dataset_card, license_fields, model_card, render, size_category
from mllm_msr.hub_cards.facts import Release
from mllm_msr.hub_cards.shards import PublishedTable
from mllm_msr.hub_cards.spaces import fill_space
from mllm_msr.records.schema import ITEMS, TASKS

RELEASE = Release(
    "org/mllm-msr-demo", "org/mllm-msr-demo-data", "org/ranking_metrics", "org/mllm-msr-demo-app", "v0.1.0"
)
PUBLISHED = (
    PublishedTable(ITEMS, {"train": 30}, {"config_name": "items"}),
    PublishedTable(TASKS, {"train": 8, "test": 8}, {"config_name": "tasks"}),
)
HOSTILE = 'a: "b"\n---\nlicense: mit # [x](y) <script>|`'


def assert_nothing_blank(text: str) -> None:
    assert not re.search(r"None|nan\b|\[More|TODO|{{|}}|Undefined", text.replace("{{ title }} {{ image }}", ""))
    assert not [secret for secret in SECRETS if secret in text]
    assert "\n\n\n" not in text
    for heading in re.finditer(r"^#+ .*\n+(.*)", text.split("\n---\n", 1)[1], re.MULTILINE):
        assert heading.group(1) and not heading.group(1).startswith("#"), f"empty section: {heading.group(0)}"


def test_model_card_states_the_results_of_the_run(finished_run):
    card = model_card(finished_run, RELEASE)
    results = finished_run.results()
    again = ModelCard(str(card)).data  # as the Hub would read it
    assert (again.library_name, again.pipeline_tag, again.license) == (
        "transformers",
        "text-ranking",
        "apache-2.0",
    )
    assert again.datasets == ["org/mllm-msr-demo-data"]
    assert again.base_model is None  # the demo's backbone is in the package, not on the Hub
    stated = {result.metric_type: result.metric_value for result in again.eval_results}
    assert stated == {name: round(one.value, 4) for name, one in results.variants["mllm_msr"].items()}
    assert all(result.dataset_args["candidate_hash"] == results.candidate_hash for result in again.eval_results)
    assert 'revision="v0.1.0"' in card.text
    assert "| popularity |" in card.text and "| lora_r | 8 |" in card.text
    assert "{{ title }} {{ image }} Choose?" in card.text
    assert_nothing_blank(str(card))


PROMPTS = {
    "recommendation": "{{ title }} {{ image }} Choose?",
    "late_user": "{{ preference }}!",
    "late_item": "{{ title }} {{ text }}.",
    "late_answer": "",
    "item_summary": "Say what it is: {{ title }}",
    "fusion": "Combine them",
    "preference": "Condense",
}


@pytest.mark.parametrize(
    ("interaction", "engine", "there", "gone", "reads"),
    [
        ("joint", "openai", ("Choose?", "Say what", "Condense"), ("{{ preference }}!", "Combine"), "title and image"),
        ("joint", "extractive", ("Choose?",), ("{{ preference }}!", "Say what", "Condense"), "title and image"),
        ("late", "openai", ("{{ preference }}!", "{{ text }}."), ("Choose?", "Combine"), "title and text"),
    ],
)
def test_a_model_card_says_nothing_that_is_not_so_of_this_model(make_run, interaction, engine, there, gone, reads):
    run = make_run()
    write_json(run.model / "processor_config.json", {"prompts": PROMPTS})
    config = json.loads((run.model / "config.json").read_text())
    write_json(run.model / "config.json", config | {"interaction": interaction})
    summaries = run.recipe.to_dict()["summaries"] | {"engine": engine}
    text = model_card(change_recipe(run, summaries=summaries)).text
    assert not [words for words in there if words not in text] and not [words for words in gone if words in text]
    assert f"the item's {reads} (MLLM-MSR" in text and "knows no real item" in text
    assert "and others" not in text and "Xiong, Hui" in text


def test_what_was_measured_stands_beside_what_was_not(make_run):
    run = make_run()
    rows = re.findall(r"^\| (.*) \| (.*) \|$", model_card(run).text.split("### What was measured")[1], re.MULTILINE)
    measured, missing = ({row[side] for row in rows} for side in (0, 1))
    assert "what the images add" in measured and "a ranking among all items" in missing
    assert any("no user has seen it" in words for words in missing) and not (measured & missing) - {""}


def test_snippets_of_the_cards_are_python(finished_run):
    for card in (model_card(finished_run), dataset_card(finished_run, PUBLISHED)):
        snippets = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        assert snippets
        for snippet in snippets:
            compile(snippet, "card", "exec")


def test_a_backbone_of_the_hub_is_named_with_its_revision(make_run):
    training = {"model_name_or_path": "llava-hf/llava-v1.6-mistral-7b-hf", "model_revision": "abc"}
    card = model_card(change_recipe(make_run(), training=training, license="Llama 3 something"))
    assert card.data.base_model == "llava-hf/llava-v1.6-mistral-7b-hf"
    assert card.data.base_model_relation == "finetune"
    assert (card.data.license, card.data.license_name) == ("other", "llama-3-something")
    assert "at revision `abc`" in card.text


def test_a_bare_run_makes_a_card_without_gaps(make_run):
    run = change_recipe(make_run(), license=None, training={})
    for path in (run.metrics, run.path / "provenance.json", run.data_report, run.training_log):
        path.unlink()
    (run.model / "processor_config.json").unlink()
    for card in (model_card(run), dataset_card(run, PUBLISHED)):
        assert_nothing_blank(str(card))
        assert "## Results" not in card.text
        assert card.data.license is None


def test_dataset_card_configs_are_those_published(finished_run):
    card = dataset_card(finished_run, PUBLISHED, RELEASE, left_out="Images are left out.")
    again = DatasetCard(str(card)).data.to_dict()
    assert [config["config_name"] for config in again["configs"]] == ["items", "tasks"]
    assert [config.get("default") for config in again["configs"]] == [True, None]
    assert again["configs"][1]["data_files"][1] == {"split": "test", "path": "tasks/test-*.parquet"}
    assert "| `tasks` | train 8, test 8 |" in card.text
    assert "> Images are left out." in card.text
    assert "| item_summaries | writer | abc123 | `fedcba987654` | ok | 30 |" in card.text
    assert_nothing_blank(str(card))


def test_names_and_licences_of_a_recipe_cannot_break_out_of_their_place(make_run, tmp_path):
    run = change_recipe(make_run(), name=HOSTILE, license=HOSTILE, item_noun="[thing]")
    prompts = {"recommendation": "{{ title }}\n```\n# A heading\n````", "item_summary": "```"}
    write_json(run.model / "processor_config.json", {"prompts": prompts})
    assert "`````jinja\n{{ title }}\n```\n# A heading\n````\n`````" in model_card(run).text
    for card in (model_card(run), dataset_card(run, PUBLISHED)):
        again = type(card)(str(card))
        assert again.data.to_dict() == card.data.to_dict()
        assert again.data.license == "other" and again.data.license_name == "a-b-license-mit-x-y-script"
        assert "<script>" not in again.text and "\nlicense: mit" not in again.text
        assert all(line.startswith("|") and line.endswith("|") for line in again.text.splitlines() if "|--" in line)
    assert dataset_card(run, PUBLISHED).data.pretty_name.startswith(HOSTILE)
    fill_space(run, tmp_path, RELEASE)
    space = SpaceCard.load(tmp_path / "README.md")
    assert space.data.title == f"MLLM-MSR: {' '.join(HOSTILE.split())}" and space.data.license == "apache-2.0"
    assert "<script>" not in space.text and space.data.models == [RELEASE.model]


def test_fields_and_sizes():
    assert license_fields("CC-BY-4.0") == {"license": "cc-by-4.0"}
    assert size_category(10**13) == "n>1T"
    assert size_category(0) == "n<1K"


def test_templates_refuse_unknown_facts():
    with pytest.raises(UndefinedError):
        render("dataset_card.md.j2", card_data="", title="x")


@pytest.mark.parametrize("tag", ["", "v 1", "a..b", "main", "x.lock", "-v1", "v1.", "a" * 101, "0" * 40, "v1\n"])
def test_a_tag_that_no_repository_takes_is_refused(tag):
    with pytest.raises(ValueError, match="a tag is made of letters"):
        Release("org/a", "org/b", "org/c", "org/d", tag)


def test_repositories_are_named_after_the_run(finished_run):
    assert Release.of(finished_run.recipe, "org", "v0.1.0") == RELEASE
    for namespace in ("", "org/team", "-org", "o rg"):
        with pytest.raises(ValueError, match="name a user or an organisation"):
            Release.of(finished_run.recipe, namespace)

"""What pages of the Hub read of the results, as the client's own types read it."""

from dataclasses import replace

import yaml
from huggingface_hub._eval_results import parse_eval_result_entries

from mllm_msr.evaluation.metrics import METRICS
from mllm_msr.hub_cards.eval_results import task_id
from mllm_msr.hub_cards.facts import Release
from mllm_msr.hub_cards.publishing import ALL_CONTENTS, build_hub, built
from mllm_msr.records.run import RunFolder

RELEASE = Release("org/m", "org/m-data", "org/ranking_metrics", "org/m-app", "v1")


def test_a_release_has_a_file_for_each_variant_and_its_data_set_the_tasks(make_run) -> None:
    run: RunFolder = make_run()
    results = run.results()
    fused = {**results.variants, "fused": results.variants["text_only"]}
    replace(results, variants=fused).write(run.metrics)
    with built(run, ("dataset", "model"), RELEASE, ALL_CONTENTS) as folders:
        content = yaml.safe_load((folders["dataset"] / "eval.yaml").read_text(encoding="utf-8"))
        files = {path.stem: path for path in (folders["model"] / ".eval_results").glob("*.yaml")}
        entries = {
            name: parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
            for name, path in files.items()
        }
    assert set(entries) == {"mllm_msr", "fused"}
    tasks = {task["id"] for task in content["tasks"]}
    assert {(task["config"], task["split"]) for task in content["tasks"]} == {("tasks", "test")}
    for name, found in entries.items():
        values = {task_id(metric): round(estimate.value, 4) for metric, estimate in fused[name].items()}
        assert {entry.task_id: entry.value for entry in found} == values and set(values) <= tasks
        assert {entry.dataset_id for entry in found} == {"org/m-data"}
        assert all((entry.notes is None) == (name == "mllm_msr") for entry in found)


def test_without_a_release_there_is_no_data_set_to_refer_to(make_run) -> None:
    folders = build_hub(make_run())
    assert not (folders["model"] / ".eval_results").exists() and (folders["dataset"] / "eval.yaml").is_file()


def test_every_metric_has_a_task_of_its_own() -> None:
    assert len({task_id(name) for name in METRICS}) == len(METRICS)

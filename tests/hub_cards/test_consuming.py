"""What was published, used by others: fresh processes, empty caches, repository ids, no package where none is due."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from gradio_client import Client
from hub_run import change_recipe, fabricate, finish
from hub_server import Hub
from hub_storage import READ, WRITE
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from PIL import Image
from ports import free_port
from tiny_models import WITHOUT_PACKAGE
from transformers import AutoModelForImageTextToText

from mllm_msr import Candidate, MllmMsrForRecommendation, MllmMsrProcessor, User
from mllm_msr.evaluation.metrics import ranking_metrics
from mllm_msr.hub_cards.release import PublishOptions, publish
from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import SCORES
from mllm_msr.training import sft

BASE = Path(str(files("mllm_msr"))) / "demo/base"
PAIRS = (
    [User("likes ships"), User()],
    [Candidate(title="One", image=Image.new("RGB", (40, 30), "red")), Candidate(title="Two")],
)
SCORE = """
from types import SimpleNamespace as Item
from PIL import Image
def score(model, processor):
    users = [Item(preference="likes ships", recent=[]), Item(preference="", recent=[])]
    image = Image.new("RGB", (40, 30), "red")
    candidates = [Item(title="One", text="", image=image), Item(title="Two", text="", image=None)]
    return model.score(**processor(users, candidates)).logits.tolist()
"""
LOAD = """
from transformers import AutoModel, AutoProcessor
pinned = {"trust_remote_code": True, "revision": REVISION}
model = AutoModel.from_pretrained("org/mllm-msr-demo", **pinned)
print("SCORES", score(model, AutoProcessor.from_pretrained("org/mllm-msr-demo", **pinned)))
"""
EVERY_CONFIG = """
from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset
repo, pinned = "org/mllm-msr-demo-data", {"revision": "v1"}
for streaming in (False, True):
    for name in get_dataset_config_names(repo, **pinned):
        for split in get_dataset_split_names(repo, name, **pinned):
            rows = list(load_dataset(repo, name, split=split, streaming=streaming, **pinned))
            print("ROWS", streaming, name, split, len(rows))
"""
APP = """
import runpy, sys
from huggingface_hub import snapshot_download
folder = snapshot_download("org/mllm-msr-demo-app", repo_type="space", revision="v1")
sys.path.insert(0, folder)  # as `python app.py` has it
runpy.run_path(folder + "/app.py", run_name="__main__")
"""
METRIC = """
import evaluate, json
scores = json.load(open("scores.json"))
metric = evaluate.load("org/ranking_metrics")
given = {"predictions": scores["logit"], "references": scores["label"], "user_ids": scores["user_id"]}
print("FOUND", json.dumps(metric.compute(**given)))
"""


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@dataclass(frozen=True)
class Published:
    """A run whose model works, and that model and its processor."""

    run: RunFolder
    model: MllmMsrForRecommendation
    processor: MllmMsrProcessor


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory) -> Published:
    """On the Hub; private, so that every reader needs a token."""
    run = fabricate(tmp_path_factory.mktemp("published") / "run")
    shutil.rmtree(run.model)
    model, processor = recommender(BASE)
    for part in (model, processor):
        part.save_pretrained(run.model)
    send(hub, finish(run), "v1")
    return Published(run, model, processor)


def recommender(base: Path) -> tuple[MllmMsrForRecommendation, MllmMsrProcessor]:
    processor = MllmMsrProcessor.from_backbone(str(base))
    return MllmMsrForRecommendation.from_backbone(str(base), processor=processor, dtype=torch.float32), processor


def send(hub: Hub, run: RunFolder, tag: str, **options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        publish(run, PublishOptions("org", tag=tag, **options), HfApi(hub.url, token=WRITE))


def knowing(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that knows the Hub and has nothing in its caches."""
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": READ, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **own, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("HF_HUB_OFFLINE", None)
    return environment


def fresh(hub: Hub, home: Path, *command: str) -> str:
    """The output of such a process, with the images that the cards' examples open."""
    for name, colour in (("first.jpg", "red"), ("second.jpg", "blue")):
        Image.new("RGB", (40, 30), colour).save(home / name)
    environment = knowing(hub, home)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-4000:]
    assert READ not in done.stdout + done.stderr and hub.leaks == []
    return done.stdout


def snippets(folder: Path) -> list[str]:
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code
    return code


def numbers(output: str) -> list[float]:
    return json.loads(re.findall(r"^SCORES (.*)$", output, re.MULTILINE)[-1])


def test_model_processor_and_pipeline_by_their_name_without_the_package(hub, published, tmp_path):
    load = LOAD.replace("REVISION", "'v1'")
    output = fresh(
        hub, tmp_path, "-c", "\n".join([WITHOUT_PACKAGE, SCORE, *snippets(published.run.hub / "model"), load])
    )
    expected = published.model.score(**published.processor(*PAIRS)).logits.tolist()
    assert numbers(output) == pytest.approx(expected, abs=1e-5)
    assert output.count("'score':") == 4  # the card's own examples


def test_every_config_of_the_data_set_and_the_metric(hub, published, tmp_path):
    run = published.run
    scores = run.read(SCORES).filter(variant="mllm_msr")
    columns = {name: scores[name].to_list() for name in ("user_id", "label", "logit")}
    (tmp_path / "scores.json").write_text(json.dumps(columns))
    cards = [*snippets(run.hub / "dataset"), *snippets(run.hub / "ranking_metrics")]
    output = fresh(hub, tmp_path, "-c", "\n".join([WITHOUT_PACKAGE, *cards, EVERY_CONFIG, METRIC]))
    rows = {tuple(line.split()[1:4]): int(line.split()[4]) for line in output.splitlines() if line.startswith("ROWS")}
    configs = {
        "items": ["train"],
        "item_summaries": ["train"],
        "preferences": ["train"],
        "sft": ["train", "validation"],
    }
    configs["tasks"] = ["train", "validation", "test"]
    wanted = {(config, split) for config, splits in configs.items() for split in splits}
    assert rows.keys() == {(streaming, *split) for split in wanted for streaming in ("False", "True")}
    assert all(rows["True", *split] == rows["False", *split] > 0 for split in wanted)
    figures = json.loads(re.findall(r"^FOUND (.*)$", output, re.MULTILINE)[0])
    expected = ranking_metrics(columns["user_id"], columns["label"], columns["logit"])
    for name, result in expected.items():
        assert figures[name] == pytest.approx(result["value"], abs=1e-12)
        assert figures[f"{name}_ci95"] == pytest.approx(result["ci95"], abs=1e-12)


def test_an_adapter_on_a_pinned_base_that_has_moved_on(hub, tmp_path):
    """The adapter names the commit of its base; the base's main then gets other weights."""
    run = fabricate(tmp_path / "run")
    shutil.rmtree(run.model)
    api = HfApi(hub.url, token=WRITE)
    api.create_repo("org/base", private=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        pinned = api.upload_folder(repo_id="org/base", folder_path=BASE).oid
        model, processor = recommender(BASE)
        model.config.backbone_name_or_path, model.config.backbone_revision = "org/base", pinned
        config = LoraConfig(r=2, target_modules=language_model_lora_targets(model), init_lora_weights=False)
        get_peft_model(model, config).eval()
        for part in (model, processor):
            part.save_pretrained(run.model)
        run = change_recipe(run, training={"model_name_or_path": "org/base", "model_revision": pinned})
        send(hub, run, "adapter-1", parts=("model",))
        other = AutoModelForImageTextToText.from_pretrained(BASE)
        with torch.no_grad():
            for weights in other.parameters():
                weights.neg_()
        other.save_pretrained(tmp_path / "other")
        api.upload_folder(repo_id="org/base", folder_path=tmp_path / "other", commit_message="other weights")
    assert hub.history("model", "org/base")[0] == "other weights"
    assert [path for path in hub.files("model", "org/mllm-msr-demo", "adapter-1") if path.endswith(".safetensors")] == [
        "adapter/adapter_model.safetensors"
    ]
    load = LOAD.replace("REVISION", "'adapter-1'")
    output = fresh(hub, tmp_path, "-c", "\n".join([WITHOUT_PACKAGE, SCORE, load]))
    expected = model.score(**processor(*PAIRS)).logits.tolist()
    assert numbers(output) == pytest.approx(expected, abs=1e-5)


def test_training_from_the_published_data_set(hub, published, tmp_path):
    flags = {
        "dataset_name": "org/mllm-msr-demo-data@v1",
        "model_name_or_path": "demo",
        "output_dir": str(tmp_path / "out"),
        "max_steps": "1",
        "per_device_train_batch_size": "2",
        "report_to": "none",
        "bf16": "false",
        "dtype": "float32",
        "save_strategy": "no",
        "use_cpu": "true",
    }
    options = [part for name, value in flags.items() for part in (f"--{name}", value)]
    start = len(hub.log)
    fresh(hub, tmp_path, "-m", "accelerate.commands.launch", "--cpu", sft.__file__, *options)
    assert (tmp_path / "out/config.json").is_file()
    pinned = hub.repos["dataset", "org/mllm-msr-demo-data"]["refs"]["refs/tags/v1"]
    read = [path for route, path, status in hub.log[start:] if route == "file" and status < 300]
    assert any("sft/train" in path for path in read) and not any("/resolve/main/" in path for path in read)
    assert all(f"/resolve/{pinned}/" in path for path in read if path.endswith(".parquet"))


def test_the_demo_space_shows_model_and_data_by_their_ids(hub, published, tmp_path):
    """Its app, fetched by name, in a process that has neither the package nor anything in its caches."""
    port = str(free_port())
    environment = {**knowing(hub, tmp_path), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": port}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
    start, log_file = len(hub.log), tmp_path / "log.txt"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "\n".join([WITHOUT_PACKAGE, APP])],
            env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "http://" in line), None)
        assert line, log_file.read_text()[-3000:]
        page = Client(line.split()[-1], verbose=False)
        items = page.predict("", api_name="/find")
        assert len(items) == 30 and all(item["title"] for item in items)
        reply = page.predict([item["item_id"] for item in items[:3]], 20, True, True, True, api_name="/recommend")
        scores = [each["score"] for each in reply["results"]]
        assert reply["preference"] and len(scores) == 20 and len(set(scores)) > 1
        assert scores == sorted(scores, reverse=True) and "all 27 things" in reply["said"][0]
    finally:
        process.terminate()
        process.wait()
    read = [path for route, path, status in hub.log[start:] if route == "file" and status < 300]
    tags = {kind: hub.repos[kind, name]["refs"]["refs/tags/v1"] for kind, name in (
        ("model", "org/mllm-msr-demo"), ("dataset", "org/mllm-msr-demo-data"))}  # fmt: skip
    for kind, file in (("model", "model.safetensors"), ("dataset", "items/train-00000-of-00001.parquet")):
        assert any(path.endswith(f"/resolve/{tags[kind]}/{file}") for path in read)
    assert READ not in log_file.read_text() and hub.leaks == []

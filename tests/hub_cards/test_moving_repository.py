"""A repository that changes, goes or falls silent while it is read: of one commit, or refused in words."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import huggingface_hub
import polars as pl
import pytest
import torch
from hub_server import Hub
from hub_storage import OTHER, READ, WRITE, Refused
from huggingface_hub import HfApi
from tiny_rankers import N_ITEMS, make

from mllm_msr import MllmMsrForRecommendation, MllmMsrProcessor
from mllm_msr.data.hub_tables import load_table, pinned_source
from mllm_msr.data.table_files import TableFile
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.processing.engine_transformers import TransformersEngine

NAME, DATA = "org/mllm-msr-demo", "org/mllm-msr-demo-data"
BASE = Path(str(files("mllm_msr"))) / "demo/base"


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> list[Path]:
    """A model with its item ranker; and the same with other weights, other items, and another noun."""
    folders = [tmp_path_factory.mktemp("model") / name for name in ("old", "new")]
    for seed, folder in enumerate(folders):
        processor = MllmMsrProcessor.from_backbone(str(BASE), item_noun=folder.name)
        model = MllmMsrForRecommendation.from_backbone(str(BASE), processor=processor, dtype=torch.float32)
        with torch.no_grad():
            for weights in model.parameters():
                weights.fill_(seed)
        ranker = make("sequence_head")
        ids = [f"{folder.name}-{code}" for code in range(N_ITEMS)]
        model.attach(ItemRanker.of(ids, dict(ranker.members), ranker.fusion))
        for part in (model, processor):
            part.save_pretrained(folder)
    return folders


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """Known to this process, which has nothing in its cache."""
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setenv("HF_TOKEN", READ)
        yield hub


def send(hub: Hub, folder: Path, kind: str = "model", name: str = NAME) -> str:
    api = HfApi(hub.url, token=WRITE)
    api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
    return api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder).oid


def told(model: MllmMsrForRecommendation) -> tuple[str, str]:
    """Which version the weights are of, and which the ranker."""
    weight = next(model.backbone.parameters()).flatten()[0].item()
    return ("old", "new")[int(weight)], version(model.item_ranker)


def version(ranker: ItemRanker) -> str:
    return ranker.item_ids[0].split("-")[0]


def load(**where) -> tuple[str, str]:
    return told(MllmMsrForRecommendation.from_pretrained(NAME, **where))


@pytest.mark.parametrize("part", ["model", "ranker"])
def test_files_of_two_commits_are_never_mixed(hub, versions, tmp_path, part):
    """Main moves before the first request of a file, or before a later one."""
    old, new = (send(hub, folder) for folder in versions)
    refs = hub.repos["model", NAME]["refs"]
    for before in (0, 2, 4):  # of config, items, weights
        refs["refs/heads/main"] = old
        hub.faults = [("file", lambda: None)] * before + [("file", lambda: refs.update({"refs/heads/main": new}))]
        if part == "model":
            assert load(cache_dir=tmp_path / str(before)) == ("old", "old")
        else:
            assert version(ItemRanker.from_pretrained(NAME, cache_dir=tmp_path / str(before))) == "old"
        assert hub.faults == []
    if part == "model":
        assert load() == ("new", "new") and load(revision=old) == ("old", "old")


def test_texts_name_the_commit_of_the_model_that_wrote_them(hub):
    old = send(hub, BASE)
    engine = TransformersEngine(NAME)
    hub.push("model", NAME, "config.json", b"{}")  # weights are fetched only later
    assert engine.revision == old and engine.model.config.model_type == engine.config.model_type


def test_all_tables_of_a_data_set_are_of_one_commit(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    commits = []
    for name in ("old", "new"):
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        for table in ("items", "tasks"):
            pl.DataFrame({"name": [name]}).write_parquet(folder / f"data/{table}.parquet")
        configs = [{"config_name": table, "data_files": f"data/{table}.parquet"} for table in ("items", "tasks")]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        commits.append(send(hub, folder, "dataset", DATA))
    refs = hub.repos["dataset", DATA]["refs"]
    refs["refs/heads/main"] = commits[0]
    source = pinned_source(DATA)
    places = [f"hf://datasets/{DATA}/data/{table}.parquet" for table in ("items", "tasks")]
    tables = [TableFile.find(places[0], tmp_path)]
    refs["refs/heads/main"] = commits[1]
    tables.append(TableFile.find(places[1], tmp_path))
    assert source == f"{DATA}@{commits[0]}" == pinned_source(f"{DATA}@{commits[0]}")
    assert [load_table(source, name, "train")["name"][0] for name in ("items", "tasks")] == ["old"] * 2
    assert [pl.read_parquet(table.parts[0].path)["name"][0] for table in tables] == ["old"] * 2


def test_what_the_hub_no_longer_gives_is_not_taken_from_the_cache_unasked(hub, versions, monkeypatch, caplog):
    send(hub, versions[0])
    assert load() == ("old", "old")
    everything = dict(hub.repos)
    for gone in ("deleted", "private", "gated", "no such revision"):
        hub.repos = {} if gone == "deleted" else dict(everything)
        monkeypatch.setenv("HF_TOKEN", OTHER if gone == "private" else READ)
        if gone == "gated":
            hub.faults = [("info", refuse_gated)]
        where = {"revision": "v9"} if gone == "no such revision" else {}
        with pytest.raises(OSError, match=rf"^{NAME}(@v9)?: the Hub does not give it to this login .*HF_HUB_OFFLINE=1"):
            load(**where)
        with pytest.raises((OSError, ValueError), match=rf"{NAME}.*the Hub does not give it to this login"):
            ItemRanker.from_pretrained(NAME, revision="v9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load() == ("old", "old")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.faults = [("info", "503")] * 9
    caplog.clear()
    assert load() == ("old", "old")
    assert "Using cached commit hash" in caplog.text


def test_a_reply_that_is_none_of_the_hub_s_is_told_with_the_remedy(hub, versions):
    send(hub, versions[0])
    page = r"http.* answers as no Hub does \(JSONDecodeError: .*\): is a proxy or its login page in between"
    limit = r"its commit cannot be asked for \(.*a fault\): with HF_HUB_OFFLINE=1 .*, or try again"
    for fault, words in (("page", page), ("429", limit), ("short", limit.replace("a fault", ""))):
        hub.faults = [("info", fault)]
        with pytest.raises(OSError, match=f"^{NAME}: {words}"):
            load()


def refuse_gated() -> None:
    raise Refused(403, "Access to this model is restricted", "GatedRepo")


def test_a_cache_that_a_killed_download_has_left_is_completed_or_refused(hub, versions, monkeypatch):
    send(hub, versions[0])
    load()
    (snapshot,) = Path(huggingface_hub.constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    for name in ("items.json", "model.safetensors"):
        blob = (snapshot / name).resolve()
        content = blob.read_bytes()
        (snapshot / name).unlink()
        blob.with_name(blob.name + ".incomplete").write_bytes(content[:100])
        blob.unlink()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match=NAME):
            load()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert load() == ("old", "old") and (snapshot / name).read_bytes() == content


def test_a_body_that_ends_early_is_fetched_again(hub, versions):
    send(hub, versions[0])
    hub.faults = [("file", lambda: None)] * 5 + [("file", "short")]
    assert load() == ("old", "old") and hub.faults == []

"""The folders that would be pushed: what is in them, what is not, and that a dry run sends nothing."""

import json
import os
import shutil
import stat
import threading

import numpy as np
import polars as pl
import pytest
from datasets import load_dataset
from hub_run import SECRETS, WRITER, change_recipe, finish, write_json
from huggingface_hub import DatasetCard, HfApi, ModelCard
from safetensors.numpy import save_file

from mllm_msr.hub_cards.facts import Release
from mllm_msr.hub_cards.publishing import Contents, build_hub, built
from mllm_msr.hub_cards.release import PublishOptions, publish
from mllm_msr.modeling.model_files import shipped_code
from mllm_msr.records.schema import ITEM_SUMMARIES, TASKS

NOWHERE = "http://127.0.0.1:9"  # nobody listens: any request would fail


def dry(run, **options):
    return publish(run, PublishOptions("org", dry_run=True, **options), api=HfApi(endpoint=NOWHERE))


def tables_of(folder) -> dict[str, pl.DataFrame]:
    return {
        f"{path.parent.name}.{path.name.split('-')[0]}": pl.read_parquet(path) for path in folder.rglob("*.parquet")
    }


def test_model_folder_has_the_allowed_files_and_no_others(make_run):
    run = make_run()
    (run.model / "checkpoint-5").mkdir()
    (run.model / "checkpoint-5/model.safetensors").write_bytes(b"")
    folder = build_hub(run)["model"]
    code = {file.name: file.read_bytes() for file in shipped_code()}
    assert {name: (folder / name).read_bytes() for name in code} == code  # as it is now, not as the run has it
    sent = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(set(sent) - code.keys()) == [
        "1_LogitScore/config.json",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "config_sentence_transformers.json",
        "cross_encoder.py",
        "handler.py",
        "model.safetensors",
        "modules.json",
        "processor_config.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["vlm_config"] == {"model_type": "llava"} and "backbone_name_or_path" not in config
    assert ModelCard.load(folder / "README.md").data.library_name == "transformers"


@pytest.mark.parametrize("streaming", [False, True])
def test_every_config_loads_as_its_card_says(finished_run, tmp_path, streaming):
    folder = build_hub(finished_run)["dataset"]
    rows = {}
    for config in DatasetCard.load(folder / "README.md").data.configs:
        for files in config["data_files"]:
            table = load_dataset(
                str(folder), config["config_name"], split=files["split"], streaming=streaming, cache_dir=str(tmp_path)
            )
            rows[config["config_name"], files["split"]] = list(table)
    assert {key: len(value) for key, value in rows.items() if key[0] != "preferences"} == {
        ("items", "train"): 30,
        ("item_summaries", "train"): 30,
        ("tasks", "train"): 8,
        ("tasks", "validation"): 8,
        ("tasks", "test"): 8,
        ("sft", "train"): 80,
        ("sft", "validation"): 80,
    }
    assert rows["items", "train"][0]["image"] is None
    assert rows["items", "train"][1]["image"].size == (96, 96)
    assert {row["split"] for row in rows["tasks", "test"]} == {"test"}
    assert rows["preferences", "train"][0]["user_id"] == "u0"  # drawn users have nothing to hide


def test_real_users_are_hashed_alike_in_every_table_and_restricted_texts_left_out(make_run):
    run = change_recipe(make_run(), source={"type": "movielens"})
    folder = build_hub(run)["dataset"]
    tables = tables_of(folder)
    users = [set(frame["user_id"]) for frame in tables.values() if "user_id" in frame.columns]
    assert len(users) == 6 and len(users[0]) == 8
    assert all(one == users[0] for one in users)
    assert set(tables["tasks.test"]["task_id"]).isdisjoint(f"test-{i}" for i in range(8))
    assert tables["items.train"]["image"].null_count() == 30 and set(tables["items.train"]["text"]) == {""}
    assert set(tables["sft.train"].columns).isdisjoint({"prompt", "completion", "images"})
    assert "do not let its texts and images be passed on" in (folder / "README.md").read_text()
    with_users = [frame for frame in tables.values() if "user_id" in frame.columns]
    assert b"u0" not in b"".join(frame.write_json().encode() for frame in with_users)
    assert stat.S_IMODE(run.user_hash_key.stat().st_mode) == 0o600
    again = pl.read_parquet(build_hub(run)["dataset"] / "tasks/test-00000-of-00001.parquet")
    assert again.equals(tables["tasks.test"])  # the key is kept, so a second release has the same users
    assert not list(run.hub.rglob("*.key"))


def test_drawn_users_are_hashed_on_request(finished_run):
    tables = tables_of(build_hub(finished_run, Contents(anonymise=True))["dataset"])
    users = [set(tables[name]["user_id"]) for name in ("sft.train", "preferences.train", "tasks.test")]
    assert users[0] == users[1] == users[2] and not {user for user in users[0] if user.startswith("u")}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has 0 bytes, not 32"),
        (b"ab" * 31, "has 31 bytes, not 32"),
        (b"ab" * 16 + b"cd" * 17, "has 33 bytes, not 32"),
        (b"not a key", "is not written in hexadecimal digits"),
        (bytes(range(200, 232)), "is not written in hexadecimal digits"),
        (b"00" * 32, "is one byte over and over"),
    ],
)
def test_a_key_that_hides_nobody_is_refused_and_left_as_it_is(make_run, content, problem):
    run = make_run()
    run.user_hash_key.write_bytes(content)
    with pytest.raises(ValueError, match=f"the key of the user hashes, .*user_hash.key, {problem}: put back"):
        dry(run, contents=Contents(anonymise=True))
    assert run.user_hash_key.read_bytes() == content
    assert not run.hub.exists() or not list(run.hub.iterdir())


@pytest.mark.parametrize("target", ["missing", "elsewhere.key", "."])
def test_a_key_that_is_a_link_or_a_folder_is_refused(make_run, target):
    run = make_run()
    (run.path / "elsewhere.key").write_text("ab" * 16 + "cd" * 16)
    run.user_hash_key.symlink_to(target)
    with pytest.raises(ValueError, match="is not a plain file"):
        dry(run, contents=Contents(anonymise=True))


def test_a_build_that_fails_leaves_the_former_folder(make_run):
    run = make_run()
    before = (build_hub(run)["dataset"] / "README.md").read_text()
    run.file(TASKS).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"tasks\.parquet is no whole Parquet file"):
        build_hub(run)
    assert (run.hub / "dataset/README.md").read_text() == before
    assert sorted(path.name for path in run.hub.iterdir()) == ["dataset", "model"]
    shutil.rmtree(run.model)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: run `mllm-msr train`"):
        build_hub(run)


def test_releases_built_at_one_time_do_not_mix(make_run):
    """Two threads hold builds under other names open at once, over and over."""
    run, wrong = make_run(), []
    together = threading.Barrier(2, timeout=60)

    def build(namespace: str, other: str) -> None:
        try:
            for _ in range(3):
                release = Release.of(run.recipe, namespace, "v1")
                with built(run, ("dataset", "model", "space", "metric"), release, Contents()) as folders:
                    together.wait()
                    texts = [path.read_text() for folder in folders.values() for path in folder.rglob("*.md")]
                    files = {part: len(list(folder.rglob("*"))) for part, folder in folders.items()}
                    if any(f"{other}/mllm-msr" in text for text in texts) or files != {
                        "dataset": 16, "metric": 4, "space": 5, "model": 16 + len(shipped_code()),
                    }:  # fmt: skip
                        wrong.append((namespace, files))
        except Exception as error:
            together.abort()
            wrong.append(error)

    threads = [threading.Thread(target=build, args=names) for names in (("org-a", "org-b"), ("org-b", "org-a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sorted(path.name for path in run.hub.iterdir()) == ["dataset", "model", "ranking_metrics", "space"]


def test_a_dry_run_shows_everything_and_sends_nothing(make_run, capsys):
    run = make_run()
    assert dry(run, tag="v1") == {}
    said = capsys.readouterr().out
    for part in (
        "model org/mllm-msr-demo (private)",
        "tasks/test-00000-of-00001.parquet",
        "| # mllm-msr-demo",
        "dry run",
    ):
        assert part in said
    assert "optimizer.pt" not in said and ".env" not in said and "notes.py" not in said
    assert not [secret for secret in SECRETS if secret in said.replace(str(run.path), "")]
    assert 'revision="v1"' in (run.hub / "model/README.md").read_text()
    shutil.rmtree(run.hub)
    dry(run, parts=("model", "metric"))
    assert sorted(path.name for path in run.hub.iterdir()) == ["model", "ranking_metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tag": "v 1"}, "a tag is made of"), ({"tag": "main"}, "a tag is made of")],
)
def test_a_dry_run_refuses_what_the_hub_would(make_run, options, message):
    with pytest.raises(ValueError, match=message):
        dry(make_run(), **options)
    with pytest.raises(ValueError, match="Repo id"):
        dry(change_recipe(make_run(), name="a name " * 20))


def test_an_unreachable_hub_is_said_so(make_run):
    with pytest.raises(RuntimeError, match=r"the Hub at http://127\.0\.0\.1:9 cannot be reached"):
        publish(make_run(), PublishOptions("org"), api=HfApi(endpoint=NOWHERE, token="hf_any"), tries=1)


def test_statuses_and_writers_leave_without_the_words_of_a_server(make_run):
    run = make_run()
    statuses = ["ok", "suspect:empty", "failed:http-400", "failed:RuntimeError: http://inner.example/secret-path: 400"]
    statuses += ["failed: sk-0123", "Bearer hf_secretsecret", "", "ok\nhttp://inner.example"]
    rows = pl.DataFrame({"status": (statuses * 4)[:30]})
    address, commit = pl.lit("https://me:pw@inner.example/v1/m"), "0123456789abcdef0123456789abcdef01234567"
    frame = run.read(ITEM_SUMMARIES).with_columns(rows["status"], generator=address)
    frame = frame.with_columns(pl.when(pl.int_range(30) < 3).then(pl.lit(commit)).otherwise(address).alias("revision"))
    run.write(ITEM_SUMMARIES, frame)
    table = tables_of(build_hub(finish(run))["dataset"])["item_summaries.train"]
    assert table["status"].to_list()[:8] == [*statuses[:3], *["failed:other"] * 5]
    assert set(table["revision"]) == {commit, "***"}
    assert set(table["generator"]) == {"m"} and WRITER["generator"] not in str(table.rows())


# ---- the model's files ---------------------------------------------------------------------------------------------


def save_in_shards(run) -> None:
    (run.model / "model.safetensors").unlink()
    for number, name in enumerate(("first", "second"), start=1):
        save_file({name: np.ones(3, np.float32)}, run.model / f"model-{number:05d}-of-00002.safetensors")
    places = {"first": "model-00001-of-00002.safetensors", "second": "model-00002-of-00002.safetensors"}
    write_json(run.model / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def save_adapter(run) -> None:
    (run.model / "model.safetensors").unlink()
    config = json.loads((run.model / "config.json").read_text())
    config |= {"adapter": "adapter", "backbone_name_or_path": "org/base", "item_memory": 4}
    write_json(run.model / "config.json", config)
    write_json(run.model / "adapter/adapter_config.json", {"r": 2, "base_model_name_or_path": "/home/someone/base"})
    save_file({"lora": np.ones(3, np.float32)}, run.model / "adapter/adapter_model.safetensors")
    save_file({"weight": np.ones((4, 3), np.float32)}, run.model / "adapter/item_memory.safetensors")


def test_weights_in_shards_and_adapters_are_published_by_their_names(make_run):
    run = make_run()
    save_in_shards(run)
    save_file({"stray": np.ones(3, np.float32)}, run.model / "model-00003-of-00003.safetensors")
    names = {path.name for path in build_hub(run)["model"].glob("*.safetensors*")}
    assert names == {f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)} | {"model.safetensors.index.json"}
    shutil.rmtree(run.path)
    run = make_run()
    save_adapter(run)
    folder = build_hub(run)["model"]
    assert not list(folder.glob("*.safetensors"))
    assert json.loads((folder / "adapter/adapter_config.json").read_text()) == {"r": 2}
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    assert (folder / "adapter/item_memory.safetensors").is_file()


def damage(change):
    """A change of a run's model folder, noted as if it had been trained so."""

    def make(run):
        change(run)
        return finish(run)

    return make


def cut(name: str):
    def change(run) -> None:
        os.truncate(run.model / name, (run.model / name).stat().st_size - 5)

    return change


def without(name: str):
    return lambda run: (run.model / name).unlink()


def write(name: str, text: str):
    return lambda run: (run.model / name).write_text(text)


def after(first, second):
    return lambda run: (first(run), second(run))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.safetensors"), r"model\.safetensors, the model's weights, is missing"),
        (write("model.safetensors", ""), r"model\.safetensors is not whole"),
        (cut("model.safetensors"), r"model\.safetensors is not whole"),
        (lambda run: save_file({}, run.model / "model.safetensors"), "holds no weights"),
        (after(save_in_shards, without("model-00002-of-00002.safetensors")), "00002-of-00002.* is missing"),
        (after(save_in_shards, cut("model-00001-of-00002.safetensors")), "00001-of-00002.* is not whole"),
        (
            after(
                save_in_shards,
                lambda run: shutil.copy(*(run.model / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))),
            ),
            r"00002-of-00002\.safetensors lacks second",
        ),
        (after(save_in_shards, write("model.safetensors.index.json", "{}")), "no weights"),
        (
            after(save_in_shards, write("model.safetensors.index.json", '{"weight_map": {"a": "../../elsewhere"}}')),
            "which is not in this folder",
        ),
        (after(save_adapter, without("adapter/adapter_model.safetensors")), "adapter_model.* is missing"),
        (after(save_adapter, without("adapter/item_memory.safetensors")), "item_memory.* is missing"),
        (after(save_adapter, cut("adapter/adapter_model.safetensors")), "adapter_model.* is not whole"),
        (after(save_adapter, without("adapter/adapter_config.json")), "adapter_config.* is missing"),
        (
            after(
                save_adapter,
                lambda run: write_json(
                    run.model / "config.json", {"adapter": "adapter", "backbone_name_or_path": "/b"}
                ),
            ),
            "backbone is not on the Hub",
        ),
        (write("config.json", "{"), r"config\.json is no whole JSON file"),
        (without("processor_config.json"), r"processor_config\.json is missing"),
        (without("tokenizer.json"), "has no tokenizer"),
        (without("modeling_mllm_msr.py"), "the model's code, is missing"),
        (
            lambda run: (run.model / "modeling_mllm_msr.py").write_text("from .gone import x"),
            "code .* needs is missing",
        ),
        (
            lambda run: (run.model / "modeling_mllm_msr.py").write_text("from .notes import x"),
            "no code of this package",
        ),
    ],
)
def test_a_model_that_would_not_load_is_not_released(make_run, change, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        dry(damage(change)(make_run()))


def test_other_weights_than_were_evaluated_are_not_released(make_run):
    run = make_run()
    save_file({"weight": np.zeros((2, 2), np.float32)}, run.model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model/model\.safetensors has changed: run `mllm-msr train"):
        dry(run)


def test_a_table_that_has_changed_since_is_not_released(make_run):
    run = make_run()
    run.write(TASKS, run.read(TASKS).head(3))
    with pytest.raises(ValueError, match=r"data/tasks\.parquet has changed: run `mllm-msr prepare"):
        dry(run)

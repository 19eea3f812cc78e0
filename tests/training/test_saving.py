"""What `--push_to_hub` sends of a training: the model, and nothing of this machine."""

import shutil
from pathlib import Path

from hub_server import Hub
from hub_storage import WRITE

from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.records.recipe import backbone_path
from mllm_msr.training import sft


def test_the_model_is_sent_and_nothing_that_lies_beside_it(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    base = shutil.copytree(backbone_path("demo"), tmp_path / "someone" / "base")
    output = tmp_path / "secret-client"
    for name in (".env", "notes/.env", "notes.txt", "data.csv", "other.safetensors"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("hf_abcdefghijkl", encoding="utf-8")
    more = {"model_name_or_path": str(base), "use_peft": False, "max_steps": 1, "per_device_train_batch_size": 2}
    more |= {"eval_strategy": "no", "push_to_hub": True, "hub_model_id": "org/mugs", "hub_token": WRITE}
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        sft.main(*sft.parse([], **small_run.flags(output, **more)))
        files = hub.files("model", "org/mugs")
        assert hub.history("model", "org/mugs") == ["Model as it was trained", "initial commit"] and not hub.leaks
    for name, content in files.items():
        for leak in (b"hf_abc", b"someone", b"secret-client", str(tmp_path).encode(), WRITE.encode()):
            assert leak not in content, name
    card = files["README.md"].decode()
    assert 'model="org/mugs"' in card and "sft.py" in card and "time machine" not in card and "None" not in card
    received = tmp_path / "received"
    for name, content in files.items():
        (received / name).parent.mkdir(parents=True, exist_ok=True)
        (received / name).write_bytes(content)
    MllmMsrForRecommendation.from_pretrained(received)
    assert not [path for path in Path(received).rglob("*") if path.name in (".env", "notes.txt", "data.csv")]

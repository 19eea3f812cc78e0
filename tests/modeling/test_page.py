"""The lines of docs/model.md run, on a tiny backbone in place of the one they name."""

import re
from pathlib import Path

import torch
from tiny_models import draw_image
from tiny_rankers import IDS, content, make
from transformers import AutoModel

from mllm_msr import Candidate

PAGE = Path(__file__).parents[2] / "docs" / "model.md"


def code_of(heading: str) -> str:
    """The lines of Python under one of the page's headings."""
    _, section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")
    return "\n".join(re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL))


def test_the_lines_of_the_page_run(backbone, tmp_path: Path, monkeypatch) -> None:
    code = code_of("The twenty most useful lines")
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) == 20, "the page promises twenty"
    assert code.count("llava-hf/llava-1.5-7b-hf") == 1
    monkeypatch.chdir(tmp_path)
    names = {"items": [Candidate(title="One", text="about ships", image=draw_image(1)), Candidate(title="Two")]}
    exec(compile(code.replace("llava-hf/llava-1.5-7b-hf", str(backbone("llava"))), PAGE, "exec"), names)
    assert names["scores"].probabilities.shape == (2,) and torch.isfinite(names["loss"])
    assert {ranked.candidate.title for ranked in names["best"]} == {"One", "Two"}
    assert {folder.name for folder in tmp_path.iterdir()} == {"adapter", "merged", "stock"}


def test_the_lines_on_the_item_ranker_run(build, tmp_path: Path, monkeypatch) -> None:
    model = build("llava")[0]
    model.attach(make())
    model.save_pretrained(tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    names = {"AutoModel": AutoModel, "repository": str(tmp_path / "repository"), "vectors": content(1, seed=5)}
    exec(compile(code_of("The item ranker of a checkpoint").replace("item-", "film-"), PAGE, "exec"), names)
    assert names["scores"].shape == (1, len(IDS))
    assert AutoModel.from_pretrained("folder").item_ranker.item_ids == [
        *(item for item in IDS if item != "film-3"),
        "new",
    ]

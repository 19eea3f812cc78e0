"""The lines of docs/model.md run, on a tiny backbone in place of the one they name."""

import re
from pathlib import Path

import torch
from tiny_models import draw_image

from mllm_msr import Candidate

PAGE = Path(__file__).parents[2] / "docs" / "model.md"


def test_the_lines_of_the_page_run(backbone, tmp_path: Path, monkeypatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join(blocks)
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) == 20, "the page promises twenty"
    assert code.count("llava-hf/llava-1.5-7b-hf") == 1
    monkeypatch.chdir(tmp_path)
    names = {"items": [Candidate(title="One", text="about ships", image=draw_image(1)), Candidate(title="Two")]}
    exec(compile(code.replace("llava-hf/llava-1.5-7b-hf", str(backbone("llava"))), PAGE, "exec"), names)
    assert names["scores"].probabilities.shape == (2,) and torch.isfinite(names["loss"])
    assert {ranked.candidate.title for ranked in names["best"]} == {"One", "Two"}
    assert {folder.name for folder in tmp_path.iterdir()} == {"adapter", "merged", "stock"}

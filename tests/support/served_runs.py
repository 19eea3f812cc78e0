"""Tiny runs with untrained models, ready to be served, and the real server as a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tiny_runs import tiny_recipe

from mllm_msr import stages
from mllm_msr.records.run import RunFolder

LATE = {
    "head.enabled": False,
    "prompts.late_user": "{{ preference }}{% for item in recent %} {{ item.summary }}{% endfor %}",
    "prompts.late_item": "{{ title }} {{ image }}",
}
READ, WRITE = "r" * 20, "w" * 20  # keys of a server
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def served_run(path: Path, backbone: Path, late: bool = False) -> RunFolder:
    """A run all of whose stages that serving needs are done; its model and heads are as they are before training."""
    from mllm_msr.processing.auto import MllmMsrForRecommendation, MllmMsrProcessor

    run = RunFolder.create(
        path, tiny_recipe({"training.model_name_or_path": str(backbone), **(LATE if late else {"head.max_epochs": 0})})
    )
    names = ["prepare", "summarize items", "summarize users", *([] if late else ["vectors"])]
    for name in names:
        stages.FUNCTIONS[name](run)
    processor = MllmMsrProcessor.from_backbone(
        str(backbone), prompts=run.recipe.prompts, item_noun=run.recipe.item_noun
    )
    model = MllmMsrForRecommendation.from_backbone(str(backbone), processor=processor, dtype="float32")
    if late:
        model.config.interaction, model.config.user_limit, model.config.item_limit = "late", 96, 48
    model.save_pretrained(run.model)
    processor.save_pretrained(run.model)
    run.take_over("train", "untrained", [run.model])
    if not late:
        stages.FUNCTIONS["head"](run)
    return run


class Live(httpx.Client):
    """A client of a server, which knows the server's process."""

    def __init__(self, process: subprocess.Popen, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        super().__init__(base_url=url, headers=headers, timeout=120)
        self.process, self.url = process, url

    def ask(self, method: str, path: str, status: int = 200, **request: Any) -> Any:
        """The JSON of a reply, which must have a status."""
        reply = self.request(method, path, **request)
        assert reply.status_code == status, reply.text
        return reply.json()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def live(run: Path, *options: str, key: str | None = None) -> Iterator[Live]:
    """`mllm-msr serve` on a free port of this machine; it is told to stop at the end, and must do so well."""
    line = [sys.executable, "-m", "mllm_msr.cli", "serve", str(run), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    assert process.stdout is not None and process.stderr is not None
    said = process.stdout.readline()
    try:
        assert "http://" in said, process.stderr.read()
        with Live(process, said.strip().rpartition(" ")[2].removesuffix("/docs"), key) as client:
            yield client
    finally:
        killed = process.poll() == -signal.SIGKILL
        process.terminate()
        _, log = process.communicate(timeout=120)
        assert killed or process.returncode in (0, -signal.SIGTERM), log
        assert "Traceback" not in log, log

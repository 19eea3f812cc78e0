"""The two Spaces of a release: the metric, and the demo. Few small files each, made anew for every release."""

import json
from importlib.metadata import version
from pathlib import Path

from mllm_msr.evaluation import metrics
from mllm_msr.hub_cards.cards import read_facts, render
from mllm_msr.hub_cards.publishing import whole

ROOM = Path(__file__).parent
SPACE_SDKS = {"metric": "static", "space": "gradio"}
GRADIO = "6.31.0"  # with which the app is tested; it need not be installed where a release is made
METRIC = "ranking_metrics"  # `evaluate` wants the script to be called as its repository or folder
METRICS_IMPORT = "from mllm_msr.evaluation.metrics import ranking_metrics\n"


def build_spaces(run: Path, ids: dict[str, str], tag: str | None = None) -> dict[str, Path]:
    """Write ``run/hub/ranking_metrics`` and ``run/hub/space`` exactly as they would be pushed, and return both."""
    return {
        "metric": whole(run / "hub" / METRIC, lambda folder: fill_metric(folder, ids["metric"])),
        "space": whole(run / "hub/space", lambda folder: fill_space(run, folder, ids, tag)),
    }


def fill_metric(folder: Path, repo_id: str | None = None) -> None:
    """The metric as one file with no need of this package; its card; and a page for the browser."""
    module = (ROOM / "metric_space.py").read_text(encoding="utf-8")
    source = Path(metrics.__file__).read_text(encoding="utf-8")
    head, tail = module.split(METRICS_IMPORT)
    (folder / f"{METRIC}.py").write_text(head + source + tail, encoding="utf-8")
    (folder / "requirements.txt").write_text("evaluate\ndatasets\nnumpy\npolars\n", encoding="utf-8")
    (folder / "README.md").write_text(render("metric_card.md.j2", repo_id=repo_id or METRIC), encoding="utf-8")
    (folder / "index.html").write_text(render("metric_page.html.j2", repo_id=repo_id or METRIC), encoding="utf-8")


def fill_space(run: Path, folder: Path, ids: dict[str, str], tag: str | None) -> None:
    """The app, what it shows, and what it needs."""
    recipe = read_facts(run)["recipe"]
    (folder / "app.py").write_bytes((ROOM / "space_app.py").read_bytes())
    shown = {
        "model": ids["model"],
        "dataset": ids["dataset"],
        "revision": tag,
        "noun": recipe.get("item_noun") or "item",
        "block_size": (recipe.get("summaries") or {}).get("block_size") or 3,
    }
    (folder / "space.json").write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    needed = ("torch", "transformers", "peft", "datasets", "jinja2")  # the rest comes with gradio
    pins = [f"{name}=={version(name).split('+')[0]}" for name in needed]
    (folder / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    card = render("space_card.md.j2", name=recipe.get("name") or run.name, sdk_version=GRADIO, **shown)
    (folder / "README.md").write_text(card, encoding="utf-8")

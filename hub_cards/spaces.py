"""The two Spaces of a release: the metric, and the demo. Few small files each, made anew for every release."""

import json
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCardData

from mllm_msr.evaluation import metrics
from mllm_msr.hub_cards.cards import TAGS, plain, render
from mllm_msr.hub_cards.facts import Release
from mllm_msr.records.run import RunFolder

ROOM = Path(__file__).parent
SPACE_SDKS = {"metric": "static", "space": "gradio"}
GRADIO = "6.31.0"  # with which the app is tested; it need not be installed where a release is made
METRIC = "ranking_metrics"  # `evaluate` wants the script to be called as its repository or folder
VIEW = "mllm_msr.hub_cards.space_view"
METRICS_IMPORT = "from mllm_msr.evaluation.metrics import ranking_metrics\n"


def fill_metric(folder: Path, release: Release | None = None) -> None:
    """The metric as one file with no need of this package; its card; and a page for the browser."""
    module = (ROOM / "metric_space.py").read_text(encoding="utf-8")
    source = Path(metrics.__file__).read_text(encoding="utf-8")
    head, tail = module.split(METRICS_IMPORT)
    (folder / f"{METRIC}.py").write_text(head + source + tail, encoding="utf-8")
    (folder / "requirements.txt").write_text("evaluate\ndatasets\nnumpy\npolars\n", encoding="utf-8")
    data = SpaceCardData(
        title="Ranking metrics",
        emoji="📏",
        colorFrom="blue",
        colorTo="green",
        sdk=SPACE_SDKS["metric"],
        app_file="index.html",
        pinned=False,
        license="apache-2.0",
        short_description="AUC, HR, MRR, NDCG and MAP with intervals over users",
        tags=[TAGS[0], "evaluate", "metric"],
    )
    repo_id = release.metric if release else METRIC
    for file, template in (("README.md", "metric_card.md.j2"), ("index.html", "metric_page.html.j2")):
        (folder / file).write_text(render(template, repo_id=repo_id, card_data=data.to_yaml()), encoding="utf-8")


def fill_space(run: RunFolder, folder: Path, release: Release) -> None:
    """The app, what it shows, and what it needs."""
    recipe = run.recipe
    app = (ROOM / "space_app.py").read_text(encoding="utf-8").replace(f"from {VIEW} import", "from space_view import")
    (folder / "app.py").write_text(app, encoding="utf-8")
    (folder / "space_view.py").write_bytes((ROOM / "space_view.py").read_bytes())
    settings = {
        "model": release.model,
        "dataset": release.dataset,
        "revision": release.tag,
        "noun": recipe.item_noun,
        "block_size": run.block_size,
    }
    (folder / "space.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    needed = ("torch", "transformers", "peft", "datasets", "jinja2")  # the rest comes with gradio
    pins = [f"{name}=={version(name).split('+')[0]}" for name in needed]
    (folder / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    data = SpaceCardData(
        title=f"MLLM-MSR: {' '.join(recipe.name.split())}",
        emoji="🖼️",
        colorFrom="indigo",
        colorTo="pink",
        sdk=SPACE_SDKS["space"],
        sdk_version=GRADIO,
        app_file="app.py",
        pinned=False,
        license="apache-2.0",
        short_description="See a taste become words, and words a ranking",
        models=[release.model],
        datasets=[release.dataset],
        tags=[TAGS[0], "recommendation"],
    )
    facts = {"name": plain(recipe.name), "noun": plain(recipe.item_noun)}
    card = render("space_card.md.j2", release=release, card_data=data.to_yaml(), **facts)
    (folder / "README.md").write_text(card, encoding="utf-8")

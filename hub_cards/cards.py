"""Model card and data set card from the facts of a run. What a run does not say, a card does not say either."""

import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import polars as pl
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mllm_msr.data.sources.registry import SOURCES
from mllm_msr.evaluation.metrics import metric_label
from mllm_msr.hub_cards.facts import Release, RunFacts, slug
from mllm_msr.hub_cards.findings import findings, headline, measured_or_not
from mllm_msr.hub_cards.shards import PublishedTable
from mllm_msr.hub_cards.terms import SOURCE_TERMS, backbone_license, conflicts
from mllm_msr.hub_cards.view import TableView, fusion_table, in_order, percent, results_table
from mllm_msr.records.public import public_name
from mllm_msr.records.results import Results
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_SUMMARIES, PREFERENCES
from mllm_msr.records.sections import OURS

TAGS = ["mllm-msr", "recommendation", "sequential-recommendation", "multimodal"]
RERANKER_TAGS = ["reranker", "sentence-transformers", "cross-encoder"]  # as which it is loaded there
# fmt: off
TRAINING_FACTS = (  # of the recipe's training section; paths and account names are not among them
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "use_peft", "lora_r",
    "lora_alpha", "lora_dropout", "dtype", "seed",
)
LICENSES = {  # ids the Hub knows
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "odc-by", "gpl-3.0",
    "agpl-3.0", "openrail", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "unknown", "other",
}
# fmt: on


def model_card(run: RunFolder, release: Release | None = None) -> ModelCard:
    """The card of the run's model; it names repositories and tag only of a ``release``."""
    facts = RunFacts.read(run)
    recipe, model = facts.recipe, facts.model
    inherited = backbone_license(facts.backbone, facts.backbone_revision)
    name = slug(recipe.name)
    data = ModelCardData(
        **license_fields(recipe.license, facts.source),
        language=SOURCES[facts.source].language,
        library_name="transformers",
        pipeline_tag="text-ranking",
        tags=[*TAGS, *RERANKER_TAGS],
        base_model=facts.backbone,
        datasets=[release.dataset] if release else None,
        model_name=release.model.split("/")[1] if release else f"mllm-msr-{name}",
        eval_results=_eval_results(facts.results, release) if facts.results else None,
    )
    if facts.backbone:
        data["base_model_relation"] = "adapter" if model.kind == "adapter" else "finetune"
    settings = {name: recipe.training.get(name) for name in TRAINING_FACTS} | {"interaction": model.interaction}
    without_effect = set() if (settings["max_steps"] or -1) > 0 else {"max_steps"}  # epochs count then
    if settings["use_peft"] is False:
        without_effect |= {name for name in settings if name.startswith("lora_")}
    stated = [item for item in settings.items() if item[0] not in without_effect and item[1] is not None]
    return ModelCard(
        render(
            "model_card.md.j2",
            card_data=data.to_yaml(),
            title=data.model_name,
            backbone=_backbone_words(facts),
            **_prompts(facts),
            reads=_reads(facts),
            evidence=list(zip_longest(*measured_or_not(facts.results), fillvalue="")) if facts.results else [],
            own_backbone=facts.own_backbone,
            settings=TableView.of_texts(("setting", "value"), stated) if stated else None,
            inherited=inherited,
            conflicts=conflicts(recipe.license, inherited, facts.source),
            release=release,
            **_shared(facts),
        )
    )


def _eval_results(results: Results, release: Release | None) -> list[EvalResult] | None:
    ours = results.variants.get(OURS, {})
    return [
        EvalResult(
            task_type="text-ranking",
            task_name="Sequential recommendation",
            dataset_type=release.dataset if release else slug(results.dataset),
            dataset_name=results.dataset,
            dataset_config="tasks" if release else None,
            dataset_split=results.split,
            dataset_args={
                "protocol": results.protocol,
                "n_candidates": results.n_candidates,
                "candidate_hash": results.candidate_hash,
            },
            metric_type=name,
            metric_name=metric_label(name),
            metric_value=round(ours[name].value, 4),
        )
        for name in ours
    ] or None


def dataset_card(
    run: RunFolder,
    tables: Sequence[PublishedTable],
    release: Release | None = None,
    left_out: str = "",
) -> DatasetCard:
    """The card of the derived data set.

    Args:
        tables: as published.
        release: whose repositories and tag are named.
        left_out: a sentence on what the source's terms keep out of it.
    """
    facts = RunFacts.read(run)
    recipe = facts.recipe
    data = DatasetCardData(
        **license_fields(recipe.license, facts.source),
        language=SOURCES[facts.source].language,
        pretty_name=f"{recipe.name}: summaries, preferences and ranking tasks for MLLM-MSR",
        tags=TAGS,
        task_categories=["text-ranking", "image-text-to-text"],
        size_categories=size_category(max(sum(config.rows.values()) for config in tables)),
        configs=[
            {
                "config_name": config.table.name,
                **({"default": True} if config is tables[0] else {}),
                "data_files": [
                    {"split": split, "path": f"{config.table.name}/{split}-*.parquet"} for split in config.rows
                ],
            }
            for config in tables
        ],
    )
    data["dataset_info"] = [dict(config.info) for config in tables]
    configs = [
        (
            f"`{config.table.name}`",
            ", ".join(f"{split} {rows:,}" for split, rows in config.rows.items()),
            config.table.meaning,
        )
        for config in tables
    ]
    terms_head = ("source", "its terms allow", "its terms forbid", "images", "histories and candidates", "what we read")
    sources = [
        (
            f"{'**this data set**: ' if source == facts.source else ''}[{terms.name}]({terms.link})",
            *(terms.allows, terms.forbids, terms.images, terms.log, terms.read),
        )
        for source, terms in SOURCE_TERMS.items()
    ]
    cleaning = [(step.step, step.interactions, step.users, step.items, step.why) for step in facts.data.cleaning]
    return DatasetCard(
        render(
            "dataset_card.md.j2",
            card_data=data.to_yaml(),
            title=data.pretty_name,
            tables=tables,
            configs=TableView.of_texts(("config", "rows", "what it holds"), configs),
            sources=TableView.of_texts(terms_head, sources),
            generators=_generators(run),
            cleaning=TableView.of_texts(("step", "interactions", "users", "items", "why"), cleaning)
            if cleaning
            else None,
            left_out=left_out,
            conflicts=conflicts(recipe.license, None, facts.source),
            release=release,
            **_shared(facts),
        )
    )


def _shared(facts: RunFacts) -> dict[str, Any]:
    """What both templates speak of."""
    results = facts.results
    popularity = results.variants.get("popularity", {}).get("auc") if results else None
    fusions = (results.fusion, results.fusion_without_answer) if results else ()
    statistics = facts.data.statistics
    counted = [f"{statistics[name]:,} {name}" for name in ("users", "items", "interactions") if name in statistics]
    return {
        "facts": facts,
        "results": results,
        "name": plain(facts.recipe.name),
        "noun": plain(facts.recipe.item_noun),
        "license": facts.recipe.license,
        "terms": SOURCE_TERMS.get(facts.source),
        "headline": headline(results) if results else None,
        "findings": findings(results)[1:] if results else [],
        "fusion_tables": [fusion_table(each) for each in fusions if each],
        "results_table": results_table(results) if results else None,
        "variants": in_order(results.variants) if results else [],
        "popularity_auc": percent(popularity.value) if popularity else "",
        "statistics": ", ".join(counted),
    }


def license_fields(license: str | None, source: str | None = None) -> dict[str, Any]:
    """Card fields for a licence: an id the Hub knows, or ``other`` with the name; nothing if unknown.

    >>> license_fields("mit"), license_fields("MovieLens terms"), license_fields(None)
    ({'license': 'mit'}, {'license': 'other', 'license_name': 'movielens-terms'}, {})
    """
    if not license:
        return {}
    if license.lower() == "other" and source in SOURCE_TERMS:
        return {"license": "other", "license_name": f"{source}-terms", "license_link": SOURCE_TERMS[source].link}
    if license.lower() in LICENSES:
        return {"license": license.lower()}
    return {"license": "other", "license_name": slug(license)}


def size_category(rows: int) -> str:
    """The Hub's word for a number of rows.

    >>> size_category(999), size_category(1000), size_category(2_500_000)
    ('n<1K', '1K<n<10K', '1M<n<10M')
    """
    units = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = next((index for index in range(len(units)) if rows < 1000 * 10**index), len(units))
    if place == 0:
        return "n<1K"
    return f"{units[place - 1]}<n<{units[place]}" if place < len(units) else "n>1T"


def _backbone_words(facts: RunFacts) -> str:
    kind, revision = facts.model.backbone_type, facts.backbone_revision
    if facts.backbone:
        link = f"[{facts.backbone}](https://huggingface.co/{facts.backbone})"
        return f"{link} at revision `{revision}`" if revision else link
    if facts.recipe.training.get("model_name_or_path") == "demo":
        return f"the tiny `{kind or 'llava'}` that ships inside the mllm-msr package"
    return f"a local `{kind}` checkpoint" if kind else ""


def _prompts(facts: RunFacts) -> dict[str, list[str]]:
    """The names of the prompts that this model was asked by: ``scored``, and ``written``, by which texts were made."""
    late, options = facts.model.interaction == "late", facts.recipe.summaries
    scored = ("late_user", "late_item", "late_answer") if late else ("recommendation",)
    written: tuple[str, ...] = ()
    if options.engine not in ("extractive", "titles"):
        of_items = ("image_summary", "text_summary", "fusion") if options.item_prompts == "paper" else ("item_summary",)
        written = (*of_items, "preference")
    prompts = facts.model.prompts
    return {
        "scored": [name for name in scored if prompts.get(name, "").strip()],
        "written": [name for name in written if prompts.get(name)],
    }


def _reads(facts: RunFacts) -> str:
    """What the scored prompts show of an item, in words."""
    scored = "".join(facts.model.prompts[name] for name in _prompts(facts)["scored"])
    shown = [name for name in ("title", "text", "image") if re.search(rf"{{{{\s*{name}\s*}}}}", scored)]
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def _generators(run: RunFolder) -> TableView | None:
    """Who wrote the texts: distinct generator, revision and prompt hash of each table, with rows and statuses."""
    rows: list[Sequence[object]] = []
    columns = ("generator", "revision", "prompt_hash", "status")
    for table in (ITEM_SUMMARIES, PREFERENCES):
        if run.has(table):
            status = pl.col("status").str.replace(":.*", "")
            counts = run.read(table, columns).with_columns(status).group_by(columns).len().sort(pl.all())
            for generator, revision, prompt, state, count in counts.rows():
                rows.append((table.name, public_name(generator), revision, f"`{prompt}`", state, f"{count:,}"))
    head = ("table", "generator", "revision", "prompt hash", "status", "rows")
    return TableView.of_texts(head, rows) if rows else None


def plain(text: str) -> str:
    """Text of a recipe within Markdown: on one line, and without markup.

    >>> plain("MovieLens\\n# <b>100k</b>")
    'MovieLens # \\\\<b\\\\>100k\\\\</b\\\\>'
    """
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def fenced(text: str, language: str = "") -> str:
    """Text as a code block, whose fence is longer than any in it."""
    longest = max((len(fence) for fence in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def render(template: str, **values: Any) -> str:
    """A template of this room; a fact that it names and is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "fenced": fenced}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(**values))

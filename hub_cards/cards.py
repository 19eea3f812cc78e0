"""Model card and dataset card from the facts of a run. What a run does not say, a card does not say either."""

import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mllm_msr.hub_cards.results import (
    METRIC_NAMES,
    OURS,
    ROW_MEANINGS,
    findings,
    headline,
    ordered_rows,
    percent,
    results_markdown,
    row_name,
)
from mllm_msr.hub_cards.terms import SOURCE_TERMS, backbone_license, conflicts

TAGS = ["mllm-msr", "recommendation", "sequential-recommendation", "multimodal"]
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
TABLES = {
    "items": "title, text and picture of every item",
    "item_summaries": "each item in words, written from its title, text and picture",
    "preferences": "each user's preference after every block of items, with the ids of the items it has read",
    "tasks": "the ranking tasks: history, frozen candidates, labels",
    "sft": "the fine-tuning examples: preference, recent summaries, candidate, Yes or No",
}
PROVENANCE = (
    "`generator`, `revision`, `prompt_hash`: what wrote the text, and from which prompt; `status`: `ok`, or why not"
)
COLUMNS = {  # those whose names do not say it all
    "item_summaries": PROVENANCE,
    "preferences": f"`step`: the block it was written after; `read_item_ids`: all it rests on; {PROVENANCE}",
    "tasks": "`history`: what came before `cutoff`, oldest first; `labels`: 1 for what the user then chose among "
    "`candidates`; `target_train_count`: how often that occurs in training",
    "sft": "`preference` and `recent`: what the model is told of the user; `prompt`, `completion` and `images`, where "
    "they are there: the same as a chat, for any trainer",
}


def read_facts(run: Path) -> dict[str, Any]:
    """What the artefacts of ``run`` say, by artefact; a missing artefact is an empty dict."""
    config = run / "config.yaml"
    facts = {
        "recipe": (yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None) or {},
        "metrics": _json(run / "metrics.json"),
        "provenance": _json(run / "provenance.json"),
        "data": _json(run / "data/report.json"),
        "model": _json(run / "model/config.json"),
        "prompts": _json(run / "model/processor_config.json").get("prompts") or {},
    }
    log = run / "model/log_history.json"
    facts["log"] = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else []
    return facts


def is_hub_id(name: str | None) -> bool:
    """Whether ``name`` can only be a repository on the Hub, not a folder.

    >>> is_hub_id("llava-hf/llava-v1.6-mistral-7b-hf"), is_hub_id("/models/llava"), is_hub_id("demo")
    (True, False, False)
    """
    return bool(name and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not Path(name).exists())


def public_name(model: str) -> str:
    """The name of a model without the folder of this machine that it may lie in.

    >>> public_name("/home/me/models/llava"), public_name("llava-hf/llava-1.5-7b-hf"), public_name("demo")
    ('llava', 'llava-hf/llava-1.5-7b-hf', 'demo')
    """
    return model if is_hub_id(model) else Path(model).name


def license_fields(license: str | None, source: str | None = None) -> dict[str, Any]:
    """Card fields for a licence: an id the Hub knows, or ``other`` with the name; nothing if unknown.

    >>> license_fields("mit"), license_fields("MovieLens terms"), license_fields(None)
    ({'license': 'mit'}, {'license': 'other', 'license_name': 'movielens-terms'}, {})
    """
    if not license:
        return {}
    if license.lower() == "other" and source in SOURCE_TERMS:
        return {"license": "other", "license_name": f"{source}-terms", "license_link": SOURCE_TERMS[source]["link"]}
    if license.lower() in LICENSES:
        return {"license": license.lower()}
    return {"license": "other", "license_name": slug(license)}


def slug(name: str) -> str:
    """``name`` as part of a repository id.

    >>> slug("MovieLens 100k!")
    'movielens-100k'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"


def model_card(
    run: Path, repo_id: str | None = None, dataset_id: str | None = None, tag: str | None = None
) -> ModelCard:
    """The card of ``run/model``; ``repo_id``, ``dataset_id`` and ``tag`` are named where they are known."""
    facts = read_facts(run)
    recipe, metrics = facts["recipe"], facts["metrics"]
    training = recipe.get("training") or {}
    backbone, revision = training.get("model_name_or_path"), training.get("model_revision")
    ours = metrics.get("rows", {}).get(OURS, {})
    source = (recipe.get("source") or {}).get("type")
    inherited = backbone_license(backbone, revision)
    variant = _variant(run, training)
    name = slug(metrics.get("dataset") or recipe.get("name") or "run")
    results = [
        EvalResult(
            task_type="text-ranking",
            task_name="Sequential recommendation",
            dataset_type=dataset_id or name,
            dataset_name=metrics.get("dataset", name),
            dataset_config="tasks" if dataset_id else None,
            dataset_split=metrics.get("split"),
            dataset_args={
                key: metrics[key]
                for key in ("protocol", "n_candidates", "candidate_hash")
                if metrics.get(key) is not None
            },
            metric_type=key,
            metric_name=METRIC_NAMES[key],
            metric_value=round(ours[key]["value"], 4),
        )
        for key in METRIC_NAMES
        if key in ours
    ]
    data = ModelCardData(
        **license_fields(recipe.get("license"), source),
        language=_language(source),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=TAGS,
        base_model=backbone if is_hub_id(backbone) else None,
        datasets=[dataset_id] if dataset_id else None,
        model_name=(repo_id or f"mllm-msr-{name}").split("/")[-1],
        eval_results=results or None,
    )
    if is_hub_id(backbone):
        data["base_model_relation"] = "adapter" if variant == "adapter" else "finetune"
    losses = [entry["loss"] for entry in facts["log"] if "loss" in entry]
    settings = {key: training.get(key) for key in TRAINING_FACTS} | {"interaction": facts["model"].get("interaction")}
    content = render(
        "model_card.md.j2",
        card_data=data.to_yaml(),
        title=data.model_name,
        backbone=_backbone_words(facts, backbone, revision),
        training={key: one for key, one in settings.items() if one is not None},
        losses=losses,
        variant=variant,
        license=recipe.get("license"),
        inherited=inherited,
        conflicts=conflicts(recipe.get("license"), inherited, source),
        prompts=facts["prompts"],
        terms=SOURCE_TERMS,
        stages=facts["provenance"].get("stages") or {},
        repo_id=repo_id,
        dataset_id=dataset_id,
        tag=tag,
        **_shared(facts),
    )
    return ModelCard(content)


def dataset_card(
    run: Path,
    tables: dict[str, dict[str, int]],
    repo_id: str | None = None,
    left_out: str = "",
    tag: str | None = None,
    info: list[dict[str, Any]] | None = None,
) -> DatasetCard:
    """The card of the derived data set.

    Args:
        tables: rows by config and split, as published: ``{"tasks": {"train": 800, "test": 400}, ...}``.
        left_out: a sentence on what the source's terms keep out of it.
        tag: the release its examples pin.
        info: ``dataset_info`` of the configs.
    """
    facts = read_facts(run)
    recipe = facts["recipe"]
    name = recipe.get("name") or facts["metrics"].get("dataset") or "run"
    source = (recipe.get("source") or {}).get("type")
    data = DatasetCardData(
        **license_fields(recipe.get("license"), source),
        language=_language(source),
        pretty_name=f"{name}: summaries, preferences and ranking tasks for MLLM-MSR",
        tags=TAGS,
        task_categories=["text-ranking", "image-text-to-text"],
        size_categories=size_category(max((sum(splits.values()) for splits in tables.values()), default=0)),
        configs=[
            {
                "config_name": table,
                **({"default": True} if table == next(iter(tables)) else {}),
                "data_files": [{"split": split, "path": f"{table}/{split}-*.parquet"} for split in splits],
            }
            for table, splits in tables.items()
        ],
    )
    if info:
        data["dataset_info"] = info
    content = render(
        "dataset_card.md.j2",
        card_data=data.to_yaml(),
        title=data.pretty_name,
        tables=tables,
        meanings=TABLES,
        columns=COLUMNS,
        generators=_generators(run),
        repo_id=repo_id,
        left_out=left_out,
        tag=tag,
        terms=SOURCE_TERMS,
        license=recipe.get("license"),
        conflicts=conflicts(recipe.get("license"), None, source),
        **_shared(facts),
    )
    return DatasetCard(content)


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


def _shared(facts: dict[str, Any]) -> dict[str, Any]:
    """What both templates speak of."""
    recipe, metrics, data = facts["recipe"], facts["metrics"], facts["data"]
    rows = metrics.get("rows")
    return {
        "name": recipe.get("name") or metrics.get("dataset") or "a data set",
        "noun": recipe.get("item_noun") or "item",
        "source_type": (recipe.get("source") or {}).get("type"),
        "metrics": metrics,
        "headline": headline(metrics) if rows else None,
        "findings": findings(metrics)[1:] if rows else [],
        "results": results_markdown(metrics) if rows else "",
        "row_meanings": {row_name(row): ROW_MEANINGS[row] for row in ordered_rows(metrics) if row in ROW_MEANINGS}
        if rows
        else {},
        "popularity_auc": percent(rows["popularity"]["auc"]["value"])
        if rows and "auc" in rows.get("popularity", {})
        else "",
        "statistics": {
            key: f"{value:,}"
            for key, value in (data.get("statistics") or {}).items()
            if key in ("users", "items", "interactions")
        },
        "cleaning": data.get("cleaning") or [],
        "protocol": data.get("protocol") or {},
        "block_size": (recipe.get("summaries") or {}).get("block_size"),
        "versions": facts["provenance"].get("versions") or {},
    }


def _language(source: str | None) -> str | None:
    """The sources we read are in English; of own tables nobody has said."""
    return None if source == "tables" else "en"


def _backbone_words(facts: dict[str, Any], backbone: str | None, revision: str | None) -> str:
    kind = (facts["model"].get("vlm_config") or {}).get("model_type")
    if is_hub_id(backbone):
        return f"[{backbone}](https://huggingface.co/{backbone})" + (f" at revision `{revision}`" if revision else "")
    if backbone == "demo":
        return f"the tiny `{kind or 'llava'}` that ships inside the mllm-msr package"
    return f"a local `{kind}` checkpoint" if kind else ""


def _variant(run: Path, training: dict[str, Any]) -> str:
    """What the model folder holds: "adapter", "merged" (a LoRA in whole weights) or "full"."""
    if (run / "model/adapter").is_dir():
        return "adapter"
    return "merged" if training.get("use_peft") else "full"


def _generators(run: Path) -> list[dict[str, Any]]:
    """Who wrote the summaries: distinct generator, revision and prompt hash of each table, with rows and statuses."""
    found = []
    for table, file in (("item_summaries", "items"), ("preferences", "preferences")):
        path = run / f"summaries/{file}.parquet"
        if path.is_file():
            frame = pl.read_parquet(path).with_columns(pl.col("status").str.replace(":.*", ""))
            for row in frame.group_by("generator", "revision", "prompt_hash", "status").len().sort(pl.all()).to_dicts():
                found.append({"table": table, **row, "generator": public_name(row["generator"])})
    return found


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def render(template: str, **values: Any) -> str:
    """A template of this room; a fact it names and is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text)

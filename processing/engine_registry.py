"""The engines by the name that a recipe calls them. Nothing heavy is imported before its engine is wanted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mllm_msr.processing.engines import AbsentAuthor, Author, Engine
from mllm_msr.processing.open_workers import open_workers
from mllm_msr.processing.prompts import MAX_NEW_TOKENS, PROMPTS
from mllm_msr.processing.text_requests import TextRequest, WrittenTexts, write_texts
from mllm_msr.processing.workers import Folder, InProcess, Workers
from mllm_msr.records.cluster import Cluster
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.sections import SummaryOptions

Build = Callable[[SummaryOptions, Mapping[str, str], str], Engine]


def build_engine(options: SummaryOptions, prompts: Mapping[str, str] | None = None, noun: str = "item") -> Engine:
    """The engine of a recipe; its model is loaded when the first text is wanted.

    Args:
        prompts: templates that replace the default ones, by name.
        noun: what the prompts call an item.
    """
    return ENGINES[str(options.engine)](options, {**PROMPTS, **(prompts or {})}, noun)


@contextmanager
def open_text_workers(
    options: SummaryOptions, prompts: Mapping[str, str], noun: str, cluster: Cluster | None
) -> Iterator[tuple[Author, Workers[TextRequest, WrittenTexts]]]:
    """Who writes texts for the block: the engine of a recipe, see :func:`build_engine`, in this process; or workers of
    a cluster, each with its own, of which this process is told only what it is. The folder of a local model is sent to
    them."""
    if cluster is None:
        engine = build_engine(options, prompts, noun)
        yield engine, InProcess(lambda: partial(write_texts, engine))
        return
    local = Path(options.model) if options.model and Path(options.model).is_dir() else None
    folders = [Folder(local.resolve())] if local else []
    workers: Any
    with open_workers(cluster, partial(_text_worker, options, dict(prompts), noun), folders) as workers:
        (author,) = workers.map([None])
        yield replace(author, generator=local.name) if local else author, workers


def _text_worker(
    options: SummaryOptions, prompts: Mapping[str, str], noun: str, *models: Path
) -> Callable[[TextRequest | None], WrittenTexts | AbsentAuthor]:
    for model in models:
        options = replace(options, model=str(model))
    engine = build_engine(options, prompts, noun)
    return lambda request: AbsentAuthor.of(engine) if request is None else write_texts(engine, request)


def _extractive(options: SummaryOptions, prompts: Mapping[str, str], noun: str) -> Engine:
    from mllm_msr.processing.engine_extractive import ExtractiveEngine

    return ExtractiveEngine()


def _titles(options: SummaryOptions, prompts: Mapping[str, str], noun: str) -> Engine:
    from mllm_msr.processing.engine_extractive import TitlesEngine

    return TitlesEngine()


def _openai(options: SummaryOptions, prompts: Mapping[str, str], noun: str) -> Engine:
    from mllm_msr.processing.engine_openai import OpenAIEngine

    return OpenAIEngine(
        options.model,
        prompts,
        noun,
        base_url=options.base_url,
        revision=options.revision,
        max_new_tokens=MAX_NEW_TOKENS | options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        timeout=options.timeout,
        tries=options.tries,
        batch_size=max(options.batch_size, options.concurrency),
    )


def _transformers(options: SummaryOptions, prompts: Mapping[str, str], noun: str) -> Engine:
    from mllm_msr.modeling.naming import naming, pinned
    from mllm_msr.processing.engine_transformers import TransformersEngine
    from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

    name = backbone_path(options.model)
    with naming(name):
        revision = pinned(name, options.revision)
        processor = MllmMsrProcessor.from_backbone(
            name, revision=revision, prompts=dict(prompts), item_noun=noun, max_length=options.max_length
        )
    return TransformersEngine(
        name,
        processor,
        label=_label(options),
        revision=revision,
        max_new_tokens=MAX_NEW_TOKENS | options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        dtype=options.dtype,
        batch_size=options.batch_size,
        token_budget=options.token_budget,
        device_map=options.device_map,
        attn_implementation=options.attn_implementation,
        quantization_config=options.quantization_config,
        decoding=options.decoding,
    )


def _vllm(options: SummaryOptions, prompts: Mapping[str, str], noun: str) -> Engine:
    from mllm_msr.processing.engine_vllm import VllmEngine

    if options.quantization_config:
        raise ValueError("summaries.quantization_config: vLLM takes a quantised model as it was saved")
    return VllmEngine(
        backbone_path(options.model),
        prompts,
        noun,
        label=_label(options),
        revision=options.revision,
        max_new_tokens=MAX_NEW_TOKENS | options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        dtype=options.dtype,
        max_length=options.max_length,
        gpus=_visible_gpus() if options.device_map == "auto" else 1,
        batch_size=max(options.batch_size, 256),
    )


def _label(options: SummaryOptions) -> str:
    """What the texts name as their writer: the model, without a path of this machine."""
    return Path(options.model).name if Path(options.model).is_dir() else options.model


def _visible_gpus() -> int:
    import torch

    return max(1, torch.accelerator.device_count())


ENGINES: dict[str, Build] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "openai": _openai,
    "extractive": _extractive,
    "titles": _titles,
}

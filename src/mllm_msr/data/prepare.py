"""Raw data -> the data folder of a run: log, catalogue with images, ranking tasks, popularity, and a report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.data.cleaning import clean
from mllm_msr.data.item_images import broken_images, counted, download, with_files, without_images, write_items
from mllm_msr.data.leakage import check_own_words
from mllm_msr.data.raw import RawData
from mllm_msr.data.statistics import statistics
from mllm_msr.data.write_tasks import write_tasks
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, POPULARITY, TASKS
from mllm_msr.records.sections import PrepareOptions

Figures = Callable[[pl.LazyFrame, pl.DataFrame], Mapping[str, float]]
README = """---
configs:
- config_name: tasks
  default: true
  data_files: tasks.parquet
- config_name: items
  data_files: items.parquet
- config_name: interactions
  data_files: interactions.parquet
- config_name: popularity
  data_files: popularity.parquet
---
"""


def prepare(
    raw: RawData,
    output: Path,
    options: PrepareOptions,
    source: str,
    popularity_figures: Figures,
    inputs: Sequence[Any] = (),
) -> dict[str, Any]:
    """Clean, split, sample and write; returns the report that is also written as ``report.json``.

    Writes interactions, items (images embedded, read by ``datasets`` as an ``Image`` column), tasks and popularity as
    Parquet into the folder ``output``, under ``max_history`` also ``seen``, the pairs that it cut off, and a README.md
    that makes ``load_dataset(output, "items")`` work. The caller moves the folder into place when it is whole. Images
    given by URL are fetched into the folder ``image_cache`` beside ``output``. Memory: the log and one batch of images
    or tasks.

    Args:
        source: names the data in the report.
        popularity_figures: what ranking the tasks of a split by the popularity table scores, see
            :func:`mllm_msr.evaluation.places.popularity_figures`.
        inputs: files and their hashes, for the report.

    Raises:
        ValueError: nothing is left.
        LeakageError: the tasks are not sound.
    """
    output.mkdir(parents=True, exist_ok=True)
    dropping = options.missing_images == "drop"  # then the images of all that may stay must be known before cleaning
    keeping = replace(options, missing_images="keep", limit_users=None, max_history=None)
    data = clean(raw, keeping if dropping else options, output)
    files, failed = download(data.items, output.parent / "image_cache")
    data.items = with_files(data.items, files)
    skipped = raw.skipped + counted("not downloaded", failed)
    if dropping:
        broken = broken_images(data.items, options)
        skipped += counted("broken image, item dropped", broken)
        data.log.close()
        usable = without_images(with_files(raw.items, files), [item for ids in broken.values() for item in ids])
        data = clean(replace(raw, items=usable), options, output)
    check_own_words(data.items)
    with INTERACTIONS.writer(output / Path(INTERACTIONS.file).name) as write:
        for rows in data.log.parts():
            write(data.log.frame(rows))
    if options.max_history is not None:  # so that the negatives can be proved again without the raw data
        with CUT_INTERACTIONS.writer(output / Path(CUT_INTERACTIONS.file).name) as write:
            for rows in data.log.parts("seen"):
                write(data.log.frame(rows))
    n_images, broken = write_items(output, data.items, options)
    protocol = write_tasks(output, data.log, options)
    tasks = TASKS.scan(output / Path(TASKS.file).name)
    popularity = POPULARITY.read(output / Path(POPULARITY.file).name)
    protocol["popularity"] = {
        split: popularity_figures(tasks.filter(split=split), popularity)
        for split in ("validation", "test")
        if protocol[f"{split}_tasks"]
    }
    report = {
        "source": source,
        "inputs": list(inputs),
        "version": version("mllm-msr"),
        "options": asdict(options),
        "cleaning": data.table,
        "skipped": skipped + counted("broken image", broken),
        "statistics": statistics(data, n_images),
        "protocol": protocol,
    }
    data.log.close()
    (output / "README.md").write_text(README, encoding="utf-8")
    (output / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report

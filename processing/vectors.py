"""The table of item vectors: what is there already by content is not computed again, nor lost when a run is killed."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from mllm_msr.data.images import BrokenImage, decode
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.modeling.item_vectors import SentenceInputs, encode_items, load_item_model
from mllm_msr.processing.auto import MllmMsrProcessor
from mllm_msr.records.schema import ITEM_VECTORS
from mllm_msr.records.storage import digest, sweep

Encode = Callable[[Sequence[Candidate]], np.ndarray]  # N items to (N, F) float16


def item_encoder(
    name: str, revision: str | None, dtype: str | None, prompts: dict[str, str], item_noun: str, token_budget: int
) -> Encode:
    """A model of transformers that makes vectors of items; one without a chat, such as an encoder of sentences, too."""
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
    config = AutoConfig.from_pretrained(name, revision=revision or "main")
    processor: Any
    named = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if tokenizer.chat_template is None and named is None and config.model_type != "mllm_msr":
        processor = SentenceInputs(tokenizer, getattr(config, "max_position_embeddings", None))
    else:
        processor = MllmMsrProcessor.from_backbone(name, revision, prompts, item_noun)
    model = load_item_model(name, revision, dtype)
    return lambda items: encode_items(model, processor, items, token_budget)


def vector_table(
    items: pl.DataFrame,
    summaries: Mapping[str, str],
    load_encoder: Callable[[], Encode],
    facts: Sequence[object],
    folder: Path,
    batch_size: int = 512,
    images: bool = True,
) -> pl.DataFrame:
    """The table ``ITEM_VECTORS``, by item id.

    Args:
        items: ``item_id``, ``title``, ``text``, ``image`` (struct with ``bytes``, or null).
        summaries: by item id, what is read after an item's text; items may be absent.
        load_encoder: called only if a vector is missing.
        facts: all that a vector depends on beside its item.
        folder: of the vectors by content; every ``batch_size`` new ones are a file, joined at the end.
    """
    items = items.sort("item_id")
    ids, titles, texts = (items[name].fill_null("").to_list() for name in ("item_id", "title", "text"))
    pixels = items["image"].struct.field("bytes").to_list() if images else [None] * len(ids)
    words = ["\n".join(filter(None, (text, summaries.get(item)))) for item, text in zip(ids, texts, strict=True)]
    hashes = [hashlib.sha256(image).hexdigest() if image else None for image in pixels]
    keys = [digest(*facts, *parts) for parts in zip(titles, words, hashes, strict=True)]
    have = _stored(folder)
    missing = list(dict(zip(reversed(keys), reversed(range(len(keys))), strict=True)).values())
    missing = sorted(place for place in missing if keys[place] not in have)
    encode = load_encoder() if missing else None
    with tqdm(total=len(missing), desc="item vectors", unit="item", disable=not missing) as bar:
        for begin in range(0, len(missing), batch_size):
            places = missing[begin : begin + batch_size]
            candidates = [Candidate("", titles[place], words[place], _image(pixels[place])) for place in places]
            assert encode is not None
            vectors = dict(zip((keys[place] for place in places), encode(candidates), strict=True))
            _store(folder, vectors)
            have |= vectors
            bar.update(len(places))
    wanted = {key: have[key] for key in keys}
    if missing or len(wanted) < len(have):
        _join(folder, wanted)
    return ITEM_VECTORS.frame().vstack(_frame(ids, [have[key] for key in keys], keys))


def _image(content: bytes | None) -> object:
    try:
        return decode(content) if content else None
    except BrokenImage:  # prepared images are sound, and one that is not must not stop a million others
        return None


def _frame(ids: Sequence[str], vectors: Sequence[np.ndarray], keys: Sequence[str]) -> pl.DataFrame:
    column = pl.Series("vector", np.stack(vectors)) if vectors else pl.Series("vector", [], pl.List(pl.Float16))
    return pl.DataFrame({"item_id": ids, "vector": column, "key": keys}).cast(pl.Schema(ITEM_VECTORS.columns))


def _stored(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    have: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            frame = ITEM_VECTORS.read(path)
        except (ValueError, OSError, pl.exceptions.PolarsError):
            path.unlink()  # damaged: its vectors are computed again
            continue
        if len(frame):
            vectors = frame["vector"].explode(empty_as_null=False).to_numpy()
            have |= zip(
                frame["key"].to_list(),
                np.split(vectors, frame["vector"].list.len().cum_sum()[:-1].to_list()),
                strict=True,
            )
    return have


def _store(folder: Path, vectors: Mapping[str, np.ndarray]) -> Path:
    path = folder / f"{digest(*vectors)}.parquet"
    ITEM_VECTORS.write(_frame([""] * len(vectors), list(vectors.values()), list(vectors)), path)
    return path


def _join(folder: Path, vectors: Mapping[str, np.ndarray]) -> None:
    """All vectors in one file, without those that no item has any more."""
    whole = {_store(folder, vectors)} if vectors else set()
    for path in set(folder.glob("*.parquet")) - whole:
        path.unlink()

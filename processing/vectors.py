"""The table of item vectors: what is there already by content is not computed again, nor lost when a run is killed."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from mllm_msr.modeling.inputs import Candidate
from mllm_msr.modeling.item_vectors import BUDGET, PlainInputs, encode_items, load_item_model, to_half
from mllm_msr.modeling.naming import pinned
from mllm_msr.processing.auto import MllmMsrProcessor
from mllm_msr.processing.encoded_items import EncodedItem
from mllm_msr.processing.open_workers import open_workers
from mllm_msr.processing.workers import Folder, Workers
from mllm_msr.records.cluster import Cluster
from mllm_msr.records.recipe import Recipe, backbone_path
from mllm_msr.records.schema import ITEM_VECTORS
from mllm_msr.records.storage import digest, sweep

Encode = Callable[[Sequence[Candidate]], np.ndarray]  # N items to (N, F) float16
VectorRequest = Mapping[str, EncodedItem]  # by key
Made = dict[str, np.ndarray]  # by key, each (F,) float16
VectorWorkers = Workers[VectorRequest, Made]
REMEDY = "name another by vectors.model, or give your own vectors by --vectors or vectors.column"


def item_model(recipe: Recipe) -> tuple[str, str | None]:
    """Name or folder, and revision, of the model that makes a recipe's item vectors; ValueError if it names none."""
    if recipe.vectors.model:
        return backbone_path(recipe.vectors.model), recipe.vectors.revision
    if name := recipe.training.get("model_name_or_path"):
        return backbone_path(name), recipe.training.get("model_revision")
    raise ValueError("vectors.model: name the model whose vectors items get, or a file of them by --vectors")


def recipe_encoder(recipe: Recipe, folder: Path | None = None) -> Encode:
    """What makes the item vectors of a recipe, loaded; ``folder``: where its model lies, if not where it says.

    Raises:
        ValueError: the model cannot be loaded, or makes no vectors of items; the message names it and the remedy.
    """
    options, (name, revision) = recipe.vectors, item_model(recipe)
    where = str(folder or name)
    dtype = options.dtype or recipe.training.get("dtype")
    prompts = {prompt: text for prompt, text in recipe.prompts.items() if prompt == "late_item"}
    try:
        if options.engine == "sentence-transformers":
            return sentence_encoder(where, revision, dtype)
        return item_encoder(where, revision, dtype, prompts, recipe.item_noun, options.token_budget)
    except Exception as error:  # of any library that reads one of its many files
        reason = " ".join(str(error).split())
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{name} makes no item vectors: {reason}; {REMEDY}") from error


def open_vector_workers(recipe: Recipe, cluster: Cluster | None) -> AbstractContextManager[VectorWorkers]:
    """Who makes the item vectors of a recipe: this process or workers of a cluster, to whom a local model is sent."""
    model = Path(item_model(recipe)[0])
    folders = [Folder(model.resolve())] if cluster and model.is_dir() else []
    return open_workers(cluster, partial(_vector_worker, recipe), folders)


def _vector_worker(recipe: Recipe, *models: Path) -> Callable[[VectorRequest], Made]:
    return partial(encode_request, recipe_encoder(recipe, *models))


def encode_request(encode: Encode, request: VectorRequest) -> Made:
    """The vectors by key."""
    vectors = encode([item.decoded() for item in request.values()])
    return dict(zip(request, vectors, strict=True))


def item_encoder(
    name: str,
    revision: str | None,
    dtype: str | None,
    prompts: dict[str, str],
    item_noun: str,
    token_budget: int | None = None,
) -> Encode:
    """A model of transformers: its mean last hidden state over an item's prompt, or, without a chat, over its words."""
    revision = pinned(name, revision) or "main"
    where = {"revision": revision}
    config = AutoConfig.from_pretrained(name, **where)
    tokenizer = AutoTokenizer.from_pretrained(name, **where)
    processor: Any
    if config.model_type in PROCESSOR_MAPPING_NAMES or config.model_type == "mllm_msr" or tokenizer.chat_template:
        processor = MllmMsrProcessor.from_backbone(name, revision, prompts, item_noun)
    else:
        positions = getattr(config, "max_position_embeddings", None) or BUDGET
        processor = PlainInputs(tokenizer, min(positions, tokenizer.model_max_length, BUDGET))
    model = load_item_model(name, revision, dtype)
    return lambda items: encode_items(model, processor, items, token_budget)


def sentence_encoder(name: str, revision: str | None, dtype: str | None) -> Encode:
    """A model of sentence-transformers, with its own pooling, of title and text and, where it sees images, the image.

    A model that reads a text or an image, such as CLIP, gives both vectors, one after the other; zeros for no image.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        needed = "sentence-transformers is not installed: `pip install 'mllm-msr[sentence-transformers]'`"
        raise ValueError(f"vectors.engine: {needed}") from error
    model = SentenceTransformer(name, revision=pinned(name, revision), model_kwargs={"dtype": dtype or "auto"})
    together = model.supports(("image", "text"))
    apart = not together and model.supports("image")

    def encode(items: Sequence[Candidate]) -> np.ndarray:
        inputs: list[Any] = [f"{item.title}\n{item.text}".strip() for item in items]
        shown = [place for place, item in enumerate(items) if item.image is not None]
        if together:
            for place in shown:
                inputs[place] = {"text": inputs[place], "image": items[place].image}
        vectors = model.encode(inputs, convert_to_tensor=True).float()
        if apart:
            pixels = torch.zeros_like(vectors)
            if shown:
                pixels[shown] = model.encode([items[place].image for place in shown], convert_to_tensor=True).float()
            vectors = torch.cat([vectors, pixels], dim=1)
        return to_half(vectors).cpu().numpy()

    return encode


def item_words(text: str, summary: str | None) -> str:
    """What a vector rests on beside title and image: the item's text, and after it the summary."""
    return "\n".join(filter(None, (text, summary)))


def vector_table(
    items: pl.DataFrame,
    summaries: Mapping[str, str],
    workers: VectorWorkers,
    facts: Sequence[object],
    folder: Path,
    batch_size: int = 512,
    images: bool = True,
) -> pl.DataFrame:
    """The table ``ITEM_VECTORS``, by item id.

    Args:
        items: ``item_id``, ``title``, ``text``, ``image`` (struct with ``bytes``, or null).
        summaries: by item id, what is read after an item's text; items may be absent.
        workers: who makes the vectors, asked only for those that are missing.
        facts: all that a vector depends on beside its item.
        folder: of the vectors by content; every ``batch_size`` are a file, joined at the end. Batches are cut from all
            items, so that a resumed stage computes the same ones, by however many workers.
    """
    items = items.sort("item_id")
    ids, titles, texts = (items[name].fill_null("").to_list() for name in ("item_id", "title", "text"))
    pixels = items["image"].struct.field("bytes").to_list() if images else [None] * len(ids)
    words = [item_words(text, summaries.get(item)) for item, text in zip(ids, texts, strict=True)]
    hashes = [hashlib.sha256(image).hexdigest() if image else None for image in pixels]
    keys = [digest(*facts, *parts) for parts in zip(titles, words, hashes, strict=True)]
    have, place = _stored(folder), {key: number for number, key in reversed(list(enumerate(keys)))}
    order = sorted(place, key=place.__getitem__)
    missing = [key for key in order if key not in have]

    def requests() -> Iterator[VectorRequest]:
        for begin in range(0, len(order), batch_size):
            places = {key: place[key] for key in order[begin : begin + batch_size] if key not in have}
            if places:
                yield {key: EncodedItem(ids[n], titles[n], words[n], pixels[n]) for key, n in places.items()}

    with tqdm(total=len(missing), desc="item vectors", unit="item", leave=False, disable=not missing) as bar:
        for vectors in workers.map(requests()):
            if wrong := [key for key, vector in vectors.items() if not np.isfinite(vector).all()]:
                what = f"the model's vector of item {ids[place[wrong[0]]]!r} is not finite"
                raise ValueError(f"{what}: try --set vectors.dtype=float32, or another vectors.model")
            _store(folder, vectors)
            have |= vectors
            bar.update(len(vectors))
    wanted = {key: have[key] for key in keys}
    if missing or len(wanted) < len(have):
        _join(folder, wanted)
    print(f"item vectors: {len(missing)} computed, {len(wanted) - len(missing)} as they were", flush=True)
    return ITEM_VECTORS.frame().vstack(_frame(ids, [have[key] for key in keys], keys))


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

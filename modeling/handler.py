"""`handler.py` of Hugging Face Inference Endpoints: a released repository is deployed as it is.

An endpoint calls it with the JSON of a request, `{"inputs": {...}, "parameters": {...}}`.
"""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MOST_PIXELS = 50_000_000  # of an image
RERANK = ("query", "documents", "top_n", "return_documents")


class EndpointHandler:
    """The pipeline of the repository at ``path``, for requests in JSON.

    `inputs` is what the pipeline takes: `candidates`, with a `preference` and perhaps `recent` items, or with a
    `history`. The answer has a mapping for each candidate, best first: `index`, `logit`, `score`, `preference` and,
    where they were given, `item_id`, `title` and `text`. Or `inputs` is what rerankers take: a `query`, which is the
    preference, `documents` (texts, of which the first line is the title, or mappings), and perhaps `top_n` and
    `return_documents`; the answer then has `results` with `index` and `relevance_score`. Images are base64 or data
    URLs; none is fetched from elsewhere. `parameters` are the pipeline's (`top_k`, `block_size`, ...).

    Raises:
        TypeError, ValueError: what is wrong with a request.
    """

    def __init__(self, path: str = "") -> None:
        task: Any = "sequential-recommendation"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline: Any = pipeline(task, model=path, trust_remote_code=True, device=device)
        self.candidate: Any = get_class_from_dynamic_module("inputs.Candidate", path)

    def __call__(self, data: Mapping[str, Any]) -> Any:
        inputs = data.get("inputs")
        if not isinstance(inputs, Mapping):
            raise ValueError("`inputs` is a mapping with `candidates`, or with `query` and `documents`")
        parameters = data.get("parameters") or {}
        if "documents" in inputs:
            return self.rerank(inputs, parameters)
        given = {name: _with_images(value) for name, value in inputs.items()}
        return [_plain(candidate) for candidate in self.pipeline(given, **parameters)]

    def rerank(self, inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
        """See the class."""
        if unknown := [name for name in inputs if name not in RERANK]:
            raise ValueError(f"`inputs` has the unknown key {unknown[0]!r}; known are {', '.join(RERANK)}")
        documents = inputs["documents"]
        if not isinstance(inputs.get("query"), str) or not isinstance(documents, list):
            raise ValueError("`query` is a text and `documents` a list")
        candidates = [self.candidate.of_document(document) for document in _with_images(documents)]
        request = {"preference": inputs["query"], "candidates": candidates}
        results = []
        for ranked in self.pipeline(request, **{**parameters, "top_k": inputs.get("top_n")}):
            result = {"index": ranked["index"], "relevance_score": ranked["score"]}
            results.append(
                result | ({"document": documents[ranked["index"]]} if inputs.get("return_documents") else {})
            )
        return {"results": results}


def _with_images(value: Any) -> Any:
    """A part of a request with the images of its items opened."""
    if not isinstance(value, list):
        return value
    opened = []
    for number, item in enumerate(value):
        if isinstance(item, Mapping) and item.get("image") is not None:
            item = {**item, "image": _image(item["image"], number)}
        opened.append(item)
    return opened


def _image(content: Any, number: int) -> Image.Image:
    try:
        raw = base64.b64decode(content.rpartition(";base64,")[2], validate=True)
        image = Image.open(io.BytesIO(raw))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
        return image
    except (AttributeError, binascii.Error, OSError, ValueError) as error:
        raise ValueError(f"the image of item {number} is not a whole image as base64 or data URL: {error}") from error


def _plain(candidate: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: candidate[name] for name in ("item_id", "title", "text") if candidate.get(name)}
    return {**shown, **{name: candidate[name] for name in ("index", "logit", "score", "preference")}}

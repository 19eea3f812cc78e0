"""The recommender as a reranker: `CrossEncoder(repository, trust_remote_code=True)` of sentence-transformers (>= 5.4).

A released repository names this file in its `modules.json`. The library's own module for language models would have to
write our prompt by a chat template, which can neither shorten it nor keep what users wrote from becoming control
tokens, and reads one token an answer. So this module scores as `Recommender` does, and hands the library's `LogitScore`
the answers' logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from transformers import AutoModel, AutoProcessor
from transformers.image_utils import load_image

from .inputs import Candidate, User
from .naming import pinned
from .ranking import Recommender


class RecommendationAnswers(InputModule):
    """The first module of a `CrossEncoder`, for ranking; it keeps no graph, so that it cannot be trained there.

    A pair is a user and a candidate. A user is the preference in words, or a mapping of `preference` and `recent`
    items. A candidate is a text, whose first line is the title, or a mapping of `title`, `text` and `image` (an opened
    image, or its path, URL or base64).
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        *,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "RecommendationAnswers":
        """Called by the library: the model and the processor that lie beside this file."""
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_folder, "local_files_only": local_files_only}
        hub["revision"] = pinned(model_name_or_path, revision, **hub) or "main"
        hub["trust_remote_code"] = trust_remote_code
        return cls(
            AutoModel.from_pretrained(model_name_or_path, **hub, **(model_kwargs or {})),
            AutoProcessor.from_pretrained(model_name_or_path, **hub, **(processor_kwargs or {})),
        )

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image", ("image", "text")]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """P pairs as `User` and `Candidate` objects, which the forward makes tokens of."""
        if prompt:
            raise ValueError("the recommender carries its own prompts: leave `prompt` and `prompt_name` out")
        return {"pairs": [(_user(query), _candidate(document)) for query, document in inputs]}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `causal_logits`, (P, 1, 2) float32: of No, which is the zero of the scale, and of Yes."""
        rows: dict[User, list[str]] = {}  # pairs of one user share what their prompts begin with
        for number, (user, _) in enumerate(features["pairs"]):
            rows.setdefault(user, []).append(str(number))
        catalogue = {str(number): candidate for number, (_, candidate) in enumerate(features["pairs"])}
        scores = Recommender(self.model, self.processor).score(list(rows), list(rows.values()), catalogue)
        logits = torch.zeros(len(catalogue), 1, 2, device=self.model.device)
        for row, values in zip(rows.values(), scores, strict=True):
            logits[[int(number) for number in row], 0, 1] = torch.from_numpy(values).to(logits.device)
        return {**features, "causal_logits": logits}


def _user(query: Any) -> User:
    return User(query) if isinstance(query, str) else User.of(query)


def _candidate(document: Any) -> Candidate:
    if not isinstance(document, str | dict):  # the library's way to give an image alone
        document = {"image": document}
    if isinstance(document, dict) and isinstance(document.get("image"), str):
        document = {**document, "image": load_image(document["image"])}
    return Candidate.of_document(document)

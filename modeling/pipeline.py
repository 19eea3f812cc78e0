"""`pipeline("sequential-recommendation", model=...)`: a user and candidates in, the candidates ranked out."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

import torch
from transformers import BatchFeature, Pipeline

from .generated_text import tidy
from .inputs import Candidate, HistoryItem, User, as_candidates
from .lora import adapter_layers, without_adapter
from .preference import PreferenceStep, preference_waves, split_history
from .ranking import Recommender, in_order
from .recommending import Recommendation, Wanted, recommend

TASK = "sequential-recommendation"
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline.SequentialRecommendationPipeline", "pt": ["AutoModel"], "type": "multimodal"}
}
REQUEST = ("preference", "recent", "history", "candidates")

Input = TypeVar("Input")


@dataclass(frozen=True)
class Writing:
    """How texts are written from a history, see :class:`SequentialRecommendationPipeline`."""

    block_size: int = 3
    max_new_tokens: int = 128
    write_batch_size: int = 8


@dataclass(frozen=True)
class ChosenItem:
    """An item of a history, and its summary if it has one already."""

    item: Candidate
    summary: str

    @classmethod
    def of(cls, value: Any) -> "ChosenItem":
        """From a mapping with any of a candidate's keys and ``summary``; TypeError or ValueError for others."""
        if not isinstance(value, Mapping):
            return cls(Candidate.of(value), "")
        shown = {name: part for name, part in value.items() if name != "summary" and part is not None}
        if not value.get("summary"):
            return cls(Candidate.of(shown), "")
        return cls(Candidate.of(shown) if shown else Candidate(), HistoryItem.of({"summary": value["summary"]}).summary)


@dataclass(frozen=True)
class Request:
    """Candidates, and either a user in words or the items that a user has chosen."""

    candidates: list[Candidate]
    user: User | None
    history: list[ChosenItem]

    @classmethod
    def of(cls, request: Any) -> "Request":
        """From a mapping; TypeError or ValueError says what is wrong with it."""
        if not isinstance(request, Mapping) or ("preference" in request) == ("history" in request):
            raise ValueError("a request is a dict with `candidates` and either a `preference` or a `history`")
        if unknown := [key for key in request if key not in REQUEST]:
            raise ValueError(f"a request has the unknown key {unknown[0]!r}; known are {', '.join(REQUEST)}")
        candidates = as_candidates(request.get("candidates"))
        if not candidates:
            raise ValueError("a request needs at least one of `candidates`, and either a `preference` or a `history`")
        if "preference" in request:
            words = {name: request[name] for name in ("preference", "recent") if name in request}
            return cls(candidates, User.of(words), [])
        if "recent" in request:
            raise ValueError("`recent` goes with a `preference`; the latest items of a `history` are recent anyway")
        return cls(candidates, None, _chosen(request["history"]))


class SequentialRecommendationPipeline(Pipeline):
    """Rank candidates for a user.

    A request is `{"preference": str, "candidates": [...]}`, with the items chosen since the preference was written as
    `recent` if there are any. Or it has, in their place, the `history` of what the user has chosen, oldest first. From
    it the backbone writes a preference as in the paper: each item is described (unless it has a `summary`), then
    history block after history block condensed. The items after the last whole block are shown as they are, which is
    what the model was trained on. Candidates and items are dicts of `title`, `text` and `image`, of which one is
    enough, or `Candidate` objects; candidates may have an `item_id`.

    The answer has a dict for each candidate, best first: `title`, `text`, `image`, `item_id`, `index` (its place in the
    request), `logit`, `score` (p(yes) / (p(yes) + p(no))) and the `preference` that it was ranked for. Several requests
    give a list of answers, and `batch_size` of them share their forward passes.

    Example:

    ```python
    rank = pipeline("sequential-recommendation", model="org/mllm-msr", trust_remote_code=True)
    rank({"preference": "quiet red films", "candidates": [{"title": "The Sea", "image": poster}, {"title": "Noise"}]})
    # [{"title": "The Sea", "image": ..., "index": 0, "logit": 1.3, "score": 0.79, ...}, {"title": "Noise", ...}]
    ```

    Args:
        top_k: how many candidates to return, all by default.
        block_size: items of a history block (paper: 3).
        max_new_tokens: of each text written from a history (128).
        write_batch_size: how many texts are written at a time (8).
    """

    model: Any  # MllmMsrForRecommendation
    processor: Any  # MllmMsrProcessor
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_video_processor: Any = False

    def __new__(cls, model: Any = None, *arguments: Any, **options: Any) -> Any:
        """The package's own pipeline for a model of the package: code of a repository may be of another version."""
        room = type(model).__module__.rpartition(".")[0]
        fetched = [place.startswith("transformers_modules.") for place in (cls.__module__, room)]
        if fetched == [True, False] and type(model).__name__ == "MllmMsrForRecommendation":
            own = import_module(f"{room}.pipeline").SequentialRecommendationPipeline
            return own(model, *arguments, **options)
        return super().__new__(cls)

    split_history = staticmethod(split_history)  # for pages that show a history without this package

    def preferences(self, history: Any, **writing: Any) -> Iterator[str]:
        """The preference after each whole history block, as it is being written.

        Args:
            history: items as in a request.
            writing: `block_size`, `max_new_tokens`, `write_batch_size`, where they differ from the pipeline's own.
        """
        own = {name: value for name, value in self._forward_params.items() if name != "top_k"}
        options = Writing(**{**own, **writing})
        for wave in self._waves(self._described([_chosen(history)], options), options):
            yield wave[0][1]

    @cached_property
    def recommender(self) -> Recommender:
        """The model, ready to rank, which keeps what it has computed of images that came prepared."""
        return Recommender(self.model, self.processor)

    def recommend(
        self, history: Sequence[str], catalogue: Mapping[str, Any], user: Any = None, **wanted: Any
    ) -> list[Recommendation]:
        """The best items of a whole catalogue that a user has not chosen yet, best first.

        The heads of the checkpoint rank all of it by the history, and the answer the best of it by the user in words;
        the fused score orders them. Without heads or a history the answer ranks all of it.

        Args:
            history: ids of all items chosen so far, oldest first.
            catalogue: items as candidates of a request are, by id; each is looked up if the answer is asked of it.
            user: in words: a `preference`, and the `recent` items if there are any.
            wanted: fields of :class:`Wanted`: `n`, `by`, `rerank`, `exclude`, `only`, `allowed`, `explain`.

        Raises:
            Refused: see :func:`~recommending.recommend`.
        """
        options = Wanted(**wanted)
        options = replace(options, only=list(catalogue)) if options.only is None else options
        words, ranker = User.of(user or {"preference": ""}), self.model.item_ranker

        def answer(ids: list[str]) -> Any:
            return self.recommender.score([words], [ids], catalogue)[0]

        return recommend(ranker, history, catalogue, options, answer)[1]

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = ("top_k", *(each.name for each in fields(Writing)))
        for name, value in given.items():
            if name not in known:
                raise TypeError(f"unknown parameter {name!r}; known are {', '.join(known)}")
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not whole and (name, value) != ("top_k", None):
                raise ValueError(f"{name}={value!r}: must be a number of at least 1")
        return {}, given, {}  # all are of the forward step, which knows their defaults

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        return {"requests": [Request.of(input_)]}

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """Answers in the order of the requests, `batch_size` at a time: they are no tensors to be collated."""
        waiting = iter(inputs)
        while batch := list(islice(waiting, batch_size)):
            yield from self.forward({"requests": [Request.of(request) for request in batch]}, **forward_params)

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        requests: list[Request] = input_tensors["requests"]
        top_k = forward_parameters.pop("top_k", None)
        users = self._users(requests, Writing(**forward_parameters))
        names = [
            [f"{number} {place}" for place in range(len(request.candidates))] for number, request in enumerate(requests)
        ]
        catalogue = {
            name: candidate
            for row, request in zip(names, requests, strict=True)
            for name, candidate in zip(row, request.candidates, strict=True)
        }
        logits = self.recommender.score(users, names, catalogue)
        return [
            [
                {**vars(ranked.candidate), "index": ranked.index, "logit": ranked.logit, "score": ranked.score}
                | {"preference": user.preference}
                for ranked in in_order(request.candidates, row, top_k)
            ]
            for user, request, row in zip(users, requests, logits, strict=True)
        ]

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> Any:
        return model_outputs[0]

    def _users(self, requests: list[Request], writing: Writing) -> list[User]:
        """The users of the requests in words."""
        histories = self._described([request.history for request in requests], writing)
        preferences = [""] * len(requests)
        for wave in self._waves(histories, writing):
            for step, text in wave:
                preferences[step.user] = text
        users = []
        for request, history, preference in zip(requests, histories, preferences, strict=True):
            recent = split_history(history, writing.block_size)[1]
            recent = [HistoryItem(summary=item.summary) if item.summary else item for item in recent]  # as trained
            users.append(request.user or User(preference, recent))
        return users

    def _described(self, histories: list[list[ChosenItem]], writing: Writing) -> list[list[HistoryItem]]:
        """The items of histories in words; what has no summary gets one."""
        new = [chosen.item for history in histories for chosen in history if not chosen.summary]
        written = self._write(self.processor.item_summary, new, writing)
        return [
            [HistoryItem(chosen.item.title, chosen.summary or next(written)) for chosen in history]
            for history in histories
        ]

    def _waves(
        self, histories: list[list[HistoryItem]], writing: Writing
    ) -> Iterator[list[tuple[PreferenceStep[HistoryItem], str]]]:
        """See :func:`preference_waves`."""

        def prompts(steps: Sequence[PreferenceStep[HistoryItem]]) -> BatchFeature:
            return self.processor.preference([step.items for step in steps], [step.previous for step in steps])

        return preference_waves(histories, writing.block_size, lambda steps: self._write(prompts, steps, writing))

    def _write(
        self, prompts: Callable[[Sequence[Input]], BatchFeature], inputs: Sequence[Input], writing: Writing
    ) -> Iterator[str]:
        """The backbone's text for each input, in their order; a live adapter is switched off meanwhile.

        Weights that were trained whole, or merged, say Yes and No in the middle of texts: they write without these two.
        """
        trained = {} if any(adapter_layers(self.model)) else self.model.config.answer_token_ids or {}
        without = [ids[0] for ids in trained.values()] or None
        for start in range(0, len(inputs), writing.write_batch_size):
            batch = prompts(inputs[start : start + writing.write_batch_size]).to(self.model.device)
            with torch.inference_mode(), without_adapter(self.model):
                options = {"max_new_tokens": writing.max_new_tokens, "do_sample": False, "suppress_tokens": without}
                ids = self.model.generate(**batch, **options)
            texts = self.processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            yield from map(tidy, texts)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and processor; the model brings this pipeline's code along."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _chosen(history: Any) -> list[ChosenItem]:
    if isinstance(history, str | bytes | Mapping) or not isinstance(history, Sequence):
        raise TypeError(f"`history` is a list of items, oldest first, not {type(history).__name__}")
    return [ChosenItem.of(item) for item in history]

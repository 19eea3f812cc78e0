"""The processor: users, candidates, items and histories in; ready batches for any image-text-to-text backbone out."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import logging, resolve_revision

from .backbone_images import NoImages, PreparedImage, build_backbone_processor, collate_images
from .chat_template import ChatTemplate
from .prompt_encoding import Prompt, PromptEncoder, PromptRefused
from .prompts import PROMPTS
from .safe_text import OPEN, Field, mark, split

logger = logging.get_logger(__name__)
MOST_CHARACTERS = 16  # of a text for each token that a prompt may have
TYPE_IDS = {"Gemma3Processor": "token_type_ids"}  # how a backbone calls its token types, where not mm_token_type_ids
TEXTUAL = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")


class PromptBatch(BatchFeature):
    """A batch of B prompts, and what went into it.

    Args:
        data: the tensors.
        images: those that the prompts show, in their order.
        shortened: how many prompts lost some of their `history`, `candidate` or `candidate_title`.
    """

    def __init__(
        self,
        data: dict[str, Any],
        images: Sequence[PreparedImage] = (),
        shortened: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(data)
        self.images, self.shortened = images, Counter(shortened or {})


class LateBlocks(TypedDict):
    """What a model with `interaction="late"` reads: users and items each once, and how every prompt ends, (A,)."""

    users: PromptBatch
    items: PromptBatch
    answer_ids: torch.Tensor


class MllmMsrProcessor(ProcessorMixin):
    """Turns items, histories and candidates into batches for [`MllmMsrForRecommendation`].

    Users, candidates and history items are any objects with the attributes of those in `modeling/inputs.py`.

    Args:
        image_processor: the backbone's; `None` for a text-only language model, which can then only write preferences.
        tokenizer: the backbone's.
        backbone_processor_class: name of the backbone's processor class in transformers, which expands images into
            image tokens; `None` for a text-only language model.
        backbone_processor_kwargs: its other `__init__` parameters.
        prompts: Jinja templates that replace the defaults of the same name in `prompts.py`.
        item_noun: what the prompts call an item: video, product, film, ...
        max_length: the most tokens of a prompt with its answer; `None` is no limit. What is longer loses text: of the
            history first, then of the candidate; images and answers are never cut. See `PromptBatch.shortened`.
        chat_template: the backbone's.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        backbone_processor_class=None,
        backbone_processor_kwargs=None,
        prompts=None,
        item_noun="item",
        max_length=None,
        chat_template=None,
    ):
        unknown = set(prompts or {}) - set(PROMPTS)
        if unknown:
            raise ValueError(f"unknown prompts {sorted(unknown)}; there are {sorted(PROMPTS)}")
        if not item_noun.strip():
            raise ValueError("item_noun is empty; name what an item is called in prompts, such as film")
        image_processor = image_processor if image_processor is not None else NoImages()
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if self.chat_template is None and tokenizer.chat_template is None:
            raise ValueError(
                "the backbone has no chat template: give one as chat_template=..., or as its file chat_template.jinja"
            )
        self.backbone_processor_class = backbone_processor_class
        self.backbone_processor_kwargs = backbone_processor_kwargs or {}
        self.prompts = {**PROMPTS, **(prompts or {})}
        self.item_noun = item_noun
        self.max_length = max_length
        self._backbone: Any = None
        if backbone_processor_class is not None:
            self._backbone = build_backbone_processor(
                backbone_processor_class, image_processor, tokenizer, self.backbone_processor_kwargs
            )
        self._encoder = PromptEncoder(tokenizer, self._backbone.image_token_ids if self._backbone is not None else ())
        self._skeletons: dict[str, list[str | int]] = {}
        self._jinja = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
        self._image_text: str | None = None
        self._answers: dict[str, list[int]] | None = None

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """The image processor by its PIL backend whatever is installed: others give slightly different pixels."""
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        if (processor_dict or {}).get("backbone_processor_class") is None:
            return [NoImages(), tokenizer]
        return [AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kwargs), tokenizer]

    @classmethod
    def from_backbone(
        cls,
        id_or_path: str,
        revision: str | None = None,
        prompts: dict[str, str] | None = None,
        item_noun: str = "item",
        max_length: int | None = None,
    ) -> "MllmMsrProcessor":
        """The processor for a backbone's repository: a stock image-text-to-text model or a text-only language model.

        Args:
            max_length: as in the class; by default as many tokens as the backbone has positions.
        """
        where: dict[str, Any] = {"revision": resolve_revision(id_or_path, revision) or "main"}
        tokenizer = AutoTokenizer.from_pretrained(id_or_path, **where)
        config = AutoConfig.from_pretrained(id_or_path, **where)
        if max_length is None:
            max_length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        own = {"prompts": prompts, "item_noun": item_noun, "max_length": max_length}
        if config.model_type == "mllm_msr":  # a trained recommender in its place
            whole = cls.from_pretrained(id_or_path, **where)
            kind, settings = whole.backbone_processor_class, whole.backbone_processor_kwargs
            return cls(whole.image_processor, tokenizer, kind, settings, chat_template=whole.chat_template, **own)
        name = transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES.get(config.model_type)
        if name is None:
            return cls(None, tokenizer, chat_template=tokenizer.chat_template, **own)
        settings, _ = ProcessorMixin.get_processor_dict(id_or_path, **where)
        backbone_class = getattr(transformers, settings.get("processor_class") or name)
        parts = [*backbone_class.get_attributes(), "processor_class", "auto_map", "chat_template"]
        template = settings.get("chat_template") or tokenizer.chat_template
        template = template["default"] if isinstance(template, dict) else template
        return cls(
            AutoImageProcessor.from_pretrained(id_or_path, backend="pil", **where),
            tokenizer,
            backbone_class.__name__,
            {key: value for key, value in settings.items() if key not in parts},
            chat_template=template,
            **own,
        )

    # ---- prompts -----------------------------------------------------------------------------------------------

    def item_summary(self, items: Sequence[Any], prompt: str = "item_summary") -> PromptBatch:
        """Prompts that ask for a description of each item, ready for `generate`.

        Args:
            items: candidates, or other objects whose attributes are the variables of the prompt. An `image` is an
                image, a list of images, or `None`.
            prompt: `item_summary`, or one of the paper's three steps `text_summary`, `image_summary`, `fusion`.
        """
        return self._batch([self._prompt(prompt, vars(item)) for item in items])

    def preference(self, blocks: Sequence[Sequence[Any]], previous: Sequence[str | None] | None = None) -> PromptBatch:
        """Prompts that ask for the preference after each history block (paper, recurrent user summary).

        Args:
            blocks: for each of B users the items of one history block, oldest first, with `title` and `summary`.
            previous: B preferences before the block, where there are any.
        """
        before = previous if previous is not None else [None] * len(blocks)
        _check_counts(blocks=blocks, previous=before)
        values = [{"items": _in_words(block), "previous": text} for block, text in zip(blocks, before, strict=True)]
        return self._batch([self._prompt("preference", value) for value in values])

    def __call__(
        self,
        users: Sequence[Any] | None = None,
        candidates: Sequence[Any] | None = None,
        labels: Sequence[int] | None = None,
        *,
        text: Any = None,
        images: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """B pairs of a user and a candidate, ready for `score`, or for `forward` if labels are given.

        With `text`, and perhaps `images`, it is the backbone's own processor, as everywhere in transformers:
        `apply_chat_template(..., tokenize=True)` and tools for the backbone call it so.

        Args:
            users: B users, each with `preference` (which may be empty) and `recent` items.
            candidates: B candidates, each with `title`, `text` and `image`.
            labels: B times 1 (Yes) or 0 (No). Then the answer token is appended and is the one that is supervised.

        Returns:
            `input_ids`, `attention_mask` and, with labels, `labels` (all (B, L), padded on the left; labels are -100
            but for the answer), token types where the backbone knows them, and the backbone's image tensors.
        """
        if text is not None:
            return self._as_the_backbone(text, images, kwargs)
        if users is None or candidates is None or kwargs or images is not None:
            raise TypeError("call the processor with `users` and `candidates`, or with `text` and perhaps `images`")
        _check(users, "users", "preference")
        _check(candidates, "candidates", "title")
        _check_counts(users=users, candidates=candidates, **({} if labels is None else {"labels": labels}))
        prompts = [
            self._prompt("recommendation", {**_user_values(user), **_candidate_values(candidate)})
            for user, candidate in zip(users, candidates, strict=True)
        ]
        answers = None
        if labels is not None:
            if wrong := [label for label in labels if label not in (0, 1)]:
                raise ValueError(f"a label is 1 (Yes) or 0 (No), not {wrong[0]!r}")
            tokens = self.answer_token_ids
            answers = [tokens["yes" if label else "no"][0] for label in labels]
        return self._batch(prompts, answers, room=1)

    def _as_the_backbone(self, text: Any, images: Any, given: dict[str, Any]) -> BatchFeature:
        kwargs = {name: value for name, value in given.items() if value is not None}
        if self._backbone is not None:
            return self._backbone(text=text, images=images, **kwargs)
        if images is not None:
            raise ValueError("a text-only language model cannot be shown images; leave `images` out")
        return BatchFeature(dict(self.tokenizer(text, **kwargs)))

    def late_users(self, users: Sequence[Any], limit: int | None = None) -> PromptBatch:
        """The users of a model with `interaction="late"`, up to ``limit`` tokens each (`config.user_limit`)."""
        _check(users, "users", "preference")
        return self._batch([self._prompt("late_user", _user_values(user)) for user in users], limit=limit)

    def late_items(self, candidates: Sequence[Any], limit: int | None = None) -> PromptBatch:
        """The candidates of a model with `interaction="late"`, up to ``limit`` tokens each (`config.item_limit`)."""
        _check(candidates, "candidates", "title")
        prompts = [self._prompt("late_item", _candidate_values(candidate)) for candidate in candidates]
        return self._batch(prompts, limit=limit)

    @property
    def late_answer_ids(self) -> torch.Tensor:
        """(A,) with which every prompt of a model with `interaction="late"` ends."""
        return torch.tensor(self._encoder.encode([self._prompt("late_answer", {})])[0])

    def late_blocks(self, users: Sequence[Any], candidates: Sequence[Any], limits: tuple[int, int]) -> LateBlocks:
        """What `pack_late` takes, each user and each candidate once, whatever the pairs.

        Args:
            limits: the most tokens of a user and of a candidate, `config.user_limit` and `config.item_limit`.
        """
        users_in, items_in = self.late_users(users, limits[0]), self.late_items(candidates, limits[1])
        return LateBlocks(users=users_in, items=items_in, answer_ids=self.late_answer_ids)

    def prepare_images(self, images: Sequence[Any]) -> list[PreparedImage]:
        """Each image made ready once, to stand for it as `image` of any candidate in any later batch."""
        return [image if isinstance(image, PreparedImage) else self._prepare_image(image) for image in images]

    def _prepare_image(self, image: Any) -> PreparedImage:
        image_text = self.image_text  # which refuses where there are none
        placeholder = self._backbone.image_token
        data = self._backbone(
            text=[placeholder], images=[[image]], return_tensors="pt", return_text_replacement_offsets=True
        )
        text = data["text_replacement_offsets"][0][0]["replacement"].join(image_text.split(placeholder))
        # the token whose place the features take
        named = getattr(self.tokenizer, "image_token", None) if self.backbone_processor_class in TYPE_IDS else None
        soft_token = self.tokenizer.convert_tokens_to_ids(named or placeholder)
        count = self._encoder.tokenize([text])[0].count(soft_token)
        return PreparedImage(text, count, {key: value for key, value in data.items() if key not in TEXTUAL})

    def prints_image(self, prompt: str) -> bool:
        """Whether `prompt` shows an item's image, if it has one; a template of one's own need not."""
        values = {"preference": "x", "recent": [], "title": "x", "text": "x", "image": "x"}
        return bool(self._prompt(prompt, values).images)

    @property
    def answer_token_ids(self) -> dict[str, list[int]]:
        """The first tokens of "Yes" and "No" as the chat template writes them, the one to train on first."""
        if self._answers is None:
            self._answers = self._chat.answer_token_ids(self._encoder)
        return self._answers

    # ---- from fields to tensors --------------------------------------------------------------------------------

    def _prompt(self, name: str, values: Mapping[str, Any]) -> Prompt:
        """The template of this name with these variables."""
        image = values.get("image")
        images = tuple(image) if isinstance(image, (list, tuple)) else (image,) if image is not None else ()
        fields: list[Field] = []
        marked = mark({**values, "image": images}, fields)
        key = json.dumps([name, marked], sort_keys=True)
        if key not in self._skeletons:
            text = self._jinja.from_string(self.prompts[name]).render({**marked, "noun": self.item_noun}).strip()
            self._skeletons[key] = split(self._framed(name, text))
        pieces = self._skeletons[key]
        printed = [piece for piece in pieces if isinstance(piece, int)]
        if sum(fields[number].name == "image" for number in printed) > 1:
            raise ValueError(f"the prompt {name!r} shows its image more than once")
        begins = name not in ("late_item", "late_answer")
        return Prompt(pieces, {number: fields[number] for number in printed}, begins)

    def _framed(self, prompt: str, text: str) -> str:
        """The text in a chat, or, of one of the three parts of a chat, with the end of the chat that is next to it."""
        if not prompt.startswith("late_"):
            return self._chat.render([text])
        before, after = self._chat.render([OPEN]).split(OPEN)
        return {"late_user": f"{before}{text}\n", "late_item": text, "late_answer": f"{text}{after}"}[prompt]

    @property
    def image_text(self) -> str:
        """What the chat template writes for an image, so that it can stand wherever a prompt puts it."""
        if self._image_text is None:
            self._image_text = self._chat.image_text()
        return self._image_text

    @property
    def _chat(self) -> ChatTemplate:
        template: Any = self.chat_template
        image_token = self._backbone.image_token if self._backbone is not None else None
        return ChatTemplate(self.tokenizer, template, image_token)

    def _batch(
        self, prompts: list[Prompt], answers: list[int] | None = None, room: int = 0, limit: int | None = None
    ) -> PromptBatch:
        """The batch of some prompts of up to ``limit`` tokens, ``room`` of which are kept free for an answer."""
        if not prompts:
            raise ValueError("there is nothing to write a prompt of: give at least one")
        images: list[PreparedImage] = []
        for field in (field for prompt in prompts for field in prompt.images):
            prepared = self.prepare_images(field.value)
            field.value = "".join(image.text for image in prepared)
            images += prepared
        most = limit or self.max_length
        for field in (field for prompt in prompts for field in prompt.texts if most):
            field.value = field.value[: MOST_CHARACTERS * most]  # of the rest a tokenizer would have to be told in vain
        encoded, shortened = [], Counter[str]()
        for prompt, ids in zip(prompts, self._encoder.encode(prompts), strict=True):
            ids, kinds = self._encoder.fit(prompt, ids, most - room if most else None)
            if most and len(ids) > most - room:
                raise PromptRefused(
                    f"{'max_length' if most == self.max_length else 'a limit'}={most} leaves no room for the prompt "
                    f"and its images alone, which take {len(ids) + room} tokens; raise it or use smaller images"
                )
            encoded.append(ids or self._encoder.tokenize(["\n"])[0])  # an item of which nothing is shown
            shortened.update(kinds)
        if shortened:
            logger.warning_once(f"prompts longer than {most} tokens lose text, of the history first: {dict(shortened)}")
        return PromptBatch({**self._collate(encoded, answers), **collate_images(images)}, images, shortened)

    def _collate(self, rows: list[list[int]], answers: list[int] | None) -> dict[str, torch.Tensor]:
        """Pad on the left; append the answers, if any, and supervise nothing else."""
        if answers is not None:
            rows = [[*ids, answer] for ids, answer in zip(rows, answers, strict=True)]
        width = max(len(ids) for ids in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

        def padded(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[filler] * (width - len(row)) + row for row in values])

        batch = {"input_ids": padded(rows, pad), "attention_mask": padded([[1] * len(ids) for ids in rows], 0)}
        if self._backbone is not None and self._backbone.return_mm_token_type_ids:
            name = TYPE_IDS.get(self.backbone_processor_class, "mm_token_type_ids")
            batch[name] = padded(self._backbone.create_mm_token_type_ids(rows), 0)
        if answers is not None:
            batch["labels"] = torch.full_like(batch["input_ids"], -100)
            batch["labels"][:, -1] = torch.tensor(answers)
        return batch


def _check(values: Sequence[Any], name: str, attribute: str) -> None:
    """A TypeError unless these are what the processor reads the attribute of."""
    if isinstance(values, (str, Mapping)) or not all(hasattr(value, attribute) for value in values):
        kind = type(values).__name__ if isinstance(values, (str, Mapping)) else "a list of something else"
        raise TypeError(f"`{name}` is a list of objects with the attribute `{attribute}` (see as_{name}), not {kind}")


def _check_counts(**lists: Sequence[Any]) -> None:
    """A ValueError unless there are as many of each."""
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"there are {counts}: give as many of each")


def _in_words(items: Sequence[Any]) -> list[dict[str, str]]:
    return [{"title": item.title, "summary": item.summary} for item in items]


def _user_values(user: Any) -> dict[str, Any]:
    return {"preference": user.preference, "recent": _in_words(user.recent)}


def _candidate_values(candidate: Any) -> dict[str, Any]:
    return {"title": candidate.title, "text": candidate.text, "image": candidate.image}


MllmMsrProcessor.register_for_auto_class()

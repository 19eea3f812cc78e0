"""The processor: items, histories and candidates in; ready batches for any image-text-to-text backbone out."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin

from .backbone_images import Picture, build_backbone_processor, collate_pictures
from .prompts import PROMPTS
from .safe_text import OPEN, Controls, Field, Row, addition, anchor, mark, split

ANSWERS = {"yes": ("Yes", "yes", " Yes", " yes"), "no": ("No", "no", " No", " no")}
SHORTEN = (  # which texts lose their ends when a prompt is too long, in this order
    ("history", ("items", "recent", "previous", "preference")),
    ("candidate", ("text", "text_summary", "image_summary")),
    ("candidate_title", ("title",)),
)
TYPE_IDS = {"Gemma3Processor": "token_type_ids"}  # how a backbone calls its token types, where not mm_token_type_ids
TEXTUAL = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")


class MllmMsrProcessor(ProcessorMixin):
    """Turns items, histories and candidates into batches for [`MllmMsrForRecommendation`].

    Args:
        image_processor: the backbone's; `None` for a text-only language model, which can then only write preferences.
        tokenizer: the backbone's.
        backbone_processor_class: name of the backbone's processor class in transformers, which expands pictures into
            image tokens; `None` for a text-only language model.
        backbone_processor_kwargs: its other `__init__` parameters.
        prompts: Jinja templates that replace the defaults of the same name in `prompts.py`.
        item_noun: what the prompts call an item: video, product, film, ...
        max_length: the most tokens of a prompt with its answer. What is longer loses text: of the history first, then
            of the candidate; pictures and answers are never cut. `shortened` counts how often each was.
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
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if image_processor is None:  # there is nothing of it to save
            vars(self)["get_attributes"] = partial(list, ("tokenizer",))
        if self.chat_template is None and tokenizer.chat_template is None:
            raise ValueError("the backbone has no chat template; give one as chat_template=...")
        self.backbone_processor_class = backbone_processor_class
        self.backbone_processor_kwargs = backbone_processor_kwargs or {}
        self.prompts = {**PROMPTS, **(prompts or {})}
        self.item_noun = item_noun
        self.max_length = max_length
        self.shortened: Counter[str] = Counter()
        self._backbone: Any = None
        if backbone_processor_class is not None:
            self._backbone = build_backbone_processor(
                backbone_processor_class, image_processor, tokenizer, self.backbone_processor_kwargs
            )
        image_ids = self._backbone.image_token_ids if self._backbone is not None else []
        self._controls = Controls(tokenizer, image_ids)
        self._soft_token: Any = None  # what a picture's features take the place of
        if self._backbone is not None:
            soft = getattr(tokenizer, "image_token", None) if backbone_processor_class in TYPE_IDS else None
            self._soft_token = tokenizer.convert_tokens_to_ids(soft or self._backbone.image_token)
        begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._lead = [tokenizer.bos_token_id] if begins else []
        self._skeletons: dict[str, list[str | int]] = {}
        self._wanted: dict[tuple[str, bool], list[int]] = {}
        self._jinja = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
        self._image_text: str | None = None
        self._answers: dict[str, list[int]] | None = None

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument is None and argument_name == "image_processor":
            return None  # a text-only language model
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """The image processor by its PIL backend whatever is installed: others give slightly different pixels."""
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        if (processor_dict or {}).get("backbone_processor_class") is None:
            return [None, tokenizer]
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
        """The processor for a backbone's repository: a stock image-text-to-text model or a text-only language model."""
        where = {"revision": revision} if revision else {}
        tokenizer = AutoTokenizer.from_pretrained(id_or_path, **where)
        config = transformers.AutoConfig.from_pretrained(id_or_path, **where)
        own = {"prompts": prompts, "item_noun": item_noun, "max_length": max_length}
        if config.model_type == "mllm_msr":  # a trained recommender in its place
            whole = cls.from_pretrained(id_or_path, revision=revision or "main")
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

    def item_summary(self, items: list[dict[str, Any]], prompt: str = "item_summary") -> BatchFeature:
        """Prompts that ask for a description of each item, ready for `generate`.

        Args:
            items: each with `title`, `text` and `image` (a picture, a list of them, or `None`), and whatever other
                variables the prompt has.
            prompt: `item_summary`, or one of the paper's three steps `text_summary`, `image_summary`, `fusion`.
        """
        return self._batch([self._row(prompt, item) for item in items])

    def preference(self, blocks: list[list[dict[str, str]]], previous: list[str | None] | None = None) -> BatchFeature:
        """Prompts that ask for the preference after each block of items (paper, recurrent user summary).

        Args:
            blocks: for each of B users the items of one block, oldest first, each with `title` and `summary`.
            previous: the preference before the block, if any.
        """
        before = previous if previous is not None else [None] * len(blocks)
        rows = [{"items": block, "previous": text} for block, text in zip(blocks, before, strict=True)]
        return self._batch([self._row("preference", row) for row in rows])

    def __call__(
        self,
        preferences: list[str],
        candidates: list[dict[str, Any]],
        labels: list[int] | None = None,
        recent: list[list[dict[str, str]]] | None = None,
    ) -> BatchFeature:
        """B pairs of a user and a candidate, ready for `score`, or for `forward` if labels are given.

        Args:
            preferences: B texts, each may be empty.
            candidates: B items, each with `title` and, if there are any, `text` and `image`.
            labels: B times 1 (Yes) or 0 (No). Then the answer token is appended and is the one that is supervised.
            recent: for each pair the items chosen after the preference was written, each with `title` and `summary`.

        Returns:
            `input_ids`, `attention_mask` and, with labels, `labels` (all (B, L), padded on the left; labels are -100
            but for the answer), token types where the backbone knows them, and the backbone's picture tensors.
        """
        latest = recent if recent is not None else [[]] * len(preferences)
        rows = [
            {**candidate, "preference": preference, "recent": items}
            for preference, candidate, items in zip(preferences, candidates, latest, strict=True)
        ]
        answers = None
        if labels is not None:
            tokens = self.answer_token_ids
            answers = [tokens["yes" if label else "no"][0] for label in labels]
        return self._batch([self._row("recommendation", row) for row in rows], answers, room=1)

    def blocks(
        self, users: list[dict[str, Any]], candidates: list[dict[str, Any]], limits: tuple[int, int]
    ) -> dict[str, Any]:
        """What a model with `interaction="late"` reads, each user and each candidate once, whatever the pairs.

        Args:
            users: each with `preference` and, if there are any, `recent` items.
            candidates: each with `title` and, if there are any, `text` and `image`.
            limits: the most tokens of a user and of a candidate, `config.user_limit` and `config.item_limit`.

        Returns:
            `users` and `items`, batches padded on the left, the latter with the backbone's picture tensors; either is
            left out where none was given; `answer_ids` (A,), with which every prompt ends.
        """
        batch: dict[str, Any] = {"answer_ids": torch.tensor(self._encode([self._row("late_answer", {})])[0])}
        for kind, prompt, rows, limit in (
            ("users", "late_user", users, limits[0]),
            ("items", "late_item", candidates, limits[1]),
        ):
            if rows:
                batch[kind] = self._batch([self._row(prompt, row) for row in rows], limit=limit)
        return batch

    def pictures(self, images: Sequence[Any]) -> list[Picture]:
        """Each picture made ready once, to stand for it as `image` of any candidate in any later batch.

        `model.image_features(**collate_pictures(pictures))` is what the decoder sees of them; after that, their
        `light()` copies need carry no pixels.
        """
        return [image if isinstance(image, Picture) else self._picture(image) for image in images]

    def _picture(self, image: Any) -> Picture:
        around, placeholder = self.image_text.split(self._backbone.image_token), self._backbone.image_token
        data = self._backbone(
            text=[placeholder], images=[[image]], return_tensors="pt", return_text_replacement_offsets=True
        )
        text = data["text_replacement_offsets"][0][0]["replacement"].join(around)
        ids = self._tokenize([text])[0]
        tensors = {key: value for key, value in data.items() if key not in TEXTUAL}
        return Picture(text, ids.count(self._soft_token), tensors)

    def prints_image(self, prompt: str) -> bool:
        """Whether `prompt` shows an item's picture, if it has one; a template of one's own need not."""
        row = self._row(prompt, {"preference": "x", "recent": [], "title": "x", "text": "x", "image": "x"})
        return any(field.name == "image" for field in row.fields.values())

    @property
    def answer_token_ids(self) -> dict[str, list[int]]:
        """The first tokens of "Yes" and "No" as the chat template writes them, the one to train on first."""
        if self._answers is None:
            self._answers = self._derive_answers()
        return self._answers

    def _derive_answers(self) -> dict[str, list[int]]:
        first = {side: [self._first_token(text) for text in variants] for side, variants in ANSWERS.items()}
        answers: dict[str, list[int]] = {"yes": [], "no": []}
        for index, pair in enumerate(zip(first["yes"], first["no"], strict=True)):
            spelt = (self.tokenizer.decode([token]).strip() for token in pair)
            whole = all(text == ANSWERS[side][index].strip() for side, text in zip(answers, spelt, strict=True))
            if index == 0 or whole:  # the spelling to train on, and others of which the first token says it all
                for side, token in zip(answers, pair, strict=True):
                    answers[side] += [token] if token not in answers[side] else []
        if set(answers["yes"]) & set(answers["no"]):
            raise ValueError(
                f"Yes and No do not begin with distinct tokens in this chat template (found {answers}), so their "
                "probabilities cannot be told apart; use a backbone whose tokenizer keeps them whole"
            )
        return answers

    def _first_token(self, answer: str) -> int:
        prompt, ids = self._encode([self._chat("x"), self._chat("x", answer=answer)])
        if ids[: len(prompt)] != prompt:  # the template writes past answers in another way than it asks for one
            ids = self._encode([self._chat("x") + answer])[0]
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise ValueError(f"the tokenizer joins the answer {answer!r} with the end of the prompt")
        return ids[len(prompt)]

    # ---- from fields to tensors --------------------------------------------------------------------------------

    def _row(self, prompt: str, values: dict[str, Any]) -> Row:
        image = values.get("image")
        images = tuple(image) if isinstance(image, (list, tuple)) else (image,) if image is not None else ()
        fields: list[Field] = []
        marked = mark({**values, "image": images}, fields)
        key = json.dumps([prompt, marked], sort_keys=True)
        if key not in self._skeletons:
            text = self._jinja.from_string(self.prompts[prompt]).render({**marked, "noun": self.item_noun}).strip()
            self._skeletons[key] = split(self._framed(prompt, text))
        pieces = self._skeletons[key]
        numbers = [piece for piece in pieces if isinstance(piece, int)]
        if sum(fields[number].name == "image" for number in numbers) > 1:
            raise ValueError(f"the prompt {prompt!r} shows its image more than once")
        printed = {number: fields[number] for number in numbers}
        return Row(pieces, printed, begins=prompt not in ("late_item", "late_answer"))

    def _framed(self, prompt: str, text: str) -> str:
        """The text in a chat, or, of one of the three parts of a chat, with the end of the chat that is next to it."""
        if not prompt.startswith("late_"):
            return self._chat(text)
        before, after = self._chat(OPEN).split(OPEN)
        return {"late_user": f"{before}{text}\n", "late_item": text, "late_answer": f"{text}{after}"}[prompt]

    def _chat(self, text: str, answer: str | None = None) -> str:
        """The rendered conversation, up to where the answer begins or, if it is given, with it."""
        return self._render([text], [answer] if answer is not None else None)

    def _render(self, parts: list[str | None], answer: list[str | None] | None = None) -> str:
        """The chat template's text for a question (``None`` is a picture) and perhaps its answer."""

        def content(some: list[str | None]) -> str | list[dict[str, str]]:
            if self._backbone is None:
                return "".join(part or "" for part in some)
            return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in some]

        messages = [{"role": "user", "content": content(parts)}]
        if answer is not None:
            messages.append({"role": "assistant", "content": content(answer)})
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=answer is None,
            tokenize=False,
            enable_thinking=False,
        )

    @property
    def image_text(self) -> str:
        """What the chat template writes for a picture, so that it can stand wherever a prompt puts it."""
        if self._backbone is None:
            raise ValueError("a text-only language model cannot be shown pictures; leave `image` out")
        if self._image_text is None:
            before, after = self._render([None, anchor(0)]).split(anchor(0))
            plain_before, plain_after = self._render([anchor(0)]).split(anchor(0))
            self._image_text = (addition(before, plain_before) or addition(after, plain_after)).strip()
            if self._image_text.count(self._backbone.image_token) != 1:
                raise ValueError(f"the chat template shows a picture as {self._image_text!r}, which is not understood")
        return self._image_text

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _encode(self, texts: Sequence[str | Row]) -> list[list[int]]:
        """Token ids; a beginning-of-sequence token is added where the tokenizer would and the template did not."""
        rows = [text if isinstance(text, Row) else Row([text], {}) for text in texts]
        encoded = self._tokenize([row.text for row in rows])
        if not self._lead:
            return encoded
        begun = [not row.begins or row.text.startswith(self.tokenizer.bos_token) for row in rows]
        return [ids if has else self._lead + ids for has, ids in zip(begun, encoded, strict=True)]

    def _batch(
        self, rows: list[Row], answers: list[int] | None = None, room: int = 0, limit: int | None = None
    ) -> BatchFeature:
        """The batch of some prompts of up to ``limit`` tokens, ``room`` of which are kept free for an answer."""
        data, limit = self._write_pictures(rows), limit or self.max_length
        ids = [self._fit(row, ids, room, limit) for row, ids in zip(rows, self._encode(rows), strict=True)]
        return self._collate(ids, answers, data)

    def _write_pictures(self, rows: list[Row]) -> dict[str, Any]:
        """Put image tokens where the rows have pictures, and return the backbone's tensors for these."""
        shown: list[Picture] = []
        for field in (field for row in rows for field in row.fields.values() if field.name == "image"):
            pictures = self.pictures(field.value)
            field.value = "".join(picture.text for picture in pictures)
            shown += pictures
        return collate_pictures(shown)

    def _fit(self, row: Row, ids: list[int], room: int, most: int | None) -> list[int]:
        """The row's ids, free of control tokens that are not the prompt's, and no longer than allowed."""
        ids = self._secure(row, ids)
        limit = most - room if most else len(ids)
        for kind, names in SHORTEN:
            fields = [field for field in row.texts if field.name in names]
            if len(ids) > limit and fields:
                self.shortened[kind] += 1
            while len(ids) > limit and any(field.value.strip() for field in fields):
                longest = max(fields, key=lambda field: len(field.value))
                longest.value = self._cut(longest.value, len(ids) - limit)
                ids = self._secure(row, self._encode([row])[0])
        if len(ids) > limit:
            raise ValueError(
                f"{'max_length' if most == self.max_length else 'a limit'}={most} leaves no room for the prompt and "
                f"its pictures alone, which take {len(ids) + room} tokens; raise it or use smaller pictures"
            )
        return ids

    def _cut(self, text: str, count: int) -> str:
        """``text`` without its last ``count`` tokens, or half of them: several texts shall share the loss."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = max(len(spans) - count, len(spans) // 2)
        return text[: spans[keep][0]].strip() if keep < len(spans) else ""

    def _secure(self, row: Row, ids: list[int]) -> list[int]:
        """The row's ids, encoded anew with its texts defused if there are control tokens that are not the prompt's."""
        wanted = self._trusted_controls(row)
        if self._controls.of(ids) == wanted:
            return ids
        for field in row.texts:
            field.value = self._controls.defuse(field.value)
        ids = self._encode([row])[0]
        if self._controls.of(ids) != wanted:  # one came about where a text touches another or the prompt
            for field in row.texts:
                field.value = f" {field.value} "
            ids = self._encode([row])[0]
        if self._controls.of(ids) != wanted:
            raise ValueError(f"these texts cannot be encoded without control tokens: {[f.value for f in row.texts]}")
        return ids

    def _trusted_controls(self, row: Row) -> list[int]:
        """The control tokens of the row's prompt and pictures, its texts aside."""
        shown = [row.fields[p].value if isinstance(p, int) and row.fields[p].name == "image" else p for p in row.pieces]
        text = "".join("x" if isinstance(piece, int) else piece for piece in shown)
        if (text, row.begins) not in self._wanted:
            self._wanted[text, row.begins] = self._controls.of(self._encode([Row([text], {}, row.begins)])[0])
        return self._wanted[text, row.begins]

    def _collate(self, rows: list[list[int]], answers: list[int] | None, data: dict[str, Any]) -> BatchFeature:
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
        return BatchFeature({**batch, **data})


MllmMsrProcessor.register_for_auto_class()

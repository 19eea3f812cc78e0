"""Text engines: prompt variables in, texts out, in the order of the input.

``transformers`` runs a (multimodal) language model in this process, batched; ``extractive`` uses no model at all:
keywords and colours, deterministic, for machines without weights and as the honest row "is the language model worth
it?". An engine only has to offer ``identity``, ``batch_size`` and ``generate``.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.processing.storage import digest, folder_digest

Task = Literal["item_summary", "preference"]


class Engine(Protocol):
    """What the summaries need of whatever writes them."""

    @property
    def identity(self) -> dict[str, str]:
        """``generator`` and ``revision``, and every setting a text depends on: part of each text's content key."""
        ...

    @property
    def batch_size(self) -> int:
        """How many inputs one ``generate`` should be given."""
        ...

    def prompt_hash(self, task: Task) -> str:
        """Changes whenever the prompt of ``task`` does."""
        ...

    def generate(self, task: Task, inputs: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        """One (text, whether it ended by itself) for each input.

        Inputs are the variables of the prompt: ``title``, ``text``, ``image`` (PIL or None) for "item_summary";
        ``items`` (a block of ``title``, ``summary``) and ``previous`` (text or None) for "preference".
        """
        ...


class TransformersEngine:
    """Greedy generation with any image-text-to-text model, or for preferences any causal language model.

    Args:
        name_or_path: a model repository or folder.
        processor: its prompts; built from ``name_or_path`` if absent.
        label: what is written as the generator of a text, if not ``name_or_path``.
        max_new_tokens: the longest text, in tokens, by task.
    """

    def __init__(
        self,
        name_or_path: str,
        processor: MllmMsrProcessor | None = None,
        *,
        label: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 16,
        max_new_tokens: Mapping[str, int] | None = None,
        **model_kwargs: Any,
    ) -> None:
        self.label, self.batch_size = label or name_or_path, batch_size
        self.max_new_tokens = {"item_summary": 96, "preference": 256, **(max_new_tokens or {})}
        self.processor = processor or MllmMsrProcessor.from_backbone(name_or_path, revision=revision)
        config = AutoConfig.from_pretrained(name_or_path, revision=revision)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self.model = auto_class.from_pretrained(name_or_path, revision=revision, dtype=dtype, **model_kwargs).eval()
        local = Path(name_or_path)
        self.revision = folder_digest(local) if local.is_dir() else self.model.config._commit_hash
        if self.model.device.type == "cpu":
            self.model = self.model.float()  # half precision is slow on most CPUs

    @property
    def identity(self) -> dict[str, str]:
        return {
            "generator": self.label,
            "revision": self.revision or "",
            "settings": f"greedy,{sorted(self.max_new_tokens.items())}",
        }

    def prompt_hash(self, task: Task) -> str:
        return digest(self.processor.prompts[task], self.processor.item_noun, self.processor.chat_template)

    @torch.inference_mode()
    def generate(self, task: Task, inputs: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        if task == "item_summary":
            batch = self.processor.item_summary([dict(one) for one in inputs])
        else:
            batch = self.processor.preference([one["items"] for one in inputs], [one["previous"] for one in inputs])
        batch = batch.to(self.model.device)
        limit = self.max_new_tokens[task]
        ids = self.model.generate(**batch, max_new_tokens=limit, do_sample=False)
        new = ids[:, batch["input_ids"].shape[1] :].tolist()
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text.strip(), bool(ends.intersection(row))) for text, row in zip(texts, new, strict=True)]


_COMMON = frozenset(
    "about after also and are been before being between both but can could did does each ever first for from had has "
    "have her here hers him his how into its just like made man more most much must new not now off one only other our "
    "out over own she should some such than that the their them then there these they this those through too two under "
    "until upon very was were what when where which while who whom whose why will with would you young your".split()
)
_COLOUR_NAMES = {
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
    "red": (200, 40, 40),
    "orange": (235, 140, 40),
    "yellow": (240, 215, 60),
    "green": (50, 150, 70),
    "blue": (45, 95, 200),
    "purple": (130, 70, 170),
    "pink": (240, 140, 185),
    "brown": (115, 75, 45),
}


class ExtractiveEngine:
    """No model: an item's first telling words and dominant colours; a preference counts words, older ones fading."""

    batch_size = 256

    def __init__(self, item_words: int = 10, preference_words: int = 16) -> None:
        self.item_words, self.preference_words = item_words, preference_words

    @property
    def identity(self) -> dict[str, str]:
        return {"generator": "extractive", "revision": "1"}

    def prompt_hash(self, task: Task) -> str:
        return f"{task},{self.item_words},{self.preference_words}"

    def generate(self, task: Task, inputs: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        write = self._item if task == "item_summary" else self._preference
        return [(write(one), True) for one in inputs]

    def _item(self, item: Mapping[str, Any]) -> str:
        words = list(dict.fromkeys(keywords(item.get("text") or "")))[: self.item_words]
        if not words:
            words = keywords(item.get("title") or "")
        if item.get("image") is not None:
            words += dominant_colours(item["image"])
        return ", ".join(words)

    def _preference(self, block: Mapping[str, Any]) -> str:
        score: dict[str, float] = {}
        for rank, word in enumerate(_listed(block.get("previous") or "")):
            score[word] = 1.8 / (1 + 0.1 * rank)
        for item in block["items"]:
            for word in _listed(item["summary"]):
                score[word] = score.get(word, 0.0) + 1.0
        return ", ".join(sorted(score, key=lambda word: -score[word])[: self.preference_words])


def keywords(text: str) -> list[str]:
    """Lower-case words of three letters or more that are not among the commonest."""
    return [word for word in re.findall(r"[^\W\d_]{3,}", text.lower()) if word not in _COMMON]


def dominant_colours(image: Image.Image, count: int = 2) -> list[str]:
    """Names of the ``count`` colours that cover most of the picture."""
    names = list(_COLOUR_NAMES)
    palette = torch.tensor(list(_COLOUR_NAMES.values()), dtype=torch.float32)
    small = image.convert("RGB").resize((24, 24))
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(-1, 3).float()
    counts = torch.bincount(torch.cdist(pixels, palette).argmin(1), minlength=len(names))
    return [names[index] for index in counts.argsort(descending=True, stable=True)[:count].tolist()]


def _listed(text: str) -> list[str]:
    return [word for word in text.split(", ") if word]

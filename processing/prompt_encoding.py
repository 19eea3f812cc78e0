"""From prompts in pieces to token ids: what users wrote stays text, and long prompts lose text in a fixed order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from .safe_text import Controls, Field

SHORTEN = (  # which texts lose their ends when a prompt is too long, in this order
    ("history", ("items", "recent", "previous", "preference")),
    ("candidate", ("text", "text_summary", "image_summary")),
    ("candidate_title", ("title",)),
)


class PromptRefused(ValueError):
    """A prompt cannot be made of these texts and images."""


@dataclass
class Prompt:
    """A prompt before it is encoded.

    Args:
        pieces: its trusted texts, and the numbers of the fields between them.
        fields: by number, those that the prompt prints.
        begins: whether nothing comes before it, so that a beginning-of-sequence token may be due.
    """

    pieces: Sequence[str | int]
    fields: dict[int, Field] = field(default_factory=dict)
    begins: bool = True

    @property
    def text(self) -> str:
        return "".join(self.fields[piece].value if isinstance(piece, int) else piece for piece in self.pieces)

    @property
    def texts(self) -> list[Field]:
        return [field for field in self.fields.values() if field.name != "image"]

    @property
    def images(self) -> list[Field]:
        return [field for field in self.fields.values() if field.name == "image"]


class PromptEncoder:
    """Encodes prompts with one tokenizer.

    Args:
        tokenizer: the backbone's.
        image_token_ids: control tokens beside those that the tokenizer names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_ids: Iterable[int | None] = ()) -> None:
        self.tokenizer = tokenizer
        self.controls = Controls(tokenizer, image_token_ids)
        begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._lead = [tokenizer.bos_token_id] if begins else []
        self._trusted: dict[tuple[str, bool], list[int]] = {}

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as they are."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids; a beginning-of-sequence token is added where the tokenizer would and the template did not."""
        encoded = self.tokenize([prompt.text for prompt in prompts])
        if not self._lead:
            return encoded
        begun = [not prompt.begins or prompt.text.startswith(self.tokenizer.bos_token) for prompt in prompts]
        return [ids if has else self._lead + ids for has, ids in zip(begun, encoded, strict=True)]

    def fit(self, prompt: Prompt, ids: list[int], limit: int | None) -> tuple[list[int], list[str]]:
        """Free a prompt's ids of control tokens that are not its own, and shorten its texts to ``limit`` tokens.

        Args:
            ids: what :meth:`encode` returned for it.

        Returns:
            The ids, still longer than ``limit`` if the prompt is so without its texts; and which kinds of text
            (``SHORTEN``) have lost something.
        """
        ids = self._secure(prompt, ids)
        limit = limit if limit is not None else len(ids)
        shortened = []
        for kind, names in SHORTEN:
            fields = [field for field in prompt.texts if field.name in names]
            if len(ids) > limit and fields:
                shortened.append(kind)
            while len(ids) > limit and any(field.value.strip() for field in fields):
                over = len(ids) - limit
                while over > 0 and any(field.value for field in fields):  # encoded anew once all should be gone
                    longest = max(fields, key=lambda field: len(field.value))
                    longest.value, lost = self._cut(longest.value, over)
                    over -= lost
                ids = self._secure(prompt, self.encode([prompt])[0])
        return ids, shortened

    def _cut(self, text: str, count: int) -> tuple[str, int]:
        """``text`` without its last ``count`` tokens, or half of them: several texts shall share the loss; and how many
        these are."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = max(len(spans) - count, len(spans) // 2)
        return (text[: spans[keep][0]].strip() if keep < len(spans) else ""), len(spans) - keep

    def _secure(self, prompt: Prompt, ids: list[int]) -> list[int]:
        """The ids, encoded anew with the texts defused if there are control tokens that are not the prompt's."""
        wanted = self._trusted_controls(prompt)
        if self.controls.of(ids) == wanted:
            return ids
        for text in prompt.texts:
            text.value = self.controls.defuse(text.value)
        ids = self.encode([prompt])[0]
        if self.controls.of(ids) != wanted:  # one came about where a text touches another or the prompt
            for text in prompt.texts:
                text.value = f" {text.value} "
            ids = self.encode([prompt])[0]
        if self.controls.of(ids) != wanted:
            raise PromptRefused(
                f"these texts cannot be encoded without control tokens: {[t.value for t in prompt.texts]}"
            )
        return ids

    def _trusted_controls(self, prompt: Prompt) -> list[int]:
        """The control tokens of the prompt and its images, its texts aside."""
        images = {number: field.value for number, field in prompt.fields.items() if field.name == "image"}
        text = "".join(images.get(piece, "x") if isinstance(piece, int) else piece for piece in prompt.pieces)
        if (text, prompt.begins) not in self._trusted:
            bare = Prompt([text], begins=prompt.begins)
            self._trusted[text, prompt.begins] = self.controls.of(self.encode([bare])[0])
        return self._trusted[text, prompt.begins]

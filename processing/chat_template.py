"""What a backbone's chat template writes around a question, for an image, and where the answer begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .prompt_encoding import Prompt, PromptEncoder
from .safe_text import addition, anchor

ANSWERS = {"yes": ("Yes", "yes", " Yes", " yes"), "no": ("No", "no", " No", " no")}


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: it renders.
        template: Jinja, in place of the tokenizer's own.
        image_token: what stands for an image; None for a text-only language model.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    image_token: str | None

    def render(self, question: Sequence[str | None], answer: str | None = None) -> str:
        """The conversation as text, up to where the answer begins or, if it is given, with it.

        Args:
            question: its parts in order: texts, and ``None`` for an image.
        """
        messages: list[Any] = [{"role": "user", "content": self._content(question)}]
        if answer is not None:
            messages.append({"role": "assistant", "content": self._content([answer])})
        text: Any = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            add_generation_prompt=answer is None,
            tokenize=False,
            enable_thinking=False,
        )
        return text

    def _content(self, parts: Sequence[str | None]) -> str | list[dict[str, str]]:
        if self.image_token is None:
            return "".join(part or "" for part in parts)
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]

    def image_text(self) -> str:
        """What is written for an image, so that it can stand wherever a prompt puts it."""
        if self.image_token is None:
            raise ValueError("a text-only language model cannot be shown images; leave `image` out")
        before, after = self.render([None, anchor(0)]).split(anchor(0))
        plain_before, plain_after = self.render([anchor(0)]).split(anchor(0))
        text = (addition(before, plain_before) or addition(after, plain_after)).strip()
        if text.count(self.image_token) != 1:
            raise ValueError(f"the chat template shows an image as {text!r}, which is not understood")
        return text

    def answer_token_ids(self, encoder: PromptEncoder) -> dict[str, list[int]]:
        """The first tokens of "Yes" and "No" as the template writes them, the one to train on first."""
        first = {side: [self._first_token(encoder, text) for text in texts] for side, texts in ANSWERS.items()}
        answers: dict[str, list[int]] = {"yes": [], "no": []}
        for index, pair in enumerate(zip(first["yes"], first["no"], strict=True)):
            spelt = (str(self.tokenizer.decode([token])).strip() for token in pair)
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

    def _first_token(self, encoder: PromptEncoder, answer: str) -> int:
        prompt, ids = encoder.encode([Prompt([self.render(["x"])]), Prompt([self.render(["x"], answer)])])
        if ids[: len(prompt)] != prompt:  # the template writes past answers in another way than it asks for one
            (ids,) = encoder.encode([Prompt([self.render(["x"]) + answer])])
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise ValueError(f"the tokenizer joins the answer {answer!r} with the end of the prompt")
        return ids[len(prompt)]

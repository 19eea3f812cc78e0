"""The processor on every family: ordinary token ids, only the answer supervised, texts never control tokens."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tiny_models import FAMILIES, picture
from transformers import AutoProcessor, BatchFeature

from mllm_msr import MllmMsrProcessor
from mllm_msr.processing.backbone_images import build_backbone_processor, collate_pictures
from mllm_msr.processing.safe_text import clean

FAMILY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def processors(backbone) -> dict[str, MllmMsrProcessor]:
    return {name: MllmMsrProcessor.from_backbone(str(backbone(name)), item_noun="film") for name in FAMILIES}


def ordinary(processor: MllmMsrProcessor, prompt: str, images: list[Any], **variables: Any) -> list[int]:
    """The ids the backbone's own processor gives for the rendered prompt."""
    stock = build_backbone_processor(
        processor.backbone_processor_class,
        processor.image_processor,
        processor.tokenizer,
        processor.backbone_processor_kwargs,
    )
    shown = processor.image_text * len(images)
    text = Environment(autoescape=False).from_string(processor.prompts[prompt])
    text = text.render(**variables, image=shown, noun=processor.item_noun).strip()
    chat = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": text}]}],
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    bos = processor.tokenizer.bos_token
    ids = []
    for image in images:  # one picture at a time, as any batch must be able to hold it
        before, chat = chat.split(processor.image_text, 1)
        ids.append((before, stock(text=[processor.image_text], images=[[image]], return_text_replacement_offsets=True)))
    text = ""
    for before, data in ids:
        whole = data["text_replacement_offsets"][0][0]["replacement"]
        text += before + processor.image_text.replace(stock.image_token, whole)
    text += chat
    return processor.tokenizer(text, add_special_tokens=not text.startswith(bos))["input_ids"]


def row(batch: BatchFeature, index: int = 0) -> list[int]:
    return batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist()


@FAMILY
@pytest.mark.parametrize("count", [0, 1, 2])
def test_prompts_are_tokenised_as_usual(processors, name: str, count: int) -> None:
    processor = processors[name]
    images = [picture(seed, 40 + 20 * seed, 30) for seed in range(count)]
    item = {"title": "The Sea of\n\nNo Return", "text": "Quiet ships, 1999 - señor 鯨!", "image": images}
    assert row(processor.item_summary([item])) == ordinary(
        processor, "item_summary", images, title=item["title"], text=item["text"]
    )
    recent = [{"title": "A", "summary": "red"}, {"title": "", "summary": "blue stripes"}]
    pairs = processor(["likes long  summers"], [item], recent=[recent])
    variables = {"title": item["title"], "text": item["text"], "preference": "likes long  summers", "recent": recent}
    assert row(pairs) == ordinary(processor, "recommendation", images, **variables)
    blocks = [{"title": "A", "summary": "b"}]
    assert row(processor.preference([blocks], ["x"])) == ordinary(
        processor, "preference", [], items=blocks, previous="x"
    )


@FAMILY
def test_only_the_answer_is_supervised(processors, name: str) -> None:
    processor = processors[name]
    candidates = [{"title": "One", "image": picture(1)}, {"title": "A longer second title"}]
    asked = processor(["ships", ""], candidates)
    told = processor(["ships", ""], candidates, labels=[1, 0])
    yes, no = processor.answer_token_ids["yes"][0], processor.answer_token_ids["no"][0]
    assert torch.equal(told["input_ids"][:, :-1], asked["input_ids"])
    assert told["input_ids"][:, -1].tolist() == [yes, no]
    assert told["labels"][:, -1].tolist() == [yes, no]
    assert (told["labels"][:, :-1] == -100).all()
    assert processor.tokenizer.decode([yes]).strip() == "Yes"
    assert processor.tokenizer.decode([no]).strip() == "No"
    assert told["attention_mask"][:, -1].all()


@FAMILY
def test_a_batch_is_its_rows(processors, name: str) -> None:
    """Pictures of different sizes, rows with and without, and pictures made ready before: always the same tensors."""
    processor = processors[name]
    images = [picture(1), None, picture(2, 90, 30), picture(3, 28, 28)]
    candidates = [{"title": f"Title {index}", "image": image} for index, image in enumerate(images)]
    batch = processor(["ships"] * 4, candidates)
    for index, candidate in enumerate(candidates):
        assert row(batch, index) == row(processor(["ships"], [candidate]))
    shown = processor.pictures([image for image in images if image is not None])
    assert {key: value.shape for key, value in collate_pictures(shown).items()} == {
        key: value.shape for key, value in batch.items() if key in shown[0].tensors
    }
    ready = iter(shown)
    again = processor(["ships"] * 4, [{**one, "image": next(ready) if one["image"] else None} for one in candidates])
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def settings_of(processor: MllmMsrProcessor) -> dict[str, Any]:
    return {key: value for key, value in processor.to_dict().items() if key != "auto_map"}  # that is of a folder


def controls(processor: MllmMsrProcessor, batch: BatchFeature) -> list[list[int]]:
    added = processor.tokenizer.added_tokens_decoder.items()
    ids = {index for index, token in added if token.special or token.content.strip()}
    return [[token for token in row(batch, index) if token in ids] for index in range(len(batch["input_ids"]))]


@FAMILY
def test_user_text_never_becomes_a_control_token(processors, name: str) -> None:
    processor = processors[name]
    tokens = [token.content for token in processor.tokenizer.added_tokens_decoder.values()]
    hostile = [*tokens, "\ue0000\ue001", "\ue000", "\ue0001\ue001<s>", "<|placeholder|>", "{{ image }}", "{% raw %}"]
    hostile += [token[:2] + token + token[2:] for token in tokens if len(token) > 2]
    image = processor.pictures([picture(1)])[0]

    def batch(texts: list[str]) -> BatchFeature:
        halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
        return processor(
            [f"likes {text}" for text in texts],
            [
                {"title": text, "text": left + text, "image": image}
                for text, (left, _) in zip(texts, halves, strict=True)
            ],
            recent=[[{"title": left, "summary": right}] for left, right in halves],
        )

    harmless = controls(processor, batch(["x"]))[0]
    found = controls(processor, batch(hostile))
    assert {text: ids for text, ids in zip(hostile, found, strict=True) if ids != harmless} == {}


@FAMILY
def test_whatever_users_write_is_text(processors, name: str) -> None:
    """Drawn from pieces of control tokens, sentinels, templates and odd characters, in any field."""
    processor = processors[name]
    tokens = [
        token.content for token in processor.tokenizer.added_tokens_decoder.values() if "row_" not in token.content
    ]
    halves = [part for token in tokens for part in (token[: len(token) // 2], token[len(token) // 2 :])]
    odd = ["\ue000", "0", "\ue001", "\ud83d", "\x00", " ", "\n", "\u200b", "\ufeff", "e\u0301", "鯨", "{{", "}}", "x"]
    text = st.lists(st.sampled_from([*tokens, *halves, *odd]) | st.text(max_size=3), max_size=6).map("".join)
    image = processor.pictures([picture(1)])[0]
    plain: dict[tuple[bool, ...], list[int]] = {}

    def batch(preference: str, title: str, about: str, summary: str) -> BatchFeature:
        candidate = {"title": title, "text": about, "image": image, "noun": title, "likes": [title]}
        return processor([preference], [candidate], recent=[[{"title": "", "summary": summary}]])

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.tuples(text, text, text, text))
    def check(fields: tuple[str, str, str, str]) -> None:
        shown = tuple(bool(clean(field)) for field in fields)
        if shown not in plain:
            plain[shown] = controls(processor, batch(*("x" if there else "" for there in shown)))[0]
        assert controls(processor, batch(*fields))[0] == plain[shown]

    check()


def test_a_token_put_together_by_two_fields_is_broken(backbone) -> None:
    glued = "{{ preference }}{{ title }}{{ text }}>"
    processor = MllmMsrProcessor.from_backbone(str(backbone("qwen2_vl")), prompts={"recommendation": glued})
    plain = controls(processor, processor(["x"], [{"title": "y", "text": "z"}]))
    assert controls(processor, processor(["<|im_"], [{"title": "start|", "text": ""}])) == plain
    assert controls(processor, processor(["<|im"], [{"title": "_start|>", "text": "ok"}])) == plain


def test_too_long_prompts_lose_history_first_and_never_the_picture(backbone) -> None:
    path = str(backbone("llava"))
    free = MllmMsrProcessor.from_backbone(path)
    candidate = {"title": "The title", "text": "about " * 30, "image": picture(1)}
    short = len(row(free(["likes"], [candidate], labels=[1])))
    processor = MllmMsrProcessor.from_backbone(path, max_length=short + 4)
    batch = processor(["likes ships and " * 40], [candidate], labels=[1])
    text = processor.tokenizer.decode(row(batch))
    assert batch["input_ids"].shape[1] <= short + 4
    assert "about " * 29 in text and "The title" in text and "likes" in text
    assert row(batch)[-1] == processor.answer_token_ids["yes"][0]
    assert row(batch).count(processor.tokenizer.image_token_id) == 4
    assert dict(processor.shortened) == {"history": 1}

    tight = MllmMsrProcessor.from_backbone(path, max_length=short - 40)
    text = tight.tokenizer.decode(row(tight(["likes ships and " * 40], [candidate])))
    assert "ships" not in text and "about" in text and "The title" in text
    assert dict(tight.shortened) == {"history": 1, "candidate": 1}
    with pytest.raises(ValueError, match="max_length=20 leaves no room"):
        MllmMsrProcessor.from_backbone(path, max_length=20)(["likes"], [candidate])


def test_whatever_the_lengths_the_policy_holds(backbone) -> None:
    path = str(backbone("llava"))
    whole = MllmMsrProcessor.from_backbone(path)
    image = whole.pictures([picture(1)])[0]
    words = {kind: [f" {kind}{index}" for index in range(40)] for kind in ("q", "w", "x", "z")}
    length = st.integers(0, 40)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.integers(95, 700), st.tuples(length, length, length, length))
    def check(limit: int, lengths: tuple[int, ...]) -> None:
        preference, summary, text, title = ("".join(words[k][:n]) for k, n in zip("qwxz", lengths, strict=True))
        candidate = {"title": title, "text": text, "image": image}
        processor = MllmMsrProcessor.from_backbone(path, max_length=limit)
        given_ = ([preference], [candidate], [1], [[{"title": "", "summary": summary}]])
        ids, free = row(processor(*given_)), row(whole(*given_))
        assert len(ids) <= limit and ids[-1] == processor.answer_token_ids["yes"][0]
        assert ids.count(processor.tokenizer.image_token_id) == 4
        left = processor.tokenizer.decode(ids)
        cut = {kind for kind, n in zip("qwxz", lengths, strict=True) if n and words[kind][n - 1] not in left}
        gone = {kind for kind, n in zip("qwxz", lengths, strict=True) if n and words[kind][0].strip() not in left}
        if len(free) <= limit:
            assert ids == free and not processor.shortened
        if "x" in cut or processor.shortened["candidate"]:
            assert {kind for kind, n in zip("qw", lengths[:2], strict=True) if n} <= gone
        if "z" in cut:
            assert {kind for kind, n in zip("qwx", lengths[:3], strict=True) if n} <= gone
        counts = [processor.shortened[kind] for kind in ("history", "candidate", "candidate_title")]
        assert counts == [int(bool(cut & kinds)) for kinds in ({"q", "w"}, {"x"}, {"z"})]

    check()


def test_several_long_texts_share_the_loss(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")), max_length=260)
    block = [{"title": f"Film {index}", "summary": f"mark{index} " + "and so on " * 40} for index in range(3)]
    text = processor.tokenizer.decode(row(processor.preference([block], ["earlier " * 30])))
    assert all(f"mark{index}" in text for index in range(3)) and "earlier" in text


@FAMILY
def test_saving_keeps_prompts_and_ids(processors, name: str, tmp_path: Path) -> None:
    processor = processors[name]
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert settings_of(loaded) == settings_of(processor)
    assert (tmp_path / "chat_template.jinja").read_text() == loaded.chat_template == processor.chat_template
    assert not list(tmp_path.glob("*.bin")) and loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    ids = row(processor.item_summary([{"title": "One"}]))
    assert loaded.decode(ids) == processor.tokenizer.decode(ids) == loaded.batch_decode([ids])[0]
    assert (loaded.prompts, loaded.item_noun, loaded.max_length) == (processor.prompts, "film", None)
    assert loaded.answer_token_ids == processor.answer_token_ids
    batches = [one(["ships"], [{"title": "One", "image": picture(1)}], labels=[1]) for one in (processor, loaded)]
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])


def test_a_language_model_writes_preferences_but_sees_no_pictures(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("language_model")))
    batch = processor.preference(
        [[{"title": "One", "summary": "red"}], [{"title": "Two", "summary": "b"}]], ["old", None]
    )
    assert set(batch) == {"input_ids", "attention_mask"}
    assert "One: red" in processor.tokenizer.decode(row(batch))
    with pytest.raises(ValueError, match="cannot be shown pictures"):
        processor.item_summary([{"title": "One", "image": picture(1)}])


def test_a_language_model_keeps_its_prompts_when_saved(backbone, tmp_path: Path) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("language_model")), item_noun="film", max_length=120)
    processor.save_pretrained(tmp_path)
    for loaded in (MllmMsrProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert loaded.image_processor is None
        assert settings_of(loaded) == settings_of(pickle.loads(pickle.dumps(processor)))
        block = [[{"title": "One", "summary": "red " * 90}]]
        assert torch.equal(loaded.preference(block)["input_ids"], processor.preference(block)["input_ids"])


def test_answers_that_begin_alike_are_refused(backbone) -> None:
    """A template that ends in the middle of a word leaves both answers the same first token."""
    processor = MllmMsrProcessor.from_backbone(str(backbone("language_model")))
    processor.chat_template = (
        "{% for m in messages %}{{ m.content.replace('Yes', '- Yes').replace('No', '- No') }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="distinct tokens"):
        _ = processor.answer_token_ids


def test_bad_prompts_are_refused(backbone) -> None:
    path = str(backbone("llava"))
    good = MllmMsrProcessor.from_backbone(path)
    good.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        MllmMsrProcessor(good.image_processor, good.tokenizer, "LlavaProcessor")
    with pytest.raises(ValueError, match="unknown prompts"):
        MllmMsrProcessor.from_backbone(path, prompts={"item": "x"})
    twice = MllmMsrProcessor.from_backbone(path, prompts={"item_summary": "{{ image }}{{ image }}"})
    with pytest.raises(ValueError, match="more than once"):
        twice.item_summary([{"title": "", "image": picture(1)}])
    cut = MllmMsrProcessor.from_backbone(path, prompts={"item_summary": "{{ title[:2] }}"})
    with pytest.raises(ValueError, match="not cut"):
        cut.item_summary([{"title": "long"}])


def test_a_prompt_without_the_picture_carries_none(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")))
    batch = processor.item_summary([{"title": "One", "text": "a", "image": picture(1)}], prompt="text_summary")
    assert set(batch) == {"input_ids", "attention_mask"}

"""The processor on every family: ordinary token ids, only the answer supervised, texts never control tokens."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tiny_models import FAMILIES, draw_image
from transformers import AutoProcessor, BatchFeature

from mllm_msr import Candidate, HistoryItem, MllmMsrProcessor, User
from mllm_msr.processing.backbone_images import NoImages, build_backbone_processor, collate_images
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
    for image in images:  # one image at a time, as any batch must be able to hold it
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
    images = [draw_image(seed, 40 + 20 * seed, 30) for seed in range(count)]
    item = Candidate(title="The Sea of\n\nNo Return", text="Quiet ships, 1999 - señor 鯨!", image=images)
    words = {"title": item.title, "text": item.text}
    assert row(processor.item_summary([item])) == ordinary(processor, "item_summary", images, **words)
    user = User("likes long  summers", [HistoryItem("A", "red"), HistoryItem(summary="blue stripes")])
    assert row(processor([user], [item])) == ordinary(processor, "recommendation", images, **words, **vars(user))
    block = [HistoryItem("A", "b")]
    assert row(processor.preference([block], ["x"])) == ordinary(processor, "preference", [], items=block, previous="x")


@FAMILY
def test_only_the_answer_is_supervised(processors, name: str) -> None:
    processor = processors[name]
    users = [User("ships"), User()]
    candidates = [Candidate(title="One", image=draw_image(1)), Candidate(title="A longer second title")]
    asked = processor(users, candidates)
    answered = processor(users, candidates, labels=[1, 0])
    yes, no = processor.answer_token_ids["yes"][0], processor.answer_token_ids["no"][0]
    assert torch.equal(answered["input_ids"][:, :-1], asked["input_ids"])
    assert answered["input_ids"][:, -1].tolist() == [yes, no]
    assert answered["labels"][:, -1].tolist() == [yes, no]
    assert (answered["labels"][:, :-1] == -100).all()
    assert processor.tokenizer.decode([yes]).strip() == "Yes"
    assert processor.tokenizer.decode([no]).strip() == "No"
    assert answered["attention_mask"][:, -1].all()


@FAMILY
def test_a_batch_is_its_rows(processors, name: str) -> None:
    """Images of different sizes, rows with and without, and images made ready before: always the same tensors."""
    processor = processors[name]
    images = [draw_image(1), None, draw_image(2, 90, 30), draw_image(3, 28, 28)]
    candidates = [Candidate(title=f"Title {index}", image=image) for index, image in enumerate(images)]
    users = [User("ships")] * 4
    batch = processor(users, candidates)
    for index, candidate in enumerate(candidates):
        assert row(batch, index) == row(processor(users[:1], [candidate]))
    prepared = processor.prepare_images([image for image in images if image is not None])
    assert {key: value.shape for key, value in collate_images(prepared).items()} == {
        key: value.shape for key, value in batch.items() if key in prepared[0].tensors
    }
    ready = iter(prepared)
    again = processor(users, [replace(one, image=next(ready)) if one.image else one for one in candidates])
    assert again.images == prepared
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def settings_of(processor: MllmMsrProcessor) -> dict[str, Any]:
    """Its settings but for what is of the folder that it was saved to."""
    settings = processor.to_dict()
    for part in (settings, settings["image_processor"]):
        part.pop("auto_map", None)
    return settings


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
    image = processor.prepare_images([draw_image(1)])[0]

    def batch(texts: list[str]) -> BatchFeature:
        halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
        return processor(
            [User(f"likes {text}", [HistoryItem(*half)]) for text, half in zip(texts, halves, strict=True)],
            [Candidate("", text, left + text, image) for text, (left, _) in zip(texts, halves, strict=True)],
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
    image = processor.prepare_images([draw_image(1)])[0]
    plain: dict[tuple[bool, ...], list[int]] = {}

    def batch(preference: str, title: str, about: str, summary: str) -> BatchFeature:
        user = User(preference, [HistoryItem(summary=summary)])
        return processor([user], [Candidate(title, title, about, image)])

    @settings(max_examples=25)
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
    plain = controls(processor, processor([User("x")], [Candidate(title="y", text="z")]))
    assert controls(processor, processor([User("<|im_")], [Candidate(title="start|")])) == plain
    assert controls(processor, processor([User("<|im")], [Candidate(title="_start|>", text="ok")])) == plain


def test_hundreds_of_texts_are_shortened_in_a_few_steps(backbone, monkeypatch) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")), max_length=1000)
    encode, encoded = processor._encoder.encode, []
    monkeypatch.setattr(processor._encoder, "encode", lambda prompts: encoded.append(1) or encode(prompts))
    user = User("ships " * 100_000, [HistoryItem(summary=f"{place} red films") for place in range(200)])
    batch = processor([user], [Candidate(title="The Sea")])
    assert batch["input_ids"].shape[1] <= 1000 and batch.shortened == {"history": 1}
    assert len(encoded) < 10


def test_too_long_prompts_lose_history_first_and_never_the_image(backbone) -> None:
    path = str(backbone("llava"))
    free = MllmMsrProcessor.from_backbone(path)
    candidate = Candidate(title="The title", text="about " * 30, image=draw_image(1))
    user, long = User("likes"), User("likes ships and " * 40)
    short = len(row(free([user], [candidate], labels=[1])))
    processor = MllmMsrProcessor.from_backbone(path, max_length=short + 4)
    batch = processor([long], [candidate], labels=[1])
    text = processor.tokenizer.decode(row(batch))
    assert batch["input_ids"].shape[1] <= short + 4
    assert "about " * 29 in text and "The title" in text and "likes" in text
    assert row(batch)[-1] == processor.answer_token_ids["yes"][0]
    assert row(batch).count(processor.tokenizer.image_token_id) == 4
    assert dict(batch.shortened) == {"history": 1}

    tight = MllmMsrProcessor.from_backbone(path, max_length=short - 40)
    batch = tight([long], [candidate])
    text = tight.tokenizer.decode(row(batch))
    assert "ships" not in text and "about" in text and "The title" in text
    assert dict(batch.shortened) == {"history": 1, "candidate": 1}
    with pytest.raises(ValueError, match="max_length=20 leaves no room"):
        MllmMsrProcessor.from_backbone(path, max_length=20)([user], [candidate])


def test_whatever_the_lengths_the_policy_holds(backbone) -> None:
    path = str(backbone("llava"))
    whole = MllmMsrProcessor.from_backbone(path)
    image = whole.prepare_images([draw_image(1)])[0]
    words = {kind: [f" {kind}{index}" for index in range(40)] for kind in ("q", "w", "x", "z")}
    length = st.integers(0, 40)

    @settings(max_examples=40)
    @given(st.integers(95, 700), st.tuples(length, length, length, length))
    def check(limit: int, lengths: tuple[int, ...]) -> None:
        preference, summary, text, title = ("".join(words[k][:n]) for k, n in zip("qwxz", lengths, strict=True))
        pair = [User(preference, [HistoryItem(summary=summary)])], [Candidate("", title, text, image)], [1]
        batch = MllmMsrProcessor.from_backbone(path, max_length=limit)(*pair)
        ids, free, processor = row(batch), row(whole(*pair)), whole
        assert len(ids) <= limit and ids[-1] == processor.answer_token_ids["yes"][0]
        assert ids.count(processor.tokenizer.image_token_id) == 4
        left = processor.tokenizer.decode(ids)
        cut = {kind for kind, n in zip("qwxz", lengths, strict=True) if n and words[kind][n - 1] not in left}
        gone = {kind for kind, n in zip("qwxz", lengths, strict=True) if n and words[kind][0].strip() not in left}
        if len(free) <= limit:
            assert ids == free and not batch.shortened
        if "x" in cut or batch.shortened["candidate"]:
            assert {kind for kind, n in zip("qw", lengths[:2], strict=True) if n} <= gone
        if "z" in cut:
            assert {kind for kind, n in zip("qwx", lengths[:3], strict=True) if n} <= gone
        counts = [batch.shortened[kind] for kind in ("history", "candidate", "candidate_title")]
        assert counts == [int(bool(cut & kinds)) for kinds in ({"q", "w"}, {"x"}, {"z"})]

    check()


def test_several_long_texts_share_the_loss(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")), max_length=260)
    block = [HistoryItem(f"Film {index}", f"mark{index} " + "and so on " * 40) for index in range(3)]
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
    ids = row(processor.item_summary([Candidate(title="One")]))
    assert loaded.decode(ids) == processor.tokenizer.decode(ids) == loaded.batch_decode([ids])[0]
    assert (loaded.prompts, loaded.item_noun, loaded.max_length) == (processor.prompts, "film", processor.max_length)
    assert loaded.answer_token_ids == processor.answer_token_ids
    batches = [
        one([User("ships")], [Candidate(title="One", image=draw_image(1))], labels=[1]) for one in (processor, loaded)
    ]
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])


def test_a_language_model_writes_preferences_but_sees_no_images(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("language_model")))
    batch = processor.preference([[HistoryItem("One", "red")], [HistoryItem("Two", "b")]], ["old", None])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert "One: red" in processor.tokenizer.decode(row(batch))
    with pytest.raises(ValueError, match="cannot be shown images"):
        processor.item_summary([Candidate(title="One", image=draw_image(1))])


def test_a_language_model_keeps_its_prompts_when_saved(backbone, tmp_path: Path) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("language_model")), item_noun="film", max_length=120)
    processor.save_pretrained(tmp_path)
    for loaded in (MllmMsrProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded.image_processor, NoImages)
        assert settings_of(loaded) == settings_of(pickle.loads(pickle.dumps(processor)))
        block = [[HistoryItem("One", "red " * 90)]]
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
    with pytest.raises(ValueError, match="item_noun is empty; name what an item is called"):
        MllmMsrProcessor.from_backbone(str(backbone("language_model")), item_noun=" ")
    with pytest.raises(ValueError, match="unknown prompts"):
        MllmMsrProcessor.from_backbone(path, prompts={"item": "x"})
    twice = MllmMsrProcessor.from_backbone(path, prompts={"item_summary": "{{ image }}{{ image }}"})
    with pytest.raises(ValueError, match="more than once"):
        twice.item_summary([Candidate(image=draw_image(1))])
    cut = MllmMsrProcessor.from_backbone(path, prompts={"item_summary": "{{ title[:2] }}"})
    with pytest.raises(ValueError, match="not cut"):
        cut.item_summary([Candidate(title="long")])


def test_a_prompt_without_the_image_carries_none(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")))
    batch = processor.item_summary([Candidate(title="One", text="a", image=draw_image(1))], prompt="text_summary")
    assert set(batch) == {"input_ids", "attention_mask"}


@FAMILY
def test_a_text_and_images_are_what_the_backbone_s_own_processor_makes(processors, name: str) -> None:
    processor = processors[name]
    stock = build_backbone_processor(
        processor.backbone_processor_class,
        processor.image_processor,
        processor.tokenizer,
        processor.backbone_processor_kwargs,
    )
    text, image = f"A {processor.image_text} here", draw_image(1)
    for asked in ({"text": [text], "images": [[image]], "return_tensors": "pt"}, {"text": "no image"}):
        batch, expected = processor(**asked), stock(**asked)
        assert batch.keys() == expected.keys()
        for key in batch:
            assert batch[key].equal(expected[key]) if hasattr(batch[key], "equal") else batch[key] == expected[key]
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    made = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    bos = processor.tokenizer.bos_token
    expected = stock(
        text=[rendered], images=[[image]], return_tensors="pt", add_special_tokens=not rendered.startswith(bos)
    )
    assert torch.equal(made["input_ids"], expected["input_ids"]) and "pixel_values" in made


def test_a_language_model_tokenises_a_chat(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("language_model")))
    chat = [{"role": "user", "content": "Hello"}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert processor.tokenizer.decode(ids) == processor.apply_chat_template(chat)
    with pytest.raises(ValueError, match="cannot be shown images"):
        processor(text="Hello", images=[draw_image(1)])


def test_what_is_neither_a_pair_nor_a_text_is_refused(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")))
    candidates = [Candidate(title="One")]
    for asked in ({}, {"users": [User("x")]}, {"images": [draw_image(1)]}, {"users": [User("x")], "candidates": None}):
        with pytest.raises(TypeError, match="`users` and `candidates`, or with `text`"):
            processor(**asked)
    for users in ("likes ships", ["likes ships"], [{"preference": "x"}], {"preference": "x"}):
        with pytest.raises(TypeError, match="`users` is a list of objects with the attribute `preference`"):
            processor(users, candidates)
    with pytest.raises(TypeError, match="`candidates` is a list of objects"):
        processor([User("x")], [{"title": "One"}])


def test_lists_that_do_not_fit_each_other_and_labels_that_are_none_are_refused(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")))
    users, candidates = [User("x")] * 2, [Candidate(title="One")] * 2
    with pytest.raises(ValueError, match="there are 2 users, 1 candidates: give as many of each"):
        processor(users, candidates[:1])
    with pytest.raises(ValueError, match="there are 2 users, 2 candidates, 1 labels"):
        processor(users, candidates, labels=[1])
    with pytest.raises(ValueError, match=r"a label is 1 \(Yes\) or 0 \(No\), not 'No'"):
        processor(users, candidates, labels=[1, "No"])
    with pytest.raises(ValueError, match="there are 1 blocks, 2 previous"):
        processor.preference([[HistoryItem("One")]], ["a", "b"])
    for write in (lambda: processor([], []), lambda: processor.item_summary([]), lambda: processor.preference([])):
        with pytest.raises(ValueError, match="there is nothing to write a prompt of"):
            write()


def test_a_prompt_is_no_longer_than_the_backbone_has_positions(backbone) -> None:
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")))
    assert processor.max_length == 2048
    user, candidate = User("likes ships and " * 2000), Candidate(title="One", text="about " * 3000)
    for batch in (processor([user], [candidate]), processor.late_users([user]), processor.late_items([candidate])):
        assert 1900 < batch["input_ids"].shape[1] <= 2048 and batch.shortened

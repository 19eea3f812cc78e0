"""Pretrain the demo's base model: ``python -m mllm_msr.demo.pretraining --output src/mllm_msr/demo/base``; an hour.

A stock Llava of a few million parameters with its own tokenizer is trained from scratch, on text that the generator
writes, to caption drawn things, to condense a list of captions and an earlier preference, and to answer general
yes/no questions about a list of words and an image. It never sees a user, a choice, or the question that the
recommender is asked; the variant ``no_sft`` of the demo's table is what this pretraining alone is worth.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_msr.data.sources.world import (
    SIZE,
    TOPICS,
    TRAITS,
    DrawnItem,
    condense,
    describe,
    draw,
    preference_text,
    random_item,
)

IMAGE_EDGE, PATCH = 64, 16
INIT = 0.06  # standard deviation; the usual 0.02 suits wide models and hardly moves one this narrow
SPECIAL = ["<pad>", "<image>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = yaml.safe_load((Path(__file__).parent / "recipe.yaml").read_text(encoding="utf-8"))["prompts"]
NUMBERS = ("zero", "one", "two", "three", "four", "five")
Turn = tuple[str, str]  # question and answer; "<image>" stands for the image


def english() -> list[str]:
    """Ordinary English at hand on any machine with Python, so that the tokenizer also serves other texts."""
    from pydoc_data.topics import topics

    return [text.replace("`", "").replace("*", "") for _, text in sorted(topics.items())]


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is unknown, and a word is tokenised alike wherever a prompt is cut."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    own = [f"{asked}\n{answer}" for _ in range(4000) for asked, answer in dialogue(rng, random_item(rng, "x"))]
    own += [f"{asked}\n{answer}" for _ in range(4000) for asked, answer in condensing(rng)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(own + english(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_EDGE,
        patch_size=PATCH,
        projection_dim=128,
        initializer_factor=INIT / 0.02,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=INIT,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    config.initializer_range = INIT
    return LlavaForConditionalGeneration(config)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_EDGE}, crop_size={"height": IMAGE_EDGE, "width": IMAGE_EDGE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def word_list(rng: np.random.Generator, item: DrawnItem, progress: float) -> list[str]:
    """Words of every trait in any order; about half of the traits have the item's own value among them.

    Early in the training fewer words are named.
    """
    words = []
    for trait, values in TRAITS.items():
        others = [value for value in values if value != item.traits[trait]]
        count = int(rng.integers(0, 2 if progress < 0.15 else 4))
        group = [str(value) for value in rng.choice(others, min(count, len(others)), replace=False)]
        if rng.random() < 0.5:
            group.insert(int(rng.integers(0, len(group) + 1)), item.traits[trait])
        words.append(group[:3])
    if rng.random() < 0.5:
        rng.shuffle(words)
    return [word for group in words for word in group]


def dialogue(rng: np.random.Generator, item: DrawnItem, progress: float = 1.0) -> list[Turn]:
    """One conversation about one thing: a caption, or questions on a list of words in any order.

    First come captions alone, then questions; a share of these shows the caption in place of the image, since
    matching words to words is learnt first.
    """
    caption = PROMPTS["item_summary"].replace("{{ title }}", item.title).replace("{{ text }}", item.text)
    caption = caption.replace("{{ image }}", "<image>")
    if rng.random() < (1.0 if progress < 0.03 else 0.15):
        return [(caption, describe(item.traits))]
    words = word_list(rng, item, progress)
    fitting = [value for value in item.traits.values() if value in words]
    turns: list[Turn] = [("Which fit?", ", ".join(fitting) or "none"), ("How many fit?", NUMBERS[len(fitting)])]
    limit = int(rng.integers(1, 5))
    turns.append((f"Do {NUMBERS[limit]} or more fit?", "Yes" if len(fitting) >= limit else "No"))
    for trait, value in item.traits.items():
        turns.append((f"Is the {trait} listed?", "Yes" if value in words else "No"))
        other = str(rng.choice(TRAITS[trait]))
        turns.append((f"Is {other} listed?", "Yes" if other in words else "No"))
        turns.append((f"Name the {trait}.", value))
    order = rng.permutation(len(turns))[: int(rng.integers(4, 9))]
    turns = [turns[index] for index in order]
    separator = str(rng.choice([", ", "; ", " "]))
    listed = f"{rng.choice(['List', 'Words', 'Wanted', 'Seen'])} {separator.join(words)}"
    view = describe(item.traits) if rng.random() < (0.7 if progress < 0.2 else 0.3) else "<image>"
    turns[0] = (f"{listed}\n{item.title}\n{view}\n{turns[0][0]}", turns[0][1])
    return turns


def condensing(rng: np.random.Generator) -> list[Turn]:
    """One step of a preference: up to three captions and, mostly, the preference so far."""
    leaning = {trait: rng.choice(values, min(3, len(values)), replace=False) for trait, values in TRAITS.items()}

    def traits() -> dict[str, str]:
        return {
            trait: str(rng.choice(leaning[trait] if rng.random() < 0.7 else values)) for trait, values in TRAITS.items()
        }

    previous = condense([traits() for _ in range(3)], None) if rng.random() < 0.75 else None
    block = [traits() for _ in range(3 if rng.random() < 0.85 else int(rng.integers(1, 3)))]
    lines = [preference_text(previous)] if previous else []
    lines += [describe(item) for item in block]
    return [("\n".join([*lines, "Condense."]), preference_text(condense(block, previous)))]


def encode(processor: LlavaProcessor, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels: only answers and their ends are supervised."""
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    patches = (IMAGE_EDGE // PATCH) ** 2
    ids: list[int] = []
    labels: list[int] = []
    for asked, answer in turns:
        prompt = tokenizer(f"<|user|>{asked}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
        prompt = [copy for token in prompt for copy in [token] * (patches if token == image_id else 1)]
        reply = tokenizer(f"{answer}<|end|>", add_special_tokens=False)["input_ids"]
        ids += prompt + reply
        labels += [-100] * len(prompt) + reply
    return ids, labels


def collate(processor: LlavaProcessor, dialogues: list[list[Turn]]) -> dict[str, torch.Tensor]:
    rows = [encode(processor, turns) for turns in dialogues]
    width = max(len(ids) for ids, _ in rows)
    pad = processor.tokenizer.pad_token_id
    return {  # right padding: (B, L)
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(ids)) for ids, labels in rows]),
    }


def gallery(count: int, seed: int, processor: LlavaProcessor) -> tuple[list[DrawnItem], torch.Tensor]:
    """``count`` items and their pixel values (count, 3, IMAGE_EDGE, IMAGE_EDGE)."""
    rng = np.random.default_rng(seed)
    items = [random_item(rng, str(index)) for index in range(count)]
    with ProcessPoolExecutor() as pool:
        images = list(pool.map(draw, items, chunksize=64))
    pixels = [
        processor.image_processor(images[start : start + 256], return_tensors="pt")["pixel_values"]
        for start in range(0, count, 256)
    ]
    return items, torch.cat(pixels)


@torch.no_grad()
def examine(model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int) -> dict[str, float]:
    """Share of right first tokens (yes/no, counts) and of right tokens (captions, preferences) on new dialogues."""
    rng = np.random.default_rng(seed)
    items, pixels = gallery(256, seed, processor)
    hits: dict[str, list[float]] = {}
    about_items = [dialogue(rng, item) for item in items]
    with_image = [index for index, turns in enumerate(about_items) if "<image>" in turns[0][0]]
    for dialogues, images in ((about_items, pixels[with_image]), ([condensing(rng) for _ in items], None)):
        batch = collate(processor, dialogues)
        logits = model(pixel_values=images, **{k: v for k, v in batch.items() if k != "labels"}).logits
        right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) & (batch["labels"][:, 1:] != -100)
        for row, turns in enumerate(dialogues):
            position = 0
            for asked, answer in turns:
                ids, _ = encode(processor, [(asked, answer)])
                reply = len(processor.tokenizer(f"{answer}<|end|>", add_special_tokens=False)["input_ids"])
                span = right[row, position + len(ids) - reply - 1 : position + len(ids) - 1]
                kind = asked.rsplit("\n", 1)[-1]
                kind = "Do n or more fit?" if kind.startswith("Do ") else kind
                kind = (
                    "Name"
                    if kind.startswith("Name")
                    else "Is value listed?"
                    if kind.startswith("Is ") and " the " not in kind
                    else kind
                )
                kind += " (image)" if "<image>" in turns[0][0] else " (words)"
                score = span[0] if reply == 2 else span.float().mean()
                hits.setdefault(kind, []).append(float(score))
                position += len(ids)
    return {kind: round(sum(values) / len(values), 3) for kind, values in sorted(hits.items())}


def dialogues_by_length(
    rng: np.random.Generator, processor: LlavaProcessor, items: list[DrawnItem], batch_size: int, steps: int
) -> Iterator[tuple[list[list[Turn]], list[int]]]:
    """Batches of dialogues, each of about equal length (little padding), with the items they are about."""
    for start in range(0, steps, 8):
        chosen = rng.integers(0, len(items), 8 * batch_size)
        dialogues = [dialogue(rng, items[index], start / steps) for index in chosen]
        order = sorted(range(len(dialogues)), key=lambda k: len(encode(processor, dialogues[k])[0]))
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        for batch in rng.permutation(batches).tolist():
            yield [dialogues[k] for k in batch], [int(chosen[k]) for k in batch]


def pretrain(steps: int, seed: int, output: Path, vocab_size: int, batch_size: int, n_images: int) -> None:
    """Train the base model and write it to ``output``, with its figures on new dialogues now and then."""
    torch.manual_seed(seed)
    processor = build_processor(build_tokenizer(vocab_size))
    model = build_model(processor.tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    items, pixels = gallery(n_images, seed + 1, processor)
    print(f"drew {len(items)} images of {SIZE} pixels about {len(TOPICS)} topics", flush=True)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    peak = 1.5e-3
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}], lr=peak, betas=(0.9, 0.98)
    )
    rng = np.random.default_rng(seed + 2)
    batches = dialogues_by_length(rng, processor, items, batch_size, steps)
    start, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        rate = peak * min(1.0, step / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        dialogues, chosen = next(batches)
        with_image = [index for turns, index in zip(dialogues, chosen, strict=True) if "<image>" in turns[0][0]]
        about_items = collate(processor, dialogues)
        preferences = collate(processor, [condensing(rng) for _ in range(batch_size // 4)])
        total = 0.0
        for batch, images in ((about_items, pixels[with_image] if with_image else None), (preferences, None)):
            loss = model(pixel_values=images, **batch).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        if step % 100 == 0:
            elapsed = time.monotonic() - start
            print(f"step {step}/{steps} {elapsed:.0f} s loss {sum(losses[-100:]) / 100:.3f}", flush=True)
        if step % 250 == 0:
            model.eval()
            print(json.dumps(examine(model, processor, seed + 3)), flush=True)
            model.train()
            save(model, processor, output)
    model.eval()
    print(json.dumps(examine(model, processor, seed + 4)), flush=True)
    save(model, processor, output)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, output: Path) -> None:
    half = LlavaForConditionalGeneration(model.config).half()
    half.load_state_dict({name: value.half() for name, value in model.state_dict().items()})
    half.save_pretrained(output)
    processor.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--images", type=int, default=12000)
    options = parser.parse_args()
    pretrain(
        options.steps, options.seed, options.output, options.vocab_size, options.batch_size, n_images=options.images
    )


if __name__ == "__main__":
    main()

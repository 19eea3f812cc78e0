"""Stock backbone repositories of a few thousand random weights, one for each supported family.

Weights are drawn anew with a standard deviation of 0.1: the small default initialisation would hide errors, since
attention is then nearly uniform.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    InternVLConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)

# Put before a script, it makes the script run as if the package were not installed.
WITHOUT_PACKAGE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mllm_msr":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
"""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CORPUS = [
    "What a user prefers: quiet red films with ships and long summers. Candidate film: The Sea of No Return.",
    "Title of the item: Yes and No. Picture of the candidate: blue stripes. Will the user choose this item?",
    "yes no Yes No. Answer Yes or No. Reply with one paragraph of preferences only, without naming single titles.",
]

# Chat templates in the manner of the families' own.
IMAGES_FIRST = (
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
)
LLAVA = (
    "{% for message in messages %}{{ message.role | upper }}: " + IMAGES_FIRST + "{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] " + IMAGES_FIRST + " [/INST]"
    "{% else %}{{ message.content[0].text }}</s>{% endif %}{% endfor %}"
)
IDEFICS = (
    "<s>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def chatml(image: str) -> str:
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}{{ '" + image + "' }}{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


GEMMA = (
    "<bos>{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA = (
    "<s>{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Family:
    """How to build a family's repository: ``config`` takes a function from tokens to ids."""

    config: Callable[[Callable[[str], int], int], PreTrainedConfig]
    chat_template: str
    processor: str
    image_processor: Any
    special: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)  # tokens the tokenizer knows by name
    settings: dict[str, Any] = field(default_factory=dict)  # of the processor
    adds_bos: bool = False


def tokenizer(
    special: tuple[str, ...], template: str, named: dict[str, str], adds_bos: bool
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's special tokens and, as real ones have it, an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    known = ["<pad>", "<s>", "</s>", *special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=600, special_tokens=known, initial_alphabet=alphabet)
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>" if "<bos>" in special else "<s>",
        eos_token="</s>",
        extra_special_tokens=named,
        chat_template=template,
    )
    made.add_tokens(["<tool_call>"])
    return made


def llava(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    vision = CLIPVisionConfig(**VISION, image_size=28, patch_size=14)
    text = LlamaConfig(**TEXT, vocab_size=size)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=token("<image>"))


def llava_next(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=28, patch_size=14),
        text_config=MistralConfig(**TEXT, vocab_size=size, sliding_window=None),
        image_token_index=token("<image>"),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )


def llava_onevision(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=28, patch_size=14, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, vocab_size=size),
        image_token_index=token("<image>"),
        video_token_index=token("<video>"),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )


def idefics3(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    return Idefics3Config(
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        text_config=LlamaConfig(**TEXT, vocab_size=size, pad_token_id=0),
        image_token_id=token("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


def smolvlm(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    return SmolVLMConfig(**{k: v for k, v in idefics3(token, size).to_dict().items() if k != "model_type"})


def qwen_ids(token: Callable[[str], int]) -> dict[str, int]:
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def qwen_text(size: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return {**TEXT, "vocab_size": size, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}


def qwen2_vl(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 4, "patch_size": 14}
    return Qwen2VLConfig(text_config=qwen_text(size), vision_config=vision, **qwen_ids(token))


def qwen2_5_vl(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=qwen_text(size), vision_config=vision, **qwen_ids(token))


def qwen3_vl(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    vision |= {"patch_size": 14, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    return Qwen3VLConfig(text_config={**qwen_text(size), "head_dim": 8}, vision_config=vision, **qwen_ids(token))


def gemma3(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    text = {**TEXT, "vocab_size": size, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    return Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0},
        vision_config={**VISION, "image_size": 28, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"),
    )


def internvl(token: Callable[[str], int], size: int) -> PreTrainedConfig:
    return InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=Qwen2Config(**TEXT, vocab_size=size),
        image_token_id=token("<IMG_CONTEXT>"),
        image_seq_length=4,
    )


CLIP = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
PINPOINTS: dict[str, Any] = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
QWEN_IMAGES = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84})
QWEN = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_CHAT = chatml("<|vision_start|><|image_pad|><|vision_end|>")
ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
SMOL = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *ROWS)
GEMMA_NAMES = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
INTERN_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPLIT = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
FAMILIES = {
    "llava": Family(
        llava,
        LLAVA,
        "LlavaProcessor",
        CLIP,
        ("<image>",),
        {"image_token": "<image>"},
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        adds_bos=True,
    ),
    "llava_next": Family(
        llava_next,
        MISTRAL,
        "LlavaNextProcessor",
        LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **PINPOINTS),
        ("<image>",),
        {"image_token": "<image>"},
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        adds_bos=True,
    ),
    "llava_onevision": Family(
        llava_onevision,
        chatml("<image>"),
        "LlavaOnevisionProcessor",
        LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, **PINPOINTS),
        ("<image>", "<video>", "<|im_start|>", "<|im_end|>"),
        settings={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "idefics3": Family(
        idefics3, IDEFICS, "Idefics3Processor", Idefics3ImageProcessorPil(**SPLIT), SMOL, settings={"image_seq_len": 4}
    ),
    "smolvlm": Family(
        smolvlm, IDEFICS, "SmolVLMProcessor", SmolVLMImageProcessorPil(**SPLIT), SMOL, settings={"image_seq_len": 4}
    ),
    "qwen2_vl": Family(qwen2_vl, QWEN_CHAT, "Qwen2VLProcessor", QWEN_IMAGES, QWEN),
    "qwen2_5_vl": Family(qwen2_5_vl, QWEN_CHAT, "Qwen2_5_VLProcessor", QWEN_IMAGES, QWEN),
    "qwen3_vl": Family(qwen3_vl, QWEN_CHAT, "Qwen3VLProcessor", QWEN_IMAGES, QWEN),
    "gemma3": Family(
        gemma3,
        GEMMA,
        "Gemma3Processor",
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        ("<bos>", "<start_of_turn>", "<end_of_turn>", *GEMMA_NAMES.values()),
        GEMMA_NAMES,
        {"image_seq_length": 4},
    ),
    "internvl": Family(
        internvl,
        chatml("<IMG_CONTEXT>\\n"),
        "InternVLProcessor",
        GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4),
        ("<|im_start|>", "<|im_end|>", *INTERN_NAMES.values()),
        INTERN_NAMES,
        {"image_seq_length": 4},
    ),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (1 if parameter.ndim == 1 else 0))


def save_backbone(name: str, folder: Path) -> Path:
    """Write the family's stock repository, laid out as those on the Hub are."""
    family = FAMILIES[name]
    tokens = tokenizer(family.special, family.chat_template, family.named, family.adds_bos)
    model = AutoModelForImageTextToText.from_config(family.config(tokens.convert_tokens_to_ids, len(tokens)))
    randomise(model)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    family.image_processor.save_pretrained(folder)
    settings = {"processor_class": family.processor, **family.settings}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def save_language_model(folder: Path) -> Path:
    """A text-only language model, which can write preferences but not see candidates."""
    tokens = tokenizer(("<|im_start|>", "<|im_end|>"), LLAMA, {}, False)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokens)))
    randomise(model)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def draw_image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Noise in colour, never black: some families take black for padding."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 255, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


transformers.logging.disable_progress_bar()

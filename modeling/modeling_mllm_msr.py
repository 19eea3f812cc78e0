"""The recommender: any image-text-to-text backbone, asked whether a user will choose a candidate."""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput, cached_file

from .block_attention import BLOCK_ATTENTION
from .configuration_mllm_msr import MllmMsrConfig
from .image_features import encoder_outputs
from .item_ranking import PREFIX, ItemRanker
from .last_layer import compute_answers_only
from .lora import adapter_layers, merge_adapter, save_adapter
from .naming import naming, pinned

MEMORY = "item_memory.safetensors"  # beside an adapter
ADAPTER = "adapter"  # where a repository keeps it; at the root, AutoModel would take the repository for PEFT's own
OWN = ("revision", "subfolder", "code_revision", "adapter_kwargs")
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder")


@dataclass
class RecommendationOutput(ModelOutput):
    """Scores of B pairs of a user and a candidate.

    logits: (B,) float32, logsumexp over the Yes tokens less logsumexp over the No tokens; rank by these.
    probabilities: (B,) float32, sigmoid of the logits: p(yes) / (p(yes) + p(no)) (paper, section on the recommender).
    """

    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None


class MllmMsrForRecommendation(PreTrainedModel, GenerationMixin):
    config_class = MllmMsrConfig
    base_model_prefix = "backbone"  # so that a plain backbone's checkpoint loads with no missing keys
    input_modalities: Any = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected: Any = (rf"^{re.escape(PREFIX)}",)  # loaded beside the model, see `attach`
    item_ranker: ItemRanker | None = None
    _packs = False  # whether the decoder has been made to compute packed rows
    item_memory: Any  # an embedding (`config.item_memory`, D), or None

    def __init__(self, config: MllmMsrConfig):
        super().__init__(config)
        if config.vlm_config is None:
            raise ValueError("MllmMsrConfig(vlm_config=...) is missing: there is no default backbone")
        if type(config.vlm_config) not in AutoModelForImageTextToText._model_mapping:
            raise ValueError(
                f"{config.vlm_config.model_type!r} is not an image-text-to-text model, so it cannot see the "
                "candidates; choose a backbone that AutoModelForImageTextToText knows"
            )
        if config.vlm_config.is_encoder_decoder:
            raise ValueError(
                f"{config.vlm_config.model_type!r} is an encoder-decoder, but user, candidate and answer are one "
                "sequence (interaction='joint'); choose a decoder-only backbone"
            )
        self.backbone = AutoModelForImageTextToText.from_config(config.vlm_config)
        self.item_memory = None
        if config.item_memory:
            self.item_memory = nn.Embedding(config.item_memory, config.get_text_config(decoder=True).hidden_size)
        self.post_init()
        layers = {type(module).__name__ for module in self.modules()}  # CLIP also names layers of its text side
        self._no_split_modules = layers & set(self._no_split_modules or ())

    @classmethod
    def from_backbone(
        cls,
        id_or_path: str | os.PathLike,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        processor: Any = None,
        **kwargs: Any,
    ) -> "MllmMsrForRecommendation":
        """An untrained recommender around a stock backbone.

        Args:
            id_or_path: a Hub id or a folder, with `revision` as everywhere in transformers. A trained recommender in
                the place of a backbone is loaded whole, its adapter merged, to be trained further; its item ranker
                stays behind, as it is of another catalogue.
            processor: the backbone's [`MllmMsrProcessor`], which knows the answers' tokens.
            kwargs: as in `from_pretrained` (`device_map`, ...).
        """
        hub = {name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if name in kwargs}
        with naming(id_or_path):
            revision = pinned(id_or_path, revision, **hub)
            where = {"revision": revision} if revision else {}
            vlm_config = AutoConfig.from_pretrained(id_or_path, **where, **hub)
        given = {"attn_implementation": attn_implementation, "quantization_config": quantization_config, "dtype": dtype}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        if vlm_config.model_type == cls.config_class.model_type:  # one of ours, to be trained further
            model: Any = cls.from_pretrained(id_or_path, **where, **kwargs).merge()
            model.config.backbone_name_or_path = model.config.backbone_revision = None  # no adapter could name it
            model.attach(None)
            return model
        config = cls.config_class(
            vlm_config=vlm_config,
            answer_token_ids=processor.answer_token_ids if processor is not None else None,
            backbone_name_or_path=str(id_or_path),
            backbone_revision=revision,
        )
        if getattr(vlm_config, "quantization_config", None) is not None:  # the backbone's checkpoint is quantised
            config.quantization_config = vlm_config.quantization_config
        return cls.from_pretrained(id_or_path, config=config, **where, **kwargs)

    # ---- a transformers model in all but its layers, which are the backbone's ------------------------------------

    @property
    def base_model(self) -> nn.Module:
        return self.backbone.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.backbone.get_decoder()

    def enable_input_require_grads(self) -> None:
        """What gradient checkpointing needs under an adapter; the frozen vision tower is to keep no graph."""
        decoder: Any = self.get_decoder()
        decoder.enable_input_require_grads()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own `generate`."""
        return self.backbone.generate(*args, **kwargs)

    def use_block_attention(self) -> None:
        """Let the decoder compute packed rows (`packing.py`) from now on; all other rows are computed by sdpa.

        It stays so: layers that gradient checkpointing computes again look up their attention again.
        """
        decoder: Any = self.get_decoder()
        decoder.set_attn_implementation(BLOCK_ATTENTION)
        if not self._packs:
            decoder.register_forward_pre_hook(self._insert_memory, with_kwargs=True)
            compute_answers_only(decoder.layers[-1])
            self._packs = True

    def set_item_memory(self, count: int) -> None:
        """Give a `late` model so many new memory tokens; 0 takes those that it has away.

        Each begins as the mean of a stretch of the candidate's text or of its image; what is learned is added.

        Raises:
            ValueError: the count is no whole number of at least 0, or the model is `joint`.
        """
        if type(count) is not int or count < 0:
            raise ValueError(f"item_memory={count!r}: must be a whole number of at least 0")
        if count and self.config.interaction == "joint":
            raise ValueError(f"item_memory={count} needs interaction='late': set config.interaction before")
        self.config.item_memory, self.item_memory = count, None
        if count:
            vocabulary: Any = self.get_input_embeddings()
            begin = vocabulary.weight.new_zeros(count, vocabulary.weight.shape[1])
            self.item_memory = nn.Embedding(count, begin.shape[1], _weight=begin)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The backbone's forward pass and output.

        Args:
            input_ids, attention_mask, labels: (B, L); the loss is next-token cross-entropy where labels are not -100.
            logits_to_keep: compute the logits of the last so many positions only (0: of all), or of these positions.
            image_features: what `encode_images` returned for the batch's images, in their order, in place of
                `pixel_values` and its companions.
            kwargs: the backbone's; `packing.py` makes all arguments for rows in which prompts share what they can.
        """
        if image_features:
            kwargs.pop("pixel_values", None)
            kwargs["mm_encoder_outputs"] = encoder_outputs(self.backbone, image_features)
        return self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, logits_to_keep=logits_to_keep, **kwargs
        )

    def _insert_memory(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before the decoder's forward, when images are in their places: put a packed row's memory tokens in theirs."""
        memory = getattr(kwargs.get("block_layout"), "memory", None)
        if memory is None:
            return None
        learned = self.item_memory(torch.arange(memory.places.shape[1], device=memory.places.device))
        embedded = memory.put(kwargs["inputs_embeds"], learned)
        return args, {**kwargs, "inputs_embeds": embedded}

    def answer_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., V) logits at the answer's position to (...) float32: logsumexp over Yes less logsumexp over No."""
        answers = self.config.answer_token_ids
        if answers is None:
            raise ValueError("config.answer_token_ids is not set: load with from_backbone(..., processor=processor)")
        yes, no = (logits[..., answers[side]].float().logsumexp(-1) for side in ("yes", "no"))
        return yes - no

    @torch.no_grad()
    def score(self, **batch: Any) -> RecommendationOutput:
        """Score the B pairs of a batch from the processor, padded on the left, or of a packed row.

        Args:
            batch: the arguments of `forward` that the processor or `packing.py` made, without labels, on any device.

        Raises:
            ValueError: the batch has labels, or whole prompts for a model with `interaction="late"`.
        """
        if "labels" in batch:
            raise ValueError("a batch with labels already has its answers; call the processor without labels to score")
        if self.config.interaction == "late" and "block_layout" not in batch:
            raise ValueError(
                "a model with interaction='late' scores no whole prompts: give it what pack_late makes of the "
                "processor's late_blocks, or use Recommender"
            )
        if (device := self.device).type != "meta":  # where its first layers are not on a disk
            batch = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
            }
        logits = self.answer_logits(self(**{"logits_to_keep": 1, **batch}).logits.flatten(0, 1))
        return RecommendationOutput(logits=logits, probabilities=logits.sigmoid())

    # ---- adapters, loading and saving ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As everywhere in transformers; a repository that holds an adapter is loaded on top of its pinned backbone.

        `revision` is then the adapter's; the backbone's is in the configuration.
        """
        with naming(pretrained_model_name_or_path):
            kwargs["revision"] = pinned(pretrained_model_name_or_path, **kwargs) or "main"
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        saved = config
        if not isinstance(config, PreTrainedConfig):
            with naming(pretrained_model_name_or_path):
                saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        saved.require_backbone(pretrained_model_name_or_path)
        ranker = None
        if saved.sequence_head is not None:
            ranker = ItemRanker.from_pretrained(pretrained_model_name_or_path, saved.sequence_head, **hub)
        if saved.adapter is None:
            with naming(pretrained_model_name_or_path):
                loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded).attach(ranker)
            return loaded
        # these are of this repository, not of the backbone's
        own = {name: kwargs.pop(name) for name in OWN if name in kwargs}
        where = {"revision": saved.backbone_revision} if saved.backbone_revision else {}
        memory, saved.item_memory = saved.item_memory, 0  # which the backbone has not
        with naming(saved.backbone_name_or_path):
            loaded = super().from_pretrained(saved.backbone_name_or_path, *model_args, config=saved, **where, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub.update(subfolder="/".join(part for part in (own.get("subfolder"), saved.adapter) if part))
        with naming(pretrained_model_name_or_path):
            if memory:
                model._load_item_memory(memory, cached_file(pretrained_model_name_or_path, MEMORY, **hub))
            model.backbone.load_adapter(str(pretrained_model_name_or_path), adapter_kwargs=hub)
        model.attach(ranker)
        return loaded

    @torch.no_grad()
    def _load_item_memory(self, count: int, file: Any) -> None:
        """Memory tokens from the file that lies beside an adapter."""
        self.set_item_memory(count)
        with safe_open(file, framework="pt") as weights:
            self.item_memory.weight.copy_(weights.get_tensor("weight"))

    def attach(self, ranker: ItemRanker | None) -> None:
        """Make `ranker` this checkpoint's `item_ranker`, saved and loaded with it; None takes it away.

        It is no submodule: it is not trained, cast, quantised, sharded or moved with the model, and stays in float32 on
        the device where it is.
        """
        self.__dict__["item_ranker"] = ranker
        self.config.sequence_head = None if ranker is None else ranker.to_config()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write all weights, or, while an adapter is live, only that, for the backbone the configuration names.

        The item ranker's weights are in the same file or files, or, beside an adapter, in `model.safetensors`; its
        items in `items.json`. Those of memory tokens are likewise, or in `adapter/item_memory.safetensors`.
        """
        from .pipeline import CUSTOM_PIPELINES  # here, as it takes a while; its code is saved with this file's

        self.config.custom_pipelines = CUSTOM_PIPELINES
        self.attach(self.item_ranker)  # as it is by now
        if self.item_ranker is not None:
            os.makedirs(save_directory, exist_ok=True)
            self.item_ranker.save_items(save_directory)
        if not any(adapter_layers(self)):
            with self._one_state_dict(kwargs):
                super().save_pretrained(save_directory, *args, **kwargs)
            return
        if not self.config.backbone_name_or_path:
            raise ValueError("config.backbone_name_or_path must say what the adapter belongs to; or merge() it first")
        os.makedirs(save_directory, exist_ok=True)
        config: Any = copy.deepcopy(self.config)
        config.adapter = ADAPTER
        quantizer: Any = getattr(self, "hf_quantizer", None)
        if quantizer is not None and not quantizer.pre_quantized:
            del config.quantization_config  # the backbone's own weights are not; whoever loads decides anew
        config.architectures = [type(self).__name__]
        custom_object_save(self, save_directory, config=config)
        config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)
        save_adapter(
            self.backbone,
            getattr(self, "peft_config", None) or self.backbone.peft_config,
            os.path.join(save_directory, ADAPTER),
            base_model_name_or_path=config.backbone_name_or_path,
            revision=config.backbone_revision,
        )
        if self.item_ranker is not None:
            self.item_ranker.save_weights(save_directory)
        if self.item_memory is not None:
            trained = getattr(self.item_memory, "modules_to_save", None)  # if PEFT has wrapped it
            memory = self.item_memory if trained is None else trained[self.item_memory.active_adapters[0]]
            weight = memory.weight.detach().cpu().contiguous()
            save_file({"weight": weight}, os.path.join(save_directory, ADAPTER, MEMORY), metadata={"format": "pt"})

    @contextmanager
    def _one_state_dict(self, saving: dict[str, Any]) -> Iterator[None]:
        """While it lasts, the item ranker's weights are among the model's; `saving`: options of `save_pretrained`."""
        if self.item_ranker is None:
            yield
            return
        if saving.get("state_dict") is not None:  # a trainer has gathered the model's
            saving["state_dict"] = {**saving["state_dict"], **self.item_ranker.weights()}
        self._modules["item_ranker"] = self.item_ranker
        try:
            yield
        finally:
            del self._modules["item_ranker"]

    def merge(self) -> "MllmMsrForRecommendation":
        """Merge a live adapter into the weights, in place."""
        merge_adapter(self)
        self.config.adapter = None
        if self.get_output_embeddings().weight is not self.get_input_embeddings().weight:  # one was trained whole
            self.config.vlm_config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
        return self

    def export_backbone(self, path: str | os.PathLike) -> None:
        """Save the backbone alone, as a stock checkpoint that any tool for it can serve."""
        if any(adapter_layers(self)):
            raise ValueError("merge() the adapter before exporting the backbone")
        if getattr(self, "hf_quantizer", None) is not None:  # it knows how its weights are written
            self.backbone.hf_quantizer = self.hf_quantizer
            self.backbone.config.quantization_config = self.config.quantization_config
        self.backbone.save_pretrained(path)


MllmMsrForRecommendation.register_for_auto_class("AutoModel")

"""The recommender: any image-text-to-text backbone, asked whether a user will choose a candidate."""

import copy
import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput, cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_mllm_msr import MllmMsrConfig
from .families import FAMILIES
from .lora import adapter_layers, merge_adapter, save_adapter
from .packing import TYPES, pack_joint, pack_late

TEXTUAL = ("input_ids", "attention_mask", *TYPES)
ADAPTER = "adapter"  # where a repository keeps it; at the root, AutoModel would take the repository for PEFT's own
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder")


@dataclass
class RecommendationOutput(ModelOutput):
    """Scores of B pairs of a user and a candidate.

    logits: (B,) float32, logsumexp over the Yes tokens less logsumexp over the No tokens; rank by these.
    probabilities: (B,) float32, sigmoid of the logits: p(yes) / (p(yes) + p(no)) (paper, section on the recommender).
    """

    logits: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None


@dataclass
class PictureFeatures(ModelOutput):
    """What backbones take for pictures that have been through the vision tower already."""

    pooler_output: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    deepstack_features: list[tuple[torch.Tensor, ...]] | None = None


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
        self.post_init()
        there = {type(module).__name__ for module in self.modules()}  # CLIP also names layers of its text side
        self._no_split_modules = there & set(self._no_split_modules or ())

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
                the place of a backbone is loaded whole, its adapter merged, to be trained further.
            processor: the backbone's [`MllmMsrProcessor`], which knows the answers' tokens.
            kwargs: as in `from_pretrained` (`device_map`, ...).
        """
        hub = {name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if name in kwargs}
        if not os.path.isdir(id_or_path):  # pinned to the commit that this revision is today
            config_file = cached_file(id_or_path, "config.json", revision=revision, **hub)
            revision = extract_commit_hash(config_file, None) or revision
        where = {"revision": revision} if revision else {}
        vlm_config = AutoConfig.from_pretrained(id_or_path, **where, **hub)
        given = {"attn_implementation": attn_implementation, "quantization_config": quantization_config, "dtype": dtype}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        if vlm_config.model_type == cls.config_class.model_type:  # one of ours, to be trained further
            model: Any = cls.from_pretrained(id_or_path, **where, **kwargs)
            merge_adapter(model)
            for name in ("adapter", "backbone_name_or_path", "backbone_revision"):  # no adapter could name it
                setattr(model.config, name, None)
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

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: list[torch.Tensor] | None = None,
        owners: torch.LongTensor | None = None,
        users: Any = None,
        items: Any = None,
        answer_ids: Any = None,
        pairs: Any = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The backbone's forward pass and output.

        Args:
            input_ids, attention_mask, labels: (B, L); the loss is next-token cross-entropy where labels are not -100.
            logits_to_keep: compute the logits of the last so many positions only (0: of all).
            image_features: what `image_features` returned for the batch's pictures, in their order, in place of
                `pixel_values` and its companions.
            owners: (B,) rows with equal numbers begin alike, and what they share is computed once: see `blocks.py`.
            users, items, answer_ids, pairs: in place of `input_ids`, what the processor's `blocks` returned, and
                (2, P) which user and which item make a pair (`interaction="late"`).

        Returns:
            The backbone's output; with `owners` or `pairs` its `logits` are those of the answers, (B, V) or (P, V).
        """
        if users is not None:
            kwargs.update({name: value for name, value in items.items() if name not in TEXTUAL})
        if users is not None:
            return self.answers(pack_late(self, users, items, answer_ids, pairs), image_features, **kwargs)
        if owners is not None:
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
            return self.answers(pack_joint(self, batch, owners), image_features, **kwargs)
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **self._pictures(image_features, kwargs),
        )

    def answers(
        self, packed: dict[str, Any], image_features: list[torch.Tensor] | None = None, **pictures: Any
    ) -> ModelOutput:
        """The backbone's output for a row from `packing.py`, its logits (P, V): those of the last token of each leaf.

        Args:
            image_features, pictures: as in `forward`; what else a batch of the processor has is not looked at.
        """
        known = self._pictures(image_features, pictures)
        output = self.backbone(**{name: value for name, value in known.items() if name not in TEXTUAL} | packed)
        output.logits = output.logits[0]
        return output

    def _pictures(self, image_features: list[torch.Tensor] | None, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with features, if they are given, in place of pixels."""
        if image_features is None:
            return batch
        kept = {name: value for name, value in batch.items() if name != "pixel_values"}
        return {**kept, "mm_encoder_outputs": {"image": self._picture_features(image_features)}}

    @torch.no_grad()
    def image_features(self, num_image_tokens: list[int] | None = None, **batch: Any) -> list[torch.Tensor]:
        """What the decoder sees of each picture, computed once to be used in any later batch.

        Args:
            num_image_tokens: how many tokens each picture has in a prompt; needed by families that do not say.
            batch: the pictures' tensors; what else a batch from the processor has is not looked at.

        Returns:
            For each picture (tokens, F), where F is the decoder's width times one plus the number of its layers that
            see the picture again (Qwen3-VL).
        """
        encode: Any = self.base_model.get_image_features
        known = set(inspect.signature(encode).parameters) | {"pixel_values"}
        output = encode(**{name: value for name, value in batch.items() if name in known}, return_dict=True)
        pooled = output.pooler_output
        if isinstance(pooled, torch.Tensor):
            if num_image_tokens is None:
                raise ValueError(f"{self.config.vlm_config.model_type} needs num_image_tokens to tell pictures apart")
            pooled = pooled.reshape(-1, pooled.shape[-1]).split(num_image_tokens)
        deep = getattr(output, "deepstack_features", None) or []
        return [torch.cat(layers, -1) for layers in zip(pooled, *deep, strict=True)]

    def _picture_features(self, image_features: list[torch.Tensor]) -> PictureFeatures:
        """The backbone's form of what `image_features` returned."""
        family = FAMILIES.get(self.config.vlm_config.model_type)
        if family is None:
            raise ValueError(
                f"it is not known how {self.config.vlm_config.model_type} takes features; give pixel_values"
            )
        depth = image_features[0].shape[-1] // self.config.get_text_config().hidden_size
        pooled, *deep = zip(*(features.chunk(depth, -1) for features in image_features), strict=True)
        return PictureFeatures(torch.cat(pooled) if family.one_tensor else pooled, deep or None)

    def answer_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., V) logits at the answer's position to (...) float32: logsumexp over Yes less logsumexp over No."""
        answers = self.config.answer_token_ids
        if answers is None:
            raise ValueError("config.answer_token_ids is not set: load with from_backbone(..., processor=processor)")
        yes, no = (logits[..., answers[side]].float().logsumexp(-1) for side in ("yes", "no"))
        return yes - no

    @torch.no_grad()
    def score(self, **batch: Any) -> RecommendationOutput:
        """Score the B pairs of a batch from the processor, padded on the left: all answers are due at the end.

        With `interaction="late"` the P pairs of what the processor's `blocks` returned.
        """
        if "labels" in batch:
            raise ValueError("a batch with labels already has its answers; call the processor without labels to score")
        if (self.config.interaction == "late") != ("users" in batch):
            wanted = "blocks(...) and pairs" if self.config.interaction == "late" else "whole prompts"
            raise ValueError(f"a model with interaction={self.config.interaction!r} scores {wanted} of the processor")
        whole = "users" not in batch and "owners" not in batch
        logits = self(**batch, logits_to_keep=1).logits[:, -1] if whole else self(**batch).logits
        logits = self.answer_logits(logits)
        return RecommendationOutput(logits=logits, probabilities=logits.sigmoid())

    # ---- adapters, loading and saving ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As everywhere in transformers; a repository that holds an adapter is loaded on top of its pinned backbone.

        `revision` is then the adapter's; the backbone's is in the configuration.
        """
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        known = (
            config
            if isinstance(config, PreTrainedConfig)
            else cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        )
        if known.adapter is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        mine = ("revision", "subfolder", "code_revision", "adapter_kwargs")  # of this repository, not of the backbone's
        own = {name: kwargs.pop(name) for name in mine if name in kwargs}
        where = {"revision": known.backbone_revision} if known.backbone_revision else {}
        loaded = super().from_pretrained(known.backbone_name_or_path, *model_args, config=known, **where, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub.update(subfolder="/".join(part for part in (own.get("subfolder"), known.adapter) if part))
        model.backbone.load_adapter(str(pretrained_model_name_or_path), adapter_kwargs=hub)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write all weights, or, while an adapter is live, only that, for the backbone the configuration names."""
        from .pipeline import CUSTOM_PIPELINES  # here, as it takes a while; its code is saved with this file's

        self.config.custom_pipelines = CUSTOM_PIPELINES
        if not any(adapter_layers(self)):
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

    def merge(self) -> "MllmMsrForRecommendation":
        """Merge a live adapter into the weights, in place."""
        merge_adapter(self)
        self.config.adapter = None
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

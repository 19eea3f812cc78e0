"""The recommender: any image-text-to-text backbone, asked whether a user will choose a candidate."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_mllm_msr import MllmMsrConfig
from .lora import adapter_layers, merge_adapter


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
    input_modalities = ("image", "text")
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
                f"{config.vlm_config.model_type!r} is not an image-text-to-text model, so it cannot see the candidates; "
                "choose a backbone that AutoModelForImageTextToText knows"
            )
        self.backbone = AutoModelForImageTextToText.from_config(config.vlm_config)
        self.post_init()

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
            id_or_path: a Hub id or a folder, with `revision` as everywhere in transformers.
            processor: the backbone's [`MllmMsrProcessor`], which knows the answers' tokens.
            kwargs: as in `from_pretrained` (`device_map`, ...).
        """
        where = {"revision": revision} if revision else {}
        vlm_config = AutoConfig.from_pretrained(id_or_path, **where)
        config = cls.config_class(
            vlm_config=vlm_config,
            answer_token_ids=processor.answer_token_ids if processor is not None else None,
            backbone_name_or_path=str(id_or_path),
            backbone_revision=revision,
        )
        if getattr(vlm_config, "quantization_config", None) is not None:  # the backbone's checkpoint is quantised
            config.quantization_config = vlm_config.quantization_config
        given = {"attn_implementation": attn_implementation, "quantization_config": quantization_config, "dtype": dtype}
        kwargs.update({name: value for name, value in given.items() if value is not None})
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
        **kwargs: Any,
    ) -> ModelOutput:
        """The backbone's forward pass and output.

        Args:
            input_ids, attention_mask, labels: (B, L); the loss is next-token cross-entropy where labels are not -100.
            logits_to_keep: compute the logits of the last so many positions only (0: of all).
            image_features: what `image_features` returned for the batch's pictures, in their order, in place of
                `pixel_values` and its companions.
        """
        if image_features is not None:
            kwargs.pop("pixel_values", None)
            kwargs["mm_encoder_outputs"] = {"image": self._as_encoder_output(image_features)}
        return self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, logits_to_keep=logits_to_keep, **kwargs
        )

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
        encode = self.base_model.get_image_features
        known = set(inspect.signature(encode).parameters) | {"pixel_values"}
        output = encode(**{name: value for name, value in batch.items() if name in known}, return_dict=True)
        pooled = output.pooler_output
        if isinstance(pooled, torch.Tensor):
            flat = pooled.reshape(-1, pooled.shape[-1])
            if num_image_tokens is None:
                if len(flat) % len(pooled):
                    raise ValueError("give num_image_tokens")
                num_image_tokens = [pooled.shape[1]] * len(pooled)
            pooled = flat.split(num_image_tokens)
        deep = getattr(output, "deepstack_features", None) or []
        return [torch.cat([first, *rest], -1) for first, *rest in zip(pooled, *deep, strict=True)]

    def _as_encoder_output(self, image_features: list[torch.Tensor]) -> ModelOutput:
        layers = list(zip(*(part.chunk(1 + self._deepstack, -1) for part in image_features), strict=True))
        ...

    def answer_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., V) logits at the answer's position to (...) float32: logsumexp over Yes less logsumexp over No."""
        answers = self.config.answer_token_ids
        if answers is None:
            raise ValueError("config.answer_token_ids is not set: load with from_backbone(..., processor=processor)")
        yes, no = (logits[..., answers[side]].float().logsumexp(-1) for side in ("yes", "no"))
        return yes - no

    @torch.no_grad()
    def score(self, **batch: Any) -> RecommendationOutput:
        """Score the B pairs of a batch from the processor (padded on the left, so that all answers are due at the end)."""
        if "labels" in batch:
            raise ValueError("a batch with labels already has its answers; call the processor without labels to score")
        logits = self.answer_logits(self(**batch, logits_to_keep=1).logits[:, -1])
        return RecommendationOutput(logits=logits, probabilities=logits.sigmoid())

    # ---- saving ------------------------------------------------------------------------------------------------

    def merge(self) -> "MllmMsrForRecommendation":
        """Merge a live adapter into the weights, in place."""
        merge_adapter(self)
        return self

    def export_backbone(self, path: str | os.PathLike) -> None:
        """Save the backbone alone, as a stock checkpoint that any tool for it can serve."""
        if any(adapter_layers(self)):
            raise ValueError("merge() the adapter before exporting the backbone")
        self.backbone.save_pretrained(path)


MllmMsrForRecommendation.register_for_auto_class("AutoModel")

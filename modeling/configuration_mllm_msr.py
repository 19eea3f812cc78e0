"""Configuration of the recommender: a backbone's configuration and what its answers mean."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class MllmMsrConfig(PreTrainedConfig):
    """Everything that decides what a checkpoint means.

    Args:
        vlm_config: the configuration of the image-text-to-text backbone, as an object or a dict with its `model_type`.
        interaction: how user and candidate meet. `joint` puts both into one causal sequence (the paper's way). In
            `late` they do not see each other, and only the last few tokens, which ask for the answer, see both: so
            each user and each candidate is computed once, whatever it is paired with.
        user_limit: with `late`, the most tokens of a user, and the position at which candidates begin.
        item_limit: with `late`, the most tokens of a candidate; answers begin at `user_limit + item_limit +
            item_memory`.
        item_memory: with `late`, how many memory tokens, whose embeddings are learned, stand after each candidate. They
            see all of it, and the answer sees of it nothing but them, so they are all that is kept of it. 0: none, and
            the answer sees all of the candidate.
        answer_token_ids: `{"yes": [...], "no": [...]}`, the first tokens of the two answers as the backbone's chat
            template writes them; the one to train on comes first, other spellings after it. The two must not overlap.
        backbone_name_or_path: where the backbone came from; an adapter repository is loaded on top of it.
        backbone_revision: its pinned revision.
        adapter: the folder of the LoRA adapter, in a repository that holds one in place of all weights.
        sequence_head: what ranks by item vectors, if the checkpoint has it, as `ItemRanker.to_config` says it: options
            of each head, reach of the likeness, weights of the fusion, sizes.
    """

    model_type = "mllm_msr"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vlm_config": SubConfigSpec(AutoConfig, model_type="llava", optional=True)  # the type is never used
    }

    vlm_config: Any = None
    interaction: str = "joint"
    user_limit: int = 512
    item_limit: int = 1024
    item_memory: int = 0
    answer_token_ids: dict[str, list[int]] | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    adapter: str | None = None
    sequence_head: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.interaction not in ("joint", "late"):
            raise ValueError(f"interaction={self.interaction!r} is not known; there are 'joint' and 'late'")
        for name, least in (("user_limit", 1), ("item_limit", 1), ("item_memory", 0)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")
        if self.item_memory and self.interaction == "joint":
            raise ValueError(f"item_memory={self.item_memory} needs interaction='late': leave it out, or at 0")
        if self.answer_token_ids is not None:
            yes, no = (set(self.answer_token_ids.get(side, ())) for side in ("yes", "no"))
            if not yes or not no or yes & no:
                raise ValueError(f"the answers need distinct tokens, not {self.answer_token_ids}")

    def require_backbone(self, name: object) -> None:
        """Raise ValueError, which begins with ``name``, if this was read from something else than a recommender."""
        if self.vlm_config is None:
            raise ValueError(
                f"{name} is no recommender: it has no config.json with `vlm_config`. A run has its recommender in the "
                "folder `model`; a stock backbone becomes one by `from_backbone`"
            )

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        if self.vlm_config is None:
            return self
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)


MllmMsrConfig.register_for_auto_class()

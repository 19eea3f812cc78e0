"""The smallest runs of the demo's world, from raw data to report in seconds; and own tables of a small shop."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_msr.records.recipe import Recipe, parse_recipe, with_settings

TINY: dict[str, Any] = {
    "name": "shop",
    "source": {"type": "demo", "seed": 1, "n_users": 12, "n_items": 40},
    "data": {"n_negatives": 5, "max_train_targets": 1, "k_core_users": 1, "k_core_items": 1},
    "summaries": {"engine": "extractive"},
    "training": {
        "model_name_or_path": "demo",
        "dtype": "float32",
        "bf16": False,
        "use_peft": True,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "seed": 0,
    },
    "evaluation": {"rows": ["mllm_msr", "popularity"]},
}


def tiny_recipe(settings: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a tiny run under ``{"section.name": value}``."""
    return parse_recipe(with_settings(TINY, settings or {}))


CHOICES = [
    (user, (user * 3 + 5 * step) % 16, 1_600_000_000 + user + 100 * step) for user in range(12) for step in range(6)
]


@dataclass(frozen=True)
class Shop:
    """Own tables under names of their own: 12 users, 16 items, 72 choices."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log.csv"

    @property
    def goods(self) -> Path:
        return self.folder / "goods.csv"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def arguments(self) -> list[str]:
        """What ``prepare`` is given to read them."""
        columns = ["user_id=who", "item_id=sku", "timestamp=when", "title=name"]
        named = [part for column in columns for part in ("--column", column)]
        cores = ["--negatives", "4", "--set", "data.k_core_users=2", "--set", "data.k_core_items=1"]
        return ["--interactions", str(self.log), "--items", str(self.goods), *named, *cores]

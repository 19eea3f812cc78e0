"""The ways of training that `performance.py` measures, on its model."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, Image, Value
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.modeling.packing import pack_joint, pack_late
from mllm_msr.training.collators import AnswerCollator
from mllm_msr.training.pair_collators import LateCollator, PackedCollator, PreparedItems
from mllm_msr.training.pair_trainer import answer_loss


class Training:
    """Seconds a pair of each way. Its adapters stay on the model: measure everything else before.

    Args:
        bench: the model, its processor, users and items, and ``best``.
    """

    def __init__(self, bench: Any, best: Callable[[Callable[[], int], int], float], limits: tuple[int, int]) -> None:
        self.model, self.processor, self.folder = bench.model, bench.processor, bench.folder
        self.users, self.items, self.names, self.device = bench.users, bench.items, bench.names, bench.device
        self.repeats, self.best, self.limits = bench.repeats, best, limits
        self.model.set_item_memory(0)
        self.peft = get_peft_model(self.model, LoraConfig(r=8, target_modules=language_model_lora_targets(self.model)))

    def trained(self, make: Callable[[Any], tuple[Callable[[], dict[str, Any]], int]], interaction: str) -> float:
        """Seconds a pair of forward and backward through LoRA, batches made anew."""
        model, peft = self.model, self.peft.train()
        model.config.interaction = interaction
        batch_of, pairs = make(model)

        def work() -> int:
            batch = {
                name: value.to(self.device) if hasattr(value, "to") else value for name, value in batch_of().items()
            }
            if "pairs" in batch or "group_ids" in batch:
                if "pairs" in batch:
                    packed = pack_late(model, batch["users"], batch["items"], batch["answer_ids"], batch["pairs"])
                else:
                    packed = pack_joint(model, batch["prompts"], batch["group_ids"])
                loss = answer_loss(peft(**packed).logits[0], batch["labels"], model.config.answer_token_ids)
            else:
                loss = peft(**batch).loss
            loss.backward()
            peft.zero_grad()
            return pairs

        return self.best(work, self.repeats)

    def table(self, count: int) -> Catalogue:
        features = Features({name: Value("string") for name in ("item_id", "title", "text")} | {"image": Image()})
        items = [self.items[name] for name in self.names[:count]]
        rows = [{name: getattr(item, name) for name in features} for item in items]
        return Catalogue(Dataset.from_list(rows, features=features))

    def rows(self, tasks: int, negatives: int) -> list[dict[str, Any]]:
        """Tasks of one positive and some negatives, all items different."""
        size = 1 + negatives
        return [
            {
                "task_id": f"t{number}",
                "user_id": f"u{number}",
                "preference": self.users[number % 16].preference,
                "recent": [],
                "item_id": self.names[number * size : (number + 1) * size],
                "label": [1] + [0] * negatives,
            }
            for number in range(tasks)
        ]

    def stock(self, size: int) -> float:
        """TRL's own collator for images, one positive to one negative, every pair a whole prompt."""
        collator = DataCollatorForVisionLanguageModeling(
            AutoProcessor.from_pretrained(self.folder), completion_only_loss=True
        )

        def rows() -> list[dict[str, Any]]:  # new ones each time, as the collator writes into them
            return [
                {
                    "images": [self.items[name].image],
                    "prompt": [{"role": "user", "content": f"{self.users[0].preference} {self.items[name].title}?"}],
                    "completion": [{"role": "assistant", "content": ("Yes", "No")[number % 2]}],
                }
                for number, name in enumerate(self.names[:size])
            ]

        return self.trained(lambda _: (lambda: collator(rows()), size), "joint")

    def unpacked(self, size: int) -> float:
        collator = AnswerCollator(self.processor, self.table(size))
        one = [{**row, "item_id": row["item_id"][0], "label": 1} for row in self.rows(size, 0)]
        return self.trained(lambda _: (lambda: collator(one), size), "joint")

    def packed(self, tasks: int, negatives: int) -> float:
        count = tasks * (1 + negatives)
        collator = PackedCollator(self.processor, PreparedItems(self.processor, self.table(count)))
        return self.trained(lambda _: (lambda: collator(self.rows(tasks, negatives)), count), "joint")

    def late(self, tasks: int) -> float:
        collator = LateCollator(
            self.processor, PreparedItems(self.processor, self.table(2 * tasks)), limits=self.limits
        )
        return self.trained(lambda _: (lambda: collator(self.rows(tasks, 1)), 2 * tasks * tasks), "late")

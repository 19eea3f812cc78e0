"""What training and ranking cost, as ratios within one run: ``make bench``, or

    python benchmarks/performance.py --sizes small medium large --output benchmarks/results.json

Random Llavas of three sizes, prompts of about 300 and 900 tokens (images of 64 and 576 tokens), 21, 100 and 1,000
candidates. Every figure is the best of ``--repeats`` passes over work that takes seconds; each row is measured beside
what it is compared with. "Usual" is what the authors' code does: every pair a whole prompt, its image encoded anew,
``generate`` in batches of six, once to the limit of 30 tokens and once stopping after the answer. "Plain" is one
forward a pair at the best batch size. Nothing is fine-tuned: time does not depend on what weights say.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as Images
from random_llava import save_random_llava
from transformers import LlavaProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.packing import pack_joint, pack_late
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.training.collators import AnswerCollator
from mllm_msr.training.pair_collators import LateCollator, PackedCollator, PreparedItems
from mllm_msr.training.pair_trainer import answer_loss

SIZES = {  # width, feed-forward, layers, heads of the language model; width, layers, heads of the vision tower
    "small": ((128, 352, 2, 4), (64, 2, 2)),
    "medium": ((256, 704, 6, 4), (128, 4, 4)),
    "large": ((512, 1408, 8, 8), (256, 6, 8)),
    "7b": ((4096, 14336, 32, 32), (1024, 24, 32)),
}
PROMPTS = {300: (64, 85), 900: (192, 115)}  # tokens: edge of the image (its patches are 8 wide), words of the user
WORDS = "red blue small large round striped quiet loud old new film mug ship lamp chair clock likes things that"
LIMITS = (512, 1024)


def best(work: Callable[[], int], repeats: int) -> float:
    """Seconds for each of as many things as ``work`` says it has done; the best of some passes."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        count = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append((time.perf_counter() - start) / count)
    return min(took)


class Bench:
    """A random model, drawn users and items, and the ways of scoring and training them."""

    def __init__(self, folder: Path, size: str, tokens: int, options: argparse.Namespace) -> None:
        edge, words = PROMPTS[tokens]
        dtype = getattr(torch, options.dtype)
        self.repeats, self.folder = options.repeats, folder
        language, tower = SIZES[size]
        self.parameters = save_random_llava(folder, language, (*tower, edge, 8), dtype)
        self.processor = MllmMsrProcessor.from_backbone(str(folder))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = dtype
        self.model = self.load()
        rng = np.random.default_rng(0)

        def text(count: int) -> str:
            return " ".join(rng.choice(WORDS.split(), count))

        self.users = [User(text(words)) for _ in range(16)]
        many = max(options.candidates)
        self.items = {
            f"i{number}": Candidate(
                f"i{number}", text(4), image=Images.fromarray(rng.integers(0, 255, (edge, edge, 3), dtype=np.uint8))
            )
            for number in range(many)
        }
        self.names = list(self.items)
        batch = self.processor(self.users[:1], [self.items["i0"]])
        self.prompt_tokens = int(batch["attention_mask"].sum())

    def load(self, interaction: str = "joint") -> Any:
        model = MllmMsrForRecommendation.from_backbone(str(self.folder), processor=self.processor, dtype=self.dtype)
        model.config.interaction, (model.config.user_limit, model.config.item_limit) = interaction, LIMITS
        model.use_block_attention()
        return model.eval().to(self.device)

    # ---- ranking ---------------------------------------------------------------------------------------------------

    def whole(self, count: int) -> Any:
        """A batch of whole prompts of one user, their images prepared anew."""
        return self.processor(self.users[:1] * count, [self.items[name] for name in self.names[:count]]).to(self.device)

    @torch.inference_mode()
    def usual(self, new_tokens: int) -> float:
        def work() -> int:
            for _ in range(2):
                self.model.generate(
                    **self.whole(6), min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False
                )
            return 12

        return best(work, self.repeats)

    @torch.inference_mode()
    def plain(self) -> tuple[float, int]:
        """Seconds a pair at the best batch size, and that."""

        def work(size: int) -> Callable[[], int]:
            def run() -> int:
                for _ in range(max(1, 8 // size)):
                    self.model.score(**self.whole(size))
                return size * max(1, 8 // size)

            return run

        return min((best(work(size), self.repeats), size) for size in (1, 4, 8, 16))

    def ranked(self, recommender: Recommender, candidates: int, users: int = 1) -> float:
        """Seconds a pair through the recommender."""
        row = self.names[:candidates]

        def work() -> int:
            recommender.score(self.users[:users], [row] * users, self.items)
            return candidates * users

        return best(work, self.repeats)

    # ---- training --------------------------------------------------------------------------------------------------

    def trained(self, make: Callable[[Any], tuple[Callable[[], dict[str, Any]], int]], interaction: str) -> float:
        """Seconds a pair of forward and backward through LoRA, batches made anew."""
        model = self.load(interaction)
        lora = LoraConfig(r=8, target_modules=language_model_lora_targets(model))
        peft = get_peft_model(model, lora).train()
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
            return pairs

        return best(work, self.repeats)

    def table(self, count: int) -> Catalogue:
        features = Features({name: Value("string") for name in ("item_id", "title", "text")} | {"image": Image()})
        return Catalogue(Dataset.from_list([vars(self.items[name]) for name in self.names[:count]], features=features))

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
            LlavaProcessor.from_pretrained(self.folder), completion_only_loss=True
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
        collator = LateCollator(self.processor, PreparedItems(self.processor, self.table(2 * tasks)), limits=LIMITS)
        return self.trained(lambda _: (lambda: collator(self.rows(tasks, 1)), 2 * tasks * tasks), "late")


def measure(size: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a pair of every way."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), size, tokens, options)
        seconds: dict[str, float] = {}
        result: dict[str, Any] = {"size": size, "parameters": bench.parameters, "prompt_tokens": bench.prompt_tokens}
        joint = Recommender(bench.model, bench.processor, token_budget=options.token_budget)
        late_model = bench.load("late")
        cold = Recommender(late_model, bench.processor, token_budget=options.token_budget)
        kept = Recommender(late_model, bench.processor, token_budget=options.token_budget, cache=f"{folder}/cache")
        most = {
            (300, "large"): 100,
            (900, "large"): 21,
            (900, "medium"): 100,
            (900, "small"): 100,
        }  # else it takes long
        counts = [count for count in options.candidates if count <= most.get((tokens, size), 1000)]
        kept.index({name: bench.items[name] for name in bench.names[: max(counts)]})
        seconds["usual, 30 tokens"] = bench.usual(30)
        seconds["usual, 2 tokens"] = bench.usual(2)
        seconds["plain"], result["plain_batch"] = bench.plain()
        for count in counts:
            if count <= 100:
                seconds[f"joint, {count}"] = bench.ranked(joint, count)
                seconds[f"late, cold, {count}"] = bench.ranked(cold, count)
            seconds[f"late, {count}"] = bench.ranked(kept, count)
        seconds[f"late, {counts[0]}, 16 users"] = bench.ranked(kept, counts[0], users=16)
        if size != "large" or options.all_training:
            stock = {batch: bench.stock(batch) for batch in (2, 8)}
            seconds["train: TRL's collator, 1:1"] = min(stock.values())
            seconds["train: unpacked"] = min(bench.unpacked(batch) for batch in (2, 8))
            seconds["train: packed, 1:8"] = bench.packed(2, 8)
            seconds["train: late, 16 x 32"] = bench.late(16)
            seconds["train: late, 32 x 64"] = bench.late(32)
        result["ms_per_pair"] = {name: round(1000 * value, 3) for name, value in seconds.items()}
        return result


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """How many times faster."""
    ms = result["ms_per_pair"]
    pairs = {
        "joint, 21, vs usual (30 tokens)": ("usual, 30 tokens", "joint, 21"),
        "joint, 21, vs usual (2 tokens)": ("usual, 2 tokens", "joint, 21"),
        "joint, 21, vs plain": ("plain", "joint, 21"),
        "late, 21, cache warm, vs usual (30 tokens)": ("usual, 30 tokens", "late, 21"),
        "late, 21, cache warm, vs usual (2 tokens)": ("usual, 2 tokens", "late, 21"),
        "late, cost of a pair at 1,000 vs at 21": ("late, 1000", "late, 21"),
        "train: late, 16 tasks a batch, vs TRL's collator": ("train: TRL's collator, 1:1", "train: late, 16 x 32"),
        "train: late, 32 tasks a batch, vs TRL's collator": ("train: TRL's collator, 1:1", "train: late, 32 x 64"),
        "train: packed 1:8 vs unpacked": ("train: unpacked", "train: packed, 1:8"),
    }
    return {name: round(ms[slow] / ms[fast], 2) for name, (slow, fast) in pairs.items() if slow in ms and fast in ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium", "large"])
    parser.add_argument("--prompts", nargs="+", type=int, choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--candidates", nargs="+", type=int, default=[21, 100, 1000])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--all-training", action="store_true", help="measure training of the large model, too")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    machine = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    results: dict[str, Any] = {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
    results["rows"] = []
    for size in options.sizes:
        for tokens in options.prompts:
            result = measure(size, tokens, options)
            result["ratios"] = ratios(result)
            results["rows"].append(result)
            print(
                f"\n{size}: {result['parameters'] / 1e6:.1f} M parameters, prompts of {result['prompt_tokens']} tokens"
            )
            for name, value in [*result["ms_per_pair"].items(), *result["ratios"].items()]:
                unit = "x" if name in result["ratios"] else "ms a pair"
                print(f"  {name:<50} {value:>10} {unit}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

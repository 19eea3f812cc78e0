"""A small, coherent run directory, fabricated from the drawn world: what the stages would have left behind."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from datasets import Dataset, Features, Image, Value

from mllm_msr.data.sources.world import condense, describe, draw, make_world, preference_text
from mllm_msr.evaluation.metrics import ranking_metrics

BLOCK = 3
RECIPE = {
    "name": "demo",
    "source": {"type": "demo", "folder": "/home/someone/data"},
    "item_noun": "thing",
    "summaries": {"engine": "transformers", "model": "demo", "block_size": BLOCK},
    "training": {"model_name_or_path": "demo", "output_dir": "/home/someone/out", "learning_rate": 2e-4, "lora_r": 8},
    "license": "apache-2.0",
}


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def fabricate(run: Path, n_users: int = 8, n_items: int = 30, n_negatives: int = 9, picture=draw) -> Path:
    """Write every artefact of a run below ``run``; item ``i0000`` has no picture and a title that is HTML."""
    world = make_world(0, n_users, n_items, min_length=8, max_length=11)
    rng = np.random.default_rng(1)
    for folder in ("data", "summaries", "sft", "model"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    ids = [item.item_id for item in world.items]
    titles = ["<script>alert(1)</script> & co" if i == 0 else item.title for i, item in enumerate(world.items)]
    images = [None if i == 0 else {"bytes": png(picture(item)), "path": None} for i, item in enumerate(world.items)]
    text = Value("string")
    items = Dataset.from_dict(
        {"item_id": ids, "title": titles, "text": [item.text for item in world.items], "image": images},
        features=Features({"item_id": text, "title": text, "text": text, "image": Image()}),
    )
    items.to_parquet(run / "data/items.parquet")

    interactions, tasks, preferences, sft = [], [], [], {"train": [], "validation": []}
    for user, history in enumerate(world.histories):
        name = f"u{user}"
        read: list[str] = []
        kept = None
        for time, item in enumerate(history):
            interactions.append({"user_id": name, "item_id": ids[item], "timestamp": 1_000 + 60 * time})
        for step in range((len(history) - 1) // BLOCK):
            block = history[step * BLOCK : (step + 1) * BLOCK]
            kept = condense([world.items[i].traits for i in block], kept)
            read = read + [ids[i] for i in block]
            preferences.append(
                {
                    "user_id": name,
                    "step": step + 1,
                    "preference": preference_text(kept),
                    "read_item_ids": read,
                    "last_timestamp": 1_000 + 60 * (len(read) - 1),
                    "status": "ok",
                    "generator": "tiny-llava",
                    "revision": "abc123",
                    "prompt_hash": "0123456789ab",
                }
            )
        for split, end in (("train", len(history) - 3), ("validation", len(history) - 2), ("test", len(history) - 1)):
            negatives = rng.choice(np.setdiff1d(np.arange(n_items), history), n_negatives, replace=False)
            candidates = rng.permutation([history[end], *negatives])
            tasks.append(
                {
                    "task_id": f"{split}-{user}",
                    "split": split,
                    "user_id": name,
                    "history": [ids[i] for i in history[:end]],
                    "cutoff": 1_000 + 60 * end,
                    "candidates": [ids[i] for i in candidates],
                    "labels": [int(i == history[end]) for i in candidates],
                    "history_length": end,
                    "target_train_count": 1,
                }
            )
            if split != "test":
                past = [
                    row for row in preferences if row["user_id"] == name and row["last_timestamp"] < 1_000 + 60 * end
                ]
                sft[split].append(
                    {
                        "task_id": f"{split}-{user}",
                        "user_id": name,
                        "item_id": ids[history[end]],
                        "label": 1,
                        "preference": past[-1]["preference"] if past else "",
                        "title": titles[history[end]],
                        "recent": [describe(world.items[history[end - 1]].traits)],
                    }
                )
    pl.DataFrame(interactions).write_parquet(run / "data/interactions.parquet")
    pl.DataFrame(tasks).write_parquet(run / "data/tasks.parquet")
    counts = pl.DataFrame(interactions).group_by("item_id").len("count").sort("item_id")
    counts.write_parquet(run / "data/popularity.parquet")
    pl.DataFrame(preferences).write_parquet(run / "summaries/preferences.parquet")
    pl.DataFrame(
        {"item_id": ids, "summary": [describe(item.traits) for item in world.items], "status": "ok"}
    ).with_columns(
        generator=pl.lit("tiny-llava"), revision=pl.lit("abc123"), prompt_hash=pl.lit("fedcba987654")
    ).write_parquet(run / "summaries/items.parquet")
    for split, rows in sft.items():
        pl.DataFrame(rows).write_parquet(run / f"sft/{split}.parquet")

    test = pl.DataFrame(tasks).filter(pl.col("split") == "test").explode("candidates", "labels")
    users, item_ids, labels = (test[column].to_list() for column in ("user_id", "candidates", "labels"))
    taste = np.array([world.utilities[int(u[1:]), ids.index(i)] for u, i in zip(users, item_ids, strict=True)])
    count = dict(counts.iter_rows())
    logits = {
        "mllm_msr": 0.5 * (taste - taste.mean()) + rng.normal(0, 1.2, len(taste)) - 2.0,
        "text_only": 0.2 * (taste - taste.mean()) + rng.normal(0, 1.2, len(taste)),
        "blank_images": 0.15 * (taste - taste.mean()) + rng.normal(0, 1.2, len(taste)),
        "no_sft": 0.05 * taste + rng.normal(0, 1.2, len(taste)),
        "popularity": np.log1p([count.get(i, 0) for i in item_ids]),
        "random": rng.normal(size=len(taste)),
        "oracle": taste,
    }
    scores, rows = [], {}
    for row, logit in logits.items():
        single = logit.astype(np.float32)
        scores.append(
            pl.DataFrame({"row": row, "user_id": users, "item_id": item_ids, "label": labels, "logit": single})
        )
        rows[row] = ranking_metrics(users, labels, single, n_bootstrap=100)
    pl.concat(scores).with_columns(score=1 / (1 + (-pl.col("logit")).exp())).write_parquet(run / "scores.parquet")
    write_json(
        run / "metrics.json",
        {
            "dataset": "demo",
            "protocol": "strict",
            "split": "test",
            "n_users": n_users,
            "n_candidates": n_negatives + 1,
            "seed": 0,
            "candidate_hash": "5d41402abc4b2a76",
            "rows": rows,
        },
    )
    write_json(
        run / "data/report.json",
        {
            "source": "drawn world, seed 0",
            "cleaning": [
                {"step": "read", "interactions": 100, "users": 9, "items": 31, "why": "as given"},
                {
                    "step": "k-core",
                    "interactions": len(interactions),
                    "users": n_users,
                    "items": n_items,
                    "why": "users < 7 or items < 2 interactions",
                },
            ],
            "skipped": [{"what": "unknown items", "count": 2, "examples": ["row 3: item <b>x9</b>"]}],
            "statistics": {
                "interactions": len(interactions),
                "users": n_users,
                "items": n_items,
                "mean_sequence_length": len(interactions) / n_users,
            },
            "protocol": {
                "name": "strict",
                "negatives": n_negatives,
                "seed": 0,
                "candidate_hash": "5d41402abc4b2a76",
                "popularity": {"counted_on": "train"},
            },
        },
    )
    stages = {"prepare": 1.5, "summarize_items": 34.0, "summarize_users": 21.0, "train": 141.5, "evaluate": 38.2}
    write_json(
        run / "provenance.json",
        {
            "versions": {"mllm-msr": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "inputs": {"interactions": "sha256:1234"},
            "stages": {
                name: {"key": "0" * 12, "seconds": seconds, "finished": "2026-01-02T03:04:05+00:00"}
                for name, seconds in stages.items()
            },
        },
    )
    (run / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    (run / "model/model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    (run / "model/modeling_mllm_msr.py").write_text("# shipped code\n")
    (run / "model/tokenizer.json").write_text("{}")
    (run / "model/optimizer.pt").write_bytes(b"training state")
    (run / "model/.env").write_text("HF_TOKEN=hf_secret")
    base = "/home/someone/base"
    backbone = {"model_type": "llava", "_name_or_path": base}
    config = {"model_type": "mllm_msr", "interaction": "joint", "backbone_name_or_path": base, "vlm_config": backbone}
    write_json(run / "model/config.json", config)
    write_json(run / "model/processor_config.json", {"prompts": {"recommendation": "{{ title }} {{ image }} Choose?"}})
    losses = 0.25 + 0.45 * np.exp(-np.arange(60) / 15) + rng.normal(0, 0.015, 60)
    log = [{"step": 5 * i + 5, "loss": float(loss), "learning_rate": 2e-4} for i, loss in enumerate(losses)]
    log += [{"step": 60 * i + 60, "eval_loss": 0.3 + 0.35 * 0.6**i} for i in range(5)]
    write_json(run / "model/log_history.json", [*log, {"step": 300, "train_runtime": 141.5, "train_loss": 0.31}])
    return run


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A run nobody changes."""
    return fabricate(tmp_path_factory.mktemp("run"))


@pytest.fixture
def make_run(tmp_path) -> Callable[[], Path]:
    """A run of one's own, to break."""
    return lambda: fabricate(tmp_path / "run")


@pytest.fixture(scope="session")
def fabricated() -> Callable[[Path], Path]:
    """Make a run in a folder."""
    return fabricate

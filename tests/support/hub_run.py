"""A small, coherent run, fabricated from the drawn world: what the stages would have left behind, and noted."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from PIL import Image
from safetensors.numpy import save_file

from mllm_msr.data.sources.world import DrawnItem, World, condense, describe, draw, make_world, preference_text
from mllm_msr.evaluation.metrics import ranking_metrics
from mllm_msr.processing.examples import run_contexts, training_examples
from mllm_msr.records.recipe import FORMAT, parse_recipe
from mllm_msr.records.results import Estimate, Results
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import (
    EXAMPLES,
    INTERACTIONS,
    ITEM_SUMMARIES,
    ITEMS,
    POPULARITY,
    PREFERENCES,
    SCORES,
    TASKS,
)

BLOCK = 3
N_USERS, N_ITEMS, N_NEGATIVES = 8, 30, 9
SECRETS = ("/home/someone", "secret-path", "hf_secretsecret", "inner.example")
SECONDS = {"prepare": 1.5, "summarize items": 34.0, "summarize users": 21.0, "train": 141.5, "evaluate": 38.2}
RECIPE = {
    "name": "demo",
    "source": {"type": "demo"},
    "item_noun": "thing",
    "summaries": {
        "engine": "openai",
        "model": "/home/someone/models/writer",
        "base_url": "https://me:pass@inner.example/secret-path/v1",
        "block_size": BLOCK,
    },
    "training": {
        "model_name_or_path": "demo",
        "logging_dir": "/home/someone/out",
        "hub_token": "hf_secretsecret",
        "learning_rate": 2e-4,
        "lora_r": 8,
    },
    "license": "apache-2.0",
}
WRITER = {"status": "ok", "generator": "/home/someone/models/writer", "revision": "abc123"}


def fabricate(path: Path, draw_image: Callable[[DrawnItem], Image.Image] = draw) -> RunFolder:
    """Every artefact of a run; item ``i0000`` has no image and a title that is HTML."""
    run = RunFolder.create(path, parse_recipe(RECIPE))
    world = make_world(0, N_USERS, N_ITEMS, min_length=8, max_length=11)
    rng = np.random.default_rng(1)
    _write_data(run, world, rng, draw_image)
    _write_texts(run, world)
    prompt = "{{ preference }} {{ title }} {{ image }}?"
    for split in ("train", "validation"):
        run.write(EXAMPLES, training_examples(run_contexts(run, split), run.read(ITEMS), prompt), split)
    _write_model(run, rng)
    _write_scores(run, world, rng)
    run.report.touch()
    run.results_page.touch()
    return finish(run)


def finish(run: RunFolder) -> RunFolder:
    """Note every stage as done by what lies in the run now."""
    writes = {
        "prepare": [run.data],
        "summarize items": [run.file(ITEM_SUMMARIES)],
        "summarize users": [run.file(PREFERENCES), run.examples],
        "train": [run.model],
        "evaluate": [run.metrics, run.file(SCORES)],
        "report": [run.report, run.results_page],
    }
    for name, paths in writes.items():
        after = ["prepare", "summarize users", "train"] if name == "evaluate" else None
        run.stage(name, lambda key: None, writes=paths, after=after)
    provenance = run.provenance()
    for name, seconds in SECONDS.items():
        provenance["stages"][name]["seconds"] = seconds
    run.write_provenance(provenance)
    return run


def change_recipe(run: RunFolder, **sections: Any) -> RunFolder:
    """The run with other sections of its recipe, all its stages noted as done under it."""
    content = {"format": FORMAT, **run.recipe.to_dict(), **sections}
    run.config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return finish(RunFolder.open(run.path))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _write_data(
    run: RunFolder, world: World, rng: np.random.Generator, draw_image: Callable[[DrawnItem], Image.Image]
) -> None:
    rows = [
        (item.item_id, item.title, item.text, {"bytes": png(draw_image(item)), "path": None}) for item in world.items
    ]
    rows[0] = (rows[0][0], "<script>alert(1)</script> & co", rows[0][2], None)
    run.write(ITEMS, ITEMS.frame(rows))
    ids = [item.item_id for item in world.items]
    interactions, tasks = [], []
    for user, history in enumerate(world.histories):
        interactions += [(f"u{user}", ids[item], 1_000 + 60 * step) for step, item in enumerate(history)]
        for split, end in (("train", len(history) - 3), ("validation", len(history) - 2), ("test", len(history) - 1)):
            negatives = rng.choice(np.setdiff1d(np.arange(N_ITEMS), history), N_NEGATIVES, replace=False)
            candidates = rng.permutation([history[end], *negatives])
            chosen = [int(item == history[end]) for item in candidates]
            read, offered = [ids[item] for item in history[:end]], [ids[item] for item in candidates]
            tasks.append((f"{split}-{user}", split, f"u{user}", read, 1_000 + 60 * end, offered, chosen, end, 1))
    run.write(INTERACTIONS, INTERACTIONS.frame(interactions))
    run.write(TASKS, TASKS.frame(tasks))
    counts = run.read(INTERACTIONS).group_by("item_id").len("count").sort("item_id")
    run.write(POPULARITY, counts.cast({"count": pl.Int64}))
    cleaned = {"interactions": len(interactions), "users": N_USERS, "items": N_ITEMS}
    address = "https://me:pass@inner.example/secret-path/9.jpg"
    report = {
        "source": "drawn world, seed 0",
        "cleaning": [
            {"step": "read", "interactions": 100, "users": 9, "items": 31, "why": "as given"},
            {"step": "k-core", **cleaned, "why": "users < 7 or items < 2 interactions"},
        ],
        "skipped": [{"what": "unknown items", "count": 2, "examples": ["row 3: item <b>x9</b>", address]}],
        "statistics": {**cleaned, "mean_sequence_length": len(interactions) / N_USERS},
        "protocol": {
            "name": "strict",
            "negatives": N_NEGATIVES,
            "seed": 0,
            "candidate_hash": "5d41402abc4b2a76",
            "popularity": {"counted_on": "train"},
        },
    }
    write_json(run.data_report, report)


def _write_texts(run: RunFolder, world: World) -> None:
    ids = [item.item_id for item in world.items]
    rows = [{"item_id": item.item_id, "summary": describe(item.traits), **WRITER} for item in world.items]
    run.write(ITEM_SUMMARIES, ITEM_SUMMARIES.frame([{**row, "prompt_hash": "fedcba987654"} for row in rows]))
    rows = []
    for user, history in enumerate(world.histories):
        kept, end = None, 0
        for step, end in enumerate(range(BLOCK, len(history), BLOCK), start=1):
            kept = condense([world.items[item].traits for item in history[end - BLOCK : end]], kept)
            facts = {"preference": preference_text(kept), "read_item_ids": [ids[item] for item in history[:end]]}
            last = {"last_timestamp": 1_000 + 60 * (end - 1), "prompt_hash": "0123456789ab"}
            rows.append({"user_id": f"u{user}", "step": step, **facts, **last, **WRITER})
    run.write(PREFERENCES, PREFERENCES.frame(rows))


def _write_model(run: RunFolder, rng: np.random.Generator) -> None:
    base = "/home/someone/base"
    write_json(
        run.model / "config.json",
        {
            "model_type": "mllm_msr",
            "interaction": "joint",
            "auto_map": {"AutoModel": "modeling_mllm_msr.MllmMsrForRecommendation"},
            "backbone_name_or_path": base,
            "vlm_config": {"model_type": "llava", "_name_or_path": base},
        },
    )
    write_json(run.model / "processor_config.json", {"prompts": {"recommendation": "{{ title }} {{ image }} Choose?"}})
    write_json(run.model / "tokenizer_config.json", {"name_or_path": base, "use_auth_token": "hf_secretsecret"})
    for name, content in {
        "modeling_mllm_msr.py": "# shipped code\n",
        "notes.py": "# not shipped\n",
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "optimizer.pt": "training state",
        ".env": "HF_TOKEN=hf_secretsecret",
    }.items():
        (run.model / name).write_text(content, encoding="utf-8")
    save_file({"weight": np.ones((2, 2), np.float32)}, run.model / "model.safetensors")
    losses = 0.25 + 0.45 * np.exp(-np.arange(60) / 15) + rng.normal(0, 0.015, 60)
    log: list[dict[str, float]] = [{"step": 5 * i + 5, "loss": float(loss)} for i, loss in enumerate(losses)]
    log += [{"step": 60 * i + 60, "eval_loss": 0.3 + 0.35 * 0.6**i} for i in range(5)]
    write_json(run.training_log, [*log, {"step": 300, "train_runtime": 141.5, "train_loss": 0.31}])


def _write_scores(run: RunFolder, world: World, rng: np.random.Generator) -> None:
    test = run.tasks("test").explode("candidates", "labels")
    users, items, labels = (test[column].to_list() for column in ("user_id", "candidates", "labels"))
    places = {item.item_id: place for place, item in enumerate(world.items)}
    taste = np.array([world.utilities[int(user[1:]), places[item]] for user, item in zip(users, items, strict=True)])
    counts = dict(run.read(POPULARITY).iter_rows())
    logits = {
        "mllm_msr": 0.5 * (taste - taste.mean()) + rng.normal(0, 1.2, len(taste)) - 2.0,
        "text_only": 0.2 * (taste - taste.mean()) + rng.normal(0, 1.2, len(taste)),
        "blank_images": 0.15 * (taste - taste.mean()) + rng.normal(0, 1.2, len(taste)),
        "no_sft": 0.05 * taste + rng.normal(0, 1.2, len(taste)),
        "popularity": np.log1p([counts.get(item, 0) for item in items]),
        "random": rng.normal(size=len(taste)),
        "oracle": taste,
    }
    frames, variants = [], {}
    for name, values in logits.items():
        logit = values.astype(np.float32)
        columns = {"variant": name, "user_id": users, "item_id": items, "label": labels, "logit": logit}
        frames.append(pl.DataFrame({**columns, "score": 1 / (1 + np.exp(-logit))}))
        figures = ranking_metrics(users, labels, logit, n_bootstrap=100)
        variants[name] = {metric: Estimate.from_json(content) for metric, content in figures.items()}
    run.write(SCORES, pl.concat(frames))
    results = Results("demo", "strict", "test", N_USERS, N_NEGATIVES + 1, 0, "5d41402abc4b2a76", variants)
    replace(results, model_of="trained by https://me:pass@inner.example/secret-path").write(run.metrics)

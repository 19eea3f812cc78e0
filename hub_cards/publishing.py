"""A run as two folders, model and data set, exactly as they will lie on the Hub; ``release`` sends them.

Nothing goes that is not on the allow-list. Users of real data appear under keyed hashes; the key stays in the run.
"""

import hashlib
import hmac
import json
import os
import secrets
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

import polars as pl
import yaml
from datasets.splits import SplitInfo

from mllm_msr.hub_cards.cards import dataset_card, is_hub_id, model_card, public_name, read_facts, slug
from mllm_msr.hub_cards.chat_table import write_chat_table
from mllm_msr.hub_cards.shards import dataset_info, shard
from mllm_msr.hub_cards.terms import RESTRICTED_SOURCES

# fmt: off
MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "processor_config.json", "preprocessor_config.json", "*.py",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
)
# fmt: on
DATASET_FILES = {  # config -> split -> file of the run; tasks are one file with a column ``split``
    "items": {"train": "data/items.parquet"},
    "item_summaries": {"train": "summaries/items.parquet"},
    "preferences": {"train": "summaries/preferences.parquet"},
    "tasks": dict.fromkeys(("train", "validation", "test"), "data/tasks.parquet"),
    "sft": {"train": "sft/train.parquet", "validation": "sft/validation.parquet"},
}
OWN_SOURCES = ("demo",)  # drawn by us: no person behind a user, no one else's rights in an item
LEFT_OUT = (
    "The source's terms do not let its texts and pictures be passed on, so `text` and `image` of `items` are "
    "empty here and `sft` has no chat messages; `rebuild.py` adds them from the source. User ids are keyed hashes."
)


def build_hub(
    run: Path, namespace: str | None = None, tag: str | None = None, *, images: bool = True, anonymise: bool = False
) -> dict[str, Path]:
    """Write ``run/hub/model`` and ``run/hub/dataset`` exactly as they would be pushed, and return both.

    Each folder takes the place of its predecessor only when it is whole. Repositories are named in the cards only if
    ``namespace`` is given. Without ``images`` no picture is embedded. Users of real data are always anonymised, drawn
    ones if ``anonymise``. Raises ``FileNotFoundError`` if the run has no model yet.
    """
    run = Path(run)
    if not (run / "model/config.json").is_file():
        raise FileNotFoundError(f"{run / 'model/config.json'} is missing: run `mllm-msr train` on this run first")
    ids = repo_ids(run, namespace) if namespace else {"model": None, "dataset": None}
    return {
        "model": whole(run / "hub/model", lambda folder: _fill_model(run, folder, ids, tag)),
        "dataset": whole(
            run / "hub/dataset", lambda folder: _fill_dataset(run, folder, ids["dataset"], tag, images, anonymise)
        ),
    }


def repo_ids(run: Path, namespace: str) -> dict[str, str]:
    """The ids of the run's repositories below ``namespace``: "model", "dataset", "metric" (any run's) and "space"."""
    facts = read_facts(run)
    name = slug(facts["recipe"].get("name") or facts["metrics"].get("dataset") or run.resolve().name)
    model = f"{namespace}/mllm-msr-{name}"
    return {
        "model": model,
        "dataset": f"{model}-data",
        "metric": f"{namespace}/ranking_metrics",
        "space": f"{model}-app",
    }


def _fill_model(run: Path, folder: Path, ids: dict, tag: str | None) -> None:
    for path in sorted((run / "model").rglob("*")):
        name = path.relative_to(run / "model").as_posix()
        if not path.is_file() or not any(name.count("/") == p.count("/") and fnmatchcase(name, p) for p in MODEL_FILES):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("config.json"):
            (folder / name).write_text(_without_paths(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            _link(path, folder / name)
    (folder / "README.md").write_text(str(model_card(run, ids["model"], ids["dataset"], tag)), encoding="utf-8")
    (folder / "recipe.yaml").write_text(shared_recipe(run), encoding="utf-8")


def _without_paths(text: str) -> str:
    """A JSON configuration without the names of folders on this machine."""

    def clean(value):
        if not isinstance(value, dict):
            return value
        return {
            key: clean(inner)
            for key, inner in value.items()
            if not (key.endswith("name_or_path") and isinstance(inner, str) and not is_hub_id(inner))
        }

    return json.dumps(clean(json.loads(text)), indent=2, ensure_ascii=False) + "\n"


def _fill_dataset(run: Path, folder: Path, repo_id: str | None, tag: str | None, images: bool, anonymise: bool) -> None:
    source = (read_facts(run)["recipe"].get("source") or {}).get("type")
    key = None if source in OWN_SOURCES and not anonymise else _user_key(run)
    restricted = source in RESTRICTED_SOURCES
    tables: dict[str, dict[str, SplitInfo]] = {}
    for table, splits in DATASET_FILES.items():
        for split, file in splits.items():
            if not (run / file).is_file():
                continue
            target = folder / f"{table}.{split}"
            if table == "items" and images and not restricted:
                _link(run / file, target)  # as it is: its schema says that ``image`` holds pictures
            else:
                frame = pl.scan_parquet(run / file)
                if table == "tasks":
                    frame = frame.filter(pl.col("split") == split)
                if table == "items":
                    frame = frame.with_columns(pl.lit(None, dtype=frame.collect_schema()["image"]).alias("image"))
                    frame = frame.with_columns(pl.lit("").alias("text")) if restricted else frame
                if restricted:
                    frame = frame.drop("prompt", "completion", strict=False)  # they quote the texts
                hashed = _hash_users(_without_folders(frame.collect()), key)
                if table == "sft" and "prompt" in hashed.columns:
                    write_chat_table(hashed, run / DATASET_FILES["items"]["train"], target, images)
                else:
                    hashed.write_parquet(target)
            if (info := shard(target, folder / table, split)) is not None:
                tables.setdefault(table, {})[split] = info
            target.unlink()
    rows = {table: {split: info.num_examples for split, info in splits.items()} for table, splits in tables.items()}
    card = dataset_card(run, rows, repo_id, LEFT_OUT if restricted else "", tag, dataset_info(folder, tables))
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    (folder / "recipe.yaml").write_text(shared_recipe(run), encoding="utf-8")
    if restricted:
        shutil.copyfile(str(files("mllm_msr") / "rebuild.py"), folder / "rebuild.py")


def shared_recipe(run: Path) -> str:
    """What a reader needs to prepare the source again, as YAML: nothing that names a place on this machine."""
    recipe = read_facts(run)["recipe"]
    places = {"folder", "interactions", "items", "images", "covers", "cache", "base_url"}
    kept = {
        key: {name: one for name, one in value.items() if name not in places} if isinstance(value, dict) else value
        for key, value in recipe.items()
        if key not in ("training", "evaluation")
    }
    if model := (kept.get("summaries") or {}).get("model"):
        kept["summaries"]["model"] = public_name(model)
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _without_folders(frame: pl.DataFrame) -> pl.DataFrame:
    """Texts' generators by name, wherever they lie on this machine."""
    if "generator" not in frame.columns:
        return frame
    names = {one: public_name(one) for one in frame["generator"].unique().drop_nulls()}
    return frame.with_columns(pl.col("generator").replace(names))


def _user_key(run: Path) -> bytes:
    """The key of this run's user hashes, made once; it is never published."""
    path = run / "user_hash.key"
    if not path.is_file():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    return bytes.fromhex(path.read_text())


def _hash_users(frame: pl.DataFrame, key: bytes | None) -> pl.DataFrame:
    """``user_id`` and ``task_id`` (which may name the user) replaced by keyed hashes, the same in every table."""
    if key is None:
        return frame

    def hashed(value: str) -> str:
        return hmac.new(key, value.encode(), hashlib.sha256).hexdigest()[:20]

    for column in ("user_id", "task_id"):
        if column in frame.columns:
            known = frame[column].unique()
            new = pl.Series([hashed(value) for value in known], dtype=pl.String)
            frame = frame.with_columns(pl.col(column).replace_strict(known, new, return_dtype=pl.String))
    return frame


def whole(target: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a fresh folder, then put it in the place of ``target``."""
    fresh = target.with_name(f".{target.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    fill(fresh)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)
    return target


def _link(source: Path, target: Path) -> None:
    """A copy that takes no room where the file system can do that; artefacts are replaced, never written over."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

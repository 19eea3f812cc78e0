"""A run as two Hub repositories: build their folders, show what would go, send each as one commit.

Nothing goes that is not on the allow-list. Users of real data appear under keyed hashes; the key stays in the run.
"""

import hashlib
import hmac
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeVar

import polars as pl
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from mllm_msr.hub_cards.cards import dataset_card, is_hub_id, model_card, read_facts, slug

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
RESTRICTED_SOURCES = ("movielens", "microlens", "amazon")  # texts and pictures of others, not ours to pass on
LEFT_OUT = (
    "The source's terms do not let its texts and pictures be passed on, so `text` and `image` of `items` are "
    "empty here; prepare the source with mllm-msr to have them. User ids are keyed hashes."
)
T = TypeVar("T")


def build_hub(run: Path, namespace: str | None = None, tag: str | None = None) -> dict[str, Path]:
    """Write ``run/hub/model`` and ``run/hub/dataset`` exactly as they would be pushed, and return both.

    Each folder takes the place of its predecessor only when it is whole. Repositories are named in the cards only if
    ``namespace`` is given. Raises ``FileNotFoundError`` if the run has no model yet.
    """
    run = Path(run)
    if not (run / "model/config.json").is_file():
        raise FileNotFoundError(f"{run / 'model/config.json'} is missing: run `mllm-msr train` on this run first")
    ids = repo_ids(run, namespace) if namespace else {"model": None, "dataset": None}
    return {
        "model": _whole(run / "hub/model", lambda folder: _fill_model(run, folder, ids, tag)),
        "dataset": _whole(run / "hub/dataset", lambda folder: _fill_dataset(run, folder, ids["dataset"])),
    }


def repo_ids(run: Path, namespace: str) -> dict[str, str]:
    """``{"model": ..., "dataset": ...}``: the ids of the run's repositories below ``namespace``."""
    facts = read_facts(run)
    name = slug(facts["recipe"].get("name") or facts["metrics"].get("dataset") or run.resolve().name)
    return {"model": f"{namespace}/mllm-msr-{name}", "dataset": f"{namespace}/mllm-msr-{name}-data"}


def plan(run: Path, namespace: str, tag: str | None = None) -> list[tuple[str, str, str, int]]:
    """What a release would send: ``(repo_id, repo_type, path in the repository, bytes)`` of every file."""
    ids = repo_ids(Path(run), namespace)
    return [
        (ids[kind], kind, path.relative_to(folder).as_posix(), path.stat().st_size)
        for kind, folder in build_hub(run, namespace, tag).items()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def publish(
    run: Path,
    namespace: str,
    dry_run: bool = True,
    public: bool = False,
    tag: str | None = None,
    api: HfApi | None = None,
    tries: int = 6,
) -> dict[str, str]:
    """Show what a release would send and, unless ``dry_run``, send it; return the commit of each repository.

    One commit a repository, on top of the head that was read (a head that moves meanwhile is read again), and the
    ``tag`` only once all commits are in: so whoever pins the tag sees a whole release. Unchanged files are not sent
    again, files the release no longer has are deleted, and repeating after any failure is safe. Private unless
    ``public``. Credentials come from the environment or the Hub login.

    Raises ``RuntimeError`` with the remedy when the Hub refuses.
    """
    run = Path(run)
    files = plan(run, namespace, tag)
    ids = repo_ids(run, namespace)
    for kind, repo_id in ids.items():
        _show(kind, repo_id, run / "hub" / kind, [(path, size) for _, of, path, size in files if of == kind], public)
    if dry_run:
        print("dry run: nothing was sent")
        return {}
    api = api or HfApi()
    commits = {}
    try:
        for kind in ("dataset", "model"):  # the model's card points to the data
            commit_this = partial(_commit, api, ids[kind], kind, run / "hub" / kind, public, tag)
            commits[kind] = _patiently(commit_this, tries)
        for kind, commit in commits.items():
            if tag:
                _patiently(partial(_tag, api, ids[kind], kind, commit, tag), tries)
            print(f"{ids[kind]} ({kind}): {commit}")
    except LocalTokenNotFoundError as error:
        raise RuntimeError("not logged in to the Hub: run `hf auth login` or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise RuntimeError(_remedy(error, namespace)) from error
    except HTTPError as error:  # of the connection
        raise RuntimeError(f"the Hub at {api.endpoint} cannot be reached ({error}); try again, it is safe") from error
    return commits


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


def _fill_dataset(run: Path, folder: Path, repo_id: str | None) -> None:
    source = (read_facts(run)["recipe"].get("source") or {}).get("type")
    key = None if source in OWN_SOURCES else _user_key(run)
    restricted = source in RESTRICTED_SOURCES
    tables: dict[str, dict[str, int]] = {}
    for table, splits in DATASET_FILES.items():
        for split, file in splits.items():
            if not (run / file).is_file():
                continue
            target = folder / table / f"{split}-00000-of-00001.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            frame = pl.scan_parquet(run / file)
            if table == "tasks":
                frame = frame.filter(pl.col("split") == split)
            if table == "items" and not restricted:
                _link(run / file, target)  # as it is: its schema says that ``image`` holds pictures
            else:
                if table == "items":
                    image = frame.collect_schema()["image"]
                    frame = frame.with_columns(pl.lit("").alias("text"), pl.lit(None, dtype=image).alias("image"))
                _hash_users(frame.collect(), key).write_parquet(target)
            rows = pl.scan_parquet(target).select(pl.len()).collect().item()
            if not rows:
                target.unlink()
                continue
            tables.setdefault(table, {})[split] = rows
    (folder / "README.md").write_text(
        str(dataset_card(run, tables, repo_id, LEFT_OUT if restricted else "")), encoding="utf-8"
    )


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


def _whole(target: Path, fill: Callable[[Path], None]) -> Path:
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


def _show(kind: str, repo_id: str, folder: Path, files: list[tuple[str, int]], public: bool) -> None:
    total = sum(size for _, size in files)
    print(f"\n{kind} {repo_id} ({'public' if public else 'private'}): {len(files)} files, {_size(total)}")
    for path, size in files:
        print(f"  {_size(size):>10}  {path}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    body = text.split("\n---\n", 1)[-1].strip().splitlines()
    print("  card:", *(f"    | {line}" for line in body[:8]), sep="\n")


def _size(count: float) -> str:
    """
    >>> _size(512), _size(2_500_000)
    ('512 B', '2.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _patiently(work: Callable[[], T], tries: int) -> T:
    """Do ``work``, again after a stale head, a 5xx or a lost reply; it must be safe to repeat."""
    for attempt in range(tries):
        try:
            return work()
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 503
            if attempt == tries - 1 or (status < 500 and status not in (408, 412, 429)):
                raise
            time.sleep(min(2**attempt, 8))
    raise AssertionError("unreachable")


def _commit(api: HfApi, repo_id: str, kind: str, folder: Path, public: bool, tag: str | None) -> str:
    """One commit that makes the repository equal to ``folder``.

    Reads the head anew and sends only what differs from it, so a commit whose reply was lost is not made twice.
    """
    api.create_repo(repo_id, repo_type=kind, private=not public, exist_ok=True)
    head = api.repo_info(repo_id, repo_type=kind).sha
    local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    there = set(api.list_repo_files(repo_id, repo_type=kind, revision=head)) - {".gitattributes"}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    operations += [CommitOperationAdd(name, str(path)) for name, path in sorted(local.items())]
    operations += [CommitOperationDelete(name) for name in sorted(there - set(local))]
    message = f"Release {tag}" if tag else "Release"
    return api.create_commit(repo_id, operations, commit_message=message, repo_type=kind, parent_commit=head).oid


def _tag(api: HfApi, repo_id: str, kind: str, commit: str, tag: str) -> None:
    known = {one.name: one.target_commit for one in api.list_repo_refs(repo_id, repo_type=kind).tags}
    if known.get(tag, commit) != commit:
        raise RuntimeError(f"{repo_id}: tag {tag!r} already names the earlier {known[tag][:8]}: choose a new tag")
    if tag not in known:
        api.create_tag(repo_id, tag=tag, revision=commit, repo_type=kind)


def _remedy(error: HfHubHTTPError, namespace: str) -> str:
    status = error.response.status_code
    remedies = {
        401: "the Hub does not accept the token: run `hf auth login` or set HF_TOKEN",
        403: f"this login may not write to {namespace!r}: use a token with write access, or another --namespace",
        409: "the name is taken by a repository this login cannot write to",
        413: "the Hub refuses the size: check the storage quota of the account",
        429: "the Hub asks to slow down: try again later, it is safe",
    }
    return f"{remedies.get(status, 'the Hub refused; repeating is safe')} ({status}: {error.server_message or error})"

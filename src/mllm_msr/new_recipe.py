"""``mllm-msr init``: look at a folder of own tables, and write the recipe that brings them to a ranking."""

import inspect
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from mllm_msr.data.discovery import FoundTables, discover
from mllm_msr.data.raw import RawData
from mllm_msr.data.sources.registry import read_source
from mllm_msr.opening import check_recipe
from mllm_msr.records.recipe import SECTIONS, Recipe
from mllm_msr.records.sections import Source
from mllm_msr.records.storage import write_text
from mllm_msr.sizing import Sized, look_at, sized_for, this_machine

NOUNS = ("product", "article", "book", "movie", "film", "song", "track", "video", "game", "recipe", "item")
CORE = 5  # interactions of a user and of an item, where the log is dense enough
SHORTEST = 3  # interactions of a user under `strict`: one to start from, one to validate, one to test
HEADINGS = {
    "source": "where the tables lie, and what their columns are called",
    "data": "cleaning, splitting and sampling (docs/data.md)",
    "summaries": "who writes item summaries and preferences (docs/summaries.md)",
    "prompts": "templates that replace the default ones (processing/prompts.py)",
    "vectors": "what item vectors are made of; null as model: the backbone (docs/training.md)",
    "training": "flags of training/sft.py (docs/training.md)",
    "head": "the sequence head over the item vectors (docs/model.md)",
    "evaluation": "what is scored, and how it is measured (docs/evaluation.md)",
}


@dataclass(frozen=True)
class InitOptions:
    """What the command line knows already; None is to be guessed.

    Args:
        folder: of the tables.
        output: the recipe file; None: ``<folder's name>.yaml`` in the working directory.
        interactions, items, images: relative to ``folder``.
        columns: our names to theirs.
        backbone: the model to fine-tune.
    """

    folder: Path
    output: Path | None = None
    interactions: str | None = None
    items: str | None = None
    images: str | None = None
    columns: Mapping[str, str] | None = None
    backbone: str = "demo"


def init(options: InitOptions) -> Path:
    """Write the recipe, print what it rests on, and return its path.

    Raises:
        FileExistsError: the recipe is there already.
        FileNotFoundError, ValueError: see :func:`~mllm_msr.data.discovery.discover`.
    """
    folder = options.folder.resolve()
    name = re.sub(r"[^\w.-]+", "-", folder.name).strip("-.") or "own-data"
    path = options.output or Path(f"{name}.yaml")
    if path.exists():
        raise FileExistsError(f"{path} is there already: remove it, or name another file by --output")
    found = discover(folder, options.interactions, options.items, options.images, options.columns)
    print(f"in {folder}:", *(f"  {reason}" for reason in [*found.reasons, *found.unused]), sep="\n")
    raw, data, why = _read(found)
    noun = _noun(found)
    print(f"  an item is called {noun!r} in prompts (item_noun)")
    machine, backbone = this_machine(), look_at(options.backbone)
    print(f"machine: {machine}", f"backbone: {backbone}", sep="\n")
    proposed, reasons = propose(raw)
    sized = sized_for(backbone, machine)
    content = {
        "name": name,
        "source": {"type": "tables", **{key: value for key, value in asdict(found.options).items() if value}},
        "item_noun": noun,
        "data": {**data, **proposed},
        **sized.sections,
    }
    recipe = check_recipe(content)
    text = recipe_text(recipe, Sized(sized.sections, {**sized.why, **reasons, **why}), f"{path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    print(f"protocol: {recipe.data.protocol}; {reasons['data.protocol']}")
    print(f"wrote {path}: read it, change what is not so\nnext: mllm-msr check {shlex.quote(str(path))}")
    return path


def _read(found: FoundTables) -> tuple[RawData, dict[str, Any], dict[str, str]]:
    """The tables by the reader that every run uses; bad rows are left out, if there are any, which is said."""
    source, data, why = Source("tables", vars(found.options)), dict[str, Any](), dict[str, str]()
    try:
        raw = read_source(source)
    except ValueError as error:
        if "on_bad_rows" not in str(error):
            raise
        raw, data["on_bad_rows"] = read_source(source, "skip"), "skip"
        why["data.on_bad_rows"] = "bad rows are left out and counted, as there are some; `error` stops at the first"
    for odd in raw.skipped:
        print(f"  {odd['count']:,} {odd['what']}, such as {', '.join(odd['examples'][:2])}")
    return raw, data, why


def propose(raw: RawData) -> tuple[dict[str, Any], dict[str, str]]:
    """The section ``data`` for a log, and why; what is not named keeps its default."""
    log = raw.interactions
    per_user, per_item = (
        log.group_by(name).len().collect(engine="streaming")["len"] for name in ("user_id", "item_id")
    )
    users, items, interactions = len(per_user), len(per_item), int(per_user.sum())
    times = log.select(low=pl.col("timestamp").min(), high=pl.col("timestamp").max()).collect(engine="streaming").row(0)
    first, last = (_day(time, raw.ticks) for time in times)
    without = raw.items.filter(pl.col("image_path").is_null() & pl.col("image_bytes").is_null()).height
    lacking = f"{without:,} of {raw.items.height:,} items have no image, and stay, without one"
    print(
        f"{users:,} users, {items:,} items, {interactions:,} interactions from {first} to {last}; "
        + (lacking if without else f"all {raw.items.height:,} items of the catalogue have an image")
    )
    longest = int(per_user.sort()[-1])
    if longest < SHORTEST:
        raise ValueError(
            f"no user of the log has {SHORTEST} interactions or more, and sequences need that: check that the column "
            "of users is the right one (--column user_id=NAME), or bring more data"
        )
    users_core = CORE if 2 * (per_user >= CORE).sum() >= users else SHORTEST
    items_core = CORE if per_item.filter(per_item >= CORE).sum() >= 0.8 * interactions else 1
    negatives = min(20, max(1, items - longest))
    data = {
        "protocol": "strict",
        "k_core_users": users_core,
        "k_core_items": items_core,
        "n_negatives": negatives,
        "min_history": 1,
    }
    kept_users, kept_items = int((per_user >= users_core).sum()) / users, int((per_item >= items_core).sum()) / items
    why = {
        "data.protocol": "each user's last choice is the test, the one before it the validation, earlier ones are "
        "trained on",
        "data.k_core_users": f"{kept_users:.0%} of the users have so many interactions",
        "data.k_core_items": f"{kept_items:.0%} of the items have so many",
        "data.n_negatives": f"candidates beside each choice; {items:,} items are there to be drawn from",
    }
    return data, why


def _day(time: int, ticks: int) -> str:
    return str(pl.Series([time // ticks * 1000]).cast(pl.Datetime("ms")).dt.date().item())


def _noun(found: FoundTables) -> str:
    names = " ".join([*found.options.columns.values(), found.options.items or "", found.options.interactions or ""])
    return next((noun for noun in NOUNS if noun in names.lower()), "item")


def recipe_text(recipe: Recipe, sized: Sized, path: str) -> str:
    """A recipe as commented YAML with all effective values; read again, it is the same recipe.

    Of the section ``training`` only what differs from the trainer's defaults is written, as there are 150 of them.
    """
    lines = [
        f"# Recipe of {recipe.name!r}, proposed by `mllm-msr init`; every value is in force as it stands.",
        f"#   mllm-msr check {path}    what each stage will cost, before it is spent",
        f"#   mllm-msr run {path}      all stages, into runs/{Path(path).stem}",
        *(f"{name}: {_value(getattr(recipe, name))}" for name in ("name", "item_noun", "license")),
    ]
    content = recipe.to_dict()
    for section, heading in HEADINGS.items():
        lines.append(f"\n# {heading}")
        values = content[section]
        if section == "training":
            values = {name: values[name] for name in sized.sections["training"]}
            lines.append("# all other flags have the trainer's defaults; they will stand in the run's config.yaml")
        if not values:
            lines.append(f"{section}: {{}}")
            continue
        lines.append(f"{section}:")
        comments = field_comments(SECTIONS[section]) if section in SECTIONS else {}
        for name, value in values.items():
            comment = sized.why.get(f"{section}.{name}") or comments.get(name)
            lines.append(f"  {name}: {_value(value)}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, str) and "\n" in value:
        return yaml.safe_dump(value, default_style='"', width=10**6, allow_unicode=True).strip()
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n...\n").strip()


def field_comments(kind: type[Any]) -> dict[str, str]:
    """What the source says beside the fields of a section's type."""
    found = re.findall(r"^    (\w+): [^\n#]*#\s*(.+)$", inspect.getsource(kind), re.MULTILINE)
    names = {each.name for each in fields(kind)}
    return {name: comment for name, comment in found if name in names}

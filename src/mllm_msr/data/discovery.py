"""Which of a folder's files is the log and which the catalogue, and which of their columns is what.

Names propose and values decide: a time must be readable as one, and the item's column of the log is the one whose
values are ids of the catalogue. Every guess says what it rests on; what cannot be guessed is an error with its remedy.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import polars as pl

from mllm_msr.data.ids import as_ids
from mllm_msr.data.image_places import URL, ImageColumn, image_files, image_suffixes
from mllm_msr.data.parts import is_parts, table_format
from mllm_msr.data.raw import ROW, BadRows, short
from mllm_msr.data.sources.tables import TablesSource
from mllm_msr.data.table_files import TableFile
from mllm_msr.data.table_samples import LONGEST_ID, Sample, likeness
from mllm_msr.data.text_files import kind_of

SAMPLE = 2_000  # rows of a table that are looked at
MOST_FILES = 50
OTHERS = {".xlsx", ".xls", ".ods", ".feather", ".arrow", ".orc", ".avro", ".sqlite", ".db", ".zip"}  # may be tables
DATE = re.compile(r"\d{1,2}[./]\d{1,2}[./]\d{2}")  # of which nobody knows whether the day or the month comes first


@dataclass(frozen=True)
class FoundTables:
    """What a folder holds, as options of the source ``tables``.

    Args:
        options: with ``folder``, ``interactions``, and what else was found.
        rating: a column of the log that looks like a rating, which is not read.
        reasons: what each guess rests on, a sentence each.
        unused: files that were left aside, each with the reason.
    """

    options: TablesSource
    rating: str | None = None
    reasons: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


class Join(NamedTuple):
    """The columns by which a log and a catalogue meet; ``share`` of the log's items are in the catalogue."""

    log: "Sample"
    catalogue: "Sample"
    ours: str
    theirs: str
    share: float

    @property
    def worth(self) -> float:
        """How likely these are items, and not users with a table of their own, or whose numbers are items' as well."""
        likes_item = max(likeness(self.ours, "item_id"), likeness(self.theirs, "item_id"))
        likes_user = max(likeness(self.ours, "user_id"), likeness(self.theirs, "user_id"))
        named = max(likeness(column, role) for column in self.catalogue.columns for role in ("title", "image"))
        alike = self.ours.casefold() == self.theirs.casefold() and not likes_user
        return self.share + likes_item - likes_user + named / 2 + (likeness(self.ours, "item_id") or alike) / 2


def discover(
    folder: Path,
    interactions: str | None = None,
    items: str | None = None,
    images: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> FoundTables:
    """The log, the catalogue and the images in ``folder``, and what their columns are called.

    Args:
        interactions, items, images: known already, relative to ``folder``.
        columns: our names to theirs, where they are known already.

    Raises:
        FileNotFoundError: no such folder, or no table in it.
        ValueError: a file or a column that cannot be guessed, with the columns that there are and the remedy.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name the one that holds your tables")
    known, reasons = dict(columns or {}), list[str]()
    samples, unused = _samples(folder, [place for place in (interactions, items) if place])
    log = _log(folder, samples, unused, interactions, known, reasons)
    others = [sample for sample in samples if sample.place != log.place and items in (None, sample.place)]
    join = _join(log, others, known)
    chosen = join.log.ids(join.ours) if join else None
    if join and chosen is not None and join.theirs in chosen.to_list():
        raise _no_names(join.catalogue, join.theirs)
    if join:
        known.setdefault("item_id", join.ours)
        if join.theirs != join.ours:
            known.setdefault("items.item_id", join.theirs)
        reasons.append(
            f"items: {join.catalogue.place}, as {join.share:.0%} of the ids in {join.ours!r} of the log are in its "
            f"column {join.theirs!r}"
        )
    elif items:
        raise ValueError(
            f"{folder / items}: no column of it has the ids of a column of {log.place} (there are {log.columns}); name "
            "both by --column item_id=NAME and --column items.item_id=NAME"
        )
    elif interactions is None and (aside := [*unused, *_strangers(log, others)]):
        raise ValueError(
            f"{folder}: no table holds the items of {log.place}. {'; '.join(aside)}. Mend it, or name the columns by "
            "--column item_id=NAME and --column items.item_id=NAME; for items without words and images, name the log "
            f"alone: --interactions {log.place}"
        )
    else:
        reasons.append("items: no catalogue, so they have neither words nor images")
    rating = _log_columns(folder, log, known, reasons)
    catalogue = join.catalogue if join else None
    if catalogue:
        _item_columns(catalogue, known, reasons)
    images = images or _images(folder, catalogue, known, reasons)
    for sample in others:
        if any(sample.is_time(name) for name in sample.columns) and sample is not catalogue:
            unused.append(f"{sample.place}: could be the log, too; if it is, --interactions {sample.place}")
        elif sample is not catalogue:
            unused.append(f"{sample.place}: neither log nor catalogue")
    named = {ours: theirs for ours, theirs in known.items() if ours != theirs}
    place = catalogue.place if catalogue else None
    options = TablesSource(interactions=log.place, items=place, images=images, columns=named, folder=str(folder))
    return FoundTables(options, rating, reasons, unused)


def _samples(folder: Path, named: Sequence[str]) -> tuple[list[Sample], list[str]]:
    """The first rows of every table in a folder and the folders in it, and what could not be read, with the reason."""
    places = list(named) or list(_tables(folder))
    if not places:
        raise FileNotFoundError(
            f"{folder} has no table: put a log (who chose what, and when) and a catalogue there, as .csv, .tsv, "
            ".jsonl or .parquet, or name them by --interactions and --items"
        )
    if len(named) == 1:  # the other one is still to be found
        places += [place for place in _tables(folder) if place not in places]
    samples, unused = [], []
    for place in places:
        try:
            sample = Sample(place, folder, TableFile.find(place, folder).head(SAMPLE))
            if sample.rows.is_empty() or not sample.columns:
                hint = " (of JSON, one object a line is read, as .jsonl)" if ".json" in place.lower() else ""
                raise ValueError(f"{folder / place}: it has no rows{hint}")
            samples.append(sample)
        except (ValueError, OSError) as error:
            if place in named:
                raise
            unused.append(f"{place}: {short(error)}")
    if not samples:
        raise ValueError(f"{folder}: no table in it can be read; {unused[0]}")
    if not named:
        others = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in OTHERS and path.is_file())
        unused += [f"{path.name}: {kind_of(path) or 'of a kind that is not read'}" for path in others]
    return samples, unused


def _tables(folder: Path) -> list[str]:
    found: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "_")) or (path / "config.yaml").is_file():  # the latter is a run
            continue
        if is_parts(path) or (path.is_file() and table_format(path.name)):
            found.append(path.name)
        elif path.is_dir():
            inner = (each for each in sorted(path.iterdir()) if each.is_file() and table_format(each.name))
            found += [each.relative_to(folder).as_posix() for each in inner if not each.name.startswith(".")]
    return found[:MOST_FILES]


def _log(
    folder: Path,
    samples: Sequence[Sample],
    unread: Sequence[str],
    named: str | None,
    known: dict[str, str],
    reasons: list[str],
) -> Sample:
    """The table with a time in which users and items come again and again; its time becomes known."""
    found: list[tuple[float, Sample, str]] = []
    for sample in samples:
        if named not in (None, sample.place):
            continue
        given = known.get("timestamp")
        times = [given] if given in sample.columns else [name for name in sample.columns if sample.is_time(name)]
        if given and given not in sample.columns:
            continue
        if given and not sample.is_time(given, named=True):
            raise ValueError(
                f"{sample.path}: column {given!r} holds no times, such as {short(sample.first(given))}: write them as "
                "2024-12-31, as 2024-12-31T23:59:59, or in seconds since 1970"
            )
        if times:
            time = max(times, key=lambda name: likeness(name, "timestamp"))
            rest = [name for name in sample.columns if name != time]
            users = max((likeness(name, "user_id") for name in rest), default=0.0)
            items = max((likeness(name, "item_id") for name in rest), default=0.0)
            titles = max((likeness(name, "title") for name in rest), default=0.0)
            repeats = sum(_comes_again(sample, name) for name in rest)
            found.append((users + items - titles + min(repeats, 2) + likeness(time, "timestamp"), sample, time))
    if not found:
        tables = "; ".join([*(f"{sample.place} has {sample.columns}" for sample in samples), *unread])
        tables += "".join(
            f". {name!r} of {sample.place} holds no times, such as {short(sample.first(name))}: write 2024-12-31"
            for sample in samples
            for name in sample.columns
            if (likeness(name, "timestamp") or DATE.match(str(*sample.first(name)))) and not sample.is_time(name)
        )
        where = folder / named if named else folder
        raise ValueError(
            f"{where}: no column of times, by which a log is known. {tables}. If one of these is the log, name its "
            "column by --column timestamp=NAME (numbers, dates or ISO texts)"
        )
    _, log, time = max(found, key=lambda each: each[0])
    if not re.search(r"[^\W\d_]", time) or log.name_is_time(time):
        raise _no_names(log, time)
    values = short(log.first(time))
    known.setdefault("timestamp", time)
    reasons.append(f"interactions: {log.place}, as its column {time!r} holds times, such as {values}")
    return log


def _no_names(sample: Sample, name: str) -> ValueError:
    return ValueError(
        f"{sample.path}: its first row looks like values, not names, such as {name!r}: put the columns' names there"
    )


def _strangers(log: Sample, others: Sequence[Sample]) -> list[str]:
    """Tables that look like a catalogue but have none of the log's items, with ids of both."""
    said = []
    for other in others:
        named = [max(each.columns, key=lambda name: likeness(name, "item_id")) for each in (log, other)]
        if any(likeness(name, role) for name in other.columns for role in ("title", "image", "text")):
            ids = [short(each.first(name)) for each, name in zip((log, other), named, strict=True)]
            said.append(f"{other.place} has ids such as {ids[1]} in {named[1]!r}, the log {ids[0]} in {named[0]!r}")
    return said


def _comes_again(sample: Sample, column: str) -> bool:
    ids = sample.ids(column)
    return ids is not None and 1 < ids.n_unique() < len(ids)


def _join(log: Sample, others: Sequence[Sample], known: Mapping[str, str]) -> Join | None:
    """The best of all pairs of a column of the log and one of a catalogue in which no value comes twice."""
    others_roles = (known["timestamp"], known.get("user_id"))
    ours = [known["item_id"]] if "item_id" in known else [name for name in log.columns if name not in others_roles]
    joins = []
    for mine in ours:
        if mine not in log.columns or (chosen := log.ids(mine)) is None:
            continue
        for other in others:
            named = known.get("items.item_id")
            for theirs in [named] if named else other.columns:
                if theirs not in other.columns or (ids := _unique_ids(other, theirs)) is None:
                    continue
                share = chosen.unique().is_in(ids.implode()).mean()
                if isinstance(share, float) and share >= 0.5:
                    joins.append(Join(log, other, mine, theirs, share))
    best = max(joins, key=lambda join: join.worth, default=None)
    if best and not likeness(best.ours, "item_id"):
        rivals = [join.ours for join in joins if join.ours != best.ours and join.worth > best.worth - 0.1]
        if rivals:
            raise ValueError(
                f"{log.path}: the values of {best.ours!r} and of {rivals[0]!r} are ids in {best.catalogue.place}, and "
                "names do not tell which are items: name them by --column item_id=NAME"
            )
    named_so = "item_id" in known or "items.item_id" in known
    return best if best and (named_so or best.worth > 0.5) else None


def _unique_ids(sample: Sample, column: str) -> pl.Series | None:
    """All ids of a catalogue's column; None unless (nearly) every row has one of its own."""
    ids = sample.ids(column)
    if ids is None or ids.n_unique() < 0.9 * len(ids):
        return None
    if len(sample.rows) < SAMPLE:
        return ids
    table = TableFile.find(sample.place, sample.folder)
    whole = pl.concat(batch.select(ROW, column) for batch in table.batches([column], (), "", BadRows("skip")))
    return as_ids(whole.lazy(), [column], sample.place, BadRows("skip")).collect()[column].drop_nulls()


def _log_columns(folder: Path, log: Sample, known: dict[str, str], reasons: list[str]) -> str | None:
    """Finds the user, and without a catalogue the item; returns a column of ratings."""
    free = [name for name in log.columns if name not in (known["timestamp"], known.get("item_id"))]
    rating = max(free, key=lambda name: likeness(name, "rating"), default=None)
    rating = rating if rating and likeness(rating, "rating") else None
    free = [name for name in free if name != rating]
    for role in ("user_id", "item_id"):
        if role in known:
            if known[role] not in log.columns:
                raise ValueError(f"{log.path}: no column {known[role]!r} for {role}; it has {log.columns}")
            if role == "item_id":
                reasons.append(f"item_id: {known[role]!r} of {log.place}")
            continue
        named = {name: likeness(name, role) for name in free if likeness(name, role) > 0 and log.ids(name) is not None}
        again = [name for name in free if _comes_again(log, name)]
        if named:
            column, why = max(named, key=lambda name: named[name]), "by its name"
        elif len(again) == 1:
            column, why = again[0], "the one column left whose values come again"
        else:
            raise ValueError(
                f"{log.path}: cannot tell which column is {role}; it has {log.columns}. Name it: "
                f"mllm-msr init {folder} --column {role}=NAME"
            )
        known[role] = column
        free = [name for name in free if name != column]
        reasons.append(f"{role}: {column!r} of {log.place}, {why}")
    if rating:
        reasons.append(f"rating: {rating!r} of {log.place} looks like one; it is not read, and every row is a choice")
    return rating


def _item_columns(catalogue: Sample, known: dict[str, str], reasons: list[str]) -> None:
    """Finds title, text and image of the catalogue; each may be absent."""
    identity = known.get("items.item_id", known["item_id"])
    taken = {identity, *(known.get(role) for role in ("image", "title", "text"))}
    free = [name for name in catalogue.columns if name not in taken]
    for role in ("image", "title", "text"):
        if role in known:
            if known[role] not in catalogue.columns:
                raise ValueError(f"{catalogue.path}: no column {known[role]!r} for {role}; it has {catalogue.columns}")
            continue
        column, why = _item_column(catalogue, free, role)
        if column is None:
            reasons.append(f"{role}: no column of {catalogue.place} looks like one")
            continue
        known[role] = column
        free = [name for name in free if name != column]
        reasons.append(f"{role}: {column!r} of {catalogue.place}, {why}")


def _item_column(catalogue: Sample, free: Sequence[str], role: str) -> tuple[str | None, str]:
    texts = [name for name in free if catalogue.rows.schema[name] == pl.String]
    possible = list(free) if role == "image" else texts
    named = max(possible, key=lambda name: likeness(name, role), default=None)
    if named and likeness(named, role):
        return named, "by its name"
    if role == "image":
        held = next((name for name in free if _holds_images(catalogue.rows[name])), None)
        return held, "as its values are images"
    lengths = {name: catalogue.rows[name].str.len_chars().mean() or 0.0 for name in texts}
    worded = {name: length for name, length in lengths.items() if catalogue.rows[name].str.contains(" ").mean()}
    longest = max(worded, key=lambda name: float(str(worded[name])), default=None)
    if role == "text" and longest and float(str(worded[longest])) > LONGEST_ID:
        return longest, "the longest text"
    shortest = min(worded, key=lambda name: float(str(worded[name])), default=None)
    return (shortest, "the shortest text") if role == "title" else (None, "")


def _holds_images(values: pl.Series) -> bool:
    if values.dtype == pl.Binary or (isinstance(values.dtype, pl.Struct) and "bytes" in str(values.dtype)):
        return True
    if values.dtype != pl.String:
        return False
    ends = "|".join(map(re.escape, sorted(image_suffixes())))
    ending = values.drop_nulls().str.to_lowercase().str.contains(f"({ends})([?#].*)?$")
    return 2 * int(ending.sum()) > len(ending)


def _images(folder: Path, catalogue: Sample | None, known: Mapping[str, str], reasons: list[str]) -> str | None:
    """The folder that holds the images which the catalogue names, or those that are called by the items' ids."""
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith((".", "_"))]
    if catalogue and "image" in known:
        values = catalogue.rows[known["image"]]
        if values.dtype != pl.String:
            return None
        names = values.drop_nulls().filter(~values.drop_nulls().str.contains(URL)).to_list()
        roots = [catalogue.path.parent, folder, *below]
        shares = [sum(ImageColumn(root).file(name) is not None for name in names) for root in roots]
        best = max(range(len(roots)), key=lambda place: shares[place])
        if not names or not shares[best]:
            return None
        reasons.append(f"images: {shares[best]} of the first {len(names)} that are named are files below {roots[best]}")
        return None if roots[best] == catalogue.path.parent else roots[best].relative_to(folder).as_posix()
    ids = catalogue.ids(known.get("items.item_id", known["item_id"])) if catalogue else None
    known_ids = set() if ids is None else set(ids)
    for root in [*below, folder] if known_ids else []:
        if count := len(set(image_files(root)) & known_ids):
            reasons.append(
                f"images: {count} of the first {len(known_ids)} items have a file in {root} that is called by the id"
            )
            return root.relative_to(folder).as_posix()
    if catalogue:
        reasons.append("images: none found, so words alone are used")
    return None

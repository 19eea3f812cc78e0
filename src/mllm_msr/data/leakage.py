"""Proof that no figure can come from having seen the answer; run on every prepare and before every publish."""

import polars as pl

from mllm_msr.data.raw import short
from mllm_msr.modeling.preference import whole_blocks

SHOWN = 5  # offending rows in a message
SLICE = 50_000  # texts cut into words at a time
TARGET = pl.col("candidates").list.get(pl.col("labels").list.arg_max()).alias("target")


class LeakageError(ValueError):
    """Tasks or what was made from them know something they must not; the message shows the rows."""


def check_leakage(
    tasks: pl.DataFrame,
    interactions: pl.DataFrame,
    popularity: pl.DataFrame | None = None,
    preferences: pl.DataFrame | None = None,
    seen: pl.DataFrame | None = None,
    protocol: str | None = None,
) -> None:
    """Check tasks against the log they came from; raises :class:`LeakageError` with the offending rows.

    Always: exactly one target a task, no candidate twice, the target not in its history, history only of items that
    the user met up to the cutoff and as long as it says, negatives never met by the user (``seen``: further user_id,
    item_id pairs). With ``protocol`` "paper": a user is trained on or held out, never both. With ``popularity``
    (item_id, count): nothing held out is counted, and the tasks' counts are these. With ``preferences`` (user_id, step,
    read_item_ids, last_timestamp): each step has read only items of the history before the user's last target (of the
    log, if there is none), none later than it says, and all that the step before had read. Ids may be numbers
    throughout. ``tasks`` may be those of some users if ``interactions`` has all of those users; pass ``popularity`` and
    ``preferences`` only with all tasks.
    """
    tasks = tasks.with_columns(TARGET)
    _none(tasks.filter(pl.col("labels").list.sum() != 1), "tasks without exactly one target")
    width = pl.col("candidates").list.len()
    _none(tasks.filter(pl.col("labels").list.len() != width), "labels do not match candidates")
    _none(tasks.filter(pl.col("candidates").list.n_unique() != width), "candidates twice")
    _none(tasks.filter(pl.col("history").list.contains(pl.col("target"))), "targets in their own history")
    _none(tasks.filter(pl.col("history").list.len() != pl.col("history_length")), "history_length is wrong")

    user, item = (_number(pl.col(name), interactions[name]) for name in ("user_id", "item_id"))
    pair = (user * (1 << 32) + item).alias("pair")  # null: not in the log
    met = interactions.select(pair, "timestamp").group_by("pair").agg(pl.col("timestamp").min().alias("met_at"))

    def explode(column: str, *others: str) -> pl.DataFrame:
        pairs = tasks.select("user_id", "task_id", "cutoff", pl.col(column).alias("item_id"), *others)
        pairs = pairs.explode("item_id", *others).drop_nulls("item_id")
        return pairs.with_columns(pair).join(met, on="pair", how="left")

    history = explode("history")
    _none(history.filter(pl.col("met_at").is_null()), "items in a history that the user never met")
    _none(history.filter(pl.col("met_at") > pl.col("cutoff")), "items in a history that are later than the cutoff")
    candidates = explode("candidates", "labels")
    is_met = pl.col("met_at").is_not_null()
    _none(candidates.filter((pl.col("labels") == 1) & ~is_met), "targets that the user never met")
    negatives = candidates.filter(pl.col("labels") == 0)
    _none(negatives.filter(is_met), "negatives that the user has met")
    if seen is not None and len(seen):
        _none(negatives.join(seen, on=["user_id", "item_id"], how="semi"), "negatives that the user has met")
    if protocol == "paper":
        trained = tasks.filter(split="train").select("user_id")
        both = tasks.filter(pl.col("split") != "train").join(trained, on="user_id", how="semi")
        _none(both, "held-out users that are trained on")

    if popularity is not None:
        check_popularity(countable(tasks, interactions, protocol), popularity)
        check_shown_counts(tasks, popularity)
    if preferences is not None:
        _check_preferences(tasks, interactions, preferences)


def _number(column: pl.Expr, ids: pl.Series) -> pl.Expr:
    """Ids as whole numbers, the same number the same id; null if it is none of ``ids``."""
    if ids.dtype.is_integer():
        return column.cast(pl.Int64)
    return column.cast(pl.Enum(ids.unique()), strict=False).to_physical().cast(pl.Int64)


def countable(tasks: pl.DataFrame, interactions: pl.DataFrame, protocol: str | None = None) -> pl.DataFrame:
    """item_id, countable: how often each item may at most count as popular, by what these users did.

    That is all that they did up to their first held-out target, without the held-out targets; under the protocol
    "paper" nothing at all of a user who is held out. Sums over parts of the users are those of the whole.
    """
    held_out = tasks.filter(pl.col("split") != "train").select("user_id", "cutoff", TARGET)
    if protocol == "paper":
        rest = interactions.join(held_out, on="user_id", how="anti")
    else:
        rest = interactions.join(held_out, left_on=["user_id", "item_id"], right_on=["user_id", "target"], how="anti")
        rest = rest.join(held_out.group_by("user_id").agg(pl.col("cutoff").min()), on="user_id", how="left")
        rest = rest.filter(pl.col("timestamp") <= pl.col("cutoff").fill_null(pl.col("timestamp")))
    return rest.group_by("item_id").agg(countable=pl.len())


def check_popularity(countable: pl.DataFrame, popularity: pl.DataFrame) -> None:
    """No item counts for more than it may (:func:`countable`); or raise."""
    counts = popularity.join(countable, on="item_id", how="left")
    too_many = pl.col("count") > pl.col("countable").fill_null(0)
    _none(counts.filter(too_many), "popularity that counts held-out interactions")


def check_shown_counts(tasks: pl.DataFrame, popularity: pl.DataFrame) -> None:
    """The training count that a task shows of its target is the popularity; or raise."""
    targets = tasks.select("task_id", TARGET, "target_train_count")
    targets = targets.join(popularity, left_on="target", right_on="item_id", how="left")
    wrong = pl.col("count").ne_missing(pl.col("target_train_count"))
    _none(targets.filter(wrong), "target_train_count that is not the popularity")


def check_no_ids(texts: pl.Series, ids: pl.Series, allowed: pl.Series | None = None) -> None:
    """No generated text (a summary, a preference) has a raw user or item id as a word; or raise.

    In what a model wrote, only ids of at least six characters with a digit among them can be told from ordinary words,
    numbers and years, so shorter ones are not looked for here; :mod:`mllm_msr.proof` says why they cannot be there.
    Words that occur in ``allowed`` (titles, descriptions) may stand anywhere.
    """
    ids = ids.filter((ids.str.len_chars() >= 6) & ids.str.contains(r"\p{N}")).unique().implode()
    texts = texts.drop_nulls().unique(maintain_order=True)
    slices = (texts.slice(start, SLICE) for start in range(0, len(texts) or 1, SLICE))
    words = pl.concat(_words(part).filter(pl.col("word").is_in(ids)) for part in slices)
    if len(words) and allowed is not None:
        quoted = allowed.filter(allowed.str.contains_any(words["word"].unique().implode()))
        words = words.join(_words(quoted), on="word", how="anti")
    _none(words.select("word", pl.col("text").str.slice(0, 300)), "raw ids in a text")


def _words(texts: pl.Series) -> pl.DataFrame:
    """text, word: both the runs of letters and digits, and what stands between blanks, for ids such as "a.b/7"."""
    plain = pl.col("text").str.extract_all(r"[\p{L}\p{N}_-]+")
    whole = pl.col("text").str.extract_all(r"[\p{L}\p{N}_](?:\S*[\p{L}\p{N}_])?")
    words = pl.DataFrame({"text": texts}).with_columns(pl.concat_list(plain, whole).list.unique().alias("word"))
    return words.explode("word").drop_nulls()


def check_own_words(items: pl.DataFrame) -> None:
    """No item is called or described by its own id (a column mapped by mistake); or raise.

    An id among other words of a title or a description is the source's own wording, and stays.
    """
    is_id = pl.any_horizontal(pl.col("title", "text") == pl.col("item_id"))
    _none(items.select("item_id", "title", "text").filter(is_id), "titles or descriptions that are the item's id")


def check_used_preferences(tasks: pl.DataFrame, preferences: pl.DataFrame, block_size: int) -> None:
    """The preference that each task is asked with has read only what stands in that task's history, and nothing later
    than its cutoff; or raise."""
    step = whole_blocks(pl.col("history").list.len(), block_size).cast(pl.Int64).alias("step")
    used = tasks.select("task_id", "user_id", step, "history", "cutoff").join(
        preferences.select("user_id", "step", "read_item_ids", "last_timestamp"), on=["user_id", "step"]
    )
    beyond = pl.col("read_item_ids").list.set_difference("history").alias("beyond")
    used = used.with_columns(beyond).filter(
        (pl.col("beyond").list.len() > 0) | (pl.col("last_timestamp") > pl.col("cutoff"))
    )
    _none(used, "tasks with a preference that has read beyond their history")


def _check_preferences(tasks: pl.DataFrame, interactions: pl.DataFrame, preferences: pl.DataFrame) -> None:
    columns = ["user_id", "step", "read_item_ids", "last_timestamp"]
    steps = preferences.select(columns).sort("user_id", "step")
    longest = tasks.sort("history_length").group_by("user_id").agg(pl.col("history", "cutoff").last())
    whole = interactions.group_by("user_id").agg(met="item_id", last=pl.col("timestamp").max())
    steps = steps.join(longest, on="user_id", how="left", maintain_order="left")
    steps = steps.join(whole, on="user_id", how="left", maintain_order="left").select(
        *columns, pl.coalesce("history", "met").alias("history"), pl.coalesce("cutoff", "last").alias("cutoff")
    )  # no task reads the preference of a user who has none: all of the log may be in it
    _none(steps.filter(pl.col("history").is_null()).select(columns), "preferences of users who are not in the log")
    beyond = pl.col("read_item_ids").list.set_difference("history")
    _none(
        steps.with_columns(beyond.alias("beyond")).filter(pl.col("beyond").list.len() > 0).select(*columns, "beyond"),
        "preferences that read items outside the history",
    )
    late = pl.col("last_timestamp") > pl.col("cutoff")
    _none(steps.filter(late).drop("history"), "preferences later than the cutoff")
    earlier = pl.col("read_item_ids").shift(1).over("user_id")
    lost = steps.with_columns(earlier.fill_null([]).list.set_difference("read_item_ids").alias("lost"))
    _none(
        lost.filter(pl.col("lost").list.len() > 0).drop("history"), "preference steps that forget what was read before"
    )

    met = interactions.group_by("user_id", "item_id").agg(pl.col("timestamp").min().alias("met_at"))
    read = steps.select("user_id", "step", pl.col("read_item_ids").alias("item_id"), "last_timestamp").explode(
        "item_id"
    )
    read = read.join(met, on=["user_id", "item_id"], how="inner")
    _none(read.filter(pl.col("met_at") > pl.col("last_timestamp")), "preferences that read later than they say")


def _none(offenders: pl.DataFrame, what: str) -> None:
    if len(offenders):
        rows = "\n  ".join(str(_short(row)) for row in offenders.head(SHOWN).to_dicts())
        raise LeakageError(f"leakage: {what}: {len(offenders)} rows, such as\n  {rows}")


def _short(row: dict[str, object]) -> dict[str, object]:
    return {
        name: [*value[:8], "…"]
        if isinstance(value, list) and len(value) > 8
        else short(value)
        if isinstance(value, str)
        else value
        for name, value in row.items()
    }

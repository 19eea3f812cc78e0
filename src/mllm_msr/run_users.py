"""The users of a run, as rankings need them: what they have chosen, and what is said of them in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from mllm_msr.data.ids import plain_id
from mllm_msr.modeling.inputs import HistoryItem, User
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, ITEM_SUMMARIES, PREFERENCES

NOTHING_SAID = User()


@dataclass(frozen=True)
class RunUser:
    """A user of a run: in words, for the answer, and all items that the user has ever chosen, oldest first."""

    user_id: str
    words: User = NOTHING_SAID
    history: tuple[str, ...] = ()

    @property
    def chosen(self) -> frozenset[str]:
        return frozenset(self.history)


def read_users(run: RunFolder, users: Sequence[str], in_words: bool = True) -> list[RunUser]:
    """Some users of a run, for the answer ``in_words``: with the preference in force and the items chosen since;
    ValueError for an unknown one."""
    wanted = pl.col("user_id").is_in(list(users))
    histories = _items_of(run.scan(INTERACTIONS).filter(wanted))
    cut = _items_of(run.scan(CUT_INTERACTIONS).filter(wanted)) if run.recipe.data.max_history is not None else {}
    if unknown := [user for user in users if user not in histories]:
        raise unknown_users(run, unknown)
    words = read_words(run, histories) if in_words else {}
    whole = {user: (*cut.get(user, ()), *histories[user]) for user in users}
    return [RunUser(user, words.get(user, NOTHING_SAID), whole[user]) for user in users]


def unknown_users(run: RunFolder, users: Sequence[str]) -> ValueError:
    """The error that names users whom a run does not have, and says which users it keeps."""
    example = run.scan(INTERACTIONS).select("user_id").head(1).collect().item()
    least, most = run.recipe.data.k_core_users, run.recipe.data.limit_users
    kept = [f"users of {least} interactions or more"] if least > 1 else []
    kept += [f"{most:,} users of the log (limit_users)"] if most else []
    keeping = f", which keeps {' and '.join(kept)}" if kept else ""
    return ValueError(f"{listed(users)} no user of {run.path}{keeping}; ids look like {example!r}")


def known_id(run: RunFolder, user_id: str) -> str:
    """A user's id as the run has it: what it does not know as it is written is read as in a log (``10.0``)."""
    other = plain_id(user_id)
    users = run.scan(INTERACTIONS).select("user_id")
    unknown = other != user_id and users.filter(user_id=user_id).head(1).collect().is_empty()
    return other if unknown and users.filter(user_id=other).head(1).collect().height else user_id


def read_words(run: RunFolder, histories: Mapping[str, Sequence[str]]) -> dict[str, User]:
    """Users in words, from their histories as far as prompts read them."""
    wanted = pl.col("user_id").is_in(list(histories))
    last = (
        run.scan(PREFERENCES)
        .filter(wanted)
        .group_by("user_id")
        .agg(pl.col("step", "preference").sort_by("step").last())
    )
    in_force = {user: (step, preference) for user, step, preference in last.collect().iter_rows()}
    summaries = dict(run.read(ITEM_SUMMARIES, ["item_id", "summary"]).iter_rows())
    words = {}
    for user, history in histories.items():
        step, preference = in_force.get(user, (0, ""))
        recent = [HistoryItem(summary=summaries[item]) for item in history[step * run.block_size :]]
        words[user] = User(preference, recent)
    return words


def _items_of(log: pl.LazyFrame) -> dict[str, list[str]]:
    return dict(log.group_by("user_id", maintain_order=True).agg("item_id").collect().iter_rows())


def listed(ids: Sequence[str]) -> str:
    """The first of some unknown ids, as the beginning of a message."""
    more = f" and {len(ids) - 3} more are" if len(ids) > 3 else " is" if len(ids) == 1 else " are"
    return ", ".join(map(repr, ids[:3])) + more

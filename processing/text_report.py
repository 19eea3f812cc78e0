"""What a stage says of the texts it has written, and when it stops because none of them is of use."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import polars as pl

from mllm_msr.processing.engines import NoTextOfUse
from mllm_msr.processing.prompts import Task
from mllm_msr.processing.text_status import OK, StoredText, has_failed, is_useless, kind

logger = logging.getLogger(__name__)
SAMPLES = 3
LISTED = 20  # texts that are not ok
MANY = 4  # different inputs from which on one text for most of them is no accident
NamedText = tuple[str, StoredText]  # the first is what people call its input


def no_use(task: Task, written: Sequence[NamedText]) -> NoTextOfUse:
    """The error of an engine none of whose texts is of use, with three samples."""
    counts = ", ".join(f"{count} {status}" for status, count in Counter(text.status for _, text in written).items())
    return NoTextOfUse(
        f"{task}: none of {len(written)} texts is of use ({counts}), such as {_samples(written)}; check "
        "summaries.model and its settings: one that reasons before it answers needs larger summaries.max_new_tokens"
    )


def check_texts(task: Task, read: Callable[[], Iterable[NamedText]]) -> None:
    """Stop if no text of different inputs is of any use, and warn if most of them are the same.

    Args:
        read: the texts, which are not held; called up to three times.

    Raises:
        NoTextOfUse: all texts have failed, are empty or refuse, see :func:`no_use`.
    """
    total, useful = 0, False
    most, lead = "", 0  # the only text that more than half of all can be (Boyer and Moore's vote)
    for _, text in read():
        total, useful, said = total + 1, useful or not is_useless(text.status), _normalised(text.text)
        if not lead:
            most = said
        lead += 1 if said == most else -1
    if total and not useful:
        raise no_use(task, list(read()))
    if not most or lead <= 0 or total < MANY:
        return
    alike = [(name, text) for name, text in read() if _normalised(text.text) == most]
    if len(alike) > total / 2:
        logger.warning("%s: %d of %d different inputs got one text: %s", task, len(alike), total, _samples(alike))


def text_report(frame: pl.DataFrame) -> str:
    """How many texts have which status, which are not ok, and three samples of those that are.

    Args:
        frame: a table ``ITEM_SUMMARIES`` or ``PREFERENCES``.
    """
    ids = [name for name in ("item_id", "user_id", "step") if name in frame.columns]
    text_column = "summary" if "summary" in frame.columns else "preference"
    written = [
        (" ".join(map(str, names)), StoredText(text, status))
        for *names, text, status in frame.select(*ids, text_column, "status").iter_rows()
    ]
    counts = Counter(kind(text.status) for _, text in written)
    lines = ["  " + ", ".join(f"{count} {status}" for status, count in counts.most_common())]
    doubtful = [(name, text.status) for name, text in written if text.status != OK]
    lines += [f"    {name}: {status}" for name, status in doubtful[:LISTED]]
    if doubtful[LISTED:]:
        lines.append(f"    and {len(doubtful) - LISTED} more, see the column `status`")
    if any(has_failed(status) for _, status in doubtful):
        lines.append("  run the same command again to try the failed ones again")
    good = [(name, text) for name, text in written if text.status == OK]
    spread = good[:: max(1, -(-len(good) // SAMPLES))]
    return "\n".join(lines + [f"  {name}: {_short(text.text)}" for name, text in spread])


def _samples(written: Sequence[NamedText]) -> str:
    return "; ".join(f"{name}: {_short(text.text) or text.status}" for name, text in written[:SAMPLES])


def _short(text: str, width: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!")

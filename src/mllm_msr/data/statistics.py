"""What a prepared data set is like, in numbers and in print."""

from typing import Any

import numpy as np

from mllm_msr.data.cleaning import CleanData
from mllm_msr.data.coded_log import Array, user_starts

BELOW_CHANCE = (
    "Popularity ranks below chance here, and the scores are not upside down: it counts training interactions, the "
    "protocol strict holds out each user's last two, and items that are new at the end of the log are among the "
    "choices and hardly in the counts."
)


def statistics(data: CleanData, n_images: int) -> dict[str, Any]:
    lengths: list[Array] = []
    tied = pairs = 0
    first, last = [], []
    for rows in data.log.parts():
        if len(rows):
            lengths.append(np.diff(user_starts(rows["user"])))
            moments = np.diff(rows["time"]).astype(bool) | np.diff(rows["user"]).astype(bool)
            alone = np.concatenate([[True], moments]) & np.concatenate([moments, [True]])
            tied += int(len(rows) - alone.sum())
            pairs += len(np.unique(rows["user"].astype(np.int64) * len(data.items) + rows["item"]))
            first.append(rows["time"].min())
            last.append(rows["time"].max())
    length = np.concatenate(lengths)
    users, items, interactions = len(length), len(data.items), int(length.sum())
    return {
        "users": users,
        "items": items,
        "interactions": interactions,
        "mean_length": round(interactions / users, 2),
        "median_length": float(np.median(length)),
        "longest": int(length.max()),
        "sparsity": round(1 - pairs / (users * items), 5),
        "share_tied_times": round(tied / interactions, 4),
        "share_without_image": round(1 - n_images / items, 4),
        "share_without_text": round((data.items["text"] == "").sum() / items, 4),
        "first_timestamp": int(min(first)),
        "last_timestamp": int(max(last)),
    }


def statistics_table(report: dict[str, Any]) -> str:
    """The report as plain text: what cleaning left, the data's statistics, the protocol, and what popularity scores."""
    steps = [(row["step"], row["interactions"], row["users"], row["items"], row["why"]) for row in report["cleaning"]]
    lines = [f"{'step':<14}{'interactions':>13}{'users':>10}{'items':>10}  why"]
    lines += [f"{step:<14}{n:>13,}{users:>10,}{items:>10,}  {why}" for step, n, users, items, why in steps]
    lines.append("")
    for name, value in report["statistics"].items():
        text = f"{value:,}"
        if name.startswith(("sparsity", "share")):
            text = f"{value:.2%}"
        elif name.endswith("timestamp"):
            text = str(np.datetime64(value, "s")).replace("T", " ")
        lines.append(f"{name.replace('_', ' '):<22}{text:>20}")
    protocol = report["protocol"]
    lines += ["", f"protocol {protocol['name']}, candidates {protocol['candidate_hash']}"]
    for split in ("train", "validation", "test"):
        tied = protocol[f"{split}_targets_tied_in_time"]
        lines.append(
            f"{split:<12}{protocol[f'{split}_tasks']:>10,} tasks, {tied:,} targets tied in time with the item before"
        )
    for name, count in protocol.items():
        if name.startswith("targets_") and count:
            lines.append(f"{count:>8,}  targets refused: {name.removeprefix('targets_').replace('_', ' ')}")
    for split, figures in protocol["popularity"].items():
        lines.append(f"popularity, {split}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if protocol["name"] == "strict" and any(each["auc_user"] < 0.5 for each in protocol["popularity"].values()):
        lines.append(BELOW_CHANCE)
    lines += [f"{row['count']:>8,}  {row['what']}" for row in report["skipped"]]
    return "\n".join(lines)

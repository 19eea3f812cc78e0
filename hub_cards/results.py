"""What ``metrics.json`` says, in words and tables: for the report, the cards, the terminal and a pasted comment."""

from pathlib import Path

METRIC_NAMES = {
    "auc": "AUC",
    "auc_user": "AUC per user",
    "hr@1": "HR@1",
    "hr@5": "HR@5",
    "hr@10": "HR@10",
    "mrr@5": "MRR@5",
    "ndcg@5": "NDCG@5",
    "map": "MAP",
}
ROW_NAMES = {
    "mllm_msr": "MLLM-MSR",
    "text_only": "text only",
    "blank_images": "blank images",
    "shuffled_images": "shuffled images",
    "no_preference": "no preference",
    "other_user": "another user's",
    "no_sft": "no fine-tuning",
    "sasrec": "SASRec",
    "gru4rec": "GRU4Rec",
    "svd": "PureSVD",
    "knn": "item-kNN",
    "tfidf": "TF-IDF",
    "popularity": "popularity",
    "random": "random",
    "oracle": "oracle",
}
ROW_MEANINGS = {
    "mllm_msr": "the trained recommender: preference, title and picture",
    "text_only": "the trained recommender without the candidate's picture",
    "blank_images": "the trained recommender, every candidate's picture replaced by a blank one",
    "shuffled_images": "the trained recommender, every candidate with another item's picture",
    "no_preference": "the trained recommender, told nothing about the user",
    "other_user": "the trained recommender, told another user's preference",
    "no_sft": "the backbone with the same prompts, before any training",
    "sasrec": "self-attention over the sequence of item ids, trained on the same training interactions",
    "gru4rec": "a recurrent network over the sequence of item ids, trained likewise",
    "svd": "matrix factorisation of the training interactions",
    "knn": "similarity of the items' training users to the recent history",
    "tfidf": "similarity of the items' words to the recent history",
    "popularity": "ranked by the number of training interactions",
    "random": "ranked by chance",
    "oracle": "ranked by the true taste, which only a generator knows: the best that is possible",
}
OURS = "mllm_msr"
TRAINED = ("sasrec", "gru4rec", "svd", "knn", "tfidf")


def row_name(row: str) -> str:
    """The reader's name of a row; rows we do not know keep their own."""
    return ROW_NAMES.get(row, row.replace("_", " "))


def ordered_rows(metrics: dict) -> list[str]:
    """The rows of ``metrics`` in reading order: ours, its reductions, the baselines, others, the oracle last."""
    known = [row for row in ROW_NAMES if row in metrics["rows"] and row != "oracle"]
    others = [row for row in metrics["rows"] if row not in ROW_NAMES]
    return known + others + [row for row in ("oracle",) if row in metrics["rows"]]


def metric_keys(metrics: dict) -> list[str]:
    """The metrics that at least one row has, in reading order."""
    return [key for key in METRIC_NAMES if any(key in values for values in metrics["rows"].values())]


def best_rows(metrics: dict, key: str) -> set[str]:
    """The rows with the highest value of ``key``; the oracle does not compete."""
    values = {row: values[key]["value"] for row, values in metrics["rows"].items() if row != "oracle" and key in values}
    return {row for row, value in values.items() if value == max(values.values())}


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def interval(result: dict) -> str:
    low, high = result["ci95"]
    return f"{percent(low)}-{percent(high)}"


def results_markdown(metrics: dict) -> str:
    """A Markdown table: a row per ranker, ``value (low-high)`` in percent, the best of each column in bold.

    >>> auc = {"auc": {"value": 0.8123, "ci95": [0.7911, 0.8333]}}
    >>> print(results_markdown({"rows": {"mllm_msr": auc}}))
    | | AUC |
    |:--|--:|
    | MLLM-MSR | **81.2** (79.1-83.3) |
    """
    keys = metric_keys(metrics)
    lines = [f"| | {' | '.join(METRIC_NAMES[key] for key in keys)} |", f"|:--|{'--:|' * len(keys)}"]
    for row in ordered_rows(metrics):
        cells = []
        for key in keys:
            result = metrics["rows"][row].get(key)
            mark = "**" if row in best_rows(metrics, key) else ""
            cells.append(f"{mark}{percent(result['value'])}{mark} ({interval(result)})" if result else "")
        lines.append(f"| {row_name(row).replace('|', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def results_table(metrics: dict) -> str:
    """The same for the terminal: aligned columns, percent, the interval under each value, ``*`` on the best.

    >>> auc = {"auc": {"value": 0.8123, "ci95": [0.7911, 0.8333]}}
    >>> print(results_table({"rows": {"mllm_msr": auc}}))
                      AUC
    MLLM-MSR        81.2*
                79.1-83.3
    """
    keys, rows = metric_keys(metrics), ordered_rows(metrics)
    first = max(len(row_name(row)) for row in rows) + 2
    width = max(11, *(len(METRIC_NAMES[key]) + 2 for key in keys))
    lines = [" " * first + "".join(f"{METRIC_NAMES[key]:>{width}}" for key in keys)]
    for row in rows:
        values, ranges = f"{row_name(row):<{first}}", " " * first
        for key in keys:
            result = metrics["rows"][row].get(key)
            star = "*" if row in best_rows(metrics, key) else ""
            values += f"{percent(result['value']) + star if result else '':>{width}}"
            ranges += f"{interval(result) if result else '':>{width}}"
        lines += [values.rstrip(), ranges]
    return "\n".join(lines)


def headline(metrics: dict) -> str | None:
    """One sentence with the run's main result; None if our row or its HR@5 is missing."""
    rows = metrics["rows"]
    if "hr@5" not in rows.get(OURS, {}):
        return None
    candidates = metrics.get("n_candidates")
    among = f" of {candidates} candidates" if candidates else ""
    sentence = f"{percent(rows[OURS]['hr@5']['value'])}% of users find their next choice in the top five{among}"
    others: list[str] = []
    for row in (strongest_baseline(metrics, "hr@5"), "popularity", "random"):
        if "hr@5" in rows.get(row, {}):
            name = "chance" if row == "random" else row_name(row) + ("" if others else " manages")
            others.append(f"{name} {percent(rows[row]['hr@5']['value'])}%")
    return f"{sentence}; {', '.join(others)}." if others else f"{sentence}."


def strongest_baseline(metrics: dict, key: str) -> str:
    """The row of the trained baselines with the highest value of ``key``; "" if there is none."""
    values = {row: metrics["rows"][row][key]["value"] for row in TRAINED if key in metrics["rows"].get(row, {})}
    return max(values, key=lambda row: values[row], default="")


def findings(metrics: dict) -> list[dict[str, str]]:
    """What the rows say beside each other, as ``{"figure", "words"}``; what users cannot tell apart is called so."""
    rows = {row: values["auc"] for row, values in metrics["rows"].items() if "auc" in values}
    if OURS not in rows:
        return []
    ours = rows[OURS]
    said = [{"figure": percent(ours["value"]), "words": f"AUC, percent ({interval(ours)}); chance is 50"}]
    strongest = strongest_baseline(metrics, "auc")
    for row, words in (
        (strongest, f"AUC against {row_name(strongest)}, the strongest baseline"),
        ("popularity", "AUC against popularity"),
        ("no_sft", "AUC from fine-tuning"),
        ("blank_images", "AUC from the pictures, against blank ones"),
    ):
        if row not in rows:
            continue
        if paired := metrics.get("against", {}).get(row, {}).get("auc"):
            apart, why = paired["ci95"][0] > 0 or paired["ci95"][1] < 0, "the 95% interval of the difference spans 0"
        else:
            apart = ours["ci95"][0] > rows[row]["ci95"][1] or ours["ci95"][1] < rows[row]["ci95"][0]
            why = "the 95% intervals overlap"
        doubt = "" if apart else f" ({why})"
        said.append({"figure": f"{100 * (ours['value'] - rows[row]['value']):+.1f}", "words": words + doubt})
    if "oracle" in rows and rows["oracle"]["value"] > 0.5 < ours["value"]:
        share = (ours["value"] - 0.5) / (rows["oracle"]["value"] - 0.5)
        words = f"of the way from chance to the oracle's {percent(rows['oracle']['value'])}"
        said.append({"figure": f"{100 * share:.0f}%", "words": words})
    return said


def write_page(text: str, path: Path) -> Path:
    """Write a finished page so that ``path`` is never seen half written, and return it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path

"""``mllm-msr status``: how far a run is, what is stale and why, and which command comes next."""

from mllm_msr.records.public import hide_secrets
from mllm_msr.records.run import RunFolder
from mllm_msr.stages import next_commands, stages_of

SHOWN = 8  # digits of a key


def status(run: RunFolder) -> str:
    """A run's stages in their order: state, key, time, and what each wrote."""
    done, pending = run.provenance()["stages"], run.pending("report")
    rows = [("stage", "state", "key", "seconds", "finished", "wrote")]
    for name in stages_of(run.recipe):
        entry = done.get(name)
        if entry is None:
            rows.append((name, "to do", "", "", "", ""))
            continue
        state = "done"
        try:
            run.require(name)
        except (FileNotFoundError, ValueError):
            state = f"stale: {pending.get(name) or next(iter(run.pending(name).values()))}"
        places = list(dict.fromkeys(path.split("/")[0] for path in entry.get("writes", {})))
        seconds = f"{entry['seconds']:,.1f}" if "seconds" in entry else ""
        rows.append((name, state, entry["key"][:SHOWN], seconds, entry["finished"], ", ".join(places)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    source = hide_secrets(", ".join([run.recipe.source.type, *_places(run)]))
    head = f"run {run.path}: recipe {run.recipe.name!r}, data of {source}"
    return "\n".join([head, *table, *next_commands(run)])


def _places(run: RunFolder) -> list[str]:
    options = run.recipe.source.options
    return [str(options[name]) for name in ("folder", "interactions") if options.get(name)]

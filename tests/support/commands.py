"""The command line in this process, where a process of its own is not the point: a new one imports for seconds."""

import io
from contextlib import redirect_stdout

from mllm_msr.cli import main


def printed(*arguments: str) -> str:
    """What a command prints; SystemExit with its message where it ends by a mistake."""
    with redirect_stdout(io.StringIO()) as out:
        main([*arguments])
    return out.getvalue()


def ranking_rows(out: str) -> list[list[str]]:
    """The words of each row of a ranking on the screen, best first: rank, score, item, and so on."""
    lines = out.strip().splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("rank "))
    return [line.split() for line in lines[head + 1 :]]

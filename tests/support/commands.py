"""The command line in this process, where a process of its own is not the point: a new one imports for seconds."""

import io
from contextlib import redirect_stdout

from mllm_msr.cli import main


def printed(*arguments: str) -> str:
    """What a command prints; SystemExit with its message where it ends by a mistake."""
    with redirect_stdout(io.StringIO()) as out:
        main([*arguments])
    return out.getvalue()

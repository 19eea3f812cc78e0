"""The fenced blocks of README and docs, and the commands in those of a shell."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKILL = "src/mllm_msr/.agents/skills/mllm-msr/SKILL.md"
PAGES = ["README.md", "AGENTS.md", SKILL, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line at which it begins, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments, assignments before it, and what makes a loop."""
        lines = self.text.replace("\\\n", " ")
        lines = re.sub(r"\$\([^)]*\)", "VALUE", lines)
        words = [shlex.split(line, comments=True) for line in lines.replace("$RUN", "RUN").splitlines()]
        commands = []
        for line in words:
            for command in _split(line):
                while command and ASSIGNMENT.match(command[0]):
                    command = command[1:]
                if command and command[0] not in ("for", "do", "done"):
                    commands.append(command)
        return commands


def blocks(page: str) -> list[Block]:
    """All blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in found]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def _split(words: list[str]) -> list[list[str]]:
    """Commands that one line joins by ``&&``."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands

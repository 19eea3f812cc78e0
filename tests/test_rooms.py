"""The house: which room may import which, and what may travel to the Hub."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = {  # what a room must not import
    "processing": {"modeling", "training", "hub_cards"},
    "modeling": {"processing", "training", "hub_cards"},
    "training": {"hub_cards"},
    "hub_cards": {"modeling", "processing"},
}
SOURCES = [path for room in (*ABOVE, "src") for path in sorted((ROOT / room).rglob("*.py"))]
SHIPPED = [ROOT / "modeling/modeling_mllm_msr.py", ROOT / "processing/processing_mllm_msr.py"]


def imported(path: Path) -> set[str]:
    """Full names of what a file imports; siblings begin with a dot."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & set(ABOVE), "rooms are imported as mllm_msr.<room>"
    own = {name.split(".")[1] for name in names if name.startswith("mllm_msr.")}
    assert not own & ABOVE.get(room, set())
    if room in ABOVE:
        assert not [name for name in names if name == "mllm_msr"] and own <= set(ABOVE)


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda path: path.stem)
def test_what_travels_to_the_hub_needs_only_its_siblings(entry):
    todo, seen = [entry], set()
    while todo:
        path = todo.pop()
        seen.add(path)
        names = imported(path)
        assert not [name for name in names if name.startswith(("..", "mllm_msr"))], path
        assert "." not in names, f"{path}: from .sibling import name, not from . import sibling"
        siblings = {path.parent / f"{name[1:]}.py" for name in names if name.startswith(".")}
        todo += [sibling for sibling in siblings if sibling not in seen]


def test_shipped_file_names_are_unique_across_rooms():
    names = [path.name for room in ("modeling", "processing") for path in (ROOT / room).glob("*.py")]
    assert [name for name in set(names) if names.count(name) > 1] == ["__init__.py"]


def test_no_file_of_training_hides_a_library():
    assert not {"datasets", "evaluate", "types", "logging"} & {path.stem for path in (ROOT / "training").glob("*.py")}

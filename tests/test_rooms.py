"""The house: which room may import which, that nothing runs in circles, and what may travel to the Hub."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
# Where each package lies; those that pyproject.toml does not place lie below src.
PACKAGES = {name: SETUP["package-dir"].get(name, f"src/{name.replace('.', '/')}") for name in SETUP["packages"]}
MODULES = {
    f"{package}.{path.stem}".removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted((ROOT / folder).glob("*.py"))
}
LEVELS = (  # a room imports itself and the rooms of the levels below its own
    {"records"},
    {"modeling"},
    {"data"},
    {"processing"},
    {"evaluation"},
    {"training", "hub_cards", "serving"},
    {"front"},
)
SHIPPED = (
    "mllm_msr.modeling.cross_encoder",
    "mllm_msr.modeling.handler",
    "mllm_msr.modeling.modeling_mllm_msr",
    "mllm_msr.modeling.pipeline",
    "mllm_msr.processing.processing_mllm_msr",
)
LONGEST = 400  # lines of a file


def room_of(module: str) -> str:
    """The room of a module; the command line, what it calls, and the demo are the front."""
    room = module.split(".")[1] if "." in module else "front"
    return room if any(room in level for level in LEVELS) else "front"


def level_of(module: str) -> int:
    return next(number for number, level in enumerate(LEVELS) if room_of(module) in level)


@cache
def imports(module: str) -> frozenset[str]:
    """Our modules that a module imports, wherever in its file."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return frozenset(found & MODULES.keys())


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    below = {
        name for name in imports(module) if room_of(name) != room_of(module) and level_of(name) >= level_of(module)
    }
    assert not below, f"{room_of(module)} must not import {sorted(below)}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(imports(module)):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def travels(module: str) -> set[str]:
    """A module and all of ours that it needs, on and on."""
    found, todo = set[str](), [module]
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += imports(name)
    return found


@pytest.mark.parametrize("module", sorted(set().union(*map(travels, SHIPPED))))
def test_what_travels_to_the_hub_imports_its_siblings_only(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.split(".")[0] == "mllm_msr"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2 and (node.module or "").split(".")[0] != "mllm_msr"
            assert node.level == 0 or node.module, "from .sibling import name, not from . import sibling"


def test_file_names_are_unique_across_the_rooms_that_ship() -> None:
    names = [path.name for room in ("modeling", "processing") for path in (ROOT / room).glob("*.py")]
    assert {name for name in names if names.count(name) > 1} <= {"__init__.py"}


def test_no_file_of_training_hides_a_library() -> None:
    assert not {"datasets", "evaluate", "types", "logging"} & {path.stem for path in (ROOT / "training").glob("*.py")}


def test_importing_the_package_or_its_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, mllm_msr, mllm_msr.cli\n"
        "print([name for name in ('torch', 'transformers', 'polars', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_opening_a_recipe_s_variants_and_sources_loads_no_torch() -> None:
    code = (
        "import sys, mllm_msr.evaluation.variants, mllm_msr.data.sources.registry, mllm_msr.records.run\n"
        "print([name for name in ('torch', 'transformers', 'trl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", [*sorted(set(PACKAGES.values())), "tests", "benchmarks"])
def test_no_file_is_longer_than_a_reader_s_patience(folder: str) -> None:
    files = (ROOT / folder).rglob("*.py") if folder in ("tests", "benchmarks") else (ROOT / folder).glob("*.py")
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_module_is_part_of_a_package_that_is_installed() -> None:
    folders = {folder for folder in PACKAGES.values()}
    sources = [
        path
        for room in ("src", "modeling", "processing", "training", "hub_cards")
        for path in (ROOT / room).rglob("*.py")
    ]
    outside = {path.parent.relative_to(ROOT).as_posix() for path in sources} - folders - {"hub_cards/templates"}
    assert outside == set()

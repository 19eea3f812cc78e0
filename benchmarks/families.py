"""The table of families and properties in docs/model.md, measured: a property is a test that every family has.

python benchmarks/families.py           # prints it
python benchmarks/families.py --write   # puts it into docs/model.md
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_msr import Candidate, MllmMsrForRecommendation, MllmMsrProcessor, User
from mllm_msr.modeling.families import FAMILIES

ROOT = Path(__file__).parents[1]
TESTS = ["tests/modeling", "tests/processing/test_processor.py"]
PAGE, BEGIN, END = ROOT / "docs" / "model.md", "<!-- families -->\n", "<!-- /families -->\n"
COMPILED = "a forward with images compiles in one graph"


class Measured:
    """What pytest reports of each property and family: nothing, or why it does not hold, and what was noted."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, list[str]]] = {}
        self.notes: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        test, _, parameters = report.nodeid.rstrip("]").partition("[")
        families = [part for part in parameters.split("-") if part in FAMILIES]
        if not families or (report.when != "call" and report.passed):
            return
        name = test.rpartition("test_")[2].replace("_", " ")
        reasons = self.results.setdefault(name, {}).setdefault(families[0], [])
        if not report.passed:
            reasons.append(str(report.longrepr).splitlines()[-1])
        for kind, note in report.user_properties:
            if kind == "note":
                self.notes.setdefault(name, {})[families[0]] = str(note)


def compiled(name: str, folder: Path) -> list[str]:
    """Why a forward with an image cannot be compiled without graph breaks."""
    tiny = sys.modules["tiny_models"]
    path = tiny.save_backbone(name, folder / name)
    processor = MllmMsrProcessor.from_backbone(str(path))
    model = MllmMsrForRecommendation.from_backbone(path, processor=processor)
    batch = processor([User("ships")], [Candidate(title="One", image=tiny.draw_image(1))])
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(**batch).logits
        try:
            logits = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)(**batch).logits
        except RuntimeError as error:  # what Dynamo raises where it cannot trace
            return [
                type(error).__name__ + ": transformers computes with the values of tensors; it compiles with breaks"
            ]
    return [] if torch.allclose(logits, expected, atol=1e-5) else ["other logits"]


def table(measured: Measured) -> str:
    """Markdown: properties in rows, families in columns, reasons and notes below."""
    remarks: list[str] = []

    def cell(name: str, family: str) -> str:
        reasons, note = measured.results[name][family], measured.notes.get(name, {}).get(family)
        remark = "; ".join([*reasons, *([note] if note else [])])
        if remark and remark not in remarks:
            remarks.append(remark)
        return ("✗" if reasons else "✓") + (f" ({remarks.index(remark) + 1})" if remark else "")

    lines = [f"| | {' | '.join(FAMILIES)} |", "|---|" + ":-:|" * len(FAMILIES)]
    for name, cells in measured.results.items():
        if set(cells) == set(FAMILIES):
            lines.append(f"| {name} | {' | '.join(cell(name, family) for family in FAMILIES)} |")
    notes = [f"{number}. {remark}" for number, remark in enumerate(remarks, 1)]
    return "\n".join([*lines, "", *notes, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    write = parser.parse_args().write
    spec = importlib.util.spec_from_file_location("tiny_models", ROOT / "tests" / "support" / "tiny_models.py")
    assert spec is not None and spec.loader is not None
    sys.modules["tiny_models"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tiny_models"])

    measured = Measured()
    failed = pytest.main(["--rootdir", str(ROOT), *(str(ROOT / test) for test in TESTS)], plugins=[measured])
    with tempfile.TemporaryDirectory() as folder:
        measured.results[COMPILED] = {name: compiled(name, Path(folder)) for name in FAMILIES}
    print(table(measured))
    if write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(measured) + END + rest.partition(END)[2], encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

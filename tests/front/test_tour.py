"""docs/tour.ipynb runs as it stands, cell by cell, in an empty folder."""

import contextlib
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs/tour.ipynb"


def test_the_ten_cells_run_from_own_tables_to_a_ranking_and_its_reasons(tmp_path: Path, capsys) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    names: dict[str, object] = {"__name__": "__main__"}
    with contextlib.chdir(tmp_path):
        for number, cell in enumerate(cells, start=1):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            shown = capsys.readouterr().out
            assert number in (1, 10) or f"{'shop' if number < 9 else 'after:'}" in shown
            if number == 9:  # the outputs that the page shows are of the members of today
                (header,) = [line for line in cell["outputs"][0]["text"] if line.startswith("rank ")]
                assert header in shown
    ranker, history, best, scores = (names[name] for name in ("ranker", "history", "best", "scores"))
    parts = ranker.shares([history], [best])
    assert abs(sum(float(part[0, 0]) for part in parts.values()) - scores[best]) < 1e-4
    assert best not in history and {near.item_id for near in ranker.nearest(best, history)} <= set(history)

"""The notebooks as committed: executed from top to bottom, with pictures. CI runs them anew."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request):
    cells = json.loads(request.param.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def outputs(cells):
    return [output for cell in cells for output in cell["outputs"]]


def test_there_are_nine_in_order():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, 10)]


def test_cells_ran_in_order_once(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


def test_no_errors_warnings_or_paths_in_outputs(cells):
    shown = outputs(cells)
    assert all(output["output_type"] != "error" for output in shown)
    assert all(output.get("name") != "stderr" for output in shown)
    text = json.dumps([{**output.get("data", {}), "image/png": None} for output in shown])
    text += "".join("".join(output.get("text", [])) for output in shown)
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", text)


def test_pictures_are_inside_and_small(cells):
    pictures = [output.get("data", {}).get("image/png") for output in outputs(cells)]
    pictures = [picture for picture in pictures if picture]
    assert pictures
    assert sum(map(len, pictures)) < 1_000_000


def test_the_first_cell_installs(cells):
    assert '%pip install -q "swagjax[notebooks]"' in "".join(cells[0]["source"])


def test_only_public_names_are_used(cells):
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert not re.search(r"swagjax\S*\._|from swagjax\S* import _|\bbenchmarks\b", source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_readme_leads_to_it(path):
    assert f"](notebooks/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")

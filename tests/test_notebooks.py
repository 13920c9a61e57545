"""The notebooks run from the first cell to the last, and what they show is a table and a picture."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_two_and_they_are_committed_without_output():
    assert [path.name for path in NOTEBOOKS] == ["five-minutes.ipynb", "your-own-model.ipynb"]
    for path in NOTEBOOKS:
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
        assert (ROOT / "docs" / "tutorials" / f"{path.stem}.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=900, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()  # fmt: skip
    shown = [output["data"]["text/html"] for cell in book.cells for output in cell.get("outputs", ())
             if "text/html" in output.get("data", {})]  # fmt: skip
    assert any("worst case" in text and "<img" in text and "<table" in text for text in shown)
    said = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    assert "95 % interval" in said or "[0, 1]" in said, said

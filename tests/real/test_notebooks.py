# SPDX-License-Identifier: Apache-2.0
"""The notebooks of examples/ run from their first cell to their last in a kernel, and are stored without outputs."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

for name in ("nbformat", "nbclient", "ipykernel"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[notebooks]'")


def read(path):
    import nbformat

    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    return book


def printed(book):
    """What the cells printed, a text for each code cell."""
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs if output.name == "stdout") for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in read(path).cells:
        assert cell.cell_type == "markdown" or not (cell.outputs or cell.execution_count)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path, tmp_path):
    from nbclient import NotebookClient

    book = read(path)
    # A cell that raises ends the test with its traceback.
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, last = filter(None, printed(book))
    assert {"first_run": "95 % interval [+", "own_method": "weights from 0."}[path.stem] in last

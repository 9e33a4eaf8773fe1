"""The tutorials as they are committed, and run from top to bottom."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPOSITORY / "tutorials").glob("*.ipynb"))
FEWEST_IMAGES = 7
FOR_THE_READER = {"live", "answer"}  # sliders, and answers of exercises: stored without outputs, for the reader to run
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|opt|usr|var|mnt|Users|private)/")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def outputs(notebook, kind=None):
    """All outputs of the notebook's cells, or those of one kind."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [output for cell in cells for output in cell.outputs if kind in (None, output.output_type)]


def texts(notebook):
    """What the outputs say, without the pictures."""
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


def images(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def listing(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_there_are_tutorials():
    assert NOTEBOOKS


@each_notebook
def test_a_committed_notebook_is_small_and_has_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 2**20
    assert not outputs(notebook, "error")
    assert len(images(notebook)) >= FEWEST_IMAGES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code if not FOR_THE_READER & {*cell.metadata.get("tags", ())}]
    assert counts == list(range(1, len(counts) + 1)), "not run from top to bottom"


@each_notebook
def test_a_notebook_teaches(path):
    """Goals first, predictions before results, a slider, and at the end an exercise whose answer is folded away."""
    cells = nbformat.read(path, as_version=4).cells
    assert "**What you will be able to do**" in cells[0].source
    assert sum("**Predict first.**" in cell.source for cell in cells) >= 2
    assert any("interact(" in cell.source and "except ImportError" in cell.source for cell in cells)
    *_, exercise, answer = cells
    assert exercise.source.startswith("## Exercise\n")
    assert answer.metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}
    assert not answer.outputs


@each_notebook
def test_a_committed_notebook_says_nothing_of_the_machine_it_ran_on(path):
    found = [text for text in texts(nbformat.read(path, as_version=4)) if MACHINE_PATH.search(text)]
    assert not found


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of what a tutorial needs, so that whatever it writes beside itself is seen."""
    for folder in ("bundles", "tutorials"):
        ignored = shutil.ignore_patterns("eval", "sources", "*.pt", "__pycache__")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignored)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two notebooks at a time share the cores
    return tmp_path


def execute(path, start, *, n_cells=None):
    """The notebook, or its first few cells of code, run in a kernel started in a folder; not the exercise's answer.

    Answers train for some minutes in all, which the rest has shown to work.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [
        cell for cell in notebook.cells if cell.cell_type == "code" and "answer" not in cell.metadata.get("tags", ())
    ]
    notebook.cells = code[:n_cells]
    for cell in notebook.cells:
        cell.outputs = []
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(start)}}).execute()


@pytest.mark.slow
@each_notebook
def test_a_notebook_finds_its_bundle_from_the_root_too(path, repository):
    execute(path, repository, n_cells=1)


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom_and_leaves_nothing_behind(path, repository):
    before = listing(repository)
    notebook = execute(path, repository / "tutorials")
    assert not outputs(notebook, "error")
    assert len(images(notebook)) >= FEWEST_IMAGES
    assert listing(repository) == before

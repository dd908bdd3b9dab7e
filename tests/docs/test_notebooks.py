"""The notebooks run from top to bottom, draw their figures, and their claims hold.

Each is executed once, in an empty folder and without a network. A cell appended by the test then checks its claims on
its own variables.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from textwrap import dedent

import pytest


pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("nbclient")

import nbformat
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


FOLDER = Path(__file__).parent.parent.parent / "notebooks"
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
SECONDS_PER_CELL = 900  # a busy machine may take ten times as long
# Replacements that reduce constants, which the notebooks suggest raising for better figures, and shorten texts. Slow
# tests run the notebooks unchanged.
SHORT_TEXTS = {"load_default()\n": "load_default()\nmodel.generation_config.max_new_tokens = 16\n"}
SMALLER = {
    "01_quickstart": {"ROUNDS = 9 ": "ROUNDS = 2 ", **SHORT_TEXTS},
    "02_train_exits": {"PLAIN_STEPS = 120 ": "PLAIN_STEPS = 60 ", "INPUTS = 48 ": "INPUTS = 24 "},
    "03_choose_a_threshold": SHORT_TEXTS,
    "04_quality_vs_speed": {"INPUTS = 16 ": "INPUTS = 4 ", "ROUNDS = 4 ": "ROUNDS = 2 ", **SHORT_TEXTS},
}
# Number of figures of each notebook, and assertions on its variables after the last cell.
PICTURES = {"01_quickstart": 4, "02_train_exits": 1, "03_choose_a_threshold": 2, "04_quality_vs_speed": 4}
CLAIMS = {
    "01_quickstart": """
        assert equal == len(inputs) == 8, f"{equal} of 8 texts of the batch are those of their inputs alone"
        assert 1 < len(set(together.layers_run[together.layers_run > 0].tolist())), "all tokens left at one layer"
        assert torch.equal(early.sequences, full.sequences), "the two texts that are timed differ"
        ours, theirs = work["decoder blocks run, rows"]
        assert ours < theirs and work["vocabulary heads run, rows"][0] > work["vocabulary heads run, rows"][1]
        assert all(len(found.seconds["cpu"]["early exit"]) == ROUNDS for found in times.values())
    """,
    "02_train_exits": """
        gained = agreements("after") - agreements("before")
        assert gained.min() > 0.02 and gained[0] > 0.2, f"agreement of the exits rose by {gained}"
        assert found["before_loss"] == found["after_loss"], "classifiers moved full depth"
        precision = [found[f"after_exit_{layer}_precision"] for layer in EXIT_LAYERS]
        agreement = [found[f"after_exit_{layer}_agreement"] for layer in EXIT_LAYERS]
        assert precision[0] > agreement[0], "what the first classifier lets go is no better than everything"
        assert same, "the loaded model writes other texts than the trained one"
        assert len(output.layers_run[output.layers_run > 0].unique()) > 1
    """,
    "03_choose_a_threshold": """
        assert certificate.certified and certificate.n == 47 and certificate.risk["upper_bound"] <= TARGET
        assert certificate.report["mean"] <= TARGET, "the promise is broken on the report part"
        eager = [row for row in certificate.table if not row["accepted"] and row["mean"] <= TARGET]
        assert eager, "no threshold looks good without being shown to be"
        assert failed["shown"] <= DELTA * len(draws) < failed["looks good"], failed
        assert loaded.exit_certificate == certificate and len(caught) == 1
        assert not strict.certificate.certified
        assert set(output.layers_run[output.layers_run > 0].tolist()) == {8}
    """,
    "04_quality_vs_speed": """
        curves = {cell["curve"] for cell in results["cells"]}
        assert curves == {"full depth", "static decoder", "classifier", "softmax:2,4,6"}
        assert all(cell["time"]["ratio"]["cpu"]["median"] > 0 for cell in results["cells"])
        eager, careful = (results["quality"][f"softmax:2,4,6 {at}"]["mean_layers"]["mean"] for at in (0.4, 0.9))
        assert eager < careful < 8
        assert len(differences) == len(results["quality"]) - 1 == 11
        assert all(one["low"] <= one["mean"] <= one["high"] for one in differences.values())
        assert set(times.seconds["cpu"]) == {*settings, "static decoder 6", "stock"}
    """,
}


@pytest.fixture(scope="module")
def kernel():
    """One kernel process for all notebooks, since imports take ten seconds. Names are reset before each notebook."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        manager, client = start_new_kernel()
    yield manager
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.once
@pytest.mark.parametrize(
    "name, changes",
    [
        *((name, SMALLER.get(name, {})) for name in NOTEBOOKS),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in SMALLER),
    ],
    ids=lambda one: one if isinstance(one, str) else "smaller" if one else "as it stands",
)
def test_it_runs_draws_and_keeps_its_claims(name, changes, kernel, tmp_path):
    """A notebook runs, draws its figures and keeps its claims; one test, since each run takes a minute."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    make_smaller(notebook, changes)
    notebook.cells.append(nbformat.v4.new_code_cell(dedent(CLAIMS[name])))
    execute(notebook, tmp_path, kernel)
    assert notebook.cells[-1].execution_count and list(tmp_path.iterdir()) == [], "files beside the notebook"
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in found if "data" in output]
    pictures = [base64.b64decode(one["image/png"]) for one in shown if "image/png" in one]
    assert len(pictures) == PICTURES[name]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in pictures)
    assert not [one for one in shown if "image/png" not in one], "a figure or an object shown by its name only"
    said = "".join(output.text for output in found if output.output_type == "stream")
    assert "Warning:" not in said, said


def make_smaller(notebook, changes: dict[str, str]) -> None:
    """Replace pieces of code, each of which must occur exactly once."""
    for piece, other in changes.items():
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and piece in cell.source]
        assert cell.source.count(piece) == 1
        cell.source = cell.source.replace(piece, other)


def execute(notebook, folder: Path, kernel) -> None:
    """Run all cells in a folder. If one fails, the test shows its code and error without the client's traceback."""
    before = [nbformat.v4.new_code_cell(code) for code in ("%reset -f", f"%cd -q {folder}")]
    start = nbformat.v4.new_notebook(cells=before, metadata=METADATA)
    try:
        for one in (start, notebook):
            NotebookClient(one, km=kernel, timeout=SECONDS_PER_CELL).execute()
    except CellExecutionError as error:
        pytest.fail(ESCAPES.sub("", str(error)), pytrace=False)


@pytest.mark.once
def test_a_cell_that_fails_says_which_line_and_why(kernel, tmp_path):
    lines = "losses = [0.1]\nassert losses[0] < 0.05, 'the promise is broken'"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(lines)], metadata=METADATA)
    with pytest.raises(pytest.fail.Exception) as caught:
        execute(notebook, tmp_path, kernel)
    message = str(caught.value)
    assert "losses = [0.1]" in message and "AssertionError: the promise is broken" in message and "\x1b" not in message


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_stored_without_outputs_and_says_nothing_of_a_machine(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert [cell.id for cell in notebook.cells] == [f"cell-{place:02d}" for place, _ in enumerate(notebook.cells, 1)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_says_what_is_learnt_teaches_in_short_cells_and_is_the_same_for_everyone(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    first = notebook.cells[0].source
    assert first.startswith("# ") and "\n\nAfter this notebook you can " in first and "**You need**" in first
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code) <= 45
    assert not re.search(r"environ|getenv", "\n".join(code)), "what is run must not depend on who runs it"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_links_lead_somewhere(name):
    text = NOTEBOOKS[name].read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and [link for link in links if not (FOLDER / link).exists()] == []


def test_the_readme_names_every_notebook():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert NOTEBOOKS and PICTURES.keys() == CLAIMS.keys() == NOTEBOOKS.keys()
    assert [name for name in NOTEBOOKS if f"(notebooks/{name}.ipynb)" not in text] == []

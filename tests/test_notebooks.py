"""Static rules of the notebooks, and their execution.

The rules follow what broke public notebooks: installs after an import of torch or numpy (unsloth
issues 5232 and 2783), widgets without a fallback, runtimes that nobody stated (TRL's GRPO notebook
for Colab), paths and secrets of the author's machine.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
PLAIN = sorted(FOLDER.glob("[0-9]*.ipynb"))
SOLVED = sorted((FOLDER / "solutions").glob("*.ipynb"))
EVERY = [pytest.param(path, id=f"{path.parent.name}/{path.name}") for path in PLAIN + SOLVED]


def code(path: Path) -> list:
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def printed(path_or_notebook) -> str:
    cells = [c for c in path_or_notebook.cells if c.cell_type == "code"]
    return "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream")


def test_there_are_notebooks_and_each_has_its_solutions():
    assert PLAIN and [p.name for p in PLAIN] == [p.name for p in SOLVED]


@pytest.mark.parametrize("path", EVERY)
def test_one_setup_cell_first_and_the_same_everywhere(path):
    """Installs come before any import that they could change (unsloth issue 5232)."""
    first = code(path)[0].source
    assert first == code(PLAIN[0])[0].source and "pip" in first
    allowed = {"importlib", "subprocess", "sys", "pathlib"}
    for node in ast.walk(ast.parse(first.replace("%matplotlib inline", ""))):
        if isinstance(node, ast.Import):
            assert {a.name.split(".")[0] for a in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] in allowed
    assert all("pip install" not in c.source for c in code(path)[1:])


@pytest.mark.parametrize("path", EVERY)
def test_form(path):
    """Cells that fit a projector, a header with minutes, a kernel that every machine has."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    head = notebook.cells[0].source
    for field in (
        "| goal |",
        "| needs |",
        "| minutes |",
        "| before |",
        "| after |",
        "**You will**",
    ):
        assert field in head, field
    assert notebook.cells[-1].source.startswith("## Key points")
    text = "".join(c.source for c in notebook.cells)
    assert "What you should see" in text and 2 <= text.count("### Exercise") <= 4
    for cell in code(path):
        lines = cell.source.split("\n")
        assert len(lines) <= 20 and max(map(len, lines)) <= 76, cell.source[:60]


@pytest.mark.parametrize("path", EVERY)
def test_committed_as_executed_and_with_nobodys_machine_in_it(path):
    """Outputs in order, no error, no path, no secret (a token in an output is public at once)."""
    cells = code(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert all(o.output_type != "error" for c in cells for o in c.outputs)
    text = path.read_text(encoding="utf-8")
    for secret in (r"/(home|root|tmp|Users|work)/", r"hf_[A-Za-z0-9]{20}", r"sk-[A-Za-z0-9]{20}"):
        assert not re.search(secret, text), secret


ALL_CELLS = """
import sys
import nbformat
from IPython.core.interactiveshell import InteractiveShell
class Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        pass  # "%matplotlib inline" asks for none
shell = Shell.instance()
for cell in nbformat.read(sys.argv[1], 4).cells:
    if cell.cell_type == "code":
        shell.run_cell(cell.source).raise_error()
"""


def run_in_a_shell(path: Path) -> str:
    """What the cells print, run one after the other in IPython without a kernel."""
    done = subprocess.run(
        [sys.executable, "-c", ALL_CELLS, path.name], cwd=path.parent, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def run_in_a_kernel(path: Path) -> str:
    """The same as Jupyter does it."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    return printed(notebook)


# In CI the solutions alone, which have every cell of the others, but for the two that train for
# minutes; and without a kernel: in some runs it and its client waited for each other for good.
LONG = ("00_start_here.ipynb", "02_qlora_sft.ipynb")
CASES = [
    pytest.param(path, run_in_a_shell, id=f"solutions/{path.name}")
    for path in SOLVED
    if path.name not in LONG
]
CASES += [
    pytest.param(*case.values, run_in_a_kernel, id=f"kernel/{case.id}", marks=pytest.mark.slow)
    for case in EVERY
]


@pytest.mark.parametrize(("path", "run"), CASES)
def test_runs_from_top_to_bottom(path, run):
    out = run(path)
    if path in SOLVED:
        assert "✓" in out and "✗" not in out
    else:  # an exercise left empty gives a hint, and no traceback stopped the run
        assert "✗" in out


def test_solutions_differ_from_the_notebooks_in_the_exercises_alone():
    for plain, solved in zip(PLAIN, SOLVED, strict=True):
        pairs = zip(nbformat.read(plain, 4).cells, nbformat.read(solved, 4).cells, strict=True)
        changed = [a for a, b in pairs if a.source != b.source]
        assert changed and all("check(" in cell.source for cell in changed)

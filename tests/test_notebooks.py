"""Static rules of the notebooks, and their execution.

The rules follow what broke public notebooks: installs after an import of torch or numpy (unsloth
issues 5232 and 2783), widgets without a fallback, runtimes that nobody stated (TRL's GRPO notebook
for Colab), paths and secrets of the author's machine.
"""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
PLAIN = sorted(FOLDER.glob("[0-9]*.ipynb"))
SOLVED = sorted((FOLDER / "solutions").glob("*.ipynb"))
ON_A_GPU = ("00", "02", "04", "05", "06")  # their last section runs any preset
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
    allowed = {"importlib", "runpy", "subprocess", "pathlib"}
    for node in ast.walk(ast.parse(first.replace("%matplotlib inline", ""))):
        if isinstance(node, ast.Import):
            assert {a.name.split(".")[0] for a in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] in allowed
    assert all("pip install" not in c.source for c in code(path)[1:])


PIP = """
import pathlib, sys
here = pathlib.Path(__file__).parents[1]
(here / "asked").write_text(" ".join(sys.argv[1:]))
if (here / "fails").exists():
    sys.exit("no matching distribution")
for name in ("old-2.0", "added-1.0"):
    (here / f"{name}.dist-info").mkdir()
    name, version = name.split("-")
    text = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    (here / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
old = here / "old-1.0.dist-info"
(old / "METADATA").unlink()
old.rmdir()
"""


@pytest.fixture
def hosted(tmp_path):
    """A repository, and a machine without the kit whose pip is not one: what runs the setup cell
    there with this REPOSITORY, and what pip was asked."""
    source, place, site = tmp_path / "source", tmp_path / "content", tmp_path / "site"
    for folder in (source / "bbkit", source / "notebooks", place, site / "pip"):
        folder.mkdir(parents=True)
    for name in ("pyproject.toml", "bbkit/config.py", "notebooks/install.py"):
        shutil.copy(FOLDER.parent / name, source / name)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "kit")):
        subprocess.run(["git", "-C", str(source), *words], check=True)
    (site / "pip" / "__init__.py").touch()  # else the real one, elsewhere on the path, is first
    (site / "pip" / "__main__.py").write_text(PIP)
    pinned = re.search(r"torch==([\d.]+)", (source / "pyproject.toml").read_text())[1]
    for name, version in (("torch", f"{pinned}+cu126"), ("numpy", "9.9.9"), ("old", "1.0")):
        made = site / f"{name}-{version}.dist-info"
        made.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (made / "METADATA").write_text(text)
    lines = code(PLAIN[0])[0].source.replace("%matplotlib inline", "").splitlines()

    def run(repository):
        cell = [f'REPOSITORY = "{repository}"' if "REPOSITORY =" in x else x for x in lines]
        hidden = "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
        done = subprocess.run(
            [sys.executable, "-c", hidden + "\n".join(cell)], cwd=place, text=True,
            capture_output=True, env={**os.environ, "PYTHONPATH": str(site)},
        )  # fmt: skip
        asked = site / "asked"
        return done, asked.read_text().split() if asked.exists() else []

    return run, source, place, site, f"torch=={pinned}+cu126"


def test_outside_a_clone_the_setup_cell_asks_for_one(hosted):
    done, asked = hosted[0]("")
    assert done.stderr == "Run this notebook inside a clone of the kit.\n" and not asked


def test_the_setup_cell_fetches_the_kit_and_says_what_pip_changed(hosted):
    run, source, place, _, torch = hosted
    done, asked = run(source)
    assert done.returncode == 0, done.stderr
    clone = place / "bbkit-clone"
    assert (clone / "bbkit" / "config.py").exists() and str(clone) in asked
    assert {torch, "numpy==9.9.9"} <= {*asked}  # what the runtime has, where the pins allow it
    assert done.stdout == "old 1.0 -> 2.0\nnew: added\n"


def test_what_a_pin_contradicts_is_not_kept():
    kept = runpy.run_path(str(FOLDER / "install.py"))["kept"]
    here = {"torch": "2.11.0+cu128", "numpy": "2.0.2", "scipy": "1.0"}
    assert kept(here, ["torch==2.13.0"]) == ["numpy==2.0.2"]
    assert kept(here, ["torch==2.11.0"]) == ["torch==2.11.0+cu128", "numpy==2.0.2"]


def test_the_setup_cell_ends_with_pips_own_words_where_it_fails(hosted):
    run, source, _, site, _ = hosted
    (site / "fails").touch()
    done, asked = run(source)
    assert done.returncode and asked and "no matching distribution" in done.stderr
    assert done.stderr.rstrip().endswith("no matching distribution")


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


@pytest.mark.parametrize("path", EVERY)
def test_lessons_are_the_same_on_a_machine_with_a_gpu(path):
    """Their models are on the CPU, as their tensors are; the last section takes what there is."""
    cells = code(path)
    lesson = [c.source for c in cells if "PRESET = " not in c.source]
    tree = ast.parse("\n".join(lesson).replace("%matplotlib inline", ""))
    nodes = sorted((n for n in ast.walk(tree) if hasattr(n, "lineno")), key=lambda n: n.lineno)
    made: dict[str, str] = {}  # the settings of each name, so far
    for node in nodes:
        if isinstance(node, ast.Assign) and "config.load(" in ast.unparse(node.value):
            made[ast.unparse(node.targets[0])] = ast.unparse(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "models.load":
            name = ast.unparse(node.args[0]).removesuffix(".model")
            assert "model.device=cpu" in made[name], ast.unparse(node)
    for source in lesson:
        if "sys.executable, *" in source:  # a run in a process of its own
            assert "model.device=cpu" in "".join(lesson)
    assert (len(lesson) < len(cells)) == (path.name[:2] in ON_A_GPU)


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
    """What the cells print, run one after the other in IPython without a kernel.

    A notebook makes its run in a folder beside it: give a copy in a folder of its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", ALL_CELLS, path.name], cwd=path.parent, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def run_in_a_kernel(path: Path) -> str:
    """The same as Jupyter does it."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    place = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place)
    # It answers an Output widget on the socket on which it waits for the cell's reply, and may then
    # miss that reply until the timeout (the wake-up of a zmq socket is lost by a send beside it:
    # jupyter_client's Session.send on a shadow). Without its own widget the cells' output is there.
    client.comm_open_handlers.clear()
    client.execute()
    return printed(notebook)


# In CI the solutions alone, which have every cell of the others, but for the three that train for
# minutes; and without a kernel, in which a client may lose cells' replies (`run_in_a_kernel`).
LONG = ("00_start_here.ipynb", "02_qlora_sft.ipynb", "04_grpo.ipynb")
CASES = [
    pytest.param(path, run_in_a_shell, id=f"solutions/{path.name}")
    for path in SOLVED
    if path.name not in LONG
]
CASES += [
    pytest.param(*case.values, run_in_a_kernel, id=f"kernel/{case.id}", marks=pytest.mark.slow)
    for case in EVERY
]


SHORTER = {  # of a look that is short already, and what ONE trains; kernels run them as they stand
    "sft.steps=20": "sft.steps=4", "grpo.steps=6": "grpo.steps=2", "PROMPTS = 32": "PROMPTS = 8",
    "retention.replies=64": "retention.replies=8", "questions=60": "questions=8",
    "instructions=60": "instructions=8", "elsewhere=20": "elsewhere=4",
    "32 * i : 32 * (i + 1)": "16 * i : 16 * (i + 1)", "sft.steps=15": "sft.steps=2",
    "range(400)": "range(40)",
}  # fmt: skip
ONE = {
    "PROMPTS = 32": ("05",), "32 * i : 32 * (i + 1)": ("05",), "sft.steps=15": ("07",),
    "range(400)": ("07",),
}  # fmt: skip


@pytest.mark.parametrize(("path", "run"), CASES)
def test_runs_from_top_to_bottom(path, run, tmp_path):
    copy, text = tmp_path / path.name, path.read_text(encoding="utf-8")
    if run is run_in_a_shell:
        for old, new in SHORTER.items():
            assert old in text or path.name[:2] not in ONE.get(old, ON_A_GPU), old
            text = text.replace(old, new)
    copy.write_text(text, encoding="utf-8")
    out = run(copy)
    if path in SOLVED:
        assert "✓" in out and "✗" not in out
    else:  # an exercise left empty gives a hint, and no traceback stopped the run
        assert "✗" in out
    assert ("measured, in minutes: " in out) == (path.name[:2] in ON_A_GPU)


def test_solutions_differ_from_the_notebooks_in_the_exercises_alone():
    for plain, solved in zip(PLAIN, SOLVED, strict=True):
        pairs = zip(nbformat.read(plain, 4).cells, nbformat.read(solved, 4).cells, strict=True)
        changed = [a for a, b in pairs if a.source != b.source]
        assert changed and all("check(" in cell.source for cell in changed)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A model of another family than pocket's, as from the Hub, with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from bbkit.machine import hub

    folder = tmp_path_factory.mktemp("hub") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 5120}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(hub.POCKET / file, folder)
    return folder


STRANGER = """
CHANGES = [
    "model.name={model}", "model.revision=", "model.dtype=float32", "model.quantization=none",
    "data.sft=ontology,ontology_chains", "data.grpo=ontology_chains,constraints",
    "data.evaluate=ontology_chains,constraints", "evaluation.ifeval=0", "sft.steps=3",
    "sft.optimizer=adamw_torch", "grpo.optimizer=adamw_torch", "grpo.steps=2", "grpo.prompts=4",
    "grpo.generations=4", "grpo.micro_batch_size=4", "grpo.max_completion_length=16",
    "retention.prompts=pocket_prompts", "retention.replies=8", "retention.per_step=4",
    "retention.max_new_tokens=16",
    "evaluation.questions=8", "evaluation.instructions=8", "evaluation.max_new_tokens=16",
    "evaluation.elsewhere=0", "evaluation.bootstrap=50", "model.max_length=256",
]
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ON_A_GPU)
def test_the_section_on_a_gpu_takes_any_preset_and_model(number, stranger, tmp_path):
    """Its cells need the setup cell and nothing else of the notebook."""
    path = next(p for p in PLAIN if p.name.startswith(number))
    notebook = nbformat.read(path, 4)
    kinds = [c.source.split("\n")[0] if c.cell_type == "markdown" else "" for c in notebook.cells]
    section = notebook.cells[kinds.index("## On your GPU") : kinds.index("## Key points")]
    notebook.cells = [code(path)[0], *section]
    knobs = next(c for c in notebook.cells if "PRESET = " in c.source)
    for old, new in (
        (r'PRESET = "pocket"', 'PRESET = "t4"'),
        (r"CHANGES = \[.*?\]\n", STRANGER.format(model=stranger)),
        (r"PROMPTS = 32", "PROMPTS = 4"),
    ):
        knobs.source, count = re.subn(old, lambda _, new=new: new, knobs.source, flags=re.DOTALL)
        assert count or old.startswith("PROMPTS"), old
    nbformat.write(notebook, tmp_path / path.name)
    out = run_in_a_shell(tmp_path / path.name)
    assert "minutes: not known, no run of preset t4 is recorded" in out
    assert "measured, in minutes: " in out and "backend transformers: as set" in out, out[-3000:]
    assert (tmp_path / "runs" / "t4" / "run.json").exists()

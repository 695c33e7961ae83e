"""Imports run one way, and bbkit stays small: contracts in pyproject.toml, sizes here."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BACK = {  # an import that goes up, lazily, and one that closes a circle within a room
    "bbkit/data/layouts.py": "bbkit import train",
    "bbkit/study/recorded.py": "bbkit.study import comparison",
}


def lint(folder: Path) -> subprocess.CompletedProcess:
    """`lint-imports` on the bbkit that stands in a folder."""
    run = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", run], cwd=folder, capture_output=True, text=True)


def test_imports_run_one_way():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", BACK)
def test_an_import_that_goes_back_is_found(tmp_path, file):
    left_out = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(ROOT / "bbkit", tmp_path / "bbkit", ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as module:
        module.write(f"\n\ndef back():\n    from {BACK[file]}\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout


def test_a_wheel_has_every_room():
    """An editable install, as CI's, finds what is listed nowhere."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {path.parent.relative_to(ROOT).parts for path in (ROOT / "bbkit").rglob("*.py")}
    assert {".".join(parts) for parts in rooms} <= {*listed}


def test_bbkit_is_small():
    """The front room fits into an hour's reading, and no module or function outgrows a sitting."""
    lines = {path: path.read_text().splitlines() for path in (ROOT / "bbkit").rglob("*.py")}
    front = [path for path in lines if path.parent == ROOT / "bbkit"]
    assert len(front) <= 16 and sum(len(lines[path]) for path in front) <= 3200
    assert not {path.name: len(found) for path, found in lines.items() if len(found) > 300}
    long = {}
    for path, found in lines.items():
        for node in ast.walk(ast.parse("\n".join(found))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long[f"{path.name}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert not long

"""The visit to a GPU, without one: what fails or hangs costs itself, and a page is filled."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_visit
import pytest

ROW = {"name": "a map", "values": {"error": 0.00231, "peak_gb": 5.0}, "card": "Card", "torch": "2",
       "transformers": "5", "bitsandbytes": None, "commit": "0123456789"}  # fmt: skip
WELL = f"import os; open(os.environ['BBKIT_GPU_ROWS'], 'a').write('''{json.dumps(ROW)}\n''')"
DOES = {
    "nf4": f"{WELL}; print('1 passed in 0.1s')",
    "onepass": "print('wrong'); raise SystemExit(1)",
    # a child of its own, which has to end with it
    "retention": "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid); p.wait()",
    "float16": "print('1 skipped in 0.1s')",
    "shape05": f"{WELL}; print('1 passed in 0.1s')",
}


@pytest.fixture
def visited(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_visit, "command", lambda name: [sys.executable, "-c", DOES[name]])
    monkeypatch.setattr(gpu_visit, "TESTS", dict.fromkeys(DOES, 20.0) | {"retention": 0.5})
    code = gpu_visit.main(["--out", str(tmp_path), "--only", ",".join(DOES), "--commit", "abc"])
    return code, json.loads((tmp_path / "gpu.json").read_text())


def test_a_test_that_fails_or_hangs_costs_itself(visited):
    code, found = visited
    ended = {name: test["ended"] for name, test in found["tests"].items()}
    assert code == 1 and ended == {"nf4": "passed", "onepass": "failed", "retention": "out of time",
                                   "float16": "skipped", "shape05": "passed"}  # fmt: skip
    assert found["rows"] == [ROW, ROW] and found["tests"]["onepass"]["tail"] == ["wrong"]
    assert found["tests"]["retention"]["seconds"] < 15
    child = Path("/proc", found["tests"]["retention"]["tail"][0], "cmdline")
    assert not child.exists() or not child.read_bytes()  # gone, or waits to be buried
    assert found["machine"]["cores"] and found["versions"]["python"] and found["commit"]


def test_none_begins_after_the_deadline_and_none_outlasts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_visit, "command", lambda _: ["sleep", "60"])
    monkeypatch.setattr(gpu_visit, "TESTS", dict.fromkeys(DOES, 100.0))
    began = time.monotonic()
    found = gpu_visit.visit(tmp_path, 1.0, ["nf4", "onepass"], False, None)
    assert time.monotonic() - began < 20
    assert [t["ended"] for t in found["tests"].values()] == ["out of time", "not begun"]


def test_the_page_is_filled_and_the_rest_of_it_kept(visited, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_visit, "ROOT", tmp_path)
    page = tmp_path / "bbkit" / "README.md"
    page.parent.mkdir()
    page.write_text("a\n<!-- gpu -->\nnot measured\n<!-- end -->\nb\n")
    for _ in range(2):  # again over its own
        assert gpu_visit.main(["--readme", str(tmp_path / "gpu.json")]) == 0
        text = page.read_text()
        assert text.startswith("a\n<!-- gpu -->\nCard, torch 2, ") and text.endswith("-->\nb\n")
        assert text.count("| a map | error 0.00231; peak GB 5 |") == 2 and "0123456" in text
        assert "retention (out of time)" in text and "not measured" not in text
    with pytest.raises(ValueError, match="no block"):
        gpu_visit.filled("no marks", visited[1])


def test_the_page_has_the_block():
    page = (Path(__file__).parents[1] / "bbkit" / "README.md").read_text(encoding="utf-8")
    assert gpu_visit.BEGIN in page
    assert gpu_visit.filled(page, {"rows": [], "tests": {}}).count(gpu_visit.BEGIN) == 1


def test_without_pytest_it_says_what_to_add(monkeypatch, capsys):
    monkeypatch.setattr(gpu_visit.importlib.util, "find_spec", lambda name: None)
    assert gpu_visit.main([]) == 3
    assert "pytest, pluggy, iniconfig, packaging and pygments" in capsys.readouterr().err


def test_it_does_without_torch():
    asked = (
        "import sys; sys.path.insert(0, 'tests'); import gpu_visit; from bbkit.runs import record;"
        "from bbkit.machine import gpu"
    )
    done = subprocess.run([sys.executable, "-c", f"{asked}; print('torch' in sys.modules)"],
                          cwd=gpu_visit.ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr

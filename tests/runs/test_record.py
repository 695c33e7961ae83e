"""The run folder: whole files, torn lines, checkpoints, resume, the lock, a full disk, kill -9."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bbkit import CannotRun, InputError
from bbkit.config import load, to_dict
from bbkit.machine import files
from bbkit.machine.files import latest_checkpoint, mark_complete, read_json, read_rows
from bbkit.runs import record
from bbkit.runs.record import Run

SETTINGS = {"run": {"seed": 0}, "grpo": {"steps": 3}}
COMMAND = ["python", "-m", "bbkit.train", "--set", "data.sft=[a, b]"]


def begin(folder: Path, **changes) -> None:
    """A run that got as far as two GRPO steps."""
    with Run(folder, SETTINGS | changes, COMMAND) as run:
        run.log("sft", 1, {"loss": 1.0})
        run.done("sft", seconds=1.0)
        for step in (1, 2):
            run.log("grpo", step, {"loss": 0.1 * step})
            run.sample("grpo", step, {"prompt": "Why?", "reply": "Bäcause\ud800"})


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(256)) * step)
    (path / "inner" / "state").write_text(f"{step}")
    mark_complete(path)
    return path


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*.tmp")]


# Whole files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 0})
    os.link(path, tmp_path / "held")  # what a reader that holds the old file sees
    files.write_json(path, {"a": 1})
    assert (read_json(tmp_path / "held"), read_json(path)) == ({"a": 0}, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotRun, match=r"file\.json: the disk is full; make room"):
        files.write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1} and not leftovers(tmp_path)


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        files.write_bytes(tmp_path / "none" / "file", b"")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), RuntimeError("No space left (28)")])
def test_guarded_knows_a_full_disk_and_nothing_else(tmp_path, error):
    with pytest.raises(CannotRun), files.guarded(tmp_path / "new" / "file"):
        raise error
    for other in (RuntimeError("shape mismatch"), OSError(errno.ECONNRESET, "reset")):
        with pytest.raises(type(other)), files.guarded(tmp_path):
            raise other
    with pytest.raises(InputError, match="mine"), files.guarded(tmp_path):
        raise InputError("mine: No space left")


def test_guarded_looks_at_the_disk_where_a_library_does_not_say(tmp_path, monkeypatch):
    """torch.save on a full disk only says that a position is unexpected."""
    with pytest.raises(RuntimeError), files.guarded(tmp_path):
        raise RuntimeError("unexpected pos 64 vs 0")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(CannotRun, match="the disk is full"), files.guarded(tmp_path):
        raise RuntimeError("unexpected pos 64 vs 0")


def test_a_full_disk_leaves_whole_files(tmp_path):
    """On a real tmpfs of 256 KiB: each failure is one CannotRun, what was whole stays whole."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root")
    try:
        full = pytest.raises(CannotRun, match="the disk is full")
        with full, Run(tmp_path / "run", SETTINGS, COMMAND) as run:
            for step in range(10**4):
                run.log("grpo", step, {"text": "x" * 1000})
        rows = read_rows(run.folder / "metrics.jsonl")
        text = (run.folder / "metrics.jsonl").read_text()
        assert len(rows) > 100 and text.endswith("}\n")
        assert read_json(run.folder / "run.json")["settings"] == SETTINGS
        with pytest.raises(CannotRun):
            files.write_bytes(run.folder / "big", bytes(2**20))
        assert not leftovers(tmp_path) and not (run.folder / "big").exists()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_plain_makes_strict_json_of_numbers_that_are_none(tmp_path):
    import numpy as np

    found = {"a": float("nan"), "b": (np.float32(0.5), np.int64(2)), "c": [float("-inf")]}
    files.write_json(tmp_path / "x.json", found | {"p": Path("a/b"), "d": np.array([1.0, np.nan])})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [0.5, 2],
        "c": [None],
        "p": "a/b",
        "d": [1.0, None],
    }


# Rows


@given(
    st.lists(st.dictionaries(st.text(), st.text() | st.floats() | st.none()), max_size=4), st.data()
)
@settings(deadline=None, max_examples=50)
def test_rows_survive_being_cut_anywhere(tmp_path_factory, rows, data):
    with Run(tmp_path_factory.mktemp("run"), SETTINGS, COMMAND) as run:
        for step, row in enumerate(rows):
            run.log("grpo", step, {"row": row})
    path = run.folder / "metrics.jsonl"
    if not rows:
        assert read_rows(path) == []
        return
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    assert read_rows(path) == [json.loads(x) for x in whole[:cut].split(b"\n")[:-1]]
    if cut == len(whole):
        assert [r["row"] for r in read_rows(path)] == files.plain(rows)


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "rows").write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(InputError, match="rows:2"):
        read_rows(tmp_path / "rows")


def test_truncate_goes_back_to_a_step(tmp_path):
    with Run(tmp_path, SETTINGS, COMMAND) as run:
        run.sample("base", 0, {"reply": "b"}, held_out=True)
        for stage in ("sft", "grpo"):
            for step in (1, 2, 3):
                run.log(stage, step, {})
                run.sample(stage, step, {"reply": f"{stage}{step}"})
            run.sample(stage, 3, {"reply": stage}, held_out=True)

        def left():
            metrics = [(r["stage"], r["step"]) for r in read_rows(tmp_path / "metrics.jsonl")]
            return metrics, [r["reply"] for r in read_rows(tmp_path / "samples.jsonl")]

        sft = [("sft", 1), ("sft", 2), ("sft", 3)]
        run.truncate("grpo", 3)  # about to evaluate GRPO again
        assert left()[1][-1] == "grpo3" and len(left()[0]) == 6
        run.truncate("grpo", 1)
        assert left() == ([*sft, ("grpo", 1)], ["b", "sft1", "sft2", "sft3", "sft", "grpo1"])
        run.truncate("grpo", 0)
        assert left() == (sft, ["b", "sft1", "sft2", "sft3", "sft"])
        run.truncate("sft", 2)
        assert left() == (sft[:2], ["b", "sft1", "sft2"])
        run.truncate("base", 0)
        assert left() == ([], [])


# Checkpoints


def test_the_newest_whole_checkpoint_is_taken(tmp_path, capsys):
    assert latest_checkpoint(tmp_path / "none") is None
    two, ten, nine = (checkpoint(tmp_path, n) for n in (2, 10, 9))
    (tmp_path / "checkpoint-99").mkdir()  # killed before its marker was written
    (tmp_path / "checkpoint-old").mkdir()
    assert latest_checkpoint(tmp_path) == ten
    assert "checkpoint-99: not finished" in capsys.readouterr().out
    os.truncate(ten / "weights", 100)
    assert latest_checkpoint(tmp_path) == nine
    assert "'weights' is missing or has changed" in capsys.readouterr().out
    data = bytearray((nine / "weights").read_bytes())
    data[7] ^= 1
    (nine / "weights").write_bytes(data)
    assert latest_checkpoint(tmp_path) == two
    assert "'weights' is missing or has changed" in capsys.readouterr().out
    os.truncate(two / files.MARKER, 20)
    assert latest_checkpoint(tmp_path) is None
    mark_complete(two)
    assert latest_checkpoint(tmp_path) == two
    (two / "inner" / "state").unlink()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["[" * 100_000, "../outside", "/etc/hostname", "", "\ud800"])
def test_a_marker_that_names_no_file_of_its_checkpoint(tmp_path, name):
    whole = checkpoint(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    sums = files.read_json(whole / files.MARKER)
    sums[name] = [1, hashlib.sha256(b"x").hexdigest()]
    (whole / files.MARKER).write_text(json.dumps(sums))
    said = files.broken(whole)
    assert said == f"{name[:80]!r} is missing or has changed since it was written" and said.encode()


# Resume


def test_resume_finds_the_run(tmp_path):
    out = tmp_path / "out"
    assert record.resolve_resume("auto", out) is None
    begin(out)
    assert record.resolve_resume("auto", out) == out
    assert record.resolve_resume("no", out) is None
    assert record.resolve_resume(str(out), tmp_path / "other") == out


def test_resume_paths_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        record.resolve_resume(str(tmp_path / "none"), tmp_path)
    with pytest.raises(InputError, match=r"no run\.json"):
        record.resolve_resume(str(tmp_path), tmp_path)
    for content in ("{", "[]", '{"other": 1}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(InputError, match=r"run\.json: not"):
            record.resolve_resume("auto", tmp_path)


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    begin(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "gr')  # killed while writing
    with Run(tmp_path, SETTINGS, COMMAND, tmp_path) as run:
        assert run.is_done("sft") and not run.is_done("grpo")
        run.log("grpo", 3, {"loss": 0.3})  # not glued to the torn line
        run.truncate("grpo", 1)
        run.log("grpo", 2, {"loss": 0.2})
    rows = [(r["stage"], r["step"]) for r in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [("sft", 1), ("grpo", 1), ("grpo", 2)]
    assert len(run.manifest["sessions"]) == 2 and run.manifest["status"] == "done"


def test_a_run_made_before_a_setting_was_there_goes_on(tmp_path):
    old, new = to_dict(load("pocket")), to_dict(load("pocket"))
    del old["grpo"]["sample_at_once"], old["run"]["save_minutes"], old["grpo"]["rewards"]
    Run(tmp_path, old, ["a"]).__exit__(None, None, None)
    with Run(tmp_path, new, ["a"], resume=tmp_path):
        pass
    new["run"]["save_minutes"] = 5
    with pytest.raises(InputError, match=r"resume, run\.save_minutes was 10 and is now 5"):
        Run(tmp_path, new, ["a"], resume=tmp_path)


def test_resume_with_other_settings_names_the_first_key(tmp_path):
    begin(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    other = {"run": {"seed": 0}, "grpo": {"steps": 4}}
    with pytest.raises(InputError, match=r"grpo\.steps was 3 and is now 4"):
        Run(tmp_path, other, COMMAND, tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before
    with pytest.raises(InputError, match=r"grpo\.lr was not set and is now 1"):
        Run(tmp_path, {"run": {"seed": 0}, "grpo": {"steps": 3, "lr": 1}}, COMMAND, tmp_path)


def test_pinned_facts_must_be_the_same_on_resume(tmp_path):
    begin(tmp_path)
    with Run(tmp_path, SETTINGS, COMMAND, tmp_path) as run:
        run.pin(prompt_hash="aa", data={"medqa": {"test": "00"}})
        run.pin(prompt_hash="aa", data={"medqa": {"test": "00"}})
        with pytest.raises(InputError, match=r"data\.medqa\.test was 00 and is now 11"):
            run.pin(data={"medqa": {"test": "11"}})


def test_a_run_with_results_is_never_overwritten(tmp_path):
    begin(tmp_path)
    with pytest.raises(InputError, match="holds a run"):
        Run(tmp_path, SETTINGS, COMMAND)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_a_run_that_failed_at_once_may_be_replaced(tmp_path):
    with pytest.raises(CannotRun), Run(tmp_path, SETTINGS, COMMAND):
        raise CannotRun("no memory")
    assert read_json(tmp_path / "run.json")["status"] == "failed: no memory"
    assert record.resolve_resume("auto", tmp_path) is None
    begin(tmp_path, grpo={"steps": 4})
    assert read_json(tmp_path / "run.json")["status"] == "done"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "interrupted"), (ValueError("odd"), "failed: odd")]
)
def test_the_manifest_says_how_a_run_ended(tmp_path, error, status):
    checkpoint(tmp_path / "grpo", 1)
    (tmp_path / "grpo" / "checkpoint-2").mkdir()
    with pytest.raises((KeyboardInterrupt, ValueError)), Run(tmp_path, SETTINGS, COMMAND):
        raise error
    assert read_json(tmp_path / "run.json")["status"] == status
    assert [p.name for p in (tmp_path / "grpo").iterdir()] == ["checkpoint-1"]


def test_the_manifest_holds_what_a_reader_needs(tmp_path):
    with Run(tmp_path, to_dict(load("pocket")), COMMAND) as run:
        running = read_json(tmp_path / "run.json")
        assert running["status"] == "running" and running["end"] is None
        run.evaluation({"base": {"domain": {"value": 0.5, "n": 2, "interval": [0.0, 1.0]}}})
        run.evaluation({"sft": {"domain": {"value": 1.0, "n": 2, "interval": [0.0, 1.0]}}})
    manifest = read_json(tmp_path / "run.json")
    assert manifest["command"] == "python -m bbkit.train --set 'data.sft=[a, b]'"
    assert manifest["settings"]["model"]["name"] == "pocket"
    assert manifest["versions"]["python"] and manifest["hardware"]["cores"] >= 1
    assert set(manifest["git"]) == {"commit", "dirty"} and manifest["end"] >= manifest["start"]
    assert list(read_json(tmp_path / "evaluation.json")) == ["base", "sft"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be used"):
            Run(folder, SETTINGS, COMMAND)


# Two processes, and kill -9


def test_two_processes_cannot_write_the_same_folder(tmp_path):
    pytest.importorskip("fcntl", reason="no file locks on this system")
    code = (
        "import sys; from pathlib import Path; from bbkit.runs.record import Run\n"
        "from bbkit import InputError\n"
        "try: Run(Path(sys.argv[1]), {}, [])\n"
        "except InputError as error: print(error)"
    )
    with Run(tmp_path, SETTINGS, COMMAND):
        words = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert "another process is writing here" in done.stdout
    with Run(tmp_path, SETTINGS, COMMAND):  # free again
        pass


def test_kill_9_at_any_moment_leaves_a_run_that_resumes(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from bbkit.machine.files import mark_complete; from bbkit.runs.record import Run\n"
        "run = Run(Path(sys.argv[1]), {'a': 1}, ['x'])\n"
        "for step in range(10**6):\n"
        "    run.log('grpo', step, {'text': 'y' * 5000})\n"
        "    run.done(f'stage {step}')\n"
        "    folder = run.folder / 'grpo' / f'checkpoint-{step}'; folder.mkdir(parents=True)\n"
        "    (folder / 'w').write_bytes(bytes(10**5)); mark_complete(folder)\n"
    )
    for number, delay in enumerate((0.01, 0.05, 0.11)):
        folder = tmp_path / str(number)
        child = subprocess.Popen([sys.executable, "-c", code, str(folder)])
        while not (folder / "grpo").exists():
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        with Run(folder, {"a": 1}, ["x"], record.resolve_resume("auto", folder)) as run:
            newest = latest_checkpoint(folder / "grpo")
            step = int(newest.name.rpartition("-")[2]) if newest else 0
            run.truncate("grpo", step)
            assert [r["step"] for r in read_rows(folder / "metrics.jsonl")] == list(range(step + 1))

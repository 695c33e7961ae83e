"""The run folder: what ran (run.json), what happened (metrics, samples, evaluation), how to go on.

Serves no claim by itself; every figure and claim is computed from run folders.
"""

import errno
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bbkit import CannotRun, InputError
from bbkit.config import Settings, leaves, to_dict
from bbkit.machine import processes
from bbkit.machine.files import MARKER, guarded, plain, read_json, read_rows, write_json, write_rows

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two runs in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

STAGES = ("base", "sft", "grpo")
PACKAGES = ("bbkit", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "unsloth")


def resolve_resume(resume: str, out: Path) -> Path | None:
    """The run folder to continue, or None to start a new run in `out`.

    `resume` is "auto" (continue `out` if it holds a run), "no", or a run folder.

    >>> resolve_resume("nowhere", Path("somewhere"))
    Traceback (most recent call last):
    bbkit.InputError: --resume nowhere: no such folder; give a run folder, auto or no
    """
    if resume == "no" or (resume == "auto" and not _begun(out)):
        return None
    folder = out if resume == "auto" else Path(resume)
    if not (folder / "run.json").exists():
        what = "no run.json in it" if folder.is_dir() else "no such folder"
        raise InputError(f"--resume {resume}: {what}; give a run folder, auto or no")
    return folder


def _begun(folder: Path) -> bool:
    """Whether a folder holds a run that got anywhere; one that failed at once may be replaced."""
    metrics = folder / "metrics.jsonl"
    started = (folder / "run.json").exists() and bool(manifest_of(folder)["stages"])
    return started or (metrics.exists() and metrics.stat().st_size > 0)


def manifest_of(folder: Path) -> dict[str, Any]:
    """run.json of a run folder; InputError where it is none."""
    manifest = read_json(folder / "run.json")
    kinds = {"settings": dict, "stages": dict, "sessions": list, "versions": dict}
    if isinstance(manifest, dict) and all(isinstance(manifest.get(k), kinds[k]) for k in kinds):
        return manifest
    raise InputError(f"{folder / 'run.json'}: not the manifest of a run of this kit")


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first dotted key at which two nested dicts differ, with both values, or "".

    A setting that `old` does not know, made before there was one, counts as its default.

    >>> first_difference({"grpo": {"steps": 3}}, {"grpo": {"steps": 4}})
    'grpo.steps was 3 and is now 4'
    """
    a, b, none = leaves(to_dict(Settings())) | leaves(old), leaves(new), "not set"
    for k in [*b, *leaves(old)]:
        if a.get(k, none) != b.get(k, none):
            return f"{k} was {a.get(k, none)} and is now {b.get(k, none)}"
    return ""


def machine() -> dict[str, Any]:
    """Hardware, package versions and git state, without importing any of the packages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware: dict[str, Any] = {"system": platform.platform(), "cores": cores}
    with suppress(OSError, ValueError, AttributeError):  # Linux
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        hardware["memory_gib"] = round(memory / 2**30, 1)
        cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
        hardware["cpu"] = cpu.strip(" \t:")
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_available():
        hardware["gpu"] = [cuda.get_device_name(i) for i in range(cuda.device_count())]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"hardware": hardware, "versions": versions, "git": _git(Path(__file__).parent)}


def _git(folder: Path) -> dict[str, Any]:
    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "record.py")  # a venv may lie inside another repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Run:
    """A run folder held open by one process: `with Run(out, settings, command, resume) as run:`.

    `settings` is the resolved configuration as a nested dict, `command` the arguments as typed,
    `resume` what `resolve_resume` gave. Raises InputError when another process holds the folder,
    when a new run would overwrite an old one, or when a resumed one had other settings. Of the
    processes of one run (bbkit.machine.processes) all read the folder and the first alone writes.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Run(folder, {"run": {"seed": 0}}, ["python", "-m", "bbkit.train"]) as run:
    ...     run.log("grpo", 1, {"loss": 0.5})
    ...     run.done("grpo", seconds=2.0)
    >>> run.manifest["status"], run.is_done("grpo"), read_rows(folder / "metrics.jsonl")
    ('done', True, [{'stage': 'grpo', 'step': 1, 'loss': 0.5}])
    """

    def __init__(
        self, folder: Path, settings: Mapping, command: Sequence[str], resume: Path | None = None
    ) -> None:
        self.folder, self.writes = folder, processes.is_first()
        if self.writes:
            self._hold()
        if resume is None and _begun(folder):
            raise InputError(f"{folder}: holds a run; use another --out, or --resume auto")
        session = {"start": _now(), "end": None, "command": shlex.join(command)}
        if resume is None:
            self.manifest: dict[str, Any] = {"status": "running", **session, "stages": {}}
            self.manifest |= {"sessions": [session], "settings": plain(settings), **machine()}
        else:
            self.manifest = manifest_of(folder)
            if change := first_difference(self.manifest["versions"], machine()["versions"]):
                print(f"note: {change}: the resumed run may differ from an uninterrupted one")
            self._same("settings", settings)
            self._keep(lambda row: True)
            self.manifest |= {"status": "running", "end": None}
            self.manifest["sessions"].append(session)
        processes.wait()  # nobody looks for an old run after somebody began this one
        self.update()

    def _hold(self) -> None:
        try:
            with guarded(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = (self.folder / ".lock").open("a")
        except OSError as error:
            raise InputError(f"--out {self.folder}: cannot be used ({error.strerror})") from error
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            busy = "another process is writing here; wait for it or use another --out"
            raise InputError(f"{self.folder}: {busy}") from error
        except OSError as error:  # some network drives have no locks
            print(f"note: no lock on {self.folder} ({error.strerror}); start only one run in it")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        """Note how the run ended; after a failure, remove checkpoints that were being written."""
        if not self.writes:
            return
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
        for checkpoint in self.folder.glob("*/checkpoint-*") if kind else ():
            if not (checkpoint / MARKER).exists():
                shutil.rmtree(checkpoint, ignore_errors=True)
        self.manifest["sessions"][-1]["end"] = _now()
        try:
            self.update(status=stopped if kind else "done", end=_now())
        except (CannotRun, InputError):
            if kind is None:  # otherwise the first error is the one to report
                raise
        finally:
            self._lock.close()

    def update(self, **facts: Any) -> None:
        """Put facts into the manifest and write it."""
        self.manifest |= plain(facts)
        if self.writes:
            write_json(self.folder / "run.json", self.manifest)

    def pin(self, **facts: Any) -> None:
        """As `update`, for what must be the same on resume: data checksums, prompt hash, model."""
        for name, value in facts.items():
            self._same(name, value)
        self.update(**facts)

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        self._append("metrics.jsonl", {"stage": stage, "step": step, **values})

    def sample(self, stage: str, step: int, values: Mapping, held_out: bool = False) -> None:
        """Append one completion to samples.jsonl: prompt, reply, gold, rewards by name, …"""
        kind = "held-out" if held_out else "train"
        self._append("samples.jsonl", {"stage": stage, "step": step, "kind": kind, **values})

    def truncate(self, stage: str, step: int) -> None:
        """Forget metrics and samples written after training step `step` of `stage`.

        Held-out samples count as later than every step of their stage.
        """

        def order(row: Mapping[str, Any]) -> tuple[int, bool, int]:
            return STAGES.index(row["stage"]), row.get("kind") == "held-out", row["step"]

        self._keep(lambda row: order(row) <= (STAGES.index(stage), False, step))

    def forget_held_out(self, stage: str) -> None:
        """Forget the held-out samples of a stage, before it is evaluated (again)."""
        self._keep(lambda row: row["stage"] != stage or row.get("kind") != "held-out")

    def evaluation(self, measures: Mapping[str, Any]) -> None:
        """Put measures by what they are of, such as a stage, into evaluation.json."""
        path = self.folder / "evaluation.json"
        write_json(path, (read_json(path) if path.exists() else {}) | dict(measures))

    def done(self, stage: str, **facts: Any) -> None:
        """Mark a stage (any name) as finished, so that a resumed run skips it."""
        self.update(stages=self.manifest["stages"] | {stage: {"end": _now(), **facts}})

    def is_done(self, stage: str) -> bool:
        """Whether `done(stage)` was called, in this session or an earlier one."""
        return stage in self.manifest["stages"]

    def _same(self, name: str, value: Any) -> None:
        new = plain(value)
        old = self.manifest.get(name, new)
        if name != "settings":  # whose keys are known without it
            old, new = {name: old}, {name: new}
        if change := first_difference(old, new):
            said = f"cannot resume, {change}; undo it or use another --out"
            raise InputError(f"{self.folder}: {said}")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"
        data, path = line.encode(errors="replace"), self.folder / name
        with guarded(path), open(path, "ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, "No space left on device")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        for path in (self.folder / name for name in ("metrics.jsonl", "samples.jsonl")):
            try:
                kept = [row for row in read_rows(path) if wanted(row)]
            except (KeyError, ValueError, TypeError) as error:
                said = "a row without stage or step; the file was damaged"
                raise InputError(f"{path}: {said}") from error
            if self.writes and path.exists():
                write_rows(path, kept)

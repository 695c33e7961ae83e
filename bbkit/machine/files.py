"""Files of a run folder, each whole or not at all, and whole checkpoints told from torn ones.

Serves no claim by itself. After kill -9 a torn last line is dropped, and a checkpoint whose
completeness marker is missing or does not fit its files is skipped.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from bbkit import CannotRun, InputError, Unhealthy

MARKER = "complete.json"


def plain(value: Any) -> Any:
    """What JSON can hold: tuples, arrays and tensors as lists, paths as text, NaN and inf as None.

    >>> plain({"loss": float("nan"), "shape": (2, 3)})
    {'loss': None, 'shape': [2, 3]}
    """
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn a full disk under `path`, however a library words it, into CannotRun with one line."""
    try:
        yield
    except (InputError, CannotRun, Unhealthy):
        raise
    except Exception as error:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error)  # safetensors; torch.save: "unexpected pos"
        if full or shutil.disk_usage(there).free < 2**16:
            raise CannotRun(f"{path}: the disk is full; make room or use another --out") from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename.

    Raises CannotRun (disk full) or InputError (no such folder, not allowed); leaves nothing behind.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with guarded(path):
            with open(temp, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({error.strerror}); use another --out") from error
    finally:
        with suppress(OSError):
            temp.unlink()


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, whole or not at all; see `plain` for what becomes of NaN."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode(errors="replace"))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as JSON lines, whole or not at all."""
    lines = (json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    write_bytes(path, "".join(lines).encode(errors="replace"))


def read(path: Path) -> bytes:
    """The bytes of a file; InputError naming it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; InputError naming it when it is missing or broken."""
    try:
        return json.loads(read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would drop the first without a word,
    and aliases, with which some lines can stand for gigabytes or for themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in (key for key in keys if keys.count(key) > 1):
            twice = f"key {key} is given twice"
            raise yaml.constructor.ConstructorError(None, None, twice, node.start_mark)
        return super().construct_mapping(node, deep)


def yaml_value(text: str) -> Any:
    """What a text means in YAML; ValueError with one line where it is none.

    >>> yaml_value("[a, 3]")
    ['a', 3]
    """
    try:
        return yaml.load(text, _Loader)
    # ValueError: a date that does not exist; RecursionError: lists in lists in lists
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, {getattr(error, 'problem', '')}" if mark else str(error)
        raise ValueError(f"not valid YAML: {' '.join(line.split())}") from error


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; InputError naming the file where it holds none."""
    try:
        text = read(path).decode()
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return yaml_tree(text, str(path))


@lru_cache(maxsize=32)  # a preset's takes 20 ms
def yaml_tree(text: str, source: str) -> Mapping[str, Any]:
    """The mapping that a text is in YAML; InputError naming its source where it is none."""
    try:
        tree = yaml_value(text)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected sections such as `grpo:` with keys below them")
    return tree


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, [] without a file; a torn last line is dropped, others raise."""
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn or empty
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a row; the file was damaged") from error
    return rows


def _sums(checkpoint: Path) -> dict[str, list]:
    """Size and sha256 of every file, by its name in the checkpoint."""
    sums = {}
    for path in sorted(f for f in checkpoint.rglob("*") if f.is_file() and f.name != MARKER):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums[path.relative_to(checkpoint).as_posix()] = [path.stat().st_size, digest]
    return sums


def mark_complete(checkpoint: Path) -> None:
    """Write the marker of a whole checkpoint, last of all: every file's size and sha256."""
    write_json(checkpoint / MARKER, _sums(checkpoint))


def broken(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used, or "" when it is whole."""
    if not (checkpoint / MARKER).exists():
        return "not finished (no completeness marker)"
    try:
        marked = {**read_json(checkpoint / MARKER)}
    except (InputError, TypeError):
        return "its completeness marker is damaged"
    there = _sums(checkpoint)
    changed = [name for name, sums in marked.items() if there.get(name) != sums]
    return f"{changed[0][:80]!r} is missing or has changed since it was written" if changed else ""


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole `checkpoint-N` in a folder, or None; prints why newer ones are skipped."""
    steps = [p.name.partition("-")[2] for p in folder.glob("checkpoint-*")]
    for step in sorted((int(step) for step in steps if step.isdigit()), reverse=True):
        checkpoint = folder / f"checkpoint-{step}"
        if not (reason := broken(checkpoint)):
            return checkpoint
        print(f"skipping {checkpoint}: {reason}")
    return None

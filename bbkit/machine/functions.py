"""A user's own functions, named by path as my_rewards.py:brevity, and the names of rewards.

Serves no claim. The file is run as it stands now: no cache, which would give an edited file's
functions as they were.
"""

import difflib
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bbkit import InputError

REWARDS = ("domain", "reasoning", "format")  # the kit's own; the functions are in bbkit.rewards


def names(entries: Sequence[str]) -> tuple[str, ...]:
    """What rewards are called in settings, logs and figures: FILE.py:FUNCTION by its function.

    >>> names(["domain", "my_rewards.py:brevity"])
    ('domain', 'brevity')
    """
    return tuple(entry.rpartition(":")[2] for entry in entries)


def faults(entries: Sequence[str], weights: Mapping[str, float]) -> list[str]:
    """What is wrong with the names of rewards and of their weights, a line each.

    >>> faults(["domain", "fromat"], {})
    ["grpo.rewards: no reward 'fromat'; did you mean format? Or FILE.py:FUNCTION, of your own"]
    >>> faults(["domain", "mine.py:brevity"], {"brevty": 2.0})
    ["grpo.weights: no reward 'brevty'; did you mean brevity?"]
    """
    own, called = "Or FILE.py:FUNCTION, of your own", names(entries)
    found = [
        f"grpo.rewards: no reward {entry!r}{_nearest(entry, REWARDS)} {own}"
        for entry in entries
        if entry not in REWARDS and not _own(entry)
    ]
    found += [
        f"grpo.rewards: two are called {name!r}; rename a function"
        for name in dict.fromkeys(n for n in called if called.count(n) > 1)
    ]
    known = dict.fromkeys((*called, *REWARDS))  # those that presets weigh, asked for or not
    found += [
        f"grpo.weights: no reward {name!r}{_nearest(name, [*known])}"
        for name in weights
        if name not in known
    ]
    if not any(weights.get(name, 1.0) for name in called):
        found.append(f"grpo.weights must not all be 0: {', '.join(called)}")
    return found


def _own(entry: str) -> bool:
    file, _, name = entry.rpartition(":")
    return bool(file) and name.isidentifier()


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}."


def load(entries: Sequence[str], parameters: Sequence[str]) -> dict[str, Callable]:
    """The own functions among `entries` by name, each of which takes so many arguments.

    A file is run once for all of its functions. Raises InputError, one line that names file and
    line, where there is no such file or function, it cannot be run, or takes other arguments.
    """
    modules: dict[str, ModuleType] = {}
    found: dict[str, Callable] = {}
    for entry in filter(_own, entries):
        file, _, name = entry.rpartition(":")
        modules[file] = modules.get(file) or _run(file)
        function = getattr(modules[file], name, None)
        if not callable(function):
            there = [k for k, v in vars(modules[file]).items() if inspect.isfunction(v)]
            near = _nearest(name, there) if there else "; there is none."
            raise InputError(f"{file}: no function {name!r}{near}")
        try:
            inspect.signature(function).bind(*parameters)
        except (TypeError, ValueError) as error:
            wanted = f"def {name}({', '.join(parameters)}):"
            raise InputError(f"{entry}: cannot be called ({error}); write {wanted}") from error
        found[name] = function
    return found


def checksums(entries: Sequence[str]) -> dict[str, str]:
    """sha256 by file of the own functions among `entries`, for a run's manifest."""
    files = dict.fromkeys(entry.rpartition(":")[0] for entry in entries if _own(entry))
    return {file: hashlib.sha256(_read(file)).hexdigest() for file in files}


def told(error: BaseException, file: str) -> str:
    """An error of a user's code in one line, with the last line of the file that it passed."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    where = f"line {lines[-1]}: " if lines else ""
    said = " ".join(str(getattr(error, "msg", error)).split())
    return f"{where}{type(error).__name__}: {said:.120}"


def _read(file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        said = "paths start where the command is run"
        raise InputError(f"{file}: cannot be read ({error.strerror}); {said}") from error


def _run(file: str) -> ModuleType:
    module: Any = ModuleType(f"own {file}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # where dataclasses look for their module
    source = _read(file)
    try:
        exec(compile(source, file, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise InputError(f"{file} cannot be run, {told(error, file)}") from error
    return module

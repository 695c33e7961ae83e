"""Where a model's files are: the shipped folder, a folder or .gguf file of the user's, or the Hub.

Only safetensors and gguf weights are read, nothing that comes with a model is run, and the
libraries' many errors become one line each.
"""

import contextlib
import errno
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bbkit import CannotRun, InputError
from bbkit.machine import files

POCKET = Path(__file__).parents[1] / "pocket"
WISHED = {name: os.environ.get(name, "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # of a Hub model; no pickles


def go_private(offline: bool) -> None:
    """No telemetry, and no connection at all if `offline`; before any Hugging Face import.

    Where they are imported already, as in a notebook, the last call holds: a run of pocket does not
    keep the next one, of another model, from the Hub.
    """
    os.environ.update(dict.fromkeys(WISHED, "1") if offline else WISHED)
    closed = os.environ["HF_HUB_OFFLINE"].lower() in ("1", "on", "yes", "true")
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            vars(sys.modules[module]).update(HF_HUB_OFFLINE=closed, HF_DATASETS_OFFLINE=closed)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def locate(
    name: str, revision: str = "", offline: bool = False, wanted: tuple[str, ...] = FILES
) -> Path:
    """Folder or .gguf file of "pocket", a path, or a Hub id, whose `wanted` files are fetched.

    >>> locate("./nowhere")
    Traceback (most recent call last):
    bbkit.InputError: model ./nowhere: no such folder or file, and not a Hub id (owner/name)
    """
    path = POCKET if name == "pocket" else Path(name).expanduser()
    if path.is_dir() or name == "pocket":
        if not (path / "config.json").is_file():
            raise InputError(f"model {name}: no config.json in {path}: not a model folder")
        return path
    if path.is_file():
        with path.open("rb") as file:
            if path.suffix != ".gguf" or file.read(4) != b"GGUF":
                raise InputError(f"model {name}: a file, but not a gguf one")
        return path
    if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(f"model {name}: no such folder or file, and not a Hub id (owner/name)")
    import huggingface_hub
    from httpx import HTTPError

    # besides pickles, what is left out are the same weights in other formats
    patterns: dict[str, Any] = {"allow_patterns": [*wanted]}
    patterns |= {"ignore_patterns": ["*/*", "consolidated*"], "local_files_only": offline}
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision or None, **patterns)
        return Path(found)
    except (OSError, ValueError, HTTPError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise CannotRun(f"model {name}: the disk is full; make room for it") from error
        why = one_line(error)
        if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            closed = offline or huggingface_hub.constants.HF_HUB_OFFLINE
            why = "not cached, and " + ("this run is offline" if closed else "no way to the Hub")
        mend = f"run `hf download {name}` first, or set model.name to a folder or .gguf file"
        raise InputError(f"model {name}: {why}; {mend}") from error


def refuse_pickles(path: Path) -> None:
    """Raise ValueError for a model folder whose weights are not all safetensors."""
    index = path / "model.safetensors.index.json"
    names = [file.name for file in path.glob("*.safetensors")]
    if index.is_file():
        names = list(files.read_json(index)["weight_map"].values())
    if path.is_dir() and not (names and all(name.endswith(".safetensors") for name in names)):
        raise ValueError(f"no safetensors weights in {path}, and pickled ones are never read")


def source(path: Path) -> tuple[Path, dict[str, Any]]:
    """What every from_pretrained gets; neither remote code nor a look at the Hub."""
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    return (path.parent, options | {"gguf_file": path.name}) if path.is_file() else (path, options)


def one_line(error: BaseException) -> str:
    """What an error says, in at most 200 characters, or its kind."""
    return textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors of the libraries in one line each, and no progress bars or reports of theirs."""
    import torch
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (InputError, CannotRun):
        raise
    except (ImportError, MemoryError, torch.OutOfMemoryError) as error:
        raise CannotRun(f"model {name}: {one_line(error)}") from error
    except Exception as error:  # a spoilt file makes them raise anything, struct.error included
        raise InputError(f"model {name}: {one_line(error)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

"""Whether torch can use a GPU here, and if not, why; a clock that waits for it.

Serves no claim. "No GPU" and "a GPU that this torch cannot use" are told apart: the second has a
mend, and who owns the card would else get a run on the CPU without a hint.
"""

import os
import subprocess
import time


def obstacle() -> str:
    """Why torch can use no CUDA GPU here, with the mend where there is one; "" where it can.

    >>> import torch
    >>> bool(obstacle()) == (not torch.cuda.is_available())
    True
    """
    import torch

    if torch.cuda.is_available():
        return ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden} hides every GPU"
    if not (found := seen()):
        return "no CUDA GPU is visible"
    if (built := torch.version.cuda) is None:
        without = f"this torch ({torch.__version__}) is built without CUDA"
        return f"{found} is here, and {without}; install one with CUDA (pytorch.org)"
    why, mend = "it says not why", "update the driver, or install a torch for an older CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
    return f"{found} is here, and torch for CUDA {built} cannot use it ({why}); {mend}"


def seen() -> str:
    """The GPU that NVIDIA's own tool finds, such as "Tesla T4 with driver 470.82.01", or ""."""
    ask = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
        name, driver = told.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return ""
    return f"{name} with driver {driver}"


def now() -> float:
    """Seconds of a clock, read when the GPU has done what it was given, which runs beside Python.

    >>> now() <= now()
    True
    """
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def choose_preset() -> tuple[str, str]:
    """The preset for this machine, and why, for printing; imports torch."""
    import torch

    if why := obstacle():
        return "pocket", why
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    seen = f"{torch.cuda.get_device_name(0)} has {gib:.1f} GiB"
    if gib >= 14:
        return "24gb" if gib >= 21 else "t4", seen  # a "24 GB" card reports 22 GiB or more
    return "pocket", f"{seen}, less than the 14 GiB that preset t4 wants"

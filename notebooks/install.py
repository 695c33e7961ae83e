"""What the setup cell runs where the kit is missing: pip installs it, and it is said what changed.

A hosted notebook has loaded torch, numpy and pillow before its first cell: they stay as they are
where the kit's pins allow that. The standard library alone, since nothing is installed yet.
"""

import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADED = ("torch", "numpy", "pillow")


def installed() -> dict[str, str]:
    """Versions by name, names as pip writes them; of two, the one that is imported."""
    importlib.invalidate_caches()
    found = [(str(d.name), d.version) for d in metadata.distributions() if d.name]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in reversed(found)}


def kept(here: Mapping[str, str], pins: Iterable[str]) -> list[str]:
    """What pip is asked to leave: it is here, and no pin wants another version.

    >>> here = {"torch": "2.13.0+cu126", "numpy": "2.5.0"}
    >>> kept(here, ["torch==2.13.0"]), kept(here, ["torch==2.14.0"])
    (['torch==2.13.0+cu126', 'numpy==2.5.0'], ['numpy==2.5.0'])
    """
    wanted = dict(pin.split("==") for pin in pins if "==" in pin)
    same = {name: here[name].split("+")[0] for name in LOADED if name in here}
    return [f"{name}=={here[name]}" for name in same if wanted.get(name, same[name]) == same[name]]


def main() -> None:
    """Install the kit into the Python that runs this; ends with pip's own words if it fails."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    before = installed()
    words = [sys.executable, "-m", "pip", "install", "-q", "-e", str(ROOT), *kept(before, pins)]
    pip = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if pip.returncode:
        raise SystemExit(f"pip could not install the kit:\n{pip.stdout[-2000:]}")
    after = installed()
    for name, old in before.items():
        if after.get(name, old) != old:
            print(name, old, "->", after[name])
    print("new:", ", ".join(sorted({*after} - {*before})) or "nothing")
    if any(name in sys.modules and before.get(name) != after.get(name) for name in LOADED):
        print("Restart the runtime now, and run this cell again.")
    sys.path.insert(0, str(ROOT))


if __name__ == "__main__":
    main()

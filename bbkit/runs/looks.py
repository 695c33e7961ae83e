"""Colours and lines of capabilities, the same in every figure.

Serves no claim. All are Okabe and Ito's, safe for the colour-blind; the kit's rewards keep theirs,
a user's take what is left.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from bbkit.machine import functions
from bbkit.machine.files import read_json

COLORS = {
    "domain": "#0072B2",
    "reasoning": "#D55E00",
    "format": "#CC79A7",
    "instruction": "#009E73",
    "retention": "#E69F00",
}
# For own rewards, in this order, the others of Okabe and Ito that no reward beside them has, then
# the same in other lines. Green and orange come late: instructions and retention have them.
FURTHER = ("#56B4E9", "#F0E442", "#E69F00", "#000000", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
LINES = ("-", "--", ":", "-.")


def looks(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and line of each reward among these, as matplotlib takes them.

    >>> looks(["domain", "brevity"])["brevity"]
    {'color': '#56B4E9', 'ls': '-'}
    """
    free = [c for c in FURTHER if all(COLORS.get(name) != c for name in names)]
    own = cycle((color, line) for line in LINES for color in free)
    chosen = {name: (COLORS[name], "-") if name in COLORS else next(own) for name in names}
    return {name: {"color": color, "ls": line} for name, (color, line) in chosen.items()}


def rewards_of(folder: Path) -> tuple[str, ...]:
    """Names of a run's rewards; the kit's three where nothing says so, as in notebook 02."""
    path = folder / "run.json"
    grpo = read_json(path)["settings"].get("grpo", {}) if path.exists() else {}
    return functions.names(grpo.get("rewards", functions.REWARDS))


def color(name: str) -> str:
    """The colour of the kit's capabilities and of measures of them; grey for any other.

    >>> color("instruction_unseen") == color("instruction")
    True
    """
    return COLORS.get(name, COLORS.get(name.split("_")[0], "#555555"))

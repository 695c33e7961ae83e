"""Signs of a run that goes wrong, read off its metrics, each with what to do about it.

Said in the terminal when they come up and in the report. A loss or gradient that is not finite is
no sign: it ends the run (bbkit.runs.callback).
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean, median
from typing import Any

WINDOW = 10  # logged steps that a sign looks at
REWARD = "reward/"
PAIR = ("format", "domain")


def signs(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the last steps of one stage show, {name: line}; rows as in metrics.jsonl.

    >>> rows = [{"step": i, "completions/clipped_ratio": 0.75} for i in range(10)]
    >>> list(signs(rows))
    ['cut replies']
    """
    last = rows[-WINDOW:]
    if len(last) < WINDOW:
        return {}
    found = {}
    names = sorted(key.removeprefix(REWARD) for key in {*chain(*last)} if key.startswith(REWARD))
    for name in names:
        if _of(last, REWARD + name) == [0] * WINDOW:
            found[f"no {name}"] = (
                f"reward {name} has been 0 for {WINDOW} steps, so nothing is learned from it: more "
                "SFT steps, easier questions or a higher grpo.temperature give it a start"
            )
    if (share := _mean(last, "frac_reward_zero_std")) > 0.8:
        found["no signal"] = (
            f"{share:.0%} of the groups have replies of equal reward and teach nothing: raise "
            "grpo.generations or grpo.temperature, or take other questions"
        )
    if (share := _mean(last, "completions/clipped_ratio")) > 0.5:
        found["cut replies"] = (
            f"{share:.0%} of the replies are cut before their end: raise grpo.max_completion_length"
        )
    if len(rows) >= 2 * WINDOW:
        first = rows[:WINDOW]
        rises = {k: _mean(last, REWARD + k) - _mean(first, REWARD + k) for k in names}
        rise, fall = (rises.get(k, 0.0) for k in PAIR)
        if rise > 0.1 and fall < -0.05:
            found["format for domain"] = (
                f"reward format rose by {rise:.2f} while domain fell by {-fall:.2f}: lower "
                "grpo.weights.format, or let grpo.controller.rule=deficit move the weights"
            )
        kept, made = (_of(last, f"retention/slope{end}") for end in ("_kept", ""))
        bound = sum(a < b for a, b in zip(kept, made, strict=True)) / WINDOW  # the cone's never is
        if names and bound > 0.8 and max(rises.values()) < 0.02:
            found["budget binds"] = (
                f"retention cut {bound:.0%} of the steps while no reward rises: raise "
                "retention.budget, or a lower learning rate needs less of it"
            )
    now, norms = last[-1].get("grad_norm") or 0, _of(rows[:-1], "grad_norm")
    if norms and now > 20 * median(norms) > 0:
        found["gradient jump"] = (
            f"gradient norm {now:.3g}, {now / median(norms):.0f} times its median: if it stays, "
            "lower the learning rate or max_grad_norm"
        )
    return found


def over(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every sign of a whole run, once, with stage and step at which it first came up."""
    lines: dict[tuple[str, str], str] = {}
    stages: dict[str, list] = {}
    for row in rows:
        own = stages.setdefault(row["stage"], [])
        own.append(row)
        for name, line in signs(own).items():
            lines.setdefault((row["stage"], name), f"{row['stage']} step {row['step']}: {line}")
    return list(lines.values())


def _of(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    values = _of(rows, key)
    return fmean(values) if values else 0.0

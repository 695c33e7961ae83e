"""What a run would do, how long it takes and whether it fits, said before anything is loaded.

Serves no claim: `python -m bbkit.train --dry-run`.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from bbkit import config, rewards
from bbkit.config import Settings
from bbkit.machine import loading


def show(
    preset: str, settings: Settings, stages: Sequence[str], offline: bool, card: float | None
) -> int:
    """Print the resolved settings, what the run would do, how long, and whether it fits."""
    import torch

    from bbkit.machine import memory, minutes

    if "grpo" in stages:
        rewards.chosen(settings.grpo.rewards)  # a user's own must be there
    print(yaml.safe_dump(config.to_dict(settings), sort_keys=False, width=100))
    if card:  # of another machine: what its GPU computes in is not known here
        name = settings.model.dtype
        dtype, kind = getattr(torch, "bfloat16" if name == "auto" else name), "cuda"
        room = int(card * 1e9)
    else:
        dtype, device = loading.choose_dtype(settings.model, say=lambda line: None)
        kind, room = device.type, memory.free_bytes(device)
    planned = memory.plan(settings, dtype, kind, offline)
    need = {stage: parts for stage, parts in planned.items() if stage in stages} or planned
    s, g = settings.sft, settings.grpo
    if "sft" in stages:
        print(f"sft   {s.steps} steps of {s.batch_size} sequences")
    if "grpo" in stages:
        tokens = g.steps * g.prompts * g.generations * g.max_completion_length
        shape = f"{g.prompts} prompts x {g.generations} completions"
        print(f"grpo  {g.steps} steps of {shape}, at most {tokens:,} new tokens")
    print(minutes.said(preset, minutes.estimate(preset, settings, stages)))
    for stage, parts in need.items():
        *rest, (_, peak) = parts.items()
        split = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in rest)
        print(f"memory {stage}: {peak / 1e9:.2f} GB at most ({split})")
    most, where = max(parts["peak"] for parts in need.values()), "card" if card else "free here"
    if most <= room:
        print(f"fits: {most / 1e9:.1f} of {room / 1e9:.1f} GB {where}")
        return 0
    changes = mend(settings, dtype, room, kind, offline)
    advice = " ".join(f"--set {change}" for change in changes) or "take a smaller model"
    print(f"does not fit: {most / 1e9:.1f} of {room / 1e9:.1f} GB {where}; {advice}")
    return 0


def mend(
    settings: Settings, dtype: Any, room: int, kind: str = "cpu", offline: bool = False
) -> list[str]:
    """Settings that make the plan fit into `room` bytes, the cheapest first; [] if none do."""
    from bbkit.machine import memory

    flat, said = config.leaves(config.to_dict(settings)), []
    for key, value in (
        ("model.quantization", "nf4"),
        ("model.gradient_checkpointing", True),
        ("sft.micro_batch_size", 1),
        ("grpo.micro_batch_size", settings.grpo.generations),
        ("sft.optimizer", "adamw_8bit"),
        ("grpo.optimizer", "adamw_8bit"),
        ("grpo.prompts", 4),
    ):
        if flat[key] == value or (type(value) is int and flat[key] < value):
            continue
        flat[key] = value
        said.append(f"{key}={str(value).lower()}")
        changed = memory.plan(config.from_dict(flat), dtype, kind, offline)
        if max(stage["peak"] for stage in changed.values()) <= room:
            return said
    return []

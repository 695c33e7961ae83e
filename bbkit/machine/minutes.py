"""How long a run takes on a CPU, from runs that were recorded: said before it starts.

Serves no claim. Seconds grow with the sequences of a stage and with the tokens that an evaluation
may write; another machine, longer texts or other work on this one change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bbkit.config import Settings


@dataclass(frozen=True)
class Pace:
    """Seconds of one sequence of SFT, of one completion of GRPO (drawn, scored, trained on), of one
    token that a held-out reply may take; the prompts held out where the settings take all; the
    machine, as the estimate names it; and how many times as long SFT and GRPO take with the
    preset's retention, once the base has replied."""

    sft: float
    grpo: float
    token: float
    held_out: int
    machine: str
    kept: tuple[float, float]


# pocket: 2 hyperthreads of a Xeon at 2.1 GHz, float32 (commit f603c8e); smollm2-cpu: one core of an
# EPYC, another run beside it (9657c7f), means of two seeds. With retention: by `bbkit.benchmark
# --retention`, but smollm2-cpu's GRPO, to which the seconds that it adds to SFT were added.
RECORDED = {
    "pocket": Pace(
        49.2 / (120 * 32), 378 / (60 * 256), 5.1 / (586 * 48), 586, "2 idle cores", (1.77, 1.09)
    ),
    "smollm2-cpu": Pace(
        1490 / (96 * 8), 1890 / (16 * 32), 1530 / (2155 * 128 + 541 * 256), 800,
        "one core that computes in bfloat16", (1.60, 1.08),
    ),
}  # fmt: skip


def estimate(preset: str | None, settings: Settings, stages: Sequence[str]) -> dict[str, float]:
    """Minutes of each stage, {} for a preset of which no run is recorded.

    >>> from bbkit import config
    >>> {k: round(v, 1) for k, v in estimate("pocket", config.load("pocket"), ["sft"]).items()}
    {'sft': 1.5}
    """
    pace = RECORDED.get(preset or "")
    if not pace:
        return {}
    s, g, e = settings.sft, settings.grpo, settings.evaluation
    asked = e.questions + e.instructions if e.questions and e.instructions else pace.held_out
    tokens = asked * e.max_new_tokens + e.ifeval * e.ifeval_tokens
    seconds = {
        "sft": s.steps * s.batch_size * pace.sft,
        "grpo": g.steps * g.prompts * g.generations * pace.grpo,
        "evaluate": (1 + bool(s.steps) + bool(g.steps)) * pace.token * tokens,
    }
    for stage, ratio in zip(("sft", "grpo"), pace.kept, strict=True):
        if settings.retention.rule != "none" and stage in settings.retention.stages:
            seconds[stage] *= ratio
    return {stage: value / 60 for stage, value in seconds.items() if stage in stages}


def said(preset: str | None, minutes: dict[str, float]) -> str:
    """The estimate as a line.

    >>> said("smollm2-cpu", {"sft": 25.0})
    'minutes: about 25 on one core that computes in bfloat16 (sft 25.0)'
    >>> said("pocket", {"sft": 0.2}).startswith("minutes: about 1 on")
    True
    """
    if not minutes or not preset:
        return f"minutes: not known, no run of preset {preset} is recorded"
    parts = ", ".join(f"{stage} {value:.1f}" for stage, value in minutes.items())
    whole = f"about {max(1, round(sum(minutes.values())))} on {RECORDED[preset].machine}"
    return f"minutes: {whole} ({parts})"

"""The claims of the paper and ours, and the verdict on each by its rule, from a recorded study.

Serves every claim: rule, contrasts and the sides they are claimed to lie on were committed before
the runs they judge. bbkit.study.comparison writes the ledger into README.md and the recorded page.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bbkit.runs import report
from bbkit.study import effects

MARGIN = 0.02  # a difference that does not matter
NEAR = (0.9, 1.1)  # a ratio that does not matter
JUDGED = ("compared", "effect", "seeds", "verdict")  # columns of a ledger


def ratio_cell(ratio: Mapping[str, Any] | None) -> str:
    """A ratio with its interval; empty for None.

    >>> ratio_cell({"value": 0.9, "interval": [0.8, 1.0]})
    '0.90 [0.80, 1.00]'
    """
    if not ratio:
        return ""
    low, high = ratio["interval"]
    return f"{ratio['value']:.2f} [{low:.2f}, {high:.2f}]"


def verdict(measure: Mapping[str, Any] | None, sign: int, none: float = 0.0) -> str:
    """The rule for an effect which is claimed to lie above (`sign` 1) or below `none`.

    *reproduced*: the 95 % interval lies on the claimed side. *not reproduced*: it lies on the other
    side, or where no difference matters (a ratio, `none` 1: 0.9 to 1.1; else within 2 points).
    `sign` 0, claimed to cost nothing: above, or below, 2 points lower.

    >>> verdict({"value": 1.0, "interval": [0.95, 1.05]}, -1, none=1.0)
    'not reproduced'
    """
    if not measure:
        return "not attempted"
    low, high = measure["interval"]
    above, below = (low > none, high < none) if sign else (low > -MARGIN, high < -MARGIN)
    claimed, other = (below, above) if sign < 0 else (above, below)
    least, most = NEAR if none else (-MARGIN, MARGIN)
    if claimed:
        return "reproduced"
    near = sign != 0 and least <= low <= high <= most
    return "not reproduced" if other or near else "inconclusive"


# (claim, before, after, measure, the side on which its effect is claimed to lie; 0: costs nothing)
CLAIMS = (
    ("aligning to biomedicine costs instruction following", "base", "sft", "general", -1),
    ("GRPO with the three rewards gives it back", "sft", "grpo", "general", 1),
    ("GRPO raises domain accuracy above SFT", "sft", "grpo", "domain", 1),
    ("a dynamic hybrid reward beats a static one", "static", "dynamic", "worse", 1),
    ("the same, by hypervolume", "static", "dynamic", "hypervolume", 1),
    ("orthogonality with retention forgets less", "dynamic", "full", "general", 1),
    ("the same, at equal KL to the base", "dynamic", "full", "equal_kl", 1),
    ("orthogonality alone forgets less", "dynamic", "orthogonal", "general", 1),
    ("the whole method raises domain accuracy", "base", "full", "domain_lenient", 1),
    ("that costs no instruction following", "base", "full", "general", 0),
    ("the whole method beats plain GRPO", "grpo", "full", "hypervolume", 1),
    ("it beats GDPO", "gdpo", "full", "hypervolume", 1),
    ("it beats weight averaging", "averaging", "full", "hypervolume", 1),
    ("orthogonality beats random coefficients", "random", "orthogonal", "hypervolume", 1),
    ("PCGrad forgets less", "dynamic", "pcgrad", "general", 1),
    ("UPGrad forgets less", "dynamic", "upgrad", "general", 1),
    ("Aligned-MTL forgets less", "dynamic", "aligned_mtl", "general", 1),
    # committed when one of these nine runs had ended, pcgrad_retention-3; its score was unread
    ("PCGrad with retention forgets less", "dynamic", "pcgrad_retention", "general", 1),
    ("UPGrad with retention forgets less", "dynamic", "upgrad_retention", "general", 1),
    ("Aligned-MTL with retention forgets less", "dynamic", "aligned_mtl_retention", "general", 1),
    ("weights by variance beat static ones", "static", "variance", "hypervolume", 1),
    ("weights by covariance beat static ones", "static", "covariance", "hypervolume", 1),
    ("weights by agreement beat static ones", "static", "agreement", "hypervolume", 1),
    ("rewards by rules and a model beat rules alone", "grpo", "judged", "domain", 1),
    ("questions of two hops teach more than single facts", "plain", "grpo", "domain", 1),
)
# Those that the abstract makes itself: README's table.
MAIN = (
    "aligning to biomedicine costs instruction following",
    "GRPO with the three rewards gives it back",
    "a dynamic hybrid reward beats a static one",
    "orthogonality with retention forgets less",
    "the whole method raises domain accuracy",
    "that costs no instruction following",
    "the whole method beats plain GRPO",
    "capability-aware GRPO has less gradient variance",
)
LATER = 3  # pocket's seeds from this one on ran after all of MAIN had been committed (b346429)
# Why nothing beats plain GRPO on pocket, each with the change that would then help; written down
# before any of these arms had run.
HYPOTHESES = (
    ("Adam steps off the cone's sum: its inner product helps", "full", "full_adam",
     "hypervolume", 1),
    ("60 steps are too few for a rate of 0.1: ten times it helps", "dynamic", "dynamic_fast",
     "hypervolume", 1),
    ("the floor of 0.1 throws away what nearly settled rewards say: 0.01 helps", "static",
     "static_unfloored", "hypervolume", 1),
)  # fmt: skip


def claims(kept: Mapping[str, Any]) -> str:
    """The ledger as Markdown: each claim, what was compared, effect, seeds, verdict by the rule."""
    lines = judged_rows(kept, CLAIMS)
    for claim, compared, ratio in (
        ("capability-aware GRPO has less gradient variance", "noise to signal: full / grpo",
         effects.noise_ratio(kept, "full")),
        ("the more so where entropy is high", "that ratio: high / low entropy",
         effects.noise_by_entropy(kept, "full")),
    ):  # fmt: skip
        n = str(ratio["n"]) if ratio else ""
        lines.append([claim, compared, ratio_cell(ratio), n, verdict(ratio, -1, 1.0)])
    return report.markdown(["claim", *JUDGED], lines)


def attempted(kept: Mapping[str, Any], ledger: Callable[[Mapping], str] = claims) -> str:
    """The ledger without the claims of which the record has no arms; empty without any."""
    lines = [line for line in ledger(kept).splitlines() if "not attempted" not in line]
    return "\n".join(lines) if len(lines) > 2 else ""


def main_claims(kept: Mapping[str, Any], since: int = 0) -> str:
    """The ledger's lines of the claims in MAIN, on the seeds from `since` on."""
    runs = {n: run for n, run in kept["runs"].items() if int(n.rpartition("-")[2]) >= since}
    head, rule, *lines = claims({**kept, "runs": runs}).splitlines()
    return "\n".join([head, rule, *(x for x in lines if x[2:].partition(" |")[0] in MAIN)])


def hypotheses(kept: Mapping[str, Any]) -> str:
    """HYPOTHESES as Markdown, with the verdicts of the same rule."""
    return report.markdown(["hypothesis", *JUDGED], judged_rows(kept, HYPOTHESES))


def judged_rows(kept: Mapping[str, Any], rows: Iterable[tuple]) -> list[list[str]]:
    """What is said, and JUDGED: what was compared, its effect, seeds, verdict by the rule."""
    found = effects.arms(kept)
    per_nat, lines = effects.slope(found), []
    for said, before, after, name, sign in rows:
        known, seeds = effects.change(found, before, after, per_nat)
        seen = effects.told(known[name]) if name in known else None
        judged = verdict(seen, sign)
        if before == "dynamic" and judged == "reproduced" and known["domain"][0] < -MARGIN:
            judged = "inconclusive"  # forgetting less by learning less
        effect, count = report.change_cell(seen), str(seeds) if seen else ""
        lines.append([said, f"{effects.NAMES[name]}: {after} − {before}", effect, count, judged])
    return lines

"""Whether the decisive study's intervals cover, and how often its verdicts would be wrong.

Serves every claim: `python -m bbkit.study.simulation RECORD` simulates studies whose truth is known
with the spreads that a record shows, those between prompts, between seeds and of what is left over.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bbkit import InputError, exit_code
from bbkit.runs import report, statistics
from bbkit.study import effects, recorded, verdicts
from bbkit.study.verdicts import FAMILIES, LEVEL, MARGIN, NATS

SEEDS = (3, 6, 12, 20)


def spreads(found: Mapping, before: str, after: str, name: str) -> tuple[int, list[float]]:
    """Clusters, and the variances of seeds, clusters and the rest in a contrast of two arms."""
    rows = [found[arm] for arm in (before, after)]
    seeds = sorted(rows[0].keys() & rows[1].keys())
    cells = [[effects.by_cluster(effects.last(r[s]))[name] for s in seeds] for r in rows]
    one, other = (np.array([[c[k] for k in some[0]] for c in some]) for some in cells)
    table = other[..., 0] / other[..., 1] - one[..., 0] / one[..., 1]
    runs, clusters = table.shape
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    rest = float((left**2).sum() / ((runs - 1) * (clusters - 1)))
    seen, asked = table.mean(1).var(ddof=1), table.mean(0).var(ddof=1)
    return clusters, [max(0.0, seen - rest / clusters), max(0.0, asked - rest / runs), rest]


def coverage(seeds: int, clusters: int, spread: Sequence[float], count: int = 400) -> list[float]:
    """Share of simulated studies whose 95 % interval has the truth: the bootstrap over seeds and
    prompts, Student's over seeds for the prompts that were asked, and for such prompts."""
    rng, hits = np.random.default_rng(0), np.zeros(3)
    of_seeds, of_prompts, rest = np.sqrt(spread)
    for _ in range(count):
        prompts = rng.normal(0, of_prompts, clusters)
        table = rng.normal(0, of_seeds, (seeds, 1)) + prompts
        table = table + rng.normal(0, rest, (seeds, clusters))
        drawn = statistics.crossed(np.stack([table, np.ones_like(table)], 2), 400)
        low, high = np.percentile(drawn[1:], [2.5, 97.5])
        least, most = verdicts.paired(table.mean(1).tolist())["interval"]
        hits += low <= 0 <= high, least <= prompts.mean() <= most, least <= 0 <= most
    return (hits / count).tolist()


def wrong(some: Sequence[Sequence[float]], seeds: int, count: int = 1000) -> list[float]:
    """Share of studies in which a family says something wrong, its contrasts spread as in `some`.

    `some` holds each contrast's differences, seed by seed. First: nothing differs, and one is told
    to; then: all differ by the margin, and one is told not to; then: every other one does, and
    either is told wrongly of one.
    """
    rng, kinds, hits = np.random.default_rng(0), np.cov(some), np.zeros(3)
    none, all_ = np.zeros(len(some)), np.ones(len(some))
    for _ in range(count):
        drawn = rng.multivariate_normal(none, kinds, seeds).T
        for i, differs in enumerate((none, all_, np.arange(len(some)) % 2)):
            tests = [verdicts.paired(row.tolist()) for row in drawn + MARGIN * differs[:, None]]
            hits[i] += _any(tests, "p", differs == 0) or _any(tests, "p_none", differs == 1)
    return (hits / count).tolist()


def _any(tests: Sequence[Mapping[str, Any]], name: str, among: Sequence[bool]) -> bool:
    """Whether, adjusted over all of them, a p-value of one `among` the tests passes."""
    adjusted = statistics.holm({i: test[name] for i, test in enumerate(tests)})
    return any(adjusted[i] < LEVEL for i, counts in enumerate(among) if counts)


def wrongly_untaxed(found: Mapping, seeds: int, count: int = 1000) -> float:
    """Share of studies in which an arm that loses a margin of `general`, and nothing elsewhere, is
    said to have no tax: the worst case of two tests that must both hold."""
    arms = [arm for arm in verdicts.UNTAXED[0] if len(found.get(arm, {})) > 2]
    both = [verdicts.differences(found, "base", arm, m) for m in ("general", "elsewhere")
            for arm in arms]  # fmt: skip
    rng, hits, least = np.random.default_rng(0), 0, min(map(len, both))
    kinds = np.cov([some[:least] for some in both])  # seeds come in order
    for _ in range(count):
        drawn = rng.multivariate_normal(np.zeros(len(kinds)), kinds, seeds).T
        lost, gone = drawn[: len(arms)] + MARGIN, drawn[len(arms) :]
        tests = [
            {"p": max(verdicts.paired(a)["p_below"], verdicts.paired(b, NATS)["p_below"])}
            for a, b in zip(lost.tolist(), gone.tolist(), strict=True)
        ]
        hits += _any(tests, "p", [True] * len(tests))
    return hits / count


def decided(spread: float, seeds: int, contrasts: int = 9, count: int = 1000) -> list[float]:
    """Share of studies in which the first of a family's contrasts, whose seeds differ by `spread`,
    is told apart where it differs by the margin, and told not to differ where it does not."""
    drawn = np.random.default_rng(0).normal(0, spread, (count, seeds))
    apart = [verdicts.paired(row)["p"] < LEVEL / contrasts for row in (drawn + MARGIN).tolist()]
    none = [verdicts.paired(row)["p_none"] < LEVEL / contrasts for row in drawn.tolist()]
    return [sum(apart) / count, sum(none) / count]


def page(kept: Mapping[str, Any]) -> str:
    """The tables as Markdown, of the contrasts that the record has seeds of."""
    found, lines, families = effects.by_arm(kept), [], []
    for family, contrasts in FAMILIES.items():
        known = [c for c in contrasts if "base" not in (c.before, c.after)]
        known = [c for c in known if len(found.get(c.before, {}).keys() & found.get(c.after, {}))
                 > 2 and c.measure == "area"]  # fmt: skip
        for c in known:
            for name in ("instruction_unseen", "domain_lenient"):
                size, spread = spreads(found, c.before, c.after, name)
                shares = [coverage(n, size, spread) for n in SEEDS]
                cells = [" / ".join(f"{100 * share:.0f}" for share in row) for row in shares]
                lines.append([f"{name}: {c.after} − {c.before}", *cells])
        if known:
            some = [verdicts.differences(found, *c[1:]) for c in known]
            some = [row for row in some if len(row) == max(map(len, some))]
            cells = [" / ".join(f"{100 * x:.1f}" for x in wrong(some, n)) for n in SEEDS[1:]]
            families.append([family, str(len(some)), *cells])
    cells = [f"{100 * wrongly_untaxed(found, n):.1f}" for n in SEEDS[1:]]
    families.append(["no tax", "", *cells])
    power = [
        [f"{100 * spread:.0f} points",
         *(" / ".join(f"{100 * x:.0f}" for x in decided(spread, n)) for n in SEEDS)]
        for spread in (0.02, 0.03, 0.04)
    ]  # fmt: skip
    seeds = [f"{n} seeds" for n in SEEDS]
    return "\n\n".join((
        report.markdown(["covers, %: bootstrap / Student, these prompts / others", *seeds], lines),
        report.markdown(["wrong, %: differs / none / either", "contrasts", *seeds[1:]], families),
        report.markdown(["decided, %, first of 9: 3 points / none; spread", *seeds], power),
    ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print how far intervals and verdicts can be trusted at a record's spreads."""
    p = argparse.ArgumentParser(prog="python -m bbkit.study.simulation", description=main.__doc__)
    p.add_argument("record", type=Path, metavar="RECORD", help="JSON of bbkit.study")
    args = p.parse_args(argv)
    return exit_code(lambda: _main(args.record))


def _main(path: Path) -> int:
    kept = recorded.read(path)
    if "sft" not in effects.by_arm(kept):
        raise InputError(f"{path}: no run sft-SEED in it; record a study of bbkit.study")
    print(page(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())

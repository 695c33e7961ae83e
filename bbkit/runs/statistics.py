"""Intervals, paired tests and fronts: what a figure of an evaluation is worth.

Serves every claim. The formulas are scipy's where it has them; tests hold them against published
values. The paper reports figures without intervals or tests: all of this is our choice.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

import numpy as np


def interval(
    values: Sequence[float], clusters: Sequence[str], draws: int, shares: bool = True
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, resampling whole clusters.

    `shares` whose values are 0 or 1, each a cluster of its own, get Wilson's score interval
    (scipy): the bootstrap of a share of 0 or 1 has no width.

    >>> low, high = interval([1.0] * 50, [str(i) for i in range(50)], 100)
    >>> round(low, 3), high
    (0.929, 1.0)
    """
    if shares and len(set(clusters)) == len(values) and set(values) <= {0.0, 1.0}:
        return wilson(round(sum(values)), len(values))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster][0] += value
        sums[cluster][1] += 1
    table = np.array(list(sums.values()))  # (clusters, [sum, count])
    rng = np.random.default_rng(0)
    picked = table[rng.integers(0, len(table), (draws, len(table)))].sum(axis=1)
    low, high = np.percentile(picked[:, 0] / picked[:, 1], [2.5, 97.5])
    return float(low), float(high)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Newcombe 1998, method 3).

    >>> [round(x, 4) for x in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    from scipy.stats import binomtest

    found = binomtest(hits, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """McNemar's exact test of two models on the same items: {"gained", "lost", "p"}.

    `gained` items are right only after, `lost` ones only before; p is two-sided and 1 without any.

    >>> mcnemar([True, False, False], [True, True, False])
    {'gained': 1, 'lost': 0, 'p': 1.0}
    """
    from scipy.stats import binomtest

    pairs = list(zip(before, after, strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p": float(p)}


def holm(values: Mapping[Any, float]) -> dict[Any, float]:
    """p-values of one family adjusted by Holm's step-down method, under their own keys.

    >>> {k: round(p, 3) for k, p in holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}).items()}
    {'a': 0.03, 'b': 0.06, 'c': 0.06, 'd': 0.02}
    """
    found, least = {}, 0.0
    for i, key in enumerate(sorted(values, key=lambda key: values[key])):
        found[key] = least = max(least, min(1.0, (len(values) - i) * values[key]))
    return {key: found[key] for key in values}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with Student's 95 % interval: {"value", "n", "interval"}; None under two.

    Seeds are the units here: how another run of the same recipe would come out, which an interval
    over the items of a single run does not tell.

    >>> round(over_seeds([1.0, 2.0, 3.0])["interval"][0], 3)
    -0.484
    """
    from scipy import stats

    found: dict[str, Any] = {"value": fmean(values), "n": len(values), "interval": None}
    if len(values) > 1:
        half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
        found["interval"] = [found["value"] - half, found["value"] + half]
    return found


@lru_cache(maxsize=32)
def _often(runs: int, clusters: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each run, and each cluster, is drawn: two thirds of what a table of arms takes."""
    rng = np.random.default_rng(0)
    one, other = (rng.multinomial(n, [1 / n] * n, draws).astype(float) for n in (runs, clusters))
    return one, other


def crossed(table: np.ndarray, draws: int) -> np.ndarray:
    """A mean over runs crossed with clusters, followed by `draws` resamples of both.

    `table` (runs, clusters, 2) holds the sum and the count of the values in each cell. Runs and
    clusters are drawn with replacement, apart from each other (pigeonhole bootstrap, Owen 2007):
    the percentiles are an interval over both. Equal shapes draw alike, so that two results pair.

    >>> crossed(np.array([[[1.0, 1.0], [0.0, 1.0]]]), 4)
    array([0.5, 0.5, 0.5, 0. , 0. ])
    """
    runs, clusters, _ = table.shape
    often, those = _often(runs, clusters, draws)
    picked = (those @ table.swapaxes(0, 1).reshape(clusters, -1)).reshape(draws, runs, 2)
    sums = (often[:, :, None] * picked).sum(axis=1)
    value = table[:, :, 0].sum() / table[:, :, 1].sum()
    return np.concatenate([[value], sums[:, 0] / sums[:, 1]])


def hypervolume(points: Iterable[tuple[float, float]]) -> float:
    """Area that points (both axes to be raised) dominate above (0, 0).

    >>> hypervolume([(1, 3), (2, 2), (3, 1), (1, 1)])
    6.0
    """
    area = height = 0.0
    for x, y in sorted(points, reverse=True):
        if y > height:
            area += max(x, 0.0) * (y - height)
            height = y
    return area

"""Intervals and tests against published or hand-counted values."""

import math

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from bbkit.runs import statistics


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(hits, n, low, high):
    """Newcombe, Stat Med 17 (1998) 857, table I, method 3."""
    assert statistics.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_mcnemar_is_exact():
    """10 lost and 2 gained: p = 2 (1 + 12 + 66) / 2^12."""
    before = [True] * 10 + [False] * 2 + [True] * 30 + [False] * 5
    after = [False] * 10 + [True] * 2 + [True] * 30 + [False] * 5
    found = statistics.mcnemar(before, after)
    assert (found["gained"], found["lost"]) == (2, 10)
    assert found["p"] == pytest.approx(2 * 79 / 4096)
    assert statistics.mcnemar([True, False], [True, False])["p"] == 1.0


def test_holm_steps_down_and_keeps_the_order():
    found = statistics.holm({"x": 0.04, "y": 0.011, "z": 0.02})
    assert found == pytest.approx({"x": 0.04, "y": 0.033, "z": 0.04})
    assert statistics.holm({}) == {}


def test_both_are_statsmodels():
    rng = np.random.default_rng(0)
    for count in (1, 5, 30):
        some = rng.random(count) ** 3
        theirs = multipletests(some, method="holm")[1]
        ours = statistics.holm(dict(enumerate(some)))
        assert list(ours) == list(range(count))
        assert list(ours.values()) == pytest.approx(list(theirs))
        before, after = rng.random((2, count)) < 0.5
        table = [[sum(a & b for a, b in zip(x, y, strict=True)) for y in (after, ~after)]
                 for x in (before, ~before)]  # fmt: skip
        found = statistics.mcnemar(list(before), list(after))["p"]
        assert found == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_over_seeds_is_students():
    """t(0.975, 4) = 2.776; values with mean 10 and standard deviation 1.5811."""
    found = statistics.over_seeds([8, 9, 10, 11, 12])
    half = 2.776 * math.sqrt(2.5 / 5)
    assert found["interval"] == pytest.approx([10 - half, 10 + half], abs=1e-3)
    assert statistics.over_seeds([3.0])["interval"] is None


def test_hypervolume_counts_what_is_dominated_once():
    assert statistics.hypervolume([(2, 2), (1, 1), (2, 2)]) == 4
    assert statistics.hypervolume([(-1, 3), (3, -1)]) == 0
    assert statistics.hypervolume([]) == 0
    front = [(0.1 * i, 1 - 0.1 * i) for i in range(11)]
    assert statistics.hypervolume(front) == pytest.approx(0.45)

"""Each sign of a run that goes wrong, and none for one that goes well."""

import json

import pytest

from bbkit.runs import health

GOOD = {"reward/domain": 0.5, "reward/format": 0.7, "frac_reward_zero_std": 0.3,
        "completions/clipped_ratio": 0.1, "grad_norm": 0.5}  # fmt: skip


def test_a_budget_that_binds_while_rewards_rise_is_no_sign():
    kept = {"retention/slope": 0.4, "retention/slope_kept": 0.1}
    assert health.signs(rows(**kept, **{"reward/domain": lambda s: s / 40})) == {}
    kept["retention/slope_kept"] = lambda s: 0.4 - 0.1 * (s % 2)
    assert health.signs(rows(**kept)) == {}


def rows(count: int = 20, **changes) -> list[dict]:
    """Steps of a good run; a change is a value, or a function of the step."""
    made = []
    for step in range(1, count + 1):
        row = GOOD | {k: v(step) if callable(v) else v for k, v in changes.items()}
        made.append({"stage": "grpo", "step": step, **row})
    return made


def test_a_good_run_shows_nothing():
    assert health.signs(rows()) == {} and health.over(rows()) == []
    assert health.signs([]) == {} and health.signs(rows(9, **{"reward/domain": 0.0})) == {}


@pytest.mark.parametrize(
    ("changes", "name", "mend"),
    [
        ({"reward/domain": 0.0}, "no domain", "grpo.temperature"),
        ({"frac_reward_zero_std": 0.9}, "no signal", "grpo.generations"),
        ({"completions/clipped_ratio": 0.6}, "cut replies", "grpo.max_completion_length"),
        (
            {"reward/format": lambda s: s / 20, "reward/domain": lambda s: 0.8 - s / 40},
            "format for domain",
            "grpo.weights.format",
        ),
        (
            {
                "retention/slope": 0.4,
                "retention/slope_kept": 0.1,
                "reward/domain": lambda s: 0.5,
                "reward/format": 0.7,
            },
            "budget binds",
            "retention.budget",
        ),
        ({"grad_norm": lambda s: 50.0 if s == 20 else 0.5}, "gradient jump", "learning rate"),
    ],
)
def test_each_sign_is_named_with_its_mend(changes, name, mend):
    found = health.signs(rows(**changes))
    assert list(found) == [name] and mend in found[name]


def test_a_reward_that_is_earned_once_is_not_stuck():
    assert health.signs(rows(**{"reward/domain": lambda s: float(s == 15)})) == {}


def test_a_budget_binds_without_harm_where_nothing_is_rewarded_or_for_the_cone():
    kept = {"retention/slope": 0.4, "retention/slope_kept": 0.1}
    sft = [{"stage": "sft", "step": s, "loss": 1.0, **kept} for s in range(1, 31)]
    assert health.signs(sft) == {}
    cone = {"retention/slope": 0.4, "retention/slope_kept": 0.4, "retention/cut": 0.2}
    assert health.signs(rows(**cone, **{"reward/domain": 0.5, "reward/format": 0.7})) == {}


def test_a_sign_is_told_once_at_its_first_step():
    found = health.over(rows(40, **{"frac_reward_zero_std": lambda s: 0.95 if s > 20 else 0.1}))
    assert len(found) == 1
    step = int(found[0].split()[2].rstrip(":"))
    assert 28 <= step <= 31  # when the mean of ten passes four fifths


def test_stages_are_looked_at_apart():
    sft = [{"stage": "sft", "step": s, "loss": 1.0, "grad_norm": 100.0} for s in range(1, 21)]
    assert health.over(sft + rows()) == []


def test_rows_without_a_value_are_no_zeros():
    empty = [json.loads('{"stage": "grpo", "step": 1, "reward/domain": null}')] * 20
    assert health.signs(empty) == {}

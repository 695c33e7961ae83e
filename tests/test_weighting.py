"""Advantages and weight controllers."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bbkit import InputError
from bbkit.weighting import CONTROLLERS, SCHEMES, Stats, advantages, statistics

NAN = float("nan")


def rewards(seed=0, groups=4, generations=4, count=3):
    return torch.rand(groups * generations, count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_are_centred_and_order_in_a_group_does_not_matter(scheme):
    r, w = rewards(), [0.5, 0.3, 0.2]
    found = advantages(r, 4, w, scheme)
    assert found.view(4, 4, 3).mean(dim=1).abs().max() < 1e-6
    turn = torch.tensor([2, 0, 3, 1])
    turned = advantages(r.view(4, 4, 3)[:, turn].reshape(16, 3), 4, w, scheme)
    assert torch.allclose(turned.view(4, 4, 3), found.view(4, 4, 3)[:, turn], atol=1e-5)
    assert torch.allclose(advantages(r + 5, 4, w, scheme), found, atol=1e-4)


def test_grpo_and_gdpo_by_hand():
    r = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0], [1.0, 0.0]])
    w = [0.75, 0.25]
    total = r @ torch.tensor(w)
    spread = total.view(2, 2).std(dim=1).repeat_interleave(2)
    mean = total.view(2, 2).mean(dim=1).repeat_interleave(2)
    grpo = advantages(r, 2, w, "grpo") @ torch.tensor(w)
    assert torch.allclose(grpo, (total - mean) / (spread + 1e-4))
    gdpo = advantages(r, 2, w, "gdpo") @ torch.tensor(w)
    assert gdpo.std() == pytest.approx(1, abs=1e-3) and gdpo.mean().abs() < 1e-6


def test_the_floor_keeps_a_settled_reward_small():
    r = torch.tensor([[1.0], [1.0], [1.0], [0.98]])
    assert advantages(r, 4, [1.0], "gdpo").abs().max() > 1
    assert advantages(r, 4, [1.0], "capability", floor=0.1).abs().max() == pytest.approx(0.15)
    wide = torch.tensor([[1.0], [0.0]])
    assert torch.allclose(
        advantages(wide, 2, [1.0], "capability", floor=0.1),
        (wide - 0.5) / wide.std(),
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_absent_constant_and_partly_absent_rewards_give_zero(scheme):
    r = rewards()
    r[:4, 0] = NAN  # does not apply to the first group
    r[4:8, 1] = 0.7  # settled in the second
    r[8:12] = NAN  # nothing scored the third
    r[12, 2] = NAN  # one completion of the fourth
    found = advantages(r, 4, [0.5, 0.3, 0.2], scheme)
    assert torch.isfinite(found).all()
    absent = [found[:4, 0], found[4:8, 1], found[8:12], found[12, 2]]
    for zero in absent[: 3 if scheme == "grpo" else 4]:  # TRL counts the last as 0
        assert zero.abs().max() < 1e-5
    assert found[13:, 2].abs().min() > 0 and found[:4, 1].abs().max() > 0
    assert not advantages(torch.full((8, 3), NAN), 4, [1, 1, 1], scheme).any()


def test_bad_rewards_are_named():
    r = rewards()
    r[5, 2] = float("inf")
    with pytest.raises(InputError, match="reward 2 of completion 5 is infinite"):
        advantages(r, 4, [1, 1, 1])
    with pytest.raises(InputError, match="16 completions in groups of 3"):
        advantages(rewards(), 3, [1, 1, 1])
    with pytest.raises(InputError, match="use one of capability, gdpo"):
        advantages(rewards(), 4, [1, 1, 1], "gpdo")


def test_statistics():
    r = torch.tensor([[1.0, 0.2], [0.0, 0.2], [1.0, NAN], [0.0, NAN]])
    found = statistics(r, 2, [1.0, 0.0])
    assert found.reward == [0.5, pytest.approx(0.2)]
    assert found.sigma == [pytest.approx(0.5**0.5), 0.0]
    assert found.covariance == [pytest.approx(0.5), 0.0]
    assert statistics(torch.full((2, 1), NAN), 2, [1.0]) == Stats([None], [None], [None])


values = st.one_of(st.none(), st.floats(0, 1))
gramians = st.one_of(
    st.none(), st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=3, max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(CONTROLLERS)),
    preference=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    floor=st.floats(0, 0.3),
    rate=st.floats(0, 50),
    steps=st.lists(st.tuples(*[st.tuples(values, values, values)] * 3, gramians), max_size=8),
)
def test_weights_stay_on_the_simplex_above_the_floor(name, preference, floor, rate, steps):
    controller = CONTROLLERS[name](preference, rate=rate, floor=floor)
    for step in steps:
        weights = controller.update(Stats(*step))
        assert sum(weights) == pytest.approx(1)
        assert min(weights) >= (floor if name != "fixed" else 0) - 1e-12


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_a_controller_goes_on_from_its_state(name):
    def stats(i):
        r = rewards(i)
        gramian = (r[:3] @ r[:3].T).tolist()
        found = statistics(r, 4, [0.4, 0.3, 0.3])
        return Stats(found.reward, found.sigma, found.covariance, gramian)

    one, other = CONTROLLERS[name]([3, 2, 1]), CONTROLLERS[name]([3, 2, 1])
    for i in range(6):
        if i == 3:
            other.restore(json.loads(json.dumps(one.state())))
        if i >= 3:
            assert one.update(stats(i)) == other.update(stats(i))
        else:
            one.update(stats(i))
    assert (one.weights == pytest.approx([0.5, 1 / 3, 1 / 6])) == (name == "fixed")


def test_what_each_controller_favours():
    flat = [0.5, 0.5]

    def after(name, **seen):
        controller = CONTROLLERS[name]([1, 1], rate=0.5)
        for _ in range(5):
            controller.update(Stats(**{"reward": flat, "sigma": flat, "covariance": flat} | seen))
        return controller.weights

    assert after("deficit", reward=[0.9, 0.2])[1] > 0.6
    assert after("variance", sigma=[0.1, 0.3]) == pytest.approx([0.25, 0.75])
    assert after("covariance", covariance=[0.9, 0.1])[1] > 0.6
    # Two of three agree, so they gain and the third, which lags alone, loses.
    agreeing = [[1.0, 0.8, -0.2], [0.8, 1.0, -0.2], [-0.2, -0.2, 1.0]]
    controller = CONTROLLERS["agreement"]([1, 1, 1])
    weights = controller.update(Stats(flat, flat, flat, agreeing))
    assert weights[0] == weights[1] > 1 / 3 > weights[2]


def test_a_weight_of_zero_stays_off_and_absent_rewards_change_nothing():
    controller = CONTROLLERS["deficit"]([1, 1, 0], floor=0.2)
    for _ in range(3):
        weights = controller.update(Stats([0.9, 0.1, 0.1], [0.1] * 3, [0.1] * 3))
    assert weights[2] == 0
    none = Stats([None] * 2, [None] * 2, [None] * 2)
    for name in CONTROLLERS:
        assert CONTROLLERS[name]([3, 1]).update(none) == [0.75, 0.25]


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_one_reward_has_all_the_weight(name):
    controller = CONTROLLERS[name]([2.0], floor=0.5)
    for seen in (Stats([None], [None], [None]), Stats([1.0], [0.0], [0.0], [[0.0]])):
        assert controller.update(seen) == [1.0]


def test_bad_weights_are_named():
    with pytest.raises(InputError, match=r"weights \[1, -1\]"):
        CONTROLLERS["deficit"]([1, -1])
    with pytest.raises(InputError, match=r"weight floor 0.5: below 1/2"):
        CONTROLLERS["deficit"]([1, 1], floor=0.5)


def test_one_completion_alone_that_is_scored_has_no_advantage():
    r = torch.full((8, 2), NAN)
    r[3, 0] = 0.4
    for scheme in SCHEMES:
        assert (advantages(r, 4, [0.5, 0.5], scheme) == 0).all(), scheme

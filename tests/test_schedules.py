import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swagjax.schedules import swa_schedule


def oracle(step, init, swa, start, begin=0.5, end=0.9):
    """The rule as the paper states it, written with branches."""
    t = step / start
    if t <= begin:
        return init
    if t <= end:
        return init + (swa - init) * (t - begin) / (end - begin)
    return swa


@pytest.mark.parametrize("start", [1, 2, 3, 7, 10, 161, 62951])
@pytest.mark.parametrize(("init", "swa"), [(0.1, 0.05), (0.05, 0.01), (0.01, 0.02), (0.1, 0.0)])
def test_equals_the_rule_at_every_step(init, swa, start):
    schedule = swa_schedule(init, swa, start)
    steps = np.unique(np.linspace(0, 1.5 * start, 97).astype(int))
    expected = [oracle(int(step), init, swa, start) for step in steps]
    np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=1e-5, atol=1e-8)


def test_other_fractions():
    schedule = swa_schedule(1.0, 0.2, 40, anneal_begin=0.0, anneal_end=1.0)
    expected = [oracle(step, 1.0, 0.2, 40, 0.0, 1.0) for step in range(60)]
    np.testing.assert_allclose([schedule(step) for step in range(60)], expected, rtol=1e-6)


def test_the_two_constants_are_exact_and_the_corners_lie_at_half_and_nine_tenths():
    schedule = swa_schedule(0.5, 0.125, 100)
    values = np.array([schedule(step) for step in range(121)])
    assert np.all(values[:51] == 0.5)
    assert np.all(values[90:] == 0.125)
    assert values[51] < 0.5
    assert values[89] > 0.125
    assert np.all(np.diff(values[50:91]) < 0)


def test_stays_constant_for_the_longest_run():
    schedule = swa_schedule(0.1, 0.03, 1000)
    assert float(schedule(jnp.iinfo(jnp.int32).max)) == pytest.approx(0.03)


def test_jit_equals_eager_for_any_kind_of_step():
    schedule = swa_schedule(0.1, 0.03, 50)
    for step in (37, np.int64(37), jnp.int32(37), jnp.float32(37)):
        np.testing.assert_allclose(jax.jit(schedule)(step), schedule(37), rtol=1e-6)


def test_works_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        assert float(swa_schedule(0.1, 0.02, 100)(jnp.int32(70))) == pytest.approx(0.06)


def test_drives_an_optimizer():
    tx = optax.sgd(swa_schedule(1.0, 0.5, 10))
    params = jnp.float32(0.0)
    state, updates = tx.init(params), []
    for _ in range(12):
        update, state = tx.update(jnp.float32(1.0), state, params)
        updates.append(-float(update))
    np.testing.assert_allclose(updates, [oracle(s, 1.0, 0.5, 10) for s in range(12)], rtol=1e-6)


@pytest.mark.parametrize("name", ["init_value", "swa_value"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_learning_rate(name, value):
    arguments = {"init_value": 0.1, "swa_value": 0.05} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} is {value}.*finite and not negative.*try 0.05"):
        swa_schedule(**arguments, start=10)


@pytest.mark.parametrize("start", [0, -3, 0.5, math.nan, math.inf])
def test_bad_start(start):
    with pytest.raises(ValueError, match=rf"start is {start}.*1 or more.*steps per epoch"):
        swa_schedule(0.1, 0.05, start)


@pytest.mark.parametrize(
    ("begin", "end"), [(0.9, 0.5), (0.5, 0.5), (-0.1, 0.9), (0.5, 1.1), (math.nan, 0.9)]
)
def test_bad_fractions(begin, end):
    message = rf"anneal_begin is {begin} and anneal_end {end}.*try 0\.5 and 0\.9"
    with pytest.raises(ValueError, match=message):
        swa_schedule(0.1, 0.05, 10, anneal_begin=begin, anneal_end=end)

"""What float32 and less can hold, and what is lost: figures that the docstrings quote."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swagjax


def collect(tx, iterates, dtype=jnp.float32):
    """The state after all iterates, (n, P), in one compiled loop."""
    zeros = jnp.zeros(iterates.shape[1], dtype)

    def step(state, theta):
        return tx.update(theta, state, zeros)[1], None

    iterates = jnp.asarray(iterates, dtype)
    return jax.jit(lambda rows: jax.lax.scan(step, tx.init(zeros), rows)[0])(iterates)


def about_one(count, std, drift=0.0, size=200, dtype=np.float32):
    """Iterates around 1 as the dtype holds them, in float64."""
    rng = np.random.default_rng(0)
    rows = 1 + std * rng.normal(size=(count, size)) + drift * np.linspace(0, 1, count)[:, None]
    return rows.astype(dtype).astype(np.float64)


def relative(found, wanted):
    return np.abs(np.asarray(found, np.float64) / wanted - 1)


@pytest.mark.parametrize(("std", "bound"), [(1e-2, 1e-5), (1e-4, 1e-3), (1e-5, 1e-2)])
def test_variance_of_139_iterates_about_one(std, bound):
    """Of 99 weights in 100; the worst of 2,000 is off by twice as much.

    The running mean is rounded at every collection, to about 2e-7 in the end: that is what is left.
    """
    rows = about_one(139, std, size=2000)
    state = collect(swagjax.swag(20), rows)
    error = relative(state.variance, rows.var(0))
    assert np.quantile(error, 0.99) < bound
    assert error.max() < 2 * bound
    assert np.abs(np.asarray(state.mean, np.float64) - rows.mean(0)).max() < 1e-6


def test_variance_where_weights_move_by_few_units_in_the_last_place():
    """At std 1e-6 float32 holds some ten values: never negative, never far from the truth."""
    rows = about_one(139, 1e-6, size=2000)
    found = np.asarray(collect(swagjax.swag_diag(), rows).variance, np.float64)
    assert (found >= 0).all()
    assert 0.9 < np.mean(found) / rows.var(0).mean() < 1.1


@pytest.mark.parametrize(
    ("std", "drift", "bound"), [(1e-2, 0.0, 1e-4), (1e-4, 0.0, 1e-2), (1e-4, 1e-5, 1e-2)]
)
def test_a_hundred_thousand_iterates_that_have_settled(std, drift, bound):
    rows = about_one(100_000, std, drift, size=50)
    state = collect(swagjax.swag_diag(), rows)
    assert state.num_collected == 100_000
    assert relative(state.variance, rows.var(0)).max() < bound
    assert np.abs(np.asarray(state.mean, np.float64) - rows.mean(0)).max() < 0.2 * std


def test_the_mean_of_float32_stalls_under_a_slow_drift_and_that_of_float64_does_not():
    """The docstring of swag names the number of collections, and this way out."""
    rows = about_one(100_000, 1e-4, drift=1e-3, size=50)
    stalled = collect(swagjax.swag_diag(), rows)
    assert relative(stalled.variance, rows.var(0)).max() > 0.5
    with jax.enable_x64(True):
        wide = collect(swagjax.swag_diag(accumulator_dtype=np.float64), rows)
        assert relative(wide.variance, rows.var(0)).max() < 1e-9
        np.testing.assert_allclose(wide.mean, rows.mean(0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_parameters_are_averaged_in_float32(dtype):
    rows = np.asarray(jnp.asarray(about_one(139, 0.05), dtype), np.float64)
    state = collect(swagjax.swag(20), rows, dtype)
    np.testing.assert_allclose(state.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(state.variance, rows.var(0), rtol=1e-4)


def test_float64_parameters_keep_float64():
    with jax.enable_x64(True):
        rows = about_one(139, 1e-6, dtype=np.float64)
        state = collect(swagjax.swag(20), rows, np.float64)
        assert relative(state.variance, rows.var(0)).max() < 1e-8


def test_weights_from_1e_minus_17_to_1e18_side_by_side():
    rng = np.random.default_rng(0)
    scale = np.logspace(-17, 18, 36)
    rows = (scale * rng.normal(size=(50, 36))).astype(np.float32).astype(np.float64)
    state = collect(swagjax.swag(20), rows)
    np.testing.assert_allclose(state.variance, rows.var(0), rtol=1e-4)
    assert np.isfinite(np.asarray(swagjax.sample(jax.random.key(0), state))).all()


def test_deviations_in_bfloat16_cost_a_part_in_250():
    """Rounding to 8 bits is a factor within 1 +- 2^-8 of each deviation, 0.4 %."""
    rows = about_one(40, 1e-2)
    wide = collect(swagjax.swag(20), rows)
    narrow = collect(swagjax.swag(20, deviation_dtype=jnp.bfloat16), rows)
    np.testing.assert_array_equal(narrow.variance, wide.variance)
    found, exact = (np.asarray(s.deviations, np.float64) for s in (narrow, wide))
    assert (np.abs(found - exact) <= 2.0**-8 * np.abs(exact)).all()
    # Of squares 2^-7 and half of the variance; of covariances as much, by Cauchy and Schwarz.
    variances = [np.asarray(swagjax.variance(s), np.float64) for s in (narrow, wide)]
    assert relative(*variances).max() < 2.0**-7
    covariances = [d.T @ d / 19 for d in (found, exact)]
    bound = 2.0**-7 * (1 + 2.0**-8) * np.sqrt(np.outer(*[np.diag(covariances[1])] * 2))
    assert (np.abs(covariances[0] - covariances[1]) <= bound).all()


def oracle_difference(state, a, b):
    """log p(a) - log p(b) of the running-centred SWAG posterior, in float64."""
    mean, v = (np.asarray(x, np.float64) for x in (state.mean, state.variance / 2))
    D = np.asarray(state.deviations, np.float64) / np.sqrt(2 * (len(state.deviations) - 1))
    a, b = (np.asarray(x, np.float64) - mean for x in (a, b))
    inner = (D / v) @ (a + b)
    capacitance = np.eye(len(D)) + (D / v) @ D.T
    shift = np.linalg.solve(capacitance, inner)
    return -(((a - b) * (a + b) / v).sum() - ((D / v) @ (a - b)) @ shift) / 2


@functools.partial(jax.jit, static_argnums=(1, 2))
def walk(key, size, drift):
    """An iterate: a spread of its own in every weight, and a drift that few directions share."""
    scale = 0.01 * jnp.exp(jax.random.normal(jax.random.key(7), (size,)))
    key, number = key
    return 1 + scale * (jax.random.normal(key, (size,)) + drift * number)


@pytest.mark.parametrize(
    "size", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)], ids=["1M", "10M"]
)
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_differences_of_log_densities_keep_three_decimals(size, drift):
    """The densities are near 1e7 and 1e8, where float32 is spaced by 1 and 8."""
    tx, zeros = swagjax.swag(6), jnp.zeros(size)
    state, update = tx.init(zeros), jax.jit(tx.update, donate_argnums=1)
    for number, key in enumerate(jax.random.split(jax.random.key(0), 9)):
        _, state = update(walk((key, number), size, drift), state, zeros)
    a, b = (swagjax.sample(jax.random.key(i), state) for i in (1, 2))
    difference = float(swagjax.log_prob_difference(state, a, b))
    assert abs(difference - oracle_difference(state, a, b)) < 1e-3
    # Between a sample and the mean it is of the size of the density: half a unit in the last place.
    far = float(swagjax.log_prob_difference(state, a, state.mean))
    np.testing.assert_allclose(far, oracle_difference(state, a, state.mean), rtol=2e-7)

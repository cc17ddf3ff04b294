import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import swagjax

RANK = 4
KINDS = {
    "swag": functools.partial(swagjax.swag, RANK),
    "swag_diag": swagjax.swag_diag,
    "swa": swagjax.swa,
}
TEMPLATE = {"a": jnp.zeros(2), "b": {"w": jnp.zeros((2, 3)), "c": jnp.zeros(())}}
SIZE = 9


def unravel(row):
    return {
        "a": jnp.asarray(row[:2], jnp.float32),
        "b": {
            "c": jnp.asarray(row[2], jnp.float32),
            "w": jnp.asarray(row[3:].reshape(2, 3), jnp.float32),
        },
    }


@functools.cache
def update(kind):
    tx = KINDS[kind]()
    return jax.jit(lambda state, theta: tx.update(theta, state, TEMPLATE)[1])


def collect(rows, kind="swag", state=None):
    state = KINDS[kind]().init(TEMPLATE) if state is None else state
    for row in rows:
        state = update(kind)(state, unravel(row))
    return state


def iterates(count, seed=0, mean=0.0, std=1.0):
    """A walk with a drift, so that running and final means differ; exactly in float32."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(count, SIZE)) + 0.3 * np.arange(count)[:, None]
    return (mean + std * steps).astype(np.float32).astype(np.float64)


def same(merged, wanted, rtol=1e-5, atol=1e-5):
    assert merged[:3] == wanted[:3]  # the counters
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, wanted)
    chex.assert_trees_all_close(merged, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 5, 9, 14])
@pytest.mark.parametrize("second", [0, 1, 2, 3, 4, 5, 9, 14])
def test_two_halves_are_the_whole_run(kind, first, second):
    rows = iterates(first + second)
    merged = swagjax.merge(collect(rows[:first], kind), collect(rows[first:], kind))
    same(merged, collect(rows, kind))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 13), st.integers(1, 13), st.integers(0, 1000))
def test_moments_and_both_centrings_are_those_of_the_oracle(first, second, seed):
    rows = iterates(first + second, seed)
    merged = swagjax.merge(collect(rows[:first]), collect(rows[first:]))
    np.testing.assert_allclose(oracle.flatten(merged.mean), rows.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(oracle.flatten(merged.variance), rows.var(0), rtol=1e-4, atol=1e-5)
    for centering in ("running", "final"):
        wanted = np.diag(oracle.covariance("swag", rows, RANK, centering=centering))
        found = oracle.flatten(swagjax.variance(merged, centering=centering))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1, 1, 1), (3, 2, 4), (6, 1, 5), (0, 7, 2)])
def test_the_order_of_merging_is_of_no_matter(cuts):
    rows = iterates(sum(cuts))
    a, b, c = (collect(part) for part in np.split(rows, np.cumsum(cuts)[:-1]))
    left = swagjax.merge(swagjax.merge(a, b), c)
    same(left, swagjax.merge(a, swagjax.merge(b, c)))
    same(left, collect(rows))


def test_collecting_goes_on_after_a_merge():
    rows = iterates(14)
    merged = swagjax.merge(collect(rows[:5]), collect(rows[5:8]))
    same(collect(rows[8:], state=merged), collect(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_state_changes_nothing(kind):
    empty, full = collect([], kind), collect(iterates(6), kind)
    for merged in (swagjax.merge(empty, full), swagjax.merge(full, empty)):
        chex.assert_trees_all_equal(
            (merged.count, merged.mean, merged.variance), (full.count, full.mean, full.variance)
        )
        chex.assert_trees_all_close(merged.deviations, full.deviations, rtol=1e-6, atol=1e-6)
    nothing = swagjax.merge(empty, empty)
    chex.assert_trees_all_equal(nothing, empty)


def test_skipped_iterates_and_steps_are_added_up():
    rows = iterates(6)
    rows[[1, 4]] = np.nan
    first, second = collect(rows[:3]), collect(rows[3:])
    merged = swagjax.merge(first, second)
    assert (merged.step, merged.count, merged.skipped) == (6, 4, 2)
    same(merged, collect(rows))


def test_numbers_of_small_spread_about_one():
    """Two runs about 1 with std 1e-4, and runs whose means are 1e4 spreads apart."""
    for rows, tolerance in (
        (iterates(40, mean=1.0, std=1e-4), 1e-3),
        (np.concatenate([iterates(20, 1), iterates(20, 2, mean=1e4)]), 1e-5),
    ):
        merged = swagjax.merge(collect(rows[:20]), collect(rows[20:]))
        np.testing.assert_allclose(oracle.flatten(merged.variance), rows.var(0), rtol=tolerance)
        wanted = oracle.deviations(rows, RANK)
        held = np.concatenate(
            [np.reshape(x, (RANK, -1)) for x in jax.tree.leaves(merged.deviations)], 1
        )
        order = (np.arange(36, 40)) % RANK
        spread = np.abs(wanted).max()
        np.testing.assert_allclose(held[order], wanted, atol=max(2e-3 * spread, 3e-7))


def test_a_ring_in_bfloat16_keeps_its_dtype():
    tx = swagjax.swag(RANK, deviation_dtype=jnp.bfloat16)
    states = []
    for part in np.split(iterates(8), 2):
        state = tx.init(TEMPLATE)
        for row in part:
            _, state = tx.update(unravel(row), state, TEMPLATE)
        states.append(state)
    merged = swagjax.merge(*states)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, states[0])
    whole = collect(iterates(8))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), merged.deviations),
        whole.deviations,
        atol=2 * 2**-8 * float(max(jnp.abs(x).max() for x in jax.tree.leaves(whole.deviations))),
    )


def test_under_jit_and_vmap():
    rows = iterates(7)
    first, second = collect(rows[:4]), collect(rows[4:])
    merged = swagjax.merge(first, second)
    chex.assert_trees_all_close(jax.jit(swagjax.merge)(first, second), merged, rtol=1e-6)
    stacked = [jax.tree.map(lambda *x: jnp.stack(x), s, s) for s in (first, second)]
    members = jax.vmap(swagjax.merge)(*stacked)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], members), merged, rtol=1e-6)


def test_masked_leaves_stay_masked():
    params = {"w": jnp.ones(2), "frozen": jnp.ones(3)}
    tx = optax.masked(swagjax.swag(2), {"w": True, "frozen": False})
    state = swagjax.get_state(tx.update(params, tx.init(params), params)[1])
    merged = swagjax.merge(state, state)
    assert jax.tree.structure(merged) == jax.tree.structure(state)


def test_sharded_rings_stay_where_they_are():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("d"))
    params = {"w": jax.device_put(jnp.arange(1600.0).reshape(800, 2), place)}
    tx, states = swagjax.swag(RANK), []
    for _ in range(2):
        state = tx.init(params)
        for i in range(5):
            _, state = tx.update(jax.tree.map(lambda p, i=i: jnp.sin(p + i), params), state, params)
        states.append(state)
    text = jax.jit(swagjax.merge).lower(*states).compile().as_text()
    assert "all-gather" not in text
    merged, whole = swagjax.merge(*states), jax.device_get(states)
    assert merged.deviations["w"].sharding.spec == PartitionSpec(None, "d")
    chex.assert_trees_all_close(jax.device_get(merged), swagjax.merge(*whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (swagjax.swag_diag().init(TEMPLATE), r"first\.deviations.*second\.deviations is None"),
        (swagjax.swag(RANK + 1).init(TEMPLATE), r"second\.deviations is .*\(5, 2\)"),
        (swagjax.swag(RANK).init({"a": jnp.zeros(2)}), r"second\.mean is"),
        (swagjax.swag(RANK).init({**TEMPLATE, "a": jnp.zeros(3)}), r"second\.mean is .*\(3,\)"),
        (TEMPLATE, r"second is a dict.*get_state"),
    ],
)
def test_states_of_other_runs_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        swagjax.merge(collect([]), other)

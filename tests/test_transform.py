import functools
import re
import sys
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import swagjax
from swagjax import transform

RANK = 3
METHODS = {
    "swa": swagjax.swa,
    "swag_diag": swagjax.swag_diag,
    "swag": functools.partial(swagjax.swag, RANK),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


# --- The oracle: the definitions of the class docstring, two passes, float64 -------------------


def oracle(iterates, rank=None):
    """Moments and ring of a list of arrays of one leaf."""
    x = np.stack(iterates).astype(np.float64)
    mean = x.mean(0)
    deviations = [x[i] - x[: i + 1].mean(0) for i in range(len(x))]
    ring = np.zeros((rank or 0, *mean.shape))
    for i in range(len(x)):
        if rank:
            ring[i % rank] = deviations[i]
    return mean, ((x - mean) ** 2).mean(0), (x**2).mean(0), ring


def assert_matches(state, iterates, step=None, skipped=0, rtol=2e-5):
    """Compare a state with the oracle over trees of iterates; tolerances are in their spread."""
    assert int(state.num_collected) == len(iterates)
    assert int(state.num_skipped) == skipped
    assert step is None or int(state.num_updates) == step
    if not iterates:
        return chex.assert_trees_all_equal(state.mean, jax.tree.map(jnp.zeros_like, state.mean))
    columns = list(zip(*map(jax.tree.leaves, iterates), strict=True))
    means = jax.tree.leaves(state.mean)
    assert len(means) == len(columns)
    squares, variances = jax.tree.leaves(state.sq_mean), jax.tree.leaves(state.variance)
    rings = jax.tree.leaves(state.deviations)
    for i, column in enumerate(columns):
        rank = rings[i].shape[0] if rings else None
        mean, variance, square, ring = oracle(column, rank)
        size = np.abs(np.stack(column).astype(np.float64)).max(initial=1e-30)
        np.testing.assert_allclose(means[i], mean, rtol=0, atol=rtol * size)
        if variances:
            np.testing.assert_allclose(variances[i], variance, rtol=0, atol=rtol * size**2)
            np.testing.assert_allclose(squares[i], square, rtol=0, atol=rtol * size**2)
        if rings:
            np.testing.assert_allclose(rings[i], ring, rtol=0, atol=rtol * size)
    return None


def due(t, start, every):
    """The cadence as the design states it."""
    return t > start and (t - start) % every == 0


# --- Driving a transformation -------------------------------------------------------------------


def feed(tx, iterates, state=None):
    """Let the t-th iterate be ``iterates[t]``: parameters at zero, the update is the iterate."""
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x[0]), iterates)
    state = tx.init(zeros) if state is None else state
    body = jax.jit(lambda s, xs: jax.lax.scan(lambda s, x: (tx.update(x, s, zeros)[1], 0), s, xs))
    return body(state, iterates)[0]


def numbers(shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rows(iterates):
    """The iterates, stacked on the leading axis of every leaf, as a list of trees."""
    leaves, treedef = jax.tree.flatten(iterates)
    return [jax.tree.unflatten(treedef, row) for row in zip(*map(np.asarray, leaves), strict=True)]


def model():
    return {"b": jnp.arange(2.0), "w": {"k": numbers((2, 3)), "z": (jnp.float32(0.5),)}}


def gradients(params, t):
    """Something deterministic that differs from leaf to leaf and never stands still."""
    return jax.tree.map(lambda p: jnp.cos(3 * p + jnp.asarray(t, p.dtype)), params)


def train(opt, params, steps=9, **extra):
    """Train with a jitted step; return the optimizer state and all iterates, the initial one first.

    Asserts what must hold for any chain with a member of this library in it: the state keeps its
    structure, shapes and dtypes (weak types too), and only the first step compiles.
    """

    traces = []

    @jax.jit
    def step(params, opt_state, t):
        traces.append(t)
        updates, opt_state = opt.update(gradients(params, t), opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(opt.init)(params)
    before = jax.eval_shape(opt.init, params)
    iterates = [jax.tree.map(np.asarray, params)]
    for t in range(1, steps + 1):
        params, opt_state = step(params, opt_state, t)
        iterates.append(jax.tree.map(np.asarray, params))
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(before, opt_state)
    chex.assert_trees_all_equal_structs(before, opt_state)
    return opt_state, iterates


def chosen(iterates, start=0, every=1):
    return [x for t, x in enumerate(iterates) if due(t, start, every)]


@pytest.fixture
def compilations():
    """A list that grows by one with every program that XLA compiles."""
    seen = []

    def listen(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1)(1.0)
    assert seen.pop()  # the listener hears
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


# --- Moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 7, 20])
@each_method
def test_moments_below_at_and_above_the_rank(method, count):
    iterates = {"a": numbers((count, 4)), "b": numbers((count, 2, 3), seed=1)}
    if count == 0:
        state = method().init({"a": jnp.ones(4), "b": jnp.ones((2, 3))})
    else:
        state = feed(method(), iterates)
    assert_matches(state, rows(iterates), step=count)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 1, 2)]),
    rank=st.integers(2, 6),
    start=st.integers(0, 9),
    every=st.integers(1, 5),
    steps=st.integers(1, 30),
    dtype=st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32]),
    shift=st.sampled_from([0.0, 1.0, -30.0]),
)
def test_moments_over_shapes_ranks_cadences_and_dtypes(
    shape, rank, start, every, steps, dtype, shift
):
    iterates = {"x": (shift + numbers((steps, *shape))).astype(dtype)}
    state = feed(swagjax.swag(rank, start=start, every=every), iterates)
    assert_matches(state, chosen([None, *rows(iterates)], start, every), step=steps)
    assert state.deviations["x"].shape == (rank, *shape)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_the_ring_wraps_and_the_first_deviation_is_exactly_zero():
    x = numbers((8, 5))
    tx = swagjax.swag(3)
    state = feed(tx, x[:1])
    assert np.all(state.deviations == 0)
    rings = [np.asarray(state.deviations)]
    for i in range(1, 8):
        state = feed(tx, x[i : i + 1], state)
        rings.append(np.asarray(state.deviations))
        # Only the row of this iterate has changed.
        changed = [r for r in range(3) if not np.array_equal(rings[-1][r], rings[-2][r])]
        assert changed == [i % 3]
    assert_matches(state, rows(x), step=8)


def test_what_a_method_does_not_keep_is_none():
    params = model()
    swa, diag = swagjax.swa().init(params), swagjax.swag_diag().init(params)
    assert swa.variance is None
    assert swa.sq_mean is None
    assert swa.deviations is None
    assert diag.deviations is None
    assert diag.variance is not None


def test_methods_agree_in_what_they_share():
    iterates = numbers((10, 6))
    swa, diag, swag = (feed(method(start=2, every=3), iterates) for method in METHODS.values())
    np.testing.assert_array_equal(swa.mean, swag.mean)
    np.testing.assert_array_equal(diag.mean, swag.mean)
    np.testing.assert_array_equal(diag.variance, swag.variance)


def test_float64_with_x64_to_float64_accuracy():
    with jax.enable_x64(True):
        iterates = 1 + 1e-4 * numbers((50, 7), dtype=np.float64)
        state = feed(swagjax.swag(4), iterates)
        assert state.mean.dtype == state.variance.dtype == state.deviations.dtype == jnp.float64
        assert (
            state.num_updates.dtype
            == state.num_collected.dtype
            == state.num_skipped.dtype
            == jnp.int32
        )
        mean, variance, _, ring = oracle(rows(iterates), 4)
        np.testing.assert_allclose(state.mean, mean, rtol=1e-14)
        np.testing.assert_allclose(state.variance, variance, rtol=1e-10)
        np.testing.assert_allclose(state.deviations, ring, atol=1e-14)


# --- Cadence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("every", [1, 2, 5])
@each_method
def test_collects_after_start_at_every_multiple(method, start, every):
    iterates = numbers((14, 2))
    state = feed(method(start=start, every=every), iterates)
    assert_matches(state, chosen([None, *rows(iterates)], start, every), step=14)


@each_method
def test_when_decides_after_the_t_th_call(method):
    iterates = numbers((12, 2))
    wanted = [3, 4, 10]
    state = feed(method(when=lambda t: (t == 3) | (t == 4) | (t == 10)), iterates)
    assert_matches(state, [rows(iterates)[t - 1] for t in wanted], step=12)


def test_when_sees_t_from_one_as_an_int32_scalar():
    seen = []

    def when(t):
        seen.append((t.shape, t.dtype, int(t)))
        return True

    tx, x = swagjax.swa(when=when), jnp.zeros(1)
    state = tx.init(x)
    for _ in range(2):
        _, state = tx.update(x, state, x)
    assert seen == [((), jnp.int32, 1), ((), jnp.int32, 2)]
    assert state.num_collected == 2


@pytest.mark.parametrize("given", [{"start": 3}, {"every": 2}, {"start": 1, "every": 4}])
@each_method
def test_when_together_with_start_or_every_is_refused(method, given):
    with pytest.raises(ValueError, match=r"when.*start=\d.*every=\d"):
        method(when=lambda t: t > 3, **given)


@pytest.mark.parametrize("verdict", [lambda t: t, lambda t: jnp.zeros(2, bool), lambda t: 1.0])
@each_method
def test_when_must_return_a_boolean_scalar(method, verdict):
    tx, x = method(when=verdict), jnp.zeros(1)
    with pytest.raises(ValueError, match=r"when.*boolean scalar"):
        tx.update(x, tx.init(x), x)


def test_when_must_be_callable():
    with pytest.raises(ValueError, match="when=7"):
        swagjax.swa(when=7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", -1),
        ("start", 1.0),
        ("start", True),
        ("start", None),
        ("every", 0),
        ("every", -2),
        ("every", 2.5),
        ("every", "3"),
        ("every", True),
        ("every", np.bool_(True)),
    ],
)
@each_method
def test_bad_cadence_is_named_with_its_value(method, name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        method(**{name: value})


@pytest.mark.parametrize("rank", [0, -3, 2.0, True, None])
def test_bad_rank_is_named_with_its_value(rank):
    with pytest.raises(ValueError, match=re.escape(f"rank={rank!r}")):
        swagjax.swag(rank)


def test_rank_one_points_to_swag_diag():
    with pytest.raises(ValueError, match=r"rank=1\b.*swag_diag"):
        swagjax.swag(1)


def test_numpy_integers_are_integers():
    tx = swagjax.swag(np.int64(2), start=np.int32(1), every=np.uint8(2))
    state = feed(tx, numbers((7, 2)))
    assert state.num_collected == 3
    assert state.deviations.shape == (2, 2)


# --- The iterate --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@each_method
def test_the_iterate_is_rounded_as_the_real_step_rounds_it(method, dtype):
    # 1 + 1e-4 is 1 in bfloat16: a float32 sum of parameters and updates would not be.
    params, updates = jnp.ones(3, dtype), jnp.array([1e-4, 1e-3, 0.1], jnp.float32)
    tx = method()
    with jax.numpy_dtype_promotion("standard"):  # as optax itself asks for
        _, state = tx.update(updates, tx.init(params), params)
        stepped = optax.apply_updates(params, updates)
    assert stepped.dtype == dtype
    np.testing.assert_array_equal(state.mean, stepped.astype(jnp.float32))


@each_method
def test_updates_pass_through_as_the_same_objects(method):
    params = model()
    tx, updates = method(), gradients(params, 1)
    passed, _ = tx.update(updates, tx.init(params), params)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(passed), jax.tree.leaves(updates)))
    chex.assert_trees_all_equal_structs(passed, updates)


@each_method
def test_training_is_the_same_with_and_without(method):
    plain = optax.sgd(0.1, momentum=0.9)
    _, alone = train(plain, model())
    _, observed = train(optax.chain(plain, method()), model())
    chex.assert_trees_all_equal(alone, observed)


@each_method
def test_params_none_says_what_to_do(method):
    tx, x = method(), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"params=None.*tx\.update\(updates, state, params\)"):
        tx.update(x, tx.init(x))
    with pytest.raises(ValueError, match=r"params=None"):
        tx.update(x, tx.init(x), None)


# --- Mistakes of other implementations -----------------------------------------------------------


@each_method
def test_regression_initial_weights_are_not_counted_in_the_mean(method):
    params = jnp.full(4, 1e6)
    tx = method()
    _, state = tx.update(jnp.full(4, -1e6 + 2), tx.init(params), params)
    assert state.num_collected == 1
    np.testing.assert_array_equal(state.mean, np.full(4, 2.0))


@each_method
def test_regression_first_model_is_not_counted_twice(method):
    state = feed(method(), jnp.array([[0.0], [3.0], [6.0]]))
    assert state.num_collected == 3
    np.testing.assert_allclose(state.mean, [3.0], rtol=1e-6)  # counted twice: 2.25


@each_method
def test_regression_mean_is_weighted_by_iterates_not_by_epochs(method):
    # Every step of three "epochs" of five is collected: weights 1/15 each.
    iterates = numbers((15, 3))
    state = feed(method(), iterates)
    np.testing.assert_allclose(state.mean, np.asarray(iterates, np.float64).mean(0), atol=1e-6)


@each_method
def test_regression_a_step_outside_the_schedule_changes_nothing(method):
    iterates = numbers((9, 3))
    tx = method(start=2, every=3)
    early = feed(tx, iterates[:2])
    chex.assert_trees_all_equal(early, tx.init(iterates[0])._replace(num_updates=jnp.int32(2)))
    fifth = feed(tx, iterates[2:5], early)
    later = feed(tx, iterates[5:7], fifth)
    chex.assert_trees_all_equal(later, fifth._replace(num_updates=jnp.int32(7)))


def near_one(std, count=139, size=20_000):
    """Float32 iterates around 1, as after a converged run with a small step."""
    return (1 + std * numbers((count, size))).astype(jnp.float32)


def relative_error(variance, iterates):
    _, expected, _, _ = oracle(list(np.asarray(iterates)))
    return np.abs(np.asarray(variance, np.float64) / expected - 1)


@pytest.mark.parametrize(
    ("std", "median", "worst"), [(1e-3, 3e-5, 5e-4), (1e-4, 3e-4, 5e-3), (1e-5, 5e-3, 5e-2)]
)
def test_regression_cancellation(std, median, worst):
    iterates = near_one(std)
    for method in (swagjax.swag_diag, functools.partial(swagjax.swag, 2)):
        variance = feed(method(), iterates).variance
        error = relative_error(variance, iterates)
        assert np.median(error) < median
        assert error.max() < worst
        assert np.all(np.asarray(variance) >= 0)


def test_regression_cancellation_is_lost_by_the_textbook_difference():
    # So that the test above can fail: E[x^2] - E[x]^2 by running means in float32.
    iterates = near_one(1e-4)

    def body(carry, x):
        n, mean, square = carry
        return (n + 1, mean + (x - mean) / (n + 1), square + (x * x - square) / (n + 1)), None

    zero = jnp.zeros_like(iterates[0])
    (_, mean, square), _ = jax.lax.scan(body, (0.0, zero, zero), iterates)
    error = relative_error(square - mean**2, iterates)
    assert np.median(error) > 0.5
    assert np.mean(square - mean**2 <= 0) > 0.1


def test_variance_of_constant_iterates_is_exactly_zero():
    # 0.1 and 1/3 are not representable: a mean that drifts by rounding would show.
    x = jnp.array([0.1, 1 / 3, -7.7, 1e-20, 1e20])
    state = feed(swagjax.swag(4), jnp.broadcast_to(x, (100, 5)))
    np.testing.assert_array_equal(state.mean, x)
    assert np.all(state.variance == 0)
    assert np.all(state.deviations == 0)


def test_regression_leaves_never_swap_where_orders_of_traversal_differ():
    # Insertion order, sorted order and creation order all differ; shapes are equal on purpose.
    names = ["w10", "w2", "Z", "a", "_b", "w1"]
    iterates = {name: float(i) + numbers((5, 2), seed=i) for i, name in enumerate(names)}
    state = feed(swagjax.swag(2), iterates)
    for name in names:
        mean, variance, _, ring = oracle(rows(iterates[name]), 2)
        np.testing.assert_allclose(state.mean[name], mean, atol=1e-5)
        np.testing.assert_allclose(state.variance[name], variance, atol=1e-5)
        np.testing.assert_allclose(state.deviations[name], ring, atol=1e-5)


# --- Dtypes and leaves --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64, jnp.uint8])
@each_method
def test_leaves_that_are_not_real_floats_are_refused_with_their_path(method, dtype):
    params = {"layer": {"fine": jnp.zeros(2), "bad": [jnp.zeros(2, dtype)]}}
    with pytest.raises(ValueError, match=r"\['layer'\]\['bad'\]\[0\].*" + jnp.dtype(dtype).name):
        method().init(params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@each_method
def test_accumulators_are_float32_at_the_least(method, dtype):
    state = method().init({"w": jnp.zeros(3, dtype)})
    floats = [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


@each_method
def test_accumulator_dtype(method):
    state = feed(method(accumulator_dtype=jnp.bfloat16), numbers((6, 3)))
    floats = [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype("bfloat16")}
    assert_matches(state, rows(numbers((6, 3))), rtol=0.03)


def test_deviation_dtype_leaves_the_accumulators_alone():
    iterates = numbers((6, 3))
    state = feed(swagjax.swag(2, deviation_dtype=jnp.bfloat16), iterates)
    full = feed(swagjax.swag(2), iterates)
    assert state.deviations.dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.mean, full.mean)
    np.testing.assert_array_equal(state.variance, full.variance)
    np.testing.assert_array_equal(state.deviations, full.deviations.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_dtypes_that_are_not_floating_are_refused(dtype):
    for method in METHODS.values():
        with pytest.raises(ValueError, match="accumulator_dtype="):
            method(accumulator_dtype=dtype)
    with pytest.raises(ValueError, match="deviation_dtype="):
        swagjax.swag(2, deviation_dtype=dtype)


def test_float64_without_x64_is_refused_not_rounded():
    for tx in (
        swagjax.swa(accumulator_dtype=jnp.float64),
        swagjax.swag(2, accumulator_dtype="float64"),
        swagjax.swag(2, deviation_dtype=np.float64),
    ):
        with jax.enable_x64(False), pytest.raises(ValueError, match=r"float64.*x64"):
            tx.init({"w": jnp.zeros(2)})


def test_float64_accumulators_of_float32_parameters_with_x64():
    with jax.enable_x64(True):
        iterates = near_one(1e-5, size=50)
        state = feed(swagjax.swag(2, accumulator_dtype=jnp.float64), iterates)
        assert state.variance.dtype == state.deviations.dtype == jnp.float64
        assert relative_error(state.variance, iterates).max() < 1e-9


# --- Iterates that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "bad"),  # the first, below the rank, the ring wrapped once and twice
    [(0, np.nan), (1, np.inf), (4, -np.inf), (4, np.nan), (6, np.inf)],
)
@each_method
def test_an_iterate_that_is_not_finite_changes_only_the_counters(method, at, bad):
    iterates = {"a": numbers((8, 3)), "b": numbers((8, 2), seed=1)}
    spoiled = {"a": iterates["a"], "b": iterates["b"].at[at, 1].set(bad)}
    tx = method()
    if at:
        before = feed(tx, jax.tree.map(lambda x: x[:at], spoiled))
        after = feed(tx, jax.tree.map(lambda x: x[at : at + 1], spoiled), before)
        expected = before._replace(num_updates=jnp.int32(at + 1), num_skipped=jnp.int32(1))
        chex.assert_trees_all_equal(after, expected)
    good = [x for i, x in enumerate(rows(iterates)) if i != at]
    assert_matches(feed(tx, spoiled), good, step=8, skipped=1)


def test_overflow_in_the_accumulator_is_skipped_too():
    # 1e5 is finite in float32 and not in float16, where it would be held.
    state = feed(swagjax.swa(accumulator_dtype=jnp.float16), jnp.array([[1.0], [1e5], [3.0]]))
    assert (int(state.num_collected), int(state.num_skipped)) == (2, 1)
    np.testing.assert_array_equal(state.mean, [2.0])


def test_steps_outside_the_schedule_do_not_count_as_skipped():
    iterates = numbers((6, 2)).at[0].set(jnp.nan)
    assert feed(swagjax.swag(2, every=2), iterates).num_skipped == 0


# --- Composition in optax -----------------------------------------------------------------------


@each_method
def test_chain_and_named_chain(method):
    kwargs = {"start": 2, "every": 3}
    for opt in (
        optax.chain(optax.adam(0.1), method(**kwargs)),
        optax.named_chain(("opt", optax.sgd(0.1)), ("swag", method(**kwargs))),
    ):
        with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to an integer power
            opt_state, iterates = train(opt, model())
        assert_matches(swagjax.get_state(opt_state), chosen(iterates, **kwargs), step=9)


@each_method
def test_multi_steps_around_counts_full_steps(method):
    opt = optax.MultiSteps(optax.chain(optax.sgd(0.1), method(start=1, every=2)), 2)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides floats by an integer
        opt_state, iterates = train(opt, model(), steps=12)
    state = swagjax.get_state(opt_state)
    assert_matches(state, chosen(iterates[::2], start=1, every=2), step=6)


@each_method
def test_multi_steps_before_counts_micro_steps(method):
    accumulate = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    opt = optax.chain(accumulate, method(start=2, every=4))
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides floats by an integer
        opt_state, iterates = train(opt, model(), steps=12)
    assert_matches(swagjax.get_state(opt_state), [iterates[6], iterates[10]], step=12)


@each_method
def test_masked_around_holds_only_what_the_mask_lets_through(method):
    mask = {"b": False, "w": {"k": True, "z": (True,)}}
    opt = optax.chain(optax.sgd(0.1), optax.masked(method(), mask))
    opt_state, iterates = train(opt, model())
    state = swagjax.get_state(opt_state)
    assert isinstance(state.mean["b"], optax.MaskedNode)
    assert_matches(state, [x["w"] for x in iterates[1:]], step=9)


@each_method
def test_masked_leaves_out_integers(method):
    params = {"w": jnp.ones(2), "n": jnp.zeros(2, jnp.int32)}
    tx = optax.masked(method(), {"w": True, "n": False})
    updates = {"w": jnp.ones(2), "n": jnp.zeros(2, jnp.int32)}
    _, opt_state = jax.jit(tx.update)(updates, tx.init(params), params)
    np.testing.assert_array_equal(swagjax.get_state(opt_state).mean["w"], [2.0, 2.0])


@each_method
def test_partition_keeps_groups_apart(method):
    labels = {"b": "frozen", "w": "trained"}
    opt = optax.partition(
        {"trained": optax.chain(optax.sgd(0.1), method(every=2)), "frozen": optax.set_to_zero()},
        labels,
    )
    opt_state, iterates = train(opt, model())
    state = swagjax.get_state(opt_state)
    assert_matches(state, [x["w"] for x in chosen(iterates, every=2)], step=9)
    np.testing.assert_array_equal(iterates[0]["b"], iterates[-1]["b"])


def test_two_groups_are_two_states_and_each_is_found_in_its_part():
    groups = {name: optax.chain(optax.sgd(0.1), swagjax.swag_diag()) for name in ("x", "y")}
    opt = optax.multi_transform(groups, {"b": "x", "w": "y"})
    opt_state, iterates = train(opt, model())
    with pytest.raises(ValueError, match="2 SWAGStates"):
        swagjax.get_state(opt_state)
    state = swagjax.get_state(opt_state.inner_states["x"])
    assert_matches(state, [x["b"] for x in iterates[1:]], step=9)


@each_method
def test_inject_hyperparams_beside(method):
    opt = optax.chain(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), method(every=2))
    # It holds the rate in the widest dtype of the parameters, and all updates get that one.
    with jax.numpy_dtype_promotion("standard"):
        opt_state, iterates = train(opt, model())
    assert_matches(swagjax.get_state(opt_state), chosen(iterates, every=2), step=9)


@each_method
def test_apply_if_finite_around_hides_bad_steps(method):
    opt = optax.apply_if_finite(optax.chain(optax.sgd(0.1), method()), 100)
    params = jnp.ones(2)
    opt_state, update = opt.init(params), jax.jit(opt.update)
    iterates = []
    for t in range(6):
        grads = jnp.array([1.0, jnp.nan if t == 3 else t])
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        iterates += [np.asarray(params)] if t != 3 else []
    assert_matches(swagjax.get_state(opt_state), iterates, step=5)


@each_method
def test_extra_arguments_are_accepted_and_ignored(method):
    tx = method()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    opt_state, iterates = train(optax.chain(optax.sgd(0.1), tx), model(), value=1.0)
    assert_matches(swagjax.get_state(opt_state), iterates[1:])
    train(optax.with_extra_args_support(tx), model(), value=1.0, grad=None)
    # Passed on by the chain to a member that needs them.
    backtracking = optax.scale_by_backtracking_linesearch(5)
    opt, params = optax.chain(optax.sgd(0.1), backtracking, method()), jnp.ones(2)
    extra = {"value": 2.0, "grad": 2 * params, "value_fn": lambda p: (p**2).sum()}
    updates, opt_state = opt.update(2 * params, opt.init(params), params, **extra)
    stepped = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(swagjax.get_state(opt_state).mean, stepped)


@each_method
def test_map_params_finds_every_leaf_like_the_parameters(method):
    params = model()
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), method())
    opt_state = tx.init(params)
    marked = optax.tree_utils.tree_map_params(
        tx, lambda x: "params", opt_state, transform_non_params=lambda x: "other"
    )
    state = swagjax.get_state(marked)
    assert (state.num_updates, state.num_collected, state.num_skipped) == ("other",) * 3
    kept = [x for x in (state.mean, state.variance, state.deviations) if x is not None]
    assert {leaf for tree in kept for leaf in jax.tree.leaves(tree)} == {"params"}
    chex.assert_trees_all_equal_structs(*kept, params)


@each_method
def test_abstract_init_agrees_with_init(method):
    params = model()
    abstract = jax.eval_shape(method().init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, method().init(params))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, jax.eval_shape(method().init, shapes))


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@pytest.mark.parametrize(
    "params",
    [
        jnp.float32(0.5),
        jnp.ones(3),
        {},
        (),
        {"w": {}},
        [jnp.ones(2), (jnp.ones(1), {"a": [jnp.ones((2, 2))]})],
        Pair(jnp.ones(2), jnp.zeros((0, 3))),
        {"a": None, "b": jnp.ones(2)},
        {"a": np.ones(2, np.float32)},
    ],
    ids=["scalar", "array", "empty", "unit", "hollow", "nested", "tuple", "none", "numpy"],
)
@each_method
def test_any_tree_of_parameters(method, params):
    opt_state, iterates = train(optax.chain(optax.sgd(0.1), method(every=2)), params, steps=4)
    state = swagjax.get_state(opt_state)
    chex.assert_trees_all_equal_structs(state.mean, params)
    assert_matches(state, chosen(iterates, every=2), step=4)


# --- Compilation --------------------------------------------------------------------------------


@each_method
def test_a_second_step_compiles_nothing(method, compilations):
    opt = optax.chain(optax.sgd(0.1), method(start=1, every=2))
    step, params = jax.jit(opt.update), model()
    opt_state, grads = opt.init(params), gradients(params, 1)
    _, opt_state = step(grads, opt_state, params)
    del compilations[:]
    for _ in range(4):
        _, opt_state = step(grads, opt_state, params)
    assert compilations == []


@each_method
def test_a_second_step_outside_jit_compiles_nothing(method, compilations):
    tx, params = method(), model()
    state, updates = tx.init(params), gradients(params, 1)
    _, state = tx.update(updates, state, params)
    del compilations[:]
    for _ in range(4):
        _, state = tx.update(updates, state, params)
    assert compilations == []


@each_method
def test_scan_over_updates_equals_a_loop(method):
    opt, params = optax.chain(optax.sgd(0.1), method(start=1, every=2)), model()

    def body(carry, t):
        params, opt_state = carry
        updates, opt_state = opt.update(gradients(params, t), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    scan = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(1, 10))[0])
    _, scanned = scan((params, opt.init(params)))
    looped, _ = train(opt, params)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5, atol=1e-6)


@each_method
def test_donation_right_after_eager_init(method):
    opt = optax.chain(optax.sgd(0.1, momentum=0.9), method())
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2)), "s": jnp.float32(1.0)}
    opt_state = opt.init(params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, opt_state))]
    assert len(set(pointers)) == len(pointers)  # nothing is an alias of anything

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        updates, opt_state = opt.update(gradients(params, 1), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    new = step(params, opt_state)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, opt_state)))
    step(*new)


def large(seed=0):
    """1.2 M parameters in six leaves."""
    shapes = {"a": (512, 1024), "b": (1024, 512), "c": (1024,), "d": (256, 512), "e": (512,)}
    return {name: numbers(shape, seed) for name, shape in shapes.items()} | {"f": numbers(())}


def compiled_step(opt, params):
    """The train step of a user: parameters and optimizer state donated."""

    def step(params, opt_state, x):
        grads = jax.grad(lambda p: sum(jnp.sum(jnp.sin(p[k] * x)) for k in p))(params)
        updates, opt_state = opt.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.eval_shape(opt.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, 1.0).compile()


def size_in_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


MEMORY_METHODS = METHODS | {
    "swag20": functools.partial(swagjax.swag, 20),
    "float16 ring": functools.partial(swagjax.swag, 20, deviation_dtype=jnp.float16),
}


@pytest.mark.parametrize("method", MEMORY_METHODS.values(), ids=MEMORY_METHODS)
def test_a_donated_step_needs_no_temporary_and_updates_the_ring_in_place(method):
    params = large()
    sgd = optax.sgd(0.1, momentum=0.9)
    plain = compiled_step(sgd, params).memory_analysis()
    opt = optax.chain(sgd, method(every=10))
    with_swag = compiled_step(opt, params).memory_analysis()
    extra = with_swag.temp_size_in_bytes - plain.temp_size_in_bytes
    assert extra < 0.05 * size_in_bytes(params)
    kept = size_in_bytes((params, jax.eval_shape(opt.init, params)))
    assert with_swag.alias_size_in_bytes >= kept


def equations(jaxpr):
    """All equations of a program, those of its branches and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def branches_and_selects(function, *args):
    """The number of ``cond``s, and the shapes of all ``select``s, of the traced program.

    A choice by platform is traced as a ``cond`` that lowering resolves, and does not count.
    """
    found = list(equations(jax.make_jaxpr(function)(*args).jaxpr))
    conds = [e for e in found if e.primitive.name == "cond"]
    conds = sum(e.params.get("branches_platforms") is None for e in conds)
    selects = [e.outvars[0].aval.shape for e in found if e.primitive.name == "select_n"]
    return conds, selects


def instructions(leaves):
    params = {f"w{i:02}": jnp.ones((3 + i % 7, 4)) for i in range(leaves)}
    opt = optax.chain(optax.sgd(0.1, momentum=0.9), swagjax.swag(4, every=10))
    return compiled_step(opt, params).as_text().count(" = ")


@pytest.mark.slow
def test_the_program_grows_linearly_with_the_number_of_leaves():
    # A check for finiteness that XLA fuses into every leaf makes it quadratic.
    small, big = instructions(20), instructions(60)
    assert big < 3.3 * small


@each_method
def test_lowers_for_other_platforms(method):
    opt, params = optax.chain(optax.sgd(0.1), method(every=2)), model()
    args = (params, opt.init(params), params)
    exported = jax.export.export(jax.jit(opt.update), platforms=("cpu", "cuda", "tpu"))(*args)
    updates, opt_state = exported.call(*args)
    # The exported program is the program.
    expected = opt.update(*args)
    chex.assert_trees_all_close((updates, opt_state), expected, rtol=1e-6)


# --- Members side by side -----------------------------------------------------------------------


def stacked(members=4):
    return {"w": numbers((members, 5)), "b": numbers((members, 2, 2), seed=1)}


def train_members(opt, params, axes, steps, spoil=None):
    """Train under vmap; ``spoil`` is (step, member) of a gradient that is not finite."""

    def one(params, opt_state, t, factor):
        grads = jax.tree.map(lambda g: factor * g, gradients(params, t))
        updates, opt_state = opt.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.vmap(opt.init, out_axes=axes)(params)
    step = jax.vmap(one, in_axes=(0, axes, None, 0), out_axes=(0, axes))
    jitted, members = jax.jit(step), len(params["w"])
    for t in range(1, steps + 1):
        factor = np.ones(members, np.float32)
        if spoil and t == spoil[0]:
            factor[spoil[1]] = np.inf
        params, opt_state = jitted(params, opt_state, t, factor)
    assert jitted._cache_size() == 1
    return opt_state, branches_and_selects(step, params, opt_state, 1, factor)


@each_method
def test_members_side_by_side_are_the_members_alone(method):
    opt = optax.chain(optax.sgd(0.1), method(start=1, every=2))
    params = stacked()
    axes = swagjax.member_axes(jax.eval_shape(opt.init, jax.tree.map(lambda x: x[0], params)))
    opt_state, (conds, selects) = train_members(opt, params, axes, steps=12)
    state = swagjax.get_state(opt_state)
    assert state.num_updates.shape == ()
    assert state.num_collected.shape == state.num_skipped.shape == (4,)
    for i in range(4):
        alone, _ = train(opt, jax.tree.map(lambda x, i=i: x[i], params), steps=12)
        member = jax.tree.map(
            lambda x, i=i: x[i], state._replace(num_updates=state.num_updates[None].repeat(4))
        )
        chex.assert_trees_all_close(member, swagjax.get_state(alone), rtol=1e-5, atol=1e-6)
    # The branch is still one, and nothing selects over the ring: (members, rank, ...).
    assert conds == 1
    assert not [s for s in selects if s[:2] == (4, RANK)]


@each_method
def test_members_mapped_over_everything_are_right_though_slower(method):
    opt = optax.chain(optax.sgd(0.1), method(start=1, every=2))
    params = stacked()
    axes = swagjax.member_axes(jax.eval_shape(opt.init, jax.tree.map(lambda x: x[0], params)))
    good, _ = train_members(opt, params, axes, steps=9)
    naive, (conds, _) = train_members(opt, params, 0, steps=9)
    good, naive = swagjax.get_state(good), swagjax.get_state(naive)
    assert conds == 0  # what member_axes is for
    np.testing.assert_array_equal(naive.num_updates, np.full(4, 9))
    naive = naive._replace(num_updates=good.num_updates)
    chex.assert_trees_all_close(naive, good, rtol=1e-6, atol=1e-7)


@each_method
def test_a_member_that_is_not_finite_leaves_the_others_alone(method):
    opt = optax.chain(optax.sgd(0.1), optax.zero_nans(), method())
    # The gradient of member 2 is infinite once: its iterates are not finite from then on.
    params = stacked()
    axes = swagjax.member_axes(jax.eval_shape(opt.init, jax.tree.map(lambda x: x[0], params)))
    spoiled = swagjax.get_state(train_members(opt, params, axes, 8, spoil=(6, 2))[0])
    whole = swagjax.get_state(train_members(opt, params, axes, 8)[0])
    until = swagjax.get_state(train_members(opt, params, axes, 5)[0])
    np.testing.assert_array_equal(spoiled.num_collected, [8, 8, 5, 8])
    np.testing.assert_array_equal(spoiled.num_skipped, [0, 0, 3, 0])
    for name in ("mean", "variance", "deviations"):
        trees = (jax.tree.leaves(getattr(x, name)) for x in (spoiled, whole, until))
        for s, w, u in zip(*trees, strict=True):
            others = np.array([0, 1, 3])
            np.testing.assert_allclose(s[others], w[others], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(s[2], u[2])


def test_members_that_are_shown_the_same_iterates():
    """States are members side by side, parameters are not: what is shared is shared with each."""
    tx, params = swagjax.swag(3), {"w": numbers(5), "b": numbers((2, 2), seed=1)}
    axes = swagjax.member_axes(jax.eval_shape(tx.init, params))
    states = [tx.init(jax.tree.map(lambda x, i=i: x + i, params)) for i in range(3)]
    for i, shift in enumerate((0.0, 1.0, 5.0)):  # something of its own in every state
        _, states[i] = tx.update(jax.tree.map(lambda x, s=shift: s * x, params), states[i], params)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = together._replace(num_updates=states[0].num_updates)
    update = jax.vmap(tx.update, in_axes=(None, axes, None), out_axes=(None, axes))
    _, together = update(params, together, params)
    for i, state in enumerate(states):
        member = jax.tree.map(lambda x, i=i: x[i], together._replace(num_updates=jnp.full(3, 2)))
        chex.assert_trees_all_close(member, tx.update(params, state, params)[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("platform", "loops"),
    [pytest.param("cpu", True, id="cpu"), pytest.param("cuda", False, id="cuda")],
)
def test_rows_of_members_are_written_in_a_loop_on_cpu_and_at_once_elsewhere(platform, loops):
    tx, params = swagjax.swag(3), stacked()
    axes = swagjax.member_axes(jax.eval_shape(tx.init, jax.tree.map(lambda x: x[0], params)))
    state = jax.vmap(tx.init, out_axes=axes)(params)
    update = jax.jit(jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes)))
    text = jax.export.export(update, platforms=(platform,))(params, state, params).mlir_module()
    assert ("stablehlo.while" in text) == loops


def test_rows_of_members_are_the_same_written_in_a_loop_or_at_once(monkeypatch):
    rings, theta, mean = numbers((4, 3, 5)), numbers((4, 5), seed=1), numbers((4, 5), seed=2)
    args = rings, jnp.array([0, 2, 1, 0]), theta, mean, jnp.array([True, True, False, True])

    def at_once(*args, cpu, default):
        return default(*args)

    write = jax.vmap(transform._write_row)
    loop = write(*args)
    monkeypatch.setattr(jax.lax, "platform_dependent", at_once)
    chex.assert_trees_all_equal(loop, write(*args))


def test_member_axes_of_any_tree():
    abstract = jax.eval_shape(optax.chain(optax.adam(0.1), swagjax.swa()).init, jnp.zeros(2))
    axes = swagjax.member_axes(abstract)
    assert swagjax.get_state(axes)._replace(num_updates=0) == swagjax.SWAGState(
        0, 0, 0, 0, None, None
    )
    assert swagjax.get_state(axes).num_updates is None
    assert axes[0][0].count == 0  # Adam's
    assert swagjax.member_axes({"a": 1.0, "b": (2.0,)}) == {"a": 0, "b": (0,)}


# --- get_state ----------------------------------------------------------------------------------


def test_get_state_where_there_is_none():
    for tree in (optax.adam(0.1).init(jnp.zeros(2)), None, (), {"a": 1.0}):
        with pytest.raises(ValueError, match=r"no SWAGState.*swagjax\.swag"):
            swagjax.get_state(tree)


def test_get_state_where_there_are_several():
    opt = optax.chain(optax.sgd(0.1), swagjax.swa(), swagjax.swag(2))
    with pytest.raises(ValueError, match="2 SWAGStates"):
        swagjax.get_state(opt.init(jnp.zeros(2)))


def test_get_state_of_a_state_is_that_state():
    state = swagjax.swag(2).init(model())
    chex.assert_trees_all_equal(swagjax.get_state(state), state)


def test_get_state_under_jit_and_of_abstract_states():
    opt = optax.chain(optax.sgd(0.1), swagjax.swag(2))
    abstract = swagjax.get_state(jax.eval_shape(opt.init, jnp.zeros(3)))
    assert abstract.deviations == jax.ShapeDtypeStruct((2, 3), jnp.result_type(float))
    mean = jax.jit(lambda s: swagjax.get_state(s).mean)(opt.init(jnp.zeros(3)))
    np.testing.assert_array_equal(mean, np.zeros(3))


# --- flax, equinox ------------------------------------------------------------------------------


@each_method
def test_linen_train_state(method):
    net = linen.Dense(2)
    params = net.init(jax.random.key(0), jnp.ones((1, 3), jnp.float32))["params"]
    opt = optax.chain(optax.sgd(0.1), method(every=2))
    train_state = TrainState.create(apply_fn=net.apply, params=params, tx=opt)

    @jax.jit
    def step(train_state, t):
        return train_state.apply_gradients(grads=gradients(train_state.params, t))

    iterates = []
    for t in range(1, 7):
        train_state = step(train_state, t)
        iterates.append(jax.tree.map(np.asarray, train_state.params))
    assert_matches(swagjax.get_state(train_state), iterates[1::2], step=6)
    assert_matches(swagjax.get_state(train_state.opt_state), iterates[1::2], step=6)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def train_nnx(method, steps=6):
    net = Net(nnx.Rngs(0))
    opt = optax.chain(optax.sgd(0.1, momentum=0.9), method(every=2))
    optimizer = nnx.Optimizer(net, opt, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x):
        grads = nnx.grad(lambda net: ((net(x) - 1) ** 2).mean())(net)
        optimizer.update(net, grads)

    iterates = []
    for t in range(steps):
        step(net, optimizer, numbers((5, 3), seed=t))
        pure = nnx.to_pure_dict(nnx.state(net, nnx.Param))
        iterates.append(jax.tree.map(np.asarray, pure))
    return net, optimizer, iterates


@each_method
def test_nnx_optimizer(method):
    _, optimizer, iterates = train_nnx(method)
    for holder in (optimizer, optimizer.opt_state):
        state = swagjax.get_state(holder)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
        pure = state._replace(
            mean=nnx.to_pure_dict(state.mean),
            variance=state.variance and nnx.to_pure_dict(state.variance),
            deviations=state.deviations and nnx.to_pure_dict(state.deviations),
        )
        assert_matches(pure, iterates[1::2], step=6)


@pytest.mark.parametrize("with_like", [False, True])
@each_method
def test_a_sample_goes_back_into_the_nnx_model(method, with_like):
    net, optimizer, _ = train_nnx(method)
    like = nnx.state(net, nnx.Param) if with_like else None
    theta = swagjax.sample(jax.random.key(0), swagjax.get_state(optimizer), like=like)
    before = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
    nnx.update(net, theta)
    pure = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    chex.assert_trees_all_equal(jax.tree.leaves(pure), jax.tree.leaves(theta))
    np.testing.assert_array_equal(net.last.kernel[...], jax.tree.leaves(theta["last"]["kernel"])[0])
    chex.assert_trees_all_equal(before, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)))
    assert net(jnp.ones((5, 3), jnp.float32)).shape == (5, 2)


@each_method
def test_equinox_module_with_none_leaves(method):
    net = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    opt = optax.chain(optax.sgd(0.1), method(every=2))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    opt_state = opt.init(params)

    @eqx.filter_jit
    def step(net, opt_state, t):
        params, _ = eqx.partition(net, eqx.is_inexact_array)
        updates, opt_state = opt.update(gradients(params, t), opt_state, params)
        return eqx.apply_updates(net, updates), opt_state

    iterates = []
    for t in range(1, 7):
        net, opt_state = step(net, opt_state, t)
        iterates.append(jax.tree.map(np.asarray, eqx.filter(net, eqx.is_inexact_array)))
    state = swagjax.get_state(opt_state)
    assert_matches(state, iterates[1::2], step=6)
    assert eqx.combine(state.mean, static)(jnp.ones(3)).shape == (2,)


# --- Sharding -----------------------------------------------------------------------------------


def sharded(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"w": P("x", "y"), "v": P(None, "x"), "b": P("y"), "s": P()}
    shapes = {"w": (8, 4), "v": (3, 8), "b": (2,), "s": ()}
    plain = {k: numbers(shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
    placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in plain.items()}
    return mesh, specs, plain, placed


def assert_sharded(state, mesh, specs):
    for name, spec in specs.items():
        for tree, wanted in ((state.mean, spec), (state.variance, spec)):
            leaf = tree[name]
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, wanted), leaf.ndim), name
        ring = state.deviations[name]
        assert ring.sharding.is_equivalent_to(NamedSharding(mesh, P(None, *spec)), ring.ndim), name


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_give_a_ring_sharded_behind_its_rank_axis(kind):
    mesh, specs, plain, placed = sharded(kind)
    opt = optax.chain(optax.sgd(0.1), swagjax.swag(4, every=2))
    with jax.set_mesh(mesh):
        opt_state = opt.init(placed)
        assert_sharded(swagjax.get_state(opt_state), mesh, specs)
        if kind == AxisType.Explicit:  # in the other mode jit is told by out_shardings alone
            assert_sharded(swagjax.get_state(jax.jit(opt.init)(placed)), mesh, specs)
        step = jax.jit(lambda p, s, t: opt.update(gradients(p, t), s, p))
        params = placed
        for t in range(1, 11):
            updates, opt_state = step(params, opt_state, t)
            params = optax.apply_updates(params, updates)
        assert_sharded(swagjax.get_state(opt_state), mesh, specs)
    expected, _ = train(opt, plain, steps=10)
    got, expected = jax.device_get((opt_state, expected))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 4])
def test_partitioned_nnx_parameters_do_not_partition_the_rank_axis(rank):
    # nnx.Optimizer copies the metadata of a parameter, ("x", None), onto its statistics. On the
    # ring that names the rank axis: an error for rank 3 over 4 devices, silently wrong for 4.
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        initializer = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", None))
        net = nnx.Linear(8, 4, kernel_init=initializer, rngs=nnx.Rngs(0))
        opt = optax.chain(optax.sgd(0.1), swagjax.swag(rank))
        optimizer = nnx.Optimizer(net, opt, wrt=nnx.Param)
        ring = swagjax.get_state(optimizer).deviations["kernel"]
    wanted = NamedSharding(mesh, P(None, "x", None))
    assert jax.tree.leaves(ring)[0].sharding.is_equivalent_to(wanted, 3)


def test_partitioned_linen_parameters_do_not_partition_the_rank_axis():
    names = linen.with_partitioning(linen.initializers.lecun_normal(), ("a", "b"))
    net, inputs = linen.Dense(4, kernel_init=names), jnp.zeros((1, 8), jnp.float32)
    params = net.init(jax.random.key(0), inputs)["params"]
    tx = swagjax.swag(rank=3)
    state = tx.init(params)
    for step in range(3):
        updates = jax.tree.map(lambda p, scale=step: scale * jnp.ones_like(p), params)
        _, state = tx.update(updates, state, params)
    assert linen.get_partition_spec(state.deviations)["kernel"] == P(None, "a", "b")
    assert linen.get_partition_spec(state.mean)["kernel"] == P("a", "b")
    drawn = swagjax.sample(jax.random.key(0), state)
    assert jax.tree.structure(drawn) == jax.tree.structure(params)
    chex.assert_trees_all_equal_structs(swagjax.variance(state), params)
    assert jnp.isfinite(swagjax.log_prob(state, params))


def test_a_start_beyond_the_counter_is_refused():
    with pytest.raises(ValueError, match=r"start=1099511627776: .*int32"):
        swagjax.swa(start=2**40)


def test_python_floats_are_leaves_as_well():
    state = swagjax.swag(2).init({"a": 1.0})
    assert state.deviations["a"].shape == (2,)
    assert state.mean["a"].dtype == jnp.result_type(float)


@pytest.mark.parametrize(
    "kind", [swagjax.swa, swagjax.swag_diag, functools.partial(swagjax.swag, 3)]
)
def test_regression_a_checkpoint_keeps_every_statistic(kind, tmp_path):
    """None of them lost, none turned into a scalar, counters and types included."""
    params, tx = {"w": jnp.arange(6.0).reshape(2, 3)}, optax.chain(optax.sgd(0.1), kind())
    opt_state = tx.init(params)
    for _ in range(5):
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert jax.tree.structure(restored) == jax.tree.structure(opt_state)
    chex.assert_trees_all_equal(restored, opt_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, opt_state)
    updates, one = tx.update(params, opt_state, params)
    chex.assert_trees_all_equal(tx.update(params, restored, params), (updates, one))


@pytest.mark.parametrize("boxed", ["linen", "nnx"])
def test_a_box_may_be_masked(boxed):
    if boxed == "linen":
        params = {"w": linen.Partitioned(jnp.ones((2, 2)), ("a", None)), "b": jnp.ones(2)}
    else:
        params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    tx = optax.masked(swagjax.swag(2), jax.tree.map(lambda x: x.ndim == 1, params))
    _, opt_state = tx.update(params, tx.init(params), params)
    state = swagjax.get_state(opt_state)
    assert [x.ndim for x in jax.tree.leaves(state.mean)] == [1]
    assert [x.ndim for x in jax.tree.leaves(state.deviations)] == [2]


# --- Beside the states of optax -----------------------------------------------------------------


def optax_names():
    """Names of the fields of all states of optax, and of the mapping of inject_hyperparams."""
    names = set()
    modules = (m for name, m in sys.modules.items() if name.split(".")[0] == "optax" and m)
    for cls in {id(c): c for m in modules for c in vars(m).values()}.values():
        if isinstance(cls, type) and cls.__module__.startswith("optax") and "State" in cls.__name__:
            names |= set(getattr(cls, "_fields", ()) or getattr(cls, "__dataclass_fields__", ()))
    return names


def test_no_field_of_ours_has_a_name_that_states_of_optax_use():
    """tree_set(opt_state, count=0), which restarts a schedule, set our counter as well."""
    taken = optax_names()
    assert {"count", "mu", "nu", "trace", "mini_step", "hyperparams", "ema"} <= taken
    ours = (
        swagjax.SWAGState,
        transform.CollectState,
        swagjax.constant_sgd.PreconditionerState,
        swagjax.ensemble.Mixture,
    )
    for cls in ours:
        # Where optax's wrappers hold the state of another optimizer, nothing is found by value.
        assert not set(cls._fields) & taken, cls


def test_restarting_a_schedule_leaves_the_posterior_alone():
    tx = optax.chain(optax.adam(0.1), swagjax.swag(2))
    with jax.numpy_dtype_promotion("standard"):  # Adam's own
        opt_state, _ = train(tx, model(), steps=5)
    assert optax.tree_utils.tree_get(opt_state, "count") == 5
    restarted = optax.tree_utils.tree_set(opt_state, count=jnp.int32(0))
    assert optax.tree_utils.tree_get(restarted, "count") == 0
    before, after = swagjax.get_state(opt_state), swagjax.get_state(restarted)
    chex.assert_trees_all_equal(before, after)


@each_method
def test_collecting_anew_forgets_what_was_collected(method):
    """num_collected=0 by tree_set: old ring rows and a mean of 1e8 stayed in use."""
    old = jnp.asarray(1e8 * np.random.default_rng(0).normal(size=(7, 4)), jnp.float32)
    new = numbers((2, 4), seed=1)
    state = feed(method(), old)
    state = optax.tree_utils.tree_set(state, num_collected=jnp.int32(0))
    state = feed(method(), new, state)
    fresh = feed(method(), new)
    chex.assert_trees_all_equal(state.mean, fresh.mean)
    chex.assert_trees_all_equal(state.variance, fresh.variance)
    assert_matches(state._replace(deviations=fresh.deviations), list(np.asarray(new)))
    chex.assert_trees_all_close(swagjax.variance(state), swagjax.variance(fresh), rtol=1e-6)


def test_a_variance_that_overflowed_is_forgotten_too():
    state = feed(swagjax.swag_diag(), jnp.array([[0.0], [1e30]], jnp.float32))
    assert not np.isfinite(state.variance).all()
    state = state._replace(num_collected=jnp.int32(0))
    state = feed(swagjax.swag_diag(), jnp.array([[1.0], [3.0]], jnp.float32), state)
    np.testing.assert_array_equal(state.variance, [1.0])


def test_counters_stop_at_the_largest_int32():
    """They wrapped to -2^31: a negative weight, and rows before the ring."""
    top = jnp.int32(2**31 - 1)
    state = feed(swagjax.swag(3), numbers((5, 4)))
    state = state._replace(num_updates=top, num_collected=top, num_skipped=top)
    again = feed(swagjax.swag(3), numbers((2, 4), seed=1), state)
    assert (again.num_updates, again.num_collected, again.num_skipped) == (top, top, top)
    np.testing.assert_allclose(again.mean, state.mean, rtol=1e-6)
    assert np.isfinite(swagjax.variance(again, centering="final")).all()
    skipped = feed(swagjax.swag(3), jnp.full((1, 4), jnp.nan), state)
    assert (skipped.num_collected, skipped.num_skipped) == (top, top)
    merged = swagjax.merge(state, again)
    assert (merged.num_updates, merged.num_collected, merged.num_skipped) == (top, top, top)
    np.testing.assert_allclose(merged.mean, state.mean, rtol=1e-6)
    assert np.isfinite(swagjax.sample(jax.random.key(0), merged)).all()


# --- Arguments are used as checked --------------------------------------------------------------


def test_integers_of_jax_are_integers():
    """rank=jnp.asarray(5) passed the check and overflowed in init."""
    five, one = jnp.asarray(5), jnp.asarray(1)
    tx = swagjax.swag(five, start=one, every=one)
    assert feed(tx, numbers((3, 2))).deviations.shape == (5, 2)
    assert swagjax.state_bytes({"w": jnp.zeros(2, jnp.float32)}, five) == 68
    for wrong in (jnp.asarray(True), jnp.asarray(2.0), jnp.asarray([2])):
        with pytest.raises(ValueError, match="rank="):
            swagjax.swag(wrong)


def test_inject_hyperparams_around_swag():
    params = jnp.ones(2)
    injected = optax.inject_hyperparams(swagjax.swag)(rank=5)
    state = injected.init(params)
    assert swagjax.get_state(state).deviations.shape == (5, 2)
    _, state = injected.update(params, state, params)
    assert swagjax.get_state(state).num_collected == 1
    # Inside jit they are traced, unless they are static.
    with pytest.raises(ValueError, match=r"rank is traced.*static_args=\('rank', ...\)"):
        jax.jit(injected.update)(params, state, params)
    static = ("rank", "start", "every")
    injected = optax.inject_hyperparams(swagjax.swag, static_args=static)(rank=5)
    _, state = jax.jit(injected.update)(params, injected.init(params), params)
    assert swagjax.get_state(state).num_collected == 1


# --- Optimizers that train elsewhere than where they are evaluated -------------------------------


QUADRATIC = jax.grad(lambda p: jnp.sum(jnp.cosh(p) * jnp.array([1.0, 3.0], p.dtype)))


def run_with(tx, params, evaluated, trained=lambda params: params, steps=11):
    """Train; return the last state and what a user would evaluate after each step, in float64."""
    step, state, found = jax.jit(tx.update), tx.init(params), []
    for _ in range(steps):
        updates, state = step(QUADRATIC(trained(params)), state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(evaluated(state.optimizer_state, params), np.float64))
    return state, found


def clean(state, params):
    """The weights that sam has not perturbed, as in the docstring of collect."""
    synced = state.steps_since_sync == 0
    return jax.tree.map(lambda x, c: jnp.where(synced, x, c), params, state.cache)


def start_at():
    return jnp.array([1.0, -1.0], jnp.float32)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_sam_is_collected_at_its_unperturbed_weights(every):
    """With an odd ``every``, swag in a chain took every other iterate from perturbed weights."""
    perturb = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
    sam = optax.contrib.sam(optax.sgd(0.05), perturb, sync_period=2)
    with jax.numpy_dtype_promotion("standard"):
        state, found = run_with(
            swagjax.collect(sam, swagjax.swag(3, every=every), clean), start_at(), clean
        )
        # By hand: x <- x - 0.05 g(x + 0.3 g / |g|), two calls a step.
        x, wanted = np.array([1.0, -1.0]), []
        gradient = lambda p: np.sinh(p) * np.array([1.0, 3.0])  # noqa: E731
        for t in range(11):
            if t % 2:
                g = gradient(x)
                x = x - 0.05 * gradient(x + 0.3 * g / np.linalg.norm(g))
            wanted.append(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert_matches(swagjax.get_state(state), chosen([None, *wanted], every=every), step=11)


def test_schedule_free_is_collected_at_its_average():
    """A chain collects y, where gradients are taken, and not x."""
    evaluate = optax.contrib.schedule_free_eval_params
    free = optax.contrib.schedule_free_sgd(0.1, b1=0.9)
    with jax.numpy_dtype_promotion("standard"):
        state, _ = run_with(swagjax.collect(free, swagjax.swag(3), evaluate), start_at(), evaluate)
        # By hand: y = .1 z + .9 x, z <- z - 0.1 g(y), x the average of the z.
        x = z = np.array([1.0, -1.0])
        wanted = []
        for t in range(1, 12):
            z = z - 0.1 * np.sinh(0.1 * z + 0.9 * x) * np.array([1.0, 3.0])
            x = x + (z - x) / t
            wanted.append(x)
        assert_matches(swagjax.get_state(state), wanted, step=11, rtol=1e-4)
        # In a chain it is found out when the state is read.
        chain = optax.chain(free, swagjax.swag(3))
        opt_state = chain.init(start_at())
    with pytest.raises(ValueError, match=r"ScheduleFreeState.*swagjax\.collect"):
        swagjax.get_state(opt_state)
    assert swagjax.get_state(opt_state[1]).num_collected == 0


def test_lookahead_is_collected_at_its_slow_weights():
    slow = lambda _, params: params.slow  # noqa: E731
    ahead = optax.lookahead(optax.sgd(0.1), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(start_at())
    with jax.numpy_dtype_promotion("standard"):
        tx = swagjax.collect(ahead, swagjax.swag(3), slow)
        state, _ = run_with(tx, params, slow, trained=lambda params: params.fast)
        fast = held = np.array([1.0, -1.0])
        wanted = []
        for t in range(1, 12):
            fast = fast - 0.1 * np.sinh(fast) * np.array([1.0, 3.0])
            if t % 3 == 0:
                fast = held = held + 0.5 * (fast - held)
            wanted.append(held)
    assert_matches(swagjax.get_state(state), wanted, step=11)
    # Inside, it would see the fast weights alone, before they are synchronised.
    inside = optax.lookahead(optax.chain(optax.sgd(0.1), swagjax.swag(3)), 3, 0.5)
    with pytest.raises(ValueError, match=r"LookaheadState.*swagjax\.collect"):
        swagjax.get_state(inside.init(params))
    # Behind it, it sees both.
    both = optax.chain(ahead, swagjax.swag(3)).init(params)
    assert swagjax.get_state(both).mean.slow.shape == (2,)


def test_collect_with_a_mask_and_only_when_it_is_time():
    """``evaluate`` stands in the branch, sees all weights, and what the mask holds is collected."""
    params = model()
    masked = optax.masked(swagjax.swag(2, every=3), {"b": True, "w": False})
    tx = swagjax.collect(
        optax.sgd(0.1),
        masked,
        lambda _, p: jax.tree.map(lambda x: 2 * x + p["w"]["z"][0].astype(x.dtype), p),
    )
    # The trees of params and state have their structure checked in ``train``.
    opt_state, iterates = train(tx, params, steps=7)
    wanted = [2 * x["b"] + x["w"]["z"][0] for x in iterates]
    state = swagjax.get_state(opt_state)
    assert_matches(state, chosen(wanted, every=3), step=7)
    assert swagjax.variance(state)["w"] == optax.MaskedNode()
    found = jax.make_jaxpr(tx.update)(params, opt_state, params)
    outside = [e.primitive.name for e in found.jaxpr.eqns]
    assert "cond" in outside
    plain = jax.make_jaxpr(optax.chain(optax.sgd(0.1), masked).update)(
        params, optax.chain(optax.sgd(0.1), masked).init(params), params
    )
    assert outside.count("mul") == [e.primitive.name for e in plain.jaxpr.eqns].count("mul")


def test_collect_asks_for_a_function():
    with pytest.raises(ValueError, match="evaluate is a int: give a function"):
        swagjax.collect(optax.sgd(0.1), swagjax.swag(2), 3)


# --- Derivatives --------------------------------------------------------------------------------


def of_collected(rows):
    """A number that depends on all that was collected, mean, variance and ring."""
    zeros, tx = jnp.zeros(rows.shape[1], rows.dtype), swagjax.swag(2)
    state = tx.init(zeros)
    for row in rows:
        _, state = tx.update(row, state, zeros)
    weights = jnp.arange(1.0, 1 + rows.shape[1], dtype=rows.dtype)
    return jnp.sum(weights * (swagjax.variance(state) + state.mean**3))


def by_hand(rows):
    """The same from the definitions, in float64."""
    mean = rows.mean(0)
    D = np.stack([rows[1] - rows[:2].mean(0), rows[2] - mean])
    variance = (rows.var(0) + (D**2).sum(0)) / 2
    return (np.arange(1.0, 1 + rows.shape[1]) * (variance + mean**3)).sum()


def numeric_gradient(function, x, h=1e-5):
    steps = h * np.eye(x.size).reshape(x.size, *x.shape)
    slopes = [(function(x + s) - function(x - s)) / (2 * h) for s in steps]
    return np.reshape(slopes, x.shape)


DERIVATIVES = {
    "grad": jax.grad,
    "jacfwd": jax.jacfwd,
    "remat": lambda function: jax.grad(jax.checkpoint(function)),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_collecting_is_differentiable(derivative):
    """The row write had no reverse mode: "Linearization failed" in meta-learning and remat."""
    rows = np.random.default_rng(0).normal(size=(3, 2))
    got = jax.jit(DERIVATIVES[derivative](of_collected))(jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(got, numeric_gradient(by_hand, rows), rtol=1e-4, atol=1e-5)


def test_collecting_is_differentiable_twice_and_for_members_side_by_side():
    rows = np.random.default_rng(0).normal(size=(2, 3, 2))

    def once(x):
        return numeric_gradient(by_hand, x, 1e-4)

    wanted = [numeric_gradient(lambda x: (once(x) * rows[0]).sum(), x, 1e-4) for x in rows]

    def along(x):  # forward over reverse
        return jax.jvp(jax.grad(of_collected), (x,), (jnp.asarray(rows[0], x.dtype),))[1]

    got = jax.jit(jax.vmap(along))(jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


# --- Weights spread by shard_map ----------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shards_collect_all_together_or_not_at_all(kind, check_vma):
    """Under shard_map the default was a TypeError; without check_vma counters came apart."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"w": P("x", "y"), "b": P("y"), "s": P()}
    ring = jax.tree.map(lambda spec: P(None, *spec), specs)
    of_state = swagjax.SWAGState(P(), P(), P(), specs, specs, ring)
    shapes = {"w": (3, 8, 4), "b": (3, 2), "s": (3,)}
    iterates = {k: numbers(shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
    # The second is not finite, in one coordinate on one device.
    iterates["w"] = iterates["w"].at[1, 5, 3].set(jnp.inf)
    tx = swagjax.swag(2)
    with jax.set_mesh(mesh):
        init, update = (
            jax.jit(
                jax.shard_map(
                    function,
                    mesh=mesh,
                    in_specs=in_specs,
                    out_specs=of_state,
                    check_vma=check_vma,
                )
            )
            for function, in_specs in (
                (tx.init, (specs,)),
                (lambda u, s, p: tx.update(u, s, p)[1], (specs, of_state, specs)),
            )
        )
        place = functools.partial(
            jax.tree.map, lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), specs
        )
        zeros = place({k: jnp.zeros_like(x[0]) for k, x in iterates.items()})
        state = init(zeros)
        for t in range(3):
            step = place({k: x[t] for k, x in iterates.items()})
            state = update(step, state, zeros)
    assert {int(s.data) for s in state.num_collected.addressable_shards} == {2}
    assert {int(s.data) for s in state.num_skipped.addressable_shards} == {1}
    assert_matches(jax.device_get(state), [rows(iterates)[i] for i in (0, 2)], step=3, skipped=1)


def test_members_on_devices_of_their_own_skip_alone():
    """Counters that vary along an axis of the mesh are those of members, not of one posterior."""
    mesh = jax.make_mesh((4,), ("member",), axis_types=(AxisType.Auto,))
    axes = swagjax.member_axes(jax.eval_shape(swagjax.swag(2).init, jnp.zeros(3)))
    tx, spec = swagjax.swag(2), P("member")
    init = jax.vmap(tx.init, out_axes=axes)
    update = jax.vmap(lambda u, s, p: tx.update(u, s, p)[1], (0, axes, 0), axes)
    of_state = jax.tree.map(
        lambda axis: P() if axis is None else spec, axes, is_leaf=lambda axis: axis is None
    )
    step = jax.jit(
        jax.shard_map(update, mesh=mesh, in_specs=(spec, of_state, spec), out_specs=of_state)
    )
    zeros = jnp.zeros((4, 3), jnp.float32)
    updates = numbers((4, 3)).at[2, 1].set(jnp.nan)
    state = step(updates, init(zeros), zeros)
    np.testing.assert_array_equal(state.num_collected, [1, 1, 0, 1])
    np.testing.assert_array_equal(state.num_skipped, [0, 0, 1, 0])

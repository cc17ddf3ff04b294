import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swagjax
from swagjax.schedules import at_minimum, cyclical_schedule, swa_schedule


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


# --- Cycles ----------------------------------------------------------------------------------


def triangular_of_the_paper(i, c, high, low):
    """Garipov et al. 2018, section 4, with its branches; i = 1, 2, ... counts the updates."""
    t = ((i - 1) % c + 1) / c
    if t <= 0.5:
        return (1 - 2 * t) * high + 2 * t * low
    return (2 - 2 * t) * low + (2 * t - 1) * high


def cosine_of_the_paper(i, c, high, low):
    """Zhang et al. 2020, equation 1, for what lies above the lowest value."""
    return low + (high - low) / 2 * (math.cos(math.pi * ((i - 1) % c) / c) + 1)


OF_THE_PAPERS = {"triangular": triangular_of_the_paper, "cosine": cosine_of_the_paper}


def cycles_oracle(shape, step, c, high, low, start=0):
    return high if step < start else OF_THE_PAPERS[shape](step - start + 1, c, high, low)


@pytest.mark.parametrize("shape", OF_THE_PAPERS)
@pytest.mark.parametrize(("c", "start"), [(2, 0), (10, 3), (46_876, 7)])
def test_cycles_equal_the_formula_at_every_step(shape, c, start):
    schedule = cyclical_schedule(0.05, 0.0005, c, shape=shape, start=start)
    steps = np.arange(start + 2 * c + 2) if c < 200 else np.linspace(0, 9 * c, 500).astype(int)
    expected = [cycles_oracle(shape, int(step), c, 0.05, 0.0005, start) for step in steps]
    np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("shape", "c"), [*zip(OF_THE_PAPERS, (6, 6), strict=True), ("cosine", 5)])
@pytest.mark.parametrize("start", [0, 4])
def test_at_minimum_finds_the_lowest_update_of_every_cycle(shape, c, start):
    """The t-th update is taken at schedule(t - 1)."""
    schedule = cyclical_schedule(1.0, 0.1, c, shape=shape, start=start)
    due, t = at_minimum(c, shape=shape, start=start), np.arange(1, start + 5 * c + 1)
    rates = np.asarray(jax.vmap(schedule)(t - 1))
    np.testing.assert_array_equal(t[np.asarray(due(t))], t[rates < rates.min() + 1e-3])
    assert due(t).sum() == 5
    assert bool(jax.jit(due)(jnp.int32(t[due(t)][0]))) is True


@pytest.mark.parametrize(("shape", "c"), [("triangular", 8), ("cosine", 7)])
def test_the_last_part_of_a_cycle_leads_to_its_minimum(shape, c):
    t, start = np.arange(1, 4 + 4 * c), 3
    lowest = set(t[np.asarray(at_minimum(c, shape=shape, start=start)(t))])
    wanted = {low - back for low in lowest for back in range(3)}
    due = at_minimum(c, shape=shape, start=start, last=3)
    assert set(t[np.asarray(due(t))]) == wanted
    # The whole way down, and nothing before the first cycle.
    longest = {"triangular": c // 2, "cosine": c}[shape]
    way = at_minimum(c, shape=shape, start=start, last=longest)(t)
    assert t[np.asarray(way)].min() == start + 1


def test_the_sampling_stage_of_cyclical_sg_mcmc():
    """r(k) = mod(k - 1, c) / c >= beta, here for beta = 3/4."""
    k = np.arange(1, 41)
    due = at_minimum(20, shape="cosine", last=5)
    np.testing.assert_array_equal(due(k), (k - 1) % 20 / 20 >= 0.75)


def test_the_snapshot_is_the_iterate_after_the_step_of_the_lowest_rate():
    """A gradient of one: the iterate tells the sum of the rates so far."""
    c, start = 4, 2
    tx = optax.chain(
        optax.sgd(cyclical_schedule(1.0, 0.25, c, start=start)),
        swagjax.swag(5, when=at_minimum(c, start=start)),
    )
    params, update = jnp.float32(0.0), jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(start + 3 * c):
        updates, state = update(jnp.float32(1.0), state, params)
        params = optax.apply_updates(params, updates)
    rates = [cycles_oracle("triangular", s, c, 1.0, 0.25, start) for s in range(start + 3 * c)]
    wanted = [-sum(rates[: start + n * c + c // 2]) for n in range(3)]
    got = swagjax.posterior.iterates(swagjax.get_state(state))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_warm_up_joined_before_the_cycles():
    warm_up = optax.linear_schedule(0.0, 1.0, 10)
    cycles = cyclical_schedule(1.0, 0.2, 4, shape="cosine")
    joined = optax.join_schedules([warm_up, cycles], [10])
    got = [float(joined(step)) for step in range(20)]
    wanted = [s / 10 for s in range(10)]
    wanted += [cycles_oracle("cosine", s, 4, 1.0, 0.2) for s in range(10)]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_cycles_for_any_kind_of_step_and_under_strict_promotion():
    schedule = cyclical_schedule(0.1, 0.0, 10, start=3)
    wanted = cycles_oracle("triangular", 37, 10, 0.1, 0.0, 3)
    with jax.numpy_dtype_promotion("strict"):
        for step in (37, np.int64(37), jnp.int32(37), jnp.float32(37)):
            np.testing.assert_allclose(jax.jit(schedule)(step), wanted, rtol=1e-5)
    longest = np.iinfo(np.int32).max  # exact to the last step: counted in integers
    np.testing.assert_allclose(
        schedule(longest), cycles_oracle("triangular", longest, 10, 0.1, 0.0, 3), rtol=1e-5
    )


CYCLES_MISUSE = {
    "infinite": (lambda: cyclical_schedule(math.inf, 0.1, 4), r"max_value is inf.*try 0\.05"),
    "negative": (lambda: cyclical_schedule(0.1, -0.1, 4), r"min_value is -0\.1.*not negative"),
    "swapped": (
        lambda: cyclical_schedule(0.1, 0.2, 4),
        r"min_value is 0\.2 and max_value 0\.1.*\(max_value, min_value, cycle\)",
    ),
    "odd": (lambda: cyclical_schedule(0.1, 0.0, 5), "cycle is 5.*even number, such as 6"),
    "odd, of at_minimum": (lambda: at_minimum(5), "cycle is 5.*even number, such as 6"),
    "short": (lambda: cyclical_schedule(0.1, 0.0, 1), "cycle=1: give an integer of at least 2"),
    "epochs": (lambda: at_minimum(1.5), r"cycle=1\.5: give an integer of at least 2"),
    "shape": (
        lambda: cyclical_schedule(0.1, 0.0, 4, shape="cosin"),
        "shape is 'cosin': give 'triangular' or 'cosine'",
    ),
    "start": (lambda: cyclical_schedule(0.1, 0.0, 4, start=-1), "start=-1: give an integer"),
    "start of at_minimum": (lambda: at_minimum(4, start=-1), "start=-1: give an integer"),
    "none of a cycle": (lambda: at_minimum(4, last=0), "last=0: give an integer of at least 1"),
    "more than the way down": (
        lambda: at_minimum(4, last=3),
        "last is 3, but the triangular cycle of 4 updates .* after 2: give 1 to 2",
    ),
}


@pytest.mark.parametrize(("use", "message"), CYCLES_MISUSE.values(), ids=CYCLES_MISUSE)
def test_wrong_cycles_are_answered(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_integers_of_jax_and_beyond_int32():
    """A checked argument is used as checked; one beyond the counter was an OverflowError later."""
    t = jnp.arange(1, 9)
    due = at_minimum(jnp.asarray(4), start=jnp.asarray(2), last=jnp.asarray(1))
    np.testing.assert_array_equal(due(t), at_minimum(4, start=2)(t))
    for make in (
        lambda n: cyclical_schedule(1.0, 0.1, 4, start=n),
        lambda n: cyclical_schedule(1.0, 0.1, n),
        lambda n: at_minimum(4, start=n),
        lambda n: at_minimum(n),
    ):
        with pytest.raises(ValueError, match=r"=1099511627776: steps are counted in int32"):
            make(2**40)

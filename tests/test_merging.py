"""Two runs merged against one run of all iterates, and against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import swagjax

SOME = settings(max_examples=30, deadline=None, derandomize=True)
MANY = settings(max_examples=400, deadline=None, derandomize=True)
SHAPES = {"b": (3,), "rest": [(2, 2), ()], "void": (0, 2)}
SIZE = 8
RANKS = (2, 3)
EPS = np.finfo(np.float32).eps
FACTORIES = {
    "swag": swagjax.swag,
    "swag_diag": lambda rank: swagjax.swag_diag(),
    "swa": lambda rank: swagjax.swa(),
}
KINDS = tuple(FACTORIES)


@functools.cache
def transformation(kind, rank, deviation_dtype=None):
    if kind == "swag":
        return swagjax.swag(rank, deviation_dtype=deviation_dtype)
    return FACTORIES[kind](rank)


def unflatten(vector, dtype=np.float32):
    """A vector of ``SIZE`` numbers as a tree of parameters."""
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    parts = np.split(np.asarray(vector, dtype), np.cumsum([np.prod(s, dtype=int) for s in shapes]))
    leaves = [jnp.asarray(x.reshape(s)) for x, s in zip(parts, shapes, strict=False)]
    return jax.tree.unflatten(treedef, leaves)


def collect(tx, iterates, state=None, dtype=np.float32):
    """The state of a run over iterates, rows of ``SIZE`` numbers; or of one that goes on."""
    zeros = unflatten(np.zeros(SIZE), dtype)
    state = tx.init(zeros) if state is None else state
    for x in iterates:
        _, state = tx.update(unflatten(x, dtype), state, zeros)
    return state


def walk(seed, lengths, drift=0.5, apart=0.0):
    """Float32 iterates of several runs, each ``apart`` from the one before, as float64 rows."""
    rng = np.random.default_rng(seed)
    spread, origin = rng.uniform(0.1, 1.0, SIZE), rng.normal(size=SIZE)
    rows, runs = rng.normal(size=(sum(lengths), SIZE)), []
    for i, length in enumerate(lengths):
        noise, rows = rows[:length], rows[length:]
        steps = drift * np.arange(length)[:, None] + apart * i
        runs.append((origin + spread * (noise + steps)).astype(np.float32).astype(np.float64))
    return runs


def flat_ring(state):
    rings = [np.asarray(x, np.float64) for x in jax.tree.leaves(state.deviations)]
    return np.concatenate([x.reshape(len(x), -1) for x in rings], 1)


def assert_one_run(state, iterates, rank, eps=EPS, ring_eps=0.0):
    """The state is that of one run over the iterates, but for rounding.

    The mean and the rows are right to ``eps`` of the largest iterate for each one collected, the
    variance to that times the deviations, the rows of a coarser ring also to 4 of its roundings.
    """
    n, x = len(iterates), iterates
    assert int(state.num_collected) == n
    if not n:
        assert all(not leaf.any() for leaf in jax.tree.leaves(state))
        return
    error = (n + 8) * eps * np.abs(x).max(0)
    width = np.abs(x - x.mean(0)).max(0)
    assert (np.abs(oracle.flatten(state.mean) - x.mean(0)) <= error).all()
    if state.variance is not None:
        bound = 2 * error * width + (n + 8) * eps * width**2
        assert (np.abs(oracle.flatten(state.variance) - x.var(0)) <= bound).all()
    if state.deviations is not None:
        ring = oracle.ring(x, rank)
        bound = 2 * error + 4 * ring_eps * np.abs(ring).max(0)
        assert (np.abs(flat_ring(state) - ring) <= bound).all()


def assert_identical(state, wanted):
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, leaf)


def assert_close(state, wanted, tolerance=2e-5):
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_allclose(got, leaf, rtol=tolerance, atol=tolerance)


# --- One run ---------------------------------------------------------------------------------


def lengths(rank):
    """None, one, below, at and above the rank, several times round the ring."""
    return st.integers(0, 3 * rank + 1)


@st.composite
def runs(draw, number=2):
    rank = draw(st.sampled_from(RANKS))
    sizes = [draw(lengths(rank)) for _ in range(number)]
    drift, apart = draw(st.sampled_from([0.0, 0.5])), draw(st.sampled_from([0.0, 5.0]))
    seed = draw(st.integers(0, 2**32 - 1))
    return rank, walk(seed, sizes, drift, apart)


def check_merge(kind, rank, first, second):
    tx = transformation(kind, rank)
    a, b = collect(tx, first), collect(tx, second)
    merged, both = swagjax.merge(a, b), np.concatenate([first, second])
    assert_one_run(merged, both, rank)
    assert_close(merged, collect(tx, second, a), 3e-4)
    assert int(merged.num_updates) == len(both)
    for centering in ("running", "final") if len(both) else ():
        wanted = np.diag(oracle.covariance(kind, both, rank, centering=centering))
        got = oracle.flatten(swagjax.variance(merged, centering=centering))
        size = np.abs(both).max(0) * np.abs(both - both.mean(0)).max(0)
        assert (np.abs(got - wanted) <= 4 * (len(both) + 8) * EPS * size).all()


@pytest.mark.slow
@SOME
@given(st.sampled_from(KINDS), runs())
def test_merging_two_runs_is_one_run(kind, case):
    rank, (first, second) = case
    check_merge(kind, rank, first, second)


@pytest.mark.slow
@MANY
@given(st.sampled_from(KINDS), runs())
def test_merging_any_two_runs_is_one_run(kind, case):
    rank, (first, second) = case
    check_merge(kind, rank, first, second)


@pytest.mark.parametrize("n", range(8))
@pytest.mark.parametrize("m", range(8))
def test_every_offset_of_both_rings(n, m):
    """A ring of 3: each offset of each ring, and each number of rows that the first gives."""
    check_merge("swag", 3, *walk(8 * n + m, (n, m), apart=2.0))


@SOME
@given(runs(3))
def test_collecting_goes_on_after_merging(case):
    """The order of collection is in the counts: the next row is the next of the one run."""
    rank, (first, second, third) = case
    tx = transformation("swag", rank)
    merged = swagjax.merge(collect(tx, first), collect(tx, second))
    assert_one_run(collect(tx, third, merged), np.concatenate(case[1]), rank)


@SOME
@given(runs(3))
def test_merging_is_associative(case):
    rank, parts = case
    a, b, c = (collect(transformation("swag", rank), part) for part in parts)
    for merged in (
        swagjax.merge(swagjax.merge(a, b), c),
        swagjax.merge(a, swagjax.merge(b, c)),
        functools.reduce(swagjax.merge, (a, b, c)),
    ):
        assert_one_run(merged, np.concatenate(parts), rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", range(1, 9))
def test_an_empty_state_is_neutral_to_the_last_bit(kind, n):
    tx = transformation(kind, 3)
    state, empty = collect(tx, walk(n, (n,))[0]), collect(tx, [])
    assert_identical(swagjax.merge(state, empty), state)
    assert_identical(swagjax.merge(empty, state), state)
    assert_identical(swagjax.merge(empty, empty), empty)


@pytest.mark.parametrize("size", [1e20, 1e30])
@pytest.mark.parametrize("kind", ["swag", "swag_diag"])
def test_an_empty_state_is_neutral_to_weights_whose_square_is_infinite(kind, size):
    """The mean of an empty state is zero: its distance from the other means nothing."""
    tx = transformation(kind, 3)
    state, empty = collect(tx, size * np.ones((4, SIZE))), collect(tx, [])
    assert_identical(swagjax.merge(state, empty), state)
    assert_identical(swagjax.merge(empty, state), state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_do_not_depend_on_the_order(kind):
    tx = transformation(kind, 3)
    a, b = (collect(tx, part) for part in walk(0, (4, 9), apart=3.0))
    one, two = swagjax.merge(a, b), swagjax.merge(b, a)
    assert_close(
        (one.num_collected, one.mean, one.variance),
        (two.num_collected, two.mean, two.variance),
        1e-5,
    )


def test_the_ring_is_made_of_the_second_alone_where_that_fills_it():
    """As documented: what the first held is forgotten, but for its mean."""
    tx = transformation("swag", 3)
    a, b = (collect(tx, part) for part in walk(0, (7, 5)))
    other = a._replace(deviations=jax.tree.map(jnp.ones_like, a.deviations))
    assert_identical(swagjax.merge(other, b), swagjax.merge(a, b))
    reverse = swagjax.merge(b, a)
    assert np.abs(flat_ring(reverse) - flat_ring(swagjax.merge(a, b))).max() > 0.1


# --- Counters --------------------------------------------------------------------------------


def test_counters_are_added_up():
    """Steps that did not collect, and iterates that were not finite, are of both runs."""
    first, second = walk(1, (9, 8))
    second[2:4] = np.nan
    states = []
    for iterates, tx in (
        (first, swagjax.swag(3, start=2, every=3)),
        (second, swagjax.swag(3, every=2)),
    ):
        states.append(collect(tx, iterates))
    merged = swagjax.merge(*states)
    counters = int(merged.num_updates), int(merged.num_collected), int(merged.num_skipped)
    assert counters == (17, 2 + 3, 1)
    assert (
        merged.num_updates.dtype
        == merged.num_collected.dtype
        == merged.num_skipped.dtype
        == jnp.int32
    )
    seen = np.concatenate([first[[4, 7]], second[[1, 5, 7]]])
    assert_one_run(merged, seen, 3)


# --- Dtypes and numerics ---------------------------------------------------------------------


@SOME
@given(runs())
def test_rings_of_bfloat16(case):
    """Rows are rounded when stored and when merged: 2^-8 of the largest, few times over.

    A row of the second run is shifted by later ones with weights of at most 1/(j - 1).
    """
    rank, parts = case
    tx = transformation("swag", rank, jnp.bfloat16)
    merged = swagjax.merge(*(collect(tx, part) for part in parts))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(merged.deviations))
    assert_one_run(merged, np.concatenate(parts), rank, ring_eps=2.0**-8)


@pytest.mark.slow
@SOME
@given(runs())
def test_merging_in_float64(case):
    rank, parts = case
    with jax.enable_x64(True):
        tx = swagjax.swag(rank)
        merged = swagjax.merge(*(collect(tx, part, dtype=np.float64) for part in parts))
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(merged.mean))
        assert_one_run(merged, np.concatenate(parts), rank, eps=np.finfo(np.float64).eps)


def test_the_state_keeps_the_dtypes_of_the_first():
    first, second = walk(2, (5, 4))
    coarse = swagjax.swag(3, accumulator_dtype=jnp.bfloat16)
    a, b = collect(coarse, first), collect(transformation("swag", 3), second)
    for merged, like in ((swagjax.merge(a, b), a), (swagjax.merge(b, a), b)):
        dtypes = [jax.tree.map(lambda x: x.dtype, tree) for tree in (merged, like)]
        assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("std", [1e-4, 1e-5])
@pytest.mark.parametrize(("n", "m"), [(70, 69), (138, 1), (1, 138)])
def test_runs_around_one_lose_nothing_by_merging(std, n, m):
    """The difference of the means is exact, so the variance is as good as that of one run."""
    rng = np.random.default_rng(n)
    draw = lambda count: (1 + std * rng.normal(size=(count, SIZE))).astype(np.float32)  # noqa: E731
    first, second = draw(n), draw(m)
    tx = transformation("swag", 3)
    merged = swagjax.merge(collect(tx, first), collect(tx, second))
    both = np.concatenate([first, second]).astype(np.float64)
    error = np.abs(oracle.flatten(merged.variance) / both.var(0) - 1)
    assert error.max() < {1e-4: 1e-3, 1e-5: 2e-2}[std]
    # A rounding of the mean at 1, once a merge: half a spacing of float32 above 1.
    ring = np.abs(flat_ring(merged) - oracle.ring(both, 3))
    assert ring.max() < 8 * EPS


@pytest.mark.parametrize("apart", [1e2, 1e4, 1e6])
def test_means_far_apart(apart):
    """The variance is then that of two points, and the distance is right to its last digits."""
    first, second = walk(3, (5, 7))
    second = (second + apart).astype(np.float32).astype(np.float64)
    tx = transformation("swag", 3)
    merged = swagjax.merge(collect(tx, first), collect(tx, second))
    both = np.concatenate([first, second])
    np.testing.assert_allclose(oracle.flatten(merged.mean), both.mean(0), rtol=1e-6)
    np.testing.assert_allclose(oracle.flatten(merged.variance), both.var(0), rtol=2e-6)
    wanted = oracle.ring(both, 3)
    np.testing.assert_allclose(flat_ring(merged), wanted, rtol=0, atol=4 * EPS * apart)


# --- jit, vmap, meshes, holes ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merging_under_jit(kind):
    tx = transformation(kind, 3)
    a, b = (collect(tx, part) for part in walk(4, (4, 6)))
    assert_close(jax.jit(swagjax.merge)(a, b), swagjax.merge(a, b), 1e-6)


def test_other_counts_compile_nothing():
    tx, seen = transformation("swag", 3), []
    states = [collect(tx, part) for part in walk(5, (0, 2, 5, 9))]
    swagjax.merge(states[0], states[1])

    def listen(event, *_, **__):
        seen.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        merged = [swagjax.merge(a, b) for a in states for b in states]
        swagjax.merge(merged[-1], merged[1])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not seen


@pytest.mark.parametrize("kind", KINDS)
def test_merging_members_side_by_side(kind):
    """Of counts of their own: each member is merged as if it were alone."""
    tx = transformation(kind, 3)
    parts = walk(6, (2, 5, 3, 4, 1, 0))
    first, second = ([collect(tx, part) for part in parts[i::2]] for i in (0, 1))
    stacked = [
        jax.tree.map(lambda *x: jnp.stack(x), *members)._replace(num_updates=jnp.int32(7))
        for members in (first, second)
    ]
    axes = swagjax.member_axes(first[0])
    together = jax.vmap(swagjax.merge, in_axes=(axes, axes), out_axes=axes)(*stacked)
    assert together.num_updates == 14
    for i, pair in enumerate(zip(first, second, strict=True)):
        member = jax.tree.map(lambda x, axis, i=i: x[i] if axis == 0 else x, together, axes)
        alone = swagjax.merge(*pair)
        assert_close(member._replace(num_updates=alone.num_updates), alone, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_not_merged_without_vmap(kind):
    """Three members of three weights each: counts would spread along the wrong axis."""
    tx = FACTORIES[kind](3)
    rng, members = np.random.default_rng(0), []
    for n in (2, 4, 5):
        state = tx.init(jnp.zeros(3))
        for x in rng.normal(size=(n, 3)).astype(np.float32):
            _, state = tx.update(jnp.asarray(x), state, jnp.zeros(3))
        members.append(state)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    with pytest.raises(ValueError, match=r"several members.*jax\.vmap"):
        swagjax.merge(stacked, stacked)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_sharded_states(kind, axis_type):
    """The result lies as its parts do, the ring behind a whole rank axis."""
    tx, rng = transformation(kind, 3), np.random.default_rng(0)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:4])
    leaf, ring = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("d",), (None, "d")))
    alone, placed = [], []
    for n in (5, 2):
        state = tx.init({"w": jnp.zeros((8, 3))})
        for x in rng.normal(size=(n, 8, 3)).astype(np.float32):
            _, state = tx.update({"w": jnp.asarray(x)}, state, {"w": jnp.zeros((8, 3))})
        alone.append(state)
        put = jax.tree.map(lambda x: jax.device_put(x, leaf), (state.mean, state.variance))
        rings = jax.tree.map(lambda x: jax.device_put(x, ring), state.deviations)
        placed.append(state._replace(mean=put[0], variance=put[1], deviations=rings))
    program = jax.jit(swagjax.merge).lower(*placed).compile().as_text()
    assert "all-gather" not in program
    for merge in (swagjax.merge, jax.jit(swagjax.merge)):
        merged = merge(*placed)
        assert_close(merged, swagjax.merge(*alone), 1e-5)
        assert merged.mean["w"].sharding.is_equivalent_to(leaf, 2)
        for x in jax.tree.leaves(merged.variance):
            assert x.sharding.is_equivalent_to(leaf, 2)
        for x in jax.tree.leaves(merged.deviations):
            assert x.sharding.is_equivalent_to(ring, 3)


def test_masked_and_missing_leaves_stay_holes():
    params = {"free": jnp.zeros(2), "frozen": jnp.ones(3), "none": None}
    tx = optax.masked(swagjax.swag(2), {"free": True, "frozen": False, "none": None})
    states, iterates = [], walk(7, (3, 4))
    for part in iterates:
        opt_state = tx.init(params)
        for x in part:
            updates = {"free": jnp.asarray(x[:2], jnp.float32), "frozen": params["frozen"]}
            _, opt_state = tx.update({**updates, "none": None}, opt_state, params)
        states.append(swagjax.get_state(opt_state))
    merged = swagjax.merge(*states)
    assert isinstance(merged.mean["frozen"], optax.MaskedNode)
    assert_one_run(merged, np.concatenate(iterates)[:, :2], 2)
    theta = swagjax.sample(jax.random.key(0), merged, like=params)
    np.testing.assert_array_equal(theta["frozen"], params["frozen"])


def test_a_tree_without_leaves():
    tx = swagjax.swag(2)
    state = tx.update({}, tx.init({}), {})[1]
    merged = swagjax.merge(state, state)
    assert (int(merged.num_collected), merged.mean, merged.deviations) == (2, {}, {})


def test_dropped_fields_are_dropped_of_both():
    """A SWAG run and a SWAG-Diag run have a mean and a variance in common."""
    first, second = walk(8, (5, 4))
    a, b = (
        collect(transformation("swag", 3), first),
        collect(transformation("swag_diag", 3), second),
    )
    merged = swagjax.merge(a._replace(deviations=None), b)
    assert_one_run(merged, np.concatenate([first, second]), 3)


# --- Errors ----------------------------------------------------------------------------------


def some_state(kind="swag", rank=3):
    return collect(transformation(kind, rank), walk(9, (4,))[0])


@pytest.mark.parametrize("wrong", [None, {"mean": 1.0}, 3, optax.adam(1e-3)])
def test_what_is_no_state_points_to_get_state(wrong):
    name = type(wrong).__name__
    with pytest.raises(ValueError, match=rf"first is a {name}.*get_state\(opt_state\)"):
        swagjax.merge(wrong, some_state())
    with pytest.raises(ValueError, match=rf"second is a {name}.*get_state\(opt_state\)"):
        swagjax.merge(some_state(), wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_other_kinds_are_refused(kind, other):
    if kind == other:
        return
    field = "variance" if "swa" in (kind, other) else "deviations"
    with pytest.raises(ValueError, match=rf"first\.{field} is .*same kind"):
        swagjax.merge(some_state(kind), some_state(other))


def test_other_ranks_are_refused():
    with pytest.raises(ValueError, match=r"first\.deviations is .*\(3, 3\).*\(2, 3\).*same .*rank"):
        swagjax.merge(some_state(rank=3), some_state(rank=2))


def vector_state(params):
    tx = swagjax.swag_diag()
    return tx.update(params, tx.init(params), params)[1]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 2), (2, 1)])
def test_other_shapes_are_refused(shape):
    """A broadcast would be silent."""
    state, other = vector_state({"w": jnp.zeros(2)}), vector_state({"w": jnp.zeros(shape)})
    for pair in ((state, other), (other, state)):
        with pytest.raises(ValueError, match=r"first\.mean is .*second\.mean is .*parameters"):
            swagjax.merge(*pair)


@pytest.mark.parametrize(
    "params",
    [
        {"v": jnp.zeros(2), "w": jnp.zeros(2)},
        {"w": [jnp.zeros(2)]},
        {"v": jnp.zeros(2)},
        {},
        jnp.zeros(2),
        {"w": None},
        {"w": jnp.zeros(2), "v": None},
    ],
)
def test_other_structures_are_refused(params):
    state, other = vector_state({"w": jnp.zeros(2)}), vector_state(params)
    for pair in ((state, other), (other, state)):
        with pytest.raises(ValueError, match=r"structure|same kind"):
            swagjax.merge(*pair)


def test_lists_are_not_tuples():
    with pytest.raises(ValueError, match=r"structure|same kind"):
        swagjax.merge(vector_state([jnp.zeros(2)]), vector_state((jnp.zeros(2),)))

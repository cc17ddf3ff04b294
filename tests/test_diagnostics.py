import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import swagjax
from swagjax.diagnostics import captured_variance, check_iterate, drift, effective_count

RANK = 3
WRAPPED = 2 * RANK + 2  # steps after which each row of the ring was written over
NOT_LAST = r"the iterate collected last differs from params.* by up to .*: put swag last"


def model(dtype=jnp.float32, offset=0.0):
    """Weights of both signs, of sizes from 1e-3 to 1, one of them zero."""
    w = jnp.linspace(-1, 1, 48).reshape(6, 8) * jnp.logspace(-3, 0, 8) + offset
    return {"b": jnp.linspace(0, 1, 5).astype(dtype), "layer": {"w": w.astype(dtype)}}


def gradients(params, t):
    """Something that differs from weight to weight, never stands still and points upwards."""
    return jax.tree.map(lambda p: 1.5 + jnp.cos(7 * p + jnp.asarray(t, p.dtype)), params)


def train(tx, params, steps, check=None, apply=optax.apply_updates, jit=False):
    """Train; return what the caller holds, and check after each step.

    Not jitted: one operation after another, all tests share what is compiled.
    """

    def step(params, opt_state, t):
        updates, opt_state = tx.update(gradients(params, t), opt_state, params)
        return apply(params, updates), opt_state

    step = jax.jit(step) if jit else step
    opt_state = tx.init(params)
    for t in range(1, steps + 1):
        params, opt_state = step(params, opt_state, float(t))
        if check is not None:
            check(opt_state, params)
    return params, opt_state


def last(*members, **options):
    """A chain with swag where it belongs."""
    return optax.chain(*members, swagjax.swag(RANK, **options))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# --- check_iterate: right uses pass ----------------------------------------------------------


def test_swag_last_passes_after_every_step():
    train(last(optax.sgd(0.1)), model(), WRAPPED, check_iterate)


def test_bfloat16_passes_in_a_jitted_step_that_fuses_what_it_can():
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-2))
    tx = last(opt, deviation_dtype=jnp.bfloat16)
    train(tx, model(jnp.bfloat16), WRAPPED, check_iterate, jit=True)


def test_in_float64_it_passes_and_a_relative_change_of_a_trillionth_is_found(x64):
    tx = last(optax.sgd(1e-3))
    params = {"w": jnp.linspace(1.0, 2.0, 9)}
    params, opt_state = train(tx, params, WRAPPED, check_iterate, jit=True)
    assert params["w"].dtype == jnp.float64
    with pytest.raises(ValueError, match=NOT_LAST):
        check_iterate(opt_state, {"w": params["w"] * (1 + 1e-12)})


def test_accumulators_of_bfloat16_pass():
    opt = last(optax.sgd(0.1), accumulator_dtype=jnp.bfloat16)
    train(opt, model(), 4, check_iterate)


@pytest.mark.parametrize("rate", [1e-5, 1e-7, 1e-9])
def test_movements_below_the_least_number_of_the_ring_pass(rate):
    # A float16 ring holds multiples of 6e-8: small weights that move by as little are far off.
    opt = last(optax.sgd(rate), deviation_dtype=jnp.float16)
    train(opt, jax.tree.map(lambda p: 1e-3 * p, model()), 4, check_iterate)


def test_weights_that_decay_to_the_least_of_all_numbers_pass():
    # Dead units under weight decay: below 1e-38 processors flush a difference to zero.
    tx, params = swagjax.swag(RANK), {"w": jnp.array([1e-37, -3e-37, 1e-36, 0.0])}
    state = tx.init(params)
    for _ in range(40):
        updates, state = tx.update({"w": -0.1 * params["w"]}, state, params)
        params = optax.apply_updates(params, updates)
        check_iterate(state, params)


def test_a_jitted_update_and_updates_applied_outside_pass():
    # Inside, XLA fuses the last product of the optimizer with the sum, and rounds once, not twice.
    tx, params = last(optax.adam(1e-2)), {"w": jnp.linspace(-1, 1, 512)}
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for t in range(30):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(3 * p + t) * p, params)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        check_iterate(opt_state, params)


def test_masked_passes_with_all_parameters():
    mask = {"b": False, "layer": {"w": True}}
    tx = optax.chain(optax.sgd(0.1), optax.masked(swagjax.swag(RANK), mask))
    train(tx, model(), WRAPPED, check_iterate)


def test_groups_of_a_partition_pass_each():
    groups = {"head": last(optax.sgd(0.1)), "body": last(optax.sgd(0.2))}
    tx = optax.partition(groups, {"b": "head", "layer": {"w": "body"}})

    def check(opt_state, params):
        for name in groups:
            check_iterate(opt_state.inner_states[name], params)

    train(tx, model(), WRAPPED, check)


@pytest.mark.parametrize("around", [True, False])
def test_multi_steps_pass(around):
    if around:  # between full steps, the parameters stay
        tx = optax.MultiSteps(last(optax.sgd(0.1)), 2).gradient_transformation()
        first = 2
    else:  # swag counts the micro-steps
        accumulated = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
        tx, first = last(accumulated, start=2, every=2), 4

    def check(opt_state, params):
        check.calls += 1
        if check.calls >= first:
            check_iterate(opt_state, params)

    check.calls = 0
    train(tx, model(), 2 * WRAPPED, check, jit=True)


def test_an_nnx_optimizer_passes_with_the_parameters_of_its_model():
    network = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, last(optax.sgd(0.1)), wrt=nnx.Param)
    for t in range(2):
        before = jax.tree.map(jnp.copy, nnx.state(network, nnx.Param))
        optimizer.update(network, gradients(before, t))
        check_iterate(optimizer, nnx.state(network, nnx.Param))
    with pytest.raises(ValueError, match=NOT_LAST):
        check_iterate(optimizer, before)


def test_a_train_state_passes_and_so_does_what_came_back_from_the_device():
    state = TrainState.create(apply_fn=None, params=model(), tx=last(optax.sgd(0.1)))
    for t in range(2):
        state = state.apply_gradients(grads=gradients(state.params, t))
        check_iterate(state, state.params)
    check_iterate(*jax.device_get((state.opt_state, state.params)))


def test_sharded_parameters_pass():
    mesh = jax.make_mesh((8,), ("d",))
    params = {"w": jnp.linspace(-1, 1, 64).reshape(8, 8)}
    params = jax.device_put(params, NamedSharding(mesh, P("d")))
    train(last(optax.sgd(0.1)), params, 2, check_iterate, jit=True)


def test_each_member_passes_by_itself():
    tx = last(optax.sgd(0.1))
    members = {"w": jnp.linspace(-1, 1, 8).reshape(2, 4)}
    axes = swagjax.member_axes(jax.eval_shape(tx.init, {"w": jnp.zeros(4)}))
    opt_state = jax.jit(jax.vmap(tx.init, out_axes=axes))(members)
    update = jax.jit(jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes)))
    for t in range(RANK + 1):
        updates, opt_state = update(gradients(members, t), opt_state, members)
        members = optax.apply_updates(members, updates)
    state = swagjax.get_state(opt_state)
    for i in range(2):
        member = jax.tree.map(lambda x, i=i: x[i] if x.ndim else x, state)
        check_iterate(member, {"w": members["w"][i]})
        with pytest.raises(ValueError, match=NOT_LAST):
            check_iterate(member, {"w": members["w"][1 - i]})


@pytest.mark.parametrize("method", [swagjax.swa, swagjax.swag_diag])
def test_without_deviations_the_first_collection_can_be_checked(method):
    params, opt_state = train(optax.chain(optax.sgd(0.1), method(start=4)), model(), 5)
    check_iterate(opt_state, params)
    wrong, opt_state = train(optax.chain(method(start=4), optax.sgd(0.1)), model(), 5)
    with pytest.raises(ValueError, match=NOT_LAST):
        check_iterate(opt_state, wrong)


@pytest.mark.parametrize("method", [swagjax.swa, swagjax.swag_diag])
def test_without_deviations_a_later_collection_says_which_one_can(method):
    params, opt_state = train(optax.chain(optax.sgd(0.1), method()), model(), 2)
    with pytest.raises(
        ValueError, match=r"num_collected=2: .*without deviations .*first such step"
    ):
        check_iterate(opt_state, params)


@pytest.mark.parametrize("steps", [1, RANK - 1, RANK, RANK + 1, 2 * RANK])
def test_around_the_wrap_of_the_ring(steps):
    params, opt_state = train(last(optax.sgd(0.1)), model(), steps)
    check_iterate(opt_state, params)


def test_an_empty_tree_passes():
    check_iterate(train(last(optax.sgd(0.1)), {}, 2)[1], {})


def test_a_merged_state_passes_with_the_last_parameters_of_the_second():
    first = train(last(optax.sgd(0.1)), model(), 5)
    second = train(last(optax.sgd(0.1)), first[0], 4)
    merged = swagjax.merge(*(swagjax.get_state(opt_state) for _, opt_state in (first, second)))
    check_iterate(merged, second[0])


@pytest.mark.parametrize(("offset", "stored"), [(0.0, None), (1e6, jnp.bfloat16)])
def test_no_false_alarm_in_a_thousand_steps(offset, stored):
    # The state after each step, out of one program. With an offset the weights stand far from
    # zero and move by little; every thirteenth step meets all rows of the ring.
    tx = last(optax.sgd(0.05, momentum=0.9), deviation_dtype=stored)
    params = model(offset=offset)

    def step(carry, t):
        params, opt_state = carry
        updates, opt_state = tx.update(gradients(params, t), opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params, opt_state)

    carry = params, tx.init(params)
    _, history = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(1.0, 1001.0)))(carry)
    history = jax.device_get(history)
    for i in (*range(0, 1000, 13), 999):
        params, opt_state = jax.tree.map(lambda x, i=i: x[i], history)
        check_iterate(opt_state, params)
    if stored is None:  # a bfloat16 deviation is known to one part in 256
        with pytest.raises(ValueError, match=NOT_LAST):
            check_iterate(opt_state, jax.tree.map(lambda p: p * np.float32(1 - 1e-5), params))


# --- check_iterate: wrong uses are found -----------------------------------------------------


def not_last(*members):
    return optax.chain(optax.sgd(0.1), swagjax.swag(RANK), *members)


WRONG_ORDERS = {
    "first in the chain": optax.chain(swagjax.swag(RANK), optax.sgd(0.1)),
    "weight decay after it": not_last(optax.add_decayed_weights(-1e-5)),
    "the learning rate after it": not_last(optax.scale(0.99)),
    "a schedule after it": not_last(optax.scale_by_schedule(lambda t: 0.99**t)),
    "clipping by norm after it": not_last(optax.clip_by_global_norm(0.1)),
    "clipping after it": not_last(optax.clip(0.01)),
    "momentum after it": not_last(optax.trace(0.5)),
    "a projection after it": not_last(optax.keep_params_nonnegative()),
    "frozen leaves after it": not_last(
        optax.masked(optax.set_to_zero(), {"b": True, "layer": {"w": False}})
    ),
}


@pytest.mark.parametrize("tx", WRONG_ORDERS.values(), ids=WRONG_ORDERS)
def test_what_changes_the_updates_after_swag_is_found_after_every_step(tx):
    def check(opt_state, params):
        if int(swagjax.get_state(opt_state).num_collected) > 1:  # at first, momentum does nothing
            with pytest.raises(ValueError, match=NOT_LAST):
                check_iterate(opt_state, params)

    train(tx, model(), RANK + 2, check)


def test_the_same_members_before_swag_pass():
    before = [
        optax.add_decayed_weights(-1e-5),
        optax.scale(0.99),
        optax.clip(0.01),
        optax.trace(0.5),
        optax.keep_params_nonnegative(),
    ]
    train(last(optax.sgd(0.1), *before), model(), RANK + 2, check_iterate)


def test_swag_inside_of_lookahead_is_found():
    # Lookahead pulls the parameters back at every second step, behind the back of what it wraps.
    tx = optax.lookahead(last(optax.sgd(0.1)), 2, 0.5)
    params = optax.LookaheadParams.init_synced(model())
    opt_state = tx.init(params)
    for t in (1, 2):
        grads = gradients(params.fast, t)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"LookaheadState.*swagjax\.collect"):
        check_iterate(opt_state, params.fast)
    with pytest.raises(ValueError, match=NOT_LAST):
        check_iterate(opt_state.fast_state, params.fast)


def test_parameters_changed_after_the_step_are_found():
    # As by a constraint, an average of the weights or a cast outside of the transformation.
    def clipped(params, updates):
        params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda p: jnp.clip(p, -0.5, 0.5), params)

    params, opt_state = train(last(optax.sgd(0.1)), model(), 3, apply=clipped)
    with pytest.raises(ValueError, match=NOT_LAST):
        check_iterate(opt_state, params)


def test_updates_that_were_never_applied_are_found():
    params, opt_state = train(last(optax.sgd(0.1)), model(), 3, apply=lambda params, _: params)
    with pytest.raises(ValueError, match=NOT_LAST):
        check_iterate(opt_state, params)


def test_update_with_parameters_of_after_the_step_is_found():
    tx, params = swagjax.swag(RANK), model()
    updates = jax.tree.map(lambda p: 0.1 * jnp.cos(p), params)
    params = optax.apply_updates(params, updates)
    _, state = tx.update(updates, tx.init(params), params)
    with pytest.raises(ValueError, match=NOT_LAST):
        check_iterate(state, params)


@pytest.mark.parametrize("cadence", [{"every": 4}, {"when": lambda t: t <= 4}])
def test_a_step_that_did_not_collect_is_found_and_named(cadence):
    tx = last(optax.sgd(0.1), **cadence)
    check_iterate(*reversed(train(tx, model(), 4)))
    params, opt_state = train(tx, model(), 5)
    with pytest.raises(ValueError, match=r"call check_iterate right after a step that collected"):
        check_iterate(opt_state, params)


def test_before_the_first_collection_there_is_nothing_to_check():
    params, opt_state = train(last(optax.sgd(0.1), start=9), model(), 3)
    with pytest.raises(
        ValueError, match=r"num_collected=0: .*call check_iterate after a step that coll"
    ):
        check_iterate(opt_state, params)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_relative_change_of_one_part_in_a_hundred_thousand_is_found(offset):
    params, opt_state = train(last(optax.sgd(1e-3)), model(offset=offset), WRAPPED)
    check_iterate(opt_state, params)
    for leaf in params:
        for factor in (1 - 1e-5, 1 + 1e-5):
            changed = {**params, leaf: jax.tree.map(lambda p, f=factor: p * f, params[leaf])}
            with pytest.raises(ValueError, match=rf"differs from params\['{leaf}'\]"):
                check_iterate(opt_state, changed)


def test_one_weight_among_many_is_found():
    params, opt_state = train(last(optax.sgd(0.1)), model(), WRAPPED)
    w = params["layer"]["w"]
    changed = {**params, "layer": {"w": w.at[3, 7].add(1e-3)}}
    with pytest.raises(ValueError, match=r"params\['layer'\]\['w'\] by up to 0.001:"):
        check_iterate(opt_state, changed)


def test_the_largest_difference_is_quoted():
    params, opt_state = train(last(optax.sgd(0.1)), model(), 2)
    changed = {**params, "b": params["b"] + jnp.array([0.0, 0.5, 0.0, -2.0, 0.0])}
    with pytest.raises(ValueError, match=r"differs from params\['b'\] by up to 2:"):
        check_iterate(opt_state, changed)


def test_a_step_that_was_not_finite_is_named_as_such():
    params, opt_state = train(last(optax.sgd(0.1)), model(), 2)
    params = jax.tree.map(lambda p: p * jnp.nan, params)
    with pytest.raises(ValueError, match=r"params\['b'\].* not finite"):
        check_iterate(opt_state, params)


def test_params_of_another_tree_or_shape_are_named():
    params, opt_state = train(last(optax.sgd(0.1)), model(), 2)
    with pytest.raises(ValueError, match="params has another structure"):
        check_iterate(opt_state, {"params": params})
    with pytest.raises(ValueError, match=r"params\['b'\] has shape \[\(1, 5\)\].*\(5,\)"):
        check_iterate(opt_state, {**params, "b": params["b"][None]})


def test_states_that_cannot_be_checked_are_refused_by_the_library():
    params, opt_state = train(last(optax.sgd(0.1)), model(), 2)
    with pytest.raises(ValueError, match="no SWAGState"):
        check_iterate(params, opt_state)
    members = jax.tree.map(lambda x: jnp.stack([x, x]), opt_state)
    with pytest.raises(ValueError, match=r"several members, num_collected=\[2 2\]"):
        check_iterate(members, params)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(check_iterate)(opt_state, params)
    with pytest.raises(ValueError, match=r"ShapeDtypeStruct|shapes"):
        check_iterate(jax.eval_shape(lambda: opt_state), params)


# --- state_bytes -----------------------------------------------------------------------------


def held_bytes(state):
    """What the arrays of a state say themselves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(linen.initializers.ones, ("d", None))
        return linen.Dense(3, kernel_init=init)(x)


TREES = {
    "one array": lambda: jnp.zeros((3, 4)),
    "nested": model,
    "bfloat16": lambda: model(jnp.bfloat16),
    "mixed": lambda: {"a": jnp.zeros(3, jnp.float16), "b": (jnp.zeros((2, 1)),)},
    "scalars and empty arrays": lambda: [jnp.zeros(()), jnp.zeros((0, 3)), 1.0],
    "NumPy": lambda: {"w": np.zeros((3, 4), np.float32)},
    "no leaf": lambda: {},
    "holes": lambda: {"a": None, "b": optax.MaskedNode(), "c": jnp.zeros(5)},
    "nnx": lambda: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
    "linen boxes": lambda: Dense().init(jax.random.key(0), jnp.zeros((1, 2)))["params"],
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize(
    "dtypes", [{}, {"accumulator_dtype": jnp.float16, "deviation_dtype": jnp.float32}]
)
def test_state_bytes_of_any_tree_are_those_of_the_state(tree, dtypes):
    params = tree()
    state = swagjax.swag(3, **dtypes).init(params)
    assert swagjax.state_bytes(params, 3, **dtypes) == held_bytes(state)


@pytest.mark.parametrize("rank", [2, 7, 40])
@pytest.mark.parametrize("dtypes", [{"deviation_dtype": "bfloat16"}, {"accumulator_dtype": "f2"}])
def test_state_bytes_of_any_rank_and_dtype_are_those_of_the_state(rank, dtypes):
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4, jnp.bfloat16)}
    state = swagjax.swag(rank, **dtypes).init(params)
    assert swagjax.state_bytes(params, rank, **dtypes) == held_bytes(state)


def test_state_bytes_in_float64(x64):
    params = {"double": jnp.zeros(4), "single": jnp.zeros(5, jnp.float32)}
    for dtypes in ({}, {"accumulator_dtype": "float64", "deviation_dtype": "float32"}):
        state = swagjax.swag(4, **dtypes).init(params)
        assert swagjax.state_bytes(params, 4, **dtypes) == held_bytes(state)


@pytest.mark.parametrize("spec", [P("d"), P()], ids=["sharded", "replicated"])
def test_state_bytes_of_sharded_parameters_count_each_weight_once(spec):
    mesh = jax.make_mesh((8,), ("d",))
    params = jax.device_put({"w": jnp.zeros((8, 16))}, NamedSharding(mesh, spec))
    assert swagjax.state_bytes(params, 5) == held_bytes(swagjax.swag(5).init(params))


def test_state_bytes_of_shapes_allocate_nothing():
    # 10^12 weights: four terabytes of parameters, eighty of deviations.
    params = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)}
    assert swagjax.state_bytes(params, 20) == 22 * 4 * 10**12 + 12
    assert swagjax.state_bytes(params, 20, deviation_dtype=jnp.bfloat16) == 48 * 10**12 + 12


# --- drift, effective_count, captured_variance ------------------------------------------------

READERS = (drift, effective_count, captured_variance)
H = 8  # rank: all of its 40320 orders can be gone through


def tree_of(rows):
    """Rows of weights as a tree with a scalar, an empty leaf, a matrix and a hole."""
    lead = rows.shape[:-1]
    return {
        "matrix": rows[..., 1:7].reshape(*lead, 2, 3),
        "empty": jnp.zeros((*lead, 0)),
        "hole": optax.MaskedNode(),
        "rest": [rows[..., 0], rows[..., 7:]],
    }


def state_of(iterates, rank=H):
    """The state of a run that collected the rows, by the oracle."""
    n = jnp.asarray(len(iterates), jnp.int32)
    moments = (iterates.mean(0), iterates.var(0), oracle.ring(iterates, rank))
    trees = [tree_of(jnp.asarray(x, jnp.result_type(float))) for x in moments]
    return swagjax.SWAGState(n, n, jnp.zeros_like(n), *trees)


def correlated(rho, h):
    """Iterates of an AR(1) process over so many weights that their inner products are exact.

    Any h vectors of inner products rho^|i - j|; of a random walk for rho = 1, independent for 0.
    """
    i = np.arange(h)
    steps = np.minimum(i[:, None], i) + 1.0 if rho == 1 else rho ** abs(i[:, None] - i)
    return np.concatenate([np.linalg.cholesky(steps), np.ones((h, 7))], axis=1)


def walk(rng, n, size=11, rho=0.6):
    """Correlated iterates of weights of several scales around a mean, not near the limit."""
    x = rng.normal(size=(n, size))
    for i in range(1, n):
        x[i] += rho * x[i - 1]
    return 3.0 + x * np.linspace(0.2, 2.0, size)


@functools.cache
def orders(h):
    return np.array(list(itertools.permutations(range(h))))


def oracle_drift(iterates, rank):
    n, h = len(iterates), min(len(iterates), rank)
    held, mean = iterates[-h:], iterates.mean(0)
    centred = held - held.mean(0)
    scatter, S = (centred**2).sum(), iterates.var(0, ddof=1).sum()

    def r2(time):  # of the least-squares lines of all weights over time, for every row
        t = time - time.mean(-1, keepdims=True)
        return ((t @ centred) ** 2).sum(-1) / (t**2).sum(-1) / scatter

    trend, of_orders = r2(np.arange(h)), r2(orders(h))
    apart = ((held.mean(0) - mean) ** 2).sum()
    return {
        "trend": trend,
        "expected": of_orders.mean(),
        "z": (trend - of_orders.mean()) / of_orders.std(),
        "shift": apart / (S * (1 / h - 1 / n)) if n > h else np.nan,
        "spread": scatter / (h - 1) / S,
        "movement": np.sqrt(iterates.var(0).sum() / (mean**2).sum()),
    }


def oracle_effective_count(iterates, rank):
    """With v from repeated substitution, and sums over pairs of iterates."""
    n, h = len(iterates), min(len(iterates), rank)
    held = iterates[-h:] - iterates[-h:].mean(0)
    g = [np.mean([held[i] @ held[i + lag] for i in range(h - lag)]) for lag in range(h)]
    used = []
    while len(used) + 1 <= h / 2 and g[len(used)] + g[len(used) + 1] > 0:
        used += [len(used), len(used) + 1]
    v = 0.0
    for _ in range(500):
        gamma = [g[lag] + v if lag in used else 0.0 for lag in range(h)]
        v = max(0.0, sum(gamma[abs(i - j)] for i in range(h) for j in range(h)) / h**2)
    rho = (np.array(g) + v) / (g[0] + v)
    time = max(1 + 2 * sum(rho[lag] for lag in used if lag), 1 / max(np.log10(n), 1))
    rho = np.concatenate([rho, np.full(rank - h, np.nan)])
    return {"n_eff": n / time, "time": time, "autocorrelation": rho}


def oracle_captured_variance(iterates, rank):
    h = min(len(iterates), rank)
    centred = iterates[-h:] - iterates[-h:].mean(0)
    variances = (np.linalg.svd(centred, compute_uv=False) ** 2)[: h - 1]
    variances = np.append(variances, np.zeros(h - 1 - len(variances))) / variances.sum()
    both = np.trace(oracle.covariance("swag", iterates, rank)) * 2
    return {
        "cumulative": np.append(np.cumsum(variances), np.full(rank - h, np.nan)),
        "effective_dimension": 1 / (variances**2).sum(),
        "low_rank_share": 1 - np.trace(oracle.covariance("swag_diag", iterates)) / both,
    }


ORACLES = dict(
    zip(READERS, (oracle_drift, oracle_effective_count, oracle_captured_variance), strict=True)
)


def agree(found, expected, rtol):
    assert set(expected) == set(found._fields)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol, 1e-2 * rtol, err_msg=name)


# At, before and after the wrap of the ring, of even and odd length.
COUNTS = (4, 5, 7, 8, 9, 15, 16, 29)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_readers_agree_with_numpy_in_float64(x64, reader):
    for n, rho in itertools.product(COUNTS, (0.6, -0.8)):
        iterates = walk(np.random.default_rng(n), n, rho=rho)
        agree(reader(state_of(iterates)), ORACLES[reader](iterates, H), 1e-9)


@pytest.mark.slow
def test_the_effective_count_of_long_rings_of_few_weights_agrees_with_numpy(x64):
    """Of which later pairs of autocorrelations are positive again."""
    for n in (21, 40, 41, 90):
        iterates = walk(np.random.default_rng(n), n)
        found = effective_count(state_of(iterates, 41))
        agree(found, oracle_effective_count(iterates, 41), 1e-6)


@pytest.mark.parametrize("reader", READERS)
def test_readers_agree_with_numpy_in_float32(reader):
    for n in COUNTS:
        iterates = walk(np.random.default_rng(n), n).astype(np.float32).astype(float)
        agree(reader(state_of(iterates)), ORACLES[reader](iterates, H), 1e-4)


@pytest.mark.parametrize("reader", READERS)
def test_readers_agree_with_numpy_after_a_run_of_swag(reader):
    iterates = walk(np.random.default_rng(0), 19).astype(np.float32)
    tx, zeros = swagjax.swag(H), tree_of(jnp.zeros(11, jnp.float32))

    def collect(state, row):
        return tx.update(tree_of(row), state, zeros)[1], None

    state = jax.lax.scan(collect, tx.init(zeros), iterates)[0]
    agree(reader(state), ORACLES[reader](iterates.astype(float), H), 1e-4)


@pytest.mark.slow
def test_over_all_orders_of_the_iterates_the_means_are_exact(x64):
    """What stands in for independence: mean of ``trend``, ``shift``, ``spread``, spread of ``z``.

    Of iterates of which one is far off, so that nothing is near a normal distribution.
    """
    iterates = np.random.default_rng(0).normal(size=(6, 8)) * np.linspace(0.1, 2, 8)
    iterates[3] += 5
    rings = np.stack([oracle.ring(iterates[order], 5) for order in orders(6)])
    state = state_of(iterates, 5)._replace(deviations=tree_of(jnp.asarray(rings)))
    axes = swagjax.SWAGState(None, None, None, None, None, 0)
    found = jax.vmap(drift, in_axes=(axes,))(state)
    np.testing.assert_allclose(found.trend.mean(), 1 / 4)
    np.testing.assert_allclose(found.expected, 1 / 4)
    np.testing.assert_allclose(found.shift.mean(), 1)
    np.testing.assert_allclose(found.spread.mean(), 1)
    np.testing.assert_allclose([found.z.mean(), found.z.var()], [0, 1], atol=1e-9)


# --- known processes, over so many weights that their inner products are exact


@pytest.mark.slow
def test_independent_iterates_of_many_weights(x64):
    h = 20
    state = state_of(correlated(0.0, h), h)
    found, counted, captured = (reader(state) for reader in READERS)
    np.testing.assert_allclose([found.trend, found.expected], 1 / (h - 1))
    np.testing.assert_allclose(found.spread, 1)
    np.testing.assert_allclose([counted.n_eff, counted.time], [h, 1])
    np.testing.assert_allclose(counted.autocorrelation[1:], 0, atol=1e-12)
    np.testing.assert_allclose(captured.cumulative, np.arange(1, h) / (h - 1))
    np.testing.assert_allclose(captured.effective_dimension, h - 1)


def test_the_trend_of_correlated_iterates_is_that_of_the_documentation(x64):
    found = [drift(state_of(correlated(rho, 20), 20)).trend for rho in (0.3, 0.5, 0.7, 0.9)]
    np.testing.assert_allclose(found, [0.09, 0.14, 0.23, 0.43], atol=0.005)


def test_the_trend_of_a_random_walk_is_three_fifths(x64):
    h = 20
    found = drift(state_of(correlated(1, h), h)).trend
    np.testing.assert_allclose(found, 0.6 * (h**2 + 1) / (h**2 - 1))


def test_a_random_walk_has_its_variance_in_few_directions(x64):
    captured = captured_variance(state_of(correlated(1, 20), 20))
    variances = 1 / np.sin(np.pi * np.arange(1, 20) / 40) ** 2  # 6 / pi^2 / k^2 of a long walk
    np.testing.assert_allclose(captured.cumulative, np.cumsum(variances) / variances.sum())


def test_a_straight_path(x64):
    path = np.arange(300.0)[:, None] * np.linspace(-1, 1, 27) + 7
    state = state_of(path, 20)
    found = drift(state)
    np.testing.assert_allclose(found.trend, 1)
    np.testing.assert_allclose(found.shift, 3 * 20, 0.1)
    assert found.z > 4
    assert found.spread < 0.01
    np.testing.assert_allclose(captured_variance(state).cumulative, 1)


@pytest.mark.slow
def test_of_a_random_walk_and_a_straight_path_the_time_is_a_good_part_of_the_ring(x64):
    walked, straight = correlated(1, 100), np.arange(100.0)[:, None] * np.ones(107)
    found = [effective_count(state_of(path, 100)).time for path in (walked, straight)]
    np.testing.assert_allclose(found, [40, 55], atol=3)


TIMES = {
    0.0: (1.0, 1.0, 1.0),
    0.5: (1.9, 2.6, 2.9),
    0.7: (2.1, 3.7, 5.2),
    0.9: (4.0, 6.4, 14.4),
}  # with 10, 20 and 100 iterates


@pytest.mark.slow
@pytest.mark.parametrize("rho", TIMES)
def test_the_time_of_correlated_iterates_is_that_of_the_documentation(x64, rho):
    states = [state_of(correlated(rho, h), h) for h in (10, 20, 100)]
    found = np.array([effective_count(state).time for state in states])
    np.testing.assert_allclose(found, TIMES[rho], atol=0.051)
    assert (found < (1 + rho) / (1 - rho) + 1e-9).all()


def test_the_autocorrelations_of_a_long_ring(x64):
    found = effective_count(state_of(correlated(0.5, 100), 100)).autocorrelation
    np.testing.assert_allclose(found[:6], 0.5 ** np.arange(6), atol=0.02)


def test_iterates_that_alternate_count_as_more_but_not_beyond_the_bound(x64):
    iterates = (-1.0) ** np.arange(100)[:, None] * np.ones(27)
    np.testing.assert_allclose(effective_count(state_of(iterates, 20)).n_eff, 100 * np.log10(100))
    few = effective_count(state_of(iterates[:8], 20))
    np.testing.assert_allclose(few.n_eff, 8)
    np.testing.assert_allclose(few.autocorrelation[:8], iterates[:8, 0], atol=1e-9)


# --- random draws: fixed keys, and a false alarm at six standard deviations, 2e-9 of a normal


@pytest.mark.slow
def test_a_simulated_process_is_recovered(x64):
    """AR(1) over 4000 weights: the pooled numbers have relative errors below (2 / 4000)^(1/2)."""
    h, weights = 20, 4000
    steps = np.random.default_rng(0).normal(size=(200, weights))
    for rho in (0.0, 0.5, 0.9):
        x = np.zeros((100 + h, weights))
        for i in range(1, len(x)):
            x[i] = rho * x[i - 1] + steps[i]
        limit = state_of(correlated(rho, h), h)
        state = state_of(x[-h:], h)
        room = 6 * np.sqrt(2 / weights)
        np.testing.assert_allclose(drift(state).trend, drift(limit).trend, room)
        rhos = [effective_count(s).autocorrelation[:3] for s in (state, limit)]
        np.testing.assert_allclose(*rhos, atol=room)


@pytest.mark.slow
def test_z_of_independent_iterates_of_many_weights_is_near_a_normal():
    """1000 runs over 500 weights. Six standard errors of mean and variance; P(z > 6) = 1e-9."""
    runs, h, weights = 1000, 10, 500
    rows = np.random.default_rng(0).normal(size=(runs, h, weights)).astype(np.float32)
    running = rows - np.cumsum(rows, 1) / np.arange(1, h + 1)[:, None]
    n = jnp.full(runs, h, jnp.int32)
    moments = (rows.mean(1), rows.var(1), running)
    states = swagjax.SWAGState(n[0], n, 0 * n, *map(jnp.asarray, moments))
    z = np.asarray(jax.vmap(drift, in_axes=(swagjax.member_axes(states),))(states).z)
    assert abs(z.mean()) < 6 / np.sqrt(runs)
    assert abs(z.var() - 1) < 6 * np.sqrt(2 / runs)
    assert z.max() < 6


# --- iterates that stand still


def test_iterates_that_never_moved():
    state = state_of(np.full((12, 11), 0.25))
    assert drift(state).movement == 0
    assert jnp.isnan(drift(state).trend)
    assert jnp.isnan(effective_count(state).n_eff)
    assert jnp.isnan(captured_variance(state).cumulative).all()


def test_iterates_that_came_to_a_stop():
    path = np.minimum(np.arange(60.0), 30)[:, None] * np.linspace(0.5, 1, 11)
    found = drift(state_of(path))
    assert found.spread < 1e-9
    assert found.movement > 0.1
    assert found.shift > 3


def test_a_cluster_far_from_the_mean_keeps_its_digits():
    """Iterates that lie 10^4 times their spread from theta_SWA: its square has no digits left."""
    rng = np.random.default_rng(0)
    iterates = np.concatenate([np.zeros((192, 11)), 100 + 0.01 * rng.normal(size=(8, 11))])
    iterates = iterates.astype(np.float32).astype(float)
    state, h = state_of(iterates), H
    found, expected = drift(state), oracle_drift(iterates, h)
    np.testing.assert_allclose(found.trend, expected["trend"], 0.02)
    np.testing.assert_allclose(found.spread, expected["spread"], 0.02)
    found, expected = effective_count(state), oracle_effective_count(iterates, h)
    np.testing.assert_allclose(found.autocorrelation, expected["autocorrelation"], atol=0.02)


# --- what a state may be


@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_read_is_refused(reader):
    state = state_of(walk(np.random.default_rng(0), 9))
    with pytest.raises(ValueError, match=r"state is a tuple: give the SWAGState"):
        reader((state,))
    for dropped in ({"deviations": None}, {"deviations": None, "variance": None}):
        with pytest.raises(ValueError, match=r"no deviations .*swag\(rank=20\)"):
            reader(state._replace(**dropped))
    with pytest.raises(ValueError, match=r"no deviations or no variance"):
        reader(state._replace(variance=None))
    with pytest.raises(ValueError, match=r"rank=3: .* fewer than 4 iterates; .*larger rank"):
        reader(state_of(walk(np.random.default_rng(0), 9), 3))
    with pytest.raises(ValueError, match=r"num_collected=3: .* fewer than 4 iterates; train on"):
        reader(state_of(walk(np.random.default_rng(0), 3)))
    with pytest.raises(ValueError, match="holds shapes"):
        reader(jax.eval_shape(lambda: state))
    with pytest.raises(ValueError, match="several members"):
        reader(jax.tree.map(lambda x: jnp.stack([x, x]), state))


@pytest.mark.parametrize("reader", READERS)
def test_inside_jit_too_few_iterates_give_nan_and_enough_the_same(reader):
    read = jax.jit(reader)
    state = state_of(walk(np.random.default_rng(0), 9))
    jax.tree.map(np.testing.assert_array_equal, read(state), reader(state))
    for n in range(4):
        few = state_of(walk(np.random.default_rng(0), n)) if n else swagjax.swag(H).init(state.mean)
        assert all(jnp.isnan(x).all() for x in read(few))


@pytest.mark.parametrize("reader", [drift, captured_variance])
def test_members_side_by_side_are_read_as_each_by_itself(reader):
    states = [state_of(walk(np.random.default_rng(n), n)) for n in (6, 9)]  # one of them skipped
    states = [state._replace(num_updates=states[0].num_updates) for state in states]
    axes = swagjax.member_axes(states[0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)._replace(
        num_updates=states[0].num_updates
    )
    found = jax.vmap(reader, in_axes=(axes,))(stacked)
    for i, state in enumerate(states):
        one = jax.tree.map(lambda x, i=i: x[i], found)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), one, reader(state))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_state_is_read_as_a_whole_one(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    iterates, n = walk(np.random.default_rng(0), 9, 16), jnp.int32(9)

    def state(put):
        rows = [iterates.mean(0), iterates.var(0), oracle.ring(iterates, H)]
        return swagjax.SWAGState(n, n, 0 * n, *[[put(x), put(x[..., :8])] for x in rows])

    def shard(x):
        spec = P("d") if x.ndim == 1 else P(None, "d")
        return jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        found = drift(state(shard))
    expected = drift(state(functools.partial(jnp.asarray, dtype=jnp.float32)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, expected)


def test_a_ring_of_bfloat16_is_read_in_the_precision_of_the_mean():
    state = state_of(walk(np.random.default_rng(0), 9))

    def cast(state, dtype):
        return state._replace(deviations=jax.tree.map(lambda x: x.astype(dtype), state.deviations))

    narrow = cast(state, jnp.bfloat16)
    wide = cast(narrow, state.mean["rest"][1].dtype)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, drift(narrow), drift(wide))
    for a, b in zip(drift(narrow), drift(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("reader", READERS)
def test_contractions_ask_for_full_precision(reader):
    state = state_of(walk(np.random.default_rng(0), 9))
    lines = jax.jit(reader).lower(state).as_text().splitlines()
    dots = [line for line in lines if "dot_general" in line]
    assert dots
    assert all(line.count("HIGHEST") == 2 for line in dots)


def test_no_copy_of_the_ring_is_made():
    shapes = [(200, 200)] * 6  # too large to be joined
    like = swagjax.swag(20).init([jnp.zeros(shape) for shape in shapes])
    memory = jax.jit(drift).lower(like).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * sum(x.nbytes for x in like.mean)  # of 20 in the ring


def test_regression_sound_states_pass_jax_debug_nans_and_infs():
    """NaN stands for what a ring that is not full does not have; no mistake is found in it."""
    tx, params = swagjax.swag(rank=6), jnp.zeros(3)
    state = tx.init(params)
    for x in np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32):
        _, state = tx.update(jnp.asarray(x), state, params)
    with jax.debug_nans(True), jax.debug_infs(True):
        found = drift(state), effective_count(state), captured_variance(state)
    assert np.isnan(found[0].shift)
    assert np.isnan(found[1].autocorrelation[5])
    assert np.isnan(found[2].cumulative[-1])

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import swagjax
from swagjax import transform
from swagjax.diagnostics import check_iterate

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
    with pytest.raises(ValueError, match=r"count=2: .*without deviations .*first such step"):
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
        if int(swagjax.get_state(opt_state).count) > 1:  # at first, momentum does nothing
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
    with pytest.raises(ValueError, match=NOT_LAST):
        check_iterate(opt_state, params.fast)


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
    with pytest.raises(ValueError, match=r"count=0: .*call check_iterate after a step that coll"):
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
    with pytest.raises(ValueError, match=r"several members, count=\[2 2\]"):
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


# --- Memory ----------------------------------------------------------------------------------


def limited(monkeypatch, limit):
    """Let the devices have this much memory; return the sets of devices that were asked for."""
    asked = []

    def memory(devices):
        asked.append(devices)
        return limit

    monkeypatch.setattr(transform, "_memory", memory)
    return asked


TOO_LARGE = r"rank={}: the state takes {} bytes.*lower rank.*deviation_dtype=jnp\.bfloat16.*shard"


def test_a_state_that_no_machine_holds_is_refused():
    params = {"w": jnp.zeros(10**6)}  # 40 terabytes of deviations
    with pytest.raises(ValueError, match=TOO_LARGE.format(10**7, r"4e\+13")):
        swagjax.swag(10**7).init(params)
    with pytest.raises(ValueError, match=TOO_LARGE.format(10**7, r"4e\+13")):
        optax.chain(optax.sgd(0.1), swagjax.swag(10**7)).init(params)


def test_the_message_quotes_state_bytes_and_the_memory(monkeypatch):
    limited(monkeypatch, 1000)
    needed = re.escape(f"takes {swagjax.state_bytes(model(), 20) - 12:.3g} bytes")
    rest = r", .* have 1e\+03 in all; .*swagjax\.state_bytes\(params, rank\)"
    with pytest.raises(ValueError, match=needed + rest):
        swagjax.swag(20).init(model())


def test_a_trace_has_no_memory_to_exceed():
    init = swagjax.swag(10**7).init
    params = {"w": jnp.zeros(10**6)}
    assert jax.eval_shape(init, params).deviations["w"].shape == (10**7, 10**6)
    assert jax.jit(init).lower(params).out_info.count.shape == ()
    abstract = jax.eval_shape(lambda: params)
    assert jax.eval_shape(init, abstract).mean["w"].shape == (10**6,)


@pytest.mark.parametrize("method", [swagjax.swa, swagjax.swag_diag])
def test_methods_without_deviations_are_never_refused(monkeypatch, method):
    limited(monkeypatch, 1)
    method().init(model())


@pytest.mark.parametrize(
    "dtypes", [{}, {"deviation_dtype": "bfloat16"}, {"accumulator_dtype": "bfloat16"}]
)
def test_the_limit_is_met_to_the_byte(monkeypatch, dtypes):
    needed = swagjax.state_bytes(model(), 5, **dtypes) - 12  # but for three counters
    tx = swagjax.swag(5, **dtypes)
    asked = limited(monkeypatch, needed)
    assert int(tx.init(model()).count) == 0
    assert asked == [{jax.devices()[0]}]
    limited(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match="rank=5: the state takes"):
        tx.init(model())


def test_devices_that_do_not_tell_refuse_nothing(monkeypatch):
    limited(monkeypatch, None)
    swagjax.swag(5).init(model())


def test_sharded_parameters_may_fill_all_of_their_devices(monkeypatch):
    mesh = jax.make_mesh((8,), ("d",))
    whole = {"w": jnp.zeros((8, 16))}
    needed = swagjax.state_bytes(whole, 5) - 12
    sharded = jax.device_put(whole, NamedSharding(mesh, P("d")))
    asked = limited(monkeypatch, needed)
    swagjax.swag(5).init(sharded)
    assert asked == [set(jax.devices())]
    # Replicas are held by every device: eight times as much.
    replicated = jax.device_put(whole, NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=re.escape(f"takes {8 * needed:.3g} bytes")):
        swagjax.swag(5).init(replicated)
    limited(monkeypatch, 8 * needed)
    swagjax.swag(5).init(replicated)


@pytest.mark.parametrize("params", [{"w": np.zeros(100, np.float32)}, [0.5] * 100])
def test_parameters_outside_of_a_device_count_as_well(monkeypatch, params):
    # Weights as they come from a file: init puts their state on the default device.
    limited(monkeypatch, swagjax.state_bytes(params, 5) - 12)
    swagjax.swag(5).init(params)
    limited(monkeypatch, swagjax.state_bytes(params, 5) - 13)
    with pytest.raises(ValueError, match="rank=5: the state takes"):
        swagjax.swag(5).init(params)


def device(platform, stats=None):
    return types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)


def frozen(devices):
    """A stand-in for a set: these devices cannot be hashed."""
    return list(devices)


def test_accelerators_add_up_and_those_that_do_not_tell_count_as_unlimited():
    gpus = [device("gpu", {"bytes_limit": 10, "bytes_in_use": 3}) for _ in range(4)]
    assert transform._memory(frozen(gpus)) == 40
    assert transform._memory(frozen([*gpus, device("tpu", {"bytes_limit": 2})])) == 42
    for silent in (device("gpu"), device("gpu", {}), device("cpu")):
        assert transform._memory(frozen([*gpus, silent])) is None


def test_processors_share_the_memory_of_their_machine():
    one = transform._memory({jax.devices()[0]})
    assert one is None or one > 1 << 27  # None where the system does not tell
    assert transform._memory(set(jax.devices())) == one
    assert transform._memory(set()) is None

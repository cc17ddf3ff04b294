import contextlib
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import swagjax
from swagjax import sharding

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
RANK = 5
# One leaf is large (2^14 elements), the others are pooled where they are drawn.
SHAPES = {
    "hidden": {"kernel": (32, 640), "bias": (640,)},
    "out": {"kernel": (640, 16), "bias": (16,)},
    "temperature": (),
}
BY_HAND = {
    "hidden": {"kernel": P(None, "model"), "bias": P("model")},
    "out": {"kernel": P("model", "data"), "bias": P()},
    "temperature": P(),
}
# Below the smallest ring, 5 x 16, and above what a reduction exchanges, a number a device.
SMALL = 64
LAYOUTS = ("replicated", "fsdp", "2d")
KINDS = (AUTO, EXPLICIT)


def is_shape(x):
    return isinstance(x, tuple)


def specs(layout):
    """Replicated; every leaf split along its longest axis; tensors and batch on a 2-D mesh."""
    if layout == "2d":
        return BY_HAND

    def spec(shape):
        longest = shape.index(max(shape)) if shape and layout == "fsdp" else None
        return P(*("data" if axis == longest else None for axis in range(len(shape))))

    return jax.tree.map(spec, SHAPES, is_leaf=is_shape)


def mesh_of(layout, kind):
    sizes, names = ((4, 2), ("data", "model")) if layout == "2d" else ((8,), ("data",))
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def placements(mesh, tree):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree)


def plain_params():
    rng = np.random.default_rng(0)
    draw = lambda shape: (rng.normal(size=shape) / 8).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def placed_params(layout, kind):
    return jax.device_put(plain_params(), placements(mesh_of(layout, kind), specs(layout)))


def within(layout, kind):
    """The mesh as context where its axes are explicit, and no context otherwise."""
    return jax.set_mesh(mesh_of(layout, kind)) if kind == EXPLICIT else contextlib.nullcontext()


def logits(params, x):
    x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return (x @ params["out"]["kernel"] + params["out"]["bias"]) * jnp.exp(params["temperature"])


def prob_fn(params, x):
    return jax.nn.softmax(logits(params, x))


def loss(params, x):
    labels = jnp.arange(len(x)) % 16
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()


GRADIENTS = jax.grad(loss)
OPT = optax.chain(optax.sgd(0.5, momentum=0.9), swagjax.swag(RANK))
BATCHES = np.random.default_rng(1).normal(size=(8, 32, 32)).astype(np.float32)


def trained(params, gradients=GRADIENTS, place=jnp.asarray):
    """Eight steps, so that the ring goes round; returns the compiled text of a step as well."""
    opt_state, kept = OPT.init(params), None
    if isinstance(jax.tree.leaves(params)[0], jax.Array):
        shardings = sharding.state_shardings(OPT.init, params)
        opt_state = jax.jit(OPT.init, out_shardings=shardings)(params)
        kept = jax.tree.map(lambda p: p.sharding, params), shardings

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=kept)
    def step(params, opt_state, x):
        updates, opt_state = OPT.update(gradients(params, x), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = step.lower(params, opt_state, place(BATCHES[0])).compile()
    for x in BATCHES:
        params, opt_state = compiled(params, opt_state, place(x))
    return params, opt_state, compiled.as_text()


@functools.cache
def unsharded():
    params, opt_state, _ = trained(plain_params())
    return params, swagjax.get_state(opt_state)


@functools.cache
def sharded_training(layout, kind):
    mesh = mesh_of(layout, kind)
    batch = NamedSharding(mesh, P("data"))
    gradients = GRADIENTS
    if kind == EXPLICIT:  # what a model's author writes by hand is left to the partitioner here
        gradients = jax.sharding.auto_axes(gradients, out_sharding=specs(layout))
    with within(layout, kind):
        return trained(placed_params(layout, kind), gradients, lambda x: jax.device_put(x, batch))


@functools.cache
def sharded_state(layout, kind):
    """The state of the unsharded run, spread out."""
    shardings = sharding.state_shardings(swagjax.swag(RANK).init, placed_params(layout, kind))
    return jax.device_put(unsharded()[1], shardings)


def elements(dimensions):
    return math.prod(int(d) for d in dimensions.split(",") if d)


def largest(operations, text):
    """Elements of the largest array that one of the operations returns."""
    lines = re.findall(rf"= (.*?) (?:{operations})(?:-start)?\(", text)
    return max(
        (elements(d) for line in lines for d in re.findall(r"\[([\d,]*)\]", line)), default=0
    )


MOVES = "all-gather|all-to-all|collective-permute"
ALL = f"{MOVES}|all-reduce|reduce-scatter"


def assert_placed(tree, shardings):
    def check(path, leaf, wanted):
        where = f"{jax.tree_util.keystr(path)}: {leaf.sharding} instead of {wanted}"
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), where

    jax.tree.map_with_path(check, tree, shardings)


def state_specs(tree):
    """What the specs of a SWAGState have to be."""
    ring = jax.tree.map(lambda spec: P(None, *spec), tree)
    return swagjax.SWAGState(P(), P(), P(), tree, tree, ring)


# --- Shardings of a state -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ring_lies_as_its_parameter_behind_a_whole_rank_axis(layout, kind):
    params, wanted = placed_params(layout, kind), state_specs(specs(layout))
    got = sharding.state_shardings(swagjax.swag(RANK).init, params)
    ranks = jax.tree.map(lambda leaf: leaf.ndim, swagjax.swag(RANK).init(params))
    wanted = placements(mesh_of(layout, kind), wanted)
    assert jax.tree.all(jax.tree.map(NamedSharding.is_equivalent_to, got, wanted, ranks))


def inner():
    return optax.chain(optax.adam(1e-3), swagjax.swag(RANK))


ONLY_HIDDEN = jax.tree.map_with_path(
    lambda path, _: "hidden" in str(path), SHAPES, is_leaf=is_shape
)
OPTIMIZERS = {
    "chain": inner,
    "named_chain": lambda: optax.named_chain(("a", optax.lion(1e-3)), ("b", swagjax.swag_diag())),
    "MultiSteps": lambda: optax.MultiSteps(inner(), 4).gradient_transformation(),
    "masked": lambda: optax.masked(inner(), ONLY_HIDDEN),
    "partition": lambda: optax.partition({True: inner(), False: optax.sgd(0.1)}, ONLY_HIDDEN),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), swagjax.swag(RANK))
    )(rate=0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(inner(), 3),
    "schedule_free": lambda: optax.contrib.schedule_free(inner(), 1e-3),
    "lookahead": lambda: optax.chain(optax.ema(0.9), swagjax.swa()),
    "bfloat16": lambda: swagjax.swag(2, deviation_dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_any_optimizer_is_made_in_its_shards(name):
    """As outside jit, where JAX's own arrays of zeros lie as what they are made like."""
    tx, params = OPTIMIZERS[name](), placed_params("2d", AUTO)
    shardings = sharding.state_shardings(tx.init, params)
    made, wanted = jax.jit(tx.init, out_shardings=shardings)(params), tx.init(params)
    chex.assert_trees_all_equal(made, wanted)
    assert_placed(made, shardings)

    def check(path, got, leaf):
        if isinstance(leaf.sharding, NamedSharding):
            assert got.is_equivalent_to(leaf.sharding, leaf.ndim), path
        else:
            assert leaf.ndim == 0, path
            assert got.is_fully_replicated, path

    jax.tree.map_with_path(check, shardings, wanted)


def test_factored_moments_lie_as_the_axes_they_are_of():
    """Of no parameter's shape: where they lie is known from what adafactor computes alone."""
    mesh = mesh_of("2d", AUTO)
    placed = NamedSharding(mesh, P("data", "model"))
    params = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=placed)
    abstract = sharding.abstract_state(optax.adafactor().init, params)
    factored = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(abstract)}
    assert factored[(256,)] == P("data")
    assert factored[(128,)] == P("model")


@pytest.mark.parametrize("kind", KINDS)
def test_abstract_parameters_serve_as_well_as_real_ones(kind):
    params, tx = placed_params("2d", kind), inner()
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )
    got = sharding.abstract_state(tx.init, abstract)
    assert got == sharding.abstract_state(tx.init, params)
    real = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, real)
    with jax.set_mesh(mesh_of("2d", kind)):
        assert got == sharding.abstract_state(tx.init, abstract)
    assert all(leaf.sharding.mesh == mesh_of("2d", kind) for leaf in jax.tree.leaves(got))


def test_members_trained_side_by_side_keep_their_axis():
    mesh = jax.make_mesh((4, 2), ("member", "model"), axis_types=(AUTO, AUTO))
    placed = NamedSharding(mesh, P("member", None, "model"))
    stacked = {"w": jax.ShapeDtypeStruct((4, 3, 8), jnp.float32, sharding=placed)}
    tx = swagjax.swag(RANK)
    one = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct((3, 8), jnp.float32)})
    init = jax.vmap(tx.init, out_axes=swagjax.member_axes(one))
    got = sharding.state_shardings(init, stacked)
    assert got.deviations["w"].spec == P("member", None, None, "model")
    assert got.mean["w"].spec == placed.spec
    assert got.num_updates.is_fully_replicated


def test_leaves_on_one_device_count_as_replicated():
    mesh = mesh_of("fsdp", AUTO)
    split = jax.device_put(jnp.zeros(16), NamedSharding(mesh, P("data")))
    params = {
        "split": split,
        "array": jnp.zeros(3),
        "number": 1.0,
        "numpy": np.zeros(2, np.float32),
    }
    got = sharding.state_shardings(swagjax.swag(RANK).init, params)
    assert got.deviations["split"].spec == P(None, "data")
    for name in ("array", "number", "numpy"):
        assert got.deviations[name].is_fully_replicated
        assert got.deviations[name].mesh == mesh
    state = jax.jit(swagjax.swag(RANK).init, out_shardings=got)(params)
    assert_placed(state, got)


def test_parameters_on_one_device_have_their_state_there():
    device = SingleDeviceSharding(jax.devices()[3])
    params = jax.device_put({"w": np.zeros(3, np.float32)}, device)
    got = sharding.state_shardings(inner().init, params)
    assert {*jax.tree.leaves(got)} == {device}
    assert_placed(jax.jit(inner().init, out_shardings=got)(params), got)


def test_parameters_without_shardings_are_refused():
    params = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(ValueError, match=r"on 0 meshes or devices \(no leaf has.*one mesh"):
        sharding.state_shardings(inner().init, params)


def test_parameters_on_two_meshes_are_refused():
    a, b = (NamedSharding(mesh_of(layout, AUTO), P("data")) for layout in ("fsdp", "2d"))
    params = {"a": jax.device_put(np.zeros(8), a), "b": jax.device_put(np.zeros(8), b)}
    with pytest.raises(ValueError, match=r"on 2 meshes .*\['a'\].*'data': 8.*\['b'\].*'data': 4"):
        sharding.state_shardings(inner().init, params)


def test_shardings_without_a_mesh_are_refused():
    unnamed = jax.sharding.Sharding()
    leaf = type("Leaf", (), {"shape": (8,), "dtype": jnp.float32, "sharding": unnamed})()
    with pytest.raises(ValueError, match=r"params\['w'\] has a Sharding, which names no axes"):
        sharding.state_shardings(inner().init, {"w": leaf})


# --- Models with metadata -----------------------------------------------------------------------


def updated(tx, params, opt_state, steps=4):
    for t in range(steps):
        gradients = jax.tree.map(lambda p, t=t: jnp.sin(p + t), params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


@pytest.mark.slow
def test_partitioned_linen_parameters_from_end_to_end():
    """TrainState and all: the names of a parameter's axes never land on the rank axis."""
    mesh, x = mesh_of("2d", AUTO), jnp.ones((1, 8))
    names = linen.with_partitioning(linen.initializers.lecun_normal(), ("data", "model"))
    model = linen.Dense(4, kernel_init=names)
    # A rank that the axis of the mesh divides: a name on it would shard it in silence.
    tx = optax.chain(optax.adam(0.1), swagjax.swag(4))

    def create(params):
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    init = lambda: model.init(jax.random.key(0), x)["params"]  # noqa: E731
    placed = linen.get_sharding(jax.eval_shape(init), mesh)
    params = jax.jit(init, out_shardings=placed)()
    shardings = sharding.state_shardings(create, params)
    made = jax.jit(create, out_shardings=shardings)(params)
    state = swagjax.get_state(made)
    names = linen.get_partition_spec(state)
    assert names.deviations["kernel"] == P(None, "data", "model")
    wanted = NamedSharding(mesh, P(None, "data", "model"))
    ring = state.deviations["kernel"].unbox()
    assert ring.sharding.is_equivalent_to(wanted, 3)
    params, opt_state = updated(tx, made.params, made.opt_state)
    got = swagjax.sample(jax.random.key(1), swagjax.get_state(opt_state))
    plain = init()
    _, opt_state = updated(tx, plain, tx.init(plain))
    wanted = swagjax.sample(jax.random.key(1), swagjax.get_state(opt_state))
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(wanted), rtol=1e-5, atol=1e-6)
    assert got["kernel"].unbox().sharding.spec == P("data", "model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_nnx_optimizer_from_end_to_end(kind):
    mesh, tx = mesh_of("2d", kind), optax.chain(optax.sgd(0.1), swagjax.swag(4))

    def network(**options):
        return nnx.Linear(8, 4, rngs=nnx.Rngs(0), **options)

    def gradients(net, t):
        return jax.tree.map(lambda p: jnp.sin(p + t), nnx.state(net, nnx.Param))

    def run(net, optimizer):
        for t in range(4):
            optimizer.update(net, gradients(net, t))
        return optimizer

    with jax.set_mesh(mesh):
        names = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        net = network(kernel_init=names)
        shardings = sharding.state_shardings(tx.init, nnx.state(net, nnx.Param))
        optimizer = run(net, nnx.Optimizer(net, tx, wrt=nnx.Param))
        state = swagjax.get_state(optimizer)
        got = swagjax.sample(jax.random.key(1), state)
    ring = state.deviations["kernel"]
    assert ring.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data", "model")), 3)
    assert_placed(jax.tree.leaves(state), jax.tree.leaves(shardings))
    net = network()
    state = swagjax.get_state(run(net, nnx.Optimizer(net, tx, wrt=nnx.Param)))
    wanted = swagjax.sample(jax.random.key(1), state)
    got, wanted = (jax.tree.leaves(jax.device_get(tree)) for tree in (got, wanted))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 4])  # the axis of the mesh divides the second
@pytest.mark.parametrize("kind", KINDS)
def test_the_spec_of_an_nnx_parameter_never_lands_on_the_rank_axis(kind, rank):
    """A PartitionSpec is no tuple: as in flax's gemma, the ring took it for its own, silently."""
    mesh, spec = mesh_of("2d", kind), P("data", "model")
    with jax.set_mesh(mesh):
        names = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)
        net = nnx.Linear(8, 4, kernel_init=names, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(net, swagjax.swag(rank), wrt=nnx.Param)
        optimizer.update(net, jax.tree.map(jnp.sin, nnx.state(net, nnx.Param)))
    ring = optimizer.opt_state.deviations["kernel"]
    assert ring.get_metadata("out_sharding") == P(None, *spec)
    ring = swagjax.get_state(optimizer).deviations["kernel"]
    assert ring.sharding.is_equivalent_to(NamedSharding(mesh, P(None, *spec)), 3)


def test_every_form_of_metadata_is_moved_behind_the_rank_axis():
    mesh, names = mesh_of("2d", AUTO), ("data", "model")
    forms = {
        names: (None, *names),
        P(*names): P(None, *names),
        NamedSharding(mesh, P(*names)): NamedSharding(mesh, P(None, *names)),
    }
    for form, wanted in forms.items():
        param = nnx.Param(
            jnp.zeros((8, 4)), out_sharding=form, optimizer_sharding=form, eager_sharding=False
        )
        metadata = swagjax.swag(4).init({"w": param}).deviations["w"].get_metadata()
        assert metadata["out_sharding"] == metadata["optimizer_sharding"] == wanted
    for form in (names, P(*names)):
        box = linen.Partitioned(jnp.zeros((8, 4)), form)
        specs = linen.get_partition_spec(swagjax.swag(4).init({"w": box}).deviations)
        assert specs["w"] == P(None, *names)


def test_the_shardings_of_an_nnx_optimizer():
    mesh, tx = mesh_of("2d", AUTO), optax.chain(optax.sgd(0.1), swagjax.swag(4))
    net = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    net.kernel.set_value(jax.device_put(net.kernel[...], NamedSharding(mesh, P("data", "model"))))
    got = sharding.abstract_state(lambda net: nnx.Optimizer(net, tx, wrt=nnx.Param), net)
    ring = swagjax.get_state(got).deviations["kernel"]
    assert ring.sharding == NamedSharding(mesh, P(None, "data", "model"))


def test_tree_map_params_reaches_the_ring_as_well():
    """With the rank axis in front: so a spec of the parameter itself is no spec of the ring."""
    params, tx = placed_params("2d", AUTO), inner()
    seen = []

    def visit(leaf, spec):
        seen.append((leaf.shape, spec))
        return leaf

    state = tx.init(params)
    mapped = optax.tree_map_params(tx, visit, state, BY_HAND)
    chex.assert_trees_all_equal(mapped, state)
    assert ((32, 640), P(None, "model")) in seen
    assert ((RANK, 32, 640), P(None, "model")) in seen  # of the parameter: on the wrong axis


# --- Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_many_devices_collects_what_one_device_does(layout, kind):
    params, opt_state, text = sharded_training(layout, kind)
    wanted_params, wanted = unsharded()
    got = swagjax.get_state(opt_state)
    assert_placed(got, placements(mesh_of(layout, kind), state_specs(specs(layout))))
    assert_placed(params, placements(mesh_of(layout, kind), specs(layout)))
    assert int(got.num_collected) == len(BATCHES)
    assert float(jnp.abs(wanted.deviations["out"]["kernel"]).max()) > 1e-3
    # Gradients are summed over the devices in another order.
    pair = jax.device_get(((params, got), (wanted_params, wanted)))
    chex.assert_trees_all_close(*pair, rtol=1e-3, atol=1e-5)
    # Weights are gathered where the layout asks for it, a ring or a row of all rings never.
    assert not re.search(rf"\[{RANK},[^=]* (?:{ALL})(?:-start)?\(", text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["fsdp", "2d"])
def test_collecting_exchanges_nothing_but_whether_all_is_finite(layout, kind):
    params = placed_params(layout, kind)
    tx = swagjax.swag(RANK)
    with within(layout, kind):
        state = tx.init(params)
        lowered = jax.jit(tx.update, donate_argnums=1).lower(params, state, params)
        text = lowered.compile().as_text()
    assert largest(MOVES, text) == 0
    assert largest(ALL, text) <= len(jax.tree.leaves(params))
    # And holds its own part of the ring alone: the partitioner never made the whole of one.
    if layout == "fsdp":
        assert largest(r"\S+", text) <= RANK * 640 * 32 / 8


# --- Reading a sharded state --------------------------------------------------------------------

KEYS = jax.random.split(jax.random.key(7), 3)


def draw(state):
    return jax.vmap(swagjax.sample, (0, None))(KEYS, state)


def score(state):
    floor = {"min_variance": 1e-6}
    density = swagjax.log_prob(state, state.mean, **floor)
    return swagjax.entropy(state, **floor), density, swagjax.variance(state)


@functools.cache
def unsharded_reading(read):
    return jax.device_get(read(unsharded()[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["fsdp", pytest.param("2d", marks=pytest.mark.slow)])
@pytest.mark.parametrize("read", [draw, score])
def test_reading_a_sharded_state_gathers_no_ring(read, layout, kind):
    state = sharded_state(layout, kind)
    with within(layout, kind):
        compiled = jax.jit(read).lower(state).compile()
        got = compiled(state)
    text = compiled.as_text()
    assert largest(MOVES, text) <= SMALL
    assert largest(ALL, text) <= max(SMALL, RANK * RANK)
    chex.assert_trees_all_close(jax.device_get(got), unsharded_reading(read), rtol=1e-4, atol=1e-6)
    lead = (None,) if read is draw else ()
    wanted = jax.tree.map(lambda spec: P(*lead, *spec), specs(layout))
    assert_placed(got if read is draw else got[-1], placements(mesh_of(layout, kind), wanted))


def test_reading_a_sharded_state_outside_jit():
    """The default axes of a mesh are explicit: no call may ask where its result is to live."""
    state = sharded_state("2d", EXPLICIT)
    sample = swagjax.sample(KEYS[0], state)
    assert_placed(sample, placements(mesh_of("2d", EXPLICIT), specs("2d")))
    first = jax.tree.map(lambda draws: draws[0], unsharded_reading(draw))
    chex.assert_trees_all_close(jax.device_get(sample), first, rtol=1e-4, atol=1e-6)
    density = swagjax.log_prob(state, state.mean, min_variance=1e-6)
    np.testing.assert_allclose(density, unsharded_reading(score)[1], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [P("data", "model"), P(None, "model")])
def test_every_device_draws_the_normals_of_its_own_shard(spec, kind):
    mesh = mesh_of("2d", kind)
    w = jax.device_put(np.ones((256, 128), np.float32), NamedSharding(mesh, spec))
    _, state = swagjax.swag_diag().update(w, swagjax.swag_diag().init(w), w)
    shard = w.sharding.shard_shape(w.shape)
    with jax.set_mesh(mesh):
        text = jax.jit(swagjax.sample).lower(KEYS[0], state).compile().as_text()
    drawn = [elements(d) for d in re.findall(r"u32\[([\d,]*)\]\S* shift-left", text)]
    assert max(drawn) == math.prod(shard)
    # Nor is there a list of all counters, of which a shard would be cut out.
    assert largest("iota", text) <= math.prod(shard)


def test_predicting_with_samples_over_one_axis_and_weights_over_the_other():
    mesh, x = mesh_of("2d", AUTO), np.ones((4, 32), np.float32)
    keys = jax.random.split(jax.random.key(3), 8)
    names = jax.tree.map(lambda spec: P(*(n if n == "model" else None for n in spec)), BY_HAND)
    state = jax.device_put(unsharded()[1], placements(mesh, state_specs(names)))
    spread = jax.device_put(keys, NamedSharding(mesh, P("data")))
    program = jax.jit(lambda keys, state: swagjax.predict(keys, state, prob_fn, x))
    compiled = program.lower(spread, state).compile()
    wanted = swagjax.predict(keys, unsharded()[1], prob_fn, x)
    np.testing.assert_allclose(compiled(spread, state), wanted, rtol=1e-4)
    text = compiled.as_text()
    # A device draws the shards of the weights of two samples, and no ring is gathered.
    drawn = [elements(d) for d in re.findall(r"u32\[([\d,]*)\]\S* shift-left", text)]
    assert max(drawn) <= 2 * 32 * 640 / 2
    assert largest(MOVES, text) <= RANK * 16


# --- Checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_is_restored_into_the_shards_of_another_mesh(tmp_path):
    _, opt_state, _ = sharded_training("fsdp", AUTO)
    abstract = sharding.abstract_state(OPT.init, placed_params("2d", AUTO))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(opt_state))
    assert jax.tree.structure(restored) == jax.tree.structure(opt_state)
    assert_placed(restored, sharding.state_shardings(OPT.init, placed_params("2d", AUTO)))

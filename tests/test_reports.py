"""Bug reports about other libraries, tried on this one: faults of their kind.

Every test names the kind, and the report by its repository and number. Right values are worked out
in NumPy's float64 or by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.core import freeze
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import swagjax
from swagjax import batch_stats, calibration, checkpoint, io, metrics

KEY = jax.random.key(0)


def collect(tx, params, iterates):
    """The state after the iterates, each a tree like the parameters, without jit."""
    state = tx.init(params)
    for iterate in iterates:
        updates = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype) - old, iterate, params)
        _, state = tx.update(updates, state, params)
    return state


def one_state(size=6):
    rng = np.random.default_rng(5)
    params = {"w": jnp.zeros(size, jnp.float32)}
    return collect(swagjax.swag(2), params, [{"w": rng.normal(size=size)} for _ in range(3)])


def prob_fn(params, x):
    return jax.nn.sigmoid(x @ params["w"])


def mesh_of(number, axis_type=AxisType.Auto):
    devices = jax.devices()[:number]
    return jax.make_mesh((number,), ("data",), axis_types=(axis_type,), devices=devices)


# --- optax: wrappers around and beside swag ---


def test_apply_if_finite_that_has_given_up_cannot_poison_the_state():
    """google-deepmind/optax#1746: after max_consecutive_errors the bad step is accepted."""
    opt = optax.apply_if_finite(optax.chain(optax.sgd(1.0), swagjax.swag_diag()), 2)
    params = jnp.zeros(2, jnp.float32)
    opt_state, update = opt.init(params), jax.jit(opt.update)
    for slope in (-1.0, -1.0, np.nan, np.nan, np.nan, -1.0):
        grads = jnp.full(2, slope, jnp.float32)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert np.isnan(params).all()
    state = swagjax.get_state(opt_state)
    assert (state.num_collected, state.num_skipped) == (2, 2)
    np.testing.assert_array_equal(state.mean, np.mean([1.0, 2.0]))
    np.testing.assert_array_equal(state.variance, np.var([1.0, 2.0]))


def test_masks_inside_masks_beside_an_optimizer_that_masks():
    """google-deepmind/optax#271: nested masked wrappers, and one before them in the chain."""
    params = {"a": jnp.ones(2), "b": jnp.zeros(3), "c": jnp.zeros(1)}
    inner = optax.masked(swagjax.swag(2), lambda tree: jax.tree.map(lambda x: x.size < 3, tree))
    outer = optax.masked(inner, {"a": True, "b": True, "c": False})
    decay = optax.add_decayed_weights(0.5, {"a": True, "b": False, "c": False})
    opt = optax.chain(decay, optax.sgd(0.1), outer)
    opt_state, update, iterates = opt.init(params), jax.jit(opt.update), []
    for _ in range(3):
        updates, opt_state = update(jax.tree.map(jnp.ones_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(np.asarray(params["a"], np.float64))
    state = swagjax.get_state(opt_state)
    np.testing.assert_allclose(state.mean["a"], np.mean(iterates, 0), rtol=1e-6)
    assert len(jax.tree.leaves(state.mean)) == 1
    np.testing.assert_array_equal(swagjax.sample(KEY, state, like=params)["c"], params["c"])


@pytest.mark.parametrize("is_masked", [False, True])
def test_frozen_dicts_are_parameters_and_stay_frozen_dicts(is_masked):
    """google-deepmind/optax#160: masks and parameters in flax's FrozenDict."""
    params = freeze({"dense": {"kernel": jnp.zeros((2, 3))}, "bias": jnp.zeros(2)})
    tx = swagjax.swag_diag()
    tx = optax.masked(tx, freeze({"dense": True, "bias": False})) if is_masked else tx
    ones = jax.tree.map(jnp.ones_like, params)
    state = swagjax.get_state(collect(tx, params, [ones, jax.tree.map(lambda x: 3 * x, ones)]))
    np.testing.assert_array_equal(state.mean["dense"]["kernel"], 2.0)
    theta = swagjax.sample(KEY, state, like=params)
    assert jax.tree.structure(theta) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("of_params", "of_grads"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_accumulated_gradients_of_another_precision_than_the_parameters(of_params, of_grads):
    """google-deepmind/optax#1039 and #1567: MultiSteps where updates change the dtype."""
    accumulated = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    opt = optax.chain(accumulated, swagjax.swag_diag(every=2))
    params = jnp.ones(3, of_params)
    opt_state, update, iterates = opt.init(params), jax.jit(opt.update), []
    for step in range(6):
        with jax.numpy_dtype_promotion("standard"):  # optax adds what is of several dtypes
            updates, opt_state = update(jnp.full(3, step * 0.1, of_grads), opt_state, params)
            params = optax.apply_updates(params, updates)
        iterates += [np.asarray(params, np.float64)] if step % 2 else []
    state = swagjax.get_state(opt_state)
    np.testing.assert_allclose(state.mean, np.mean(iterates, 0), rtol=1e-6)
    np.testing.assert_allclose(state.variance, np.var(iterates, 0), rtol=1e-5)


def test_a_chain_inside_inject_hyperparams_follows_the_rate_without_another_compilation():
    """google-deepmind/optax#412 and #577: hyperparameters that are traced, or compiled in."""

    def make(learning_rate, rank):
        return optax.chain(optax.sgd(learning_rate), swagjax.swag(rank))

    opt = optax.inject_hyperparams(make, static_args="rank")(learning_rate=0.1, rank=2)
    params, iterates = jnp.zeros(2, jnp.float32), []
    opt_state, update = jax.jit(opt.init)(params), jax.jit(opt.update)
    for step in range(4):
        opt_state.hyperparams["learning_rate"] = jnp.asarray(0.1 * (step + 1), jnp.float32)
        updates, opt_state = update(-jnp.ones_like(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(np.asarray(params, np.float64))
    assert update._cache_size() == 1
    state = swagjax.get_state(opt_state)
    np.testing.assert_allclose(state.mean, np.mean(iterates, 0), rtol=1e-6)
    np.testing.assert_allclose(state.variance, np.var(iterates, 0), rtol=1e-5)


def test_frozen_parameters_with_gradients_that_are_nan_keep_their_bits():
    """google-deepmind/optax#477: set_to_zero, and gradients that nobody should use."""
    params = {"free": jnp.zeros(2), "frozen": jnp.array([0.1, 1 / 3, 1e-8, 12345.678])}
    labels = {"free": "free", "frozen": "frozen"}
    parts = {"free": optax.sgd(1.0), "frozen": optax.set_to_zero()}
    opt = optax.chain(optax.partition(parts, labels), swagjax.swag(2))
    opt_state, update, now = opt.init(params), jax.jit(opt.update), params
    for slope in (0.3, 0.5, 0.7):
        grads = {"free": jnp.full(2, slope), "frozen": jnp.full(4, jnp.nan)}
        updates, opt_state = update(grads, opt_state, now)
        now = optax.apply_updates(now, updates)
    state = swagjax.get_state(opt_state)
    assert state.num_collected == 3
    for tree in (state.mean, swagjax.sample(KEY, state)):
        np.testing.assert_array_equal(tree["frozen"], params["frozen"])


def test_what_is_read_off_a_state_outlives_its_donation():
    """google-deepmind/optax#1059, liesel-devs/liesel#272: one buffer in two places."""
    params = {"held": jnp.ones(3), "left": jnp.ones(2)}
    tx = optax.masked(swagjax.swag_diag(), {"held": True, "left": False})
    ones = jax.tree.map(jnp.ones_like, params)
    state = swagjax.get_state(collect(tx, params, [ones, jax.tree.map(jnp.negative, ones)]))
    point = state._replace(variance=None)
    readings = (
        swagjax.mean(state),
        swagjax.mean(point),
        swagjax.sample(KEY, state, like=params),
        swagjax.sample(KEY, point, like=params),
    )
    # What the state does not hold is passed through, and is the caller's own.
    owned = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, params["held"]))}
    shared = [x for x in jax.tree.leaves(readings) if x.unsafe_buffer_pointer() in owned]
    assert not shared


# --- flax: variables of nnx, statistics of linen ---


class Two(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("place", ["after the groups", "in a group"])
def test_an_nnx_optimizer_of_groups(place):
    """google/flax#5372 and #4901, google-deepmind/optax#1148: partition fails in nnx.Optimizer."""

    def labels(params):
        return jax.tree.map_with_path(
            lambda path, _: path[0].key, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )

    model, collected = Two(nnx.Rngs(0)), swagjax.swag_diag()
    first = optax.chain(optax.sgd(0.1), collected) if place == "in a group" else optax.sgd(0.1)
    opt = optax.partition({"a": first, "b": optax.sgd(0.1)}, labels)
    opt = optax.chain(opt, collected) if place == "after the groups" else opt
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
    iterates = []
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
        iterates.append(np.asarray(model.a.kernel[...], np.float64))
    state = swagjax.get_state(optimizer)
    np.testing.assert_allclose(state.mean["a"]["kernel"], np.mean(iterates, 0), rtol=1e-6)
    theta = swagjax.sample(KEY, state, like=nnx.state(model, nnx.Param))
    assert len(jax.tree.leaves(theta)) == 4


def test_tied_variables_of_nnx_are_collected_once_and_stay_tied():
    """google/flax#1263 and #3516: shared weights drawn apart would be another model."""

    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.into = self.out = nnx.Embed(5, 2, rngs=rngs)

    model = Tied(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.sgd(0.1), swagjax.swag_diag()), wrt=nnx.Param
    )
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    state = swagjax.get_state(optimizer)
    assert len(jax.tree.leaves(state.mean)) == 1
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    drawn = nnx.merge(graphdef, swagjax.sample(KEY, state, like=params), rest)
    assert drawn.into is drawn.out


def test_a_last_batch_of_one_example_counts_by_its_size():
    """pytorch/pytorch#4534: a batch of one has no variance, and is no error."""
    x = np.array([[1.0], [3.0], [5.0], [9.0], [100.0]], np.float32)
    model = linen.BatchNorm()
    variables = model.init(KEY, x, use_running_average=False)
    refresh = batch_stats.linen(
        model, variables["batch_stats"], x, batch_size=2, use_running_average=False
    )
    stats = refresh(variables["params"])
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], (2 * 1.0 + 2 * 4.0 + 0.0) / 5, rtol=1e-5)


def test_running_statistics_that_are_no_batch_norm_are_refreshed_too():
    """pytorch/pytorch#84053: buffers that the averaged model keeps from before training."""

    class Centred(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            mean = self.variable("batch_stats", "input_mean", lambda: jnp.zeros((), jnp.float32))
            if train and not self.is_initializing():
                mean.value = 0.9 * mean.value + 0.1 * x.mean()
            return x - mean.value

    x = (np.random.default_rng(0).normal(size=(30, 3)) + 5).astype(np.float32)
    stored = Centred().init(KEY, x)["batch_stats"]
    refresh = batch_stats.linen(Centred(), stored, x, batch_size=8, train=True)
    np.testing.assert_allclose(refresh({})["input_mean"], x.mean(dtype=np.float64), rtol=1e-5)


# --- metrics and calibration ---


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_class_alone_are_scored_against_that_class(label):
    """scikit-learn#11245 and #13628: the only label present is taken for the negative one."""
    probs, labels = np.array([[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]]), np.full(3, label)
    target = np.eye(2)[labels]
    np.testing.assert_allclose(metrics.brier(probs, labels), ((probs - target) ** 2).sum(1).mean())
    hit = probs.argmax(1) == label
    np.testing.assert_allclose(metrics.accuracy(probs, labels), hit.mean(), rtol=1e-6)
    gaps = [abs(hit[i] - probs[i].max()) for i in range(3)]  # each in a bin of its own
    np.testing.assert_allclose(metrics.ece(probs, labels, 10), np.mean(gaps), rtol=1e-6)


@pytest.mark.parametrize("metric", ["predictive_entropy", "mutual_information"])
def test_uncertainties_have_a_gradient_where_a_softmax_underflows(metric):
    """huggingface/trl#7221 and #7252, tensorflow/probability#241: NaN of 0 times infinity."""
    logits = jnp.array([[[0.0, -200.0, 1.0]], [[0.0, -200.0, 3.0]]], jnp.float32)

    def score(logits):
        probs = jax.nn.softmax(logits)
        return getattr(metrics, metric)(probs if metric == "mutual_information" else probs[0]).sum()

    p = np.array([[1, 0, np.exp(z)] / (1 + np.exp(z)) for z in (1.0, 3.0)])  # float64

    def slope(of, at):  # of -sum_c at_c log of_c by the logits of `at`'s distribution
        log = np.log(np.where(of > 0, of, 1))
        return -at * (log - (at * log).sum())

    want = np.zeros((2, 3))
    if metric == "predictive_entropy":
        want[0] = slope(p[0], p[0])
    else:
        mean = p.mean(0)
        want = np.array([slope(mean, p[s]) - slope(p[s], p[s]) for s in range(2)]) / 2
    np.testing.assert_allclose(jax.jit(jax.grad(score))(logits)[:, 0], want, atol=1e-6)


@pytest.mark.parametrize("metric", ["gaussian_nll", "gaussian_crps"])
def test_a_variance_that_xla_takes_for_zero_is_refused_like_zero(metric):
    """jax-ml/jax#37762 and #16200: numbers below 1.2e-38 are positive to Python, zero to XLA."""
    zero = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="variance holds the value"):
        getattr(metrics, metric)(zero, np.full(1, 1e-39, np.float32), zero)


# --- shards and keys ---


def test_a_draw_does_not_depend_on_the_number_of_shards():
    """jax-ml/jax#40232: the normals of an array cut into 2 and into 8 differed."""
    state = one_state(1 << 15)  # large enough to be drawn alone
    whole = swagjax.sample(KEY, state)["w"]
    for number, axis_type in ((2, AxisType.Explicit), (8, AxisType.Auto)):
        mesh = mesh_of(number, axis_type)

        def place(x, mesh=mesh):
            axes = (*[None] * (x.ndim - 1), "data") if x.ndim else ()
            return jax.device_put(x, NamedSharding(mesh, P(*axes)))

        drawn = swagjax.sample(KEY, jax.tree.map(place, state))["w"]
        np.testing.assert_array_equal(drawn, whole)


def test_the_generator_is_the_one_in_force_at_the_call_not_at_the_first_compilation():
    """jax-ml/jax#21061: the setting of threefry inside of jit."""
    state = one_state()
    draw = jax.jit(swagjax.sample)
    before = draw(KEY, state)["w"]
    with jax.threefry_partitionable(False):
        inside, plain = draw(KEY, state)["w"], swagjax.sample(KEY, state)["w"]
    np.testing.assert_array_equal(inside, plain)
    assert (inside != before).all()
    np.testing.assert_array_equal(draw(KEY, state)["w"], before)


def test_sampling_inside_shard_map():
    """jax-ml/jax#15398 and #31080: generators that loop fail where an axis varies."""
    state, keys = one_state(), jax.random.split(KEY, 8)
    draw = jax.vmap(swagjax.sample, (0, None))
    each = jax.shard_map(draw, mesh=mesh_of(8), in_specs=(P("data"), P()), out_specs=P("data"))
    found = jax.jit(each)(keys, state)["w"]
    np.testing.assert_allclose(found, draw(keys, state)["w"], rtol=1e-5, atol=1e-6)


def test_predicting_inside_shard_map():
    """jeertmans/DiffeRT#280, instadeepai/Mava#1184: a scan that starts from a constant."""

    def predict(state, x):
        return swagjax.predict(KEY, state, prob_fn, x, num_samples=2)

    split = jax.shard_map(predict, mesh=mesh_of(8), in_specs=(P(), P("data")), out_specs=P("data"))
    state, x = one_state(), jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    thetas = swagjax.predict_samples(KEY, state, lambda params, _: params["w"], 0.0, num_samples=2)
    logits = np.asarray(x, np.float64) @ np.asarray(thetas, np.float64).T
    want = (1 / (1 + np.exp(-logits))).mean(1)
    np.testing.assert_allclose(jax.jit(split)(state, x), want, rtol=1e-5)


def test_fitting_a_temperature_inside_shard_map():
    """The same kind in a loop of bisection: each device fits its own share."""
    logits = jnp.asarray(np.log([[0.9, 0.1]] * 16), jnp.float32)  # 90 % sure, right at 3 of 4
    labels = jnp.asarray([0, 0, 0, 1] * 4)
    split = jax.shard_map(
        lambda *share: calibration.fit_temperature(*share)[None],
        mesh=mesh_of(4),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    np.testing.assert_allclose(jax.jit(split)(logits, labels), np.log(9) / np.log(3), rtol=1e-5)


PROBS = np.array([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875], [1.0, 0.0]] * 2, np.float32)
LABELS = np.array([0, 1, 1, 0, 1, 0, 0, 0])


def entropy(probs):
    return -(probs * np.log(np.where(probs > 0, probs, 1))).sum(1).mean()


def auroc(below, above):
    pairs = np.sign(above[None, :] - below[:, None])
    return (pairs + 1).mean() / 2


SCORES = {
    "nll": (metrics.nll, lambda p, y: -np.log(p[np.arange(8), y]).mean()),
    "ece": (
        lambda p, y: metrics.ece(p, y, 1),
        lambda p, y: abs(((p.argmax(1) == y) - p.max(1)).sum()) / 8,
    ),
    "brier": (metrics.brier, lambda p, y: ((p - np.eye(2)[y]) ** 2).sum(1).mean()),
    "predictive_entropy": (
        lambda p, y: metrics.predictive_entropy(p).mean(),
        lambda p, y: entropy(p),
    ),
    "auroc": (lambda p, y: metrics.auroc(p[:, 0], p[:, 1]), lambda p, y: auroc(p[:, 0], p[:, 1])),
}


@pytest.mark.parametrize("name", SCORES)
def test_metrics_of_predictions_split_by_their_type(name):
    """jax-ml/jax#28542: gathers under AxisType.Explicit; predict's outputs lie so there."""
    score, oracle = SCORES[name]
    mesh = mesh_of(8, AxisType.Explicit)
    with jax.set_mesh(mesh):
        probs, labels = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (PROBS, LABELS))
        found = score(probs, labels)
    np.testing.assert_allclose(found, oracle(PROBS.astype(np.float64), LABELS), rtol=1e-6)


# --- files and checkpoints ---


def test_pytorch_buffers_of_any_memory_layout():
    """safetensors/safetensors#825: the bytes of Fortran-ordered arrays were taken for C's."""
    rng = np.random.default_rng(0)
    mean, ring = rng.normal(size=(2, 3)), rng.normal(size=(2, 6))
    params = {"Dense_0": {"kernel": jnp.zeros((3, 2), jnp.float32)}}
    layouts = (
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1].copy()[::-1],
        lambda x: x.astype(">f8"),
    )
    for layout in layouts:
        arrays = {"mean": mean, "sq_mean": mean**2 + 1, "cov_mat_sqrt": ring}
        named = {f"base.fc.weight_{name}": layout(x) for name, x in arrays.items()}
        named["n_models"] = np.array([2])
        state = io.from_torch(named, params, io.flax_names({"Dense_0": "base.fc"}))
        np.testing.assert_allclose(state.mean["Dense_0"]["kernel"], mean.T, rtol=1e-6)
        rows = ring.reshape(2, 2, 3).swapaxes(1, 2)
        np.testing.assert_allclose(state.deviations["Dense_0"]["kernel"], rows, rtol=1e-6)


@pytest.mark.parametrize("name", ["__metadata__", "", "step", "mean", "é 中"])
def test_parameters_may_have_the_names_that_the_file_format_reserves(tmp_path, name):
    """safetensors/safetensors#849: a tensor named __metadata__ made an unreadable file."""
    params = {name: jnp.zeros(2)}
    state = collect(swagjax.swag(2), params, [{name: np.ones(2)}])
    io.save(tmp_path / "file", state)
    assert jax.tree.all(jax.tree.map(np.array_equal, io.load(tmp_path / "file", params), state))


def test_an_nnx_model_and_its_optimizer_survive_a_checkpoint(tmp_path):
    """google/flax#4423, google/orbax#2540: their state came back as dicts, or not at all."""

    def make():
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        opt = optax.chain(optax.sgd(0.1, momentum=0.9), swagjax.swag(2))
        return model, nnx.Optimizer(model, opt, wrt=nnx.Param)

    model, optimizer = make()
    for _ in range(3):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoint.save(manager, 1, nnx.state((model, optimizer)))
    target = nnx.eval_shape(lambda: nnx.state(make()))
    _, restored = checkpoint.restore_latest(tmp_path, target)
    other, other_optimizer = make()
    nnx.update((other, other_optimizer), restored)
    same = jax.tree.map(
        np.array_equal, swagjax.get_state(other_optimizer), swagjax.get_state(optimizer)
    )
    assert jax.tree.all(same)
    np.testing.assert_array_equal(other.kernel[...], model.kernel[...])


def test_a_manager_that_keeps_the_best_still_restores_the_newest(tmp_path):
    """antonioterpin/flowgym#51: best_fn evicted the checkpoints that a run resumes from."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=lambda scores: -scores["loss"])
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert all(checkpoint.save(manager, n, {"x": jnp.float32(n)}) for n in range(1, 5))
    step, tree = checkpoint.restore_latest(tmp_path, {"x": jnp.float32(0)})
    assert (step, tree["x"]) == (4, 4)


def test_a_manager_that_keeps_nothing_is_named(tmp_path):
    """google/orbax#527: retention rules that delete what was just written."""
    options = ocp.CheckpointManagerOptions(max_to_keep=0)
    with (
        ocp.CheckpointManager(tmp_path, options=options) as manager,
        pytest.raises(RuntimeError, match="max_to_keep"),
    ):
        checkpoint.save(manager, 1, {"x": jnp.float32(1)})

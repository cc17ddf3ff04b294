import sys
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from swagjax import batch_stats

KEY = jax.random.key(0)
# 23 examples in batches of 8: the last one has 7.
X = (1 + np.random.default_rng(0).normal(size=(23, 6, 6, 2))).astype(np.float32)
SIZE = 8


class Net(nn.Module):
    """Convolution, BatchNorm, dense layer, BatchNorm: the second sees the first's output."""

    momentum: float = 0.9
    fast: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        options = {"momentum": self.momentum, "use_fast_variance": self.fast}
        x = nn.Conv(3, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(not train, **options, name="first")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(4, name="dense")(x.reshape(len(x), -1))
        return nn.BatchNorm(not train, **options, name="second")(x)


class NNXNet(nnx.Module):
    def __init__(self, momentum=0.9):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.first = nnx.BatchNorm(3, momentum=momentum, rngs=rngs)
        self.dense = nnx.Linear(108, 4, rngs=rngs)
        self.second = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(self.conv(x)))
        return self.second(self.dense(x.reshape(len(x), -1)))


def activations(params, x):
    """What the two BatchNorms of either network see of a batch, in float64 NumPy."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    first = np.einsum("nhwcij,ijco->nhwo", windows, params["conv"]["kernel"])
    first = first + params["conv"]["bias"]
    mean, var = first.mean((0, 1, 2)), first.var((0, 1, 2))
    hidden = (first - mean) / np.sqrt(var + 1e-5) * params["first"]["scale"]
    hidden = np.maximum(hidden + params["first"]["bias"], 0).reshape(len(x), -1)
    return {"first": first, "second": hidden @ params["dense"]["kernel"] + params["dense"]["bias"]}


def true_statistics(params, inputs=X, batch_size=SIZE):
    """Moments of every batch, averaged with weights proportional to the sizes of the batches."""
    batches = [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]
    seen = [activations(params, batch) for batch in batches]

    def average(moment, layer):
        moments = [moment(s[layer].reshape(-1, s[layer].shape[-1]), 0) for s in seen]
        return np.average(moments, axis=0, weights=[len(b) for b in batches])

    layers = ("first", "second")
    return {n: {"mean": average(np.mean, n), "var": average(np.var, n)} for n in layers}


def variables(model, seed=0):
    """Parameters, and statistics that would show if any of them were left."""
    shapes = jax.eval_shape(model.init, KEY, X)
    rng = np.random.default_rng(seed)
    made = jax.tree.map(lambda x: jnp.float32(rng.normal(0.2, 0.3, x.shape)), shapes)
    return made["params"], made["batch_stats"]


def pure(state):
    return nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state


def assert_close(got, wanted, rtol=2e-4, atol=1e-5):
    got = pure(got)
    assert set(got) == set(wanted)
    for layer in wanted:
        for name in ("mean", "var"):
            np.testing.assert_allclose(got[layer][name], wanted[layer][name], rtol, atol)


# --- linen -----------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99, 0.999])
def test_linen_statistics_are_the_averaged_moments_of_the_batches(momentum):
    model = Net(momentum)
    params, stats = variables(model)
    refresh = jax.jit(batch_stats.linen(model, stats, X, batch_size=SIZE, train=True))
    assert_close(refresh(params), true_statistics(params), rtol=1e-3)


def test_statistics_follow_the_weights():
    model = Net()
    refresh = jax.jit(batch_stats.linen(model, variables(model)[1], X, batch_size=SIZE, train=True))
    for seed in (0, 1):
        params, _ = variables(model, seed)
        assert_close(refresh(params), true_statistics(params))


@pytest.mark.parametrize("batch_size", [5, 256])
def test_batch_size_sets_the_batches(batch_size):
    """The variance is that within batches: smaller ones have less of it."""
    model = Net()
    params, stats = variables(model)
    refresh = jax.jit(batch_stats.linen(model, stats, X, batch_size=batch_size, train=True))
    assert_close(refresh(params), true_statistics(params, batch_size=batch_size))


def test_last_batch_counts_by_its_size():
    """Weighted equally, a batch of one would outweigh each of the others' members fivefold."""
    x = np.array([[0.0]] * 10 + [[11.0]], np.float32)
    model = nn.BatchNorm(momentum=0.9)
    made = model.init(KEY, x, use_running_average=False)
    refresh = batch_stats.linen(
        model, made["batch_stats"], x, batch_size=5, use_running_average=False
    )
    np.testing.assert_allclose(refresh(made["params"])["mean"], 1.0, rtol=1e-4)


def test_regression_refresh_without_reset_with_the_models_momentum():
    """Nothing of the stored statistics is left; not even a NaN."""
    model = Net(0.99)
    params, stats = variables(model)
    results = []
    for value in (1e6, np.nan):
        stored = jax.tree.map(lambda s, v=value: jnp.full_like(s, v), stats)
        refresh = jax.jit(batch_stats.linen(model, stored, X, batch_size=SIZE, train=True))
        results.append(refresh(params))
    assert_close(results[0], true_statistics(params), rtol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, *results)
    # Over one batch three times over there is no drift towards the last batches either.
    thrice = np.concatenate([X[:SIZE]] * 3)
    refresh = jax.jit(batch_stats.linen(model, stats, thrice, batch_size=SIZE, train=True))
    assert_close(refresh(params), true_statistics(params, X[:SIZE]), rtol=1e-3)


def test_order_of_the_batches_is_of_no_consequence():
    model = Net(0.5)
    params, stats = variables(model)
    first, second = (
        jax.jit(batch_stats.linen(model, stats, x, batch_size=8, train=True))(params)
        for x in (X[:16], np.concatenate([X[8:16], X[:8]]))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first, second)


def test_accurate_variance_where_the_mean_is_large():
    """With the model's use_fast_variance=False; E[x^2] - E[x]^2 would lose all its digits."""
    x = (1000 + np.random.default_rng(0).normal(size=(32, 4))).astype(np.float32)
    model = nn.BatchNorm(momentum=0.99, use_fast_variance=False)
    made = model.init(KEY, x, use_running_average=False)
    refresh = batch_stats.linen(
        model, made["batch_stats"], x, batch_size=16, use_running_average=False
    )
    stats = refresh(made["params"])
    within = (np.float64(x[:16]).var(0) + np.float64(x[16:]).var(0)) / 2
    np.testing.assert_allclose(stats["var"], within, rtol=2e-3)
    np.testing.assert_allclose(stats["mean"], x.mean(0, np.float64), rtol=1e-4)


def test_accurate_variance_of_a_network():
    model = Net(fast=False)
    params, stats = variables(model)
    refresh = jax.jit(batch_stats.linen(model, stats, X, batch_size=SIZE, train=True))
    assert_close(refresh(params), true_statistics(params))


@pytest.mark.slow
def test_dropout_takes_its_rngs_from_apply_kwargs():
    model = Net(dropout=0.5)
    params, stats = variables(model)

    def refreshed(key):
        refresh = batch_stats.linen(
            model, stats, X, batch_size=SIZE, train=True, rngs={"dropout": key}
        )
        return jax.jit(refresh)(params)

    one, other = (refreshed(jax.random.key(seed)) for seed in (0, 1))
    # Before the dropout nothing changes, after it the mask tells.
    wanted = true_statistics(params)
    np.testing.assert_allclose(one["first"]["mean"], wanted["first"]["mean"], rtol=1e-3)
    assert np.isfinite(one["second"]["mean"]).all()
    assert np.abs(one["second"]["mean"] - other["second"]["mean"]).max() > 1e-3


# --- nnx -------------------------------------------------------------------------------------


def nnx_net(momentum=0.9):
    """A model with parameters and statistics unlike the ones it was created with."""
    model = NNXNet(momentum)
    rng = np.random.default_rng(0)
    for variable in (nnx.Param, nnx.BatchStat):
        moved = jax.tree.map(
            lambda x: x + rng.uniform(0.1, 0.5, x.shape).astype(np.float32),
            nnx.state(model, variable),
        )
        nnx.update(model, moved)
    return model


@pytest.mark.parametrize("momentum", [0.1, 0.999])
def test_nnx_statistics_are_the_averaged_moments_of_the_batches(momentum):
    model = nnx_net(momentum)
    params = nnx.state(model, nnx.Param)
    refresh = jax.jit(batch_stats.nnx(model, X, batch_size=SIZE))
    assert_close(refresh(params), true_statistics(pure(params)), rtol=1e-3)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nnx_model_is_not_changed(mode):
    model = nnx_net()
    getattr(model, mode)()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    refresh = batch_stats.nnx(model, X, batch_size=SIZE)
    params = nnx.state(model, nnx.Param)
    stats = refresh(params)
    assert_close(stats, true_statistics(pure(params)))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert model.first.use_running_average == (mode == "eval")
    assert model.second.use_running_average == (mode == "eval")


def test_nnx_statistics_merge_into_the_model():
    model = nnx_net()
    model.eval()
    graphdef, params, _, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    stats = batch_stats.nnx(model, X, batch_size=len(X))(params)
    got = nnx.merge(graphdef, params, stats, rest)(X)
    seen = activations(pure(params), X)["second"]
    scale, bias = model.second.scale[...], model.second.bias[...]
    wanted = (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_nnx_takes_arrays_in_place_of_params():
    """As swagjax.sample gives them for the state of an nnx.Optimizer."""
    model = nnx_net()
    params = nnx.state(model, nnx.Param)
    refresh = jax.jit(batch_stats.nnx(model, X, batch_size=SIZE))
    got = refresh(nnx.as_pure(params))
    assert_close(got, pure(refresh(params)), rtol=1e-6)


def test_nnx_model_without_statistics_needs_no_refresh():
    with pytest.raises(ValueError, match=r"^model has no nnx.BatchStat.*needs no refresh$"):
        batch_stats.nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), X)


def test_nnx_variables_of_other_kinds_take_part_as_they_are():
    class Doubled(nnx.Module):
        def __init__(self):
            self.factor = nnx.Variable(jnp.float32(2))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dropout(self.norm(self.factor[...] * x))

    x = np.random.default_rng(0).normal(1, 1, (9, 3)).astype(np.float32)
    model = Doubled()
    stats = batch_stats.nnx(model, x, batch_size=4)(nnx.state(model, nnx.Param))
    np.testing.assert_allclose(stats["norm"]["mean"], 2 * x.mean(0), rtol=1e-3)
    assert model.factor[...] == 2


# --- Transformations -------------------------------------------------------------------------


@pytest.mark.parametrize("build", ["linen", "nnx"])
def test_several_samples_side_by_side(build):
    if build == "linen":
        model = Net(0.99)
        params, stats = variables(model)
        refresh = batch_stats.linen(model, stats, X, batch_size=SIZE, train=True)
    else:
        model = nnx_net(0.99)
        params, refresh = (
            nnx.state(model, nnx.Param),
            batch_stats.nnx(model, X, batch_size=SIZE),
        )
    factors = jnp.array([0.5, 1.0, 2.0])
    samples = jax.vmap(lambda f: jax.tree.map(lambda p: f * p, params))(factors)
    together = pure(jax.jit(jax.vmap(refresh))(samples))
    for i in range(3):
        alone = pure(jax.tree.map(lambda p, i=i: p[i], samples))
        row = jax.tree.map(lambda s, i=i: s[i], together)
        assert_close(row, true_statistics(alone), rtol=1e-3)


def test_refresh_works_outside_jit():
    model = Net()
    params, stats = variables(model)
    refresh = batch_stats.linen(model, stats, X, batch_size=SIZE, train=True)
    assert_close(refresh(params), true_statistics(params))


def test_refresh_is_a_pytree_of_its_arrays():
    """Its inputs travel as arguments, so that they are no constants of the compiled program."""
    model = Net()
    refresh = batch_stats.linen(model, variables(model)[1], X, batch_size=SIZE, train=True)
    shapes = {leaf.shape for leaf in jax.tree.leaves(refresh) if isinstance(leaf, jax.Array)}
    assert (2, SIZE, 6, 6, 2) in shapes
    assert (7, 6, 6, 2) in shapes


# --- refresher and keep ----------------------------------------------------------------------


def test_inputs_may_be_trees():
    def train_pass(params, mean, batch):
        return 0.9 * mean + 0.1 * params * (batch["x"] * batch["y"]).mean()

    x, y = np.arange(10.0), np.linspace(1, 2, 10)
    refresh = batch_stats.refresher(train_pass, jnp.zeros(()), {"x": x, "y": y}, batch_size=4)
    np.testing.assert_allclose(refresh(3.0), 3 * (x * y).mean(), rtol=1e-4)


def test_leaves_may_differ_in_momentum():
    def train_pass(params, stats, batch):
        return {
            "slow": 0.99 * stats["slow"] + 0.01 * batch.mean(0),
            "fast": 0.2 * stats["fast"] + 0.8 * batch.max(0),
        }

    x = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    template = {"slow": jnp.zeros(5), "fast": jnp.zeros(5)}
    stats = batch_stats.refresher(train_pass, template, x, batch_size=12)(None)
    np.testing.assert_allclose(stats["slow"], x.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stats["fast"], x.max(0), rtol=1e-4)


@pytest.mark.parametrize(
    "update",
    [
        lambda old, batch: old * batch.std(0),  # another momentum for each feature
        lambda old, batch: (old + 1) ** 2 * jnp.arange(1, 4) + batch.mean(0),
        lambda old, batch: jnp.nan * old + batch.mean(0),
        lambda old, batch: 0.9 * jnp.sqrt(old) + 0.1 * batch.mean(0),
        lambda old, batch: 1.5 * old + batch.mean(0),
        lambda old, batch: -0.5 * old + 1.5 * batch.mean(0),
        lambda old, batch: old + 0 * batch.mean(0),
        lambda old, batch: (0.99 * old + 0.01 * batch.mean(0)).astype(jnp.bfloat16),
    ],
)
def test_a_leaf_that_is_no_average_is_named_and_becomes_nan_under_jit(update):
    """A momentum beyond [0, 1), one that bfloat16 does not hold, or none: finite and wrong once."""

    def train_pass(params, stats, batch):
        return {
            "bad": update(stats["bad"], batch),
            "good": 0.9 * stats["good"] + 0.1 * batch.mean(0),
        }

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    template = {"bad": jnp.zeros(3), "good": jnp.zeros(3)}
    refresh = batch_stats.refresher(train_pass, template, x)
    stats = jax.jit(refresh)(None)
    assert np.isnan(stats["bad"]).all()
    np.testing.assert_allclose(stats["good"], x.mean(0), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"batch_stats\['bad'\]: .* one momentum"):
        refresh(None)


@pytest.mark.parametrize("value", [np.uint32(7), np.array([True, False])])
def test_leaves_that_are_no_floats_are_kept(value):
    """A raw key, a flag: as they were given, though the model reads and changes them."""

    def train_pass(params, stats, batch):
        mean = 0.9 * stats["mean"] + 0.1 * batch.mean() * (stats["other"] == value).all()
        return {"mean": mean, "other": (stats["other"] + 1).astype(value.dtype)}

    template = {"mean": jnp.zeros(()), "other": jnp.asarray(value)}
    stats = jax.jit(batch_stats.refresher(train_pass, template, jnp.arange(10.0)))(None)
    np.testing.assert_allclose(stats["mean"], 4.5, rtol=1e-4)
    np.testing.assert_array_equal(stats["other"], value)
    assert stats["other"].dtype == template["other"].dtype


def test_batches_hold_256_inputs_by_default():
    x = np.zeros((300, 2), np.float32)
    model = nn.BatchNorm(use_running_average=False)
    for refresh in (
        batch_stats.linen(model, model.init(KEY, x)["batch_stats"], x),
        batch_stats.nnx(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), x),
        batch_stats.refresher(lambda *_: None, None, x),
    ):
        assert {(1, 256, 2), (44, 2)} <= {np.shape(leaf) for leaf in jax.tree.leaves(refresh)}


def test_keep_gives_the_same_statistics_to_every_sample():
    stats = {"mean": jnp.arange(3.0)}
    kept = batch_stats.keep(stats)
    for params in (None, {"w": 1.0}):
        np.testing.assert_array_equal(kept(params)["mean"], stats["mean"])


@pytest.mark.parametrize(
    ("inputs", "batch_size", "message"),
    [
        (X, 0, "batch_size=0: give an integer of at least 1"),
        (X, -8, "batch_size=-8: give an integer of at least 1"),
        (X[:0], 8, "inputs have lengths .*N > 0"),
        ({}, 8, "inputs have lengths .*N > 0"),
        (np.float32(1), 8, "inputs have lengths .*N > 0"),
        ({"x": X, "y": X[:5]}, 8, r"inputs have lengths \[\(5,\), \(23,\)\].*one length"),
    ],
)
def test_bad_arguments(inputs, batch_size, message):
    with pytest.raises(ValueError, match=message):
        batch_stats.linen(Net(), {}, inputs, batch_size=batch_size, train=True)
    with pytest.raises(ValueError, match=message):
        batch_stats.nnx(NNXNet(), inputs, batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        batch_stats.refresher(lambda *_: None, jnp.zeros(()), inputs, batch_size=batch_size)


@pytest.mark.parametrize("momentum", [0.9, 0.999])
@pytest.mark.parametrize("std", [1.0, 1e3, 1e5])
def test_moments_of_any_size_keep_their_digits(momentum, std):
    """Beside a variance of 1e10 a statistic of one would be lost, and the momentum with it."""
    x = std * np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    model = nn.BatchNorm(momentum=momentum, use_fast_variance=False, use_running_average=False)
    variables = model.init(jax.random.key(0), x)
    refresh = batch_stats.linen(model, variables["batch_stats"], x, batch_size=32)
    wanted = x.astype(np.float64).reshape(2, 32, 3).var(1).mean(0)
    np.testing.assert_allclose(refresh(variables["params"])["var"], wanted, rtol=5e-4)


def test_a_model_left_in_evaluation_mode_is_refused():
    model, x = nn.BatchNorm(use_running_average=True), np.ones((4, 2), np.float32)
    variables = model.init(jax.random.key(0), x)
    refresh = batch_stats.linen(model, variables["batch_stats"], x)
    with pytest.raises(ValueError, match=r"training mode, for linen .* train=True"):
        refresh(variables["params"])
    with pytest.raises(ValueError, match="training mode"):
        jax.jit(refresh)(variables["params"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_keep_their_precision(dtype):
    def train_pass(params, mean, batch):
        return (0.9 * mean + 0.1 * batch.mean()).astype(dtype)

    with jax.enable_x64(True):
        x = jnp.arange(10, dtype=dtype)
        mean = batch_stats.refresher(train_pass, jnp.zeros((), dtype), x, batch_size=4)(None)
    assert mean.dtype == dtype
    np.testing.assert_allclose(mean, 4.5, rtol=1e-5)


def test_float64_statistics_with_x64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 2)))
        model = nn.BatchNorm(use_running_average=False, dtype=jnp.float64, param_dtype=jnp.float64)
        variables = jax.tree.map(lambda v: v.astype(float), model.init(jax.random.key(0), x))
        stats = batch_stats.linen(model, variables["batch_stats"], x)(variables["params"])
        np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-6, atol=1e-8)


# --- Stored statistics -----------------------------------------------------------------------


def normed(use=None, **fields):
    """A linen model that passes ``use`` on to its BatchNorm, and its variables."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *args, **kwargs):
            return nn.BatchNorm(use, **fields)(nn.Dense(2)(x), *args, **kwargs)

    return Model(), Model().init(
        KEY, X[:, 0, 0], **({"use_running_average": True} if use is None else {})
    )


def test_linen_batch_norm_on_stored_statistics_is_refused_however_it_is_told():
    x = X[:, 0, 0]
    field, field_variables = normed(True)
    call, call_variables = normed()
    calls = [
        lambda: field.apply(field_variables, x),
        lambda: call.apply(call_variables, x, True),
        lambda: call.apply(call_variables, x, use_running_average=True),
    ]
    for run in calls:
        wanted = run()
        with (
            batch_stats.refuse_stored(),
            pytest.raises(ValueError, match=r"stored statistics.*batch_stats\.linen.*\.nnx.*keep"),
        ):
            run()
        np.testing.assert_array_equal(run(), wanted)  # allowed again


def test_linen_batch_norm_on_the_batch_is_not_refused_however_it_is_told():
    x = X[:, 0, 0]
    field, field_variables = normed(False)
    call, call_variables = normed()
    calls = [
        lambda: field.apply(field_variables, x, mutable="batch_stats")[0],
        lambda: call.apply(call_variables, x, False, mutable="batch_stats")[0],
        lambda: call.apply(call_variables, x, use_running_average=False, mutable="batch_stats")[0],
    ]
    for run in calls:
        wanted = run()
        with batch_stats.refuse_stored():
            np.testing.assert_array_equal(run(), wanted)


def test_other_methods_of_a_linen_batch_norm_are_not_refused():
    class Named(nn.BatchNorm):
        def title(self, x):
            return self.momentum

    model = Named(use_running_average=True)
    with batch_stats.refuse_stored():
        assert model.apply({}, X, method="title") == 0.99


@pytest.mark.parametrize("module", ["flax.linen", "flax.nnx", "equinox.nn"])
def test_without_its_package_there_is_nothing_to_refuse(monkeypatch, module):
    monkeypatch.delitem(sys.modules, module)
    with batch_stats.refuse_stored(), batch_stats.refuse_training():
        pass


def equinox_norm(mode="batch"):
    return eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, "batch", mode=mode)


def test_equinox_batch_norm_on_stored_statistics_is_refused():
    model, state = equinox_norm()
    inference, x = eqx.nn.inference_mode(model), jnp.ones(2)
    before = vars(eqx.nn.BatchNorm)["__call__"]
    for run in (lambda: inference(x, state), lambda: model(x, state, inference=True)):
        with batch_stats.refuse_stored(), pytest.raises(ValueError, match="stored statistics"):
            run()
        with batch_stats.refuse_training():
            run()
    assert vars(eqx.nn.BatchNorm)["__call__"] is before


def test_nnx_batch_norm_on_stored_statistics_is_refused():
    layer = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    evaluated, x = nnx.view(layer, use_running_average=True), jnp.ones((3, 2))
    for run in (lambda: evaluated(x), lambda: layer(x, True)):
        with batch_stats.refuse_stored(), pytest.raises(ValueError, match="stored statistics"):
            run()
        with batch_stats.refuse_training():
            run()


def test_a_model_left_in_training_mode_is_refused():
    """Forgotten ``model.eval()``: the prediction of a row depends on the others in its batch."""
    model, state = equinox_norm()
    layer, x = nnx.BatchNorm(2, rngs=nnx.Rngs(0)), jnp.ones((3, 2))
    run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for refuse in (batch_stats.refuse_stored, batch_stats.refuse_training):
        with refuse(), pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
            layer(x)
        with refuse(), pytest.raises(ValueError, match=r"training mode.*say inference=False"):
            run(x, state)
        with refuse():  # told by the call, it is meant
            layer(x, use_running_average=False)


def test_other_threads_are_not_looked_at():
    layer = nnx.view(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), use_running_average=True)
    with batch_stats.refuse_stored(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(layer, jnp.ones((3, 2))).result().shape == (3, 2)


# --- Scale and precision of the statistics ---------------------------------------------------

SCALES = ((0, 1), (0, 3e6), (0, 1e7), (0, 1e8), (1e4, 1), (1e6, 1e3))


def raw_columns(n=300):
    """Features of any scale, in float32, as they come from a table."""
    mean, std = np.array(SCALES).T
    return np.float32(mean + std * np.random.default_rng(0).normal(size=(n, len(mean))))


def moments(x, size):
    """Mean and variance of batches, averaged by their sizes, in float64."""
    batches = [np.float64(x[i : i + size]) for i in range(0, len(x), size)]
    weights = [len(b) for b in batches]
    return [np.average([f(b, 0) for b in batches], 0, weights) for f in (np.mean, np.var)]


def normalised(build, momentum, x, size, **fields):
    if build == "nnx":
        model = nnx.BatchNorm(x.shape[1], momentum=momentum, rngs=nnx.Rngs(0), **fields)
        return batch_stats.nnx(model, x, batch_size=size), nnx.state(model, nnx.Param)
    model = nn.BatchNorm(momentum=momentum, use_running_average=False, **fields)
    variables = model.init(KEY, x)
    refresh = batch_stats.linen(model, variables["batch_stats"], x, batch_size=size)
    return refresh, variables["params"]


@pytest.mark.parametrize("build", ["linen", "nnx"])
@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
def test_raw_columns_of_any_scale_have_their_moments(momentum, build):
    """Columns of 3e6: 3 % off, of 1e7: NaN, of 1e8: infinite; mean 1e4 and deviation 1: 8 times."""
    x = raw_columns()
    refresh, params = normalised(build, momentum, x, 128)
    stats = jax.jit(refresh)(params)
    mean, var = moments(x, 128)
    # The mean of a batch in float32 is exact to a few roundings of 1e4, 1e-3 deviations.
    assert (np.abs(stats["mean"] - mean) < 2e-3 * np.sqrt(var)).all()
    assert (np.abs(stats["mean"] - mean)[-1] < 2e-4 * np.sqrt(var[-1])).all()
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("momentum", [0.99, 0.999])
def test_statistics_kept_in_half_precision_are_recomputed_in_float32(dtype, momentum):
    """In bfloat16 15 % off at momentum .99 and infinite at .999; NaN in float16."""
    x = raw_columns()[:, :1]
    model = nn.BatchNorm(momentum=momentum, use_running_average=False)
    variables = model.init(KEY, x)
    template = jax.tree.map(lambda s: s.astype(dtype), variables["batch_stats"])
    stats = jax.jit(batch_stats.linen(model, template, x, batch_size=128))(variables["params"])
    mean, var = moments(x, 128)
    np.testing.assert_allclose(stats["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
    assert stats["var"].dtype == jnp.float32


# --- Randomness ------------------------------------------------------------------------------

ROWS, FEATURES = np.ones((512, 200), np.float32), 200


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(x * self.param("w", nn.initializers.ones, (1, 1)))
        return nn.BatchNorm(False, momentum=0.9, use_scale=False, use_bias=False)(x)


class NNXDropped(nnx.Module):
    def __init__(self, own):
        rngs = nnx.Rngs(0)
        self.w = nnx.Param(jnp.ones((1, 1)))
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs if own else None)

    def __call__(self, x, rngs=None):
        return self.norm(self.dropout(x * self.w[...], rngs=rngs))


def dropped(build):
    """A refresh of a model with dropout, as a function of one weight."""
    if build == "linen":
        model, rngs = Dropped(), {"params": KEY, "dropout": KEY}
        stats = model.init(rngs, ROWS)["batch_stats"]
        refresh = batch_stats.linen(model, stats, ROWS, batch_size=8, rngs={"dropout": KEY})
        return lambda w: refresh({"w": w * jnp.ones((1, 1))})["BatchNorm_0"]["mean"]
    own = build == "nnx own"
    options = {} if own else {"rngs": nnx.Rngs(3)}
    refresh = batch_stats.nnx(NNXDropped(own), ROWS, batch_size=8, **options)
    ones = {"bias": jnp.zeros(FEATURES), "scale": jnp.ones(FEATURES)}
    return lambda w: refresh({"w": w * jnp.ones((1, 1)), "norm": ones})["norm"]["mean"]


@pytest.mark.parametrize("build", ["linen", "nnx own", "nnx rngs"])
def test_each_batch_and_each_sample_have_masks_of_their_own(build):
    """One mask for all batches has eight times the noise here, one for all samples is shared.

    The mean of 512 kept or dropped ones, doubled, has standard deviation 1 / sqrt(512). Bounds at
    five standard errors: a false alarm in a million at the most, and the key is fixed.
    """
    means = jax.jit(jax.vmap(dropped(build)))(jnp.array([1.0, 2.0, 1.0]))
    noise = np.asarray(means) / np.array([[1], [2], [1]]) - 1
    spread = np.sqrt((noise**2).mean(1) * 512)
    assert (np.abs(spread - 1) < 5 / np.sqrt(2 * FEATURES)).all()
    np.testing.assert_array_equal(means[0], means[2])  # the same weights, the same statistics
    assert abs(np.corrcoef(noise[:2])[0, 1]) < 5 / np.sqrt(FEATURES)


# --- Counters --------------------------------------------------------------------------------


class Stacked(eqx.Module):
    """BatchNorm, a layer, BatchNorm."""

    first: eqx.nn.BatchNorm
    linear: eqx.nn.Linear
    second: eqx.nn.BatchNorm

    def __init__(self, mode):
        self.first = eqx.nn.BatchNorm(3, "batch", mode=mode, momentum=0.9)
        self.linear = eqx.nn.Linear(3, 2, key=KEY)
        self.second = eqx.nn.BatchNorm(2, "batch", mode=mode, momentum=0.9)

    def __call__(self, x, state):
        x, state = self.first(x, state)
        return self.second(self.linear(x), state)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox_batch_norm_that_counts_its_steps(mode, steps):
    """Statistics that are de-biased by a counter: .83 for 1.83."""
    model, fresh = eqx.nn.make_with_state(Stacked)(mode)
    x = np.random.default_rng(0).normal(1.83, 2, (32, 3)).astype(np.float32)
    run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    state = fresh
    for _ in range(steps):
        state = run(x, state)[1]
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def train_pass(params, state, batch):
        model = eqx.combine(params, static)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return run(batch, state)[1]

    refresh = batch_stats.refresher(train_pass, state, x)
    if mode == "ema" and steps:  # trains on its running statistics, which is not affine
        with pytest.raises(ValueError, match="from statistics of a model that has just been made"):
            refresh(params)
        return
    evaluated = eqx.nn.inference_mode(model)
    out, _ = jax.vmap(evaluated, in_axes=(0, None))(x, jax.jit(refresh)(params))
    seen = (x - x.mean(0, np.float64)) / np.sqrt(x.var(0, np.float64) + 1e-5)
    hidden = seen @ np.float64(model.linear.weight).T + np.float64(model.linear.bias)
    wanted = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    np.testing.assert_allclose(out, wanted, atol=1e-4)


def test_an_average_that_is_kept_de_biased():
    """With a hidden one beside it, as Haiku's moving averages have."""

    def train_pass(params, stats, batch):
        count = stats["count"] + 1
        hidden = 0.99 * stats["hidden"] + 0.01 * batch.mean(0)
        return {"count": count, "hidden": hidden, "average": hidden / (1 - 0.99**count)}

    x = np.random.default_rng(0).normal(3, 1, (40, 2)).astype(np.float32)
    for count in (0, 60):
        template = {"count": jnp.array(count), "hidden": jnp.zeros(2), "average": jnp.zeros(2)}
        stats = batch_stats.refresher(train_pass, template, x, batch_size=16)(None)
        debiased = stats["hidden"] / (1 - 0.99 ** stats["count"])
        for got in (stats["average"], debiased):
            np.testing.assert_allclose(got, x.mean(0, np.float64), rtol=1e-5)


# --- Models of other forms -------------------------------------------------------------------


def test_ghost_batch_norm_and_fixed_batch_sizes():
    """The momentum is read from a whole batch, not from eight examples of it."""

    def train_pass(params, mean, batch):
        groups = batch.reshape(4, 4, 2)  # of a batch of 16
        return 0.9 * mean + 0.1 * groups.mean(1).mean(0)

    x = np.random.default_rng(0).normal(size=(48, 2)).astype(np.float32)
    mean = batch_stats.refresher(train_pass, jnp.zeros(2), x, batch_size=16)(None)
    np.testing.assert_allclose(mean, x.mean(0, np.float64), atol=1e-6)


@pytest.mark.parametrize("build", ["linen", "nnx"])
def test_batch_norm_over_devices_takes_its_batch_as_whole(build):
    """With an axis name: a NameError outside of pmap and shard_map."""
    x = raw_columns(40)[:, :1]
    options = {"axis_name": "devices"}
    if build == "linen":
        model = nn.BatchNorm(use_running_average=False, **options)
        stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
        params = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
        refresh = batch_stats.linen(model, stats, x, batch_size=16)
    else:
        refresh, params = normalised(build, 0.9, x, 16, **options)
    mean, var = moments(x, 16)
    got = refresh(params)
    np.testing.assert_allclose(got["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(got["var"], var, rtol=1e-5)
    # Where the axis is there, it is used.
    parts = jax.vmap(lambda p: refresh(p), None, axis_name="devices", axis_size=2)(params)
    np.testing.assert_allclose(parts["var"], [var] * 2, rtol=1e-5)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, shift, train=False):
        return nn.BatchNorm(not train)(x * self.param("w", nn.initializers.ones, (1, 1)) + shift)


class NNXTwo(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((1, 1)))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x, shift, train=False):
        return self.norm(x * self.w[...] + shift, use_running_average=not train)

    def by_name(self, batch, train=False):
        return self(batch["x"], batch["shift"], train)


def two_inputs(n=23):
    rng = np.random.default_rng(0)
    return np.float32(rng.normal(size=(n, 3))), np.float32(rng.normal(size=(n, 1)))


def by_dict(model, batch, train):
    return model(batch["x"], batch["shift"], train)


FORMS = {
    "tuple": (tuple, {}),
    "list": (list, {}),
    "dict": (lambda pair: dict(zip(("x", "shift"), pair, strict=True)), {"method": by_dict}),
    "named": (lambda pair: dict(zip(("x", "shift"), pair, strict=True)), {"method": "by_name"}),
}


@pytest.mark.parametrize(
    ("build", "form"),
    [("nnx", form) for form in FORMS] + [("linen", "tuple"), ("linen", "dict")],
)
def test_models_of_several_inputs_with_arguments(build, form):
    """Two inputs, tuples, dicts, and ``train=True`` of nnx."""
    pair = two_inputs()
    make, options = FORMS[form]
    if build == "linen":
        model = Two()
        variables = model.init(KEY, *pair)
        params, stats = variables["params"], variables["batch_stats"]
        refresh = batch_stats.linen(model, stats, make(pair), batch_size=8, train=True, **options)
        got = refresh(params)["BatchNorm_0"]
    else:
        model = NNXTwo()
        refresh = batch_stats.nnx(model, make(pair), batch_size=8, train=True, **options)
        got = refresh(nnx.state(model, nnx.Param))["norm"]
    mean, var = moments(np.float64(pair[0]) + pair[1], 8)
    np.testing.assert_allclose(got["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(got["var"], var, rtol=1e-5)


# --- Loaders ---------------------------------------------------------------------------------


class Loader:
    """Batches of (inputs, label) that start anew each time, and how often they did."""

    def __init__(self, x, size):
        self.x, self.size, self.walks = x, size, 0

    def __iter__(self):
        self.walks += 1
        for i in range(0, len(self.x), self.size):
            yield self.x[i : i + self.size], 7


def inputs_only(model, x, label, **kwargs):
    return model(x, **kwargs)


@pytest.mark.parametrize("build", ["linen", "nnx"])
def test_a_loader_gives_the_moments_of_its_batches(build):
    """The counterpart of PyTorch's ``update_bn``; the last batch is smaller."""
    loader = Loader(X, SIZE)
    if build == "linen":
        model = Net(0.99)
        params, stats = variables(model)
        by_name = ({"epoch": label, "images": x} for x, label in loader)
        options = {"train": True, "method": lambda m, batch, train: m(batch["images"], train)}
        once = batch_stats.linen(model, stats, by_name, **options)
        assert_close(once(params), true_statistics(params))
        loader.walks = 0
        options = {"train": True, "method": inputs_only}
        refresh = batch_stats.linen(model, stats, loader, **options)
    else:
        model = nnx_net(0.99)
        params = nnx.state(model, nnx.Param)
        refresh = batch_stats.nnx(model, loader, method=inputs_only)
    for _ in range(2):
        assert_close(refresh(params), true_statistics(pure(params)))
    assert loader.walks == 2


def test_a_loader_that_is_empty_or_inside_jit_is_answered():
    def train_pass(params, mean, batch):
        return 0.9 * mean + 0.1 * params * batch.mean()

    refresh = batch_stats.refresher(train_pass, jnp.zeros(()), iter([np.arange(4.0)]))
    with pytest.raises(ValueError, match=r"loader.*outside jit"):
        jax.jit(refresh)(1.0)
    refresh = batch_stats.refresher(train_pass, jnp.zeros(()), iter([np.arange(4.0)]))
    np.testing.assert_allclose(refresh(2.0), 3, rtol=1e-6)
    with pytest.raises(ValueError, match=r"gave no batch.*only once"):
        refresh(2.0)


def test_a_loader_of_many_batches_loses_no_digits():
    """Batches add up as deviations from the first, not as sums: 2000 of mean 1e4."""
    rng = np.random.default_rng(0)
    x = np.float32(1e4 + rng.normal(size=(2000, 8)))

    def train_pass(params, mean, batch):
        return 0.9 * mean + 0.1 * (1e4 + (batch - 1e4).mean())

    mean = jax.jit(batch_stats.refresher(train_pass, jnp.zeros(()), x.ravel(), batch_size=8))(None)
    np.testing.assert_allclose(mean, x.mean(dtype=np.float64), atol=1.5e-3)


# --- Meshes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_inputs_split_over_devices(axis_type):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:4])
    x = raw_columns(64)
    refresh, params = normalised("linen", 0.9, x, 16)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
        refresh, _ = normalised("linen", 0.9, spread, 16)
        stats = jax.jit(refresh)(params)
    np.testing.assert_allclose(stats["var"], moments(x, 16)[1], rtol=1e-5)

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    ],
)
def test_a_leaf_that_is_not_affine_becomes_nan_and_the_others_stay(update):
    def train_pass(params, stats, batch):
        return {
            "bad": update(stats["bad"], batch),
            "good": 0.9 * stats["good"] + 0.1 * batch.mean(0),
        }

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    template = {"bad": jnp.zeros(3), "good": jnp.zeros(3)}
    stats = batch_stats.refresher(train_pass, template, x)(None)
    assert np.isnan(stats["bad"]).all()
    np.testing.assert_allclose(stats["good"], x.mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [np.int32(7), np.array([True, False])])
def test_leaves_that_are_no_floats_are_kept(value):
    """A count of batches, a flag: as they were given, though the model reads and changes them."""

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


STORED = nnx.state(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.BatchStat)


def by_name(params, x):
    return x - STORED["mean"][...]


def by_call(params, x):
    return by_name(params, x)


def by_call_of_a_call(params, x):
    return by_call(params, x)


def in_turn(params, x):
    return by_turns(params, x)


def by_turns(params, x):
    return by_name(params, x) + in_turn(params, x)


def by_default(params, x, stats=STORED):
    return x - stats["mean"][...]


def by_keyword(params, x, *, stats=STORED):
    return x - stats["mean"][...]


def by_argument(first, second, third=None):
    return first


def at_temperature(temperature, params, x):
    return by_name(params, x) / temperature


tempered = functools.partial(at_temperature, 2.0)


def by_tempered(params, x):
    return tempered(params, x)


def harmless(params, x):
    return jnp.sin(x)


def by_one_of_several(params, x):
    return harmless(params, by_name(params, harmless(params, x)))


def over(stats, join=str.join):
    def closure(params, x):
        return harmless(params, x) - stats, join

    return closure


REFERRING = {
    "name": by_name,
    "call": by_call,
    "call of a call": by_call_of_a_call,
    "recursion": in_turn,
    "one of several": by_one_of_several,
    "default": by_default,
    "keyword": by_keyword,
    "closure over a state": over(STORED),
    "closure over a variable": over(STORED["mean"]),
    "closure over a model": over(nnx.BatchNorm(2, rngs=nnx.Rngs(0))),
    "closure of a closure": over(over(STORED)),
    "partial": functools.partial(by_argument, STORED),
    "partial keyword": functools.partial(by_argument, third=STORED),
    "partial of a function": tempered,
    "jax partial of a function": jax.tree_util.Partial(at_temperature, 2.0),
    "partial of a partial": functools.partial(functools.partial(at_temperature), 2.0),
    "call of a partial": by_tempered,
    "partial of a jitted function": functools.partial(jax.jit(at_temperature), 2.0),
    "jit": jax.jit(by_name),
    "vmap": jax.vmap(jax.jit(by_call)),
}


@pytest.mark.parametrize("way", REFERRING)
def test_stored_statistics_of_nnx_are_found(way):
    with pytest.raises(ValueError, match=r"stored statistics.*batch_stats\.linen.*\.nnx.*keep"):
        batch_stats.refuse_closure(REFERRING[way])


def elsewhere(params, x):
    return by_name(params, x)


elsewhere.__module__ = "another"


def not_there_yet():
    def function(params, x):
        return later(params), harmless, undefined_name  # noqa: F821

    yield function
    later = STORED
    yield later


@pytest.mark.parametrize(
    "function",
    [
        harmless,
        over(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))),
        over({"stats": 1, 2: {"mean"}}),
        over(elsewhere),  # another module's functions are its own affair
        next(not_there_yet()),
        functools.partial(by_argument, 1.0, third=harmless),
        str.join,
        len,
        nnx.relu,
    ],
)
def test_what_refers_to_no_stored_statistics_is_accepted(function):
    batch_stats.refuse_closure(function)
    batch_stats.refuse_closure(jax.jit(lambda params, x: function(params, x)))


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


@pytest.mark.parametrize("module", ["flax.linen", "flax.nnx"])
def test_without_flax_there_is_nothing_to_refuse(monkeypatch, module):
    monkeypatch.delitem(sys.modules, module)
    with batch_stats.refuse_stored():
        ran = batch_stats.refuse_closure(harmless) is None
    assert ran

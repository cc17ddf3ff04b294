import contextlib
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import scipy.stats
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import swagjax
from swagjax import diagnostics, ensemble, io, subspace, surface
from swagjax.gaussian import total
from swagjax.posterior import iterates

RANK = 4
# Below, at and above the rank; 5 to 8 leave the next row of the ring at each of its offsets.
COUNTS = (2, 3, 4, 5, 6, 7, 8, 11)
KINDS = ("swag", "swag_diag", "swa")
FACTORIES = {
    "swag": functools.partial(swagjax.swag, RANK),
    "swag_diag": swagjax.swag_diag,
    "swa": swagjax.swa,
}
TX = {kind: make() for kind, make in FACTORIES.items()}
# What every function of a state takes; the second argument stands for key, params or noise.
READERS = {
    "mean": lambda state, **_: swagjax.mean(state),
    "variance": swagjax.variance,
    "sample": lambda state, **options: swagjax.sample(jax.random.key(0), state, **options),
    "log_prob": lambda state, **options: swagjax.log_prob(state, state.mean, **options),
    "entropy": swagjax.entropy,
    "from_noise": lambda state, **options: swagjax.from_noise(
        state, state.mean, jnp.ones(RANK), **options
    ),
}

SCORE = jax.jit(jax.value_and_grad(swagjax.log_prob, 1), static_argnames="centering")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def template(dtype=np.float64):
    """Two leaves of one shape, so that pairing by shape or by order of traversal shows."""
    shapes = {"a": (2, 3), "b": {"w": (2, 3), "bias": (3,)}, "c": ()}
    return jax.tree.map(
        lambda s: np.zeros(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def stack(count, tree, seed=0):
    """Iterates of a random walk, a different spread in every coordinate: (count, ...) leaves."""
    rng = np.random.default_rng(seed)

    def walk(x):
        steps = rng.normal(size=(count, *x.shape)) * rng.uniform(0.1, 1.0, x.shape)
        return (rng.normal(size=x.shape) + steps.cumsum(0)).astype(x.dtype)

    return jax.tree.map(walk, tree)


@functools.cache
def jitted(function, **options):
    return jax.jit(function, **options)


def collect(tx, iterates):
    """The state after collecting iterates stacked on a leading axis."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), iterates)
    state = tx.init(zeros)
    for i in range(len(jax.tree.leaves(iterates)[0])):
        _, state = jitted(tx.update)(jax.tree.map(lambda x, i=i: x[i], iterates), state, zeros)
    return state


def rows(iterates):
    """The same iterates as a float64 matrix (count, P)."""
    count = len(jax.tree.leaves(iterates)[0])
    leaves = [np.reshape(x, (count, -1)) for x in jax.tree.leaves(iterates)]
    return np.concatenate(leaves, 1).astype(np.float64)


def example(kind="swag", count=6, dtype=np.float64, seed=0):
    iterates = stack(count, template(dtype), seed)
    return collect(TX[kind], iterates), rows(iterates)


def jacobian(state, *, scale=1.0, centering="running", min_variance=0.0):
    """d theta / d (z1, z2): a square root of the covariance, by automatic differentiation."""
    root = jitted(_jacobian, static_argnames="centering")
    return np.asarray(root(state, scale, min_variance, centering=centering), np.float64)


def _jacobian(state, scale, min_variance, *, centering):
    options = {"scale": scale, "centering": centering, "min_variance": min_variance}
    z1 = jax.tree.map(jnp.zeros_like, state.mean)
    ring = jax.tree.leaves(state.deviations)
    z2 = jnp.zeros(len(ring[0]), ring[0].dtype) if ring else None

    def theta(z1, z2):
        leaves = jax.tree.leaves(swagjax.from_noise(state, z1, z2, **options))
        return jnp.concatenate([x.ravel() for x in leaves])

    columns = jax.tree.leaves(jax.jacobian(theta, (0, 1) if ring else 0)(z1, z2))
    size = sum(x.size for x in jax.tree.leaves(state.mean))
    return jnp.concatenate([c.reshape(size, -1) for c in columns], 1)


def unflatten(vector, state):
    leaves, treedef = jax.tree.flatten(state.mean)
    parts = np.split(vector, np.cumsum([x.size for x in leaves])[:-1])
    parts = [jnp.asarray(p.reshape(x.shape), x.dtype) for p, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, parts)


def many_samples(state, number=20_000, seed=0, **options):
    """Flattened samples (number, P), in float64."""
    draw = functools.partial(swagjax.sample, **options)
    keys = jax.random.split(jax.random.key(seed), number)
    thetas = jax.vmap(draw, (0, None))(keys, state)
    leaves = [np.reshape(x, (number, -1)) for x in jax.tree.leaves(thetas)]
    return np.concatenate(leaves, 1).astype(np.float64)


@contextlib.contextmanager
def compilations():
    """Count the programs that XLA compiles in the body."""
    seen = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# --- The covariance, exactly -----------------------------------------------------------------


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("count", COUNTS)
def test_covariance_of_swag_is_that_of_the_dense_oracle(x64, count, centering):
    state, iterates = example("swag", count)
    root = jacobian(state, centering=centering)
    wanted = oracle.covariance("swag", iterates, RANK, centering=centering)
    np.testing.assert_allclose(root @ root.T, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["swag_diag", "swa"])
@pytest.mark.parametrize("count", [2, 5])
def test_covariance_of_swag_diag_has_no_half_and_swa_is_a_point(x64, kind, count):
    state, iterates = example(kind, count)
    root = jacobian(state)
    np.testing.assert_allclose(root @ root.T, oracle.covariance(kind, iterates), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_covariance_in_float32(kind):
    state, iterates = example(kind, 7, np.float32)
    root = jacobian(state)
    wanted = oracle.covariance(kind, iterates, RANK)
    np.testing.assert_allclose(root @ root.T, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "min_variance": 0.5}])
@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 9])
def test_variance_is_the_diagonal_of_the_covariance(x64, kind, count, centering, options):
    state, iterates = example(kind, count)
    got = swagjax.variance(state, centering=centering, **options)
    wanted = np.diag(oracle.covariance(kind, iterates, RANK, centering=centering, **options))
    np.testing.assert_allclose(oracle.flatten(got), wanted, rtol=1e-9, atol=1e-15)
    assert jax.tree.structure(got) == jax.tree.structure(state.mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 0.25, 3.0])
def test_scale_and_min_variance_enter_the_covariance(x64, kind, scale):
    state, iterates = example(kind, 5)
    floor = np.median(iterates.var(0))
    root = jacobian(state, scale=scale, min_variance=floor)
    wanted = oracle.covariance(kind, iterates, RANK, scale=scale, min_variance=floor)
    np.testing.assert_allclose(root @ root.T, wanted, rtol=1e-9, atol=1e-12)


def test_mean_is_the_mean_of_the_iterates(x64):
    state, iterates = example("swa", 7)
    np.testing.assert_allclose(oracle.flatten(swagjax.mean(state)), iterates.mean(0), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_from_noise_is_affine_about_the_mean(x64, kind):
    state, iterates = example(kind, 6)
    root = jacobian(state)
    rng = np.random.default_rng(1)
    z = rng.normal(size=root.shape[1])
    size = iterates.shape[1]
    z2 = jnp.asarray(z[size:]) if kind == "swag" else None
    got = swagjax.from_noise(state, unflatten(z[:size], state), z2)
    np.testing.assert_allclose(oracle.flatten(got), iterates.mean(0) + root @ z, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", range(RANK + 3))
def test_final_centering_is_the_scatter_of_the_last_iterates(x64, offset, dtype):
    """D D^T alone (no Sigma_diag), the ring wrapped at every offset, straight from iterates."""
    state, iterates = example("swag", RANK + offset, dtype)
    zero = state._replace(variance=jax.tree.map(jnp.zeros_like, state.variance))
    root = jacobian(zero, centering="final")
    last = iterates[-RANK:] - iterates.mean(0)
    wanted = last.T @ last / (RANK - 1) / 2
    tolerance = {"rtol": 1e-9} if dtype == np.float64 else {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(root @ root.T, wanted, **tolerance)


def test_centerings_differ_where_the_iterates_travel():
    state, _ = example("swag", 8, np.float32)
    running, final = (swagjax.variance(state, centering=c) for c in ("running", "final"))
    assert not np.allclose(oracle.flatten(running), oracle.flatten(final), rtol=0.05)


def test_dropping_fields_reads_the_state_of_the_lesser_method(x64):
    state, iterates = example("swag", 7)
    diag, point = state._replace(deviations=None), state._replace(deviations=None, variance=None)
    for kind, reduced in (("swag_diag", diag), ("swa", point)):
        root = jacobian(reduced)
        np.testing.assert_allclose(root @ root.T, oracle.covariance(kind, iterates), rtol=1e-9)


# --- Samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "centering": "final", "min_variance": 0.2}])
def test_sample_is_from_noise_at_some_noise(kind, options):
    """A sample less the same one at scale 4 gives its noise back: both lie on one ray."""
    state, _ = example(kind, 6, np.float32)
    key, mean = jax.random.key(3), oracle.flatten(state.mean)
    scale = options.get("scale", 1.0)
    once = oracle.flatten(swagjax.sample(key, state, **options)) - mean
    twice = oracle.flatten(swagjax.sample(key, state, **{**options, "scale": 4 * scale})) - mean
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-5)


def test_sample_lies_where_its_noise_puts_it(x64):
    """Noise solved for from three samples that share it gives back a fourth one."""
    state, _ = example("swag", 6)
    key, mean = jax.random.key(5), oracle.flatten(state.mean)
    draws, roots = [], []
    for floor in (0.0, 10.0, 100.0):
        draws.append(oracle.flatten(swagjax.sample(key, state, min_variance=floor)) - mean)
        roots.append(jacobian(state, min_variance=floor))
    noise, *_ = np.linalg.lstsq(np.concatenate(roots), np.concatenate(draws), rcond=None)
    size = len(mean)
    z1, z2 = unflatten(noise[:size], state), jnp.asarray(noise[size:])
    for options in ({}, {"centering": "final"}, {"scale": 0.1, "min_variance": 1.0}):
        got = swagjax.sample(key, state, **options)
        wanted = swagjax.from_noise(state, z1, z2, **options)
        np.testing.assert_allclose(oracle.flatten(got), oracle.flatten(wanted), atol=1e-7)


@pytest.mark.parametrize("kind", ["swag", "swag_diag"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "centering": "final", "min_variance": 0.1}])
def test_samples_have_the_moments_of_the_oracle(kind, options):
    """Exact laws at a fixed key: a false alarm over all bounds has probability below 1e-6.

    Along a direction u the squares of N projections are chi-square with N degrees of freedom;
    all coordinates and all their pairwise sums determine the whole covariance.
    """
    state, iterates = example(kind, 6, np.float32)
    samples = many_samples(state, **options)
    wanted = oracle.covariance(kind, iterates, RANK, **options)
    root = np.linalg.cholesky(wanted)
    white = scipy.linalg.solve_triangular(root, (samples - iterates.mean(0)).T, lower=True).T
    number, size = white.shape

    far = number * (white.mean(0) ** 2).sum()
    assert far < scipy.stats.chi2.isf(3e-7, size)

    gram = white.T @ white
    pairs = np.triu_indices(size, 1)
    sums = (np.diag(gram)[pairs[0]] + np.diag(gram)[pairs[1]]) / 2 + gram[pairs]
    squares = np.concatenate([np.diag(gram), sums])
    low, high = scipy.stats.chi2.isf([1 - 3e-7 / len(squares), 3e-7 / len(squares)], number)
    assert low < squares.min()
    assert squares.max() < high


def test_diagonal_noise_is_independent_in_every_coordinate_and_leaf():
    """Equal leaves of equal shape must not repeat numbers; large leaves draw for themselves."""
    shapes = {"a": (7,), "b": (7,), "c": (130, 130), "d": (130, 130), "e": (60, 300)}
    shapes = jax.tree.map(np.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))
    iterates = jax.tree.map(lambda x: np.stack([x + 1, x - 1]).astype(np.float32), shapes)
    state = collect(swagjax.swag_diag(), iterates)  # N(0, I)
    theta = oracle.flatten(swagjax.sample(jax.random.key(0), state))
    assert len(np.unique(theta)) > 0.99 * len(theta)  # float32 normals coincide now and then
    leaves = [np.ravel(x) for x in jax.tree.leaves(swagjax.sample(jax.random.key(1), state))]
    # Correlation of n pairs times sqrt(n) is nearly standard normal: 6 has probability 2e-9.
    for i, x in enumerate(leaves[2:]):
        assert abs(x.mean()) * np.sqrt(x.size) < 6
        assert abs(np.mean(x[1:] * x[:-1])) * np.sqrt(x.size) < 6
        for y in leaves[2:][:i]:
            n = min(x.size, y.size)
            assert abs(np.mean(x[:n] * y[:n])) * np.sqrt(n) < 6


def test_regression_a_fresh_z2_per_tensor():
    """One z2 for all leaves, or the low-rank part turns block-diagonal.

    With Sigma_diag = 0 every sample is in the span of the deviations across all leaves.
    """
    state, iterates = example("swag", 4, np.float32)
    zero = state._replace(variance=jax.tree.map(jnp.zeros_like, state.variance))
    offsets = many_samples(zero, 64) - iterates.mean(0)
    D = oracle.deviations(iterates, RANK)
    outside = offsets - offsets @ np.linalg.pinv(D) @ D
    assert np.abs(outside).max() < 1e-4 * np.abs(offsets).max()
    assert np.linalg.matrix_rank(offsets, 1e-3) == 3  # four deviations, of which the first is zero


def test_regression_variance_used_as_standard_deviation(x64):
    iterates = {"w": np.array([[98.0], [102.0], [98.0], [102.0]])}
    state = collect(swagjax.swag_diag(), iterates)  # N(100, 4)
    one = swagjax.from_noise(state, {"w": jnp.ones(1)}, None)
    assert one["w"][0] == 102.0
    density = swagjax.log_prob(state, {"w": jnp.array([103.0])})
    np.testing.assert_allclose(density, scipy.stats.norm(100, 2).logpdf(103))
    np.testing.assert_allclose(swagjax.entropy(state), scipy.stats.norm(100, 2).entropy())


@pytest.mark.parametrize("rank", [3, 20])
def test_regression_low_rank_divided_by_the_size_of_the_ring(x64, rank):
    """K is what was collected: rings of 3 and 20 that hold the same 3 deviations agree."""
    iterates = stack(3, template())
    state = collect(swagjax.swag(rank), iterates)
    root = jacobian(state)
    wanted = oracle.covariance("swag", rows(iterates), 3)
    np.testing.assert_allclose(root @ root.T, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_regression_scale_as_standard_deviation_in_one_path(x64, kind):
    """A covariance times four: twice the offset, four times the variance, P log 2 of entropy."""
    state, iterates = example(kind, 6)
    options = {"min_variance": 0.01}
    key, mean, size = jax.random.key(0), iterates.mean(0), iterates.shape[1]
    small, large = ({**options, "scale": s} for s in (0.5, 2.0))
    offsets = [oracle.flatten(swagjax.sample(key, state, **o)) - mean for o in (small, large)]
    np.testing.assert_allclose(offsets[1], 2 * offsets[0], rtol=1e-6, atol=1e-9)
    variances = [oracle.flatten(swagjax.variance(state, **o)) for o in (small, large)]
    np.testing.assert_allclose(variances[1], 4 * variances[0])
    entropies = [swagjax.entropy(state, **o) for o in (small, large)]
    np.testing.assert_allclose(entropies[1] - entropies[0], size * np.log(2))
    densities = [swagjax.log_prob(state, state.mean, **o) for o in (small, large)]
    np.testing.assert_allclose(densities[0] - densities[1], size * np.log(2))


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("kind", ["swag", "swag_diag"])
def test_regression_log_prob_of_another_gaussian_than_sampled(x64, kind, centering):
    """By change of variables, with the covariance read off the sampler itself."""
    state, _ = example(kind, 5)
    options = {"scale": 0.7, "centering": centering, "min_variance": 0.02}
    root = jacobian(state, **options)
    sampled = scipy.stats.multivariate_normal(oracle.flatten(state.mean), root @ root.T)
    theta = swagjax.sample(jax.random.key(1), state, **options)
    got = swagjax.log_prob(state, theta, **options)
    np.testing.assert_allclose(got, sampled.logpdf(oracle.flatten(theta)), rtol=1e-9)
    np.testing.assert_allclose(swagjax.entropy(state, **options), sampled.entropy(), rtol=1e-9)


def test_regression_parameters_paired_by_traversal_order(x64):
    """Leaves of one shape, given in another order of insertion, keep their own moments."""
    iterates = stack(5, {"x": np.zeros(3), "y": np.zeros(3)})
    state = collect(swagjax.swag(3), iterates)
    theta = swagjax.sample(jax.random.key(0), state)
    swapped = {"y": theta["y"], "x": theta["x"]}
    assert swagjax.log_prob(state, swapped) == swagjax.log_prob(state, theta)
    exchanged = {"y": theta["x"], "x": theta["y"]}
    assert swagjax.log_prob(state, exchanged) != swagjax.log_prob(state, theta)
    again = swagjax.sample(jax.random.key(0), state, like=swapped)
    np.testing.assert_array_equal(again["x"], theta["x"])
    np.testing.assert_array_equal(again["y"], theta["y"])


# --- Iterates --------------------------------------------------------------------------------


def walk(count, size=7, dtype=np.float32):
    """A random walk, and the leaves of a tree that its rows are cut into."""
    path = 1 + np.random.default_rng(count).normal(size=(count, size)).cumsum(0).astype(dtype)
    return {"a": path[:, :6].reshape(count, 2, 3), "b": path[:, 6]}


@pytest.mark.parametrize("count", [3, 4, 7])
def test_iterates_are_those_collected_from_the_oldest(x64, count):
    wanted = walk(count, dtype=np.float64)
    got = iterates(collect(TX["swag"], wanted))
    for name, path in wanted.items():
        assert got[name].shape == (min(count, RANK), *path.shape[1:])
        np.testing.assert_allclose(got[name], path[-RANK:], rtol=1e-13)


def test_iterates_inside_jit_are_nan_where_none_was_collected():
    for count in (2, 4, 7):
        wanted = walk(count)
        state = collect(TX["swag"], wanted)
        got = jax.jit(iterates)(state)
        for name, path in wanted.items():
            held = min(count, RANK)
            assert got[name].shape[0] == RANK
            np.testing.assert_allclose(got[name][:held], path[-RANK:], rtol=3e-6)
            assert np.isnan(got[name][held:]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "ulps"), [(20, 8), (100, 16)])
@pytest.mark.parametrize("spread", [1e-4, 1e-2])
def test_iterates_lose_few_digits(rank, ulps, spread):
    """Of weights around 1 in float32: units in the last place, whatever their spread."""
    rng = np.random.default_rng(0)
    path = (1 + spread * rng.normal(size=(150, 300))).astype(np.float32)
    state = collect(swagjax.swag(rank), path)
    error = np.abs(np.asarray(iterates(state), np.float64) - path[-rank:])
    assert 0 < error.max() < ulps * np.finfo(np.float32).eps


@pytest.mark.slow
def test_iterates_of_a_ring_of_bfloat16_are_off_by_their_rounding():
    path = 1 + 0.1 * np.random.default_rng(0).normal(size=(30, 300)).astype(np.float32)
    state = collect(swagjax.swag(20, deviation_dtype=jnp.bfloat16), path)
    error = np.abs(np.asarray(iterates(state)) - path[-20:]).max()
    assert 1e-4 < error < 0.02 * 0.1  # of a spread of 0.1


@pytest.mark.slow
def test_iterates_of_a_merged_state_are_those_of_both_halves():
    first, second = (collect(TX["swag"], {"w": walk(n)["a"]}) for n in (2, 3))
    got = iterates(swagjax.merge(first, second))["w"]
    wanted = np.concatenate([walk(2)["a"], walk(3)["a"]])[-RANK:]
    order = lambda rows: np.asarray(rows)[np.argsort(rows[:, 0, 0])]  # noqa: E731
    np.testing.assert_allclose(order(got), order(wanted), rtol=1e-5)


def test_iterates_take_the_dtypes_and_the_holes_of_like():
    params = {"free": jnp.ones((2, 2), jnp.bfloat16), "frozen": jnp.full(3, 5.0)}
    tx = optax.masked(swagjax.swag(3), {"free": True, "frozen": False})
    state = run_masked(tx, params)
    got = iterates(state, like=params)
    assert got["free"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["free"][:, 0, 0], [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(got["frozen"], np.full((3, 3), 5.0))
    assert isinstance(iterates(state)["frozen"], optax.MaskedNode)


def test_iterates_that_were_not_finite_are_not_among_them():
    path = walk(4)["a"]
    path[1] = np.inf
    got = iterates(collect(TX["swag"], {"w": path}))["w"]
    np.testing.assert_allclose(got, path[[0, 2, 3]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["swag_diag", "swa"])
def test_iterates_ask_for_deviations(kind):
    state = collect(TX[kind], walk(3))
    with pytest.raises(ValueError, match=r"holds no deviations.*collect by swagjax\.swag\(rank\)"):
        iterates(state)
    with pytest.raises(ValueError, match="collected no iterate"):
        iterates(TX["swag"].init(template(np.float32)))
    empty = jax.jit(iterates)(TX["swag"].init(template(np.float32)))
    assert np.isnan(oracle.flatten(empty)).all()


# --- Densities -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "min_variance": 0.5}])
@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("kind", ["swag", "swag_diag"])
@pytest.mark.parametrize("count", [2, 4, 7])
def test_density_entropy_and_gradient_are_those_of_scipy(x64, kind, count, centering, options):
    state, iterates = example(kind, count)
    options = {**options, "centering": centering}
    covariance = oracle.covariance(kind, iterates, RANK, **options)
    gaussian = scipy.stats.multivariate_normal(iterates.mean(0), covariance)
    point = iterates.mean(0) + np.random.default_rng(2).normal(size=iterates.shape[1])
    density, slope = SCORE(state, unflatten(point, state), **options)
    np.testing.assert_allclose(density, gaussian.logpdf(point), rtol=1e-8)
    np.testing.assert_allclose(swagjax.entropy(state, **options), gaussian.entropy(), rtol=1e-8)
    wanted = -np.linalg.solve(covariance, point - iterates.mean(0))
    np.testing.assert_allclose(oracle.flatten(slope), wanted, rtol=1e-6, atol=1e-8)


def test_swa_with_a_floor_is_a_ball(x64):
    state, iterates = example("swa", 4)
    gaussian = scipy.stats.norm(iterates.mean(0), np.sqrt(0.5 * 0.04))
    options = {"scale": 0.5, "min_variance": 0.04}
    theta = swagjax.sample(jax.random.key(0), state, **options)
    got = swagjax.log_prob(state, theta, **options)
    np.testing.assert_allclose(got, gaussian.logpdf(oracle.flatten(theta)).sum())
    np.testing.assert_allclose(swagjax.entropy(state, **options), gaussian.entropy().sum())


def test_density_in_float32():
    state, iterates = example("swag", 9, np.float32)
    gaussian = scipy.stats.multivariate_normal(
        iterates.mean(0), oracle.covariance("swag", iterates, RANK)
    )
    theta = swagjax.sample(jax.random.key(0), state)
    got = swagjax.log_prob(state, theta)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, gaussian.logpdf(oracle.flatten(theta)), rtol=1e-3)
    np.testing.assert_allclose(swagjax.entropy(state), gaussian.entropy(), rtol=1e-4)


def test_density_integrates_to_one_over_a_plane(x64):
    """No oracle at all: two coordinates, a grid and a sum."""
    state = collect(swagjax.swag(3), stack(5, {"x": np.zeros(2)}))
    spread = np.sqrt(swagjax.variance(state)["x"])
    axes = [m + s * np.linspace(-9, 9, 301) for m, s in zip(state.mean["x"], spread, strict=True)]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    densities = jnp.exp(jax.vmap(lambda x: swagjax.log_prob(state, {"x": x}))(grid))
    area = np.prod([a[1] - a[0] for a in axes])
    np.testing.assert_allclose(densities.sum() * area, 1, rtol=1e-6)


# --- Degenerate states -----------------------------------------------------------------------


@pytest.fixture
def dead():
    """A state one of whose coordinates, dead[1], never moved."""
    iterates = stack(6, {"alive": np.zeros(2, np.float32), "dead": np.zeros(3, np.float32)})
    iterates["dead"][:, 1] = 0.7
    return collect(swagjax.swag(RANK), iterates), rows(iterates)


def test_coordinates_that_never_moved_stay_at_the_mean(dead):
    state, _ = dead
    thetas = jax.vmap(swagjax.sample, (0, None))(jax.random.split(jax.random.key(0), 50), state)
    assert (thetas["dead"][:, 1] == state.mean["dead"][1]).all()
    assert (thetas["dead"][:, 0] != state.mean["dead"][0]).all()


@pytest.mark.parametrize("centering", ["running", "final"])
def test_density_of_a_dead_coordinate_is_degenerate(dead, centering):
    state, _ = dead
    on = swagjax.sample(jax.random.key(0), state)
    off = {**on, "dead": on["dead"].at[1].add(1e-3)}
    assert swagjax.log_prob(state, on, centering=centering) == jnp.inf
    assert swagjax.log_prob(state, off, centering=centering) == -jnp.inf
    assert swagjax.entropy(state, centering=centering) == -jnp.inf


def test_min_variance_is_the_same_floor_everywhere(dead):
    state, iterates = dead
    options = {"min_variance": 0.01, "scale": 0.5}
    covariance = oracle.covariance("swag", iterates, RANK, **options)
    gaussian = scipy.stats.multivariate_normal(iterates.mean(0), covariance)
    theta = swagjax.sample(jax.random.key(0), state, **options)
    assert theta["dead"][1] != state.mean["dead"][1]
    variances = oracle.flatten(swagjax.variance(state, **options))
    np.testing.assert_allclose(variances, np.diag(covariance), rtol=1e-4)
    density = swagjax.log_prob(state, theta, **options)
    np.testing.assert_allclose(density, gaussian.logpdf(oracle.flatten(theta)), rtol=1e-3)
    np.testing.assert_allclose(swagjax.entropy(state, **options), gaussian.entropy(), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centering", ["running", "final"])
def test_one_collected_iterate_is_a_point(kind, centering):
    state, iterates = example(kind, 1, np.float32)
    theta = swagjax.sample(jax.random.key(0), state, centering=centering)
    np.testing.assert_array_equal(oracle.flatten(theta), iterates[0])
    assert (oracle.flatten(swagjax.variance(state, centering=centering)) == 0).all()
    assert swagjax.log_prob(state, theta, centering=centering) == jnp.inf
    assert swagjax.entropy(state, centering=centering) == -jnp.inf


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_a_point(kind):
    state, _ = example(kind, 6, np.float32)
    theta = swagjax.sample(jax.random.key(0), state, scale=0.0)
    np.testing.assert_array_equal(oracle.flatten(theta), oracle.flatten(state.mean))
    assert swagjax.log_prob(state, theta, scale=0.0) == jnp.inf
    off = jax.tree.map(lambda x: x + 1, theta)
    assert swagjax.log_prob(state, off, scale=0.0) == -jnp.inf
    assert swagjax.entropy(state, scale=0.0) == -jnp.inf


@pytest.mark.parametrize("reader", ["mean", "variance", "sample", "log_prob", "entropy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_collected_nothing_is_an_error_and_nan_in_jit(kind, reader):
    params = jax.tree.map(jnp.ones_like, template(np.float32))
    tx = FACTORIES[kind](start=3)
    _, state = tx.update(params, tx.init(params), params)
    with pytest.raises(
        ValueError, match=r"collected no iterate \(num_collected=0 after num_updates=1, .*start"
    ):
        READERS[reader](state)
    # The initial weights would be silently wrong; so would the zeros that the state holds.
    assert np.isnan(oracle.flatten(jax.jit(READERS[reader])(state))).all()
    if kind == "swa":  # a floor under a variance of zero is no variance either
        floored = jax.jit(functools.partial(READERS[reader], min_variance=1.0))(state)
        assert np.isnan(oracle.flatten(floored)).all()


def test_from_noise_of_a_state_that_collected_nothing():
    state = TX["swag"].init(template(np.float32))
    with pytest.raises(ValueError, match="collected no iterate"):
        READERS["from_noise"](state)
    assert np.isnan(oracle.flatten(jax.jit(READERS["from_noise"])(state))).all()


# --- like: dtypes, masked and None leaves, nnx -----------------------------------------------


def test_like_gives_dtypes():
    iterates = stack(4, {"x": np.zeros(3, np.float32), "y": np.zeros(2, np.float32)})
    state = collect(swagjax.swag(2), iterates)
    like = {"x": jnp.zeros(3, jnp.bfloat16), "y": jnp.zeros(2, jnp.float16)}
    theta, plain = (swagjax.sample(jax.random.key(0), state, like=p) for p in (like, None))
    assert jax.tree.map(lambda t: t.dtype, theta) == jax.tree.map(lambda p: p.dtype, like)
    assert plain["x"].dtype == jnp.float32
    for name in like:
        np.testing.assert_array_equal(theta[name], plain[name].astype(like[name].dtype))
    z1 = jax.tree.map(jnp.ones_like, plain)
    assert swagjax.from_noise(state, z1, jnp.ones(2), like=like)["y"].dtype == jnp.float16


def run_masked(tx, params):
    opt_state = tx.init(params)
    for i in range(4):
        updates = jax.tree.map(lambda p, i=i: jnp.full_like(p, i - 1.0), params)
        updates, opt_state = tx.update(updates, opt_state, params)
    return swagjax.get_state(opt_state)


def test_masked_leaves_are_filled_from_like():
    params = {"free": jnp.ones((2, 2)), "frozen": {"a": jnp.full(3, 5.0), "b": jnp.full(1, 7.0)}}
    tx = optax.masked(swagjax.swag(3), {"free": True, "frozen": False})
    state = run_masked(tx, params)
    current = jax.tree.map(lambda p: p + 0.5, params)
    theta = swagjax.sample(jax.random.key(0), state, like=current)
    assert jax.tree.structure(theta) == jax.tree.structure(params)
    np.testing.assert_array_equal(theta["frozen"]["a"], current["frozen"]["a"])
    np.testing.assert_array_equal(theta["frozen"]["b"], current["frozen"]["b"])
    assert (theta["free"] != current["free"]).all()
    # Full parameters are scored by the leaves that the state holds.
    held = {**state.mean, "free": theta["free"]}
    assert swagjax.log_prob(state, theta) == swagjax.log_prob(state, held)
    assert np.isfinite(swagjax.log_prob(state, theta))
    # Noise may be a full tree as well, and without like the holes stay.
    z1 = jax.tree.map(jnp.ones_like, params)
    again = swagjax.from_noise(state, z1, jnp.ones(3))
    assert isinstance(again["frozen"], optax.MaskedNode)


def test_partitioned_groups_are_filled_from_like():
    params = {"body": jnp.ones(3), "head": jnp.full(2, 2.0)}
    tx = optax.partition(
        {"swag": swagjax.swag(2), "frozen": optax.set_to_zero()},
        {"body": "frozen", "head": "swag"},
    )
    theta = swagjax.sample(jax.random.key(0), run_masked(tx, params), like=params)
    np.testing.assert_array_equal(theta["body"], params["body"])
    assert (theta["head"] != params["head"]).all()


def test_none_leaves_of_equinox_are_filled_from_like():
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    weights = eqx.filter(model, eqx.is_inexact_array)
    state = run_masked(swagjax.swag(2), weights)
    theta = swagjax.sample(jax.random.key(0), state, like=weights)
    assert jax.tree.structure(theta) == jax.tree.structure(weights)
    sampled = eqx.combine(theta, model)
    assert sampled(jnp.ones(2)).shape == (3,)
    assert np.isfinite(swagjax.log_prob(state, theta))


def test_like_refuses_another_shape_or_structure():
    state, _ = example("swag", 4, np.float32)
    like = template(np.float32)
    draw = functools.partial(swagjax.sample, jax.random.key(0), state)
    with pytest.raises(ValueError, match=r"like\['a'\] has shape \[\(3, 2\)\].*\(2, 3\)"):
        draw(like={**like, "a": np.zeros((3, 2), np.float32)})
    with pytest.raises(ValueError, match="like has another structure"):
        draw(like={"a": like["a"]})


def nnx_run():
    """An nnx model trained for a few steps, with swag in the chain of its optimizer."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.3), swagjax.swag(3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.array([[1.0, -2.0], [0.5, 3.0]], jnp.float32)
    for _ in range(4):
        optimizer.update(model, nnx.grad(lambda m: ((m(x) - 1) ** 2).mean())(model))
    return model, swagjax.get_state(optimizer)


def test_nnx_params_stand_for_like_and_params():
    model, state = nnx_run()
    params = nnx.state(model, nnx.Param)
    theta = swagjax.sample(jax.random.key(0), state, like=params)
    assert jax.tree.structure(theta) == jax.tree.structure(params)
    bare = swagjax.sample(jax.random.key(0), state)
    for got, wanted in zip(jax.tree.leaves(theta), jax.tree.leaves(bare), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert swagjax.log_prob(state, theta) == swagjax.log_prob(state, bare)
    nnx.update(model, theta)
    np.testing.assert_array_equal(model.kernel[...], jax.tree.leaves(bare)[1])


def test_a_state_of_nnx_params_can_be_collected_directly():
    params = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    tx = swagjax.swag_diag()
    state = tx.init(params)
    for i in range(3):
        _, state = tx.update(jax.tree.map(lambda p, i=i: p * i, params), state, params)
    theta = swagjax.sample(jax.random.key(0), state, like=params)
    assert jax.tree.structure(theta) == jax.tree.structure(params)
    assert not np.isnan(swagjax.log_prob(state, theta, min_variance=0.1))


# --- Keys, transformations, dtypes -----------------------------------------------------------


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("reader", READERS)
def test_sharded_states_read_as_others(reader, axis_type):
    """The ring is sharded as its parameter, behind a whole rank axis."""
    state = collect(TX["swag"], stack(5, {"w": np.zeros((8, 3), np.float32)}))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:4])
    leaf, ring = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("d",), (None, "d")))
    sharded = state._replace(
        mean=jax.device_put(state.mean, leaf),
        variance=jax.device_put(state.variance, leaf),
        deviations=jax.device_put(state.deviations, ring),
    )
    got = READERS[reader](sharded)
    wanted = READERS[reader](state)
    np.testing.assert_allclose(oracle.flatten(got), oracle.flatten(wanted), rtol=1e-4, atol=1e-6)
    if isinstance(got, dict):
        assert got["w"].sharding.is_equivalent_to(leaf, 2)


def test_typed_and_raw_keys_give_the_same_sample():
    state, _ = example("swag", 5, np.float32)
    typed, raw = (swagjax.sample(k(7), state) for k in (jax.random.key, jax.random.PRNGKey))
    np.testing.assert_array_equal(oracle.flatten(typed), oracle.flatten(raw))
    other = swagjax.sample(jax.random.key(8), state)
    assert (oracle.flatten(typed) != oracle.flatten(other)).all()


def test_other_generators_than_threefry_work():
    state, _ = example("swag", 5, np.float32)
    theta = swagjax.sample(jax.random.key(0, impl="rbg"), state)
    assert np.isfinite(oracle.flatten(theta)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_jit_and_vmap_over_keys_change_nothing(kind):
    state, _ = example(kind, 5, np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(swagjax.sample, (0, None)))(keys, state)
    for i, key in enumerate(keys):
        alone = swagjax.sample(key, state)
        row = jax.tree.map(lambda x, i=i: x[i], together)
        np.testing.assert_allclose(oracle.flatten(row), oracle.flatten(alone), rtol=1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_vmap_over_members(reader):
    """Members trained side by side share the step, and differ in all else, count included."""
    alone = [collect(TX["swag"], stack(n, template(np.float32), seed=n)) for n in (3, 6)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *alone)._replace(num_updates=jnp.int32(6))
    axes = swagjax.member_axes(states)
    got = jax.vmap(READERS[reader], in_axes=(axes,))(states)
    for i, state in enumerate(alone):
        member = jax.tree.map(lambda x, i=i: x[i], got)
        wanted = oracle.flatten(READERS[reader](state))
        np.testing.assert_allclose(oracle.flatten(member), wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_another_key_state_or_scale_compiles_nothing(reader):
    first, second = (example("swag", n, np.float32, seed=n)[0] for n in (3, 7))
    options = {"scale": 0.5, "min_variance": 0.01} if reader != "mean" else {}
    READERS[reader](first, **options)
    with compilations() as compiled:
        READERS[reader](second, **options)
        READERS[reader](second, **{name: 2 * value for name, value in options.items()})
    assert not compiled


def test_another_key_compiles_nothing():
    state, _ = example("swag", 5, np.float32)
    keys = [jax.random.key(i) for i in range(3)]
    swagjax.sample(keys[0], state)
    with compilations() as compiled:
        swagjax.sample(keys[1], state)
        swagjax.sample(keys[2], state)
    assert not compiled


def test_scale_may_be_traced_and_differentiated():
    state, iterates = example("swag", 5, np.float32)
    slope = jax.jit(jax.grad(lambda s, state: swagjax.entropy(state, scale=s)))(0.5, state)
    np.testing.assert_allclose(slope, iterates.shape[1] / 2 / 0.5, rtol=1e-4)  # P / (2 scale)


@pytest.mark.parametrize("reader", READERS)
def test_a_state_may_be_closed_over_in_jit(reader):
    """A concrete state in a traced function, and concrete options: constants of the program."""
    state, _ = example("swag", 5, np.float32)
    options = {} if reader == "mean" else {"scale": jnp.float32(0.5)}
    got = jax.jit(lambda: READERS[reader](state, **options))()
    wanted = READERS[reader](state, **options)
    np.testing.assert_allclose(oracle.flatten(got), oracle.flatten(wanted), rtol=1e-4, atol=1e-6)


def test_an_empty_state_closed_over_in_jit_is_never_silent():
    state = TX["swag"].init(template(np.float32))
    with contextlib.suppress(ValueError):  # the clear error is as good
        theta = jax.jit(lambda key: swagjax.sample(key, state))(jax.random.key(0))
        assert np.isnan(oracle.flatten(theta)).all()


def test_sample_of_float64_is_drawn_in_float64(x64):
    state, _ = example("swag", 5)
    theta = oracle.flatten(swagjax.sample(jax.random.key(0), state))
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(state.mean))
    offset = theta - oracle.flatten(state.mean)
    assert (offset.astype(np.float32) != offset).all()


def test_deviations_in_bfloat16():
    iterates = stack(6, template(np.float32))
    state = collect(swagjax.swag(RANK, deviation_dtype=jnp.bfloat16), iterates)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.deviations))
    theta = swagjax.sample(jax.random.key(0), state)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(theta))
    wide = state._replace(deviations=jax.tree.map(jnp.float32, state.deviations))
    root = jacobian(wide)
    wanted = oracle.covariance("swag", rows(iterates), RANK)
    # bfloat16 keeps 8 bits: 0.4 per cent of the largest entry, twice.
    np.testing.assert_allclose(root @ root.T, wanted, atol=0.01 * wanted.max())
    assert np.isfinite(swagjax.log_prob(state, theta))


def test_bfloat16_deviations_enter_in_float32():
    """Rounded when stored, not again in the arithmetic."""
    state = collect(
        swagjax.swag(RANK, deviation_dtype=jnp.bfloat16), stack(6, template(np.float32))
    )
    wide = state._replace(deviations=jax.tree.map(jnp.float32, state.deviations))
    for reader in READERS.values():
        got, wanted = oracle.flatten(reader(state)), oracle.flatten(reader(wide))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


# --- Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["variance", "sample", "log_prob", "entropy", "from_noise"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centering": "median"}, "centering='median'.*'running' or 'final'"),
        ({"scale": -1.0}, "scale=-1.0: .*at least zero"),
        ({"scale": float("nan")}, "scale=nan: .*at least zero"),
        ({"scale": float("inf")}, "scale=inf: .*finite"),
        ({"scale": jnp.ones(2)}, "scale=.*: give a finite number"),
        ({"min_variance": -0.1}, "min_variance=-0.1: .*at least zero"),
        ({"min_variance": float("nan")}, "min_variance=nan: .*at least zero"),
    ],
)
def test_bad_options(reader, options, message):
    state, _ = example("swag", 4, np.float32)
    with pytest.raises(ValueError, match=message):
        READERS[reader](state, **options)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("wrong", [None, {"mean": 1.0}, optax.adam(1e-3)])
def test_what_is_no_state_points_to_get_state(reader, wrong):
    read = {
        "log_prob": lambda s: swagjax.log_prob(s, jnp.ones(2)),
        "from_noise": lambda s: swagjax.from_noise(s, jnp.ones(2), None),
    }.get(reader, READERS[reader])
    name = type(wrong).__name__
    with pytest.raises(ValueError, match=rf"state is a {name}.*get_state\(opt_state\)"):
        read(wrong)


@pytest.mark.parametrize("reader", READERS)
def test_a_state_of_several_members_points_to_vmap(reader):
    state, _ = example("swag", 4, np.float32)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match=r"several members, num_collected=\[4 4\].*jax\.vmap"):
        READERS[reader](states)


@pytest.mark.parametrize("keys", [jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 2), "u4")])
def test_a_batch_of_keys_points_to_vmap(keys):
    state, _ = example("swag", 4, np.float32)
    with pytest.raises(ValueError, match=r"key holds keys of shape \(3,\).*jax\.vmap"):
        swagjax.sample(keys, state)


@pytest.mark.parametrize("key", [0, None, 1.5, jnp.zeros(2), "seed", jnp.zeros(3, "u4")])
def test_what_is_no_key_is_refused(key):
    state, _ = example("swag", 4, np.float32)
    with pytest.raises(ValueError, match=r"key=.*: give a PRNG key, such as jax.random.key\(0\)"):
        swagjax.sample(key, state)


@pytest.mark.parametrize("name", ["params", "z1"])
def test_trees_of_another_structure_or_shape_are_refused(name):
    state, _ = example("swag", 4, np.float32)
    good = template(np.float32)

    def read(tree):
        if name == "params":
            return swagjax.log_prob(state, tree)
        return swagjax.from_noise(state, tree, jnp.ones(RANK))

    with pytest.raises(ValueError, match=f"{name} has another structure"):
        read({"a": good["a"]})
    with pytest.raises(ValueError, match=f"{name} has another structure"):
        read({**good, "extra": good["a"]})
    # A broadcast would be silent: one number would stand for a whole leaf.
    for shape in [(), (1,), (3,), (3, 2), (1, 2, 3)]:
        where = re.escape(f"{name}['b']['w'] has shape [{shape}]") + r".*\(2, 3\)"
        with pytest.raises(ValueError, match=where):
            read({**good, "b": {**good["b"], "w": np.zeros(shape, np.float32)}})


@pytest.mark.parametrize("z2", [None, jnp.ones(RANK + 1), jnp.ones(()), jnp.ones((RANK, 1))])
def test_z2_of_another_shape_is_refused(z2):
    state, _ = example("swag", 4, np.float32)
    shape = None if z2 is None else z2.shape
    wanted = re.escape(f"z2 has shape {shape}") + rf".*\({RANK},\)"
    with pytest.raises(ValueError, match=wanted):
        swagjax.from_noise(state, template(np.float32), z2)


def test_z2_for_a_state_without_deviations_is_refused():
    state, _ = example("swag_diag", 4, np.float32)
    with pytest.raises(ValueError, match=r"z2 has shape \(4,\).*None"):
        swagjax.from_noise(state, template(np.float32), jnp.ones(4))


# --- The compiled program --------------------------------------------------------------------


def shaped(kind, tree, **options):
    """A state of shapes alone: enough to lower a program."""
    tx = swagjax.swag(**options) if kind == "swag" else TX[kind]
    return jax.eval_shape(tx.init, tree)


KEY = jax.ShapeDtypeStruct((2,), np.uint32)
PROGRAMS = {
    "sample": lambda key, state, centering: swagjax.sample(key, state, centering=centering),
    "samples": lambda key, state, centering: jax.vmap(
        lambda k: swagjax.sample(k, state, centering=centering)
    )(jax.random.split(key, 3)),
    "log_prob": lambda key, state, centering: swagjax.log_prob(
        state, state.mean, centering=centering
    ),
    "entropy": lambda key, state, centering: swagjax.entropy(state, centering=centering),
    "variance": lambda key, state, centering: swagjax.variance(state, centering=centering),
}


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_contractions_over_the_rank_axis_ask_for_full_precision(program, centering):
    """TF32 and bfloat16, the defaults of accelerators, would keep 10 bits or 7."""
    lowered = jax.jit(PROGRAMS[program], static_argnums=2).lower(
        KEY, shaped("swag", template(np.float32)), centering
    )
    dots = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert dots or (program, centering) == ("variance", "running")  # a sum of squares
    assert all(line.count("HIGHEST") == 2 for line in dots)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", ["swag", "swag_diag"])
def test_programs_lower_for_cpu_cuda_and_tpu(program, kind):
    function = jax.jit(functools.partial(PROGRAMS[program], centering="final"))
    export = jax.export.export(function, platforms=["cpu", "cuda", "tpu"])
    assert export(KEY, shaped(kind, template(np.float32))).platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("program", ["sample", "log_prob", "entropy", "variance"])
def test_no_reader_makes_a_copy_of_the_ring(program, centering):
    """Temporaries of a few times the parameters, whatever the rank."""
    tree = {"w": np.zeros((500, 400), np.float32), "v": np.zeros((300, 1000), np.float32)}
    size = sum(x.nbytes for x in tree.values())
    state = shaped("swag", tree, rank=20)
    compiled = jax.jit(PROGRAMS[program], static_argnums=2).lower(KEY, state, centering).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * size
    assert memory.output_size_in_bytes < 1.01 * size


def many_leaves(leaves=300, shapes=85):
    """The sizes of a residual network's leaves: many, small, in many shapes."""
    shapes = [(1 + i % 7, 3 + i) for i in range(shapes)]
    return {f"leaf{i}": np.zeros(shapes[i % len(shapes)], np.float32) for i in range(leaves)}


@pytest.mark.slow
def test_a_tree_of_300_leaves_compiles_to_a_small_program():
    """One normal a leaf took a minute to compile; so does a generator fused into every leaf."""
    function = jax.jit(PROGRAMS["sample"], static_argnums=2)
    lowered = function.lower(KEY, shaped("swag", many_leaves(), rank=3), "running")
    instructions = lowered.compile().as_text().count(" = ")
    assert instructions < 60 * 300


def test_log_prob_of_a_million_weights_keeps_its_digits():
    """A matrix-vector product over the weights would lose four of them on CPU."""
    tree = {"w": np.zeros((1000, 1000), np.float32)}
    draw = jax.jit(lambda key: {"w": 1 + 0.01 * jax.random.normal(key, (1000, 1000), jnp.float32)})
    tx, state = swagjax.swag(rank=6), swagjax.swag(rank=6).init(tree)
    for key in jax.random.split(jax.random.key(0), 9):
        theta = draw(key)
        _, state = jax.jit(tx.update)(theta, state, tree)
    rows = np.asarray(state.deviations["w"], np.float64).reshape(6, -1) / np.sqrt(2 * 5)
    v = np.asarray(state.variance["w"], np.float64).ravel() / 2
    r = (np.asarray(theta["w"], np.float64) - np.asarray(state.mean["w"], np.float64)).ravel()
    inner = (rows / v) @ r
    capacitance = np.eye(6) + (rows / v) @ rows.T
    distance = (r * r / v).sum() - inner @ np.linalg.solve(capacitance, inner)
    log_det = np.log(v).sum() + np.linalg.slogdet(capacitance)[1]
    wanted = -(distance + log_det + len(v) * np.log(2 * np.pi)) / 2
    np.testing.assert_allclose(swagjax.log_prob(state, theta), wanted, rtol=2e-6)


def test_gradients_pass_dead_weights_by():
    """The square root of a zero variance has no slope: not infinite, not NaN."""
    params, tx = {"w": jnp.ones(3)}, swagjax.swag(rank=3)
    state = tx.init(params)
    for step in (0.1, -0.3, 0.4):
        _, state = tx.update({"w": jnp.array([step, 2 * step, 0.0])}, state, params)

    def first(scale, state):
        return swagjax.sample(jax.random.key(0), state, scale=scale)["w"]

    slope = jax.jacobian(first)(1.0, state)
    np.testing.assert_allclose(slope[:2], (first(1.0, state) - state.mean["w"])[:2] / 2, rtol=1e-4)
    assert slope[2] == 0
    once = tx.update(params, tx.init(params), params)[1]
    np.testing.assert_array_equal(jax.jacobian(first)(1.0, once), 0)


@pytest.mark.parametrize("tree", [{}, {"frozen": None}])
def test_trees_without_leaves(tree):
    state = TX["swag"].update(tree, TX["swag"].init(tree), tree)[1]
    assert (
        swagjax.sample(jax.random.key(0), state)
        == swagjax.mean(state)
        == swagjax.variance(state)
        == tree
    )
    assert swagjax.log_prob(state, tree) == swagjax.entropy(state) == 0


def test_regression_a_sample_stays_on_the_device_of_its_state():
    """No move to some default device inside sampling, no copy through the host."""
    device = jax.devices()[3]
    params, tx = {"w": jax.device_put(jnp.ones(3), device)}, swagjax.swag(rank=2)
    state = tx.init(params)
    for step in (0.1, -0.2):
        _, state = tx.update({"w": jax.device_put(jnp.full(3, step), device)}, state, params)
    for tree in (state, swagjax.sample(jax.random.key(0), state), swagjax.variance(state)):
        assert {d for leaf in jax.tree.leaves(tree) for d in leaf.devices()} <= {device} | (
            {jax.devices()[0]} if tree is state else set()  # counters, made before any parameter
        )
    program = str(jax.make_jaxpr(swagjax.sample)(jax.random.key(0), state))
    assert "device_put" not in program
    assert "callback" not in program


# --- Rows of the ring that were not written since the last reset -------------------------------


def after_reset(count):
    """A state of a collection that began anew, and the same with zeros for what is older."""
    zeros = template(np.float32)
    rng = np.random.default_rng(3)
    old = jax.tree.map(lambda x: rng.normal(size=(7, *x.shape)).astype(np.float32) * 30, zeros)
    new = stack(count, zeros, seed=1)
    state = collect(TX["swag"], old)
    state = optax.tree_utils.tree_set(state, num_collected=jnp.int32(0))
    for i in range(count):
        update = jax.tree.map(lambda x, i=i: x[i], new)
        _, state = jitted(TX["swag"].update)(update, state, zeros)
    held = jnp.arange(RANK) < count
    clean = jax.tree.map(
        lambda ring: jnp.where(held.reshape(-1, *(1,) * (ring.ndim - 1)), ring, 0), state.deviations
    )
    assert any(
        (x != y).any()
        for x, y in zip(*map(jax.tree.leaves, (state.deviations, clean)), strict=True)
    )
    return state, state._replace(deviations=clean), new


def saved(state, tmp_path):
    io.save(tmp_path / "state.safetensors", state)
    return io.load(tmp_path / "state.safetensors", template(np.float32))


FLOOR = {"min_variance": 0.1}
OF_A_RESET = {
    **READERS,
    "log_prob_difference": lambda state, **options: swagjax.log_prob_difference(
        state, state.mean, jax.tree.map(jnp.ones_like, state.mean), **options
    ),
    "kl": lambda state, **options: swagjax.kl(state, example(dtype=np.float32)[0], **options),
    "kl of another": lambda state, **options: swagjax.kl(
        example(dtype=np.float32)[0], state, **options
    ),
    "mixture": lambda state, **options: ensemble.variance(ensemble.mix([state, state]), **options),
    "draw of a mixture": lambda state, **options: ensemble.sample(
        jax.random.key(0), ensemble.mix([state, state]), **options
    ),
}
WITHOUT_OPTIONS = {
    "iterates": iterates,
    "merged before": lambda state: swagjax.merge(state, example(dtype=np.float32)[0]),
    "merged behind": lambda state: swagjax.merge(example(dtype=np.float32)[0], state),
    "merged with nothing": lambda state: swagjax.merge(state, TX["swag"].init(state.mean)),
    "nothing merged": lambda state: swagjax.merge(TX["swag"].init(state.mean), state),
    "subspace.pca": lambda state: subspace.pca(state, 1),
    "surface.pca_plane": lambda state: surface.pca_plane(state, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["running", "final"])
def test_rows_from_before_a_reset_count_nowhere(centering):
    """After num_collected=0 old rows stayed in use: a variance of 140 for .60."""
    state, clean, new = after_reset(count=3)
    for name, read in OF_A_RESET.items():
        options = {} if name == "mean" else {"centering": centering, **FLOOR}
        got, wanted = (oracle.flatten(read(s, **options)) for s in (state, clean))
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6, err_msg=name)
    dense = oracle.covariance("swag", rows(new), RANK, centering=centering)
    variance = oracle.flatten(swagjax.variance(state, centering=centering))
    np.testing.assert_allclose(variance, np.diag(dense), rtol=1e-4)


def test_rows_from_before_a_reset_are_merged_projected_and_saved_nowhere(tmp_path):
    state, clean, _ = after_reset(count=3)
    for name, read in WITHOUT_OPTIONS.items():
        got, wanted = (oracle.flatten(read(s)) for s in (state, clean))
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6, err_msg=name)
    got, wanted = (swagjax.variance(s) for s in (saved(state, tmp_path), clean))
    np.testing.assert_allclose(oracle.flatten(got), oracle.flatten(wanted), rtol=1e-6)


def test_rows_from_before_a_reset_are_not_diagnosed():
    """The diagnostics ask for four iterates of a ring of five and more."""
    tx, zeros = swagjax.swag(6), jnp.zeros(3)
    rng = np.random.default_rng(0)
    state = clean = tx.init(zeros)
    for x in 50 * rng.normal(size=(8, 3)):
        _, state = jitted(tx.update)(jnp.asarray(x, zeros.dtype), state, zeros)
    state = state._replace(num_collected=jnp.int32(0))
    for x in rng.normal(size=(4, 3)):
        _, state = jitted(tx.update)(jnp.asarray(x, zeros.dtype), state, zeros)
        _, clean = jitted(tx.update)(jnp.asarray(x, zeros.dtype), clean, zeros)
    for read in (diagnostics.drift, diagnostics.effective_count, diagnostics.captured_variance):
        got, wanted = (oracle.flatten(read(s)) for s in (state, clean))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, err_msg=read.__name__)


# --- Second derivatives, and the flags that look for NaN and infinities ---------------------------


def of_options(function):
    return lambda options: function(scale=options[0], min_variance=options[1])


def small(seed):
    """A state of three weights with two deviations, in float64."""
    rng, n = np.random.default_rng(seed), jnp.int32(3)
    moments = (jnp.asarray(rng.normal(size=shape)) for shape in ((3,), (3,), (2, 3)))
    mean, root, deviations = moments
    return swagjax.SWAGState(n, n, 0 * n, mean, root**2, deviations)


def dense_of(state, scale, min_variance):
    D = np.asarray(state.deviations)
    diagonal = np.diag(np.maximum(state.variance, min_variance))
    return np.asarray(state.mean), scale / 2 * (diagonal + D.T @ D)


@pytest.mark.slow
def test_all_that_is_read_is_differentiable_twice_by_the_options(x64):
    """The second derivatives of kl were a TypeError; here in float64 against differences."""
    state, other = small(0), small(1)
    point = state.mean + 0.5

    def log_density(scale, min_variance):
        return scipy.stats.multivariate_normal(*dense_of(state, scale, min_variance)).logpdf(point)

    def entropy(scale, min_variance):
        covariance = dense_of(state, scale, min_variance)[1]
        return (3 * (1 + np.log(2 * np.pi)) + np.linalg.slogdet(covariance)[1]) / 2

    def divergence(scale, min_variance):
        pair = (dense_of(s, scale, min_variance) for s in (state, other))
        return oracle.kl(*[x for gaussian in pair for x in gaussian])

    cases = (
        (functools.partial(swagjax.kl, state, other), divergence),
        (functools.partial(swagjax.log_prob, state, point), log_density),
        (functools.partial(swagjax.entropy, state), entropy),
    )
    at, h = np.array([1.3, 0.2]), 1e-4  # a floor above some variances and below others
    steps = h * np.eye(2)
    for function, exact in cases:
        wanted = [
            [
                (
                    exact(*(at + a + b))
                    - exact(*(at + a - b))
                    - exact(*(at - a + b))
                    + exact(*(at - a - b))
                )
                / (4 * h * h)
                for b in steps
            ]
            for a in steps
        ]
        got = jax.jit(jax.hessian(of_options(function)))(jnp.asarray(at))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_sum_is_differentiable_twice_inside_a_scan_that_depends_on_both():
    """There JAX drops the rule for the derivative: that of the reduction itself has to do."""

    def outer(a, b):
        def body(carry, x):
            one, two = total([a * x * jnp.ones(3)]), total([b * x * jnp.ones(3)])
            return carry + one**2 * two**2, None

        return jax.lax.scan(body, jnp.zeros(()), jnp.array([1.0, 2.0]))[0]

    # 81 a^2 b^2 (1 + 16): the mixed derivative at a = b = 1 is 4 * 81 * 17.
    mixed = jax.jacfwd(jax.grad(outer, 0), 1)(jnp.ones(()), jnp.ones(()))
    np.testing.assert_allclose(mixed, 4 * 81 * 17, rtol=1e-6)


@pytest.mark.slow
def test_the_flags_of_jax_for_nan_and_infinities_stop_nothing_that_is_sound():
    """jax_debug_nans stopped swagjax.mean: the NaN of an empty state was made on its own."""
    zeros = jnp.zeros(3)  # as many weights as rows: the ring is full, and spans two directions
    with jax.debug_nans(True), jax.debug_infs(True):
        tx = swagjax.swag(3)
        state = tx.init(zeros)
        for x in np.random.default_rng(0).normal(size=(4, 3)):
            _, state = tx.update(jnp.asarray(x, zeros.dtype), state, zeros)
        key, mixture = jax.random.key(0), ensemble.mix([state, state])
        space, options = subspace.pca(state, 2), {"centering": "final"}
        for found in (
            swagjax.mean(state),
            swagjax.variance(state, **options),
            swagjax.sample(key, state, like=zeros),
            swagjax.from_noise(state, zeros, jnp.zeros(3)),
            iterates(state),
            swagjax.log_prob(state, zeros, **options),
            swagjax.log_prob_difference(state, zeros, state.mean),
            swagjax.entropy(state),
            swagjax.kl(state, state, **options),
            swagjax.merge(state, state),
            ensemble.mean(mixture),
            ensemble.variance(mixture),
            ensemble.log_prob(mixture, zeros),
            ensemble.sample(key, mixture),
            subspace.point(space, jnp.ones(2)),
            subspace.coordinates(space, zeros),
            surface.pca_plane(state, 2).directions,
            swagjax.predict(key, state, lambda w, x: w * x, 2.0, num_samples=2, antithetic=True),
            jax.grad(swagjax.log_prob, 1)(state, state.mean),
        ):
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


# --- like: leaves that are anything -----------------------------------------------------------


def test_leaves_that_the_state_does_not_hold_pass_through_untouched():
    """A sample with functions was a TypeError; antithetic made floats of integers, NaN of -inf."""
    params = {"free": jnp.ones((2, 2), jnp.float32), "frozen": jnp.float32(3.0)}
    state = run_masked(optax.masked(swagjax.swag(3), {"free": True, "frozen": False}), params)
    frozen = {
        "large": jnp.int32(16777217),
        "masked": jnp.array([-jnp.inf, 0.0]),
        "key": jax.random.key(7),
        "function": jnp.tanh,
        "name": "relu",
        "number": 5,
    }
    like = {"free": params["free"].astype(jnp.bfloat16), "frozen": frozen}
    key = jax.random.key(0)
    theta = swagjax.sample(key, state, like=like)
    assert theta["free"].dtype == jnp.bfloat16
    for got in (
        theta,
        swagjax.from_noise(state, params, jnp.ones(3), like=like),
        ensemble.sample(key, ensemble.mix([state]), like=like),
    ):
        assert all(got["frozen"][name] is leaf for name, leaf in frozen.items())
    stacked = iterates(state, like=like)["frozen"]
    assert stacked["function"] is jnp.tanh
    assert stacked["key"].shape == (3,)
    np.testing.assert_array_equal(stacked["large"], [16777217] * 3)
    with pytest.raises(ValueError, match=r"like\['free'\] has shape \['builtin_function"):
        swagjax.sample(key, state, like={**like, "free": len})
    # In mirrored pairs as well.
    arrays = {name: frozen[name] for name in ("large", "masked", "key")}
    posterior = jax.tree_util.Partial(
        swagjax.sample, state=state, like={"free": params["free"], "frozen": arrays}
    )

    def outputs(params, x):
        held = params["frozen"]
        return params["free"].sum() * x, held["large"], held["masked"], held["key"]

    linear, large, masked, keys = swagjax.predict_samples(
        key, posterior, outputs, 1.0, num_samples=4, antithetic=True
    )
    mean = float(state.mean["free"].sum())
    np.testing.assert_allclose((linear[::2] + linear[1::2]) / 2, [mean] * 2, rtol=1e-6)
    np.testing.assert_array_equal(large, [16777217] * 4)
    np.testing.assert_array_equal(masked, [[-np.inf, 0.0]] * 4)
    assert (keys == jax.random.key(7)).all()


def test_an_equinox_module_with_its_functions_stands_for_like():
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    state = run_masked(swagjax.swag(2), eqx.filter(model, eqx.is_inexact_array))
    theta = swagjax.sample(jax.random.key(0), state, like=model)
    assert theta.activation is model.activation
    assert theta(jnp.ones(2)).shape == (3,)

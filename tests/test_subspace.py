"""The subspace of the deviations against a dense SVD, and inference in it against algebra."""

import functools
import re

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.tree_util import Partial
from scipy import stats

import swagjax
from swagjax import ensemble, subspace

KEY = jax.random.key(0)
RANK, SIZE = 6, 9


def unflatten(row):
    row = jnp.asarray(row, jnp.float32)
    return {"a": row[:8].reshape(2, 4), "b": row[8]}


def iterates(count, seed=0):
    """Rows of a correlated walk, in float64 but exact in float32."""
    rng = np.random.default_rng(seed)
    rows = 3 + (rng.normal(size=(count, SIZE)) @ rng.normal(size=(SIZE, SIZE))).cumsum(0) / 4
    return rows.astype(np.float32).astype(np.float64)


TX = swagjax.swag(RANK)
UPDATE = jax.jit(TX.update)


@functools.cache
def state(count=8):
    collected = TX.init(unflatten(np.zeros(SIZE)))
    for row in iterates(count):
        collected = UPDATE(unflatten(0 * row), collected, unflatten(row))[1]
    return collected


def matrix(space):
    """The directions as rows, in float64."""
    rows = [np.reshape(v, (len(v), -1)) for v in jax.tree.leaves(space.directions)]
    return np.concatenate(rows, axis=1).astype(np.float64)


# --- The subspace ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "centering"),
    [
        (8, "running"),
        pytest.param(13, "final", marks=pytest.mark.slow),
        pytest.param(4, "running", marks=pytest.mark.slow),
        pytest.param(8, "final", marks=pytest.mark.slow),
    ],
)
def test_directions_are_those_of_the_dense_svd(count, centering):
    """s_j u_j / sqrt(K - 1), up to sign, longest first."""
    deviations = oracle.deviations(iterates(count), RANK, centering)
    _, s, right = np.linalg.svd(deviations, full_matrices=False)
    held = min(count, RANK)
    for dim in (3, min(count - 1, RANK)):
        space = subspace.pca(state(count), dim, centering=centering)
        wanted = (s[:, None] * right / np.sqrt(held - 1))[:dim]
        got = matrix(space)
        sign = np.sign((got * wanted).sum(1, keepdims=True))
        np.testing.assert_allclose(sign * got, wanted, atol=2e-4 * s[0])
        np.testing.assert_allclose(space.variances, s[:dim] ** 2 / (held - 1), rtol=2e-3)
        np.testing.assert_allclose((got**2).sum(1), space.variances, rtol=2e-3)
    mean = iterates(count).mean(0)
    np.testing.assert_allclose(oracle.flatten(space.origin), mean, rtol=1e-5)


@pytest.mark.slow
def test_all_directions_span_the_low_rank_part_of_swag():
    """N(0, I) of z is twice D D^T / (2 (K - 1)): the covariance of SWAG at scale 2 without V."""
    v = matrix(subspace.pca(state(), RANK))
    deviations = oracle.deviations(iterates(8), RANK)
    np.testing.assert_allclose(
        v.T @ v, deviations.T @ deviations / (RANK - 1), rtol=1e-4, atol=1e-4
    )


def test_the_gram_matrix_keeps_directions_of_small_variance():
    """One a thousandth as long as the first: a relative 1e-6 of the Gram matrix."""
    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.normal(size=(500, 4)))[0].T * np.array([[1.0], [0.1], [0.01], [1e-3]])
    rows, four = rng.normal(size=(4, 4)) @ axes, jnp.int32(4)
    ring = jnp.asarray(oracle.ring(rows, 4), jnp.float32)
    mean = jnp.asarray(rows.mean(0), jnp.float32)
    collected = swagjax.SWAGState(four, four, jnp.int32(0), mean, jnp.ones(500, jnp.float32), ring)
    space = subspace.pca(collected, 3)
    deviations = oracle.deviations(rows, 4)
    s = np.linalg.svd(deviations, compute_uv=False)[:3]
    np.testing.assert_allclose(np.sqrt((matrix(space) ** 2).sum(1)), s / np.sqrt(3), rtol=0.02)


def test_signs_are_those_of_the_deviations_not_of_the_solver():
    space = subspace.pca(state(), 3)
    products = oracle.deviations(iterates(8), RANK) @ matrix(space).T
    largest = products[np.abs(products).argmax(0), range(3)]
    assert (largest > 0).all()


@pytest.mark.slow
def test_inside_jit_directions_that_were_not_collected_are_zero():
    space = jax.jit(functools.partial(subspace.pca, dim=5))(state(4))
    got = matrix(space)
    np.testing.assert_allclose(got[:3], matrix(subspace.pca(state(4), 3)), rtol=1e-3, atol=1e-5)
    assert np.abs(got[3:]).max() < 1e-2 * np.abs(got[0]).max()
    empty = swagjax.swag(RANK).init(unflatten(np.zeros(SIZE)))
    nothing = jax.jit(functools.partial(subspace.pca, dim=2))(empty)
    assert np.isnan(oracle.flatten(nothing.origin)).all()


@pytest.mark.slow
def test_random_directions_have_length_one_and_no_preference():
    origin = unflatten(np.arange(9))
    spaces = jax.vmap(lambda key: subspace.random(key, origin, 2))(jax.random.split(KEY, 4000))
    rows = np.concatenate(
        [np.reshape(v, (8000, -1)) for v in jax.tree.leaves(spaces.directions)], axis=1
    ).astype(np.float64)
    np.testing.assert_allclose((rows**2).sum(1), 1, rtol=1e-5)
    # Mean 0 and second moments I / 9 of 8000 directions on the sphere, within 7 standard errors:
    # false alarm 90 * 3e-12 < 1e-9 for a random key.
    assert np.abs(rows.mean(0)).max() < 7 * np.sqrt(1 / SIZE / 8000)
    moments = rows.T @ rows / 8000
    error = np.sqrt(2 / (SIZE * (SIZE + 2)) / 8000)
    assert np.abs(moments - np.eye(SIZE) / SIZE).max() < 7 * error


def test_a_point_is_the_origin_and_a_sum_of_directions():
    space, zs = subspace.pca(state(), 3), jax.random.normal(KEY, (5, 3))
    thetas = jax.vmap(subspace.point, (None, 0))(space, zs)
    for i, z in enumerate(np.asarray(zs, np.float64)):
        got = oracle.flatten(jax.tree.map(lambda x, i=i: x[i], thetas))
        wanted = oracle.flatten(space.origin) + z @ matrix(space)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), space.origin)
    assert subspace.point(space, zs[0], like=like)["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["pca", pytest.param("random", marks=pytest.mark.slow)])
def test_coordinates_are_those_of_the_nearest_point(kind):
    """By least squares, of directions that are orthogonal or not."""
    space = subspace.pca(state(), 3)
    if kind == "random":
        space = subspace.random(KEY, state().mean, 3)
    off = iterates(1, seed=5)[0]
    wanted = np.linalg.lstsq(matrix(space).T, off - oracle.flatten(space.origin))[0]
    got = subspace.coordinates(space, unflatten(off))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
    z = jnp.array([0.5, -1.0, 2.0])
    again = subspace.coordinates(space, subspace.point(space, z))
    np.testing.assert_allclose(again, z, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_leaves_of_two_precisions_without_silent_promotion():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        origin = {"a": jnp.ones((2, 4), jnp.float32), "b": jnp.ones(2, jnp.float64)}
        space = subspace.random(KEY, origin, 2)
        np.testing.assert_allclose((matrix(space) ** 2).sum(1), 1, rtol=1e-6)
        z = np.array([0.5, -1.0])
        found = subspace.coordinates(space, subspace.point(space, z))
        np.testing.assert_allclose(found, z, rtol=1e-5)


def test_masked_leaves_come_from_like():
    params = {"free": jnp.arange(4.0), "frozen": jnp.full(3, 5.0)}
    tx = optax.masked(swagjax.swag(3), {"free": True, "frozen": False})
    opt_state = tx.init(params)
    for shift in (0.0, 1.0, 3.0):
        updates = jax.tree.map(lambda x, shift=shift: x * 0 + shift, params)
        opt_state = tx.update(updates, opt_state, params)[1]
    space = subspace.pca(swagjax.get_state(opt_state), 2)
    theta = subspace.point(space, jnp.ones(2), like=params)
    np.testing.assert_array_equal(theta["frozen"], params["frozen"])
    assert (theta["free"] != params["free"]).all()


# --- The posterior in it ---------------------------------------------------------------------

NOISE, TEMPERATURE = 0.5, 3.0
X = np.random.default_rng(2).normal(size=(20, SIZE))
Y = np.random.default_rng(3).normal(size=20) + X @ np.full(SIZE, 3.0)


def linear(params):
    """Log-likelihood of a linear model of known noise."""
    weights = jnp.concatenate([params["a"].ravel(), params["b"][None]])
    residual = (jnp.asarray(Y, weights.dtype) - jnp.asarray(X, weights.dtype) @ weights) / NOISE
    return -0.5 * (residual**2).sum() - len(Y) * float(np.log(NOISE * np.sqrt(2 * np.pi)))


def exact(space, temperature=TEMPERATURE):
    """Mean and covariance of z: a Gaussian, for the model is linear and its noise Gaussian."""
    design = X @ matrix(space).T
    precision = design.T @ design / NOISE**2 / temperature + np.eye(design.shape[1])
    covariance = np.linalg.inv(precision)
    residual = Y - X @ oracle.flatten(space.origin)
    return covariance @ design.T @ residual / NOISE**2 / temperature, covariance


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_densities_are_the_tempered_likelihood_and_the_prior(temperature):
    space = subspace.pca(state(), 3)
    for z in (np.zeros(3), np.array([0.3, -1.0, 0.5])):
        weights = oracle.flatten(space.origin) + z @ matrix(space)
        likelihood = stats.norm(X @ weights, NOISE).logpdf(Y).sum() / temperature
        options = {"function": linear, "temperature": temperature}
        got = subspace.log_likelihood(space, jnp.float32(z), **options)
        np.testing.assert_allclose(got, likelihood, rtol=1e-4)
        got = subspace.log_prob(space, jnp.float32(z), **options)
        np.testing.assert_allclose(got, likelihood + stats.norm.logpdf(z).sum(), rtol=1e-4)


def drawn(space, chains=512, steps=60):
    """The last state of many chains of elliptical slice sampling from the prior: independent."""
    tempered = Partial(subspace.log_likelihood, space, function=linear, temperature=TEMPERATURE)
    kernel = blackjax.elliptical_slice(tempered, mean=jnp.zeros(2), cov=jnp.ones(2))

    def chain(key):
        first, *keys = jax.random.split(key, steps + 1)
        start = kernel.init(jax.random.normal(first, (2,)))
        step = lambda s, k: (kernel.step(k, s)[0], None)  # noqa: E731
        return jax.lax.scan(step, start, jnp.stack(keys))[0].position

    return jax.jit(jax.vmap(chain))(jax.random.split(KEY, chains))


@pytest.mark.slow
def test_elliptical_slice_sampling_finds_the_exact_posterior():
    """Whitened by the exact moments: N(0, I), within six standard errors of 512 chains.

    Two means, two variances and a correlation: false-alarm rate 5 * 2e-9 = 1e-8; fixed key.
    """
    space = subspace.pca(state(), 2)
    mean, covariance = exact(space)
    assert (np.diag(covariance) < 0.5).all()  # the data say something that the prior does not
    zs = drawn(space)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(zs) - mean).T)
    n = white.shape[1]
    assert np.abs(white.mean(1)).max() < 6 / np.sqrt(n)
    errors = (white @ white.T / n - np.eye(2)) * np.sqrt(n)
    assert np.abs(np.diag(errors)).max() < 6 * np.sqrt(2)
    assert abs(errors[0, 1]) < 6
    # As points they are a posterior for predict.
    points = ensemble.Points(jax.vmap(subspace.point, (None, 0))(space, zs))
    got = swagjax.predict(KEY, points, lambda params, x: params["b"] * x, 2.0)
    wanted = 2 * (oracle.flatten(space.origin) + np.asarray(zs).mean(0) @ matrix(space))[-1]
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_the_gradient_is_that_of_the_exact_posterior():
    """What NUTS follows."""
    space = subspace.pca(state(), 3)
    mean, covariance = exact(space)
    density = Partial(subspace.log_prob, space, function=linear, temperature=TEMPERATURE)
    for z in (mean + 1, np.array([2.0, 0.0, -1.0])):
        slope = jax.jit(jax.grad(density))(jnp.float32(z))
        wanted = -np.linalg.solve(covariance, z - mean)
        np.testing.assert_allclose(slope, wanted, rtol=2e-3, atol=2e-2)


# --- Wrong uses ------------------------------------------------------------------------------


def space():
    return subspace.pca(state(), 2)


MISUSE = {
    "more directions than iterates": (
        lambda: subspace.pca(state(4), 4),
        r"dim=4: the state spans 3 directions \(rank=6, num_collected=4\).*at most 3",
    ),
    "more directions than the ring holds": (
        lambda: subspace.pca(state(13), 7),
        r"dim=7: the state spans 6 directions \(rank=6, num_collected=13\).*at most 6",
    ),
    "no direction": (lambda: subspace.pca(state(), 0), "dim=0: give an integer of at least 1"),
    "no random direction": (
        lambda: subspace.random(KEY, state().mean, 0),
        "dim=0: give an integer of at least 1",
    ),
    "a state without deviations": (
        lambda: subspace.pca(state()._replace(deviations=None), 2),
        r"holds no deviations: collect by swagjax\.swag\(rank\)",
    ),
    "an optimizer state": (lambda: subspace.pca((state(),), 2), "state is a tuple: give the SWAG"),
    "a centering": (lambda: subspace.pca(state(), 2, centering="last"), "centering='last': give"),
    "many points": (
        lambda: subspace.point(space(), jnp.zeros((7, 2))),
        r"z has shape \(7, 2\): the subspace asks for \(2,\); map over many by jax\.vmap",
    ),
    "a cold likelihood": (
        lambda: subspace.log_prob(space(), jnp.zeros(2), function=linear, temperature=0.0),
        r"temperature=0\.0: give a finite number above zero",
    ),
    "temperatures": (
        lambda: subspace.log_prob(space(), jnp.zeros(2), function=linear, temperature=[1, 2]),
        r"temperature=\[1, 2\]: give a finite number above zero",
    ),
    "a likelihood of every row": (
        lambda: subspace.log_likelihood(space(), jnp.zeros(2), function=lambda p: p["a"]),
        r"function returned an array of shape \(2, 4\): return one number, the sum",
    ),
    "coordinates of other parameters": (
        lambda: subspace.coordinates(space(), {"c": jnp.zeros(3)}),
        "params has another structure",
    ),
}


@pytest.mark.parametrize(("use", "message"), MISUSE.values(), ids=MISUSE)
def test_wrong_use_is_answered(use, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        use()

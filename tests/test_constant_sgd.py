"""Constant SGD: formulas against float64 algebra, and SGD itself where the posterior is known.

Samples are compared with a covariance by n (tr M - D - log det M), with M the sample covariance of
n chains in units of the other: of normals about chi-squared with D (D + 1) / 2 degrees of freedom.
``LIMIT`` is exceeded once in 10^7 times, and ten times over by a covariance that is 10 % too large.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import linalg, optimize, stats

import swagjax
from swagjax import constant_sgd
from tests import oracle

N, S, D = 200, 4, 3
CHAINS = 8192
MANY = 100_000  # examples, of which S are few
WINDOW = N // S
LIMIT = stats.chi2.isf(1e-7, D * (D + 1) / 2)


def squared_error(params, example):
    """In nats for noise of variance 1, with a flat prior."""
    x, y = example
    return (x @ params["w"] + params["b"] - y) ** 2 / 2


def logistic(params, example):
    x, y = example
    return optax.sigmoid_binary_cross_entropy(x @ params["w"] + params["b"], y)


@functools.cache
def linear_data(noise=1.0):
    """Inputs of correlated columns; targets whose noise has this standard deviation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 2)) @ np.array([[1.0, 0.8], [0.0, 0.9]])
    y = x @ [1.0, -0.5] + 0.3 + noise * rng.normal(size=N)
    return x.astype(np.float32), y.astype(np.float32)


def linear_truth(data):
    """Optimum, Hessian and noise covariance in float64, of the vector (b, w)."""
    X, y = np.column_stack([np.ones(N), data[0]]).astype(float), data[1].astype(float)
    optimum = np.linalg.solve(X.T @ X, X.T @ y)
    gradients = X * (X @ optimum - y)[:, None]
    return optimum, X.T @ X / N, gradients.T @ gradients / N


def as_params(vector):
    return {"b": jnp.float32(vector[0]), "w": jnp.asarray(vector[1:], jnp.float32)}


def draw_with_replacement(key, step):
    return jax.random.randint(jax.random.fold_in(key, step), (S,), 0, N)


def draw_reshuffled(key, step):
    order = jax.random.permutation(jax.random.fold_in(key, step // WINDOW), N)
    return jax.lax.dynamic_slice(order, (step % WINDOW * S,), (S,))


def run(
    loss,
    data,
    optimum,
    tx,
    *,
    steps=4 * WINDOW,
    draw=draw_with_replacement,
    window=WINDOW,
    chains=CHAINS,
):
    """Last iterates and last averages of independent chains from the optimum, (chains, D) each."""
    tx = optax.chain(tx, constant_sgd.iterate_average(window))
    x, y = map(jnp.asarray, data)

    def mean_loss(params, batch):
        return jax.vmap(loss, (None, 0))(params, batch).mean()

    def step(carry, at):
        params, opt_state, key = carry
        rows = draw(key, at)
        gradient = jax.grad(mean_loss)(params, (x[rows], y[rows]))
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), None

    def chain(key):
        first = (optimum, tx.init(optimum), key)
        (params, opt_state, _), _ = jax.lax.scan(step, first, jnp.arange(steps))
        average = swagjax.get_state(opt_state).mean
        return ravel_pytree(params)[0], ravel_pytree(average)[0]

    keys = jax.random.split(jax.random.key(0), chains)
    return [np.asarray(found, float) for found in jax.jit(jax.vmap(chain))(keys)]


def distance(samples, covariance):
    """The statistic of this module."""
    M = np.linalg.solve(covariance, np.cov(samples.T))
    return len(samples) * (np.trace(M) - len(M) - np.linalg.slogdet(M)[1])


def noise_of(loss, data, optimum):
    return constant_sgd.gradient_noise(loss, optimum, [data])


def random_matrix(rng, size=D):
    """Symmetric positive definite, its eigenvalues apart."""
    A = rng.normal(size=(size, size + 1))
    return A @ A.T / size + 0.05 * np.eye(size)


# Noise of the gradients.


def test_noise_is_that_of_single_gradients_however_the_examples_are_cut():
    data = linear_data()
    params = {"b": jnp.float32(0.5), "w": jnp.array([0.1, -0.2], jnp.float32)}
    X = np.column_stack([np.ones(N), data[0]]).astype(float)
    gradients = X * (X @ [0.5, 0.1, -0.2] - data[1])[:, None]
    batches = [tuple(part[rows] for part in data) for rows in (slice(50), slice(50, None))]
    noise = constant_sgd.gradient_noise(squared_error, params, iter(batches))
    assert int(noise.count) == N
    np.testing.assert_allclose(oracle.flatten(noise.mean), gradients.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(oracle.flatten(noise.variance), gradients.var(0), rtol=1e-5)
    np.testing.assert_allclose(noise.trace, gradients.var(0).sum(), rtol=1e-5)
    covariance = constant_sgd.gradient_covariance(squared_error, params, batches)
    np.testing.assert_allclose(covariance, np.cov(gradients.T, ddof=0), rtol=1e-4, atol=1e-5)


def test_noise_of_a_network_in_bfloat16_is_accumulated_in_float32():
    """Gradients of 100 and 101, each a number of bfloat16; their mean and variance are none."""
    batch = jnp.asarray(np.arange(300) % 3 == 0, jnp.bfloat16) + 100
    noise = constant_sgd.gradient_noise(
        lambda params, x: params["w"] * x, {"w": jnp.bfloat16(0)}, [batch[:100], batch[100:]]
    )
    assert noise.mean["w"].dtype == noise.variance["w"].dtype == jnp.float32
    np.testing.assert_allclose(noise.mean["w"], 100 + 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(noise.variance["w"], 2 / 9, rtol=1e-4)


def test_only_small_models_have_a_dense_covariance():
    with pytest.raises(ValueError, match="params hold 10001 numbers"):
        constant_sgd.gradient_covariance(lambda p, x: p.sum() * x, jnp.zeros(10_001), [np.ones(2)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([np.ones(0)], r"leading axes \[\(0,\)\]"),
        ([np.float32(1.0)], r"leading axes \[\(\)\]"),
        ([(np.ones(3), np.ones(2))], r"leading axes \[\(2,\), \(3,\)\]"),
    ],
)
def test_batches_that_are_none(batches, message):
    with pytest.raises(ValueError, match=message):
        constant_sgd.gradient_noise(lambda p, x: p * x, jnp.zeros(()), batches)


# The stationary distribution, and the posterior.


def recursion(A, C, eps, m, H):
    """The stationary covariance of position and velocity together, by SciPy."""
    eye = np.eye(len(A))
    step = np.block([[eye - eps * H @ A, m * eye], [-eps * H @ A, m * eye]])
    q = eps**2 / S * H @ C @ H
    return linalg.solve_discrete_lyapunov(step, np.block([[q, q], [q, q]]))[: len(A), : len(A)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_stationary_covariance_is_that_of_the_recursion(momentum, kind):
    rng = np.random.default_rng(1)
    A, C, H = (random_matrix(rng) for _ in range(3))
    given = {"none": None, "diagonal": np.diag(H), "full": H}[kind]
    H = {"none": np.eye(D), "diagonal": np.diag(np.diag(H)), "full": H}[kind]
    for share in (0.02, 0.7):  # of the largest step that is stable
        eps = share * 2 * (1 + momentum) / np.linalg.eigvals(H @ A).real.max()
        got = constant_sgd.stationary_covariance(
            A, C, eps, S, momentum=momentum, preconditioner=given
        )
        wanted = recursion(A, C, eps, momentum, H)
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-4 * abs(wanted).max())


@pytest.mark.parametrize("window", [1, 2, 50])
def test_averaged_covariance_is_the_sum_over_all_pairs(window):
    rng = np.random.default_rng(2)
    A, C, H = (random_matrix(rng) for _ in range(3))
    for share in (0.05, 0.8):
        eps = share * 2 / np.linalg.eigvals(H @ A).real.max()
        sigma, step = recursion(A, C, eps, 0.0, H), np.eye(D) - eps * H @ A
        powers = [np.linalg.matrix_power(step, k) @ sigma for k in range(window)]
        powers = [power.T for power in powers[:0:-1]] + powers  # k = 1 - T, ..., T - 1
        counts = window - abs(np.arange(1 - window, window))
        wanted = np.tensordot(counts, powers, 1) / window**2
        got = constant_sgd.averaged_covariance(A, C, eps, S, window, preconditioner=H)
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-4 * abs(wanted).max())
    sandwich = np.linalg.solve(A, np.linalg.solve(A, C).T)
    got = constant_sgd.averaged_covariance(A, C, eps, S, 20_000, preconditioner=H)
    np.testing.assert_allclose(20_000 * S * got, sandwich, rtol=0.02)


def test_where_sgd_diverges_there_is_no_stationary_covariance():
    A = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
    for at in (constant_sgd.stationary_covariance, averaged_by_three):
        at(A, A, 0.49, 1)
        for eps in (0.51, 0.0, -0.1):
            with pytest.raises(ValueError, match="SGD diverges"):
                at(A, A, eps, 1)
        assert jnp.isnan(jax.jit(at, static_argnums=3)(A, A, 0.51, 1)).all()
    constant_sgd.stationary_covariance(A, A, 0.9, 1, momentum=0.9)  # below 2 (1 + m) / 4
    with pytest.raises(ValueError, match="SGD diverges"):
        constant_sgd.stationary_covariance(A, A, 0.96, 1, momentum=0.9)


def averaged_by_three(A, C, eps, batch_size):
    return constant_sgd.averaged_covariance(A, C, eps, batch_size, 3)


def test_kl_is_that_of_normals():
    rng = np.random.default_rng(3)
    A, sigma = random_matrix(rng), random_matrix(rng)
    wanted = oracle.kl(np.zeros(D), sigma / 7, np.zeros(D), np.linalg.inv(7 * A))
    np.testing.assert_allclose(constant_sgd.kl_to_posterior(sigma / 7, A, 7), wanted, rtol=1e-4)
    near = np.linalg.inv(A) / 7 * 1.01
    got = constant_sgd.kl_to_posterior(near, A, 7)
    np.testing.assert_allclose(got, D * (0.01 - np.log(1.01)) / 2, rtol=0.01)


# The best step and the best preconditioner.


def exact_noise(C):
    return constant_sgd.GradientNoise(1, jnp.zeros(len(C)), jnp.asarray(np.diag(C), jnp.float32))


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, None, 0, None, 0))
def kl_of_sgd(A, C, eps, momentum, H):
    """Of many steps eps and preconditioners H at once, with MANY examples."""
    sigma = constant_sgd.stationary_covariance(A, C, eps, S, momentum=momentum, preconditioner=H)
    return constant_sgd.kl_to_posterior(sigma, A, MANY)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_the_kl_over_steps_is_least_where_the_formula_says(momentum):
    """For any A and C; eps lambda is small of so many examples. The grid has steps of 2 %."""
    rng = np.random.default_rng(4)
    A, C = random_matrix(rng), random_matrix(rng)
    step = float(constant_sgd.optimal_step_size(exact_noise(C), MANY, S, momentum))
    steps = step * 1.02 ** np.arange(-60, 61)
    found = np.asarray(kl_of_sgd(A, C, steps, momentum, np.ones((121, D))))
    assert abs(np.argmin(found) - 60) <= 1
    assert found[0] > found[60] + 0.1 < found[-1]


@pytest.mark.parametrize("c", [1.0, 3.0])
def test_order_of_scalar_diagonal_and_full_where_noise_is_proportional_to_the_hessian(c):
    """The theorem: C = A, and C = 3 A, where a step three times as small mends it."""
    A = random_matrix(np.random.default_rng(5))
    C = c * A
    unit = float(constant_sgd.optimal_step_size(exact_noise(C), MANY, S)) * np.eye(D)
    diag = np.diag(constant_sgd.scale_by_variance(exact_noise(C), MANY, S).init(jnp.zeros(D))[0])
    full = 2 * S / MANY * np.linalg.inv(C)
    scalar_kl, diagonal_kl, full_kl = kl_of_sgd(A, C, np.ones(3), 0.0, np.stack([unit, diag, full]))
    assert scalar_kl > diagonal_kl + 0.01 > diagonal_kl > full_kl + 0.01
    assert full_kl < 1e-5
    # The best isotropic Gaussian, that of mean-field VI, and the posterior.
    best = (D / np.trace(A) * np.eye(D), np.diag(1 / np.diag(A)), np.linalg.inv(A))
    for H, wanted in zip((unit, diag, full), best, strict=True):
        sigma = MANY * constant_sgd.stationary_covariance(A, C, 1.0, S, preconditioner=H)
        np.testing.assert_allclose(sigma, wanted, rtol=1e-3, atol=1e-3 * wanted.max())
    # No diagonal around it is better: each of its numbers 10 % up and down.
    around = diag[None] * np.concatenate([1 + 0.1 * np.eye(D), 1 - 0.1 * np.eye(D)])[:, None]
    assert (kl_of_sgd(A, C, np.ones(2 * D), 0.0, around) > diagonal_kl + 1e-4).all()


def least_kl(A, C, start, directions):
    """KL of small steps, minimised over log H = start + directions @ x by SciPy in float64.

    Of Sigma in units of 1 / N and H in units of 2 S / N.
    """

    def kl(x):
        H = np.diag(np.exp(start + directions @ x))
        sigma = linalg.solve_continuous_lyapunov(H @ A, 2 * H @ C @ H)
        return oracle.kl(np.zeros(D), sigma, np.zeros(D), np.linalg.inv(A))

    found = optimize.minimize(kl, np.zeros(directions.shape[1]), method="BFGS")
    return kl(np.zeros(directions.shape[1])), found.fun


def test_order_where_noise_and_hessian_are_unrelated():
    """Minimised, the order holds; the diagonal's formula can be worse than the scalar's."""
    rng = np.random.default_rng(6)
    worse = 0
    for _ in range(12):
        A, C = random_matrix(rng), random_matrix(rng)
        scalar = np.full(D, np.log(D / np.trace(C)))
        by_formula, best = least_kl(A, C, scalar, np.ones((D, 1)))
        np.testing.assert_allclose(by_formula, best, atol=1e-6)
        diag, best_diag = least_kl(A, C, -np.log(np.diag(C)), np.eye(D))
        worse += diag > by_formula
        assert best_diag <= min(best, diag) + 1e-6
        full = linalg.solve_continuous_lyapunov(np.linalg.solve(C, A), 2 * np.linalg.inv(C))
        np.testing.assert_allclose(full, np.linalg.inv(A), rtol=1e-6, atol=1e-9)
    assert 0 < worse < 12


def test_the_full_preconditioner_of_finite_steps():
    """C = A: A^-1 / (N - S), as its docstring says; here N is only five times S."""
    A = random_matrix(np.random.default_rng(7))
    H = 2 * S / 20 * np.linalg.inv(A)
    got = constant_sgd.stationary_covariance(A, A, 1.0, S, preconditioner=H)
    np.testing.assert_allclose(got, np.linalg.inv(A) / (20 - S), rtol=1e-3, atol=1e-5)


# The transformations.


def test_preconditioners_scale_trees_and_keep_dtypes():
    rng = np.random.default_rng(8)
    C = random_matrix(rng)
    noise = constant_sgd.GradientNoise(1, as_params(np.zeros(D)), as_params(np.diag(C)))
    params = as_params(np.zeros(D))
    gradient = as_params(rng.normal(size=D))
    flat = oracle.flatten(gradient)
    for tx, wanted in (
        (constant_sgd.scale_by_variance(noise, N, S), flat / np.diag(C)),
        (constant_sgd.scale_by_variance(noise, N, S, damping=2.0), flat / (np.diag(C) + 2)),
        (constant_sgd.scale_by_covariance(C, N, S), np.linalg.solve(C, flat)),
    ):
        state = jax.jit(tx.init)(params)
        updates, _ = jax.jit(tx.update)(gradient, state)
        np.testing.assert_allclose(oracle.flatten(updates), 2 * S / N * wanted, rtol=1e-4)
        half, _ = tx.update(jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient), state)
        assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_iterate_averages_are_means_of_windows():
    tx = optax.chain(optax.sgd(1.0, momentum=0.5), constant_sgd.iterate_average(4))
    params = as_params([1.0, 2.0, 3.0])
    gradients = np.random.default_rng(9).normal(size=(12, D))

    def step(carry, gradient):
        params, opt_state = carry
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params, swagjax.get_state(opt_state))

    trees = {"b": jnp.float32(gradients[:, 0]), "w": jnp.float32(gradients[:, 1:])}
    _, (visited, states) = jax.lax.scan(step, (params, tx.init(params)), trees)
    assert states.num_collected.tolist() == [1, 2, 3, 4] * 3
    flat = np.column_stack([visited["b"], visited["w"]]).astype(float)
    means = np.column_stack([states.mean["b"], states.mean["w"]])
    np.testing.assert_allclose(means[3::4], flat.reshape(3, 4, D).mean(1), rtol=1e-5)
    np.testing.assert_allclose(means[5], flat[4:6].mean(0), rtol=1e-5)  # of a window that goes on


NOISE = constant_sgd.GradientNoise(1, jnp.zeros(2), jnp.ones(2))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: constant_sgd.optimal_step_size(NOISE, 0, 1), "num_data=0"),
        (lambda: constant_sgd.optimal_step_size(NOISE, 10, 0), "batch_size=0"),
        (lambda: constant_sgd.optimal_step_size(NOISE, 10, 1, 1.0), "momentum=1.0"),
        (lambda: constant_sgd.scale_by_variance(NOISE, 10, 1).init(jnp.ones(3)), "noise is of"),
        (
            lambda: constant_sgd.scale_by_variance(
                NOISE._replace(variance=jnp.array([0.0, 1.0])), 10, 1
            ).init(jnp.ones(2)),
            "damping=0.0: some variance is zero",
        ),
        (
            lambda: constant_sgd.scale_by_covariance(np.eye(2), 10, 1).init(jnp.ones(3)),
            r"covariance has shape \(2, 2\), and the parameters are 3",
        ),
        (
            lambda: constant_sgd.scale_by_covariance(np.ones((2, 2)), 10, 1).init(jnp.ones(2)),
            "covariance is not positive definite",
        ),
        (lambda: constant_sgd.iterate_average(0), "window=0"),
        (lambda: constant_sgd.iterate_average(2).update(1.0, None, 1.0), "state is a NoneType"),
        (
            lambda: constant_sgd.stationary_covariance(np.eye(2), np.eye(3), 0.1, 1),
            r"hessian \(2, 2\), noise_covariance \(3, 3\)",
        ),
        (
            lambda: constant_sgd.stationary_covariance(
                np.eye(2), np.eye(2), 0.1, 1, preconditioner=1.0
            ),
            r"preconditioner \(\)",
        ),
    ],
)
def test_wrong_uses_are_told(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_a_preconditioner_keeps_its_digits_for_gradients_of_bfloat16():
    """In bfloat16 H would be another matrix: what its entries leave of each other is 1/500."""
    C = np.array([[1.0, 0.998], [0.998, 1.0]])
    params, gradient = jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.bfloat16)
    tx = constant_sgd.scale_by_covariance(C, 2, 1)
    updates, _ = tx.update(gradient, tx.init(params))
    np.testing.assert_allclose(np.asarray(updates, float), 1 / C.sum(0), rtol=2**-8)


@pytest.mark.slow
def test_two_precisions_without_silent_promotion():
    """Leaves of float32 and float64, and matrices of both, under strict promotion."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        rng = np.random.default_rng(11)
        x = jnp.asarray(rng.normal(size=(20, 3)))
        params = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros(1, jnp.float64)}

        def loss(params, row):
            return (params["a"].astype(row.dtype) * row[:2]).sum() + (params["b"] * row[2:]).sum()

        wanted = np.cov(x.T, ddof=0)
        noise = constant_sgd.gradient_noise(loss, params, [x])
        np.testing.assert_allclose(noise.trace, np.trace(wanted), rtol=1e-6)
        covariance = constant_sgd.gradient_covariance(loss, params, [x])
        np.testing.assert_allclose(covariance, wanted, rtol=1e-5, atol=1e-6)
        tx = constant_sgd.scale_by_covariance(covariance, N, S)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
        assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
        step, C = jnp.float32(0.1), jnp.eye(2, dtype=jnp.float32)
        sigma = constant_sgd.stationary_covariance(np.eye(2), C, step, S)
        np.testing.assert_allclose(sigma, recursion(np.eye(2), np.eye(2), 0.1, 0, np.eye(2)))
        assert constant_sgd.kl_to_posterior(sigma.astype(jnp.float32), np.eye(2), 40) < 1


# SGD itself.


def kinds(noise, covariance):
    """Optimizers, each with the arguments of its stationary covariance."""
    step = constant_sgd.optimal_step_size(noise, N, S)
    by_variance = constant_sgd.scale_by_variance(noise, N, S)
    by_covariance = constant_sgd.scale_by_covariance(covariance, N, S)
    H = ravel_pytree(by_variance.init(noise.mean).preconditioner)[0]
    full = 2 * S / N * np.linalg.inv(covariance)
    slower = constant_sgd.optimal_step_size(noise, N, S, 0.8)
    momentum = optax.sgd(0.2, momentum=0.8)
    return {
        "scalar": (optax.sgd(step), (step, {})),
        "momentum": (optax.sgd(slower, momentum=0.8), (slower, {"momentum": 0.8})),
        "diagonal": (
            optax.chain(by_variance, momentum),
            (0.2, {"momentum": 0.8, "preconditioner": H}),
        ),
        "full": (optax.chain(by_covariance, optax.sgd(1.0)), (1.0, {"preconditioner": full})),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scalar", "momentum", "diagonal", "full"])
def test_linear_regression_has_the_predicted_covariances(kind):
    """Of iterates, and of averages where there is a formula; the posterior is the full one's."""
    data = linear_data()
    center, A, C = linear_truth(data)
    optimum = as_params(center)
    tx, (eps, options) = kinds(noise_of(squared_error, data, optimum), C)[kind]
    iterates, averages = run(squared_error, data, optimum, tx)
    predicted = constant_sgd.stationary_covariance(A, C, eps, S, **options)
    assert distance(iterates, predicted) < LIMIT
    if "momentum" not in options:
        window = constant_sgd.averaged_covariance(A, C, eps, S, WINDOW, **options)
        assert distance(averages, window) < LIMIT
    posterior = np.linalg.inv(N * A)
    np.testing.assert_allclose(np.trace(N * A @ np.cov(iterates.T)) / D, 1, atol=0.05)
    if kind == "full":
        np.testing.assert_allclose(np.cov(iterates.T), posterior, atol=0.08 * posterior.max())


@pytest.mark.slow
def test_where_the_model_is_wrong_averages_have_the_covariance_of_the_sandwich():
    """Noise of standard deviation 3, by the loss 1: the sandwich is 9 times the posterior."""
    data = linear_data(noise=3.0)
    center, A, C = linear_truth(data)
    tx, steps = optax.sgd(0.05), 10 * WINDOW
    _, averages = run(squared_error, data, as_params(center), tx, steps=2 * steps, window=steps)
    window = np.asarray(constant_sgd.averaged_covariance(A, C, 0.05, S, steps), float)
    assert distance(averages, window) < LIMIT
    sandwich = np.linalg.solve(A, np.linalg.solve(A, C).T) / N
    share = 10 * np.diag(window) / np.diag(sandwich)
    assert ((share > 0.8) & (share < 1)).all()
    assert (np.diag(sandwich) > 6 * np.diag(np.linalg.inv(N * A))).all()


@pytest.mark.slow
def test_reshuffled_minibatches_spread_less():
    """Why minibatches are drawn with replacement: half of the trace and less is left."""
    data = linear_data()
    center, A, C = linear_truth(data)
    optimum = as_params(center)
    tx, (eps, _) = kinds(noise_of(squared_error, data, optimum), C)["scalar"]
    iterates, averages = run(squared_error, data, optimum, tx, draw=draw_reshuffled, chains=1024)
    predicted = constant_sgd.stationary_covariance(A, C, eps, S)
    assert np.trace(np.cov(iterates.T)) < 0.7 * np.trace(predicted)
    window = constant_sgd.averaged_covariance(A, C, eps, S, WINDOW)
    assert np.trace(np.cov(averages.T)) < 0.4 * np.trace(window)


@functools.cache
def logistic_data():
    """Labels of a logistic model, the maximum of their likelihood, and the Hessian there."""
    rng = np.random.default_rng(10)
    x = rng.normal(size=(N, 2)) @ np.array([[1.0, 0.8], [0.0, 0.9]])
    X = np.column_stack([np.ones(N), x])
    y = rng.uniform(size=N) < 1 / (1 + np.exp(-X @ [0.2, 0.8, -0.5]))
    center = np.zeros(D)
    for _ in range(20):  # Newton's
        p = 1 / (1 + np.exp(-X @ center))
        A = X.T @ (X * (p * (1 - p))[:, None]) / N
        center = center - np.linalg.solve(A, X.T @ (p - y) / N)
    C = X.T @ (X * ((p - y) ** 2)[:, None]) / N
    return (x.astype(np.float32), y.astype(np.float32)), center, A, C


@functools.cache
def logistic_runs():
    """Of each kind the arguments of its stationary covariance, and iterates."""
    data, center, _, C = logistic_data()
    optimum = as_params(center)
    of = kinds(noise_of(logistic, data, optimum), C)
    return {
        kind: (eps, options, run(logistic, data, optimum, tx, steps=20 * WINDOW)[0])
        for kind, (tx, (eps, options)) in of.items()
    }


@pytest.mark.slow
def test_logistic_regression_has_the_predicted_covariances():
    """The loss is no parabola: 10 % is what 200 examples allow."""
    _, _, A, C = logistic_data()
    for eps, options, iterates in logistic_runs().values():
        predicted = np.asarray(constant_sgd.stationary_covariance(A, C, eps, S, **options), float)
        M = np.linalg.solve(predicted, np.cov(iterates.T))
        np.testing.assert_allclose(np.linalg.eigvals(M), 1, atol=0.15)


@pytest.mark.slow
def test_order_on_logistic_regression_against_nuts():
    """KL of the moments of SGD to those of NUTS: scalar, diagonal, full."""
    import blackjax

    (x, y), center, _, _ = logistic_data()
    optimum = as_params(center)

    def log_density(params):
        return -jax.vmap(logistic, (None, 0))(params, (x, y)).sum()

    warmup = blackjax.window_adaptation(blackjax.nuts, log_density)

    def sample(key):
        k1, k2 = jax.random.split(key)
        found, _ = warmup.run(k1, optimum, 300)
        kernel = blackjax.nuts(log_density, **found.parameters)

        def step(state, key):
            state, _ = kernel.step(key, state)
            return state, ravel_pytree(state.position)[0]

        return jax.lax.scan(step, found.state, jax.random.split(k2, 2000))[1]

    draws = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(1), 4))
    draws = np.asarray(draws, float).reshape(-1, D)
    mean, covariance = draws.mean(0), np.cov(draws.T)
    found = {}
    for kind, (_, _, iterates) in logistic_runs().items():
        moments = iterates.mean(0), np.cov(iterates.T)
        found[kind] = oracle.kl(*moments, mean, covariance)
    assert found["scalar"] > found["diagonal"] + 0.02 > found["full"] + 0.04
    assert abs(found["scalar"] - found["momentum"]) < 0.05
    assert found["full"] < 0.05
